"""The page about a learning run: from synthetic data of every kind, and from a real run whose numbers are made again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import ase.build
import ase.io
import numpy as np
import pytest
from report_data import Balanced
from test_report import only_paint

from gpmlp.cli import main, progress
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import loop, triggers
from gpmlp.learning.labels import LabelFile
from gpmlp.learning.model import OnlineModel
from gpmlp.learning.recipe import LearnRecipe, TriggerRecipe
from gpmlp.learning.triggers import StepContext, trigger_limits
from gpmlp.report.run import collect, numbers
from gpmlp.report.run.data import LabelRecord, ObservableCurve, PrequentialError, RunData, RunFrames
from gpmlp.report.run.page import report_run, write_run_page
from gpmlp.uncertainty.calibration import Calibration

KEYS = (  # of report.json
    "Why did it stop, and is it converged?",
    "How did it learn?",
    "Was the uncertainty honest?",
    "What did it cost?",
    "Which structures were labelled?",
    "Where is the model blind?",
    "How was it made?",
)
TITLES = (
    *KEYS[:2],
    "Were errors as large as predicted?",
    *KEYS[3:5],
    "Where does the model extrapolate?",
    "Recipe, model and files",
)
CRITERIA = (
    {"name": "ensemble", "met": True, "sentence": "mean temperature 300 K (target 300)", "numbers": {"frames": 10.0}},
    {"name": "plateau", "met": None, "sentence": "too few frames yet", "numbers": {}},
    {"name": "coverage", "met": False, "sentence": "80 % of frames inside", "numbers": {"frames": float("nan")}},
)


def frames(n: int = 300, walkers: int = 2, seed: int = 0) -> RunFrames:
    rng = np.random.default_rng(seed)
    walker = np.arange(n) % walkers
    step = 10 * (1 + np.arange(n) // walkers)
    sigma = 0.05 * rng.lognormal(0, 0.3, n)
    novelty = rng.lognormal(-0.3, 0.3, n)
    return RunFrames(
        walker=walker, step=step, time_ps=step / 500, temperature_K=300 + 20 * rng.standard_normal(n),
        target_K=np.full(n, 300.0), sigma=sigma, sigma_median=0.6 * sigma, limit=np.full(n, 0.2), novelty=novelty,
        outside=np.clip(novelty - 1, 0, 1), inside=novelty < 1.5, labelled=np.arange(n) % 50 == 49,
        window=np.arange(n) > 0.7 * n, total_step=10 * (1 + np.arange(n)),
    )  # fmt: skip


def prequential(rng: np.random.Generator, atoms: int = 8, scale: float = 1.0) -> PrequentialError:
    sigma = 0.05 * rng.lognormal(0, 0.4, (atoms, 3))
    error = scale * sigma * rng.standard_normal((atoms, 3))
    norm = np.linalg.norm(error, axis=1)
    return PrequentialError(0.25, float(norm.max()), int(norm.argmax()), error, sigma, 0.001, 0.002, 1.2)


def labels(scale: float = 1.0, asked: int = 12, atoms: int = 8) -> tuple[LabelRecord, ...]:
    rng = np.random.default_rng(1)
    first = [LabelRecord(k + 1, f"k{k}", "first", f"first structure {k + 1}", seconds=2.0) for k in range(3)]
    reasons = ("force", "novelty", "force and novelty", "guard")
    return (*first, *(
        LabelRecord(
            4 + k, f"k{k + 3}", reasons[k % 4], f"because {k}", k % 2, 100 * (k // 2 + 1), 0.2 * (k // 2 + 1), 310.0, 200 * k,
            0.22, 0.2, np.full(atoms, 13), 40 + k, 2.0 + k, 1 + (k == 3), prequential(rng, atoms, scale),
        )
        for k in range(asked)
    ))  # fmt: skip


def synthetic(**changes) -> RunData:
    steps = np.linspace(100, 900, 12)
    curve = ObservableCurve("energy", "eV/atom", steps, 0.1 + 0.01 / steps, 0.1 / np.sqrt(steps), 0.004, steps > 300)
    given = {
        "title": "Al8, NVT at 300 K", "folder": "out", "ended": "steps", "stopped": "all 1500 steps are made; going on",
        "sentence": "going on", "criteria": CRITERIA, "frames": frames(), "labels": labels(), "observables": (curve,),
        "steps": (1500, 1500), "wanted": 1500, "novelty_limit": 1.5, "wanted_rate": 1.0, "wanted_frames": 0.9,
        "wanted_atoms": 0.97, "refused": ({"key": "kx", "reason": "did not converge", "attempts": 2},),
        "seconds": {"dynamics": 60.0, "oracle": 30.0, "learning": 10.0}, "hours": 0.04, "began": "2026-01-02 03:04",
        "ended_at": "2026-01-02 04:04", "recipe": {"start": "a.xyz", "seed": 0}, "given": {"start": "a.xyz"},
        "files": (("labels", "labels.xyz", "ab" * 32),), "versions": {"gpmlp": "0.1.0"},
        "model": {"rank": 40, "noise": {"forces": 0.01}, "rows": {"forces": 360}, "events": ["3 labels: refreshed"]},
        "oracle": ("emt", "o123"), "labels_page": "model/index.html",
    }  # fmt: skip
    return RunData(**(given | changes))


def built(data: RunData, folder) -> tuple[str, dict, Balanced]:
    page = write_run_page(data, folder).read_text("utf-8")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in report.json")

    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert not parser.open and len(set(parser.ids)) == len(parser.ids)
    # a page beside it may be linked to; nothing else is loaded
    assert all(load.startswith(("data:", "#")) or load == "model/index.html" for load in parser.loads)
    return page, json.loads((folder / "report.json").read_text("utf-8"), parse_constant=refuse), parser


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return *built(synthetic(), folder), folder


def test_the_page_answers_the_questions_in_order(whole):
    page, record, parser, folder = whole
    places = [page.index(f">{title}</h2>") for title in TITLES]
    assert places == sorted(places) and tuple(record["answers"]) == KEYS
    words = "".join(parser.text)
    for answer in record["answers"].values():
        assert answer in words and "nan" not in answer and answer.endswith(".")
    drawn = {path.stem for path in (folder / "figures").iterdir()}
    wanted = {
        "window_sigma",
        "sigma",
        "temperature",
        "novelty",
        "prequential_errors",
        "reliability",
        "bounds",
        "label_rate",
        "trust_region",
    }
    assert wanted | {"observable_1", "labels_over_time", "label_causes"} == drawn
    assert "http" not in page.replace("http-equiv", "") and len(page) < 3e6


def test_numbers_of_the_json_are_those_of_the_run(whole):
    record = whole[1]
    assert record["label_causes"] == {"first": 3, "force": 3, "novelty": 3, "force and novelty": 3, "guard": 3}
    costs = record["costs"]
    assert costs["oracle_calls"] == 3 + 12 + 1 and costs["labels_asked_by_dynamics"] == 12 and costs["refused"] == 1
    assert costs["failed_attempts"] == 1 + 2
    assert costs["steps_per_label"] == 3000 / 12 and costs["share_of_steps_without_oracle"] == 1 - 12 / 3000
    rate = record["label_rate"]
    width = (rate["to_step"][0] - rate["from_step"][0]) / 1000
    assert sum(rate["per_1000_steps"]) * width == pytest.approx(12)
    assert record["window"]["frames"] == int(frames().window.sum())
    rows = record["labels"]
    assert [r["number"] for r in rows] == list(range(1, 16)) and rows[0]["largest_error_eV_per_A"] is None
    told = labels()[3].prequential
    assert rows[3]["force_rmse_eV_per_A"] == pytest.approx(np.sqrt(np.mean(told.force_error**2)))


@pytest.mark.parametrize(("scale", "word"), [(1.0, "Yes"), (0.5, "On the cautious side"), (2.0, "No")])
def test_honest_error_bars_are_found_honest(scale, word, tmp_path, monkeypatch):
    """Normal errors as large as σ, half and twice as large: 68, 95 and 38 % lie within one σ."""
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    data = synthetic(labels=labels(scale, atoms=60))
    found = numbers.prequential_scores(data)
    expected = {1.0: 0.683, 0.5: 0.954, 2.0: 0.383}[scale]
    # 2160 components: the standard error of a share is at most 0.011; four of them
    assert found["coverage"]["all"]["coverage_68"] == pytest.approx(expected, abs=0.044)
    assert found["rms_error_over_sigma"] == pytest.approx(scale, rel=0.06)
    told = [errors for _, errors in data.predicted]
    assert found["bounds_exceeded"] == sum(t.largest_error > t.bound for t in told)
    answer = built(data, tmp_path)[1]["answers"][KEYS[2]]
    assert answer.startswith(word)


def test_reasons_are_told_once(tmp_path, monkeypatch):
    """What bound, limit, atom and novelty already say has no words in the table; anything else has."""
    assert collect.reason_notes("force error of atom 3 may reach 1.4 eV/A (limit 1.2)", "") == []
    assert collect.reason_notes(
        "halted: H-H distance 0.3 A; H atom 1 lies at 2 times the radius of the trust region", ""
    ) == ["H-H distance 0.3 A"]
    assert collect.reason_notes("first structure 3 of 17", "") == []
    assert collect.reason_notes("explored: rare around atom 0", "cluster of 9 atoms") == [
        "explored: rare around atom 0", "cluster of 9 atoms"
    ]  # fmt: skip
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    reason = "force error of atom 3 may reach 1.4 eV/A (limit 1.2)"
    same = tuple(dataclasses.replace(label, reason=reason, cause="force", atom=3) for label in labels())
    page, record, _ = built(synthetic(labels=same), tmp_path)
    assert reason not in page and page.count("a force error that might exceed the limit") == 2  # the answer, the list
    assert {row["atom"] for row in record["labels"]} == {3} and {row["reason"] for row in record["labels"]} == {reason}


def test_thinned_frames_hold_what_asked_and_the_extremes():
    seen = frames(20000)
    some = numbers.drawn_frames(synthetic(frames=seen))
    assert len(some) <= numbers.MOST_FRAMES + 2 and (np.diff(some) > 0).all()
    assert np.isin(seen.labelled.nonzero()[0], some).all()
    assert seen.sigma.argmax() in some and seen.sigma.argmin() in some


def test_running_shares():
    np.testing.assert_allclose(numbers.running_mean(np.array([1.0, 0, 1, 1]), 2), [1, 0.5, 0.5, 1])


NOTHING = frames(0)
DEGENERATE = {
    "no frames": {"frames": NOTHING, "observables": (), "criteria": (), "labels": labels()[:3], "steps": (0,)},
    "one frame": {"frames": frames(1, 1), "labels": labels()[:3], "steps": (10,)},
    "nothing asked": {"labels": labels()[:3]},
    "nothing foretold": {"labels": tuple(dataclasses.replace(label, prequential=None) for label in labels())},
    "no limits": {"frames": dataclasses.replace(frames(), limit=np.full(300, np.nan)), "novelty_limit": float("nan")},
    "no novelty, no window": {
        "frames": dataclasses.replace(frames(), novelty=np.full(300, np.nan), window=np.zeros(300, bool)),
        "wanted_rate": float("nan"), "wanted_frames": float("nan"), "wanted_atoms": float("nan"),
    },
    "a species never seen": {"frames": dataclasses.replace(frames(), novelty=np.full(300, np.inf))},
    "nothing recorded": {
        "seconds": {}, "hours": 0.0, "began": "", "given": {}, "files": (), "versions": {}, "model": {}, "labels_page": "",
    },
    "exact": {"labels": labels(0.0)},
    "forces unknown": {"labels": tuple(
        dataclasses.replace(label, prequential=label.prequential and dataclasses.replace(
            label.prequential, force_error=np.full((8, 3), np.nan), largest_error=float("nan"), bound=float("nan")))
        for label in labels())},
    "unfinished": {"ended": "", "stopped": ""},
    "unstable": {"ended": "unstable", "stopped": "a walker could not be kept stable"},
    "converged": {"ended": "converged"},
}  # fmt: skip


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")  # of what other tests left to the collector
def test_missing_parts_are_explained(name, tmp_path, monkeypatch):
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    page, record, _ = built(synthetic(**DEGENERATE[name]), tmp_path)
    assert all(f">{title}</h2>" in page for title in TITLES)
    assert not {"nan", "None", "inf"} & set("".join(record["answers"].values()).replace(".", " ").split())


def test_strings_of_the_run_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    evil = '</script><img src="http://x"> & \'"<b>'
    odd = tuple(dataclasses.replace(label, reason=evil, key=evil) for label in labels())
    criterion = CRITERIA[0] | {"name": evil, "sentence": evil}
    data = synthetic(
        title=evil, folder=evil, labels=odd, criteria=(criterion,), recipe={evil: evil}, given={evil: [evil]}, oracle=(evil, evil),
        files=((evil, evil, evil),), versions={evil: evil}, model={"events": [evil]}, stopped=evil,
        refused=({"key": evil, "reason": evil, "attempts": 1},),
    )  # fmt: skip
    page, record, parser = built(data, tmp_path)
    assert evil not in page and record["title"] == evil and evil in "".join(parser.text)


def test_wrong_data_are_refused():
    with pytest.raises(UserError, match=r"`sigma` must have shape \(300,\); got \(2,\)"):
        dataclasses.replace(frames(), sigma=np.zeros(2))
    with pytest.raises(UserError, match="`ended` must be one of 'converged'"):
        synthetic(ended="somehow")


# ---------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four atoms of aluminium that ask for some labels; the folder of the run, and its recipe."""
    base = tmp_path_factory.mktemp("run")
    ase.io.write(base / "start.xyz", ase.build.bulk("Al", cubic=True))
    recipe = LearnRecipe.model_validate({
        "start": "start.xyz", "oracle": {"calculator": "emt", "executor": "inline"},
        "dynamics": {"temperature_K": [200, 900], "steps": 60, "timestep_fs": 4.0, "ramp_steps": 30, "walkers": 2},
        "trigger": {"every": 5, "cooldown": 5, "force": 0.03, "most_per_1000_steps": 300},
        "stop": {"every_frames": 5, "at_least_steps": 0},
        "model": {"descriptor": {"n_max": 3, "l_max": 2, "cutoff": 4.0}, "inducing": {"n": 20, "gradients": 1}},
        "bootstrap": {"n": 4, "displacement_A": 0.04}, "output": "out", "thin": 10,
    })  # fmt: skip
    return base / "out", recipe, list(loop.learn(recipe, base))[-1]


def collect_std(folder, potential) -> np.ndarray:
    """(atoms,) root mean squares over components of the σ of forces on the frames of a trajectory, eV/A."""
    frames = ase.io.read(folder / "trajectory.xyz", ":")
    variance = potential(structures_from_ase(frames), variance="forces").forces_variance.total
    return variance.mean(dim=1).sqrt().numpy()


def test_the_page_of_a_real_run(run, tmp_path, monkeypatch):
    folder, recipe, last = run
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    page = report_run(folder, recipe)
    assert page == folder / "report" / "index.html" and (folder / "report" / "model" / "index.html").exists()
    record = json.loads((folder / "report" / "report.json").read_text())
    tape = LabelFile(folder / "labels.xyz")
    learned = [*last.progress.first, *last.progress.learned]
    assert [row["key"] for row in record["labels"]] == learned and len(learned) == len(tape) > 4
    assert record["ended"] == "steps" and record["costs"]["steps"] == 120
    assert record["costs"]["seconds_by_activity"].keys() == {"dynamics", "oracle", "learning"}
    assert all(row["seconds"] > 0 for row in record["labels"])
    assert record["oracle"] == {"calculator": "emt", "settings": recipe.oracle.settings_hash}
    assert {c["name"] for c in record["criteria"]} == {"ensemble", "plateau", "observable energy", "coverage"}
    # the window that is shown is the one that was judged
    ensemble = next(c for c in record["criteria"] if c["name"] == "ensemble")
    assert record["window"]["frames"] == ensemble["numbers"]["frames"]
    assert "learned from" in page.read_text("utf-8")
    assert collect.run_recipe(folder) == recipe
    # the error that is foreseen stands in the head of the page and in the table of the command
    std = record["blind"]["force_std_rms_meV_per_A"]
    assert std == pytest.approx(1e3 * np.sqrt(np.mean(collect_std(folder, last.model.potential) ** 2)), rel=1e-6)
    assert "force error foreseen along the trajectory" in page.read_text("utf-8")
    names, values = (list(column.cells) for column in progress.learning_table(last, folder, page).columns)
    assert f"± {std:.3g} meV/A" in str(values[names.index("force error, foreseen")])


def test_what_was_foretold_is_what_the_model_before_says(run):
    """Taught by hand: the error and σ of the first label asked for, from the potential that had not learned it."""
    folder, recipe, last = run
    tape = LabelFile(folder / "labels.xyz")
    student = OnlineModel.from_labels([tape.find(k) for k in last.progress.first], recipe.model, recipe.refresh)
    asked = [e for e in collect.read_events(folder / "log.jsonl") if e["event"] == "learned" and "key" in e]
    for event in asked[:2]:
        entry, told = tape.find(event["key"]), event["foreseen"]
        prediction = student.potential(entry.structure, variance=("energies", "forces"), novelty=True)
        error = prediction.forces - entry.targets.forces
        # four digits are kept
        np.testing.assert_allclose(told["force_error"], error.flatten().numpy(), rtol=6e-4, atol=1e-9)
        sigma = prediction.forces_variance.total.sqrt()
        np.testing.assert_allclose(told["force_sigma"], sigma.flatten().numpy(), rtol=6e-4, atol=1e-9)
        assert told["largest_error"] == pytest.approx(float(error.norm(dim=1).max()), rel=1e-6)
        bound = triggers.force_error_bound(prediction.forces_covariance.total, recipe.trigger.probability)
        assert told["bound"] == pytest.approx(bound, rel=1e-3)
        energy = (prediction.energies - entry.targets.energies) / entry.structure.n_atoms
        assert told["energy_error"] == pytest.approx(float(energy), rel=1e-6, abs=1e-12)
        assert told["novelty"] == pytest.approx(float(prediction.novelty.max()), rel=1e-6)
        student = student.with_label(entry)


def test_the_frames_shown_are_the_history_of_the_run(run):
    folder, recipe, last = run
    seen = collect.judge_frames(collect.read_events(folder / "log.jsonl"), recipe, last.labels, 0.0)
    history = last.progress.history
    np.testing.assert_array_equal(seen.frames.step, history.column("step"))
    np.testing.assert_allclose(seen.frames.sigma, history.column("sigma_max"))
    np.testing.assert_allclose(seen.frames.outside * 4, history.column("outside/13"))
    steps, walkers = history.column("step"), history.column("walker")
    # steps made again after a set-back are steps made
    forward = sum(np.diff(steps[walkers == w], prepend=0).clip(min=0).sum() for w in history.walkers)
    assert seen.frames.total_step[-1] == forward >= 120
    assert seen.observables == () or seen.observables[0].name == "energy"


def test_a_run_that_was_killed_has_a_page_too(run, tmp_path, monkeypatch):
    folder, recipe, _ = run
    for name in ("labels.xyz", "model.gpmlp", "recipe.json", "log.jsonl", "trajectory.xyz"):
        data = (folder / name).read_bytes()
        keep = {"log.jsonl": int(0.7 * len(data)), "trajectory.xyz": len(data) - 40, "labels.xyz": len(data)}
        (tmp_path / name).write_bytes(data[: keep.get(name, len(data))])
    monkeypatch.setattr("gpmlp.report.run.figures.draw_picture", only_paint)
    monkeypatch.setattr("gpmlp.report.model.figures.draw_picture", only_paint)
    before = (tmp_path / "labels.xyz").read_bytes()
    report_run(tmp_path, collect.run_recipe(tmp_path))
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["ended"] == "not finished" and "can be resumed" in record["answers"][KEYS[0]]
    assert (tmp_path / "labels.xyz").read_bytes() == before


def one_frame_less(data: bytes) -> bytes:
    return data[: data.rindex(b"\n4\n") + 1]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("labels.xyz", one_frame_less, "labels, of "),
        ("labels.xyz", lambda data: data[:-30], "labels, of "),
        ("labels.xyz", lambda data: data.replace(b"energy=-", b"energy=", 1), "frame 0 (.*) was altered"),
        ("labels.xyz", lambda data: b"", "labels, of "),
        ("log.jsonl", lambda data: data[: len(data) // 2], "log.jsonl: is shorter than the run left it"),
        ("trajectory.xyz", lambda data: data[:-40], "trajectory.xyz: is shorter than the run left it"),
    ],
)
def test_a_run_whose_files_were_altered_has_none(name, change, said, run, tmp_path, capsys):
    """As --resume refuses them."""
    shutil.copytree(run[0], tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_bytes(change(path.read_bytes()))
    assert main.main(["report", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(said, " ".join(error.split())), error


def test_an_unfinished_frame_beyond_the_checkpoint_is_left_out(run, tmp_path):
    """The run may be writing it."""
    folder = tmp_path / "out"
    shutil.copytree(run[0], folder)
    data = (folder / "labels.xyz").read_bytes()
    (folder / "labels.xyz").write_bytes(data + b"4\nenergy=1")
    with pytest.warns(DataWarning, match="ends with an unfinished frame, which is left out"):
        entries, _ = collect.read_labels(folder)
    assert len(entries) == len(LabelFile(run[0] / "labels.xyz"))


def test_a_run_of_before_json_times_and_causes_has_the_same_page(run, tmp_path):
    """What the log now says in fields was read from sentences and from run.log before."""
    folder, recipe, last = run
    for name in ("labels.xyz", "model.gpmlp", "log.jsonl", "trajectory.xyz", "run.log", "checkpoint.gpmlp-run"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    events = collect.read_events(folder / "log.jsonl")
    old = [{k: v for k, v in e.items() if k not in ("cause", "first", "ended")} for e in events]
    assert events != old and (folder / "times.jsonl").exists()
    entries, refused = collect.read_labels(folder)
    now, before = (
        collect.collect_run(path, recipe, lines, entries, refused, last.model.potential)
        for path, lines in ((folder, events), (tmp_path, old))
    )
    assert (now.ended, now.began, now.ended_at) == (before.ended, before.began, before.ended_at)
    assert now.ended == "steps" and len(now.began) == len("2026-01-02 03:04")
    assert [(x.key, x.cause, x.attempts) for x in now.labels] == [(x.key, x.cause, x.attempts) for x in before.labels]
    seconds = np.array([[x.seconds for x in data.labels] for data in (now, before)])
    np.testing.assert_allclose(seconds[0], seconds[1], rtol=1e-2)  # the text has three digits
    np.testing.assert_array_equal([x.bound for x in now.labels], [x.bound for x in before.labels])


def test_times_that_a_kill_cut_short_are_left_out(tmp_path):
    lines = [
        '{"event": "labelled", "time": "2026-01-02 03:04:05", "key": "a", "seconds": 2.5, "attempts": 1}',
        '{"event": "lab',
    ]
    (tmp_path / "times.jsonl").write_text("\n".join([*lines, lines[0].replace("03:04", "04:05")]) + "\n")
    times = collect.read_times(tmp_path, [{"event": "learned", "first": []}])
    assert [t["time"][11:16] for t in times] == ["03:04", "04:05"]


def test_no_run_no_page(tmp_path):
    with pytest.raises(UserError, match="holds no learning run"):
        collect.run_recipe(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    recipe = LearnRecipe.model_validate(
        {"start": "a", "oracle": {"calculator": "emt"}, "dynamics": {"temperature_K": 1}}
    )
    with pytest.raises(UserError, match="has no labels yet"):
        report_run(tmp_path, recipe)


def test_reasons_are_recognised(run):
    """The words that criteria give, sorted by what made them."""
    student = run[2].model
    atoms = ase.build.bulk("Al", cubic=True)
    atoms.rattle(0.4, seed=1)
    structure = structures_from_ase([atoms], ["far off"])
    prediction = student.potential(structure, ("atom_energies", "forces"), novelty=True)

    def why(**limits) -> str:
        trigger = TriggerRecipe(**({"force": None, "novelty": None, "guards": {"distance": 0.01}} | limits))
        found = trigger_limits(trigger, 1.0, 4, {"forces": 0.01}, Calibration.identity())
        return triggers.trigger_decision(prediction, structure, found).reason

    assert collect.label_cause(why(force=1e-3, halt=1e9)) == "force"
    assert collect.label_cause("halted: " + why(force=1e-3)) == "force, halted"
    assert collect.label_cause(why(local_energy=1e-9)) == "local energy"
    assert collect.label_cause(why(novelty=1e-3)) == "novelty"
    assert collect.label_cause(why(force=1e-3, novelty=1e-3, halt=1e9)) == "force and novelty"
    close = triggers.broken_guard(prediction, structure, TriggerRecipe(guards={"distance": 3}).guards)
    assert collect.label_cause("halted: " + close.reason) == "guard"
    hot = triggers.broken_guard(
        prediction, structure, TriggerRecipe(guards={"distance": 0.01}).guards, StepContext(None, 300, 1e5)
    )
    assert collect.label_cause("halted: " + hot.reason) == "guard"
    assert [collect.label_cause(r) for r in ("first structure 1 of 4", "given", "explored: rare around atom 0")] == [
        "first",
        "given",
        "explored",
    ]
