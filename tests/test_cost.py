"""The expected cost of a fit: what is counted, what is said, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gpmlp.core.errors import DataWarning, UserError
from gpmlp.fitting import cost
from gpmlp.fitting.cost import FitCost, expected_cost
from gpmlp.fitting.fit import fit
from gpmlp.io.recipe_files import changed_recipe

# columns, rows, 1e9 operations per second of one core, seconds and GB that the fit then took (data/silicon, data/ethanol)
MEASURED = (
    (592, 593, 4.4, 42.9, 0.128),
    (400, 1977, 6.6, 23.9, 0.127),
    (1200, 1977, 5.4, 79.0, 0.278),
    (420, 1608, 3.7, 35.0, 0.139),
    (2000, 2907, 3.0, 245.9, 0.610),
)


def test_counts_are_those_of_the_fit(fitted, small_set, small_recipe, monkeypatch):
    monkeypatch.setattr(cost, "operations_per_second", lambda: 1e10)
    found = expected_cost(fitted[0].recipe, *small_set)
    assert found.columns == fitted[1].columns and found.rows == sum(fitted[1].rows.values())
    said = []
    fit(*small_set, small_recipe, progress=lambda stage, done, total, note: said.append((stage, note)))
    notes = [note for stage, note in said if stage == "data" and note]
    assert notes == [f"expected: {found.columns} columns x {found.rows} rows, 0.12 GB, about 20 s"]
    assert said.index(("data", notes[0])) < [stage for stage, _ in said].index("inducing points")


@pytest.mark.parametrize(("columns", "rows", "speed", "seconds", "memory"), MEASURED)
def test_formula_against_fits(columns, rows, speed, seconds, memory, small_set, small_recipe, monkeypatch):
    """Within a factor of two in time, and of 1.5 in memory, hardly ever too little."""
    monkeypatch.setattr(cost, "operations_per_second", lambda: 1e9 * speed)
    found = cost.cost_of(columns, rows)
    assert 0.5 < found.seconds / seconds < 2.0
    assert 0.95 < found.memory_GB / memory < 1.5


def test_what_does_not_fit_is_refused_before_anything_is_computed(small_set, small_recipe, monkeypatch):
    monkeypatch.setattr(cost, "physical_memory_GB", lambda: 0.1)
    with pytest.raises(
        UserError, match=r"would need 0.12 GB for 40 columns; this machine has 0.1 GB: lower inducing.n"
    ):
        fit(*small_set, small_recipe)
    recipe = changed_recipe(small_recipe, {"inducing.n": 10**9})
    monkeypatch.undo()
    with pytest.raises(UserError, match="inducing.n asks for 1000000000 inducing points, but"):
        fit(*small_set, recipe)


def test_error_bars_from_all_columns_are_counted(small_set, fitted, monkeypatch):
    monkeypatch.setattr(cost, "operations_per_second", lambda: 1e10)
    found = cost.cost_of(7518, 23_000, 7518)
    assert str(found).endswith(
        "error bars from 7518 columns: up to 0.34 GB in the model file, about 0.03 s for the force of an atom "
        "(fewer: --set variance.columns=1500)"
    )
    assert str(cost.cost_of(7518, 23_000, 1500)) == str(cost.cost_of(7518, 23_000)) == str(found).split(";")[0]
    recipe = changed_recipe(
        fitted[0].recipe, {"inducing.0.n": 2000, "inducing.0.gradients": 99, "variance.columns": "all"}
    )
    assert expected_cost(recipe, *small_set).variance_columns == expected_cost(recipe, *small_set).columns > 1500
    some = changed_recipe(recipe, {"variance.columns": 1600})
    assert expected_cost(some, *small_set).variance_columns == 1600


def test_more_than_an_hour_is_warned_of():
    with pytest.warns(
        DataWarning, match=r"Expected: 9000 columns x 10000 rows, 10 GB, about 2 h; to have it sooner lower"
    ):
        FitCost(9000, 10_000, 10.0, 7300.0).check()
    FitCost(9000, 10_000, 1e-3, 3599.0).check()


def test_all_functionals_cost_what_their_way_costs(small_set, fitted, monkeypatch):
    """Force labels that the factorisation in place does not take go by the QR, whose memory is many times that."""
    monkeypatch.setattr(cost, "operations_per_second", lambda: 1e10)
    structures, targets = small_set
    every = {"inducing.0.functionals": "all", "inducing.0.n": None, "inducing.0.gradients": None}
    recipe = changed_recipe(fitted[0].recipe, every | {"variance.columns": 20})
    forces, noise = targets.forces.clone(), targets.forces_noise.clone()
    forces[0, 0] = torch.nan
    noise[0, 0] = 0.1
    exact, *others = (
        expected_cost(recipe, structures, labels)
        for labels in (targets, replace(targets, forces=forces), replace(targets, forces_noise=noise))
    )
    n = exact.columns
    for other in others:
        assert other.columns == n and other.memory_GB > exact.memory_GB + 8e-9 * 10 * n**2
    forces[structures.structure_of_atom == 0] = torch.nan  # of one structure no force at all: as before
    assert expected_cost(recipe, structures, replace(targets, forces=forces)).memory_GB == exact.memory_GB
