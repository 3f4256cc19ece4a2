"""`DEQ` and `Unrolled` as modules: one call signature, ordinary `nn.Module` habits, DDP and `torch.compile`."""

import copy
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    BackpropAdjoint,
    Broyden,
    ConvergenceError,
    FixedPointIteration,
    ImplicitAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    Result,
    Solution,
    Unrolled,
    fixed_point,
)
from tests.problems import relative_residual

SOLVER = Broyden(rtol=1e-6, max_steps=60)
ADJOINT = ImplicitAdjoint(solver=GMRES(rtol=1e-6))


class PlainCell(nn.Module):
    """A cell without `inject`: the input itself is the injection."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        with torch.no_grad():
            self.linear.weight.copy_(0.6 * torch.linalg.qr(torch.randn(size, size))[0])

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Injection(NamedTuple):
    shift: Tensor
    offset: Tensor | None


class InjectingCell(PlainCell):
    """A cell whose state is wider than its input, with a memory; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 4)
        self.calls: list[str] = []

    def inject(self, x: Tensor, memory: Tensor | None = None) -> Injection:
        self.calls.append("inject")
        return Injection(self.project(x), memory)

    def initial_state(self, x: Tensor) -> Tensor:
        self.calls.append("initial_state")
        return x.new_full((len(x), 4), 0.25)

    def forward(self, z: Tensor, injection: Injection) -> Tensor:
        self.calls.append("cell")
        shift = injection.shift if injection.offset is None else injection.shift + injection.offset
        return torch.tanh(self.linear(z) + shift)


def deq(cell: nn.Module, **options) -> DEQ:
    return DEQ(cell, **{"solver": SOLVER, "adjoint": ADJOINT, **options})


LAYERS = {"deq": deq, "unrolled": lambda cell: Unrolled(cell, 100)}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=list(LAYERS))


# --- one call signature ----------------------------------------------------------------------------------------------


@layers
def test_plain_cell_takes_x_as_injection_and_starts_from_zeros(make):
    cell, seen = PlainCell(), []
    cell.register_forward_pre_hook(lambda module, args: seen.append(args))
    x = torch.randn(3, 4)
    solution = make(cell)(x)
    assert isinstance(solution, Solution)
    assert torch.equal(seen[0][0], torch.zeros_like(x))
    assert all(args[1] is x for args in seen)
    assert (relative_residual(lambda z: cell(z, x), solution.value) < 1e-5).all()


@layers
def test_injecting_cell_prepares_once_per_call(make):
    cell = InjectingCell()
    solution = make(cell)(torch.randn(3, 2))
    assert cell.calls == ["inject", "initial_state"] + ["cell"] * solution.num_evals
    assert solution.value.shape == (3, 4)
    cell.calls.clear()
    make(cell)(torch.randn(3, 2), torch.zeros(3, 4), torch.zeros(3, 4))  # x, z0, memory, by position
    assert cell.calls[:2] == ["inject", "cell"]  # z0 was given


@layers
def test_given_z0_is_the_first_point(make):
    cell, seen = PlainCell(), []
    cell.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    z0 = torch.randn(3, 4)
    make(cell)(torch.randn(3, 4), z0=z0)
    assert torch.equal(seen[0], z0)


def test_warm_start_at_the_equilibrium_takes_one_step():
    layer, x = deq(PlainCell()), torch.randn(3, 4)
    cold = layer(x)
    warm = layer(x, z0=cold.value)
    assert (cold.num_steps > 3).all()
    assert (warm.num_steps == 1).all()
    assert warm.value.requires_grad


@layers
def test_memory_reaches_the_cell_and_gets_its_gradient(make):
    layer = make(InjectingCell())
    x, memory = torch.randn(3, 2, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    with_memory = layer(x, memory=memory).value
    assert not torch.allclose(with_memory, layer(x).value, atol=1e-2)
    gradients = torch.autograd.grad(with_memory.sum(), [x, memory, *layer.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients)


@layers
def test_memory_for_a_cell_that_takes_none_is_an_error(make):
    with pytest.raises(ValueError, match="PlainCell has no inject"):
        make(PlainCell())(torch.randn(3, 4), memory=torch.randn(3, 4))


@layers
def test_cell_that_is_no_module_is_an_error(make):
    with pytest.raises(TypeError, match="function"):
        make(lambda z, x: z)


def test_structured_input_of_a_plain_cell_gives_a_structured_state():
    class Pair(nn.Module):
        def forward(self, z, x):
            return {"a": 0.5 * z["b"] + x["a"], "b": 0.25 * z["a"] + x["b"]}

    x = {"a": torch.ones(2, 3), "b": torch.zeros(2, 3)}
    for layer in (deq(Pair()), Unrolled(Pair(), 60)):
        solution = layer(x)
        torch.testing.assert_close(solution.value["a"], torch.full((2, 3), 8 / 7), rtol=1e-4, atol=0.0)
        torch.testing.assert_close(solution.value["b"], torch.full((2, 3), 2 / 7), rtol=1e-4, atol=0.0)
        assert solution.relative_residual.shape == (2,)


# --- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_cell", [PlainCell, InjectingCell])
def test_deq_and_a_deep_unrolled_stack_agree_in_value_and_gradient(make_cell):
    cell = make_cell().double()
    x = torch.randn(3, 4 if make_cell is PlainCell else 2, dtype=torch.float64, requires_grad=True)
    exact = deq(cell, solver=Broyden(rtol=1e-12, max_steps=100), adjoint=ImplicitAdjoint(solver=GMRES(rtol=1e-12)))
    values, gradients = [], []
    for layer in (exact, Unrolled(cell, 100)):
        value = layer(x).value
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value.square().sum(), [x, *cell.parameters()]))
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-11)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_deq_is_fixed_point_with_the_cell():
    cell, x = PlainCell(), torch.randn(3, 4)
    direct = fixed_point(lambda z: cell(z, x), torch.zeros(3, 4), solver=SOLVER, adjoint=ADJOINT)
    layer = deq(cell)(x)
    assert torch.equal(layer.value, direct.value)
    assert layer.num_evals == direct.num_evals


def test_deq_hands_on_solver_adjoint_and_throw():
    cell, x = PlainCell(), torch.randn(3, 4)
    short = DEQ(cell, solver=FixedPointIteration(max_steps=2), on_failure="ignore")
    assert short(x).result is Result.MAX_STEPS
    assert short(x).num_steps.tolist() == [2, 2, 2]
    with pytest.raises(ConvergenceError, match="after 2 steps"):
        DEQ(cell, solver=FixedPointIteration(max_steps=2), throw=True)(x)
    one, exact = (
        torch.autograd.grad(DEQ(cell, solver=SOLVER, adjoint=a)(x).value.sum(), cell.linear.bias)[0]
        for a in (PhantomAdjoint(), ADJOINT)
    )
    assert (one - exact).norm() > 0.1 * exact.norm()
    default = DEQ(cell)
    assert default.solver == Anderson()
    assert default.adjoint == ImplicitAdjoint()


@pytest.mark.parametrize("grad", [True, False])
def test_rules_given_to_a_call_stand_in_for_those_of_the_layer(grad):
    cell, x = PlainCell(), torch.randn(3, 4)
    layer, solver = deq(cell), FixedPointIteration(rtol=1e-2)
    with torch.set_grad_enabled(grad):
        once, after = layer(x, solver=solver), layer(x)
        expected = [fixed_point(lambda z: cell(z, x), torch.zeros(3, 4), solver=s) for s in (solver, SOLVER)]
    for a, b in zip((once, after), expected, strict=True):
        assert torch.equal(a.value, b.value)
        assert torch.equal(a.num_steps, b.num_steps)
    assert layer.solver == SOLVER


def test_adjoint_given_to_a_call_stands_in_for_that_of_the_layer():
    cell, x = PlainCell(), torch.randn(3, 4)
    layer = deq(cell)
    phantom, exact = (
        torch.autograd.grad(layer(x, **options).value.sum(), cell.linear.bias)[0]
        for options in ({"adjoint": PhantomAdjoint()}, {})
    )
    (expected,) = torch.autograd.grad(
        DEQ(cell, solver=SOLVER, adjoint=PhantomAdjoint())(x).value.sum(), cell.linear.bias
    )
    torch.testing.assert_close(phantom, expected)
    assert (phantom - exact).norm() > 0.1 * exact.norm()
    assert layer.adjoint == ADJOINT


def test_call_hands_on_segments_keep_and_callback():
    cell, x, seen = PlainCell(), torch.randn(3, 4), []
    solution = deq(cell)(x, segments=torch.tensor([0, 0, 1]), keep=[1], callback=lambda step, z, r: seen.append(step))
    assert solution.relative_residual.shape == (2,)
    torch.testing.assert_close(solution.kept[0], cell(torch.zeros(3, 4), x))
    assert seen == list(range(1, int(solution.num_steps.max()) + 1))


def test_layer_of_one_coupled_state_solves_it_as_one():
    """Row 0 is row 1: taken one by one it looks solved at zero."""

    class Chain(nn.Module):
        def forward(self, z, x):
            return torch.cat([z[1:], 0.5 * z[1:]]) + x

    x = torch.tensor([[0.0], [1.0]])
    solution = DEQ(Chain(), batch_dims=0)(x)
    torch.testing.assert_close(solution.value, torch.full((2, 1), 2.0), rtol=1e-2, atol=0.0)
    believing = DEQ(Chain(), verify=False)
    assert believing(x).value[0].item() == 0.0
    assert believing.how.verify is False


def test_unrolled_is_the_loop_and_reports_the_last_layer():
    cell, x = PlainCell(), torch.randn(3, 4)
    states = [torch.zeros(3, 4)]
    for _ in range(5):
        states.append(cell(states[-1], x))
    solution = Unrolled(cell, 5)(x)
    assert torch.equal(solution.value, states[-1])
    assert solution.num_evals == 5
    assert solution.num_steps.tolist() == [5, 5, 5]
    assert solution.num_steps.dtype == torch.int64
    assert solution.residual_history.shape == (5, 3)
    for before, residual in zip(states[:-1], solution.residual_history, strict=True):
        torch.testing.assert_close(residual, relative_residual(lambda z: cell(z, x), before))
    assert torch.equal(solution.relative_residual, solution.residual_history[-1])
    assert not solution.relative_residual.requires_grad
    assert solution.result is Result.MAX_STEPS
    assert not solution.converged.any()


@pytest.mark.parametrize("depth", [0, -1, 1.5, True, None])
def test_bad_depth_raises_at_construction(depth):
    with pytest.raises(ValueError, match="depth="):
        Unrolled(PlainCell(), depth)


@pytest.mark.parametrize("options", [{"solver": "broyden"}, {"adjoint": GMRES()}], ids=["solver", "adjoint"])
def test_bad_solver_or_adjoint_raises_at_construction(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        DEQ(PlainCell(), **options)


def test_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="f_solver"):
        DEQ(PlainCell(), f_solver="anderson")
    with pytest.raises(TypeError, match="stop_mode"):
        DEQ(PlainCell())(torch.randn(1, 4), stop_mode="abs")


# --- module habits ---------------------------------------------------------------------------------------------------


@layers
def test_call_leaves_no_state_on_the_module(make):
    layer, x = make(PlainCell()), torch.randn(3, 4, requires_grad=True)
    before = {name: set(vars(module)) for name, module in layer.named_modules()}
    pending = layer(x).value
    assert {name: set(vars(module)) for name, module in layer.named_modules()} == before
    clone = copy.deepcopy(layer)  # between a forward and its backward
    pickle.dumps(layer.state_dict())
    torch.testing.assert_close(clone(x).value, pending, rtol=0, atol=0)
    pending.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all(p.grad is None for p in clone.parameters())


@layers
def test_state_dict_round_trip_and_names(make):
    source, target = make(PlainCell()), make(PlainCell())
    x = torch.randn(3, 4)
    assert set(source.state_dict()) == {"cell.linear.weight", "cell.linear.bias"}
    assert not torch.allclose(source(x).value, target(x).value)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x).value, target(x).value)
    # Warm-up by the stack and the equilibrium share their weights.
    swapped = Unrolled(PlainCell(), 3) if make is deq else deq(PlainCell())
    swapped.load_state_dict(source.state_dict())


def test_repr_names_what_the_layer_does():
    text = repr(DEQ(PlainCell(), solver=Anderson(history_size=7)))
    assert "Anderson" in text
    assert "history_size=7" in text
    assert "ImplicitAdjoint" in text
    assert "depth=12" in repr(Unrolled(PlainCell(), 12))


def test_layer_in_eval_mode_is_trainable_and_the_same():
    layer, x = deq(PlainCell()), torch.randn(3, 4, requires_grad=True)
    training = torch.autograd.grad(layer(x).value.sum(), [x, *layer.parameters()])
    layer.eval()
    evaluation = torch.autograd.grad(layer(x).value.sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(training, evaluation, strict=True))


def test_frozen_cell_still_passes_the_gradient_of_x():
    layer = deq(PlainCell())
    layer.requires_grad_(False)
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).value.sum(), x)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        assert not layer(x).value.requires_grad


@layers
def test_double_precision_and_meta_free_conversion(make):
    layer = make(PlainCell()).double()
    assert layer(torch.randn(3, 4, dtype=torch.float64)).value.dtype == torch.float64


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    layer, x = DEQ(PlainCell()), torch.randn(16, 4)
    target = torch.tanh(x.flip(1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x).value - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_stacked_layers_backpropagate_through_each_other():
    first, second = (deq(PlainCell().double()) for _ in range(2))
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    stacks = [[first, second], [Unrolled(layer.cell, 100) for layer in (first, second)]]
    gradients = []
    for a, b in stacks:
        value = b(a(x).value).value
        gradients.append(torch.autograd.grad(value.square().sum(), [x, *first.parameters(), *second.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- distributed -----------------------------------------------------------------------------------------------------


def _data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    return InjectingCell(), torch.randn(6, 2)


def _loss(layer: nn.Module, x: Tensor) -> Tensor:
    return (layer(x).value - 0.3).square().mean()


def _ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cell, x = _data()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.mul_(1.0 + rank)  # DDP has to broadcast those of rank 0
    layer = DistributedDataParallel(deq(cell))
    half = x[3 * rank : 3 * rank + 3]
    gradients = []
    for _ in range(2):  # a second step finds the reducer ready again
        layer.zero_grad()
        _loss(layer, half).backward()
        gradients.append([p.grad.clone() for p in layer.module.parameters()])
    torch.save(gradients, f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()  # a rank that leaves early aborts the other
    torch.distributed.destroy_process_group()


def test_ddp_gradient_is_that_of_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(_ddp_worker, args=(str(tmp_path),), nprocs=2)
    cell, x = _data()
    layer = deq(cell)
    _loss(layer, x).backward()
    for rank in range(2):
        for gradients in torch.load(tmp_path / f"rank{rank}.pt", weights_only=True):
            for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
                torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


# --- torch.compile ---------------------------------------------------------------------------------------------------


class CompiledCell(nn.Module):
    """Saves intermediates of its forward pass, which a compiled backward may take for itself (donated buffers)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(0.3 * z + self.down(torch.softmax(self.up(z), dim=-1)) + x)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
compiler_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiler_warnings
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "adjoint",
    [
        ADJOINT,
        ImplicitAdjoint(solver=GMRES(rtol=1e-6), checkpoint=True),
        ImplicitAdjoint(solver=GMRES(rtol=1e-6), twice_differentiable=True),
        NeumannAdjoint(terms=3),
        PhantomAdjoint(steps=2),
        BackpropAdjoint(),
    ],
    ids=["implicit", "checkpoint", "twice", "neumann", "phantom", "backprop"],
)
def test_compiled_cell_agrees_with_eager(fresh_compiler, backend, adjoint):
    cell = CompiledCell()
    compiled = torch.compile(cell, backend=backend, fullgraph=True)
    x = torch.randn(3, 4, requires_grad=True)
    outputs = []
    for module in (cell, compiled):
        value = DEQ(module, solver=SOLVER, adjoint=adjoint)(x).value
        leaves = [x, *cell.parameters()]
        first = torch.autograd.grad(value.square().sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(value.square().sum(), leaves)
        outputs.append([value, *first, *second])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@compiler_warnings
@pytest.mark.parametrize("warm_up", ["unrolled", "zero_gradient"])
def test_cell_compiled_for_one_backward_says_what_to_set(fresh_compiler, warm_up):
    cell, x = CompiledCell(), torch.randn(3, 4)
    compiled = torch.compile(cell, backend="aot_eager")
    layer = DEQ(compiled, solver=SOLVER, adjoint=ADJOINT)
    loss = Unrolled(compiled, 3)(x).value.sum() if warm_up == "unrolled" else 0.0 * layer(x).value.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="donated_buffer = False before the compiled f runs"):
        layer(x).value.square().sum().backward()


@compiler_warnings
def test_compiled_cell_works_after_any_warm_up_without_donated_buffers(fresh_compiler):
    """What the message above asks for."""
    cell, x = CompiledCell(), torch.randn(3, 4)
    compiled = torch.compile(cell, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):
        Unrolled(compiled, 3)(x).value.sum().backward()
        cell.zero_grad()
        DEQ(compiled, solver=SOLVER, adjoint=ADJOINT)(x).value.square().sum().backward()
    gradients = [p.grad for p in cell.parameters()]
    expected = torch.autograd.grad(
        DEQ(cell, solver=SOLVER, adjoint=ADJOINT)(x).value.square().sum(), list(cell.parameters())
    )
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cell_with_inject_alone_starts_from_zeros():
    class Injecting(nn.Module):
        def inject(self, x, memory=None):
            return 2.0 * x

        def forward(self, z, injection):
            return 0.5 * z + injection

    x = torch.randn(3, 4)
    solution = DEQ(Injecting(), solver=FixedPointIteration(rtol=1e-6, max_steps=100))(x)
    torch.testing.assert_close(solution.value, 4.0 * x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 5, 9])
def test_checkpointed_stack_has_the_same_value_and_gradient_though_its_cell_draws(depth):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, z, x):
            return torch.tanh(torch.dropout(self.linear(z), 0.5, True) + x)

    cell, x = Drawing(), torch.randn(3, 4)
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        value = Unrolled(cell, depth, checkpoint=checkpoint)(x).value
        torch.randn(5)  # drawn between the passes
        gradients.append((value, *torch.autograd.grad(value.square().sum(), list(cell.parameters()))))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_kept_states_are_those_after_every_so_many_layers(checkpoint):
    cell, x = nn.Linear(4, 4), torch.randn(3, 4)
    cell = _Residual(cell)
    solution = Unrolled(cell, 7, checkpoint=checkpoint, keep_every=3)(x)
    assert len(solution.kept) == 2
    for state, depth in zip(solution.kept, (3, 6), strict=True):
        torch.testing.assert_close(state, Unrolled(cell, depth)(x).value)
    assert solution.residual_history.shape == (7, 3)
    assert Unrolled(cell, 6, keep_every=3)(x).kept[-1] is not solution.value
    assert len(Unrolled(cell, 6, keep_every=3)(x).kept) == 1


class _Residual(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)
