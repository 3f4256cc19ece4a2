"""Hypergradients: the derivative of a validation loss through the minimizer of a training loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepeq import (
    GMRES,
    Anderson,
    Broyden,
    ConvergenceWarning,
    ImplicitAdjoint,
    Result,
    Solution,
    Solver,
    fixed_point,
    root_find,
)
from deepeq.solvers.conjugate_gradient import ConjugateGradient
from tests.clients import dense

Weights = dict[str, Tensor]
NUM_FEATURES = 5
EXACT = Broyden(rtol=1e-12, max_steps=300, history_size=300)
BACKWARD = {
    "gmres": GMRES(rtol=1e-13, max_steps=100),
    "conjugate_gradient": ConjugateGradient(rtol=1e-13, max_steps=100),
}
backward_solvers = pytest.mark.parametrize("backward", BACKWARD.values(), ids=list(BACKWARD))


class Ridge:
    """Ridge regression with an intercept and one penalty per feature, as a task with a training and a validation set.

    The penalty is the hyperparameter: `log_penalty`, `(..., features)`. The inner variables are a dict of parameters
    without a batch dimension, as the parameters of a module are.
    """

    def __init__(self, log_penalty: Tensor, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, NUM_FEATURES, generator=generator, dtype=torch.float64)
        x = x * torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3], dtype=torch.float64)
        y = x @ torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0], dtype=torch.float64) + 0.7
        y = y + 0.5 * torch.randn(40, generator=generator, dtype=torch.float64)
        self.train_x, self.validation_x = x[:15], x[15:]
        self.train_y, self.validation_y = y[:15], y[15:]
        self.log_penalty = log_penalty

    @property
    def penalty(self) -> Tensor:
        return self.log_penalty.exp()

    def gradient(self, w: Weights) -> Weights:
        """The gradient of half the mean squared error and the penalty."""
        error = w["weight"] @ self.train_x.T + w["bias"] - self.train_y  # (..., samples)
        weight = error @ self.train_x / len(self.train_y) + self.penalty * w["weight"]
        return {"weight": weight, "bias": error.mean(dim=-1, keepdim=True)}

    def descent_step(self, w: Weights) -> Weights:
        gradient = self.gradient(w)
        return {name: part - 0.2 * gradient[name] for name, part in w.items()}

    def first_weights(self) -> Weights:
        zeros = torch.zeros_like(self.penalty)
        return {"weight": zeros, "bias": zeros[..., :1]}

    def validation_loss(self, w: Weights) -> Tensor:
        prediction = w["weight"] @ self.validation_x.T + w["bias"]
        return (prediction - self.validation_y).square().mean(dim=-1)

    def closed_form(self) -> Weights:
        ones = torch.ones(len(self.train_y), 1, dtype=torch.float64)
        design = torch.cat([self.train_x, ones], dim=1)
        penalty = torch.nn.functional.pad(self.penalty, (0, 1))
        normal = design.T @ design / len(design) + torch.diag_embed(penalty)
        solution = torch.linalg.solve(normal, (design.T @ self.train_y / len(design)).expand(penalty.shape))
        return {"weight": solution[..., :-1], "bias": solution[..., -1:]}


def by_descent(task: Ridge, batch_dims: int, backward: Solver) -> Solution:
    adjoint = ImplicitAdjoint(solver=backward)
    return fixed_point(task.descent_step, task.first_weights(), solver=EXACT, adjoint=adjoint, batch_dims=batch_dims)


def by_root(task: Ridge, batch_dims: int, backward: Solver) -> Solution:
    adjoint = ImplicitAdjoint(solver=backward)
    return root_find(task.gradient, task.first_weights(), solver=EXACT, adjoint=adjoint, batch_dims=batch_dims)


formulations = pytest.mark.parametrize("solve", [by_descent, by_root])


def log_penalties(*leading: int) -> Tensor:
    return torch.randn(*leading, NUM_FEATURES, dtype=torch.float64) - 1.5


def hypergradient(task: Ridge, w: Weights, penalty: Tensor) -> Tensor:
    return torch.autograd.grad(task.validation_loss(w).sum(), penalty)[0]


@formulations
@backward_solvers
def test_the_hypergradient_of_ridge_regression_is_that_of_the_closed_form(solve: Callable, backward: Solver):
    penalty = log_penalties().requires_grad_()
    task = Ridge(penalty)
    solution = solve(task, 0, backward)
    assert solution.result is Result.CONVERGED
    assert solution.relative_residual.shape == (1,)
    expected = task.closed_form()
    for name, part in solution.value.items():
        torch.testing.assert_close(part, expected[name], rtol=1e-9, atol=1e-10)
    actual, exact = hypergradient(task, solution.value, penalty), hypergradient(task, expected, penalty)
    torch.testing.assert_close(actual, exact, rtol=1e-8, atol=1e-11)


@formulations
@backward_solvers
def test_a_batch_of_penalties_has_the_hypergradient_of_each(solve: Callable, backward: Solver):
    penalty = log_penalties(4)
    penalty[2] -= 4.0  # almost no penalty: an ill-conditioned problem
    penalty.requires_grad_()
    task = Ridge(penalty)
    solution = solve(task, 1, backward)
    assert solution.result is Result.CONVERGED
    exact = hypergradient(task, task.closed_form(), penalty)
    torch.testing.assert_close(hypergradient(task, solution.value, penalty), exact, rtol=1e-7, atol=1e-10)


def test_conjugate_gradients_take_no_more_steps_than_there_are_parameters_and_a_few():
    penalty = log_penalties().requires_grad_()
    task = Ridge(penalty)
    steps: dict[str, int] = {}
    for name, backward in BACKWARD.items():

        def note(solution, name: str = name) -> None:
            steps[name] = int(solution.num_steps.max())

        adjoint = ImplicitAdjoint(solver=backward, callback=note)
        value = fixed_point(task.descent_step, task.first_weights(), solver=EXACT, adjoint=adjoint, batch_dims=0).value
        hypergradient(task, value, penalty)
    assert steps["conjugate_gradient"] <= NUM_FEATURES + 5
    assert steps["gmres"] <= NUM_FEATURES + 5


def test_conjugate_gradients_say_so_where_the_jacobian_is_not_symmetric():
    penalty = log_penalties().requires_grad_()
    task = Ridge(penalty)
    skewed = torch.eye(NUM_FEATURES, dtype=torch.float64)
    skewed[0, 1:] = 4.0  # a preconditioner makes the map of a symmetric problem unsymmetric

    def preconditioned(w: Weights) -> Weights:
        gradient = task.gradient(w)
        return {"weight": w["weight"] - 0.05 * gradient["weight"] @ skewed, "bias": w["bias"] - 0.2 * gradient["bias"]}

    def solve(backward: Solver) -> Tensor:
        adjoint = ImplicitAdjoint(solver=backward)
        value = fixed_point(preconditioned, task.first_weights(), solver=EXACT, adjoint=adjoint, batch_dims=0).value
        return hypergradient(task, value, penalty)

    exact = hypergradient(task, task.closed_form(), penalty)
    torch.testing.assert_close(solve(BACKWARD["gmres"]), exact, rtol=1e-8, atol=1e-11)
    with pytest.warns(ConvergenceWarning, match="backward pass.*"):
        solve(ConjugateGradient(rtol=1e-10, max_steps=12))


@backward_solvers
@pytest.mark.parametrize("solver", [EXACT, Anderson(rtol=1e-12, max_steps=500)], ids=["broyden", "anderson"])
def test_the_hypergradient_of_logistic_regression_is_that_of_dense_implicit_differentiation(
    solver, backward, generator
):
    x = torch.randn(20, NUM_FEATURES, generator=generator, dtype=torch.float64)
    y = (x[:, 0] + torch.randn(20, generator=generator, dtype=torch.float64) > 0).double()
    penalty, sample_weights = torch.tensor(-2.0, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    wanted = [penalty.requires_grad_(), sample_weights.requires_grad_()]

    def gradient(w: Tensor) -> Tensor:
        """The inner loss is differentiated by autograd, as in code that takes any model."""
        with torch.enable_grad():
            w = w if w.requires_grad else w.detach().requires_grad_()
            terms = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y, reduction="none")
            loss = (terms * sample_weights.softmax(dim=0)).sum() + 0.5 * penalty.exp() * w.square().sum()
            return torch.autograd.grad(loss, w, create_graph=True)[0]

    def loss_of(w: Tensor) -> Tensor:
        return (w - 0.3).square().sum()

    w0 = torch.zeros(NUM_FEATURES, dtype=torch.float64)
    adjoint = ImplicitAdjoint(solver=backward)
    root = root_find(gradient, w0, solver=solver, adjoint=adjoint, batch_dims=0).value
    actual = torch.autograd.grad(loss_of(root), wanted)
    descent = dense.equilibrium(lambda w: w - gradient(w), w0)
    torch.testing.assert_close(root, descent, rtol=1e-9, atol=1e-10)
    for a, b in zip(actual, dense.gradients(lambda w: w - gradient(w), descent, loss_of, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_hypergradient_descent_from_the_last_weights_lowers_the_validation_loss():
    penalty = torch.full((NUM_FEATURES,), 1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([penalty], lr=0.3)
    losses, weights = [], None
    for _ in range(20):
        task = Ridge(penalty)
        start = task.first_weights() if weights is None else weights
        solution = root_find(task.gradient, start, batch_dims=0)
        weights = solution.value
        loss = task.validation_loss(weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights = {name: part.detach() for name, part in weights.items()}
    assert losses[-1] < 0.5 * losses[0]
