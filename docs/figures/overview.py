"""Draw docs/figures/overview.png: a stack of equal layers beside one layer that solvers bring to its equilibrium.

    python docs/figures/overview.py

The residuals are those of a real cell with random weights, whose spectral radius is above one.
"""

from pathlib import Path

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import deepeq

COLORS, GRAY = ("#0072B2", "#D55E00"), "0.35"
SIZES = ("font.size", "axes.titlesize", "axes.labelsize", "legend.fontsize")


class Cell(torch.nn.Module):
    """A dense cell with random weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        torch.nn.init.orthogonal_(self.linear.weight, gain=1.05)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `tanh(W z + x)`."""
        return torch.tanh(self.linear(z) + x)


def residuals() -> dict[str, list[float]]:
    """Return the largest relative residual of eight problems at each evaluation, by stacking and by two solvers."""
    torch.manual_seed(0)
    cell, x = Cell(64), 0.3 * torch.randn(8, 64)
    solvers = {
        "stacking, z ← f(z)": deepeq.FixedPointIteration(rtol=1e-6, max_steps=40),
        "Anderson": deepeq.Anderson(rtol=1e-6, max_steps=40),
        "Broyden": deepeq.Broyden(rtol=1e-6, max_steps=40),
    }
    layer = deepeq.DEQ(cell, on_failure="ignore")
    with torch.no_grad():
        return {name: layer(x, solver=rule).residual_history.amax(dim=1).tolist() for name, rule in solvers.items()}


def box(axes, x: float, y: float, color: str) -> None:
    """Draw a layer."""
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x - 0.85, y - 0.36), 1.7, 0.72, boxstyle=style, color=color))
    axes.text(x, y, "f(z, x)", color="white", ha="center", va="center", fontsize=20)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    """Draw an arrow."""
    line = {"connectionstyle": f"arc3,rad={curve}", "arrowstyle": "-|>", "mutation_scale": 22, "color": GRAY, "lw": 2}
    axes.add_patch(FancyArrowPatch(start, end, **line))


def text(axes, x: float, y: float, words: str, color: str = "black") -> None:
    """Write centered words."""
    axes.text(x, y, words, ha="center", va="center", fontsize=20, color=color)


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(10.0, 8.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1])
    stack, layer, curves = (figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1, :]))
    for axes in (stack, layer):
        axes.set(xlim=(0, 4), ylim=(0, 5))
        axes.axis("off")
    stack.set_title("a stack stores every layer")
    for y in (0.75, 1.85, 3.85):
        box(stack, 2.4, y, COLORS[0])
        arrow(stack, (0.75, y), (1.5, y))
        text(stack, 0.5, y, "x")
    text(stack, 2.4, 2.83, "⋮")
    for start, end in ((0.0, 0.37), (1.13, 1.47), (2.23, 2.6), (3.08, 3.47), (4.23, 4.6)):
        arrow(stack, (2.4, start), (2.4, end))
    text(stack, 2.4, 4.83, "output")
    layer.set_title("a DEQ stores one layer")
    box(layer, 2.0, 2.2, COLORS[1])
    text(layer, 0.15, 2.2, "x")
    arrow(layer, (0.4, 2.2), (1.1, 2.2))
    arrow(layer, (2.9, 2.4), (2.9, 2.0), curve=-2.6)
    text(layer, 3.75, 2.95, "solver", GRAY)
    arrow(layer, (2.0, 2.6), (2.0, 3.5))
    text(layer, 2.0, 3.85, "z* = f(z*, x)")
    text(layer, 2.0, 0.9, "exact gradient\nfrom this layer", GRAY)
    for name, values in residuals().items():
        curves.semilogy(range(1, len(values) + 1), values, label=name, linewidth=3)
    curves.set(xlabel="evaluations of f", ylabel="relative residual", xlim=(0, 41), title="finding the equilibrium")
    curves.legend()
    return figure


if __name__ == "__main__":
    # Larger letters than in other figures: the home page shows this one on phones too.
    with matplotlib.style.context(["deepeq.style", dict.fromkeys(SIZES, 20)]):
        draw().savefig(Path(__file__).with_suffix(".png"), dpi=100)
