"""Tuning: never worse than its start, resumed is uninterrupted, failures recorded, time kept, recipes that fit."""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import ase.io
import optuna
import pytest
import torch
import yaml

from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.fitting import calibrate, tune
from gpmlp.fitting.search_space import SearchParameter, default_space, parse_search, propose
from gpmlp.io import archive, ase_atoms, files, recipe_files
from gpmlp.recipe import InducingRecipe

SILICON = Path(__file__).resolve().parents[1] / "data" / "silicon" / "train.xyz"
START = {"descriptor": {"cutoff": 3.5, "n_max": 3, "l_max": 2}, "kernel": {"zeta": 2}}
SMALL = ["--set", "descriptor.cutoff=3.5", "--set", "descriptor.n_max=3", "--set", "descriptor.l_max=2"]
SMALL += ["--columns", "24"]
SEARCH = ["descriptor.cutoff=3:4.2", "kernel.zeta=1:4"]
SPACE = [word for text in SEARCH for word in ("--search", text)]


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    """24 of the smallest frames of the silicon data and the isolated atom, in a file."""
    frames = sorted(ase.io.read(SILICON, ":"), key=len)[:25]
    path = tmp_path_factory.mktemp("silicon") / "train.xyz"
    ase_atoms.write_frames(path, frames)
    return path


@pytest.fixture(scope="module")
def problem(silicon):
    return tune.tuning_problem(
        *ase_atoms.read(silicon),
        recipe_files.validate_recipe(START),
        SEARCH,
        columns=24,
        data={"name": "train.xyz", "sha256": "ab"},
    )


@pytest.fixture(scope="module")
def five(problem):
    """Five trials, uninterrupted."""
    return list(tune.run_trials(problem, most=5))


@pytest.fixture
def gpmlp(capsys):
    """Run a command: (status, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, " ".join(out.split()), " ".join(err.split())

    return run


def timeless(trials):
    return [replace(t, seconds=0.0) for t in trials]


# --- the search


def test_first_trial_is_the_start_and_the_best_is_no_worse(problem, five):
    assert [t.number for t in five] == list(range(5))
    assert five[0].parameters == {"descriptor.cutoff": 3.5, "kernel.zeta": 2} == problem.first
    assert len({str(t.parameters) for t in five}) == 5
    assert all(p.contains(t.parameters[p.key]) for t in five for p in problem.search)
    assert all(isinstance(t.parameters["kernel.zeta"], int) for t in five)
    top = tune.best_trial(five)
    assert top.objective == max(t.objective for t in five) >= five[0].objective
    assert all(t.force_rmse_meV_per_A >= t.force_mae_meV_per_A > 0 and t.seconds > 0 for t in five)


def test_objective_is_the_mean_log_density_of_held_out_force_components(problem, five):
    """By a second road: fit the recipe of the trial, and write the Gaussian out."""
    from gpmlp.fitting.fit import fit

    potential, _ = fit(*problem.learned_from, problem.trial(five[0].parameters))
    structures, targets = problem.held
    prediction = potential(structures, variance=("energies", "forces", "stresses"))
    error, variance = prediction.forces - targets.forces, prediction.forces_variance.total
    density = -error.square() / (2 * variance) - variance.log() / 2 - math.log(2 * math.pi) / 2
    # the same arithmetic in another order
    assert five[0].objective == pytest.approx(density.mean().item(), rel=1e-9)
    assert five[0].force_mae_meV_per_A == pytest.approx(1e3 * error.abs().mean().item(), rel=1e-9)


def test_held_out_are_not_learned_from_and_the_same_for_all(silicon, problem):
    again = tune.tuning_problem(*ase_atoms.read(silicon), recipe_files.validate_recipe(START), SEARCH, columns=24)
    assert again.held[0].names == problem.held[0].names
    assert not set(problem.held[0].names) & set(problem.learned_from[0].names)
    other = tune.tuning_problem(
        *ase_atoms.read(silicon), recipe_files.validate_recipe(START), SEARCH, columns=24, seed=1
    )
    assert other.held[0].names != problem.held[0].names
    assert not any(calibrate.baselines.is_isolated_atom(label) for label in problem.held[1].config_types)


def test_large_data_are_thinned(silicon, monkeypatch):
    monkeypatch.setattr(tune, "TRAIN_ATOMS", 30)
    few = tune.tuning_problem(*ase_atoms.read(silicon), recipe_files.validate_recipe(START), SEARCH)
    assert len(few.learned_from[0]) + len(few.held[0]) == 25  # too few to choose from
    thin = tune.tuning_problem(*ase_atoms.read(SILICON, "::6"), recipe_files.validate_recipe(START), SEARCH)
    assert 15 <= thin.learned_from[0].n_atoms <= 40
    assert any("isolated" in label for label in thin.learned_from[1].config_types)
    assert not set(thin.held[0].names) & set(thin.learned_from[0].names)


def test_resumed_is_uninterrupted(problem, five):
    resumed = list(tune.run_trials(problem, five[:3], most=5))
    assert timeless(resumed) == timeless(five[3:])


def test_evidence(silicon, problem):
    judged = replace(problem, objective="evidence")
    trials = list(tune.run_trials(judged, most=2))
    assert all(t.objective is not None and t.force_mae_meV_per_A > 0 for t in trials)
    with pytest.raises(UserError, match="'use_stresses' cannot be searched"):
        parse_search(["use_stresses=true,false"], problem.start, "evidence")


def test_failed_trials_are_recorded_and_the_search_goes_on(problem):
    """A cutoff below the width over which the density is cut off is refused by the recipe."""
    start = recipe_files.changed_recipe(problem.start, {"descriptor.cutoff_width": 2.0})
    some = replace(problem, start=start, search=(SearchParameter("descriptor.cutoff", choices=(1.5, 3.4)),))
    trials = list(tune.run_trials(some))
    assert len(trials) == 3  # the start and every choice: then there is nothing left to try
    failed = [t for t in trials if t.objective is None]
    assert [t.parameters["descriptor.cutoff"] for t in failed] == [1.5]
    assert "cutoff_width 2.0 A is larger than the cutoff 1.5 A" in failed[0].failure
    assert tune.best_trial(trials) is not None


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory"), torch.linalg.LinAlgError("x")])
def test_lack_of_memory_and_bad_numbers_are_failures(problem, monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(tune, "fit", broken)
    assert tune.run_trial(problem, 0, {}).failure


def test_gives_up_where_everything_fails(problem, monkeypatch):
    def broken(*_, **__):
        raise UserError("no such thing")

    monkeypatch.setattr(tune, "fit", broken)
    with pytest.raises(UserError, match="first 5 trials all failed, the last one so: no such thing"):
        list(tune.run_trials(problem))


def test_budget(problem, five):
    started = time.perf_counter()
    alone = list(tune.run_trials(problem, budget_s=1e-3))
    assert timeless(alone) == timeless(five[:1])  # the start recipe always
    typical = alone[0].seconds
    started = time.perf_counter()
    some = list(tune.run_trials(problem, budget_s=2 * typical))
    assert len(some) < 30
    # between two looks at the clock lies at most one chunk of a fit: far less than a trial, but machines are busy
    assert time.perf_counter() - started < 2 * typical + 2
    assert not list(tune.run_trials(problem, [replace(t, seconds=100.0) for t in five], budget_s=500))


def test_final_recipe_leaves_inducing_and_noise_as_they_were(problem, five, tmp_path):
    top = tune.best_trial(five)
    final, path = problem.final(top.parameters), tmp_path / "best.yaml"
    recipe_files.save_recipe(final, path, tune.recipe_comment(problem, five))
    assert recipe_files.load_recipe(path) == final
    given = yaml.safe_load(path.read_text())
    assert "n" not in given["inducing"] and "gradients" not in given["inducing"] and "noise" not in given
    assert given["descriptor"]["cutoff"] == top.parameters["descriptor.cutoff"] and given["descriptor"]["basis"]
    assert given["kernel"]["zeta"] == top.parameters["kernel.zeta"]
    text = path.read_text()
    assert text.startswith("# gpmlp tune") and f"{top.objective:.4f}" in text and "sha256 ab" in text


# --- the space


def test_default_space_holds_the_start(silicon):
    problem = tune.tuning_problem(*ase_atoms.read(silicon), recipe_files.validate_recipe({}))
    assert {p.key for p in problem.search} == {
        "descriptor.cutoff", "descriptor.sigma_atom", "descriptor.radial_scaling.scale",
        "descriptor.radial_scaling.exponent", "descriptor.n_max", "descriptor.l_max", "kernel.zeta",
    }  # fmt: skip
    assert all(p.contains(problem.first[p.key]) for p in problem.search)
    recipe = problem.trial({})
    assert recipe.inducing.n * (1 + recipe.inducing.gradients) <= tune.COLUMNS
    assert problem.trial({"inducing.gradients": 19}).inducing.n == tune.COLUMNS // 20


def test_several_descriptors_and_kernels(silicon):
    data = {"descriptor": [{"cutoff": 3.0, "radial_scaling": False}, {"cutoff": 5.0, "name": "dscribe-acsf"}]}
    data["kernel"] = {"name": "sum", "terms": [{"zeta": 2}, {"name": "exponential"}]}
    problem = tune.tuning_problem(*ase_atoms.read(silicon), recipe_files.validate_recipe(data))
    keys = [p.key for p in problem.search]
    assert "descriptor.0.l_max" in keys and "descriptor.1.cutoff" in keys and "descriptor.1.l_max" not in keys
    assert not any("scale" in key for key in keys)
    assert {"kernel.terms.0.zeta", "kernel.terms.1.length"} <= set(keys)
    final = problem.final(problem.first)
    assert final.descriptor[0].radial_scaling is False and final.kernel.terms[0].zeta == 2


def test_ranges_know_whole_numbers():
    start = recipe_files.validate_recipe({})
    whole, real, words = parse_search(
        ["kernel.zeta=1:4", "descriptor.cutoff=4:6", "descriptor.basis=gto,optimal"], start
    )
    assert (whole.integer, real.integer, words.choices) == (True, False, ("gto", "optimal"))
    assert str(real) == "descriptor.cutoff=4:6" and real.rounded(4.123456) == 4.123 and real.rounded(9) == 6


def test_proposals_find_a_maximum_and_each_point_once():
    space = (SearchParameter("a", 0.0, 1.0), SearchParameter("b", 1, 9, integer=True))
    history = [({"a": 0.9, "b": 9}, -3.0)]
    while len(history) < 50:
        at = propose(space, history, seed=3)
        value = None if at["b"] > 7 else -((at["a"] - 0.3) ** 2) - 0.02 * (at["b"] - 4) ** 2
        history.append((at, value))
    assert max(v for _, v in history if v is not None) > -0.01
    assert len({str(at) for at, _ in history}) == 50
    assert propose(space, history, 3) == propose(space, history, 3)
    few = (SearchParameter("b", 1, 3, integer=True),)
    assert propose(few, [({"b": k}, float(k)) for k in (1, 2, 3)], 0) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kernel.zeta", "must look like KEY=LOW:HIGH"),
        ("=1:2", "must look like"),
        ("kernel.zeta=", "must look like"),
        ("kernel.zeta=1:2,3", "must look like"),
        ("kernel.zeta=4:1", "the smaller one first; got '4:1'"),
        ("kernel.zeta=a:b", "two numbers"),
        ("descriptor.cutoff=4:inf", "two numbers"),
        ("kernel.zeta=1:2:3", "two numbers"),
        ("kernel.zeta=1.5:3", "kernel.zeta"),
        ("kernel.zeta=0:3", "at least 1"),
        ("kernel.zeta=3", "needs two values or more"),
        ("kernel.zeta=3,3", "all different"),
        ("descriptor.basis=gto,best", "descriptor.basis"),
        ("descriptor.cutof=4:6", "Perhaps you meant 'descriptor.cutoff'"),
        ("inducing.n=100:200", "cannot be searched"),
        ("inducing.0.n=100:200", "cannot be searched"),
        ("noise.force=0.1:0.2", "cannot be searched"),
    ],
)
def test_bad_search(gpmlp, silicon, tmp_path, text, message):
    log = tmp_path / "log"
    status, _, err = gpmlp("tune", silicon, "-o", tmp_path / "r.yaml", "--log", log, "--search", text)
    assert status == 2 and message in err and "--search" in err
    assert not log.exists()


# --- the command


def recorded(log):
    """The trials in the log of a search."""
    journal = optuna.storages.journal
    storage = journal.JournalStorage(journal.JournalFileBackend(str(log)))
    return tune.trials_of(optuna.load_study(study_name=tune.STUDY, storage=storage))


def test_tune_resume_fit(gpmlp, silicon, tmp_path, five):
    recipe, log, model = tmp_path / "r.yaml", tmp_path / "t.jsonl", tmp_path / "m.gpmlp"
    run = ["tune", silicon, "-o", recipe, "--log", log, *SMALL, "--set", "kernel.zeta=2", *SPACE]
    status, out, err = gpmlp(*run, "--trials", 2)
    assert status == 0, err
    assert "Best of 2 trials (0 failed" in out and f"wrote {recipe}" in out
    assert "trial 0: " in err and "meV/A, objective" in err and "held out, 24 columns" in err
    first = log.read_text()

    status, _, err = gpmlp(*run, "--trials", 3)
    assert status == 2 and "is there already; go on with it (--resume)" in err
    with open(log, "a") as file:  # killed while it wrote
        file.write('{"op_code":4,"study')
    status, out, err = gpmlp(*run, "--trials", 3, "--resume")
    assert status == 0, err
    assert log.read_text().startswith(first)
    trials = recorded(log)
    assert timeless(trials) == timeless(five[:3])

    status, _, err = gpmlp("fit", silicon, "--recipe", recipe, "--set", "inducing.n=8", "-o", model)
    assert status == 0, err
    chosen = recipe_files.load_recipe(recipe).descriptor
    assert archive.load(model).recipe.descriptors[0].cutoff == chosen.cutoff


def test_log_of_something_else_is_refused(gpmlp, silicon, tmp_path):
    log, other = tmp_path / "t.jsonl", tmp_path / "other.xyz"
    run = [*SMALL, *SPACE, "--log", log, "--trials", 1]
    assert gpmlp("tune", silicon, "-o", tmp_path / "r.yaml", *run)[0] == 0
    before = log.read_bytes()
    shutil.copy(silicon, other)
    with open(other, "ab") as file:
        file.write(b"\n")
    again = ["-o", tmp_path / "r.yaml", *run, "--resume"]
    for source, more, message in (
        (other, [], "was made with other data"),
        (silicon, ["--search", "kernel.weight=1:2"], "another search space"),
        (silicon, ["--seed", 1], "another seed: 0, now 1"),
        (silicon, ["--objective", "evidence"], "another objective"),
        (silicon, ["--set", "descriptor.l_max=1"], "another start recipe"),
        (silicon, ["--columns", 30], "another number of columns"),
    ):
        status, _, err = gpmlp("tune", source, *again, *more)
        assert status == 2 and message in err, err
    assert log.read_bytes() == before
    log.write_text('{"a": 1}\n')
    status, _, err = gpmlp("tune", silicon, *again)
    assert status == 2 and "is not a log of `gpmlp tune`" in err
    log.write_text('{"gpmlp_tune": 1, "version": "0.1"}\n{"number": 0}\n')  # as versions before 0.2 wrote it
    status, _, err = gpmlp("tune", silicon, *again)
    assert status == 2 and "was written by gpmlp 0.1, whose trials are recorded in another form" in err


def test_interrupted_writes_the_best_so_far(gpmlp, silicon, tmp_path, monkeypatch):
    recipe, log, fit = tmp_path / "r.yaml", tmp_path / "t.jsonl", tune.fit
    calls = []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit(*arguments, **named)

    monkeypatch.setattr(tune, "fit", stopped)
    status, out, _ = gpmlp("tune", silicon, "-o", recipe, "--log", log, *SMALL, *SPACE)
    assert status == 130 and f"wrote {recipe}" in out
    assert len(recorded(log)) == 1 and recipe_files.load_recipe(recipe).kernel.zeta


def test_mistakes_are_found_before_any_work(gpmlp, silicon, train_file, tmp_path):
    recipe, log = tmp_path / "r.yaml", tmp_path / "t.jsonl"
    recipe.write_text("kernel: {zeta: 2}\n")
    for arguments, message in (
        (["tune", silicon, "-o", recipe, "--recipe", recipe], "the start recipe"),
        (["tune", silicon, "-o", recipe, "--log", recipe], "a name of its own"),
        (["tune", silicon, "-o", tmp_path / "no" / "r.yaml"], "does not exist"),
        (["tune", silicon, "-o", recipe, "--log", log, "--budget-minutes", "-1"], "--budget-minutes"),
        (["tune", silicon, "-o", recipe, "--log", log, "--trials", "0"], "--trials"),
        (["tune", silicon, "-o", recipe, "--log", log, "--objective", "luck"], "--objective"),
        (["tune", train_file, "-o", recipe, "--log", log], "at least 20 structures"),
    ):
        status, _, err = gpmlp(*arguments)
        assert status == 2 and message in err, err
    assert not log.exists() and recipe.read_text() == "kernel: {zeta: 2}\n"


def test_without_optuna(monkeypatch, problem):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'gpmlp\[tune\]'"):
        next(tune.run_trials(problem))


# --- the journal


def test_journal(tmp_path):
    path = tmp_path / "j"
    assert files.reopen_journal(path) is None
    log = files.begin_journal(path, {"about": 1})
    log.append({"n": 0})
    again = files.reopen_journal(path)
    assert (again.header, again.entries) == ({"about": 1}, ({"n": 0},))
    again.append({"n": 1})
    whole = path.read_bytes()
    for torn in (b'{"n"', b"\x00\x00\n", b"[1]\n"):
        path.write_bytes(whole + torn)
        assert files.reopen_journal(path).entries == ({"n": 0}, {"n": 1})
        assert path.read_bytes() == whole
    path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(UserError, match="line 1 is not a JSON object"):
        files.reopen_journal(path)
    with pytest.raises(UserError, match="is there already"):
        files.begin_journal(path, {})
    path.write_bytes(b'{"abou')
    assert files.reopen_journal(path) is None and path.read_bytes() == b""


def test_default_space_of_a_resolved_recipe_is_valid_everywhere():
    start = recipe_files.validate_recipe(
        {"descriptor": {"n_max": 1, "l_max": 0, "sigma_atom": 0.1}, "kernel": {"zeta": 9}}
    )
    full = recipe_files.changed_recipe(
        start, {"descriptor.cutoff": 5.0, "descriptor.radial_scaling": {"scale": 2, "exponent": 0}}
    )
    for parameter in default_space(full):
        for value in (parameter.low, parameter.high):
            recipe_files.changed_recipe(full, {parameter.key: value})
        assert parameter.contains(recipe_files.value_at(full, parameter.key))


def test_trials_with_functionals_have_so_many_of_them():
    """In place of all, whose centres are for variances."""
    every = InducingRecipe(functionals="all").model_copy(update={"n": 30, "gradients": 2})
    limited = tune._limited(every, 400, 100)
    assert limited == InducingRecipe.model_validate(limited.model_dump()) and limited.functionals == 400
