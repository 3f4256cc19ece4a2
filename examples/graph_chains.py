"""An implicit graph network carries a label along a chain of any length.

Each graph is a directed chain. Its first node has one of four labels, the other nodes have a little noise, and every
node has to name the label. A convolution moves information by one hop, so k layers know nothing of a node that is more
than k hops away. An implicit graph network (Gu et al., NeurIPS 2020) takes the state that one more convolution does not
change, X = relu(A X W + U): its depth is whatever the graph needs. In a directed chain A^n = 0, so every W has exactly
one such state. The bound ||W||_inf <= 1 keeps messages from growing at each node. Look at three things:

- Training solves a ragged batch of chains (`segments`). `norm="positions"` asks every node to have converged.
- The test solves all chains as one coupled problem too (`batch_dims=0`), with the same answers.
- A network of k layers is right for about k nodes at best, and guesses (25 %) after them. Many layers do not train.
"""

import time
from itertools import pairwise

import torch
from _report import COLORS, Row, count, panels, parse, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import deepeq
from deepeq.nn import infinity_norm

HIDDEN, LABELS = 16, 4
PLAIN = deepeq.FixedPointIteration(rtol=1e-3, max_steps=300)  # also backward: gradients go from node to node as well
OPTIONS = {"solver": PLAIN, "adjoint": deepeq.ImplicitAdjoint(solver=PLAIN), "norm": "positions"}


def chains(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features (nodes, labels), edges (2, nodes - chains), the chain of each node, and the label of each."""
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    graph = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    labels = torch.randint(LABELS, (len(lengths),))
    features = 0.01 * torch.randn(len(graph), LABELS)
    features[first] += one_hot(labels, LABELS)
    later = 1 + (graph[1:] == graph[:-1]).nonzero().squeeze(1)
    return features, torch.stack([later - 1, later]), graph, labels[graph]


def neighbors(z: Tensor, edges: Tensor) -> Tensor:
    """Return A z: the sum of the nodes that point to each node."""
    return torch.zeros_like(z).index_add(0, edges[1], z[edges[0]])


class ImplicitGraphNetwork(nn.Module):
    """A cell of one convolution, its equilibrium, and a linear layer that reads each node."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(HIDDEN, HIDDEN, bias=False), nn.Linear(LABELS, HIDDEN, bias=False)
        nn.init.eye_(self.w.weight)  # messages arrive from the first step of training on
        infinity_norm(self.w, bound=1.0)
        self.readout = nn.Linear(HIDDEN, LABELS)

    def forward(self, features: Tensor, edges: Tensor, graph: Tensor | None) -> Tensor:
        w, u = self.w.weight, self.u(features)
        f, dims = lambda z: (neighbors(z @ w.T, edges) + u).relu(), 0 if graph is None else 1
        return self.readout(deepeq.fixed_point(f, 0 * u, segments=graph, batch_dims=dims, **OPTIONS).value)


class ConvolutionalNetwork(nn.Module):
    """An explicit network of `depth` convolutions, where each node also reads itself."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise([LABELS, *[HIDDEN] * depth, LABELS]))
        for layer in self.layers[1:-1]:
            nn.init.eye_(layer.weight)

    def forward(self, z: Tensor, edges: Tensor, graph: Tensor | None) -> Tensor:
        *layers, readout = self.layers
        for layer in layers:
            z = layer(0.5 * (z + neighbors(z, edges))).relu()
        return readout(z)


def run(model: nn.Module, steps: int, lengths: list[int]) -> tuple[list[Tensor], float]:
    """Train, and return the accuracy (%) at each place of test chains, and how far ragged and coupled solves differ."""
    optimizer, right, difference = torch.optim.Adam(model.parameters(), lr=0.01), [], 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        features, edges, graph, labels = chains(torch.randint(lengths[0], lengths[3] + 1, (16,)).tolist())
        loss = cross_entropy(model(features, edges, graph), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
    for length in lengths:
        features, edges, graph, labels = chains([length] * 100)
        coupled, ragged = model(features, edges, None), model(features, edges, graph)
        right.append(100.0 * (coupled.argmax(dim=1) == labels).view(100, length).float().mean(dim=0))
        difference = max(difference, (coupled - ragged).detach().abs().max().item())
    return right, difference


if __name__ == "__main__":
    arguments, rows, differences, (figure, (left, right)) = parse("graph_chains", __doc__), [], [], panels(2)
    lengths, depths = ([1, 2, 5, 10, 20], (2, 5)) if arguments.fast else ([10, 20, 50, 100, 200], (2, 10, 30))
    makers = {"implicit": ImplicitGraphNetwork} | {f"{k} layers": lambda k=k: ConvolutionalNetwork(k) for k in depths}
    for (name, make), color in zip(makers.items(), COLORS, strict=False):
        parts, rows = [], [*rows, Row(name, count(make()), arguments.seeds, [], [])]
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            start = time.perf_counter()
            accuracies, difference = run(make(), 60 if arguments.fast else 400, lengths)
            parts, differences = [*parts, accuracies], [*differences, difference]
            rows[-1].seconds.append(time.perf_counter() - start)
            rows[-1].reached.append(accuracies[3].mean().item())
        curve = [torch.cat(same).mean().item() for same in zip(*parts, strict=True)]
        left.plot(lengths, curve, "o-", color=color, label=name)
        right.plot(range(1, lengths[3] + 1), sum(part[3] for part in parts) / len(parts), color=color)
    left.set(xlabel="nodes of the chain", xticks=lengths[1:], ylim=(0, 105), ylabel="nodes with the right label (%)")
    right.set(xlabel="place in the chain", title=f"Each node of chains of {lengths[3]} nodes", ylim=(0, 105))
    left.legend(fontsize=12)
    note = "Each hop costs an evaluation; where a few hops are enough, a network of a few layers is cheaper."
    details = {"ragged_and_coupled_differ_by": max(differences)}
    metric = f"right labels, chains of {lengths[3]} (%)"
    save(arguments, rows, figure, metric=metric, target=99.0, note=note, details=details)
