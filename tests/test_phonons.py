"""Phonons and thermal expansion against ASE's phonons, Hessians and sums done by hand; error bars against the full route."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.phonons import Phonons as ASEPhonons
from phonopy.qha.core import QHA
from pydantic import ValidationError
from scipy.optimize import minimize_scalar
from test_properties import labelled

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.lattice_dynamics import (
    J_K_MOL,
    KJ_MOL,
    Harmonic,
    LatticeDynamics,
    standard_cell,
    supercell_repeats,
    too_short,
)
from gpmlp.properties.phonons import Phonons, forces_of
from gpmlp.properties.quasi_harmonic import QuasiHarmonic, states_of
from gpmlp.properties.surface import EnergySurface, Failed, strained

THZ = np.sqrt(units._e / units._amu) * 1e10 / (2 * np.pi) * 1e-12  # of sqrt(eV / (A^2 u))
AT_REST = 3.5898  # A, of EMT's copper
SMALL = {"supercell": (2, 2, 2)}


class Pressed(Calculator):
    """EMT under a pressure: E + p V, whose crystals are smaller."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, pressure: float) -> None:
        super().__init__()
        self.inner, self.pressure = EMT(), pressure

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)) -> None:
        super().calculate(atoms, properties, system_changes)
        inner = atoms.copy()
        inner.calc = self.inner
        stress = inner.get_stress() + self.pressure * np.array([1, 1, 1, 0, 0, 0])
        energy = inner.get_potential_energy() + self.pressure * inner.get_volume()
        self.results = {"energy": energy, "forces": inner.get_forces(), "stress": stress}


@pytest.fixture(scope="module")
def copper() -> dict:
    return exact_properties(
        EnergySurface.of_calculator(EMT()), bulk("Cu"), [Phonons(**SMALL, temperatures=(300.0, 3000.0))]
    )


def by_hand(hessian: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """Frequencies (THz, imaginary ones negative) of a Hessian (3n, 3n) in eV/A^2."""
    weights = np.repeat(masses, 3) ** -0.5
    values = np.linalg.eigvalsh(weights[:, None] * hessian * weights)
    return np.sign(values) * np.sqrt(np.abs(values)) * THZ


def every_branch(found: dict, point: str, first: int = 1, last: int = 3) -> list[float]:
    """Frequencies at a point."""
    return [found[f"frequency_{point}_{i}"] for i in range(first, last + 1)]


def test_frequencies_are_those_of_ase(copper, tmp_path):
    """At q-points that both supercells hold exactly, so that only displacements (0.01 A, both signs) and rest positions differ."""
    plain = ASEPhonons(bulk("Cu", a=AT_REST), EMT(), supercell=(4, 4, 4), delta=0.01, name=str(tmp_path / "phonon"))
    plain.run()
    plain.read(acoustic=True)
    points = {"X": (0.5, 0.0, 0.5), "L": (0.5, 0.5, 0.5)}
    found = plain.band_structure(list(points.values()), verbose=False) / units._hplanck * units._e * 1e-12
    for name, frequencies in zip(points, found, strict=True):
        assert every_branch(copper, name) == pytest.approx(frequencies, abs=0.01)


@pytest.mark.parametrize("alloy", [False, True])
def test_modes_of_a_cell_are_those_at_its_wave_vectors(alloy):
    """The Hessian of the cubic cell (four atoms) has the modes at Gamma and at the three X; that of an alloy those at its own Gamma."""
    surface = EnergySurface.of_calculator(EMT())
    crystal = bulk("Cu", cubic=True)
    if alloy:
        crystal.symbols[0] = "Au"
    at_rest = surface.relax(standard_cell(crystal), "full", 5e-4)
    modes = np.sort(by_hand(surface.hessian(at_rest), at_rest.get_masses()))[3:]
    found = exact_properties(surface, crystal, [Phonons(**SMALL)])
    point, times, first, last = ("GAMMA", 1, 4, 12) if alloy else ("X", 3, 1, 3)
    assert np.sort(every_branch(found, point, first, last) * times) == pytest.approx(modes, abs=0.01)


def test_sum_rules_and_symmetry():
    surface = EnergySurface.of_calculator(EMT())
    cell = surface.relax(standard_cell(bulk("Cu")), "full", 5e-4)
    dynamics = LatticeDynamics(cell, (2, 2, 2), 0.01)
    assert len(dynamics.structures) == 2  # one displacement is enough in fcc
    forces = forces_of(surface.points(dynamics.structures))
    rng = np.random.default_rng(0)
    constants = dynamics.force_constants(forces + 0.1 * rng.normal(size=forces.shape[1:]))
    assert np.abs(constants - dynamics.force_constants(forces)).max() < 1e-9  # what acts on the undisplaced crystal
    noisy = dynamics.force_constants(forces + 1e-3 * rng.normal(size=forces.shape))
    assert np.abs(noisy - constants).max() > 1e-3
    for each in (constants, noisy):
        assert np.abs(each.sum(1)).max() < 1e-9
    gamma = dynamics.frequencies(constants, np.zeros((1, 3)))[0]
    assert np.abs(gamma).max() < 1e-4
    mesh = dynamics.mesh_frequencies(constants)
    grid = np.linspace(0, 1.1 * mesh.max(), 161)
    assert np.trapezoid(dynamics.density_of_states(constants, grid), grid) == pytest.approx(3, rel=0.005)
    stars = dynamics.frequencies(constants, np.array([[0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0.0]]))
    assert np.ptp(stars, axis=0).max() < 1e-6
    a, b = dynamics.frequencies(constants, np.array([[0.1, 0.23, 0.4], [-0.1, -0.23, -0.4]]))
    assert a == pytest.approx(b, abs=1e-6)


def test_thermal_properties(copper):
    """Law of Dulong and Petit, third law, and F, S and C of one another; then F as a sum over modes."""
    t = np.linspace(0.0, 1000.0, 51)
    free, capacity = copper["vibrational_free_energy"], copper["heat_capacity"]
    assert copper["heat_capacity_3000K"] == pytest.approx(3, abs=0.005)
    assert capacity[0] == 0 and (np.diff(capacity) > -1e-9).all()
    assert free[0] == pytest.approx(copper["zero_point_energy"], abs=1e-9)
    entropy = -np.gradient(free, t)[15] / units.kB
    assert entropy == pytest.approx(copper["entropy_300K"], rel=2e-3)
    assert -t[15] * np.gradient(np.gradient(free, t), t)[15] / units.kB == pytest.approx(capacity[15], rel=5e-3)
    surface = EnergySurface.of_calculator(EMT())
    dynamics = LatticeDynamics(standard_cell(bulk("Cu", a=AT_REST)), (2, 2, 2), 0.01)
    constants = dynamics.force_constants(forces_of(surface.points(dynamics.structures)))
    places = (np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5) / 12
    quanta = dynamics.frequencies(constants, places) * 1e12 * units._hplanck / units._e
    by_sum = (quanta / 2 + units.kB * 300 * np.log1p(-np.exp(-quanta / (units.kB * 300)))).sum(1).mean()
    assert copper["vibrational_free_energy_300K"] == pytest.approx(by_sum, abs=2e-4)
    assert copper["zero_point_energy"] == pytest.approx((quanta / 2).sum(1).mean(), abs=2e-5)


def test_quantities_of_several_species_are_per_atom():
    """Four atoms of two masses: modes of the cell alone, whose zero-point energy is half their sum, and law of Dulong and Petit."""
    surface = EnergySurface.of_calculator(EMT())
    alloy = bulk("Cu", cubic=True)
    alloy.symbols[0] = "Au"
    cell = surface.relax(standard_cell(alloy), "full", 5e-4)
    dynamics = LatticeDynamics(cell, (2, 2, 2), 0.01)
    assert dynamics.n_branches == 12
    constants = dynamics.force_constants(forces_of(surface.points(dynamics.structures)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # phonopy warns of acoustic modes at Gamma in the sums
        found = dynamics.harmonic(constants, [3000.0])
    assert found.heat_capacity[0] == pytest.approx(3, abs=0.01) and found.free_energy.shape == (1,)
    places = (np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3) + 0.5) / 6
    quanta = dynamics.frequencies(constants, places) * 1e12 * units._hplanck / units._e
    assert found.zero_point_energy == pytest.approx((quanta / 2).sum(1).mean() / 4, rel=1e-3)
    grid = np.linspace(0, 8, 161)
    assert np.trapezoid(dynamics.density_of_states(constants, grid), grid) == pytest.approx(3, rel=0.01)


def test_supercells_of_moved_crystals():
    """Strained, and with ions elsewhere: as many times the energy of the cell as it has copies; displacements as they were."""
    surface = EnergySurface.of_calculator(EMT())
    cell = standard_cell(bulk("Cu", "hcp", a=2.56, c=4.2))
    dynamics = LatticeDynamics(cell, (3, 3, 2), 0.01)
    moved = strained(cell, [0.02, -0.01, 0.01, 0.03, 0.0, 0.02])
    moved.positions[1] += (0.1, -0.05, 0.2)
    whole, displaced = dynamics.displaced(moved)[:2]
    energies = [point.energy for point in surface.points([moved, whole])]
    assert energies[1] == pytest.approx(18 * energies[0], abs=1e-6)
    step = displaced.positions - whole.positions
    assert step == pytest.approx(dynamics.structures[1].positions - dynamics.structures[0].positions)
    assert np.linalg.norm(step, axis=1).max() == pytest.approx(0.01)


def test_bands_end_where_their_marks_say(copper):
    surface = EnergySurface.of_calculator(EMT())
    plan = Phonons(**SMALL, points=11).plan(surface, [bulk("Cu")])
    bands, axis = plan.evaluate(surface.points(plan.structures))["phonon_bands"], plan.curves["phonon_bands"]
    assert bands.shape == (len(axis.x), 3) and len(axis.x) % 11 == 0
    assert [label for _, label in axis.ticks][:3] == ["Γ", "X", "U|K"] and axis.ticks[0][0] == 0
    at = {label: place for place, label in reversed(axis.ticks)}
    for label in "XL":
        row = bands[np.flatnonzero(np.isclose(axis.x, at[label]))[0]]
        assert row == pytest.approx(every_branch(copper, label), abs=1e-6)
    told = [name for name in plan.units if name.startswith("frequency")]
    assert told == [f"frequency_{end}" for end in ("X_1", "X_3", "U_1", "U_2", "U_3", "L_1", "L_3", "W_1", "W_2")]
    assert plan.about["frequency_X_1"].startswith("branches 1–2 at X")
    reciprocal = 2 * np.pi / AT_REST
    assert at["X"] == pytest.approx(reciprocal, rel=1e-3)  # |Γ X| = 2 pi / a


def test_another_surface_is_taken_at_its_own_volume():
    """Points of a crystal under 1 GPa at the structures of one without: as if it had been relaxed there, to second order of 0.7 %."""
    calculation = Phonons(**SMALL)
    plan = calculation.plan(EnergySurface.of_calculator(EMT()), [bulk("Cu")])
    pressed = EnergySurface.of_calculator(Pressed(1 * units.GPa))
    fast = plan.evaluate(pressed.points(plan.structures))
    full = exact_properties(pressed, bulk("Cu"), [calculation])
    free = plan.evaluate(EnergySurface.of_calculator(EMT()).points(plan.structures))
    for name in ("frequency_X_1", "frequency_L_3", "vibrational_free_energy_300K"):
        shift = full[name] - free[name]
        assert abs(shift) > 5e-4
        assert fast[name] - free[name] == pytest.approx(shift, rel=0.07)


def test_unstable_crystals_have_no_free_energy():
    """Copper as bcc by EMT: bands with negative frequencies, said in words, and no free energies."""
    surface = EnergySurface.of_calculator(EMT())
    plan = Phonons(supercell=(3, 3, 3)).plan(surface, [bulk("Cu", "bcc", a=2.9)])
    found = plan.evaluate(surface.points(plan.structures))
    assert found["phonon_bands"].min() < -0.5 and np.isfinite(found["phonon_bands"]).all()
    assert plan.curves["phonon_dos"].x[0] < -0.5
    assert "imaginary modes down to -" in plan.about["phonon_bands"]
    assert "without meaning" in plan.about["zero_point_energy"]
    assert np.isnan(found["vibrational_free_energy_300K"]) and np.isnan(found["vibrational_free_energy"]).all()
    with pytest.raises(UserError, match="imaginary modes, down to -"):
        exact_properties(surface, bulk("Cu", "bcc", a=2.9), [QuasiHarmonic(supercell=(3, 3, 3))])


def test_a_calculator_is_asked_once_for_each_structure():
    """Planning needs force constants, and so does the result; an oracle is dear."""
    asked = []

    class Counting(Pressed):
        def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)) -> None:
            if len(atoms) > 4:
                asked.append(atoms.positions.tobytes() + atoms.cell.array.tobytes())
            super().calculate(atoms, properties, system_changes)

    exact_properties(EnergySurface.of_calculator(Counting(0.0)), bulk("Cu"), [Phonons(**SMALL)])
    assert len(asked) == len(set(asked)) == 4  # two volumes, with and without a displacement


def test_polar_crystals_are_said_to_lack_their_field():
    surface = EnergySurface.of_calculator(EMT())
    alloy = bulk("Cu", cubic=True)
    alloy.symbols[0] = "Au"
    for crystal, polar in ((alloy, True), (bulk("Cu"), False)):
        about = Phonons(supercell=(1, 1, 1)).plan(surface, [crystal]).about
        assert ("long-range field" in about["phonon_bands"]) == polar


def test_supercells():
    cell = standard_cell(bulk("Cu", a=3.6))
    assert len(cell) == 4
    assert supercell_repeats(cell, 5.0, 1000) == (3, 3, 3)  # 10 A in steps of 3.6
    assert supercell_repeats(cell, 5.0, 60) == (3, 2, 2) or supercell_repeats(cell, 5.0, 60).count(2) >= 2
    assert supercell_repeats(cell, 5.0, 1) == (1, 1, 1)
    assert supercell_repeats(cell, None, 1000) == (3, 3, 3)
    long = Atoms("Cu", cell=[2.0, 4.0, 30.0], pbc=True)
    assert supercell_repeats(long, 6.0, 1000) == (6, 3, 1)
    skew = Atoms("Cu", cell=[[4.0, 0, 0], [3.9, 1.0, 0], [0, 0, 4.0]], pbc=True)
    assert supercell_repeats(skew, 2.0, 1000)[1] == 4  # heights, not lengths


def test_supercells_are_twice_the_reach_across_or_are_said_not_to_be():
    cell = standard_cell(bulk("Cu", a=3.6))
    surface = EnergySurface(
        SimpleNamespace(cutoff=3.0, reach=5.0)
    )  # of a baseline that reaches farther than the descriptor
    assert len(Phonons().dynamics(surface, cell).structures[0]) == 27 * 4
    for options, option in (({"most_atoms": 50}, "most_atoms"), ({"supercell": (3, 2, 3)}, "supercell")):
        phonons = Phonons(**options)
        said = phonons.too_short(surface, phonons.dynamics(surface, cell))
        assert said.startswith(
            "; the supercell is 7.2 A across, less than twice the model's reach of 5.0 A (phonons." + option
        )
    assert Phonons().too_short(surface, Phonons().dynamics(surface, cell)) == ""
    assert too_short(cell, None, "") == ""


def test_the_pages_of_phonons_say_that_a_supercell_is_too_short():
    class Reaching(type(EnergySurface.of_calculator(EMT()))):
        reach = 6.0

    plan = Phonons(**SMALL).plan(Reaching(EMT()), [bulk("Cu")])
    assert all("less than twice the model's reach of 6.0 A" in words for words in plan.about.values())


def test_crystals_without_symmetry_say_what_they_cost():
    glass = bulk("Cu", cubic=True)
    glass.rattle(0.2, rng=np.random.default_rng(0))
    calculation = Phonons(supercell=(1, 1, 1), most_displaced=9)
    with pytest.raises(Failed, match=r"takes \d\d supercells of 4 atoms, more than 9; --set phonons.most_displaced="):
        calculation.dynamics(EnergySurface.of_calculator(EMT()), standard_cell(glass))


def test_refusals():
    isotopes = bulk("Cu", cubic=True)
    isotopes.set_masses([63, 65, 63, 65])
    with pytest.raises(UserError, match="differ in mass"):
        standard_cell(isotopes)
    heavy = bulk("Cu", cubic=True)
    heavy.set_masses([65] * 4)
    assert standard_cell(heavy).get_masses() == pytest.approx(65)
    assert "no crystal" in Phonons().refusal([Atoms("Cu2", [(0, 0, 0), (2.2, 0, 0)])])
    with pytest.raises(ValidationError):
        Phonons(temperatures=(-1.0,))


def test_fast_error_bars_of_phonons_are_those_of_relaxed_samples():
    """Frequencies and free energies, within a quarter."""
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.5, "n_max": 6, "l_max": 3}, inducing={"n": 90})
    potential = gpmlp.fit(*from_ase(labelled(bulk("Cu", cubic=True), EMT(), 24, 0.03, 0.1)), recipe)[0]
    wanted = [Phonons(**SMALL)]
    fast, full = (
        gpmlp.compute_properties(potential, bulk("Cu"), wanted, samples=5, full=full) for full in (False, True)
    )
    assert not fast.failures and not full.failures
    for a, b in zip(fast.values, full.values, strict=True):
        assert a.value == b.value and a.sigma > 0
        assert a.sigma == pytest.approx(b.sigma, rel=0.25), a.name
    for a, b in zip(fast.curves, full.curves, strict=True):
        assert a.sigma.shape == a.value.shape == b.sigma.shape
        assert np.nanmedian(a.sigma) == pytest.approx(np.nanmedian(b.sigma), rel=0.25), a.name


# ---------------------------------------------------------------- quasi-harmonic


def einstein(volumes: np.ndarray, temperatures: np.ndarray, gamma: float) -> tuple[np.ndarray, list[Harmonic]]:
    """A crystal of one frequency, 5 THz (V / 12)^-γ, on Birch and Murnaghan's curve of 140 GPa, B' 5, 12 A^3."""
    x = (12 / volumes) ** (2 / 3)
    energies = 9 * 12 * 140 * units.GPa / 16 * ((x - 1) ** 3 * 5 + (x - 1) ** 2 * (6 - 4 * x))
    found = []
    for volume in volumes:
        quantum = 5e12 * units._hplanck / units._e * (volume / 12) ** -gamma
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            y = quantum / (units.kB * temperatures)
            free = 3 * (quantum / 2 + units.kB * temperatures * np.log1p(-np.exp(-y)))
            entropy = 3 * (y / np.expm1(y) - np.log1p(-np.exp(-y)))
            capacity = 3 * y**2 * np.exp(-y) / np.expm1(-y) ** 2
        found.append(Harmonic(free, entropy, capacity, 1.5 * quantum))
    return energies, found


def test_gruneisen_parameter_of_an_einstein_crystal():
    """It is the exponent, at every temperature; expansion by differences of V(T), and V(T) by a search of the lowest F."""
    volumes, t = np.linspace(11.6, 13.0, 7), np.array([100.0, 299.0, 300.0, 301.0, 900.0])
    states = states_of(volumes, *einstein(volumes, t, 2.0), t)
    assert states["gruneisen_parameter"] == pytest.approx(2.0, rel=2e-3)
    v = states["volume"]

    def free_energy(volume: float, kelvin: float) -> float:
        energies, (found,) = einstein(np.array([volume]), np.array([kelvin]), 2.0)
        return float(energies[0] + found.free_energy[0])

    for kelvin, volume in zip(t, v, strict=True):
        found = minimize_scalar(
            free_energy, bounds=(11.6, 13.0), args=(kelvin,), method="bounded", options={"xatol": 1e-8}
        )
        assert volume == pytest.approx(found.x, rel=1e-5)
    step = 0.01
    f = [free_energy(v[2] + d, 300.0) for d in (-step, 0.0, step)]
    assert states["isothermal_bulk_modulus"][2] == pytest.approx(
        v[2] * (f[0] - 2 * f[1] + f[2]) / step**2 / units.GPa, rel=2e-3
    )
    assert states["volumetric_thermal_expansion"][2] == pytest.approx(1e6 * (v[3] - v[1]) / 2 / v[2], rel=1e-3)
    enthalpy = [free_energy(v[i], t[i]) + t[i] * _entropy(v[i], t[i]) for i in (1, 3)]
    assert states["isobaric_heat_capacity"][2] == pytest.approx((enthalpy[1] - enthalpy[0]) / 2 / units.kB, rel=2e-3)


def _entropy(volume: float, kelvin: float) -> float:
    return units.kB * float(einstein(np.array([volume]), np.array([kelvin]), 2.0)[1][0].entropy[0])


def test_a_minimum_outside_of_the_volumes_is_none():
    volumes, t = np.linspace(11.6, 12.4, 7), np.array([300.0, 3000.0])
    states = states_of(volumes, *einstein(volumes, t, 3.0), t)
    for values in states.values():
        assert np.isfinite(values[0]) and np.isnan(values[1])


def test_quasi_harmonic_copper_against_phonopy():
    """EMT's copper; phonopy fits Birch and Murnaghan's equation to the same volumes, and takes differences of temperatures."""
    surface, calculation = EnergySurface.of_calculator(EMT()), QuasiHarmonic(**SMALL, temperatures=(300.0, 600.0))
    plan = calculation.plan(surface, [bulk("Cu")])
    points = surface.points(plan.structures)
    found = plan.evaluate(points)
    n = calculation.volumes
    assert plan.relaxed == {i: i for i in range(n)}
    volumes = np.array([atoms.get_volume() for atoms in plan.structures[:n]]) / 4
    dynamics = LatticeDynamics(standard_cell(bulk("Cu", a=AT_REST)), (2, 2, 2), 0.01)
    t = np.arange(0.0, 700.0, 10.0)
    vibrations = [
        dynamics.harmonic(dynamics.force_constants(forces_of(points[n + 2 * i : n + 2 * i + 2])), t) for i in range(n)
    ]
    rows = {
        name: np.array([getattr(each, name) for each in vibrations]).T for name in vars(vibrations[0]) if name[0] != "z"
    }
    qha = QHA(
        volumes, [point.energy / 4 for point in points[:n]], t,
        J_K_MOL * rows["heat_capacity"], J_K_MOL * rows["entropy"], KJ_MOL * rows["free_energy"],
        eos="birch_murnaghan", t_max=650.0,
    )  # fmt: skip
    qha.run()
    for kelvin in (300, 600):
        i = kelvin // 10
        assert found[f"volume_{kelvin}K"] == pytest.approx(qha.volume_temperature[i], rel=1e-5)
        assert found[f"isothermal_bulk_modulus_{kelvin}K"] == pytest.approx(qha.bulk_modulus_temperature[i], rel=2e-3)
        expansion = 1e6 * qha.thermal_expansion[i]
        assert found[f"volumetric_thermal_expansion_{kelvin}K"] == pytest.approx(expansion, rel=5e-3)
    assert found["volume"].shape == plan.curves["volume"].x.shape
    assert 1.5 < found["gruneisen_parameter_300K"] < 3
