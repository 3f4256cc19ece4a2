"""A sequence solved in pieces against the same sequence solved at once, and against dense algebra."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    ConvergenceError,
    FixedPointIteration,
    ImplicitAdjoint,
    PhantomAdjoint,
    Pieces,
    Result,
    Solution,
    Subsequences,
    Unrolled,
)
from deepeq.models import TransformerCell, TransformerConfig, TrellisCell, TrellisConfig
from deepeq.universality import stack
from tests.problems import relative_residual

EXACT = Anderson(rtol=1e-13, max_steps=300)
ADJOINT = ImplicitAdjoint(solver=GMRES(rtol=1e-13, max_steps=300))
D = 3


class ChainCell(nn.Module):
    """`z_t = tanh(W z_t + U z_{t-1} + x_t)`, with a state of one tensor; its memory is the state before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = (nn.Parameter(scale * torch.linalg.qr(torch.randn(D, D))[0]) for scale in (0.5, 0.4))
        self.seen: list[tuple[int, bool]] = []

    def inject(self, x: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.seen.append((x.shape[1], memory is not None))
        return x, torch.zeros_like(x[:, :1]) if memory is None else memory

    def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
        x, memory = injection
        return torch.tanh(z @ self.w.T + torch.cat([memory, z[:, :-1]], dim=1) @ self.u.T + x)

    def extend_memory(self, memory: Tensor | None, x: Tensor, z: Tensor, *, length: int | None = None) -> Tensor:
        return z[:, -1:]


class PairCell(ChainCell):
    """The same chain with a second, slower tensor in the state, as a dict."""

    def initial_state(self, x: Tensor) -> dict[str, Tensor]:
        return {"fast": torch.zeros_like(x), "slow": x.new_zeros(*x.shape, 2)}

    def forward(self, z: dict[str, Tensor], injection: tuple[Tensor, Tensor]) -> dict[str, Tensor]:  # pyright: ignore
        fast = super().forward(z["fast"] + 0.1 * z["slow"].sum(-1), injection)
        return {"slow": torch.stack([fast, 0.5 * z["slow"][..., 0]], dim=-1), "fast": fast}

    def extend_memory(self, memory: Any, x: Tensor, z: Any, *, length: int | None = None) -> Tensor:
        # What the chain read at the last position, so that the next piece reads the same.
        return z["fast"][:, -1:] + 0.1 * z["slow"][:, -1:].sum(-1)


def make_transformer() -> TransformerCell:
    """A cell whose plain iteration converges, because the injected values outweigh the residual connection."""
    cell = TransformerCell(TransformerConfig(d_model=8, num_heads=2, d_inner=12, memory_len=3, init_std=0.2))
    with torch.no_grad():
        assert cell.injection is not None
        cell.injection.weight[-8:] *= 15
        cell.output_projection.weight *= 4
    return cell


def make_trellis() -> TrellisCell:
    config = TrellisConfig(d_input=8, d_hidden=6, d_output=4, kernel_size=3, dilation=2, init_std=0.2)
    return TrellisCell(config)


def make_stack() -> nn.Module:
    """A chain, and a Transformer that reads it."""

    class Wide(ChainCell):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.u = (nn.Parameter(0.4 * torch.linalg.qr(torch.randn(8, 8))[0]) for _ in range(2))

    return stack(DEQ(Wide()), DEQ(make_transformer())).cell


CELLS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "chain": (ChainCell, D),
    "pair": (PairCell, D),
    "transformer": (make_transformer, 8),
    "trellisnet": (make_trellis, 8),
    "stack": (make_stack, 8),
}
cells = pytest.mark.parametrize(("make", "channels"), CELLS.values(), ids=list(CELLS))


def deq(cell: nn.Module, **options: Any) -> DEQ:
    return DEQ(cell.double(), **{"solver": EXACT, "adjoint": ADJOINT, **options})


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def loss_of(value: Any) -> Tensor:
    """A different weight for every entry, the same for equal shapes."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack(
        [
            (z * torch.randn(z.shape, dtype=z.dtype, generator=generator)).sum() + z.square().sum()
            for z in pytree.tree_leaves(value)
        ]
    ).sum()


def gradients(layer: DEQ, x: Tensor, **call: Any) -> list[Tensor]:
    """Of the loss, for `x`, the memory and all parameters."""
    x = x.clone().requires_grad_()
    memory = pytree.tree_map(lambda m: m.clone().requires_grad_(), call.pop("memory"))
    leaves = [x, *pytree.tree_leaves(memory), *layer.parameters()]
    return list(torch.autograd.grad(loss_of(layer(x, memory=memory, **call).value), leaves))


# --- the answer of the whole -----------------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("length", [1, 3, 4, 6, 7])  # of seven positions
def test_value_and_gradients_are_those_of_the_whole(make: Callable[[], nn.Module], channels: int, length: int) -> None:
    whole = deq(make())
    earlier, x = draw(2, 5, channels), draw(2, 7, channels)
    memory: Any = whole.cell.extend_memory(None, earlier, whole(earlier).value, length=None)  # pyright: ignore
    memory = pytree.tree_map(Tensor.detach, memory)
    pieces = Subsequences(whole, length)
    solutions = [layer(x, memory=memory) for layer in (whole, pieces)]
    for a, b in zip(*(pytree.tree_leaves(solution.value) for solution in solutions), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert all(solution.result is Result.CONVERGED for solution in solutions)
    expected = gradients(whole, x, memory=memory)
    assert sum(float(g.norm()) > 0 for g in expected) > len(expected) // 2
    for a, b in zip(gradients(pieces, x, memory=memory), expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm() + 1e-10


def test_gradients_are_those_of_the_dense_linear_system() -> None:
    """`u = (I - J)^{-T} v` with the Jacobian of the whole sequence written out."""
    cell = ChainCell().double()
    x, memory = draw(2, 5, D).requires_grad_(), draw(2, 1, D).requires_grad_()
    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(400):
            z = cell(z, (x, memory))
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, (x.detach(), memory.detach())), z)
    jacobian = jacobian.reshape(z.numel(), z.numel()).detach()
    leaf = z.clone().requires_grad_()
    (v,) = torch.autograd.grad(loss_of(leaf), leaf)
    u = torch.linalg.solve(torch.eye(z.numel(), dtype=z.dtype) - jacobian.T, v.reshape(-1)).reshape(z.shape)
    expected = torch.autograd.grad(cell(z, (x, memory)), [x, memory, *cell.parameters()], u)
    actual = gradients(Subsequences(deq(cell), 2), x.detach(), memory=memory.detach())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_gradient_of_the_last_piece_reaches_the_inputs_of_the_first() -> None:
    """Term (B) of appendix E: through the equilibria that the last piece remembers."""
    layer, x = Subsequences(deq(ChainCell()), 2), draw(1, 6, D).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).value[:, 4:].sum(), x)
    assert (gradient.norm(dim=-1) > 1e-4).all()
    (gradient,) = torch.autograd.grad(layer(x).value[:, :2].sum(), x)
    assert (gradient[:, :2] != 0).all()
    assert (gradient[:, 2:] == 0).all()  # causality


def test_z0_is_split_with_the_sequence() -> None:
    layer, x = Subsequences(deq(PairCell()), 3), draw(2, 7, D)
    cold = layer(x)
    warm = layer(x, z0=cold.value)
    assert (cold.num_steps > 3).all()
    assert (warm.num_steps == 1).all()


def test_other_adjoints_pass_through() -> None:
    cell, x = ChainCell().double(), draw(2, 4, D)
    exact, phantom = (
        torch.autograd.grad(Subsequences(deq(cell, adjoint=adjoint), 2)(x).value.sum(), cell.w)[0]
        for adjoint in (ADJOINT, PhantomAdjoint())
    )
    assert (exact - phantom).norm() > 0.05 * exact.norm()


# --- how it is found -------------------------------------------------------------------------------------------------


def test_every_piece_is_solved_with_those_before_as_memory() -> None:
    cell = ChainCell().double()
    Subsequences(deq(cell), 3)(draw(2, 8, D))
    assert cell.seen == [(3, False), (3, True), (2, True)]


@pytest.mark.parametrize("num_positions", [0, 4, 5])
def test_sequence_of_one_piece_is_the_plain_solve(num_positions: int) -> None:
    layer, x = deq(ChainCell()), draw(2, num_positions, D)
    plain, pieces = layer(x), Subsequences(layer, 5)(x)
    for a, b in zip(plain, pieces, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def by_hand(layer: DEQ, x: Tensor, length: int) -> list[Solution]:
    memory, solutions = None, []
    for piece in x.split(length, dim=1):
        solutions.append(layer(piece, memory=memory))
        memory = layer.cell.extend_memory(memory, piece, solutions[-1].value)  # pyright: ignore[reportCallIssue]
    return solutions


def test_solution_describes_all_pieces() -> None:
    layer, x = deq(ChainCell(), solver=FixedPointIteration(rtol=1e-3, max_steps=50)), draw(3, 8, D)
    x[0, 4:] *= 1e-4  # so that pieces and samples differ in what they need
    x[1, :4] *= 30.0
    first, second, third = pieces = by_hand(layer, x, 3)
    joined = Subsequences(layer, 3)(x)
    assert len({len(piece.residual_history) for piece in pieces}) > 1
    assert torch.equal(joined.value, torch.cat([piece.value for piece in pieces], dim=1))
    assert joined.num_evals == first.num_evals + second.num_evals + third.num_evals
    steps = torch.stack([piece.num_steps for piece in pieces])
    assert torch.equal(joined.num_steps, steps.max(dim=0).values)
    assert len(joined.residual_history) == int(joined.num_steps.max())
    for step in range(len(joined.residual_history)):
        for b in range(3):
            rows = [piece.residual_history[min(step, len(piece.residual_history) - 1), b] for piece in pieces]
            assert joined.residual_history[step, b] == max(rows)
    assert torch.equal(
        joined.relative_residual, torch.stack([piece.relative_residual for piece in pieces]).max(dim=0).values
    )
    assert joined.converged.all()
    assert joined.result is Result.CONVERGED


def test_residual_bounds_that_of_the_whole() -> None:
    layer, x = deq(ChainCell(), solver=FixedPointIteration(rtol=0.05, max_steps=50)), draw(3, 8, D)
    solution = Subsequences(layer, 3)(x)
    f, _ = layer.prepare(x)
    of_the_whole = relative_residual(f, solution.value.detach())
    assert (of_the_whole > 1e-3).all()
    assert (of_the_whole <= solution.relative_residual).all()


def test_one_piece_short_of_its_tolerance_shows_in_the_whole() -> None:
    x = draw(2, 6, D)
    x[0, 2:4] *= 100.0  # saturated, and found at once
    x[1] = 0.0
    layer = deq(ChainCell(), solver=FixedPointIteration(rtol=1e-6, max_steps=6), on_failure="ignore")
    pieces = by_hand(layer, x, 2)
    solution = Subsequences(layer, 2)(x)
    assert [piece.converged.tolist() for piece in pieces] == [[False, True], [True, True], [False, True]]
    assert solution.converged.tolist() == [False, True]
    assert solution.result is Result.MAX_STEPS
    with pytest.raises(ConvergenceError):
        Subsequences(deq(layer.cell, solver=layer.solver, throw=True), 2)(x)


# --- what it costs ---------------------------------------------------------------------------------------------------


def saved_bytes(layer: DEQ, x: Tensor) -> int:
    """Kept for the backward pass in distinct storages, parameters and inputs excepted."""
    known = {leaf.untyped_storage().data_ptr() for leaf in (x, *layer.parameters())}
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["chain", "pair", "transformer", "trellisnet"])
def test_about_as_much_is_kept_for_the_backward_as_by_one_solve(name: str) -> None:
    make, channels = CELLS[name]
    layer, x = deq(make(), on_failure="ignore"), draw(2, 40, channels).requires_grad_()
    # The keys and values of each piece's memory come on top, a twentieth for the Transformer; another graph, all of it.
    assert 0 < saved_bytes(Subsequences(layer, 20), x) <= 1.25 * saved_bytes(layer, x)


def test_pieces_share_normalized_weights() -> None:
    """Kept for the backward pass: as much more a piece as its states need, for any size of the weights."""
    config = TrellisConfig(d_input=8, d_hidden=64, d_output=4, kernel_size=3, dilation=2, weight_norm=True)
    layer, x = deq(TrellisCell(config)), draw(1, 8, 8).requires_grad_()
    weights = 8 * 4 * 64 * 3 * (8 + 64)  # bytes
    assert saved_bytes(layer, x) > weights
    assert saved_bytes(Subsequences(layer, 1), x) < saved_bytes(layer, x) + weights / 4


def test_entries_of_the_weights_are_dropped_once_for_all_pieces() -> None:
    config = TrellisConfig(d_input=8, d_hidden=6, d_output=4, weight_dropout=0.5, init_std=0.2)
    layer, x = deq(TrellisCell(config)).train(), draw(2, 6, 8)
    values = []
    for each in (layer, Subsequences(layer, 2)):
        torch.manual_seed(1)
        values.append(each(x).value[0].detach())
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-10)


# --- what it takes ---------------------------------------------------------------------------------------------------


def test_state_dict_is_that_of_the_layer() -> None:
    layer = deq(ChainCell())
    pieces = Subsequences(layer, 2)
    assert pieces.state_dict().keys() == layer.state_dict().keys()
    assert pieces.cell is layer.cell
    assert pieces.how == Pieces(equilibrium=layer.how, length=2)
    assert "length=2" in repr(pieces)


@pytest.mark.parametrize("length", [0, -1, 2.0, True, None])
def test_bad_length_raises_at_construction(length: Any) -> None:
    with pytest.raises(ValueError, match="length="):
        Subsequences(deq(ChainCell()), length)


def test_layer_that_cannot_be_solved_in_pieces_raises_at_construction() -> None:
    with pytest.raises(TypeError, match="layer must be a DEQ, got Unrolled"):
        Subsequences(Unrolled(ChainCell(), 3), 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="Identity must have inject"):
        Subsequences(deq(nn.Identity()), 2)


def test_state_without_positions_is_an_error() -> None:
    class Pooled(ChainCell):
        def initial_state(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), D)

        def forward(self, z: Tensor, injection: tuple[Tensor, Tensor]) -> Tensor:
            return torch.tanh(0.5 * z + injection[0].mean(dim=1))

    with pytest.raises(ValueError, match=r"the state for 2 positions must be \(B, 2, ...\), got \(4, 3\)"):
        Subsequences(deq(Pooled()), 2)(draw(4, 6, D))
    with pytest.raises(ValueError, match="z0 for 6 positions"):
        Subsequences(deq(ChainCell()), 2)(draw(4, 6, D), z0=draw(4, 5, D))
