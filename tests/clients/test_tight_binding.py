"""Self-consistent charges of a chain of atoms: forces, Hessians and a response that no variational principle helps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from deepeq import GMRES, Anderson, Broyden, ImplicitAdjoint, Result, Solution, fixed_point

ONSITE = torch.tensor([-0.3, 0.25, 0.1, -0.05], dtype=torch.float64)
NUM_ATOMS = 4
TEMPERATURE, HUBBARD = 0.15, 1.2
EXACT = Broyden(rtol=1e-13, max_steps=200, history_size=200)
SCF = Broyden(rtol=1e-10, atol=1e-12, max_steps=200, history_size=200)
TWICE = ImplicitAdjoint(solver=GMRES(rtol=1e-12), twice_differentiable=True)
TWO_DERIVATIVES = pytest.mark.parametrize(
    "solver", [EXACT, Anderson(rtol=1e-13, max_steps=300)], ids=["broyden", "anderson"]
)


@dataclass
class Chain:
    """One orbital an atom; positions `(..., atoms, 3)`, excess electrons `(..., atoms)`, chemical potential `(..., 1)`.

    The Hamiltonian is `H0(R) + diag(gamma(R) n)` for excess electrons `n`; `H0` joins neighbors alone. The state holds
    the chemical potential too: it is what makes the chain neutral.
    """

    positions: Tensor
    onsite: Tensor = ONSITE

    def __post_init__(self) -> None:
        difference = self.positions.unsqueeze(-2) - self.positions.unsqueeze(-3)
        self.square = difference.square().sum(dim=-1)  # (..., atoms, atoms)
        number = torch.arange(NUM_ATOMS)
        steps = (number.unsqueeze(1) - number).abs()
        distance = torch.where(steps > 0, self.square, 1.0).sqrt()
        hopping = torch.where(steps == 1, -1.1 * torch.exp(1.0 - distance), 0.0)
        self.hopping = torch.where(steps == 0, torch.diag(self.onsite), hopping)
        self.gamma = (self.square + HUBBARD**-2).rsqrt()
        self.repulsion = torch.where(steps > 0, torch.exp(2.0 - 2.0 * distance), 0.0).sum(dim=(-2, -1)) / 2

    def levels(self, excess: Tensor) -> tuple[Tensor, Tensor]:
        potential = (self.gamma @ excess.unsqueeze(-1)).squeeze(-1)
        energies, orbitals = torch.linalg.eigh(self.hopping + torch.diag_embed(potential))
        return energies, orbitals

    def __call__(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        excess, potential = state
        energies, orbitals = self.levels(excess)
        occupations = 2.0 * torch.sigmoid((potential - energies) / TEMPERATURE)
        missing = NUM_ATOMS - occupations.sum(dim=-1, keepdim=True)
        populations = (orbitals.square() @ occupations.unsqueeze(-1)).squeeze(-1)
        return populations - 1.0, potential + 0.1 * missing

    def first_state(self) -> tuple[Tensor, Tensor]:
        excess = torch.zeros(self.positions.shape[:-1], dtype=torch.float64)
        return excess, torch.zeros_like(excess[..., :1])

    def energy(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """The free energy of electrons and nuclei, one number per geometry."""
        excess, potential = state
        energies, _ = self.levels(excess)
        x = (potential - energies) / TEMPERATURE
        occupations = torch.sigmoid(x)
        entropy = -2.0 * (occupations * torch.nn.functional.logsigmoid(x)).sum(dim=-1)
        entropy = entropy - 2.0 * ((1.0 - occupations) * torch.nn.functional.logsigmoid(-x)).sum(dim=-1)
        field = (self.gamma @ excess.unsqueeze(-1)).squeeze(-1)
        counted_twice = ((1.0 + 0.5 * excess) * field).sum(dim=-1)
        band = 2.0 * (occupations * energies).sum(dim=-1)
        return band - TEMPERATURE * entropy - counted_twice + self.repulsion

    def dipole(self, state: tuple[Tensor, Tensor]) -> Tensor:
        return -(state[0].unsqueeze(-1) * self.positions).sum(dim=-2)

    def solve_by_hand(self) -> tuple[Tensor, Tensor]:
        """The same state by damped iteration, without the library."""
        excess, potential = self.first_state()
        for _ in range(400):
            new_excess, new_potential = self((excess, potential))
            excess, potential = excess.lerp(new_excess, 0.4), new_potential
        return excess, potential


def geometries(count: int, generator: torch.Generator) -> Tensor:
    """Bent chains with uneven distances, `(count, atoms, 3)`."""
    straight = torch.stack([torch.arange(NUM_ATOMS) * 1.2, torch.zeros(NUM_ATOMS), torch.zeros(NUM_ATOMS)], dim=1)
    noise = torch.randn(count, NUM_ATOMS, 3, generator=generator, dtype=torch.float64)
    return straight.double() + 0.15 * noise


def self_consistent(positions: Tensor, solver: Anderson | Broyden = EXACT) -> tuple[Chain, Solution]:
    chain = Chain(positions)
    batch_dims = positions.ndim - 2
    return chain, fixed_point(chain, chain.first_state(), solver=solver, adjoint=TWICE, batch_dims=batch_dims)


def energy(positions: Tensor) -> Tensor:
    chain, solution = self_consistent(positions)
    return chain.energy(solution.value).sum()


def dipole(positions: Tensor) -> Tensor:
    chain, solution = self_consistent(positions)
    return chain.dipole(solution.value)


@torch.no_grad()
def differences(of: Callable[[Chain, tuple[Tensor, Tensor]], Tensor], positions: Tensor, step: float) -> Tensor:
    """Central differences of a quantity at the self-consistent state, `(..., atoms * 3)`; all moves in one batch."""
    moves = step * torch.eye(positions.numel(), dtype=torch.float64).reshape(-1, *positions.shape)
    values = []
    for sign in (1.0, -1.0):
        chain = Chain(positions + sign * moves)
        values.append(of(chain, chain.solve_by_hand()))
    return ((values[0] - values[1]) / (2.0 * step)).movedim(0, -1)


@TWO_DERIVATIVES
def test_charges_are_self_consistent_and_conserved(generator, solver):
    (positions,) = geometries(1, generator)
    chain, solution = self_consistent(positions, solver)
    assert solution.result is Result.CONVERGED
    for a, b in zip(solution.value, chain.solve_by_hand(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert solution.value[0].sum().item() == pytest.approx(0.0, abs=1e-10)
    assert solution.value[0].abs().max() > 0.1  # the atoms are charged


def test_the_force_is_the_slope_of_the_converged_energy(generator):
    (positions,) = geometries(1, generator)
    force = -torch.autograd.functional.jacobian(energy, positions)
    slope = differences(lambda chain, state: chain.energy(state), positions, 1e-4)
    torch.testing.assert_close(force.flatten(), -slope, rtol=1e-6, atol=1e-8)


def test_the_response_of_the_dipole_is_that_of_the_converged_charges(generator):
    (positions,) = geometries(1, generator)
    response = torch.autograd.functional.jacobian(dipole, positions).reshape(3, -1)
    torch.testing.assert_close(
        response, differences(lambda chain, state: chain.dipole(state), positions, 1e-4), rtol=1e-6, atol=1e-7
    )
    # The charges move with the atoms: to leave that out is to be far off.
    chain = Chain(positions)
    state = chain.solve_by_hand()
    frozen = torch.autograd.functional.jacobian(lambda x: Chain(x).dipole(state), positions).reshape(3, -1)
    assert float((response - frozen).abs().max()) > 0.05


def test_the_hessian_is_the_curvature_of_the_converged_energy(generator):
    (positions,) = geometries(1, generator)
    size = positions.numel()
    hessian = torch.autograd.functional.hessian(energy, positions).reshape(size, size)
    torch.testing.assert_close(hessian, hessian.T, rtol=0.0, atol=1e-9)

    def slope(x: Tensor) -> Tensor:
        # The energy, with the potential for the missing electrons, does not depend on the state to first order.
        state = Chain(x).solve_by_hand()
        with torch.enable_grad():
            chain = Chain(x.detach().requires_grad_())
            missing = 10.0 * (chain(state)[1] - state[1]).squeeze(-1)
            total = chain.energy(state) + state[1].squeeze(-1) * missing
            return torch.autograd.grad(total.sum(), chain.positions)[0].flatten(start_dim=-2)

    curvature = differences(lambda chain, _: slope(chain.positions), positions, 1e-4)
    torch.testing.assert_close(hessian, curvature, rtol=1e-6, atol=1e-7)
    direction = torch.randn(positions.shape, generator=generator, dtype=torch.float64)
    for product in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        value, column = product(energy, positions, direction)
        torch.testing.assert_close(value, energy(positions), rtol=1e-12, atol=0.0)
        torch.testing.assert_close(column.flatten(), hessian @ direction.flatten(), rtol=1e-7, atol=1e-9)


def test_second_derivatives_of_the_dipole_are_right_too(generator):
    (positions,) = geometries(1, generator)
    direction = torch.randn(3, generator=generator, dtype=torch.float64)

    def along(x: Tensor) -> Tensor:
        return dipole(x) @ direction

    hessian = torch.autograd.functional.hessian(along, positions).reshape(positions.numel(), -1)

    def slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return torch.autograd.functional.jacobian(lambda y: (dipole(y) @ direction).sum(), x).flatten(start_dim=-2)

    curvature = differences(lambda chain, _: slope(chain.positions), positions, 1e-4)
    torch.testing.assert_close(hessian, curvature, rtol=1e-5, atol=1e-6)


def test_the_response_of_atoms_that_are_neutral_by_symmetry_is_that_of_their_converged_charges(generator):
    (positions,) = geometries(1, generator)
    onsite = torch.full((NUM_ATOMS,), 0.3, dtype=torch.float64)  # each atom has one electron, to rounding

    def excess(x: Tensor) -> Tensor:
        chain = Chain(positions, onsite + x)
        return fixed_point(chain, chain.first_state(), solver=SCF, batch_dims=0).value[0]

    response = torch.autograd.functional.jacobian(excess, torch.zeros_like(onsite))
    step, columns = 1e-4, []
    for move in step * torch.eye(NUM_ATOMS, dtype=torch.float64):
        up, down = (Chain(positions, onsite + shift).solve_by_hand()[0] for shift in (move, -move))
        columns.append((up - down) / (2.0 * step))
    torch.testing.assert_close(response, torch.stack(columns, dim=1), rtol=1e-4, atol=1e-5)


def test_a_batch_of_geometries_has_the_energies_and_forces_of_each(generator):
    positions = geometries(5, generator)
    positions[3] *= 1.3  # far apart, so hard to converge
    batch = positions.clone().requires_grad_()
    chain, solution = self_consistent(batch)
    assert len(set(solution.num_steps.tolist())) > 1
    (forces,) = torch.autograd.grad(-chain.energy(solution.value).sum(), batch)
    for i, single in enumerate(positions):
        alone, own = self_consistent(single.requires_grad_())
        assert solution.num_steps[i] == own.num_steps
        torch.testing.assert_close(chain.energy(solution.value)[i], alone.energy(own.value), rtol=1e-11, atol=0.0)
        (force,) = torch.autograd.grad(-alone.energy(own.value), single)
        torch.testing.assert_close(forces[i], force, rtol=1e-9, atol=1e-11)


@dataclass
class Ring:
    """Two atoms a cell at several wave numbers, with the exchange of a bond; the state is a complex density matrix.

    A magnetic flux through the ring turns the phase of each bond between cells by `flux`.
    """

    flux: Tensor
    num_cells: int = 3

    def hamiltonian(self, density: Tensor) -> Tensor:
        k = 2.0 * math.pi * torch.arange(self.num_cells, dtype=torch.float64) / self.num_cells + self.flux
        phase = torch.exp(1j * k)
        mean = density.mean(dim=0)  # all wave numbers together make the field
        bond = -1.0 - 0.6 * phase - 0.8 * mean[0, 1]
        level = torch.stack([0.2 + 0.5 * mean[0, 0].real, -0.2 + 0.5 * mean[1, 1].real]).expand(self.num_cells, 2)
        upper = torch.nn.functional.pad(bond.reshape(-1, 1, 1), (1, 0, 0, 1))
        return torch.diag_embed(level.to(bond.dtype)) + upper + upper.mH

    def __call__(self, density: Tensor) -> Tensor:
        energies, orbitals = torch.linalg.eigh(self.hamiltonian(density))
        occupations = torch.sigmoid(-energies / TEMPERATURE).to(orbitals.dtype)
        return orbitals @ (occupations.unsqueeze(-1) * orbitals.mH)

    def first_state(self) -> Tensor:
        return 0.5 * torch.eye(2, dtype=torch.complex128).expand(self.num_cells, 2, 2)

    def current(self, density: Tensor) -> Tensor:
        """The current between cells: not variational."""
        k = 2.0 * math.pi * torch.arange(self.num_cells, dtype=torch.float64) / self.num_cells + self.flux
        return 2.0 * 0.6 * (torch.exp(1j * k) * density[:, 1, 0]).imag.mean()


def current(flux: Tensor) -> Tensor:
    ring = Ring(flux)
    return ring.current(fixed_point(ring, ring.first_state(), solver=EXACT, adjoint=TWICE, batch_dims=0).value)


def test_a_complex_density_matrix_responds_to_a_flux_as_its_converged_one(generator):
    flux, step = torch.tensor(0.17, dtype=torch.float64), 1e-4

    def by_hand(x: Tensor) -> Tensor:
        ring = Ring(x)
        density = ring.first_state()
        for _ in range(200):
            density = density.lerp(ring(density), 0.5)
        return ring.current(density)

    below, here, above = (by_hand(flux + shift) for shift in (-step, 0.0, step))
    x = flux.requires_grad_()
    value = current(x)
    assert abs(float(here)) > 0.01
    torch.testing.assert_close(value, here, rtol=1e-10, atol=0.0)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    torch.testing.assert_close(slope, (above - below) / (2.0 * step), rtol=1e-6, atol=1e-8)
    (curvature,) = torch.autograd.grad(slope, x)
    torch.testing.assert_close(curvature, (above - 2.0 * here + below) / step**2, rtol=1e-4, atol=1e-5)
