"""Labelling through worker processes that crash, hang and outlive the run that started them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch

from gpmlp.core.errors import ProgressNotice, UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning.labels import LabelRefusal, LabelResult, key_of
from gpmlp.learning.oracles import results, worker
from gpmlp.learning.oracles.labeller import Labeller, check_refusal
from gpmlp.learning.oracles.oracle import CalculatorOracle, OracleRecipe, make_job

TESTS = Path(__file__).parent


def copper(seed=0):
    atoms = ase.build.bulk("Cu", cubic=True)
    atoms.rattle(0.05, rng=np.random.default_rng(seed))
    return structures_from_ase([atoms])


def recipe(folder, *behaviour, gate="", **values) -> OracleRecipe:
    kwargs = {"log": str(folder / "log"), "behaviour": list(behaviour) or ["well"], "gate": str(gate)}
    return OracleRecipe(**({"calculator": "fake_oracles:Fake", "kwargs": kwargs} | values))


def calls(folder) -> list[int]:
    """Process of each call."""
    log = folder / "log"
    return [int(pid) for pid in log.read_text().split()] if log.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def of_emt(structure):
    return CalculatorOracle(OracleRecipe(calculator="emt")).label(structure)


@pytest.fixture(autouse=True)
def no_process_is_left():
    before = set(worker.child_processes(os.getpid()))
    yield
    assert not set(worker.child_processes(os.getpid())) - before  # zombies are children too


def assert_label(label, structure, attempts=1):
    assert isinstance(label, LabelResult), label
    expected = of_emt(structure)
    assert torch.equal(label.targets.energies, expected.energies)
    assert torch.equal(label.targets.forces, expected.forces)
    assert torch.equal(label.targets.stresses, expected.stresses)
    assert torch.equal(label.structure.positions, structure.positions)
    assert label.attempts == attempts and label.seconds > 0


def test_labels_of_two_workers(tmp_path):
    structures = {key_of(s): s for s in map(copper, range(4))}
    with Labeller(recipe(tmp_path, workers=2), tmp_path) as labeller:
        for key, structure in structures.items():
            labeller.submit(key, structure)
            labeller.submit(key, structure)  # once is enough
        assert set(labeller.wait()) <= set(structures)
        for key, structure in structures.items():
            assert_label(labeller.result(key), structure)
            assert labeller.done(key)
        assert len(calls(tmp_path)) == 4 and len(set(calls(tmp_path))) <= 2
        assert list((tmp_path / "scratch").iterdir()) == []  # of labels that came, nothing is kept
        labeller.forget(key)
        assert not list((tmp_path / "spool").glob(f"{key}.*"))
        with pytest.raises(UserError, match="was not asked for"):
            labeller.result(key)
    with pytest.raises(UserError, match="was closed"):
        labeller.submit("other", structure)


def test_inline_gives_the_same(tmp_path):
    structure = copper()
    with Labeller(recipe(tmp_path, "unconverged", "well", executor="inline"), tmp_path) as labeller:
        labeller.submit("k", structure)
        assert labeller.done("k") and calls(tmp_path) == [os.getpid()] * 2
        assert_label(labeller.result("k"), structure, attempts=2)


def test_failed_twice_is_set_aside(tmp_path):
    folder, match = (
        tmp_path,
        "attempt 1: its worker process crashed \\(exit code 7\\); attempt 2: .* \\(signal SIGSEGV\\)",
    )
    with Labeller(recipe(folder, "exit", "segfault", "well"), folder) as labeller:
        labeller.submit("bad", copper())
        refusal = labeller.result("bad")
        assert isinstance(refusal, LabelRefusal) and refusal.attempts == 2 and Path(refusal.folder).is_dir()
        pytest.raises(UserError, check_refusal, recipe(folder, on_failure="stop"), refusal, 1).match(match)
        check_refusal(recipe(folder), refusal, 5)
        with pytest.raises(UserError, match="6 structures in a row, more than at_most_failures 5"):
            check_refusal(recipe(folder), refusal, 6)
        labeller.submit("good", copper(1))
        assert_label(labeller.result("good"), copper(1))
    with Labeller(recipe(folder, "well"), folder) as labeller:  # of the spool, the same again
        labeller.submit("bad", copper())
        assert labeller.result("bad") == refusal and len(calls(folder)) == 3


def test_crash_beside_a_running_label(tmp_path):
    """The process of one label dies while another computes; that one is not disturbed and not asked twice; nothing stays open."""
    gate = tmp_path / "gate"
    before = set(os.listdir("/proc/self/fd"))
    with Labeller(recipe(tmp_path, "well", workers=2, gate=gate), tmp_path) as labeller:
        labeller.submit("slow", copper(1))
        until(lambda: len(calls(tmp_path)) == 1)
        labeller.submit("bad", copper(2))
        until(lambda: len(calls(tmp_path)) == 2)
        os.kill(calls(tmp_path)[1], signal.SIGKILL)
        until(lambda: len(calls(tmp_path)) == 3)
        gate.touch()
        assert_label(labeller.result("slow"), copper(1))
        assert_label(labeller.result("bad"), copper(2), attempts=2)
        assert len(calls(tmp_path)) == 3
        assert set(os.listdir("/proc/self/fd")) > before
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("behaviour", "match"),
    [
        ("hang", "no answer within timeout_s 1.2"),
        ("hang_in_a_program", "no answer within timeout_s 1.2"),
        ("hang_deaf", "hung: no answer within timeout_s 1.2, (stuck in .*fake_oracles.py|nor to signals)"),
        ("freeze", "hung: no answer within timeout_s 1.2, nor to signals"),
    ],
)
def test_hanging_oracle(tmp_path, behaviour, match):
    """By an alarm, by a watchdog where compiled code does not let the alarm through, or from outside."""
    with Labeller(recipe(tmp_path, behaviour, timeout_s=1.2, retries=0), tmp_path) as labeller:
        labeller.submit("k", copper())
        pytest.raises(UserError, check_refusal, recipe(tmp_path, on_failure="stop"), labeller.result("k", 20), 1).match(
            match
        )
        started = tmp_path / "log.children"
        if started.exists():
            assert not alive(int(started.read_text()))
        labeller.submit("next", copper())  # the pool lives


def test_hanging_oracle_in_this_process(tmp_path):
    """What the oracle started ends with it; what the process had started before does not."""
    other = subprocess.Popen(["sleep", "1000"])
    time.sleep(0.05)
    with Labeller(
        recipe(tmp_path, "hang_in_a_program", timeout_s=1, retries=0, executor="inline"), tmp_path
    ) as labeller:
        labeller.submit("k", copper())
        assert labeller.result("k").reason == "no answer within timeout_s 1"
    assert not alive(int((tmp_path / "log.children").read_text())) and other.poll() is None
    other.kill()
    other.wait()


def test_killed_by_terminate_is_no_failure(tmp_path):
    """A batch system ends workers and run together: the attempt is made again, not counted."""
    with Labeller(recipe(tmp_path, "terminated", "well", retries=0), tmp_path) as labeller:
        labeller.submit("k", copper())
        assert_label(labeller.result("k"), copper())
        assert len(calls(tmp_path)) == 2


def test_close_while_labels_are_computed(tmp_path):
    began = time.monotonic()
    with Labeller(recipe(tmp_path, "hang_in_a_program", workers=2), tmp_path) as labeller:
        for i in range(4):
            labeller.submit(f"k{i}", copper(i))
        until(lambda: (tmp_path / "log.children").exists() and len(calls(tmp_path)) == 2)
    assert time.monotonic() - began < 8
    for i in range(4):
        with pytest.raises(UserError, match="was not labelled, because the labeller was closed"):
            labeller.result(f"k{i}")
    assert not results.read_attempts(tmp_path / "spool", "k0")
    until(lambda: not any(map(alive, calls(tmp_path))))
    with Labeller(recipe(tmp_path), tmp_path) as labeller:
        labeller.submit("k0", copper(0))
        assert_label(labeller.result("k0"), copper(0))


RUN = """
import sys, time, torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
import test_labeller as t
from pathlib import Path
labellers = []
for name in {names!r}:
    folder = Path({folder!r}) / name
    labellers.append(t.Labeller(t.recipe(folder, gate=folder / "gate"), folder))
    labellers[-1].submit("k", t.copper())
labellers[0].result("k")
print("answered", flush=True)
time.sleep(1000)
"""


def test_run_killed(tmp_path):
    """kill -9 of a run with three labels under way; a new run asks again only for the one of which nothing was left."""
    answered, orphan, lost = folders = [tmp_path / name for name in ("answered", "orphan", "lost")]
    for folder in folders:
        folder.mkdir()
    (answered / "gate").touch()
    code = RUN.format(tests=str(TESTS), folder=str(tmp_path), names=[folder.name for folder in folders])
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "answered\n"
    until(lambda: all(len(calls(folder)) == 1 for folder in folders))
    run.kill()
    run.wait()
    run.stdout.close()
    os.kill(calls(lost)[0], signal.SIGKILL)

    # its worker had put the label into the spool
    with Labeller(recipe(answered), answered) as labeller:
        labeller.submit("k", copper())
        assert labeller.done("k")
        assert_label(labeller.result("k"), copper())
    assert len(calls(answered)) == 1
    # its worker lives and goes on: wait for it
    with Labeller(recipe(orphan, gate=orphan / "gate"), orphan) as labeller:
        labeller.submit("k", copper())
        time.sleep(1.0)
        assert not labeller.done("k")
        (orphan / "gate").touch()
        assert_label(labeller.result("k", 20), copper())
    assert len(calls(orphan)) == 1
    until(lambda: not alive(calls(orphan)[0]))  # nobody asks it any more
    # its worker died with it: the attempt is made again, as the first
    with Labeller(recipe(lost), lost) as labeller:
        labeller.submit("k", copper())
        assert_label(labeller.result("k", 20), copper())
    assert len(calls(lost)) == 2


def test_failed_attempts_are_remembered(tmp_path):
    """A run that goes on makes the second attempt with the second keyword arguments."""
    first = recipe(tmp_path, "unconverged", "well", executor="inline", retries=1)
    job_of = {"key": "k", "attempt": 1, "scratch": str(tmp_path / "scratch")}
    results.write_record(tmp_path / "spool", worker.attempt_record(job_of, results.FAILED, "not converged"))
    with Labeller(first, tmp_path) as labeller:
        labeller.submit("k", copper())
        refusal = labeller.result("k")
    assert refusal.reason == "attempt 1: not converged; attempt 2: RuntimeError: SCF not converged in 100 cycles"


def test_oracle_that_cannot_be_used_is_no_failure_of_the_structure(tmp_path):
    with pytest.raises(UserError, match="Perhaps you meant 'cutoff'"):
        Labeller(recipe(tmp_path, calculator="fake_oracles:Strict", kwargs={"cutof": 1}), tmp_path)
    with Labeller(recipe(tmp_path, "full_disk"), tmp_path) as labeller:
        labeller.submit("k", copper())
        with pytest.raises(UserError, match="No space left on device; nothing before it is lost: make room and go on"):
            labeller.result("k")
    assert not results.read_attempts(tmp_path / "spool", "k")


def test_spool_that_cannot_be_written(tmp_path, monkeypatch):
    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write_record", full)
    with Labeller(recipe(tmp_path, executor="inline"), tmp_path) as labeller:
        labeller.submit("k", copper())
        with pytest.raises(UserError, match="the label could not be kept: .*spool: No space left on device; nothing"):
            labeller.result("k")
        monkeypatch.undo()
        (tmp_path / "spool" / "k.lock").unlink()
        (tmp_path / "spool").rmdir()
        (tmp_path / "spool").write_text("a file in the place of the folder")
        with pytest.raises(UserError, match="spool: cannot be read"):
            labeller.submit("other", copper())


def test_vanished_scratch(tmp_path):
    with Labeller(recipe(tmp_path, directory=str(tmp_path / "elsewhere")), tmp_path) as labeller:
        labeller.submit("a", copper(1))
        labeller.result("a")
        (tmp_path / "elsewhere").rmdir()
        labeller.submit("b", copper(2))
        assert_label(labeller.result("b"), copper(2))


def test_scratch_is_kept_where_wanted(tmp_path):
    with Labeller(recipe(tmp_path, executor="inline", keep=True), tmp_path) as labeller:
        labeller.submit("k", copper())
    assert (tmp_path / "scratch" / "k.1").is_dir()


def test_checks_belong_to_keys(tmp_path):
    """Every third label on average, and the same ones after a restart."""
    keys = [f"k{i:031x}" for i in range(30)]
    checked = []
    for attempt in ("a", "b"):
        folder = tmp_path / attempt
        folder.mkdir()
        with Labeller(recipe(folder, check_every=3, executor="inline"), folder) as labeller:
            per_key = []
            for key in keys[: 10 if attempt == "b" else 30]:
                before = len(calls(folder))
                labeller.submit(key, copper())
                per_key.append(len(calls(folder)) - before)
        checked.append(per_key)
    assert checked[0][:10] == checked[1] and 5 <= checked[0].count(2) <= 15


def test_worker_starts_without_torch():
    code = "import sys, gpmlp.learning.oracles.worker as w; assert not {'torch', 'pydantic', 'scipy'} & set(sys.modules), 'heavy'"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_executor_options_and_missing_executors(tmp_path):
    with pytest.raises(UserError, match="executor processes has no option 'thread'. Perhaps you meant 'threads'"):
        Labeller(recipe(tmp_path, executor_options={"thread": 2}), tmp_path)
    for name, package in (("dask", "distributed"), ("parsl", "parsl")):
        try:
            __import__(package)
        except ImportError:
            with pytest.raises(UserError, match=f"executor {name} cannot be imported.*pip install 'gpmlp\\[{name}\\]'"):
                Labeller(recipe(tmp_path, executor=name), tmp_path)


@pytest.mark.parametrize(("name", "package"), [("dask", "distributed"), ("parsl", "parsl")])
def test_other_executors(tmp_path, name, package):
    """A crash and a good label, two at a time."""
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'gpmlp[{name}]')")
    with Labeller(recipe(tmp_path, "exit", "well", executor=name, workers=2), tmp_path) as labeller:
        labeller.submit("a", copper(1))
        labeller.submit("b", copper(2))
        answers = [labeller.result("a", 60), labeller.result("b", 60)]
        assert sorted(answer.attempts for answer in answers) == [1, 2]
        for answer, seed in zip(answers, (1, 2), strict=True):
            assert_label(answer, copper(seed), answer.attempts)


@pytest.mark.parametrize(("name", "package"), [("dask", "distributed"), ("parsl", "parsl")])
def test_other_executors_closed_while_they_compute(tmp_path, name, package):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'gpmlp[{name}]')")
    with Labeller(recipe(tmp_path, "hang_in_a_program", executor=name), tmp_path) as labeller:
        labeller.submit("a", copper(1))
        labeller.submit("b", copper(2))
        until(lambda: (tmp_path / "log.children").exists())
    for key in "ab":
        with pytest.raises(UserError, match="the labeller was closed"):
            labeller.result(key)
    assert len(calls(tmp_path)) == 1 and not alive(calls(tmp_path)[0])
    assert not alive(int((tmp_path / "log.children").read_text()))


# ---------------------------------------------------------------- workers that nobody waits for any more

KILLED = """
import json, sys
from gpmlp.learning.oracles.executors import WorkerProcess
process = WorkerProcess()
print(process.process.pid, flush=True)
process.call(json.loads(sys.argv[1]))
"""


def opened(path, pid) -> int:
    """How often a process has a file open."""
    return sum(os.path.realpath(link) == str(path) for link in Path(f"/proc/{pid}/fd").glob("*"))


@pytest.fixture
def orphan(tmp_path):
    """Makes a worker that computes label "a" in some way, the run of which was killed; kills what is left of it in the end."""
    found = []

    def make(*behaviour, waits=False):
        wanted = make_job(recipe(tmp_path, *behaviour), "a", 1, copper(), tmp_path / "spool", tmp_path / "scratch", ())
        run = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(wanted)], stdout=subprocess.PIPE, text=True)
        with run:
            found.append(int(run.stdout.readline()))
            until(lambda: opened(tmp_path / "spool" / "a.lock", found[-1]) if waits else calls(tmp_path))
            assert not results.LockHolder.from_text((tmp_path / "spool" / "a.lock").read_text()).orphaned
            run.kill()
        return found[-1]

    yield make
    for pid in found:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
            until(lambda pid=pid: not alive(pid))


def test_an_orphan_that_hangs_is_ended(tmp_path, orphan):
    """A run that is resumed says whom it waits for, and does not wait for who will never answer."""
    pid = orphan("hang", "well")
    with Labeller(recipe(tmp_path, "hang", "well"), tmp_path) as labeller:
        with pytest.warns(ProgressNotice) as told:
            labeller.submit("a", copper())
            assert_label(labeller.result("a", 60), copper())
    first, last = (str(warning.message) for warning in told)
    assert (
        f"waiting for process {pid} on this machine, an oracle of an earlier run, which computes the label a" in first
    )
    assert f"process {pid}, an oracle of an earlier run, has done nothing for 5 s; it was ended" in last
    assert not alive(pid) and len(calls(tmp_path)) == 2


def test_only_an_orphan_that_does_nothing_is_ended(tmp_path, orphan, monkeypatch):
    """Not one that computes; nor a process of another time, machine or kind; nor one the run of which lives."""
    monkeypatch.setattr(results, "GRACE", 0.3)
    monkeypatch.setattr(results, "CHECK_S", 0.1)
    told = []

    def wait(holder):
        waiting, end = results.LockWaiter("a", told.append), time.monotonic() + 1.5
        while time.monotonic() < end:
            waiting(holder.to_text())
            time.sleep(0.02)

    busy = orphan("hang_deaf")
    known = results.LockHolder.from_text((tmp_path / "spool" / "a.lock").read_text())
    assert known.pid == busy and known.orphaned
    wait(known)
    assert alive(busy) and len(told) == 1 and f"kill {busy}" in told[0]
    os.kill(busy, signal.SIGSTOP)  # does nothing from now on
    me = results.LockHolder.this_process()
    for other in (
        replace(known, began=known.began - 1),
        replace(known, machine="another"),
        replace(known, parent=int(results._stat(busy)[1])),  # the run it works for
        replace(me, parent=me.parent + 1),  # this process, which is no worker
    ):
        assert not other.orphaned
        wait(other)
    assert alive(busy)
    wait(known)
    until(lambda: not alive(busy))
    assert "it was ended" in told[-1]


def test_nothing_is_begun_for_a_run_that_has_ended(tmp_path, orphan):
    """Its worker, which waited for another process to compute the same label, goes when that one is done."""
    with results.label_lock(tmp_path / "spool", "a"):
        pid = orphan("well", waits=True)
    until(lambda: not alive(pid))
    assert not calls(tmp_path)


def test_a_label_that_was_forgotten_meanwhile_is_not_computed_again(tmp_path):
    """By who waited for it: a later run has the answer."""
    wanted = make_job(recipe(tmp_path), "a", 1, copper(), tmp_path / "spool", tmp_path / "scratch", ())
    found = []
    thread = threading.Thread(target=lambda: found.append(worker.make_attempt(wanted)))
    with results.label_lock(tmp_path / "spool", "a"):
        thread.start()
        until(lambda: opened(tmp_path / "spool" / "a.lock", os.getpid()) == 2)
        results.write_record(tmp_path / "spool", worker.attempt_record(wanted, results.LABEL))
        results.remove_records(tmp_path / "spool", "a")
    thread.join(20)
    assert found[0]["kind"] == results.INTERRUPTED and not calls(tmp_path)
