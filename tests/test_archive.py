"""Model files: what goes in comes out, and nothing but a whole, unaltered file is accepted."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.io import archive
from gpmlp.io.ase_atoms import from_ase
from gpmlp.io.files import atomic_write, check_target


class Double:
    """Anything with state() can be archived."""

    def __init__(self, header: dict, tensors: dict) -> None:
        self.header, self.tensors = header, tensors

    def state(self):
        return self.header, self.tensors


HEADER = {"name": 'Grüße "quoted" \\', "value": 0.1, "missing": float("nan"), "archive_sha256": "f" * 64}


@pytest.fixture
def double():
    whole = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    tensors = {"a": whole, "strided": whole.T, "shared": whole[1], "scalar": torch.tensor(3), "none": torch.zeros(0, 2)}
    return Double(HEADER, tensors)


@pytest.fixture
def saved(tmp_path, double):
    path = tmp_path / "m.gpmlp"
    archive.save(double, path)
    return path


def test_labels_without_net_forces(tmp_path):
    """Pairs of atoms of an exact potential: the labels show no noise at all, and the file can be read."""
    frames = []
    for k in range(8):
        atoms = Atoms("H2", [(0, 0, 0), (0.7 + 0.05 * k, 0, 0)])
        force = np.array([(0.1 * k - 0.3, 0, 0)])
        atoms.calc = SinglePointCalculator(atoms, energy=0.01 * k * k, forces=np.concatenate([force, -force]))
        frames.append(atoms)
    potential = gpmlp.fit(*from_ase(frames))[0]
    assert potential.variances.label_noise["forces"] == 0
    gpmlp.save(potential, tmp_path / "m.gpmlp")
    assert gpmlp.load(tmp_path / "m.gpmlp").variances.label_noise == potential.variances.label_noise


def test_round_trip(saved, double):
    again = archive.load(saved, Double)
    assert again.header["name"] == HEADER["name"] and again.header["value"] == 0.1
    assert np.isnan(again.header["missing"])
    for name, tensor in double.tensors.items():
        assert again.tensors[name].dtype == tensor.dtype
        assert torch.equal(again.tensors[name], tensor)
    content = archive.read_header(saved, potential=False)
    assert content["format"] == archive.FORMAT_VERSION
    assert "eV/angstrom^3" in content["units"]


def test_the_same_model_gives_the_same_bytes(saved, double, tmp_path):
    archive.save(double, tmp_path / "again.gpmlp")
    assert saved.read_bytes() == (tmp_path / "again.gpmlp").read_bytes()


def test_every_flipped_bit_is_noticed(saved, tmp_path):
    data = saved.read_bytes()
    altered = tmp_path / "altered.gpmlp"
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        altered.write_bytes(flipped)
        with pytest.raises(UserError, match="altered.gpmlp: "):
            archive.load(altered, Double)


def test_truncated_files(saved, tmp_path):
    data = saved.read_bytes()
    short = tmp_path / "short.gpmlp"
    for size in (0, 4, 8, 9, 40, len(data) // 2, len(data) - 1):
        short.write_bytes(data[:size])
        with pytest.raises(UserError, match="short.gpmlp: .*(empty|not a gpmlp|cut off|damaged)"):
            archive.load(short, Double)
    short.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="damaged or was altered"):
        archive.load(short, Double)


def test_newer_format(saved, monkeypatch, double, tmp_path):
    monkeypatch.setattr(archive, "FORMAT_VERSION", 7)
    archive.save(double, tmp_path / "newer.gpmlp")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"is of format 7, written by gpmlp .*reads formats up to 4. Upgrade gpmlp"):
        archive.load(tmp_path / "newer.gpmlp", Double)


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("hello, this is no model")
    with pytest.raises(UserError, match="is not a gpmlp model file"):
        archive.load(tmp_path / "text", Double)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(UserError, match="holds tensors .* but is not a gpmlp model file"):
        archive.load(tmp_path / "other", Double)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "fake", metadata={"gpmlp": json.dumps({"format": 1})})
    with pytest.raises(UserError, match="its header lacks the format or the model"):
        archive.load(tmp_path / "fake", Double)
    with pytest.raises(UserError, match="there is no such file"):
        archive.load(tmp_path / "none", Double)
    with pytest.raises(UserError, match="is a folder"):
        archive.load(tmp_path, Double)


def test_potential_round_trip_predicts_the_same(model_file, potential, small_set):
    before, after = potential(small_set[0]), archive.load(model_file)(small_set[0])
    for name in ("energies", "atom_energies", "forces", "stresses"):
        # the same numbers through the same operations: equal to the last bit
        assert torch.equal(getattr(before, name), getattr(after, name))


# --- atomic writing


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_full_disk_leaves_the_old_file(saved, double, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="could not be written: No space left on device; the old file is untouched"):
        archive.save(double, saved)
    assert saved.read_bytes() == before
    assert leftovers(saved.parent) == ["m.gpmlp"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_that_is_full(double):
    with pytest.raises(UserError, match="/dev/full: could not be written: No space left"):
        archive.save(double, "/dev/full")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, text=True) as file:
        file.write("half of the n")
        raise error
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == ["a.txt"]


def test_atomic_follows_links_and_keeps_permissions_open(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    with atomic_write(link, text=True) as file:
        file.write("new")
    assert link.is_symlink() and target.read_text() == "new"


def test_targets_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="the folder .*missing does not exist; make it first"):
        check_target(tmp_path / "missing" / "m.gpmlp")
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        check_target(tmp_path)
