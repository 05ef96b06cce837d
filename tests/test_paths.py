"""Relaxations and paths on the posterior of few labels: against ASE on the oracle itself, killed and resumed, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixedLine, FixedPlane
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from reaction_systems import gpmlp_command, hop, killed_and_resumed, oracle_barrier, slab

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.paths.oracle import OracleCalculator
from gpmlp.learning.paths.recipe import NebRecipe, RelaxRecipe
from gpmlp.learning.paths.run import PathOutcome, _frames, find_path, path_numbers
from gpmlp.learning.paths.surface import PRIOR_LABELS, PRIOR_SCORE, Surface, surface_recipe
from gpmlp.learning.paths.vibrations import SaddleModes, saddle_modes
from gpmlp.report.path.page import foreseen_answer, modes_answer, path_page

pytestmark = pytest.mark.filterwarnings("ignore:Skipping unhashable")


@pytest.fixture(scope="module")
def found() -> gpmlp.GPNEB:
    start, end = hop()
    neb = gpmlp.GPNEB(start, end, EMT(), images=3)
    assert neb.run(fmax=0.05)
    return neb


def test_barrier_is_that_of_the_oracle(found):
    """To 10 meV, with at most five calls on the path; the label at the top is what the model had foreseen."""
    truth = oracle_barrier(*hop())
    assert found.path.barrier == pytest.approx(truth, abs=0.01)
    assert len(found.labels) <= 5
    assert found.oracle.calls == len(found.labels) + 2  # and the end points, which were at rest
    last = found.labels[-1]
    assert last.force < 0.05 and abs(last.error) < 0.01 and last.reason == "the top"
    assert abs(last.error) < 3 * last.sigma + 1e-3


def test_barrier_is_the_difference_of_the_labels(found):
    """The top of a path that converged stays where it was labelled, and path.xyz says what neb.json says."""
    truth = []
    for i in (0, found.path.top, -1):
        image = found.path.images[i].copy()
        image.calc = EMT()
        truth.append(image.get_potential_energy())
        assert found.path.images[i].get_potential_energy() == pytest.approx(truth[-1], abs=1e-9)
    assert found.path.barrier == pytest.approx(truth[1] - truth[0], abs=1e-9)
    assert found.path.reaction_energy == pytest.approx(truth[2] - truth[0], abs=1e-9)
    for frame in _frames(found.path):
        relative = frame.get_potential_energy() - found.path.images[0].get_potential_energy()
        assert frame.info["relative_energy_eV"] == pytest.approx(relative, abs=1e-9)


def test_error_bars_along_the_path_cover_the_oracle(found):
    """Errors of energies of all images, none of which but the top need be labelled, are within 3 σ and a meV."""
    errors = []
    for image in found.path.images:
        moved = image.copy()
        moved.calc = EMT()
        errors.append(moved.get_potential_energy())
    errors = np.array(errors) - errors[0] - found.path.energies
    assert (np.abs(errors) < 3 * found.path.sigmas + 1e-3).all()
    assert found.path.sigmas[0] == 0 and found.path.sigmas[1:-1].max() > found.path.sigma


def test_saddle_has_the_oracles_imaginary_mode(found, tmp_path):
    """One, as the oracle's finite differences have it, to 20 %: the model knows that curvature from a few labels."""
    top = found.path.images[found.path.top]
    modes = saddle_modes(found.surface, top)
    truth = top.copy()
    truth.calc = EMT()
    vibrations = Vibrations(truth, indices=range(4, len(top)), name=str(tmp_path / "vib"))
    vibrations.run()
    imaginary = vibrations.get_frequencies().imag
    assert (imaginary > 10).sum() == len(modes.imaginary) == 1
    assert modes.imaginary[0] == pytest.approx(imaginary.max(), rel=0.2)
    minimum = saddle_modes(found.surface, found.path.images[0])
    assert minimum.imaginary == []


def test_slopes_are_those_of_the_energies(found):
    """The curve of the figure: slopes by forces agree with differences of energies on either side of the top."""
    path = found.path
    chords = np.diff(path.energies) / np.diff(path.distances)
    assert np.sign(path.slopes[1]) == 1 and np.sign(path.slopes[-2]) == -1
    assert abs(path.slopes[path.top]) < 0.05
    assert np.sign(chords[0]) == 1 and 0.3 < path.slopes[1] / chords[:2].mean() < 3


def test_relaxation_needs_less_than_a_third_of_the_calls_of_bfgs():
    counts, energies = [], []
    for optimizer in (BFGS, gpmlp.GPMinimizer):
        atoms = slab("bridge", 2.3)
        atoms.rattle(0.1, seed=2)
        atoms.calc = OracleCalculator(EMT())
        with optimizer(atoms, logfile=None) as run:
            assert run.run(fmax=0.02)
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.02
        counts.append(atoms.calc.calls)
        energies.append(atoms.get_potential_energy())
    assert counts[1] < 0.6 * counts[0]
    assert energies[1] < energies[0] + 0.002


def test_surface_goes_through_its_labels():
    """Energies and forces of labels come back; forces are slopes of the energies; standard deviations grow away from labels."""
    surface = Surface(surface_recipe())
    rng = np.random.default_rng(0)
    for _ in range(3):
        atoms = slab()
        atoms.set_constraint()
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        atoms.calc = EMT()
        surface = surface.with_label(atoms, atoms.get_potential_energy(), atoms.get_forces())
    predicted = surface.predict(surface.labels)
    assert np.abs(predicted.energies - [a.get_potential_energy() for a in surface.labels]).max() < 2e-3
    away = surface.labels[0].copy()
    away.positions[-1] += [0.3, 0.2, 0.1]
    forward, backward = away.copy(), away.copy()
    forward.positions[-1, 0] += 1e-3
    backward.positions[-1, 0] -= 1e-3
    three = surface.predict([away, forward, backward])
    assert three.forces[0, -1, 0] == pytest.approx((three.energies[2] - three.energies[1]) / 2e-3, abs=1e-4)
    assert three.sigmas[0] > 3 * predicted.sigmas.max()


def test_scale_of_standard_deviations_follows_errors():
    """By hand from the scores, and standard deviations are the posterior's times it."""
    surface = Surface(surface_recipe())
    rng = np.random.default_rng(1)
    for _ in range(4):
        atoms = slab()
        atoms.set_constraint()
        atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
        atoms.calc = EMT()
        before = surface
        surface = surface.with_label(atoms, atoms.get_potential_energy(), atoms.get_forces())
    assert len(surface.scores) == 2 and Surface(surface_recipe()).scale == PRIOR_SCORE
    foreseen = before.predict([atoms])
    score = (foreseen.energies[0] - atoms.get_potential_energy()) / foreseen.sigmas[0] * before.scale
    assert surface.scores[-1] == pytest.approx(score, rel=1e-6)
    squares = PRIOR_LABELS * PRIOR_SCORE**2 + sum(x**2 for x in surface.scores)
    assert surface.scale == pytest.approx((squares / (PRIOR_LABELS + 2)) ** 0.5)
    bare = surface.potential(structures_from_ase([slab()]), variance="energies", form="dtc", calibrated=False)
    assert surface.predict([slab()]).sigmas[0] == pytest.approx(
        surface.scale * float(bare.energies_variance.epistemic.sqrt())
    )


def test_forces_that_symmetry_forbids_do_not_count():
    """Two symmetric structures, and the same as a file rounds them: one prediction between them, one error bar, one evidence."""
    found = []
    for digits in (15, 8):
        surface = Surface(surface_recipe())
        for atoms in hop():
            atoms.set_constraint()
            atoms.positions = np.round(atoms.positions, digits)
            surface = surface.with_label(atoms, atoms.get_potential_energy(), atoms.get_forces())
        between = slab()
        between[-1].x += 1.4
        predicted = surface.predict([between])
        found.append([predicted.energies[0], predicted.sigmas[0], surface.potential.report["negative_log_evidence"]])
    assert np.abs(np.diff(found, axis=0)).max() < 1e-3


# ---------------------------------------------------------------- what is refused


def changed(**how: object) -> tuple[Atoms, Atoms]:
    start, end = slab(), slab()
    end[-1].x += 2.8
    for name, value in how.items():
        setattr(end, name, value)
    return start, end


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (lambda: (slab(), slab()), "are the same structure"),
        (lambda: (slab(), slab()[:-1]), "the same atoms"),
        (lambda: changed(numbers=slab().numbers[::-1]), "in another order"),
        (lambda: changed(pbc=False), "is periodic along"),
        (lambda: changed(cell=slab().cell * 1.01), "cells of start and end differ"),
        (lambda: changed(constraints=[]), "other constraints"),
        (lambda: [a for a in changed() if a.set_constraint(FixBondLengths([[0, 1]])) is None], "FixBondLengths"),
        (lambda: [a for a in changed() if a.set_constraint(FixAtoms(range(9))) is None], "all 9 atoms are fixed"),
    ],
)
def test_end_points_that_no_path_joins_are_refused(ends, said):
    with pytest.raises(UserError, match=said):
        gpmlp.GPNEB(*ends(), EMT())


@pytest.mark.parametrize(
    ("constraint", "free", "held"),
    [
        (FixAtoms([0]), None, [0.4, 0, 0]),
        (FixCartesian(0, [True, False, False]), [0, 0.4, 0.3], [0.4, 0, 0]),
        (FixedLine(0, [0, 0, 1]), [0, 0, 0.4], [0.4, 0, 0.2]),
        (FixedPlane(0, [0, 1, 0]), [0.3, 0, 0.2], [0.3, 0.4, 0]),
    ],
)
def test_what_is_held_lies_elsewhere_in_the_end(constraint, free, held):
    """Only along what is held, and after the periodic image is chosen; along what is free the atom may move."""
    start, end = changed()
    for atoms in (start, end):
        atoms.set_constraint(constraint)
    end.positions[0] += 2 * end.cell[1] - end.cell[0]
    gpmlp.GPNEB(start, end, EMT())
    if free is not None:
        end.positions[0] += free
        gpmlp.GPNEB(start, end, EMT())
    end.positions[0] += held
    with pytest.raises(UserError, match=r"Atom 0 is held but is 0\.400 A elsewhere in the end"):
        gpmlp.GPNEB(start, end, EMT())


def test_ends_of_other_charges_or_moments_are_refused():
    start, end = changed(info={"total_charge": 1})
    with pytest.raises(UserError, match=r"start has the total charge 0 e and the end 1 e"):
        gpmlp.GPNEB(start, end, EMT())
    start.set_initial_charges([1.0, *[0.0] * 8])  # the same in another way
    gpmlp.GPNEB(start, end, EMT())
    moments = np.ones(9)
    start.set_initial_magnetic_moments(moments)
    with pytest.raises(UserError, match="that of atom 0 is 1 in the start and 0 in the end"):
        gpmlp.GPNEB(start, end, EMT())
    end.set_initial_magnetic_moments(np.outer(moments, [0, 0, 1]))  # the same in another way
    gpmlp.GPNEB(start, end, EMT())
    end.set_initial_magnetic_moments(np.outer(moments, [0, 1, 0]))
    with pytest.raises(UserError, match=r"is \(0, 0, 1\) in the start and \(0, 1, 0\) in the end"):
        gpmlp.GPNEB(start, end, EMT())


def test_keys_of_the_model_take_the_place_of_single_keys():
    given = {
        "inducing": {"n": 5},
        "noise": {"force": 1e-3},
        "variance": {"local": "reduced"},
        "descriptor": {"cutoff": 4.0},
    }
    recipe = surface_recipe(given)
    assert (recipe.inducing.n, recipe.inducing.functionals) == (5, "all")
    assert (recipe.noise.force, recipe.noise.energy_per_atom) == (1e-3, 5e-5)
    assert (recipe.variance.local, recipe.variance.columns) == ("reduced", "all")
    assert (recipe.mean, recipe.calibration, recipe.descriptor.cutoff) == ("exact", False, 4.0)
    assert (
        RelaxRecipe.model_validate({"start": "a.xyz", "oracle": {"calculator": "emt"}, "model": given}).model == recipe
    )
    two = surface_recipe(
        {"descriptor": [{"cutoff": 4.0}, {"cutoff": 5.0}], "inducing": [{"n": 5}, {"functionals": None}]}
    )
    assert [i.functionals for i in two.inducing] == ["all", None]


def test_model_whose_cutoff_no_pair_is_within_is_refused_after_one_label():
    atoms, oracle = slab("bridge", 2.3), OracleCalculator(EMT())
    atoms.calc = oracle
    with pytest.raises(UserError, match=r"No pair of atoms lies within the model's cutoff, 2 A"):
        gpmlp.GPMinimizer(atoms, Surface(surface_recipe({"descriptor": {"cutoff": 2.0}})), logfile=None).run(0.02)
    assert oracle.calls == 1


def test_too_few_images_and_no_calculator_are_refused():
    with pytest.raises(UserError, match=r"3 images between its end points at least.*got 2"):
        gpmlp.GPNEB(*changed(), EMT(), images=2)
    with pytest.raises(UserError, match="no calculator"):
        gpmlp.GPNEB(*changed())
    with pytest.raises(UserError, match="have no calculator"):
        gpmlp.GPMinimizer(slab())


class FailsAt(Calculator):
    """EMT that fails at one call."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, call: int, how: str) -> None:
        super().__init__()
        self.call, self.how, self.calls = call, how, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, list(properties), list(system_changes))
        self.calls += 1
        if self.calls == self.call and self.how == "raise":
            raise RuntimeError("SCF diverged")
        work = atoms.copy()
        work.calc = EMT()
        self.results = {"energy": work.get_potential_energy(), "forces": work.get_forces()}
        if self.calls == self.call:
            self.results["forces"][0, 0] = np.nan


@pytest.mark.parametrize(("how", "said"), [("raise", "RuntimeError: SCF diverged"), ("nan", "not finite")])
def test_failure_of_the_oracle_names_the_image(how, said):
    start, end = hop()
    with pytest.raises(UserError, match=rf"image 2 of 4 \(the middle of the first path\).*{said}"):
        gpmlp.GPNEB(start, end, FailsAt(3, how), images=3).run()


# ---------------------------------------------------------------- the commands


def written_hop(folder: Path) -> Path:
    start, end = hop()
    ase.io.write(folder / "start.xyz", start)
    ase.io.write(folder / "end.xyz", end)
    recipe = {"start": "start.xyz", "end": "end.xyz", "images": 3, "relax_ends": False}
    (folder / "neb.yaml").write_text(json.dumps({**recipe, "oracle": {"calculator": "emt", "executor": "inline"}}))
    return folder


def test_neb_killed_and_resumed_asks_for_the_same_labels(tmp_path, found):
    """kill -9 while labels come; the resumed run has the labels of one that was never killed, and its barrier is the class's."""
    folders, whole = killed_and_resumed(tmp_path, written_hop, "neb", "neb.yaml", "path", 3)
    numbers = [json.loads((folder / "neb.json").read_text()) for folder in folders]
    assert numbers[0] == numbers[1]
    assert numbers[0]["converged"] is True and numbers[0]["oracle_calls"] <= 5
    assert numbers[0]["barrier_eV"] == pytest.approx(found.path.barrier, abs=2e-3)
    assert 0 < numbers[0]["barrier_sigma_eV"] < 0.01
    assert numbers[0]["oracle_calls_end_points"] == 2
    assert "barrier" in whole.stdout and "the top" in whole.stderr
    assert (folders[0] / "path.png").read_bytes().startswith(b"\x89PNG")
    assert len(ase.io.read(folders[0] / "path.xyz", ":")) == 5


def test_relax_writes_what_the_oracle_says(tmp_path):
    atoms = slab("bridge", 2.0)
    ase.io.write(tmp_path / "start.xyz", atoms)
    recipe = {"start": "start.xyz", "fixed": [4], "oracle": {"calculator": "emt", "executor": "inline"}}
    (tmp_path / "relax.yaml").write_text(json.dumps(recipe))
    few = gpmlp_command(tmp_path, "relax", "relax.yaml", "--set", "labels_at_most=2")
    assert few.returncode == 2 and "not converged after 2 labels" in few.stderr
    done = gpmlp_command(tmp_path, "relax", "relax.yaml", "--resume")
    assert done.returncode == 0, done.stderr
    numbers, relaxed = (
        json.loads((tmp_path / "relaxed/relax.json").read_text()),
        ase.io.read(tmp_path / "relaxed/relaxed.xyz"),
    )
    assert numbers["converged"] is True
    held = [0, 1, 2, 3, 4]
    assert np.abs(relaxed.positions[held] - atoms.positions[held]).max() < 1e-7
    relaxed.calc = EMT()
    assert numbers["energy_eV"] == pytest.approx(relaxed.get_potential_energy(), abs=1e-5)
    assert np.linalg.norm(np.delete(relaxed.get_forces(apply_constraint=False), held, axis=0), axis=1).max() < 0.021


def test_second_reaction_needs_fewer_calls(tmp_path, found):
    """The way back, and the same hop along y, with the labels of the first: in Python, and by label files, whose labels are no calls."""
    start, end = hop()
    back = gpmlp.GPNEB(end, start, EMT(), images=3, surface=found.surface)
    assert back.run(fmax=0.05) and len(back.labels) < len(found.labels)
    assert back.path.barrier == pytest.approx(found.path.barrier, abs=0.005)
    assert back.labels[-1].number == len(back.surface.labels) - len(found.surface.labels)
    first = written_hop(tmp_path)
    done = gpmlp_command(first, "neb", "neb.yaml")
    assert done.returncode == 0, done.stderr
    turned = ase.io.read(first / "start.xyz")
    turned[-1].y += start.cell[0, 0] / 2
    ase.io.write(first / "aside.xyz", turned)
    changes = {"end": "aside.xyz", "labels": ["path/labels.xyz"], "output": "aside"}
    recipe = json.loads((first / "neb.yaml").read_text())
    (first / "aside.yaml").write_text(json.dumps({**recipe, **changes}))
    again = gpmlp_command(first, "neb", "aside.yaml")
    assert again.returncode == 0, again.stderr
    before, after = (json.loads((first / folder / "neb.json").read_text()) for folder in ("path", "aside"))
    assert after["oracle_calls"] < before["oracle_calls"]
    assert after["oracle_calls_end_points"] == 1  # the start is known
    assert after["barrier_eV"] == pytest.approx(before["barrier_eV"], abs=0.005)
    assert (first / "aside/taken/1.xyz").read_bytes() == (first / "path/labels.xyz").read_bytes()


def test_shared_labels_of_the_path_are_no_calls_and_no_minus(tmp_path):
    """All labels of a path are there already: it is found again without a call."""
    folder = written_hop(tmp_path)
    recipe = json.loads((folder / "neb.yaml").read_text())
    recipes = [NebRecipe.model_validate(recipe | x) for x in ({}, {"labels": ["path/labels.xyz"], "output": "again"})]
    first, again = ([*find_path(one, folder)][-1].numbers for one in recipes)
    assert first["oracle_calls"] == len(first["labels"]) and first["oracle_calls_end_points"] == 2
    made = again["oracle_calls"]
    assert again["oracle_calls_end_points"] == 0 and 0 <= made <= len(again["labels"])
    new = folder / "again/labels.xyz"
    assert made == (len(ase.io.read(new, ":")) if new.exists() else 0)


def test_labels_of_another_oracle_or_charge_are_refused(tmp_path):
    folder = written_hop(tmp_path)
    recipe = json.loads((folder / "neb.yaml").read_text())
    assert gpmlp_command(folder, "neb", "neb.yaml", "--set", "labels_at_most=1").returncode == 2
    labels = (folder / "path/labels.xyz").read_text()
    charged = ase.io.read(folder / "start.xyz")
    charged.info["charge"] = 1
    ase.io.write(folder / "charged.xyz", charged)
    (folder / "altered.xyz").write_text(labels.replace("energy=3", "energy=4", 1))
    shutil.copyfile(folder / "start.xyz", folder / "bare.xyz")
    for change, said in (
        ({"labels": ["nowhere.xyz"]}, "there is no such file"),
        ({"labels": ["altered.xyz"]}, "was altered"),
        ({"labels": ["bare.xyz"]}, "no run wrote it"),
        ({"oracle": recipe["oracle"] | {"kwargs": {"asap_cutoff": True}}}, "of another oracle"),
        ({"start": "charged.xyz"}, "two energy surfaces"),
    ):
        given = {"start": "start.xyz", "oracle": recipe["oracle"], "labels": ["path/labels.xyz"], **change}
        (folder / "relax.yaml").write_text(json.dumps(given))
        refused = gpmlp_command(folder, "relax", "relax.yaml")
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr
        assert not (folder / "relaxed").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": 2}, "images"),
        ({"end": "start.xyz"}, "are the same structure"),
        ({"end": "nowhere.xyz"}, "there is no such file"),
        ({"fixed": [99]}, "there is no atom 99"),
        ({"model": {"variance": False}}, "variance"),
        ({"end": "held.xyz"}, "Atom 0 is held but is 0.400 A elsewhere in the end"),
        ({"end": "charged.xyz"}, "total charge 0 e and the end 1 e"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(tmp_path, change, said):
    folder = written_hop(tmp_path)
    recipe = json.loads((folder / "neb.yaml").read_text())
    held, charged = (ase.io.read(folder / "end.xyz") for _ in range(2))
    held.positions[0, 0] += 0.4
    charged.info["charge"] = 1
    ase.io.write(folder / "held.xyz", held)
    ase.io.write(folder / "charged.xyz", charged)
    (folder / "neb.yaml").write_text(json.dumps({**recipe, **change}))
    refused = gpmlp_command(folder, "neb", "neb.yaml")
    assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (folder / "path").exists()


def test_page_says_what_the_numbers_say(tmp_path, found):
    """Barrier, frequency, labels and reasons are on it; all drawings are there; nothing is loaded from elsewhere."""
    modes = saddle_modes(found.surface, found.path.images[found.path.top])
    numbers = path_numbers(found, modes)
    page = path_page(PathOutcome(True, numbers, found.path, modes), found.labels, {"images": 3})
    text = page.write(tmp_path).read_text()
    assert (tmp_path / "path.html").exists() and (tmp_path / "figures/course.png").read_bytes().startswith(b"\x89PNG")
    assert f"{numbers['barrier_eV']:.3f} eV" in text and "Yes: one imaginary frequency" in text
    assert text.count('<span class="rank">') == len(found.labels) and all(x.reason in text for x in found.labels)
    assert text.count('<svg class="hood"') == 3 and "://" not in text.replace("http://www.w3.org", "")


def test_page_says_where_a_top_is_no_saddle():
    assert modes_answer(SaddleModes(np.array([-5.0, 30.0]))).startswith("No: the model has no imaginary frequency")
    assert modes_answer(SaddleModes(np.array([-90.0, -30.0, 20.0]))).startswith("Not of first order: 2 imaginary")
    said = foreseen_answer(np.array([0.03, -0.001]), np.array([0.01, 0.001]), 4)
    assert (
        said.startswith("2 structures, besides 4 of relaxations. Of their energies 1 lay within 2 σ")
        and "1.0 meV" in said
    )


def test_a_label_is_known_where_lattice_vectors_move_it(found):
    """The end of a hop over half of a cell lies on either side of the start, as rounding has it."""
    image = found.path.images[0].copy()
    image.positions[-1] += 2 * image.cell[0] - image.cell[1]
    assert found.surface.label_of(image) is found.surface.label_of(found.path.images[0]) is not None
    image.positions[-1, 2] += 1e-3
    assert found.surface.label_of(image) is None
    image.positions[-1, 2] -= 1e-3
    image.pbc = False
    assert found.surface.label_of(image) is None
