"""Theorems 2 and 3: the constructed layer against what it stands for, in values and gradients."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq import (
    DEQ,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConvergenceError,
    FixedPointIteration,
    Result,
    Unrolled,
)
from deepeq.models import Memory, TrellisCell, TrellisConfig
from deepeq.universality import StackedCell, WeightTiedCell, stack, weight_tied
from tests.test_deq_pieces import ADJOINT, deq, draw, loss_of, make_transformer


class TanhCell(nn.Module):
    """A cell without `inject`, `z = tanh(W z + x)`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.6 * torch.linalg.qr(torch.randn(size, size))[0])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + x)


class WideningCell(TanhCell):
    """A cell with a state of another width than its input, a first state, a memory, and dropout in `inject`."""

    def __init__(self, size: int, *, d_input: int, dropout: float = 0.0) -> None:
        super().__init__(size)
        self.project = nn.Linear(d_input, size)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[str] = []

    def initial_state(self, x: Tensor) -> Tensor:
        self.calls.append("initial_state")
        return x.new_full((*x.shape[:-1], len(self.weight)), 0.25)

    def inject(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        self.calls.append("inject")
        return self.dropout(self.project(x)) + (0.0 if memory is None else memory)


def make_trellis() -> TrellisCell:
    return TrellisCell(TrellisConfig(d_input=4, d_hidden=10, d_output=8, kernel_size=3, dilation=2, init_std=0.6))


PAIRS: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "tanh_tanh": lambda: (TanhCell(4), TanhCell(4)),
    "tanh_widening": lambda: (TanhCell(4), WideningCell(6, d_input=4)),
    "widening_tanh": lambda: (WideningCell(6, d_input=4), TanhCell(6)),
    "widening_transformer": lambda: (WideningCell(8, d_input=4), make_transformer()),
    "trellisnet_transformer": lambda: (make_trellis(), make_transformer()),  # reads the output, not the state
    "weight_tied_tanh": lambda: (WeightTiedCell(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), TanhCell(5)),
}
pairs = pytest.mark.parametrize("make", PAIRS.values(), ids=list(PAIRS))


def assert_same(actual: Any, expected: Any, *, rtol: float = 1e-8) -> None:
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)


# --- theorem 2 -------------------------------------------------------------------------------------------------------


@pairs
def test_stack_equals_the_second_layer_after_the_first(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
    deq1, deq2 = (deq(cell.double()) for cell in make())
    x = draw(2, 5, 4).requires_grad_()
    leaves = [x, *deq1.parameters(), *deq2.parameters()]
    z1 = deq1(x).value
    z2 = deq2(deq1.cell.output(z1) if hasattr(deq1.cell, "output") else z1).value  # pyright: ignore
    expected = torch.autograd.grad(loss_of(z2), leaves)
    one = stack(deq1, deq2)
    solution = one(x)
    assert_same(solution.value, (z1, z2))
    assert_same(one.cell.output(solution.value), solution.value[1])  # pyright: ignore[reportCallIssue]
    assert_same(torch.autograd.grad(loss_of(solution.value[1]), leaves), expected)
    assert solution.result is Result.CONVERGED


def test_gradient_of_both_equilibria_is_the_sum() -> None:
    deq1, deq2 = deq(TanhCell(4)), deq(TanhCell(4))
    x = draw(3, 4).requires_grad_()
    leaves = [x, *deq1.parameters(), *deq2.parameters()]
    z1, z2 = stack(deq1, deq2)(x).value
    actual = torch.autograd.grad(loss_of(z1) + loss_of(z2.tanh()), leaves)
    z1 = deq1(x).value
    assert_same(actual, torch.autograd.grad(loss_of(z1) + loss_of(deq2(z1).value.tanh()), leaves))


@pytest.mark.parametrize("nested_first", [True, False])
def test_stacks_stack(nested_first: bool) -> None:
    a, b, c = deq(WideningCell(6, d_input=4)), deq(TanhCell(6)), deq(WideningCell(3, d_input=6))
    x = draw(2, 4).requires_grad_()
    leaves = [x, *(p for layer in (a, b, c) for p in layer.parameters())]
    za = a(x).value
    zb = b(za).value
    zc = c(zb).value
    expected = torch.autograd.grad(loss_of(zc), leaves)
    one = stack(stack(a, b), c) if nested_first else stack(a, stack(b, c))
    value = one(x).value
    assert_same(value, ((za, zb), zc) if nested_first else (za, (zb, zc)))
    output = one.cell.output(value)  # pyright: ignore[reportCallIssue]
    assert_same(output, zc)
    assert_same(torch.autograd.grad(loss_of(output), leaves), expected)


def test_stack_takes_a_pair_of_memories_and_each_gets_its_gradient() -> None:
    deq1, deq2 = deq(WideningCell(8, d_input=4)), deq(make_transformer())
    x, memory1 = draw(2, 5, 4), draw(2, 1, 8).requires_grad_()
    memory2 = Memory(draw(2, 3, 8).requires_grad_(), draw(2, 3, 8).requires_grad_())
    leaves = [memory1, *memory2]
    expected = torch.autograd.grad(loss_of(deq2(deq1(x, memory=memory1).value, memory=memory2).value), leaves)
    one = stack(deq1, deq2)
    assert_same(torch.autograd.grad(loss_of(one(x, memory=(memory1, memory2)).value[1]), leaves), expected)
    assert_same(one(x, memory=(None, memory2)).value[1], deq2(deq1(x).value, memory=memory2).value)
    assert_same(one(x, memory=(memory1, None)).value[0], deq1(x, memory=memory1).value)
    with pytest.raises(ValueError, match="pair"):
        one(x, memory=memory1)
    with pytest.raises(ValueError, match="TanhCell has no inject"):
        stack(deq(TanhCell(4)), deq(TanhCell(4)))(x, memory=(None, x))


def test_stack_extends_both_memories() -> None:
    one, x = stack(deq(make_trellis()), deq(make_transformer())), draw(2, 6, 4)
    assert isinstance(one.cell, StackedCell)
    memory, values = None, []
    for segment in x.split(2, dim=1):  # shorter than what the first cell remembers
        values.append(one(segment, memory=memory).value)
        memory = one.cell.extend_memory(memory, segment, values[-1])
    joined = pytree.tree_map(lambda *parts: torch.cat(parts, dim=1), *values)
    whole = one(x)
    assert whole.result is Result.CONVERGED
    assert_same(joined, whole.value)
    assert one.cell.extend_memory(memory, x, joined, length=4)[1].x.shape == (2, 4, 8)


def test_first_cell_is_prepared_once_and_the_second_at_every_evaluation() -> None:
    first, second = WideningCell(6, d_input=4), WideningCell(3, d_input=6)
    solution = stack(deq(first), deq(second))(draw(2, 4))
    assert first.calls.count("inject") == 1
    assert second.calls.count("inject") == solution.num_evals > 3
    assert second.calls.count("initial_state") == 1


def test_both_first_states_are_those_of_the_cells() -> None:
    one = stack(deq(WideningCell(6, d_input=4)), deq(TanhCell(6)))
    z1, z2 = one.cell.initial_state(draw(2, 4))  # pyright: ignore[reportCallIssue]
    assert (z1 == 0.25).all()
    assert torch.equal(z2, torch.zeros_like(z1))


@pytest.mark.parametrize("nested", [False, True])
def test_second_cell_draws_its_mask_once_per_solve(nested: bool) -> None:
    """A fresh mask at every evaluation would leave nothing to converge to."""
    second = deq(WideningCell(6, d_input=4, dropout=0.5))
    one = stack(deq(TanhCell(4)), stack(second, deq(TanhCell(6))) if nested else second)
    x = draw(8, 4)
    values = []
    for _ in range(2):
        solution = one(x)
        assert solution.result is Result.CONVERGED
        values.append(pytree.tree_leaves(solution.value)[1])
    assert not torch.allclose(*values, atol=1e-2)  # another solve, another mask
    assert torch.autograd.grad(values[0].sum(), second.cell.weight)[0].norm() > 0  # pyright: ignore


def test_random_numbers_of_the_caller_go_on_as_if_the_solve_drew_one() -> None:
    one, x = stack(deq(TanhCell(4)), deq(WideningCell(6, d_input=4, dropout=0.5))), draw(8, 4)
    after = []
    for _ in range(2):
        torch.manual_seed(7)
        one(x, z0=None)
        after.append(torch.rand(3))
    assert torch.equal(*after)
    torch.manual_seed(7)
    torch.randint(2**31, ())
    assert torch.equal(torch.rand(3), after[0])
    one.eval()
    torch.manual_seed(7)
    one(x)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))  # nothing is drawn in evaluation


def test_parameters_are_shared() -> None:
    deq1, deq2 = deq(TanhCell(4)), deq(TanhCell(4))
    one = stack(deq1, deq2)
    assert {id(p) for p in one.parameters()} == {id(p) for p in (*deq1.parameters(), *deq2.parameters())}
    clone = copy.deepcopy(one)
    assert {id(p) for p in clone.parameters()}.isdisjoint(id(p) for p in one.parameters())


def test_rules_are_those_of_the_second_layer_unless_given() -> None:
    deq1 = DEQ(TanhCell(4), solver=Anderson(), adjoint=BackpropAdjoint(), throw=True)
    deq2 = DEQ(TanhCell(4), solver=Broyden(rtol=1e-5), adjoint=ADJOINT)
    one = stack(deq1, deq2)
    assert one.how == replace(deq2.how, on_failure="raise")
    given = stack(deq1, deq2, solver=FixedPointIteration(max_steps=2), adjoint=BackpropAdjoint())
    assert (given.solver, given.adjoint) == (FixedPointIteration(max_steps=2), BackpropAdjoint())
    with pytest.raises(ConvergenceError):
        given(torch.randn(2, 4))


@pytest.mark.parametrize("name", ["deq1", "deq2"])
def test_stack_of_what_is_no_deq_raises(name: str) -> None:
    layers: dict[str, Any] = {"deq1": DEQ(TanhCell(4)), "deq2": DEQ(TanhCell(4))}
    layers[name] = Unrolled(TanhCell(4), 3)
    with pytest.raises(TypeError, match=f"{name} must be a DEQ, got Unrolled"):
        stack(**layers)


# --- theorem 3 -------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "one_layer": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()),
    "affine": lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)),
    "mixed": lambda: nn.Sequential(
        nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2), nn.Linear(2, 5), nn.GELU(), nn.Linear(5, 3), nn.Softplus()
    ),
    "no_bias": lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Sigmoid(), nn.Linear(6, 2), nn.Tanh()),
    "learned_in_place": lambda: nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 6), nn.ReLU(inplace=True)),
    "linear_end": lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)),
}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=list(NETWORKS))


def features(network: nn.Sequential, x: Tensor) -> list[Tensor]:
    """What each layer of the feed-forward network gives."""
    kept = []
    for i, module in enumerate(network):
        x = module(x)
        if i + 1 == len(network) or isinstance(network[i + 1], nn.Linear):
            kept.append(x)
    return kept


@networks
@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4)])
def test_weight_tied_network_equals_the_feed_forward_network(
    make: Callable[[], nn.Sequential], shape: tuple[int, ...]
) -> None:
    network, x = make().double(), draw(*shape).requires_grad_()
    leaves = [x, *network.parameters()]
    layer = weight_tied(network)
    assert isinstance(layer.cell, WeightTiedCell)
    value = layer(x).value
    assert_same(value, torch.cat(features(network, x), dim=-1), rtol=1e-12)
    output = layer.cell.output(value)
    assert_same(output, network(x), rtol=1e-12)
    assert layer.how.depth == sum(isinstance(module, nn.Linear) for module in network)
    expected = torch.autograd.grad(loss_of(network(x)), leaves)
    assert_same(torch.autograd.grad(loss_of(output), leaves), expected, rtol=1e-10)


@networks
def test_equilibrium_of_the_cell_is_the_feed_forward_network(make: Callable[[], nn.Sequential]) -> None:
    network, x = make().double(), draw(3, 4).requires_grad_()
    cell = WeightTiedCell(network)
    layer = DEQ(cell, solver=FixedPointIteration(rtol=1e-300, max_steps=cell.depth + 1), adjoint=ADJOINT)
    solution = layer(x)
    assert solution.converged.all()  # to the last bit, after one step more than there are layers
    assert (solution.relative_residual == 0.0).all()
    assert_same(cell.output(solution.value), network(x), rtol=1e-12)
    leaves = [x, *network.parameters()]
    expected = torch.autograd.grad(loss_of(network(x)), leaves)
    assert_same(torch.autograd.grad(loss_of(cell.output(solution.value)), leaves), expected, rtol=1e-10)


def test_jacobian_is_nilpotent() -> None:
    cell, x, z = WeightTiedCell(NETWORKS["mixed"]().double()), draw(1, 4), draw(1, 17)
    injection = cell.inject(x)
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, injection), z).reshape(17, 17)
    assert (torch.linalg.matrix_power(jacobian, cell.depth) == 0).all()
    assert (torch.linalg.matrix_power(jacobian, cell.depth - 1) != 0).any()


def test_matrix_is_that_of_the_theorem() -> None:
    """Eq. 19, block by block."""
    network = NETWORKS["mixed"]().double()
    cell, x = WeightTiedCell(network), draw(2, 4)
    weight, shift = cell.inject(x)
    linears = [module for module in network if isinstance(module, nn.Linear)]
    expected, row, column = torch.zeros(17, 17, dtype=torch.float64), 7, 0
    for layer in linears[1:]:
        expected[row : row + layer.out_features, column : column + layer.in_features] = layer.weight.detach()
        row, column = row + layer.out_features, column + layer.in_features
    assert torch.equal(weight, expected)
    assert_same(shift[:, :7], x @ linears[0].weight.T + linears[0].bias)
    assert torch.equal(shift[0, 7:], torch.cat([layer.bias for layer in linears[1:]]))


def test_matrix_is_built_once_per_solve() -> None:
    cell, seen = WeightTiedCell(NETWORKS["mixed"]().double()), []
    cell.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    Unrolled(cell, cell.depth)(draw(2, 4))
    assert len(seen) == cell.depth
    assert all(injection is seen[0] for injection in seen)


def test_pairs_are_taken_like_a_sequential() -> None:
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    x = torch.randn(5, 4)
    layer = weight_tied([(first, nn.Tanh()), (second, None)])
    torch.testing.assert_close(layer(x).value[:, 3:], second(first(x).tanh()))
    assert {id(p) for p in layer.parameters()} == {id(p) for p in (*first.parameters(), *second.parameters())}


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (nn.Sequential(), ValueError, "layers is empty"),
        (nn.Sequential(nn.Tanh()), TypeError, "layer 0 must start with a torch.nn.Linear, got Tanh"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 2)),
            TypeError,
            "layer 1 must start with a torch.nn.Linear, got Dropout",
        ),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(4, 2)), ValueError, "layer 1 takes 4 channels, but .* 3;"),
        ([(nn.Linear(4, 3), torch.tanh)], TypeError, "activation of layer 0 must be an element-wise"),
        ([(nn.Linear(4, 3), nn.Linear(3, 3))], TypeError, "activation of layer 0 must be an element-wise"),
        ([nn.Linear(4, 3), nn.Tanh()], TypeError, "pairs"),
        ([(nn.Tanh(), None)], TypeError, "layer 0 must start with a torch.nn.Linear, got Tanh"),
    ],
)
def test_network_of_another_structure_raises(layers: Any, error: type[Exception], message: str) -> None:
    for construct in (WeightTiedCell, weight_tied):
        with pytest.raises(error, match=message):
            construct(layers)


def test_weight_tied_network_takes_no_memory() -> None:
    with pytest.raises(ValueError, match="feed-forward network has none"):
        weight_tied(NETWORKS["affine"]())(torch.randn(2, 4), memory=torch.zeros(2))
