"""Draw docs/figures/overview.png: a stack of equal layers beside one layer that solvers bring to its equilibrium.

    python docs/figures/overview.py

The residuals are those of a real cell with random weights, whose spectral radius is above one.
"""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import deepeq

BLUE, ORANGE, GRAY = "#3b6ea5", "#d9772b", "0.35"


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


def box(axes, x: float, y: float, text: str, color: str, width: float = 1.5, height: float = 0.5) -> None:
    """Draw a layer."""
    style = "round,pad=0.02,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=style, color=color))
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=11)


def arrow(axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    """Draw an arrow."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={curve}", arrowstyle="-|>", mutation_scale=13, color=GRAY, lw=1.4
        )
    )


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(10.0, 3.5), layout="constrained")
    stack, layer, curves = figure.subplots(1, 3, width_ratios=[1, 1.15, 1.7])
    for axes in (stack, layer):
        axes.set(xlim=(0, 4), ylim=(0, 5))
        axes.axis("off")
    stack.set_title("a stack: every layer is stored", fontsize=11)
    for index, (y, text) in enumerate([(0.9, "f(z, x)"), (1.9, "f(z, x)"), (3.6, "f(z, x)")]):
        box(stack, 2.4, y, text, BLUE)
        arrow(stack, (0.75, y), (1.6, y))
        stack.text(0.55, y, "x", ha="center", va="center", fontsize=11)
        if index < 2:
            arrow(stack, (2.4, y + 0.28), (2.4, y + 0.72))
    stack.text(2.4, 2.82, "⋮", ha="center", va="center", fontsize=15)
    arrow(stack, (2.4, 3.05), (2.4, 3.33))
    arrow(stack, (2.4, 3.88), (2.4, 4.45))
    stack.text(2.4, 4.65, "output", ha="center", va="center", fontsize=11)
    arrow(stack, (2.4, 0.2), (2.4, 0.62))
    layer.set_title("a DEQ: one layer at its equilibrium", fontsize=11)
    box(layer, 2.1, 2.2, "f(z, x)", ORANGE)
    layer.text(0.3, 2.2, "x", ha="center", va="center", fontsize=11)
    arrow(layer, (0.5, 2.2), (1.3, 2.2))
    arrow(layer, (2.85, 2.35), (2.85, 2.05), curve=-2.6)
    layer.text(3.75, 2.2, "solver", ha="center", va="center", fontsize=10, color=GRAY, rotation=90)
    arrow(layer, (2.1, 2.5), (2.1, 3.5))
    layer.text(2.1, 3.8, "z* = f(z*, x)", ha="center", va="center", fontsize=12)
    layer.text(2.1, 0.9, "exact gradient from\none stored layer", ha="center", va="center", fontsize=10, color=GRAY)
    for (name, values), color in zip(residuals().items(), (BLUE, ORANGE, "#4a8f4a"), strict=True):
        curves.semilogy(range(1, len(values) + 1), values, label=name, color=color, linewidth=1.8)
    curves.set(xlabel="evaluations of f", ylabel="relative residual", xlim=(0, 41))
    curves.set_title("finding the equilibrium", fontsize=11)
    curves.grid(alpha=0.3)
    curves.legend(fontsize=10)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=120)
