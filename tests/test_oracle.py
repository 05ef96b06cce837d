"""Oracles: how a recipe names one, what is believed of its answers, and the codes that can be run here, run for real."""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import ase
import ase.build
import numpy as np
import pytest
import torch
import yaml
from ase.calculators.emt import EMT
from pydantic import ValidationError

import gpmlp
from gpmlp.core import calculators
from gpmlp.core.calculators import (
    PSEUDO_DIRS,
    READY,
    CalculatorError,
    build_calculator,
    electronic_kwargs,
    merge_kwargs,
)
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.oracles import single_point
from gpmlp.learning.oracles.oracle import CalculatorOracle, OracleRecipe, make_job

SILICON = {
    "pseudopotentials": {"Si": "Si.pbe-rrkj.UPF"},
    "ecutwfc_Ry": 16,
    "kpts": [2, 2, 2],
    "koffset": [1, 1, 1],
}
pseudo = next((d for d in map(Path, PSEUDO_DIRS) if (d / "Si.pbe-rrkj.UPF").is_file()), None)
needs_espresso = pytest.mark.skipif(
    shutil.which("pw.x") is None or pseudo is None,
    reason="Quantum ESPRESSO is not installed (apt install quantum-espresso quantum-espresso-data)",
)


def rattled(atoms, seed=0, size=0.05):
    atoms.rattle(size, rng=np.random.default_rng(seed))
    return atoms


def fake(tmp_path, *behaviour, **values) -> CalculatorOracle:
    kwargs = {"log": str(tmp_path / "log"), "behaviour": behaviour}
    values = {"check_every": 0} | values  # calls are counted
    return CalculatorOracle(OracleRecipe(calculator="fake_oracles:Fake", kwargs=kwargs, **values))


def calls(tmp_path) -> int:
    return len((tmp_path / "log").read_text().split())


@pytest.fixture
def copper():
    return structures_from_ase([rattled(ase.build.bulk("Cu", cubic=True), 1)])


@pytest.mark.parametrize("name", ["emt", "ase.calculators.emt:EMT"])
def test_emt_by_name_and_by_path(name):
    frames = [rattled(ase.build.bulk("Cu", cubic=True), 1), rattled(ase.build.molecule("H2O"), 2)]
    structures = structures_from_ase(frames)
    targets = CalculatorOracle(OracleRecipe(calculator=name)).label(structures)
    for frame in frames:
        frame.calc = EMT()
    assert targets.energies.tolist() == [frame.get_potential_energy() for frame in frames]
    assert torch.equal(targets.forces, torch.tensor(np.concatenate([frame.get_forces() for frame in frames])))
    assert torch.equal(targets.stresses[0], torch.tensor(frames[0].get_stress(voigt=False)))
    assert targets.stresses[1].isnan().all()  # no cell, no stress
    assert targets.energies_noise.isnan().all() and targets.config_types == ("", "")


def test_lennard_jones(copper):
    """Energy and forces agree; ASE gives this one a free energy and a stress, too."""
    kwargs = {"sigma": 2.3, "epsilon": 0.4, "rc": 6.0, "smooth": True}
    recipe = OracleRecipe(calculator="lennard-jones", kwargs=kwargs, check_every=1, free_energy=True, stress=True)
    assert CalculatorOracle(recipe).label(copper).stresses.isfinite().all()


def test_documented_recipes():
    text = (Path(__file__).parents[1] / "docs" / "oracles.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        values = yaml.safe_load(block)["oracle"]
        recipe = OracleRecipe(**values)
        try:
            calculators.find_calculator(recipe.calculator)
        except calculators.CalculatorError as error:
            assert "install" in str(error), error  # what is not installed here says so
            continue
        if recipe.calculator == "quantum-espresso" and pseudo is not None:
            calculators.build_calculator(recipe.calculator, recipe.kwargs_of(2), Path("unused"))
    keys = re.findall(r"^\| `(\w+)` \|", text.split("| key | default |")[1], re.MULTILINE)
    assert set(keys) == set(OracleRecipe.model_fields) - {"calculator", "kwargs"}


def test_stress_only_where_wanted(copper):
    assert CalculatorOracle(OracleRecipe(calculator="emt", stress=False)).label(copper).stresses.isnan().all()
    slab = structures_from_ase([ase.build.fcc111("Cu", (1, 1, 2), vacuum=5.0)])
    assert CalculatorOracle(OracleRecipe(calculator="emt")).label(slab).stresses.isnan().all()


def test_free_energy_of_smeared_electrons(copper, tmp_path):
    """Forces are the slope of the free energy, so that is what is learned; `energy` is 0.25 eV higher here."""
    free = fake(tmp_path, "smeared").label(copper).energies
    assert torch.equal(free, CalculatorOracle(OracleRecipe(calculator="emt")).label(copper).energies)
    assert fake(tmp_path, "smeared", free_energy=False).label(copper).energies.item() == free.item() + 0.25
    oracle = CalculatorOracle(OracleRecipe(calculator="ase.calculators.harmonic:SpringCalculator", free_energy=True,
                                           kwargs={"ideal_positions": [[0, 0, 0]] * 4, "k": 1.0}))  # fmt: skip
    with pytest.raises(UserError, match="gives no free energy, which free_energy: true asks for"):
        oracle.label(copper)


def test_own_oracle(copper):
    targets = CalculatorOracle(OracleRecipe(calculator="fake_oracles:OwnOracle", largest_net_force=100.0)).label(copper)
    assert torch.equal(targets.forces, -2.0 * copper.positions) and targets.stresses.isnan().all()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"calculator": "tblit"}, "there is no calculator 'tblit'. Perhaps you meant 'tblite'"),
        ({"calculator": "nonsense"}, "Valid names: aims, cp2k, dftb\\+, emt.*import path, 'module:Class'"),
        ({"calculator": "os.path.join(1):x"}, "there is no calculator"),
        ({"calculator": "os:"}, "there is no calculator"),
        ({"calculator": "emt", "retrys": 2}, "retrys"),
        ({"calculator": "emt", "kwargs": {"x": object()}}, "must hold plain values"),
        ({"calculator": "emt", "magnetic_moments": {"Fee": 2}}, "'Fee' is not a chemical symbol"),
        ({"calculator": "emt", "timeout_s": 0}, "greater than 0"),
    ],
)
def test_recipe_refused(values, match):
    with pytest.raises(ValidationError, match=match):
        OracleRecipe(**values)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"calculator": "ase.calculators.emt:EMTT"},
            "module ase.calculators.emt has no class 'EMTT'. Perhaps .* 'EMT'",
        ),
        ({"calculator": "no_such_code.ase:Code"}, "No module named 'no_such_code'; install what holds no_such_code"),
        (
            {"calculator": "emt", "kwargs": {"asap_cutof": True}},
            "emt knows no kwargs.asap_cutof. Perhaps .* 'asap_cutoff'",
        ),
        (
            {"calculator": "fake_oracles:Strict", "kwargs": {"cuttoff": 3}},
            "fake_oracles:Strict knows no kwargs.cuttoff. Perhaps you meant 'cutoff'",
        ),
        ({"calculator": "quantum-espresso", "kwargs": {"command": "no-pw.x"}}, "no program 'no-pw.x'.*apt install"),
        (
            {"calculator": "quantum-espresso", "kwargs": {"command": "true", "pseudo_dir": "/nowhere"}},
            "no folder of pseudopotentials at /nowhere",
        ),
    ],
)
def test_calculator_that_cannot_be_made(values, match, copper):
    with pytest.raises(UserError, match=match):
        CalculatorOracle(OracleRecipe(**values)).label(copper)


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "builtins:exec", "shutil:rmtree", "pathlib:Path"])
def test_what_is_no_oracle_is_not_called(name, copper, tmp_path):
    """Nor made: only a class that can answer is."""
    told = tmp_path / "told"
    kwargs = {"command": f"touch {told}", "args": f"touch {told}", "shell": True}
    with pytest.raises(UserError, match=f"'{name}' is no oracle: it has to be a class with `calculate`"):
        CalculatorOracle(OracleRecipe(calculator=name, kwargs=kwargs)).label(copper)
    assert not told.exists()


def test_reading_a_recipe_imports_nothing(tmp_path, monkeypatch):
    """What a stranger's recipe names runs when a run of it is begun, and not before."""
    (tmp_path / "strangers_oracle.py").write_text("raise AssertionError('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = OracleRecipe(calculator="strangers_oracle:Own")
    assert recipe.settings_hash and "strangers_oracle" not in sys.modules
    with pytest.raises(UserError, match="it was imported"):
        recipe.check()


def test_hash_of_settings():
    """Changes with what a label is, not with how it is obtained."""
    one = OracleRecipe(calculator="emt", kwargs={"asap_cutoff": True, "command": "a"})
    how = {"workers": 2, "timeout_s": 1, "retries": 7, "executor": "inline", "directory": "/x", "check_every": 3}
    same = OracleRecipe(calculator="emt", kwargs={"command": "mpirun a", "asap_cutoff": True}, **how)
    assert one.settings_hash == same.settings_hash
    others = [{"kwargs": {"asap_cutoff": False}}, {"free_energy": False}, {"magnetic_moments": {"Cu": 1.0}}]
    assert len({OracleRecipe(**({"calculator": "emt"} | o)).settings_hash for o in others} | {one.settings_hash}) == 4


def test_retry_kwargs_are_merged_in_turn():
    recipe = OracleRecipe(calculator="emt", kwargs={"a": {"b": 1, "c": 2}}, retry_kwargs=({"a": {"b": 3}}, {"d": 4}))
    assert recipe.attempts == 3
    assert [recipe.kwargs_of(n) for n in (1, 2, 3)] == [
        {"a": {"b": 1, "c": 2}},
        {"a": {"b": 3, "c": 2}},
        {"a": {"b": 1, "c": 2}, "d": 4},
    ]
    assert OracleRecipe(calculator="emt", retries=4, retry_kwargs=({"d": 4},)).kwargs_of(5) == {"d": 4}
    assert merge_kwargs({"a": 1}, {"a": {"b": 2}}) == {"a": {"b": 2}}


@pytest.mark.parametrize(
    ("behaviour", "match"),
    [
        ("nan", "the force on atom 0 is NaN or infinite"),
        ("huge", "the force on atom 0 is 1.73e\\+05 eV/A, more than largest_force 1000"),
        ("pulled", "forces sum up to 0.5 eV/A per atom instead of 0, more than largest_net_force 0.1"),
        ("unconverged", "RuntimeError: SCF not converged in 100 cycles"),
    ],
)
def test_labels_that_are_not_believed(copper, tmp_path, behaviour, match):
    with pytest.raises(UserError, match=f"frame 0: the oracle gave no label: {match}.* \\(2 times\\)"):
        fake(tmp_path, behaviour).label(copper)
    assert calls(tmp_path) == 2


def test_third_attempt_is_good(copper, tmp_path):
    targets = fake(tmp_path, "unconverged", "nan", "well", retries=2).label(copper)
    assert torch.equal(targets.energies, CalculatorOracle(OracleRecipe(calculator="emt")).label(copper).energies)
    assert calls(tmp_path) == 3


def test_checks_of_forces_can_be_switched_off(copper, tmp_path):
    assert fake(tmp_path, "huge", check_forces=False).label(copper).forces.abs().max() == 1e5


def test_energy_against_forces(copper, tmp_path):
    """Forces 20 % too large are found by one more call; those of EMT itself are not (nor are they without the check)."""
    fake(tmp_path, "contradiction").label(copper)
    assert calls(tmp_path) == 1
    with pytest.raises(UserError, match="energy and forces contradict each other: a step of at most 0.02 A"):
        fake(tmp_path, "contradiction", check_every=1, retries=0).label(copper)
    assert calls(tmp_path) == 3
    default = OracleRecipe(calculator="emt").check_every
    with pytest.raises(UserError, match="contradict"):  # the first of a batch at least
        fake(tmp_path, "contradiction", check_every=default, retries=0).label(copper)
    CalculatorOracle(OracleRecipe(calculator="emt", check_every=1)).label(copper)


def test_timeout_in_this_process(copper, tmp_path):
    with pytest.raises(UserError, match="no answer within timeout_s 0.3"):
        fake(tmp_path, "hang", timeout_s=0.3, retries=0).label(copper)


def test_full_disk_is_no_failure_of_the_structure(copper, tmp_path):
    with pytest.raises(UserError, match="No space left on device"):
        fake(tmp_path, "full_disk").label(copper)
    assert calls(tmp_path) == 1


def test_label_does_not_depend_on_those_before(tmp_path):
    """Else a resumed run could not be the same to the last bit; tblite starts from its last wave function if it can."""
    pytest.importorskip("tblite.ase", reason="tblite cannot be imported (pip install tblite)", exc_type=ImportError)
    frames = [rattled(ase.build.molecule("CH3OH"), seed, 0.1) for seed in (1, 2)]
    oracle = CalculatorOracle(OracleRecipe(calculator="tblite"))
    both, alone = oracle.label(structures_from_ase(frames)), oracle.label(structures_from_ase(frames[1:]))
    assert both.energies[1] == alone.energies[0] and torch.equal(both.forces[6:], alone.forces)


def test_tblite_forces_are_slopes():
    """GFN2-xTB of ethanol: analytic forces against central differences of the energy."""
    pytest.importorskip("tblite.ase", reason="tblite cannot be imported (pip install tblite)", exc_type=ImportError)
    molecule = rattled(ase.build.molecule("CH3CH2OH"), 1, 0.1)
    oracle = CalculatorOracle(OracleRecipe(calculator="tblite", kwargs={"accuracy": 0.01}))
    forces = oracle.label(structures_from_ase([molecule])).forces
    for atom, axis in ((0, 0), (2, 1), (5, 2)):
        pair = []
        for sign in (-1, 1):
            pair.append(molecule.copy())
            pair[-1].positions[atom, axis] += sign * 1e-3
        low, high = oracle.label(structures_from_ase(pair)).energies.tolist()
        # h^2 E'''/6 is about 1e-5 eV/A
        assert forces[atom, axis].item() == pytest.approx(-(high - low) / 2e-3, abs=2e-4)


def test_pyscf_forces_are_slopes():
    pytest.importorskip("pyscf", reason="pyscf is not installed (pip install pyscf)")
    water = structures_from_ase([rattled(ase.build.molecule("H2O"), 1)])
    kwargs = {"xc": "pbe", "basis": "sto-3g"}
    CalculatorOracle(OracleRecipe(calculator="pyscf", kwargs=kwargs, check_every=1)).label(water)
    with pytest.raises(UserError, match="unknown keyword arguments \\['base'\\]"):
        CalculatorOracle(OracleRecipe(calculator="pyscf", kwargs={"base": "sto-3g"})).label(water)


def test_stillinger_weber():
    """Diamond silicon of Stillinger and Weber: two bonds of -2.17 eV an atom."""
    pytest.importorskip("matscipy", reason="matscipy is not installed (pip install matscipy)")
    silicon = ase.build.bulk("Si", cubic=True, a=5.431)
    oracle = CalculatorOracle(OracleRecipe(calculator="stillinger-weber", check_every=1))
    assert oracle.label(structures_from_ase([silicon])).energies.item() / 8 == pytest.approx(-4.3363, abs=1e-3)
    oracle.label(structures_from_ase([rattled(silicon, 1)]))


@needs_espresso
def test_quantum_espresso_silicon():
    """Energies of pw.x against its forces, by a second call."""
    silicon = rattled(ase.build.bulk("Si"), 1, 0.1)
    oracle = CalculatorOracle(OracleRecipe(calculator="quantum-espresso", kwargs=SILICON, check_every=1, retries=0))
    targets = oracle.label(structures_from_ase([silicon]))
    assert -108 < targets.energies.item() / 2 < -106  # this pseudopotential has four electrons
    assert targets.forces.abs().max() > 0.3 and targets.forces.sum(dim=0).abs().max() < 1e-3
    assert torch.equal(targets.stresses[0], targets.stresses[0].T) and targets.stresses.abs().max() < 0.2


@needs_espresso
def test_quantum_espresso_makes_the_labels_of_our_data():
    """Eight atoms; the friendly keywords mean what the input of data/silicon/generate.py meant."""
    structures, targets = gpmlp.read(Path(__file__).parents[1] / "data/silicon/test.xyz", "20:21")
    kwargs = SILICON | {
        "ecutwfc_Ry": 30,
        "degauss_Ry": 0.01,
        "kpts": [2, 2, 2],
        "mixing_beta": 0.5,
        "input_data": {"electrons": {"conv_thr": 1e-9}},
    }
    found = CalculatorOracle(OracleRecipe(calculator="quantum-espresso", kwargs=kwargs)).label(structures)
    assert found.energies.item() == pytest.approx(targets.energies.item(), abs=1e-5)
    assert torch.allclose(found.forces, targets.forces, atol=1e-4)
    assert torch.allclose(found.stresses, targets.stresses, atol=1e-5)


@needs_espresso
def test_quantum_espresso_retried_with_other_keywords(tmp_path):
    silicon = structures_from_ase([rattled(ase.build.bulk("Si"), 1)])
    kwargs = SILICON | {"ecutwfc_Ry": 12, "input_data": {"electron_maxstep": 2}}
    few = {"calculator": "quantum-espresso", "kwargs": kwargs}
    with pytest.raises(UserError, match="self-consistency was not reached"):
        CalculatorOracle(OracleRecipe(**few, retries=0)).label(silicon)
    more = {"mixing_beta": 0.4, "input_data": {"electron_maxstep": 100}}
    assert CalculatorOracle(OracleRecipe(**few, retry_kwargs=(more,))).label(silicon).energies.isfinite().all()


@needs_espresso
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"pseudopotentials": {"Si": "Si.UPF"}}, "no pseudopotential Si.UPF in .*; for Si it holds .*Si.pbe-rrkj.UPF"),
        ({"ecutwfc_Ry": None}, "needs kwargs.ecutwfc_Ry"),
        ({"pseudopotentials": None}, "needs kwargs.pseudopotentials"),
    ],
)
def test_quantum_espresso_incomplete(kwargs, match, copper):
    with pytest.raises(UserError, match=match):
        OracleRecipe(calculator="quantum-espresso", kwargs=SILICON | kwargs).check()
    with pytest.raises(UserError, match="names no file for Cu"):
        CalculatorOracle(OracleRecipe(calculator="quantum-espresso", kwargs=SILICON)).label(copper)


@needs_espresso
def test_quantum_espresso_needs_a_box():
    water = structures_from_ase([ase.build.molecule("H2O")])
    with pytest.raises(UserError, match="pw.x needs a cell"):
        CalculatorOracle(OracleRecipe(calculator="quantum-espresso", kwargs=SILICON)).label(water)


STRUCTURE = {"initial_charges": [-1.0, 1.0], "magnetic_moments": [1.0, -1.0]}


@pytest.mark.parametrize("name", READY)
def test_what_ready_made_calculators_are_told_of_charge_and_moments(name):
    """Each gets the charge where it does not ask the atoms, and refuses moments that it would not see; nothing is dropped."""
    entry = READY[name]
    charge = {"charge": -1.0}
    assert electronic_kwargs(name, {"a": 1}, {}) == {"a": 1}
    if not entry.charge:
        assert electronic_kwargs(name, {"a": 1}, charge, needed=False) == {"a": 1}
        with pytest.raises(CalculatorError, match=f"{name} knows no charge, and the structure has the total charge -1"):
            electronic_kwargs(name, {"a": 1}, charge)
    else:
        assert electronic_kwargs(name, {"a": 1}, charge) == {"a": 1, entry.charge: -1}
        assert electronic_kwargs(name, {entry.charge: -1}, charge) == {entry.charge: -1}
        with pytest.raises(
            CalculatorError, match=f"kwargs.{entry.charge} is 2, but the structure has the total charge -1"
        ):
            electronic_kwargs(name, {entry.charge: 2}, charge)
    if entry.moments:
        electronic_kwargs(name, {}, STRUCTURE)
    else:
        with pytest.raises(CalculatorError, match=f"{re.escape(name)} takes no magnetic moments of atoms"):
            electronic_kwargs(name, {}, STRUCTURE)


def test_pw_x_is_told_of_spins_by_site_and_of_the_charge(tmp_path):
    """Its input, written for an antiferromagnetic ion: two types of atoms of opposite moment, and the charge of the cell."""
    pytest.importorskip("ase.calculators.espresso")
    (tmp_path / "Fe.upf").touch()
    atoms = ase.Atoms(
        "Fe2", [[0, 0, 0], [0, 0, 2.4]], cell=[5, 5, 5], pbc=True, magmoms=[2.0, -2.0], charges=[1.0, 0.0]
    )
    kwargs = {"pseudopotentials": {"Fe": "Fe.upf"}, "pseudo_dir": str(tmp_path), "ecutwfc_Ry": 30, "command": "true"}
    (structure,) = [structures_from_ase([atoms])]
    job = make_job(
        OracleRecipe(calculator="quantum-espresso", kwargs=kwargs), "k", 1, structure, tmp_path, tmp_path, ()
    )
    made = electronic_kwargs("quantum-espresso", kwargs, job["structure"])
    calculator = build_calculator("quantum-espresso", made, tmp_path)
    calculator.template.write_input(calculator.profile, tmp_path, atoms, calculator.parameters, ["energy"])
    text = (tmp_path / "espresso.pwi").read_text()
    assert (
        re.search(r"tot_charge\s*=\s*1\b", text)
        and re.search(r"nspin\s*=\s*2", text)
        and re.search(r"ntyp\s*=\s*2", text)
    )


def test_moments_of_the_atoms_come_before_those_by_symbol(copper, monkeypatch):
    asked = []
    monkeypatch.setattr(single_point, "_answer", lambda job, atoms, folder: asked.append(atoms) or {})
    recipe = OracleRecipe(calculator="emt", magnetic_moments={"Cu": 1.0}, check_every=0)
    magnet = replace(copper.select([0]), magnetic_moments=-2.0 * torch.ones(int(copper.counts[0])))
    for structure in (copper.select([0]), magnet):
        single_point.compute_label(make_job(recipe, "k", 1, structure, Path("."), Path("."), ()), Path("."))
    assert [atoms.get_initial_magnetic_moments()[0] for atoms in asked] == [1.0, -2.0]
