"""Warm starts: each frame of a film is solved from the solution of the frame before it.

A camera is out of focus and noisy. A layer restores each frame: z* is the equilibrium of a small convolutional cell
that sees the blurred frame. It is trained on single pictures. Neighboring frames are alike, and so are their
equilibria, so the last z* is a good first state for the next frame: that costs one argument, `layer(frame, z0)`.
Look at the evaluations of the cell per frame, and at the cut in the middle of the film, where the last frame is of no
use. The pictures are as good, because a warm start ends at the same tolerance.
"""

import time
from statistics import mean

import torch
from _report import COLORS, Row, count, panels, parse, save
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, pad

import deepeq
from deepeq.nn import ConvCell

SIZE, WIDTH = 32, 16


def scene(films: int, frames: int, speed: float) -> Tensor:
    """Return films of discs that move and bounce before a wavy background, `(frames, films, 1, SIZE, SIZE)`."""
    (place, way), (radius, gray) = torch.rand(2, films, 3, 2, 1, 1), torch.rand(2, films, 3, 1, 1)
    wave = torch.rand(3, films, 1, 1)
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")) / SIZE
    background = 0.3 + 0.2 * (6.3 * (3 * wave[0] * grid[0] + 3 * wave[1] * grid[1] + wave[2])).sin()
    pictures = []
    for t in range(frames):
        center = 1 - ((place + speed / SIZE * t * (2 * way - 1)) % 2 - 1).abs()
        distance = (grid - center).square().sum(2).sqrt()
        picture = background
        for i in range(3):
            picture = picture.lerp(gray[:, i], ((0.1 + 0.15 * radius[:, i] - distance[:, i]) * SIZE).sigmoid())
        pictures.append(picture.unsqueeze(1))
    return torch.stack(pictures)


def blurred(pictures: Tensor) -> Tensor:
    """Return pictures after a blur of 5 x 5 pixels and with noise."""
    frames = pad(pictures.flatten(0, 1), (2, 2, 2, 2), mode="replicate")
    soft = conv2d(frames, torch.full((1, 1, 5, 5), 0.04)).view_as(pictures)
    return soft + 0.01 * torch.randn_like(soft)


class Restorer(nn.Module):
    """A correction of the blurred picture, read from an equilibrium or, for comparison, from explicit layers."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.layer = deepeq.DEQ(ConvCell(1, WIDTH), solver=deepeq.Broyden(rtol=1e-3, max_steps=40))
        if explicit:
            parts = [(nn.Conv2d(d, WIDTH, 3, padding=1), nn.GroupNorm(1, WIDTH), nn.ReLU()) for d in (1, WIDTH, WIDTH)]
            self.layer = nn.Sequential(*[part for group in parts for part in group])
        self.readout = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor, z0: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        """Return the picture, the state, and the evaluations of the cell."""
        if isinstance(self.layer, deepeq.DEQ):
            solution = self.layer(x, z0)
            return x + self.readout(solution.value), solution.value, solution.num_evals
        state = self.layer(x)
        return x + self.readout(state), state, 1


def train(model: nn.Module, steps: int) -> None:
    """Train with plain PyTorch on single pictures."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        sharp = scene(16, 1, 0.0)
        loss = mse_loss(model(blurred(sharp)[0])[0], sharp[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def play(model: nn.Module, film: Tensor, sharp: Tensor, warm: bool) -> tuple[list[int], list[float]]:
    """Return the evaluations and the PSNR in dB of each frame."""
    frames, z = [], None
    for frame, clean in zip(film, sharp, strict=True):
        picture, z, evaluations = model(frame, z if warm else None)
        frames.append((evaluations, -10.0 * mse_loss(picture, clean).log10().item()))
    return tuple(map(list, zip(*frames, strict=True)))


if __name__ == "__main__":
    arguments, (figure, (left, right)) = parse("moving_picture", __doc__), panels(2)
    frames, steps = (6, 10) if arguments.fast else (20, 300)
    names = ("from the last frame", "explicit network, one pass", "from zero")
    rows = [Row(name, count(Restorer("pass" in name)), arguments.seeds, [], []) for name in names]
    numbers, psnr = {name: [] for name in names}, {name: [] for name in names}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        sharp = torch.cat([scene(1, frames // 2, speed=0.5) for _ in range(2)])  # a cut in the middle
        film, models, seconds = blurred(sharp), [Restorer(explicit) for explicit in (False, True)], []
        for model in models:
            start = time.perf_counter()
            train(model, steps)
            seconds.append(time.perf_counter() - start)
        for row, color, style, index in zip(rows, COLORS, ("-", "-", ":"), (0, 1, 0), strict=False):
            evaluations, quality = play(models[index], film, sharp, warm=row is rows[0])
            row.seconds.append(seconds[index])
            numbers[row.model].append(mean(evaluations))
            psnr[row.model].append(mean(quality))
            if seed == arguments.seeds[0]:
                left.plot(range(1, frames + 1), evaluations, "o" + style, color=color, label=row.model)
                right.plot(range(1, frames + 1), quality, style, color=color)
        for row in rows:
            row.reached.append(100.0 * numbers[row.model][-1] / numbers["from zero"][-1])
    left.set(xlabel="frame", ylabel="evaluations of the cell (lower is better)", ylim=(0, 8), xticks=range(5, 21, 5))
    right.set(xlabel="frame", ylabel="PSNR in dB (higher is better)", xticks=range(5, 21, 5))
    left.legend(fontsize=12, loc="upper right")
    note = "An explicit network of the same size restores the film better, and in one pass."
    metric, details = "evaluations per frame, in % of those from zero", {"evaluations": numbers, "psnr_db": psnr}
    save(arguments, rows, figure, metric=metric, better="lower", target=75.0, note=note, details=details)
