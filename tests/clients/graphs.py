"""An implicit graph network, as its users write one: plain tensors for the graph, one module for the cell."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Graph(NamedTuple):
    """Features of the nodes, and the edges as two rows of node indices with one weight each."""

    features: Tensor  # (nodes, channels)
    edges: Tensor  # (2, edges)
    weights: Tensor  # (edges,)


class GraphCell(nn.Module):
    """`X <- tanh(A X W + U V)`, where `A` sums over the neighbors and the two-norm of `W` stays below `gain`."""

    def __init__(self, channels: int, hidden: int, gain: float = 0.9, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gain = gain
        self.w = nn.Parameter(torch.randn(hidden, hidden, dtype=dtype) / math.sqrt(hidden))
        self.v = nn.Parameter(torch.randn(channels, hidden, dtype=dtype) / math.sqrt(channels))

    def inject(self, x: Graph, memory: None = None) -> tuple[Graph, Tensor, Tensor]:
        norm = torch.linalg.matrix_norm(self.w, ord=2)
        return x, self.w * (self.gain / norm.clamp_min(self.gain)), x.features @ self.v

    def initial_state(self, x: Graph) -> Tensor:
        return x.features.new_zeros(len(x.features), self.w.shape[0])

    def forward(self, z: Tensor, injection: tuple[Graph, Tensor, Tensor]) -> Tensor:
        graph, w, bias = injection
        source, target = graph.edges
        messages = graph.weights.unsqueeze(1) * (z @ w)[source]
        return torch.tanh(torch.zeros_like(z).index_add(0, target, messages) + bias)


class GraphClassifier(nn.Module):
    """A layer of `GraphCell`, an equilibrium or a stack, and a linear readout of each node."""

    def __init__(self, layer: nn.Module, hidden: int, classes: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(hidden, classes, dtype=dtype)

    def forward(self, x: Graph) -> Tensor:
        return self.readout(self.layer(x).value)


def undirected(pairs: list[tuple[int, int]], nodes: int) -> tuple[Tensor, Tensor]:
    """Edges in both directions and to each node itself, and their weights `1 / sqrt(degree degree)`.

    The adjacency matrix has the two-norm one, so that the cell contracts by its gain.
    """
    one_way = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    loops = torch.arange(nodes).expand(2, -1)
    edges = torch.cat([one_way, one_way.flip(0), loops], dim=1)
    degree = torch.bincount(edges[0], minlength=nodes).double()
    return edges, (degree[edges[0]] * degree[edges[1]]).rsqrt()


def random_graph(nodes: int, channels: int, generator: torch.Generator, density: float = 0.3) -> Graph:
    """A connected graph: a chain with random shortcuts."""
    pairs = [(i, i + 1) for i in range(nodes - 1)]
    shortcuts = torch.rand(nodes, nodes, generator=generator) < density
    pairs += [(i, j) for i in range(nodes) for j in range(i + 2, nodes) if bool(shortcuts[i, j])]
    edges, weights = undirected(pairs, nodes)
    return Graph(torch.randn(nodes, channels, generator=generator, dtype=torch.float64), edges, weights)


def disjoint_union(graphs: list[Graph]) -> tuple[Graph, Tensor]:
    """The graphs side by side as one, and the graph of each node."""
    offsets = torch.tensor([0, *(len(graph.features) for graph in graphs)]).cumsum(0)
    edges = [graph.edges + offset for graph, offset in zip(graphs, offsets[:-1], strict=True)]
    union = Graph(
        torch.cat([graph.features for graph in graphs]),
        torch.cat(edges, dim=1),
        torch.cat([graph.weights for graph in graphs]),
    )
    segments = torch.repeat_interleave(torch.arange(len(graphs)), offsets.diff())
    return union, segments
