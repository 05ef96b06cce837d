"""The TorchSim adaptor: the same numbers as the potential itself, dynamics that conserve energy, batches with autobatching."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("torch_sim", reason="torch-sim is not installed (pip install 'gpmlp[torchsim]')")

import torch_sim
from ase.build import bulk
from torch.utils._python_dispatch import TorchDispatchMode

import gpmlp
from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.torchsim import GPModel
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.recipe import Recipe

NEW = hasattr(torch_sim, "Integrator")  # TorchSim 0.6 names its integrators and optimizers; 0.3 has functions
if NEW:
    INTEGRATORS = {i.value: i for i in torch_sim.Integrator}
    FIRE = {"fire": (torch_sim.Optimizer.fire, {})} | {
        f"fire {f.value}": (torch_sim.Optimizer.fire, {"init_kwargs": {"cell_filter": f}}) for f in torch_sim.CellFilter
    }
else:
    exported = ("nve", "nvt_langevin", "npt_langevin")
    INTEGRATORS = {name: getattr(torch_sim.integrators, name) for name in exported}
    FIRE = {n: (getattr(torch_sim.optimizers, n), {}) for n in ("fire", "unit_cell_fire", "frechet_cell_fire")}
ON_DEVICE = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
WAYS = pytest.mark.parametrize(
    "way", ["pairs", "tables", *(pytest.param(f"cuda {name}", marks=ON_DEVICE) for name in ("pairs", "tables"))]
)


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


def state_of(atoms, way="pairs", dtype=torch.float64):
    return torch_sim.io.atoms_to_state(atoms, torch.device("cuda" if way.startswith("cuda") else "cpu"), dtype)


def model_of(potential, way, kind=GPModel):
    return kind(potential.to("cuda") if way.startswith("cuda") else potential, tables=way.endswith("tables"))


class Asked(TorchDispatchMode):
    """Notes what would make the host wait for a device."""

    QUESTIONS = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "masked_select",
        "bincount",
        "equal",
        "is_nonzero",
        "repeat_interleave",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.QUESTIONS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Truth(GPModel):
    """A model each of whose answers is compared with the potential's own, which remembers nothing, on the CPU and on tensors as NumPy
    would lay them."""

    calls = 0

    def __init__(self, potential, tables) -> None:
        super().__init__(potential, "atom_energies", novelty=True, tables=tables)
        self.there = potential.to("cpu")

    def forward(self, state, **options):
        found = super().forward(state, **options)
        positions, cell = state.positions.double().cpu().contiguous(), state.cell.double().cpu().mT.contiguous()
        periodic = torch.as_tensor(state.pbc).cpu().expand(len(cell), 3)
        one = Structures(positions, cell, periodic, state.atomic_numbers.long().cpu(), state.system_idx.long().cpu())
        there = self.there(one, "atom_energies", novelty=True)
        expected = {
            "energy": there.energies,
            "forces": there.forces,
            "stress": there.stresses.nan_to_num(),
            "local_energy_std": there.atom_energies_variance.total.sqrt(),
            "novelty": there.novelty,
        }
        assert set(found) == set(expected)
        # numbers of a state in single precision are rounded; variances are differences, and their roots lose half of the digits
        close = 1e-4 if state.positions.dtype == torch.float32 else 1e-8
        for name, value in expected.items():
            assert (found[name].dtype, found[name].device) == (state.positions.dtype, state.positions.device), name
            by = {"rtol": 1e-3, "atol": 1e-5} if name == "local_energy_std" else {"rtol": close, "atol": close}
            torch.testing.assert_close(found[name].double().cpu(), value, msg=lambda m, n=name: f"{n}: {m}", **by)
        assert self.calls or (found["stress"].abs().amax((1, 2)) > 1e-4).all()  # both could be wrong
        self.calls += 1
        return found


def run(model, state, integrator, steps=8):
    """Dynamics so hot that neighbours change; gentler where the cell moves, whose barostats are violent with a few atoms."""
    torch.manual_seed(0)
    hot = {"timestep": 0.004, "temperature": 1500}
    if "npt" in integrator:
        pressure = state.positions.new_zeros(())
        hot = {"timestep": 0.002, "temperature": 300, "external_pressure": pressure}
    return torch_sim.integrate(system=state, model=model, integrator=INTEGRATORS[integrator], n_steps=steps, **hot)


@WAYS
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_every_call_of_dynamics_is_true(potential, integrator, way):
    model, start = model_of(potential, way, Truth), state_of(cells(), way)
    end = run(model, start, integrator)
    assert model.calls > 6 and float((end.positions - start.positions).norm(dim=1).max()) > 0.02
    assert ("npt" in integrator) == (not torch.equal(end.cell, start.cell))


@WAYS
@pytest.mark.parametrize("optimizer", FIRE)
def test_every_call_of_a_relaxation_is_true(potential, optimizer, way):
    """Forces become small, and with a filter the stress."""
    model, (method, options) = model_of(potential, way, Truth), FIRE[optimizer]
    never = torch_sim.runners.generate_force_convergence_fn(0.0, include_cell_forces=False)
    start = state_of(cells(), way)
    end = torch_sim.optimize(system=start, model=model, optimizer=method, convergence_fn=never, max_steps=25, **options)
    before, after = model(start), model(end)
    assert model.calls > 25
    assert float(after["forces"].norm(dim=1).max()) < 0.5 * float(before["forces"].norm(dim=1).max())
    moved = not torch.equal(end.cell, start.cell)
    assert moved == (optimizer != "fire")
    assert not moved or float(after["stress"].abs().max()) < float(before["stress"].abs().max())


@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["view", "contiguous"])
def test_every_layout_and_precision_of_a_state_is_true(potential, whole, dtype, way):
    """TorchSim's cells are views with vectors as columns; some of its functions copy them."""
    state, model = state_of(cells(), way, dtype), model_of(potential, way, Truth)
    state.cell = state.cell.contiguous() if whole else state.cell.mT.contiguous().mT
    state.positions = state.positions.contiguous() if whole else state.positions.T.contiguous().T
    for _ in range(3):
        model(state)
        state.positions += 0.1 * torch.sin(7 * state.positions)  # in place, as integrators do
    run(model, state, "nve", 3)


@WAYS
def test_every_call_for_a_slab_is_true(potential, way):
    """Periodic along two axes, where TorchSim can say so; and other systems afterwards."""
    slab = bulk("Cu", cubic=True).repeat((1, 1, 2))
    slab.rattle(0.05, seed=3)
    slab.center(vacuum=6.0, axis=2)
    state, model = state_of([slab], way), model_of(potential, way, Truth)
    state.pbc = torch.tensor([True, True, False]) if NEW else state.pbc
    run(model, state, "nvt_langevin")
    run(model, state_of(cells(), way), "nve", 2)


@WAYS
def test_every_call_of_autobatching_is_true(potential, way):
    """Systems that come and go: batches of a memory that holds two at a time, by bins, and as others have converged."""
    systems = [*cells(), *reversed(cells())]
    model, size = model_of(potential, way, Truth), {"memory_scales_with": "n_atoms", "max_memory_scaler": 9}
    bins = torch_sim.autobatching.BinningAutoBatcher(model=model, **size)
    torch_sim.static(system=state_of(systems, way), model=model, autobatcher=bins)
    flight = torch_sim.autobatching.InFlightAutoBatcher(model=model, **size)
    name = "fire frechet" if NEW else "frechet_cell_fire"
    method, options = FIRE[name]
    soon = torch_sim.runners.generate_force_convergence_fn(0.1, include_cell_forces=False)
    calls = model.calls
    end = torch_sim.optimize(
        system=state_of(systems, way), model=model, optimizer=method, autobatcher=flight, convergence_fn=soon, max_steps=40, **options
    )  # fmt: skip
    assert end.n_systems == 4 and model.calls > calls + 5
    assert float(model(end)["forces"].norm(dim=1).max()) < 0.2


@WAYS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torchsim_has_nothing_to_object(way, dtype):
    """Its own check of models, on crystals and a molecule."""
    from ase.build import molecule
    from torch_sim.models.interface import validate_model_outputs

    frames, rng = [], np.random.default_rng(0)
    for _ in range(4):
        for atoms in (bulk("Si", "diamond", a=5.43, cubic=True), bulk("Mg"), bulk("Fe"), molecule("C6H6")):
            atoms.rattle(0.08, rng=rng)
            frames.append(atoms)
    batch, generator = structures_from_ase(frames), torch.Generator().manual_seed(0)
    energies = torch.randn(len(batch), generator=generator, dtype=torch.float64)
    recipe = {"descriptor": {"cutoff": 4.0, "n_max": 2, "l_max": 1}, "inducing": {"n": 8, "gradients": 0}}
    noise = {"energy_per_atom": 0.05, "force": 0.1, "stress": 0.01}
    targets = replace(Targets.unlabelled(batch), energies=energies)
    model = gpmlp.fit(batch, targets, Recipe.model_validate(recipe | {"noise": noise, "calibration": False}))[0]
    validate_model_outputs(model_of(model, way), state_of(frames[:1], way).positions.device, dtype)


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
    wanted = "atom_energies", "sampled_forces"
    model = GPModel(potential, wanted, novelty=True, tables=True)
    for systems in (cells(), cells()[1:], cells()):
        found, there = model(state_of(systems)), potential(structures_from_ase(systems), wanted, novelty=True)
        close = {"rtol": 1e-8, "atol": 1e-9}
        for name, value in {"energy": there.energies, "forces": there.forces, "stress": there.stresses}.items():
            torch.testing.assert_close(found[name], value, **close)
        torch.testing.assert_close(found["novelty"], there.novelty, **close)
        std = there.atom_energies_variance.total.sqrt()
        torch.testing.assert_close(found["local_energy_std"], std, rtol=1e-5, atol=1e-8)
        std = there.sampled_forces_covariance.diagonal().total.sum(1).sqrt()
        torch.testing.assert_close(found["force_std"], std, rtol=1e-6, atol=1e-9)
        assert set(found) == {"energy", "forces", "stress", "novelty", "local_energy_std", "force_std"}


@WAYS
def test_dynamics(potential, way):
    """NVE of two systems at once: each keeps its energy, whatever the number of steps."""
    model, totals = model_of(potential, way), []
    nve = torch_sim.Integrator.nve if hasattr(torch_sim, "Integrator") else torch_sim.integrators.nve
    for steps in (1, 80):
        torch.manual_seed(0)
        end = torch_sim.integrate(
            system=state_of(cells(), way), model=model, integrator=nve, n_steps=steps, timestep=0.002, temperature=300
        )
        kinetic = 0.5 * (end.momenta.square().sum(1) / end.masses)
        totals.append(end.energy.new_zeros(2).index_add(0, end.system_idx, kinetic) + end.energy)
    assert float((end.positions - state_of(cells(), way).positions).norm(dim=1).max()) > 0.02  # it moved
    torch.testing.assert_close(*totals, rtol=0, atol=2e-3)


@WAYS
def test_relaxation(potential, way):
    """Rattled crystals relax until forces are small."""
    model = model_of(potential, way)
    fire = torch_sim.Optimizer.fire if hasattr(torch_sim, "Optimizer") else torch_sim.optimizers.fire
    small = torch_sim.runners.generate_force_convergence_fn(0.02, include_cell_forces=False)
    end = torch_sim.optimize(
        system=state_of(cells()[:1], way), model=model, optimizer=fire, convergence_fn=small, max_steps=500
    )
    assert float(model(end)["forces"].norm(dim=1).max()) < 0.03


@WAYS
def test_autobatching(potential, way):
    """As many systems at a time as fit: the same energies as all of them together."""
    model, systems = model_of(potential, way), [*cells(), *cells()]
    batcher = torch_sim.autobatching.BinningAutoBatcher(model=model, memory_scales_with="n_atoms", max_memory_scaler=9)
    found = torch_sim.static(system=state_of(systems, way), model=model, autobatcher=batcher)
    energies = torch.stack([f["potential_energy"].reshape(()).cpu() for f in found])
    torch.testing.assert_close(energies, potential(structures_from_ase(systems)).energies, rtol=1e-9, atol=1e-10)


@WAYS
def test_one_question_of_a_device_for_atoms_that_are_known(potential, way, monkeypatch):
    """Structures are made unchecked, and with them the cells, however many systems there are; others are looked at again, also where
    a state was changed in place."""
    model, state = model_of(potential, way), state_of([*cells()] * 8, way)
    looked, look = [], errors.check_cells
    monkeypatch.setattr(errors, "check_cells", lambda c, *rest: looked.append(len(c)) or look(c, *rest))
    model(state), model(state)
    looked.clear()
    for _ in range(3):
        state.positions += 1e-4
        with Asked() as seen:
            model._structures(state)
        assert seen.names == ["_local_scalar_dense"]
        model(state)
    assert not looked
    with Asked() as seen:
        model(state)
    # the same atoms? pairs missing? atoms on top of each other?
    assert "tables" not in way or seen.names == ["_local_scalar_dense"] * 3
    state.atomic_numbers[0] = 13
    with pytest.raises(UserError, match="system 0: the potential was not trained on Al"):
        model(state)
    state.atomic_numbers[0], state.cell[1] = 29, 0.0
    with pytest.raises(UserError, match="system 1: periodic along a lattice vector of zero length"):
        model(state)


def test_to_moves_the_potential_or_says_why_not(potential):
    model = GPModel(potential)
    assert model.to("cpu") is model and model.double() is model and model.device == torch.device("cpu")
    with pytest.raises(UserError, match=r"stays in torch.float64.*potential.to\(descriptors='float32'\)"):
        model.to(torch.float32)
    with pytest.raises(UserError, match="device 'meta' cannot be used"):
        model.to("meta")


def test_what_cannot_be_done_is_said(potential):
    with pytest.raises(UserError, match="needs a potential"):
        GPModel("model.gpmlp")
    with pytest.raises(UserError, match="variance"):
        GPModel(potential, "everything")
    with pytest.raises(UserError, match="more than local energies"):
        GPModel(potential, "forces", tables=True)
    with pytest.raises(UserError, match="system 0: the potential was not trained on Al"):
        GPModel(potential)(state_of([bulk("Al", cubic=True)]))


def test_the_example_of_this_version_runs(tmp_path, monkeypatch, capsys):
    """The one in docs/torchsim.md: relaxed cells of silicon are the same, whatever they began with."""
    root = Path(__file__).parents[1]
    recipe = {"descriptor": {"cutoff": 4.0, "n_max": 4, "l_max": 3}, "inducing": {"n": 40, "gradients": 0}}
    silicon, targets = gpmlp.read(root / "data/silicon/train.xyz")
    gpmlp.save(gpmlp.fit(silicon, targets, Recipe.model_validate(recipe))[0], tmp_path / "small.gpmlp")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs/torchsim.md").read_text(), re.DOTALL)
    mine = [block for block in blocks if block.startswith("# TorchSim 0.6" if NEW else "# TorchSim 0.3")]
    namespace: dict = {}
    exec(compile(mine[0], "docs/torchsim.md", "exec"), namespace)
    lengths = namespace["relaxed"].cell.diagonal(dim1=1, dim2=2)
    assert 5.2 < float(lengths.min()) and float(lengths.max() - lengths.min()) < 0.05
    assert namespace["found"]["novelty"].shape == (32,)
