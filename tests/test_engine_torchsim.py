"""The TorchSim adaptor: the same numbers as the potential itself, dynamics that conserve energy, batches with autobatching."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("torch_sim", reason="torch-sim is not installed (pip install 'gpmlp[torchsim]')")

import torch_sim
from ase.build import bulk

import gpmlp
from gpmlp.checks import UserError
from gpmlp.engines.torchsim import GPModel
from gpmlp.io.atoms import structures_from_ase
from gpmlp.recipe import Recipe


@pytest.fixture(scope="module")
def potential(tmp_path_factory):
    from ase.calculators.emt import EMT
    from ase.io import write

    frames, rng = [], np.random.default_rng(0)
    for scale in np.linspace(0.96, 1.04, 8):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell * scale, scale_atoms=True)
        atoms.rattle(0.12, rng=rng)
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        frames.append(atoms)
    path = tmp_path_factory.mktemp("cu") / "train.xyz"
    write(path, frames)
    recipe = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 16, "gradients": 0}}
    made, _ = gpmlp.fit(*gpmlp.read(path), Recipe.model_validate(recipe))
    return made


def cells():
    """Two systems of different sizes and shapes; the second is skewed, so that rows and columns of cells cannot be mixed up."""
    first, second = bulk("Cu", cubic=True), bulk("Cu").repeat((2, 2, 1))
    for seed, atoms in enumerate((first, second)):
        atoms.rattle(0.05, seed=seed)
    second.set_cell(second.cell @ np.array([[1, 0.03, 0], [0, 1, 0], [0.02, 0, 1]]), scale_atoms=True)
    return [first, second]


def state_of(atoms, dtype=torch.float64):
    return torch_sim.io.atoms_to_state(atoms, torch.device("cpu"), dtype)


def test_the_same_as_the_potential(potential):
    model = GPModel(potential, "all", novelty=True)
    found = model(state_of(cells()))
    there = potential(structures_from_ase(cells()), "all", novelty=True)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(found["energy"], there.energies, **close)
    torch.testing.assert_close(found["forces"], there.forces, **close)
    torch.testing.assert_close(found["stress"], there.stresses, **close)
    torch.testing.assert_close(found["novelty"], there.novelty, **close)
    for name, variance in {
        "energy_std": there.energies_variance,
        "local_energy_std": there.atom_energies_variance,
        "forces_std": there.forces_covariance.diagonal(),
        "stress_std": there.stresses_covariance.diagonal(),
    }.items():
        torch.testing.assert_close(found[name], variance.total.sqrt(), rtol=1e-5, atol=1e-8)
    plain = GPModel(potential)(state_of(cells()))
    assert set(plain) == {"energy", "forces", "stress"}


def test_on_tables_the_same_as_the_potential(potential):
    """All systems at once, then others, then the first ones again."""
    model = GPModel(potential, "atom_energies", novelty=True, tables=True)
    for systems in (cells(), cells()[1:], cells()):
        found, there = model(state_of(systems)), potential(structures_from_ase(systems), "atom_energies", novelty=True)
        close = {"rtol": 1e-8, "atol": 1e-9}
        for name, value in {"energy": there.energies, "forces": there.forces, "stress": there.stresses}.items():
            torch.testing.assert_close(found[name], value, **close)
        torch.testing.assert_close(found["novelty"], there.novelty, **close)
        std = there.atom_energies_variance.total.sqrt()
        torch.testing.assert_close(found["local_energy_std"], std, rtol=1e-5, atol=1e-8)
        assert set(found) == {"energy", "forces", "stress", "novelty", "local_energy_std"}


@pytest.mark.parametrize("tables", [None, True], ids=["pairs", "tables"])
def test_dynamics(potential, tables):
    """NVE of two systems at once: each keeps its energy, whatever the number of steps."""
    model, totals = GPModel(potential, tables=tables), []
    nve = torch_sim.Integrator.nve if hasattr(torch_sim, "Integrator") else torch_sim.integrators.nve
    for steps in (1, 80):
        torch.manual_seed(0)
        end = torch_sim.integrate(
            system=state_of(cells()), model=model, integrator=nve, n_steps=steps, timestep=0.002, temperature=300
        )
        kinetic = 0.5 * (end.momenta.square().sum(1) / end.masses)
        totals.append(end.energy.new_zeros(2).index_add(0, end.system_idx, kinetic) + end.energy)
    assert float((end.positions - state_of(cells()).positions).norm(dim=1).max()) > 0.02  # it moved
    torch.testing.assert_close(*totals, rtol=0, atol=2e-3)


@pytest.mark.parametrize("tables", [None, True], ids=["pairs", "tables"])
def test_relaxation(potential, tables):
    """Rattled crystals relax until forces are small."""
    model = GPModel(potential, tables=tables)
    fire = torch_sim.Optimizer.fire if hasattr(torch_sim, "Optimizer") else torch_sim.optimizers.fire
    small = torch_sim.runners.generate_force_convergence_fn(0.02, include_cell_forces=False)
    end = torch_sim.optimize(
        system=state_of(cells()[:1]), model=model, optimizer=fire, convergence_fn=small, max_steps=500
    )
    assert float(model(end)["forces"].norm(dim=1).max()) < 0.03


@pytest.mark.parametrize("tables", [None, True], ids=["pairs", "tables"])
def test_autobatching(potential, tables):
    """As many systems at a time as fit: the same energies as all of them together."""
    model, systems = GPModel(potential, tables=tables), [*cells(), *cells()]
    batcher = torch_sim.autobatching.BinningAutoBatcher(model=model, memory_scales_with="n_atoms", max_memory_scaler=9)
    found = torch_sim.static(system=state_of(systems), model=model, autobatcher=batcher)
    energies = torch.stack([f["potential_energy"].reshape(()) for f in found])
    torch.testing.assert_close(energies, potential(structures_from_ase(systems)).energies, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_done_is_said(potential):
    with pytest.raises(UserError, match="needs a potential"):
        GPModel("model.gpmlp")
    with pytest.raises(UserError, match="variance"):
        GPModel(potential, "everything")
    with pytest.raises(UserError, match="more than local energies"):
        GPModel(potential, "forces", tables=True)
    with pytest.raises(UserError, match="system 0: the potential was not trained on Al"):
        GPModel(potential)(state_of([bulk("Al", cubic=True)]))
