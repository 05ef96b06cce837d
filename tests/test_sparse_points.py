"""Selection of rows of a feature matrix, and of centres in one pass over the data."""

from __future__ import annotations

import math

import pytest
import torch
from systems import KERNELS, cluster, descriptor

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.fitting import sparse_points

KERNEL = KERNELS["polynomial 3"]


def profile(s: torch.Tensor) -> torch.Tensor:
    return KERNEL.profile(s)[0]


def _features(n: int = 150, dimension: int = 12, seed: int = 0) -> torch.Tensor:
    x = torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x + 2 * torch.eye(dimension, dtype=torch.float64)[torch.arange(n) % 3]
    return x / x.norm(dim=1, keepdim=True)


def pivoted_cholesky(matrix: torch.Tensor, n: int, first: int) -> tuple[list[int], list[float]]:
    """The textbook algorithm, one pivot at a time, on the whole matrix; the first pivot, among equals, is given."""
    residual, chosen, scores = matrix.clone(), [], []
    for step in range(n):
        k = int(residual.diagonal().argmax()) if step else first
        chosen.append(k)
        scores.append(float(residual[k, k]))
        residual = residual - residual[:, k : k + 1] * residual[k : k + 1] / residual[k, k]
    return chosen, scores


def test_greedy_without_slack_is_pivoted_cholesky():
    x = _features()
    chosen, scores = sparse_points.greedy_selection(x, 60, profile, slack=1.0)
    expected, variances = pivoted_cholesky(profile(x @ x.T), 60, int(chosen[0]))
    assert chosen.tolist() == expected
    torch.testing.assert_close(scores, torch.tensor(variances, dtype=torch.float64), atol=1e-10, rtol=0)


@pytest.mark.parametrize("slack", [0.5, 0.8])
def test_greedy_with_slack_is_nearly_as_good(slack):
    """What is left unexplained, the trace of the conditional covariance, is within a few per cent of the exact order's."""
    x = _features(400)
    left = []
    for value in (1.0, slack):
        chosen, scores = sparse_points.greedy_selection(x, 80, profile, slack=value)
        assert len(chosen.unique()) == 80
        assert (scores.diff() <= 0).all()
        k = profile(x @ x[chosen].T)
        left.append(float(len(x) - (k * torch.linalg.solve(k[chosen], k.T).T).sum()))
    assert left[1] < 1.1 * left[0]


@pytest.mark.parametrize("method", ["greedy", "farthest", "cur"])
def test_duplicates_are_never_chosen_twice(method):
    x = _features(30)
    pool = torch.cat([x, x[:20], x[:10], x])
    chosen, scores = sparse_points.select_rows(method, pool, 60, profile, 0)
    picked = pool[chosen]
    assert ((picked @ picked.T) > 1 - 1e-9).sum() == len(chosen)
    assert len(chosen) <= 30
    assert len(chosen) == 30 or method == "greedy"  # greedy also stops where nothing is left to explain
    assert len(scores) == len(chosen)


def test_greedy_stops_when_nothing_is_left():
    basis = torch.eye(6, dtype=torch.float64)
    pool = torch.cat([basis, basis, basis])
    chosen, scores = sparse_points.greedy_selection(pool, 18, lambda s: s)
    assert sorted(i % 6 for i in chosen.tolist()) == list(range(6))
    torch.testing.assert_close(scores, torch.ones(6).double(), atol=1e-9, rtol=0)
    same = torch.ones(5, 1, dtype=torch.float64)
    for method in ("greedy", "farthest", "cur"):
        assert len(sparse_points.select_rows(method, same, 5, profile, 0)[0]) == 1


@pytest.mark.parametrize("method", sparse_points.METHODS)
def test_indices_are_distinct_scores_never_rise_and_seeds_decide(method):
    x = _features()
    chosen, scores = sparse_points.select_rows(method, x, 40, profile, 3)
    assert len(chosen.unique()) == len(chosen) == 40
    assert (scores.diff() <= 0).all()
    again, _ = sparse_points.select_rows(method, x, 40, profile, 3)
    assert torch.equal(chosen, again)
    other, _ = sparse_points.select_rows(method, x, 40, profile, 4)
    assert torch.equal(chosen, other) == (method in ("greedy", "farthest"))
    everything, _ = sparse_points.select_rows(method, x[:10], 40, profile, 3)
    assert sorted(everything.tolist()) == list(range(10))


def test_farthest_points_are_far_from_those_before():
    x = _features()
    chosen, scores = sparse_points.farthest_points(x, 20)
    for k in range(1, 20):
        distance = torch.cdist(x, x[chosen[:k]]).square().min(1).values
        assert float(scores[k]) == pytest.approx(float(distance.max()), rel=1e-9)


def test_cur_prefers_rows_of_high_leverage():
    """One direction that a single row has is found every time; rows that repeat a common direction share their chance."""
    common = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).repeat(200, 1)
    common = common + 1e-3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    common[:, 2] = 0
    rare = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    x = torch.cat([common, rare])
    x = x / x.norm(dim=1, keepdim=True)
    hits = sum(200 in sparse_points.select_rows("cur", x, 20, profile, seed)[0].tolist() for seed in range(20))
    # leverage 1 against 2/200: the chance to be left out of 20 draws is below 1 %
    assert hits >= 19


def test_unknown_methods_are_refused():
    with pytest.raises(UserError, match="Unknown selection method 'greedi'. Perhaps you meant 'greedy'"):
        sparse_points.select_rows("greedi", _features(), 3, profile, 0)


# centres --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stream():
    """(parts, descriptor): ten heaps of two species, some of them twice."""
    heaps = [cluster((6, 8, 6, 8, 6, 6), seed) for seed in (*range(8), 0, 1)]
    return [Structures.concatenate(heaps[k : k + 2]) for k in range(0, 10, 2)], descriptor(
        "soap gto", (6, 8), n_max=2, l_max=2
    )


def _choose(stream, method="greedy", n=12, shares="species", seed=0):
    parts, made = stream
    told = []
    choice = sparse_points.CentreChoice(made, KERNEL, method, n, shares, seed)
    found = sparse_points.Candidates(choice).collect(parts, told.append)
    assert told == [1, 2, 3, 4, 5]
    return found.chosen(), found.counts


def test_centres_are_environments_with_their_features(stream):
    chosen, seen = _choose(stream)
    assert seen == {6: 40, 8: 20}
    assert {z: len(features) for z, (features, _) in chosen.items()} == {6: 8, 8: 4}  # in proportion
    for z, (features, surroundings) in chosen.items():
        assert (surroundings.species == z).all()
        torch.testing.assert_close(stream[1](surroundings).features, features, atol=1e-14, rtol=0)


def test_shares_by_hand_and_from_all_together(stream):
    chosen, _ = _choose(stream, n=10, shares={6: 3, 8: 7})
    assert {z: len(f) for z, (f, _) in chosen.items()} == {6: 3, 8: 7}
    together, _ = _choose(stream, n=15, shares="total")
    assert sum(len(f) for f, _ in together.values()) == 15
    # the best of all: every variance chosen is at least as large as the best one left out, in either species
    lowest, best_left = [], []
    for z, (features, _) in together.items():
        pool = torch.cat(_pool(stream, z))
        _, scores = sparse_points.greedy_selection(pool, len(features) + 1, profile)
        lowest.append(float(scores[len(features) - 1]))
        best_left.append(float(scores[len(features)]))
    assert min(lowest) >= max(best_left) - 1e-9


def _pool(stream, z: int) -> list[torch.Tensor]:
    parts, made = stream
    out = []
    for part in parts:
        surroundings = Surroundings.from_structures(part, neighbors.find_neighbors(part, made.cutoff))
        out.append(made(surroundings).features[part.species == z])
    return out


@pytest.mark.parametrize("method", ["greedy", "farthest"])
def test_without_thinning_the_choice_is_that_from_the_whole_pool(stream, method):
    chosen, _ = _choose(stream, method)
    pool = torch.cat(_pool(stream, 6))
    expected, _ = sparse_points.select_rows(method, pool, 8, profile, 6)
    torch.testing.assert_close(chosen[6][0], pool[expected], atol=1e-14, rtol=0)


@pytest.mark.parametrize("method", sparse_points.METHODS)
def test_a_full_pool_is_thinned_and_still_gives_distinct_centres(stream, monkeypatch, method):
    """With no room at all the pool is thinned as it goes; it never holds more than a few times the centres asked for."""
    n, held = 7, []
    keep = sparse_points._Pool.keep

    def watched(pool, chosen):
        held.append(pool.size())
        keep(pool, chosen)

    monkeypatch.setattr(sparse_points, "POOL_BYTES", 1)
    monkeypatch.setattr(sparse_points._Pool, "keep", watched)
    chosen, seen = _choose(stream, method, n=n, shares={6: 4, 8: 3})
    assert held  # it did thin
    assert max(held) <= 4 * n + 12  # the limit, and what one part adds
    assert seen == {6: 40, 8: 20}
    for z, (features, surroundings) in chosen.items():
        assert len(features) == {6: 4, 8: 3}[z]
        assert torch.equal(surroundings.species.unique(), torch.tensor([z]))
        torch.testing.assert_close(stream[1](surroundings).features, features, atol=1e-14, rtol=0)
        if method != "random":
            assert ((features @ features.T) > 1 - 1e-9).sum() == len(features)


def test_thinning_costs_little(stream, monkeypatch):
    """The variance that greedy centres leave unexplained in the whole pool, thinned on the way or not."""
    pool = torch.cat(_pool(stream, 6))

    def left(features: torch.Tensor) -> float:
        k = profile(pool @ features.T)
        return float(len(pool) - (k * (k @ torch.linalg.pinv(profile(features @ features.T), hermitian=True))).sum())

    full, _ = _choose(stream, n=9)
    monkeypatch.setattr(sparse_points, "POOL_BYTES", 1)
    thinned, _ = _choose(stream, n=9)
    assert len(thinned[6][0]) == len(full[6][0])
    random = left(pool[sparse_points.select_rows("random", pool, len(full[6][0]), profile, 0)[0]])
    assert left(thinned[6][0]) < min(1.5 * left(full[6][0]), random)


def test_merged_candidates_are_those_of_the_stream(stream, monkeypatch):
    """To the last bit, as long as all of them fit; and with no room each pool has twice the centres at most."""
    parts, made = stream
    choice = sparse_points.CentreChoice(made, KERNEL, "greedy", 9, "species", 0)

    def merged() -> sparse_points.Candidates:
        first, second, third = (sparse_points.Candidates(choice).collect(p) for p in (parts[:1], parts[1:4], parts[4:]))
        return first.merge(second).merge(third)

    whole, found = sparse_points.Candidates(choice).collect(parts), merged()
    assert found.counts == whole.counts
    for z, (features, surroundings) in whole.chosen().items():
        assert torch.equal(found.chosen()[z][0], features)
        assert torch.equal(found.chosen()[z][1].vectors, surroundings.vectors)
    monkeypatch.setattr(sparse_points, "_room", lambda *_: 0)
    thinned = merged()
    assert {z: pool.size() for z, pool in thinned.pools.items()} == {6: 12, 8: 6}
    assert {z: len(features) for z, (features, _) in thinned.chosen().items()} == {6: 6, 8: 3}


def test_quotas_add_up():
    assert sparse_points._quotas(10, "species", {6: 30, 8: 10, 1: 60}) == {6: 3, 8: 1, 1: 6}
    assert sparse_points._quotas(7, {6: 4, 8: 3}, {6: 30, 8: 10}) == {6: 4, 8: 3}
    assert sparse_points._quotas(4, {6: 4}, {6: 30, 8: 10}) == {6: 4, 8: 1}
    shared = sparse_points._quotas(7, "species", {6: 3, 8: 3, 1: 3})
    assert math.isclose(sum(shared.values()), 7, abs_tol=2)
    assert min(sparse_points._quotas(3, "species", {6: 1000, 8: 1}).values()) >= 1  # no species is left without
