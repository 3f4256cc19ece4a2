"""Warnings of a run that is about to go wrong, from the metrics that it has written."""

import math
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

UNCONVERGED_SHARE = 0.1
"""Least share of unconverged solves that is worth a warning."""
UNCONVERGED_GROWTH = 2.0
"""By how much that share has to exceed its median so far, and the share of the warning before."""
RADIUS_GROWTH = 1.5
"""By how much a spectral radius above 1 has to exceed the least one so far, and that of the warning before."""
MIN_ROWS = 5
"""Rows of training with a solver that are needed to tell what is usual."""

_CAUSES = {
    "forward": "the map has become harder to solve",
    "backward": "the linear system of the backward pass has become harder to solve, so that gradients are less exact",
}
_SOLVERS = {"forward": "solver", "backward": "backward"}
_REMEDIES = (
    "raise equilibrium.jacobian_weight (where there is no subsequence_len), lower optimizer.lr or lengthen "
    "equilibrium.warm_up_share"
)


def warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the newest of the rows of `metrics.jsonl` gives reason to fear, a sentence each.

    All that came before is seen in the rows, so that a resumed run warns as an uninterrupted one does.
    """
    if not rows:
        return []
    newest, found = rows[-1], []
    if newest["split"] == "train" and not newest.get("warm_up"):
        found = [_unconverged(rows, "forward"), _unconverged(rows, "backward")]
    elif newest["split"] == "valid":
        found = [_radius(rows)]
    return [sentence for sentence in found if sentence is not None]


def _unconverged(rows: Sequence[dict[str, Any]], direction: Literal["forward", "backward"]) -> str | None:
    name = f"{direction}_unconverged"
    newest = rows[-1].get(name)
    if newest is None or newest < UNCONVERGED_SHARE:
        return None
    shares = [row[name] for row in rows if row["split"] == "train" and not row.get("warm_up") and name in row]
    usual = _last_alarm(shares, _medians(shares), least=UNCONVERGED_SHARE, growth=UNCONVERGED_GROWTH)
    if usual is None:
        return None
    solver = f"equilibrium.{_SOLVERS[direction]}"
    return (
        f"step {rows[-1]['step']}: {newest:.0%} of the {direction} solves stopped at their step limit, where "
        f"{usual:.1%} was usual: {_CAUSES[direction]}; {_REMEDIES}, or give it more: raise {solver}.max_steps "
        f"or loosen {solver}.rtol"
    )


def _radius(rows: Sequence[dict[str, Any]]) -> str | None:
    name = "spectral_radius"
    newest, radii, shallow = rows[-1].get(name), [], False
    if newest is None or not newest > 1.0:
        return None
    for row in rows:
        if row["split"] == "train":
            shallow = bool(row.get("warm_up"))
        elif row["split"] == "valid" and name in row and not shallow:
            radii.append(row[name])
    if shallow:  # training has not asked for an equilibrium yet
        return None
    least = _last_alarm(radii, _minima(radii), least=1.0, growth=RADIUS_GROWTH)
    if least is None:
        return None
    return (
        f"step {rows[-1]['step']}: the spectral radius of the map at its equilibrium is {newest:.2f}, up from "
        f"{least:.2f}: above 1, stacking the cell does not converge, and solvers need ever more steps; {_REMEDIES}"
    )


def _last_alarm(values: Sequence[float], usual: Iterable[float], *, least: float, growth: float) -> float | None:
    """What was usual before the last of the values, if that value raises an alarm, else None."""
    warned, before = 0.0, None
    for value, normal in zip(values, usual, strict=True):
        before = None
        if value >= least and value >= growth * normal and value >= growth * warned:
            warned, before = value, normal
    return before


def _medians(values: Sequence[float]) -> Iterator[float]:
    """The median of the values before each one; infinite while they are too few."""
    earlier: list[float] = []
    for value in values:
        count = len(earlier)
        # Of a sorted list: statistics.median would sort it again at every row.
        yield (earlier[(count - 1) // 2] + earlier[count // 2]) / 2 if count >= MIN_ROWS else math.inf
        insort(earlier, value)


def _minima(values: Sequence[float]) -> Iterator[float]:
    """The least of the values before each one; infinite before the first."""
    least = math.inf
    for value in values:
        yield least
        least = min(least, value)
