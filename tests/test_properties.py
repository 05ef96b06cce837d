"""Properties with error bars: the value against the oracle's own, the fast error bar against one from relaxations of every sample."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixedLine, FixedPlane
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS
from ase.spacegroup import crystal
from matscipy.calculators.manybody import Manybody
from matscipy.calculators.manybody.explicit_forms.stillinger_weber import (
    Stillinger_Weber_PRB_31_5262_Si,
    StillingerWeber,
)
from scipy import stats

import gpmlp
from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.core.units import VOIGT
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties import symmetry
from gpmlp.properties.calculations import choose_calculations
from gpmlp.properties.compute import (
    IonResponse,
    PropertyResults,
    applications,
    exact_properties,
    left_out,
    named,
    plan_all,
)
from gpmlp.properties.constraints import allowed_motions
from gpmlp.properties.equation_of_state import EquationOfState
from gpmlp.properties.labelling import _noise, _whitened_rows, choose_labels, sharpened_names
from gpmlp.properties.phases import PhaseEnergies
from gpmlp.properties.plan import Calculation, CurveAxis, Plan
from gpmlp.properties.surface import EnergySurface, Failed, check_stable, inverse_hessian
from gpmlp.properties.values import spread, value_from_samples


def labelled(crystal: Atoms, calculator, n: int, strain: float, rattle: float) -> list[Atoms]:
    """n copies of a crystal, strained and rattled, with labels."""
    rng, out = np.random.default_rng(0), []
    for _ in range(n):
        atoms = crystal.copy()
        atoms.set_cell(atoms.cell @ (np.eye(3) + rng.normal(0, strain, (3, 3))), scale_atoms=True)
        atoms.rattle(rattle, rng=rng)
        asked = atoms.copy()
        asked.calc = calculator
        found = {"energy": asked.get_potential_energy(), "forces": asked.get_forces(), "stress": asked.get_stress()}
        atoms.calc = SinglePointCalculator(atoms, **found)
        out.append(atoms)
    return out


def stillinger_weber() -> Manybody:
    return Manybody(**StillingerWeber(Stillinger_Weber_PRB_31_5262_Si))


def alloy() -> Atoms:
    """Triclinic."""
    atoms = bulk("Cu", a=3.8) * (2, 2, 2)
    atoms.symbols = "CuAuAgPdCuCuAgAu"
    atoms.set_cell(atoms.cell @ np.array([[1, 0.02, 0], [0, 0.98, 0.01], [0.03, 0, 1]]), scale_atoms=True)
    return atoms


def corundum() -> Atoms:
    """Al2O3, trigonal."""
    return crystal(
        ("Al", "O"), [(0, 0, 0.352), (0.306, 0, 0.25)], spacegroup=167, cellpar=[4.76, 4.76, 12.99, 90, 90, 120],
        primitive_cell=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def copper() -> Potential:
    """Of few labels, so that there is something to be unsure of."""
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 6, "l_max": 3}, inducing={"n": 90})
    return gpmlp.fit(*from_ase(labelled(bulk("Cu", cubic=True), EMT(), 24, 0.03, 0.1)), recipe)[0]


@pytest.fixture(scope="module")
def silicon() -> Potential:
    """Diamond, whose atoms move against each other when it is sheared."""
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 5, "l_max": 4}, inducing={"n": 60})
    return gpmlp.fit(*from_ase(labelled(bulk("Si", cubic=True), stillinger_weber(), 16, 0.02, 0.1)), recipe)[0]


CUBIC = ["eos", "lattice", "elastic"]


@pytest.mark.parametrize(
    ("model", "crystals", "what"),
    [
        ("copper", [bulk("Cu")], CUBIC),
        ("silicon", [bulk("Si")], CUBIC),
        ("copper", [bulk("Cu", "hcp", a=2.55, c=4.15)], ["lattice", "elastic"]),
        ("copper", [bulk("Cu"), bulk("Cu", "hcp", a=2.55, c=4.15)], ["phases"]),
    ],
    ids=["copper", "silicon", "hexagonal", "phases"],
)
def test_fast_error_bars_are_those_of_relaxed_samples(model, crystals, what, request):
    """Same samples, so what differs is the Newton step and the like: within a quarter, as the contract says."""
    potential = request.getfixturevalue(model)
    fast = gpmlp.compute_properties(potential, crystals, what, samples=8)
    full = gpmlp.compute_properties(potential, crystals, what, samples=8, full=True)
    assert not fast.failures and not full.failures
    for a, b in zip(fast.values, full.values, strict=True):
        assert a.value == b.value
        assert a.sigma == pytest.approx(b.sigma, rel=0.25), a.name
        assert a.sigma > 0


def test_ions_that_stay_have_another_error_bar(silicon, monkeypatch):
    """Without their Newton step the error bar of diamond's C44 is another one, and wrong."""
    moved = gpmlp.compute_properties(silicon, bulk("Si"), ["elastic"], samples=32)["C44"]
    monkeypatch.setattr(IonResponse, "corrected", lambda self, point, atoms: point)
    stayed = gpmlp.compute_properties(silicon, bulk("Si"), ["elastic"], samples=32)["C44"]
    assert stayed.value == moved.value
    assert abs(stayed.sigma / moved.sigma - 1) > 0.05


def brute_force_stiffness(crystal: Atoms, calculator, strain: float = 2e-3) -> np.ndarray:
    """(6, 6) GPa from relaxations at all twelve strains by ASE alone."""
    columns = []
    for i, j in VOIGT:
        stresses = []
        for sign in (1, -1):
            matrix = np.eye(3)
            matrix[i, j] += sign * strain / (1 if i == j else 2)
            matrix[j, i] = matrix[i, j]
            atoms = crystal.copy()
            atoms.set_cell(atoms.cell.array @ matrix, scale_atoms=True)
            atoms.calc = calculator
            BFGS(atoms, logfile=None).run(fmax=1e-5, steps=300)
            stresses.append(atoms.get_stress())
        columns.append((stresses[0] - stresses[1]) / (2 * strain) / units.GPa)
    return np.array(columns).T


def at_rest(crystal: Atoms, calculator) -> Atoms:
    crystal.calc = calculator
    BFGS(FrechetCellFilter(crystal), logfile=None).run(fmax=1e-5, steps=300)
    crystal.calc = None
    return crystal


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        (bulk("Cu"), "C11 C12 C44"),
        (bulk("Cu", "hcp", a=2.55, c=4.15), "C11 C12 C13 C33 C44"),
        (bulk("Cu", cubic=True) * (2, 1, 1), "C11 C12 C13 C22 C23 C33 C44 C55 C66"),
        (alloy(), " ".join(f"C{i}{j}" for i in range(1, 7) for j in range(i, 7))),
    ],
    ids=["cubic", "hexagonal", "orthorhombic", "triclinic"],
)
def test_elastic_constants_of_any_symmetry(cell, names):
    """Against strains and relaxations by ASE alone, of the crystal in its standard orientation; EMT, 1 GPa or 2 %."""
    if len(cell) == 8:  # an atom of another kind on one site of each plane
        cell.symbols[0] = cell.symbols[2] = "Au"
    surface = EnergySurface.of_calculator(EMT())
    found = exact_properties(surface, cell, ["elastic"])
    assert " ".join(name for name in found if name[0] == "C") == names
    rest = at_rest(cell.copy(), EMT())
    rest = symmetry.turned(rest, symmetry.find_symmetry(rest).to_standard)
    truth = brute_force_stiffness(rest, EMT())
    for name in names.split():
        assert found[name] == pytest.approx(truth[int(name[1]) - 1, int(name[2]) - 1], rel=0.02, abs=1.0), name


def test_symmetry_leaves_as_many_elastic_constants_as_books_say():
    """Nye, Physical Properties of Crystals, table 9."""
    counts = {227: 3, 194: 5, 167: 6, 2: 21}
    made = {227: bulk("Si"), 194: bulk("Zn"), 167: corundum(), 2: alloy()}
    for group, cell in made.items():
        found = symmetry.find_symmetry(cell)
        basis = symmetry.invariant_stiffnesses(found.rotations)
        assert found.space_group == group
        assert len(basis) == len(symmetry.independent_components(basis)) == counts[group]
    assert symmetry.independent_columns(
        symmetry.invariant_stiffnesses(symmetry.find_symmetry(bulk("Si")).rotations)
    ) == [0, 3]


def test_values_are_near_those_of_the_oracle(copper):
    """EMT's copper by the same code on the oracle itself; within five standard deviations, as the fit is small."""
    found = gpmlp.compute_properties(copper, bulk("Cu"), ["eos"])
    truth = exact_properties(EnergySurface.of_calculator(EMT()), bulk("Cu"), ["eos"])
    for value in found.values:
        assert abs(value.value - truth[value.name]) < 5 * value.sigma
        assert value.low_90 < value.value < value.high_90
        assert value.samples == 32 and value.failed == 0 and value.novelty > 0
    assert found["bulk_modulus"].value == pytest.approx(truth["bulk_modulus"], rel=0.05)


def test_values_unlike_the_data_are_wider_than_samples(copper):
    """By the root of how far the novelty is above what is typical; where that is below it, as samples are."""
    found = gpmlp.compute_properties(copper, bulk("Cu"), ["eos"])
    value = found["bulk_modulus"]
    for ratio, factor in ((4.0, 2.0), (0.5, 1.0)):
        other = replace(copper.calibration, typical_novelty=value.novelty / ratio)
        typical = gpmlp.compute_properties(replace(copper, calibration=other), bulk("Cu"), ["eos"])["bulk_modulus"]
        none = replace(copper.calibration, typical_novelty=None)
        samples = gpmlp.compute_properties(replace(copper, calibration=none), bulk("Cu"), ["eos"])["bulk_modulus"]
        assert typical.sigma == pytest.approx(factor * samples.sigma, rel=1e-6)
        assert typical.parts["sampled"] == typical.sigma
        assert typical.high_90 - typical.value == pytest.approx(factor * (samples.high_90 - samples.value), rel=1e-6)


def test_curves_unlike_the_data_are_wider_than_samples(copper):
    """Each point of a dimer curve by the root of the larger novelty of its pair and of free atoms; others by that of all structures."""
    none = replace(copper, calibration=replace(copper.calibration, typical_novelty=None))
    typical = copper.calibration.typical_novelty
    pair = Atoms("Cu2", [(0, 0, 0), (2.4, 0, 0)])
    (wide,), (plain,) = (gpmlp.compute_properties(p, pair, ["dimers"]).curves for p in (copper, none))
    assert wide.samples == 32 and (plain.sigma > 0).all()
    ratio = (wide.sigma / plain.sigma) ** 2
    surface = EnergySurface(copper)
    places = [Atoms("Cu2", [(0, 0, 0), (0, 0, r)]) for r in (*wide.x, 1e3)]
    novelty = surface.novelty(places)
    expected = np.maximum(np.maximum(novelty[:-1], novelty[-1]) / typical, 1.0)
    np.testing.assert_allclose(ratio, expected, rtol=1e-5)
    assert ratio[0] > 1
    found, samples = (gpmlp.compute_properties(p, bulk("Cu"), ["eos"]) for p in (copper, none))
    wider = found["bulk_modulus"].sigma / samples["bulk_modulus"].sigma
    np.testing.assert_allclose(found.curves[0].sigma, wider * samples.curves[0].sigma, rtol=1e-6)


def test_a_sample_that_fails_does_not_widen_the_rest():
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 0.1, 200)
    whole = value_from_samples("hop", "eV", 2.0, samples)
    assert whole.sigma == pytest.approx(0.1, rel=0.1)
    assert whole.high_90 - 2.0 == pytest.approx(1.645 * whole.sigma, rel=0.02)
    lost = value_from_samples("hop", "eV", 2.0, [*samples, np.nan, 9.0])
    assert lost.failed == 1 and lost.samples == 202
    assert lost.sigma == pytest.approx(0.1, rel=0.15)
    far = value_from_samples("hop", "eV", 2.0, [*samples, 9.0])
    assert far.failed == 0 and far.sigma == pytest.approx(0.1, rel=0.15)
    both = value_from_samples("hop", "eV", 2.0, samples, statistical=0.2)
    assert both.sigma == pytest.approx(np.hypot(whole.sigma, 0.2))
    assert np.isnan(spread(np.array([[1.0], [np.nan]]), 1.0)).all()


def test_refusals(copper):
    with pytest.raises(UserError, match="no crystal"):
        gpmlp.compute_properties(copper, Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)]), ["eos"])
    with pytest.raises(UserError, match="not trained on H "):
        gpmlp.compute_properties(copper, molecule("H2O"), ["eos"])
    with pytest.raises(UserError, match="Unknown property 'eso'. Perhaps you meant 'eos'"):
        gpmlp.compute_properties(copper, bulk("Cu"), ["eso"])
    with pytest.raises(UserError, match="no structures"):
        gpmlp.compute_properties(copper, [], ["eos"])


def held_copper() -> Atoms:
    """Atoms away from their sites: one held along x, one in an oblique plane, one on a line."""
    atoms = bulk("Cu", cubic=True)
    atoms.positions[:3] += [[0.12, 0, 0], [0, 0.1, 0.1], [0.06, 0.0, 0.06]]
    atoms.set_constraint([FixCartesian([0], [True, False, False]), FixedPlane(1, [0, 1, 1]), FixedLine(2, [1, 1, 0])])
    return atoms


def test_force_constants_and_newton_steps_go_where_constraints_let_them(copper):
    surface, held = EnergySurface(copper), held_copper()
    free = held.copy()
    free.set_constraint()
    allowed = allowed_motions(held)
    assert surface.hessian(held) == pytest.approx(allowed @ surface.hessian(free) @ allowed, abs=0.02)
    rest = surface.relax(held, fmax=1e-4)
    (point,) = surface.points([rest])
    response = IonResponse(inverse_hessian(surface.hessian(rest)), None)
    assert np.abs(point.forces).max() > 0.1  # what constraints take up
    assert response.corrected(point, rest).energy == pytest.approx(point.energy, abs=1e-7)
    assert response.corrected(point, rest).forces == pytest.approx(point.forces, abs=1e-3)
    (moved,) = surface.relax_ions([held], response.compliance)
    assert surface.points([moved])[0].energy == pytest.approx(point.energy, abs=1e-6)
    nothing = held.copy()
    nothing.set_constraint(FixAtoms(range(4)))
    assert not surface.hessian(nothing).any()


def test_fast_error_bars_under_constraints_are_those_of_relaxed_samples(copper):
    two = [bulk("Cu", cubic=True), held_copper()]
    fast, full = (gpmlp.compute_properties(copper, two, ["phases"], samples=6, full=full) for full in (False, True))
    assert not fast.failures and not full.failures
    assert fast.values[0].sigma == pytest.approx(full.values[0].sigma, rel=0.25) and fast.values[0].sigma > 0


def test_a_constraint_that_no_sample_can_hold_is_refused(copper):
    bound = bulk("Cu", cubic=True)
    bound.set_constraint(FixBondLength(0, 1))
    with pytest.raises(UserError, match="Cu4: the constraint FixBondLengths? cannot be held here, only FixAtoms"):
        gpmlp.compute_properties(copper, [bulk("Cu"), bound], ["phases"])


CRYSTALS_ONLY = ["eos", "lattice", "elastic", "phonons", "quasi_harmonic", "vacancy", "interstitial", "surface"]


@pytest.mark.parametrize("what", CRYSTALS_ONLY)
def test_constraints_and_slabs_are_refused_for_crystals(copper, what):
    held = bulk("Cu", cubic=True)
    held.set_constraint(FixCartesian([0], [True, True, False]))
    with pytest.raises(UserError, match=f"^{what}: Cu4 has constraints, which a crystal's .* cannot have: remove them"):
        gpmlp.compute_properties(copper, held, [what])
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    slab.pbc = True
    boxed = Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)], cell=[12.0] * 3, pbc=True)
    sheared = slab.copy()
    sheared.cell[2] += 2 * sheared.cell[0]
    for atoms, kind in ((slab, "a slab or a layer"), (sheared, "a slab or a layer"), (boxed, "a molecule in a box")):
        with pytest.raises(
            UserError, match=rf"no crystal: its cell has a gap of 1\d\.\d A without atoms, as that of {kind}"
        ):
            gpmlp.compute_properties(copper, atoms, [what])
    with pytest.raises(UserError, match="no property that suits .* eos: Cu4 has constraints"):
        gpmlp.compute_properties(copper, held)


def test_a_gap_beyond_the_reach_of_the_model_holds_no_cell(copper):
    slab = fcc111("Cu", (1, 1, 3), vacuum=3.0)
    slab.pbc = True
    with pytest.raises(
        UserError, match=r"gap of 6\.0 A without atoms, across which the model does not reach \(4\.5 A\)"
    ):
        gpmlp.compute_properties(copper, slab, ["elastic"])


@pytest.mark.parametrize("what", ["lattice", "elastic"])
def test_a_crystal_that_gives_way_has_no_elastic_tensor(what):
    with pytest.raises(UserError, match="not stable: an eigenvalue of its elastic tensor is -"):
        exact_properties(EnergySurface.of_calculator(EMT()), bulk("Cu", "sc", a=2.4), [what])
    with pytest.raises(Failed, match="not stable"):
        check_stable(np.diag([1, 1, 1, 1, 1, 1e-7]), "it")  # rounding


def test_names_differ_and_stay():
    """A number makes no name that another structure has; named again they are the same."""
    given = [bulk("Cu") for _ in range(4)]
    for atoms, name in zip(given, ("Cu", "Cu", "Cu_1", "Au"), strict=True):
        atoms.info["name"] = name
    names = [atoms.info["name"] for atoms in named(given)]
    assert len(set(names)) == 4 and names[2:] == ["Cu_1", "Au"]
    assert [atoms.info["name"] for atoms in named(named(given))] == names


def test_few_samples_that_remain_are_less_sure():
    """A median deviation is as sure as the rms of .37 of the samples; of too few there is no error bar."""
    samples = np.random.default_rng(2).normal(0.0, 1.0, 32)
    whole = value_from_samples("x", "eV", 0.0, samples)
    assert whole.high_90 / whole.sigma == pytest.approx(stats.t.ppf(0.95, 32))
    lost = value_from_samples("x", "eV", 0.0, [*samples[:20], *[np.nan] * 12])
    assert lost.high_90 / lost.sigma == pytest.approx(stats.t.ppf(0.95, 0.37 * 20))
    for n, k in ((32, 15), (8, 4)):
        few = value_from_samples("x", "eV", 0.0, [*samples[:k], *[np.nan] * (n - k)])
        assert np.isnan(few.sigma) and np.isnan(few.high_90) and few.failed == n - k
    assert np.isfinite(value_from_samples("x", "eV", 0.0, samples[:3]).sigma)
    scales = 1.4826 * np.median(np.abs(np.random.default_rng(3).normal(size=(4000, 400))), axis=1)
    assert 1 / (2 * 400 * scales.var()) == pytest.approx(0.37, abs=0.03)


class Wandering(Calculation):
    """A curve whose marked places are other ones on every third surface, another length on every third."""

    name: ClassVar[str] = "wandering"
    asked: ClassVar[list[int]] = []

    def plan(self, surface: EnergySurface, structures) -> Plan:
        turn = len(self.asked) % 3
        self.asked.append(turn)
        x = np.linspace(0, 1, 6 if turn == 2 else 5)
        axis = CurveAxis(x, "q", "1/A", ((0.0, "G"), (1.0, "M" if turn == 1 else "X")))
        name = "bands" if turn < 2 or len(self.asked) % 2 else "other"

        def evaluate(points):
            return {name: points[0].energy * np.ones((len(x), 3)), "energy": points[0].energy}

        return Plan(tuple(structures), evaluate, {name: "THz", "energy": "eV"}, curves={name: axis})


def test_a_sample_of_another_symmetry_has_no_such_curve(copper):
    Wandering.asked.clear()
    found = gpmlp.compute_properties(copper, bulk("Cu"), [Wandering()], samples=12, full=True)
    (curve,) = found.curves
    assert curve.failed == 8 and curve.samples == 12
    assert np.isnan(curve.sigma).all()  # a third of the samples says too little
    assert any("8 of 12 samples have another symmetry" in text for text in found.failures)
    assert found["energy"].failed == 0 and found["energy"].sigma > 0


def test_a_crystal_and_a_molecule_together(copper):
    """Each calculation is of what it suits, and says what it leaves out."""
    dimer = Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)], info={"name": "pair"})
    found = gpmlp.compute_properties(copper, [bulk("Cu"), dimer], ["lattice", "frequencies"], samples=4)
    names = {value.name.partition(".")[0]: value.calculation for value in found.values}
    assert names == {"Cu": "lattice", "pair": "frequencies"}
    assert any(text.startswith("pair.lattice is left out: pair is no crystal") for text in found.failures)
    assert any(text.startswith("Cu.frequencies is left out: Cu is periodic") for text in found.failures)
    chosen = [each.name for each in choose_calculations(named([bulk("Cu"), dimer]))]
    assert {"eos", "lattice", "elastic", "frequencies"} <= set(chosen)
    with pytest.raises(UserError, match="torsions: Cu is periodic"):
        choose_calculations(named([bulk("Cu"), dimer]), ["lattice", "torsions"])
    truth = exact_properties(EnergySurface.of_calculator(EMT()), [bulk("Cu"), dimer], ["lattice"])
    assert list(truth) == ["Cu.lattice_constant_a"]


def test_only_some_of_the_structures_suit_what_is_named():
    """A compound with its elements: the equation of state of the crystals, the vacancies of them all."""
    oxide, metal, gas = bulk("MgO", "rocksalt", a=4.2), bulk("Mg"), molecule("O2")
    chosen = choose_calculations(named([oxide, metal, gas]), ["eos", "vacancy"])
    made = [(each.name, prefix, len(these)) for each, these, prefix in applications(chosen, named([oxide, metal, gas]))]
    assert made == [("eos", "MgO.", 1), ("eos", "Mg2.", 1), ("vacancy", "", 3)]
    assert left_out(chosen, named([oxide, metal, gas]))[0].startswith("O2.eos is left out: O2 is no crystal")


def test_labels_are_not_chosen_for_phonons(copper):
    made = (value_from_samples("frequency_X_1", "THz", 1.0, [0.9, 1.2, 1.1], calculation="phonons"),)
    made += (value_from_samples("C11", "GPa", 1.0, [0.9, 1.2, 1.1], calculation="elastic"),)
    what = choose_calculations([bulk("Cu")], ["phonons", "elastic"])
    with pytest.raises(UserError, match="cannot be chosen for values of phonons.* they can for C11"):
        choose_labels(copper, [bulk("Cu")], what, PropertyResults(made), ["frequency_X_1"], 1)
    assert sharpened_names(what, PropertyResults(made)) == ["C11"]


def run(*arguments) -> int:
    return main.main([str(argument) for argument in ("properties", *arguments)])


def test_command(copper, tmp_path, capsys):
    """Each frame is a structure; what is written is what Python gives."""
    gpmlp.save(copper, tmp_path / "m.gpmlp")
    ase.io.write(tmp_path / "cu.xyz", [bulk("Cu"), bulk("Cu", "hcp", a=2.55, c=4.15)])
    ase.io.write(tmp_path / "box.xyz", Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)]))
    out = tmp_path / "out"
    files = tmp_path / "m.gpmlp", tmp_path / "cu.xyz"
    assert run(*files, "-o", out, "--only", "lattice,phases", "--samples", "6", "--seed", "3") == 0
    printed = capsys.readouterr().out
    values = json.loads((out / "properties.json").read_text())
    names = ["cu_0.lattice_constant_a", "cu_1.lattice_constant_a", "cu_1.lattice_constant_c", "cu_1.energy_above_cu_0"]
    assert [value["name"] for value in values] == names and all(name in printed for name in names)
    assert {"name", "value", "sigma", "low_90", "high_90", "unit", "parts", "novelty", "failed"} <= set(values[0])
    crystals = ase.io.read(tmp_path / "cu.xyz", ":")
    for i, atoms in enumerate(crystals):
        atoms.info["name"] = f"cu_{i}"
    again = gpmlp.compute_properties(copper, crystals, ["lattice", "phases"], samples=6, seed=3)
    assert [value["sigma"] for value in values] == pytest.approx([value.sigma for value in again.values], rel=1e-6)
    used = ase.io.read(out / "structures.xyz", ":")
    assert {name for value in values for name in value["structures"]} == {atoms.info["name"] for atoms in used}
    assert run(*files, "-o", out, "--only", "eos", "--set", "eos.volumes=5", "--samples", "4") == 0
    curves = json.loads((out / "curves.json").read_text())
    assert len(curves) == 2 and len(curves[0]["x"]) == len(curves[0]["sigma"]) and min(curves[0]["sigma"]) > 0
    page = (out / "properties.html").read_text()
    assert "Equation of state of cu_1" in page and (out / "figures" / "cu_1_equation_of_state.svg").exists()
    capsys.readouterr()
    for arguments, said in (
        ((tmp_path / "box.xyz", "--only", "elastic"), "box is no crystal"),
        ((files[1], "--only", "elastic", "--set", "elastic.stran=1"), "Perhaps you meant 'strain'"),
        ((files[1], "--only", "elastic", "--set", "eos.volumes=5"), "eos is not computed"),
        ((files[1], "--only", "elastic", "--set", "elastic=5"), "options have names"),
        ((files[1], "--only", "elastik"), "Perhaps you meant 'elastic'"),
    ):
        assert run(files[0], *arguments, "-o", tmp_path / "no") == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_the_oracle_beside(copper, tmp_path, capsys):
    """Its own lattice constants, from its own relaxation, in the table and the file; what it cannot do is warned of."""
    gpmlp.save(copper, tmp_path / "m.gpmlp")
    ase.io.write(tmp_path / "cu.xyz", bulk("Cu"))
    (tmp_path / "learn.yaml").write_text("start: cu.xyz\noracle: {calculator: emt}\ndynamics: {temperature_K: 300}\n")
    files, out = (tmp_path / "m.gpmlp", tmp_path / "cu.xyz"), tmp_path / "out"
    options = ("-o", out, "--only", "lattice", "--samples", "4", "--oracle", tmp_path / "learn.yaml")
    assert run(*files, *options) == 0
    (value,) = json.loads((out / "properties.json").read_text())
    truth = exact_properties(EnergySurface.of_calculator(EMT()), bulk("Cu"), ["lattice"])["lattice_constant_a"]
    assert value["oracle"] == pytest.approx(truth, rel=1e-6) and value["oracle"] != value["value"]
    assert "oracle" in capsys.readouterr().out
    (tmp_path / "learn.yaml").write_text("calculator: emtt\n")
    assert run(*files, *options) == 2
    assert "Perhaps you meant 'emt'" in capsys.readouterr().err


class Fragile(EMT):
    """Fails on cells that are larger than some volume."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        if atoms.get_volume() > 13:
            raise RuntimeError("no convergence")
        super().calculate(atoms, properties, system_changes)


def test_an_oracle_that_fails_loses_its_own_values_only(copper, tmp_path, capsys, monkeypatch):
    gpmlp.save(copper, tmp_path / "m.gpmlp")
    ase.io.write(tmp_path / "cu.xyz", bulk("Cu"))
    ase.io.write(tmp_path / "wide.xyz", bulk("Cu", a=3.9))
    (tmp_path / "learn.yaml").write_text("calculator: emt\n")
    monkeypatch.setattr("gpmlp.core.calculators.build_calculator", lambda *_: Fragile())
    files, out = [tmp_path / name for name in ("m.gpmlp", "cu.xyz", "wide.xyz")], tmp_path / "out"
    options = ("-o", out, "--only", "lattice", "--samples", "4", "--oracle", tmp_path / "learn.yaml")
    assert run(*files, *options) == 0
    values = {value["name"]: value for value in json.loads((out / "properties.json").read_text())}
    assert values["cu.lattice_constant_a"]["oracle"] and values["wide.lattice_constant_a"]["oracle"] is None
    said = " ".join(capsys.readouterr().err.split())
    assert "wide.lattice: wide: the calculator failed (RuntimeError: no convergence)" in said
    assert "emt itself gives no wide.lattice_constant_a" in said


def test_what_an_earlier_run_left_is_removed(copper, tmp_path, capsys):
    """Its figures and its structures to label, and nothing else; a pool is checked before anything is computed."""
    gpmlp.save(copper, tmp_path / "m.gpmlp")
    ase.io.write(tmp_path / "cu.xyz", bulk("Cu"))
    out = tmp_path / "out"
    files = tmp_path / "m.gpmlp", tmp_path / "cu.xyz", "-o", out, "--samples", "4", "--only"
    assert run(*files, "eos", "--set", "eos.volumes=5", "--label", "1") == 0
    assert (out / "label_next.xyz").exists() and (out / "figures" / "equation_of_state.svg").exists()
    (out / "figures" / "mine.svg").write_text("x")
    assert run(*files, "lattice") == 0
    assert not (out / "label_next.xyz").exists()
    assert [path.name for path in (out / "figures").iterdir()] == ["mine.svg"]
    ase.io.write(tmp_path / "pool.xyz", [bulk("Cu"), bulk("Au")])
    capsys.readouterr()
    before = (out / "properties.json").stat().st_mtime_ns
    assert run(*files, "lattice", "--label", "1", "--pool", tmp_path / "pool.xyz") == 2
    said = "".join(capsys.readouterr().err.split())
    assert "pool.xyz,frame1:thepotentialwasnottrainedonAu" in said
    assert (out / "properties.json").stat().st_mtime_ns == before


def test_what_to_label(silicon, tmp_path, capsys):
    """One after the other is as all at once: a dense Gaussian conditioned on the labels of all that was chosen."""
    crystals = named([bulk("Si"), bulk("Si", cubic=True)])
    chosen_from = [bulk("Si", a=5.2), bulk("Si", a=5.6), bulk("Si", a=5.9)]
    what = [PhaseEnergies(relax=False), EquationOfState()]
    results = gpmlp.compute_properties(silicon, crystals, what, samples=8)
    wanted = ["Si2.bulk_modulus", "Si8.energy_above_Si2"]
    chosen = choose_labels(silicon, crystals, what, results, wanted[:1], 3, chosen_from)
    found = [choice.sigmas[wanted[0]] for choice in chosen]
    assert results[wanted[0]].sigma > found[0] > found[1] > found[2] > 0
    # dense, with a functional from the fit of the curve to energies of one displaced volume after the other
    surface, task = (
        EnergySurface(silicon),
        plan_all(EnergySurface(silicon), what[1:], crystals[:1], lambda *_: None)[0][0],
    )
    points = surface.points(task.plan.structures)
    row = 0.0
    for i, atoms in enumerate(task.plan.structures):
        moduli = []
        for sign in (1, -1):
            moved = [replace(p, energy=p.energy + sign * 1e-3 * (j == i)) for j, p in enumerate(points)]
            moduli.append(task.plan.evaluate(moved)["bulk_modulus"])
        row = row + (moduli[0] - moduli[1]) / 2e-3 * _whitened_rows(silicon, atoms)[0]
    labels = torch.cat([_whitened_rows(silicon, c.atoms) / _noise(silicon, c.atoms)[:, None] for c in chosen])
    cross = labels @ row
    inner = torch.eye(len(labels)).double() + labels @ labels.T
    left = 1 - float(cross @ torch.linalg.solve(inner, cross)) / float(row @ row)
    assert found[-1] == pytest.approx(results[wanted[0]].sigma * left**0.5, rel=1e-3)
    # energies of what is the same crystal cannot differ, and there is nothing to sharpen
    assert results[wanted[1]].value == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="only .* structures that could be labelled"):
        choose_labels(silicon, crystals, what, results, wanted[:1], 1000)
    with pytest.raises(UserError, match="no property 'C12'"):
        choose_labels(silicon, crystals, what, results, ["C12"], 1)
    gpmlp.save(silicon, tmp_path / "m.gpmlp")
    bulk("Si").write(tmp_path / "si.xyz")
    files = tmp_path / "m.gpmlp", tmp_path / "si.xyz", "-o", tmp_path / "out", "--only", "elastic", "--samples", 8
    assert run(*files, "--label", 2, "--sharpen", "C44") == 0
    assert "What to label" in capsys.readouterr().out
    written = ase.io.read(tmp_path / "out" / "label_next.xyz", ":")
    values = {v["name"]: v["sigma"] for v in json.loads((tmp_path / "out" / "properties.json").read_text())}
    assert len(written) == 2 and written[1].info["sigma_C44"] < written[0].info["sigma_C44"] < values["C44"]
    assert run(*files, "--sharpen", "C44") == 2
    assert "--label" in capsys.readouterr().err


def test_a_model_without_variances_gives_values(tmp_path, capsys):
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 4, "l_max": 2}, inducing={"n": 20}, variance=False)
    potential = gpmlp.fit(*from_ase(labelled(bulk("Cu", cubic=True), EMT(), 8, 0.03, 0.1)), recipe)[0]
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    bulk("Cu").write(tmp_path / "cu.xyz")
    assert run(tmp_path / "m.gpmlp", tmp_path / "cu.xyz", "-o", tmp_path / "out", "--only", "eos") == 0
    assert "no variances" in capsys.readouterr().err
    values = json.loads((tmp_path / "out" / "properties.json").read_text())
    assert all(value["sigma"] is None and value["value"] is not None and value["samples"] == 0 for value in values)


@pytest.mark.parametrize("lacking", ["energies", "forces", "stresses"])
def test_kinds_without_noise_tell_nothing(lacking):
    """Models that were fitted without energies, forces or stresses: labels of that kind do not count, the others do."""
    noise = {"energies": 1e-3, "forces": 1e-2, "stresses": 1e-4}
    del noise[lacking]
    each = _noise(SimpleNamespace(noise=noise), Atoms("H2"))
    kinds = {"energies": each[:1], "forces": each[1:7], "stresses": each[7:]}
    expected = {"energies": 2e-3, "forces": 1e-2, "stresses": 1e-4} | {lacking: np.inf}
    assert all((kinds[kind] == expected[kind]).all() for kind in expected)
