"""A fixed point in two dimensions, found in three ways.

A deep network applies layer after layer. If every layer is the same map `f`, the state usually settles at a point that
another layer does not change, the equilibrium `z* = f(z*)`. A deep equilibrium model computes that point directly. The
left picture shows the way of each solver from `z = 0` to `z*`:

- plain iteration `z <- f(z)` is the infinitely deep network itself, and spirals slowly inwards;
- Anderson acceleration combines the last few states;
- Broyden's method builds an estimate of the inverse Jacobian of `f(z) - z`, and takes nearly Newton's steps.

The right picture shows what each evaluation of `f` buys. The gradient of the equilibrium needs none of these steps: it
follows from `z* = f(z*)` alone. The script compares it with finite differences.

    python examples/fixed_point.py
"""

import time

import torch
from _report import COLORS, Row, panels, parse, save

import deepeq

TOLERANCE = 1e-6
SOLVERS = {
    "Broyden": deepeq.Broyden(rtol=TOLERANCE, max_steps=30),
    "Anderson": deepeq.Anderson(rtol=TOLERANCE, history_size=2, max_steps=30),
    "plain iteration": deepeq.FixedPointIteration(rtol=TOLERANCE, max_steps=400),
}


def make_map(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `W` and `x` of the map `tanh(W z + x)`: `W` turns the plane by a random angle."""
    generator = torch.Generator().manual_seed(seed)
    angle = 1.6 + 0.5 * torch.rand((), generator=generator, dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    return turn, 0.4 * torch.rand(1, 2, generator=generator, dtype=torch.float64) + 0.2


def gradient_error(weight: torch.Tensor, x: torch.Tensor) -> float:
    """Return the difference of the implicit gradient and central differences, relative to the gradient."""

    def loss(x: torch.Tensor) -> torch.Tensor:
        solver = deepeq.Broyden(rtol=1e-13, max_steps=60)
        adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-12))
        start = torch.zeros_like(x)
        z = deepeq.fixed_point(lambda z: torch.tanh(z @ weight.T + x), start, solver=solver, adjoint=adjoint).value
        return z.pow(2).sum()

    x = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(x), x)
    steps = 1e-4 * torch.eye(2, dtype=x.dtype)
    with torch.no_grad():
        numeric = torch.stack([(loss(x + step) - loss(x - step)) / 2e-4 for step in steps])
    return float((exact[0] - numeric).norm() / numeric.norm())


def main() -> None:
    """Solve one map for each seed, and draw that of the first."""
    arguments = parse("fixed_point", __doc__)
    evaluations: dict[str, list[float]] = {name: [] for name in SOLVERS}
    seconds: dict[str, list[float]] = {name: [] for name in SOLVERS}
    figure, (left, right) = panels(2)
    for seed in arguments.seeds:
        weight, x = make_map(seed)
        for (name, solver), color in zip(SOLVERS.items(), COLORS, strict=False):
            path, residuals = [], []

            def watch(step, z, residual, path=path, residuals=residuals):
                path.append(z[0].clone())
                residuals.append(residual.item())

            start = time.perf_counter()
            solution = deepeq.fixed_point(
                lambda z, weight=weight, x=x: torch.tanh(z @ weight.T + x),
                torch.zeros(1, 2, dtype=torch.float64),
                solver=solver,
                callback=watch,
            )
            seconds[name].append(time.perf_counter() - start)
            assert solution.converged.all()
            evaluations[name].append(float(solution.num_steps.item()))
            if seed == arguments.seeds[0]:
                trail = torch.stack(path).T
                width, order = (1.0, 1) if name == "plain iteration" else (3.0, 3)
                left.plot(*trail, "o-", color=color, markersize=3 + width, linewidth=width, zorder=order, label=name)
                right.semilogy(range(1, len(residuals) + 1), residuals, color=color, label=name)
                end = solution.value[0].detach()
    left.plot(*end, "*", color="black", markersize=18, label="equilibrium z*", zorder=4)
    left.set(xlabel="first component of z", ylabel="second component of z", title="Ways from 0 to the equilibrium")
    left.legend(fontsize=12)
    right.axhline(TOLERANCE, color="gray", linestyle=":")
    right.set(xlabel="evaluations of f", ylabel="relative residual (lower is better)", xlim=(0, 80), ylim=(1e-9, 10))
    right.set_title("What each evaluation buys")
    right.legend(fontsize=12)
    rows = [Row(name, None, arguments.seeds, evaluations[name], seconds[name]) for name in SOLVERS]
    save(
        arguments,
        rows,
        figure,
        metric=f"evaluations of f to a relative residual of {TOLERANCE:g}",
        better="lower",
        target=15.0,
        note="A solver pays where f is expensive: for a map this cheap, plain iteration needs less time a step.",
        details={"gradient_error": max(gradient_error(*make_map(seed)) for seed in arguments.seeds)},
    )


if __name__ == "__main__":
    main()
