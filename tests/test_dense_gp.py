"""The sparse process with every environment as a centre and all its gradients is the dense Gaussian process.

What holds exactly: the DTC posterior with prior covariance Q = K_ou K_uu^-1 K_uo is the dense one wherever every training
observation is a linear combination of the inducing variables. Energies are sums of values; forces and stresses are sums of
derivatives along the rows of descriptor Jacobians; so all values and, for each centre, a basis of the row space of its Jacobian
suffice, and nothing is asked of the structures that are predicted.

Tolerance: `directions` leaves out singular values below 1e-5 of the largest, and the inducing covariance columns with less than
1e-9 of variance of their own. Environments of n neighbours have 3n - 3 nonzero singular values, which fall fast with n, so the structures
here have few neighbours, where the smallest is 1e-3 of the largest (asserted): then nothing physical is left out, rounding is
amplified by at most (1e3)^2 x (signal/noise)^2 ~ 1e8 in the weights of directions that hardly matter, and 1e-8 is safe (1e-12 is seen).
"""

from __future__ import annotations

from dataclasses import replace

import oracles
import pytest
import torch
from systems import KERNELS, cluster, crystal, descriptor, structure, targets_of
from test_covariances import inducing_blocks

from gpmlp.core import neighbors
from gpmlp.core.environments import StructureEnvironments, Surroundings
from gpmlp.core.quantities import KINDS, Prediction, Targets
from gpmlp.core.structures import Structures
from gpmlp.core.units import VOIGT
from gpmlp.fitting.fit import fit
from gpmlp.gp import covariances, evidence, inducing, posterior, qr
from gpmlp.gp.evidence import SufficientStatistics
from gpmlp.recipe import Recipe

TIGHT = 1e-8
SIZES = {"cutoff": 3.2, "n_max": 5, "l_max": 5, "sigma_atom": 0.4, "radial_scaling": False}
SOAP = {"name": "soap", "basis": "gto", "cutoff_width": 1.0, "shortest": 1.0} | SIZES
SIGNAL = {6: 1.3, 8: 0.8}
NOISE = {"energies": 0.01, "forces": 0.05, "stresses": 0.005}


def training_set() -> Structures:
    """Two molecules and a crystal in which each atom has four neighbours."""
    crystal_cell = [[2.7, 0.3, 0.1], [0.2, 4.9, 0.3], [-0.3, 0.4, 4.6]]
    few = structure([[0, 0, 0], [1.2, 1.0, 0.9]], (6, 8), crystal_cell, (True, True, True))
    return Structures.concatenate([cluster((6, 8, 6), 2, 2.5), few, cluster((8, 6, 8), 3, 2.5)])


def other_structures() -> Structures:
    return Structures.concatenate([cluster((6, 8, 6), 5, 2.5), crystal("cubic"), cluster((6, 8, 8, 6, 6), 6)])


def labels(structures: Structures, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arbitrary numbers: the identity has nothing to do with what the labels are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"energies": len(structures), "forces": 3 * structures.n_atoms, "stresses": 6 * len(structures)}
    made = {kind: 0.3 * torch.randn(n, generator=generator, dtype=torch.float64) for kind, n in sizes.items()}
    made["stresses"][structures.volumes.isnan().repeat_interleave(6)] = float("nan")
    return made


def sparse_factors(structures: Structures, made, kernel, blocks, lowers, values) -> tuple[dict, dict]:
    """Whitened factor and number of rows of each kind; energies per atom."""
    rows = covariances.covariance_rows(
        structures, StructureEnvironments.from_structures(made, structures), kernel, blocks
    )
    whitened, counts = {}, {}
    for kind, y in values.items():
        a, known = getattr(rows, kind), ~torch.isnan(y)
        a = a / structures.counts[:, None] if kind == "energies" else a
        factor = qr.RowFactor(a.shape[1], 50)
        factor.add(a[known], y[known])
        whitened[kind], counts[kind] = inducing.whiten_rows(factor.factor(), lowers), factor.count
    return whitened, counts


@pytest.fixture(scope="module", params=["polynomial 2", "polynomial 3", "exponential", "sum"])
def both(request):
    """(dense process, sparse factors and what belongs to them) conditioned on the same labels."""
    made, kernel, structures = descriptor("soap gto", (6, 8), **SIZES), KERNELS[request.param], training_set()
    surroundings = Surroundings.from_structures(structures, neighbors.find_neighbors(structures, made.cutoff))
    jacobian = made(surroundings).jacobian()
    for e in range(structures.n_atoms):
        singular = torch.linalg.svdvals(jacobian[surroundings.centers == e].flatten(0, 1))
        singular = singular[singular > 1e-12 * singular[0]]
        assert singular[-1] > 1e-3 * singular[0]  # see the docstring of this file
    blocks, lowers = inducing_blocks(made, kernel, 12, structures, (6, 8))
    values = labels(structures)
    noise = {kind: torch.full_like(y, NOISE[kind]) for kind, y in values.items()}
    dense = oracles.DenseGP(made, kernel.profile, SIGNAL).condition(structures, values, noise)
    whitened, counts = sparse_factors(structures, made, kernel, blocks, lowers, values)
    widths = torch.tensor([b.n_columns for b in blocks])
    block_of_column = torch.repeat_interleave(torch.arange(2), widths)
    signal = torch.tensor([SIGNAL[6], SIGNAL[8]], dtype=torch.float64)
    return dense, made, kernel, blocks, lowers, whitened, counts, block_of_column, signal


def test_predictions_are_those_of_the_dense_process(both):
    dense, made, kernel, blocks, lowers, whitened, counts, block_of_column, signal = both
    solved = posterior.solve_posterior(whitened, counts, NOISE, signal[block_of_column], lowers)
    others = other_structures()
    expected = dense.predict(others)
    rows = covariances.covariance_rows(others, StructureEnvironments.from_structures(made, others), kernel, blocks)
    torch.testing.assert_close(rows.energies @ solved.weights / others.counts, expected["energies"], atol=TIGHT, rtol=0)
    torch.testing.assert_close(rows.forces @ solved.weights, expected["forces"], atol=TIGHT, rtol=0)
    torch.testing.assert_close(rows.stresses @ solved.weights, expected["stresses"], atol=TIGHT, rtol=0)
    assert expected["energies"].abs().max() > 0.1  # not a comparison of nothing with nothing
    assert expected["stresses"].abs().max() > 1e-4


def test_the_evidence_is_the_dense_marginal_likelihood(both):
    dense, *_, whitened, counts, block_of_column, signal = both
    statistics = {kind: SufficientStatistics.from_factor(w, counts[kind]) for kind, w in whitened.items()}
    value, _, _ = evidence.negative_log_evidence(statistics, NOISE, signal, block_of_column)
    # a difference of terms like y^2/noise^2 ~ 1e4, through the Gram matrices: eps x 1e4 x condition 1e2
    assert value == pytest.approx(-dense.log_evidence, abs=1e-7)


def test_the_gradient_of_the_evidence_by_differences(both):
    *_, whitened, counts, block_of_column, signal = both
    statistics = {kind: SufficientStatistics.from_factor(w, counts[kind]) for kind, w in whitened.items()}
    _, d_noise, d_signal = evidence.negative_log_evidence(statistics, NOISE, signal, block_of_column)
    h = 1e-4  # in the logarithm; third derivatives are of the size of the value, 1e3: error 1e-8 x 1e3 / 6

    def value(noise, signal) -> float:
        return evidence.negative_log_evidence(statistics, noise, signal, block_of_column)[0]

    for kind in KINDS:
        sides = [value(NOISE | {kind: NOISE[kind] * 2.718281828459045 ** (s * h)}, signal) for s in (-1, 1)]
        assert d_noise[kind] == pytest.approx((sides[1] - sides[0]) / (2 * h), rel=1e-5, abs=1e-5)
    for b in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[b] = h
        sides = [value(NOISE, signal * torch.exp(s * step)) for s in (-1, 1)]
        assert float(d_signal[b]) == pytest.approx((sides[1] - sides[0]) / (2 * h), rel=1e-5, abs=1e-5)


def test_energies_alone_need_values_alone():
    """Value-only inducing sets represent energies exactly; forces are then predicted as the dense process predicts them."""
    made, kernel, structures = descriptor("soap gto", (6, 8), **SIZES), KERNELS["polynomial 3"], training_set()
    blocks, lowers = inducing_blocks(made, kernel, 0, structures, (6, 8))
    values = {"energies": labels(structures)["energies"]}
    dense = oracles.DenseGP(made, kernel.profile, SIGNAL)
    dense.condition(structures, values, {"energies": torch.full_like(values["energies"], 0.01)})
    whitened, counts = sparse_factors(structures, made, kernel, blocks, lowers, values)
    signal = torch.cat([torch.full((b.n_columns,), SIGNAL[b.species], dtype=torch.float64) for b in blocks])
    solved = posterior.solve_posterior(whitened, counts, NOISE, signal, lowers)
    others = other_structures()
    rows = covariances.covariance_rows(others, StructureEnvironments.from_structures(made, others), kernel, blocks)
    expected = dense.predict(others)
    torch.testing.assert_close(rows.energies @ solved.weights / others.counts, expected["energies"], atol=TIGHT, rtol=0)
    torch.testing.assert_close(rows.forces @ solved.weights, expected["forces"], atol=TIGHT, rtol=0)


# the whole of fit -----------------------------------------------------------------------------------------------------------


def recipe(**changes) -> Recipe:
    fields = {
        "descriptor": SOAP,
        "kernel": {"zeta": 3},
        "inducing": {"n": 8, "gradients": 12},
        "noise": {"energy_per_atom": 0.01, "force": 0.05, "stress": 0.005},
        "baseline": {"isolated_atoms": "none", "zbl": False},
    }
    return Recipe.model_validate(fields | changes)


def targets(structures: Structures) -> Targets:
    """labels() as Targets: energies in total, stresses as matrices."""
    values = labels(structures)
    stresses = torch.zeros(len(structures), 3, 3, dtype=torch.float64)
    for k, (a, b) in enumerate(VOIGT):
        stresses[:, a, b] = stresses[:, b, a] = values["stresses"].reshape(-1, 6)[:, k]
    forces = values["forces"].reshape(-1, 3)
    prediction = Prediction(values["energies"] * structures.counts, forces[:, 0], forces, stresses)
    return targets_of(structures, prediction)


def dense_fit(
    structures: Structures, wanted: Targets, report, noise: dict[str, torch.Tensor] | None = None
) -> oracles.DenseGP:
    """The dense process with the signal variances that the fit arrived at, unknown labels left out."""
    signal = {6: report.signal["0:C"], 8: report.signal["0:O"]}
    a, b = zip(*VOIGT, strict=True)
    values = {
        "energies": wanted.energies / structures.counts,
        "forces": wanted.forces.flatten(),
        "stresses": wanted.stresses[:, a, b].flatten(),
    }
    values = {kind: y for kind, y in values.items() if not y.isnan().all()}
    common = {kind: torch.full_like(y, report.noise.get(kind, float("nan"))) for kind, y in values.items()}
    made = descriptor("soap gto", (6, 8), **SIZES)
    return oracles.DenseGP(made, KERNELS["polynomial 3"].profile, signal).condition(
        structures, values, common | (noise or {})
    )


def assert_equal_predictions(potential, dense: oracles.DenseGP) -> None:
    others = other_structures()
    found, expected = potential(others), dense.predict(others)
    a, b = zip(*VOIGT, strict=True)
    known = ~others.volumes.isnan()
    pairs = {
        "energies": (found.energies / others.counts, expected["energies"]),
        "forces": (found.forces.flatten(), expected["forces"]),
        "stresses": (found.stresses[:, a, b][known], expected["stresses"].reshape(-1, 6)[known]),
    }
    for left, right in pairs.values():  # random labels ask for forces of up to 1e2 eV/A where there are none
        torch.testing.assert_close(left, right, atol=TIGHT * max(1.0, float(right.abs().max())), rtol=0)


def test_fit_is_the_dense_process():
    structures = training_set()
    wanted = targets(structures)
    potential, report = fit(structures, wanted, recipe())
    assert report.jitter == 0
    # rounding of the transform to an unconstrained parameter and back
    assert report.noise == pytest.approx({"energies": 0.01, "forces": 0.05, "stresses": 0.005}, rel=1e-13)
    assert report.rows == {"energies": 3, "forces": 24, "stresses": 6}
    assert_equal_predictions(potential, dense_fit(structures, wanted, report))


def test_learned_noises_and_signals_are_those_of_the_dense_process():
    """Learned hyperparameters, put into the dense process, give the same predictions."""
    structures = training_set()
    wanted = targets(structures)
    potential, report = fit(structures, wanted, recipe(noise={}))
    assert_equal_predictions(potential, dense_fit(structures, wanted, report))


def test_missing_labels_are_left_out():
    structures = training_set()
    wanted = targets(structures)
    nan = float("nan")
    energies, forces, stresses = wanted.energies.clone(), wanted.forces.clone(), wanted.stresses.clone()
    energies[2] = nan
    forces[1] = nan
    forces[4, 2] = nan
    stresses[1, 0, 1] = stresses[1, 1, 0] = nan
    wanted = replace(wanted, energies=energies, forces=forces, stresses=stresses)
    potential, report = fit(structures, wanted, recipe())
    assert report.rows == {"energies": 2, "forces": 20, "stresses": 5}
    assert_equal_predictions(potential, dense_fit(structures, wanted, report))


@pytest.mark.parametrize("kinds", [("forces",), ("energies",), ("energies", "stresses")])
def test_kinds_can_be_left_out(kinds):
    structures = training_set()
    wanted = targets(structures)
    used = {f"use_{kind}": kind in kinds for kind in KINDS}
    potential, report = fit(structures, wanted, recipe(**used))
    assert set(report.rows) == set(kinds)
    absent = {k: torch.full_like(getattr(wanted, k), float("nan")) for k in KINDS if k not in kinds}
    assert_equal_predictions(potential, dense_fit(structures, replace(wanted, **absent), report))


def test_noise_of_single_structures_is_a_weighted_solve():
    structures = training_set()
    wanted = targets(structures)
    energies_noise = torch.tensor([float("nan"), 0.002, float("nan")], dtype=torch.float64)
    forces_noise = torch.full_like(wanted.forces, float("nan"))
    forces_noise[0] = 0.4
    forces_noise[7, 1] = 0.02
    stresses_noise = torch.tensor([float("nan"), 0.05, float("nan")], dtype=torch.float64)
    wanted = replace(wanted, energies_noise=energies_noise, forces_noise=forces_noise, stresses_noise=stresses_noise)
    potential, report = fit(structures, wanted, recipe())
    flat = forces_noise.flatten()
    noise = {
        "energies": torch.tensor([0.01, 0.002, 0.01], dtype=torch.float64),
        "forces": torch.where(flat.isnan(), torch.tensor(0.05, dtype=torch.float64), flat),
        "stresses": torch.full((18,), 0.05, dtype=torch.float64),
    }
    assert_equal_predictions(potential, dense_fit(structures, wanted, report, noise))


def test_noise_of_a_config_type_yields_to_that_of_a_structure():
    structures = training_set()
    wanted = replace(targets(structures), config_types=("molecule", "bulk", "molecule"))
    wanted = replace(wanted, energies_noise=torch.tensor([float("nan"), float("nan"), 0.03], dtype=torch.float64))
    given = recipe().noise.model_dump() | {"config_types": {"molecule": {"energy_per_atom": 0.1, "force": 0.2}}}
    potential, report = fit(structures, wanted, recipe(noise=given))
    per_atom = torch.tensor([0.2, 0.2, 0.2, 0.05, 0.05, 0.2, 0.2, 0.2], dtype=torch.float64)
    noise = {
        "energies": torch.tensor([0.1, 0.01, 0.03], dtype=torch.float64),
        "forces": per_atom.repeat_interleave(3),
    }
    assert_equal_predictions(potential, dense_fit(structures, wanted, report, noise))


def test_more_noise_on_a_structure_means_less_trust_in_it():
    structures = training_set()
    wanted = targets(structures)
    residuals = []
    for sigma in (1e-3, 1.0):
        noisy = replace(wanted, energies_noise=torch.tensor([sigma, float("nan"), float("nan")], dtype=torch.float64))
        potential, _ = fit(structures, noisy, recipe(use_forces=False, use_stresses=False))
        residuals.append(abs(float(potential(structures).energies[0] - wanted.energies[0])))
    assert residuals[0] < 0.1 * residuals[1]


def test_two_descriptors_add_up_to_a_sum_of_processes():
    """Two equal descriptors with the signal variance split between them are the one process with their sum."""
    structures = training_set()
    wanted = targets(structures)
    double, report = fit(structures, wanted, recipe(descriptor=[SOAP, SOAP], kernel=[{"zeta": 3}, {"zeta": 3}]))
    assert len(double.terms) == 2
    total = {z: (report.signal[f"0:{s}"] ** 2 + report.signal[f"1:{s}"] ** 2) ** 0.5 for z, s in ((6, "C"), (8, "O"))}
    joined = replace(report, signal={"0:C": total[6], "0:O": total[8]})
    assert_equal_predictions(double, dense_fit(structures, wanted, joined))
