"""The configuration of a run: one frozen dataclass for each part, and how each phase of a run solves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from deepeq.adjoint import Adjoint, ImplicitAdjoint
from deepeq.data import DataConfig
from deepeq.deq import Equilibrium, How, Pieces, Stack
from deepeq.models import ModelConfig
from deepeq.solution import Solution
from deepeq.solvers import GMRES, Anderson, ConjugateGradient, Solver
from deepeq.train.schedules import Cosine, Schedule, factor_at


@dataclass(frozen=True, kw_only=True)
class EquilibriumConfig:
    """How equilibria are found and differentiated in training, and the shallow stack that training starts with.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    # None, because jsonargparse carries a default's init_args to the class that a user chooses.
    solver: Solver | None = None
    """Forward solver in training; default `Anderson(rtol=1e-2, max_steps=12)`."""
    backward_solver: Solver | None = None
    """Solver of the backward fixed point; default `GMRES(rtol=1e-1, max_steps=8)`."""
    adjoint: Adjoint | None = None
    """How gradients are computed, if not exactly: `PhantomAdjoint`, `NeumannAdjoint` or `BackpropAdjoint`. None for
    `ImplicitAdjoint` with `backward_solver`."""
    eval_solver: Solver | None = None
    """Forward solver in evaluation and generation; default `Anderson(rtol=1e-3, max_steps=40)`."""
    pretrain_fraction: float = 0.2
    """Fraction of the steps that first train a shallow stack of the cell (Bai et al. 2019, appendix E); in [0, 1)."""
    pretrain_depth: int = 3
    """Number of layers of that stack."""
    pretrain_depth_schedule: Schedule | None = None
    """Factor of `pretrain_depth` over the steps of the stack, rounded up; None for none. A stack that grows comes close
    to its equilibrium."""
    piece_len: int | None = None
    """Largest number of positions that are solved together (appendix E); None for a whole segment."""
    jacobian_weight: float = 0.0
    """Weight of `jacobian_penalty` in the loss, which keeps the equilibrium easy to find; 0 for none. The shallow stack
    is penalized too."""
    jacobian_fraction: float = 0.5
    """Fraction of the steps that compute the penalty, evenly spread; in (0, 1]."""
    jacobian_schedule: Schedule | None = None
    """Factor of `jacobian_weight` from the first step after the shallow stack to the last; during the stack its first
    value applies. None for none."""
    tolerance_schedule: Schedule | None = None
    """Factor of the solver's `rtol` and `atol` over the same steps: `Geometric(start=10, end=1)` of `deepeq.train` goes
    from loose to tight."""
    step_limit_schedule: Schedule | None = None
    """Factor of the solver's `max_steps` over the same steps, rounded up."""

    def __post_init__(self) -> None:
        problems = self._problems()
        for name in ("solver", "eval_solver"):
            kind = type(getattr(self, name))
            if issubclass(kind, GMRES | ConjugateGradient):
                problems.append(
                    f"{name}={kind.__name__} solves linear equations; only equilibrium.backward_solver takes it"
                )
        if isinstance(self.adjoint, ImplicitAdjoint):
            problems.append("adjoint=ImplicitAdjoint is what backward_solver sets up: leave adjoint out")
        elif self.adjoint is not None and self.backward_solver is not None:
            problems.append(
                f"adjoint={type(self.adjoint).__name__} has no backward solve: leave backward_solver or adjoint out"
            )
        if self.piece_len is not None and self.jacobian_weight:
            problems.append(
                f"piece_len={self.piece_len!r} solves several maps, and the Jacobian penalty is of one: leave "
                "jacobian_weight out"
            )
        if self.pretrain_depth_schedule is not None and not self.pretrain_fraction:
            problems.append(
                f"pretrain_depth_schedule={self.pretrain_depth_schedule!r} needs a pretrain_fraction above 0"
            )
        if self.jacobian_schedule is not None and not self.jacobian_weight:
            problems.append(f"jacobian_schedule={self.jacobian_schedule!r} needs a jacobian_weight to multiply")
        if self.step_limit_schedule is not None and self.solver is not None:
            least = min(self.step_limit_schedule.factor(progress) for progress in (0.0, 1.0)) * self.solver.max_steps
            if least < self.solver.min_steps:
                problems.append(
                    f"step_limit_schedule={self.step_limit_schedule!r} brings solver.max_steps={self.solver.max_steps} "
                    f"down to {least:g}, below solver.min_steps={self.solver.min_steps}; lower min_steps"
                )
        if self.tolerance_schedule is not None and not min(map(self.tolerance_schedule.factor, (0.0, 1.0))) > 0.0:
            problems.append(f"tolerance_schedule={self.tolerance_schedule!r} must stay > 0")
        _raise("equilibrium", problems)

    def _problems(self) -> list[str]:
        rules = (
            ("pretrain_fraction", 0.0 <= self.pretrain_fraction < 1.0, "must lie in [0, 1)"),
            ("pretrain_depth", self.pretrain_depth >= 1, "must be a whole number >= 1"),
            ("piece_len", self.piece_len is None or self.piece_len >= 1, "must be a whole number >= 1"),
            ("jacobian_weight", 0.0 <= self.jacobian_weight < math.inf, "must be >= 0 and finite"),
            ("jacobian_fraction", 0.0 < self.jacobian_fraction <= 1.0, "must lie in (0, 1]"),
        )
        return [f"{name}={getattr(self, name)!r} {rule}" for name, holds, rule in rules if not holds]

    def with_defaults(self) -> "EquilibriumConfig":
        """Return the same configuration with the default solvers in place of None."""
        return replace(
            self,
            solver=self.solver or Anderson(rtol=1e-2, max_steps=12),
            backward_solver=self.backward_solver or (None if self.adjoint else GMRES(rtol=1e-1, max_steps=8)),
            eval_solver=self.eval_solver or Anderson(rtol=1e-3, max_steps=40),
        )

    def pretrain_steps(self, num_steps: int) -> int:
        """Return how many of the steps of a run train the shallow stack."""
        return math.ceil(self.pretrain_fraction * num_steps)

    def training_how(
        self,
        step: int,
        num_steps: int,
        validations: Sequence[float] = (),
        *,
        on_backward: Callable[[Solution], None] | None = None,
    ) -> How:
        """Return how a training step solves.

        Args:
            step: The step, counted from 0.
            num_steps: Number of steps of the run.
            validations: Losses on the validation text before the step, the oldest first.
            on_backward: Receives the Solution of each backward solve.
        """
        first = self.pretrain_steps(num_steps)
        if step < first:
            depth = self.pretrain_depth * factor_at(self.pretrain_depth_schedule, step, 0, first, validations)
            return Stack(depth=_rounded_up(depth))
        complete = self.with_defaults()
        solver, adjoint = complete.solver, complete.adjoint
        assert solver is not None
        if self.tolerance_schedule is not None:
            factor = factor_at(self.tolerance_schedule, step, first, num_steps, validations)
            solver = replace(solver, rtol=solver.rtol * factor, atol=solver.atol * factor)
        if self.step_limit_schedule is not None:
            factor = factor_at(self.step_limit_schedule, step, first, num_steps, validations)
            solver = replace(solver, max_steps=_rounded_up(solver.max_steps * factor))
        if adjoint is None:
            assert complete.backward_solver is not None
            adjoint = ImplicitAdjoint(solver=complete.backward_solver, on_failure="ignore", callback=on_backward)
        return self._in_pieces(Equilibrium(solver=solver, adjoint=adjoint, on_failure="ignore", verify=False))

    def evaluation_how(self) -> How:
        """Return how evaluation and generation solve."""
        solver = self.with_defaults().eval_solver
        assert solver is not None
        return self._in_pieces(Equilibrium(solver=solver, on_failure="ignore", verify=False))

    def jacobian_weight_at(self, step: int, num_steps: int, validations: Sequence[float] = ()) -> float:
        """Return the weight of the Jacobian penalty at a step; 0 for a step without the penalty.

        The steps with the penalty are spread evenly without a random number, so a resumed run takes the same ones.

        Args:
            step: Step of training, counted from 0.
            num_steps: Number of steps of the run.
            validations: Losses of the validations so far.
        """
        fraction = self.jacobian_fraction
        if math.floor((step + 1) * fraction) == math.floor(step * fraction):
            return 0.0
        first = self.pretrain_steps(num_steps)
        return self.jacobian_weight * factor_at(self.jacobian_schedule, step, first, num_steps, validations)

    def _in_pieces(self, how: Equilibrium) -> How:
        return how if self.piece_len is None else Pieces(equilibrium=how, length=self.piece_len)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The rule by which parameters follow the gradient, and the learning rate over the steps.

    Raises:
        ValueError: A field is out of range.
    """

    name: Literal["adamw", "muon", "sgd"] = "adamw"
    """`adamw` is Adam with decoupled weight decay, and plain Adam at `weight_decay=0`. `muon` makes the steps of the
    network's matrices orthogonal (Jordan et al. 2024), with `adamw` for all other parameters. `sgd` has no momentum."""
    lr: float = 2e-3
    """Learning rate at the end of the linear warm-up. The schedule multiplies it afterwards."""
    schedule: Schedule | None = None
    """Factor of `lr` from the end of the warm-up to the last step; default `Cosine(end=0.05)` of `deepeq.train`."""
    lr_warmup_steps: int = 50
    """Number of optimizer steps of the linear warm-up to `lr`."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of Adam's running means of the gradient and of its square."""
    weight_decay: float = 0.01
    """Weight decay of matrices; vectors have none."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this Euclidean norm."""

    def __post_init__(self) -> None:
        rules = (
            ("lr", 0.0 < self.lr < math.inf, "must be > 0 and finite"),
            ("betas", all(0.0 <= beta < 1.0 for beta in self.betas), "must lie in [0, 1)"),
            ("lr_warmup_steps", self.lr_warmup_steps >= 0, "must be a whole number >= 0"),
            ("weight_decay", 0.0 <= self.weight_decay < math.inf, "must be >= 0 and finite"),
            ("max_gradient_norm", self.max_gradient_norm > 0.0, "must be > 0"),
        )
        _raise("optimizer", [f"{name}={getattr(self, name)!r} {rule}" for name, holds, rule in rules if not holds])

    def with_defaults(self) -> "OptimizerConfig":
        """Return the same configuration with the default schedule in place of None."""
        return replace(self, schedule=self.schedule or Cosine(end=0.05))

    def lr_at(self, step: int, num_steps: int, validations: Sequence[float] = ()) -> float:
        """Return the learning rate of a step counted from 0: a linear warm-up, then the schedule.

        Args:
            step: The step, counted from 0.
            num_steps: Number of steps of the run.
            validations: Losses on the validation text before the step, the oldest first.
        """
        if step < self.lr_warmup_steps:
            return self.lr * (step + 1) / self.lr_warmup_steps
        schedule = self.with_defaults().schedule
        return self.lr * factor_at(schedule, step, self.lr_warmup_steps, num_steps, validations)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and intervals of a run.

    Raises:
        ValueError: A field is out of range, or two fields contradict each other.
    """

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 16
    """Number of contiguous streams of the corpus that are trained side by side, in all processes together."""
    segment_len: int = 64
    """Number of tokens of a stream in one step."""
    eval_batch_size: int = 16
    """Number of streams of the validation and test text."""
    eval_segment_len: int | None = None
    """Number of tokens of a stream in one call of evaluation; None for `segment_len`."""
    eval_every: int = 500
    """Number of optimizer steps between two validations."""
    checkpoint_every: int = 500
    """Number of optimizer steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Number of last checkpoints that are kept."""
    log_every: int = 20
    """Number of optimizer steps between two lines of metrics."""
    seed: int = 0
    """Seed of the initial weights, of dropout and of the sample."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Arithmetic of training. With `bf16-mixed`, solvers and evaluation stay in float32."""
    accumulate: int = 1
    """Number of parts that a process splits its rows of a batch into before a step; less memory, the same gradient."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How processes that `torchrun` started work together. With `ddp` (and `auto`) each has a copy of the model, with
    `fsdp` each holds a part of the parameters, gradients and optimizer state."""
    wandb_project: str | None = None
    """Weights & Biases project that also gets the metrics; None for none."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "segment_len", "eval_batch_size", "eval_every", "checkpoint_every")
        counts += ("log_every", "keep_checkpoints", "accumulate", "eval_segment_len")
        values = {name: getattr(self, name) for name in counts}
        problems = [
            f"{name}={value!r} must be a whole number >= 1"
            for name, value in values.items()
            if value is not None and value < 1
        ]
        if self.batch_size % max(1, self.accumulate):
            problems.append(f"batch_size={self.batch_size!r} must be a multiple of accumulate={self.accumulate!r}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed={self.seed!r} must lie in [0, 2^63)")
        _raise("train", problems)


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """The folder of a run.

    Raises:
        ValueError: `dir` is empty.
    """

    name: str = "run"
    """First part of the default folder's name."""
    dir: str | None = None
    """The run folder; default `runs/NAME-DATE-TIME`."""

    def __post_init__(self) -> None:
        if self.dir == "":
            raise ValueError("run.dir='' must name a folder")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about a run; a recipe is this in YAML.

    Raises:
        ValueError: The parts contradict each other.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    equilibrium: EquilibriumConfig = field(default_factory=EquilibriumConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    run: FolderConfig = field(default_factory=FolderConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", self.optimizer.with_defaults())
        if self.model.depth == 0:
            object.__setattr__(self, "equilibrium", self.equilibrium.with_defaults())
        elif self.equilibrium != EquilibriumConfig():
            raise ValueError(
                f"equilibrium is set, but model.depth={self.model.depth!r} makes an explicit network, which has none: "
                "leave equilibrium out, or set model.depth to 0"
            )

    @property
    def eval_segment_len(self) -> int:
        """Number of tokens of a stream in one call of evaluation."""
        return self.train.eval_segment_len or self.train.segment_len

    def training_how(
        self, step: int, validations: Sequence[float], on_backward: Callable[[Solution], None]
    ) -> How | None:
        """Return how a training step solves; None for an explicit network.

        Args:
            step: Step of training, counted from 0.
            validations: Losses of the validations so far.
            on_backward: Called with the Solution of each backward solve.
        """
        if self.model.depth:
            return None
        return self.equilibrium.training_how(step, self.train.steps, validations, on_backward=on_backward)

    def evaluation_how(self) -> How | None:
        """Return how evaluation and generation solve; None for an explicit network."""
        return None if self.model.depth else self.equilibrium.evaluation_how()


def _rounded_up(count: float) -> int:
    # Rounding can put a factor slightly above a whole number, which must not add one.
    return max(1, math.ceil(count - 1e-9))


def _raise(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(f"{owner}.{problem}" for problem in problems))
