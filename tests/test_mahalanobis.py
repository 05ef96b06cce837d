"""Mahalanobis distance of features: clusters, thresholds, what lies outside the reduced space, updates."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from sklearn.covariance import OAS

from gpmlp.core.errors import UserError
from gpmlp.uncertainty import mahalanobis as m
from gpmlp.uncertainty.mahalanobis import Mahalanobis, ReservoirSample

Z = 14


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


def _cloud(n: int, seed: int, centre: int = 0, spread: float = 0.05, dimension: int = 60, directions: int = 10):
    """Unit rows about one of a few fixed centres, along a few fixed directions of falling size."""
    rng = _generator(99)
    centres = _unit(torch.randn(4, dimension, generator=rng, dtype=torch.float64))
    basis = torch.randn(directions, dimension, generator=rng, dtype=torch.float64) / math.sqrt(dimension)
    drawn = torch.randn(n, directions, generator=_generator(seed), dtype=torch.float64)
    sizes = torch.logspace(0, -1.5, directions, dtype=torch.float64)
    return _unit(centres[centre] + spread * (drawn * sizes) @ basis)


def _one(clusters_of: Mahalanobis, features: torch.Tensor) -> torch.Tensor:
    return clusters_of.novelty(torch.full((len(features),), Z), features)


@pytest.fixture(scope="module")
def crystal_and_liquid() -> Mahalanobis:
    return m.fit_mahalanobis({Z: torch.cat([_cloud(500, 0, 0, 0.005), _cloud(700, 1, 1, 0.05)])})


def test_between_two_clusters_is_far_from_both(crystal_and_liquid, monkeypatch):
    """What lies between is as unlike the data as anything; one Gaussian over both takes it for their mean."""
    crystal, liquid = sorted(crystal_and_liquid.species[Z].count.tolist())
    assert 490 < crystal <= 500 and 690 < liquid <= 700  # but for rows that came close to others by chance
    a, b = _cloud(1, 4, 0, 0.0), _cloud(1, 4, 1, 0.0)
    between = torch.cat([0.7 * a + 0.3 * b, 0.5 * a + 0.5 * b])
    assert (_one(crystal_and_liquid, between) > 2).all()
    assert (_one(crystal_and_liquid, torch.cat([a, b])) < 1).all()
    # displaced as the liquid is, but about the crystal
    assert (_one(crystal_and_liquid, _cloud(20, 5, 0, 0.05)) > 2).double().mean() > 0.9
    monkeypatch.setattr(m, "CLUSTERS", 1)
    x = torch.cat([_cloud(500, 0, 0, 0.005), _cloud(700, 1, 1, 0.05)])
    blind = m.fit_mahalanobis({Z: x})
    assert len(blind.species[Z].count) == 1
    assert (_one(blind, between) < 1).all()


def test_distance_is_that_of_scipy_where_nothing_is_reduced():
    x = torch.randn(400, 8, generator=_generator(0), dtype=torch.float64) * torch.logspace(0, -1, 8) + 1
    spread = float((x - x.mean(0)).square().sum(1).mean())
    clusters = m.SpeciesClusters.fit(x, torch.zeros(400, dtype=torch.long), torch.tensor([spread]).double())
    found = Mahalanobis({Z: clusters}, {Z: 1.0}, 0.99)
    assert found.species[Z].components.shape == (8, 8)
    inverse = np.linalg.inv(np.cov(x.numpy(), rowvar=False, ddof=0) + spread / 400 * np.eye(8))
    query = torch.randn(30, 8, generator=_generator(1), dtype=torch.float64)
    expected = scipy.spatial.distance.cdist(query, x.mean(0)[None], "mahalanobis", VI=inverse)[:, 0]
    distance = found.distance(torch.full((30,), Z), query)
    # the floor, 1e-8 of the variance, is 1e-6 or less of the smallest eigenvalue here
    torch.testing.assert_close(distance, torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert expected.min() > 3


def test_reduced_space_and_residual_by_hand():
    """d² = (y − m)ᵀ S⁻¹ (y − m) + |r|²/s with a basis of numpy's SVD, 100 directions cut to 40, and one row more along each."""
    rng = np.random.default_rng(0)
    x = 0.05 * rng.standard_normal((600, 100)) * np.logspace(0, -1, 100) + 0.1
    found = m.fit_mahalanobis({Z: torch.from_numpy(x)}).species[Z]
    centred = x - x.mean(0)
    more = (centred**2).sum(1).mean() / 600
    v = np.linalg.svd(centred)[2][:40].T
    assert found.components.shape == (100, 40)
    across = (centred - centred @ v @ v.T) ** 2
    inverse = np.linalg.inv(np.cov(centred @ v, rowvar=False, ddof=0) + more * np.eye(40))
    query = rng.standard_normal((20, 100)) * 0.1 + 0.1 - x.mean(0)
    rest = ((query - query @ v @ v.T) ** 2).sum(1) / (across.sum(1).mean() + more)
    expected = np.sqrt(np.einsum("nr,rs,ns->n", query @ v, inverse, query @ v) + rest)
    torch.testing.assert_close(
        found.distance(torch.from_numpy(query + x.mean(0))), torch.from_numpy(expected), rtol=1e-5, atol=0
    )


def test_direction_outside_the_reduced_space_is_seen():
    found = m.fit_mahalanobis({Z: _cloud(800, 0)})
    clusters = found.species[Z]
    assert clusters.components.shape[1] < 30
    across = torch.randn(60, generator=_generator(2), dtype=torch.float64)
    across -= clusters.components @ (clusters.components.T @ across)
    across *= 0.03 / across.norm()
    like = _cloud(50, 3)
    y, y_moved = clusters.reduce(like)[0], clusters.reduce(like + across)[0]
    torch.testing.assert_close(y, y_moved, atol=1e-12, rtol=0)
    assert (_one(found, like) < 1.5).all()
    assert (_one(found, like + across) > 2.5).all()  # 0.03 against √(4.7e-3 / 800) = 0.0024, over the threshold


@pytest.mark.parametrize("n", [1, 2, 50])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_perfect_crystal(n, dtype):
    """All rows equal: zero (to the rounding of the type) at the crystal, large away from it, never NaN."""
    crystal = _cloud(1, 0).expand(n, -1).to(dtype)
    found = m.fit_mahalanobis({Z: crystal})
    assert found.thresholds == {Z: m.LEAST_THRESHOLD}
    at, away = _one(found, crystal), _one(found, _cloud(20, 1, spread=1e-3).to(dtype))
    assert at.dtype == away.dtype == dtype
    assert (at < 0.2).all()
    assert (away > 10).all() and torch.isfinite(away).all()
    if dtype == torch.float64:
        assert (at < 1e-8).all()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_hardly_any_rows(n):
    """Fewer rows than dimensions: finite numbers, the rows themselves near, anything else compared with what was left out."""
    x = _cloud(n, 0)
    found = m.fit_mahalanobis({Z: x})
    assert (_one(found, x) < 1).all()
    new = _one(found, _cloud(50, 1))
    assert torch.isfinite(new).all()
    assert float(new.median()) < float(_one(found, _cloud(50, 1, 1)).median()) / 3


def test_perfect_crystal_beside_a_liquid():
    """Its cluster has no variance but the floor; the liquid's is not touched by it."""
    x = torch.cat([_cloud(1, 0, 0).expand(200, -1), _cloud(400, 1, 1, 0.05)])
    found = m.fit_mahalanobis({Z: x})
    crystal, liquid = sorted(found.species[Z].count.tolist())
    assert crystal == 200 and 390 < liquid <= 400
    assert (_one(found, _cloud(1, 0, 0)) < 1).all()
    assert (_one(found, _cloud(50, 2, 0, 0.05)) > 2).all()
    assert (_one(found, _cloud(200, 3, 1, 0.05)) < 1).double().mean() > 0.9


def test_few_odd_rows_make_no_cluster_and_hide_none():
    """Five rows far away are no cluster of their own, and two true clusters are found all the same."""
    x = torch.cat([_cloud(300, 0, 0), _cloud(300, 1, 1), _cloud(5, 2, 2)])
    counts = m.fit_mahalanobis({Z: x}).species[Z].count
    assert len(counts) == 2 and (counts >= 295).all() and 595 < counts.sum() <= 605


def test_share_of_new_environments_above_the_threshold():
    """1 − quantile, for data like those fitted; 4000 rows leave it uncertain by 0.005, 1000 left out by 0.01."""
    found = m.fit_mahalanobis({Z: _cloud(1000, 0)}, quantile=0.9)
    assert 0.07 < float((_one(found, _cloud(4000, 2)) > 1).double().mean()) < 0.13


@pytest.mark.parametrize("n", [10, 80, 900])
def test_threshold_from_rows_left_out(n):
    """The 0.99 quantile of the novelty of new rows is near 1; judged by their own fit, training rows would give a smaller threshold."""
    x = _cloud(n, 0, directions=30)
    found = m.fit_mahalanobis({Z: x})
    assert 0.7 < float(_one(found, _cloud(2000, 2, directions=30)).quantile(0.99)) < 1.4
    assert found.thresholds[Z] > found.distance(torch.full((n,), Z), x).quantile(0.99)


def test_incremental_statistics_are_those_of_all_rows():
    first, second = _cloud(500, 0, 0, 0.005), _cloud(700, 1, 1, 0.05)
    labels = (torch.arange(1200) >= 500).long()
    fitted = m.SpeciesClusters.fit(torch.cat([first, second]), labels, torch.tensor([2e-5, 2e-3]).double())
    start = Mahalanobis({Z: fitted, 1: m.fit_mahalanobis({1: _cloud(40, 7)}).species[1]}, {Z: 4.0, 1: 3.0}, 0.99)
    more = [(_cloud(30, 10 + k, 0, 0.005), _cloud(50, 20 + k, 1, 0.05)) for k in range(5)]
    found = start
    for pair in more:
        x = torch.cat(pair)
        found = found.updated(torch.full((len(x),), Z), x)
    clusters, crystal = found.species[Z], int(start.species[Z].count.argmin())
    whole = {
        crystal: torch.cat([first, *(p[0] for p in more)]),
        1 - crystal: torch.cat([second, *(p[1] for p in more)]),
    }
    for k, rows in whole.items():
        centred = rows - clusters.centre
        y = centred @ clusters.components
        assert clusters.count[k] == len(rows)
        # sums of about 1000 terms of order 1e-2
        torch.testing.assert_close(clusters.mean[k], y.mean(0), atol=1e-13, rtol=0)
        torch.testing.assert_close(clusters.scatter[k], (y - y.mean(0)).T @ (y - y.mean(0)), atol=1e-11, rtol=0)
        across = (centred - y @ clusters.components.T).square().sum()
        torch.testing.assert_close(clusters.residual[k], across, atol=1e-12, rtol=1e-9)
    assert found.thresholds == start.thresholds
    assert start.species[Z].count.sum() == 1200  # as it was
    assert found.species[1] is start.species[1]


def test_new_environments_come_near_by_updates():
    start = m.fit_mahalanobis({Z: _cloud(200, 0)})
    strange = _cloud(100, 2, spread=0.3)
    before = _one(start, strange)
    found = start.updated(torch.full((100,), Z), strange)
    assert (_one(found, strange) < before).all()
    species = torch.full((100,), 8)
    assert torch.isinf(start.updated(species, strange).novelty(species, strange)).all()


def test_state_round_trip(crystal_and_liquid):
    header, tensors = crystal_and_liquid.state()
    again = Mahalanobis.from_state(json.loads(json.dumps(header, allow_nan=False)), tensors)
    x = _cloud(10, 0)
    assert torch.equal(_one(again, x), _one(crystal_and_liquid, x))
    assert (again.quantile, again.thresholds) == (crystal_and_liquid.quantile, crystal_and_liquid.thresholds)
    assert all(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tensors.values())
    assert set(m.fit_mahalanobis({}).state()[1]) == set()


def test_rows_that_repeat_others_count_once():
    """A set four times over, even with the small displacements of later steps: thresholds and distances stay as they were."""
    x, owners, query = _cloud(60, 0), torch.arange(60) // 3, _cloud(200, 1)
    once = m.fit_mahalanobis({Z: x}, {Z: owners})
    again = _unit(x.repeat(3, 1) + 1e-4 * torch.randn(180, 60, generator=_generator(2), dtype=torch.float64))
    often = m.fit_mahalanobis(
        {Z: torch.cat([x, again])}, {Z: torch.cat([owners, owners + 20, owners + 40, owners + 60])}
    )
    assert often.species[Z].count == once.species[Z].count == 60
    torch.testing.assert_close(_one(often, query), _one(once, query), rtol=0.1, atol=0)


def test_whole_structures_are_left_out():
    """Rows of one structure are nearly the same: left out one by one they would be judged by their neighbours."""
    generator = _generator(3)
    at = _cloud(12, 0).repeat_interleave(10, 0)
    x = _unit(at + 3e-2 * torch.randn(at.shape, generator=generator, dtype=torch.float64) / 60**0.5)
    found = m.fit_mahalanobis({Z: x}, {Z: torch.arange(120) // 10})
    alone = m.fit_mahalanobis({Z: x})
    assert 0.5 < float(_one(found, _cloud(500, 1)).quantile(0.99)) < 1.5
    assert found.thresholds[Z] > 1.2 * alone.thresholds[Z]


def test_few_rows_give_a_wide_threshold():
    """The largest of n distances is the n/(n+1) quantile; what is missing to 0.99 comes from the width of their logarithms."""
    distances = torch.logspace(0.2, 0.5, 9, dtype=torch.float64)
    assert m._threshold(distances[:1], 0.99) == m._threshold(distances[:0], 0.99) == m.LEAST_THRESHOLD
    found = m._threshold(distances, 0.99)
    logs = distances.log().numpy()
    width = np.sqrt(((logs[4:] - logs[4]) ** 2).mean())
    tail = np.exp(logs[4] + scipy.stats.t.ppf(0.99, 8) * np.sqrt(10 / 9) * width)
    assert tail < m.WIDEST * 10**0.5
    assert found == pytest.approx(np.sqrt(10**0.5 * tail)) and found > 10**0.5
    two = torch.tensor([1.5, 6.0], dtype=torch.float64)
    assert m._threshold(two, 0.99) == pytest.approx(6 * math.sqrt(m.WIDEST))
    many = torch.arange(1, 1001, dtype=torch.float64)
    assert m._threshold(many, 0.9) < 1000


def test_clusters_of_files_without_a_spread_are_shrunk_as_they_were():
    """S by OAS of scikit-learn, s the mean of |r|²."""
    x = torch.randn(50, 12, generator=_generator(0), dtype=torch.float64) * torch.logspace(0, -1, 12) + 1
    clusters = m.SpeciesClusters.fit(x, torch.zeros(50, dtype=torch.long), torch.ones(1, dtype=torch.float64))
    header, tensors = Mahalanobis({Z: clusters}, {Z: 2.5}, 0.9).state()
    del tensors[f"{Z}.spread"]
    old = Mahalanobis.from_state(header, tensors)
    query = torch.randn(20, 12, generator=_generator(1), dtype=torch.float64)
    inverse = np.linalg.inv(OAS().fit(x.numpy()).covariance_)
    expected = scipy.spatial.distance.cdist(query, x.mean(0)[None], "mahalanobis", VI=inverse)[:, 0]
    torch.testing.assert_close(_one(old, query), torch.from_numpy(expected) / 2.5, rtol=1e-5, atol=0)


def test_species_are_kept_apart_and_unseen_ones_are_infinitely_far():
    seen = {1: _cloud(100, 0, 0), 8: _cloud(100, 1, 1), 26: _cloud(0, 0)}
    found = m.fit_mahalanobis(seen)
    species = torch.tensor([8, 1, 6, 8, 26])
    x = torch.cat([_cloud(1, 2, k) for k in (1, 0, 0, 0, 0)])
    novelty = found.novelty(species, x)
    assert (novelty[:2] < 1).all()
    assert torch.isinf(novelty[[2, 4]]).all()
    assert novelty[3] > 2 and torch.isfinite(novelty[3])
    expected = found.distance(species, x)[:2] / torch.tensor([found.thresholds[8], found.thresholds[1]])
    torch.testing.assert_close(novelty[:2], expected)
    assert found.novelty(species[:0], x[:0]).shape == (0,)
    assert torch.isinf(m.fit_mahalanobis({}).novelty(species, x)).all()


def test_features_that_are_no_numbers_are_infinitely_far(crystal_and_liquid):
    x = _cloud(2, 0)
    x[0, 3] = math.nan
    found = _one(crystal_and_liquid, x)
    assert torch.isinf(found[0]) and torch.isfinite(found[1])


def test_float32_follows_float64(crystal_and_liquid):
    x = torch.cat([_cloud(20, 5, 0, 0.005), _cloud(20, 5, 1, 0.05), _cloud(20, 5, 2)])
    single = _one(crystal_and_liquid, x.float())
    assert single.dtype == torch.float32
    # rounding of unit features, 6e-8, against the rms of what lies across, about 1e-4
    torch.testing.assert_close(single.double(), _one(crystal_and_liquid, x), rtol=5e-3, atol=5e-3)
    fitted = m.fit_mahalanobis({Z: _cloud(100, 0).float()})
    assert fitted.species[Z].scatter.dtype == torch.float64


def test_order_of_the_rows_does_not_matter(crystal_and_liquid):
    x = torch.cat([_cloud(500, 0, 0, 0.005), _cloud(700, 1, 1, 0.05)])
    order = torch.randperm(1200, generator=_generator(0))
    again = m.fit_mahalanobis({Z: x[order]}, {Z: order})
    query = torch.cat([_cloud(20, 8, 0), _cloud(20, 8, 1)])
    # small eigenvalues, 1e-6 of the largest, amplify rounding
    torch.testing.assert_close(_one(again, query), _one(crystal_and_liquid, query), rtol=1e-6, atol=0)


def test_order_does_not_matter_where_clusters_touch():
    """One curved sheet, cut in two: where, depends on the start of the mixture, and that on the order of what it is given."""
    y = m._principal(_cloud(700, 1, 1, 0.4))[1]
    assert (y.gather(0, y.abs().argmax(0, keepdim=True)) > 0).all()  # signs of directions are not chance
    x = _cloud(700, 1, 1, 0.4)
    first = m.fit_mahalanobis({Z: x}).species[Z]
    assert len(first.count) > 1
    for seed in range(3):
        again = m.fit_mahalanobis({Z: x[torch.randperm(700, generator=_generator(seed))]}).species[Z]
        assert torch.equal(again.count, first.count)


def test_differentiable_in_the_features(crystal_and_liquid):
    x = torch.cat([_cloud(2, 5, 0, 0.05), _cloud(2, 5, 1, 0.5)]).requires_grad_()
    species = torch.full((4,), Z)
    assert torch.autograd.gradcheck(lambda f: crystal_and_liquid.distance(species, f), (x,), atol=1e-3, rtol=1e-4)
    at = _cloud(1, 0).requires_grad_()
    _one(m.fit_mahalanobis({Z: at.detach()}), at).sum().backward()
    assert torch.equal(at.grad, torch.zeros_like(at))


def test_bad_input(crystal_and_liquid):
    x = _cloud(5, 0)
    with pytest.raises(UserError, match=r"`features` must have shape \(n, 60\)"):
        _one(crystal_and_liquid, x[:, :10])
    with pytest.raises(UserError, match="`species` must have shape"):
        crystal_and_liquid.distance(torch.ones(3), x)
    with pytest.raises(UserError, match="of Si hold a NaN"):
        m.fit_mahalanobis({Z: torch.full((3, 4), math.nan)})
    with pytest.raises(UserError, match="Species Si, a structure for each row"):
        m.fit_mahalanobis({Z: x}, {Z: torch.arange(4)})
    with pytest.raises(UserError, match="`quantile`"):
        m.fit_mahalanobis({Z: x}, quantile=99)


def test_reservoir_takes_each_row_alike():
    """Of 40 rows 10 stay: each in a quarter of 600 draws, within four binomial errors (0.0177) of it."""
    rows = torch.arange(40.0)[:, None]
    kept = torch.zeros(40)
    for seed in range(600):
        sample = ReservoirSample(10, seed)
        for chunk in rows.split([1, 20, 0, 4, 15]):
            sample.add(chunk, 7 + chunk[:, 0].long())
        chosen = sample.rows()[:, 0].long()
        assert torch.equal(sample.owners(), 7 + chosen)
        assert len(chosen.unique()) == 10
        kept[chosen] += 1 / 600
    assert (kept - 0.25).abs().max() < 0.071


def test_reservoir_by_seed_whatever_the_chunks():
    rows = torch.randn(300, 3, generator=_generator(0))
    found = {}
    for name, seed, size in (("one", 0, 300), ("small", 0, 7), ("other", 1, 300)):
        sample = ReservoirSample(20, seed)
        for chunk in rows.split(size):
            sample.add(chunk, torch.zeros(len(chunk), dtype=torch.long))
        found[name] = sample.rows()
    assert torch.equal(found["one"], found["small"])
    assert not torch.equal(found["one"], found["other"])
    few = ReservoirSample(1000, 0)
    assert few.rows().shape == (0, 0)
    few.add(rows, torch.arange(300))
    assert torch.equal(few.rows(), rows)
    with pytest.raises(UserError, match="`size`"):
        ReservoirSample(0, 0)


def test_merged_reservoirs_are_that_of_the_stream():
    """Wherever the stream was cut: a later sample knows how many rows came before."""
    rows, owners = torch.randn(300, 3, generator=_generator(0)), torch.arange(300)
    whole, empty = ReservoirSample(20, 5), ReservoirSample(20, 5)
    whole.add(rows, owners)
    for cuts in ([150, 150], [0, 300], [100, 100, 100], [1, 5, 294]):
        before, merged = 0, None
        for part, who in zip(rows.split(cuts), owners.split(cuts), strict=True):
            sample = ReservoirSample(20, 5, before)
            sample.add(part, who)
            merged, before = sample if merged is None else merged.merge(sample), before + len(part)
        assert torch.equal(merged.rows(), whole.rows()) and torch.equal(merged.owners(), whole.owners())
    assert torch.equal(empty.merge(whole).rows(), whole.rows()) and torch.equal(whole.merge(empty).rows(), whole.rows())
    assert len(empty.rows()) == 0
