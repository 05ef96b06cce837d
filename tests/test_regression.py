"""Rows streamed into factors: the same whoever makes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gpmlp
from gpmlp.fitting import defaults, inducing_sets, regression
from gpmlp.fitting.partitions import Partition
from gpmlp.fitting.passes import _chunked
from gpmlp.fitting.sparse_points import Candidates
from gpmlp.recipe import Recipe

DATA = Path(__file__).parents[1] / "data" / "silicon"


@pytest.fixture(scope="module")
def parts():
    """Chunks of silicon with their labels, a recipe and its models."""
    structures, targets = gpmlp.read(DATA / "train.xyz", "::3")
    recipe = Recipe.model_validate(
        {"descriptor": {"n_max": 3, "l_max": 3, "cutoff": 4.5}, "inducing": {"n": 20, "gradients": 2}}
    )
    recipe = defaults.resolve_recipe(recipe, defaults.summarise_data(structures, targets), 1)
    chunks, labels = _chunked(Partition(structures, targets, 0, {14: 0}), torch.arange(len(structures)))
    models, _ = inducing_sets.make_models(
        recipe, structures, lambda k, choice: Candidates(choice).collect(chunks), structures, targets
    )
    assert len(chunks) > 2
    return recipe, models, chunks, labels


def test_threads_and_memory_change_no_factor(parts, monkeypatch):
    """To the last bit: each chunk is made by one thread, and folded in in its turn, however many are there at a time."""
    before, found = torch.get_num_threads(), []
    steps: list[float] = []
    try:
        for threads, at_most in ((1, regression.ROW_BYTES), (3, regression.ROW_BYTES), (3, 1 << 19)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(regression, "ROW_BYTES", at_most)
            factors = regression.stream_rows(*parts[1:], lambda done, total, note: steps.append(done / total))
            found.append({kind: f.factor() for kind, f in factors.items()})
    finally:
        torch.set_num_threads(before)
    assert found[0].keys() == {"energies", "forces", "stresses"}
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(other[kind], factor) for kind, factor in found[0].items())
    n = len(parts[2])
    assert steps == 3 * [(k + 1) / n for k in range(n)]
