"""Dispersion tails: against sums over images and derivatives, D3 against its library, in fits, files and engines, and how often labels hold
them."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase.units import Bohr, Hartree
from torch import Tensor

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core import free_atoms
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.kim import export_kim
from gpmlp.fitting import tail_strength
from gpmlp.fitting.online import OnlineFit
from gpmlp.fitting.tail_strength import TailEvidence
from gpmlp.io import archive, export
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.potential import dispersion
from gpmlp.potential.baselines import baseline_from_state
from gpmlp.potential.dispersion import D3Dispersion, R6Tail
from gpmlp.potential.stepper import Stepper
from gpmlp.recipe import Recipe

C6 = {(6, 6): 30.0, (6, 8): 20.0, (8, 8): 15.0}
TAIL = R6Tail(C6, 2.0, 3.5, 9.0)
SMALL = {
    "descriptor": {"n_max": 4, "l_max": 3, "cutoff": 4.6},
    "inducing": {"n": 20, "gradients": 1},
    "baseline": {"zbl": False},
    "calibration": False,
    "novelty": False,
}


def cell_of(kind: str, seed: int = 0) -> Structures:
    """Carbon and oxygen at random: in a triclinic cell, a slab, a chain, or alone."""
    rng = np.random.default_rng(seed)
    cell = np.array([[4.1, 0.3, 0.0], [0.5, 4.6, 0.2], [-0.4, 0.7, 5.2]])
    grid = np.array(list(itertools.product((0.1, 0.6), repeat=3)))[:5]
    atoms = ase.Atoms("C2O2C", positions=grid @ cell + 0.2 * rng.standard_normal((5, 3)), cell=cell)
    atoms.pbc = {"crystal": (1, 1, 1), "slab": (1, 1, 0), "chain": (0, 0, 1), "cluster": (0, 0, 0)}[kind]
    return structures_from_ase([atoms])


KINDS = ("crystal", "slab", "chain", "cluster")


def smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return 6 * x**5 - 15 * x**4 + 10 * x**3


def summed(tail: R6Tail, positions: Tensor, cell: Tensor, structure: Structures) -> Tensor:
    """The energy by loops over atoms and images."""
    reach = [range(-6, 7) if p else (0,) for p in structure.periodic[0].tolist()]
    images = torch.tensor(list(itertools.product(*reach)), dtype=torch.float64) @ cell
    species, energy = structure.species.tolist(), positions.new_zeros(())
    for i, j in itertools.product(range(len(species)), repeat=2):
        vectors = positions[j] - positions[i] + images
        if i == j:
            vectors = vectors[(images != 0).any(1)]
        r = vectors.norm(dim=1)
        switch = smoothstep((r - tail.begin) / (tail.full - tail.begin)) * smoothstep((tail.outer - r) / 2.0)
        energy = (
            energy - 0.5 * (tail.c6[min(species[i], species[j]), max(species[i], species[j])] * switch / r**6).sum()
        )
    return energy


@pytest.mark.parametrize("kind", KINDS)
def test_r6_is_the_sum_over_images(kind):
    structure = cell_of(kind)
    positions = structure.positions.clone().requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    deformed = torch.eye(3, dtype=torch.float64) + 0.5 * (strain + strain.T)
    energy = summed(TAIL, positions @ deformed, structure.cells[0] @ deformed, structure)
    on_atoms, by_strain = torch.autograd.grad(energy, (positions, strain))
    found = TAIL(structure)
    assert float(found.energies) == pytest.approx(energy.item(), abs=1e-12)
    assert float(found.atom_energies.sum()) == pytest.approx(energy.item(), abs=1e-12)
    torch.testing.assert_close(found.forces, -on_atoms, atol=1e-12, rtol=0)
    if kind == "cluster":
        assert found.stresses.isnan().all()
    else:
        torch.testing.assert_close(found.stresses[0], by_strain / structure.volumes[0], atol=1e-13, rtol=0)


def differences(term, structure: Structures, step: float) -> tuple[Tensor, Tensor]:
    """Forces on all atoms and stress of one structure, by central differences of the fourth order."""

    def slope(move) -> float:
        e = {k: float(term(structure.with_positions(*move(k * step))).energies) for k in (-2, -1, 1, 2)}
        return (8 * (e[1] - e[-1]) - (e[2] - e[-2])) / (12 * step)

    forces = torch.zeros_like(structure.positions)
    for i, c in itertools.product(*map(range, forces.shape)):
        unit = torch.zeros_like(forces)
        unit[i, c] = 1.0
        forces[i, c] = -slope(lambda h, unit=unit: (structure.positions + h * unit, structure.cells))
    stress = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        strain = torch.zeros_like(stress)
        strain[a, b] += 0.5
        strain[b, a] += 0.5

        def deformed(h, strain=strain):
            return structure.positions @ (torch.eye(3) + h * strain), structure.cells @ (torch.eye(3) + h * strain)

        stress[a, b] = slope(deformed) / float(structure.volumes[0])
    return forces, stress


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["r6", "d3"])
def test_forces_and_stress_are_derivatives(name, kind):
    if name == "d3":
        pytest.importorskip("dftd3")
    term, structure = TAIL if name == "r6" else D3Dispersion("pbe"), cell_of(kind, 1)
    forces, stress = differences(term, structure, 1e-3)
    found = term(structure)
    # in crystals dftd3 counts neighbours by a function that is 5e-7 where it ends, at 40 Bohr: its energy has steps
    atol = 1e-5 if name == "d3" and kind in ("crystal", "slab") else 1e-8
    torch.testing.assert_close(found.forces, forces, atol=atol, rtol=0)
    if kind != "cluster":
        torch.testing.assert_close(found.stresses[0], stress, atol=min(atol, 2e-6), rtol=0)


def test_the_tail_is_zero_at_both_ends_with_two_derivatives():
    for end in (TAIL.begin, TAIL.outer):
        for side in (-1, 1):
            r = torch.tensor([end + side * 1e-4], dtype=torch.float64)
            energy, slope = TAIL.of_pair(r, 100.0)
            assert abs(float(energy)) < 1e-10 and abs(float(slope)) < 1e-6
    energy, _ = TAIL.of_pair(torch.tensor([5.0], dtype=torch.float64), 100.0)
    assert float(energy) == pytest.approx(-100.0 / 5.0**6, rel=1e-14)


def test_many_structures_and_chunks_give_the_same(monkeypatch):
    several = Structures.concatenate([cell_of(kind, seed) for seed, kind in enumerate(KINDS)])
    one_by_one = [TAIL(several.select([i])) for i in range(len(several))]
    for atoms in (1, 10, 1000):
        monkeypatch.setattr(dispersion, "TOGETHER", atoms)
        found = TAIL(several)
        torch.testing.assert_close(found.forces, torch.cat([p.forces for p in one_by_one]), atol=1e-15, rtol=0)
        torch.testing.assert_close(found.energies, torch.cat([p.energies for p in one_by_one]), atol=1e-15, rtol=0)


def test_coefficients_of_free_atoms():
    """Argon and hydrogen as tabulated; unlike pairs by the combination rule, whose limit for equal ones is the table."""
    assert free_atoms.pair_c6("Ar", "Ar") == pytest.approx(64.2 * Hartree * Bohr**6)
    (a, b), both = (free_atoms.pair_c6(x, x) for x in ("H", "C")), free_atoms.pair_c6("C", "H")
    assert both == free_atoms.pair_c6("H", "C") and both == pytest.approx(2 * a * b / (12 / 4.5 * a + 4.5 / 12 * b))
    with pytest.raises(UserError, match="no free-atom C6 of U.*{U-U: 50.0}"):
        free_atoms.pair_c6("U", "H")


# ---------------------------------------------------------------- D3


@pytest.mark.parametrize("damping", ["bj", "zero", "bjm", "zerom", "op"])
@pytest.mark.parametrize("kind", KINDS)
def test_d3_is_that_of_its_library(kind, damping):
    pytest.importorskip("dftd3")
    from dftd3.ase import DFTD3

    structure = cell_of(kind, 2)
    (atoms,) = to_ase(structure)
    if kind in ("slab", "chain"):  # taken into the cell by the library
        atoms.set_cell(np.where(atoms.pbc[:, None], atoms.cell.array, 40 * np.eye(3)))
        atoms.positions += 15 * ~atoms.pbc
    atoms.calc = DFTD3(
        method="pbe",
        damping="d3" + damping,
        realspace_cutoff={key: value * Bohr for key, value in dispersion.D3_REACH.items()},
    )
    found = D3Dispersion("pbe", damping)(structure)
    # the calculator has the three-body term where no parameters are changed
    with_atm = D3Dispersion("pbe", damping, True)(structure)
    theirs = atoms.get_potential_energy()
    mine = min((found, with_atm), key=lambda p: abs(float(p.energies) - theirs))
    assert float(mine.energies) == pytest.approx(theirs, abs=1e-7)
    np.testing.assert_allclose(mine.forces.numpy(), atoms.get_forces(), atol=1e-7)
    if kind != "cluster":
        scale = atoms.get_volume() / float(structure.volumes[0])
        np.testing.assert_allclose(mine.stresses[0].numpy(), atoms.get_stress(voigt=False) * scale, atol=1e-8)
    assert abs(float(found.energies - with_atm.energies)) > 1e-6


def test_d3_that_cannot_be(monkeypatch):
    pytest.importorskip("dftd3")
    with pytest.raises(UserError, match="no parameters of the functional 'no-such'"):
        D3Dispersion.asked_for("no-such", "bj", False)
    monkeypatch.setattr(dispersion.metadata, "version", lambda name: "0.1")
    state = D3Dispersion("pbe", "bj", False, {"dftd3": "1.7.0"}).state()
    with pytest.warns(DataWarning, match="fitted with dftd3 1.7.0; here is 0.1"):
        baseline_from_state(state)


# ---------------------------------------------------------------- in fits


def labelled(structures: Structures, *terms) -> Targets:
    nothing, found = vars(Targets.unlabelled(structures)), [term(structures) for term in terms]
    names = ("energies", "forces", "stresses")
    return Targets(**nothing | {name: sum(getattr(p, name) for p in found) for name in names})


def argon(n: int = 14) -> Structures:
    rng, out = np.random.default_rng(0), []
    for seed in range(n):
        cell = ase.build.bulk("Ar", "fcc", 5.26 * (0.94 + 0.12 * rng.random()), cubic=True)
        cell.rattle(0.15, seed=seed)
        out.append(cell)
    for seed in range(3):
        slab = ase.build.fcc111("Ar", (1, 2, 4), a=5.26, vacuum=9.0, orthogonal=True, periodic=True)
        slab.rattle(0.1, seed=seed)
        out.append(slab)
    return structures_from_ase(out)


class Repulsion(R6Tail):
    """Something else that a local model can learn: within 4.3 A."""

    def of_pair(self, r, c6):
        x = (4.3 - r).clamp(min=0)
        return 0.05 * x**4, -0.2 * x**3


TRUE = R6Tail({(18, 18): 64.0}, 3.22, 4.37, 25.0)
NEAR = Repulsion({(18, 18): 1.0}, 3.22, 4.37, 6.5)


def recipe_of(**r6) -> Recipe:
    isolated = {"baseline": {"zbl": False, "isolated_atoms": {"Ar": 0.0}}}
    return Recipe.model_validate({**SMALL, **isolated, "long_range": {"dispersion": {"r6": {"outer": 25.0, **r6}}}})


@pytest.fixture(scope="module")
def with_tail():
    structures = argon()
    return gpmlp.fit(structures, labelled(structures, TRUE, NEAR), recipe_of(c6={"Ar-Ar": 64.0}))


def two_layers(gap: float) -> Structures:
    layer = ase.build.fcc111("Ar", (1, 2, 2), a=5.26, vacuum=0, orthogonal=True)
    other = layer.copy()
    other.positions[:, 2] += np.ptp(layer.positions[:, 2]) + gap
    both = layer + other
    both.cell[2, 2], both.pbc = 70.0, True
    return structures_from_ase([both])


def test_slabs_apart_attract_as_the_tail_says(with_tail):
    potential, report = with_tail
    found = [float(potential(two_layers(gap)).energies) for gap in (6.0, 8.0, 10.0, 30.0)]
    right = [float(TRUE(two_layers(gap)).energies + NEAR(two_layers(gap)).energies) for gap in (6.0, 8.0, 10.0, 30.0)]
    for k in range(3):
        assert found[k] - found[3] == pytest.approx(right[k] - right[3], rel=1e-3)
    assert not any(f.kind.startswith("dispersion") for f in report.findings)
    without, _ = gpmlp.fit(
        argon(),
        labelled(argon(), TRUE, NEAR),
        Recipe.model_validate({**SMALL, "baseline": {"zbl": False, "isolated_atoms": {"Ar": 0.0}}}),
    )
    assert float(without(two_layers(6.0)).energies - without(two_layers(30.0)).energies) == pytest.approx(0.0, abs=1e-9)


def test_saved_and_shown(with_tail, tmp_path, capsys):
    potential, new = with_tail[0], argon(2)
    gpmlp.save(potential, tmp_path / "tail.gpmlp")
    assert torch.equal(gpmlp.load(tmp_path / "tail.gpmlp")(new).forces, potential(new).forces)
    assert torch.equal(pickle.loads(pickle.dumps(potential))(new).forces, potential(new).forces)
    assert main(["info", str(tmp_path / "tail.gpmlp")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tail -C6/r^6 with C6 Ar-Ar 64 eV A^6, whole from 4.37 A, to 25 A" in text
    assert main(["export", str(tmp_path / "tail.gpmlp"), "--to", "lammps", "-o", str(tmp_path / "tail.lammps")]) == 0
    assert "holds no uncertainty of the C6" in " ".join(capsys.readouterr().out.split())
    header = archive.read_header(tmp_path / "tail.gpmlp")["header"]
    assert header["recipe"]["long_range"]["dispersion"]["r6"]["c6"] == {"Ar-Ar": 64.0}


def test_engines_that_have_no_tail(with_tail, tmp_path):
    potential = with_tail[0]
    assert not potential.is_local
    with pytest.raises(UserError, match="dispersion tail, which the model driver for KIM does not compute"):
        export_kim(potential, tmp_path / "argon")
    d3 = replace(
        potential, baselines=(*potential.local_baselines, D3Dispersion("pbe"))
    )  # needs no package to be refused
    with pytest.raises(UserError, match="cannot be exported: .* the baseline D3Dispersion.*take models with.*r6"):
        export.export_model(d3, tmp_path / "x.gpk")
    with pytest.raises(UserError, match="its baseline R6Tail has no form"):
        Stepper(potential, argon(1).select([0]))


def test_d3_in_a_fit():
    pytest.importorskip("dftd3")
    structures = argon(8)
    term = D3Dispersion("pbe")
    chosen = Recipe.model_validate({**SMALL, "long_range": {"dispersion": {"d3": {"functional": "pbe"}}}})
    potential, _ = gpmlp.fit(structures, labelled(structures, term, NEAR), chosen)
    assert potential.outer_baselines[0].state()["versions"] == {"dftd3": dispersion.metadata.version("dftd3")}
    found = float(potential(two_layers(7.0)).energies - potential(two_layers(30.0)).energies)
    assert found == pytest.approx(float(term(two_layers(7.0)).energies - term(two_layers(30.0)).energies), abs=1e-9)


# ---------------------------------------------------------------- how strong it is in labels


def test_the_evidence_is_that_of_dense_algebra():
    """Strength and its deviation from an explicit covariance of all labels."""
    structures = argon(5)
    targets = labelled(structures, TRUE, NEAR)
    chosen = recipe_of()
    (unit,) = TRUE.unit_tails().values()
    start = torch.tensor([50.0], dtype=torch.float64)
    evidence = tail_strength._evidence(
        structures, targets, chosen.model_copy(update={"long_range": type(chosen.long_range)()}), [unit], start
    )
    strength, deviation = evidence.free()
    # the same fit, whose rows are stacked: y ~ N(Φ c, A Aᵀ + 1) in units of the noise
    less = targets.minus(unit(structures).map(lambda v: 50.0 * v))
    pilot = {
        **SMALL,
        "inducing": {"n": tail_strength.CENTRES},
        "baseline": {"zbl": False, "isolated_atoms": {"Ar": 0.0}},
        "variance": False,
    }
    fit = OnlineFit.begin(structures, less, Recipe.model_validate(pilot))
    from gpmlp.fitting import regression
    from gpmlp.gp import likelihood

    def column(term) -> Tensor:
        found = term(structures)
        labels = replace(
            fit.batches[0].remaining, energies=found.energies, forces=found.forces, stresses=found.stresses
        )
        rows = regression.rows_of_labels([], likelihood.observed_labels(labels, structures.counts))
        return torch.cat([rows[kind][:, 0] / fit.noise[kind] for kind in fit.batches[0].rows])

    stacked = torch.cat(list(fit.batches[0].rows.values()))
    a, y = stacked[:, :-1], stacked[:, -1]
    (faster,) = tail_strength._faster(unit)
    design = torch.stack([column(faster), column(unit)], dim=1)
    covariance = a @ a.T + torch.eye(len(y), dtype=torch.float64)
    information = design.T @ torch.linalg.solve(covariance, design)
    shift = torch.linalg.solve(information, design.T @ torch.linalg.solve(covariance, y))
    assert float(strength) == pytest.approx(50.0 + float(shift[1]), rel=1e-6)
    assert float(deviation) == pytest.approx(float(information.inverse()[1, 1].sqrt()), rel=1e-6)


def test_c6_is_learned():
    structures = argon()
    potential, _ = gpmlp.fit(structures, labelled(structures, TRUE, NEAR), recipe_of(c6="learned"))
    ((_, _, c6),) = potential.outer_baselines[0].state()["pairs"]
    assert c6 == pytest.approx(64.0, rel=0.15)  # that of free atoms is 38.4
    assert potential.recipe.long_range.dispersion.r6.c6 == {"Ar-Ar": c6}
    with pytest.raises(UserError, match="takes its C6 as they are"):
        OnlineFit.begin(structures, labelled(structures, TRUE), recipe_of(c6="learned"))


def test_priors_are_positive_and_stay_where_labels_say_nothing():
    nothing = TailEvidence(torch.zeros(2, 2).double(), torch.zeros(2).double(), torch.tensor([3.0, 5.0]).double())
    medians = torch.tensor([10.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(nothing.positive(medians), medians)
    sharp = TailEvidence(
        1e4 * torch.eye(2).double(), torch.tensor([1e4, -1e5]).double(), torch.tensor([3.0, 5.0]).double()
    )
    found = sharp.positive(medians)  # labels say 4 and -5
    assert float(found[0]) == pytest.approx(4.0, rel=1e-3) and 0 < float(found[1]) < 0.1


@pytest.mark.parametrize(
    "times, said", [(0.0, "It is for labels that hold it once"), (1.0, ""), (2.0, "Do they hold it twice")]
)
def test_labels_that_hold_it_another_number_of_times(times, said):
    structures = argon()
    own = R6Tail({(18, 18): 64.0 * times}, 3.22, 4.37, 25.0)
    settled, found = tail_strength.settle_dispersion(
        structures, labelled(structures, own, NEAR), recipe_of(c6={"Ar-Ar": 64.0})
    )
    assert settled.long_range.dispersion.r6.c6 == {"Ar-Ar": 64.0}
    if not said:
        assert not found
        return
    (finding,) = found
    assert finding.kind == "dispersion-of-another-strength" and said in finding.advice
    assert finding.numbers["strength"] == pytest.approx(times, abs=0.1)


def test_a_calculator_below_that_holds_dispersion_itself():
    recipe = recipe_of()
    for calculator, twice in (
        ({"name": "tblite"}, True),
        ({"name": "emt"}, False),
        ({"name": "vasp", "kwargs": {"xc": "vdw-df"}}, True),
    ):
        section = type(recipe.baseline).model_validate({"calculator": calculator})
        found = tail_strength._twice_by_name(recipe.model_copy(update={"baseline": section}))
        assert [f.kind for f in found] == (["dispersion-twice"] if twice else [])


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    "section, message",
    [
        ({"dispersion": {}}, "give one of r6 and d3"),
        ({"dispersion": {"r6": {}, "d3": {"functional": "pbe"}}}, "give one of r6 and d3"),
        (
            {"dispersion": {"r6": {"outer": 5.0, "begin": 3.0, "full": 4.0}}},
            "must grow by 0.1 A or more: 4 A comes before 3 A",
        ),
        ({"dispersion": {"r6": {"c6": {"Ar": 60.0}}}}, "'Ar' is no pair of elements"),
        ({"dispersion": {"r6": {"c6": {"Ar-Ax": 60.0}}}}, "Ax"),
        ({"dispersion": {"r6": {"c6": {"C-H": 1.0, "Ar-Ar": 60.0, "H-C": 50.0}}}}, "H-C is given twice"),
        ({"dispersion": {"r6": {"c6": {"Ar-Ar": -1.0}}}}, "greater than or equal to 0"),
        ({"dispersion": {"d3": {"functional": "pbe", "damping": "none"}}}, "damping"),
        ({"dispersion": {"d3": {}}}, "functional"),
        ({"dispersal": {}}, "dispersal"),
    ],
)
def test_recipes_that_cannot_be(section, message):
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({"long_range": section})


def test_what_only_the_data_can_say():
    structures = argon(4)
    targets = labelled(structures, TRUE, NEAR)
    with pytest.raises(UserError, match="gives none of Ar-Ar"):
        gpmlp.fit(structures, targets, recipe_of(c6={"Kr-Kr": 10.0}))
    with pytest.raises(UserError, match="which must come one after the other"):
        gpmlp.fit(structures, targets, recipe_of(outer=6.0))


def test_never_on_by_itself(with_tail):
    assert Recipe().long_range.dispersion is False
    switched_on = Recipe.model_validate({"long_range": {"dispersion": {"r6": True}}}).long_range.dispersion.r6
    assert switched_on.outer == 25.0 and switched_on.c6 == "free_atoms"
