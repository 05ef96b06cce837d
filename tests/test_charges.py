"""Charges that equilibrate: forces, stresses and the columns of a fit against differences, sums of charges, and limits of the family."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from systems import charge_basis, scattered, structure
from torch import Tensor

from gpmlp.core.coulomb import CoulombMatrix
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.potential.charges import LOCAL, ChargeForm, ChargeModel, EqualStructures, stack_rows

SPECIES = (11, 17, 8, 1, 17)
CELL = torch.tensor([[6.0, 0.0, 0.5], [1.0, 7.0, 0.0], [0.4, -0.3, 5.0]], dtype=torch.float64)
AXES = {"isolated": (False,) * 3, "periodic": (True,) * 3, "slab": (True, True, False)}
FORMS = (ChargeForm(LOCAL), ChargeForm(10.0), ChargeForm(1.0, True), ChargeForm(3.0))


def _case(name: str, seed: int = 0, total: float = 0.3) -> Structures:
    positions = scattered(len(SPECIES), 4.2 * torch.eye(3, dtype=torch.float64), seed)
    one = structure(positions, SPECIES, CELL, AXES[name])
    return replace(one, charges=torch.tensor([total], dtype=torch.float64))


def _model(form: ChargeForm, seed: int = 5) -> ChargeModel:
    basis = charge_basis(*(_case("isolated", s) for s in (1, 2, 3)))
    start = basis.physical({11: 1, 17: 2, 8: 1, 1: 1})
    noise = torch.randn(basis.n_columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ChargeModel(form, basis, start + 0.2 * noise, start)


def _difference(function, h: float):
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def _strained(one: Structures, strain: Tensor) -> Structures:
    deformed = torch.eye(3, dtype=torch.float64) + strain
    return one.with_positions(one.positions @ deformed.T, one.cells @ deformed.T)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forces_and_stress_are_derivatives_of_the_energy(name, form):
    """To 1e-8 eV/A: forces are some eV/A, and differences by four points err by 1e-9."""
    model, one = _model(form), _case(name)
    found = model(one)
    assert float(found.charges.sum()) == pytest.approx(0.3, abs=1e-10)
    assert float(found.atom_energies.sum()) == pytest.approx(float(found.energies), abs=1e-12)
    for i in range(len(SPECIES)):
        for x in range(3):
            unit = torch.zeros_like(one.positions)
            unit[i, x] = 1.0
            slope = _difference(
                lambda h, unit=unit: float(model(one.with_positions(one.positions + h * unit)).energies), 1e-3
            )
            assert -slope == pytest.approx(float(found.forces[i, x]), abs=1e-8)
    for a, b in VOIGT if name != "isolated" else ():
        unit = torch.zeros(3, 3, dtype=torch.float64)
        unit[a, b] += 0.5
        unit[b, a] += 0.5
        slope = _difference(lambda h, unit=unit: float(model(_strained(one, h * unit)).energies), 5e-4)
        assert slope / float(one.volumes) == pytest.approx(float(found.stresses[0, a, b]), abs=1e-8)


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_columns_are_derivatives_by_the_parameters(name, form):
    model, one = _model(form), _case(name)
    (parts,) = EqualStructures.of_structures(model.basis, one)
    found = parts.evaluate(form, model.parameters)
    predicted = model(one)
    assert torch.allclose(found.values.energies[:, 0], predicted.energies, rtol=0, atol=1e-10)
    assert torch.allclose(found.values.forces.view(-1, 3), predicted.forces, rtol=0, atol=1e-10)
    assert torch.allclose(found.charges, predicted.charges, rtol=0, atol=1e-10)
    if name != "isolated":
        voigt = torch.stack([predicted.stresses[0, a, b] for a, b in VOIGT])
        assert torch.allclose(found.values.stresses[:, 0], voigt, rtol=0, atol=1e-10)
    assert found.columns is not None and found.of_charges is not None
    for k in range(model.basis.n_columns):
        unit = torch.zeros_like(model.parameters)
        unit[k] = 1.0

        def at(h: float, unit=unit) -> Tensor:
            here = parts.evaluate(form, model.parameters + h * unit, columns=False)
            return torch.cat([here.values.energies, here.values.forces, here.values.stresses, here.charges[:, None]])[
                :, 0
            ]

        columns = torch.cat([found.columns.energies, found.columns.forces, found.columns.stresses, found.of_charges])
        assert torch.allclose(_difference(at, 1e-2), columns[:, k], rtol=0, atol=1e-8)


def test_several_structures_are_one_after_another():
    model, every = _model(ChargeForm(3.0)), [_case("isolated", 4), _case("periodic", 5, -1.0), _case("slab", 6, 0.0)]
    together, alone = model(Structures.concatenate(every)), [model(one) for one in every]
    assert torch.allclose(together.forces, torch.cat([p.forces for p in alone]), rtol=0, atol=1e-12)
    assert torch.allclose(together.electrostatic, torch.cat([p.energies for p in alone]), rtol=0, atol=1e-12)
    rows = model.columns(Structures.concatenate(every))
    assert torch.allclose(rows.forces, stack_rows([model.columns(one) for one in every]).forces, rtol=0, atol=1e-12)


def test_stiff_charges_are_local_ones():
    """κ → ∞ without the self energy of free charges is `local`, whose Coulomb energy has none, but for the even share of the excess."""
    local = _model(ChargeForm(LOCAL))
    stiff = replace(local, form=ChargeForm(1e7, True))
    one = _case("isolated")
    total = float(replace(local, form=ChargeForm(LOCAL))(one).charges.sum())
    free = EqualStructures.of_structures(local.basis, one)[0].functions.values @ local.parameters
    one = replace(one, charges=free.sum()[None])  # nothing in excess
    assert total == pytest.approx(0.3, abs=1e-12)
    assert float(stiff(one).energies) == pytest.approx(float(local(one).energies), abs=1e-4)


def test_charges_of_least_energy_solve_the_equations_of_equilibrium():
    """∂/∂q of ½ Σ J (q - q⁰)² + ½ qᵀ(A + S)q is the same for all atoms."""
    form = ChargeForm(1.0)
    model, one = _model(form), _case("periodic")
    found, coulomb = model(one), CoulombMatrix.of_structure(one)
    free = EqualStructures.of_structures(model.basis, one)[0].functions.values @ model.parameters
    potential = coulomb.matrix @ found.charges + coulomb.self_terms * (
        found.charges + form.kappa * (found.charges - free)
    )
    assert float(potential.max() - potential.min()) < 1e-10
    moved = found.charges.clone()
    moved[0], moved[1] = moved[0] + 0.1, moved[1] - 0.1

    def energy(q: Tensor) -> float:
        stretched = form.kappa * coulomb.self_terms * (q - free) ** 2
        return float(0.5 * (stretched.sum() + q @ coulomb.matrix @ q + (coulomb.self_terms * q**2).sum()))

    assert energy(found.charges) == pytest.approx(float(found.energies), abs=1e-10)
    assert energy(moved) > energy(found.charges)


def test_physical_start_is_that_of_electronegativities():
    """Free charges of NaCl: sodium positive by as much as chlorine is negative; a total charge is shared by softness."""
    basis = charge_basis(*(_case("isolated", s) for s in (1, 2, 3)))
    sodium, chlorine = (basis.physical({11: 4, 17: 4})[basis.n_weights :][k] for k in (2, 3))
    assert 0.2 < float(sodium) < 0.6 and float(sodium + chlorine) == pytest.approx(0.0, abs=1e-12)
    charged = basis.physical({11: 4, 17: 4}, total=1.0)[basis.n_weights :]
    assert float(4 * (charged[2] + charged[3])) == pytest.approx(1.0, abs=1e-12)
