"""Deblurring as an equilibrium: the physics of the blur and a learned model of pictures, in balance.

A picture x was blurred and has noise: y = A x + noise. The equilibrium z* = R(z* + eta A^T (y - A z*)) is a picture
that a step towards the data and a small denoising network R do not change any more. R first learns to denoise, and is
then trained through the equilibrium. Look at the iterations beyond training, and at total variation (TV), without any.
"""

import time

import torch
from _report import Row, count, panels, parse, save
from skimage import data
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, mse_loss

from deepeq import Anderson, Equilibrium, FixedPointIteration, PhantomAdjoint, Stack
from deepeq.nn import OncePerSolve, spectral_norm

TRAIN = ("brick", "cell", "coins", "grass", "gravel", "immunohistochemistry", "moon", "page", "retina", "rocket")
TEST, LONG = ("astronaut", "camera", "chelsea", "coffee"), 100  # LONG: iterations in the test
KERNEL, PHANTOM = torch.full((1, 1, 5, 5), 1 / 25), PhantomAdjoint(steps=3, returns="last")
SEARCH, FAR = (Anderson(history_size=5, ridge=1e-2, rtol=r, max_steps=n) for r, n in ((1e-3, 40), (1e-9, LONG + 1)))
PLAIN, KEEP = FixedPointIteration(rtol=1e-9, max_steps=LONG + 1), {"on_failure": "ignore", "nonfinite": "keep"}
HOW = {  # a way to solve in training, the number of training steps, a way to follow the iterations in the test
    "equilibrium": (Equilibrium(solver=SEARCH, adjoint=PHANTOM, **KEEP), 300, Equilibrium(solver=FAR, **KEEP)),
    "unrolled, 5 steps": (Stack(depth=5), 600, Equilibrium(solver=PLAIN, **KEEP)),
}


def crops(names: tuple[str, ...], size: int) -> Tensor:
    """Return the parts of gray pictures at half their resolution, `(B, 1, size, size)` in [0, 1]."""
    parts = []
    for name in names:
        picture = torch.tensor(getattr(data, name)() / 255.0, dtype=torch.float32)
        picture = avg_pool2d(picture.view(1, *picture.shape[:2], -1).mean(3), 2)
        parts.append(picture.unfold(1, size, size).unfold(2, size, size).reshape(-1, 1, size, size))
    return torch.cat(parts)


def blur(z: Tensor, *, transposed: bool = False) -> Tensor:
    """Return A z, or A^T z; everything outside the picture is black."""
    return (conv_transpose2d if transposed else conv2d)(z, KERNEL, padding=2)


def psnr(z: Tensor, x: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB."""
    return -10 * (z - x).square().flatten(1).mean(1).log10().mean().item()


class Step(nn.Module):
    """One step towards the data, then the denoiser `R(v) = v - N(v)` of four convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 24), (24, 24), (24, 24), (24, 1))]
        noise = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
        self.noise, self.eta = spectral_norm(noise, bound=0.95), nn.Parameter(torch.tensor(1.0))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        v = z + self.eta * blur(y - blur(z), transposed=True)
        return v - self.noise(v)


def fit(step: Step, how: Equilibrium | Stack | None, pictures: Tensor, steps: int) -> None:
    """Train R to denoise (`how` is None), or train through a way to solve."""
    optimizer = torch.optim.Adam(step.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    cell = OncePerSolve(step.train())  # the normalized weights are computed once per solve
    for _ in range(steps):
        x = pictures[torch.randint(len(pictures), (8,))]
        v, y = x + 0.03 * torch.rand(8, 1, 1, 1) * torch.randn_like(x), blur(x) + 0.01 * torch.randn_like(x)
        z = how(cell, y, y).value if how else v - step.noise(v)
        optimizer.zero_grad()
        mse_loss(z, x).backward()
        nn.utils.clip_grad_norm_(step.parameters(), 0.1)
        optimizer.step()
        schedule.step()


def total_variation(y: Tensor, weight: float, steps: int) -> Tensor:
    """Return the pictures that total variation in place of the network finds, by proximal gradient steps."""
    z = y
    for _ in range(steps):
        rough = (z + blur(y - blur(z), transposed=True)).double().numpy()
        smooth = [torch.tensor(denoise_tv_chambolle(each[0], weight=weight, max_num_iter=30)) for each in rough]
        z = torch.stack(smooth).to(y).unsqueeze(1)
    return z


if __name__ == "__main__":
    arguments, curves, rows, (figure, (left, right)) = parse("inverse_problem", __doc__), {}, [], panels(2, width=8)
    began, pictures, x = time.time(), crops(TRAIN, 32), crops(TEST, 48)[:: 50 if arguments.fast else 4]
    torch.manual_seed(0)
    y = blur(x) + 0.01 * torch.randn_like(x)
    columns = [y, total_variation(y, 1.5e-3, 5 if arguments.fast else 200)]  # a good weight for the training pictures
    tv = Row("total variation", None, [0], [psnr(columns[1], x)], [time.time() - began])
    for name, (how, steps, far) in HOW.items():
        rows.append(Row(name, count(Step()), arguments.seeds, [], []))
        for seed in arguments.seeds:
            torch.manual_seed(seed)
            began, step, states = time.time(), Step(), []
            fit(step, None, pictures, 10 if arguments.fast else 300)
            fit(step, how, pictures, 1 if arguments.fast else steps)
            with torch.no_grad():
                far(OncePerSolve(step.eval()), y, y, callback=lambda _, z, __, states=states: states.append(z))
            states += [states[-1]] * (LONG + 1 - len(states))  # a search that is done stays
            curves.setdefault(name, []).append([psnr(z, x) for z in states])
            rows[-1].seconds.append(time.time() - began)
        columns += [states[5], states[LONG]]
        rows[-1].reached += [curve[5 if "5" in name else LONG] for curve in curves[name]]
        left.plot(torch.tensor(curves[name]).mean(0).tolist(), label=name)
    left.axhline(tv.reached[0], color="black", linestyle="--", label=tv.model)
    left.set(xlabel="iterations", ylabel="PSNR in dB (higher is better)", ylim=(18, 32))
    left.legend(fontsize=12)
    right.imshow(torch.cat([torch.cat(list(z[::8, 0])) for z in (*columns, x)], 1).clamp(0, 1).numpy(), cmap="gray")
    right.set(xticks=[], yticks=[], xlabel="seen, TV, equilibrium (5, 100 steps), unrolled (5, 100), original")
    note = "Total variation, which nobody trained, restores best; five unrolled steps train in less time."
    metric, details, target = "PSNR of test pictures (dB)", {"curves": curves}, tv.reached[0]
    save(arguments, [*rows, tv], figure, metric=metric, target=target, note=note, details=details)
