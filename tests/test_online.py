"""A fit that goes on is, after whatever came and went, the fit of what is there: rows and factors made anew from the structures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from systems import KERNELS, cluster, crystal, descriptor, random_term, structure, targets_of

from gpmlp.core.errors import UserError
from gpmlp.core.quantities import KINDS, Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import calibrate, defaults, online_updates, regression, variance_checks
from gpmlp.fitting import online_updates as batches
from gpmlp.fitting.fit import fit
from gpmlp.fitting.online import OnlineFit
from gpmlp.fitting.report import StageTimer
from gpmlp.gp import inducing, posterior
from gpmlp.gp.variance import VARIANCES, VarianceModel
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty import residuals

SMALL = {
    "descriptor": {"cutoff": 3.2, "n_max": 3, "l_max": 2, "sigma_atom": 0.5},
    "kernel": {"zeta": 2},
    "inducing": {"n": 8, "gradients": 2},
    "baseline": {"zbl": False, "isolated_atoms": {"C": -2.0, "O": -3.0}},
    "noise": {"config_types": {"rough": {"force": 0.4, "energy_per_atom": 0.02}}},
}
FULL, ENERGY, HOLES, GIVEN, ROUGH = "full", "energy", "holes", "given", "rough"


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(SMALL | changes)


TRUTH = random_term(descriptor("soap gto"), KERNELS["polynomial 3"])


def labelled(seed: int, kind: str = FULL, periodic: bool | None = None) -> tuple[Structures, Targets]:
    """A structure of two species with labels of an energy surface and some noise: all, energy alone, with holes in the forces, or
    with a noise of their own."""
    periodic = seed % 3 == 0 if periodic is None else periodic
    one = crystal("cubic", (6, 8), seed) if periodic else cluster((6, 8, 6, 8)[: 3 + seed % 2], seed, 2.6)
    generator = torch.Generator().manual_seed(1000 + seed)
    true = TRUTH(one)
    forces = true.forces + 0.01 * torch.randn(one.n_atoms, 3, generator=generator, dtype=torch.float64)
    energies = true.energies - 2.0 * (one.species == 6).sum() - 3.0 * (one.species == 8).sum()
    targets = replace(targets_of(one, true), energies=energies, forces=forces)
    if kind == ENERGY:
        targets = replace(Targets.unlabelled(one), energies=energies)
    if kind == HOLES:
        forces[0], forces[-1, 1] = float("nan"), float("nan")
    if kind == GIVEN:
        targets = replace(
            targets, energies_noise=torch.full_like(energies, 0.01), forces_noise=torch.full_like(forces, 0.02)
        )
    return one, replace(targets, config_types=(kind,))


def together(*parts: tuple[Structures, Targets]) -> tuple[Structures, Targets]:
    return Structures.concatenate([s for s, _ in parts]), Targets.concatenate([t for _, t in parts])


def first_data(n: int = 8) -> tuple[Structures, Targets]:
    return together(*(labelled(seed, (FULL, HOLES, GIVEN, ENERGY)[seed % 4]) for seed in range(n)))


def begun(n: int = 8, **changes) -> OnlineFit:
    return OnlineFit.begin(*first_data(n), recipe(**changes))


def probes() -> Structures:
    return together(*(labelled(seed) for seed in (901, 903, 904)))[0]


def refit(online: OnlineFit) -> Potential:
    """The potential of the same inducing variables, hyperparameters and labels, all made anew from the structures."""
    lowers, models = [], []
    for m in online.models:
        own = []
        for block in m.blocks:
            double = replace(block, features=block.features.double(), tangents=block.tangents.double())
            own.append(torch.linalg.cholesky(inducing.K_uu(m.kernel, double, double)))
        lowers += own
        models.append(replace(m, lowers=tuple(own)))
    remaining = Targets.concatenate([b.remaining for b in online.batches])
    made = regression.labelled_rows(models, online.structures, remaining)
    whitened = {kind: inducing.whiten_rows(rows.double(), lowers) for kind, rows in made.items()}
    signal = online.signal.repeat_interleave(torch.tensor([len(lower) for lower in lowers]))
    noise = online.noise | {posterior.FIXED: 1.0}
    solved = posterior.solve_posterior(whitened, {k: len(r) for k, r in whitened.items()}, noise, signal, lowers)
    about = tuple(m.blocks for m in models), tuple(lowers), signal, solved.factor, online.constant, online.label_noise
    variances = VarianceModel(tuple(regression.make_priors(models, signal)), *about, len(signal))
    terms = regression.make_terms(models, solved.weights)
    return Potential(terms, online.baselines, (6, 8), online.recipe, online.noise, variances=variances)


def difference(a: Potential, b: Potential, structures: Structures) -> float:
    """The largest of energies, forces, stresses, and of the parts of all variances, these relative to the largest of their sum."""
    p, q = (x(structures, variance=VARIANCES, calibrated=False) for x in (a, b))
    found = [(getattr(p, n) - getattr(q, n)).nan_to_num().abs().max() for n in KINDS]
    for name in ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance"):
        for part in ("inducing", "data"):
            x, y = (getattr(getattr(r, name), part).nan_to_num() for r in (p, q))
            found.append((x - y).abs().max() / getattr(q, name).total.nan_to_num().abs().max())
    return float(max(found))


def test_five_hundred_mixed_updates_equal_a_refit():
    """Data and inducing points of two species, with gradients, added and removed at random; labels of every sort."""
    online, generator = begun(), torch.Generator().manual_seed(0)
    structures = probes()
    seen, worst, largest = {}, 0.0, 0.0

    def chance(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    for k in range(500):
        n_centres = [len(b.features) for b in online.models[0].blocks]
        choice = ("add", "add", "remove", "more", "fewer")[chance(5)]
        if choice == "add" or choice == "remove" and len(online.batches) < 6:
            choice = "add" if len(online.batches) < 16 else "remove"
        if choice == "fewer" and min(n_centres) < 4 or choice == "more":
            choice = "more" if sum(n_centres) < 24 else "fewer"
        if choice == "add":
            online = online.added(*labelled(100 + k, (FULL, ENERGY, HOLES, GIVEN, ROUGH)[chance(5)]))
        elif choice == "remove":
            online = online.removed(chance(len(online.batches)))
        elif choice == "more":
            online = online.extended(labelled(100 + k)[0], 1 + chance(2))
        else:
            block = online.models[0].blocks[chance(2)]
            online = online.without(0, block.species, [chance(len(block.features))])
        seen[choice] = seen.get(choice, 0) + 1
        largest = max(largest, online.factor.condition)
        if k % 25 == 24:
            worst = max(worst, difference(online.potential, refit(online), structures))
    assert worst < 1e-8
    assert min(seen.values()) > 60 and len(seen) == 4


def same(a: Potential, b: Potential) -> bool:
    """Whether they predict the same, to the last bit."""
    return difference(a, b, probes()) == 0.0


def test_what_is_learned_is_the_fit_of_all_labels():
    """learned = added and extended; a species with more than one block width, columns in the order of the blocks."""
    online = begun(6)
    for seed in (20, 21, 22):
        online = online.learned(*labelled(seed))
    assert online.n_labels == 9 and len(online.prequential) == 3
    assert sum(len(b.features) for b in online.models[0].blocks) > 4
    assert difference(online.potential, refit(online), probes()) < 1e-9


def test_an_older_state_is_not_touched():
    """What was, predicts as before to the last bit, and shares no memory that changes."""
    online = begun()
    before = online.potential
    frozen = [rows.clone() for b in online.batches for rows in b.rows.values()] + [online.factor.upper.clone()]
    later = online.learned(*labelled(30)).extended(labelled(31)[0], 2).removed(0)
    later = later.without(0, 6, [0]).refreshed("a test").learned(*labelled(33))
    assert later.n_labels == 2 and online.n_labels == 8
    now = [rows for b in online.batches for rows in b.rows.values()] + [online.factor.upper]
    assert all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    again = replace(online)  # without what was cached
    assert same(again.potential, before)


def test_a_refresh_learns_the_noise_that_a_fit_learns():
    """The same evidence from the same rows; energies by leaving one out. The optimiser stops at 1e-10 of a value of some hundreds."""
    data = first_data(12)
    options = recipe(calibration=False, novelty=False, inducing={"n": 4, "gradients": 2})
    _, report = fit(*data, replace_noise(options))
    online = OnlineFit.begin(*data, replace_noise(options))
    for kind, sigma in report.noise.items():
        assert online.noise[kind] == pytest.approx(sigma, rel=1e-3), kind
    signal = torch.tensor(list(report.signal.values()), dtype=torch.float64)
    torch.testing.assert_close(online.signal, signal, rtol=1e-3, atol=0)


def replace_noise(options: Recipe) -> Recipe:
    """Without noises by config_type, which a fit wants to meet in its data."""
    return options.model_copy(update={"noise": type(options.noise)()})


def test_a_refresh_of_updated_rows_is_one_of_rows_made_anew():
    online = begun()
    for seed in (40, 41, 42):
        online = online.learned(*labelled(seed))
    online = online.removed(0).without(0, 8, [1]).refreshed("a test")
    lowers = regression.lowers_of(online.models)
    made = regression.labelled_rows(
        online.models, online.structures, Targets.concatenate([b.remaining for b in online.batches])
    )
    whitened = {k: inducing.whiten_rows(rows.double(), lowers) for k, rows in made.items()}
    counts = {k: len(rows) for k, rows in whitened.items()}
    parameters, _, _ = regression.learn_hyperparameters(
        online.recipe, online.models, whitened, counts, StageTimer(None), restarts=0
    )
    for kind, sigma in parameters.noise().items():
        if kind != "energies":  # leaving one out lessens it
            assert online.noise[kind] == pytest.approx(sigma, rel=1e-6)
    torch.testing.assert_close(online.signal, parameters.signal(), rtol=1e-6, atol=0)
    assert difference(online.potential, refit(online), probes()) < 1e-9
    assert online.events[-1] == "3 labels: refreshed: a test"


def test_made_anew_is_what_all_labels_begin_with():
    """The same sums over labels, taken one by one or together: noises are found to their rounding."""
    online = begun(inducing={"gradients": 2})
    for seed in range(40, 46):
        online = online.learned(*labelled(seed, (FULL, HOLES, GIVEN, ENERGY)[seed % 4]))
    anew = online.rebuilt("a test")
    data = together(first_data(), *(labelled(seed, (FULL, HOLES, GIVEN, ENERGY)[seed % 4]) for seed in range(40, 46)))
    begin = OnlineFit.begin(*data, recipe(inducing={"gradients": 2}))
    same, other = (difference(o.potential, anew.potential, probes()) for o in (begin, online))
    assert same < 1e-9 < 1e-3 < other
    assert anew.recipe == begin.recipe and anew.noise == pytest.approx(begin.noise, rel=1e-7)
    assert anew.prequential == online.prequential and anew.calibration.source["held_out_structures"] == 14
    assert [len(b.structures) for b in anew.batches] == [8, 1, 1, 1, 1, 1, 1]
    assert anew.events == (*online.events, "14 labels: refreshed: made anew, a test")
    assert difference(anew.removed(-1).potential, refit(anew.removed(-1)), probes()) < 1e-9


def test_first_labels_of_a_kind_bring_its_noise():
    data = together(*(labelled(seed, periodic=False) for seed in range(6)))
    online = OnlineFit.begin(*data, recipe())
    assert set(online.noise) == {"energies", "forces"}
    later = online.added(*labelled(50, periodic=True))
    assert later.noise["stresses"] > 0 and later.events[-1] == "7 labels: refreshed: first stresses"
    assert difference(later.potential, refit(later), probes()) < 1e-9


def test_energies_alone_will_do():
    online = OnlineFit.begin(*together(*(labelled(seed, ENERGY) for seed in range(8))), recipe())
    online = online.learned(*labelled(60, ENERGY)).learned(*labelled(63, ENERGY))
    assert set(online.noise) == {"energies"}
    assert difference(online.potential, refit(online), probes()) < 1e-9


def test_calibration_comes_from_what_was_foreseen():
    online = begun()
    assert not online.calibration.source  # nothing was foreseen yet
    for seed in range(70, 82):
        online = online.learned(*labelled(seed, FULL if seed % 2 else ENERGY))
    calibrated = online.recalibrated()
    source = calibrated.calibration.source
    assert source["held_out_structures"] == 12 and "before they were learned" in source["how"]
    assert "forces" in calibrated.calibration.kinds and "energies" in calibrated.calibration.kinds
    assert len(online.prequential) == 12
    components = [int(f.targets.forces.isfinite().sum()) for f in online.prequential]
    assert sum(components[1:]) < calibrate.COMPONENTS or len(components) == calibrate.FEWEST_PREQUENTIAL
    covered = calibrated.potential(probes(), variance="forces").forces_variance
    assert (covered.total > 0).all()


def test_calibration_does_not_depend_on_the_units_of_novelty_then():
    """Thresholds of novelty are learned again at every refresh; what was foreseen before has another unit."""
    online = begun()
    for seed in range(70, 76):
        online = online.learned(*labelled(seed))
    online = online.refreshed("a test")
    other = replace(
        online,
        prequential=tuple(
            replace(f, prediction=replace(f.prediction, novelty=0.01 * f.prediction.novelty))
            for f in online.prequential
        ),
    ).recalibrated()
    assert other.calibration.kinds == online.calibration.kinds
    novelty = online.potential(probes(), novelty=True).novelty
    near, plain = (
        replace(online, calibration=replace(online.calibration, typical_novelty=t)).potential(
            probes(), variance="forces"
        )
        for t in (float(novelty.median()), None)
    )
    grown = near.forces_variance.data / plain.forces_variance.data
    expected = (novelty / novelty.median()).clamp_min(1.0).square()
    assert expected.max() > 1
    torch.testing.assert_close(grown, expected[:, None].expand_as(grown), rtol=1e-9, atol=0)
    assert online.calibration.typical_novelty == 1.25


def test_error_bars_from_few_structures_are_widened():
    """By what errors of these structures say of how many they are as good as; the intervals stay."""
    online = begun()
    for seed in range(70, 74):
        online = online.learned(*labelled(seed))
    learned = online.recalibrated().calibration.kinds
    parts = [replace(f.prediction, novelty=None) for f in online.prequential]
    data = together(*((f.structures, f.targets) for f in online.prequential))
    prediction = Prediction.concatenate(parts)
    raw = calibrate.learn_calibration(prediction, *data, "a test").kinds
    std = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
    for kind in ("energies", "forces"):
        each = (residuals.split_residuals(kind, f.structures, f.targets, f.prediction) for f in online.prequential)
        found = [(errors.square() / raw[kind].variance(variances)).mean() for errors, variances, _ in each]
        squares = torch.stack(found)
        assert learned[kind].scale == pytest.approx(calibrate.small_sample_factor(squares) * raw[kind].scale, rel=1e-9)
        for level in (0.5, 0.9):
            found, was = (some[kind].half_width(some[kind].scale * std, level) for some in (learned, raw))
            torch.testing.assert_close(found, was, rtol=1e-9, atol=0)


def test_few_structures_vouch_for_what_they_agree_on():
    """Of structures whose squares scatter as single normal numbers do the factor is that of as many numbers; of equal ones it is less."""
    generator = torch.Generator().manual_seed(3)
    single = torch.randn(4000, generator=generator, dtype=torch.float64).square()
    assert calibrate.small_sample_factor(single) == pytest.approx((4000 / 3998) ** 0.5, rel=1e-4)
    four = torch.ones(4, dtype=torch.float64)
    assert calibrate.small_sample_factor(four) == pytest.approx((10 / 8) ** 0.5, rel=1e-9)  # v = 2·2 / 5, ν = 10
    assert (
        calibrate.small_sample_factor(7 * four)
        == calibrate.small_sample_factor(four)
        < calibrate.small_sample_factor(torch.tensor([0.1, 0.1, 0.1, 3.7]))
    )
    assert calibrate.small_sample_factor(0 * four) == 1.0  # labels that were foreseen exactly


def test_new_errors_are_as_large_as_the_widened_scale_says():
    """Of 8 structures with 30 errors each, whose sizes differ from structure to structure: rms of new errors over it, in 2000 cases."""
    generator = torch.Generator().manual_seed(4)
    size = (0.4 * torch.randn(2000, 8, 1, generator=generator, dtype=torch.float64)).exp()
    errors = size * torch.randn(2000, 8, 30, generator=generator, dtype=torch.float64)
    true = 2.7182818 ** (0.5 * 4 * 0.4**2)  # mean of size²
    squares = errors.square().mean(2)
    factors = torch.tensor([calibrate.small_sample_factor(some) for some in squares], dtype=torch.float64)
    plain, widened = (float((true / (f * squares.mean(1))).mean().sqrt()) for f in (1.0, factors.square()))
    assert 1.04 < plain and 0.97 < widened < 1.02


def test_no_variances_no_novelty_no_calibration_where_none_is_wanted():
    online = begun(variance=False, novelty=False, calibration=False).learned(*labelled(90))
    assert online.prequential == () and online.novelty is None and online.recalibrated() is online
    assert online.potential.variances is None


def test_novelty_counts_what_was_learned():
    online = begun()
    one, targets = labelled(95)
    before = online.potential(one, novelty=True).novelty
    after = online.learned(one, targets).potential(one, novelty=True).novelty
    assert (after < before).all()


def test_jacobians_kept_or_made_again_give_the_same(monkeypatch):
    """To 1e-12: the same sums, of environments made in chunks of another size."""
    sequence = [labelled(seed) for seed in (100, 101, 102)]

    def run() -> OnlineFit:
        online = begun()
        for data in sequence:
            online = online.learned(*data)
        return online.added(*sequence[0]).extended(labelled(103)[0], 3)

    kept = run()
    assert (
        all(b.environments for b in kept.batches)
        and sum(b.n_bytes for b in kept.batches) < online_updates.JACOBIAN_BYTES
    )
    monkeypatch.setattr(batches, "JACOBIAN_BYTES", kept.batches[0].n_bytes + 1)  # of the first alone
    some = run()
    assert some.batches[0].environments and not some.batches[-1].environments
    monkeypatch.setattr(batches, "JACOBIAN_BYTES", 0)
    none = run()
    assert not any(b.environments for b in none.batches)
    for other in (some, none):
        assert difference(kept.potential, other.potential, probes()) < 1e-12
        for a, b in zip(kept.batches, other.batches, strict=True):
            torch.testing.assert_close(a.features, b.features, rtol=0, atol=1e-14)


def test_a_dependent_column_is_dropped():
    """The environments of a lone pair of atoms change in one direction only, so that one of their two tangents is zero."""
    online, pair = begun(), structure([[0, 0, 0], [0, 0, 1.3]], [6, 8])
    new = online.extended(pair, 2)
    assert [
        len(b.features) - len(a.features) for a, b in zip(online.models[0].blocks, new.models[0].blocks, strict=True)
    ] == [1, 1]
    assert new.factor.columns == online.factor.columns + 4
    assert difference(new.potential, refit(new), probes()) < 1e-9
    assert new.extended(pair, 2) is new  # what is there already brings nothing


def test_inducing_points_grow_with_the_labels_up_to_the_recipe():
    online = begun(inducing={"n": 8, "gradients": 2})
    counts = [sum(len(b.features) for b in online.models[0].blocks)]
    for seed in range(120, 150):
        online = online.learned(*labelled(seed))
        counts.append(sum(len(b.features) for b in online.models[0].blocks))
        labels = sum(b.count for b in online.batches)
        assert counts[-1] <= min(8, max(counts[0], defaults.columns_for(labels, False) // 3))
    assert counts[0] <= 8 and counts[-1] == 8 and counts == sorted(counts)
    free = begun(inducing={"gradients": 2})
    for seed in range(120, 130):
        free = free.learned(*labelled(seed))
    assert sum(len(b.features) for b in free.models[0].blocks) > 8


def test_a_label_brings_no_more_inducing_points_than_a_pass_over_the_data_may_cost():
    online = begun(inducing={"gradients": 2})
    few, many = (
        online_updates.missing_centres(online.asked, online.recipe, online.models, 0, labels, False)
        for labels in (300, 10_000)
    )
    have = sum(len(b.features) for b in online.models[0].blocks)
    assert few == 300 // 3 - have  # as many as the labels ask for
    assert many == online_updates.PASS // (3 * 10_000) < defaults.columns_for(10_000, False) // 3 - have
    assert online_updates.missing_centres(online.asked, online.recipe, online.models, 0, 10**7, False) == 1


def test_more_inducing_points_asked_for_than_there_are_atoms():
    """A fit refuses that; here it is the most there may ever be."""
    online = OnlineFit.begin(*first_data(2), recipe(inducing={"n": 500, "gradients": 0}))
    assert sum(len(b.features) for b in online.models[0].blocks) <= 500


def test_variances_of_many_columns_by_some_of_them():
    """The subset is a sparse process of its own with all centres: the same from the factor as from rows made anew."""
    online = begun()
    for seed in range(150, 156):
        online = online.added(*labelled(seed)).extended(labelled(seed)[0], 4)
    wide = online.factor.columns
    for share in (2, 4):  # fewer gradients; none, and not all values
        fewer = online.recipe.variance.model_copy(update={"columns": wide // share})
        some = replace(online, recipe=online.recipe.model_copy(update={"variance": fewer})).potential
        small = some.variances
        assert 0.6 * wide / share < small.n_columns < 1.4 * wide / share and small.of_fit == wide
        models = [replace(m, blocks=b) for m, b in zip(online.models, small.blocks, strict=True)]
        remaining = Targets.concatenate([b.remaining for b in online.batches])
        made = regression.labelled_rows(models, online.structures, remaining)
        lowers = [torch.linalg.cholesky(inducing.K_uu(m.kernel, b, b)) for m in models for b in m.blocks]
        rows = {k: inducing.whiten_rows(r, lowers) for k, r in made.items()}
        noise = online.noise | {posterior.FIXED: 1.0}
        factor = posterior.solve_posterior(
            rows, {k: len(r) for k, r in rows.items()}, noise, small.signal, lowers
        ).factor
        anew = replace(some, variances=replace(small, lowers=tuple(lowers), factor=factor))
        assert difference(some, anew, probes()) < 1e-9


def test_a_refresh_says_what_a_subset_of_columns_does_to_variances():
    online = begun()
    every = online.refreshed("a test").report()["variance_subset"]
    assert every == {"columns": online.factor.columns, "columns_of_fit": online.factor.columns}
    fewer = online.recipe.variance.model_copy(update={"columns": online.factor.columns // 3})
    some = replace(online, recipe=online.recipe.model_copy(update={"variance": fewer})).refreshed("a test")
    told = some.report()["variance_subset"]
    assert told["columns"] < told["columns_of_fit"] == online.factor.columns
    assert told == some.potential.report["variance_subset"]
    whole = replace(some, recipe=online.recipe)  # the same state, all columns kept
    looked, atoms = variance_checks._draw_atoms(some.structures, some.recipe.seed)
    std = [
        replace(p, variances=replace(p.variances, noise={}))(looked, "forces", form="dtc", calibrated=False)
        .forces_covariance.epistemic.diagonal(dim1=1, dim2=2)
        .sum(1)[atoms]
        .sqrt()
        for p in (some.potential, whole.potential)
    ]
    assert told["std_ratio_median"] == pytest.approx(float((std[0] / std[1]).quantile(0.5)), rel=1e-6)
    assert told["std_ratio_median"] > 1


def test_a_factor_that_has_drifted_is_made_again_and_says_so():
    online = begun()
    for seed in range(160, 163):
        online = online.added(*labelled(seed))
    upper = online.factor.upper.clone()
    upper[3, 5] += 1e-6 * upper[3, 3]
    spoilt = replace(online, factor=replace(online.factor, upper=upper))
    well = online.removed(-1)
    again = spoilt.removed(-1)
    assert again.factor.changes == 0 and len(again.events) == len(online.events) + 1
    assert "rounding of" in again.events[-1] and "had grown to" in again.events[-1]
    assert well.events == online.events and well.factor.changes > 0
    assert difference(again.potential, well.potential, probes()) < 1e-9
    wrong_mean = online.factor.upper.clone()
    wrong_mean[:, -1] *= 1 + 1e-7
    assert len(replace(online, factor=replace(online.factor, upper=wrong_mean)).removed(-1).events) == len(again.events)


def test_labels_that_told_nearly_all_are_removed_without_a_downdate():
    """A first batch of much smaller noise: what is left after it cannot be told from rounding by a downdate."""
    sure, targets = labelled(170, periodic=False)
    targets = replace(
        targets,
        energies_noise=torch.full_like(targets.energies, 1e-7),
        forces_noise=torch.full_like(targets.forces, 1e-7),
    )
    online = begun().added(sure, targets)
    left = online.removed(-1)
    assert "could not be removed by a downdate" in left.events[-1]
    assert difference(left.potential, begun().potential, probes()) < 1e-9


def test_a_state_knows_what_it_is():
    online = begun()
    assert len(online.structures) == len(online.targets) == online.n_labels == 8
    report = online.report()
    assert report["rank"] == online.factor.columns <= report["columns"]
    assert report["events"] == ["8 labels: refreshed: first data"]
    assert online.potential.report["rows"]["forces"] > 0


@pytest.mark.parametrize("act", ["learned", "added"])
def test_a_species_that_was_not_there_is_refused(act):
    stranger = cluster((6, 1, 8), 3)
    with pytest.raises(UserError, match="H was not among the structures.*it knows C, O"):
        getattr(begun(), act)(stranger, Targets.unlabelled(stranger))


def test_what_is_refused():
    online = begun(4)
    with pytest.raises(UserError, match="last labels"):
        online.removed(0)
    with pytest.raises(UserError, match="All inducing points of C"):
        online.without(0, 6, range(len(online.models[0].blocks[0].features)))
    with pytest.raises(UserError, match="no inducing points of H"):
        online.without(0, 1, [0])
    with pytest.raises(UserError, match="counted from 0; got"):
        online.without(0, 6, [99])
    with pytest.raises(UserError, match="No structure has an energy"):
        online.added(labelled(1)[0], Targets.unlabelled(labelled(1)[0]))


def test_a_refresh_calibrates_on_structures_left_out():
    """From 10 structures on; until the next refresh the calibration stays, whatever is foreseen meanwhile."""
    online = OnlineFit.begin(*together(*(labelled(seed) for seed in range(calibrate.FEWEST_ONLINE - 2))), recipe())
    online = online.learned(*labelled(70)).learned(*labelled(71))
    assert "left out" not in online.recalibrated().calibration.source["how"]
    fresh = online.refreshed("enough structures")
    source = fresh.calibration.source
    assert "left out" in source["how"] and source["held_out_structures"] == calibrate.FEWEST_ONLINE
    later = fresh.learned(*labelled(72)).recalibrated()
    assert later.calibration == fresh.calibration
    assert later.refreshed("again").calibration.source["held_out_structures"] == calibrate.FEWEST_ONLINE + 1


def test_samples_have_shifts_of_structures_left_out():
    """By a refresh; they move predictions by as much when labels, and inducing points with them, have been added."""
    n = 24  # of small structures, with forces enough for a scale of samples
    parts = [labelled(seed) for seed in range(n + 2)]
    fresh = OnlineFit.begin(*together(*parts[:-2]), recipe(inducing={"gradients": 2}))
    structures = together(*parts)[0]

    def moved(online: OnlineFit) -> torch.Tensor:
        """(energies, shifts) by which leaving structures out moves these energies."""
        potential = online.potential
        model = potential.variances
        rows = model.covariance_rows(structures, [t.environments(structures) for t in potential.terms])
        return model.whitened(rows).b.energies @ model.shifts.T

    later = fresh.learned(*parts[-2]).learned(*parts[-1])
    assert len(later.potential.variances.signal) > len(fresh.potential.variances.signal)
    before = moved(fresh)
    assert before.shape == (n + 2, n) and before.abs().max() > 1e-6
    torch.testing.assert_close(moved(later), before, rtol=1e-7, atol=1e-10 * float(before.abs().max()))
    assert later.calibration.posterior_scale == fresh.calibration.posterior_scale > 0
    raw = later.potential.covariance(structures, kinds=["energies"])
    scale, model = later.calibration.posterior_scale, later.potential.variances
    rows = model.covariance_rows(structures, [t.environments(structures) for t in later.potential.terms])
    b = model.whitened(rows).b.energies
    torch.testing.assert_close(raw, scale**2 * b @ b.T + before @ before.T, rtol=1e-6, atol=1e-12)
    assert moved(later.refreshed("again")).shape == (n + 2, n + 2)
    few = OnlineFit.begin(*together(*parts[: calibrate.FEWEST_ONLINE - 1]), recipe()).potential
    assert few.variances.shifts is None and few.calibration.posterior_scale is None
