"""Calculators as baselines: what is subtracted and added, computed once, kept beside the data, and what a model file may not do."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import ase.io
import fake_calculators
import numpy as np
import pytest
import torch
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from conftest import copper
from learning_runs import finish
from learning_runs import prepare as run_folder
from learning_runs import recipe as learn_recipe

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core import calculator_pool, calculators
from gpmlp.core.calculator_pool import PointCalculator, compute_points
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.structures import Structures, plain_structure
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting import prepare
from gpmlp.io import baseline_cache, export
from gpmlp.io.ase_atoms import from_ase, structures_from_ase, write_frames
from gpmlp.potential import calculator_energies
from gpmlp.potential.calculator_energies import COMPUTED, PERMITTED, CalculatorEnergies
from gpmlp.potential.stepper import Stepper
from gpmlp.recipe import Recipe

MODEL = {
    "descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.0},
    "inducing": {"n": 20, "gradients": 1},
    "calibration": False,
    "novelty": False,
}
EMT_BASELINE = {"calculator": {"name": "emt"}, "zbl": False}


@pytest.fixture(autouse=True)
def _forgotten():
    """Nothing computed or permitted by one test is there in the next."""
    COMPUTED.clear()
    PERMITTED.clear()
    yield
    COMPUTED.clear()
    PERMITTED.clear()


@pytest.fixture(scope="module")
def frames():
    return [copper(seed) for seed in range(12)]


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "calls"


def calls(log: Path) -> list[int]:
    """Processes that were asked, one for each call."""
    file = log.with_suffix(".txt")
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def fake(name: str, log: Path, **kwargs) -> dict:
    return {"name": f"fake_calculators:{name}", "kwargs": {"log": str(log)} | kwargs}


def fitted(frames, baseline: dict, **more) -> gpmlp.Potential:
    recipe = Recipe.model_validate({**MODEL, "baseline": {"zbl": False} | baseline, **more})
    return gpmlp.fit(*from_ase(frames), recipe)[0]


# ---------------------------------------------------------------- what is learned is the difference


def test_labels_of_the_calculator_leave_nothing_to_learn(frames):
    potential = fitted(frames, EMT_BASELINE)
    new = [copper(seed) for seed in range(50, 54)]
    structures, targets = from_ase(new)
    prediction = potential(structures, variance="all")
    assert (prediction.energies - targets.energies).abs().max() < 1e-6
    assert (prediction.forces - targets.forces).abs().max() < 1e-6
    assert (prediction.stresses - targets.stresses).abs().max() < 1e-8
    assert prediction.atom_energies.sum() == pytest.approx(float(prediction.energies.sum()), abs=1e-9)
    assert prediction.forces_variance.total.sqrt().max() < 2e-4  # of the correction; no noise is below 1e-4


def test_error_bars_are_of_the_correction(frames):
    """Labels less the calculator, learned without it, have the same predictions but for what it adds, and the same variances."""
    rng = np.random.default_rng(0)
    shift = {"name": "emt", "kwargs": {"asap_cutoff": True}}
    structures, targets = from_ase(frames)
    targets = replace(
        targets, forces=targets.forces + 0.05 * torch.as_tensor(rng.standard_normal((len(targets.forces), 3)))
    )
    with_it, _ = gpmlp.fit(
        structures, targets, Recipe.model_validate({**MODEL, "baseline": {"calculator": shift, "zbl": False}})
    )
    term = CalculatorEnergies.asked_for(**shift)
    less = targets.minus(term(structures))
    without, _ = gpmlp.fit(structures, less, Recipe.model_validate({**MODEL, "baseline": {"zbl": False}}))
    new = structures_from_ase([copper(40)])
    one, other, own = with_it(new, variance="all"), without(new, variance="all"), term(new)
    for name in ("energies", "forces", "stresses", "atom_energies"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name) + getattr(own, name), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(one.forces_variance.total, other.forces_variance.total, rtol=2e-2, atol=0)


def test_forces_and_stress_are_derivatives_with_a_calculator_below(frames):
    potential = fitted(
        frames,
        {"calculator": {"name": "lennard-jones", "kwargs": {"sigma": 2.3, "epsilon": 0.1, "rc": 4.0, "smooth": True}}},
    )
    new = copper(60)
    structure = structures_from_ase([new])
    found, step = potential(structure), 1e-4

    def energy(positions, cell) -> float:
        return float(potential(structure.with_positions(positions, cell)).energies)

    for atom, axis in ((0, 0), (2, 1)):
        moved = torch.zeros_like(structure.positions)
        moved[atom, axis] = step
        slope = (
            energy(structure.positions + moved, structure.cells) - energy(structure.positions - moved, structure.cells)
        ) / (2 * step)
        assert -slope == pytest.approx(float(found.forces[atom, axis]), abs=1e-6)
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[0, 1] = strain[1, 0] = step
    both = [
        energy(structure.positions @ (torch.eye(3) + s), structure.cells @ (torch.eye(3) + s))
        for s in (strain, -strain)
    ]
    slope = (both[0] - both[1]) / (4 * step) / float(structure.volumes)
    assert slope == pytest.approx(float(found.stresses[0, 0, 1]), abs=1e-7)


def test_isolated_atoms_have_their_energy_with_a_calculator_below(frames, log):
    potential = fitted(frames, {"calculator": fake("Counting", log, shift=3.0), "isolated_atoms": {"Cu": -7.0}})
    alone = Structures(
        torch.zeros(1, 3).double(),
        torch.zeros(1, 3, 3).double(),
        torch.zeros(1, 3).bool(),
        torch.tensor([29]),
        torch.zeros(1).long(),
    )
    assert sum(float(b(alone).energies) for b in potential.baselines) == pytest.approx(-7.0, abs=1e-9)


def test_samples_and_covariances_hold_the_calculator(frames):
    potential, new = fitted(frames, EMT_BASELINE), structures_from_ase([copper(70)])
    drawn = potential.sample(3, 0)
    assert (drawn(new).forces - potential(new).forces).abs().max() < 1e-3
    assert float((drawn[0](new).energies - drawn(new).energies[0]).abs()) < 1e-9


# ---------------------------------------------------------------- how it is computed


def test_calculators_that_remember_are_made_anew(frames, log):
    kwargs = {"log": str(log)}
    PERMITTED.add(("fake_calculators:Remembering", calculator_energies.ANY))
    structures = structures_from_ase(frames[:4])
    fresh = CalculatorEnergies("fake_calculators:Remembering", kwargs)(structures).energies
    right = torch.tensor([frame.get_potential_energy() + 1 for frame in frames[:4]])
    torch.testing.assert_close(fresh, right, atol=1e-9, rtol=0)
    again = CalculatorEnergies("fake_calculators:Remembering", kwargs, {}, True)(structures).energies
    torch.testing.assert_close(again, right + torch.arange(4), atol=1e-9, rtol=0)


def test_by_processes_to_the_last_bit_and_in_one(frames, log, monkeypatch):
    structures = structures_from_ase(frames)
    plain = [plain_structure(structures, i) for i in range(len(structures))]
    calculator, found = PointCalculator(**fake("Counting", log)), []
    for seconds in (1e9, -1.0):
        monkeypatch.setattr(calculator_pool, "ALONE_S", seconds)
        monkeypatch.setattr(calculator_pool.os, "sched_getaffinity", lambda pid: {0, 1})
        points: dict = {}
        compute_points(calculator, plain, points.__setitem__)
        found.append([points[i] for i in range(len(plain))])
    for here, there in zip(*found, strict=True):
        assert here["energy"] == there["energy"]
        np.testing.assert_array_equal(here["forces"], there["forces"])
        np.testing.assert_array_equal(here["stress"], there["stress"])
    assert len(set(calls(log))) == 3


@pytest.mark.parametrize("kill", [False, True])
def test_structures_that_fail_are_named_and_the_others_kept(kill, frames, log, monkeypatch, tmp_path):
    monkeypatch.setattr(calculator_pool, "ALONE_S", -1.0)
    monkeypatch.setattr(calculator_pool.os, "sched_getaffinity", lambda pid: {0, 1})
    bad = frames[3].copy()
    bad.positions[1] = bad.positions[0] + [0.9, 0, 0]
    structures = structures_from_ase([*frames[:3], bad, frames[4]], [f"train.xyz frame {i}" for i in range(5)])
    term = CalculatorEnergies.asked_for(**fake("Failing", log, closest=1.0, kill=kill))
    why = "its process was ended by signal 9" if kill else "RuntimeError: self-consistency was not reached"
    with pytest.raises(
        UserError, match=f"train.xyz frame 3: the baseline calculator fake_calculators:Failing failed: {why}"
    ):
        baseline_cache.compute_baselines([term], structures, tmp_path / "train.xyz")
    assert len(COMPUTED) == 4
    COMPUTED.clear()
    before = len(calls(log))
    baseline_cache.compute_baselines([term], structures.select([0, 1, 2, 4]), tmp_path / "train.xyz")
    assert len(calls(log)) == before and len(COMPUTED) == 4


def test_a_calculator_without_stress(frames, log):
    with pytest.raises(UserError, match="has a stress, but the baseline gives none.* use_stresses: false"):
        fitted(frames, {"calculator": fake("NoStress", log)})
    potential = fitted(frames, {"calculator": fake("NoStress", log)}, use_stresses=False)
    new = copper(80)
    structure, targets = from_ase([new])
    prediction = potential(structure)
    assert prediction.stresses.isnan().all() and (prediction.forces - targets.forces).abs().max() < 1e-5
    result = gpmlp.evaluate(potential, structure, targets).as_dict()
    assert result["stress_mae_GPa"] is None and result["force_mae_meV_per_A"] < 0.01
    new.calc = GPCalculator(potential)
    with pytest.raises(PropertyNotImplementedError):
        new.get_stress()


def test_charges_and_moments_reach_the_calculator(frames):
    atoms = frames[0].copy()
    atoms.set_initial_charges([1, 0, 0, 0])
    atoms.set_initial_magnetic_moments([0, 2, 0, 0])
    other = frames[0].copy()
    term = CalculatorEnergies.asked_for("fake_calculators:Electronic", {})
    energies = term(structures_from_ase([atoms, other])).energies
    assert energies.tolist() == [12.0, 0.0]
    potential = fitted(frames, {"calculator": {"name": "fake_calculators:Electronic"}}, use_stresses=False)
    other.calc = GPCalculator(potential)
    before = other.get_potential_energy()
    other.set_initial_magnetic_moments([0, 2, 0, 0])
    assert other.get_potential_energy() == pytest.approx(before + 2.0)
    other.set_initial_charges([1, 0, 0, 0])
    assert other.get_potential_energy() == pytest.approx(before + 12.0)


def test_the_total_charge_of_a_code_that_wants_it_said():
    pytest.importorskip("pyscf")
    from ase.build import molecule

    atoms = molecule("H2O")
    neutral, charged = atoms.copy(), atoms.copy()
    charged.set_initial_charges([2.0, 0, 0])
    term = CalculatorEnergies.asked_for("pyscf", {"xc": "hf", "basis": "sto-3g"})
    both = term(structures_from_ase([neutral, charged])).energies
    assert float(both[1] - both[0]) > 20.0  # eV: two electrons less


# ---------------------------------------------------------------- computed once


def test_computed_once_and_kept_beside_the_data(frames, log, tmp_path, capsys):
    data = tmp_path / "train.xyz"
    write_frames(data, frames)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**MODEL, "baseline": {"zbl": False, "calculator": fake("Counting", log)}}))
    fit = ["fit", str(data), "--recipe", str(recipe), "-o", str(tmp_path / "model.gpmlp")]
    assert main(fit) == 0
    assert len(calls(log)) == len(frames)
    first = gpmlp.load(tmp_path / "model.gpmlp")
    COMPUTED.clear()
    structures, _ = gpmlp.read(data)  # rounded by the file
    assert main(fit) == 0 and main(["evaluate", str(tmp_path / "model.gpmlp"), str(data)]) == 0
    assert len(calls(log)) == len(frames)
    assert torch.equal(first(structures).forces, gpmlp.load(tmp_path / "model.gpmlp")(structures).forces)
    assert main(["info", str(tmp_path / "model.gpmlp")]) == 0
    assert "the calculator fake_calculators:Counting (fake_calculators sha256 " in " ".join(
        capsys.readouterr().out.split()
    )
    # damaged: said, not used, computed again
    (kept,) = (tmp_path / baseline_cache.FOLDER).rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-8] + b"\0" * 8)
    COMPUTED.clear()
    with pytest.warns(DataWarning, match="is damaged and not used"):
        baseline_cache.compute_baselines(first.outer_baselines, structures, data)
    assert len(calls(log)) == 2 * len(frames)


def test_other_settings_and_other_structures_are_computed_anew(frames, log, tmp_path):
    structures = structures_from_ase(frames[:3])
    for shift, expected in ((0.0, 3), (1.0, 6), (0.0, 6)):
        COMPUTED.clear()
        term = CalculatorEnergies.asked_for(**fake("Counting", log, shift=shift))
        baseline_cache.compute_baselines([term], structures, tmp_path / "x.xyz")
        assert len(calls(log)) == expected
        assert term(structures).energies[0] == pytest.approx(frames[0].get_potential_energy() + 4 * shift)
    moved = structures.with_positions(structures.positions + 1e-9)
    baseline_cache.compute_baselines([term], moved, tmp_path / "x.xyz")
    assert len(calls(log)) == 9
    twice = Structures.concatenate([moved, moved])
    baseline_cache.compute_baselines([term], twice, tmp_path / "x.xyz")
    assert len(calls(log)) == 9


def test_a_folder_that_cannot_be_written_to(frames, tmp_path, log):
    (tmp_path / baseline_cache.FOLDER).write_text("a file in its place")
    term = CalculatorEnergies.asked_for(**fake("Counting", log))
    with pytest.warns(DataWarning, match="are not kept for another time"):
        baseline_cache.compute_baselines([term], structures_from_ase(frames[:2]), tmp_path / "x.xyz")
    assert len(COMPUTED) == 2


LOCAL = """
import json
from ase.calculators.lj import LennardJones
from {package}.base import EPSILON
class Local(LennardJones):
    def __init__(self, files=(), **kwargs):
        depth = sum(json.load(open(file)) for file in files)
        super().__init__(sigma=2.2, epsilon=EPSILON + depth, rc=6.0, **kwargs)
"""


def local_package(folder: Path, name: str, epsilon: float) -> str:
    """A package of this folder alone, as a new process would find it; the name of its calculator."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "__init__.py").touch()
    (folder / name / "base.py").write_text(f"EPSILON = {epsilon!r}\n")
    (folder / name / "pot.py").write_text(LOCAL.format(package=name))
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]
    importlib.invalidate_caches()
    return f"{name}.pot:Local"


@pytest.fixture
def working_folder(tmp_path, monkeypatch) -> Path:
    """As in a console script: Python does not look there by itself."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != ""])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def test_a_package_that_was_edited_is_computed_anew(frames, working_folder):
    """Any of its files may decide about the numbers, not that of the class alone."""
    structures, energies, hashes = structures_from_ase(frames[:2]), [], set()
    for epsilon in (0.1, 0.3):
        COMPUTED.clear()
        term = CalculatorEnergies.asked_for(local_package(working_folder, "edited_potential", epsilon), {})
        baseline_cache.compute_baselines([term], structures, working_folder / "x.xyz")
        energies.append(term(structures).energies)
        hashes.add(term.versions["edited_potential"])
    assert len(hashes) == 2 and torch.allclose(energies[1], 3 * energies[0], rtol=1e-12)


def test_files_among_keyword_arguments_are_part_of_the_settings(frames, working_folder):
    name, file = local_package(working_folder, "reading_potential", 0.1), working_folder / "depth.json"
    structures, energies = structures_from_ase(frames[:2]), []
    for depth in ("0.1", "0.3"):
        file.write_text(depth)
        COMPUTED.clear()
        term = CalculatorEnergies.asked_for(name, {"files": ["depth.json"]})
        baseline_cache.compute_baselines([term], structures, working_folder / "x.xyz")
        energies.append(term(structures).energies)
    assert torch.allclose(energies[1], 2 * energies[0], rtol=1e-12)
    state = term.state()
    assert set(state["versions"]) == {"reading_potential", "depth.json"}
    CalculatorEnergies.from_state(state)
    file.write_text("0.5")
    with pytest.warns(DataWarning, match="depth.json sha256 .*; here is .*depth.json sha256"):
        CalculatorEnergies.from_state(state)
    file.unlink()
    with pytest.warns(DataWarning, match="here is .*, no depth.json"):
        CalculatorEnergies.from_state(state)


def test_a_class_inherits_from_sources_too(working_folder):
    base = local_package(working_folder, "inherited_potential", 0.1).partition(":")[0]
    (working_folder / "heir.py").write_text(f"from {base} import Local\nclass Heir(Local):\n    pass\n")
    versions = CalculatorEnergies.asked_for("heir:Heir", {}).versions
    assert set(versions) == {"heir", "inherited_potential"}
    assert CalculatorEnergies.asked_for("ase.calculators.emt:EMT", {}).versions == {"ase": ase.__version__}


# ---------------------------------------------------------------- model files


def saved(frames, baseline: dict, tmp_path: Path) -> Path:
    path = tmp_path / "delta.gpmlp"
    gpmlp.save(fitted(frames, {"calculator": baseline}), path)
    PERMITTED.clear()
    COMPUTED.clear()
    return path


def test_a_file_imports_nothing_that_was_not_allowed(frames, log, tmp_path, monkeypatch, capsys):
    path, trace = saved(frames, fake("Counting", log), tmp_path), tmp_path / "imported"
    monkeypatch.setenv("FAKE_CALCULATORS_IMPORTED", str(trace))
    monkeypatch.delitem(sys.modules, "fake_calculators")
    before = len(calls(log))
    with pytest.raises(
        UserError,
        match="delta.gpmlp: this model needs the baseline calculator fake_calculators:Counting .*sha256.*allow_calculator",
    ):
        gpmlp.load(path)
    assert main(["evaluate", str(path), str(tmp_path / "none.xyz")]) == 2 and main(["info", str(path)]) == 0
    assert not trace.exists() and "fake_calculators" not in sys.modules and len(calls(log)) == before
    monkeypatch.setenv(calculator_energies.ALLOWED, "another:One, fake_calculators:Counting")
    structures, targets = from_ase(frames[:2])
    assert (gpmlp.load(path)(structures).forces - targets.forces).abs().max() < 1e-5
    assert trace.exists()
    monkeypatch.delenv(calculator_energies.ALLOWED)
    gpmlp.allow_calculator("fake_calculators:Counting")
    gpmlp.load(path)


def test_what_a_recipe_allows_are_its_keyword_arguments_alone(frames, log, tmp_path):
    path = saved(frames, fake("Counting", log), tmp_path)
    CalculatorEnergies.asked_for(**fake("Counting", log, shift=1.0))
    with pytest.raises(UserError, match="needs the baseline calculator"):
        gpmlp.load(path)
    CalculatorEnergies.asked_for(**fake("Counting", log))
    gpmlp.load(path)


def test_programs_are_not_run_for_a_file_and_pure_potentials_are(frames, tmp_path):
    state = {"name": "calculator", "kwargs": {"command": "touch x"}, "versions": {"ase": "3"}}
    for name in ("dftb+", "vasp", "orca", "cp2k", "aims", "gpaw", "quantum-espresso", "pyscf"):
        with pytest.raises(UserError, match="nothing that a model file names is imported or run by itself"):
            CalculatorEnergies.from_state(state | {"calculator": name})
    path = saved(frames, {"name": "emt"}, tmp_path)
    structures, targets = from_ase(frames[:2])
    assert (gpmlp.load(path)(structures).forces - targets.forces).abs().max() < 1e-5


def test_a_local_calculator_is_found_once_it_is_allowed(frames, working_folder, monkeypatch):
    name = local_package(working_folder, "allowed_potential", 0.1)
    path = saved(frames, {"name": name}, working_folder)
    folder = str(working_folder.resolve())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != folder])
    local_package(working_folder, "allowed_potential", 0.1)
    with pytest.raises(UserError, match="needs the baseline calculator allowed_potential.pot:Local"):
        gpmlp.load(path)
    assert folder not in sys.path and "allowed_potential" not in sys.modules
    monkeypatch.setenv(calculator_energies.ALLOWED, name)
    structures, targets = from_ase(frames[:2])
    assert torch.isfinite(gpmlp.load(path)(structures).forces).all()
    # elsewhere nobody is sent to a registry for it
    local_package(working_folder, "allowed_potential", 0.1)
    (working_folder / "elsewhere").mkdir()
    monkeypatch.chdir(working_folder / "elsewhere")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != folder])
    with pytest.raises(UserError, match="allowed_potential.*work in the folder where it is") as error:
        gpmlp.load(path)
    assert "pip" not in str(error.value)


@pytest.mark.parametrize("name", ["emt", "lennard-jones", "stillinger-weber", "tblite"])
@pytest.mark.parametrize("keyword", sorted(calculators.FILE_KEYWORDS))
def test_no_file_that_a_model_names_is_opened(name, keyword, tmp_path, monkeypatch):
    """ASE's calculators read `parameters` and `restart` when they are made."""
    named, opened = str(tmp_path / "secret"), []
    Path(named).write_text("{}")
    monkeypatch.setattr(
        "builtins.open", lambda file, *a, real=open, **k: (opened.append(str(file)), real(file, *a, **k))[1]
    )
    monkeypatch.setattr(
        Path, "read_bytes", lambda self, real=Path.read_bytes: (opened.append(str(self)), real(self))[1]
    )
    package = calculators.READY[name].package
    state = {"name": "calculator", "calculator": name, "kwargs": {keyword: named}, "versions": {package: "1"}}
    if (name, keyword) == ("stillinger-weber", "parameters"):  # a name, which is looked up
        pytest.importorskip("matscipy", reason="matscipy is not installed (pip install matscipy)")
        with pytest.warns(DataWarning):
            term = CalculatorEnergies.from_state(state)
        with pytest.raises(UserError, match="matscipy has no Stillinger-Weber parameters"):
            term(structures_from_ase([copper(0)]))
    else:
        with pytest.raises(UserError, match=f"the keyword argument {keyword}, by which it may read or write files"):
            CalculatorEnergies.from_state(state)
    assert named not in opened


def test_closed_calculators_are_not_made_with_what_they_do_not_know(tmp_path):
    file = tmp_path / "parameters.json"
    file.write_text("not JSON")  # reading it would say so
    with pytest.raises(UserError, match="emt knows no kwargs.parameters; it takes asap_cutoff"):
        CalculatorEnergies.asked_for("emt", {"parameters": str(file)})(structures_from_ase([copper(0)]))


@pytest.mark.parametrize("kwargs", [{"rc": float("inf")}, {"deep": {"er": [1.0, float("nan")]}}])
def test_numbers_that_no_model_file_can_hold(kwargs):
    with pytest.raises(ValueError, match="must not hold NaN or infinite numbers"):
        Recipe.model_validate({"baseline": {"calculator": {"name": "lennard-jones", "kwargs": kwargs}}})


def test_another_version_is_told(frames, tmp_path, monkeypatch):
    path = saved(frames, {"name": "emt"}, tmp_path)
    monkeypatch.setattr(calculator_energies.calculators, "package_versions", lambda *_: {"ase": "99.1"})
    with pytest.warns(DataWarning, match=r"fitted on the baseline calculator emt \(ase [\d.]+\); here is ase 99.1"):
        gpmlp.load(path)
    monkeypatch.setattr(calculator_energies.calculators, "package_versions", lambda *_: {})
    with pytest.raises(UserError, match=r"needs the baseline calculator emt \(ase [\d.]+\), which is not installed"):
        gpmlp.load(path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("emmt", "there is no calculator 'emmt'. Perhaps you meant 'emt'"),
        ("no_such_module:Potential", "cannot be imported"),
        ("fake_calculators:Countin", "has no class 'Countin'. Perhaps you meant 'Counting'"),
        ("fake_calculators:Oracle", "has no `calculate`"),
        ("os:getcwd", "was not called"),
    ],
)
def test_calculators_that_are_none(name, message, frames):
    with pytest.raises(UserError, match=f"baseline.calculator: .*{message}"):
        fitted(frames, {"calculator": {"name": name}})


def test_a_keyword_that_is_none(frames):
    with pytest.raises(UserError, match="emt knows no kwargs.asap_cutof. Perhaps you meant 'asap_cutoff'"):
        fitted(frames, {"calculator": {"name": "emt", "kwargs": {"asap_cutof": True}}})


# ---------------------------------------------------------------- engines


def test_dynamics_conserves_the_energy(frames, log):
    potential, atoms = fitted(frames, EMT_BASELINE), copper(90)
    atoms.calc = GPCalculator(potential, uncertainty="forces")
    energies = []
    dynamics = VelocityVerlet(atoms, 1.0 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(20)
    moving = atoms.get_kinetic_energy()
    assert moving > 0.01 and np.ptp(energies) < 0.03 * moving


def test_engines_that_cannot_say_so(frames, tmp_path):
    potential = fitted(frames, EMT_BASELINE)
    assert not potential.is_local and "a baseline beyond" in repr(potential)
    with pytest.raises(UserError, match="cannot be exported: .* the baseline CalculatorEnergies"):
        export.export_model(potential, tmp_path / "x.gpk")
    with pytest.raises(UserError, match="its baseline CalculatorEnergies has no form"):
        Stepper(potential, structures_from_ase(frames[:1]))
    with pytest.raises(UserError, match="Virials of atoms have no meaning"):
        potential(structures_from_ase(frames[:1]), atom_virials=True)


def test_a_potential_travels_to_other_processes(frames):
    potential, new = fitted(frames, EMT_BASELINE), structures_from_ase([copper(95)])
    expected = potential(new).forces
    assert torch.equal(pickle.loads(pickle.dumps(potential))(new).forces, expected)


def test_a_learning_run(tmp_path, log):
    """Labels of EMT on a baseline that is EMT with another cutoff: learned is little, and the run goes as any other."""
    folder = run_folder(tmp_path / "run")
    baseline = {"zbl": False, "calculator": fake("Counting", log, shift=1.5)}
    chosen = learn_recipe(
        oracle={"calculator": "emt"}, dynamics={"steps": 20}, model={"baseline": baseline}, trigger={"force": 0.002}
    )
    last = finish(chosen, folder)
    assert last.phase == "stopped" and last.labels >= 3
    potential = gpmlp.load(folder / "out" / "model.gpmlp")
    structure = structures_from_ase([ase.io.read(folder / "start.xyz")])
    atoms = ase.io.read(folder / "start.xyz")
    atoms.calc = EMT()
    prediction = potential(structure)
    assert float(prediction.energies) == pytest.approx(atoms.get_potential_energy(), abs=1e-3)
    assert fake_calculators.Counting.__module__ == "fake_calculators"
    frames = ase.io.read(folder / "out" / "trajectory.xyz", ":")
    assert len(calls(log)) < 3 * 20 + 2 * last.labels + len(
        frames
    )  # a step is asked for once, a label is not asked for again
    assert len(prepare.outer_baselines(chosen.model)) == 1
