"""Networks under the Gaussian process: derivatives of features, fits, files, engines, baselines; a toy, and SevenNet if installed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
import toy_network
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet
from systems import CUTOFF, SPECIES, cluster, crystal, descriptor, everything, network_descriptor, structure

import gpmlp
from gpmlp.cli.main import main
from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors import networks
from gpmlp.descriptors.network_features import LayerScalars, learn_features
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.io.recipe_files import load_recipe
from gpmlp.potential.baselines import NetworkEnergies
from gpmlp.recipe import Recipe

# of features of order 1, differences of fourth order with 1e-3 A: as in test_descriptors, times the slopes of the network
STEP, DIFFERENCE = 1e-3, 2e-9
TOY = {"name": "network", "checkpoint": "toy"}


def complete(structures: Structures) -> Surroundings:
    return Surroundings.from_structures(structures, neighbors.find_neighbors(structures, float("inf")))


def moved(s: Surroundings, vectors: torch.Tensor) -> Surroundings:
    return Surroundings(s.species, s.centers, s.neighbor_species, vectors, s.atoms, s.neighbor_atoms)


@pytest.fixture(scope="module", params=["soap gto", None], ids=["beside soap", "alone"])
def case(request):
    made, surroundings = network_descriptor(request.param), complete(everything())
    return made, surroundings, made(surroundings)


def test_a_complete_list_has_all_atoms_and_the_lattice_vectors():
    structures = Structures.concatenate([cluster(), crystal("slab"), structure([[0, 0, 0]], [1])])
    near = neighbors.find_neighbors(structures, float("inf"))
    assert len(near) == 5 * 4 + 2 * (1 + 2) + 0
    own = near.centers == near.neighbors
    torch.testing.assert_close(near.vectors(structures)[own], structures.cells[1, :2].repeat(2, 1), atol=1e-14, rtol=0)
    assert (near.centers.diff() >= 0).all() and not near.shifts[~own].any()
    pairs = set(zip(near.centers[~own].tolist(), near.neighbors[~own].tolist(), strict=True))
    same = structures.structure_of_atom
    assert pairs == {(i, j) for i in range(8) for j in range(8) if i != j and same[i] == same[j]}
    with pytest.raises(UserError, match="A apart"):
        neighbors.find_neighbors(structure([[0, 0, 0], [0, 0, 0.1]], [1, 1]), float("inf"))


def test_the_local_features_are_those_with_a_cutoff(case):
    """Images within the cutoff are found again from the lattice vectors, in cells of every kind."""
    made, surroundings, environments = case
    if made.local is None:
        pytest.skip("no local descriptor")
    structures = everything()
    near = neighbors.find_neighbors(structures, CUTOFF)
    expected = descriptor("soap gto")(Surroundings.from_structures(structures, near)).features
    local = torch.nn.functional.normalize(environments.features[:, : made.local.n_features], dim=1)
    torch.testing.assert_close(local, expected, atol=1e-11, rtol=0)  # positions are rounded to 1e-12 A


def test_features_are_unit_vectors_and_those_of_networks_of_one_structure(case):
    """The same as the network's scalars of each structure by itself, from its own neighbour list and cell."""
    made, surroundings, environments = case
    torch.testing.assert_close(environments.features.norm(dim=1), torch.ones(len(surroundings)).double())
    structures, network = everything(), made.network
    weights = environments.features[:, : 1 if made.local is None else made.local.n_features].norm(dim=1)
    found = environments.features[:, -network.n_features :] / weights[:, None] / made.weight
    scalars = LayerScalars(toy_network.TOY, network.layers)
    for s in range(len(structures)):
        one = structures.select([s])
        near = neighbors.find_neighbors(one, toy_network.TOY.cutoff)
        raw = scalars(one.species, near, one.positions, one.cells, one.structure_of_atom).detach()
        slots = network.slots(one.species)
        expected = torch.einsum("nw,nwd->nd", raw - network.means[slots], network.projections[slots])
        torch.testing.assert_close(found[structures.structure_of_atom == s], expected, atol=1e-10, rtol=0)


def test_the_jacobian_is_the_derivative_of_the_features(case):
    """With respect to vectors to atoms and lattice vectors alike."""
    made, surroundings, environments = case
    jacobian = environments.jacobian()
    assert jacobian.shape == (len(surroundings.centers), 3, made.n_features)
    own = (surroundings.neighbor_atoms == surroundings.atoms[surroundings.centers]).nonzero()[:, 0]
    for pair in {*range(0, len(jacobian), 9), *own[::4].tolist()}:
        center = int(surroundings.centers[pair])
        for axis in range(3):
            slope = torch.zeros(made.n_features, dtype=torch.float64)
            for steps, factor in ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)):
                vectors = surroundings.vectors.clone()
                vectors[pair, axis] += steps * STEP
                slope += factor / STEP * made(moved(surroundings, vectors).select([center])).features[0]
            torch.testing.assert_close(jacobian[pair, axis], slope, atol=DIFFERENCE, rtol=0)


def test_pull_back_gives_the_forces_and_virials_of_the_jacobian(case):
    """Which pairs a gradient is laid on is free where all pairs are functions of the same atoms: sums over them are not."""
    made, surroundings, environments = case
    structures = everything()
    near = neighbors.find_neighbors(structures, float("inf"))
    generator = torch.Generator().manual_seed(0)
    cotangents = torch.randn(2, len(surroundings), made.n_features, generator=generator, dtype=torch.float64)
    expected = torch.einsum("pxf,kpf->kpx", environments.jacobian(), cotangents[:, surroundings.centers])
    found = environments.pull_back(cotangents)
    for a, b in zip(found, expected, strict=True):
        for of_pairs in (
            lambda g: neighbors.scatter_forces(near, structures.n_atoms, g),
            lambda g: neighbors.scatter_virials(structures, near, surroundings.vectors, g),
        ):
            torch.testing.assert_close(of_pairs(a), of_pairs(b), atol=1e-12, rtol=0)
    torch.testing.assert_close(environments.pull_back(cotangents[1]), found[1], atol=1e-14, rtol=0)


def test_some_environments_in_any_order_are_cut_out_of_all(case):
    made, surroundings, environments = case
    order = torch.randperm(len(surroundings), generator=torch.Generator().manual_seed(1))[:9]
    some = made(surroundings.select(order))
    torch.testing.assert_close(some.features, environments.features[order], atol=1e-14, rtol=0)
    rows = environments.jacobian()[surroundings.pairs_of(order)[1]]
    torch.testing.assert_close(some.jacobian(), rows, atol=1e-13, rtol=0)
    both = made(Surroundings.concatenate([surroundings.select(order[:4]), surroundings.select(order[4:])]))
    torch.testing.assert_close(both.features, some.features, atol=1e-14, rtol=0)
    assert made(surroundings.select([])).jacobian().shape == (0, 3, made.n_features)


def test_components_leave_out_what_they_say():
    """With all components nothing is lost, and with some the share of features and derivatives that they say."""
    structures = Structures.concatenate([cluster(seed=k) for k in range(6)])
    parameters = TOY | {"layers": (1, 2, 3), "components": 100}
    whole = learn_features((1, 6, 8), parameters, structures, 0)
    assert whole.n_features == 18 and whole.lost.abs().max() < 1e-12
    part = learn_features((1, 6, 8), parameters | {"components": 3}, structures, 0)
    assert 1e-5 < part.lost.min() and part.lost.max() < 0.5
    torch.testing.assert_close(part.projections, whole.projections[:, :, :3], atol=1e-10, rtol=0)
    # |v|² is 1 on average where nothing is lost, of a species with a spread
    near = neighbors.find_neighbors(structures, toy_network.TOY.cutoff)
    scalars = LayerScalars(toy_network.TOY, (1, 2, 3))
    raw = scalars(structures.species, near, structures.positions, structures.cells, structures.structure_of_atom)
    carbon = structures.species == 6
    v = (raw[carbon].detach() - whole.means[1]) @ whole.projections[1]
    assert float(v.square().sum(1).mean()) == pytest.approx(1, abs=1e-9)


# fits ----------------------------------------------------------------------------------------------------------------------------


def labelled(n: int = 24, seed: int = 0) -> tuple[Structures, Targets]:
    """Distorted molecules with the energies of another network, which neither SOAP nor the toy has."""
    generator = torch.Generator().manual_seed(seed)
    start = cluster(size=2.6)
    shaken = [
        start.positions + 0.08 * torch.randn(start.positions.shape, generator=generator, dtype=torch.float64)
        for _ in range(n)
    ]
    structures = Structures.concatenate([structure(x, start.species) for x in shaken])
    truth = NetworkEnergies("network", "truth", TRUTH)(structures)
    unknown = Targets.unlabelled(structures)
    return structures, Targets(**(vars(unknown) | {"energies": truth.energies, "forces": truth.forces}))


TRUTH = networks.register_network("truth", toy_network.ToyNetwork(seed=5))
SMALL = {
    "baseline": {"zbl": False},
    "kernel": {"zeta": 2},
    "inducing": {"n": 30, "gradients": 6},
    "calibration": False,
    "mean": "exact",
}
SOAP = {"name": "soap", "cutoff": CUTOFF, "n_max": 3, "l_max": 3}


@pytest.fixture(scope="module")
def fitted():
    recipe = {"descriptor": [SOAP, TOY | {"weight": 0.3, "components": 12}], **SMALL}
    return gpmlp.fit(*labelled(), Recipe.model_validate(recipe))


def test_a_list_with_a_weight_is_one_descriptor_and_without_it_two():
    joined = Recipe.model_validate({"descriptor": [SOAP, TOY | {"weight": 0.3}]})
    assert len(joined.descriptors) == 1 and joined.descriptors[0].beside.weight == 0.3
    assert len(Recipe.model_validate({"descriptor": [SOAP, TOY]}).descriptors) == 2
    again = Recipe.model_validate(joined.model_dump(mode="json"))
    assert again == joined
    apart = Recipe.model_validate({"descriptor": [SOAP | {"beside": False}, TOY | {"weight": 0.3}]})
    assert len(apart.descriptors) == 2 and Recipe.model_validate(apart.model_dump(mode="json")) == apart


def test_a_sum_of_two_terms_is_saved_and_loaded(tmp_path):
    recipe = Recipe.model_validate({"descriptor": [SOAP, TOY], **SMALL, "inducing": {"n": 10, "gradients": 2}})
    potential, _ = gpmlp.fit(*labelled(8), recipe)
    gpmlp.save(potential, tmp_path / "sum.gpmlp")
    again, one = gpmlp.load(tmp_path / "sum.gpmlp"), labelled(1, seed=2)[0]
    assert len(again.terms) == len(potential.terms) == 2 and again.recipe == potential.recipe
    torch.testing.assert_close(again(one).forces, potential(one).forces, atol=1e-11, rtol=0)


def test_forces_are_derivatives_of_the_energy_and_variances_are_there(fitted):
    potential, report = fitted
    one = labelled(1, seed=9)[0]
    found = potential(one, variance="all", novelty=True)
    for atom, axis in ((0, 0), (3, 2)):
        shift = torch.zeros_like(one.positions)
        shift[atom, axis] = 1e-4
        up, down = (potential(one.with_positions(one.positions + s * shift)).energies for s in (1, -1))
        assert float((down - up) / 2e-4) == pytest.approx(float(found.forces[atom, axis]), abs=1e-6)
    assert bool((found.forces_variance.total > 0).all()) and bool((found.energies_variance.total > 0).all())
    assert bool(found.novelty.isfinite().all()) and report.columns > 50


def test_a_network_close_to_the_truth_makes_forces_better():
    """Features of the very network that made the labels, beside SOAP: what the whole section is for."""
    train, test = labelled(16), labelled(12, seed=4)
    errors = []
    for section in (SOAP, [SOAP, TOY | {"checkpoint": "truth", "weight": 0.1}]):
        potential, _ = gpmlp.fit(*train, Recipe.model_validate({"descriptor": section, **SMALL, "variance": False}))
        errors.append(gpmlp.evaluate(potential, *test).overall.force_mae_meV_per_A)
    assert errors[1] < 0.3 * errors[0]


def test_a_model_file_brings_the_constants_and_demands_the_network(fitted, tmp_path, monkeypatch):
    potential, _ = fitted
    path, one = tmp_path / "model.gpmlp", labelled(3, seed=2)[0]
    gpmlp.save(potential, path)
    again = gpmlp.load(path)
    first, second = potential(one, variance="all"), again(one, variance="all")
    torch.testing.assert_close(second.forces, first.forces, atol=1e-11, rtol=0)
    torch.testing.assert_close(second.energies, first.energies, atol=1e-11, rtol=0)
    torch.testing.assert_close(second.forces_variance.total, first.forces_variance.total, rtol=1e-9, atol=0)
    assert again.recipe.descriptors[0].beside.sha256 == toy_network.SHA256
    known = dict(networks.REGISTERED)
    monkeypatch.setattr(networks, "REGISTERED", {})
    with pytest.raises(UserError, match=r"model\.gpmlp: There is no network 'toy'; registered in this process: none"):
        gpmlp.load(path)
    other = networks.KnownNetwork(toy_network.ToyNetwork(seed=8), "0" * 64)
    monkeypatch.setattr(networks, "REGISTERED", known | {"toy": other})
    with pytest.raises(UserError, match="not those that the model was fitted with"):
        gpmlp.load(path)


def test_registering_is_checked():
    assert networks.register_network("toy", toy_network.TOY) == toy_network.SHA256  # the same once more
    with pytest.raises(UserError, match="Another network is registered as 'toy'"):
        networks.register_network("toy", toy_network.ToyNetwork(seed=1))
    with pytest.raises(UserError, match="has no `cutoff`"):
        networks.register_network("nothing", torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"has 'embedding' in float32; .*network\.double\(\)"):
        networks.register_network("single", toy_network.ToyNetwork(seed=2).float())
    half = toy_network.ToyNetwork(seed=2)
    half.register_buffer("scale", torch.ones(1, dtype=torch.bfloat16))
    with pytest.raises(UserError, match="has 'scale' in bfloat16"):
        networks.register_network("half", half)
    with pytest.raises(UserError, match=r"layers 1 to 3; got \[2, 4\]"):
        learn_features((1,), TOY | {"layers": (2, 4), "components": 3}, cluster((1, 1)), 0)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "sevennet", "checkpoint": "/tmp/x.pth"}, "is none of 7net-0, 7net-l3i5"),
        ({"name": "sevennet", "weight": 0.0}, "greater than 0"),
        ({"name": "sevennet", "layers": [0]}, "greater than or equal to 1"),
        ({"name": "network", "sha256": "abc"}, "match pattern"),
        ({"name": "sevennet", "cutoff": 5.0}, "cutoff"),
    ],
)
def test_mistakes_in_a_recipe_are_named(section, words):
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate({"descriptor": section})


@pytest.mark.parametrize("section", ["{name: sevennet, cutoff: 5}", "[{name: soap}, {name: sevennet, cutoff: 5}]"])
def test_keys_of_other_descriptors_are_not_suggested(section, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"descriptor: {section}\n")
    with pytest.raises(UserError, match=r"unknown key 'descriptor(\.1)?\.cutoff'\. Valid names: .*layers"):
        load_recipe(tmp_path / "recipe.yaml")


def test_too_large_structures_are_refused_before_memory_is():
    n = neighbors.MOST_COMPLETE + 1
    positions = 3.0 * torch.cartesian_prod(*[torch.arange(18.0)] * 3)[:n]
    with pytest.raises(UserError, match="has 5001 atoms.* 4 GB here; at most 5000 atoms"):
        neighbors.find_neighbors(structure(positions, [6] * n), float("inf"))


def test_what_is_not_local_is_told(fitted):
    potential, _ = fitted
    assert f"cutoff {CUTOFF:g} A, a network beyond;" in repr(potential) and potential.cutoff == CUTOFF
    with pytest.raises(UserError, match="Virials of atoms have no meaning with a network"):
        potential(labelled(1)[0], atom_virials=True)


def test_an_atom_of_unknown_species_is_refused():
    few = toy_network.ToyNetwork(seed=3)
    few.species = (1, 6)
    networks.register_network("few", few)
    with pytest.raises(UserError, match="does not know O"):
        gpmlp.fit(*labelled(8), Recipe.model_validate({"descriptor": TOY | {"checkpoint": "few"}, **SMALL}))
    with pytest.raises(UserError, match="does not know O"):
        gpmlp.fit(*labelled(8), Recipe.model_validate({**SMALL, "baseline": {"network": TOY | {"checkpoint": "few"}}}))


def test_dynamics_conserve_the_energy_and_ase_gives_the_same_numbers(fitted):
    potential, _ = fitted
    atoms = Atoms(numbers=cluster().species.numpy(), positions=cluster(size=2.6).positions.numpy())
    atoms.calc = GPCalculator(potential)
    direct = potential(structures_from_ase([atoms]))
    assert atoms.get_potential_energy() == pytest.approx(float(direct.energies), abs=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), direct.forces.numpy(), atol=1e-12)
    MaxwellBoltzmannDistribution(atoms, temperature_K=60, rng=np.random.default_rng(0))
    dynamics, energies = VelocityVerlet(atoms, 0.25 * units.fs), []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()), interval=5)
    dynamics.run(100)
    moving = atoms.get_kinetic_energy()
    assert len(energies) == 21 and moving > 1e-3
    assert np.ptp(energies) < 0.02 * moving  # what the integrator does with steps of 0.25 fs


def test_a_network_as_baseline_is_learned_against(tmp_path, capsys):
    """Labels that are the network's own: nothing is left to learn; and the file demands the network."""
    structures, targets = labelled(12)
    recipe = Recipe.model_validate(
        {"descriptor": SOAP, **SMALL, "baseline": {"network": TOY | {"checkpoint": "truth"}, "zbl": False}}
    )
    potential, _ = gpmlp.fit(structures, targets, recipe)
    fresh = labelled(4, seed=3)
    assert float((potential(fresh[0]).forces - fresh[1].forces).abs().max()) < 1e-6
    path = tmp_path / "delta.gpmlp"
    gpmlp.save(potential, path)
    assert main(["info", str(path)]) == 0
    assert "energies of the network 'truth'" in " ".join(capsys.readouterr().out.split())
    assert torch.equal(gpmlp.load(path)(fresh[0]).forces, potential(fresh[0]).forces)


def test_isolated_atoms_have_their_energy_with_a_network_below():
    """Energies that are given are those of the whole model, not of what is added to the network."""
    structures, targets = labelled(8)
    energies = {"H": -13.0, "C": -1000.0, "O": -2000.0}
    baseline = {"network": TOY, "isolated_atoms": energies, "zbl": False}
    potential, _ = gpmlp.fit(
        structures, targets, Recipe.model_validate({"descriptor": SOAP, **SMALL, "baseline": baseline})
    )
    alone = structure([[0, 0, 0]], [6])
    total = sum(float(b(alone).energies) for b in potential.baselines)
    assert total == pytest.approx(-1000.0, abs=1e-9)


def test_descriptors_go_to_other_processes(fitted):
    potential, _ = fitted
    one = labelled(1, seed=2)[0]
    made = pickle.loads(pickle.dumps(potential.terms[0].descriptor))
    surroundings = complete(one)
    expected = potential.terms[0].descriptor(surroundings).features
    torch.testing.assert_close(made(surroundings).features, expected, atol=1e-14, rtol=0)


def test_periodic_structures_have_stresses_that_are_derivatives():
    crystals = Structures.concatenate([crystal("triclinic", SPECIES[1:], seed) for seed in range(6)])
    truth = NetworkEnergies("network", "truth", TRUTH)(crystals)
    unknown = Targets.unlabelled(crystals)
    known = {"energies": truth.energies, "forces": truth.forces, "stresses": truth.stresses}
    recipe = {"descriptor": [SOAP, TOY | {"weight": 0.5}], **SMALL, "inducing": {"n": 8, "gradients": 6}}
    potential, _ = gpmlp.fit(crystals, Targets(**(vars(unknown) | known)), Recipe.model_validate(recipe))
    one = crystals.select([0])
    found = potential(one, variance="all")
    strain = torch.zeros(3, 3, dtype=torch.float64)
    strain[0, 1] = strain[1, 0] = 1e-4
    energies = []
    for sign in (1, -1):
        deformation = torch.eye(3).double() + sign * strain
        energies.append(potential(one.with_positions(one.positions @ deformation, one.cells @ deformation)).energies)
    slope = float((energies[0] - energies[1]) / 4e-4 / one.volumes)
    assert slope == pytest.approx(float(found.stresses[0, 0, 1]), abs=1e-7)
    assert bool(found.stresses_variance.total.isfinite().all())
    # twice the cell is the same crystal
    shifted = one.positions + one.cells[0, 0]
    twice = structure(
        torch.cat([one.positions, shifted]), torch.cat([one.species] * 2), one.cells[0] * torch.tensor([[2.0], [1], [1]]),
        (True, True, True),
    )  # fmt: skip
    torch.testing.assert_close(potential(twice).energies, 2 * found.energies, atol=1e-9, rtol=0)
    torch.testing.assert_close(potential(twice).forces[:2], found.forces, atol=1e-9, rtol=0)


# SevenNet ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sevennet():
    pytest.importorskip("sevenn")
    return networks.find_network("sevennet", "7net-0").network


def test_sevennet_is_invariant_to_rotations_and_reflections_in_double_precision(sevennet):
    """As published it is neither: coupling coefficients in single precision, and no parity."""
    one = cluster()
    near = neighbors.find_neighbors(one, sevennet.cutoff)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    for turn in (q, -q):
        first, second = (
            torch.cat(list(sevennet.layers(one.species, near.centers, near.neighbors, v)), 1)
            for v in (near.vectors(one), near.vectors(one) @ turn)
        )
        assert float((first - second).abs().max()) < 1e-11 * float(first.abs().max())


def test_sevennet_has_the_energy_of_its_own_package(sevennet):
    """The mean of the energies of a structure and its mirror image, as the package computes them in single precision."""
    from sevenn.calculator import SevenNetCalculator

    one, energies = cluster(), []
    for sign in (1, -1):
        atoms = Atoms(numbers=one.species.numpy(), positions=sign * one.positions.numpy())
        atoms.calc = SevenNetCalculator("7net-0", device="cpu")
        energies.append(atoms.get_potential_energy())
    found = NetworkEnergies("sevennet", "7net-0", networks.find_network("sevennet", "7net-0").sha256)(one)
    assert float(found.energies) == pytest.approx(np.mean(energies), abs=2e-3)


def test_jacobians_of_sevennet_are_derivatives(sevennet):
    one = cluster((6, 1, 8))
    scalars = LayerScalars(sevennet, (2, 5))
    with torch.no_grad():
        jacobian = scalars.jacobian(one)
        near = neighbors.find_neighbors(one, sevennet.cutoff)
        slope = 0
        for steps, factor in ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12)):
            points = one.positions.clone()
            points[1, 2] += steps * STEP
            slope = slope + factor / STEP * scalars(one.species, near, points, one.cells, one.structure_of_atom)
    torch.testing.assert_close(jacobian[:, 1, 2], slope, atol=1e-6 * float(jacobian.abs().max()), rtol=0)


def test_other_weights_than_the_known_ones_are_not_read(monkeypatch):
    pytest.importorskip("sevenn")
    from gpmlp.descriptors import sevennet as module

    name, _ = module.CHECKPOINTS["7net-0"]
    monkeypatch.setitem(module.CHECKPOINTS, "7net-0", (name, "0" * 64))
    with pytest.raises(UserError, match="not read"):
        module.load_sevennet("7net-0")


def test_without_the_package_a_sentence_says_what_to_install(monkeypatch):
    from gpmlp.descriptors import sevennet as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'gpmlp\[pretrained\]'"):
        module.load_sevennet("7net-l3i5")
