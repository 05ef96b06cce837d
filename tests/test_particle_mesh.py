"""Coulomb sums on a mesh: the matrix of the same charges, torch-pme's Ewald sum, differences, and charges found by iteration."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from systems import charge_basis, structure
from torch import Tensor

from gpmlp.core import coulomb, neighbors, particle_mesh
from gpmlp.core.coulomb import CoulombMatrix
from gpmlp.core.errors import UserError
from gpmlp.core.particle_mesh import ParticleMesh, coulomb_sum
from gpmlp.core.structures import Structures
from gpmlp.core.units import COULOMB, VOIGT
from gpmlp.potential.charges import LOCAL, ChargeForm, ChargeModel, EqualStructures, equilibrate

torchpme = pytest.importorskip("torchpme")

AXES = {"periodic": (True,) * 3, "slab": (True, True, False), "slab along a": (False, True, True)}


def _crystal(cells: int, axes: tuple[bool, ...] = (True,) * 3, skew: float = 0.04, total: float = 0.7) -> Structures:
    """Rocksalt of 8 cells³ atoms in a sheared cell, displaced by 0.15 A, with some oxygen and hydrogen in it."""
    generator = torch.Generator().manual_seed(cells)
    grid = torch.cartesian_prod(*[torch.arange(2 * cells)] * 3)
    species = torch.where(grid.sum(1) % 2 == 0, 11, 17)
    species[::7], species[3::29] = 8, 1
    lattice = 5.6 * cells * (torch.eye(3) + skew * torch.randn(3, 3, generator=generator)).double()
    positions = grid.double() / (2 * cells) @ lattice
    positions = positions + 0.15 * torch.randn(positions.shape, generator=generator).double()
    one = structure(positions, species, lattice, axes)
    return replace(one, charges=torch.tensor([total], dtype=torch.float64))


def _charges(one: Structures) -> Tensor:
    """Of ions, with noise, and not neutral."""
    noise = torch.randn(one.n_atoms, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ions = {11: 0.8, 17: -0.8, 8: -0.9, 1: 0.5}
    return torch.tensor([ions[int(z)] for z in one.species], dtype=torch.float64) + 0.1 * noise


@pytest.mark.parametrize("name", [*AXES, "in vacuum"])
def test_it_is_the_coulomb_matrix(name):
    one = _crystal(3, AXES.get(name, (True,) * 3))
    if name == "in vacuum":
        one = structure(one.positions, one.species, 45 * torch.eye(3, dtype=torch.float64), (True,) * 3)
    q, mesh, matrix = _charges(one), ParticleMesh.of_structure(one), CoulombMatrix.of_structure(one)
    assert torch.allclose(mesh.potential(q), matrix.potential(q), rtol=0, atol=2e-6)
    energy = float(q @ matrix.potential(q))
    assert float(q @ mesh.potential(q)) == pytest.approx(energy, rel=1e-7)
    on_atoms, strained = mesh.energy_gradients(q)
    expected, of_strain = matrix.energy_gradients(q)
    assert float(expected.abs().max()) > 1
    assert torch.allclose(on_atoms, expected, rtol=0, atol=1e-5)
    assert torch.allclose(strained, of_strain, rtol=0, atol=1e-6 * float(of_strain.abs().max()))
    spacings = mesh.cell.norm(dim=1) / (particle_mesh.SPACING * mesh.smearing)
    assert float(spacings.prod()) < 1000 * one.n_atoms


@pytest.mark.parametrize("name", ["periodic", "slab"])
def test_forces_and_strain_derivatives_are_those_of_the_energy(name):
    """The same mesh before and after: what is left is where an atom passes to other points of it."""
    one = _crystal(2, AXES[name])
    q = _charges(one)
    on_atoms, strained = ParticleMesh.of_structure(one).energy_gradients(q)

    def energy(positions: Tensor, strain: Tensor) -> float:
        deformed = torch.eye(3, dtype=torch.float64) + strain
        moved = one.with_positions(positions @ deformed.T, one.cells @ deformed.T)
        return float(0.5 * q @ ParticleMesh.of_structure(moved).potential(q))

    def slope(of, h: float) -> float:
        return (8 * (of(h) - of(-h)) - (of(2 * h) - of(-2 * h))) / (12 * h)

    none = torch.zeros(3, 3, dtype=torch.float64)
    for i, x in ((0, 0), (3, 1), (7, 2), (40, 0)):
        unit = torch.zeros_like(one.positions)
        unit[i, x] = 1.0
        found = slope(lambda h, unit=unit: energy(one.positions + h * unit, none), 5e-3)
        assert found == pytest.approx(float(on_atoms[i, x]), abs=1e-5)
    for a, b in VOIGT:
        unit = torch.zeros(3, 3, dtype=torch.float64)
        unit[a, b] += 0.5
        unit[b, a] += 0.5
        found = slope(lambda h, unit=unit: energy(one.positions, h * unit), 1e-3)
        assert found == pytest.approx(float(strained[a, b]), abs=3e-4 if name == "slab" else 1e-4)


def test_it_is_the_ewald_sum_of_torch_pme():
    """Of narrow Gaussians, which atoms apart cannot tell from points."""
    one = _crystal(2)
    q = _charges(one)
    q -= q.mean()
    found = ParticleMesh.of_structure(one, dict.fromkeys(one.distinct_species, 300.0)).potential(q)
    pairs = neighbors.find_neighbors(one, 8.0)
    kernel = torchpme.CoulombPotential(smearing=1.0, prefactor=COULOMB)
    calculator = torchpme.EwaldCalculator(kernel, lr_wavelength=0.5, full_neighbor_list=True).to(torch.float64)
    indices = torch.stack([pairs.centers, pairs.neighbors], dim=1)
    expected = calculator(q[:, None], one.cells[0], one.positions, indices, pairs.vectors(one).norm(dim=1))[:, 0]
    assert torch.allclose(found, 2 * expected, rtol=0, atol=1e-5)


def _model(form: ChargeForm) -> ChargeModel:
    basis = charge_basis(_crystal(2))
    start = basis.physical({11: 3, 17: 3, 8: 1, 1: 1})
    noise = torch.randn(basis.n_columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ChargeModel(form, basis, start + 0.05 * noise, start)


@pytest.mark.parametrize("name", ["periodic", "slab"])
@pytest.mark.parametrize("form", [ChargeForm(LOCAL), ChargeForm(1.0), ChargeForm(3.0, True)], ids=str)
def test_a_model_says_of_a_mesh_what_it_says_of_a_matrix(name, form, monkeypatch):
    model, one = _model(form), _crystal(3, AXES[name])
    expected = model(one)
    monkeypatch.setattr(particle_mesh, "DENSE", 200)
    products, potential = [], ParticleMesh.potential
    monkeypatch.setattr(ParticleMesh, "potential", lambda mesh, q: products.append(0) or potential(mesh, q))
    with torch.inference_mode():
        found = model(one)
    assert float(found.energies) == pytest.approx(float(expected.energies), rel=1e-6)
    assert float(expected.charges.std()) > 0.05
    assert torch.allclose(found.charges, expected.charges, rtol=0, atol=3e-7)
    assert float(found.charges.sum()) == pytest.approx(0.7, abs=1e-10)
    assert torch.allclose(found.forces, expected.forces, rtol=0, atol=1e-5)
    assert torch.allclose(found.stresses, expected.stresses, rtol=0, atol=1e-8)
    assert len(products) == 1 if form.kappa == LOCAL else 5 < len(products) <= 32


@pytest.mark.parametrize("axes, cells", [((True,) * 3, 5), ((True, True, False), 3)], ids=["crystal", "slab"])
def test_charges_take_few_iterations_and_are_those_of_least_energy(axes, cells, monkeypatch):
    """Without the longest waves in the preconditioner it takes twice as many."""
    one = _crystal(cells, axes)
    free = _charges(one)
    products, potential = [], ParticleMesh.potential
    monkeypatch.setattr(ParticleMesh, "potential", lambda self, q: products.append(0) or potential(self, q))
    found = equilibrate(ChargeForm(1.0), ParticleMesh.of_structure(one), free, one.charges[0])
    assert len(products) - 2 <= 14
    expected = equilibrate(ChargeForm(1.0), CoulombMatrix.of_structure(one), free, one.charges[0])
    assert torch.allclose(found.charges, expected.charges, rtol=0, atol=1e-6)
    assert float(found.charges.sum()) == pytest.approx(0.7, abs=1e-10)


def test_which_structures_have_a_mesh(monkeypatch):
    monkeypatch.setattr(particle_mesh, "DENSE", 50)
    assert isinstance(coulomb_sum(_crystal(2)), ParticleMesh)
    assert isinstance(coulomb_sum(_crystal(1)), CoulombMatrix)
    assert isinstance(coulomb_sum(_crystal(2, (False,) * 3)), CoulombMatrix)
    monkeypatch.setattr(coulomb, "LARGEST", 60)
    with pytest.raises(UserError, match="has 64 atoms.*vacuum around it.*no error bars"):
        coulomb_sum(_crystal(2, (False,) * 3))
    with pytest.raises(UserError, match="has 64 atoms"):
        EqualStructures.of_structures(_model(ChargeForm(1.0)).basis, _crystal(2))


def test_without_torch_pme_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(particle_mesh, "DENSE", 50)
    monkeypatch.setitem(sys.modules, "torchpme", None)
    with pytest.raises(UserError, match=r"more than 50 atoms need the package torch-pme.*gpmlp\[long-range\]"):
        coulomb_sum(_crystal(2))
