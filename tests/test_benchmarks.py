"""The benchmarks of speed run, every part of them, at a tiny size; what takes turns does; what fails is said so. No time is asserted."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpmlp

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "stages", "scaling", "threads", "ase", "md", "variance", "precision", "start", "sigma", "reduced", "float32", "low_rank",
    "descriptors", "molecules", "peers", "known",
)  # fmt: skip
COLUMNS = 20


@pytest.fixture(scope="module")
def benchmarks():
    """Imports modules beside the benchmarks, which are scripts."""
    sys.path.insert(0, str(ROOT / "tests/benchmarks"))
    yield importlib.import_module
    sys.path.pop(0)


@pytest.fixture(scope="module")
def bursts(benchmarks):
    return benchmarks("bursts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


@pytest.fixture(scope="module")
def run(folder):
    """(record, output, errors) of all parts, with Pythons that have no peers, and an older file of results."""
    (folder / "speed.json").write_text(json.dumps({"md": "old", "another part": "kept"}))
    options = [
        "--work", folder, "--json", folder / "speed.json", "--zeta", 2, "--columns", COLUMNS, "--cells", 1, "--sizes", 1, 2,
        "--rounds", 2, "--seconds", 0.01, "--lammps-python", sys.executable, "--featomic-python", sys.executable,
        "--ace-python", sys.executable, "--nep-python", sys.executable,
    ]  # fmt: skip
    command = [sys.executable, "tests/benchmarks/speed.py", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "speed.json").read_text())
    assert record.pop("another part") == "kept"
    return record, done.stdout, done.stderr


@pytest.fixture(scope="module")
def results(run):
    return {name: part["result"] for name, part in run[0].items()}


def test_every_part_is_there(run):
    record, output, _ = run
    assert set(record) == set(PARTS)
    assert all(part["begun"] for part in record.values())
    assert all(f"\n{name.upper()} (" in output for name in PARTS)


def test_floors_are_those_of_the_formulas(results, folder):
    """Mean of rank k with D features: 4 k D; the whole is the sum of what stands before it."""
    machine = results["stages"]["zeta 2"]["machine"]
    stages = {stage["stage"]: stage for stage in results["stages"]["zeta 2"]["stages"]}
    features = 8 * 9 // 2 * 7
    kernel = stages["kernel, slope of the mean"]
    rank = gpmlp.load(folder / f"si_zeta2_{COLUMNS}.gpmlp").report["low_rank"]["rank"]["0:Si"]
    assert rank < COLUMNS and kernel["kflop"] == pytest.approx(4 * rank * features / 1e3)
    memory, gemm = kernel["kB"] / machine["memory"], kernel["kflop"] / machine["gemm"]
    assert kernel["floor"] == pytest.approx(max(memory, gemm))
    before = list(stages)[: list(stages).index("whole: energy, forces, stress")]
    assert len(before) == 6
    assert stages["whole: energy, forces, stress"]["floor"] == pytest.approx(sum(stages[n]["floor"] for n in before))
    assert all(0 < stage["least"] <= stage["median"] for stage in stages.values())
    assert len(results["molecules"]["floors"]["zeta 2"]["stages"]) == 9


def test_scaling_and_threads(results):
    one = results["scaling"]["zeta 2, std"]
    assert (
        one["atoms"] == [8, 64]
        and one["peak MB"][1] >= one["peak MB"][0] > 0
        and len(one["least"]) == 2
        and math.isfinite(one["slope"])
    )
    names = [call["case"] for call in results["threads"]["calls"]]
    assert names == ["zeta 2, 8 atoms", "zeta 2, 64 atoms", "zeta 2, std, 8 atoms", "zeta 2, ethanol_train"]
    (step,) = results["ase"]["calls"]
    assert step["case"] == "zeta 2, 8 atoms"
    for call in (*results["threads"]["calls"], step):
        low, middle, high = call["ratio"]
        assert 0 < low <= middle <= high and set(call["us"]) == {"1", "2"}
    assert results["threads"]["ceiling"]["zeta 2"][1] > 0


def test_ways_beside_the_usual_one(results):
    """All of them have two times and a ratio."""
    for part, names in {
        "sigma": ["mean", "with std"],
        "float32": ["float64", "float32"],
        "low_rank": ["low rank", "exact"],
    }.items():
        found = results[part]["of"]
        assert list(found) == ["si, zeta 2", "ethanol_train, zeta 2"]
        for one in found.values():
            assert list(one["us"]) == names and 0 < one["ratio"][0] <= one["ratio"][1] <= one["ratio"][2]
    assert not results["reduced"]["of"]  # of models of so few columns


def test_new_processes(results):
    """Python alone is part of the help."""
    found = results["start"]["of"]
    assert found["Python alone"][0] < found["gpmlp --help, the whole process"][0] and len(found) == 9
    assert all(0 < least <= median for least, median in found.values())


def test_dynamics_search_again(results):
    """64 atoms at 600 K of a model of 20 columns; searches are counted, so far fewer than steps."""
    runs = results["md"]["of"]
    assert [(r["atoms"], r["std"]) for r in runs] == [(8, False), (8, True), (64, False), (64, True)]
    assert all(0 <= r["searches"] < r["steps"] and r["steps per s"] > 0 for r in runs)


def test_errors_of_fast_paths(results):
    """Blocks of 20 columns are in double precision throughout: rounding, times what whitening makes of it."""
    found = results["variance"]["errors"]
    assert [e["of"] for e in found][:3] == ["training", "test", "crystal of 216 atoms"] and len(found) == 6
    assert all(0 < e["median"] <= e["99 %"] <= e["largest"] < 1e-8 for e in found)
    single, kernels, stepped, _ = results["precision"]["of"]
    assert 1e-6 < single["force max, meV/A"] < 0.1 and 1e-9 < single["local std, relative"] < 1e-3
    assert single["force std, relative"] < 1e-3
    assert kernels["energy max, meV/atom"] > single["energy max, meV/atom"] and "local std, relative" not in kernels
    assert stepped["force max, meV/A"] < 1e-6


def test_peers_that_fail_are_left_out_and_said_so(run, results):
    _, _, errors = run
    assert set(results["peers"]["of"]) == {"zeta 2", "zeta 2, std", "SNAP", "quadratic SNAP"}
    assert "is left out: ended with status 1: " in errors
    assert all(f"No module named '{name}'" in errors for name in ("featomic", "jax", "calorine"))
    assert set(results["known"]["of"]) == {"zeta 2"}
    described = results["descriptors"]["of"]
    assert set(described) == {"values", "and pulled back", "dscribe, values"}
    assert described["values"]["ratios"]["values"] == [1, 1, 1]
    assert described["dscribe, values"]["least"] > 0


def test_a_gap_needs_gap_fit(benchmarks, tmp_path):
    case = benchmarks("speed_cases").silicon_case(1, COLUMNS, tmp_path)
    with pytest.raises(SystemExit, match="there is no gap_fit beside it; pip install quippy-ase there"):
        case.peer(tmp_path / "python")


def test_the_figure_is_drawn(run, tmp_path):
    path, figure = tmp_path / "speed.json", tmp_path / "speed.png"
    path.write_text(json.dumps(run[0]))
    command = [sys.executable, "docs/make_speed_figure.py", path, "--output", figure]
    subprocess.run(command, cwd=ROOT, check=True)
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_tables_are_written(run, tmp_path):
    """A section for each part, with a row for each contestant."""
    path, page = tmp_path / "speed.json", tmp_path / "speed.md"
    path.write_text(json.dumps(run[0]))
    subprocess.run([sys.executable, "docs/make_speed_tables.py", path, "--output", page], cwd=ROOT, check=True)
    text = page.read_text()
    assert all(f"`--parts {part}`" in text for part in run[0])
    for name, found in run[0]["peers"]["result"]["of"].items():
        assert f"| {name} | {found['least']:.3g} |" in text or f"| {name} | {found['least']:.0f} |" in text
    assert "nan" not in text


def test_contestants_take_turns(bursts):
    """One uncounted call each, then every round in order; ratios are of bursts side by side."""
    order: list[str] = []
    times = {"a": iter([[9.0], [1.0, 3.0], [2.0]]), "b": iter([[9.0], [4.0, 4.0], [2.0, 6.0]])}

    def contestant(name):
        def run(seconds):
            order.append(f"{name} {seconds}")
            return next(times[name])

        return run

    found = bursts.in_turn({name: contestant(name) for name in "ab"}, 2, 0.5)
    assert order == ["a 0.0", "b 0.0", "a 0.5", "b 0.5", "a 0.5", "b 0.5"]
    assert (found["a"].least, found["a"].median, found["b"].median) == (1, 2, 4)
    ratio = found["b"].over(found["a"])  # 4 / 2, 4 / 2
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)
    spread = bursts.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (spread.low, spread.median, spread.high) == (2, 3, 4) and bursts.Spread.of([7.0]).high == 7


def test_a_burst_does_not_count_its_first_call(bursts):
    calls: list[int] = []
    assert len(bursts.burst(lambda: calls.append(0), 0.0)) == 1 and len(calls) == 1
    calls.clear()
    assert len(bursts.burst(lambda: calls.append(0), 0.01)) == len(calls) - 1


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no processes")
def test_pinned_to_one_core_and_back(bursts):
    before = bursts.cores()
    with bursts.pinned(before[-1]):
        assert bursts.cores() == [before[-1]]
    assert bursts.cores() == before


def test_workers(bursts, tmp_path):
    """What they print beside their answers goes to the log; one that ends says what it wrote last."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests/benchmarks')!r}); import bursts\n"
        "def call():\n    print('noise')\n    seen.append(0)\n    if len(seen) > 2: raise SystemExit('enough')\n"
        "seen = []\nbursts.serve(lambda: (call, 4))"
    )
    worker = bursts.Worker([sys.executable, "-c", code], bursts.cores()[0], tmp_path / "log", {})
    assert len(worker(0.0)) == 1
    with pytest.raises(bursts.WorkerError, match="ended with status 1: .*enough"):
        worker(0.0)
    worker.close()
    assert "noise" in (tmp_path / "log").read_text()
    with pytest.raises(bursts.WorkerError, match="No such file"):
        bursts.Worker([tmp_path / "no python"], bursts.cores()[0], tmp_path / "log", {})


def test_engines_take_turns(folder):
    """Of 8 atoms; what is not installed is left out, ASE is there."""
    options = ["--work", folder, "--json", folder / "engines.json", "--cells", 1, "--columns", COLUMNS, "--rounds", 2]
    options += ["--seconds", 0.01, "--engines", "fix_external", "openmm"]  # the others compile for minutes
    command = [sys.executable, "tests/benchmarks/engines.py", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "engines.json").read_text())
    assert found["ase"]["ratio"] == {"low": 1, "median": 1, "high": 1} and "8 atoms" in done.stdout
    assert all(0 < one["us"][0] <= one["us"][1] and 0 < one["ratio"]["median"] for one in found.values())
    assert all(name in done.stdout for name in ("fix_external", "openmm"))


def test_costs_of_large_fits():
    """Constants of a few columns and what is computed from them."""
    command = [sys.executable, "tests/benchmarks/scale.py", "--times", "1", "--centres", str(COLUMNS), "--workers"]
    done = subprocess.run([*command, "--seconds", "0.01"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "minutes: " in done.stdout and "core-hours for 1e5 steps" in done.stdout
    constants = dict(line.split(": ") for line in done.stdout.splitlines() if ": " in line and line[0] != " ")
    assert 0 < float(constants["rows, us an atom and column"]) < math.inf


def test_what_is_beyond_the_cutoff(benchmarks, tmp_path):
    """Far structures are set aside and no structure is both fitted and tested; a tiny fit gives a line of the table."""
    module = benchmarks("long_range")
    folder = tmp_path / "charged_dimers"
    folder.mkdir()
    lines = []
    for dimer in (0, 1):
        for k in (3, 0, 2, 1, 4):
            lines.append(
                f'2\nProperties=species:S:1:pos:R:3:forces:R:3 dimer={dimer} distance={5 + k} energy={-k} pbc="F F F"\n'
            )
            lines.append(f"Na 0 0 0 0 0 {0.1 * k}\nCl 0 0 {5 + k} 0 0 {-0.1 * k}\n")
    (folder / "train_short.xyz").write_text("".join(lines))
    case = module.SETS["charged_dimers"](tmp_path)
    far, near = (sorted((-data[1].energies).tolist()) for data in (case.tests["far"], case.train))
    assert far == [2, 2, 3, 3, 4, 4] and near == [0, 0, 1, 1]
    for name in ("ag3", "water", "nacl"):
        case = module.SETS[name](tmp_path)
        fitted = set(case.train[0].fingerprints())
        assert all(fitted.isdisjoint(data[0].fingerprints()) for data in case.tests.values())
    assert module.nested(["inducing.n=5", 'mean="exact"']) == {"inducing": {"n": 5}, "mean": "exact"}
    small = {"inducing": {"n": 10}, "descriptor": {"n_max": 2, "l_max": 1}}
    module.SETS["tiny"] = lambda _: module.Case(
        module.part(case.train, range(12)), {"far": module.part(case.train, range(12, 20))}
    )
    (found,) = module.run("tiny", tmp_path, "off", small)
    assert found["energy_rmse_meV"] > 0 and len(module.row(found)) == len(module.COLUMNS)
