"""A table of what oracles get wrong, and what becomes of it: the label is refused with a reason, or it is right, or the run ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ase.build
import ase.io
import fake_oracles
import numpy as np
import pytest
import torch
from learning_runs import crystal, finish, prepare, recipe
from test_labeller import alive, until

from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.labels import LabelRefusal, LabelResult
from gpmlp.learning.loop import learn
from gpmlp.learning.oracles.labeller import Labeller
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.oracles.single_point import FORCES, STRESS

FORCES_WRONG = "energy and forces contradict each other: .* as if forces were "
ENERGY_WRONG = "energy and forces contradict each other: .* right, and the energy "
STRESS_WRONG = "energy and stress contradict each other: .* as if the stress were "

# what the oracle does: why its label is refused, '' where it is right all the same
HERE = {
    # numbers that are none
    "infinite_energy": "the energy is inf",
    "nan_energy": "the energy is nan",
    "energies_of_atoms": "the energy is an array of the shape \\(4,\\)",
    "text": "energy must be real numbers; got str",
    "texts": "forces must be real numbers; got str",
    "complex": "forces must be real numbers; got complex128",
    "nothing": "'NoneType'|got NoneType",
    "no_energy": "energy must be real numbers; got NoneType",
    "ragged": "ValueError|AttributeError",
    "one_too_few": "forces have the shape \\(3, 3\\) for 4 atoms",
    "transposed": "forces have the shape \\(3, 4\\) for 4 atoms",
    "nan": "the force on atom 0 is NaN or infinite",
    "nan_stress": "the stress is NaN or infinite",
    "short_stress": "AssertionError",  # of ASE's
    "no_stress": "",  # nobody insists on it
    "single_precision": "",
    "smeared": "",  # the free energy is taken
    "huge": "more than largest_force 1000",
    "pulled": "forces sum up to 0.5 eV/A per atom instead of 0",
    # labels that are those of something else
    "wrong_sign": FORCES_WRONG + "of the opposite sign",
    "wrong_unit": FORCES_WRONG + "in Hartree/Bohr",
    "contradiction": "energy and forces contradict each other",
    "energy_in_hartree": ENERGY_WRONG + "in Hartree",
    "energy_per_atom": ENERGY_WRONG + "per atom",
    "other_order": "energy and forces contradict each other",
    "zero": "energy and forces contradict each other|exactly zero, here and after these atoms were moved",
    "held": "energy and forces contradict each other|forces on 2 atoms \\(0, 1\\) are exactly zero",
    "flat": "energy and forces contradict each other|the forces along z are exactly zero on all atoms, here and after these were moved",
    "flipped_axis": "energy and forces contradict each other",
    "frozen_energy": "energy and forces contradict each other",
    "bytes_for_energy": "energy must be real numbers; got bytes",
    "at_random": "energy and forces contradict each other",
    "noisy": "energy and forces contradict each other",
    "cached": "energy and forces contradict each other",
    "relaxed": "energy and forces contradict each other",
    "moved": "the calculator changed the positions of the structure",
    "wrapped": "the calculator changed the positions of the structure",
    "transmuted": "the calculator changed the numbers of the structure",
    "another_cell": "the calculator changed the cell of the structure",
    "stress_sign": STRESS_WRONG + "of the opposite sign",
    "virial": STRESS_WRONG + "the virial",
    "stress_in_GPa": STRESS_WRONG + "in GPa",
    # behaviour
    "slow": "",
    "unconverged": "RuntimeError: SCF not converged in 100 cycles",
    "no_memory": "MemoryError",
    "endless": "RecursionError",
    "leave": "SystemExit: 3",
    "base": "Stranger: it is none of the usual ones",
    "long_story": "RuntimeError: no no .* \\.\\.\\. ",
    "deaf": "no answer within timeout_s 1",
    "prints": "",
    "prints_much": "",
    "closes": "",
    "elsewhere": "",
    "tidy": "",
    "forks": "",
}
# in a process of its own; what would end the run itself, too
ELSEWHERE = {
    "exit": "its worker process crashed \\(exit code 7\\)",
    "segfault": "its worker process crashed \\(signal SIGSEGV\\)",
    "abort": "its worker process crashed \\(signal SIGABRT\\)",
    "hang": "no answer within timeout_s 1",
    "hang_deaf": "hung: no answer within timeout_s 1",
    "interrupt": "KeyboardInterrupt",
    "prints": "",
    "closes": "",
    "elsewhere": "",
    "forks": "",
    "leaves_a_child": "",
    "base": "Stranger: it is none of the usual ones",
}


def aluminium():
    atoms = crystal()
    atoms.rattle(0.05, rng=np.random.default_rng(1))
    return structures_from_ase([atoms])


def oracle(folder: Path, *behaviour: str, **values) -> OracleRecipe:
    kwargs = {"log": str(folder / "log"), "behaviour": list(behaviour)} | values.pop("kwargs", {})
    return OracleRecipe(calculator="fake_oracles:Fake", kwargs=kwargs, **({"retries": 0} | values))


def assert_right(answer: LabelResult, stress: bool = True) -> None:
    atoms = crystal()
    atoms.positions = aluminium().positions.numpy()
    expected = fake_oracles.emt_results(atoms)
    assert float(answer.targets.energies) == expected["energy"]
    np.testing.assert_allclose(answer.targets.forces.numpy(), expected["forces"], rtol=1e-6)  # of one is single
    assert bool(answer.targets.stresses.isfinite().all()) == stress


def assert_outcome(answer: LabelResult | LabelRefusal, name: str, expected: str) -> None:
    if expected:
        assert isinstance(answer, LabelRefusal), answer
        pytest.raises(UserError, _raise, answer.reason).match(expected)
        assert len(answer.reason) < 1000 and "Traceback" not in answer.reason
        assert answer.contradiction == ("contradict" in answer.reason or "exactly zero" in answer.reason)
    else:
        assert isinstance(answer, LabelResult), answer
        assert_right(answer, stress=name != "no_stress")


def _raise(text: str) -> None:
    raise UserError(text)


def children(folder: Path) -> list[int]:
    """Processes that the oracle started."""
    log = folder / "log.children"
    return [int(pid) for pid in log.read_text().split()] if log.exists() else []


@pytest.mark.parametrize("name", HERE)
def test_in_the_process_of_the_run(name, tmp_path, capfd):
    """A label that is checked, as the first of a run is; the process is afterwards as it was."""
    place, process = os.getcwd(), os.getpid()
    with Labeller(oracle(tmp_path, name, executor="inline", timeout_s=1.0), tmp_path) as labeller:
        labeller.submit("k", aluminium(), (FORCES, STRESS))
        assert_outcome(labeller.result("k"), name, HERE[name])
    assert os.getcwd() == place and os.getpid() == process and "SCF cycle 1" not in capfd.readouterr().out
    until(lambda: not any(map(alive, children(tmp_path))), 5.0)
    scratch = [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    assert bool(HERE[name]) or not scratch


@pytest.mark.parametrize("name", ELSEWHERE)
def test_in_a_process_of_its_own(name, tmp_path, capfd):
    with Labeller(oracle(tmp_path, name, "well", "well", "well", timeout_s=1.0), tmp_path) as labeller:
        labeller.submit("k", aluminium())
        assert_outcome(labeller.result("k", 60), name, ELSEWHERE[name])
        labeller.submit("next", aluminium())  # nothing of it is left
        assert_right(labeller.result("next", 60))
    assert "SCF" not in capfd.readouterr().out
    assert not any(map(alive, children(tmp_path)))


def run_of(folder: Path, *behaviour: str, steps: int = 40, **values):
    """A recipe of a run whose oracle behaves like that, call by call, and well where the file `mended` is there."""
    os.environ["FAKE_ORACLE"] = str(folder)
    kwargs = {"log": "$FAKE_ORACLE/log", "behaviour": list(behaviour), "mended": "$FAKE_ORACLE/mended"}
    chosen = {"calculator": "fake_oracles:Fake", "kwargs": kwargs, "check_every": 20, "retries": 0}
    return recipe(oracle=chosen | values, dynamics={"steps": steps}, trigger={"force": 0.003})


def right_labels(path: Path) -> list[bool]:
    """Whether energy and forces of each label are those of EMT."""
    frames = ase.io.read(path, ":")
    expected = [fake_oracles.emt_results(a) for a in frames]
    forces = [bool(np.abs(a.get_forces() - e["forces"]).max() < 1e-9) for a, e in zip(frames, expected, strict=True)]
    energies = [abs(a.get_potential_energy() - e["energy"]) < 1e-9 for a, e in zip(frames, expected, strict=True)]
    return [f and e for f, e in zip(forces, energies, strict=True)]


@pytest.mark.parametrize("name", ["wrong_sign", "wrong_unit", "zero", "other_order", "energy_per_atom", "stress_sign"])
def test_a_run_whose_oracle_is_wrong_ends_before_it_learns(name, tmp_path):
    """Two structures are asked for, no label is taken; nothing that the oracle said is used when it is mended."""
    with pytest.raises(
        UserError, match=r"The oracle contradicts itself, so the run ends: .* And: .* go on \(--resume\)"
    ):
        finish(run_of(tmp_path, name), prepare(tmp_path))
    out = tmp_path / "out"
    assert not (out / "labels.xyz").exists() and not (out / "refused.jsonl").exists()
    assert not list((out / "spool").glob("*.json"))
    (tmp_path / "mended").touch()
    last = finish(run_of(tmp_path, name), tmp_path, resume=True)
    assert last.labels > 5 and all(right_labels(out / "labels.xyz"))
    assert len(last.progress.first) == 3  # none is missing


@pytest.mark.parametrize("name", ["wrong_sign", "zero", "other_order"])
def test_a_run_whose_oracle_goes_wrong_later(name, tmp_path):
    """The model finds such a label unlikely, so it is checked, and the next one, too; none is learned."""
    with pytest.raises(
        UserError, match="The oracle contradicts itself, so the run ends: .* may be wrong, too"
    ) as error:
        # no label is checked by chance, which the last digits of its structure decide
        finish(chosen := run_of(tmp_path, *["well"] * 8, name, check_every=10**9), prepare(tmp_path))
    out = tmp_path / "out"
    assert len(right_labels(out / "labels.xyz")) >= 6 and all(right_labels(out / "labels.xyz"))
    before, last = (out / "labels.xyz").read_bytes(), len(right_labels(out / "labels.xyz"))
    assert f" to {last} of " in str(error.value)
    (tmp_path / "mended").touch()
    assert finish(chosen, tmp_path, resume=True).labels > last
    assert all(right_labels(out / "labels.xyz")) and (out / "labels.xyz").read_bytes().startswith(before)


def test_one_contradiction_is_set_aside(tmp_path):
    """It was that structure: the next labels are checked and agree, and the run goes on; calls of checks are counted as calls."""
    well = run_of(tmp_path, "well", "well", "well", "well", "well", "wrong_sign", "well")
    folder = prepare(tmp_path)
    seen = list(learn(well, folder))
    refused = [json.loads(line) for line in (folder / "out" / "refused.jsonl").read_text().splitlines()][1:]
    assert seen[-1].refused == len(refused) == 1 and refused[0]["contradiction"]
    labelled = [json.loads(line) for line in (folder / "out" / "times.jsonl").read_text().splitlines()]
    labelled = [e for e in labelled if e["event"] == "labelled"]
    checked = [e["checked"] for e in labelled]
    assert checked[0] == "forces stress" and checked[1:3] == ["", ""] and checked[3:6] == ["forces stress"] * 3
    assert [e["calls"] for e in labelled[:6]] == [3, 1, 1, 3, 3, 3] and "" in checked[6:]
    asked = len((tmp_path / "log").read_text().split())
    assert asked == sum(e["calls"] for e in labelled) + 2 * len(refused)
    assert all(right_labels(folder / "out" / "labels.xyz"))


def test_never_checked_where_nobody_wants_it(tmp_path):
    last = finish(run_of(tmp_path, "wrong_sign", steps=10, check_every=0), prepare(tmp_path))
    assert last.labels > 3
    assert last.calls == last.labels == len((tmp_path / "log").read_text().split())


def test_a_label_of_the_spool_is_checked_afterwards(tmp_path):
    """Without asking for the label again: one call for the forces, one for the stress."""
    with Labeller(oracle(tmp_path, "well", check_every=0), tmp_path) as labeller:
        labeller.submit("k", aluminium())
        first = labeller.result("k", 60)
        assert (first.calls, first.checked) == (1, ())
    with Labeller(oracle(tmp_path, "well", check_every=0), tmp_path) as labeller:
        for _ in range(2):
            labeller.submit("k", aluminium(), (FORCES, STRESS))
            answer = labeller.result("k", 60)
            assert (answer.calls, answer.attempts, answer.checked) == (3, 1, (FORCES, STRESS))
            assert torch.equal(answer.targets.forces, first.targets.forces)
    assert len((tmp_path / "log").read_text().split()) == 3
