"""Prior distributions of noises and signals: priors move the optimum, bounds hold, what is given stays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch

from gpmlp import recipe
from gpmlp.core.errors import UserError
from gpmlp.fitting import regression
from gpmlp.fitting.fit import fit
from gpmlp.fitting.online import OnlineFit
from gpmlp.gp import evidence, hyperparameters
from gpmlp.gp.evidence import AtBound, SufficientStatistics
from gpmlp.gp.likelihood import NOISE_PRIORS, SIGNAL_PRIOR, StdPrior
from gpmlp.io import archive
from gpmlp.io.recipe_files import load_recipe, save_recipe, validate_recipe

COLUMNS, BLOCKS = 30, [(0, 6), (0, 14)]
BLOCK_OF_COLUMN = torch.arange(2).repeat_interleave(COLUMNS // 2)


def data(n: int = 80) -> dict[str, SufficientStatistics]:
    """Energies and forces of a linear model with signals 3 and 0.5, and noises 0.02 and 0.3."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn(COLUMNS, generator=generator, dtype=torch.float64)
    weights *= torch.tensor([3.0, 0.5], dtype=torch.float64)[BLOCK_OF_COLUMN]
    found = {}
    for kind, noise in (("energies", 0.02), ("forces", 0.3)):
        rows = torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64) / 6
        labels = rows @ weights + noise * torch.randn(n, generator=generator, dtype=torch.float64)
        found[kind] = SufficientStatistics.from_factor(torch.cat([rows, labels[:, None]], dim=1), n)
    return found


def made(given: dict):
    return hyperparameters.make_hyperparameters(validate_recipe(given), ("energies", "forces"), BLOCKS)


def by_hand(medians: list[float], factors: list[float]) -> np.ndarray:
    """Standard deviations of energies, forces, C and Si at which evidence times log-normal priors is largest, by a search without
    slopes that knows nothing of gpmlp's parameters."""
    statistics = data()

    def value(x: np.ndarray) -> float:
        energies, forces, *signal = np.exp(x)
        about = {"energies": energies, "forces": forces}, torch.tensor(signal, dtype=torch.float64), BLOCK_OF_COLUMN
        priors = scipy.stats.norm.logpdf(x, np.log(medians), np.log(factors))
        return evidence.negative_log_evidence(statistics, *about)[0] - priors.sum()

    start = np.log(medians)
    options = {"xatol": 1e-4, "fatol": 1e-8, "maxiter": 1000}
    found = scipy.optimize.minimize(value, start, method="Nelder-Mead", options=options)
    assert found.success
    return np.exp(found.x)


def test_a_prior_moves_the_optimum_as_evidence_and_prior_say():
    """Against a search by other means; the prior is stronger than the data for the noise of forces and weaker for the rest."""
    parameters = made(
        {
            "noise": {
                "energy_per_atom": {"prior": {"median": 0.1, "factor": 3}},
                "force": {"prior": {"median": 2.0, "factor": 1.1}},
            },
            "signal": {"Si": {"prior": {"median": 0.1, "factor": 2}}},
        }
    )
    evidence.maximise_evidence(data(), parameters, BLOCK_OF_COLUMN, 200)
    found = [*parameters.noise().values(), *parameters.signal().tolist()]
    # L-BFGS-B stops where the value (about 100) changes by less than 1e-8 of itself: sqrt(1e-6 / curvature of about 10)
    np.testing.assert_allclose(found, by_hand([0.1, 2.0, 1.0, 0.1], [3.0, 1.1, math.exp(3), 2.0]), rtol=2e-3)
    free = made({})
    evidence.maximise_evidence(data(), free, BLOCK_OF_COLUMN, 200)
    assert free.noise()["forces"] == pytest.approx(0.3, rel=0.2)
    assert 1.5 * free.noise()["forces"] < parameters.noise()["forces"] < 2.0
    assert parameters.signal()[1] < 0.95 * free.signal()[1]


def test_the_fixed_point_has_the_same_optimum_with_priors():
    given = {
        "noise": {"force": {"prior": {"median": 2.0, "factor": 1.1}}},
        "signal": {"Si": {"prior": {"median": 0.05, "factor": 1.3}}, "C": 2.0},
    }
    smooth, fixed = made(given), made(given)
    evidence.maximise_evidence(data(), smooth, BLOCK_OF_COLUMN, 200)
    evidence.iterate_fixed_point(data(), fixed, BLOCK_OF_COLUMN, max_iterations=200, tolerance=1e-9, n_probes=4096)
    # traces from 4096 probes: sqrt(2 / (4096 x 30 columns)) = 0.4 %, and as much of what they steer
    assert fixed.noise() == pytest.approx(smooth.noise(), rel=5e-3)
    assert fixed.signal().tolist() == pytest.approx(smooth.signal().tolist(), rel=1e-2)
    assert fixed.signal()[0] == pytest.approx(2.0, rel=1e-12)


def test_the_slope_is_that_of_evidence_and_priors_together():
    parameters = made(
        {
            "noise": {"force": {"prior": {"median": 0.01, "factor": 1.5}, "bounds": [1e-3, 9]}},
            "signal": {"C": {"start": 2.5, "prior": {"median": 40, "factor": 1.2}}, "Si": 0.7},
        }
    )
    statistics, h = data(), 1e-5
    _, slopes = evidence.negative_log_posterior(statistics, parameters, BLOCK_OF_COLUMN)
    assert slopes["signal"][1] == 0  # given
    for name, slope in slopes.items():
        middle = parameters.log_std(name).detach().clone()
        for i in parameters.free(name).nonzero()[:, 0].tolist():
            sides = []
            for step in (-h, h):
                parameters.set(name, middle + step * torch.eye(len(middle))[i])
                sides.append(evidence.negative_log_posterior(statistics, parameters, BLOCK_OF_COLUMN)[0])
            parameters.set(name, middle)
            # rounding of values of 1e3 and more over 2 h
            assert float(slope[i]) == pytest.approx((sides[1] - sides[0]) / (2 * h), rel=1e-5, abs=1e-5), (name, i)


def test_bounds_hold_and_are_told_and_what_is_given_stays():
    given = {
        "noise": {"energy_per_atom": 0.07, "force": {"bounds": [0.5, 0.8]}},
        "signal": {"C": {"bounds": [0.1, 1.0]}, "Si": 0.4},
    }
    for learn in (evidence.maximise_evidence, evidence.iterate_fixed_point):
        parameters = made(given)
        evidence.restart_optimisation(data(), parameters, BLOCK_OF_COLUMN, 2, seed=0)
        ended = learn(data(), parameters, BLOCK_OF_COLUMN).at_bound
        assert parameters.noise() == pytest.approx({"energies": 0.07, "forces": 0.5}, rel=1e-5)  # true is 0.3
        assert parameters.signal().tolist() == pytest.approx([1.0, 0.4], rel=1e-4)  # true are 3 and 0.5
        assert set(ended) == {AtBound("forces", 0, "lower"), AtBound("signal", 0, "upper")}
        said = sorted(hyperparameters.bound_warnings(validate_recipe(given), BLOCKS, ended))
        assert said[0].startswith("noise.force ended at 0.5 eV/A, the lower bound that the recipe sets (noise.force.b")
        assert said[1].startswith("signal.C ended at 1 eV, the upper bound that the recipe sets")
    (said,) = hyperparameters.bound_warnings(validate_recipe({}), BLOCKS, [AtBound("signal", 1, "upper")])
    assert said.startswith("signal.Si ended at 1e+04 eV, the upper bound of its range; the data may not determine it")


def test_nothing_is_left_to_learn():
    parameters = made({"noise": {"energy_per_atom": 0.07, "force": 0.1}, "signal": {"C": 2.0, "Si": 0.4}})
    evidence.restart_optimisation(data(), parameters, BLOCK_OF_COLUMN, 1, seed=0)
    result = evidence.maximise_evidence(data(), parameters, BLOCK_OF_COLUMN)
    assert parameters.signal().tolist() == pytest.approx([2.0, 0.4], rel=1e-12)
    assert result.at_bound == () and math.isfinite(result.negative_log_evidence)


def test_what_is_left_out_is_the_default():
    parameters = made({"noise": {"force": {"prior": {"median": 0.3, "factor": 2}}}})
    assert torch.cat(parameters.bounds("forces")).exp().tolist() == pytest.approx(
        [NOISE_PRIORS["forces"].low, NOISE_PRIORS["forces"].high]
    )
    assert parameters.noise()["forces"] == pytest.approx(0.3)  # begins at the prior's median
    parameters = made({"noise": {"force": {"bounds": [1.0, 4.0]}}, "signal": {"Si": {"start": 5}}})
    assert parameters.noise()["forces"] == pytest.approx(2.0)  # the default start is outside
    middle, width = parameters.prior("forces")
    assert (
        float(middle.exp()) == pytest.approx(NOISE_PRIORS["forces"].median)
        and float(width) == StdPrior(1, 1, 1).log_width
    )
    assert parameters.signal().tolist() == pytest.approx([SIGNAL_PRIOR.median, 5])


def test_signals_of_free_charges_at_a_bound():
    """They follow those of the blocks, and no recipe knows them: charges that are constants are none to warn of."""
    ended = [AtBound("signal", len(BLOCKS), side) for side in ("lower", "upper")]
    (said,) = hyperparameters.bound_warnings(validate_recipe({}), BLOCKS, ended)
    assert said.startswith("The signal of free charges ended at the upper bound")


def test_each_descriptor_may_have_signals_of_its_own():
    given = {"descriptor": [{"cutoff": 3}, {"cutoff": 5}], "signal": [{"Si": 2}, {"Si": {"bounds": [3, 4]}}]}
    blocks = [(0, 6), (0, 14), (1, 6), (1, 14)]
    parameters = hyperparameters.make_hyperparameters(validate_recipe(given), ("forces",), blocks)
    assert parameters.signal().tolist() == pytest.approx([1, 2, 1, math.sqrt(12)])
    (said,) = hyperparameters.bound_warnings(validate_recipe(given), blocks, [AtBound("signal", 3, "lower")])
    assert said.startswith("signal.1.Si ended at 3 eV, the lower bound that the recipe sets (signal.1.Si.bounds)")
    shared = hyperparameters.make_hyperparameters(validate_recipe(given | {"signal": {"Si": 2}}), ("forces",), blocks)
    assert shared.signal().tolist() == pytest.approx([1, 2, 1, 2])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("noise.force.bounds=[0.5,0.1]", r"`noise.force.bounds` must be \[lowest, highest\].*got \[0.5, 0.1\]"),
        ("noise.stress.bounds=3", r"`noise.stress.bounds` must be \[lowest, highest\].*got 3"),
        ("noise.force.bounds=[-1,1]", r"`noise.force.bounds` must be .* positive numbers.*got \[-1, 1\]"),
        ("signal.Si.bounds=[a,1]", r"`signal.Si.bounds` must be .*got \['a', 1\]"),
        ("signal.Si=-2", r"`signal.Si` must be greater than 0; got -2"),
        ("signal.Sj=2", r"signal: 'Sj' is not a chemical symbol. Perhaps you meant 'S'.$"),
        ("signal=2", r"`signal` must be a mapping of keys to values or a list of such; got 2"),
        ("signal=[{Si: 1}, {Si: 2}]", r"`signal` lists 2 entries for 1 descriptors"),
        ("noise.force={prior: {median: 0.1}}", r"`noise.force.prior.factor` is missing and has to be given"),
        ("noise.force={prior: {median: 0.1, factor: 1}}", r"`noise.force.prior.factor` must be greater than 1; got 1"),
        ("noise.force={prior: [0.1, 2]}", r"`noise.force.prior` must be a mapping of keys to values; got \[0.1, 2\]"),
        ("noise.force={start: 1, bounds: [2, 3]}", r"noise.force: start 1 lies outside the bounds, 2 to 3"),
        (
            "noise.force={prior: {median: 9, factor: 2}, bounds: [2, 3]}",
            r"noise.force: prior.median 9 lies outside the bounds, 2 to 3",
        ),
        ("noise.force_meV=3", r"unknown key 'noise.force_meV'. Perhaps you meant 'noise.force'"),
        ("noise.energy.prior=3", r"unknown key 'noise.energy'. Perhaps you meant 'noise.energy_per_atom'"),
        ("signal.Si.prio=3", r"unknown key 'signal.Si.prio'. Perhaps you meant 'signal.Si.prior'"),
        ("noise.config_types.a.force.start=3", r"`noise.config_types.a.force` must be a valid number"),
        ("noise=5", r"`noise` must be a mapping of keys to values; got 5"),
    ],
)
def test_mistakes_name_their_key(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, [override])


def test_files_keep_what_is_given(tmp_path):
    given = load_recipe(
        None, ["noise.force.bounds=[1e-3, 0.1]", "signal.Si.prior={median: 3, factor: 2}", "signal.O=1"]
    )
    assert given.noise.force == recipe.LearnedRecipe(bounds=(1e-3, 0.1))
    save_recipe(given, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == given
    # a number put where a section was takes its place, and the other way round
    assert load_recipe(tmp_path / "recipe.yaml", ["noise.force=0.2"]).noise.force == 0.2
    assert load_recipe(tmp_path / "recipe.yaml", ["signal.O.start=2"]).signal["O"] == recipe.LearnedRecipe(start=2)


def test_a_fit_keeps_to_them_and_its_file_tells(small_set, small_recipe, tmp_path):
    given = {"force": {"bounds": [0.5, 2.0]}, "stress": {"prior": {"median": 0.1, "factor": 1.01}}}
    asked = small_recipe.model_copy(
        update={
            "noise": recipe.NoiseRecipe.model_validate(given),
            "signal": {"Cu": 3.0},
        }
    )
    potential, report = fit(*small_set, asked)
    assert report.signal == pytest.approx({"0:Cu": 3.0}, rel=1e-12)
    assert report.noise["forces"] == pytest.approx(0.5, rel=1e-4)
    assert report.noise["stresses"] == pytest.approx(0.1, rel=0.05)
    assert any("noise.force ended at 0.5 eV/A, the lower bound that the recipe sets" in w for w in report.warnings)
    archive.save(potential, tmp_path / "m.gpmlp")
    again = archive.load(tmp_path / "m.gpmlp").recipe
    assert again == potential.recipe and again.noise.force == recipe.LearnedRecipe(bounds=(0.5, 2.0))
    assert again.signal == {"Cu": 3.0}


def test_leaving_out_keeps_to_the_bounds_of_energies_and_yields_to_their_prior(small_set, small_recipe):
    def learned(**given) -> tuple[float, float]:
        asked = small_recipe.model_copy(update={"noise": recipe.NoiseRecipe.model_validate(given)})
        _, report = fit(*small_set, asked)
        return report.noise["energies"], report.noise_by_evidence["energies"]

    least, by_evidence = learned()
    assert least < 0.6 * by_evidence
    middle = math.sqrt(least * by_evidence)
    found, _ = learned(energy_per_atom={"bounds": [middle, 1.0]})
    assert found == pytest.approx(middle, rel=1e-3)
    found, again = learned(energy_per_atom={"prior": {"median": by_evidence, "factor": 20.0}})
    assert found == again == pytest.approx(by_evidence, rel=0.05)


def test_a_signal_of_a_species_that_is_not_there(small_set, small_recipe):
    asked = small_recipe.model_copy(update={"signal": {"Ge": 3.0}})
    with pytest.raises(UserError, match="`signal.Ge` is given, but there is no Ge .* hold Cu"):
        fit(*small_set, asked)
    with pytest.raises(UserError, match="`signal.Ge` is given, but there is no Ge"):
        OnlineFit.begin(*small_set, asked)


def test_an_online_model_keeps_to_them(small_set, small_recipe):
    structures, targets = small_set
    some = list(range(6))
    asked = small_recipe.model_copy(
        update={"noise": recipe.NoiseRecipe(force=recipe.LearnedRecipe(bounds=(0.5, 2.0))), "signal": {"Cu": 3.0}}
    )
    online = OnlineFit.begin(structures.select(some), targets.select(structures, some), asked)
    assert online.noise["forces"] == pytest.approx(0.5, rel=1e-4)
    assert online.signal.tolist() == pytest.approx([3.0], rel=1e-12)
    assert regression.blocks_of(online.models) == [(0, 29)]
