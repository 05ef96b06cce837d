"""Transport: random effects of simulated data, reweighting where it is exact, runs that are killed."""

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
from ase.build import bulk
from test_transport_dynamics import random_walks

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.core.units import BOLTZMANN
from gpmlp.potential.potential import Potential
from gpmlp.properties import transport_results
from gpmlp.properties.static_averages import BINS
from gpmlp.properties.statistics import random_effects, reweighted_averages
from gpmlp.properties.transport import TransportRun, TransportSettings
from gpmlp.properties.transport_results import (
    Arrhenius,
    MemberAverages,
    average_members,
)

SPRING = 2.0  # eV/A^2


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
    rdf = next(c for c in state.results.curves if c.name == "radial_distribution_Cu_Cu_200K")
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


def test_trajectories_are_no_longer_than_asked_for(potential: Potential):
    """Of whole segments, of which no third one fits."""
    results = gpmlp.transport(potential, bulk("Cu", cubic=True), settings_of(samples=0, length_ps=0.27))
    assert results.time_ps == pytest.approx(0.2)


@pytest.mark.parametrize("second", ["Cu", "Al"])
def test_radial_distributions_that_an_earlier_version_began(potential: Potential, tmp_path, second):
    """Of one element they are those of its only pair; of two they are left out, in later runs too, and said to be."""
    atoms = bulk("Cu", cubic=True)
    run = TransportRun(potential, atoms, settings_of(what=("energy", "rdf")), tmp_path, resume=False)
    rng, (copies,) = np.random.default_rng(0), run.replicas.settings.copies_K.shape
    old = {"energies": rng.normal(size=(9, 1, copies)), "pressures": rng.normal(size=(9, 1, copies))}
    old = {f"static/{name}": frames for name, frames in old.items()} | {"static/rdf": np.ones((9, copies, BINS))}
    run.close()
    run.static.samples, run.static.pairs = None, [(29, 29)] if second == "Cu" else [(13, 13), (13, 29), (29, 29)]
    for state in (old, None):
        run.static.restore(run.static.state() if state is None else state)
        _, curves, _ = run.static.averages({})
        assert [curve.name for curve in curves] == [
            f"radial_distribution_Cu_Cu_{t}K" for t in (300, 400) if second == "Cu"
        ]
        assert bool(run.static.lost) == (second == "Al") and all(curve.value.mean() == 1 for curve in curves)


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
        gpmlp.transport(
            potential, bulk("Cu", cubic=True), settings_of(time_limit_s=1e-3, segment_ps=10.0, length_ps=20.0)
        )


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
        ({"length_ps": 0.15}, "`length_ps` .0.15. is shorter than two segments of 0.1 ps"),
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
