"""Plain and damped fixed-point iteration."""

from dataclasses import dataclass

from torch import Tensor

from deepeq.solvers.base import Solver


@dataclass(frozen=True, kw_only=True)
class FixedPointIteration(Solver):
    """`z <- damping z + (1 - damping) f(z)`: the infinitely deep stack (Bai et al. 2019, eq. 5).

    Converges where the spectral radius of the (damped) Jacobian is below one, which is rarely true of trained
    cells. It keeps no history.
    """

    damping: float = 0.0
    """Fraction of the old iterate that is kept; 0 means none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_damping(self.damping)

    @property
    def num_stored(self) -> int:
        return 0

    def init(self, z0: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, g: Tensor, state: None) -> tuple[Tensor, None]:
        return (fz if self.damping == 0.0 else fz.lerp(z, self.damping)), None
