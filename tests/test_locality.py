"""Locality of forces: spreads against brute force and linear response, laws of decay, verdicts, interruption, errors, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import ase.build
import ase.io
import conftest
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from born_mayer import force_constants
from counting_oracle import LOG, answers

import gpmlp
from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.fitting.cutoff_fits import CutoffFit
from gpmlp.io.ase_atoms import from_ase, structures_from_ase
from gpmlp.learning import locality
from gpmlp.learning.force_decay import DecayLaw, fit_decay
from gpmlp.learning.locality import Locality
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.redraws import MARGIN, LocalityFloor, Redraws, Sphere, draw_spheres
from gpmlp.recipe import Recipe

EMT_RECIPE = OracleRecipe(calculator="emt", executor="inline")
CHARGES = {"Na": 0.7, "Cl": -0.7}
SALT = OracleRecipe(calculator="born_mayer:BornMayer", kwargs={"charges": CHARGES}, executor="inline")
ARGON = OracleRecipe(
    calculator="lennard-jones", kwargs={"epsilon": 0.0104, "sigma": 3.4, "rc": 40.0, "smooth": False}, executor="inline"
)


def rattled(atoms: Atoms, size: float = 0.1, seed: int = 1) -> Atoms:
    atoms.rattle(size, rng=np.random.default_rng(seed))
    return atoms


def copper(cells: int = 4) -> Atoms:
    return rattled(ase.build.bulk("Cu", a=3.6, cubic=True).repeat(cells))


def ball(crystal: Atoms, radius: float) -> Atoms:
    """All atoms of a crystal within a sphere around one of them, without a cell."""
    crystal = crystal.repeat(math.ceil(2 * radius / crystal.cell.lengths().min()) + 1)
    middle = crystal.positions[np.linalg.norm(crystal.positions - crystal.positions.mean(0), axis=1).argmin()]
    cut = crystal[np.linalg.norm(crystal.positions - middle, axis=1) < radius]
    cut.pbc, cut.cell = False, np.zeros((3, 3))
    return rattled(cut, 0.05)


def salt(radius: float = 10.0) -> Atoms:
    return ball(ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True), radius)


def measured(atoms: Atoms, oracle: OracleRecipe, folder: Path, **chosen) -> Locality:
    return gpmlp.locality(
        structures_from_ase([atoms], ["frame 0"]), oracle=oracle, folder=folder, redraws=Redraws(**chosen)
    )


# ---------------------------------------------------------------- spreads


def test_spread_is_that_of_forces_on_atoms_whose_far_neighbours_are_redrawn(tmp_path):
    """Against plain loops over copies, with distances to all images."""
    atoms = copper()
    found = measured(atoms, EMT_RECIPE, tmp_path, radii=(3.5, 5.0), draws=3, centres=2)
    spheres, radii = draw_spheres(structures_from_ase([atoms]), Redraws((3.5, 5.0), centres=2))
    images = [atoms.positions + np.array(s) @ atoms.cell.array for s in np.ndindex(3, 3, 3)]
    for floor, radius in zip(found.floors, (3.5, 5.0), strict=True):
        variances = []
        for number, sphere in enumerate(spheres):
            nearest = np.min([np.linalg.norm(im - images[13][sphere.atom], axis=1) for im in images], axis=0)
            np.testing.assert_allclose(sphere.distances, nearest, atol=1e-10)
            forces = []
            for draw in range(3):
                moved = atoms.copy()
                deviates = np.random.default_rng([0, 2, number, draw]).standard_normal((len(atoms), 3))
                moved.positions[nearest > radius] += 0.1 * deviates[nearest > radius]
                moved.calc = EMT()
                forces.append(moved.get_forces()[sphere.atom])
            variances.append(np.var(forces, axis=0, ddof=1))
        assert floor.spread == pytest.approx(np.mean(variances) ** 0.5, rel=1e-9)
        assert floor.error == pytest.approx(
            np.std(np.mean(variances, 1), ddof=1) / 2**0.5 / (2 * floor.spread), rel=1e-9
        )
        assert floor.labels == 6 and floor.species == {"Cu": floor.spread}


def test_small_redraws_of_charges_are_linear_response(tmp_path):
    """Var F = δ² Σ_j Φ_ij Φ_ijᵀ over the atoms beyond R; the tolerance is three standard errors of a variance of 3 · 2 · 29 numbers."""
    atoms = salt(8.0)
    chosen = {"radii": (4.0, 6.0), "displacement": 1e-3, "draws": 30, "centres": 2}
    found = measured(atoms, SALT, tmp_path, **chosen)
    spheres, _ = draw_spheres(structures_from_ase([atoms]), Redraws(**chosen))
    q = np.array([CHARGES[s] for s in atoms.symbols])
    for floor in found.floors:
        each = []
        for sphere in spheres:
            phi = force_constants(atoms.positions, q, sphere.atom)[sphere.distances > floor.radius]
            each.append(1e-6 * np.einsum("jab,jab->", phi, phi) / 3)
        assert floor.spread == pytest.approx(np.mean(each) ** 0.5, rel=3 / (2 * 174) ** 0.5)


def test_a_law_is_read_from_sums_over_the_atoms_that_were_redrawn():
    """Exponents and lengths that spreads were made with come back, whatever the shape of the structure."""
    atoms = salt(9.0)
    spheres = [Sphere.around(structures_from_ase([atoms]), i) for i in (0, 40, 120)]

    def floors(phi):
        out = []
        for radius in (3.5, 4.5, 5.5, 6.5, 8.0):
            spread = np.mean([(phi(s.distances[s.distances > radius]) ** 2).sum() for s in spheres]) ** 0.5
            out.append(LocalityFloor(radius, 100 * spread, 0.0, {}, 8))
        return out

    for exponent, kind in ((3.0, "Coulomb"), (8.0, "r^-6")):
        law = fit_decay(floors(lambda r, n=exponent: r**-n), spheres)
        assert law.kind == kind and law.exponent == pytest.approx(exponent, abs=1e-3)
    law = fit_decay(floors(lambda r: 50 * np.exp(-r / 0.45)), spheres)
    assert law.kind == "exponential" and law.length == pytest.approx(0.45, abs=1e-3)
    nothing = [dataclasses.replace(floor, spread=0.0) for floor in floors(lambda r: r)]
    assert fit_decay(nothing, spheres).kind == "none"


def test_radii_that_redraw_the_same_atoms_are_one_point():
    """The spreads of a dimer are equal beyond all radii, and those of this trimer beyond two of three."""

    def law(positions, spreads):
        sphere = Sphere.around(structures_from_ase([Atoms(f"Cu{len(positions)}", positions)]), 0)
        floors = [LocalityFloor(r, s, 0.0, {}, 8) for r, s in zip((2.0, 3.0, 4.0, 5.0), spreads, strict=True)]
        return fit_decay(floors, [sphere])

    assert law([[0, 0, 0], [6.0, 0, 0]], (0.1, 0.1, 0.1, 0.1)).kind == "none"
    assert law([[0, 0, 0], [2.5, 0, 0], [6.0, 0, 0]], (0.3, 1e-4, 1e-4, 1e-4)).kind == "exponential"
    assert law([[0, 0, 0], [2.5, 0, 0], [6.0, 0, 0]], (1e-7, 0.1, 0.1, 0.1)).kind == "none"


@pytest.mark.parametrize(
    "law",
    [DecayLaw("Coulomb", 3.0), DecayLaw("r^-6", 8.0), DecayLaw("exponential", 12.0, 0.5)],
    ids=lambda law: law.kind,
)
def test_a_law_reaches_where_it_says(law):
    assert law.ratio(4.0, law.reach(4.0, 0.2)) == pytest.approx(0.2)
    assert law.ratio(4.0, 4.0) == 1.0


# ---------------------------------------------------------------- kinds of matter


def test_a_metal_is_short_sighted(tmp_path):
    """Copper: 16, 2.2, .5, .04 meV/A in the prototype, from one central atom and eight draws; spreads of two atoms scatter by a half."""
    found = measured(copper(5), EMT_RECIPE, tmp_path, radii=(3.5, 4.5, 5.5, 6.5), centres=2, draws=4)
    assert found.law.kind == "exponential" and found.law.length < 0.6
    np.testing.assert_allclose([1e3 * floor.spread for floor in found.floors], [16, 2.2, 0.5, 0.04], rtol=0.7)
    assert dataclasses.replace(found, cutoff=5.0, force_error=0.01, error_of="a model").verdict == "fine"


def test_ions_are_not(tmp_path):
    found = measured(salt(), SALT, tmp_path, radii=(3.5, 4.5, 5.5, 7.0), centres=4, draws=6)
    assert found.law.kind == "Coulomb" and found.law.exponent == pytest.approx(3.0, abs=0.8)
    assert set(found.floors[0].species) == {"Na", "Cl"}
    judged = dataclasses.replace(found, cutoff=5.0, force_error=0.04, error_of="a model")
    assert judged.verdict == "charges" and "long_range: {charges: auto}" in judged.sentence


def test_argon_has_dispersion(tmp_path):
    found = measured(
        ball(ase.build.bulk("Ar", cubic=True), 13.0), ARGON, tmp_path, radii=(5.5, 6.5, 8.0), centres=3, draws=4
    )
    assert found.law.kind == "r^-6" and found.law.exponent == pytest.approx(8.0, abs=1.5)
    judged = dataclasses.replace(found, cutoff=5.5, force_error=1.2 * found.floors[0].spread, error_of="a model")
    assert judged.verdict == "dispersion" and "dispersion" in judged.sentence


def test_a_molecule_ends_somewhere(tmp_path):
    """A cutoff that sees all of it is enough."""
    pytest.importorskip("tblite.ase", reason="tblite cannot be imported (pip install tblite)", exc_type=ImportError)
    oracle = OracleRecipe(calculator="tblite", executor="inline")
    found = measured(ase.build.molecule("CH3CH2OH"), oracle, tmp_path, centres=3, draws=3)
    assert found.floors[0].spread > found.floors[-1].spread > 0
    assert 3.0 < found.whole < 5.0 and found.floors[-1].radius < found.whole
    assert found.law.kind in ("none", "exponential")  # bonds fall off as slowly as charges
    judged = dataclasses.replace(found, cutoff=found.floors[0].radius, force_error=0.02, error_of="a model")
    assert judged.verdict == "longer cutoff"


def test_small_fits_are_flat_where_the_cutoff_is_long_enough(cells):
    structures, targets = from_ase(cells)
    found = gpmlp.locality(
        structures, targets, recipe=Recipe.model_validate({"descriptor": {"n_max": 4, "l_max": 3}}),
        redraws=Redraws((2.6, 3.6, 4.6)),
    )  # fmt: skip
    assert not found.floors and [fit.cutoff for fit in found.fits] == sorted({2.6, 3.6, 4.6, found.cutoff})
    assert found.fits[0].noise > 2 * found.fits[-1].noise  # bonds alone do not explain copper
    assert found.verdict in ("fine", "longer cutoff")


@pytest.fixture(scope="module")
def cells() -> list[Atoms]:
    """24 labelled cells of copper, as small fits need."""
    return [conftest.copper(seed, 1 + seed % 2) for seed in range(24)]


# ---------------------------------------------------------------- verdicts


def judged(
    law: DecayLaw, spreads: tuple[float, ...], cutoff: float = 4.5, error: float = 0.04, whole: float = math.inf
) -> Locality:
    floors = tuple(LocalityFloor(r, s, 0.0, {}, 8) for r, s in zip((3.5, 4.5, 5.5), spreads, strict=True))
    return Locality(floors, (), law, cutoff, error, "a model", whole, Redraws())


@pytest.mark.parametrize(
    ("law", "spreads", "verdict", "says"),
    [
        (DecayLaw("exponential", 12.0, 0.5), (0.016, 0.0022, 0.0005), "fine", "Fine as it is: atoms beyond the cutoff of 4.5 A"),
        (DecayLaw("exponential", 12.0, 0.5), (0.3, 0.04, 0.005), "longer cutoff", "a cutoff of 5.1 A would make that 30 %"),
        (DecayLaw("none"), (0.3, 0.04, 0.0), "longer cutoff", "a cutoff of 5.5 A would"),
        (DecayLaw("Coulomb", 3.1), (0.07, 0.04, 0.03), "charges", "as between charges"),
        (DecayLaw("r^-6", 8.0), (0.07, 0.02, 0.01), "dispersion", "a cutoff of 4.9 A would make that"),
        (DecayLaw("Coulomb", 3.1), (0.01, 0.006, 0.004), "fine", "15 % of the force error (40 meV/A, a model)"),
    ],
)  # fmt: skip
def test_verdicts(law, spreads, verdict, says):
    found = judged(law, spreads)
    assert found.verdict == verdict and says in found.sentence


def test_one_radius_tells_no_law():
    found = dataclasses.replace(
        judged(DecayLaw("none"), (0.3, 0.04, 0.0)), floors=(LocalityFloor(4.5, 0.04, 0.0, {}, 8),)
    )
    assert found.verdict == "longer cutoff" and "longer radii would say which" in found.sentence


def test_between_and_beyond_radii():
    law = DecayLaw("exponential", 12.0, 0.5)
    assert judged(law, (0.16, 0.04, 0.01), cutoff=4.0).floor == pytest.approx(0.08)
    assert judged(law, (0.16, 0.04, 0.01), cutoff=6.0).floor == pytest.approx(0.01 * math.exp(-1))
    assert judged(law, (0.16, 0.04, 0.01), cutoff=4.5).floor == 0.04


def test_without_an_error_there_is_no_verdict():
    found = judged(DecayLaw("Coulomb", 3.0), (0.07, 0.04, 0.03), error=math.nan, cutoff=math.nan)
    assert found.verdict == "unknown" and "With a model, or labels" in found.sentence
    assert found.as_dict()["force_error_meV_per_A"] is None


@pytest.mark.parametrize(
    ("noises", "cutoff", "verdict", "says"),
    [
        ((80.0, 20.0, 10.0, 9.5), 5.0, "fine", "are flat from 5 A on (10 and 10 meV/A"),
        ((80.0, 20.0, 10.0, 9.5), 4.0, "longer cutoff", "take a longer cutoff than 4 A"),
        ((80.0, 40.0, 20.0, 10.0), 5.0, "longer cutoff", "still fall at the longest cutoff, 6 A"),
    ],
)
def test_verdicts_from_small_fits(noises, cutoff, verdict, says):
    fits = tuple(CutoffFit(c, 1e-3 * n, 1e-3 * n) for c, n in zip((3.0, 4.0, 5.0, 6.0), noises, strict=True))
    found = Locality((), fits, DecayLaw("none"), cutoff, math.nan, "", math.inf, Redraws())
    assert found.verdict == verdict and says in found.sentence


def test_noise_alone_is_not_enough():
    """A fit that takes little for noise, and predicts badly, has too short a cutoff."""
    fits = tuple(CutoffFit(c, n, e) for c, n, e in zip((3.6, 4.2, 5.0), (1.8, 1.6, 2.6), (8.3, 6.2, 5.7), strict=True))
    found = Locality((), fits, DecayLaw("none"), 3.6, math.nan, "", math.inf, Redraws())
    assert found.verdict == "longer cutoff" and "flat from 4.2 A" in found.sentence


def test_a_model_is_judged_by_its_error(potential, small_set, tmp_path):
    """By labels where there are some, else by its own error bars; its cutoff is one of the radii."""
    structures = structures_from_ase([copper()])
    chosen = Redraws(centres=1, draws=2)
    found = gpmlp.locality(structures, None, EMT_RECIPE, potential, tmp_path / "a", chosen)
    assert found.cutoff == 4.0 and 4.0 in [floor.radius for floor in found.floors] and "error bars" in found.error_of
    variance = potential(structures, variance="forces").forces_variance.total
    assert found.force_error == pytest.approx(float(variance.mean().sqrt()))
    atoms = copper()
    atoms.calc = EMT()
    forces = torch.from_numpy(atoms.get_forces())
    targets = dataclasses.replace(Targets.unlabelled(structures), forces=forces)
    found = gpmlp.locality(structures, targets, EMT_RECIPE, potential, tmp_path / "a", chosen)
    error = (potential(structures).forces - forces).square().mean().sqrt()
    assert found.force_error == pytest.approx(float(error)) and "labels" in found.error_of


# ---------------------------------------------------------------- room, errors, interruption


def test_cells_that_are_too_small_are_named_or_repeated(tmp_path):
    small = copper(2)
    with pytest.raises(
        UserError,
        match=r"too small for R = 4\.5 A: that of frame 0, .* is 7\.2 A across.*R is at most 2\.60 A.*--repeat",
    ):
        measured(small, EMT_RECIPE, tmp_path, radii=(3.5, 4.5))
    found = measured(small, EMT_RECIPE, tmp_path, radii=(3.5, 4.5), draws=2, centres=1, repeat=True)
    assert len(found.floors) == 2
    (frame,) = {len(frame) for frame in ase.io.read(tmp_path / "labels.xyz", ":")}
    assert frame == 32 * 8  # 7.2 A twice in each direction


def test_a_slab_needs_room_along_its_periodic_axes_only():
    slab = ase.build.fcc111("Cu", (6, 6, 3), vacuum=4.0)
    sphere = Sphere.around(structures_from_ase([slab]), 40)
    height = slab.cell.lengths()[1] * math.sin(math.pi / 3)
    assert sphere.room == pytest.approx(min(height / 2 - MARGIN, sphere.distances.max()))


def test_a_molecule_without_far_atoms_is_named(tmp_path):
    with pytest.raises(UserError, match=r"No atom lies beyond R = 9 A .* in frame 0, .* the farthest is at 1\.5"):
        measured(ase.build.molecule("H2O"), EMT_RECIPE, tmp_path, radii=(9.0,))


def test_a_failure_of_the_oracle_names_the_structure(tmp_path):
    oracle = OracleRecipe(
        calculator="fake_oracles:Fake", executor="inline", retries=0, at_most_failures=0,
        kwargs={"log": str(tmp_path / "log"), "behaviour": ["well", "well", "unconverged"]},
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"frame 0, all beyond 3\.5 A of Cu atom \d+ redrawn, draw 1: .*SCF not converged"
    ):
        measured(copper(), oracle, tmp_path / "out", radii=(3.5,), centres=1)


def test_a_few_failures_are_left_out(tmp_path):
    oracle = OracleRecipe(
        calculator="fake_oracles:Fake", executor="inline", retries=0,
        kwargs={"log": str(tmp_path / "log"), "behaviour": ["well", "well", "unconverged", "well"]},
    )  # fmt: skip
    found = measured(copper(), oracle, tmp_path / "out", radii=(3.5,), centres=1, draws=4)
    assert found.floors[0].labels == 3


def test_an_oracle_that_contradicts_itself_ends_it(tmp_path):
    kwargs = {"log": str(tmp_path / "log"), "behaviour": ["contradiction"]}
    oracle = OracleRecipe(calculator="fake_oracles:Fake", executor="inline", retries=0, kwargs=kwargs)
    with pytest.raises(UserError, match="draw 0: the oracle contradicts itself"):
        measured(copper(), oracle, tmp_path / "out", radii=(3.5,), centres=1)


def test_neither_labels_nor_an_oracle(tmp_path):
    with pytest.raises(UserError, match="no forces that small fits could learn"):
        gpmlp.locality(structures_from_ase([copper()]), folder=tmp_path)


@pytest.mark.parametrize("wrong", [{"radii": (-1.0,)}, {"draws": 1}, {"centres": 0}, {"displacement": 0.0}])
def test_choices_that_make_no_sense(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)) if "centres" not in wrong else "central atoms"):
        Redraws(**wrong)


def test_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    oracle = OracleRecipe(calculator="counting_oracle:Counting", executor="inline", check_every=0)
    whole = measured(copper(), oracle, tmp_path / "whole", radii=(3.5, 4.5), centres=1, draws=3)
    assert len(answers(tmp_path / "log")) == 6

    def stop(stage, done, total, note):
        if done == 4:
            raise KeyboardInterrupt

    structures = structures_from_ase([copper()], ["frame 0"])
    about = {"oracle": oracle, "folder": tmp_path / "out", "redraws": Redraws((3.5, 4.5), centres=1, draws=3)}
    with pytest.raises(KeyboardInterrupt):
        gpmlp.locality(structures, **about, progress=stop)
    again = gpmlp.locality(structures, **about)
    assert again == whole and sorted(answers(tmp_path / "log")) == sorted(2 * answers(tmp_path / "log")[:6])


def test_the_same_from_several_workers(tmp_path):
    """And a folder that another process works in is left alone."""
    chosen = {"radii": (3.5, 4.5), "centres": 1, "draws": 2}
    alone = measured(copper(), EMT_RECIPE, tmp_path / "a", **chosen)
    together = measured(copper(), OracleRecipe(calculator="emt", workers=2), tmp_path / "b", **chosen)
    assert alone == together


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A structure, the recipe of an oracle, and one of a learning run with the same."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("cu.xyz", copper())
    Path("emt.yaml").write_text("{calculator: emt, executor: inline}\n")
    Path("learn.yaml").write_text(
        "start: cu.xyz\noracle: {calculator: emt, executor: inline}\ndynamics: {temperature_K: 300}\n"
    )
    return tmp_path


SMALL = ["--radii", "3.5,4.5", "--draws", "2", "--centres", "1"]


@pytest.mark.parametrize("recipe", ["emt.yaml", "learn.yaml"])
def test_the_command_with_an_oracle(files, capsys, recipe):
    assert main.main(["locality", "cu.xyz", "--oracle", recipe, *SMALL, "-o", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "beyond R" in said and "wrote out/locality.json" in said
    content = json.loads(Path("out/locality.json").read_text())
    assert [one["radius_A"] for one in content["floors"]] == [3.5, 4.5] and content["verdict"] == "unknown"
    assert content["floors"][0]["spread_meV_per_A"] > content["floors"][1]["spread_meV_per_A"] > 0
    assert content["displacement_A"] == 0.1 and content["decay"]["kind"] == "exponential"
    assert Path("out/locality.svg").read_text().startswith("<?xml") and Path("out/locality.png").stat().st_size > 1000


def test_the_command_without_one(files, cells, capsys):
    ase.io.write("train.xyz", cells)
    Path("small.yaml").write_text("{descriptor: {n_max: 3, l_max: 2}}\n")
    assert main.main(["locality", "train.xyz", "--radii", "3,4", "--recipe", "small.yaml", "-o", "out"]) == 0
    assert "held-out RMSE" in capsys.readouterr().out.replace("\n", " ")
    content = json.loads(Path("out/locality.json").read_text())
    assert content["floors"] == [] and [one["cutoff_A"] for one in content["fits"]][:2] == [3.0, 4.0]
    assert all(one["noise_meV_per_A"] > 0 and one["force_rmse_meV_per_A"] > 0 for one in content["fits"])
    assert content["verdict"] in ("fine", "longer cutoff") and content["cutoff_A"] > 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["cu.xyz", "--oracle", "emt.yaml", "--radii", "9"],
            "The cells are too small for R = 9 A: that of cu.xyz frame 0",
        ),
        (["cu.xyz", "--oracle", "emt.yaml", "--radii", "a,b"], "--radii a,b: must be numbers"),
        (["cu.xyz", "--oracle", "emt.yaml", "--set", "worker=2"], "Perhaps you meant 'workers'"),
        (["cu.xyz", "--set", "workers=2"], "--set is of the oracle"),
        (["cu.xyz", "--oracle", "none.yaml"], "none.yaml"),
        (["cu.xyz", "--oracle", "emt.yaml", "-o", "cu.xyz"], "is a file; give the name of a folder"),
        (["cu.xyz"], "no forces that small fits could learn"),
    ],
)
def test_wrong_arguments(files, capsys, arguments, says):
    assert main.main(["locality", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_an_interruption_says_how_to_go_on(files, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(locality, "locality", interrupted)
    monkeypatch.setattr(sys, "argv", ["gpmlp", "locality", "cu.xyz", "--oracle", "emt.yaml"])
    assert main.main(["locality", "cu.xyz", "--oracle", "emt.yaml"]) == 130
    assert "labels are kept in locality, go on with: gpmlp locality cu.xyz --oracle emt.yaml" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not os.path.exists("locality/locality.json")
