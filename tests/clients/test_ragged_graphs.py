"""A batch of graphs of different sizes, each an equilibrium of its own: `segments`."""

import pytest
import torch
from torch import Tensor

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    FixedPointIteration,
    ImplicitAdjoint,
    Result,
    Solution,
    fixed_point,
)
from tests.clients import dense
from tests.clients.graphs import Graph, GraphCell, disjoint_union, random_graph

SIZES = (5, 1, 9, 3)
SOLVERS = {
    "broyden": Broyden(rtol=1e-9, max_steps=100),
    "anderson": Anderson(rtol=1e-9, max_steps=100),
    "plain": FixedPointIteration(rtol=1e-9, max_steps=400),
}
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
IMPLICIT = ImplicitAdjoint(solver=GMRES(rtol=1e-12, max_steps=100))


@pytest.fixture
def graphs(generator: torch.Generator) -> list[Graph]:
    return [random_graph(nodes, 3, generator) for nodes in SIZES]


@pytest.fixture
def cell() -> GraphCell:
    return GraphCell(3, 4)


def shuffled(union: Graph, segments: Tensor, generator: torch.Generator) -> tuple[Graph, Tensor]:
    """The same graphs with their nodes in any order: new node `i` is the old node `order[i]`."""
    order = torch.randperm(len(segments), generator=generator)
    return union._replace(features=union.features[order], edges=order.argsort()[union.edges]), segments[order]


def alone(cell: GraphCell, graph: Graph, solver) -> Solution:
    return DEQ(cell, solver=solver, adjoint=IMPLICIT, batch_dims=0)(graph)


@solvers
@pytest.mark.parametrize("in_order", [True, False], ids=["sorted", "unsorted"])
def test_each_graph_of_a_batch_is_solved_as_if_alone(graphs, cell, solver, in_order, generator):
    union, segments = disjoint_union(graphs)
    if not in_order:
        union, segments = shuffled(union, segments, generator)
        graphs = [part_of(union, segments, i) for i in range(len(SIZES))]
    together = DEQ(cell, solver=solver, adjoint=IMPLICIT)(union, segments=segments)
    assert together.result is Result.CONVERGED
    assert len(set(together.num_steps.tolist())) > 1  # not all graphs are equally hard
    for i, graph in enumerate(graphs):
        single = alone(cell, graph, solver)
        torch.testing.assert_close(together.value[segments == i], single.value, rtol=1e-8, atol=1e-10)
        assert together.num_steps[i] == single.num_steps[0]
        torch.testing.assert_close(together.relative_residual[i], single.relative_residual[0], rtol=1e-3, atol=1e-15)
        torch.testing.assert_close(together.absolute_residual[i], single.absolute_residual[0], rtol=1e-3, atol=1e-15)
        weights = list(cell.parameters())
        share = torch.autograd.grad(loss_of(together.value[segments == i]), weights, retain_graph=True)
        for a, b in zip(share, torch.autograd.grad(loss_of(single.value), weights), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def part_of(union: Graph, segments: Tensor, index: int) -> Graph:
    """One graph of a batch, with its nodes in the order of the batch."""
    rows = (segments == index).nonzero().squeeze(1)
    edges = segments[union.edges[0]] == index
    place = torch.full_like(segments, -1)
    place[rows] = torch.arange(len(rows))
    return Graph(union.features[rows], place[union.edges[:, edges]], union.weights[edges])


def loss_of(z: Tensor) -> Tensor:
    return (z * torch.linspace(-1.0, 2.0, z.numel(), dtype=z.dtype).reshape(z.shape)).sum()


@solvers
def test_gradients_of_a_batch_are_the_sum_of_the_dense_ones_of_its_graphs(graphs, cell, solver):
    union, segments = disjoint_union(graphs)
    union = union._replace(features=union.features.requires_grad_(), weights=union.weights.requires_grad_())
    value = DEQ(cell, solver=solver, adjoint=IMPLICIT)(union, segments=segments).value
    total = sum(loss_of(value[segments == i]) for i in range(len(SIZES)))
    wanted = [cell.w, cell.v, union.features, union.weights]
    actual = torch.autograd.grad(total, wanted)
    expected = [torch.zeros_like(leaf) for leaf in wanted]
    for i in range(len(SIZES)):
        f, z0 = DEQ(cell).prepare(part_of(union, segments, i))
        for whole, part in zip(expected, dense.gradients(f, dense.equilibrium(f, z0), loss_of, wanted), strict=True):
            whole += part
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@solvers
def test_a_hard_graph_changes_nothing_for_the_others(graphs, cell, solver):
    union, segments = disjoint_union(graphs)
    easy = DEQ(cell, solver=solver)(union, segments=segments)
    hard = [graph._replace(weights=2.5 * graph.weights) if i == 2 else graph for i, graph in enumerate(graphs)]
    union, _ = disjoint_union(hard)
    mixed = DEQ(cell, solver=solver, on_failure="ignore")(union, segments=segments)
    others = torch.tensor([0, 1, 3])
    assert mixed.num_steps[2] > 1.2 * mixed.num_steps[others].max()
    assert torch.equal(mixed.num_steps[others], easy.num_steps[others])
    assert torch.equal(mixed.relative_residual[others], easy.relative_residual[others])
    assert torch.equal(mixed.value[segments != 2], easy.value[segments != 2])


@solvers
def test_a_broken_graph_is_named_and_the_others_are_solved(graphs, cell, solver):
    features = graphs[2].features.clone()
    features[4, 1] = torch.nan
    broken = [graph._replace(features=features) if i == 2 else graph for i, graph in enumerate(graphs)]
    union, segments = disjoint_union(broken)
    layer = DEQ(cell, solver=solver)
    with pytest.raises(ConvergenceError, match=r"problem 2 of 4") as caught, torch.no_grad():
        layer(union, segments=segments)
    kept = fixed_point(*layer.prepare(union), segments=segments, solver=solver, nonfinite="keep", on_failure="ignore")
    for solution in (caught.value.solution, kept):
        assert solution.result is Result.NONFINITE
        assert solution.converged.tolist() == [True, True, False, True]
        assert bool(torch.isfinite(solution.value).all())
        for i in (0, 1, 3):
            single = alone(cell, graphs[i], solver)
            torch.testing.assert_close(solution.value[segments == i], single.value, rtol=1e-8, atol=1e-10)
            assert solution.num_steps[i] == single.num_steps[0]


def test_a_graph_that_is_dropped_after_it_broke_leaves_right_gradients(graphs, cell):
    graphs[2] = graphs[2]._replace(features=torch.full_like(graphs[2].features, torch.nan))
    union, segments = disjoint_union(graphs)
    solver = SOLVERS["broyden"]
    layer = DEQ(cell, solver=solver, adjoint=IMPLICIT, nonfinite="keep", on_failure="ignore")
    with torch.no_grad():
        good = layer(union, segments=segments).converged
    left = [graph for graph, is_good in zip(graphs, good.tolist(), strict=True) if is_good]
    union, segments = disjoint_union(left)
    solution = layer(union, segments=segments)
    assert bool(solution.converged.all())
    weights = list(cell.parameters())
    actual = torch.autograd.grad(sum(loss_of(solution.value[segments == i]) for i in range(len(left))), weights)
    parts = [torch.autograd.grad(loss_of(alone(cell, graph, solver).value), weights) for graph in left]
    for a, *singles in zip(actual, *parts, strict=True):
        torch.testing.assert_close(a, sum(singles), rtol=1e-7, atol=1e-9)
