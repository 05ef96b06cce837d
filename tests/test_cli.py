"""The command line: files it writes, exit status, and one clear message for each mistake."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import xml.dom.minidom

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from conftest import copper
from rich.console import Console

from gpmlp.__main__ import main as gpmlp_main
from gpmlp.cli import console, main
from gpmlp.io import archive, ase_atoms
from gpmlp.report.figures import Picture
from gpmlp.report.style import format_number

ERRORS = (
    "energy_mae_meV_per_atom",
    "energy_rmse_meV_per_atom",
    "force_mae_meV_per_A",
    "force_rmse_meV_per_A",
    "stress_mae_GPa",
    "stress_rmse_GPa",
)
QUICK = ["--set", "descriptor.cutoff=4", "--set", "descriptor.n_max=4", "--set", "descriptor.l_max=2"]
QUICK += ["--set", "inducing.n=10", "--set", "inducing.gradients=0"]


@pytest.fixture
def gpmlp(capsys):
    """Run a command: (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


# --- what it does


def test_observations_are_told_in_words():
    assert console.format_rows({"energies": 3, "given": 2}) == "3 energies, 2 with a noise of their own"
    terms = [{"name": "isolated_atoms", "energies": {"1": -1.5}, "open_directions": [{"1": 2.0}]}]
    assert console.chosen_baselines(terms) == [("isolated atoms", "H -1.5 eV; the data do not determine all of them")]


def test_fit_evaluate_report_info_cite(gpmlp, train_file, tmp_path, monkeypatch):
    model, result, predicted = tmp_path / "m.gpmlp", tmp_path / "e.json", tmp_path / "p.xyz"
    status, out, err = gpmlp("fit", train_file, "--valid", train_file, *QUICK, "-o", model)
    assert status == 0, err
    assert "observations" in out and "validation MAE" in out and f"wrote {model}" in out
    assert "covariances: " in err  # one line for each stage where there is no terminal

    status, out, err = gpmlp("evaluate", model, train_file, "--json", result, "--xyz", predicted)
    assert status == 0, err
    assert "warning: " in err and "is the file this model was trained on" in err
    assert "meV/atom" in out and "big" in out and "small" in out
    assert "inside conformal intervals of 50 / 68 / 90 / 95 %" in " ".join(out.split())
    numbers = json.loads(result.read_text())
    scored = {
        f"{kind}_{score}"
        for kind in ("energy", "force")
        for score in ("coverage_90", "nll", "crps", "ence", "spearman")
    }
    assert {*ERRORS, *scored, "n_structures", "n_atoms", "by_config_type"} <= set(numbers)
    assert (numbers["n_structures"], numbers["n_atoms"]) == (16, 96)
    monkeypatch.setattr(
        "gpmlp.report.model.figures.draw_picture", lambda *_, **__: Picture(b"<svg/>", b"", "a figure", 1.0)
    )
    status, out, err = gpmlp("report", model, train_file, "-o", tmp_path / "report")
    assert status == 0, err
    assert "is the file this model was trained on" in err
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "trained on" in record["answers"]["How wrong is it?"]
    overall = record["errors"]["overall"]
    assert {key: overall[key] for key in ERRORS} == pytest.approx({key: numbers[key] for key in ERRORS})
    assert record["dimers"][0]["energy"][-1] == pytest.approx(0, abs=1e-9)  # less the free atoms, beyond the cutoff
    assert record["rank_correlation"]["forces"]["spearman_of_atoms"] == pytest.approx(numbers["force_spearman"])
    assert set(numbers["by_config_type"]) == {"big", "small"}
    assert numbers["by_config_type"]["big"]["n_structures"] == 8
    frames = ase.io.read(predicted, ":")
    differences = [f.info["gpmlp_energy"] / len(f) - f.get_potential_energy() / len(f) for f in frames]
    assert 1e3 * np.abs(differences).mean() == pytest.approx(numbers["energy_mae_meV_per_atom"], rel=1e-6)
    forces = np.concatenate([(f.arrays["gpmlp_forces"] - f.get_forces()).ravel() for f in frames])
    assert 1e3 * np.sqrt((forces**2).mean()) == pytest.approx(numbers["force_rmse_meV_per_A"], rel=1e-4)

    status, out, _ = gpmlp("info", model)
    assert status == 0 and "Cu" in out and "training train.xyz" in out and "n_max: 4" in out
    said = " ".join(out.split())
    assert "mean exact" in said
    assert "ZBL fades out Cu-Cu " in said and re.search(r"isolated atoms Cu -?[\d.]+ eV", said) and "null" in said
    status, out, _ = gpmlp("info", model, "--json")
    content = json.loads(out)
    assert content["header"]["recipe"]["seed"] == 0
    assert len(content["header"]["provenance"]["files"]["training"]["sha256"]) == 64
    assert content["header"]["report"]["rows"]["energies"] == 16

    status, out, _ = gpmlp("cite", model)
    assert status == 0
    assert "Bartok2013" in out and "Ziegler1985" in out and "Himanen2020" not in out


def test_structures_that_calibrated_are_known_again(gpmlp, tmp_path, monkeypatch):
    """In another file, with other names and digits: evaluate and report say that they are no test."""
    frames = [copper(100 + seed) for seed in range(24)]
    model, train, other = tmp_path / "m.gpmlp", tmp_path / "train.xyz", tmp_path / "other.xyz"
    ase_atoms.write_frames(train, frames)
    assert gpmlp("fit", train, *QUICK, "--set", "noise.energy_per_atom.bounds=[0.5,0.9]", "-o", model)[0] == 0
    source = archive.read_header(model)["header"]["calibration"]["source"]
    assert source["held_out_structures"] == len(source["fingerprints"]) == 24
    numbers = [int(name.split("frame ")[1]) for name in source["names"]]
    held = [frames[i].copy() for i in numbers]
    for frame, i in zip(held, numbers, strict=True):
        frame.positions = frame.positions.round(7)
        frame.calc = frames[i].calc
    ase_atoms.write_frames(other, [*held, copper(300), copper(301)])

    status, _, err = gpmlp("evaluate", model, other, "--no-variance")
    assert status == 0 and "other.xyz: 24 of 26 structures are among those from which this model" in " ".join(
        err.split()
    )
    monkeypatch.setattr(
        "gpmlp.report.model.figures.draw_picture", lambda *_, **__: Picture(b"<svg/>", b"", "a figure", 1.0)
    )
    assert gpmlp("report", model, other, "-o", tmp_path / "report")[0] == 0
    record = json.loads((tmp_path / "report" / "report.json").read_text())
    assert record["answers"]["How wrong is it?"].startswith("Of these structures 24 of 26 are among those")
    assert "fingerprints" not in json.dumps(record)
    page = (tmp_path / "report" / "index.html").read_text()
    table = page[page.index("Calibration of the error bars") :]
    weights = archive.read_header(model)["header"]["calibration"]["kinds"]["forces"]["weights"]
    assert all(format_number(weight) in table for weight in weights) and "24 structures, 96 atoms, left out" in table

    ase_atoms.write_frames(other, [copper(300), copper(301)])
    status, _, err = gpmlp("evaluate", model, other, "--no-variance")
    assert status == 0 and "are among those" not in err
    said = " ".join(gpmlp("info", model)[1].split())
    digest = hashlib.sha256("".join(source["fingerprints"]).encode()).hexdigest()[:12]
    assert "warning noise.energy_per_atom ended at 0.9 eV/atom, the upper bound" in said
    assert "calibrated on 24 structures, 96 atoms, left out" in said and f"(sha256 of all {digest})" in said


def test_errors_without_labels_are_null(gpmlp, model_file, small_atoms, tmp_path):
    frames = [frame.copy() for frame in small_atoms[:2]]
    frames[0].info["energy"] = 0.0
    ase.io.write(tmp_path / "e.xyz", frames)
    status, out, _ = gpmlp("evaluate", model_file, tmp_path / "e.xyz", "--json", tmp_path / "e.json")
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert status == 0
    assert numbers["force_mae_meV_per_A"] is None and numbers["stress_rmse_GPa"] is None
    assert numbers["energy_mae_meV_per_atom"] > 0
    assert "- / -" in out


def test_json_to_standard_output(model_file, train_file):
    # in a process of its own: the capture of the tests stands in for standard output
    command = [sys.executable, "-m", "gpmlp", "evaluate", str(model_file), str(train_file), "--json", "/dev/stdout"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert '"energy_mae_meV_per_atom"' in run.stdout


def test_md_runs_and_resumes(gpmlp, model_file, train_file, tmp_path):
    trajectory, table = tmp_path / "t.xyz", tmp_path / "e.dat"
    common = ["md", model_file, train_file, "-o", trajectory, "--energies", table, "--timestep-fs", 2, "--interval", 2]
    status, out, err = gpmlp(*common, "--temperature-K", 200, "--steps", 4, "--ensemble", "nvt", "--seed", 3)
    assert status == 0, err
    assert "step 4" in out
    status, _, err = gpmlp(*common, "--steps", 6, "--resume")
    assert status == 0, err
    assert [f.info["step"] for f in ase.io.read(trajectory, ":")] == [0, 2, 4, 6]
    rows, frames = np.loadtxt(table), ase.io.read(trajectory, ":")
    assert rows[:, 0].tolist() == [0, 2, 4, 6]
    # unless told otherwise every 100 steps, of which only the first was made
    assert (rows[0, 7:] > 0).all() and np.isnan(rows[1:, 7:]).all()
    assert frames[0].info["gpmlp_largest_force_std"] == pytest.approx(rows[0, 7], rel=1e-5)
    assert f"largest std of a force {rows[0, 7]:.3g} eV/A (step 0, " in out
    status, out, err = gpmlp(*common, "--steps", 10, "--resume", "--uncertainty", 4)
    assert status == 0 and np.isfinite(np.loadtxt(table)[4:, 7:]).all(1).tolist() == [True, False]
    status, _, err = gpmlp(*common, "--steps", 12, "--resume", "--uncertainty", 3)
    assert status == 2 and "--uncertainty must be a multiple of the 2 steps" in " ".join(err.split())
    status, out, _ = gpmlp(*common, "--steps", 12, "--resume", "--uncertainty", 0)
    assert status == 0 and np.isnan(np.loadtxt(table)[6, 7:]).all() and "largest std" not in out
    status, _, err = gpmlp(*common, "--steps", 12, "--resume")
    assert status == 0 and "reached already" in err
    status, _, err = gpmlp(*common, "--steps", 6, "--temperature-K", 200)
    assert status == 2 and "exists; continue that run with --resume" in err


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command 'bogus'. Try 'gpmlp --help'"),
        (["evaluat"], "No such command 'evaluat'. Did you mean 'evaluate'? Try 'gpmlp --help'."),
        (["fit"], "Missing argument"),
        (["fit", "none.xyz", "-o", "m"], "none.xyz: there is no such file"),
        (["fit", "none.xyz", "-o", "no/where/m"], "does not exist; make it first"),
        (["fit", "none.xyz", "-o", "m", "--set", "kernel.zta=2"], "Perhaps you meant 'kernel.zeta'"),
        (
            ["fit", "none.xyz", "-o", "none.xyz"],
            "is to be written as the model (--output), but is the training data too",
        ),
        (["fit", "none.xyz", "-o", "m", "--recipe", "none.yaml"], "none.yaml: the recipe cannot be read"),
        (["info", "none.gpmlp"], "none.gpmlp: there is no such file"),
        (["evaluate", "none.gpmlp", "none.xyz", "--json", "no/e.json"], "does not exist; make it first"),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--steps", "many"], "'--steps'"),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--ensemble", "npt"], "'--ensemble'"),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--ensemble", "nvt"], "--temperature-K must be given"),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--steps", "-1"], "--steps must be zero or positive; got -1"),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--resume", "--overwrite"], "give one of them"),
        (
            ["md", "m", "s.xyz", "-o", "m", "--overwrite"],
            "m: is to be written as the trajectory (--output), but is the model",
        ),
        (
            ["md", "m", "s.xyz", "-o", "t.xyz", "--energies", "t.xyz"],
            "but is the trajectory (--output) too; give the table",
        ),
        (["md", "m", "s.xyz", "-o", "t.xyz", "--energies", "s.xyz", "--resume"], "but is the start too"),
        (
            ["evaluate", "m", "s.xyz", "--json", "s.xyz"],
            "s.xyz: is to be written as the errors (--json), but is the data too",
        ),
        (
            ["evaluate", "m", "s.xyz", "--xyz", "./m"],
            "m: is to be written as the predictions (--xyz), but is the model too",
        ),
        (
            ["evaluate", "m", "s.xyz", "--json", "e", "--xyz", "e"],
            "e: is to be written as the predictions (--xyz), but is the errors",
        ),
        (
            ["report", "m", "s.xyz", "-o", "s.xyz"],
            "s.xyz: is to be written as the report (--output), but is the data too",
        ),
        (["report", "m", "s.xyz", "-o", "there/is/a"], "a file; choose another place"),
    ],
)
def test_mistakes_are_one_line_and_status_2(gpmlp, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    status, out, err = gpmlp(*arguments)
    assert status == 2
    assert message in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert out == "" and "Traceback" not in err


def test_links_do_not_hide_an_input(gpmlp, model_file, train_file, tmp_path):
    data, soft, hard = tmp_path / "data.xyz", tmp_path / "soft.xyz", tmp_path / "hard.xyz"
    data.write_bytes(train_file.read_bytes())
    soft.symlink_to(data)
    hard.hardlink_to(data)
    for option, path in (("--xyz", soft), ("--json", hard)):
        status, _, err = gpmlp("evaluate", model_file, data, option, path)
        assert status == 2 and "but is the data too" in err
    assert data.read_bytes() == train_file.read_bytes()


@pytest.mark.parametrize("wrong", ["options", "species", "overlap", "velocities"])
def test_a_failed_md_touches_no_files(gpmlp, model_file, tmp_path, wrong):
    start = {
        "species": ase.build.bulk("Ag", cubic=True),
        "overlap": ase.Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 0.1]]),
    }.get(wrong, ase.build.bulk("Cu", cubic=True))
    ase.io.write(tmp_path / "start.xyz", start)
    old = tmp_path / "old.xyz"
    old.write_text("old")
    run = ["md", model_file, tmp_path / "start.xyz", *(["--interval", 0] if wrong == "options" else [])]
    run += [] if wrong in ("velocities", "species") else ["--temperature-K", 300]  # the species is said first
    for files in (["-o", tmp_path / "new.xyz", "--energies", tmp_path / "new.dat"], ["-o", old, "--overwrite"]):
        status, _, err = gpmlp(*run, *files)
        assert status == 2, err
        assert err.count("\n") == 1
    if wrong == "velocities":
        assert "give a temperature to draw them at, --temperature-K." in err
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.xyz", "start.xyz"]


def test_no_command_shows_the_help(gpmlp):
    status, out, err = gpmlp()
    assert status == 2
    assert "evaluate" in out + err and "Traceback" not in err


def test_version_and_help(gpmlp):
    assert gpmlp("--version")[:2][1].startswith("gpmlp ")
    status, out, _ = gpmlp("md", "--help")
    assert status == 0 and "--temperature-K" in out


def test_our_faults_are_status_1(gpmlp, monkeypatch, model_file):
    def broken(path):
        raise RuntimeError("a wheel came off")

    monkeypatch.setattr(archive, "read_header", broken)
    monkeypatch.delenv(main.DEBUG, raising=False)
    status, _, err = gpmlp("info", model_file)
    assert status == 1
    assert "RuntimeError: a wheel came off. This is a fault of gpmlp" in err and "Traceback" not in err
    status, _, err = gpmlp("info", model_file, "--debug")
    assert status == 1 and "Traceback" in err
    monkeypatch.setenv(main.DEBUG, "1")
    assert "Traceback" in gpmlp("info", model_file)[2]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt, 130),
        (MemoryError, 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to"
            ),
            1,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 800 bytes."), 1),
    ],
)
def test_interruption_and_memory(gpmlp, monkeypatch, model_file, error, status):
    def stop(path):
        raise error

    monkeypatch.setattr(archive, "read_header", stop)
    got, _, err = gpmlp("info", model_file)
    assert got == status
    assert err.count("\n") == 1
    assert status == 130 or ("out of memory; lower memory_GB" in err and "smaller descriptor.cutoff" in err)


def test_interruption_while_importing(monkeypatch, capsys):
    class Interrupts:
        def find_spec(self, name, *_):
            if name == "gpmlp.cli":
                raise KeyboardInterrupt

    monkeypatch.delattr("gpmlp.cli")
    monkeypatch.delitem(sys.modules, "gpmlp.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert gpmlp_main() == 130
    assert capsys.readouterr().err == "error: interrupted before anything was done.\n"


def test_warnings_are_one_line_on_standard_error(gpmlp, model_file, small_atoms, tmp_path):
    frame = small_atoms[0].copy()
    frame.rattle(0.02, seed=1)  # not one that the error bars were calibrated on
    frame.info |= {"energy": 1.0, "free_energy": 2.0}
    ase.io.write(tmp_path / "w.xyz", frame)
    status, out, err = gpmlp("evaluate", model_file, tmp_path / "w.xyz")
    assert status == 0
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "w.xyz frame 0: `free_energy` and `energy` differ by 0.25 eV/atom" in line
    assert "warning" not in out


def test_an_interrupted_fit_leaves_the_old_model(gpmlp, monkeypatch, train_file, tmp_path):
    model = tmp_path / "m.gpmlp"
    model.write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ase_atoms, "from_frames", interrupted)
    assert gpmlp("fit", train_file, *QUICK, "-o", model)[0] == 130
    assert model.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.gpmlp"]


# --- what it shows


@pytest.fixture
def bars(monkeypatch):
    """Run Stages on a terminal of so many columns, with these reports, and return the lines left on it."""

    def shown(width: int, *reports: tuple) -> list[str]:
        screen = io.StringIO()
        terminal = Console(file=screen, force_terminal=True, width=width, highlight=False)
        monkeypatch.setattr(console, "standard_error", lambda: terminal)
        with console.StageBars() as stages:
            for report in reports:
                stages(*report)
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
        return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]

    return shown


@pytest.mark.parametrize("width", [80, 120])
def test_a_long_note_gives_way_to_bar_and_time(bars, width):
    note = "-log evidence -12345; energies 0.0123, forces 0.123, stresses 0.00123, and so on " * 2
    last = bars(width, ("inducing points", 1, 1, "greedy"), ("evidence", 3, 4, note))[-1]
    assert re.search(r"evidence +━+.* 75% \d:\d\d:\d\d -log evidence -12345.*…$", last)
    assert width - 2 <= len(last) <= width


def test_stages_last_from_the_end_of_the_one_before(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with console.StageBars() as stages:
        # done twice: a stage may find more to do
        for seconds, report in ((2, ("a", 1, 1)), (3, ("a", 0, 1)), (4, ("a", 1, 1, "note")), (8, ("b", 1, 1))):
            now[0] += seconds
            stages(*report)
    assert capsys.readouterr().err.splitlines() == ["a: 9.0 s note", "b: 8.0 s"]


@pytest.mark.parametrize(
    ("value", "text"), [(5000.0, "5000"), (1234.5, "1234"), (999.7, "1000"), (0.01234, "0.0123"), (5e7, "5e+07")]
)
def test_numbers_of_tables(value, text):
    assert console.format_number(value) == text
    assert console.format_number(float("nan")) == console.format_number(None) == "-"


@pytest.mark.parametrize(("cell", "said"), [(None, "has no cell"), ([9.0, 9.0, 9.0], "has a cell, but pbc is F F F")])
def test_md_says_what_a_start_without_periodicity_means(gpmlp, model_file, tmp_path, cell, said):
    ase.io.write(tmp_path / "start.xyz", ase.Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]], cell=cell))
    status, _, err = gpmlp(
        "md", model_file, tmp_path / "start.xyz", "-o", tmp_path / "md.xyz", "--temperature-K", 100, "--steps", 2
    )
    assert status == 0 and said in " ".join(err.split()) and "nve and nvt" in " ".join(err.split())
    ase.io.write(tmp_path / "start.xyz", ase.build.bulk("Cu", cubic=True))
    _, _, err = gpmlp(
        "md", model_file, tmp_path / "start.xyz", "-o", tmp_path / "two.xyz", "--temperature-K", 100, "--steps", 2
    )
    assert "empty space" not in err


NAMES = (
    "[red]x[/red]",
    ":smile:",
    "esc\x1b[31m",
    "[/]",
    "bell\x07",
    "<b>x</b>",
    "$\\frac{$",
    "a\u202eb",
    "[link=http://x]y",
)


def test_names_are_shown_as_they_are(gpmlp, model_file, small_atoms, tmp_path):
    """Neither markup, emoji codes nor terminal escapes in names are obeyed; figures and page stay whole."""
    frames = [frame.copy() for frame in small_atoms[: len(NAMES)]]
    for frame, labelled, name in zip(frames, small_atoms, NAMES, strict=False):
        frame.calc, frame.info["config_type"] = labelled.calc, name
    data = tmp_path / "[red]:smile:\x1b[31m.xyz"
    ase.io.write(data, frames, format="extxyz")
    status, out, err = gpmlp("evaluate", model_file, data)
    assert status == 0 and "\x1b" not in out + err and "\x07" not in out and "\u202e" not in out
    for name in ("[red]x[/red]", ":smile:", r"esc\x1b[31m", "[/]", "<b>x</b>", r"a\u202eb", "[link=http://x]y"):
        assert name in out
    status, _, err = gpmlp("info", data)
    assert status == 2 and r"[red]:smile:\x1b[31m.xyz: is not a gpmlp model file" in err
    status, out, _ = gpmlp("report", model_file, data, "-o", tmp_path / "page")
    assert status == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert not {c for c in page if ord(c) < 32 and c not in "\n\t"} and "\u202e" not in page and r"esc\x1b[31m" in page
    for picture in (tmp_path / "page" / "figures").glob("*.svg"):
        xml.dom.minidom.parse(str(picture))


def test_special_files_are_no_output(gpmlp, model_file, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", "/dev/zero"):
        status, _, err = gpmlp("fit", model_file, "-o", target)
        assert status == 2 and "is a device or a pipe; give the name of a file for the model" in " ".join(err.split())


def test_a_long_stage_is_not_silent_in_a_file(capsys, monkeypatch):
    now = iter([0.0, 0.0, 10.0, 35.0, 40.0, 70.0, 71.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    bars = console.StageBars()
    bars.begun = bars.last = bars.spoke = 0.0
    next(now)
    for k in range(4):
        bars("covariances", k, 8, f"{k} rows")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["covariances: 12 % after 35 s 1 rows", "covariances: 38 % after 70 s 3 rows"]
