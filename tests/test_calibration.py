"""Calibration: the scale, the weights of the parts of a variance, conformal intervals."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import KINDS
from gpmlp.uncertainty import calibration as c
from gpmlp.uncertainty import variance_weights as vw
from gpmlp.uncertainty.calibration import LEVELS, Calibration, KnownErrors
from gpmlp.uncertainty.local_scale import LocalScale


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _heavy(n: int, seed: int, freedom: float = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of Student's t (heavy tails) with a std that is wrong by a factor that depends on itself."""
    rng = np.random.default_rng(seed)
    true = np.exp(rng.standard_normal(n))
    return torch.from_numpy(true * rng.standard_t(freedom, n)), torch.from_numpy(0.3 * true**0.7)


def _covered(fitted: Calibration, errors: torch.Tensor, std: torch.Tensor, level: float, species=None) -> torch.Tensor:
    half = fitted.half_width("forces", fitted.kinds["forces"].scale * std, level, species)
    return (errors.abs() <= half).double()


@pytest.mark.parametrize("factor", [0.2, 1.0, 7.0])
def test_scale_is_recovered(factor):
    std = torch.rand(20_000, generator=_generator(0), dtype=torch.float64) + 0.1
    e = factor * std * torch.randn(20_000, generator=_generator(1), dtype=torch.float64)
    fitted = Calibration.fit({"energies": (e, std, None)})
    # relative error of an rms of n numbers: 1/sqrt(2n) = 0.005
    assert fitted.kinds["energies"].scale == pytest.approx(factor, rel=0.02)
    assert fitted.kinds["energies"].n == 20_000
    parts = std[:3, None].square()
    torch.testing.assert_close(
        fitted.kinds["energies"].variance(parts).sqrt(), fitted.kinds["energies"].scale * std[:3]
    )
    assert fitted.kinds["forces"] == c.KindCalibration.identity()


def test_scale_is_the_maximum_of_the_likelihood():
    e, std = _heavy(300, 0)
    found = c.KindCalibration.fit(KnownErrors(e, std)).scale
    best = scipy.optimize.minimize_scalar(
        lambda a: -scipy.stats.norm.logpdf(e, scale=math.exp(a) * std).sum(), bracket=(-1, 3), tol=1e-10
    )
    assert found == pytest.approx(math.exp(best.x), rel=1e-6)  # a minimum is found to the root of the rounding


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_guarantee_at_twenty_held_out_errors(level):
    """Coverage over all splits is at least the level where (n+1) p <= n, and the rank over n + 1 exactly; beyond, n/(n + 1)."""
    n, trials, each = 20, 500, 10
    shares = []
    for seed in range(trials):
        e, std = _heavy(n + each, seed)
        fitted = Calibration.fit({"forces": (e[:n], std[:n], None)})
        shares.append(_covered(fitted, e[n:], std[n:], level).mean())
    shares = torch.stack(shares)
    exact = min(n, math.ceil((n + 1) * level)) / (n + 1)
    assert (exact >= level) == (level < 0.95)
    assert abs(float(shares.mean()) - exact) < 4 * float(shares.std()) / math.sqrt(trials)


def test_coverage_of_groups_over_splits():
    """Heavy tails, std wrong in its shape and by species: each species, and each third of std, is covered as the whole is."""
    n, level = 1200, 0.9
    inside = {name: [] for name in ("all", "species 1", "species 8", "small", "large")}
    for seed in range(25):
        e, std = _heavy(2 * n, seed)
        species = torch.randint(0, 2, (2 * n,), generator=_generator(seed)) * 7 + 1
        e = torch.where(species == 8, 4 * e, e)
        fitted = Calibration.fit({"forces": (e[:n], std[:n], species[:n])})
        test = slice(n, None)
        hit = _covered(fitted, e[test], std[test], level, species[test])
        third = std[test].quantile(torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
        for name, rows in {
            "all": hit == hit,
            "species 1": species[test] == 1,
            "species 8": species[test] == 8,
            "small": std[test] < third[0],
            "large": std[test] > third[1],
        }.items():
            inside[name].append(hit[rows].mean())
    for name, shares in inside.items():
        shares = torch.stack(shares)
        slack = 4 * float(shares.std()) / 5
        # members of the smallest group: 200, so that its coverage is within 1/201 above the level
        assert level - slack < float(shares.mean()) < level + 0.005 + slack, name
    # one multiplier for all would not do: the species differ by a factor of four
    table = fitted.kinds["forces"].multipliers
    assert table["8/1"][3] > 2 * table["1/1"][3]


def test_small_groups_take_the_multiplier_of_the_wider_one():
    n = 320
    std = torch.linspace(1, 2, n, dtype=torch.float64)
    species = torch.full((n,), 1)
    species[::32] = 8  # 10 of them
    e = torch.randn(n, generator=_generator(0), dtype=torch.float64) * std
    fitted = c.KindCalibration.fit(KnownErrors(e, std, species))
    assert set(fitted.multipliers) == {"all", "*/0", "*/1", "*/2", "1/0", "1/1", "1/2"}
    assert fitted.counts["*/0"] + fitted.counts["*/1"] + fitted.counts["*/2"] == fitted.counts["all"] == n
    # about 107 in a bin: enough for 0.95 (60), not for 0.99 (300), which comes from all
    assert fitted.multipliers["*/1"][4] != fitted.multipliers["all"][4]
    assert fitted.multipliers["*/1"][5] == max(fitted.multipliers["all"][5], fitted.multipliers["*/1"][4])
    point = torch.tensor([1.5], dtype=torch.float64) * fitted.scale
    of_bin = fitted.half_width(point, 0.9) / point
    assert of_bin.item() == pytest.approx(fitted.multipliers["*/1"][3])
    for z, name in ((8, "*/1"), (26, "*/1"), (1, "1/1")):
        found = fitted.half_width(point, 0.9, torch.tensor([z])) / point
        assert found.item() == pytest.approx(fitted.multipliers[name][3]), z


def test_multipliers_never_fall_with_the_level():
    """8 large errors of 100 in a group, of 3000 in all: its own multiplier at 0.95 is above that of the bin at 0.99."""
    std = torch.linspace(1, 2, 3000, dtype=torch.float64)
    species = torch.ones(3000)
    species[1200:1300] = 8
    e = std * torch.randn(3000, generator=_generator(0), dtype=torch.float64).clamp(-3, 3)
    e[1200:1208] = 100
    table = c.KindCalibration.fit(KnownErrors(e, std, species.long())).multipliers
    assert table["*/1"][5] < table["8/1"][4]
    assert table["8/1"][5] == table["8/1"][4]
    for row in table.values():
        assert list(row) == sorted(row)


def test_multiplier_is_the_order_statistic():
    """n = 19: (n + 1) 0.95 = 19, the largest, and (n + 1) 0.9 = 18, the second largest; float must not push it up."""
    e = torch.arange(1.0, 20.0, dtype=torch.float64)[torch.randperm(19, generator=_generator(0))]
    fitted = c.KindCalibration.fit(KnownErrors(e, torch.ones(19, dtype=torch.float64)))
    found = [round(m * fitted.scale, 9) for m in fitted.multipliers["all"]]
    assert found == [10, 14, 16, 18, 19, 19]
    assert set(fitted.multipliers) == {"all"}
    assert fitted.edges == ()  # constant std
    e = torch.arange(1.0, 75.0, dtype=torch.float64)
    fitted = c.KindCalibration.fit(KnownErrors(e, torch.ones(74, dtype=torch.float64)))
    assert 75 * 0.68 > 51
    assert fitted.multipliers["all"][1] * fitted.scale == pytest.approx(51)


def test_level_between_the_grid_is_the_next_higher():
    e, std = _heavy(500, 0)
    fitted = Calibration.fit({"forces": (e, std, None)})
    half = {p: fitted.half_width("forces", std, p) for p in (0.3, 0.5, 0.85, 0.9)}
    assert torch.equal(half[0.85], half[0.9])
    assert torch.equal(half[0.3], half[0.5])
    assert (half[0.9] > half[0.5]).all()
    for bad in (0.0, 0.995, 90.0, math.nan):
        with pytest.raises(UserError, match="`level` must be above 0 and at most 0.99"):
            fitted.half_width("forces", std, bad)


@pytest.mark.parametrize("data", [{}, {"forces": (torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long))}])
def test_identity_where_there_is_nothing(data):
    fitted = Calibration.fit(data)
    assert fitted == Calibration.identity()
    assert set(fitted.kinds) == set(KINDS)
    std = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert torch.equal(fitted.kinds["forces"].variance(std[:, None].square()), std.square())
    expected = scipy.stats.norm.ppf(0.95) * std
    torch.testing.assert_close(fitted.half_width("forces", std, 0.9), expected)
    torch.testing.assert_close(fitted.half_width("forces", std, 0.9, torch.tensor([1, 1, 8])), expected)


def test_unknown_errors_and_std_of_zero():
    e, std = _heavy(200, 0)
    holes = torch.cat([e, torch.full((7,), math.nan)])
    with_holes = c.KindCalibration.fit(KnownErrors(holes, torch.cat([std, torch.ones(7)]), torch.ones(207)))
    assert with_holes == c.KindCalibration.fit(KnownErrors(e, std, torch.ones(200)))
    zero = torch.zeros(40, dtype=torch.float64)
    for errors, spread in ((zero, zero), (zero + 1, zero), (zero, zero + 1)):
        fitted = c.KindCalibration.fit(KnownErrors(errors, spread))
        half = fitted.half_width(fitted.scale * spread, 0.9)
        assert torch.isfinite(half).all()
        assert (half >= errors.abs() * (1 - 1e-9)).all()
    # the floor is far below: a std smaller than those held out keeps its own interval
    fitted = c.KindCalibration.fit(KnownErrors(e, std))
    small = fitted.scale * std[:1] * 1e-3
    assert fitted.half_width(small, 0.9).item() == pytest.approx(fitted.multipliers["*/0"][3] * small.item())


def test_round_trip_through_json_is_exact():
    e, std = _heavy(1000, 0)
    species = torch.arange(1000) % 2 + 13
    source = {"n_structures": 12, "held_out": "10 % of the training set, seed 0"}
    weights = {"forces": torch.tensor([0.1, 2.0], dtype=torch.float64)}
    fitted = Calibration.fit({"forces": (e, std, species), "energies": (e[:9], std[:9], None)}, source, weights)
    again = Calibration.from_dict(json.loads(json.dumps(fitted.as_dict(), allow_nan=False)))
    assert again == fitted
    assert again.kinds["forces"].weights == (0.1, 2.0)
    assert again.source == source
    old = fitted.as_dict() | {"levels": [0.5, 0.9]}
    with pytest.raises(UserError, match="levels"):
        Calibration.from_dict(old)


def test_unknown_kind():
    with pytest.raises(UserError, match="Perhaps you meant 'forces'"):
        Calibration.fit({"force": (torch.ones(1), torch.ones(1), None)})
    with pytest.raises(UserError, match="Perhaps you meant 'energies'"):
        Calibration.identity().half_width("energy", torch.ones(1), 0.9)


def _parts(n: int = 20_000) -> torch.Tensor:
    """Three causes of variance, of different sizes and shapes."""
    drawn = torch.randn(n, 3, generator=_generator(5), dtype=torch.float64).exp()
    return drawn * torch.tensor([1e-4, 1e-3, 3e-4], dtype=torch.float64)


def test_weights_are_recovered():
    parts, truth = _parts(), torch.tensor([30.0, 0.5, 2.0], dtype=torch.float64)
    e = (parts @ truth).sqrt() * torch.randn(len(parts), generator=_generator(6), dtype=torch.float64)
    e[::100] = math.nan
    found = vw.fit_variance_weights(e, parts)
    assert (found / truth - 1).abs().max() < 0.15  # errors of the estimate by the curvature at the truth: up to 5 %
    fitted = c.KindCalibration.fit(KnownErrors(e, (parts @ found).sqrt()), tuple(found.tolist()))
    # where no direction helps, a common factor does not; the prior moves it by Σ log w / (PRIOR² n) = 4e-5
    assert fitted.scale == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(fitted.variance(parts), fitted.scale**2 * (parts @ found))
    # a maximum: worse in every direction
    known = ~torch.isnan(e)
    squared, p = (e[known] ** 2).numpy(), parts[known].numpy()
    best = vw._negative_log_posterior(found.log().numpy(), squared, p, 0.0)[0]
    for k in range(3):
        for step in (-0.1, 0.1):
            moved = found.log().numpy().copy()
            moved[k] += step
            assert vw._negative_log_posterior(moved, squared, p, 0.0)[0] > best


def test_gradient_of_the_weights():
    parts = _parts(50).numpy()
    squared = np.random.default_rng(0).chisquare(1, 50) * 1e-3
    at = np.array([0.3, -1.0, 2.0])
    gradient = vw._negative_log_posterior(at, squared, parts, 1e-6)[1]
    h = 1e-5
    for k in range(3):
        plus, minus = (vw._negative_log_posterior(at + d * np.eye(3)[k], squared, parts, 1e-6)[0] for d in (h, -h))
        # truncation h² and rounding eps/h are both about 1e-10
        assert gradient[k] == pytest.approx((plus - minus) / (2 * h), abs=1e-8)


def test_weights_that_the_errors_do_not_determine_stay_near_one():
    parts = _parts(2000)[:, :1]
    e = parts[:, 0].sqrt() * torch.randn(2000, generator=_generator(7), dtype=torch.float64)
    with_zero = torch.cat([parts, torch.zeros_like(parts)], dim=1)
    found = vw.fit_variance_weights(e, with_zero)
    assert found[1].item() == pytest.approx(1, rel=1e-4)
    assert found[0].item() == pytest.approx(1, abs=0.15)  # sqrt(2/2000) = 0.03
    assert torch.equal(vw.fit_variance_weights(e[:0], with_zero[:0]), torch.ones(2, dtype=torch.float64))
    assert torch.isfinite(vw.fit_variance_weights(torch.zeros(5), torch.zeros(5, 2))).all()


def test_bad_parts_are_errors():
    with pytest.raises(UserError, match="`parts` must have shape"):
        vw.fit_variance_weights(torch.ones(3), torch.ones(2, 2))
    with pytest.raises(UserError, match="must be finite"):
        vw.fit_variance_weights(torch.ones(2), torch.tensor([[1.0, -0.5], [1.0, 1.0]]))
    with pytest.raises(UserError, match="`parts` must have shape"):
        c.KindCalibration(1.0, 0, {}, weights=(1.0, 2.0)).variance(torch.ones(3, 3))


def test_multipliers_stand_on_the_grid():
    for kind in KINDS:
        assert [len(row) for row in Calibration.identity().kinds[kind].multipliers.values()] == [len(LEVELS)]


def grouped(n_structures: int, sizes: dict[str, float], seed: int, each: int = 30) -> KnownErrors:
    """Errors of structures of several config_types, normal with a std that is wrong by a factor of each config_type and each structure."""
    rng = np.random.default_rng(seed)
    labels = [name for name in sizes for _ in range(n_structures)]
    structure = np.arange(len(labels)).repeat(each)
    std = np.exp(0.3 * rng.standard_normal(len(structure)))
    factor = np.array([sizes[name] for name in labels]) * np.exp(0.1 * rng.standard_normal(len(labels)))
    errors = factor[structure] * std * rng.standard_normal(len(structure))
    names = tuple(np.array(labels)[structure])
    return KnownErrors(torch.from_numpy(errors), torch.from_numpy(std), None, torch.from_numpy(structure), names)


def calibrated(fitted: c.KindCalibration, known: KnownErrors, groups) -> torch.Tensor:
    factors = torch.tensor([fitted.group(name).std for name in groups], dtype=torch.float64)
    return fitted.scale * factors * known.std


SIZES = {"bulk": 1.0, "elastic": 0.2, "surface": 2.0}


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_each_group_is_covered_and_has_its_scale(level):
    """Twenty structures of each: coverage within .04 of the level, rms of error/std within .15 of 1; pooled it is far off."""
    fitted, new = c.KindCalibration.fit(grouped(20, SIZES, 0)), grouped(200, SIZES, 1)
    std = calibrated(fitted, new, new.groups)
    inside = (new.errors.abs() <= fitted.half_width(std, level, groups=new.groups)).double()
    pooled = c.KindCalibration.fit(grouped(20, SIZES, 0)._replace(groups=()))
    blind = (new.errors.abs() <= pooled.half_width(pooled.scale * new.std, level)).double()
    for name in SIZES:
        mine = torch.tensor([g == name for g in new.groups])
        assert abs(float(inside[mine].mean()) - level) < 0.04, name
        assert abs(float((new.errors / std)[mine].square().mean().sqrt()) - 1) < 0.15, name
        if level == 0.9 and name != "bulk":
            assert abs(float(blind[mine].mean()) - level) > 0.08, name


def test_group_is_shrunk_to_all():
    """The fewer its structures the nearer its factors are to 1, and nothing is said of a group by its name alone."""
    found = []
    for few in (1, 4, 40):
        bulk = [grouped(40, {f"bulk {k}": 1.0}, k) for k in range(4)]
        odd = grouped(few, {"odd": 3.0}, 9)
        parts, first = [*bulk, odd], 0
        for k, part in enumerate(parts):
            parts[k] = part._replace(structure=part.structure + first)
            first = int(parts[k].structure.max()) + 1
        fitted = c.KindCalibration.fit(
            KnownErrors(
                torch.cat([p.errors for p in parts]), torch.cat([p.std for p in parts]), None,
                torch.cat([p.structure for p in parts]), sum((p.groups for p in parts), ()),
            )
        )  # fmt: skip
        assert fitted.groups["odd"].structures == few
        reference = fitted.groups["bulk 0"].std
        found.append(fitted.groups["odd"].std * fitted.groups["odd"].intervals[3] / reference)
    assert 1 < found[0] < found[1] < found[2] < 3.6
    assert found[2] > 2.3
    assert fitted.group("") == c.GroupScale() and fitted.group("never seen") == fitted.unseen


def test_a_group_nobody_has_seen_is_covered_on_average():
    """Of groups whose errors differ by exp(0.5 x), each left out of the calibration: 90 % intervals hold them on average."""
    rng = np.random.default_rng(5)
    shares, narrow = [], []
    for seed in range(12):
        sizes = {f"g{k}": float(np.exp(0.5 * rng.standard_normal())) for k in range(12)}
        sizes["new"] = float(np.exp(0.5 * rng.standard_normal()))
        known = grouped(10, sizes, seed)
        seen = torch.tensor([g != "new" for g in known.groups])
        fitted, new = c.KindCalibration.fit(known.select(seen)), known.select(~seen)
        assert fitted.unseen.std >= 1
        half = fitted.half_width(calibrated(fitted, new, new.groups), 0.9, groups=new.groups)
        shares.append(float((new.errors.abs() <= half).double().mean()))
        narrow.append(float((new.errors.abs() <= fitted.half_width(fitted.scale * new.std, 0.9)).double().mean()))
    # standard error of the mean over the new groups: 0.1 / sqrt(12)
    assert np.mean(shares) > 0.87 and np.mean(shares) > np.mean(narrow)


def test_intervals_of_groups_grow_with_the_level():
    fitted, new = c.KindCalibration.fit(grouped(6, SIZES, 2)), grouped(6, SIZES, 3)
    for names in (new.groups, ["never seen"] * len(new.errors), ()):
        half = torch.stack([fitted.half_width(new.std, p, groups=names) for p in LEVELS])
        assert (half.diff(dim=0) >= 0).all()


def test_scale_that_depends_on_the_prediction_is_found():
    """Errors that grow as the root of the predicted force beyond what σ says; forces outside of what was seen count as at its margin."""
    rng = np.random.default_rng(0)
    n, each = 300, 30
    structure = torch.arange(n).repeat_interleave(each)
    force = torch.from_numpy(np.exp(rng.uniform(-1, 1, n * each)))
    parts = torch.from_numpy(np.exp(rng.standard_normal((n * each, 3))))
    std = parts.sum(1).sqrt()
    errors = 0.3 * force.sqrt() * std * torch.from_numpy(rng.standard_normal(n * each))
    fitted = c.KindCalibration.fit(KnownErrors(errors, std, None, structure, (), parts, force.square()))
    factor = fitted.local.factor(parts, force.square())
    expected = 0.3 * force.sqrt()
    assert (fitted.scale * factor / expected).log().abs().mean() < 0.03
    far = torch.tensor([1e-9, 1e9], dtype=torch.float64)
    edges = fitted.local.factor(parts[:2] * 0 + parts[:1], far)
    assert edges[0] > 0.5 * factor.min() and edges[1] < 2 * factor.max()
    again = c.KindCalibration.from_dict(json.loads(json.dumps(dataclasses.asdict(fitted))))
    assert again == fitted


def test_no_slope_without_structures_to_show_it():
    """Two structures are no reason to believe that errors grow with the force: the factor stays within a third of 1."""
    generator = _generator(0)
    force = torch.rand(60, generator=generator, dtype=torch.float64) + 0.1
    errors = 3 * force * torch.randn(60, generator=generator, dtype=torch.float64)
    parts = torch.ones(60, 3, dtype=torch.float64)
    structure = torch.arange(2).repeat_interleave(30)
    known = KnownErrors(errors, parts.sum(1).sqrt(), None, structure, (), parts, force.square())
    factor = c.KindCalibration.fit(known).local.factor(parts, force.square())
    assert 0.66 < float(factor.min()) <= float(factor.max()) < 1.5


def test_a_part_that_is_rounding_says_nothing_of_the_local_scale():
    """Where every environment is an inducing point that part of the variance is 1e-12 of the other, by chance as large as the errors; a new
    structure, which has as much of either, gets no other standard deviation for that."""
    generator = np.random.default_rng(0)
    ratio = torch.from_numpy(10.0 ** generator.uniform(-15, -9, 40))
    parts = torch.stack([ratio, torch.ones(40), torch.zeros(40)], dim=1).double()
    squares = torch.from_numpy(generator.chisquare(1, 40)) * (ratio / ratio.median()) ** -0.4
    scale, _ = LocalScale.fit(squares, parts, torch.ones(40).double(), torch.arange(40))
    new = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    assert 0.5 < float(scale.factor(new, torch.ones(1).double())) < 2
    # where a few structures have that part, they do not speak for those to come
    most = parts.clone()
    most[:8, 0] = 10.0 ** torch.linspace(-3, -1, 8).double()
    scale, _ = LocalScale.fit(
        squares.clone().index_fill_(0, torch.arange(8), 0.01), most, torch.ones(40).double(), torch.arange(40)
    )
    assert scale.slopes[2] == 0.0
    # of parts that are there it does depend
    parts[:, 0] = 10.0 ** torch.linspace(-2, 2, 40).double()
    squares = torch.from_numpy(generator.chisquare(1, 40)) * parts[:, 0] ** -0.5
    scale, _ = LocalScale.fit(squares, parts, torch.ones(40).double(), torch.arange(40))
    ends = scale.factor(parts[[0, -1]], torch.ones(2).double())
    assert ends[0] > 2 * ends[1]
