"""Sudoku of 4x4 as an equilibrium: search until the answer no longer changes.

One small cell reads a puzzle and a state of its 16 squares. The equilibrium z* = f(z*, puzzle) is an answer that the
cell does not change any more. The residual says, without the solution, whether the search has settled. A search that
has not can start again from another random state; the start of least residual is kept. The 288 solution grids are 12 up
to the names of the digits, and three of the 12 are for the test alone.
"""

import time
from dataclasses import replace
from itertools import permutations

import torch
from _report import COLORS, Row, count, panels, parse, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm

from deepeq import Equilibrium, FixedPointIteration, PhantomAdjoint, Stack

SQUARES = torch.arange(16).view(4, 4)  # rows, columns and blocks of squares hold each digit once
UNITS = torch.cat([SQUARES, SQUARES.T, SQUARES.view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)])
DEPTHS, RESTARTS = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16)
SHORT, PHANTOM = FixedPointIteration(rtol=1e-2, max_steps=12), PhantomAdjoint(steps=3, returns="last")
HOW = {  # exact gradients (ImplicitAdjoint) of searches that are this short trained worse
    "equilibrium": Equilibrium(solver=SHORT, adjoint=PHANTOM),
    "weight-tied stack of 8": Stack(depth=8),
    "explicit stack of 8 blocks": Stack(depth=1),
}
FAR = Equilibrium(solver=FixedPointIteration(rtol=1e-9, max_steps=65), on_failure="ignore")


def minimal_puzzles(solutions: Tensor, grids: Tensor) -> Tensor:
    """Return a puzzle for each solution, with 0 where a square is empty; without any of its clues it is ambiguous."""
    clues = torch.ones_like(solutions, dtype=torch.bool)
    for square in torch.rand(solutions.shape).argsort(1).T:
        fewer = clues.scatter(1, square[:, None], False)
        unique = ((solutions[:, None] == grids) | ~fewer[:, None]).all(2).sum(1) == 1
        clues = torch.where(unique[:, None], fewer, clues)
    return solutions * clues


def split(per_grid: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return puzzles and solutions for training, then those for the test."""
    grids = torch.tensor(list(permutations(range(1, 5))))[torch.cartesian_prod(*[torch.arange(24)] * 4)].flatten(1)
    grids = grids[((2**grids)[:, UNITS].sum(2) == 30).all(1)]
    renamed = (grids[:, :4].argsort(1) + 1).gather(1, grids - 1)  # the first row becomes 1 2 3 4
    test = torch.isin(renamed.unique(dim=0, return_inverse=True)[1], torch.randperm(12)[:3])
    training, held = grids[~test].repeat(per_grid, 1), grids[test].repeat(3, 1)
    return minimal_puzzles(training, grids), training, minimal_puzzles(held, grids), held


class Mixer(nn.Module):
    """Blocks that mix squares, then channels, with a normalization after each, so that the state stays bounded."""

    def __init__(self, width: int, hidden: int, blocks: int, start: float) -> None:
        super().__init__()
        self.width, self.start, self.embedding, self.head = width, start, nn.Embedding(5, width), nn.Linear(width, 4)
        sizes = [(16, hidden), (width, 3 * width)] * blocks
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(n, m), nn.SiLU(), nn.Linear(m, n)) for n, m in sizes)

    def initial_state(self, x: Tensor) -> Tensor:
        return self.start * torch.randn(*x.shape, self.width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        h = z + self.embedding(x)
        for squares, channels in zip(self.layers[::2], self.layers[1::2], strict=True):
            h = rms_norm(h + squares(h.mT).mT, h.shape[-1:])
            h = rms_norm(h + channels(h), h.shape[-1:])
        return h


def train(cell: Mixer, how: Equilibrium | Stack, x: Tensor, y: Tensor, steps: int) -> None:
    """Fit all the squares of random puzzles."""
    optimizer = torch.optim.AdamW(cell.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1.02 - step / steps)
        rows = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        cross_entropy(cell.head(how(cell, x[rows]).value).mT, y[rows] - 1).backward()
        nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
        optimizer.step()


if __name__ == "__main__":
    arguments, (figure, (left, middle, right)) = parse("sudoku", __doc__), panels(3, width=5.8)
    fast, aucs, rows, curves = arguments.fast, [], {}, {name: [] for name in (*HOW, "restarts")}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        x, y, x_test, y_test = split(1 if fast else 40)
        for name, how in HOW.items():
            began, cell = time.time(), Mixer(*((30, 36, 8, 0.0) if "explicit" in name else (64, 48, 2, 1.0)))
            train(cell, how, x, y, 3 if fast else 900)
            starts = 16 if name == "equilibrium" and not fast else 1
            with torch.no_grad():
                solution = FAR(cell, x_test.repeat(starts, 1), keep=DEPTHS)
                answers = torch.stack([cell.head(z).argmax(2) + 1 for z in solution.kept])
            solved = (answers.unflatten(1, (starts, -1)) == y_test).all(3)
            residual = solution.residual_history[-1].view(starts, -1)
            curves[name].append((100 * solved.float().mean((1, 2))).tolist())
            rows.setdefault(name, Row(name, count(cell), arguments.seeds, [], [])).seconds.append(time.time() - began)
            if name == "equilibrium":
                last, logs = solved[-1], residual.log10()
                aucs.append((residual[last][:, None] < residual[~last]).float().mean().nan_to_num(0.5).item())
                best = torch.cat([last.gather(0, residual[:n].argmin(0)[None]) for n in RESTARTS])
                curves["restarts"].append((100 * best.float().mean(1)).tolist())
    ends = {"equilibrium": -1, "weight-tied stack of 8": 3, "explicit stack of 8 blocks": 0}
    table = [replace(rows[name], reached=[curve[at] for curve in curves[name]]) for name, at in ends.items()]
    table.append(replace(table[0], model="best of 16 starts", reached=[curve[-1] for curve in curves["restarts"]]))
    table.append(replace(table[1], model="the tied stack, 64 steps", reached=[c[-1] for c in curves[table[1].model]]))
    for name in list(HOW)[:2]:
        left.plot(DEPTHS, torch.tensor(curves[name]).mean(0).tolist(), "o-", label=name)
    left.set(xscale="log", xticks=DEPTHS, xticklabels=DEPTHS, xlabel="steps", ylabel="test puzzles solved (%)")
    middle.hist([logs[last].tolist(), logs[~last].tolist()], 25, label=["right", "wrong"], color=COLORS[2:0:-1])
    middle.set(xlabel="log10 of the residual after 64 steps", ylabel="answers of the last seed", yscale="log")
    right.plot(RESTARTS, torch.tensor(curves["restarts"]).T.numpy(), "o-", label=[f"seed {n}" for n in arguments.seeds])
    right.set(xlabel="starts, the least residual kept", ylabel="test puzzles solved (%)", xticks=RESTARTS)
    _ = [axes.legend(fontsize=12) for axes in (left, middle, right)]
    details = {"depths": DEPTHS, "curves": curves, "restarts": RESTARTS, "auc_of_the_residual": aucs}
    note = "The tied stack trains in half of the time, and solves as many puzzles if it runs on for 64 steps."
    save(arguments, table, figure, metric="4x4 puzzles solved (%)", target=95.0, note=note, details=details)
