"""Force covariances estimated from posterior samples, against samples as whole potentials and the exact covariance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gpmlp
from gpmlp.core.quantities import Variance
from gpmlp.fitting.calibrate import unsampled_factor
from gpmlp.fitting.fit import fit
from gpmlp.potential import force_samples
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.scores import spearman_correlation

KERNELS = {"zeta 2": {"zeta": 2}, "zeta 4": {"zeta": 4}, "exponential": {"name": "exponential", "length": 0.5}}


@pytest.fixture(scope="module", params=KERNELS)
def silicon(request):
    structures, known = gpmlp.read("data/silicon/train.xyz", "::4")
    recipe = Recipe(inducing={"n": 30, "gradients": 3}, kernel=KERNELS[request.param])
    return fit(structures, known, recipe)[0], structures


def traces(variance: Variance, part: str = "total") -> torch.Tensor:
    return getattr(variance, part).diagonal(dim1=1, dim2=2).sum(1)


def test_the_scatter_of_samples_as_potentials(silicon):
    """The same as forces of whole sampled potentials less those of the mean."""
    potential, structures = silicon
    some = structures.select([3, 30, 60])
    found = potential(some, "sampled_forces", calibrated=False).sampled_forces_covariance
    samples = potential.sample(force_samples.MEMBERS, force_samples.SEED, calibrated=False)
    apart = samples(some).forces - potential.to(mean="exact")(some).forces
    expected = torch.einsum("kna,knb->nab", apart, apart) / force_samples.MEMBERS
    torch.testing.assert_close(found.data, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def test_no_bias(silicon, monkeypatch):
    """2000 members give each variance to 2.6 % and less (they have one to three independent components)."""
    potential, structures = silicon
    one = structures.select([40])
    monkeypatch.setattr(force_samples, "MEMBERS", 2000)
    found = replace(potential)(one, "sampled_forces", calibrated=False).sampled_forces_covariance
    exact = potential(one, "forces", calibrated=False).forces_covariance
    torch.testing.assert_close(traces(found, "data"), traces(exact, "data"), rtol=0.15, atol=0)
    # in directions that are nearly forbidden it follows the part due to the data, which scatters
    close = 0.01 * float(exact.misspecification.abs().max())
    torch.testing.assert_close(found.misspecification, exact.misspecification, rtol=0.01, atol=close)
    torch.testing.assert_close(found.noise, exact.noise)


def test_ranks_as_the_exact_variance(silicon):
    potential, structures = silicon
    some = structures.select(list(range(0, len(structures), 3)))
    both = potential(some, ("forces", "sampled_forces"))
    exact, found = traces(both.forces_covariance), traces(both.sampled_forces_covariance)
    assert spearman_correlation(found, exact) > 0.85
    assert 0.7 < float((found / exact).sqrt().median()) < 1.4  # calibrated likewise


def test_forces_that_symmetry_forbids(silicon):
    """In a perfect crystal nothing is left but what labels scatter; its local energies are as uncertain as any."""
    from ase.build import bulk

    from gpmlp.io.ase_atoms import structures_from_ase

    potential, structures = silicon
    crystal = structures_from_ase([bulk("Si", a=5.2, cubic=True)])
    typical = traces(potential(structures, "sampled_forces").sampled_forces_covariance).median()
    assert traces(potential(crystal, "sampled_forces").sampled_forces_covariance).max() < 1e-4 * typical


def test_invariance(silicon):
    """Variances are those of the structure, however it is turned, and of any chunk it is predicted in."""
    potential, structures = silicon
    one = structures.select([60])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turned = replace(one, positions=one.positions @ turn.T, cells=one.cells @ turn.T)
    here, there = (potential(s, "sampled_forces").sampled_forces_covariance.total for s in (one, turned))
    torch.testing.assert_close(turn @ here @ turn.T, there, rtol=1e-7, atol=1e-9 * float(here.abs().max()))
    beside = potential(structures.select([3, 60]), "sampled_forces").sampled_forces_covariance.total
    torch.testing.assert_close(beside[-one.n_atoms :], here, rtol=1e-9, atol=1e-12)


def test_what_samples_do_not_show_is_made_up_for():
    parts = torch.tensor([[2.0, 1.0, 9.0], [6.0, 1.0, 9.0], [4.0, 0.0, 9.0], [0.5, 1.0, 9.0]], dtype=torch.float64)
    assert unsampled_factor(parts, torch.tensor([0.5, 2.0, 1.0])) == pytest.approx(
        1.125
    )  # the lower middle of 0.5, 1.5, 0, 0.125


def test_a_model_file_keeps_the_factor(silicon, tmp_path):
    potential, structures = silicon
    gpmlp.save(potential, tmp_path / "model.gpmlp")
    again = gpmlp.load(tmp_path / "model.gpmlp")
    assert again.calibration.unsampled == potential.calibration.unsampled > 1
    one = structures.select([10])
    here, there = (p(one, "sampled_forces").sampled_forces_covariance.total for p in (potential, again))
    assert torch.equal(here, there)
