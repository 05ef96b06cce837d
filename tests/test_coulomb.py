"""Coulomb matrix: derivatives, Madelung constants, torch-pme's Ewald sum, and that no charge density has a negative energy."""

from __future__ import annotations

import math

import pytest
import torch
from systems import scattered, structure
from torch import Tensor

from gpmlp.core import coulomb, neighbors
from gpmlp.core.coulomb import CoulombMatrix
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.core.units import COULOMB, VOIGT

SPECIES = (11, 17, 8, 1, 6, 17)
CELL = torch.tensor([[6.0, 0.0, 0.5], [1.0, 7.0, 0.0], [0.4, -0.3, 5.0]], dtype=torch.float64)
POINT = 300.0  # eV/e²: Gaussians of 0.027 A, which atoms cannot tell from points


def _case(name: str, seed: int = 0) -> Structures:
    axes = {
        "isolated": (False,) * 3,
        "periodic": (True,) * 3,
        "slab": (True, True, False),
        "slab along a": (False, True, True),
    }
    positions = scattered(len(SPECIES), 4.5 * torch.eye(3, dtype=torch.float64), seed)
    return structure(positions, SPECIES, CELL, axes[name])


def _charges(n: int, seed: int = 3) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _difference(energy, h: float = 2e-3) -> float:
    """dE/dx at 0, with an error of h⁴."""
    return (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)


CASES = ("isolated", "periodic", "slab", "slab along a")


@pytest.mark.parametrize("name", CASES)
def test_forces_and_strain_derivatives_are_those_of_the_energy(name):
    """To 1e-8 of forces and virials of some eV/A and eV: differences have an error of that size."""
    one, q = _case(name), _charges(len(SPECIES))

    def energy(positions: Tensor, strain: Tensor | None = None) -> float:
        deformed = torch.eye(3, dtype=torch.float64) if strain is None else torch.eye(3, dtype=torch.float64) + strain
        moved = one.with_positions(positions @ deformed.T, one.cells @ deformed.T)
        return float(0.5 * q @ CoulombMatrix.of_structure(moved).matrix @ q)

    matrix = CoulombMatrix.of_structure(one)
    on_atoms, strained = matrix.energy_gradients(q)
    for i in range(len(SPECIES)):
        for x in range(3):
            unit = torch.zeros_like(one.positions)
            unit[i, x] = 1.0
            assert _difference(lambda h, unit=unit: energy(one.positions + h * unit)) == pytest.approx(
                float(on_atoms[i, x]), abs=3e-8
            )
    for a, b in VOIGT:
        unit = torch.zeros(3, 3, dtype=torch.float64)
        unit[a, b] += 0.5
        unit[b, a] += 0.5
        assert _difference(lambda h, unit=unit: energy(one.positions, h * unit), 1e-3) == pytest.approx(
            float(strained[a, b]), abs=1e-7
        )
    # the matrices of derivatives give the same
    assert torch.allclose(torch.einsum("i,xij,j->jx", q, matrix.gradients, q), on_atoms, rtol=0, atol=1e-11)
    voigt = torch.stack([strained[a, b] for a, b in VOIGT])
    assert torch.allclose(0.5 * torch.einsum("i,vij,j->v", q, matrix.strains, q), voigt, rtol=0, atol=1e-11)
    assert torch.equal(matrix.matrix, matrix.matrix.T) or (matrix.matrix - matrix.matrix.T).abs().max() < 1e-12


FCC = torch.tensor([[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
# cell and fractional coordinates of cation and anions, their charges, distance of nearest neighbours in units of the lattice constant,
# and the Madelung constant α of E = -α z₊|z₋| k_e / distance of a formula unit (Sakamoto, J. Chem. Phys. 28, 164 (1958))
CRYSTALS = {
    "NaCl": (FCC, [(0, 0, 0), (0.5, 0.5, 0.5)], (1, -1), 0.5, 1.747564594633),
    "CsCl": (
        torch.eye(3, dtype=torch.float64),
        [(0, 0, 0), (0.5, 0.5, 0.5)],
        (1, -1),
        math.sqrt(3) / 2,
        1.762674773071,
    ),
    "ZnS": (FCC, [(0, 0, 0), (0.25, 0.25, 0.25)], (1, -1), math.sqrt(3) / 4, 1.638055053389),
    "CaF2": (FCC, [(0, 0, 0), (0.25, 0.25, 0.25), (0.75, 0.75, 0.75)], (2, -1, -1), math.sqrt(3) / 4, 2.519392439924),
}


@pytest.mark.parametrize("name", CRYSTALS)
@pytest.mark.parametrize("length", [3.7, 9.1])
def test_madelung_constants(name, length):
    cell, fractional, charges, distance, constant = CRYSTALS[name]
    positions = torch.tensor(fractional, dtype=torch.float64) @ (length * cell)
    one = structure(positions, [11] * len(charges), length * cell, (True, True, True))
    q = torch.tensor(charges, dtype=torch.float64)
    energy = float(0.5 * q @ CoulombMatrix.of_structure(one, {11: POINT}).matrix @ q)
    assert -energy * distance * length / (charges[0] * COULOMB) == pytest.approx(constant, abs=1e-8)


def test_it_is_the_ewald_sum_of_torch_pme():
    torchpme = pytest.importorskip("torchpme")
    one = _case("periodic")
    q = _charges(len(SPECIES))
    q -= q.mean()
    found = CoulombMatrix.of_structure(one, dict.fromkeys(one.distinct_species, POINT))
    smearing = 1.0
    pairs = neighbors.find_neighbors(one, 8.0)
    calculator = torchpme.EwaldCalculator(
        torchpme.CoulombPotential(smearing=smearing), lr_wavelength=0.4, full_neighbor_list=True
    )
    distances = pairs.vectors(one).norm(dim=1)
    indices = torch.stack([pairs.centers, pairs.neighbors], dim=1)
    potential = calculator.to(torch.float64)(q[:, None], one.cells[0], one.positions, indices, distances)[:, 0]
    # torch-pme counts half of each pair
    assert torch.allclose(COULOMB * 2 * potential, found.matrix @ q, rtol=0, atol=1e-10)


def test_a_wide_cell_is_no_cell():
    """In a cell of length L the energy of a neutral cluster without dipole differs by L⁻⁵; a slab is told from the sum over its plane."""
    molecule = structure([[0.0, 0.0, 0.0], [1.2, 0.0, 0.0], [-1.2, 0.0, 0.0]], [6, 8, 8])
    q = torch.tensor([0.8, -0.4, -0.4], dtype=torch.float64)
    alone = float(q @ CoulombMatrix.of_structure(molecule).matrix @ q)
    for axes in ((True, True, True), (True, True, False)):
        errors = []
        for length in (14.0, 28.0):
            cell = length * torch.eye(3, dtype=torch.float64)
            here = structure(molecule.positions, molecule.species, cell, axes)
            errors.append(abs(float(q @ CoulombMatrix.of_structure(here).matrix @ q) - alone))
        assert errors[0] < 2e-3 and errors[1] < 0.1 * errors[0]


def test_two_charged_sheets_attract_as_a_capacitor():
    """±q on sheets of area A that are d apart: E = -2π k_e q² d / A more than at no distance, far from the lattice of the sheets."""
    cell, area = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)), 4.0

    def energy(d: float) -> float:
        one = structure([[0.0, 0.0, 0.0], [0.3, 0.7, d]], [11, 11], cell, (True, True, False))
        matrix = CoulombMatrix.of_structure(one, {11: POINT}).matrix
        return float(0.5 * (matrix[0, 0] + matrix[1, 1]) - matrix[0, 1])

    assert energy(13.0) - energy(10.0) == pytest.approx(2 * math.pi * COULOMB * 3.0 / area, abs=1e-8)


def _heap(n: int, seed: int) -> Structures:
    """Random atoms, the first two 0.3 A apart."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        positions = 4 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
        toward = torch.randn(3, generator=generator, dtype=torch.float64)
        positions[1] = positions[0] + 0.3001 * toward / toward.norm()
        if float((torch.cdist(positions, positions) + 9 * torch.eye(n)).min()) > 0.3:
            species = torch.tensor([1, 3, 6, 8, 9, 11, 17, 55])[torch.randint(8, (n,), generator=generator)]
            return structure(positions, species)


def test_no_charge_density_has_negative_energy():
    """A + S of a thousand heaps with contacts of 0.3 A: all eigenvalues positive, in a cell too; of a slab on neutral charges."""
    for seed in range(1000):
        one = _heap(2 + seed % 7, seed)
        matrix = CoulombMatrix.of_structure(one)
        assert float(torch.linalg.eigvalsh(matrix.matrix + torch.diag(matrix.self_terms))[0]) > -1e-9
    for seed, axes in enumerate([(True, True, True), (True, True, False)] * 10):
        one = _heap(5, seed)
        one = structure(one.positions, one.species, 7 * torch.eye(3, dtype=torch.float64), axes)
        matrix = CoulombMatrix.of_structure(one)
        gram = matrix.matrix + torch.diag(matrix.self_terms) + (0.0 if all(axes) else 1e3)
        assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-9


def test_what_has_no_sum_is_refused():
    one = _case("isolated")
    with pytest.raises(UserError, match="one periodic axis"):
        CoulombMatrix.of_structure(structure(one.positions, one.species, CELL, (True, False, False)))
    with pytest.raises(UserError, match="beyond Am"):
        CoulombMatrix.of_structure(structure(one.positions, [96] * len(SPECIES)))
    with pytest.raises(UserError, match="apart|closer|on top"):
        CoulombMatrix.of_structure(structure([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0]], [1, 1]))
    flat = CELL.clone()
    flat[1] = 2 * flat[0]
    with pytest.raises(UserError, match="parallel|flat"):
        CoulombMatrix.of_structure(structure(one.positions, one.species, flat, (True, True, False)))


def test_hardness_and_electronegativity_are_those_of_the_literature():
    """Pearson, Inorg. Chem. 27, 734 (1988), table: χ and twice η, whose affinities are older."""
    for z, chi, eta in (
        (1, 7.18, 6.43),
        (3, 3.01, 2.39),
        (9, 10.41, 7.01),
        (17, 8.30, 4.68),
        (26, 4.06, 3.81),
        (53, 6.76, 3.69),
        (79, 5.77, 3.46),
    ):
        assert coulomb.electronegativity(z) == pytest.approx(chi, abs=0.06)
        assert coulomb.hardness(z) == pytest.approx(2 * eta, abs=0.15)
    assert all(coulomb.hardness(z) > 2 for z in range(1, 96))
