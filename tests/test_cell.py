"""The contract of a cell: its defaults, plain modules, and what is said where a method is missing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deepeq import DEQ, Cell, Equilibrium, Pieces
from deepeq.cell import implements, method, prepare, require
from deepeq.models import TransformerCell, TransformerConfig, TrellisCell, TrellisConfig
from deepeq.universality import StackedCell, WeightTiedCell

OPTIONAL = ("inject", "initial_state", "output", "extend_memory", "shared_weights", "take")


class Smallest(Cell):
    """Nothing but `forward`."""

    def forward(self, z: Tensor, injection: Tensor) -> Tensor:
        return torch.tanh(0.5 * z) + injection


class Plain(nn.Module):
    """The same as an ordinary module."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * z) + x


class Named(Plain):
    """A plain module that has submodules with the names of optional methods."""

    def __init__(self) -> None:
        super().__init__()
        for name in OPTIONAL:
            self.add_module(name, nn.Linear(3, 3))


class Full(Smallest):
    """A cell that replaces two defaults."""

    def inject(self, x: Tensor, memory: Any = None) -> Tensor:
        return 2.0 * x if memory is None else x + memory

    def extend_memory(self, memory: Any, x: Tensor, z: Tensor, *, length: int | None = None) -> Tensor:
        return z[:, -1:]


@pytest.mark.parametrize("make", [Smallest, Plain, Named])
def test_cell_without_optional_methods_has_the_defaults(make: Callable[[], nn.Module]) -> None:
    cell, x = make(), torch.randn(4, 3)
    assert not any(implements(cell, name) for name in OPTIONAL)
    assert method(cell, "inject")(x) is x
    assert torch.equal(method(cell, "initial_state")(x), torch.zeros(4, 3))
    assert method(cell, "output")(x) is x
    assert method(cell, "extend_memory")(None, x, x) is None
    assert method(cell, "shared_weights")() is None
    rows = torch.tensor([2, 0])
    assert torch.equal(method(cell, "take")(x, rows), x[rows])
    f, z0 = prepare(cell, x)
    assert torch.equal(f(z0), x)
    torch.testing.assert_close(DEQ(cell)(x).value, DEQ(Plain())(x).value)
    with pytest.raises(ValueError, match=f"memory was given, but {make.__name__} has no inject"):
        prepare(cell, x, memory=x)


def test_cell_must_have_a_forward() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Cell()  # pyright: ignore[reportAbstractUsage]


def test_methods_of_a_cell_replace_the_defaults() -> None:
    cell, x = Full(), torch.ones(2, 1, 3)
    assert [name for name in OPTIONAL if implements(cell, name)] == ["inject", "extend_memory"]
    f, z0 = prepare(cell, x)
    assert torch.equal(f(z0), 2.0 * x)
    assert torch.equal(prepare(cell, x, memory=x)[0](z0), x + x)
    assert prepare(cell, x, z0=x)[1] is x


def test_compiled_cell_keeps_its_methods() -> None:
    cell = torch.compile(Full(), backend="eager")
    assert implements(cell, "inject")  # pyright: ignore[reportArgumentType]
    assert not implements(cell, "output")  # pyright: ignore[reportArgumentType]


def test_missing_methods_are_named_in_one_sentence() -> None:
    x = torch.randn(2, 4, 3)
    pieces = Pieces(equilibrium=Equilibrium(), length=2)
    sentence = r"must have inject\(x, memory\) and extend_memory\(memory, x, z, \*, length\) to be solved in pieces$"
    for cell in (Smallest(), Plain(), Named()):
        with pytest.raises(TypeError, match=f"^{type(cell).__name__} {sentence}"):
            pieces(cell, x)
    with pytest.raises(
        TypeError, match=r"^Full must have take\(injection, rows\) to give up some problems of a batch$"
    ):
        Full().take(x, torch.tensor([0]))
    require(Full(), "inject(x, memory)", "extend_memory(memory, x, z)", purpose="be solved in pieces")


def transformer_case(training: bool, **values: Any) -> tuple[TransformerCell, Any, Any]:
    config = TransformerConfig(d_model=8, num_heads=2, d_inner=12, init_std=0.2, **values)
    cell, x = TransformerCell(config).double().train(training), torch.randn(5, 3, 8, dtype=torch.float64)
    return cell, cell.inject(x), torch.randn_like(x)


def decoding_case(empty: bool) -> tuple[TransformerCell, Any, Any]:
    cell, _, _ = transformer_case(training=False)
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    memory = cell.extend_memory(cell.start_memory(5), x[:, :3], torch.randn_like(x[:, :3]), length=8)
    if empty:
        memory = memory._replace(empty=torch.tensor([0, 1, 2, 0, 1]))  # pyright: ignore
    return cell, cell.inject(x[:, 3:], memory), torch.randn_like(x[:, 3:])


def trellis_case(training: bool) -> tuple[TrellisCell, Any, Any]:
    config = TrellisConfig(d_input=4, d_hidden=6, d_output=4, hidden_dropout=0.5, init_std=0.3)
    cell, x = TrellisCell(config).double().train(training), torch.randn(5, 3, 4, dtype=torch.float64)
    z = tuple(torch.randn(5, 3, 6, dtype=torch.float64) for _ in range(2))
    return cell, cell.inject(x), z


def weight_tied_case() -> tuple[WeightTiedCell, Any, Any]:
    cell = WeightTiedCell(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))).double()
    return cell, cell.inject(torch.randn(5, 4, dtype=torch.float64)), torch.randn(5, 5, dtype=torch.float64)


CASES: dict[str, Callable[[], tuple[Cell, Any, Any]]] = {
    "transformer": lambda: transformer_case(training=False),
    "transformer_dropout": lambda: transformer_case(training=True, hidden_dropout=0.5, attention_dropout=0.5),
    "transformer_decoding": lambda: decoding_case(empty=False),
    "transformer_decoding_empty": lambda: decoding_case(empty=True),
    "trellis": lambda: trellis_case(training=False),
    "trellis_dropout": lambda: trellis_case(training=True),
    "weight_tied": weight_tied_case,
}


@pytest.mark.parametrize("make", CASES.values(), ids=list(CASES))
@pytest.mark.parametrize("rows", [torch.tensor([3, 1]), torch.tensor([True, False, False, True, True])])
def test_taken_problems_are_mapped_as_in_the_whole_batch(
    make: Callable[[], tuple[Cell, Any, Any]], rows: Tensor
) -> None:
    cell, injection, z = make()
    expected = pytree.tree_map(lambda part: part[rows], cell(z, injection))
    actual = cell(pytree.tree_map(lambda part: part[rows], z), cell.take(injection, rows))
    torch.testing.assert_close(actual, expected)


def test_stacked_cell_says_that_it_takes_no_rows() -> None:
    cell = StackedCell(DEQ(Smallest()), DEQ(Smallest()))
    with pytest.raises(TypeError, match="StackedCell must have take"):
        cell.take(cell.inject(torch.randn(2, 3)), torch.tensor([0]))
