"""A solve computes each parametrized weight once, without losing a gradient."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import deepeq
from deepeq.nn import (
    OncePerSolve,
    WeightDropout,
    hold_weights,
    infinity_norm,
    regularize_weight,
    spectral_norm,
    weight_norm,
)
from tests.nn.parts import EXACT, NORMALIZATIONS, Cell, Counting, FullCell, assert_all_close, gradients, x_of


@pytest.mark.parametrize(
    "adjoint",
    [
        deepeq.ImplicitAdjoint(),
        deepeq.ImplicitAdjoint(checkpoint=True),
        deepeq.ImplicitAdjoint(twice_differentiable=True),
        deepeq.PhantomAdjoint(steps=3),
        deepeq.NeumannAdjoint(terms=2),
        deepeq.BackpropAdjoint(),
    ],
    ids=repr,
)
def test_a_solve_computes_each_weight_once_with_a_graph(adjoint: deepeq.Adjoint) -> None:
    cell = Cell()
    counters = {}
    for name in ("first", "second"):
        counters[name] = Counting()
        register_parametrization(getattr(cell, name), "weight", counters[name])
    layer = deepeq.DEQ(OncePerSolve(cell), adjoint=adjoint)
    for counter in counters.values():
        counter.calls.clear()
    solution = layer(x_of())
    assert solution.num_evals > 3
    solution.value.square().sum().backward()
    assert [counter.calls for counter in counters.values()] == [[True], [True]]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in cell.parameters())
    layer(x_of())
    assert [len(counter.calls) for counter in counters.values()] == [2, 2]


def test_without_holding_every_evaluation_computes() -> None:
    """What the wrapper is for; and that holding weights changes nothing for those who use the cell directly."""
    cell = Cell()
    counter = Counting()
    register_parametrization(cell.first, "weight", counter)
    x = x_of()
    deepeq.DEQ(OncePerSolve(cell))(x)
    counter.calls.clear()
    solution = deepeq.DEQ(cell)(x)
    assert len(counter.calls) == solution.num_evals > 3


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_is_that_of_a_long_unrolling_with_the_normalization_inside(name: str, checkpoint: bool) -> None:
    cell = Cell()
    NORMALIZATIONS[name](cell)
    cell.eval()  # the vectors of both must be the same
    x = x_of().requires_grad_()
    adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-14, max_steps=60), checkpoint=checkpoint)
    layer = deepeq.DEQ(OncePerSolve(cell), solver=EXACT["solver"], adjoint=adjoint)
    weighting = torch.randn_like(x)
    z = torch.zeros_like(x)
    for _ in range(150):
        z = cell(z, x)
    solution = layer(x)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, z)
    expected = gradients((z * weighting).sum(), cell, retain_graph=True)
    expected += torch.autograd.grad((z * weighting).sum(), x)
    actual = gradients((solution.value * weighting).sum(), cell, retain_graph=True)
    actual += torch.autograd.grad((solution.value * weighting).sum(), x)
    assert_all_close(actual, expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in actual)


def test_gradient_in_training_is_the_closed_form() -> None:
    """`z = s v z + x` with a scalar state: `z = x / (1 - a)`, where the normalized weight `a` is `0.5 sign(w)`."""
    linear = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    weight_norm(linear)
    g = linear.parametrizations.weight.original0
    with torch.no_grad():
        g.fill_(0.5)
        linear.parametrizations.weight.original1.fill_(3.0)
    held = hold_weights(linear)
    x = torch.tensor([[2.0]], dtype=torch.float64)
    solution = deepeq.fixed_point(lambda z: held(z) + x, torch.zeros_like(x), **EXACT)
    solution.value.sum().backward()
    assert solution.value.item() == pytest.approx(4.0)
    assert g.grad is not None
    assert g.grad.item() == pytest.approx(2.0 / (1 - 0.5) ** 2)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_second_backward_with_retained_graph_repeats_the_first(checkpoint: bool) -> None:
    cell = Cell()
    NORMALIZATIONS["spectral"](cell)
    adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-13, max_steps=60), checkpoint=checkpoint)
    loss = deepeq.DEQ(OncePerSolve(cell), solver=EXACT["solver"], adjoint=adjoint)(x_of()).value.square().sum()
    first = gradients(loss, cell, retain_graph=True)
    second = gradients(loss, cell)
    assert_all_close(second, first)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_two_forwards_before_one_backward(checkpoint: bool) -> None:
    cell = Cell()
    spectral_norm(cell, bound=0.6, clip=False, num_steps=1)
    twin = copy.deepcopy(cell)
    adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-13, max_steps=60), checkpoint=checkpoint)
    layer = deepeq.DEQ(OncePerSolve(cell), solver=EXACT["solver"], adjoint=adjoint)
    inputs = [x_of(), x_of()]
    losses = [layer(x).value.square().sum() for x in inputs]
    together = gradients(losses[0] + 3 * losses[1], cell)
    layer.cell = OncePerSolve(twin)
    apart = [gradients(layer(x).value.square().sum(), twin) for x in inputs]
    assert_all_close(together, [a + 3 * b for a, b in zip(*apart, strict=True)])


def test_two_layers_share_a_module() -> None:
    cell = Cell()
    NORMALIZATIONS["spectral_clipped"](cell)
    cell.eval()
    x = x_of()
    one, two = (deepeq.DEQ(OncePerSolve(cell), **EXACT) for _ in range(2))
    chained = two(one(x).value).value
    z = x
    for _ in range(2):
        injection, z = z, torch.zeros_like(x)
        for _ in range(120):
            z = cell(z, injection)
    torch.testing.assert_close(chained, z)
    assert_all_close(gradients(chained.sum(), cell), gradients(z.sum(), cell))


def test_second_derivatives_pass_through_the_normalization() -> None:
    cell = Cell(3)
    NORMALIZATIONS["infinity"](cell)
    layer = deepeq.DEQ(
        OncePerSolve(cell),
        solver=deepeq.FixedPointIteration(rtol=1e-15, max_steps=300),
        adjoint=deepeq.ImplicitAdjoint(
            solver=deepeq.FixedPointIteration(rtol=1e-14, max_steps=300), twice_differentiable=True
        ),
    )
    original = cell.first.parametrizations.weight.original
    x = x_of(2, 3).requires_grad_()

    def penalty(value: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        return slope.square().sum()

    z = torch.zeros_like(x)
    for _ in range(80):
        z = cell(z, x)
    (expected,) = torch.autograd.grad(penalty(z), original)
    (actual,) = torch.autograd.grad(penalty(layer(x).value), original)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_without_gradients(name: str, guard: Callable[[], Any]) -> None:
    cell = Cell()
    NORMALIZATIONS[name](cell)
    layer, x = deepeq.DEQ(OncePerSolve(cell), **EXACT), x_of()
    with guard():
        layer(x)  # updates vectors in training
        layer.eval()
        value = layer(x).value
        assert not value.requires_grad
    with_graph = layer(x).value
    assert torch.equal(with_graph, value)
    layer.train()
    assert all(gradient.isfinite().all() for gradient in gradients(layer(x).value.sum(), cell))


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_autocast_keeps_norms_exact_and_gradients(name: str, checkpoint: bool) -> None:
    cell = Cell(16).float()
    NORMALIZATIONS[name](cell)
    cell.eval()
    x = torch.randn(4, 16)
    adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-2), checkpoint=checkpoint)
    layer = deepeq.DEQ(OncePerSolve(cell), solver=deepeq.FixedPointIteration(rtol=1e-2), adjoint=adjoint)
    plain = hold_weights(cell)
    expected = gradients(layer(x).value.square().sum(), cell)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held = hold_weights(cell)
        with held.in_place():
            weight = cell.first.weight
        with plain.in_place():
            assert torch.equal(weight, cell.first.weight), "a norm was computed in 16 bits"
        loss = layer(x).value.float().square().sum()
    actual = gradients(loss, cell)
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 0.1 * b.norm()


def test_user_module_of_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1))
            self.double()

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.body(z) + x)

    net = spectral_norm(Net(), bound=0.3)
    net.eval()
    x = x_of(2, 3, 5, 5)
    value = deepeq.DEQ(OncePerSolve(net), **EXACT)(x).value
    z = torch.zeros_like(x)
    for _ in range(120):
        z = net(z, x)
    torch.testing.assert_close(value, z)
    assert_all_close(gradients(value.sum(), net), gradients(z.sum(), net))


def test_plain_sequential_as_a_map() -> None:
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).double()
    infinity_norm(net, bound=0.8)
    counter = Counting()
    register_parametrization(net[0], "weight", counter)
    counter.calls.clear()
    x, held = x_of(), hold_weights(net)
    solution = deepeq.fixed_point(lambda z: held(z) + x, torch.zeros_like(x), **EXACT)
    solution.value.sum().backward()
    assert solution.converged.all()
    assert counter.calls == [True]
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_random_weights_are_drawn_once_per_solve() -> None:
    cell = Cell()
    for linear in (cell.first, cell.second):
        regularize_weight(linear, weight_norm=True, dropout=0.5)
        infinity_norm(linear, bound=0.8, clip=False)
    layer, x = deepeq.DEQ(OncePerSolve(cell), **EXACT), x_of()
    torch.manual_seed(3)
    solution = layer(x)
    assert solution.converged.all()
    torch.manual_seed(3)
    with torch.no_grad():
        weights = [linear.weight for linear in (cell.first, cell.second)]
    fixed = Cell()
    for linear, source, weight in zip((fixed.first, fixed.second), (cell.first, cell.second), weights, strict=True):
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_(source.bias)
    assert torch.equal(solution.value, deepeq.DEQ(fixed, **EXACT)(x).value)
    assert not torch.allclose(layer(x).value, solution.value), "the next solve draws anew"
    bare = nn.Linear(6, 6, dtype=torch.float64)
    register_parametrization(bare, "weight", WeightDropout(0.5), unsafe=True)
    held = hold_weights(bare)
    assert torch.equal(held(x), held(x))
    assert not torch.equal(bare(x), bare(x))


def test_cell_with_every_optional_method() -> None:
    cell = FullCell()
    counter = Counting()
    register_parametrization(cell.linear, "weight", counter)
    wrapper = OncePerSolve(cell)
    layer = deepeq.DEQ(wrapper, **EXACT)
    counter.calls.clear()
    x, memory = x_of(), x_of()
    solution = layer(x, memory=memory)
    assert counter.calls == [True], "inject and the evaluations share one weight"
    plain = deepeq.DEQ(cell, **EXACT)(x, memory=memory)
    torch.testing.assert_close(solution.value, plain.value)
    assert_all_close(gradients(solution.value.sum(), cell), gradients(plain.value.sum(), cell))
    assert torch.equal(layer.prepare(x)[1], torch.full_like(x, 0.25))
    assert wrapper.output(x).shape == (4, 2)
    assert not hasattr(OncePerSolve(Cell()), "initial_state")
    clone = copy.deepcopy(wrapper)
    assert clone.output.__self__ is clone.cell, "a copy uses its own cell"


def test_pieces_of_a_sequence_share_the_weights() -> None:
    cell = FullCell()
    counter = Counting()
    register_parametrization(cell.linear, "weight", counter)
    layer = deepeq.Subsequences(deepeq.DEQ(OncePerSolve(cell), **EXACT), length=2)
    counter.calls.clear()
    x = x_of(3, 6, 6)
    solution = layer(x)
    assert counter.calls == [True]
    plain = deepeq.Subsequences(deepeq.DEQ(cell, **EXACT), length=2)(x)
    torch.testing.assert_close(solution.value, plain.value)
    assert_all_close(gradients(solution.value.sum(), cell), gradients(plain.value.sum(), cell))


def test_cells_own_shared_weights_are_passed_on() -> None:
    class Sharing(FullCell):
        drawn = 0

        def shared_weights(self) -> Tensor:
            self.drawn += 1
            return self.linear.weight.sum()

        def inject(self, x: Tensor, memory: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
            return x + (self.shared_weights() if weights is None else weights)

    cell = Sharing()
    counter = Counting()
    register_parametrization(cell.linear, "weight", counter)
    counter.calls.clear()
    layer = deepeq.Subsequences(deepeq.DEQ(OncePerSolve(cell), **EXACT), length=2)
    layer(x_of(3, 6, 6))
    assert (cell.drawn, len(counter.calls)) == (1, 1)


def test_holding_is_undone_when_the_cell_fails() -> None:
    class Failing(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            super().forward(z, x)
            raise KeyError("inside")

    cell = Failing()
    counter = Counting()
    register_parametrization(cell.first, "weight", counter)
    with pytest.raises(KeyError, match="inside"):
        deepeq.DEQ(OncePerSolve(cell))(x_of())
    counter.calls.clear()
    assert cell.first.weight is not cell.first.weight
    assert len(counter.calls) == 2


def test_held_weights_nest() -> None:
    """A cell that solves an inner equilibrium with a part of itself."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deepeq.DEQ(OncePerSolve(Cell()), **EXACT)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            inner = self.inner.cell.cell
            before = inner.first.weight
            value = self.inner(0.1 * z + x).value
            assert inner.first.weight is before
            return value

    outer = Outer()
    counter = Counting()
    register_parametrization(outer.inner.cell.cell.first, "weight", counter)
    counter.calls.clear()
    held = hold_weights(outer)
    x = x_of()
    held(held(x, x), x).sum().backward()
    assert counter.calls == [True]
    pair = weight_norm(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with hold_weights(pair).in_place():
        first, second = pair[0].weight, pair[1].weight
        with hold_weights(pair[0]).in_place():
            assert pair[0].weight is first
            assert pair[1].weight is second


def test_threads_do_not_see_each_others_weights() -> None:
    linear = nn.Linear(3, 3)
    weight_norm(linear)
    held, entered, read = hold_weights(linear), threading.Event(), threading.Event()

    def hold() -> None:
        with held.in_place():
            entered.set()
            read.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    other = linear.weight
    read.set()
    thread.join()
    with held.in_place():
        assert linear.weight is not other
        assert linear.weight is linear.weight


def test_backward_in_another_thread_uses_the_held_weights() -> None:
    """A GPU's backward pass runs in a thread of its own, where a checkpointed map is evaluated again."""
    cell = Cell()
    register_parametrization(cell.first, "weight", WeightDropout(0.5), unsafe=True)
    adjoint = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-13, max_steps=60), checkpoint=True)
    layer = deepeq.DEQ(OncePerSolve(cell), solver=EXACT["solver"], adjoint=adjoint)
    loss = layer(x_of()).value.square().sum()
    here, there = gradients(loss, cell, retain_graph=True), []
    thread = threading.Thread(target=lambda: there.extend(gradients(loss, cell)))
    thread.start()
    thread.join()
    assert_all_close(there, here)


@pytest.mark.filterwarnings("ignore::deepeq.ConvergenceWarning")
def test_memory_is_one_weight_per_solve() -> None:
    """The graph of two evaluations and that of many keep the same tensors of the size of the weight."""

    def kept(module: nn.Module, steps: int) -> int:
        storages = set()

        def note(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().nbytes() >= 64 * 64 * 8:
                storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        solver = deepeq.FixedPointIteration(rtol=1e-30, max_steps=steps)
        layer = deepeq.DEQ(module, solver=solver, adjoint=deepeq.BackpropAdjoint(), on_failure="ignore")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            solution = layer(x_of(1, 64))
        assert solution.value.requires_grad
        assert solution.num_evals == steps
        return len(storages)

    cell = Cell(64)
    infinity_norm(cell, bound=6.0, clip=False)
    assert kept(OncePerSolve(cell), 12) == kept(OncePerSolve(cell), 2)
    assert kept(cell, 12) >= kept(cell, 2) + 2 * 10, "without holding, every evaluation keeps weights of its own"


def test_unrolled_stack_ties_random_weights() -> None:
    cell = Cell()
    register_parametrization(cell.first, "weight", WeightDropout(0.5), unsafe=True)
    x = x_of()
    held = OncePerSolve(cell)
    torch.manual_seed(5)
    plain = deepeq.Unrolled(held, depth=6)(x).value
    torch.manual_seed(5)
    recomputed = deepeq.Unrolled(held, depth=6, checkpoint=True)(x).value
    assert torch.equal(plain, recomputed)
    assert_all_close(gradients(recomputed.sum(), cell), gradients(plain.sum(), cell))


def test_checkpoint_inside_a_cell_is_refused_and_not_silently_wrong() -> None:
    class Inner(Cell):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, z, x, use_reentrant=False)

    cell = Inner()
    NORMALIZATIONS["spectral"](cell)
    value = deepeq.DEQ(OncePerSolve(cell), **EXACT)(x_of()).value
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        value.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler looks at inputs that are no leaves
def test_compiled_cell_uses_the_held_weights() -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    cell = Cell()
    NORMALIZATIONS["spectral"](cell)
    wrapper = OncePerSolve(cell)
    forward = torch.compile(wrapper, backend=backend, fullgraph=True)
    x = x_of()
    for _ in range(3):
        injection = wrapper.inject(x)
        value = forward(x, injection)
        assert torch.equal(value, wrapper(x, injection))
        assert all(gradient.abs().sum() > 0 for gradient in gradients(value.sum(), cell))
    assert len(compiled) == 1, "new weights need no new compilation"
    operations = [str(node.target) for graph in compiled for node in graph.graph.nodes]
    assert not any("norm" in operation for operation in operations)


def test_parametrizations_of_torch_are_held_too() -> None:
    cell = Cell()
    parametrizations.orthogonal(cell.first, "weight")
    parametrizations.weight_norm(cell.second)
    x = x_of()
    with torch.no_grad():
        cell.second.parametrizations.weight.original0.mul_(0.3)
    value = deepeq.DEQ(OncePerSolve(cell), **EXACT)(x).value
    z = torch.zeros_like(x)
    for _ in range(120):
        z = cell(z, x)
    assert_all_close(gradients(value.sum(), cell), gradients(z.sum(), cell))


def test_cell_without_shared_weights_of_its_own_is_solved_in_pieces() -> None:
    class Running(deepeq.Cell):
        """Reads the mean of all earlier positions; `shared_weights` is the default."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = spectral_norm(nn.Linear(4, 4), bound=0.5)

        def inject(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
            return x if memory is None else x + memory.mean(dim=1, keepdim=True)

        def extend_memory(self, memory: Any, x: Tensor, z: Tensor, *, length: int | None = None) -> Tensor:
            return z

        def forward(self, z: Tensor, injection: Tensor) -> Tensor:
            return torch.tanh(self.mix(z) + injection)

    torch.manual_seed(0)
    x, cell = torch.randn(2, 6, 4, dtype=torch.float64), OncePerSolve(Running().double())
    how = deepeq.Pieces(equilibrium=deepeq.Equilibrium(solver=deepeq.Broyden(rtol=1e-9, max_steps=60)), length=3)
    first, second = how(cell, x).value.split(3, dim=1)
    assert_all_close([second], [deepeq.DEQ(cell, **EXACT)(x[:, 3:], memory=first).value], rtol=1e-6)
