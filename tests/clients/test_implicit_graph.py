"""A graph network whose nodes form one coupled state: `batch_dims=0`."""

import warnings

import pytest
import torch
from torch import Tensor

from deepeq import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    ConvergenceWarning,
    FixedPointIteration,
    ImplicitAdjoint,
    Result,
    Unrolled,
    error_bound,
    smallest_singular_value,
    spectral_radius,
)
from tests.clients import dense
from tests.clients.graphs import Graph, GraphCell, GraphClassifier, disjoint_union, random_graph, undirected

EXACT = Broyden(rtol=1e-13, max_steps=200, history_size=200)
IMPLICIT = ImplicitAdjoint(solver=GMRES(rtol=1e-13, max_steps=200))
SOLVERS = {
    "broyden": EXACT,
    "anderson": Anderson(rtol=1e-13, max_steps=500),
    "plain": FixedPointIteration(rtol=1e-13, max_steps=1000),
}


@pytest.fixture
def graph(generator: torch.Generator) -> Graph:
    return random_graph(12, 3, generator)


@pytest.fixture
def cell() -> GraphCell:
    return GraphCell(3, 4)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=list(SOLVERS))
def test_the_value_is_the_dense_fixed_point_of_all_nodes_together(graph, cell, solver):
    layer = DEQ(cell, solver=solver, batch_dims=0)
    with torch.no_grad():
        solution = layer(graph)
    f, z0 = layer.prepare(graph)
    expected = dense.equilibrium(f, z0)
    assert solution.result is Result.CONVERGED
    assert solution.relative_residual.shape == (1,)
    torch.testing.assert_close(solution.value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_weights_inputs_and_edges_are_those_of_dense_implicit_differentiation(graph, cell, checkpoint):
    graph = graph._replace(features=graph.features.requires_grad_(), weights=graph.weights.requires_grad_())
    target = torch.randn(12, 4, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return ((z - target) ** 2).sum()

    adjoint = ImplicitAdjoint(solver=IMPLICIT.solver, checkpoint=checkpoint)
    layer = DEQ(cell, solver=EXACT, adjoint=adjoint, batch_dims=0)
    wanted = [cell.w, cell.v, graph.features, graph.weights]
    actual = torch.autograd.grad(loss(layer(graph).value), wanted)
    f, z0 = layer.prepare(graph)
    expected = dense.gradients(f, dense.equilibrium(f, z0), loss, wanted)
    for a, b in zip(actual, expected, strict=True):
        assert dense.cosine([a], [b]) > 0.999999
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, at its first use
def test_measures_of_the_equilibrium_are_those_of_the_whole_jacobian(graph, cell, generator):
    layer = DEQ(cell, solver=EXACT, batch_dims=0)
    with torch.no_grad():
        z = layer(graph).value
    f, _ = layer.prepare(graph)
    j = dense.jacobian(f, z)
    radius = spectral_radius(f, z, num_steps=400, generator=generator, batch_dims=0)
    torch.testing.assert_close(radius, torch.linalg.eigvals(j).abs().max().reshape(1), rtol=1e-2, atol=0.0)
    smallest = smallest_singular_value(f, z, generator=generator, batch_dims=0)
    exact = torch.linalg.svdvals(torch.eye(len(j), dtype=j.dtype) - j)[-1]
    torch.testing.assert_close(smallest, exact.reshape(1), rtol=1e-6, atol=0.0)
    near = z + 1e-6 * torch.randn_like(z)
    bound = error_bound(f, near, smallest=smallest, batch_dims=0)
    assert float((near - z).norm()) <= 1.001 * float(bound)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [Broyden, Anderson, FixedPointIteration])
def test_forgotten_batch_dims_are_told_and_a_wrong_state_is_never_called_converged(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    graphs = [random_graph(nodes, 3, generator, density) for nodes, density in ((4, 0.9), (15, 0.0))]
    # One component has little to do and is done early, the other one has far to go.
    graphs[0] = graphs[0]._replace(weights=0.1 * graphs[0].weights)
    graph, _ = disjoint_union(graphs)
    layer = DEQ(GraphCell(3, 4), solver=kind(rtol=1e-6, max_steps=300))
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solution = layer(graph)
        f, _ = layer.prepare(graph)
        rows = (f(solution.value) - solution.value).norm(dim=1) / f(solution.value).norm(dim=1)
    if solution.result is Result.CONVERGED:
        assert float(rows.max()) <= 1.02e-6
    else:
        (warning,) = caught
        assert warning.category is ConvergenceWarning
        assert "batch_dims=0" in str(warning.message)
        assert not bool(solution.converged[rows > 1.02e-6].any())


def test_forgotten_batch_dims_are_told_in_training_too(graph, cell):
    layer = DEQ(cell, solver=Broyden(rtol=1e-6, max_steps=100))
    with pytest.warns(ConvergenceWarning, match="batch_dims=0"):
        solution = layer(graph)
    assert solution.result is not Result.CONVERGED
    assert not bool(solution.converged.any())


def chains(length: int, copies: int) -> tuple[Graph, Tensor]:
    """Chains whose first node alone knows the class of all its nodes."""
    labels = torch.arange(2 * copies) % 2
    pairs = [(i, i + 1) for i in range(length - 1)]
    edges, weights = undirected(pairs, length)
    features = torch.zeros(length, 2, dtype=torch.float64)
    parts = []
    for label in labels.tolist():
        own = features.clone()
        own[0, label] = 1.0
        parts.append(Graph(own, edges, weights))
    union, _ = disjoint_union(parts)
    return union, labels.repeat_interleave(length)


def test_an_equilibrium_learns_what_lies_farther_away_than_a_stack_of_layers_can_see():
    length, depth = 12, 4
    graph, labels = chains(length, copies=2)
    far = torch.arange(length).repeat(4) > depth
    accuracy = {}
    for name in ("equilibrium", "stack"):
        torch.manual_seed(1)
        cell = GraphCell(2, 8, gain=0.98)
        layer = DEQ(cell, solver=Broyden(rtol=1e-4), batch_dims=0) if name == "equilibrium" else Unrolled(cell, depth)
        model = GraphClassifier(layer, 8, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(graph), labels).backward()
            optimizer.step()
        with torch.no_grad():
            right = model(graph).argmax(dim=1) == labels
        accuracy[name] = float(right[far].double().mean())
    assert accuracy["stack"] == 0.5  # it gives nodes of both classes the same answer
    assert accuracy["equilibrium"] == 1.0
