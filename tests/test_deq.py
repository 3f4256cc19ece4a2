"""The ways to solve as values: what they compute, what they refuse, and that a module is a cell and such a value."""

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    Cell,
    Equilibrium,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Pieces,
    Result,
    Solution,
    Stack,
    Subsequences,
    Unrolled,
    fixed_point,
)
from deepeq.cell import prepare

SOLVER = Anderson(rtol=1e-10, max_steps=200)


class Chain(Cell):
    """`z_t = tanh(W z_t + U z_{t-1} + x_t)`; the memory is the state before the first position."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(scale * torch.linalg.qr(torch.randn(3, 3))[0]) for scale in (0.5, 0.4))
        self.double()

    def inject(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x[:, :1]) if memory is None else memory

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        x, memory = injection
        return torch.tanh(z @ self.w.T + torch.cat([memory, z[:, :-1]], dim=1) @ self.u.T + x)

    def extend_memory(self, memory: Tensor | None, x: Tensor, z: Tensor, *, length: int | None = None) -> Tensor:
        return z[:, -1:]


HOWS = {
    "equilibrium": (Equilibrium(solver=SOLVER), lambda cell: DEQ(cell, solver=SOLVER)),
    "stack": (Stack(depth=4, no_grad_depth=2), lambda cell: Unrolled(cell, 4, no_grad_depth=2)),
    "pieces": (
        Pieces(equilibrium=Equilibrium(solver=SOLVER), length=2),
        lambda cell: Subsequences(DEQ(cell, solver=SOLVER), 2),
    ),
}
hows = pytest.mark.parametrize(("how", "make"), HOWS.values(), ids=list(HOWS))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@hows
def test_module_solves_as_its_value_does(how: Any, make: Any) -> None:
    cell, x, z0, memory = Chain(), draw(2, 5, 3), draw(2, 5, 3), draw(2, 1, 3)
    layer = make(cell)
    assert layer.how == how
    for value, module in ((how(cell, x), layer(x)), (how(cell, x, z0, memory), layer(x, z0, memory))):
        assert isinstance(value, Solution)
        assert torch.equal(value.value, module.value)
        gradients = [torch.autograd.grad(s.value.square().sum(), list(cell.parameters())) for s in (value, module)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@hows
def test_value_is_frozen_compared_by_its_fields_and_can_be_copied(how: Any, make: Any) -> None:
    for name in vars(how):
        with pytest.raises(FrozenInstanceError):
            setattr(how, name, None)
    assert copy.deepcopy(how) == how == pickle.loads(pickle.dumps(how)) == replace(how)
    assert str(how) in repr(make(Chain()))


@pytest.mark.parametrize("name", ["solver", "adjoint"])
def test_rules_of_a_module_cannot_be_assigned(name: str) -> None:
    layer = DEQ(Chain())
    with pytest.raises(AttributeError):
        setattr(layer, name, getattr(layer, name))
    assert getattr(layer, name) is getattr(layer.how, name)


def test_equilibrium_is_fixed_point_of_the_prepared_map() -> None:
    cell, x, steps = Chain(), draw(2, 5, 3), []
    how = Equilibrium(solver=SOLVER, on_failure="raise")
    f, z0 = prepare(cell, x)
    expected = fixed_point(f, z0, solver=SOLVER, keep=[1], on_failure="raise")
    for solution in (
        how(cell, x, keep=[1], callback=lambda step, z, residual: steps.append(step)),
        how.solve(f, z0, keep=[1]),
    ):
        assert torch.equal(solution.value, expected.value)
        assert torch.equal(solution.kept[0], expected.kept[0])
    assert steps == list(range(1, int(expected.num_steps.max()) + 1))
    segments = torch.tensor([0, 0])
    assert how(cell, x, segments=segments).relative_residual.shape == (1,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adjoint", PhantomAdjoint()),
        ("norm", "whole"),
        ("batch_dims", 0),
        ("on_failure", "raise"),
        ("nonfinite", "keep"),
        ("verify", False),
    ],
)
def test_every_field_of_an_equilibrium_reaches_the_solve(name: str, value: Any, monkeypatch: Any) -> None:
    seen = {}
    monkeypatch.setattr("deepeq.deq.fixed_point", lambda f, z0, **options: seen.update(options))
    Equilibrium(**{name: value})(Chain(), draw(2, 4, 3))
    assert seen[name] == value


def test_stack_runs_its_layers_and_differentiates_the_last_ones() -> None:
    cell, x = Chain(), draw(2, 5, 3)
    f, z = prepare(cell, x)
    states = []
    for layer in range(6):
        z = f(z)
        states.append(z)
        z = z.detach() if layer == 1 else z
    solution = Stack(depth=4, no_grad_depth=2, keep_every=2)(cell, x)
    assert torch.equal(solution.value, states[-1])
    assert torch.equal(solution.kept[0], states[3])
    assert solution.num_evals == 6
    assert solution.result is Result.MAX_STEPS
    expected, actual = (torch.autograd.grad(value.sum(), cell.w)[0] for value in (z, solution.value))
    torch.testing.assert_close(actual, expected)


def test_pieces_are_the_whole() -> None:
    cell, x = Chain(), draw(2, 7, 3)
    equilibrium = Equilibrium(solver=SOLVER, adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-10)))
    whole, pieces = equilibrium(cell, x), Pieces(equilibrium=equilibrium, length=3)(cell, x)
    torch.testing.assert_close(pieces.value, whole.value, rtol=1e-8, atol=1e-8)
    gradients = [torch.autograd.grad(solution.value.sum(), cell.u)[0] for solution in (whole, pieces)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Equilibrium(solver="broyden"), TypeError, "solver='broyden' must be a Solver"),
        (lambda: Equilibrium(adjoint=GMRES()), TypeError, "adjoint=GMRES.* must be an Adjoint"),
        (lambda: Equilibrium(norm="l1"), ValueError, "norm='l1' must be one of"),
        (lambda: Equilibrium(on_failure="warm"), ValueError, "on_failure='warm' must be one of"),
        (lambda: Equilibrium(nonfinite="drop"), ValueError, "nonfinite='drop' must be one of"),
        (lambda: Equilibrium(batch_dims=-1), ValueError, "batch_dims=-1 of Equilibrium must be a whole number >= 0"),
        (lambda: Stack(depth=0), ValueError, "depth=0 of Stack must be a whole number >= 1"),
        (lambda: Stack(depth=True), ValueError, "depth=True of Stack must be a whole number >= 1"),
        (lambda: Stack(depth=2, no_grad_depth=-1), ValueError, "no_grad_depth=-1 of Stack must be a whole number"),
        (lambda: Stack(depth=2, keep_every=0.5), ValueError, "keep_every=0.5 of Stack must be a whole number >= 0"),
        (lambda: Pieces(equilibrium=Stack(depth=2), length=3), TypeError, "equilibrium must be an Equilibrium, got St"),
        (lambda: Pieces(equilibrium=Equilibrium(), length=0), ValueError, "length=0 of Pieces must be a whole number"),
        (
            lambda: Pieces(equilibrium=Equilibrium(batch_dims=2), length=3),
            ValueError,
            "batch_dims=2 of the equilibrium",
        ),
    ],
)
def test_mistakes_are_named_when_the_value_is_built(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_defaults_are_those_of_fixed_point() -> None:
    assert Equilibrium() == Equilibrium(solver=Anderson(), adjoint=ImplicitAdjoint(), batch_dims=1, norm="parts")
    assert DEQ(Chain()).how == Equilibrium()
    other = Equilibrium(solver=FixedPointIteration(), adjoint=NeumannAdjoint())
    assert DEQ(Chain(), solver=FixedPointIteration(), adjoint=NeumannAdjoint()).how == other
