"""Selection from a pool: the greedy order is that of dense conditioning, nothing is picked twice, and every mistake has a message."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import ase.build
import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from conftest import copper
from test_cli import gpmlp  # noqa: F401  (a fixture)

from gpmlp.core.errors import UserError
from gpmlp.descriptors import make_descriptor
from gpmlp.fitting import sparse_points
from gpmlp.gp import covariances
from gpmlp.io import ase_atoms
from gpmlp.learning import pool as picking
from gpmlp.learning.pool import METHODS, ConditionedUncertainty, label_variance, select_pool

TIGHT = 1e-10  # eV^2: covariances are of the order of 1 eV^2, and lose some digits in the whitening


def primitive(seed: int) -> Atoms:
    """One strained atom of copper: its local energy is its total energy."""
    rng = np.random.default_rng(seed)
    frame = ase.build.bulk("Cu")
    frame.set_cell(frame.cell.array @ (np.eye(3) + 0.12 * rng.standard_normal((3, 3))), scale_atoms=True)
    return frame


def structures(frames: list[Atoms]):
    return ase_atoms.structures_from_ase(frames)


def rattled(frame: Atoms, size: float, seed: int = 0) -> Atoms:
    other = frame.copy()
    other.rattle(size, rng=np.random.default_rng(seed))
    return other


@pytest.fixture(scope="module")
def pool():
    """12 cells of 4 and 8 atoms, more strained and rattled than what the potential was fitted to."""
    return structures([copper(100 + s, 1 + s % 2, strain=0.06, rattle=0.03 * (1 + s % 5)) for s in range(12)])


def local_covariance(potential, pool) -> torch.Tensor:
    """Posterior covariance of all local energies of the pool, dense."""
    model = potential.variances
    views = [term.environments(pool) for term in potential.terms]
    every = list(zip(model.priors, model.blocks, views, strict=True))
    rows = [covariances.atom_rows(v.environments.features, pool.species, p.kernel, u) for p, u, v in every]
    a, b = model.whiten(torch.cat(rows, dim=1))
    x = [v.environments.features for v in views]
    same = pool.species[:, None] == pool.species
    scale = [torch.tensor([p.signal[int(z)] for z in pool.species], dtype=torch.float64) for p in model.priors]
    prior = sum(
        s[:, None] * s * p.kernel.profile(f @ f.T)[0] * same for s, f, p in zip(scale, x, model.priors, strict=True)
    )
    return model.amplitude * (prior - a @ a.T) + b @ b.T


def conditioned(covariance: torch.Tensor, pivots: list[int], noise: float) -> torch.Tensor:
    """Variances left when the pivots were observed with that noise, all at once."""
    cross = covariance[:, pivots]
    corner = covariance[pivots][:, pivots] + noise * torch.eye(len(pivots)).double()
    return covariance.diagonal() - (cross * torch.linalg.solve(corner, cross.T).T).sum(1)


def brute_force(covariance, offsets, n, noise) -> tuple[list[int], list[float]]:
    """Greedy picking of structures by the most uncertain local energy, everything made anew at each step."""
    chosen, scores, pivots = [], [], []
    for _ in range(n):
        left = conditioned(covariance, pivots, noise)
        worst = [float(left[a:b].max()) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
        best = max((i for i in range(len(worst)) if i not in chosen), key=lambda i: worst[i])
        chosen.append(best)
        scores.append(worst[best] ** 0.5)
        pivots += range(offsets[best], offsets[best + 1])
    return chosen, scores


# --- the order


def test_structures_of_one_atom_against_the_covariance_of_energies(potential):
    pool = structures([primitive(s) for s in range(14)])
    joint = potential.covariance(pool, calibrated=False)[: len(pool), : len(pool)]
    noise = label_variance(potential, 29)
    expected, scores = brute_force(joint, list(range(15)), 8, noise)
    found = select_pool(pool, 8, "variance", potential)
    assert found.structures.tolist() == expected
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert found.repeats == 0 and found.atoms is None


def test_dense_local_covariance_sums_to_that_of_energies(potential, pool):
    """What the next tests compare with is right: C summed over atoms is the covariance of total energies."""
    dense = local_covariance(potential, pool)
    own = torch.nn.functional.one_hot(pool.structure_of_atom).double()
    n = len(pool)
    torch.testing.assert_close(
        own.T @ dense @ own, potential.covariance(pool, calibrated=False)[:n, :n], atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("cache", [None, 1])
def test_structures_against_dense_conditioning(potential, pool, monkeypatch, cache):
    """With room for all candidates and with room for none of them, which are then made again whenever they are needed."""
    if cache:
        monkeypatch.setattr(picking, "CACHE_BYTES", cache)
    expected, scores = brute_force(
        local_covariance(potential, pool), pool.offsets.tolist(), 7, label_variance(potential, 29)
    )
    found = select_pool(pool, 7, "variance", potential)
    assert found.structures.tolist() == expected
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert (found.scores.diff() <= 0).all()


def test_environments_against_dense_conditioning(potential, pool):
    dense, noise, expected = local_covariance(potential, pool), label_variance(potential, 29), []
    for _ in range(15):
        left = conditioned(dense, expected, noise)
        left[expected] = -1
        expected.append(int(left.argmax()))
    found = select_pool(pool, 15, "variance", potential, environments=True)
    assert found.atoms.tolist() == expected
    assert torch.equal(found.structures, pool.structure_of_atom[found.atoms])
    places = found.places(pool)
    assert [int(pool.offsets[s]) + p for s, p in zip(found.structures.tolist(), places, strict=True)] == expected


def test_first_scores_are_what_the_potential_predicts(potential, pool):
    """Variances and novelty before anything was picked: those of Potential.__call__."""
    told = potential(pool, variance="atom_energies", novelty=True, calibrated=False)
    belief = ConditionedUncertainty(potential, True, True)
    seen = belief.candidates(pool)
    variance, novelty = torch.cat([c.variance for c in seen]), torch.cat([c.novelty for c in seen])
    torch.testing.assert_close(variance, told.atom_energies_variance.epistemic, atol=TIGHT, rtol=1e-9)
    torch.testing.assert_close(novelty, told.novelty)
    product = torch.cat([c.scores for c in seen])
    torch.testing.assert_close(product, variance.sqrt() * novelty)
    for method, score in (("variance", variance.sqrt()), ("mahalanobis", novelty), ("both", product)):
        assert float(select_pool(pool, 1, method, potential).scores[0]) == pytest.approx(float(score.max()))


def test_novelty_is_measured_from_what_was_picked_in_the_metric_of_the_clusters(potential, pool):
    belief = ConditionedUncertainty(potential, False, True)
    candidates = belief.candidates(pool)
    first, second = candidates[0], candidates[1]
    before = second.novelty.clone()
    belief.condition_on(first, 2)
    belief.update(second)
    clusters, threshold = potential.novelty.species[29], potential.novelty.thresholds[29]
    whitening, spread = clusters.precision
    step = second.features[0] - first.features[0][2]
    y = step @ clusters.components
    across = (step - y @ clusters.components.T).square().sum(1)
    squared = torch.einsum("krs,ns->nkr", whitening, y).square().sum(2) + across[:, None] / spread
    expected = torch.minimum(before, squared.amin(1).sqrt() / threshold)
    # |r|² is a difference of squares: relative to the floor of s_k some six digits are left
    torch.testing.assert_close(second.novelty, expected, rtol=1e-4, atol=1e-4)
    assert float(first.novelty[2]) < 1e-9  # rounding of the whitening


def test_rows_too_long_for_memory_are_projected(potential, pool, monkeypatch):
    """Distances stay nearly what they are: in 64 random directions their relative standard deviation is 1/√128, of which 4 are allowed."""
    rich = dict(potential.recipe.descriptors[0].model_dump(), n_max=8, l_max=6)
    descriptor = make_descriptor(potential.species, rich)
    monkeypatch.setattr(picking, "ROW_BYTES", 1)
    for environments, size in ((False, len(pool)), (True, pool.n_atoms)):
        picks = SimpleNamespace(environments=environments, size=size, progress=lambda *_: None)
        short = picking._rows(descriptor, potential.species, pool, picks)
        with monkeypatch.context() as patch:
            patch.setattr(picking, "ROW_BYTES", 1 << 30)
            whole = picking._rows(descriptor, potential.species, pool, picks)
        assert short.shape[1] < 70 < 200 < whole.shape[1]
        exact = torch.pdist(whole)
        ratio = (torch.pdist(short) / exact)[exact > 1e-9]
        assert (ratio.log().abs() < 4 / 128**0.5).all() and ratio.std() > 0.01
    assert len(select_pool(pool, 9, "cur", potential, environments=True).atoms.unique()) == 9


# --- nothing twice


@pytest.mark.parametrize("environments", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_picked_twice_while_others_remain(potential, method, environments):
    """Each structure is there again, once as it is, once moved by a thousandth of an A: the copies come last or not at all."""
    frames = [copper(200 + s, strain=0.06, rattle=0.15) for s in range(4)]
    copies = structures([*frames, *(rattled(f, 0.001) for f in frames), *frames])
    n = 16 if environments else 4
    found = select_pool(copies, n, method, potential, environments)
    assert found.repeats == 0
    if environments:
        assert len({(int(s) % 4, p) for s, p in zip(found.structures, found.places(copies), strict=True)}) == 16
    else:
        assert len({int(s) % 4 for s in found.structures}) == 4
    more = select_pool(copies, n + 3, method, potential, environments)
    assert more.repeats == 3
    items = more.atoms if environments else more.structures
    assert len(items.unique()) == n + 3
    kept = (found.atoms if environments else found.structures).tolist()
    assert method == "cur" or items.tolist()[:n] == kept  # the leverage of CUR depends on how many are asked for


@pytest.mark.parametrize("method", ["variance", "mahalanobis", "both"])
def test_a_batch_of_two_avoids_near_duplicates(potential, method):
    """The two highest scores are nearly one structure (moved by more than what counts as the same); a batch takes something else."""
    strange = copper(7, strain=0.08, rattle=0.15)
    frames = [rattled(copper(31, strain=0.05, rattle=0.15), 0.01), strange, rattled(strange, 0.012), copper(33)]
    pool = structures(frames)
    belief = ConditionedUncertainty(potential, method != "mahalanobis", method != "variance")
    top = sorted(range(4), key=lambda s: -float(belief.candidates(pool)[s].scores.max()))
    assert set(top[:2]) == {1, 2}
    x = [potential.terms[0].environments(pool.select([s])).environments.features for s in (1, 2)]
    assert torch.cdist(*x).amin(1).max() > picking.LIKE
    found = select_pool(pool, 2, method, potential)
    assert found.structures[0] == top[0]
    assert found.structures[1] not in (1, 2)


@pytest.mark.parametrize("environments", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_like_what_is_excluded_is_picked(potential, pool, method, environments):
    first = select_pool(pool, 3, method, potential)
    known = pool.select(first.structures)
    moved = known.with_positions(known.positions + 0.0005 * torch.sin(known.positions))
    found = select_pool(pool, 5, method, potential, environments, exclude=moved)
    assert not set(found.structures.tolist()) & set(first.structures.tolist())
    assert found.repeats == 0
    n = (pool.n_atoms if environments else len(pool)) - 1
    with pytest.raises(UserError, match="only .* of the .* are unlike all that are excluded"):
        select_pool(pool, n, method, potential, environments, exclude=moved)


def test_what_is_excluded_counts_as_known(potential, pool):
    """Scores are those given that the excluded structures were labelled: lower than without."""
    first = int(select_pool(pool, 1, "variance", potential).structures[0])
    rest = pool.select([s for s in range(len(pool)) if s != first])
    with_it = select_pool(pool, 2, "variance", potential)
    told = select_pool(rest, 1, "variance", potential, exclude=pool.select([first]))
    assert float(told.scores[0]) == pytest.approx(float(with_it.scores[1]), rel=1e-6)
    assert float(select_pool(rest, 1, "variance", potential).scores[0]) > float(told.scores[0])


def test_farthest_keeps_away_from_known_rows():
    x = torch.nn.functional.normalize(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)).double())
    chosen, scores = sparse_points.farthest_points(x[10:], 5, x[:10])
    distance = torch.cdist(x[10:], x[:10]).square().min(1).values
    assert int(chosen[0]) == int(distance.argmax())
    assert float(scores[0]) == pytest.approx(float(distance.max()))
    assert (scores.diff() <= 0).all()


# --- without a model, and by chance


def test_without_a_model_of_several_species():
    rng = np.random.default_rng(0)
    frames = [ase.build.molecule(name) for name in ("H2O", "CH3OH", "CH4", "CO2", "H2O")]
    frames[4].rattle(0.1, rng=rng)
    pool = structures(frames)
    found = select_pool(pool, 4)
    assert found.method == "farthest"
    assert {0, 4} - set(found.structures.tolist())  # the two waters are the nearest pair
    single = select_pool(pool, 6, environments=True)
    assert set(pool.species[single.atoms].tolist()) == {1, 6, 8}
    again = select_pool(pool, 4, exclude=structures([ase.build.molecule("NH3"), frames[2]]))
    assert 2 not in again.structures.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_seeds_decide_where_there_is_chance(potential, pool, method):
    one, same, other = (select_pool(pool, 6, method, potential, seed=s) for s in (3, 3, 4))
    assert torch.equal(one.structures, same.structures) and torch.equal(one.scores, same.scores)
    assert torch.equal(one.structures, other.structures) == (method not in ("cur", "random"))


# --- mistakes


def test_mistakes(potential, pool):
    with pytest.raises(UserError, match="Cannot pick 13 structures: the pool holds 12"):
        select_pool(pool, 13)
    with pytest.raises(UserError, match="Cannot pick 73 environments: the pool holds 72"):
        select_pool(pool, 73, environments=True)
    with pytest.raises(UserError, match="must be 1 or more; got 0"):
        select_pool(pool, 0)
    with pytest.raises(UserError, match="Unknown method 'varianc'. Perhaps you meant 'variance'"):
        select_pool(pool, 1, "varianc")
    for method in picking.BY_MODEL:
        with pytest.raises(UserError, match=f"'{method}' needs a model; give one, or choose one of: farthest, cur"):
            select_pool(pool, 1, method)
    silver = structures([ase.build.bulk("Ag")])
    with pytest.raises(UserError, match="frame 0: the potential was not trained on Ag"):
        select_pool(silver, 1, "random", potential)
    with pytest.raises(UserError, match="was not trained on Ag"):
        select_pool(pool, 1, potential=potential, exclude=silver)


def test_the_default_method_is_what_the_model_can_do(potential, pool):
    assert select_pool(pool, 1, potential=potential).method == "both"
    assert select_pool(pool, 1, potential=replace(potential, novelty=None)).method == "variance"
    assert select_pool(pool, 1, potential=replace(potential, variances=None)).method == "mahalanobis"
    assert select_pool(pool, 1, potential=replace(potential, variances=None, novelty=None)).method == "farthest"
    with pytest.raises(UserError, match="fitted with its novelty"):
        select_pool(pool, 1, "both", replace(potential, novelty=None))
    with pytest.raises(UserError, match="fitted with its posterior factor"):
        select_pool(pool, 1, "variance", replace(potential, variances=None))


# --- the command


@pytest.fixture(scope="module")
def pool_file(tmp_path_factory):
    """Labelled structures with information of their own, the last like the first."""
    frames = [copper(300 + s, 1 + s % 2, strain=0.06, rattle=0.15) for s in range(5)]
    frames.append(frames[0])
    for i, frame in enumerate(frames):
        frame.info["origin"] = f"run {i}"
        frame.arrays["tag"] = np.arange(len(frame))
    path = tmp_path_factory.mktemp("pool") / "pool.xyz"
    ase.io.write(path, frames)
    return path


def test_select_writes_structures_as_they_were_in_the_pool(gpmlp, model_file, pool_file, tmp_path):  # noqa: F811
    out_file = tmp_path / "chosen.xyz"
    status, out, err = gpmlp("select", pool_file, "-n", 3, "-o", out_file, "--model", model_file)
    assert status == 0, err
    assert "picked 3 of 6 structures" in out and "by both" in out and f"wrote {out_file}" in out
    assert len(out.splitlines()) == 1 and "pool: " in err and "picking: " in err
    source, found = ase.io.read(pool_file, ":"), ase.io.read(out_file, ":")
    assert [f.info.pop("gpmlp_selected_rank") for f in found] == [0, 1, 2]
    scores = [f.info.pop("gpmlp_selected_score") for f in found]
    assert scores == sorted(scores, reverse=True)
    for frame in found:
        own = source[int(frame.info["origin"].split()[1])]
        assert frame.info == own.info and set(frame.arrays) == set(own.arrays)
        assert frame.get_potential_energy() == own.get_potential_energy()
        np.testing.assert_allclose(frame.get_forces(), own.get_forces(), atol=1e-7)
        np.testing.assert_allclose(frame.get_stress(), own.get_stress(), atol=1e-7)


def test_select_environments_without_a_model(gpmlp, pool_file, tmp_path):  # noqa: F811
    out_file = tmp_path / "chosen.xyz"
    arguments = ["select", pool_file, "-n", 7, "-o", out_file, "--environments", "--method", "cur", "--seed", 2]
    status, out, err = gpmlp(*arguments)
    assert status == 0, err
    found = ase.io.read(out_file, ":")
    assert f"picked 7 environments in {len(found)} of 6 structures" in out
    ranks = np.concatenate([f.arrays["gpmlp_selected"] for f in found])
    assert sorted(ranks[ranks >= 0]) == list(range(7)) and ranks.min() == -1
    best = [min(r for r in f.arrays["gpmlp_selected"] if r >= 0) for f in found]
    assert best == sorted(best) and [f.info["gpmlp_selected_rank"] for f in found] == list(range(len(found)))
    before = out_file.read_bytes()
    assert gpmlp(*arguments)[0] == 0 and out_file.read_bytes() == before


def test_select_says_when_only_repeats_are_left(gpmlp, pool_file, tmp_path):  # noqa: F811
    status, _, err = gpmlp("select", pool_file, "-n", 6, "-o", tmp_path / "c.xyz")
    assert status == 0 and "the last 1 of 6 are like others" in err


def test_select_refuses(gpmlp, model_file, pool_file, train_file, tmp_path):  # noqa: F811
    out_file, empty = tmp_path / "c.xyz", tmp_path / "empty.xyz"
    empty.write_text("")
    ase.io.write(tmp_path / "silver.xyz", ase.build.bulk("Ag"))
    own = tmp_path / "own.xyz"
    own.write_bytes(pool_file.read_bytes())
    cases = [
        ((pool_file, "-n", 7, "-o", out_file), "Cannot pick 7 structures: the pool holds 6"),
        ((pool_file, "-n", 1, "-o", out_file, "--method", "variance"), "needs a model"),
        ((tmp_path / "silver.xyz", "-n", 1, "-o", out_file, "--model", model_file), "not trained on Ag"),
        ((empty, "-n", 1, "-o", out_file), "is empty"),
        ((own, "-n", 1, "-o", own), "is the pool too"),
        ((pool_file, "-n", 1, "-o", own, "--exclude", own), "is --exclude too"),
        ((pool_file, "-n", 6, "-o", out_file, "--exclude", pool_file), "only 0 of the 6"),
        ((pool_file, "-n", 1, "-o", out_file, "--method", "best"), "--method"),
    ]
    for arguments, text in cases:
        status, out, err = gpmlp("select", *arguments)
        assert status == 2 and text in err and not out, (text, err)
        assert not out_file.exists() and own.read_bytes() == pool_file.read_bytes()
    status, _, err = gpmlp("select", pool_file, "-n", 2, "-o", out_file, "--exclude", train_file)
    assert status == 0, err
