"""Hyper-parameters learned by gradient descent, through the optimum of the training loss.

The weights of a logistic regression are the minimizer w*(p) of the training loss plus penalties exp(p) w^2 / 2. The
penalties p should minimize the validation loss at w*(p), which is a problem within a problem: bilevel optimization. The
minimizer is where the gradient of the training loss vanishes, so `root_find` finds it, and the implicit function
theorem gives the hypergradient: the derivative of the validation loss with respect to p. Look at:

- The hypergradient agrees with finite differences. The backward solve may use `ConjugateGradient`, as a Hessian allows.
- The explicit network, 50 unrolled steps of gradient descent, does not reach the minimum, and its gradient is wrong.
- A grid is no way to find 64 penalties, one per pixel. A hypergradient costs one linear solve for any number of them.
"""

import time
from collections.abc import Callable

import torch
from _report import COLORS, Row, panels, parse, save
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

import deepeq

ADJOINT = deepeq.ImplicitAdjoint(solver=deepeq.ConjugateGradient(rtol=1e-8, max_steps=2000))
Fit = Callable[[Tensor, Tensor], Tensor]  # of penalties, and weights to start from, to weights


class Task:
    """Digits of 8 x 8 pixels: 200 to train on, 400 to choose the penalties, the rest to test."""

    def __init__(self, seed: int) -> None:
        x, y = map(torch.tensor, load_digits(return_X_y=True))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        x, y = x[order] / 16, y[order]
        self.train, self.validation, self.test = ((x[a:b], y[a:b]) for a, b in ((0, 200), (200, 600), (600, None)))
        self.zero = x.new_zeros(64, 10)

    def gradient(self, w: Tensor, p: Tensor) -> Tensor:
        """Return the gradient of the training loss and of the penalties, one for each pixel or one for all."""
        x, y = self.train
        return x.T @ ((x @ w).softmax(dim=1) - one_hot(y, 10)) / len(x) + p.exp() * w

    def optimum(self, p: Tensor, w0: Tensor) -> Tensor:
        """Return the minimizer, differentiable with respect to `p`."""
        solver = deepeq.NewtonKrylov(rtol=0.0, atol=1e-9, max_steps=100)
        return deepeq.root_find(lambda w: self.gradient(w, p), w0, solver=solver, adjoint=ADJOINT, batch_dims=0).value

    def unrolled(self, p: Tensor, w0: Tensor) -> Tensor:
        """Return the weights after 50 steps of gradient descent from zero, with a graph of each."""
        w = self.zero
        for _ in range(50):
            w = w - self.gradient(w, p)
        return w

    def losses(self, p: Tensor, fit: Fit, w0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the validation loss and the test loss after a training, and the weights."""
        w = fit(p, w0)
        return *(cross_entropy(x @ w, y) for x, y in (self.validation, self.test)), w

    def slope_error(self, p: Tensor, fit: Fit) -> float:
        """Return the relative error of the hypergradient of all penalties together, against central differences."""
        slope = torch.autograd.functional.jacobian(lambda q: self.losses(q, fit, self.zero)[0], p)
        up, down = (self.losses(p + step, self.optimum, self.zero)[0] for step in (1e-4, -1e-4))
        return abs(slope.sum() / ((up - down) / 2e-4) - 1.0).item()


def learn(task: Task, p: Tensor, fit: Fit, steps: int) -> list[tuple[float, float]]:
    """Return the validation loss and the test loss of each step of hypergradient descent."""
    p, w, curve = p.clone().requires_grad_(), task.zero, []
    optimizer = torch.optim.Adam([p], lr=0.5)
    for _ in range(steps):
        validation, test, w = task.losses(p, fit, w.detach())
        curve.append((validation.item(), test.item()))
        optimizer.zero_grad()
        validation.backward()
        optimizer.step()
        p.data.clamp_(-10.0, 0.0)
    return curve


@torch.no_grad()
def grid(task: Task, values: Tensor) -> list[tuple[float, float]]:
    """Return the validation loss and the test loss for a few values of one penalty."""
    w, curve = task.zero, []
    for value in values:
        validation, test, w = task.losses(value.view(1, 1), task.optimum, w)
        curve.append((validation.item(), test.item()))
    return curve


if __name__ == "__main__":
    arguments, (figure, (left, right)) = parse("bilevel", __doc__), panels(2)
    few, many, points = (2, 3, 3) if arguments.fast else (10, 25, 11)
    values, first = torch.linspace(0.0, -10.0, points).double(), -2.0 if arguments.fast else -5.0
    p = torch.full((64, 1), first, dtype=torch.float64)
    runs = {
        "1 penalty, learned": lambda task: learn(task, p[:1], task.optimum, few),
        "1 penalty, unrolled": lambda task: learn(task, p[:1], task.unrolled, few),
        f"1 penalty, grid of {points}": lambda task: grid(task, values),
        "64 penalties, learned": lambda task: learn(task, p, task.optimum, many),
    }
    rows = [Row(name, int(name.split()[0]), arguments.seeds, [], []) for name in runs]
    details = {"test_loss": {name: [] for name in runs}, "slope_error": []}
    for seed in arguments.seeds:
        task, curves = Task(seed), {}
        details["slope_error"].append([task.slope_error(p, fit) for fit in (task.optimum, task.unrolled)])
        for row, run in zip(rows, runs.values(), strict=True):
            start, curves[row.model] = time.perf_counter(), run(task)
            row.seconds.append(time.perf_counter() - start)
            row.reached.append(min(curves[row.model])[0])
            details["test_loss"][row.model].append(min(curves[row.model])[1])
    for (name, curve), color in zip(curves.items(), (*COLORS[:2], COLORS[6], COLORS[2]), strict=False):
        axes, x = (left, values) if "grid" in name else (right, range(1, len(curve) + 1))
        axes.plot(x, [validation for validation, _ in curve], "o-", color=color, label=name)
    left.axhline(rows[0].reached[-1], color=COLORS[0], linestyle="--", label=rows[0].model)
    left.set(xlabel="logarithm of the penalty", title="A grid", ylabel="validation loss (lower is better)", ylim=(0, 1))
    right.set(xlabel="trainings", title="Hypergradient descent", ylim=(0, 1))
    _ = [axes.legend(fontsize=12) for axes in (left, right)]
    note = "A grid finds one penalty with less code. Most of what 64 penalties gain in validation is lost in the test."
    save(arguments, rows, figure, metric="validation loss", better="lower", target=0.235, note=note, details=details)
