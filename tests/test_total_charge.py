"""The total charge of a structure: by which names it is read, what keeps it, and who is told of it."""

from __future__ import annotations

from dataclasses import replace

import ase.build
import ase.io
import counting_oracle
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from learning_runs import contents, crystal, finish, prepare, recipe
from systems import cluster, dimer

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.engines import md
from gpmlp.engines.ase import GPCalculator
from gpmlp.io.ase_atoms import from_ase, read, structures_from_ase, to_ase, write_frames
from gpmlp.io.charges import is_total_charge
from gpmlp.learning.loop import learn
from gpmlp.learning.oracles.oracle import CalculatorOracle, OracleRecipe
from gpmlp.learning.recipe import DynamicsRecipe
from gpmlp.learning.walker import Walker


def ion(charge: float, key: str = "charge", **values) -> Atoms:
    atoms = Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 2.5]], **values)
    atoms.info[key] = charge
    return atoms


@pytest.mark.parametrize(
    "key", ["charge", "Charge", "total_charge", "tot_charge", "net_charge", "totalcharge", "total-charge", "qtot"]
)
def test_names_of_the_total_charge(tmp_path, key):
    path = tmp_path / "ions.xyz"
    path.write_text(f"1\n{key}=-1\nCl 0 0 0\n1\n\nCl 0 0 0\n1\n{key}=1.5\nNa 0 0 0\n")
    structures, _ = read(path)
    assert structures.charges.tolist() == [-1, 0, 1.5] and structures.charges.dtype == torch.float64
    assert structures.select([2, 0]).charges.tolist() == [1.5, -1]


@pytest.mark.parametrize("key", ["charges", "charge_state", "core_charge", "initial_charge", "q", "nuclear_charge"])
def test_names_that_are_no_total_charge(key):
    assert not is_total_charge(key)
    assert structures_from_ase([ion(-1, key)]).charges.tolist() == [0]


@pytest.mark.parametrize("value", ["neutral", [1, -1], float("nan"), True])
def test_a_charge_that_is_no_number(value):
    with pytest.raises(
        UserError, match="frame 1: `charge` must be the total charge of the structure, one finite number"
    ):
        structures_from_ase([ion(0), ion(value)])


def test_charges_that_contradict_each_other():
    twice = ion(1)
    twice.info["total_charge"] = 0
    with pytest.raises(
        UserError, match="frame 0: `charge` is 1 and `total_charge` is 0; a structure has one total charge"
    ):
        from_ase([twice])
    with pytest.raises(UserError, match="frame 0: `charge` is 1, but the initial charges of the atoms sum to 0.5"):
        from_ase([ion(1, charges=[0.5, 0.0])])
    rounded = structures_from_ase([ion(1, charges=[0.97, 0.0]), Atoms("NaCl", charges=[0.7, 0.2996]), ion(0)])
    assert rounded.charges.tolist() == [1, 1, 0]  # a sum of rounded charges is a whole number


def test_the_charge_stays_with_its_structure():
    one = replace(dimer(2.0), charges=torch.tensor([-1]))
    batch = Structures.concatenate([cluster(), one])
    assert batch.charges.tolist() == [0, -1] and cluster().charges.dtype == torch.float64
    again = batch.select([1, 0, 1]).to(dtype=torch.float32)
    assert again.charges.tolist() == [-1, 0, -1] and again.charges.dtype == torch.float64
    moved = one.with_positions(2 * one.positions).with_unchecked_positions(one.positions, one.cells)
    assert moved.charges.tolist() == [-1]
    frames = to_ase(batch)
    assert "charge" not in frames[0].info and frames[1].info["charge"] == -1
    assert structures_from_ase(frames).charges.tolist() == [0, -1]
    assert structures_from_ase(frames).fingerprints() == batch.fingerprints() != cluster().fingerprints() * 2


def test_a_charge_through_files(tmp_path):
    frames = [ion(-1), ion(1 / 3, "total_charge"), ion(0), ion(1, charges=[1.0, 0.0])]
    structures, targets = from_ase(frames)
    write_frames(tmp_path / "a.xyz", to_ase(structures, targets))
    back = read(tmp_path / "a.xyz")[0]
    assert torch.equal(back.charges, structures.charges) and back.charges.tolist() == [-1, 1 / 3, 0, 1]
    assert back.fingerprints() == structures.fingerprints()


def test_the_calculator_notices_another_charge(potential):
    """ASE compares neither info nor what it says; a charge that did not change costs nothing."""
    frame, asked = ase.build.bulk("Cu", cubic=True), []

    class Noting(GPCalculator):
        def _predict(self):
            asked.append(self.structures)
            return super()._predict()

    frame.calc = Noting(potential)
    for change in ({}, {"charge": 0}, {"charge": 1}, {}, {"total_charge": -1}, {"total_charge": -1}):
        for key in ("charge", "total_charge"):
            frame.info.pop(key, None)
        frame.info |= change
        frame.get_forces()
        frame.get_potential_energy()
    assert [float(s.charges) for s in asked] == [0, 0, 1, 0, -1]
    frame.info.pop("total_charge")
    frame.set_initial_charges([1.0, 0, 0, 0])
    frame.get_potential_energy()
    frame.positions[0] += 0.1
    frame.get_potential_energy()
    assert [float(s.charges) for s in asked[5:]] == [1, 1]


def test_the_charge_through_dynamics(tmp_path):
    """Every frame says it, and a run is not gone on with under another charge."""
    atoms = crystal()
    atoms.info["charge"] = -1
    path = tmp_path / "md.xyz"
    settings = md.MDSettings(steps=4, interval=2, temperature_K=300.0)
    with md.record_trajectory(path, None) as append:
        for state in md.run_dynamics(atoms, EMT(), settings):
            append(state)
    assert [frame.info["charge"] for frame in ase.io.read(path, ":")] == [-1] * 3
    assert md.resume_trajectory(path, None, atoms).info["charge"] == -1
    atoms.info["charge"] = 1
    with pytest.raises(UserError, match="is a run with the total charge -1, but the start has 1; give the start"):
        md.resume_trajectory(path, None, atoms)


def test_the_charge_through_walkers():
    atoms = crystal()
    atoms.info |= {"total_charge": 2, "config_type": "ion"}
    walker = Walker.from_atoms(0, atoms, DynamicsRecipe(temperature_K=300, steps=10), seed=1)
    again = Walker.from_state(*walker.state())
    assert walker.atoms.info == again.atoms.info == {"charge": 2}


def test_an_oracle_is_told_of_the_charge(tmp_path):
    """A class of the user's sees it in info and as the sum of initial charges; a code with a keyword gets the keyword."""
    pytest.importorskip("tblite")
    from tblite.ase import TBLite

    atoms = ase.build.molecule("H2O")
    atoms.info["charge"] = 1
    atoms.calc = TBLite(method="GFN2-xTB", charge=1, verbosity=0)
    wanted = atoms.get_potential_energy(), atoms.get_forces()
    for name, kwargs in (("tblite", {}), ("tblite.ase:TBLite", {"method": "GFN2-xTB", "verbosity": 0})):
        oracle = CalculatorOracle(OracleRecipe(calculator=name, kwargs=kwargs, check_forces=False))
        targets = oracle.label(structures_from_ase([atoms]))
        assert float(targets.energies) == pytest.approx(wanted[0], abs=1e-6)
        np.testing.assert_allclose(targets.forces.numpy(), wanted[1], atol=1e-4)


def test_a_charged_start_is_labelled_as_one(tmp_path, monkeypatch):
    """The charge reaches each question to the oracle, before and after an interruption, and is in every file."""
    monkeypatch.setenv(counting_oracle.LOG, str(tmp_path / "answers"))
    start, asked, plain = crystal(), [], counting_oracle.Counting.calculate
    start.info["total_charge"] = -1

    def noting(self, atoms=None, *more):
        asked.append((atoms.info.get("charge"), round(float(atoms.get_initial_charges().sum()), 9)))
        plain(self, atoms, *more)

    monkeypatch.setattr(counting_oracle.Counting, "calculate", noting)
    whole, broken = (prepare(tmp_path / name, start) for name in ("whole", "broken"))
    last = finish(recipe(), whole)
    for k, _ in enumerate(learn(recipe(), broken)):
        if k == 9:
            break
    finish(recipe(), broken, resume=True)
    assert contents(whole) == contents(broken)
    assert len(asked) >= 2 * last.labels > 6 and set(asked) == {(-1, -1)}
    for name in ("labels.xyz", "trajectory.xyz"):
        assert {frame.info["charge"] for frame in ase.io.iread(whole / "out" / name)} == {-1}
    assert set(gpmlp.read(whole / "out" / "labels.xyz")[0].charges.tolist()) == {-1}


def test_a_surrogate_of_a_charged_frame_is_refused(tmp_path):
    start = crystal()
    start.info["charge"] = 1
    folder = prepare(tmp_path, start)
    with pytest.raises(UserError, match="frame 0 has a total charge, and a surrogate that `carve` cuts"):
        next(iter(learn(recipe(carve={"above": 2}), folder)))
