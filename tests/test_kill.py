"""Learning runs that are killed, ended, and left without a disk: nothing is lost, nothing is asked twice, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import counting_oracle
import pytest
import torch
import yaml
from counting_oracle import answers
from learning_runs import SMALL, contents, events, finish, merged, prepare, recipe

from gpmlp.learning.labels import LabelFile
from gpmlp.learning.loop import learn
from gpmlp.learning.oracles import results

TESTS = Path(__file__).parent
RUN = {
    "trigger": {"force": 0.006},
    "dynamics": {"walkers": 2, "ahead": 2, "steps": 20, "ramp_steps": 15},
    "oracle": {"workers": 2},
}
ELSEWHERE = merged(RUN, {"oracle": {"executor": "processes"}})
SIGKILL = -signal.SIGKILL


class Killer:
    """A process of killed_runs.py: it imports everything once, and each run is a fork of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "killed_runs.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=TESTS,
            text=True,
        )

    def run(self, folder: Path, more: dict = RUN, resume: bool = True, delay: float = 0.0, **how) -> dict:
        """Run in a folder; how it ended."""
        env = {counting_oracle.LOG: str(folder / "answers"), counting_oracle.DELAY: str(delay)}
        request = {"folder": str(folder), "recipe": more, "resume": resume, "env": env, **how}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def killer():
    process = Killer()
    yield process
    process.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory, killer):
    """(folder, seconds) of the run to which nothing happens."""
    folder = prepare(tmp_path_factory.mktemp("reference"))
    ended = killer.run(folder, resume=False)
    assert ended["code"] == 0, ended["text"]
    assert len(events(folder, "learned")) > 4 and len(answers(folder / "answers")) == len(
        LabelFile(folder / "out" / "labels.xyz")
    )
    return folder, ended["seconds"]


@pytest.fixture(autouse=True)
def like_the_reference():
    """Sums depend on the number of threads in their last digits; the reference has one, whatever other tests have left behind."""
    torch.set_num_threads(2)  # that setting the same number does nothing is no way to be sure of it
    torch.set_num_threads(1)


@pytest.fixture
def undisturbed(tmp_path_factory, monkeypatch):
    """Folder of the run to which nothing happens, made in this process: what other tests did to it may change last digits."""
    folder = tmp_path_factory.mktemp("undisturbed")
    monkeypatch.setenv(counting_oracle.LOG, str(folder / "answers"))
    prepare(folder)
    finish(recipe(**RUN), folder)
    return folder


def kept(folder: Path) -> set[str]:
    """Answers that are on the disk, on the tape or in the spool: these must never be asked for again."""
    out = folder / "out"
    found = set()
    for path in (out / "spool").glob("k*.json"):
        record = json.loads(path.read_text())
        found |= {repr(record["energy"])} if record["kind"] == results.LABEL else set()
    if (out / "labels.xyz").exists():
        copy = shutil.copy(out / "labels.xyz", folder / "copy.xyz")  # opening a tape repairs it
        found |= {repr(float(e.targets.energies[0])) for e in LabelFile(copy)}
    return found


class Life:
    """A run that is killed again and again, and what is to hold whenever it is."""

    def __init__(self, folder: Path, killer: Killer, more: dict = RUN) -> None:
        self.folder, self.killer, self.more, self.kills, self.ended = prepare(folder), killer, more, 0, False

    def once(self, **how) -> None:
        """Go on until killed, or to the end."""
        before, asked = kept(self.folder), len(answers(self.folder / "answers"))
        ended = self.killer.run(self.folder, self.more, **how)
        assert ended["code"] in (0, SIGKILL), ended["text"]
        again = set(answers(self.folder / "answers")[asked:]) & before
        assert not again, f"asked again after {how}"
        assert before <= kept(self.folder), f"lost after {how}"
        self.kills += ended["code"] == SIGKILL
        self.ended = ended["code"] == 0

    def finish(self, reference: Path) -> None:
        """Go on to the end, which is to be that of the run to which nothing happened."""
        if not self.ended:
            self.once()
        assert self.ended and not list((self.folder / "out").glob(".*.tmp"))
        for name, found in contents(self.folder).items():
            assert found == contents(reference)[name], f"{name} after {self.kills} kills"
        assert set(answers(self.folder / "answers")) == set(answers(reference / "answers"))


def test_killed_in_the_middle_of_everything(killer, reference, tmp_path):
    """Before, after and in the middle of each step that a label, a stride or a checkpoint consists of."""
    folder, _ = reference
    points = ["oracle", "spool", "tape", "forgetting", "learning", "log", "model", "checkpoint", "name", "disk"]
    todo = [(p, when) for p in points for when in ("before", "after")]
    todo += [("log", "torn"), ("dynamics", "before"), ("asking", "after"), ("judging", "after")]
    rng = random.Random(4)
    rng.shuffle(todo)
    todo.insert(0, ("tape", "torn"))
    lives = [Life(tmp_path / "0", killer)]
    for point, when in todo:
        if lives[-1].ended:
            lives[-1].finish(folder)
            lives.append(Life(tmp_path / str(len(lives)), killer))
        number = rng.randint(1, 12 if point in ("log", "dynamics", "disk", "name") else 2)
        lives[-1].once(point=point, when=when, number=number)
    lives[-1].finish(folder)
    assert sum(life.kills for life in lives) >= 20
    assert any((life.folder / "out" / "labels.xyz.broken").exists() for life in lives)  # what was torn was found


def test_killed_at_any_moment(killer, reference, tmp_path):
    (folder, seconds), rng, lives = reference, random.Random(1), []
    while (
        sum(life.kills for life in lives) < 5
    ):  # a run may end before its next death, on a machine that is busy with other things
        assert len(lives) < 12
        lives.append(Life(tmp_path / f"run{len(lives)}", killer))
        for _ in range(7):
            lives[-1].once(after_s=rng.uniform(0.0, 0.6 * seconds / len(lives)))
            if lives[-1].ended:
                break
        lives[-1].finish(folder)


def test_killed_while_others_compute(killer, reference, tmp_path):
    """The run alone is killed: its workers finish what they compute, and nothing is computed twice. Or all are, and what is on the
    disk is not asked for again."""
    folder, seconds = reference
    rng, life = random.Random(2), Life(tmp_path / "alone", killer, ELSEWHERE)
    for _ in range(5):
        life.once(after_s=0.3 + rng.uniform(0.0, 0.6 * seconds), delay=0.3)
    life.finish(folder)
    found = answers(life.folder / "answers")
    assert life.kills >= 4 and len(found) == len(set(found))
    life = Life(tmp_path / "all", killer, ELSEWHERE)
    for _ in range(4):
        life.once(after_s=0.3 + rng.uniform(0.0, 0.6 * seconds), delay=0.3, family=True)
    life.finish(folder)
    assert life.kills >= 3


def alive(folder: Path) -> list[int]:
    """Processes that label for a run, wherever they have gone."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_terminated(killer, reference, tmp_path):
    """SIGTERM, as from a batch system, while a label is being computed: a clean end, nobody left behind, and it can go on."""
    folder, _ = reference
    prepare(tmp_path)
    ended = killer.run(tmp_path, ELSEWHERE, after_s=1.5, terminate=True, delay=1000.0)
    assert ended["code"] == 130 and ended["seconds"] < 12
    assert not answers(tmp_path / "answers")
    ended = killer.run(tmp_path, ELSEWHERE, after_s=1.5, terminate=True)
    assert ended["code"] in (0, 130), ended["text"]
    assert killer.run(tmp_path, ELSEWHERE)["code"] == 0
    assert contents(tmp_path) == contents(folder)
    found = answers(tmp_path / "answers")
    assert len(found) == len(set(found))


def test_the_command_is_terminated(reference, tmp_path):
    """The same for `gpmlp learn` itself."""
    folder, _ = reference
    prepare(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(merged(SMALL, ELSEWHERE)))))
    env = {
        **os.environ,
        counting_oracle.LOG: str(tmp_path / "answers"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    command = [sys.executable, "-m", "gpmlp", "learn", str(tmp_path / "recipe.yaml"), "--resume", "--no-report"]

    def start(delay):
        return subprocess.Popen(
            command, env={**env, counting_oracle.DELAY: str(delay)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def until(condition):
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.02)

    process = start(1000.0)
    until(lambda: any((tmp_path / "out" / "scratch").glob("*")))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted; go on with: gpmlp learn" in said
    assert not alive(tmp_path)
    process = start(0.0)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert contents(tmp_path) == contents(folder)
    found = answers(tmp_path / "answers")
    assert len(found) == len(set(found))


@pytest.mark.parametrize("file_bytes", [2500, 9000, 20000])
def test_full_disk(killer, reference, tmp_path, file_bytes):
    """No file can grow beyond a size (recipe, tape, log, model and checkpoint have sizes of their own): a message, and no more."""
    folder, _ = reference
    prepare(tmp_path)
    ended = killer.run(tmp_path, file_bytes=file_bytes)
    assert ended["code"] == 2 and "File too large" in ended["text"], ended["text"]
    before = kept(tmp_path)
    assert killer.run(tmp_path)["code"] == 0
    assert before <= kept(tmp_path) and contents(tmp_path) == contents(folder)
    found = answers(tmp_path / "answers")
    assert len(found) - len(set(found)) <= 1  # one, if its answer had no room in the spool


def test_scratch_and_spool_vanish(undisturbed, tmp_path, monkeypatch):
    """Removed behind its back after every state: they are made again."""
    folder = undisturbed
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))
    prepare(tmp_path)
    for state in learn(recipe(**RUN), tmp_path):
        if state.phase in ("dynamics", "learning"):
            shutil.rmtree(tmp_path / "out" / "scratch", ignore_errors=True)
            shutil.rmtree(tmp_path / "out" / "spool", ignore_errors=True)
    assert contents(tmp_path) == contents(folder)


def test_a_place_that_cannot_be_written_to(undisturbed, tmp_path, monkeypatch):
    """A scratch folder that is a file by now: the run ends with a message, and goes on when it is a folder again."""
    folder = undisturbed
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))
    prepare(tmp_path)
    (tmp_path / "scratch").write_text("")
    elsewhere = merged(RUN, {"oracle": {"directory": str(tmp_path / "scratch")}})
    from gpmlp.core.errors import UserError

    with pytest.raises(UserError, match=r"make room and go on \(--resume\)|no folder can be made"):
        finish(recipe(**elsewhere), tmp_path)
    (tmp_path / "scratch").unlink()
    finish(recipe(**elsewhere), tmp_path, resume=True)
    assert contents(tmp_path) == contents(folder)
