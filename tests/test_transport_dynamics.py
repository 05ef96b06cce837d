"""Dynamics of replicas: motion whose diffusion, viscosity and temperature are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.units import BOLTZMANN, FEMTOSECOND, GPA
from gpmlp.properties.dynamics import DynamicsSettings, MovingForces, Replicas
from gpmlp.properties.transport_results import (
    SegmentAnalysis,
    analyse_segments,
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


def test_a_diffusion_coefficient_in_doubt_has_an_interval_that_holds_zero():
    """Of displacements that do not grow, that are no line, and of few segments; not of a fluid with many."""
    name = "diffusion_coefficient_Ar_300K"
    for replicas, said in (
        (random_walks(), ""),
        (random_walks(fluid=False), "as in a solid"),
        (random_walks(segments=2, members=1, replicas=1), "too few segments"),
    ):
        results = analyse_segments(replicas, ["diffusion"], None, "gas")
        value, other = results[name], SegmentAnalysis(replicas).diffusion_of_velocities()["Ar"].effects(0)
        assert (value.low_90 == 0) == bool(said) == ("in doubt" in value.about)
        assert any(said in note for note in results.notes)
        if said:
            assert value.low_90 <= 1e3 * max(0, other.value) <= value.high_90 and value.sigma >= value.value / 1.645
    bent = random_walks()
    for sums in bent.sums:  # quick motion in a cage that is left ever more slowly
        sums["msd"] = np.sqrt(sums["msd"])
    results = analyse_segments(bent, ["diffusion"], None, "gas")
    velocities = 1e3 * SegmentAnalysis(bent).diffusion_of_velocities()["Ar"].effects(0).value
    assert results[name].low_90 == 0 and results[name].high_90 >= velocities > 0
    assert any("not a line" in note for note in results.doubts)


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
