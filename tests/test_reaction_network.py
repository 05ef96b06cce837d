"""Explorations of reactions: motions of bonds, structures that are one, networks against the oracle, killed and resumed, and refused."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixedLine
from ase.optimize import BFGS
from reaction_systems import gpmlp_command, killed_and_resumed, slab

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.recipe_files import load_recipe_as
from gpmlp.learning.paths.motions import Motion, bond_changes, fragments, proposed_motions
from gpmlp.learning.paths.network import NetworkLabel, Search
from gpmlp.learning.paths.recipe import NetworkRecipe
from gpmlp.learning.paths.run import find_network
from gpmlp.learning.paths.same import difference, find_same

WAVE = '''
import numpy as np
from ase.calculators.calculator import Calculator


class Wave(Calculator):
    """Of two atoms: minima near 2 and 3.2 A, the saddle near 2.6 A, a wall below 1.6 A; no answer beyond `last`."""

    implemented_properties = ["energy", "forces"]
    last = 9.0

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        vector = self.atoms.positions[1] - self.atoms.positions[0]
        d = np.linalg.norm(vector)
        if d > self.last:
            raise RuntimeError("too far apart")
        phase = 2 * np.pi * (d - 2) / 1.2
        wall, slope = np.exp(8 * (1.2 - d)), 0.3 * 2 * np.pi / 1.2 * np.sin(phase)
        force = 8 * wall - slope + 0.05
        self.results = {
            "energy": 0.3 * (1 - np.cos(phase)) + wall - 0.05 * (d - 2),
            "forces": np.array([-force * vector / d, force * vector / d]),
        }


class Short(Wave):
    last = 2.75
'''


def dimer() -> Atoms:
    return Atoms("H2", [[0, 0, 0], [2.0, 0, 0]], constraint=[FixAtoms([0]), FixedLine(1, [1, 0, 0])])


@pytest.fixture(scope="module")
def wave() -> dict:
    found: dict = {}
    exec(WAVE, found)
    return found


@pytest.fixture(scope="module")
def cluster() -> gpmlp.GPReactionNetwork:
    """Four copper atoms from the rhombus, at rest on the way between two tetrahedra, and what it leads to."""
    start = Atoms("Cu4", [[0, 0, 0], [2.3, 0, 0], [1.15, 2.0, 0], [3.45, 2.0, 0]])
    network = gpmlp.GPReactionNetwork(start, EMT(), ["soft"])
    network.run(calls=26)
    return network


# ---------------------------------------------------------------- motions and structures that are one


def test_motions_of_ethanol():
    """Turns about C-C and C-O, not about bonds to hydrogen; a hydrogen goes to what it is not bonded to, the nearest first."""
    ethanol = molecule("CH3CH2OH")
    assert fragments(ethanol) == "C2H6O"
    turns = proposed_motions(ethanol, ["rotate"], range(9))
    assert len(turns) == 4 and {m.kind for m in turns} == {"rotate"}
    assert all("H" not in (ethanol.symbols[m.i], ethanol.symbols[m.j]) for m in turns)
    transfers = proposed_motions(ethanol, ["transfer"], range(9))
    assert transfers and all(ethanol.symbols[m.i] == "H" != ethanol.symbols[m.j] for m in transfers)
    assert len(proposed_motions(ethanol, ["stretch"], range(9))) == 8
    held = proposed_motions(ethanol, ["rotate", "transfer", "stretch"], [])
    assert held == []


def test_a_turn_changes_the_dihedral_and_no_bond():
    """To first order: finite differences along the motion; the other way round the other way."""
    ethanol = molecule("CH3CH2OH")
    oxygen = ethanol.symbols.search("O")[0]
    near = ethanol.get_distances(oxygen, range(9))
    carbon = min(ethanol.symbols.search("C"), key=lambda i: near[i])
    hydrogen = min(ethanol.symbols.search("H"), key=lambda i: near[i])
    methyl = next(i for i in ethanol.symbols.search("C") if i != carbon)
    for reverse in (False, True):
        motion = Motion.of(ethanol, "rotate", carbon, oxygen, reverse)
        moved = ethanol.copy()
        moved.positions += 1e-4 * motion.vectors(ethanol)
        turned = moved.get_dihedral(methyl, carbon, oxygen, hydrogen) - ethanol.get_dihedral(
            methyl, carbon, oxygen, hydrogen
        )
        turned = (turned + 180) % 360 - 180
        assert abs(turned) == pytest.approx(np.degrees(1e-4), rel=1e-3) and (turned > 0) != reverse
        assert np.abs(moved.get_all_distances() - ethanol.get_all_distances())[oxygen, hydrogen] < 1e-7


def test_bonds_that_change():
    water = molecule("H2O")
    apart = water.copy()
    apart.positions[1] += [0, 4.0, 0]
    assert bond_changes(water, water) == "" and bond_changes(water, apart) == "O0–H1 → none"
    assert fragments(apart) == "H + HO"


@pytest.mark.parametrize(
    ("kind", "pair", "said"),
    [
        ("rotate", (0, 0), "two different atoms"),
        ("rotate", (0, 99), "from 0 to 8"),
        ("transfer", (0, 1), "are bonded already"),
        ("stretch", (2, 8), "are not bonded"),
        ("rotate", (0, 5), "nothing hangs on one of them"),
    ],
)
def test_motions_that_are_none_are_refused(kind, pair, said):
    ethanol = molecule("CH3CH2OH")
    if said.startswith("nothing"):
        pair = next(
            (i, j)
            for i in ethanol.symbols.search("C")
            for j in ethanol.symbols.search("H")
            if ethanol.get_distance(i, j) < 1.2
        )
    with pytest.raises(UserError, match=said):
        Motion.of(ethanol, kind, *map(int, pair))


def test_nothing_turns_in_a_ring_or_crystal():
    benzene = molecule("C6H6")
    carbons = sorted(range(6), key=lambda i: benzene.get_distance(0, i))
    with pytest.raises(UserError, match="ring"):
        Motion.of(benzene, "rotate", 0, carbons[1])
    assert proposed_motions(bulk("Cu", cubic=True), ["rotate", "transfer"], range(4)) == []


def test_structures_are_one_whatever_order_place_and_orientation():
    ethanol, rng = molecule("CH3CH2OH"), np.random.default_rng(1)
    other = ethanol[rng.permutation(9)]
    other.rotate(50, [1, 2, 3])
    other.positions *= [-1, 1, 1]
    other.positions += 3.0
    assert difference(ethanol, other) < 1e-9
    moved = ethanol.copy()
    moved.positions[3] += [0.0, 0.0, 0.4]
    assert 0.1 < difference(ethanol, moved) <= 0.4 + 1e-9
    assert difference(ethanol, molecule("CH3OCH3")) > 0.5
    assert difference(ethanol, molecule("H2O")) == np.inf == difference(slab(), slab("bridge")[:-1])
    hopped = slab()
    hopped.positions[-1, 0] += hopped.cell[0, 0] / 2
    assert difference(slab(), hopped) < 1e-9 < 0.1 < difference(slab(), slab("bridge"))


def test_the_energy_tells_structures_apart(wave):
    atoms = [dimer(), dimer()]
    for a in atoms:
        a.calc = wave["Wave"]()
        a.get_forces()
    energy = atoms[0].get_potential_energy()
    assert find_same(atoms[0], atoms, energy) == 0 and find_same(atoms[0], atoms, energy + 0.1) is None
    assert find_same(atoms[0], []) is None


# ---------------------------------------------------------------- networks


def test_network_against_the_oracle(cluster):
    """BFGS on the oracle from beside them gets hardly below the minima; forces vanish at the saddles; barriers are its differences."""
    assert cluster.minima and cluster.reactions and cluster.calls <= 26
    for minimum in cluster.minima:
        below = minimum.atoms.copy()
        below.calc = EMT()
        assert minimum.atoms.get_potential_energy() == pytest.approx(below.get_potential_energy(), abs=1e-9)
        below.rattle(0.05, seed=1)
        BFGS(below, logfile=None).run(fmax=0.002)
        lower = minimum.atoms.get_potential_energy() - below.get_potential_energy()
        assert -1e-6 < lower < 0.005 and find_same(below, [minimum.atoms]) == 0
    for reaction in cluster.reactions:
        there = reaction.saddle.copy()
        there.calc = EMT()
        assert np.linalg.norm(there.get_forces(), axis=1).max() < 0.031 and len(reaction.imaginary) == 1
        first, second = (cluster.minima[n - 1] for n in (reaction.first, reaction.second))
        assert reaction.forward == pytest.approx(
            there.get_potential_energy() - first.atoms.get_potential_energy(), abs=1e-9
        )
        assert reaction.forward - reaction.backward == pytest.approx(second.energy - first.energy, abs=1e-9)
        low, high = reaction.interval
        assert 0 < reaction.sigma < 0.02 and high - low == pytest.approx(2 * 1.645 * reaction.sigma)
        assert find_same(reaction.end, [second.atoms]) == 0 == find_same(reaction.start, [first.atoms])


def test_calls_are_never_more_than_may_be():
    network = gpmlp.GPReactionNetwork(dimer(), EMT(), ["soft"])
    assert network.run(calls=1).startswith("1 oracle calls were spent") and network.calls == 1


def test_search_in_which_the_oracle_fails_is_given_up_and_the_exploration_goes_on(wave):
    network = gpmlp.GPReactionNetwork(dimer(), wave["Short"](), ["soft"])
    events = list(network.irun(calls=60, highest=1.0))
    searches = [event for event in events if isinstance(event, Search)]
    assert any("too far apart" in search.outcome for search in searches) and len(searches) >= 2
    assert "every way" in network.ended and all(isinstance(e, (Search, NetworkLabel)) for e in events)


def test_what_goes_down_along_a_mode_is_no_minimum(wave):
    """At rest on the top of its wave, the start is pushed off it and relaxes to a minimum of the oracle."""
    top = dimer()
    top.positions[1, 0] = 2.592  # forces below fmax
    top.calc = wave["Wave"]()
    assert np.abs(top.get_forces()).max() < 0.03
    network = gpmlp.GPReactionNetwork(top, wave["Wave"](), ["soft"])
    network.surface = network.surface.with_oracle(moved(top, 2.5)).with_oracle(moved(top, 2.7))
    network.run(calls=1)
    assert network.minima[0].doubt.startswith("not a minimum: curvature -") and network.calls == 1
    network = gpmlp.GPReactionNetwork(top, wave["Wave"](), ["soft"], surface=network.surface)
    network.run(calls=12, highest=1.0)
    first = network.minima[0]
    assert not first.doubt and first.softest > 1 and min(abs(first.atoms.positions[1, 0] - np.array([2, 3.2]))) < 0.05
    assert np.linalg.norm(first.atoms.get_forces(), axis=1).max() < 0.03


def moved(atoms: Atoms, x: float) -> Atoms:
    there = atoms.copy()
    there.positions[1, 0], there.calc = x, atoms.calc
    return there


def test_barriers_that_are_not_above_zero_are_doubted(cluster):
    reaction = cluster.reactions[0]
    assert not reaction.doubt and not any(m.doubt for m in cluster.minima)
    low = replace(reaction, backward=reaction.sigma_backward)
    assert low.doubt == "no barrier above zero within its 90 % interval"
    assert replace(low, doubtful_ends=(2,)).doubt.startswith("2 is not a minimum; no barrier")


def written_run(folder: Path) -> Path:
    ase.io.write(folder / "start.xyz", dimer())
    (folder / "wave.py").write_text(WAVE)
    recipe = {
        "start": "start.xyz",
        "oracle": {"calculator": "wave:Wave", "executor": "inline", "check_every": 0, "check_forces": False},
        "reactions": {"ways": ["soft"], "highest_eV": 1.0, "minima_at_most": 3},
        "labels_at_most": 60,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_exploration_killed_and_resumed_asks_for_the_same_labels(tmp_path):
    """kill -9 while labels come; then --resume: labels, numbers and structures of a run that was never killed."""
    folders, whole = killed_and_resumed(tmp_path, written_run, "learn", "run.yaml", "network", 5)
    for name in ("network.json", "minima.xyz", "saddles.xyz", "log.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    numbers = json.loads((folders[0] / "network.json").read_text())
    reaction = numbers["reactions"][0]
    assert (reaction["from"], reaction["to"]) == (1, 2)
    assert reaction["barrier_eV"] == pytest.approx(0.57, abs=0.02)
    assert reaction["reverse_barrier_eV"] == pytest.approx(0.63, abs=0.02)
    assert reaction["barrier_90_eV"][0] < reaction["barrier_eV"] < reaction["barrier_90_eV"][1]
    keys = {frame.info["key"] for frame in ase.io.iread(folders[0] / "labels.xyz", index=":")}
    assert set(reaction["labels"]) <= keys and {m["label"] for m in numbers["minima"]} <= keys
    assert numbers["oracle_calls"] == len(keys)
    assert "1 → 2" in whole.stdout and "search 1: from minimum 1" in whole.stderr
    page = (folders[0] / "network.html").read_text()
    assert (
        "1 → 2" in page
        and f"{reaction['barrier_eV']:.3f}" in page
        and "://" not in page.replace("http://www.w3.org", "")
    )


def test_exploration_that_spent_its_calls_goes_on_with_more(tmp_path):
    folder = written_run(tmp_path)
    few = gpmlp_command(folder, "learn", "run.yaml", "--set", "labels_at_most=4")
    assert few.returncode == 0 and "4 oracle calls were spent" in few.stdout
    before = (folder / "network/labels.xyz").read_bytes()
    searches = json.loads((folder / "network/network.json").read_text())["searches"]
    assert searches[-1]["outcome"].startswith("cut off") and searches[-1]["calls"] > 0
    assert '"label"' not in (folder / "network/log.jsonl").read_text().replace('"event": "label"', "")
    more = gpmlp_command(folder, "learn", "run.yaml", "--resume")
    assert more.returncode == 0, more.stderr
    assert (folder / "network/labels.xyz").read_bytes().startswith(before) and "1 → 2" in more.stdout


def test_calls_that_do_not_bring_the_start_to_rest_end_the_run_in_a_sentence(tmp_path):
    folder = written_run(tmp_path)
    away = dimer()
    away.positions[1, 0] = 2.25
    ase.io.write(folder / "start.xyz", away)
    few = gpmlp_command(folder, "learn", "run.yaml", "--set", "labels_at_most=1")
    assert few.returncode == 2 and "Traceback" not in few.stderr, few.stderr
    said = " ".join(few.stderr.split())
    assert "1 oracle calls were spent before the start was at rest; go on with --resume" in said
    more = gpmlp_command(folder, "learn", "run.yaml", "--resume")
    assert more.returncode == 0 and "1 → 2" in more.stdout, more.stderr


def test_report_resume_and_defaults_of_an_exploration(tmp_path):
    """Nothing after `reactions:`, no page with --no-report, a resume where there is nothing, and then the page of the folder."""
    folder = written_run(tmp_path)
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**recipe, "reactions": None, "labels_at_most": 4}))
    first = gpmlp_command(folder, "learn", "run.yaml", "--resume", "--no-report")
    assert first.returncode == 0 and "there is nothing to resume" in " ".join(first.stderr.split()), first.stderr
    assert not (folder / "network/network.html").exists()
    assert json.loads((folder / "network/recipe.json").read_text())["reactions"]["highest_eV"] == 3
    none = gpmlp_command(folder, "report", "network")
    assert none.returncode == 2 and "has no page yet" in " ".join(none.stderr.split())
    assert gpmlp_command(folder, "learn", "run.yaml", "--resume").returncode == 0
    there = gpmlp_command(folder, "report", "network")
    assert there.returncode == 0 and "network.html" in there.stdout + there.stderr


def test_results_stay_while_labels_are_replayed(tmp_path, monkeypatch, wave):
    """A resume that is interrupted in labels that were there leaves network.json as it was."""
    folder = written_run(tmp_path)
    assert gpmlp_command(folder, "learn", "run.yaml").returncode == 0
    before = (folder / "network/network.json").read_bytes()
    module = types.ModuleType("wave")
    module.__dict__.update(wave)
    monkeypatch.setitem(sys.modules, "wave", module)
    recipe = load_recipe_as(NetworkRecipe, folder / "run.yaml")
    states = find_network(recipe, folder, resume=True)
    next(state for state in states if isinstance(state, Search))
    states.close()
    assert (folder / "network/network.json").read_bytes() == before


def test_a_known_minimum_has_the_energy_that_the_model_foresees(wave):
    search = gpmlp.GPSaddle(dimer(), wave["Wave"](), {1: [1, 0, 0]}, sides=False)
    search.run(steps=4)
    here, there = search.start.copy(), search.start.copy()
    for atoms, above in ((here, 0.0), (there, 1.0)):
        atoms.calc = SinglePointCalculator(atoms, energy=search.start.get_potential_energy() + above)
    search.minima = (there,)
    assert search._known_minimum(here) is None
    search.minima = (there, here)
    found = search._known_minimum(search.start)
    assert found is not None and found.get_potential_energy() == pytest.approx(here.get_potential_energy())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dynamics": {"temperature_K": 300}}, "dynamics"),
        ({"reactions": {"way": ["soft"]}}, "ways"),
        ({"reactions": {"ways": ["sideways"]}}, "ways"),
        ({"reactions": {"ways": []}}, "ways"),
        ({"reaction": {}}, "Perhaps 'reaction' was meant to be 'reactions'"),
        ({"explore": {}}, "neither `dynamics`"),
        ({"reactions": {"highest_eV": -1}}, "highest_eV"),
        ({"start": "two.xyz"}, "holds 2 structures"),
        ({"start": "one.xyz"}, "it has one atom"),
        ({"fixed": [0, 1]}, "all 2 atoms are fixed"),
        ({"labels": ["nowhere.xyz"]}, "there is no such file"),
        ({"labels_at_most": 0}, "labels_at_most"),
        ({"seeds": 3}, "seed"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(tmp_path, change, said):
    folder = written_run(tmp_path)
    ase.io.write(folder / "two.xyz", [dimer(), dimer()])
    ase.io.write(folder / "one.xyz", Atoms("H"))
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    if {"reaction", "explore"} & set(change):
        del recipe["reactions"]
    (folder / "run.yaml").write_text(yaml.safe_dump({**recipe, **change}))
    refused = gpmlp_command(folder, "learn", "run.yaml")
    assert refused.returncode == 2 and said in " ".join(refused.stderr.split()) and "Traceback" not in refused.stderr, (
        refused.stderr
    )
    assert not (folder / "network").exists()
