"""A self-consistent field: charges that agree with the potential that they make, and exact forces and Hessians.

A ring of atoms has one orbital per atom, of two elements in turn. Electrons fill the lower half of the levels of a
Hamiltonian H; H depends on the charges q of the atoms; the charges come from the occupied orbitals. So q = f(q; x) at
positions x: the charges are an equilibrium, and chemists call the search for it a self-consistent field. The force is
-dE/dx, and the Hessian d2E/dx2 gives the vibrations. Differentiation through the search would store all of its steps.
Implicit differentiation needs the equilibrium alone, and is exact for second derivatives too. Look at three things:

- Both agree with finite differences in float64. The Hessian needs the response of the charges: frozen, it is wrong.
- The explicit network is a loop of k mixing steps that is differentiated step by step, with k stored graphs.
- Plain mixing q <- q + a (f(q) - q) needs a small `a` and many steps. Anderson acceleration was invented for this.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from _report import COLORS, Row, panels, parse, save
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import deepeq

HUBBARD, DISTANCE = 3.0, 1.4
GOAL = {"rtol": 1e-10, "max_steps": 150}
SOLVERS = {f"mixing, a = {a}": deepeq.FixedPointIteration(damping=1 - a, **GOAL) for a in (1.0, 0.3, 0.1)}
SOLVERS |= {"Anderson": deepeq.Anderson(**GOAL), "Broyden": deepeq.Broyden(**GOAL)}
ADJOINT = deepeq.ImplicitAdjoint(solver=deepeq.GMRES(rtol=1e-12), twice_differentiable=True)


class Ring:
    """The map of the charges to the charges for positions `(..., atoms, 3)`, and the energy."""

    def __init__(self, x: Tensor) -> None:
        n = torch.arange(x.shape[-2])
        square = (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1)
        distance = torch.where(n == n.unsqueeze(1), 1.0, square).sqrt()
        apart = (n - n.unsqueeze(1)) % len(n)
        bonds = torch.where((apart == 1) | (apart == len(n) - 1), torch.exp(2.0 * (DISTANCE - distance)), 0.0)
        onsite = torch.where(n % 2 == 0, 0.3, -0.3).double()
        self.hamiltonian = torch.diag_embed(onsite) - bonds  # without the field of the charges
        self.coulomb = (square + HUBBARD**-2).rsqrt()  # of unit charges: HUBBARD on one atom, 1/r far apart
        self.repulsion, self.start = bonds.square().sum((-2, -1)) / 2, torch.zeros_like(x[..., 0]).detach()

    def orbitals(self, charges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the levels, the orbitals, and the potential of the charges."""
        field = (self.coulomb @ charges.unsqueeze(-1)).squeeze(-1)
        return *torch.linalg.eigh(self.hamiltonian + torch.diag_embed(field)), field

    def __call__(self, charges: Tensor) -> Tensor:
        """Return the electrons of each atom beyond one, from the lower half of the orbitals."""
        return 2.0 * self.orbitals(charges)[1][..., : charges.shape[-1] // 2].square().sum(-1) - 1.0

    def energy(self, charges: Tensor) -> Tensor:
        """Return the energy of each ring."""
        levels, _, field = self.orbitals(charges)
        band = 2.0 * levels[..., : levels.shape[-1] // 2].sum(-1)
        return band - ((1.0 + 0.5 * charges) * field).sum(-1) + self.repulsion


def solved(x: Tensor, respond: bool = True) -> Tensor:
    """Return the energy at the equilibrium; leading dimensions of `x` are independent rings."""
    ring, solver = Ring(x), deepeq.Anderson(rtol=1e-12, max_steps=200)
    charges = deepeq.fixed_point(ring, ring.start, solver=solver, adjoint=ADJOINT, batch_dims=x.ndim - 2).value
    return ring.energy(charges if respond else charges.detach())


def mixed(x: Tensor, steps: int) -> Tensor:
    """Return the energy of the explicit network: after a fixed number of mixing steps, with a graph of each."""
    charges = (ring := Ring(x)).start
    for _ in range(steps):
        charges = torch.lerp(charges, ring(charges), 0.3)
    return ring.energy(charges)


def differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-3) -> Tensor:
    """Return fourth-order central differences of a function of many rings, one row per coordinate."""
    moves = step * torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    near, far = (function(x + k * moves) - function(x - k * moves) for k in (1, 2))
    return (8 * near - far) / (12 * step)


def error(value: Tensor, reference: Tensor) -> float:
    """Return a relative error."""
    return ((value - reference.view_as(value)).norm() / reference.norm()).item()


if __name__ == "__main__":
    arguments, (figure, (left, right)) = parse("self_consistent_field", __doc__), panels(2)
    atoms, depths = (6, (5,)) if arguments.fast else (10, (30, 10, 5))
    energies = {"equilibrium": solved} | {f"{k} mixing steps": partial(mixed, steps=k) for k in depths}
    energies["frozen charges"] = partial(solved, respond=False)
    rows = [Row(name, None, arguments.seeds, [], []) for name in energies]
    details = {"force_error": [], "steps_to_1e-10": []}
    for seed in arguments.seeds:
        angle = 2 * torch.pi * torch.arange(atoms).double() / atoms
        circle = DISTANCE / (2 * torch.sin(angle[1] / 2)) * torch.stack([angle.cos(), angle.sin(), 0 * angle], dim=1)
        x = circle + 0.05 * torch.randn(atoms, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        curvature = differences(lambda y: jacobian(lambda v: solved(v).sum(), y).flatten(1), x)
        details["force_error"].append(error(jacobian(solved, x), differences(solved, x).detach()))
        for row, energy in zip(rows, energies.values(), strict=True):
            start = time.perf_counter()
            row.reached.append(error(hessian(energy, x), curvature))
            row.seconds.append(time.perf_counter() - start)
        solutions, ring = {}, Ring(x)
        for name, solver in SOLVERS.items():
            solutions[name] = deepeq.fixed_point(ring, ring.start, solver=solver, batch_dims=0, on_failure="ignore")
        details["steps_to_1e-10"].append({name: len(s.residual_history) for name, s in solutions.items()})
    for color, (name, solution) in zip(COLORS[1:], solutions.items(), strict=False):
        left.semilogy(solution.residual_history, color=color, label=name)
    left.set(xlabel="evaluations of f", ylabel="relative residual (lower is better)", title="Finding the charges")
    left.legend(fontsize=12)
    means = [sum(row.reached) / len(row.reached) for row in rows]
    right.barh(list(energies)[::-1], means[::-1], log=True, color=[COLORS[1]] * (len(rows) - 1) + [COLORS[0]])
    right.axvline(1e-4, color="black", linestyle="--")
    right.set(xlabel="relative error (lower is better; dashed: target)", title=f"Hessian of {atoms} atoms")
    note = "Thirty steps of mixing with a good a give the same Hessian in less time, if their graphs fit into memory."
    metric = "relative error of the Hessian against finite differences"
    save(arguments, rows, figure, metric=metric, better="lower", target=1e-4, note=note, details=details)
