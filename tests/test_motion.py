"""Radial distributions and mean-square displacements among properties: the numbers of `transport`, of each pair of elements."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core.errors import UserError
from gpmlp.core.radial_distribution import radial_distribution
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.properties.lattice import LatticeConstants
from gpmlp.properties.motion import MeanSquareDisplacements, RadialDistributions
from gpmlp.properties.static_averages import BINS, CUTOFF, StaticFrames
from gpmlp.properties.transport import TransportSettings, transport

SHORT = {"temperature_K": 100.0, "equilibrate_ps": 0.2, "segment_ps": 0.5, "most_atoms": 32}


def gold_in_copper(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True, a=3.8) * (2, 1, 1)
    atoms.symbols[[0, 3, 5]] = "Au"
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_radial_distributions_of_pairs_are_means_over_frames():
    """Of two temperatures with two trajectories each, against one pair of one frame at a time."""
    settings = SimpleNamespace(temperatures_K=(300.0, 600.0), replicas=2, copies_K=np.array([300.0, 300, 600, 600]))
    replicas = SimpleNamespace(species=[29, 79], n=8, volume=109.744, settings=settings)
    static, seen = StaticFrames(("rdf",), replicas, None), []
    for k in range(10):
        frames = [gold_in_copper(4 * k + copy) for copy in range(4)]
        replicas.energies, replicas.stresses = np.random.default_rng(k).normal(size=(1, 4)), np.zeros((1, 4, 3, 3))
        static.add(structures_from_ase(frames))
        seen.append(frames)
    values, curves, _ = static.averages({})
    names = [f"radial_distribution_{pair}_{t}K" for t in (300, 600) for pair in ("Cu_Cu", "Cu_Au", "Au_Au")]
    assert not values and [curve.name for curve in curves] == names
    pairs = [(29, 29), (29, 79), (79, 79)]
    for k, curve in enumerate(curves):
        here = structures_from_ase([frames[copy] for frames in seen for copy in ((0, 1) if k < 3 else (2, 3))])
        np.testing.assert_allclose(curve.value, radial_distribution(here, CUTOFF, BINS, pairs[k % 3])[1], atol=1e-12)
        assert (curve.sigma >= 0).all() and curve.sigma.max() > 0
    again = StaticFrames(("rdf",), replicas, None)
    again.restore(static.state())
    assert np.array_equal(again.averages({})[1][4].value, curves[4].value)


def test_a_cold_crystal_has_twelve_neighbours(potential):
    start = bulk("Cu", cubic=True)
    found = gpmlp.compute_properties(
        potential, start, [RadialDistributions(**SHORT, length_ps=5.0)], samples=4
    )  # more than eight frames
    (curve,) = found.curves
    assert curve.name == "radial_distribution_Cu_Cu_100K" and curve.unit == "" and curve.x_unit == "A"
    shells = 4 * math.pi / 3 * np.diff(np.linspace(0, CUTOFF, BINS + 1) ** 3)
    nearest = (curve.value * shells)[curve.x < 3.1].sum() * 4 / start.get_volume()
    assert nearest == pytest.approx(12, abs=0.3)
    energy, pressure = found["potential_energy_100K"], found["pressure_100K"]
    for value in (energy, pressure):
        assert value.parts["sampled"] > 0 and value.parts["statistical"] > 0 and value.calculation == "rdf"
        assert value.sigma == pytest.approx(math.hypot(*value.parts.values()))
    atoms = found.structures[0]
    assert energy.structures == (atoms.info["name"],) and len(atoms) == 32
    # equipartition: half of 3 kT above the crystal at rest, within what anharmonic terms and few frames leave
    rest = float(potential(structures_from_ase([start])).energies) / 4
    assert energy.value - rest == pytest.approx(1.5 * 8.617e-5 * 100, rel=0.3)


def test_displacements_are_those_of_transport(potential):
    chosen = MeanSquareDisplacements(**SHORT, length_ps=1.0, samples=3)
    found = gpmlp.compute_properties(potential, bulk("Cu", cubic=True), [chosen], samples=8, seed=5)
    settings = TransportSettings(
        (100.0,), samples=3, replicas=1, length_ps=1.0, segment_ps=0.5, equilibrate_ps=0.2, seed=5
    )
    own = transport(potential, chosen.start(bulk("Cu", cubic=True)), settings)
    assert [value.value for value in found.values] == [value.value for value in own.values]
    (displacement,) = (curve for curve in found.curves if curve.name == "mean_square_displacement_Cu_100K")
    assert displacement.value[0] == 0 and 0 < displacement.value[-1] < 0.1 and displacement.sigma[-1] > 0
    value = found["diffusion_coefficient_Cu_100K"]
    assert value.samples == 3 and {"sampled", "statistical"} == value.parts.keys() and value.calculation == "msd"
    assert chosen.value_names([bulk("Cu")]) == ["diffusion_coefficient_Cu_100K"]


def test_with_others_and_without_variances(potential, small_set, small_recipe):
    """Beside values of structures at rest, of two structures; intervals of a model without variances are statistical alone."""
    two = [bulk("Cu", cubic=True), bulk("Cu", "bcc", a=2.9, cubic=True)]
    two[1].info["name"] = "bcc"
    short = SHORT | {"length_ps": 1.0}
    found = gpmlp.compute_properties(potential, two, [MeanSquareDisplacements(**short), LatticeConstants()], samples=4)
    names = {value.name for value in found.values}
    assert names >= {"Cu4.diffusion_coefficient_Cu_100K", "bcc.diffusion_coefficient_Cu_100K", "Cu4.lattice_constant_a"}
    bare = gpmlp.fit(*small_set, small_recipe.model_copy(update={"variance": False}))[0]
    (value,) = gpmlp.compute_properties(bare, two[0], [MeanSquareDisplacements(**short)]).values
    assert "sampled" not in value.parts and value.parts["statistical"] > 0


def test_what_cannot_move_is_refused(potential):
    held = bulk("Cu", cubic=True)
    held.set_constraint(FixAtoms([0]))
    for atoms, said in ((molecule("H2"), "not periodic"), (held, "has constraints")):
        assert said in RadialDistributions().refusal([atoms])
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    with pytest.raises(UserError, match="msd: Cu4 is not periodic in three directions"):
        gpmlp.compute_properties(potential, slab, ["msd"])


def test_too_few_samples_and_too_short_trajectories_are_refused(potential):
    atoms = bulk("Cu", cubic=True)
    for chosen in (RadialDistributions(), MeanSquareDisplacements()):
        with pytest.raises(UserError, match=f"{chosen.name}: 2 samples are too few"):
            gpmlp.compute_properties(potential, atoms, [chosen], samples=2)
    with pytest.raises(ValueError, match="length_ps .0.8. must be at least two of segment_ps .2."):
        RadialDistributions(length_ps=0.8)


def test_command(model_file, tmp_path, capsys):
    ase.io.write(tmp_path / "cu.xyz", bulk("Cu", cubic=True))
    command = ["properties", str(model_file), str(tmp_path / "cu.xyz"), "-o", str(tmp_path / "out"), "--samples", "4"]
    options = [f"{name}.{key}={value}" for name in ("rdf", "msd") for key, value in (SHORT | {"length_ps": 5}).items()]
    options += ["msd.length_ps=1", "msd.samples=3"]
    words = [word for option in options for word in ("--set", option)]
    assert main([*command, "--only", "rdf,msd", *words]) == 0
    said = capsys.readouterr()
    values = {value["name"]: value for value in json.loads((tmp_path / "out/properties.json").read_text())}
    assert values.keys() == {"potential_energy_100K", "pressure_100K", "diffusion_coefficient_Cu_100K"}
    assert all(value["parts"]["statistical"] > 0 and value["sigma"] > 0 for value in values.values())
    curves = {curve["name"] for curve in json.loads((tmp_path / "out/curves.json").read_text())}
    assert curves >= {"radial_distribution_Cu_Cu_100K", "mean_square_displacement_Cu_100K"}
    assert main([*command, "--only", "rdf", "--set", "rdf.length_ps=0.8"]) == 2
    assert "must be at least two of segment_ps (2)" in capsys.readouterr().err
    page = (tmp_path / "out/properties.html").read_text()
    assert "radial distribution" in page.lower() and "diffusion_coefficient_Cu_100K" in said.out
