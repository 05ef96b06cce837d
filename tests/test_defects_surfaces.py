"""Defects and surfaces: against the same by hand on EMT and Lennard-Jones, and the fast error bar against relaxed samples."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, fcc110, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from test_properties import labelled

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import from_ase
from gpmlp.potential.potential import Potential
from gpmlp.properties.bulk import Bulk, InLattice, conventional
from gpmlp.properties.compute import exact_properties
from gpmlp.properties.defects import Interstitials, Vacancies, largest_holes
from gpmlp.properties.surface import EnergySurface, Failed, Point, strained
from gpmlp.properties.surfaces import J_PER_M2, AdsorptionEnergies, SurfaceEnergies, adsorption_systems, cut_slab

pytest.importorskip("spglib")
EMT_SURFACE = EnergySurface.of_calculator(EMT())


@pytest.fixture(scope="module")
def at_rest() -> Atoms:
    """EMT's copper, conventional cell."""
    return EMT_SURFACE.relax(bulk("Cu", cubic=True), "full", 1e-5)


@pytest.fixture(scope="module")
def model() -> Potential:
    """Of few labels, of crystals, slabs and a vacancy."""
    hole = bulk("Cu", cubic=True) * (2, 1, 1)
    del hole[0]
    slabs = [make("Cu", (1, 1, 5), a=3.6, vacuum=5, periodic=True) for make in (fcc100, fcc110, fcc111)]
    frames = [frame for atoms in (*slabs, hole) for frame in labelled(atoms, EMT(), 3, 0.02, 0.1)]
    frames += labelled(bulk("Cu", cubic=True), EMT(), 10, 0.03, 0.1)
    recipe = gpmlp.Recipe(descriptor={"cutoff": 4.0, "n_max": 5, "l_max": 3}, inducing={"n": 60})
    return gpmlp.fit(*from_ase(frames), recipe)[0]


def energy(atoms: Atoms) -> float:
    return EMT_SURFACE.points([atoms])[0].energy


def test_vacancy_as_by_hand(at_rest):
    e = energy(at_rest) / 4
    defect = at_rest.repeat(3)
    del defect[50]
    by_hand = energy(EMT_SURFACE.relax(defect)) - 107 * e
    found = exact_properties(
        EMT_SURFACE, bulk("Cu") * 2, [Vacancies(supercell=10.0)]
    )  # a supercell is given: it is no other crystal
    assert found == {"vacancy_formation_energy": pytest.approx(by_hand, abs=2e-4)}
    small = exact_properties(EMT_SURFACE, bulk("Cu"), [Vacancies(supercell=7.0)])
    assert abs(small["vacancy_formation_energy"] - by_hand) > 1e-3


def test_vacancies_of_a_compound_are_paid_for_by_the_elements():
    """E(defect) + mu - E(bulk), once with a metal, once with a gas of pairs as the other element's reference."""
    alloy, copper_, gold = bulk("CuAu", "cesiumchloride", a=3.1), bulk("Cu"), Atoms("Au2", [[0, 0, 0], [0, 0, 2.6]])
    alloy.info["name"] = "alloy"
    found = exact_properties(EMT_SURFACE, [copper_, alloy, gold], [Vacancies(supercell=9.0)])
    assert set(found) == {"vacancy_formation_energy_Cu", "vacancy_formation_energy_Au"}
    cell = EMT_SURFACE.relax(alloy, "full", 1e-5)
    prices = {
        "Cu": energy(EMT_SURFACE.relax(copper_, "full", 1e-5)),
        "Au": energy(EMT_SURFACE.relax(gold)) / 2,
    }
    for symbol, mu in prices.items():
        defect = cell.repeat(3)
        del defect[defect.symbols.search(symbol)[0]]
        by_hand = energy(EMT_SURFACE.relax(defect)) + mu - 27 * energy(cell)
        assert found[f"vacancy_formation_energy_{symbol}"] == pytest.approx(by_hand, abs=5e-4)


def test_holes_are_those_of_textbooks():
    """fcc: octahedral at half an edge, tetrahedral at quarters; diamond: tetrahedral, then hexagonal at sqrt(11)/8 of an edge."""
    crystal = conventional(bulk("Cu", a=4.0))
    (first, octahedral), (second, tetrahedral) = largest_holes(crystal, 3)
    assert (first, second) == ("octahedral", "tetrahedral")
    for site, distance in ((octahedral, 2.0), (tetrahedral, 3**0.5)):
        probe = crystal + Atoms("H", [site])
        assert probe.get_distances(4, [0, 1, 2, 3], mic=True).min() == pytest.approx(distance, abs=1e-6)
    silicon = conventional(bulk("Si", a=8.0))
    names, sites = zip(*largest_holes(silicon, 5), strict=True)
    assert names == ("tetrahedral", "6_neighbours")
    probe = silicon + Atoms("H", [sites[1]])
    assert probe.get_distances(8, range(8), mic=True).min() == pytest.approx(11**0.5, abs=1e-6)
    assert [name for name, _ in largest_holes(conventional(bulk("Fe")), 5)] == ["tetrahedral"]


def test_interstitials_as_by_hand(at_rest):
    e, host = energy(at_rest) / 4, at_rest.repeat(2)
    a = at_rest.cell[0, 0]
    found = exact_properties(EMT_SURFACE, bulk("Cu"), [Interstitials(supercell=7.0)])
    assert {name.removeprefix("interstitial_formation_energy_") for name in found} == {
        "octahedral", "tetrahedral", "dumbbell_100", "dumbbell_110", "dumbbell_111",
    }  # fmt: skip
    octahedral = host + Atoms("Cu", [[a / 2, 0, 0]])
    by_hand = energy(EMT_SURFACE.relax(octahedral)) - 33 * e
    assert found["interstitial_formation_energy_octahedral"] == pytest.approx(by_hand, abs=5e-4)
    dumbbell = host + Atoms("Cu", [[1.0, 0, 0]])
    dumbbell.positions[0] = [-1.0, 0, 0]
    by_hand = energy(EMT_SURFACE.relax(dumbbell)) - 33 * e
    assert found["interstitial_formation_energy_dumbbell_100"] == pytest.approx(by_hand, abs=5e-4)
    site = exact_properties(EMT_SURFACE, bulk("Cu"), [Interstitials(supercell=7.0, sites=((0.5, 0.5, 0.5),))])
    assert site["interstitial_formation_energy_site"] == pytest.approx(
        found["interstitial_formation_energy_octahedral"], abs=5e-4
    )


def test_surface_energies_as_by_hand(at_rest):
    e, a = energy(at_rest) / 4, at_rest.cell[0, 0]
    found = exact_properties(EMT_SURFACE, bulk("Cu"), [SurfaceEnergies(thickness=12.0)])
    for make, plane in ((fcc100, "100"), (fcc110, "110"), (fcc111, "111")):
        slab = EMT_SURFACE.relax(make("Cu", (1, 1, 8), a=a, vacuum=8, periodic=True))
        by_hand = J_PER_M2 * (energy(slab) - 8 * e) / (2 * np.linalg.norm(np.cross(*slab.cell[:2])))
        assert found[f"surface_energy_{plane}"] == pytest.approx(by_hand, rel=0.01)  # another number of layers
    turned = exact_properties(EMT_SURFACE, bulk("Cu"), [SurfaceEnergies(planes=((0, -1, 1),), thickness=12.0)])
    assert turned["surface_energy_0m11"] == pytest.approx(found["surface_energy_110"], rel=1e-4)


def test_slabs_have_the_composition_and_no_dipole():
    salt = conventional(bulk("NaCl", "rocksalt", a=5.64))
    assert cut_slab(salt, (1, 1, 1), 10.0, 10.0) is None  # polar
    unequal = cut_slab(salt, (1, 1, 1), 10.0, 10.0, unequal_faces=True)
    order = np.argsort(unequal.atoms.positions[:, 2])
    assert not unequal.symmetric and set(unequal.atoms.numbers[order[[0, -1]]]) == {11, 17}
    for plane, layers in (((1, 0, 0), 2.82), ((1, 1, 0), 5.64 / 8**0.5)):
        slab = cut_slab(salt, plane, 10.0, 10.0)
        atoms = slab.atoms
        assert slab.symmetric and (atoms.numbers == 11).sum() == (atoms.numbers == 17).sum()
        assert np.dot(np.where(atoms.numbers == 11, 1, -1), atoms.positions[:, 2]) == pytest.approx(0, abs=1e-6)
        heights = np.unique(atoms.positions[:, 2].round(4))
        np.testing.assert_allclose(np.diff(heights), layers, atol=1e-3)
        assert np.ptp(atoms.positions[:, 2]) + 10.0 == pytest.approx(atoms.cell[2, 2])
    silicon = cut_slab(conventional(bulk("Si", a=5.43)), (1, 1, 1), 12.0, 10.0)
    heights = np.unique(silicon.atoms.positions[:, 2].round(4))
    assert np.diff(heights)[0] == pytest.approx(5.43 * 3**0.5 / 12, abs=1e-3)  # one bond cut for each atom, not three
    zinc_blende = conventional(bulk("GaAs", "zincblende", a=5.65))
    assert cut_slab(zinc_blende, (1, 1, 0), 10.0, 10.0).symmetric
    assert cut_slab(zinc_blende, (1, 1, 1), 10.0, 10.0) is None


def test_a_plane_without_a_slab_is_told():
    alloy = Atoms(
        "AuCu3", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]], cell=[3.75] * 3, pbc=True
    )
    plan = SurfaceEnergies(planes=((1, 0, 0), (1, 1, 1)), thickness=6.0).plan(EMT_SURFACE, [alloy])
    assert set(plan.units) == {"surface_energy_111"} and "two different faces" in plan.missing["surface_energy_100"]
    found = exact_properties(
        EMT_SURFACE, alloy, [SurfaceEnergies(planes=((1, 0, 0),), thickness=6.0, unequal_faces=True)]
    )
    assert 0.5 < found["surface_energy_100"] < 2.0
    with pytest.raises(UserError, match="two different faces"):
        exact_properties(EMT_SURFACE, alloy, [SurfaceEnergies(planes=((1, 0, 0),), thickness=6.0)])


def test_rotation_of_a_slab_is_that_of_its_lattice():
    """A strain of the crystal, turned, is that of a slab cut from the strained crystal."""
    crystal = conventional(bulk("Cu"))
    strain = np.array([0.002, -0.001, 0.003, 0.001, -0.002, 0.002])
    plain = cut_slab(crystal, (1, 1, 0), 8.0, 8.0)
    matrix = np.zeros((3, 3))
    matrix[[0, 1, 2], [0, 1, 2]] = strain[:3]
    matrix[[1, 0, 0], [2, 2, 1]] = matrix[[2, 2, 1], [1, 0, 0]] = strain[3:] / 2
    turned = plain.rotation @ matrix @ plain.rotation.T
    a1, a2 = plain.atoms.cell.array[:2]
    lengths = np.linalg.norm(np.array([a1, a2]) @ (np.eye(3) + turned), axis=1)
    vectors = np.array([a1, a2]) @ plain.rotation  # in the crystal
    moved = strained(crystal, strain).cell.array
    np.testing.assert_allclose(
        np.linalg.norm(np.linalg.solve(crystal.cell.array.T, vectors.T).T @ moved, axis=1), lengths, rtol=1e-5
    )


def test_lattice_of_another_surface():
    """From stresses in the lattice of one Lennard-Jones potential: lattice and energy of a shallower, wider one, to second order."""
    one = EnergySurface.of_calculator(LennardJones(sigma=2.3, epsilon=0.4, rc=7.0, smooth=True))
    other = EnergySurface.of_calculator(LennardJones(sigma=2.304, epsilon=0.39, rc=7.0, smooth=True))
    solid = Bulk.at_rest(one, bulk("Ar", "fcc", a=3.7))
    there = Bulk.at_rest(other, bulk("Ar", "fcc", a=3.7))
    (point,) = other.points([solid.atoms])
    wanted = there.atoms.cell[0, 0] / solid.atoms.cell[0, 0] - 1
    np.testing.assert_allclose(solid.strain(point), wanted * np.eye(3), rtol=0.03, atol=1e-6)
    assert solid.energy_per_atom(point) == pytest.approx(other.points([there.atoms])[0].energy / 4, abs=2e-6)
    assert point.energy / 4 - solid.energy_per_atom(point) > 2e-5  # which is what the lattice gains


def test_slab_in_the_lattice_of_another_surface():
    """As relaxed there in that lattice; the stress of the slab itself is on both about the same, and large."""
    one = EnergySurface.of_calculator(LennardJones(sigma=2.3, epsilon=0.4, rc=7.0, smooth=True))
    other = EnergySurface.of_calculator(LennardJones(sigma=2.31, epsilon=0.4, rc=7.0, smooth=True))
    solid = Bulk.at_rest(one, bulk("Ar", "fcc", a=3.7))
    slab = one.relax(cut_slab(solid.atoms, (1, 1, 1), 8.0, 8.0).atoms)
    strain = solid.strain(other.points([solid.atoms])[0])
    here, there = other.relax(slab), slab.copy()
    there.set_cell(slab.cell @ (np.eye(3) + strain), scale_atoms=True)
    points = other.points([here, other.relax(there)])
    found = InLattice.of(one, [slab])[0].energy(points[0], strain)
    gain = points[1].energy - points[0].energy
    assert abs(found - points[0].energy) > 0.01
    assert found - points[0].energy == pytest.approx(gain, rel=0.05)


def test_a_strain_across_planes():
    """Hexagonal copper whose lattice becomes longer along c alone: areas of prism planes grow, that of the basal plane does not."""
    crystal = bulk("Cu", "hcp", a=2.54, c=4.15)
    plan = SurfaceEnergies(planes=((0, 0, 1), (1, 0, 0))).plan(EMT_SURFACE, [crystal])
    points = EMT_SURFACE.points(plan.structures)
    solid = Bulk.at_rest(EMT_SURFACE, crystal)
    longer = np.diag([0, 0, 0.01])
    stress = -np.linalg.inv(solid.compliance)[:, 2] * 0.01
    stress = points[0].stress + np.array([[stress[i] for i in row] for row in ((0, 5, 4), (5, 1, 3), (4, 3, 2))])
    moved = [Point(points[0].energy, points[0].forces, stress), *points[1:]]
    found = plan.evaluate(moved)
    e = (points[0].energy + 0.5 * solid.atoms.get_volume() * np.sum(stress * longer)) / len(solid.atoms)
    for name, slab, point, along_c in zip(found, plan.structures[1:], points[1:], (2, 1), strict=True):
        area = np.linalg.norm(np.cross(*slab.cell[:2])) * (1.0 if along_c == 2 else 1.01)
        whole = point.energy + slab.get_volume() * point.stress[along_c, along_c] * 0.01
        assert found[name] == pytest.approx(J_PER_M2 * (whole - len(slab) * e) / (2 * area), rel=1e-3)


def test_adsorption_as_by_hand():
    slab = fcc100("Al", (2, 2, 3), vacuum=6.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    both = slab.copy()
    add_adsorbate(both, "Au", 1.7, "hollow")
    gold = Atoms("Au")
    energies = [energy(EMT_SURFACE.relax(atoms)) for atoms in (both, slab, gold)]
    by_hand = {"adsorption_energy": pytest.approx(energies[0] - energies[1] - energies[2], abs=1e-5)}
    assert exact_properties(EMT_SURFACE, both, [AdsorptionEnergies()]) == by_hand  # by its tags
    assert exact_properties(EMT_SURFACE, [gold, both, slab], [AdsorptionEnergies()]) == by_hand  # not twice
    plain = both.copy()
    plain.set_tags(None)
    assert exact_properties(EMT_SURFACE, [gold, plain, slab], [AdsorptionEnergies()]) == by_hand
    twice = plain.copy()
    twice += Atoms("Au", [twice.positions[-1] + [2.86, 0, 0]])
    found = exact_properties(EMT_SURFACE, [twice, slab, gold], [AdsorptionEnergies(relax=False)])
    by_hand = (energy(twice) - energy(slab)) / 2 - energy(gold)
    assert found == {"adsorption_energy": pytest.approx(by_hand, abs=1e-9)}


def test_an_adsorbate_across_the_edge_is_made_whole():
    slab = fcc111("Cu", (3, 3, 3), vacuum=6.0)
    add_adsorbate(slab, Atoms("CO", [[0, 0, 0], [0, 0, 1.2]]), 1.9, "ontop")
    slab.positions[-2:] += [0.3, 0, 0]
    slab.positions[-1] += slab.cell[0] - [0.5, 0, 0]
    ((together, bare, alone),) = adsorption_systems([slab])
    assert alone.get_distance(0, 1) == pytest.approx(np.hypot(1.2, 0.5)) and not alone.pbc.any()
    assert len(bare) == 27 and len(together) == 29


@pytest.mark.parametrize("what", ["vacancy", "surface"])
def test_fast_error_bars_are_those_of_relaxed_samples(model, what):
    """Each sample of a potential that has met such atoms, with few labels, has its own ions and its own lattice."""
    fast = gpmlp.compute_properties(model, bulk("Cu"), [what], samples=8)
    full = gpmlp.compute_properties(model, bulk("Cu"), [what], samples=8, full=True)
    truth = exact_properties(EMT_SURFACE, bulk("Cu"), [what])
    assert all(len(value.structures) == 2 for value in fast.values)  # the bulk and its own
    assert not fast.failures and not full.failures
    for a, b in zip(fast.values, full.values, strict=True):
        assert a.sigma == pytest.approx(b.sigma, rel=0.05) and a.sigma > 0
        assert abs(a.value - truth[a.name]) < 5 * a.sigma


@pytest.mark.parametrize(
    ("what", "structures", "match"),
    [
        (Vacancies(), [bulk("NaCl", "rocksalt", a=5.6)], "what an atom of Na and Cl costs in .* give a structure of the element too"),
        (Vacancies(species=("Cl",)), [bulk("NaCl", "rocksalt", a=5.6)], "what an atom of Cl costs"),
        (Vacancies(species=("Al",)), [bulk("Cu")], "there is no Al in Cu to take out"),
        (Vacancies(), [molecule("H2O")], "no crystal"),
        (Interstitials(species=("C",)), [bulk("Fe")], "what an atom of C costs"),
        (Vacancies(species=("Xx",)), [bulk("Fe")], "Unknown vacancy.species 'Xx'"),
        (SurfaceEnergies(), [molecule("H2O")], "no crystal"),
        (SurfaceEnergies(planes=((0, 0, 0),)), [bulk("Cu")], "0 0 0 are no plane"),
        (AdsorptionEnergies(), [fcc111("Cu", (1, 1, 3), vacuum=5)], "a slab with an adsorbate, the slab and the molecule"),
    ],
)  # fmt: skip
def test_refusals(what, structures, match):
    with pytest.raises(UserError, match=match):
        exact_properties(EMT_SURFACE, structures, [what])


def test_a_crystal_that_is_not_stable():
    with pytest.raises(Failed, match="not stable"):
        Bulk.at_rest(EMT_SURFACE, bulk("Cu", "sc", a=2.4))
