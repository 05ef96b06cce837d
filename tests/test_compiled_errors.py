"""Variances of local energies, novelties and calibrated standard deviations in the compiled core, against PyTorch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from systems import BASELINES, SPECIES, cluster, descriptor, evaluate_by_core, everything, force_sigma_by_core
from test_local_variance import CASES, looks, model_of, shaken

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.structures import Structures
from gpmlp.gp import local_variance
from gpmlp.gp.variance import VarianceModel
from gpmlp.native import library
from gpmlp.potential import chunked
from gpmlp.potential.compiled import CompiledMean, build_calibration, build_novelty, build_variances, compile_mean
from gpmlp.potential.local_errors import LocalErrors
from gpmlp.potential.mean import EnergyTerm, MeanBlock
from gpmlp.uncertainty.calibration import Calibration, KindCalibration, calibrate_prediction
from gpmlp.uncertainty.local_scale import LocalScale
from gpmlp.uncertainty.mahalanobis import Mahalanobis, fit_mahalanobis

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")


def terms_of(model: VarianceModel) -> list[EnergyTerm]:
    """Means at random, of which the first centres are those of the variances."""
    generator, made = torch.Generator().manual_seed(5), []
    for prior, blocks in zip(model.priors, model.blocks, strict=True):
        means = {}
        for block in blocks:
            more = torch.randn(3, block.features.shape[1], generator=generator, dtype=torch.float64)
            features = torch.cat([block.features, torch.nn.functional.normalize(more)])
            weights = torch.randn(len(features), generator=generator, dtype=torch.float64)
            means[block.species] = MeanBlock(features, weights, features[:0])
        made.append(EnergyTerm(descriptor("soap gto"), prior.kernel, means))
    return made


def core_baselines() -> list:
    return [made() for made in BASELINES.values()]


def distances_of(model: VarianceModel) -> Mahalanobis:
    """Of all species but one; some with several clusters."""
    seen = Structures.concatenate([shaken(everything(), 0.05 + 0.2 * (k % 2), k) for k in range(30)])
    x = looks(model, seen)[0].features
    return fit_mahalanobis({z: x[seen.species == z] for z in SPECIES[1:]})


@pytest.fixture(scope="module", params=CASES)
def errors(request) -> LocalErrors:
    model = model_of(request.param)
    return LocalErrors(model, distances_of(model), "scaled")


def both(terms, structures: Structures, errors: LocalErrors, compiled: CompiledMean | None = None):
    """Predictions by the core and by PyTorch."""
    near = neighbors.find_neighbors(structures, max(t.descriptor.cutoff for t in terms) + 0.4).of_centers
    core = compiled or compile_mean(terms, [], sorted(SPECIES))
    assert core is not None
    return (chunked.predict_mean(terms, structures, near, errors, compiled=c) for c in (core, None))


def compare(ours, reference, rtol: float = 1e-8) -> None:
    """Standard deviations and novelties; rounding of prior variances is 1e-13 eV²."""
    for part in ("inducing", "data"):
        mine, theirs = (getattr(p.atom_energies_variance, part) for p in (ours, reference))
        torch.testing.assert_close(mine, theirs, rtol=2 * rtol, atol=1e-12)
    torch.testing.assert_close(ours.novelty, reference.novelty, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours.forces, reference.forces, rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["scaled", "dtc"])
def test_as_pytorch_has_it(errors, form):
    asked = LocalErrors(errors.variances, errors.distances, form)
    ours, reference = both(terms_of(errors.variances), shaken(everything(), 0.2, 60), asked)
    compare(ours, reference)
    assert reference.atom_energies_variance.inducing.max() > 1e-3 and reference.novelty.isinf().any()


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(species=st.lists(st.sampled_from(SPECIES), min_size=1, max_size=25), seed=st.integers(0, 99))
def test_any_environments(errors, species, seed):
    """Single atoms, without neighbours, among them."""
    structures = Structures.concatenate([cluster(tuple(species), seed), cluster(SPECIES[:1], seed + 1)])
    compare(*both(terms_of(errors.variances), structures, errors))


def test_leading_columns_in_double_the_rest_in_single(monkeypatch):
    """The same numbers of single precision, in another order of sums."""
    monkeypatch.setattr(local_variance, "LEADING", 12)
    monkeypatch.setattr(local_variance, "TOLERANCE", 1.0)
    for case in ("polynomial 2", "polynomial 4", "tangents", "two descriptors"):
        model = model_of(case)
        ours, reference = both(terms_of(model), shaken(everything(), 0.2, 61), LocalErrors(model))
        assert all(len(part.whiten_rest) for part in model.local.values())
        mine, theirs = (p.atom_energies_variance.total.sqrt() for p in (ours, reference))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
        assert ours.novelty is None


def test_a_species_without_columns():
    """Nothing is known of it but the prior."""
    model = model_of("polynomial 4")
    (first,) = model.blocks
    kept = model.n_columns - first[-1].n_columns
    signal, factor = model.signal[:kept], model.factor[:kept, :kept]
    lacking = VarianceModel(model.priors, (first[:-1],), model.lowers[:-1], signal, factor, {}, {}, 0)
    ours, reference = both(terms_of(lacking), everything(), LocalErrors(lacking, distances_of(model)))
    compare(ours, reference)
    mine = everything().species == first[-1].species
    prior = model.priors[0].signal[first[-1].species] ** 2
    assert (ours.atom_energies_variance.inducing[mine] == prior).all()


@pytest.mark.parametrize("typical", [None, 0.4])
def test_calibrated_standard_deviations(errors, typical):
    """What engines get: weights, scale, widening by novelty, as calibrate_prediction has them."""
    learned = KindCalibration(1.7, 9, {"all": (1.0,) * 6}, weights=(0.3, 2.5, 1.1), forbidden=3e-3)
    calibration = Calibration({"forces": learned, "energies": learned, "stresses": learned}, typical_novelty=typical)
    terms, structures = terms_of(errors.variances), shaken(everything(), 0.2, 62)
    core = compile_mean(terms, core_baselines(), sorted(SPECIES))
    core.hold(errors.variances, errors.distances)
    build_calibration(core.model, calibration, errors.variances, library.build)
    near = neighbors.find_neighbors(structures, terms[0].descriptor.cutoff)
    given = Surroundings.from_structures(structures, near)
    *_, sigma, novelty = evaluate_by_core(core.model, given, True)
    raw = chunked.predict_mean(terms, structures, near.of_centers, errors)
    wanted = calibrate_prediction(raw, structures, calibration).atom_energies_variance.total.sqrt()
    torch.testing.assert_close(sigma, wanted, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(novelty, raw.novelty, rtol=1e-6, atol=1e-9)


def test_a_core_that_was_told_nothing_says_so(errors):
    core = compile_mean(terms_of(errors.variances), [], sorted(SPECIES))
    none = torch.zeros(0, dtype=torch.float64)
    whole = torch.zeros(0, dtype=torch.long)
    for wanted in ((none, 0), (0, none)):
        filled = [w if isinstance(w, int) else torch.zeros(1, dtype=torch.float64) for w in wanted]
        given = whole, whole, whole, none, none, none
        assert library.call("evaluate", core.model, 0, 0, *given, 0, *filled, 1) == 2


def test_threads_and_company_change_no_bit(errors):
    batch, before, found = Structures.concatenate([everything()] * 6), torch.get_num_threads(), []
    terms = terms_of(errors.variances)
    core = compile_mean(terms, [], sorted(SPECIES))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(next(both(terms, batch, errors, core)))
    finally:
        torch.set_num_threads(before)
    found.append(next(both(terms, everything(), errors, core)))
    for other in found[1:]:
        for get in (lambda p: p.atom_energies_variance.total, lambda p: p.novelty, lambda p: p.atom_energies):
            part = get(other)
            assert torch.equal(get(found[0])[: len(part)], part)


LOCAL = LocalScale((0.2, -0.3, 0.15), (-3.0, 0.1, -0.4), (-6.0, -2.0, -3.0), (1.0, 1.5, 2.0), 1.3)


@pytest.mark.parametrize("local", [None, LOCAL], ids=["", "local scale"])
def test_standard_deviations_of_forces(errors, local):
    """Of some atoms, in cells where they see their own images and in clusters, calibrated; and of neither threads nor company."""
    model = replace(errors.variances, noise={"forces": 0.05}, label_noise={"forces": 0.02})
    learned = KindCalibration(1.7, 9, {"all": (1.0,) * 6}, weights=(0.3, 2.5, 1.1), forbidden=3e-3, local=local)
    calibration = Calibration({"forces": learned, "energies": learned, "stresses": learned}, typical_novelty=0.4)
    terms, structures = terms_of(model), shaken(everything(), 0.1, 63)
    core = compile_mean(terms, core_baselines(), sorted(SPECIES))
    build_variances(core.model, model, core.species, library.build, forces=True)
    build_novelty(core.model, errors.distances, core.species, library.build)
    build_calibration(core.model, calibration, model, library.build)
    near, atoms = neighbors.find_neighbors(structures, 3.9), [9, 0, 4, structures.n_atoms - 1]
    found = force_sigma_by_core(core.model, structures, near, atoms)

    raw = chunked.predict_mean(
        terms, structures, near.of_centers, LocalErrors(None, errors.distances), core_baselines()
    )
    seen = [term.environments(structures) for term in terms]
    covariance = model.force_covariance(structures, seen, model.amplitude, torch.tensor(atoms))
    whole = calibrate_prediction(replace(raw, forces_covariance=covariance), structures, calibration)
    wanted = whole.forces_covariance.total.diagonal(dim1=1, dim2=2).sqrt()[atoms]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    assert torch.equal(force_sigma_by_core(core.model, structures, near, [4]), found[2:3])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(force_sigma_by_core(core.model, structures, near, atoms), found)
    finally:
        torch.set_num_threads(before)
