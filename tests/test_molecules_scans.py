"""Vibrations, torsions and pairs of atoms: against ASE on GFN2-xTB, analytic potentials, and relaxed samples."""

from __future__ import annotations

import os

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixInternals
from ase.optimize import BFGS
from ase.vibrations import Vibrations

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.molecules import Frequencies, relax_to_minimum
from gpmlp.properties.scans import Dimers, Torsions, rotatable_bonds
from gpmlp.properties.surface import EnergySurface, Failed


@pytest.fixture(scope="module")
def xtb():
    """GFN2-xTB, a calculator whose molecules are sensible."""
    ase = pytest.importorskip(
        "tblite.ase", reason="tblite cannot be imported (pip install tblite)", exc_type=ImportError
    )
    return ase.TBLite(method="GFN2-xTB", verbosity=0)


@pytest.fixture(scope="module")
def peroxide(xtb) -> Potential:
    """A potential of hydrogen peroxide, from 24 turned and rattled molecules."""
    rng, frames = np.random.default_rng(0), []
    for k in range(24):
        atoms = molecule("H2O2")
        atoms.set_dihedral(2, 0, 1, 3, 15 * k, indices=[3])
        atoms.rattle(0.08, rng=rng)
        asked = atoms.copy()
        asked.calc = xtb
        atoms.calc = SinglePointCalculator(atoms, energy=asked.get_potential_energy(), forces=asked.get_forces())
        frames.append(atoms)
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.0, "n_max": 6, "l_max": 4}, inducing={"n": 60})
    return gpmlp.fit(*from_ase(frames), recipe)[0]


def morse(r0: float = 1.1, epsilon: float = 9.0) -> EnergySurface:
    """Of two atoms; V'' = 2 epsilon (rho0 / r0)^2 at the minimum."""
    return EnergySurface.of_calculator(MorsePotential(epsilon=epsilon, r0=r0, rho0=3.0, rcut1=2.0, rcut2=3.0))


def wave_number(curvature: float, reduced_mass: float) -> float:
    """cm^-1."""
    return np.sqrt(curvature * units._e / (reduced_mass * units._amu)) * 1e10 / (2 * np.pi * units._c * 100)


@pytest.mark.parametrize("name", ["CH3OH", "CO2"])  # bent, linear
def test_frequencies_are_those_of_ase(xtb, tmp_path, name):
    found = exact_properties(EnergySurface.of_calculator(xtb), molecule(name), ["frequencies"])
    atoms = EnergySurface.of_calculator(xtb).relax(molecule(name))
    atoms.calc = xtb
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"))
    vibrations.run()
    wanted = vibrations.get_frequencies().real[-(len(found) - 1) :]
    assert len(wanted) == {"CH3OH": 12, "CO2": 4}[name]
    np.testing.assert_allclose(
        [found[f"frequency_{k + 1}"] for k in range(len(wanted))], wanted, atol=5.0
    )  # finite steps
    assert found["zero_point_energy"] == pytest.approx(wanted.sum() * units.invcm / 2, rel=2e-3)


def test_frequency_is_that_of_another_surface_at_its_own_minimum():
    """Morse: the curvature falls by 3 rho0 / r0 of the shift of the minimum, which an uncorrected frequency would keep."""
    start, mass = Atoms("N2", [[0, 0, 0], [0, 0, 1.1]]), 14.007 / 2
    plan = Frequencies().plan(morse(), [start])
    assert plan.evaluate(morse().points(plan.structures))["frequency_1"] == pytest.approx(
        wave_number(2 * 9.0 * (3 / 1.1) ** 2, mass), rel=1e-3
    )
    other = morse(r0=1.11)
    found = plan.evaluate(other.points(plan.structures))["frequency_1"]
    wanted = wave_number(2 * 9.0 * (3 / 1.11) ** 2, mass)
    here = wave_number(2 * 9.0 * (3 / 1.11) ** 2 * (1 + 9 * 0.01 / 1.11), mass)
    assert found == pytest.approx(wanted, rel=0.004) and abs(here - wanted) > 0.03 * wanted


def test_minimum_is_reached_from_a_saddle(xtb):
    """Planar ammonia, which forces alone leave planar."""
    flat = Atoms("NH3", [[0, 0, 0], [1, 0, 0], [-0.5, 0.75**0.5, 0], [-0.5, -(0.75**0.5), 0]])
    surface = EnergySurface.of_calculator(xtb)
    atoms, modes = relax_to_minimum(surface, flat)
    assert len(modes.curvatures) == 6 and modes.curvatures[0] > 0
    assert surface.points([atoms])[0].energy < surface.points([surface.relax(flat)])[0].energy - 0.05


def test_a_surface_without_the_minimum_fails():
    plan = Frequencies().plan(morse(), [Atoms("N2", [[0, 0, 0], [0, 0, 1.1]])])
    with pytest.raises(Failed, match="1 imaginary frequencies where a minimum was wanted"):
        plan.evaluate(morse(r0=0.8).points(plan.structures))  # beyond the turning point, 1.0


@pytest.mark.parametrize("what", ["frequencies", "torsions"])
def test_fast_error_bars_are_those_of_relaxed_samples(peroxide, xtb, what):
    """Of values and curves. Far within the quarter of the contract, as the molecule is stiff but for its torsion."""
    fast = gpmlp.compute_properties(peroxide, molecule("H2O2"), [what], samples=6)
    full = gpmlp.compute_properties(peroxide, molecule("H2O2"), [what], samples=6, full=True)
    truth = exact_properties(EnergySurface.of_calculator(xtb), molecule("H2O2"), [what])
    assert not fast.failures and not full.failures and fast.values
    for a, b in zip((*fast.values, *fast.curves), (*full.values, *full.curves), strict=True):
        np.testing.assert_allclose(a.sigma, b.sigma, rtol=0.05, atol=1e-9)
        assert np.all(np.abs(a.value - truth[a.name]) <= 5 * a.sigma + 1e-9)


def test_torsion_is_that_of_constrained_relaxations(xtb):
    """At 60 degrees: ASE's FixInternals; the barrier: the cis form, a stationary point by symmetry."""
    surface = EnergySurface.of_calculator(xtb)
    found = exact_properties(surface, molecule("H2O2"), [Torsions(step=30)])
    rest = surface.relax(molecule("H2O2"))
    turned = rest.copy()
    turned.set_dihedral(2, 0, 1, 3, 60, indices=[3])
    turned.set_constraint(FixInternals(dihedrals_deg=[[60, [2, 0, 1, 3]]]))
    turned.calc = xtb
    BFGS(turned, logfile=os.devnull).run(fmax=2e-3)
    lowest = surface.points([rest])[0].energy
    assert found["torsion_O0_O1"][8] == pytest.approx(turned.get_potential_energy() - lowest, abs=1e-3)
    cis = rest.copy()
    cis.set_dihedral(2, 0, 1, 3, 0, indices=[3])
    cis = surface.relax(cis)
    assert np.cos(np.radians(cis.get_dihedral(2, 0, 1, 3))) == pytest.approx(1, abs=1e-6)
    assert found["torsion_O0_O1_barrier"] == pytest.approx(surface.points([cis])[0].energy - lowest, abs=2e-3)
    rigid = exact_properties(surface, molecule("H2O2"), [Torsions(step=30, rigid=True)])
    assert rigid["torsion_O0_O1_barrier"] > found["torsion_O0_O1_barrier"] + 0.01


def test_torsion_on_another_surface(xtb):
    """From the structures of GFN2-xTB the curve of GFN1-xTB, which is another one: within 0.4 meV, 1.1 without the Newton step."""
    one, other = (
        EnergySurface.of_calculator(xtb),
        EnergySurface.of_calculator(type(xtb)(method="GFN1-xTB", verbosity=0)),
    )
    plan = Torsions(step=30).plan(one, [molecule("H2O2")])
    found = plan.evaluate(other.points(plan.structures))
    wanted = exact_properties(other, molecule("H2O2"), [Torsions(step=30)])
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=4e-4)
        assert np.abs(plan.evaluate(one.points(plan.structures))[name] - value).max() > 0.01


@pytest.mark.parametrize(
    ("name", "bonds"),
    [
        ("CH3CH2OH", {(0, 1), (1, 2)}),
        ("trans-butane", {(0, 1), (1, 2), (2, 3)}),
        ("2-butyne", set()),  # straight behind both
        ("C6H6", set()),
        ("cyclobutane", set()),
        ("H2O2", {(0, 1)}),
        ("H2O", set()),
    ],
)
def test_bonds_that_turn(name, bonds):
    atoms = molecule(name)
    found = rotatable_bonds(atoms)
    assert {tuple(sorted(torsion.atoms[1:3])) for torsion in found} == bonds
    for torsion in found:
        turned = atoms.copy()
        turned.set_dihedral(*torsion.atoms, 33.0, indices=torsion.turning)
        fixed = [i for i in range(len(atoms)) if i not in torsion.turning]
        assert len(fixed) >= len(torsion.turning)
        for part in (fixed, torsion.turning):
            np.testing.assert_allclose(
                turned[list(part)].get_all_distances(), atoms[list(part)].get_all_distances(), atol=1e-9
            )


def test_dimer_is_the_pair_potential():
    found = exact_properties(
        morse(1.4, 2.0), Atoms("NO", [[0, 0, 0], [0, 0, 1.3]]), [Dimers(closest=0.9, farthest=5.0)]
    )
    assert len(found) == 9
    for pair in ("N_N", "N_O", "O_O"):
        assert found[f"dimer_{pair}_well_depth"] == pytest.approx(2.0, rel=1e-3)
        assert found[f"dimer_{pair}_bond_length"] == pytest.approx(1.4, rel=1e-3)
        r = np.linspace(0.9, 5.0, 60)
        near = r < 2.6
        e = np.exp(3 * (1 - r[near] / 1.4))
        np.testing.assert_allclose(found[f"dimer_{pair}"][near], 2.0 * (e * e - 2 * e), atol=1e-9)


def test_dimers_of_a_potential(peroxide):
    found = gpmlp.compute_properties(peroxide, molecule("H2O2"), ["dimers"], samples=4)
    assert all(name.startswith("H_O ") for name in found["dimer_H_O_bond_length"].structures)
    assert [curve.name for curve in found.curves] == ["dimer_H_H", "dimer_H_O", "dimer_O_O"]
    for curve in found.curves:
        assert curve.x[-1] == pytest.approx(peroxide.reach + 0.3) and (curve.sigma[:-10] > 0).all()
        assert abs(curve.value[-1]) < 1e-6  # beyond the reach
    (mark,) = found.curves[1].ticks
    assert mark == (peroxide.report["shortest"]["H-O"], "data from here")


@pytest.mark.parametrize(
    ("what", "atoms", "match"),
    [
        (Frequencies(), bulk("Cu"), "Cu is periodic; frequencies are of isolated molecules"),
        (Frequencies(), Atoms("N"), "N is a single atom"),
        (Frequencies(), Atoms("N2", [[0, 0, 0], [0, 0, 1]], constraint=FixAtoms([0])), "under constraints"),
        (Torsions(), bulk("Cu"), "Cu is periodic; torsions are scanned in isolated molecules"),
        (Torsions(), Atoms(molecule("H2O2"), constraint=FixAtoms([0])), "under constraints"),
        (Torsions(), molecule("H2O"), "H2O has no bond that it can turn about"),
        (Torsions(most_atoms=8), molecule("CH3CH2OH"), "has 9 atoms, more than torsions.most_atoms=8"),
        (Torsions(bonds=((2, 3),)), molecule("CH3CH2OH"), "cannot turn about the bond 2-3; it can about 1-0, 1-2"),
    ],
)
def test_refusals(what, atoms, match):
    with pytest.raises(UserError, match=match):
        exact_properties(EnergySurface.of_calculator(EMT()), atoms, [what])
