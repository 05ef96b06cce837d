"""An online model of all functionals of its labels: bordered factors against a fit made anew, variances of centres, and ways back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import exact_model, prepare, regression
from gpmlp.fitting.online import OnlineFit
from gpmlp.io.export import export_model
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

DATA = Path(__file__).parents[1] / "data" / "ethanol"
SMALL = {
    "descriptor": {"n_max": 3, "l_max": 2, "cutoff": 4.0, "four_body": False},
    "inducing": {"functionals": "all"},
    "baseline": {"isolated_atoms": {"H": -13.0, "C": -1030.0, "O": -2043.0}},
}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(SMALL | changes)


@pytest.fixture(scope="module")
def data() -> tuple[Structures, Targets]:
    """Molecules, one of them without forces, one without an energy, one with noises of its own."""
    structures, targets = gpmlp.read(DATA / "train.xyz", ":40")
    whole = [i for i, n in enumerate(structures.counts.tolist()) if n > 1]
    structures, targets = structures.select(whole), targets.select(structures, whole)
    forces, energies, noise = targets.forces.clone(), targets.energies.clone(), targets.forces_noise.clone()
    forces[structures.structure_of_atom == 12] = torch.nan
    energies[14] = torch.nan
    noise[structures.structure_of_atom == 16] = 0.2
    return structures, replace(targets, forces=forces, energies=energies, forces_noise=noise)


def part(data, numbers) -> tuple[Structures, Targets]:
    return data[0].select(list(numbers)), data[1].select(data[0], list(numbers))


def grown(data, first: int = 8, last: int = 20, **changes) -> OnlineFit:
    model = OnlineFit.begin(*part(data, range(first)), recipe(**changes))
    for i in range(first, last):
        model = model.learned(*part(data, [i])).recalibrated()
    return model


@pytest.fixture(scope="module")
def model(data) -> OnlineFit:
    return grown(data)


def refit(model: OnlineFit) -> Potential:
    """The mean of the same functionals and hyperparameters from one covariance, made and solved at once by dense algebra."""
    (old,), remaining = model.models, Targets.concatenate([b.remaining for b in model.batches])
    structures = model.structures
    maps = exact_model.label_maps(structures, remaining)
    relative, make = old.exact.block.relative, type(old.exact.block).with_all_directions
    block = make(old.descriptor, structures, maps, relative)
    labels = exact_model.functional_labels(structures, remaining, maps)
    variance = labels.given.nan_to_num().square()
    for kind, rows in labels.by_kind().items():
        variance[rows] = (model.exact.noise[kind] * labels.scale[rows]).square()
    c = model.exact.signal**2 * block.K_uu(old.kernel) + torch.diag(variance)
    weights = model.exact.signal**2 * torch.linalg.solve(c, labels.values)
    exact = replace(old.exact, block=block)
    return replace(model.potential, terms=regression.make_terms([replace(old, exact=exact)], weights))


def difference(a: Potential, b: Potential, structures: Structures) -> float:
    p, q = (x(structures) for x in (a, b))
    return float(max((p.energies - q.energies).abs().max(), (p.forces - q.forces).abs().max()))


def test_after_many_labels_the_mean_is_that_of_a_fit_made_anew(data, model):
    probes = part(data, range(30, 34))[0]
    assert len(model.exact._borders) == 12 and model.rank == sum(map(len, model.models[0].exact.block.maps))
    assert difference(model.potential, refit(model), probes) < 1e-8
    fewer = model.removed(3).removed(0)
    assert fewer.n_labels == 11 and fewer.rank < model.rank
    assert difference(fewer.potential, refit(fewer), probes) < 1e-8
    more = (
        fewer.learned(*part(data, [21])).learned(*part(data, [22, 23])).refreshed("a test").learned(*part(data, [25]))
    )
    assert difference(more.potential, refit(more), probes) < 1e-8
    assert difference(more.potential, model.potential, probes) > 1e-4


def test_its_evidence_and_what_is_left_out_are_those_of_one_factor(model):
    whole = model.exact.process.select(torch.arange(model.rank)).condition(model.exact.noise, model.exact.signal)
    assert model.exact.negative_log_evidence == pytest.approx(whole.negative_log_evidence, rel=1e-8)
    torch.testing.assert_close(model.exact.alpha, whole.alpha, rtol=0, atol=1e-6 * float(whole.alpha.abs().max()))
    for group in ([2, 3, 4], [model.rank - 3, 5]):
        for a, b in zip(model.exact.left_out(group), whole.left_out(group), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert model.exact.rms == pytest.approx(whole.rms, rel=1e-8)


def test_an_older_state_is_not_touched(data, model):
    probes = part(data, range(30, 34))[0]
    before = model.potential(probes, ("energies", "forces"))
    later = model.learned(*part(data, [24])).removed(0).refreshed("a test").learned(*part(data, [26]))
    assert later.n_labels == 14
    after = replace(model).potential(probes, ("energies", "forces"))
    assert torch.equal(before.forces, after.forces) and torch.equal(before.energies, after.energies)
    assert torch.equal(before.forces_variance.total, after.forces_variance.total)
    again = model.learned(*part(data, [24]))  # from the same state twice, with the same result
    twice = model.learned(*part(data, [24]))
    assert torch.equal(again.exact.alpha, twice.exact.alpha)


def test_it_is_more_accurate_than_centres_and_knows_its_errors(data, model):
    others = part(data, range(20, 37))
    few = grown(data, inducing={"functionals": None})
    assert few.exact is None
    errors = [(m.potential(others[0]).forces - others[1].forces).abs().mean() for m in (model, few)]
    assert errors[0] < 0.97 * errors[1]
    refreshed = model.refreshed("a test")
    assert refreshed.subset["columns"] == refreshed.factor.columns and "std_ratio_median" in refreshed.subset
    found = refreshed.potential(others[0], "forces")
    z = (found.forces - others[1].forces) / found.forces_variance.total.sqrt()
    assert 0.5 < float(z.square().mean().sqrt()) < 1.6


def test_variances_are_everywhere(model, tmp_path):
    """Those of centres: in model files, in the compiled core and in exports, without a warning."""
    potential = model.potential
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    again, probe = gpmlp.load(tmp_path / "model.gpmlp"), model.structures.select([2])
    a, b = (p(probe, "all", novelty=True) for p in (potential, again))
    assert torch.equal(a.forces, b.forces)
    for name in ("energies_variance", "forces_covariance", "atom_energies_variance"):
        torch.testing.assert_close(getattr(b, name).total, getattr(a, name).total, rtol=1e-6, atol=1e-12)
    assert potential.variances.local_blocks is not None
    export_model(potential, tmp_path / "model.kim")
    samples = potential.sample(300, seed=1, calibrated=False)(probe).forces.var(0)
    spread = potential(probe, "forces", calibrated=False).forces_variance
    assert abs(float(samples.mean() / (spread.inducing + spread.data).mean()) - 1) < 0.4


def test_few_labels_have_variances_of_the_size_of_the_exact_ones(data):
    """Not those of the signal that a sparse process learns from them, dozens of times larger."""
    few, (others, labels) = part(data, range(6)), part(data, range(20, 37))

    def found(potential: Potential) -> tuple[Tensor, Tensor]:
        p = potential(others, ("energies", "forces"), calibrated=False)
        stds = [v.epistemic.square().mean().pow(0.25) for v in (p.energies_variance, p.forces_variance)]
        return torch.stack(stds), ((p.forces - labels.forces).square() / p.forces_variance.total).mean().sqrt()

    online = OnlineFit.begin(*few, recipe(calibration=False))
    exactly, _ = found(gpmlp.fit(*few, recipe(calibration=False, variance={"columns": "all"}))[0])
    later = online.learned(*part(data, [6]))
    for potential in (gpmlp.fit(*few, recipe(calibration=False))[0], online.potential, later.potential):
        stds, z = found(potential)
        assert ((stds / exactly > 0.3) & (stds / exactly < 4)).all() and 0.3 < float(z) < 3
    assert later.amplitude == online.amplitude < 0.1


def test_energies_alone_have_such_variances(data):
    structures, targets = part(data, range(10))
    alone = replace(targets, forces=torch.full_like(targets.forces, torch.nan))
    online, probes = OnlineFit.begin(structures, alone, recipe(calibration=False)), part(data, range(20, 37))[0]
    exactly = gpmlp.fit(structures, alone, recipe(calibration=False, variance={"columns": "all"}))[0]
    a, b = (p(probes, "energies", calibrated=False).energies_variance.epistemic for p in (online.potential, exactly))
    assert online.amplitude != 1 and 0.2 < float((a.mean() / b.mean()).sqrt()) < 5


def test_what_was_foreseen_follows_the_amplitude(model):
    """Calibrated, it is what it was, though variances are of another size."""
    changed = model._with_amplitude(3 * model.amplitude)
    for a, b in zip(model.prequential, changed.prequential, strict=True):
        old, new = a.prediction.forces_variance, b.prediction.forces_variance
        torch.testing.assert_close(new.inducing, 3 * old.inducing)
        torch.testing.assert_close(new.data, old.data, rtol=0, atol=0)
    probe = model.structures.select([2])
    a, b = (x.potential(probe, "forces").forces_variance.total for x in (model, changed))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_a_refresh_learns_relative_signals_again(data):
    """Of all labels there are, up to as many functionals as they depend on; the square is of these, and comes back by none."""
    first = OnlineFit.begin(*part(data, range(4)), recipe(calibration=False))
    online = first
    for i in range(4, 16):
        online = online.added(*part(data, [i]))
    old, fresh = online.models[0].exact, online.refreshed("a test")
    new = fresh.models[0].exact
    assert old.block.relative == first.models[0].exact.block.relative and new.first == 16
    order = Targets.concatenate([b.remaining for b in online.batches]).select(online.structures, list(new.of))
    relative, start, _ = exact_model.first_evidence(online.recipe, 0, online.models[0].kernel, old.block, order)
    assert new.block.relative == relative and new.start == start
    assert max(abs(relative[z] / old.block.relative[z] - 1) for z in relative) > 0.1
    assert difference(fresh.potential, refit(fresh), part(data, [30])[0]) < 1e-8
    again = fresh.refreshed("once more").models[0].exact
    assert again.block.relative == relative and torch.equal(again.block.maps[3], new.block.maps[3])
    assert fresh.removed(2).refreshed("fewer").models[0].exact.first == 15


def test_first_labels_of_a_kind(data):
    """Forces, where there were energies alone."""
    structures, targets = part(data, range(10))
    alone = replace(targets, forces=torch.full_like(targets.forces, torch.nan))
    first = OnlineFit.begin(structures, alone, recipe())
    assert first.rank == 10 and first.exact.noise.keys() == {"energies"}
    second = first.learned(*part(data, [18]))
    assert second.exact.noise.keys() == {"energies", "forces"} and second.rank == 10 + 22
    assert difference(second.potential, refit(second), part(data, [30])[0]) < 1e-8


def test_what_cannot_be_among_all_functionals_goes_back_to_centres(data, model, monkeypatch):
    """Forces known in part; more labels than are to be; no memory for them. The model says so and goes on."""
    structures, targets = part(data, [24])
    holes = targets.forces.clone()
    holes[0, 1] = torch.nan
    fewer = model.learned(structures, replace(targets, forces=holes))
    assert fewer.exact is None and "known in part" in fewer.events[-1] and fewer.rank == fewer.factor.columns
    assert fewer.n_labels == 21 and bool(fewer.potential(structures).forces.isfinite().all())
    anew = fewer.rebuilt("a test")
    assert anew.exact is None and any("known in part" in e for e in anew.events)
    monkeypatch.setattr(prepare, "MOST_FUNCTIONALS", 300)
    anew = model.rebuilt("a test")
    assert anew.exact is None and any("300 at most" in e for e in anew.events)
    monkeypatch.undo()
    few = OnlineFit.begin(*part(data, range(8)), recipe(memory_GB=1e-4))
    assert few.exact is None and any("memory_GB" in e for e in few.events)


def test_so_many_functionals_are_refused(data):
    with pytest.raises(UserError, match="or give `all`"):
        OnlineFit.begin(*part(data, range(8)), recipe(inducing={"functionals": 50}))
