"""Saddles without an end point: against ASE on the oracle itself, killed and resumed, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixedLine, FixedPlane
from ase.optimize import BFGS
from ase.vibrations import Vibrations
from reaction_systems import gpmlp_command, hop, killed_and_resumed, oracle_barrier, slab

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.learning.paths.recipe import SaddleRecipe
from gpmlp.learning.paths.run import SaddleOutcome, _saddle_frames, find_saddle, saddle_numbers
from gpmlp.learning.paths.vibrations import saddle_modes
from gpmlp.properties.constraints import free_motions
from gpmlp.report.path.page import saddle_page

pytestmark = pytest.mark.filterwarnings("ignore:Skipping unhashable")


@pytest.fixture(scope="module")
def climbed() -> gpmlp.GPSaddle:
    start, _ = hop()
    search = gpmlp.GPSaddle(start, EMT(), direction={8: [1.0, 0.1, 0.0]})
    assert search.run(fmax=0.05)
    return search


def test_saddle_without_an_end_is_that_of_the_path(climbed):
    """The barrier of the oracle's own path, to 10 meV; the oracle's forces vanish there; the sides are the start and the next hollow."""
    start, end = hop()
    saddle = climbed.saddle
    assert saddle.barrier == pytest.approx(oracle_barrier(start, end), abs=0.01)
    assert saddle.barrier == pytest.approx(
        saddle.atoms.get_potential_energy() - start.get_potential_energy(), abs=0.002
    )
    there = saddle.atoms.copy()
    there.calc = EMT()
    assert np.linalg.norm(there.get_forces(), axis=1).max() < 0.05
    assert saddle.curvature < 0 and np.linalg.norm(saddle.mode) == pytest.approx(1)
    assert abs(saddle.mode[8, 0]) > 0.8 and (saddle.mode[:4] == 0).all()
    apart = sorted(np.abs(side.positions - start.positions).max() for side in saddle.sides)
    assert saddle.joins_start and apart[0] < 0.1
    assert apart[1] == pytest.approx(start.cell[0, 0] / 2, abs=0.1)
    assert len(climbed.labels) <= 8
    assert climbed.oracle.calls == len(climbed.surface.labels)


def test_barrier_is_the_difference_of_the_labels(climbed):
    """Whatever the posterior makes of them: that of the numbers and of the frames are one."""
    numbers = saddle_numbers(climbed, saddle_modes(climbed.surface, climbed.saddle.atoms))
    start, saddle = _saddle_frames(climbed.saddle)[:2]
    assert numbers["barrier_eV"] == saddle.info["relative_energy_eV"]
    for atoms in (start, saddle):
        there = atoms.copy()
        there.calc = EMT()
        assert atoms.get_potential_energy() == pytest.approx(there.get_potential_energy(), abs=1e-9)
    noise = climbed.surface.potential.noise["energies"] * len(start)
    assert 0 < numbers["barrier_sigma_eV"] <= 2**0.5 * noise


def test_saddle_has_one_negative_mode_by_the_oracle(climbed, tmp_path):
    """The oracle's own finite differences agree with the frequency of the model to 20 %."""
    truth = climbed.saddle.atoms.copy()
    truth.calc = EMT()
    vibrations = Vibrations(truth, indices=range(4, len(truth)), name=str(tmp_path / "vib"))
    vibrations.run()
    imaginary = vibrations.get_frequencies().imag
    modes = saddle_modes(climbed.surface, climbed.saddle.atoms)
    assert (imaginary > 10).sum() == len(modes.imaginary) == 1
    assert modes.imaginary[0] == pytest.approx(imaginary.max(), rel=0.2)


@pytest.mark.parametrize("direction", ["random", "softest", "uncertain"])
def test_directions_of_words_follow_their_seed(direction):
    """Bit for bit; another seed leads elsewhere; what is held stays."""
    ends = []
    for seed in (3, 3, 6):
        search = gpmlp.GPSaddle(hop()[0], EMT(), direction, seed=seed, sides=False)
        assert not search.run(fmax=0.05, steps=2)
        ends.append(search.saddle.atoms.positions)
    assert (ends[0] == ends[1]).all() and np.abs(ends[0] - ends[2]).max() > 0.05
    assert np.abs(ends[0][:4] - slab().positions[:4]).max() < 1e-12


def test_search_that_climbs_too_high_is_given_up():
    search = gpmlp.GPSaddle(hop()[0], EMT(), {8: [0.0, 0.0, -1.0]})
    assert not search.run(highest=0.3)
    last = search.labels[-1]
    assert last.barrier - last.error > 0.3 and all(x.barrier - x.error <= 0.3 for x in search.labels[:-1])


def test_motions_leave_out_what_is_held_and_the_whole():
    """Counted: 3 N - 6 of a molecule, 3 N - 5 of a linear one, 3 N - 3 of a crystal, 3 free atoms' with held ones; rigid motions vanish."""
    water, carbon_dioxide = molecule("H2O"), molecule("CO2")
    crystal = bulk("Cu", cubic=True)
    assert [free_motions(a).shape[1] for a in (water, carbon_dioxide, crystal, slab())] == [3, 4, 9, 15]
    turned = np.cross([0.3, -0.2, 0.9], water.positions - water.positions.mean(axis=0)).ravel()
    assert np.abs(free_motions(water).T @ turned).max() < 1e-12
    assert np.abs(free_motions(water).T @ np.tile([1.0, 2.0, 3.0], 3)).max() < 1e-12
    water.set_constraint([FixAtoms([0]), FixedLine(1, [0, 1, 1]), FixedPlane(2, [1, 0, 0])])
    motions = free_motions(water)
    assert motions.shape == (9, 3) and np.abs(motions[:3]).max() < 1e-12 and np.abs(motions[6]).max() < 1e-12
    assert np.abs(motions[3]).max() < 1e-12 and np.abs(motions[4] - motions[5]).max() < 1e-12


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        ("sideways", "there is no 'sideways'"),
        ({99: [1, 0, 0]}, "there is no atom 99"),
        ({0: [1, 0, 0]}, "nothing moves that way"),
        ({8: [0, 0, 0]}, "nothing moves that way"),
        ({8: [np.nan, 0, 0]}, "nothing moves that way"),
        (np.ones((2, 3)), r"must have shape \(9, 3\)"),
    ],
)
def test_directions_that_lead_nowhere_are_refused(direction, said):
    with pytest.raises(UserError, match=said):
        gpmlp.GPSaddle(slab(), EMT(), direction)


def test_saddle_of_a_free_cluster():
    """Cu5, whose rotations are left out: one negative mode by the oracle too, and the barrier is that of the oracle's energies."""
    places = [[0, 0, 0], [2.3, 0, 0], [1.15, 2.0, 0], [1.15, 0.67, 1.8], [1.15, 0.67, -1.8]]
    start = Atoms("Cu5", places, calculator=EMT())
    BFGS(start, logfile=None).run(fmax=0.01)
    search = gpmlp.GPSaddle(start, EMT(), seed=1)
    assert search.run(fmax=0.05)
    saddle = search.saddle
    truth = saddle.atoms.get_potential_energy() - saddle.start.get_potential_energy()
    assert saddle.barrier == pytest.approx(truth, abs=0.002) and truth > 0.05
    modes = saddle_modes(search.surface, saddle.atoms)
    oracle = SimpleNamespace(forces=emt_forces)
    assert len(modes.imaginary) == len(saddle_modes(oracle, saddle.atoms).imaginary) == 1
    assert (np.abs(modes.frequencies) < 1e-3).sum() == 6
    assert len(saddle.sides) == 2 and all(
        side.get_potential_energy() < saddle.atoms.get_potential_energy() for side in saddle.sides
    )


def emt_forces(images: list[Atoms]) -> tuple[None, np.ndarray]:
    """As Surface.forces, of the oracle."""
    out = []
    for image in images:
        image = image.copy()
        image.calc = EMT()
        out.append(image.get_forces())
    return None, np.array(out)


def test_frequencies_are_those_of_ase(tmp_path):
    """Ethanol by EMT: the same as ASE's own, whose translations and rotations alone differ: here they vanish."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = EMT()
    BFGS(atoms, logfile=None).run(fmax=0.001)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"))
    vibrations.run()
    truth = vibrations.get_frequencies()
    truth = np.sort(truth.real - truth.imag)
    mine = saddle_modes(SimpleNamespace(forces=emt_forces), atoms).frequencies
    assert (np.abs(mine) < 1e-3).sum() == 6
    assert np.abs(mine - truth)[np.abs(truth) > 50].max() < 0.5


def written_search(folder: Path) -> Path:
    start, _ = hop()
    ase.io.write(folder / "start.xyz", start)
    recipe = {
        "start": "start.xyz",
        "direction": {8: [1.0, 0.1, 0.0]},
        "oracle": {"calculator": "emt", "executor": "inline"},
    }
    (folder / "saddle.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_saddle_killed_and_resumed_asks_for_the_same_labels(tmp_path, climbed):
    """kill -9 while labels come; then --resume: labels and numbers of a run that was never killed, which are the class's."""
    folders, whole = killed_and_resumed(tmp_path, written_search, "saddle", "saddle.yaml", "saddle", 3)
    numbers = [json.loads((folder / "saddle.json").read_text()) for folder in folders]
    assert numbers[0] == numbers[1]
    assert numbers[0]["converged"] is True and numbers[0]["joins_start"] is True
    assert numbers[0]["barrier_eV"] == pytest.approx(climbed.saddle.barrier, abs=2e-3)
    assert numbers[0]["oracle_calls"] == len(climbed.labels)
    assert numbers[0]["oracle_calls_relaxations"] == len(climbed.surface.labels) - len(climbed.labels)
    assert len(numbers[0]["imaginary_frequencies_per_cm"]) == 1 and 0 < numbers[0]["barrier_sigma_eV"] < 0.01
    frames = ase.io.read(folders[0] / "saddle.xyz", ":")
    assert [frame.info["what"] for frame in frames] == ["start", "saddle", "side 1", "side 2"]
    assert "barrier" in whole.stdout and "following the mode" in whole.stderr


def test_saddle_that_is_not_reached_says_so_and_goes_on(tmp_path):
    folder = written_search(tmp_path)
    few = gpmlp_command(folder, "saddle", "saddle.yaml", "--set", "labels_at_most=2")
    assert few.returncode == 2 and "not converged after 2 labels" in few.stderr
    assert json.loads((folder / "saddle/saddle.json").read_text())["converged"] is False
    other = gpmlp_command(folder, "saddle", "saddle.yaml", "--resume", "--set", "seed=5")
    assert other.returncode == 2 and "seed" in other.stderr


def test_search_that_went_too_high_names_the_limit_and_goes_on_with_a_higher_one(tmp_path):
    """No barrier of what is no saddle; the same folder goes on once the limit is raised, with the labels that are there."""
    folder = written_search(tmp_path)
    low = gpmlp_command(folder, "saddle", "saddle.yaml", "--set", "highest_eV=0.1", "--set", "sides=false")
    assert low.returncode == 2 and "highest_eV, 0.1 eV" in low.stderr
    assert "barrier" not in low.stdout and "no saddle" in low.stdout
    assert "higher than highest_eV" in (folder / "saddle/saddle.html").read_text()
    numbers = json.loads((folder / "saddle/saddle.json").read_text())
    assert numbers["highest_eV_met"] is True and numbers["barrier_eV"] is None and numbers["barrier_sigma_eV"] is None
    assert numbers["energy_above_start_eV"] > 0.05
    before = (folder / "saddle/labels.xyz").read_bytes()
    more = gpmlp_command(folder, "saddle", "saddle.yaml", "--resume", "--set", "sides=false")
    assert more.returncode == 0, more.stderr
    assert (folder / "saddle/labels.xyz").read_bytes().startswith(before) and "barrier" in more.stdout


def test_labels_of_other_runs_are_no_calls(tmp_path, climbed):
    """The same search with the labels of the first asks for none of them; a start that is not relaxed is one call."""
    folder = written_search(tmp_path)
    recipe = yaml.safe_load((folder / "saddle.yaml").read_text()) | {"sides": False, "relax_start": False}
    about = [
        SaddleRecipe.model_validate(recipe | more) for more in ({}, {"labels": ["saddle/labels.xyz"], "output": "b"})
    ]
    first, second = ([*find_saddle(one, folder)][-1].numbers for one in about)
    assert first["oracle_calls"] == len(first["labels"]) and first["oracle_calls_relaxations"] == 1
    assert second["oracle_calls_relaxations"] == 0 and 0 <= second["oracle_calls"] <= len(second["labels"])
    made = len(ase.io.read(folder / "saddle/labels.xyz", ":"))
    assert made == first["oracle_calls"] + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"direction": "sideways"}, "direction"),
        ({"direction": {99: [1, 0, 0]}}, "there is no atom 99"),
        ({"direction": {0: [1, 0, 0]}}, "nothing moves that way"),
        ({"seed": -1}, "seed"),
        ({"fixed": [4, 5, 6, 7, 8]}, "all 9 atoms are fixed"),
        ({"end": "end.xyz"}, "end"),
    ],
)
def test_bad_recipes_of_searches_are_refused_before_anything_is_written(tmp_path, change, said):
    folder = written_search(tmp_path)
    recipe = yaml.safe_load((folder / "saddle.yaml").read_text())
    (folder / "saddle.yaml").write_text(yaml.safe_dump({**recipe, **change}))
    refused = gpmlp_command(folder, "saddle", "saddle.yaml")
    assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (folder / "saddle").exists()


def test_page_says_what_the_numbers_say(tmp_path, climbed):
    """Barrier, frequency, labels and reasons are on it; a drawing of the start, the saddle and the other side."""
    modes = saddle_modes(climbed.surface, climbed.saddle.atoms)
    numbers = saddle_numbers(climbed, modes)
    page = saddle_page(SaddleOutcome(True, numbers, climbed.saddle, modes), climbed.labels, {"seed": 0})
    text = page.write(tmp_path).read_text()
    assert f"{numbers['barrier_eV']:.3f} eV" in text and "Yes: one imaginary frequency" in text
    assert text.count('<span class="rank">') == len(climbed.labels) and all(x.reason in text for x in climbed.labels)
    assert text.count('<svg class="hood"') == 3 and "The start lies on one side" in text


class Wave(Calculator):
    """A wave along x for atom 1 of a dimer."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012 - as ASE declares it

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        x = self.atoms.positions[1, 0] - 3.0
        forces = np.zeros((2, 3))
        forces[1, 0] = -0.3 * np.pi * np.sin(np.pi * x)
        forces[0] = -forces[1]
        self.results = {"energy": 0.3 * (1 - np.cos(np.pi * x)), "forces": forces}


def test_one_degree_of_freedom():
    """A single curvature: there is no second one that could be negative."""
    start = Atoms("H2", [[0, 0, 0], [3.0, 0, 0]], constraint=[FixAtoms([0]), FixedLine(1, [1, 0, 0])])
    search = gpmlp.GPSaddle(start, Wave(), direction={1: [-1, 0, 0]}, sides=False)
    assert search.run(fmax=0.05)
    assert search.saddle.barrier == pytest.approx(0.6, abs=0.02)
    assert search.saddle.atoms.positions[1, 0] == pytest.approx(2.0, abs=0.05)


def test_one_atom_leads_nowhere():
    with pytest.raises(UserError, match="it has one atom"):
        gpmlp.GPSaddle(Atoms("H"), Wave())
