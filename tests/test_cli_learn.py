"""gpmlp learn on the command line: what it says, how it ends, how it goes on."""

from __future__ import annotations

import io
import os
import re
import signal
import sys

import ase.build
import ase.io
import pytest
from rich.console import Console

from gpmlp.cli import main, progress
from gpmlp.io.recipe_files import load_recipe_as
from gpmlp.learning import loop, walker_state
from gpmlp.learning.recipe import LearnRecipe

RECIPE = """\
start: start.xyz
oracle: {calculator: emt, executor: inline}
dynamics: {temperature_K: 300, steps: 30, timestep_fs: 4}
trigger: {every: 10}
stop: {every_frames: 2, at_least_steps: 0}
model: {descriptor: {n_max: 3, l_max: 2, cutoff: 4.0}, inducing: {n: 20, gradients: 1}}
bootstrap: {n: 3, displacement_A: 0.05}
output: out
thin: 10
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe beside its start: four atoms of aluminium, and an oracle that costs nothing."""
    ase.io.write(tmp_path / "start.xyz", ase.build.bulk("Al", cubic=True))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def changed(path, before: str, after: str):
    """The recipe with one text in it replaced."""
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    return path


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_run_and_going_on(recipe, capsys):
    assert main.main(["learn", str(recipe), "--no-report"]) == 0
    said = capsys.readouterr()
    table = words(said.out)
    assert "why it stopped all 30 steps of 1 walker(s) are made; it is not converged" in table
    labels, asked = re.search(r"labels (\d+): 3 to begin with, (\d+) asked for", table).groups()
    assert int(labels) == 3 + int(asked)
    assert "coverage cannot be judged yet: " in table and f"model {recipe.parent / 'out' / 'model.gpmlp'}" in table
    model = recipe.parent / "out" / "model.gpmlp"
    assert main.main(["info", str(model)]) == 0
    about = words(capsys.readouterr().out)
    assert (
        re.search(r"data \d+ labels of emt, learned on the fly (calibrated on .*)?made by gpmlp", about)
        and "columns" in about
    )
    lines = said.err.splitlines()
    assert lines[:3] == [f"label {k}: first structure {k} of 3" for k in (1, 2, 3)]
    names = {path.name for path in (recipe.parent / "out").iterdir()}
    assert {"labels.xyz", "model.gpmlp", "log.jsonl", "run.log", "trajectory.xyz", "recipe.json"} <= names
    assert "report" not in names

    assert main.main(["learn", str(recipe), "--no-report"]) == 2
    assert "out: holds a run already; go on with it (--resume), or choose another output." in words(
        capsys.readouterr().err
    )

    assert main.main(["learn", str(recipe), "--no-report", "--resume"]) == 0
    said = capsys.readouterr()
    assert "finished: the run in" in said.err and "had stopped already, and nothing was done" in words(said.err)
    assert "why it stopped all 30 steps" in words(said.out) and "noise" not in said.out

    arguments = ["learn", str(recipe), "--no-report", "--resume", "--set", "dynamics.steps=50"]
    assert main.main(arguments) == 0
    said = capsys.readouterr()
    assert "all 50 steps" in words(said.out)
    assert "first structure" not in said.err  # nothing is told twice


def test_the_bar_fits(recipe, monkeypatch):
    """Nothing is cut off on a terminal of 80 columns, and only the note on a wide one."""
    chosen = load_recipe_as(LearnRecipe, recipe)
    states = list(loop.learn(chosen, recipe.parent))
    for width in (80, 120):
        file = io.StringIO()
        terminal = Console(file=file, force_terminal=True, width=width, soft_wrap=True)
        monkeypatch.setattr(progress, "standard_error", lambda terminal=terminal: terminal)
        show = progress.LearningBar(chosen)
        drawn = []
        for state in states:
            show(state)
            with terminal.capture() as capture:
                terminal.print(show.bar.get_renderable())
            drawn.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get()).strip("\n"))
        assert max(map(len, drawn)) <= width
        assert not any("\n" in line for line in drawn)
        numbers = [line for line in drawn if "step" in line]
        assert numbers and all(re.search(r"error [\d.e-]+/[\d.]+", line) for line in numbers)
        assert all(re.search(r"step \d+ +\d+ K .* novelty [\d.]+ +labels \d+", line) for line in numbers)


WRONG = {
    "a missing start": (("start.xyz", "none.xyz"), "none.xyz: there is no such file"),
    "an unknown key": (("every: 10", "evry: 10"), "unknown key 'trigger.evry'. Perhaps you meant 'trigger.every'"),
    "no oracle": (("oracle: {calculator: emt, executor: inline}\n", ""), "`oracle` is missing and has to be given"),
    "an unknown oracle": (
        ("calculator: emt", "calculator: emtt"),
        "there is no calculator 'emtt'. Perhaps you meant 'emt'",
    ),
    "no dynamics": (
        ("dynamics: {temperature_K: 300, steps: 30, timestep_fs: 4}\n", ""),
        "has neither `dynamics` (molecular dynamics that learns) nor `reactions`",
    ),
    "a bad value": (("steps: 30", "steps: 0"), "`dynamics.steps` must be at least 1; got 0"),
    "a list that is too long": (
        ("temperature_K: 300", "temperature_K: [1, 2, 3]"),
        "`dynamics.temperature_K` must be a list of 2 values or a valid number; got [1, 2, 3].",
    ),
    "an infinite temperature": (
        ("temperature_K: 300", "temperature_K: .inf"),
        "`dynamics.temperature_K` must be a finite number",
    ),
    "an infinite pressure": (("steps: 30", "pressure_GPa: .inf"), "`dynamics.pressure_GPa` must be a finite number"),
    "no pressure": (("steps: 30", "pressure_GPa: .nan"), "`dynamics.pressure_GPa` must be a finite number"),
    "a ramp to nowhere": (
        ("steps: 30", "pressure_GPa: [0, .inf]"),
        "`dynamics.pressure_GPa.1` must be a finite number; got inf",
    ),
    "a trigger that asks for nothing": (
        ("trigger: {every: 10}", "trigger: {every: 10, force: null, novelty: null}"),
        "trigger: force, local_energy and novelty are all null, so that nothing would ever be asked",
    ),
    "a pressure without a barostat": (
        ("steps: 30", "steps: 30, pressure_GPa: 1"),
        "dynamics: pressure_GPa has no meaning with ensemble nvt",
    ),
    "a shape of a cell that is kept": (("steps: 30", "steps: 30, cell: full"), "dynamics: cell has no meaning with"),
    "a ramp that is too long": (
        ("temperature_K: 300", "temperature_K: [300, 600], ramp_steps: 31"),
        "dynamics: ramp_steps 31 are more than all steps, 30",
    ),
    "a pair that is not there": (
        ("every_frames: 2", "every_frames: 2, observable: {name: rdf, pair: O-H}"),
        "radial distribution (rdf): start 0 has no pair O-H",
    ),
    "too few labels to begin with": (
        ("every_frames: 2", "every_frames: 2, labels_at_most: 1"),
        "stop.labels_at_most: a model is made from two labels at least",
    ),
    "a contradiction": (("temperature_K: 300", "temperature_K: [300, 600], ensemble: nve"), "nve has no thermostat"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_the_user_are_one_message(name, recipe, capsys):
    (before, after), expected = WRONG[name]
    assert main.main(["learn", str(changed(recipe, before, after))]) == 2
    said = words(capsys.readouterr().err)
    assert expected in said and said.count("error:") == 1 and "Traceback" not in said
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("class Broken(:", "'wrong_oracle:Own' cannot be imported: SyntaxError: invalid syntax"),
        ("1 / 0", "'wrong_oracle:Own' cannot be imported: ZeroDivisionError: division by zero; correct the module."),
        ("raise SystemExit(3)", "'wrong_oracle:Own' cannot be imported: SystemExit: 3"),
        (
            "class Own:\n    label = None\n    def __init__(self, argument): ...\n    def calculate(self): ...",
            "TypeError: Own.__init__() missing 1 required positional argument: 'argument'.",
        ),
    ],
)
def test_modules_of_the_user_that_are_wrong(text, expected, recipe, capsys, monkeypatch):
    (recipe.parent / "wrong_oracle.py").write_text(text)
    monkeypatch.syspath_prepend(recipe.parent)
    monkeypatch.delitem(sys.modules, "wrong_oracle", raising=False)
    assert main.main(["learn", str(changed(recipe, "calculator: emt", "calculator: 'wrong_oracle:Own'"))]) == 2
    said = words(capsys.readouterr().err)
    assert expected in said and ".." not in said and said.count("error:") == 1
    sys.modules.pop("wrong_oracle", None)


def test_a_keyword_that_means_nothing(recipe, capsys):
    assert main.main(["learn", str(recipe), "--set", "oracle.kwargs={wibble: true}"]) == 2
    assert "oracle: emt knows no kwargs.wibble; it takes asap_cutoff." in words(capsys.readouterr().err)


def test_pressure_of_what_has_none(recipe, capsys):
    """It is told before a label is paid for."""
    atoms = ase.build.bulk("Al", cubic=True)
    atoms.pbc = False
    ase.io.write(recipe.parent / "start.xyz", atoms)
    for name, said in {"pressure": "observable 'pressure'", "rdf": "radial distribution (rdf)"}.items():
        more = f"stop.observable={{name: {name}}}"
        assert main.main(["learn", str(recipe), "--set", more]) == 2
        assert said in words(capsys.readouterr().err)
        assert not (recipe.parent / "out").exists()


def test_modules_beside_the_recipe(recipe, capsys, monkeypatch, tmp_path_factory):
    """Of oracles and observables, wherever the command is started; as all files of the recipe."""
    (recipe.parent / "beside_it.py").write_text(
        "from ase.calculators.emt import EMT\n\n\nclass Own(EMT):\n    pass\n\n\ndef volume(atoms):\n    return atoms.get_volume()\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    changed(recipe, "every_frames: 2", "every_frames: 2, observable: {name: 'beside_it:volume'}")
    assert (
        main.main(["learn", str(changed(recipe, "calculator: emt", "calculator: 'beside_it:Own'")), "--no-report"]) == 0
    )
    assert "beside_it:volume" in (recipe.parent / "out" / "log.jsonl").read_text()
    sys.modules.pop("beside_it")


def test_dynamics_that_cannot_be_kept_stable(recipe, capsys, monkeypatch):
    """No success: the table says how far it came, the status that something has to be done."""
    monkeypatch.setattr(walker_state, "MOST_SETBACKS", 2)
    monkeypatch.setattr(loop, "MOST_RESTARTS", 1)
    arguments = ["learn", str(recipe), "--no-report", "--set", "trigger.guards.temperature=0.01"]
    for more in ([], ["--resume"]):
        assert main.main(arguments + more) == 2
        said = capsys.readouterr()
        assert "error:" in said.err and "the run ended early: a walker could not be kept stable" in words(said.err)
        assert "why it stopped" in words(said.out)


def test_a_start_without_atoms(recipe, capsys):
    (recipe.parent / "start.xyz").write_text("0\n\n")
    assert main.main(["learn", str(recipe)]) == 2
    assert "start.xyz: frame 0 has no atoms" in words(capsys.readouterr().err)


def test_set_is_checked_as_the_file_is(recipe, capsys):
    assert main.main(["learn", str(recipe), "--set", "trigger.probability=2"]) == 2
    assert "`trigger.probability` must be less than 1; got 2" in words(capsys.readouterr().err)


def test_a_recipe_that_is_not_there(tmp_path, capsys):
    assert main.main(["learn", str(tmp_path / "none.yaml")]) == 2
    assert "the recipe cannot be read" in words(capsys.readouterr().err)


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_interrupted(how, recipe, capsys, monkeypatch):
    closed = []

    def interrupted(*_):
        try:
            if how == "SIGTERM":  # as a batch system ends a job
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise KeyboardInterrupt
            yield
        finally:
            closed.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "learn", interrupted)
    assert main.main(["learn", str(recipe), "--set", "output=el se"]) == 130
    assert f"interrupted; go on with: gpmlp learn {recipe} '--set=output=el se' --resume" in words(
        capsys.readouterr().err
    )
    assert main.main(["learn", str(recipe), "--resume"]) == 130
    assert "there is nothing to resume, a new run begins" in words(capsys.readouterr().err)
    assert closed and signal.getsignal(signal.SIGTERM) == before


def test_the_page_of_a_run_whose_novelty_limit_follows_from_the_coverage(recipe, tmp_path):
    """In its folder all keys are given, those that were left out too."""
    changed(recipe, "at_least_steps: 0}", "at_least_steps: 0, coverage: {far: 1.5}}")
    assert main.main(["learn", str(recipe), "--no-report"]) == 0
    assert main.main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "index.html").exists()


def test_report_of_a_folder_needs_nothing_else(tmp_path, capsys):
    assert main.main(["report", str(tmp_path), "data.xyz"]) == 2
    assert "leave out DATA and --output" in words(capsys.readouterr().err)
    assert main.main(["report", str(tmp_path)]) == 2
    assert "holds no learning run" in words(capsys.readouterr().err)
    assert main.main(["report", str(tmp_path / "typo")]) == 2
    assert "there is no such file or folder" in words(capsys.readouterr().err)
    (tmp_path / "model.gpmlp").write_text("")
    assert main.main(["report", str(tmp_path / "model.gpmlp")]) == 2
    assert "needs DATA and --output" in words(capsys.readouterr().err)
