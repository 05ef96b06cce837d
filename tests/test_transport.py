"""Transport: motion whose diffusion is known, random effects of simulated data, reweighting where it is exact, runs that are killed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.core.units import BOLTZMANN, FEMTOSECOND, GPA
from gpmlp.potential.potential import Potential
from gpmlp.properties import transport_results
from gpmlp.properties.dynamics import DynamicsSettings, MovingForces, Replicas
from gpmlp.properties.statistics import random_effects, reweighted_averages
from gpmlp.properties.transport import TransportRun, TransportSettings
from gpmlp.properties.transport_results import (
    Arrhenius,
    MemberAverages,
    SegmentAnalysis,
    analyse_segments,
    average_members,
)

SPRING = 2.0  # eV/A^2


def springs(sites: np.ndarray, strength: float = SPRING):
    """Forces of independent oscillators about sites."""

    def forces(positions):
        moved = positions - sites
        energies = 0.5 * strength * (moved**2).sum((1, 2))
        return energies, -strength * moved, np.zeros((len(positions), 3, 3))

    return forces


def gas(n: int = 8) -> Atoms:
    rng = np.random.default_rng(0)
    return Atoms(f"Ar{n}", positions=rng.uniform(0, 20, (n, 3)), cell=[20.0] * 3, pbc=True)


# ------------------------------------------------------------ dynamics


def brownian(replicas: Replicas, segments: int, friction_fs: float, seed: int) -> float:
    """Fill the frames of replicas with exact paths of Langevin's equation without forces, and return D = kT τ/m, A²/fs."""
    settings, rng = replicas.settings, np.random.default_rng(seed)
    thermal = BOLTZMANN * settings.copies_K[0] / replicas.masses[0] * FEMTOSECOND**2  # (A/fs)²
    dt, tau = settings.record_fs, friction_fs
    keep = math.exp(-dt / tau)
    # joint law of the change of velocity and position in a record: Gillespie, Phys. Rev. E 54, 2084 (1996)
    vv = thermal * (1 - keep**2)
    xx = thermal * tau**2 * (2 * dt / tau - 4 * (1 - keep) + (1 - keep**2))
    xv = thermal * tau * (1 - keep) ** 2
    root = np.linalg.cholesky([[vv, xv], [xv, xx]])
    v = math.sqrt(thermal) * rng.standard_normal(replicas.velocities.shape)
    x = np.zeros_like(v)
    for _ in range(segments):
        replicas.frames = {name: [] for name in replicas.frames}
        for record in range(settings.segment + 1):
            replicas.frames["x"].append(x)
            replicas.frames["v"].append(v)
            replicas.frames["g"].append(np.zeros((*v.shape[:2], 5)))
            replicas.frames["scalars"].append(np.zeros((3, *v.shape[:2])))
            if record < settings.segment:
                noise = np.einsum("ab,...b->...a", root, rng.standard_normal((*v.shape, 2)))
                x, v = x + tau * (1 - keep) * v + noise[..., 1], keep * v + noise[..., 0]
        replicas.sums.append(replicas._segment_sums())
    return thermal * tau


@pytest.fixture(scope="module")
def walk() -> tuple[Replicas, float]:
    settings = DynamicsSettings((300.0,), replicas=2, stride=10, segment=80)
    replicas = Replicas(gas(), [springs(gas().positions)] * 5, settings)
    return replicas, brownian(replicas, 6, 100.0, 1)


def test_diffusion_of_brownian_motion(walk):
    """Known exactly: by displacements and by velocities, within what the error bar says, which is small."""
    replicas, exact = walk
    analysis = SegmentAnalysis(replicas)
    for averages in (analysis.diffusion()["Ar"], analysis.diffusion_of_velocities()["Ar"]):
        found = averages.effects(0)
        assert abs(found.value - exact) < 3 * found.statistical
        assert 0.01 * exact < found.statistical < 0.1 * exact
        assert found.low_90 < exact < found.high_90


def test_displacements_and_velocities_agree_lag_by_lag(walk):
    """MSD'(t)/6 = ∫₀ᵗ⟨v·v⟩/3, an identity that holds of each path but for its ends."""
    replicas, exact = walk
    msd, vacf = (np.mean([s[name] for s in replicas.sums], axis=(0, 1, 2))[0] for name in ("msd", "vacf"))
    lags = replicas.lags_fs
    slope = np.gradient(msd, lags)[1:-1] / 6
    integral = np.concatenate([[0], np.cumsum((vacf[1:] + vacf[:-1]) / 2 * np.diff(lags))])[1:-1] / 3
    np.testing.assert_allclose(slope, integral, atol=0.12 * exact)
    np.testing.assert_allclose(slope[:3] / exact, 1 - np.exp(-lags[1:4] / 100.0), atol=0.08)


def test_viscosity_of_a_known_memory():
    """Stress that forgets at once: G is a random walk, and eta = V <P²> dt/(2kT) for steps that are independent."""
    settings = DynamicsSettings((300.0,), replicas=4, segment=80)
    replicas, rng = Replicas(gas(), [springs(gas().positions)] * 4, settings), np.random.default_rng(2)
    step = 0.3  # eV fs, standard deviation of G in a record
    shape = replicas.velocities.shape
    for _ in range(10):
        walk = np.cumsum(step * rng.standard_normal((81, *shape[:2], 5)), axis=0)
        replicas.frames = {"x": [np.zeros(shape)] * 81, "v": [np.zeros(shape)] * 81, "g": list(walk)}
        replicas.frames["scalars"] = [np.zeros((3, *shape[:2]))] * 81
        replicas.sums.append(replicas._segment_sums())
    found = SegmentAnalysis(replicas).viscosity().effects(0)
    exact = step**2 / settings.record_fs / (2 * replicas.volume * BOLTZMANN * 300) * 1e-3 / GPA
    assert abs(found.value - exact) < 3 * found.statistical < 0.3 * exact


def random_walks(
    cell: tuple[float, float, float] = (20.0, 20.0, 20.0), segments: int = 10, members: int = 4, replicas: int = 4,
    fluid: bool = True, relaxes: bool = True,
) -> Replicas:  # fmt: skip
    """Replicas of a gas whose positions and Helfand moments are random walks; or of a solid, or of stress that does not relax."""
    atoms, rng = gas(), np.random.default_rng(7)
    atoms.set_cell(cell)
    settings = DynamicsSettings((300.0,), replicas=replicas, segment=80)
    out = Replicas(atoms, [springs(atoms.positions)] * members, settings)
    shape = out.velocities.shape
    for _ in range(segments):
        steps = 0.3 * rng.standard_normal((81, *shape))
        x = np.cumsum(steps, axis=0) if fluid else steps
        stress = rng.standard_normal((81 if relaxes else 1, *shape[:2], 5))
        g = np.cumsum(np.broadcast_to(stress, (81, *shape[:2], 5)), axis=0)
        v = np.diff(x, axis=0, append=x[-1:]) / settings.record_fs
        out.frames = {"x": list(x), "v": list(v), "g": list(g), "scalars": [np.zeros((3, *shape[:2]))] * 81}
        out.sums.append(out._segment_sums())
    return out


def test_periodic_images_are_corrected_in_a_cubic_cell_of_a_fluid_alone():
    """Else D of an infinite fluid is left out, and a note says why."""
    name = "diffusion_coefficient_infinite_Ar_300K"
    for replicas, reason in (
        (random_walks(), ""),
        (random_walks((20.0, 20.0, 21.5)), ""),
        (random_walks((20.0, 20.0, 24.0)), "heights of 20, 20, 24 A"),
        (random_walks(fluid=False), "as in a solid"),
        (random_walks(relaxes=False), "not lines yet within the lags"),
    ):
        results = analyse_segments(replicas, ["diffusion", "viscosity"], None, "gas")
        assert (name in {value.name for value in results.values}) == (not reason)
        said = [note for note in results.notes if "is not corrected for periodic images" in note]
        assert len(said) == bool(reason) and all(reason in note for note in said)
        assert any("viscosity at 300 K has not converged" in note for note in results.doubts) == ("lags" in reason)


def test_harmonic_crystal_does_not_diffuse():
    """D = 0 within the error, and energy and temperature as equipartition has them."""
    atoms, n = gas(40), 40
    settings = DynamicsSettings((300.0, 600.0), replicas=2, timestep_fs=10.0, stride=5, equilibrate=60, segment=60)
    replicas = Replicas(atoms, [springs(atoms.positions)] * 4, settings)
    while len(replicas.sums) < 5:
        replicas.advance()
    results = analyse_segments(replicas, ["diffusion"], None, "gas")
    for k, t in enumerate((300.0, 600.0)):
        d = results[f"diffusion_coefficient_Ar_{t:g}K"]
        scale = 1e3 * BOLTZMANN * t / SPRING / settings.record_fs  # of motion as fast as it looks in a record, A²/ps
        assert d.low_90 == 0.0 and d.high_90 < 0.05 * scale
        energies = np.mean([s["energy_eV"] for s in replicas.sums], axis=0)[:, 2 * k : 2 * k + 2].mean()
        kelvins = np.mean([s["temperature_K"] for s in replicas.sums], axis=0)[:, 2 * k : 2 * k + 2].mean()
        assert energies == pytest.approx(1.5 * n * BOLTZMANN * t, rel=0.08)
        assert kelvins == pytest.approx(t, rel=0.08)
    assert any("No activation energy" in note for note in results.notes)


def test_without_a_thermostat_energy_is_conserved():
    """The same steps with a time constant that is never reached: Verlet's, whose error falls with the square of the step."""
    drifts = []
    for timestep in (4.0, 8.0):
        settings = DynamicsSettings((300.0,), 1, timestep, 5, 0, 40, weak_fs=1e15)
        replicas = Replicas(gas(), [springs(gas().positions)], settings)
        totals = []
        for _ in range(60):
            replicas.advance()
            totals.append(float(replicas.energies[0, 0] + replicas.kinetic_eV[0, 0]))
        drifts.append(np.std(totals) / np.mean(totals))
    assert drifts[0] < 5e-3
    assert drifts[1] / drifts[0] == pytest.approx(4, rel=0.4)


def test_velocity_rescaling_samples_the_canonical_kinetic_energy():
    """Of free particles: mean and variance of a gamma distribution of 3n − 3 degrees of freedom, in 400 copies."""
    n = 4
    settings = DynamicsSettings((300.0,), 400, 10.0, 10, 0, 1000, weak_fs=50.0)
    free = Replicas(gas(n), [springs(gas(n).positions, 0.0)], settings)
    for _ in range(40):
        free.advance()
    kinetic = free.kinetic_eV[0] / (BOLTZMANN * 300)
    assert kinetic.mean() == pytest.approx((3 * n - 3) / 2, abs=4 * math.sqrt(4.5 / 400))
    assert kinetic.var() == pytest.approx((3 * n - 3) / 2, rel=0.35)
    drift = (free.masses[:, None] * free.velocities).sum(2)
    assert np.abs(drift).max() < 1e-10


def test_a_sample_that_blows_up_is_counted_and_the_others_go_on():
    atoms = gas()

    def breaking(positions):
        breaking.calls += 1
        if breaking.calls > 60:
            raise UserError("two atoms are on top of each other")
        return springs(atoms.positions)(positions)

    breaking.calls = 0
    members = [springs(atoms.positions)] * 4 + [breaking]
    replicas = Replicas(atoms, members, DynamicsSettings((300.0,), 2, 10.0, 5, 2, 10))
    while len(replicas.sums) < 3:
        replicas.advance()
    value = analyse_segments(replicas, ["diffusion"], None, "gas")["diffusion_coefficient_Ar_300K"]
    assert (value.samples, value.failed) == (4, 1) and math.isfinite(value.sigma)
    assert replicas.failures == {4: "two atoms are on top of each other"}
    breaking.calls = 0
    with pytest.raises(UserError, match="mean potential cannot go on"):
        broken = Replicas(atoms, [breaking], DynamicsSettings((300.0,), 2, 10.0, 5, 2, 10))
        for _ in range(20):
            broken.advance()


def test_forces_of_copies_are_those_of_the_potential(potential):
    """Through searches of neighbours and between them, to the last bit."""
    atoms = bulk("Cu", cubic=True)
    moving, rng = MovingForces(potential, atoms, 3), np.random.default_rng(0)
    positions = np.stack([atoms.positions] * 3)
    for _ in range(6):
        positions = positions + 0.03 * rng.standard_normal(positions.shape)
        energies, forces, stresses = moving(positions)
        for k, here in enumerate(positions):
            frame = atoms.copy()
            frame.positions = here
            expected = potential(gpmlp.io.ase_atoms.structures_from_ase([frame]))
            np.testing.assert_allclose(energies[k], float(expected.energies[0]), atol=1e-10)
            np.testing.assert_allclose(forces[k], expected.forces.numpy(), atol=1e-10)
            np.testing.assert_allclose(stresses[k], expected.stresses[0].numpy(), atol=1e-12)


# ------------------------------------------------------------ statistics


@pytest.mark.parametrize(("scatter", "noise"), [(1.0, 0.01), (1.0, 0.5), (0.3, 1.0)])
def test_random_effects_of_simulated_data(scatter, noise):
    """The interval covers a further draw in 90 % at least, and the scatter comes out without the noise on it."""
    rng, inside, squares = np.random.default_rng(3), 0, []
    for _ in range(200):
        y = 5 + scatter * rng.standard_normal(8) + noise * rng.standard_normal(8)
        found = random_effects(y, np.full(8, noise), 5 + noise * rng.standard_normal(), noise)
        inside += found.low_90 <= 5 + scatter * rng.standard_normal() <= found.high_90
        squares.append(found.sampled**2)
    assert inside >= 174  # of 200; 180 are meant, and chance takes three in a hundred below
    if noise < scatter:
        assert math.sqrt(np.mean(squares)) == pytest.approx(scatter, rel=0.15)


def test_random_effects_without_scatter_and_of_the_mean_alone():
    same = random_effects(np.full(8, 2.0), np.full(8, 0.1), 2.0, 0.1)
    assert same.sampled == 0.0 and same.statistical == pytest.approx(0.1 / 3)
    alone = random_effects(np.zeros(0), np.zeros(0), 2.0, 0.1)
    assert (alone.value, alone.sigma, alone.samples) == (2.0, 0.1, 0)
    assert alone.high_90 == pytest.approx(2.0 + 1.6449 * 0.1, abs=1e-4)
    lost = random_effects(np.array([1.0, np.nan, 3.0, 2.0]), np.full(4, 0.1))
    assert (lost.samples, lost.failed) == (4, 1) and lost.value == pytest.approx(2.0, abs=0.05)
    few = random_effects(np.array([1.0, np.nan, np.nan]), np.full(3, 0.1), 2.0, 0.1).as_value("x", "", least=0.0)
    assert few.value == 2.0 and few.as_dict()["low_90"] is None and few.as_dict()["parts"]["sampled"] is None
    with pytest.raises(UserError, match="three are needed"):
        random_effects(np.array([1.0, np.nan]), np.full(2, 0.1))


@pytest.mark.parametrize(("segments", "replicas"), [(2, 1), (2, 2), (3, 4)])
def test_the_interval_of_the_mean_alone_holds_nine_of_ten(segments, replicas):
    """Few segments say little of their own scatter: Student's distribution, not the normal one."""
    rng, runs = np.random.default_rng(8), 2000
    inside = within_sigma = 0
    for _ in range(runs):
        found = average_members(5 + rng.standard_normal((segments, 1, replicas)), replicas).effects(0)
        inside += found.low_90 <= 5 <= found.high_90
        within_sigma += abs(found.value - 5) <= found.sigma
    assert inside / runs == pytest.approx(0.9, abs=0.02)
    assert within_sigma / runs == pytest.approx(0.683, abs=0.03)


def test_reweighting_is_exact_for_oscillators():
    """⟨x²⟩ = kT/k of another spring constant, from coordinates of the first; the cumulant's is that to first order in the change."""
    t, rng = 300.0, np.random.default_rng(4)
    x = math.sqrt(BOLTZMANN * t / SPRING) * rng.standard_normal(200_000)
    other = SPRING * np.array([1.1, 0.9, 1.6])
    found = reweighted_averages((x**2)[:, None], 0.5 * (other[:, None] - SPRING) * x**2, t)
    assert not found.cumulant.any()
    np.testing.assert_allclose(found.values[:, 0], BOLTZMANN * t / other, rtol=0.02)
    assert found.frames == len(x) and (np.diff(found.effective[[0, 2]]) < 0).all()
    first = reweighted_averages((x**2)[:, None], 0.5 * (other[:, None] - SPRING) * x**2, t, least=1.0)
    assert first.cumulant.all()
    np.testing.assert_allclose(first.values[:, 0], BOLTZMANN * t / SPRING * (2 - other / SPRING), rtol=0.02)


def test_many_atoms_leave_no_frame_and_the_cumulant_takes_over():
    rng = np.random.default_rng(5)
    found = reweighted_averages(
        rng.standard_normal((100, 1)), np.stack([5 * rng.standard_normal(100), np.zeros(100)]), 300.0
    )
    assert found.cumulant.tolist() == [True, False]
    assert found.effective[0] < 5 and found.effective[1] == pytest.approx(100)


def test_arrhenius_line_gives_back_what_it_was_made_of():
    kelvins = np.array([1200.0, 1400.0, 1600.0])
    energies = np.array([0.4, 0.38, 0.41, 0.43, 0.39, 0.40])
    values = 60e-3 * np.exp(-energies[:, None] / (BOLTZMANN * kelvins))
    line = Arrhenius.from_members("Cu", kelvins, MemberAverages(values, 1e-5 * values, np.ones(3), np.full(3, np.inf)))
    np.testing.assert_allclose(line.energies, energies, atol=1e-6)
    found = line.activation_energy()
    assert found.value == pytest.approx(0.4, abs=0.01) and found.parts["sampled"] == pytest.approx(0.02, abs=0.005)
    assert line.prefactor().value == pytest.approx(60.0, rel=1e-3)
    colder = line.diffusion_at(900.0)
    assert colder.value == pytest.approx(60 * math.exp(-0.4 / (BOLTZMANN * 900)), rel=0.1)
    assert colder.sigma / colder.value > line.diffusion_at(1400.0).sigma / line.diffusion_at(1400.0).value
    rough = MemberAverages(values, 0.5 * values, np.ones(3), np.full(3, np.inf))
    assert Arrhenius.from_members("Cu", kelvins, rough) is None


def test_error_of_an_arrhenius_energy_is_that_of_repeated_data():
    kelvins, rng = np.array([1200.0, 1400.0, 1600.0]), np.random.default_rng(6)
    d = np.broadcast_to(0.06 * np.exp(-0.4 / (BOLTZMANN * kelvins)), (400, 3))
    noise = 0.1 * d
    line = Arrhenius.from_members(
        "Cu", kelvins, MemberAverages(d + noise * rng.standard_normal(d.shape), noise, np.ones(3), np.full(3, np.inf))
    )
    assert np.std(line.energies) == pytest.approx(line.errors[0], rel=0.12)
    assert np.std(line.logarithms) == pytest.approx(line.errors[1], rel=0.12)
    assert np.mean(line.energies) == pytest.approx(0.4, abs=0.01)


def test_correction_for_periodic_images():
    """Yeh and Hummer: water at 298 K, 0.85 mPa s, in a box of 20 Å: 2.837 kT/(6 π η L) = 0.0364 Å²/ps."""
    d = gpmlp.properties.values.PropertyValue(
        "diffusion_coefficient_O_298K", 0.2, "A^2/ps", 0.01, 0.18, 0.22, {"statistical": 0.01}
    )
    eta = gpmlp.properties.values.PropertyValue("viscosity_298K", 0.85, "mPa s", 0.085, 0.7, 1.0)
    found = transport_results.add_image_correction(d, eta, 298.0, 20.0**3)
    by_hand = 2.837297 * 1.380649e-23 * 298 / (6 * math.pi * 0.85e-3 * 20e-10) * 1e8  # m²/s in A²/ps
    assert found.value - 0.2 == pytest.approx(by_hand, rel=1e-4)
    assert found.sigma == pytest.approx(math.hypot(0.01, 0.1 * by_hand), rel=1e-3)
    assert found.high_90 - found.value == pytest.approx(math.hypot(0.02, 0.15 / 0.85 * by_hand), rel=1e-3)
    for error, reason in ((0.1, ""), (0.5, "the viscosity is not known to 35 % yet")):
        known = replace(eta, parts={"statistical": error})
        assert transport_results._no_correction([d], known, 0.0, np.full(3, 20.0)) == reason


# ------------------------------------------------------------ runs

SHORT = {
    "samples": 3,
    "replicas": 2,
    "segment_ps": 0.1,
    "equilibrate_ps": 0.04,
    "length_ps": 0.3,
    "precision": 1e-3,
    "timestep_fs": 1.0,
}


def settings_of(**changes) -> TransportSettings:
    return TransportSettings(**({"temperatures_K": (300.0, 400.0)} | SHORT | changes))


def test_a_run_on_a_crystal(potential: Potential, tmp_path):
    results = gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(what=("diffusion", "viscosity")), tmp_path)
    names = {value.name for value in results.values}
    assert {"diffusion_coefficient_Cu_300K", "viscosity_300K"} <= names
    assert not any("infinite" in name for name in names)
    assert sum("is not corrected for periodic images" in note for note in results.notes) == 2
    for value in results.values:
        assert value.samples == 3 and value.structures == ("Cu4",) and value.low_90 <= value.value <= value.high_90
        assert set(value.parts) == {"sampled", "statistical"}
    assert "0.3 ps long" in results.stopped and "would take" in results.stopped
    curve = next(c for c in results.curves if c.name == "mean_square_displacement_Cu_300K")
    assert curve.value[0] == 0 and (np.diff(curve.value[:3]) > 0).all() and curve.sigma.shape == curve.value.shape


def test_static_averages_of_samples_are_those_of_runs_of_their_own(potential: Potential):
    """Energy per atom of each sample by reweighting the mean's frames; of nearly harmonic atoms 3/2 kT above the ground state."""
    atoms = bulk("Cu", cubic=True)
    chosen = settings_of(
        what=("energy", "pressure", "rdf"), temperatures_K=(200.0,), length_ps=8.0, segment_ps=2.0, replicas=4, precision=1e-6,
        timestep_fs=4.0, equilibrate_ps=2.0,
    )  # fmt: skip
    run = TransportRun(potential, atoms, chosen, None, False)
    *_, state = run
    value = state.results["potential_energy_200K"]
    ground = float(potential(gpmlp.io.ase_atoms.structures_from_ase([atoms])).energies[0]) / 4
    assert value.value - ground == pytest.approx(
        1.5 * BOLTZMANN * 200 * 3 / 4, rel=0.15
    )  # 3 of 4 atoms: the centre of mass rests
    samples = potential.sample(3, 0)
    grounds = samples(gpmlp.io.ase_atoms.structures_from_ase([atoms])).energies[:, 0].numpy() / 4
    expected = math.sqrt(((grounds - ground) ** 2).mean())
    assert value.parts["sampled"] == pytest.approx(expected, rel=0.3)
    rdf = next(c for c in state.results.curves if c.name == "radial_distribution_200K")
    assert rdf.value[rdf.x < 2.0].max() == 0 and rdf.x[rdf.value.argmax()] == pytest.approx(2.55, abs=0.1)


def test_more_precision_is_foreseen_to_take_longer(potential: Potential):
    """Errors fall with the square root of the length: half of the error takes four times as long."""
    run = TransportRun(potential, bulk("Cu", cubic=True), settings_of(what=("viscosity",), precision=0.01), None, False)
    *_, state = run
    loose = state.results.needed
    run.settings = replace(run.settings, precision=0.005)
    tight = run.results()
    assert 1 < loose < math.inf and tight.needed == pytest.approx(4 * loose)
    assert f"{4 * loose * 0.3:.3g} ps in all" in run._outlook(tight)


def test_a_run_is_not_over_while_its_error_is_hardly_known(potential: Potential):
    """However small it looks: of three segments of one trajectory it has two degrees of freedom of the five that are asked for."""
    chosen = settings_of(samples=0, replicas=1, temperatures_K=(300.0,), precision=10.0)
    run = TransportRun(potential, bulk("Cu", cubic=True), chosen, None, False)
    run.replicas = random_walks(segments=3, members=1, replicas=1)
    few = run.results()
    assert few.freedom == 2 and few.needed == pytest.approx(5 / 2) and run._verdict(few, 100) == ""
    run.replicas = random_walks(segments=12, members=1, replicas=1)
    many = run.results()
    assert many.freedom > 5 and "as small as asked for" in run._verdict(many, 100)


def test_a_run_is_not_over_while_a_slope_is_in_doubt(potential: Potential):
    """Small errors of a displacement that is no line yet are no reason to stop, but the longest trajectories are."""
    chosen = settings_of(temperatures_K=(300.0,), what=("viscosity",), precision=0.5)
    run = TransportRun(potential, bulk("Cu", cubic=True), chosen, None, False)
    for relaxes in (True, False):
        run.replicas = random_walks(relaxes=relaxes)
        results = run.results()
        assert results.needed < 1 and bool(results.doubts) != relaxes
        assert ("as small as asked for" in run._verdict(results, 100)) == relaxes
    assert run._verdict(results, 100) == "" and "segments are too short" in run._verdict(results, 10)
    assert set(results.doubts) <= set(results.notes)


def model_and_start(potential: Potential, folder) -> list[str]:
    gpmlp.save(potential, folder / "model.gpmlp")
    ase.io.write(folder / "start.xyz", bulk("Cu", cubic=True))
    flags = "--temperatures 300,400 --samples 3 --segment-ps 0.1 --equilibrate-ps 0.04 --timestep 1 --precision 0.001"
    return [
        "transport",
        str(folder / "model.gpmlp"),
        str(folder / "start.xyz"),
        *flags.split(),
        "--what",
        "diffusion,energy",
    ]


def test_killed_and_resumed_it_is_the_same_to_the_last_bit(potential: Potential, tmp_path, monkeypatch):
    command = [*model_and_start(potential, tmp_path), "--length-ps", "0.8"]
    assert main([*command, "-o", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = []
    for resume in ([], ["--resume"]):
        called = [sys.executable, "-m", "gpmlp", *command, "-o", str(folder), *resume]
        child = subprocess.Popen(called, env=environment, stderr=subprocess.PIPE)
        before = (folder / "state.npz").stat().st_mtime_ns if resume else 0
        end = time.monotonic() + 300
        while child.poll() is None and time.monotonic() < end:
            if (folder / "state.npz").exists() and (folder / "state.npz").stat().st_mtime_ns > before:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        ended.append(child.wait())
        child.stderr.close()
    assert ended[0] == -signal.SIGKILL
    assert not (folder / "transport.json").exists() or ended[1] == 0
    assert main([*command, "-o", str(folder), "--resume"]) == 0
    for name in ("transport.json", "curves.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_is_over_goes_on_when_more_is_asked_for(potential: Potential, tmp_path, capsys):
    command = model_and_start(potential, tmp_path)
    out = ["-o", str(tmp_path / "out")]
    assert main([*command, "--length-ps", "0.2", *out]) == 0
    first = json.loads((tmp_path / "out" / "transport.json").read_text())
    assert "0.2 ps long" in capsys.readouterr().out
    assert main([*command, "--length-ps", "0.2", *out]) == 2  # not over what is there
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--length-ps", "0.4", *out, "--resume"]) == 0
    longer = json.loads((tmp_path / "out" / "transport.json").read_text())
    assert first[0]["name"] == longer[0]["name"] and first[0]["value"] != longer[0]["value"]
    assert {"name", "value", "sigma", "low_90", "high_90", "unit", "parts", "novelty", "samples", "failed"} <= set(
        longer[0]
    )
    assert main([*command, "--length-ps", "0.4", "--seed", "1", *out, "--resume"]) == 2
    assert "another seed" in capsys.readouterr().err
    (tmp_path / "out" / "state.npz").write_bytes(b"torn")
    assert main([*command, *out, "--resume"]) == 2
    assert "no state of a run" in capsys.readouterr().err


def test_a_run_interrupted_at_once_goes_on(potential: Potential, tmp_path):
    atoms = bulk("Cu", cubic=True)
    whole = gpmlp.transport(potential, atoms, settings_of(), tmp_path / "whole")

    def interrupt(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpmlp.transport(potential, atoms, settings_of(), tmp_path, progress=interrupt)
    assert (tmp_path / "state.npz").exists()
    assert gpmlp.transport(potential, atoms, settings_of(), tmp_path, resume=True).values == whole.values
    # killed before there was any state
    assert gpmlp.transport(potential, atoms, settings_of(), tmp_path / "new", resume=True).values == whole.values


def test_one_process_at_a_time_has_the_folder(potential: Potential, tmp_path):
    run = TransportRun(potential, bulk("Cu", cubic=True), settings_of(), tmp_path, resume=False)
    for resume in (False, True):
        with pytest.raises(UserError, match="another process is at work"):
            gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(), tmp_path, resume=resume)
    run.close()


def test_it_goes_on_with_the_same_model_and_masses_alone(potential: Potential, tmp_path):
    atoms = bulk("Cu", cubic=True)
    TransportRun(potential, atoms, settings_of(), tmp_path, resume=False).close()
    heavy = atoms.copy()
    heavy.set_masses([65.0] * 4)
    with pytest.raises(UserError, match="another start"):
        TransportRun(potential, heavy, settings_of(), tmp_path, resume=True)
    ion = atoms.copy()
    ion.info["charge"] = 1.0
    with pytest.raises(UserError, match="another start"):
        TransportRun(potential, ion, settings_of(), tmp_path, resume=True)
    shifted = replace(potential, baselines=())
    with pytest.raises(UserError, match="another model"):
        TransportRun(shifted, atoms, settings_of(), tmp_path, resume=True)
    TransportRun(replace(potential, report={"read": 1}), atoms, settings_of(), tmp_path, resume=True).close()


def test_the_time_limit_ends_it(potential: Potential):
    results = gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(time_limit_s=1.0, length_ps=1e6))
    assert "time limit" in results.stopped
    with pytest.raises(UserError, match="Two segments"):
        gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(time_limit_s=1e-3, segment_ps=10.0))


def test_the_time_limit_counts_from_where_a_run_is_resumed(potential: Potential, tmp_path):
    """It goes on although the tries before took longer than the limit of this one."""
    atoms = bulk("Cu", cubic=True)
    before = TransportRun(potential, atoms, settings_of(), tmp_path, resume=False)
    before.spent_s = 1e4
    before._save()
    before.close()
    *_, state = TransportRun(potential, atoms, settings_of(length_ps=0.2, time_limit_s=100.0), tmp_path, resume=True)
    assert "0.2 ps long" in state.results.stopped


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "at least 3"),
        ({"what": ("conductivity",)}, "not offered"),
        ({"what": ("difusion",)}, "diffusion"),
        ({"what": ()}, "must name"),
        ({"temperatures_K": ()}, "at least"),
        ({"temperatures_K": (300.0, 300.0)}, "must differ"),
        ({"temperatures_K": (-5.0,)}, "temperatures"),
        ({"precision": 0.0}, "precision"),
        ({"replicas": 0}, "replicas"),
        ({"timestep_fs": 0.0}, "timestep_fs"),
        ({"timestep_fs": -1.0}, "timestep_fs"),
    ],
)
def test_settings_that_are_refused(potential: Potential, changes, message):
    with pytest.raises(UserError, match=message):
        gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(**changes))


def test_starts_that_are_refused(potential: Potential):
    from ase.constraints import FixAtoms

    cluster, held, other = bulk("Cu", cubic=True), bulk("Cu", cubic=True), bulk("Al", cubic=True)
    cluster.pbc = False
    held.set_constraint(FixAtoms([0]))
    for atoms, message in (
        (cluster, "periodic"),
        (held, "constraints"),
        (other, "not trained on Al"),
        (bulk("Cu"), "one atom"),
    ):
        with pytest.raises(UserError, match=message):
            gpmlp.transport(potential, atoms, settings_of())


def test_a_model_without_variances_has_statistics_alone(potential: Potential):
    results = gpmlp.transport(potential.sample(1, 0)[0], bulk("Cu", cubic=True), settings_of())
    assert results.values[0].samples == 0 and set(results.values[0].parts) == {"statistical"}
    assert any("no samples" in note for note in results.notes)
