"""Surrogates cut out of large frames: environments are kept to the last neighbour, cells close, and only what is trusted is learned."""

from __future__ import annotations

import functools

import ase.build
import counting_oracle
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.lj import LennardJones
from counting_oracle import answers
from learning_runs import contents, events, finish, merged, prepare, recipe
from scipy.spatial.transform import Rotation
from test_kill import Killer

from gpmlp import descriptors
from gpmlp.core import neighbors
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.fitting import defaults
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.learning import surrogate
from gpmlp.learning.initial_structures import make_structures as first_structures
from gpmlp.learning.labels import LabelFile
from gpmlp.learning.surrogate import cut_surrogate
from gpmlp.recipe import Recipe
from gpmlp.report.run.page import report_run

REACH = 4.0


def rattled(atoms: Atoms, size: float, seed: int = 0) -> Atoms:
    atoms.positions += size * np.random.default_rng(seed).standard_normal((len(atoms), 3))
    return atoms


def aluminium(repeat: int = 5, size: float = 0.1) -> Atoms:
    return rattled(ase.build.bulk("Al", cubic=True).repeat(repeat), size)


@functools.cache
def liquid(n: int = 400, length: float = 19.5) -> Atoms:
    """Atoms at random places, pushed apart until few are nearer than 2.2 A."""
    rng = np.random.default_rng(3)
    places = rng.random((n, 3)) * length
    for _ in range(60):
        d = places[:, None] - places[None]
        d -= length * np.round(d / length)
        r = np.linalg.norm(d, axis=2) + 1e9 * np.eye(n)
        push = np.where(r < 2.2, 2.2 - r, 0.0) / r
        places = (places + 0.3 * (push[:, :, None] * d).sum(1)) % length
    return Atoms(f"Al{n}", places, cell=[length] * 3, pbc=True)


def water(n: int = 6) -> Atoms:
    """Molecules on a lattice of 3.3 A, turned and moved at random."""
    rng = np.random.default_rng(1)
    one, many = ase.build.molecule("H2O").positions, []
    for cell in np.ndindex(n, n, n):
        turned = (one - one[0]) @ Rotation.random(random_state=rng).as_matrix().T
        many.append(turned + 3.3 * np.array(cell) + 0.1 * rng.standard_normal(3))
    return Atoms("OH2" * n**3, np.concatenate(many), cell=[3.3 * n] * 3, pbc=True)


def frame(atoms: Atoms):
    return structures_from_ase([atoms])


def environment(structure, atom: int, reach: float = REACH) -> np.ndarray:
    """Vectors to all neighbours with their elements, in order: by brute force over images."""
    p, z, cell, pbc = (
        t.numpy() for t in (structure.positions, structure.species, structure.cells[0], structure.periodic[0])
    )
    spans = [range(-3, 4) if periodic else (0,) for periodic in pbc]
    found = []
    for shift in np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3):
        d = p + shift @ cell - p[atom]
        r = np.linalg.norm(d, axis=1)
        near = (r < reach) & (r > 1e-9)
        found.append(np.column_stack([z[near], d[near]]))
    rows = np.concatenate(found)
    return rows[np.lexsort(rows.round(6).T)]


FRAMES = {
    "crystal": (aluminium, 7, True),
    "primitive cell": (lambda: rattled(ase.build.bulk("Al").repeat(9), 0.1), 300, True),
    "ionic crystal": (lambda: rattled(ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True).repeat(4), 0.05), 8, True),
    "slab": (lambda: rattled(ase.build.fcc111("Cu", (10, 10, 4), vacuum=6.0), 0.08), 399, True),
    "liquid": (liquid, 40, False),
    "water": (water, 9, False),
    "particle": (lambda: rattled(Atoms(aluminium(4).symbols, aluminium(4).positions), 0.05), 100, False),
}


@pytest.mark.parametrize("name", FRAMES)
def test_environments_are_kept(name):
    """Around the atom, and around all that are said to be intact, neighbours are those of the frame and no others."""
    make, atom, small = FRAMES[name]
    whole = frame(make())
    cut = cut_surrogate(whole, atom, REACH)
    assert cut.structure.n_atoms < 0.5 * whole.n_atoms and cut.of == whole.n_atoms
    assert int(cut.origin[cut.centre]) == atom and bool(cut.intact[cut.centre])
    assert torch.equal(cut.structure.species, whole.species[cut.origin])
    for i in range(cut.structure.n_atoms):
        now, was = environment(cut.structure, i), environment(whole, int(cut.origin[i]))
        same = now.shape == was.shape and np.allclose(now, was, atol=1e-6)
        assert same == bool(cut.intact[i])
    assert cut.small_cell == small
    assert torch.equal(cut.structure.periodic, whole.periodic)


@pytest.mark.parametrize("name", FRAMES)
def test_no_atoms_are_closer_than_in_the_frame(name):
    whole = frame(FRAMES[name][0]())
    cut = cut_surrogate(whole, FRAMES[name][1], REACH)

    def nearest(structure) -> float:
        return float(neighbors.find_neighbors(structure, 3.0).vectors(structure).norm(dim=1).min())

    bonded = name == "water"
    assert nearest(cut.structure) >= (1.0 if bonded else surrogate.CLOSER) * nearest(whole) - 1e-6


def test_a_crystal_is_cut_by_its_lattice():
    for atom in (0, 77, 250):
        cut = cut_surrogate(frame(aluminium()), atom, REACH)
        periods = cut.structure.cells[0].diagonal() / 4.05
        np.testing.assert_allclose(cut.structure.cells[0].numpy(), 4.05 * np.diag(periods.round()), atol=1e-9)
        assert cut.structure.n_atoms == 4 * int(periods.round().prod()) <= 108 and cut.small_cell
    ionic = cut_surrogate(frame(FRAMES["ionic crystal"][0]()), 8, REACH)
    assert to_ase(ionic.structure)[0].get_chemical_formula() == "Cl32Na32"  # two cells of eight each way


def test_a_larger_core_keeps_more():
    whole = frame(aluminium(6))
    cut = cut_surrogate(whole, 7, REACH, core=3.2)
    inside = np.linalg.norm(environment(whole, 7, 3.2)[:, 1:], axis=1)
    assert int(cut.intact.sum()) >= 1 + len(inside) == 13


def test_molecules_stay_whole():
    cut = cut_surrogate(frame(water()), 9, REACH)
    formula = to_ase(cut.structure)[0].symbols.formula.count()
    assert formula["H"] == 2 * formula["O"]
    d = to_ase(cut.structure)[0].get_all_distances(mic=True)
    assert ((d < 1.2).sum(1) - 1).tolist() == [2 if z == 8 else 1 for z in cut.structure.species.tolist()]


def test_a_vacancy_stays_where_it_is_wanted_and_is_no_small_cell_elsewhere():
    """What has a hole in its middle is cut by the lattice all the same; a cut that makes holes of its own is not believed."""
    atoms = aluminium(6, 0.03)
    near = int(np.argsort(np.linalg.norm(atoms.positions - atoms.positions[400], axis=1))[1])
    del atoms[400]
    near -= near > 400
    cut = cut_surrogate(frame(atoms), near, REACH)
    assert len(environment(cut.structure, cut.centre)) == len(environment(frame(atoms), near))
    assert cut.structure.n_atoms in (31, 107)


def test_what_is_no_smaller_is_not_cut():
    assert cut_surrogate(frame(aluminium(2)), 0, REACH) is None
    assert cut_surrogate(frame(Atoms("Al3", [[0, 0, 0], [2.8, 0, 0], [0, 2.8, 0]])), 1, REACH) is None


def test_features_of_the_atom_do_not_change():
    """By the descriptor itself, and the test that says so can fail."""
    whole = frame(aluminium())
    cut = cut_surrogate(whole, 7, REACH)
    found = defaults.summarise_data(whole, Targets.unlabelled(whole))
    chosen = defaults.resolve_recipe(Recipe(descriptor={"n_max": 4, "l_max": 3, "cutoff": REACH}), found, 1)
    made = descriptors.make_descriptor((13,), chosen.descriptors[0].model_dump())
    before = StructureEnvironments.from_structures(made, whole).environments.features[7]
    after_ = StructureEnvironments.from_structures(made, cut.structure).environments.features
    assert float((after_[cut.centre] - before).norm()) < surrogate.SAME
    far = int((~cut.intact).nonzero()[-1, 0])
    assert (
        float(
            (
                after_[far]
                - StructureEnvironments.from_structures(made, whole).environments.features[int(cut.origin[far])]
            ).norm()
        )
        > surrogate.SAME
    )


def test_forces_of_a_short_ranged_oracle_are_those_of_the_frame():
    """A potential that reaches no farther than half the ball: forces on atoms whose environments are intact cannot differ."""
    atoms = aluminium(6)
    cut = cut_surrogate(frame(atoms), 7, 6.0)
    pair = {"sigma": 2.5, "epsilon": 0.1, "rc": 4.5, "smooth": True}
    small = to_ase(cut.structure)[0]
    atoms.calc, small.calc = LennardJones(**pair), LennardJones(**pair)
    difference = np.abs(small.get_forces() - atoms.get_forces()[cut.origin.numpy()]).max(1)
    intact = cut.intact.numpy()
    assert difference[intact].max() < 1e-8 < difference[~intact].max()


def test_what_is_learned():
    whole = frame(liquid())
    cut = cut_surrogate(whole, 40, REACH)
    n = cut.structure.n_atoms
    told = Targets.unlabelled(cut.structure)
    told = type(told)(
        torch.ones(1, dtype=torch.float64), torch.ones(n, 3, dtype=torch.float64), torch.ones(1, 3, 3, dtype=torch.float64),
        told.energies_noise, told.forces_noise, told.stresses_noise, ("",),
    )  # fmt: skip
    believed = cut.trusted_targets(told)
    assert bool(believed.energies.isnan()) and bool(believed.stresses.isnan().all())
    assert torch.equal(believed.forces.isfinite().all(1), cut.intact) and 0 < int(cut.intact.sum()) < n
    notes = {"surrogate": "carved", "carved_from": 400, "carved_around": 40, "intact": int(cut.intact.sum())}
    assert cut.notes() == notes
    crystal = cut_surrogate(frame(aluminium()), 7, REACH)
    told = Targets.unlabelled(crystal.structure)
    assert crystal.trusted_targets(told) is told and crystal.notes()["surrogate"] == "small cell"


# ---------------------------------------------------------------- in the loop

CARVED = {
    "carve": {"above": 100},
    "dynamics": {"steps": 10, "ramp_steps": 8},
    "trigger": {"force": 0.015, "novelty": 3.0, "halt": 100.0},
}
CARVED |= {"stop": {"coverage": False}, "bootstrap": {"n": 2}}


@pytest.fixture(autouse=True)
def log(tmp_path, monkeypatch):
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))


def folder_of(path):
    """With a start that is hot enough to leave what the first labels told."""
    return prepare(path, aluminium(4, 0.12))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = folder_of(tmp_path_factory.mktemp("carved"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(counting_oracle.LOG, str(folder / "answers"))
        return folder, finish(recipe(**CARVED), folder)


def test_a_run_never_labels_a_large_frame(finished):
    folder, last = finished
    entries = list(LabelFile(folder / "out" / "labels.xyz"))
    assert max(e.structure.n_atoms for e in entries) < 256
    asked = [e for e in entries if e.notes["walker"] == 0]
    assert asked and all(
        e.notes["surrogate"] in ("small cell", "carved") and e.notes["carved_from"] == 256 for e in asked
    )
    assert last.surrogates == len(asked)
    told = events(folder, "carved")
    assert [e["carved_around"] for e in told] == [e.notes["carved_around"] for e in asked]
    assert all(e["kept"] and e["differs"] < 1e-6 for e in told)
    for e in asked:
        whole = e.notes["surrogate"] == "small cell"
        known = e.targets.forces.isfinite().all(1)
        assert int(known.sum()) == (e.structure.n_atoms if whole else e.notes["intact"])
        assert bool(e.targets.energies.isfinite()) == bool(e.targets.stresses.isfinite().all()) == whole
    assert "surrogate" in (folder / "out" / "run.log").read_text()


def test_the_page_says_what_was_cut_out(finished):
    folder, last = finished
    page = report_run(folder / "out", recipe(**CARVED)).read_text()
    assert f"{last.surrogates} of these labels are of surrogates" in page
    assert "of 256, " in page


def test_without_it_frames_are_labelled_whole(tmp_path):
    finish(recipe(**merged(CARVED, {"carve": {"above": 256}})), folder_of(tmp_path))
    assert {e.structure.n_atoms for e in LabelFile(tmp_path / "out" / "labels.xyz")} == {256}


def test_first_structures_are_small(tmp_path):
    start = aluminium(4, 0.0)
    made = first_structures([start], recipe(**merged(CARVED, {"bootstrap": {"n": 4}})))
    assert {len(a) for a in made} <= {32, 108}
    assert len({a.positions.tobytes() for a in made}) == 4


def test_killed_runs_end_as_others(finished, tmp_path):
    """Killed while asking, labelling, learning and writing, and resumed: the same surrogates, nothing asked twice."""
    folder, _ = finished
    killer = Killer()
    try:
        folder_of(tmp_path)
        for point, when, number in (("asking", "after", 3), ("oracle", "before", 3), ("learning", "before", 1)):
            ended = killer.run(tmp_path, CARVED, point=point, when=when, number=number)
            assert ended["code"] in (0, -9), ended["text"]
        assert killer.run(tmp_path, CARVED)["code"] == 0
        reference = folder_of(tmp_path / "reference")
        assert killer.run(reference, CARVED)["code"] == 0
    finally:
        killer.close()
    assert contents(tmp_path) == contents(reference)
    found = answers(tmp_path / "answers")
    assert len(found) == len(set(found))


def test_the_recipe_cannot_change_on_the_way(finished):
    folder, _ = finished
    with pytest.raises(UserError, match=r"carve.above = 100, the recipe says 90"):
        finish(recipe(**merged(CARVED, {"carve": {"above": 90}})), folder, resume=True)
