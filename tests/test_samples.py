"""Posterior samples: consistent energy surfaces whose scatter is the posterior covariance."""

from __future__ import annotations

import pytest
import torch

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core import errors
from gpmlp.fitting.fit import fit
from gpmlp.potential.samples import PosteriorSamples, draw_samples
from gpmlp.recipe import Recipe


@pytest.fixture(scope="module")
def silicon():
    structures, known = gpmlp.read("data/silicon/train.xyz", "::4")
    return fit(structures, known, Recipe(inducing={"n": 30, "gradients": 3}))[0], structures


def moved(structures, atom: int, axis: int, by: float):
    from dataclasses import replace

    positions = structures.positions.clone()
    positions[atom, axis] += by
    return replace(structures, positions=positions)


def test_together_as_one_by_one(silicon):
    potential, structures = silicon
    some = structures.select([3, 30])
    samples = potential.sample(3, seed=1)
    together = samples(some)
    assert len(samples) == 3 and together.forces.shape == (3, some.n_atoms, 3)
    for k, one in enumerate(samples):
        alone = one(some)
        for name in ("energies", "atom_energies", "forces", "stresses"):
            torch.testing.assert_close(getattr(together, name)[k], getattr(alone, name), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(samples[-1](some).forces, together.forces[2], rtol=1e-10, atol=1e-10)


def test_forces_are_slopes_of_the_energy(silicon):
    potential, structures = silicon
    one = structures.select([25])
    samples = potential.sample(4, seed=2)
    h = 1e-4  # third derivatives of some 1e3 eV/A^3: error 1e-8 x 1e3 / 6
    sides = [samples(moved(one, 2, 1, s * h)).energies[:, 0] for s in (-1, 1)]
    slopes = (sides[0] - sides[1]) / (2 * h)
    torch.testing.assert_close(samples(one).forces[:, 2, 1], slopes, atol=1e-5, rtol=0)
    assert slopes.std() > 1e-3  # they do differ


def test_scatter_is_the_posterior_covariance(silicon):
    """All columns are kept here, so that the data part is all that samples can show; 3000 draws give variances to 2.6 %.

    Calibrated ones: tests/test_joint_covariance.py.
    """
    potential, structures = silicon
    assert potential.variances.n_columns == potential.variances.of_fit
    one = structures.select([40])
    found = potential.sample(3000, seed=3, calibrated=False)(one)
    expected = potential(one, variance="all", calibrated=False)
    centred = found.forces - found.forces.mean(0)
    covariance = torch.einsum("kna,knb->nab", centred, centred) / 2999
    reference = expected.forces_covariance.data
    scale = reference.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert ((covariance - reference) / scale).abs().max() < 0.15  # six standard deviations of one entry
    assert (found.forces.mean(0) - expected.forces).abs().max() < 0.1 * reference.max().sqrt()
    torch.testing.assert_close(found.atom_energies.var(0), expected.atom_energies_variance.data, rtol=0.15, atol=0)


def test_what_a_subset_misses_is_drawn_too():
    """With values of a third of the centres for variances, paths at the other centres have the full prior residual."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::4")
    choices = Recipe(inducing={"n": 60, "gradients": 0}, variance={"columns": 20}, calibration=False)
    potential, _ = fit(structures, known, choices)
    samples = potential.sample(2000, seed=4, calibrated=False)
    assert potential.variances.n_columns == 20
    block, prior = potential.variances.blocks[0][0], potential.variances.priors[0]
    centres = potential.terms[0].blocks[14].features[20:24]
    alpha = samples.terms[0].blocks[14].weights - potential.terms[0].blocks[14].weights
    values = prior.kernel.profile(potential.terms[0].blocks[14].features @ centres.T)[0]
    drawn = (alpha @ values).var(0)
    rows = prior.kernel.profile(block.features @ centres.T)[0].T
    a, left = potential.variances.whiten(rows)
    missed = prior.signal[14] ** 2 - a.square().sum(1)
    expected = potential.variances.amplitude * missed + left.square().sum(1)
    torch.testing.assert_close(drawn, expected, rtol=0.2, atol=0)  # 3.2 % each, six standard deviations


def test_calibrated_scatter_is_as_large_as_the_errors(silicon):
    """On structures never seen, of which the model makes errors of all causes; not so without calibration."""
    potential, _ = silicon
    structures, known = gpmlp.read("data/silicon/test.xyz")
    error = (potential(structures).forces - known.forces).square().mean().sqrt()
    ratios = {}
    for calibrated in (True, False):
        samples = potential.sample(32, seed=11, calibrated=calibrated)(structures)
        ratios[calibrated] = float((samples.forces - potential(structures).forces).square().mean().sqrt() / error)
    assert 0.6 < ratios[True] < 1.6 and ratios[False] < 0.5
    again = type(potential.calibration).from_dict(potential.calibration.as_dict())
    assert again == potential.calibration and again.posterior_scale > 0


def test_label_noise_committee_is_narrower(silicon):
    potential, structures = silicon
    one = structures.select([40])
    committee, samples = (draw_samples(potential, 2000, 5, how)(one) for how in ("label_noise", "posterior"))
    assert committee.forces.var(0).sum() < samples.forces.var(0).sum()
    assert committee.forces.std() > 0


def test_a_sample_is_a_potential(silicon, tmp_path, capsys):
    potential, structures = silicon
    one = potential.sample(2, seed=6)[1]
    gpmlp.save(one, tmp_path / "sample")
    again = gpmlp.load(tmp_path / "sample")
    some = structures.select([10])
    torch.testing.assert_close(again(some).forces, one(some).forces)
    assert (one(some).forces - potential(some).forces).abs().max() > 1e-4
    origin = {"how": "posterior", "seed": 6, "of": 2, "calibrated": True, "index": 1}
    assert again.provenance == potential.provenance | {"sample": origin}
    assert main(["info", str(tmp_path / "sample")]) == 0
    assert "index 1 of 2 drawn from the posterior, seed 6, calibrated; not the mean" in " ".join(
        capsys.readouterr().out.split()
    )


def test_slices_are_samples(silicon):
    potential, structures = silicon
    some, samples = structures.select([10]), potential.sample(4, seed=9)
    part = samples[1::2]
    assert isinstance(part, PosteriorSamples) and len(part) == 2
    torch.testing.assert_close(part(some).forces, samples(some).forces[[1, 3]])
    assert part[-1].provenance["sample"]["index"] == 3
    with pytest.raises(errors.UserError, match="one or more of the 4"):
        samples[4:]
    with pytest.raises(IndexError):
        part[2]


def test_seed_decides(silicon):
    potential, structures = silicon
    some = structures.select([10])
    a, b, c = (potential.sample(2, seed=s)(some).energies for s in (7, 7, 8))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_mistakes(silicon):
    potential, _ = silicon
    with pytest.raises(errors.UserError, match="1 or more"):
        potential.sample(0, seed=0)
    with pytest.raises(errors.UserError, match=r"whole number, as 2; got 2\.5"):
        potential.sample(2.5, 0)
    with pytest.raises(errors.UserError, match=r"`seed` must be a whole number"):
        potential.sample(2, 0.5)
    with pytest.raises(errors.UserError, match=r"got PosteriorSamples.*save each for itself"):
        gpmlp.save(potential.sample(2, 0), "samples")
    with pytest.raises(errors.UserError, match="way of sampling"):
        draw_samples(potential, 2, 0, "bootstrap")
    with pytest.raises(errors.UserError, match="no posterior factor"):
        potential.sample(1, 0)[0].sample(1, 0)


def test_single_precision_and_lone_atoms():
    """Samples follow the type of the model; an atom without neighbours has no pairs to pull back to."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::6")
    choices = {"inducing": {"n": 30, "gradients": 1}, "dtype": "float32", "variance": {"columns": 20}}
    potential, _ = fit(structures, known, Recipe.model_validate(choices))
    some = structures.select([0, 4])
    samples = potential.sample(2, seed=0)
    together, alone = samples(some), samples[1](some)
    torch.testing.assert_close(together.forces[1], alone.forces, atol=1e-3, rtol=1e-3)
    assert samples(structures.select([0])).forces.shape == (2, 1, 3)
    assert (samples(structures.select([0])).forces == 0).all()
