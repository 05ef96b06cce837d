"""Fitted potentials: what they keep, what they refuse, and dynamics that conserve energy."""

from __future__ import annotations

import json
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from ase.calculators.emt import EMT
from systems import (
    CELLS,
    DESCRIPTORS,
    KERNELS,
    TERMS,
    OwnTerm,
    cluster,
    crystal,
    descriptor,
    random_term,
    structure,
    targets_of,
)

from gpmlp.core import units
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures, chunk_structures
from gpmlp.fitting.fit import fit
from gpmlp.potential import potential as potential_module
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

SMALL = {"cutoff": 3.4, "n_max": 3, "l_max": 2, "sigma_atom": 0.5}


def _training() -> tuple[Structures, Targets]:
    """Molecules and crystals of three species, labelled by an energy term of the family that is fitted."""
    structures = Structures.concatenate(
        [cluster(seed=s) for s in range(6)] + [crystal(kind, (6, 8, 1)) for kind in CELLS]
    )
    return structures, targets_of(structures, TERMS["soap gto"]()(structures))


def _recipe(**changes) -> Recipe:
    return Recipe.model_validate(
        {"descriptor": SMALL, "kernel": {"zeta": 2}, "inducing": {"n": 20, "gradients": 2}} | changes
    )


@pytest.fixture(scope="module")
def fitted():
    structures, targets = _training()
    return fit(structures, targets, _recipe(), validation=(structures, targets))


def test_the_potential_is_its_terms_and_baselines(fitted):
    potential, _ = fitted
    structures = Structures.concatenate([cluster(seed=11), crystal("slab")])
    found = potential(structures)
    terms = [OwnTerm(term.descriptor, term.kernel, term.blocks) for term in potential.terms]
    parts = [term(structures) for term in (*terms, *potential.baselines)]
    torch.testing.assert_close(found.energies, sum(p.energies for p in parts), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.forces, sum(p.forces for p in parts), atol=1e-12, rtol=0)
    per_structure = found.energies.new_zeros(2).index_add(0, structures.structure_of_atom, found.atom_energies)
    torch.testing.assert_close(per_structure, found.energies, atol=1e-12, rtol=1e-12)


def test_forces_and_stress_of_the_whole_are_derivatives_of_its_energy(fitted):
    potential, _ = fitted
    one, step = crystal("triclinic", (6, 8, 1)), 1e-4  # A; error step^2 f'''/6 ~ 1e-7, see test_physics.py
    found = potential(one)
    for atom, axis in ((0, 0), (2, 1)):
        sides = []
        for sign in (-1, 1):
            moved = one.positions.clone()
            moved[atom, axis] += sign * step
            sides.append(float(potential(one.with_positions(moved)).energies))
        assert float(found.forces[atom, axis]) == pytest.approx(-(sides[1] - sides[0]) / (2 * step), abs=1e-5)
    sides = []
    for sign in (-1, 1):
        strain = torch.eye(3, dtype=torch.float64)
        strain[0, 1] += sign * step / 2
        strain[1, 0] += sign * step / 2
        sides.append(float(potential(one.with_positions(one.positions @ strain, one.cells @ strain)).energies))
    assert float(found.stresses[0, 0, 1] * one.volumes) == pytest.approx((sides[1] - sides[0]) / (2 * step), abs=1e-5)


def test_predictions_do_not_depend_on_chunks(fitted, monkeypatch):
    potential, _ = fitted
    structures, _ = _training()
    whole = potential(structures)
    monkeypatch.setattr(potential_module, "LIST_ATOMS", 1)
    single = potential(structures)
    torch.testing.assert_close(single.energies, whole.energies, atol=1e-12, rtol=1e-13)
    torch.testing.assert_close(single.forces, whole.forces, atol=1e-11, rtol=0)
    torch.testing.assert_close(single.stresses, whole.stresses, atol=1e-11, rtol=0, equal_nan=True)
    assert [len(part) for part in chunk_structures(structures, 12)] == [2, 2, 2, 4, 2]


def test_a_potential_is_made_again_from_its_state(fitted):
    potential, _ = fitted
    header, tensors = potential.state()
    again = Potential.from_state(json.loads(json.dumps(header)), tensors)
    structures, _ = _training()
    for name in ("energies", "forces"):  # the same numbers through the same operations
        assert torch.equal(getattr(again(structures), name), getattr(potential(structures), name))
    assert again.species == (1, 6, 8)
    assert again.cutoff == potential.cutoff == 3.4
    assert again.noise == potential.noise


def test_a_model_fitted_by_the_evidence_of_older_versions_is_read(fitted):
    header, tensors = fitted[0].state()
    old = header | {"recipe": header["recipe"] | {"evidence": "vfe"}}
    assert Potential.from_state(old, tensors).recipe == fitted[0].recipe


def test_species_it_was_not_trained_on_are_refused_by_name(fitted):
    potential, _ = fitted
    batch = Structures.concatenate([cluster(), structure([[0, 0, 0], [0, 0, 1.6]], (6, 14))])
    with pytest.raises(
        UserError, match=r"structure 0: the potential was not trained on Si \(Z = 14\); it knows H, C, O"
    ):
        potential(batch)
    with pytest.raises(UserError, match="no structures to predict"):
        potential(cluster().select([]))


def test_the_report_tells_what_happened(fitted):
    potential, report = fitted
    structures, _ = _training()
    assert report.rows == {"energies": 12, "forces": 3 * structures.n_atoms, "stresses": 30}
    assert sum(report.environments.values()) == structures.n_atoms
    assert sum(report.centres.values()) == pytest.approx(20, abs=2)
    assert 0 < report.rank <= report.columns
    assert report.jitter == 0
    assert report.validation_errors.n_structures == 12
    assert [name for name, _, _ in report.stages][:3] == ["data", "inducing points", "covariances"]
    assert (
        potential.report == json.loads(json.dumps(report.as_dict(), default=list))
        or potential.report == report.as_dict()
    )
    # the residuals that the factor knows are those of the potential itself
    found = potential(structures)
    targets = _training()[1]
    assert report.train_rmse["forces"] == pytest.approx(
        float((found.forces - targets.forces).square().mean().sqrt()), rel=1e-6
    )


@pytest.mark.parametrize("name", [n for n in DESCRIPTORS if n.startswith("dscribe")])
def test_fits_with_descriptors_of_dscribe(name):
    structures = Structures.concatenate([cluster((6, 1, 1), seed) for seed in range(5)] + [crystal("slab", (6, 1))])
    targets = targets_of(structures, TERMS["soap gto"]()(structures))
    potential, report = fit(
        structures, targets, _recipe(descriptor=SMALL | {"name": name}, inducing={"n": 12, "gradients": 3})
    )
    header, tensors = potential.state()
    again = Potential.from_state(json.loads(json.dumps(header)), tensors)
    assert torch.equal(again(structures).energies, potential(structures).energies)
    spread = float(targets.forces.square().mean().sqrt())
    assert report.train_rmse["forces"] < 0.5 * spread


def test_single_precision_fits_agree_as_far_as_they_can():
    structures, targets = _training()
    double, _ = fit(structures, targets, _recipe(noise={"energy_per_atom": 0.01, "force": 0.1, "stress": 0.01}))
    single, _ = fit(
        structures, targets, _recipe(dtype="float32", noise={"energy_per_atom": 0.01, "force": 0.1, "stress": 0.01})
    )
    a, b = double(structures), single(structures)
    assert b.energies.dtype == torch.float64  # as it was asked
    # rounding of 6e-8 times the condition of the weights; well below the noises given
    assert (a.energies - b.energies).div(structures.counts).abs().max() < 0.01
    assert (a.forces - b.forces).abs().max() < 0.1


def test_fits_are_reproducible():
    structures, targets = _training()
    made = [
        fit(structures, targets, _recipe(inducing={"n": 20, "gradients": 1, "method": "random"}, seed=s))[0]
        for s in (1, 1, 2)
    ]
    energies = [p(structures).energies for p in made]
    assert torch.equal(energies[0], energies[1])
    assert not torch.equal(energies[0], energies[2])


def test_duplicated_data_do_no_harm():
    """Every structure three times with noise larger by the root of three is the same data."""
    structures, targets = _training()
    index = list(range(len(structures))) * 3
    noise = np.array([0.01, 0.1, 0.01])
    names = ("energy_per_atom", "force", "stress")
    thrice, report = fit(
        structures.select(index),
        targets.select(structures, index),
        _recipe(noise=dict(zip(names, noise * 3**0.5, strict=True))),
    )
    assert report.jitter == 0
    once, single = fit(structures, targets, _recipe(noise=dict(zip(names, noise, strict=True))))
    assert report.rank == single.rank
    # copies change the order in which greedy rounds take centres, so not all of the 20 are the same; half the noise is allowed
    a, b = thrice(structures), once(structures)
    assert (a.energies - b.energies).div(structures.counts).abs().max() < 0.005


@pytest.mark.parametrize(
    ("change", "recipe", "message"),
    [
        (lambda s, t: (s.select([]), t.select(s, [])), {}, "There are no training structures"),
        (lambda s, t: (s, Targets.unlabelled(s)), {}, "No structure has an energy, forces or a stress to learn from"),
        (lambda s, t: (s, t.select(s, [0, 1])), {}, "The targets are of 2 structures .* the structures are 12"),
        (lambda s, t: (s, t), {"inducing": {"n": 1000}}, "asks for 1000 inducing points, but the training data hold only 48"),
        (lambda s, t: (s, t), {"baseline": {"isolated_atoms": {"C": 0.0}}}, "gives no energy for H, O"),
        (
            lambda s, t: (s, replace(t, stresses=torch.zeros(12, 3, 3).double())), {},
            "structure 0: has a stress but is not periodic or has no volume",
        ),
        (
            lambda s, t: (s, replace(t, config_types=("liquid",) * 12)),
            {"noise": {"config_types": {"liqiud": {"force": 0.1}}}},
            "noise.config_types names 'liqiud', .* Perhaps you meant 'liquid'",
        ),
    ],
)  # fmt: skip
def test_fit_refuses(change, recipe, message):
    with pytest.raises(UserError, match=message):
        fit(*change(*_training()), _recipe(**recipe))


# dynamics -------------------------------------------------------------------------------------------------------------------


def _copper(count: int) -> tuple[Structures, Targets]:
    """Rattled 8-atom cells of fcc copper with energies, forces and stresses of ASE's effective medium theory."""
    rng = np.random.default_rng(5)
    parts, labels = [], {"energies": [], "forces": [], "stresses": []}
    for k in range(count):
        frame = ase.build.bulk("Cu", cubic=True) * (2, 1, 1)
        frame.set_cell(frame.cell.array @ (np.eye(3) + 0.01 * rng.standard_normal((3, 3))), scale_atoms=True)
        frame.rattle(0.05 + 0.01 * (k % 10), rng=rng)
        frame.calc = EMT()
        parts.append(structure(frame.positions, frame.numbers, frame.cell.array, (True, True, True)))
        labels["energies"].append(frame.get_potential_energy())
        labels["forces"].append(frame.get_forces())
        labels["stresses"].append(frame.get_stress(voigt=False))
    structures = Structures.concatenate(parts)
    known = {
        "energies": torch.tensor(labels["energies"], dtype=torch.float64),
        "forces": torch.tensor(np.concatenate(labels["forces"])),
        "stresses": torch.tensor(np.array(labels["stresses"])),
    }
    return structures, replace(Targets.unlabelled(structures), **known)


def _velocity_verlet(potential, start: Structures, mass: float, kelvin: float, dt: float, steps: int) -> np.ndarray:
    """Total energy per atom, eV, after each step of dt fs."""
    generator = torch.Generator().manual_seed(0)
    velocity = torch.randn(start.n_atoms, 3, generator=generator, dtype=torch.float64)
    velocity = (velocity - velocity.mean(0)) * (units.BOLTZMANN * kelvin / mass) ** 0.5
    dt *= units.FEMTOSECOND
    position, force, total = start.positions, potential(start).forces, []
    for _ in range(steps):
        velocity = velocity + 0.5 * dt * force / mass
        position = position + dt * velocity
        found = potential(start.with_positions(position))
        force = found.forces
        velocity = velocity + 0.5 * dt * force / mass
        total.append((float(found.energies) + 0.5 * mass * float(velocity.square().sum())) / start.n_atoms)
    return np.array(total)


def test_dynamics_in_a_fitted_potential_conserve_energy():
    """Drift = slope of a straight line through the total energy x 5 ps: below 1e-5 eV/atom, in a crystal at 300 K.

    Velocity Verlet has no drift of its own at 2 fs (an eightieth of the fastest period of copper), only an oscillation of
    1e-5 eV/atom that a fit over 30 periods averages out to 1e-6: what is left is the potential's, and any force that is not the
    gradient of the energy, or a jump at the cutoff, would show. Seen: 6e-7.
    """
    potential, _ = fit(
        *_copper(24), _recipe(descriptor={"cutoff": 3.5, "n_max": 4, "l_max": 3}, inducing={"n": 12, "gradients": 3})
    )
    frame = ase.build.bulk("Cu", cubic=True) * (2, 1, 1)
    start = structure(frame.positions, frame.numbers, frame.cell.array, (True, True, True))
    total = _velocity_verlet(potential, start, 63.546, 600.0, 2.0, 2500)  # half of it becomes potential energy
    time = np.arange(len(total)) * 2e-3  # ps
    assert abs(np.polyfit(time, total, 1)[0] * 5.0) < 1e-5
    assert np.ptp(total) < 5e-4  # and it is bounded meanwhile


def test_dynamics_with_every_kernel_conserve_energy():
    """Short runs of a random potential per kernel, atoms crossing the cutoff: the error of Verlet falls with the square of the step."""
    start = crystal("cubic", (6, 8, 1))
    for name, kernel in KERNELS.items():
        term = random_term(descriptor("soap optimal"), kernel, scale=0.2)
        spread = [
            np.ptp(_velocity_verlet(term, start, 12.0, 1500.0, dt, steps)) for dt, steps in ((1.0, 40), (0.5, 80))
        ]
        # 4 for a smooth potential, up to the next order in dt and where the extremes are sampled; first-order errors would give 2
        assert spread[0] / spread[1] > 3, name
