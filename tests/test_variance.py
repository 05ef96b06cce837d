"""Posterior variances: equality with the dense process, invariances, parts, subsets, calibration.

Tolerance of the equality: as in test_dense_gp.py, where the sparse process is the dense one; variances are differences of prior
covariances of the order of 10, so 1e-8 leaves six digits for rounding.
"""

from __future__ import annotations

from dataclasses import replace

import ase.build
import numpy as np
import oracles
import pytest
import scipy.stats
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from systems import cluster, crystal, replicate, rotation, structure
from test_dense_gp import TIGHT, dense_fit, other_structures, recipe, targets, training_set

import gpmlp
from gpmlp.core import errors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.fitting import variance_checks
from gpmlp.fitting.fit import fit
from gpmlp.gp import stored_factors
from gpmlp.io import archive, ase_atoms
from gpmlp.potential import baselines
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe, VarianceRecipe
from gpmlp.uncertainty.calibration import invariants, widen_by_novelty

PARTS = ("inducing", "data", "misspecification", "noise")
FIELDS = ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance")


@pytest.fixture(scope="module")
def exact():
    """A potential whose inducing variables span everything that was observed, and the dense process on the same labels."""
    structures = training_set()
    wanted = targets(structures)
    potential, report = fit(structures, wanted, recipe())
    return potential, dense_fit(structures, wanted, report)


@pytest.fixture(scope="module")
def silicon():
    """A small model of real data, with a calibration."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::3")
    return fit(structures, known, Recipe(inducing={"n": 40, "gradients": 3}))[0], structures, known


def every_functional(dense, structures: Structures):
    """Energies in total, forces, stresses, as the joint covariance orders them."""
    groups, x, z = dense.functionals(structures)
    scale = torch.cat([structures.counts.double(), torch.ones(3 * structures.n_atoms + 6 * len(structures))])
    return [f for kind in ("energies", "forces", "stresses") for f in groups[kind]], x, z, scale.double()


def test_joint_covariance_is_that_of_the_dense_process(exact):
    """Energies, forces and stresses of several structures, and all cross-covariances between them."""
    potential, dense = exact
    others = other_structures()
    functionals, x, z, scale = every_functional(dense, others)
    expected = dense.posterior_covariance(functionals, x, z) * scale[:, None] * scale
    torch.testing.assert_close(potential.covariance(others, calibrated=False), expected, atol=TIGHT, rtol=0)
    n = len(others)
    assert expected[:n, :n].fill_diagonal_(0).abs().max() > 1e-3  # different structures do have something in common


def test_variances_are_those_of_the_dense_process(exact):
    potential, dense = exact
    others = other_structures()
    found = potential(others, variance="all", calibrated=False)
    functionals, x, z, scale = every_functional(dense, others)
    expected = dense.posterior_covariance(functionals, x, z) * scale[:, None] * scale
    n, m = len(others), 3 * others.n_atoms
    torch.testing.assert_close(found.energies_variance.epistemic, expected.diagonal()[:n], atol=TIGHT, rtol=0)
    blocks = expected[n : n + m, n : n + m].reshape(others.n_atoms, 3, others.n_atoms, 3)
    atoms = torch.arange(others.n_atoms)
    torch.testing.assert_close(found.forces_covariance.epistemic, blocks[atoms, :, atoms], atol=TIGHT, rtol=0)
    stresses = expected[n + m :, n + m :].reshape(n, 6, n, 6)[torch.arange(n), :, torch.arange(n)]
    known = ~others.volumes.isnan()
    torch.testing.assert_close(found.stresses_covariance.epistemic[known], stresses[known], atol=TIGHT, rtol=0)
    assert found.stresses_covariance.total[~known].isnan().all()
    local = []
    for i in range(others.n_atoms):
        one = oracles.Functional()
        one.add(i, 1.0, torch.zeros_like(x[0]))
        local.append(one)
    expected = dense.posterior_covariance(local, x, z).diagonal()
    torch.testing.assert_close(found.atom_energies_variance.total, expected, atol=TIGHT, rtol=0)


def test_noise_is_that_of_the_likelihood(exact):
    potential, _ = exact
    others = other_structures()
    found = potential(others, variance="all", calibrated=False)
    constant = found.energies_variance.misspecification + found.energies_variance.noise
    torch.testing.assert_close(constant.sqrt(), 0.01 * others.counts.double())
    constant = found.forces_variance.misspecification + found.forces_variance.noise
    torch.testing.assert_close(constant, torch.full_like(constant, 0.05**2))


def test_nothing_is_computed_that_was_not_asked_for(exact):
    potential, _ = exact
    assert all(getattr(potential(cluster((6, 8))), name) is None for name in FIELDS)
    found = potential(cluster((6, 8)), variance="energies")
    assert [name for name in FIELDS if getattr(found, name) is not None] == ["energies_variance"]


def test_forces_of_some_atoms(silicon):
    potential, structures, _ = silicon
    some = structures.select(range(0, 60, 20))
    everything = potential(some, variance="forces").forces_variance.total
    picked = potential(some, variance="forces", atoms=[1, some.n_atoms - 1]).forces_variance.total
    torch.testing.assert_close(picked[[1, -1]], everything[[1, -1]], rtol=1e-9, atol=1e-14)
    assert picked[[0, 2]].isnan().all()


@pytest.mark.parametrize("form", ["scaled", "dtc"])
def test_parts_are_never_negative(silicon, form):
    """On the training structures, where the first part is a difference of equal numbers."""
    potential, structures, _ = silicon
    found = potential(structures.select(range(0, len(structures), 9)), variance="all", form=form)
    for name in FIELDS:
        whole = getattr(found, name)
        whole = whole.diagonal() if name.endswith("covariance") else whole
        for part in PARTS:
            values = getattr(whole, part)
            assert (values[~values.isnan()] >= 0).all(), (name, part)
        assert (whole.inducing.nan_to_num() > 0).any()


def test_rotation_turns_the_covariance(silicon):
    potential, structures, _ = silicon
    one = structures.select([20])
    turn = rotation()
    turned = replace(one, positions=one.positions @ turn.T, cells=one.cells @ turn.T)
    before, after = (potential(s, variance="all") for s in (one, turned))
    for part in PARTS:
        a, b = (getattr(p.forces_covariance, part) for p in (before, after))
        torch.testing.assert_close(
            turn @ a @ turn.T, b, rtol=0, atol=1e-10 * float(before.forces_covariance.total.max())
        )
    torch.testing.assert_close(before.energies_variance.total, after.energies_variance.total, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("moved", [0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, "one atom", "strain"])
def test_rotation_turns_the_covariance_where_symmetry_forbids_forces(silicon, moved):
    """Nothing is divided by rounding noise: every part turns to 1e-10 of the covariances that atoms which move have, or of its own."""
    potential, structures, _ = silicon
    frame = ase.build.bulk("Si", "diamond", a=5.43, cubic=True)
    if moved == "one atom":
        frame.positions[0, 2] += 0.01
    elif moved == "strain":
        frame.set_cell(frame.cell.array @ (np.eye(3) + 0.02 * np.eye(3)[[1, 0, 2]]), scale_atoms=True)
    else:
        frame.positions += moved * np.random.default_rng(1).normal(size=(8, 3))
    one, turn = ase_atoms.structures_from_ase([frame]), rotation()
    turned = replace(one, positions=one.positions @ turn.T, cells=one.cells @ turn.T)
    usual = float(potential(structures.select([20]), variance="forces").forces_covariance.total.max())
    for calibrated in (True, False):
        before, after = (potential(s, variance="forces", calibrated=calibrated) for s in (one, turned))
        for part in (*PARTS, "total"):
            a, b = (getattr(p.forces_covariance, part) for p in (before, after))
            torch.testing.assert_close(turn @ a @ turn.T, b, rtol=0, atol=1e-10 * max(usual, float(a.max())))


def test_replicated_cell(silicon):
    """Per-atom variances do not see the size of the cell; the force on an atom moves with all its images, so the cells are wide."""
    potential, *_ = silicon
    cell = 10.9 * torch.eye(3, dtype=torch.float64)
    grid = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3) * 2.725
    noise = 0.1 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = structure(grid + noise, [14] * 64, cell, (True, True, True))
    two = replicate(one, (2, 1, 1))
    a, b = (potential(s, variance=("forces", "atom_energies")) for s in (one, two))
    torch.testing.assert_close(a.forces_covariance.total, b.forces_covariance.total[:64], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(
        a.atom_energies_variance.total, b.atom_energies_variance.total[:64], rtol=1e-7, atol=1e-12
    )


def test_a_subset_of_columns_sees_less():
    """Fewer inducing variables represent less; what is kept of them is a process of its own."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::6")
    choices = {"inducing": {"n": 30, "gradients": 3}, "calibration": False}
    every = fit(structures, known, Recipe.model_validate(choices))[0]
    some, report = fit(structures, known, Recipe.model_validate(choices | {"variance": {"columns": 40}}))
    told = report.variance_subset
    assert (told["columns"], told["columns_of_fit"]) == (some.variances.n_columns, every.variances.of_fit)
    assert told["atoms"] <= variance_checks.SUBSET_ATOMS and told["std_spearman"] > 0.5
    assert (
        0.9 < told["std_ratio_low"] <= told["std_ratio_median"] <= told["std_ratio_high"]
        and told["std_ratio_median"] > 1
    )
    assert every.variances.n_columns == every.variances.of_fit > 100
    whole, report = fit(structures, known, Recipe.model_validate(choices | {"variance": {"columns": "all"}}))
    torch.testing.assert_close(
        whole(structures.select([3]), variance="all").energies_variance.total,
        every(structures.select([3]), variance="all").energies_variance.total,
    )
    assert report.variance_subset == {"columns": len(whole.variances.signal), "columns_of_fit": every.variances.of_fit}
    assert VarianceRecipe(columns="all").at_most(10**6) == 10**6 == VarianceRecipe().at_most(10**6)
    assert VarianceRecipe(columns=40).at_most(10**6) == 40 and VarianceRecipe(columns=40).at_most(30) == 30
    assert 30 <= some.variances.n_columns <= 40
    test = structures.select([3, 17])
    a, b = (p(test, variance="all") for p in (every, some))
    torch.testing.assert_close(a.forces, b.forces)  # the mean is not touched
    assert (b.atom_energies_variance.inducing >= a.atom_energies_variance.inducing - 1e-12).all()
    assert (b.energies_variance.inducing > a.energies_variance.inducing).all()


def test_the_error_of_a_subset_is_that_against_all_columns():
    """By hand, from another fit that keeps all columns, on the atoms that were looked at."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::9")
    choices = {"inducing": {"n": 30, "gradients": 3}, "calibration": False, "seed": 4}
    every, whole = fit(structures, known, Recipe.model_validate(choices))
    assert whole.variance_subset == {"columns": every.variances.of_fit, "columns_of_fit": every.variances.of_fit}
    some, report = fit(structures, known, Recipe.model_validate(choices | {"variance": {"columns": 60}}))
    looked, atoms = variance_checks._draw_atoms(structures, 4)
    cheap, exact = (
        replace(p, variances=replace(p.variances, noise={}))(looked, "forces", form="dtc", calibrated=False)
        .forces_covariance.epistemic[atoms]
        .numpy()
        for p in (some, every)
    )
    told = report.variance_subset
    assert told["atoms"] == len(cheap) > 50
    ratio = np.sqrt(np.trace(cheap, axis1=1, axis2=2) / np.trace(exact, axis1=1, axis2=2))
    # two fits: the same evidence and factor to rounding, amplified by the condition of K_uu
    named = [told[key] for key in ("std_ratio_low", "std_ratio_median", "std_ratio_high")]
    np.testing.assert_allclose(named, np.quantile(ratio, (0.05, 0.5, 0.95)), rtol=1e-5)
    off = [np.linalg.norm(c - e) / np.linalg.norm(e) for c, e in zip(cheap, exact, strict=True)]
    assert told["covariance_error"] == pytest.approx(np.median(off), rel=1e-5)
    assert told["std_spearman"] == pytest.approx(
        scipy.stats.spearmanr(np.trace(cheap, axis1=1, axis2=2), np.trace(exact, axis1=1, axis2=2))[0], rel=1e-5
    )
    # one number cannot make it worse than that of least squares over all atoms does: less is left than without
    scales = np.linspace(0.2, 1.2, 101)
    left = [np.square(s * cheap - exact).sum() for s in scales]
    off = [
        np.linalg.norm(scales[np.argmin(left)] * c - e) / np.linalg.norm(e) for c, e in zip(cheap, exact, strict=True)
    ]
    assert told["covariance_error_scaled"] == pytest.approx(np.median(off), rel=0.1)


def test_calibration_scales_and_can_be_left_out(silicon):
    potential, structures, _ = silicon
    some = structures
    raw, ready = (potential(some, variance="all", novelty=True, calibrated=c) for c in (False, True))
    far = (raw.novelty / potential.calibration.typical_novelty).clamp_min(1)
    assert far.max() > 1  # some are more novel than the typical environment
    raw = widen_by_novelty(raw, some, potential.calibration.typical_novelty)
    learned = potential.calibration.kinds["forces"]
    assert learned.n >= 100 and len(learned.weights) == 3
    parts, squared_force = invariants("forces", raw, some)
    local = learned.local.factor(parts * torch.tensor(learned.weights, dtype=torch.float64), squared_force)[:, None]
    assert local.min() < 0.99 < 1.01 < local.max()
    inducing, data, constant = ((learned.scale * local) ** 2 * w for w in learned.weights)
    expected = (
        inducing * raw.forces_variance.inducing
        + data * raw.forces_variance.data
        + constant * (raw.forces_variance.misspecification + raw.forces_variance.noise)
    )
    torch.testing.assert_close(ready.forces_variance.total, expected)
    assert (data > 1).all()  # the data part is left as it is, and what exceeds it is misspecification
    torch.testing.assert_close(ready.forces_variance.data, raw.forces_variance.data)
    assert 0.9 * len(structures) < potential.calibration.source["held_out_structures"] < len(structures)


def test_archive_keeps_variances(silicon, tmp_path):
    potential, structures, _ = silicon
    gpmlp.save(potential, tmp_path / "model")
    again = gpmlp.load(tmp_path / "model")
    some = structures.select([0, 40])
    a, b = (p(some, variance="all", novelty=True) for p in (potential, again))
    for name in FIELDS:
        torch.testing.assert_close(getattr(a, name).total, getattr(b, name).total, rtol=1e-10, atol=0, equal_nan=True)
    torch.testing.assert_close(a.novelty, b.novelty)
    assert again.calibration == potential.calibration


def test_a_large_factor_is_kept_in_single_precision(silicon, tmp_path, monkeypatch):
    """Variances are those of double precision within what is promised, and a file gives the same bits back."""
    potential, structures, _ = silicon
    some = structures.select(range(0, len(structures), 9))
    assert stored_factors.rounded_factor(potential.variances.factor) is potential.variances.factor  # of few columns
    monkeypatch.setattr(stored_factors, "DOUBLE_COLUMNS", 10)
    factor = stored_factors.rounded_factor(potential.variances.factor)
    assert not torch.equal(factor, potential.variances.factor) and torch.equal(factor.float().double(), factor)
    single = replace(potential, variances=replace(potential.variances, factor=factor))
    two, one = (p(some, variance="all", calibrated=False) for p in (potential, single))
    for name in FIELDS:
        a, b = (getattr(p, name).data for p in (one, two))
        a, b = (v.diagonal(dim1=1, dim2=2) if v.dim() > 1 else v for v in (a, b))
        torch.testing.assert_close(a, b, rtol=2 * stored_factors.SINGLE_ERROR, atol=1e-12, equal_nan=True)
        assert not torch.equal(a.nan_to_num(), b.nan_to_num())
    for p, path in ((potential, tmp_path / "double.gpmlp"), (single, tmp_path / "single.gpmlp")):
        archive.save(p, path)
    again = archive.load(tmp_path / "single.gpmlp", Potential.from_state)
    assert torch.equal(again.variances.factor, factor)
    n = len(factor)
    saved = (tmp_path / "double.gpmlp").stat().st_size - (tmp_path / "single.gpmlp").stat().st_size
    assert saved == pytest.approx(4 * n * (n + 1) / 2, rel=0.05)


def test_a_factor_that_single_precision_would_spoil_stays_in_double(monkeypatch):
    """The error promised is the largest singular value of (R' - R) R⁻¹."""
    monkeypatch.setattr(stored_factors, "DOUBLE_COLUMNS", 10)
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(300, 60, generator=generator, dtype=torch.float64)
    for size, kept in ((1e2, False), (1e7, True)):  # of columns that are nearly the same
        near = size * (rows[:, :1] + 1e-8 * rows)
        factor = torch.linalg.qr(torch.cat([near, torch.eye(60, dtype=torch.float64)])).R
        lost = (factor.float().double() - factor) @ torch.linalg.inv(factor)
        error = float(torch.linalg.matrix_norm(lost, 2))
        assert (stored_factors.rounded_factor(factor) is factor) == kept == (error > stored_factors.SINGLE_ERROR), error
        monkeypatch.setattr(stored_factors, "SINGLE_ERROR", 1.01 * error)
        assert stored_factors.rounded_factor(factor) is not factor
        monkeypatch.setattr(stored_factors, "SINGLE_ERROR", 0.9 * error)
        assert stored_factors.rounded_factor(factor) is factor
        monkeypatch.setattr(stored_factors, "SINGLE_ERROR", 0.01)


def test_uncertainty_grows_away_from_the_data(silicon):
    potential, structures, _ = silicon
    known = potential(structures.select([12]), variance="atom_energies", novelty=True)
    odd = structure([[0, 0, 0], [1.7, 0, 0], [0, 1.9, 0], [1.2, 1.2, 1.2]], [14] * 4)
    strange = potential(odd, variance="atom_energies", novelty=True)
    assert strange.atom_energies_variance.total.min() > known.atom_energies_variance.total.max()
    assert strange.novelty.min() > 1 > known.novelty.max()


def test_mistakes(exact):
    potential, _ = exact
    with pytest.raises(errors.UserError, match="variance"):
        potential(cluster((6, 8)), variance="force")
    with pytest.raises(errors.UserError, match="form"):
        potential(cluster((6, 8)), variance="forces", form="fitc")
    bare = replace(potential, variances=None)
    with pytest.raises(errors.UserError, match="no posterior factor"):
        bare(cluster((6, 8)), variance="forces")
    with pytest.raises(errors.UserError, match="novelty"):
        replace(potential, novelty=None)(cluster((6, 8)), novelty=True)


def test_unknown_labels_are_no_obstacle():
    """Energies alone: calibration and variances of everything are there, from energies."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::4")
    blank = Targets.unlabelled(structures)
    energies = replace(blank, energies=known.energies, config_types=known.config_types)
    potential, _ = fit(structures, energies, Recipe(inducing={"n": 30, "gradients": 0}))
    found = potential(structures.select([1]), variance="all")
    assert (found.forces_variance.total > 0).all()
    n = potential.calibration.kinds["energies"].n  # all but the isolated atom and near-duplicates
    assert n == potential.report["held_out"] > 0.9 * len(structures)
    assert potential.calibration.kinds["forces"].n == 0


def test_the_force_on_a_lone_atom_is_known(silicon):
    """Nothing sees it, and it sees nothing: the model is sure of it, by itself and beside others."""
    potential, structures, _ = silicon
    lone = structure([[0.0, 0.0, 0.0]], [14])
    for some in (lone, Structures.concatenate([lone, lone]), Structures.concatenate([lone, structures.select([1])])):
        found = potential(some, variance="forces", form="dtc", calibrated=False).forces_variance
        assert (found.inducing[0] == 0).all() and (found.data[0] == 0).all()


def test_triclinic_and_slab_have_variances(exact):
    potential, _ = exact
    found = potential(Structures.concatenate([crystal("triclinic"), crystal("slab")]), variance="all")
    assert (found.stresses_variance.total > 0).all()


def test_atoms_in_one_chunk_of_several(silicon):
    """Structures of more atoms than a chunk holds; indices, a mask, nobody; and what is refused."""
    potential, structures, _ = silicon
    several = structures.select([1 + i % 60 for i in range(45)])
    assert several.n_atoms > 300
    everything = potential(several.select([0, 44]), variance="forces").forces_variance.total
    ends = [0, several.n_atoms - 1]
    picked = potential(several, variance="forces", atoms=ends).forces_variance.total
    torch.testing.assert_close(picked[ends], everything[[0, -1]], rtol=1e-8, atol=1e-14)
    assert int((~picked.isnan()).all(1).sum()) == 2
    mask = torch.zeros(several.n_atoms, dtype=torch.bool)
    mask[ends] = True
    torch.testing.assert_close(
        potential(several, variance="forces", atoms=mask).forces_variance.total[ends], picked[ends]
    )
    assert potential(several, variance="forces", atoms=[]).forces_variance.total.isnan().all()
    for wrong in ([-1], [several.n_atoms]):
        with pytest.raises(errors.UserError, match="indices of atoms"):
            potential(several, variance="forces", atoms=wrong)


def test_noise_of_the_labels_themselves():
    """Labels that bring their own noise: what a new one scatters by is known from them."""
    structures, known = gpmlp.read("data/silicon/train.xyz", "::8")
    own = replace(
        known, forces_noise=torch.full_like(known.forces, 0.2), energies_noise=torch.full_like(known.energies, 0.01)
    )
    potential, _ = fit(structures, own, Recipe(inducing={"n": 20, "gradients": 0}, calibration=False))
    found = potential(structures.select([1]), variance=("energies", "forces"))
    constant = found.forces_variance.misspecification + found.forces_variance.noise
    torch.testing.assert_close(constant, torch.full_like(constant, 0.04))


def test_where_symmetry_forbids_a_force_nothing_is_missed(silicon):
    """In a perfect crystal, and across the plane of a strained one; as soon as an atom is moved, what the class misses is there."""
    potential, structures, _ = silicon
    a = 5.43
    basis = torch.tensor([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0], [1, 1, 1], [1, 3, 3], [3, 1, 3], [3, 3, 1]]) / 4
    perfect = structure((a * basis.double()).tolist(), [14] * 8, a * torch.eye(3).double(), (True, True, True))
    constant = potential.variances.noise_parts("forces")[0]
    found = potential(perfect, "forces", calibrated=False).forces_covariance
    size = torch.linalg.matrix_norm(found.misspecification).max()
    assert 0 < size < 1e-5 * constant
    assert potential(perfect, "forces").forces_variance.total.max() > 0
    moved = perfect.positions.clone()
    moved[0, 2] += 0.03  # along z: x and y of that atom stay forbidden by the two mirror planes that hold z
    axis = potential(perfect.with_positions(moved), "forces", calibrated=False).forces_covariance.misspecification[0]
    values, vectors = torch.linalg.eigh(axis)
    assert values[-1] > 0.99 * constant and vectors[2, -1].abs() > 0.999
    rattled = structures.select([3])
    usual = potential(rattled, "forces", calibrated=False).forces_covariance.misspecification
    torch.testing.assert_close(
        usual, (constant * torch.eye(3).double()).expand_as(usual), rtol=1e-3, atol=1e-3 * constant
    )


TOTAL = {1: -13.6, 6: -1028.0, 8: -2041.0, 14: -7870.0}  # eV, of all electrons


def springs(symbols: list[str], n: int, seed: int = 0):
    """Molecules whose atoms hang on springs at fixed places, with total energies of all electrons."""
    rng, frames = np.random.default_rng(seed), []
    places = {name: ase.build.molecule(name).positions for name in symbols}
    for k in range(n):
        frame = ase.build.molecule(symbols[k % len(symbols)])
        moved = 0.05 * rng.normal(size=frame.positions.shape)
        frame.positions = places[symbols[k % len(symbols)]] + moved
        energy = sum(TOTAL[z] for z in frame.numbers) + 5 * (moved**2).sum()
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=-10 * moved)
        frames.append(frame)
    return ase_atoms.from_ase(frames)


@pytest.mark.parametrize(
    "learned, others",
    [(["CH3CH2OH"], ["H2O", "CH4", "CO"]), (["H2O"], ["H2", "O2"]), (["CH4", "H2O"], ["H2", "CO2", "CH3OH"])],
)
def test_compositions_that_the_data_do_not_tell_apart(learned, others, tmp_path):
    """Another composition has an error bar as wide as its error, one in the span of the data that of the process alone."""
    recipe = Recipe.model_validate({"descriptor": {"n_max": 4, "l_max": 2}, "inducing": {"n": 12}})
    potential, _ = fit(*springs(learned, 40), recipe)
    *others_, isolated = potential.baselines
    settled = replace(potential, baselines=(*others_, replace(isolated, open_directions=())))
    far, labels = springs(others, len(others))
    found, narrow = (p(far, variance="energies") for p in (potential, settled))
    z = (found.energies - labels.energies) / found.energies_variance.epistemic.sqrt()
    assert z.abs().max() < 3
    opened = found.energies_variance.data - narrow.energies_variance.data
    expected = isolated.energy_deviations(far).square().sum(1)
    assert opened.min() > 1e5 and (opened > 0.05 * (found.energies - labels.energies).square()).all()
    torch.testing.assert_close(opened, expected, rtol=1e-9, atol=0)
    near, _ = springs(learned, 2, seed=5)
    places = near.positions + 20.0 * near.structure_of_atom[:, None]
    within = structure(places.tolist(), near.species.tolist())  # both together
    for some in (near, within):
        a, b = (p(some, variance="energies").energies_variance.total for p in (potential, settled))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    joint = potential.covariance(far, calibrated=False)[: len(far), : len(far)]
    raw = potential(far, variance="energies", calibrated=False, form="scaled").energies_variance
    torch.testing.assert_close(joint.diagonal(), raw.inducing + raw.data, rtol=1e-9, atol=1e-9)
    archive.save(potential, tmp_path / "m.gpmlp")
    again = archive.load(tmp_path / "m.gpmlp")(far, variance="energies").energies_variance.total
    torch.testing.assert_close(again, found.energies_variance.total, rtol=1e-12, atol=0)


def test_isolated_atoms_leave_nothing_open():
    """Each element by itself, or as many compositions as elements."""
    structures, targets = springs(["H2O", "CH4", "CO"], 9)
    assert baselines.open_directions(structures, targets) == ()
    only, known = springs(["H2O"], 9)
    (direction,) = baselines.open_directions(only, known)
    assert 2 * direction[1] + direction[8] == pytest.approx(0, abs=1e-9) and abs(direction[8]) > 500
    assert baselines.open_directions(only, replace(known, energies=torch.full_like(known.energies, torch.nan))) == ()
