"""The label file: what is learned from it after a restart is, to the last bit, what was learned when the label came."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from dataclasses import replace

import ase.build
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.learning import labels as label_module
from gpmlp.learning.labels import LabelEntry, LabelFile, LabelRefusal, canonical_structure, format_entry, key_of

CHARGED_KEY = (
    "k6ff90c1f5e86fd64971268c90d69f6f"  # with moments and initial charges, before structures had total charges
)
PLAIN_KEY = (
    "k7406d6c8db31d0cdc14b027b9782345"  # of structure() and oracle 'o1', before structures had moments and charges
)


def structure(seed: int = 0, periodic: bool = True, n: int = 2) -> Structures:
    rng = np.random.default_rng(seed)
    cell = 5 * np.eye(3) + rng.standard_normal((3, 3)) / 3 if periodic else np.zeros((3, 3))
    return structures_from_ase([ase.Atoms("Cu" * n, rng.standard_normal((n, 3)), cell=cell, pbc=periodic)])


def entry(seed: int = 0, periodic: bool = True, **values) -> LabelEntry:
    rng = np.random.default_rng([seed, 1])
    asked = structure(seed, periodic)
    unknown = Targets.unlabelled(asked)
    stress = rng.standard_normal((3, 3))
    stress = torch.tensor(stress + stress.T)[None] if periodic else unknown.stresses
    targets = Targets(
        torch.tensor(rng.standard_normal(1) * 100),
        torch.tensor(rng.standard_normal((2, 3))),
        stress,
        unknown.energies_noise,
        unknown.forces_noise,
        unknown.stresses_noise,
        ("",),
    )
    return LabelEntry(asked, targets, key_of(asked, "o1"), **({"reason": "novelty 1.3 > 1", "oracle": "o1"} | values))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def assert_same(a: LabelEntry, b: LabelEntry) -> None:
    for name in ("positions", "cells", "periodic", "species"):
        assert bits(getattr(a.structure, name)) == bits(getattr(b.structure, name)), name
    for name in ("energies", "forces", "stresses", "energies_noise", "forces_noise", "stresses_noise"):
        first, second = getattr(a.targets, name), getattr(b.targets, name)
        assert bool((first.isnan() == second.isnan()).all()), name
        assert bits(first.nan_to_num()) == bits(second.nan_to_num()), name
    assert a.targets.config_types == b.targets.config_types
    assert (a.key, a.reason, a.oracle, dict(a.notes)) == (b.key, b.reason, b.oracle, dict(b.notes))


def test_reads_back_as_it_was_appended(tmp_path):
    tape = LabelFile(tmp_path / "labels.xyz")
    notes = {"step": 12, "walker": 0, "time_fs": 0.1 + 0.2, "phase": "first melt", "trusted": True}
    asked = [entry(0, notes=notes), entry(1, periodic=False), entry(2, reason='σ 3 > "2"\nC:\\x  = y')]
    appended = [tape.append(e) for e in asked]
    assert_same(appended[0], asked[0])
    assert appended[2].reason == "σ 3 > '2' C:/x = y"
    again = LabelFile(tmp_path / "labels.xyz")
    assert len(again) == len(tape) == 3 and not again.repaired
    for a, b in zip(again, appended, strict=True):
        assert_same(a, b)
        assert_same(again.find(a.key), a)
        assert a.key == key_of(a.structure, "o1")  # of what reads back too
    structures, targets = gpmlp.read(tmp_path / "labels.xyz")
    mine = again.structures_and_targets()
    assert torch.equal(structures.positions, mine[0].positions) and torch.equal(structures.cells, mine[0].cells)
    assert torch.equal(targets.energies, mine[1].energies) and torch.equal(targets.forces, mine[1].forces)
    assert torch.equal(targets.stresses.nan_to_num(), mine[1].stresses.nan_to_num())


def test_given_noise_and_kind_are_kept(tmp_path):
    e = entry(3)
    noise = torch.full_like(e.targets.forces, float("nan"))
    noise[0] = 0.1 / 3
    targets = Targets(
        *(e.targets.energies, e.targets.forces, e.targets.stresses),
        *(
            torch.tensor([0.001 / 3], dtype=torch.float64),
            noise,
            torch.tensor([0.01], dtype=torch.float64),
            ("liquid",),
        ),
    )
    e = LabelEntry(e.structure, targets, e.key, e.reason, e.oracle)
    assert_same(LabelFile(tmp_path / "labels.xyz").append(e), e)


number = st.floats(allow_nan=False, allow_infinity=False, width=64)
place = st.floats(-1e9, 1e9, width=64, exclude_min=True, exclude_max=True)  # beyond, structures are refused


@settings(max_examples=60, deadline=None)
@given(
    x=st.lists(place, min_size=6, max_size=6),
    f=st.lists(number, min_size=6, max_size=6),
    energy=number,
    reason=st.text(max_size=30),
)
def test_every_number_and_text_survives(x, f, energy, reason):
    asked = structures_from_ase([ase.Atoms("CuAu", np.reshape(x, (2, 3)))])
    unknown = Targets.unlabelled(asked)
    values = (torch.tensor([energy], dtype=torch.float64), torch.tensor(f, dtype=torch.float64).reshape(2, 3))
    rest = (unknown.stresses, unknown.energies_noise, unknown.forces_noise, unknown.stresses_noise, ("",))
    e = LabelEntry(asked, Targets(*values, *rest), key_of(asked, "o"), reason, "o", {"step": 1})
    back = label_module._parse(format_entry(e), "frame")
    assert bits(back.structure.positions) == bits(asked.positions)
    assert bits(back.targets.forces) == bits(values[1]) and bits(back.targets.energies) == bits(values[0])
    assert back.key == e.key
    again = label_module._parse(format_entry(back), "frame")
    assert again.reason == back.reason  # what could not be written was replaced once


def test_keys():
    a = structure(0)
    assert key_of(a) == key_of(structure(0)) == key_of(canonical_structure(a)) and key_of(a) != key_of(
        a, "other oracle"
    )
    moved = a.positions.clone()
    moved[0, 0] = np.nextafter(moved[0, 0].item(), 1e9)
    assert key_of(a.with_positions(moved)) != key_of(a)
    assert key_of(a.with_positions(a.positions * 0.0)) == key_of(a.with_positions(a.positions * -0.0))
    assert key_of(structure(0, periodic=False)) != key_of(a)
    assert bits(canonical_structure(a).positions) == bits(a.positions) and canonical_structure(a).names == a.names


def test_first_of_a_key_is_kept(tmp_path):
    tape = LabelFile(tmp_path / "labels.xyz")
    first = tape.append(entry(0))
    other = LabelEntry(first.structure, entry(5).targets, first.key)
    assert tape.append(other) is first and len(tape) == 1
    older = tmp_path / "older.xyz"  # without checksums
    older.write_bytes(format_entry(first) + format_entry(replace(other, oracle=first.oracle)))
    assert_same(next(iter(LabelFile(older))), first)


def test_cut_at_every_byte(tmp_path):
    path = tmp_path / "labels.xyz"
    tape = LabelFile(path)
    kept = [tape.append(entry(0))]
    before = path.stat().st_size
    last = tape.append(entry(2, periodic=False))
    whole = path.read_bytes()
    for size in range(before, len(whole)):
        path.write_bytes(whole[:size])
        broken = tmp_path / "labels.xyz.broken"
        broken.unlink(missing_ok=True)
        cut = LabelFile(path)
        assert [e.key for e in cut] == [e.key for e in kept], size
        assert path.stat().st_size == before
        assert bool(cut.repaired) == (size > before)
        if size > before:
            assert broken.read_bytes() == whole[before:size] and "was moved to" in cut.repaired
    assert_same(cut.append(entry(2, periodic=False)), last)
    assert path.read_bytes() == whole


def test_first_frame_cut_and_zeros_after_a_power_cut(tmp_path):
    path = tmp_path / "labels.xyz"
    tape = LabelFile(path)
    tape.append(entry(0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert len(LabelFile(path)) == 0 and path.stat().st_size == 0
    path.write_bytes(whole + b"\0" * 200)
    assert len(LabelFile(path)) == 1 and path.read_bytes() == whole
    path.write_bytes(whole + format_entry(entry(1)).replace(b"energy=", b"energy=\0"))
    assert len(LabelFile(path)) == 1 and path.read_bytes() == whole


def test_broken_in_the_middle_is_not_cut_off(tmp_path):
    path = tmp_path / "labels.xyz"
    one, two, three = (format_entry(entry(i)) for i in range(3))
    for damage in (one + two[:-40] + three, one + b"garbage\n" + two + three, one + two.replace(b"Cu", b"?!") + three):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="repair it by hand"):
            LabelFile(path)
        assert path.read_bytes() == damage


def test_disk_really_full(tmp_path):
    """The system stops the write in its middle (RLIMIT_FSIZE); nothing of it stays."""
    tape = LabelFile(tmp_path / "labels.xyz")
    tape.append(entry(0))
    whole = tape.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        with pytest.raises(UserError, match="could not be written: File too large; the file is as it was before"):
            tape.append(entry(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tape.path.read_bytes() == whole and len(tape) == 1
    tape.append(entry(1))
    assert len(LabelFile(tape.path)) == 2


def test_disk_full(tmp_path, monkeypatch):
    tape = LabelFile(tmp_path / "labels.xyz")
    write = os.write

    def half(descriptor, data):
        if len(data) < 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(UserError, match="No space left on device"):
        tape.append(entry(0))
    assert tape.path.read_bytes() == b"" and len(tape) == 0
    monkeypatch.undo()
    assert len(LabelFile(tape.path)) == 0


def test_vanished_folder(tmp_path):
    (tmp_path / "run").mkdir()
    tape = LabelFile(tmp_path / "run" / "labels.xyz")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="No such file or directory"):
        tape.append(entry(0))


def test_refusals(tmp_path):
    tape = LabelFile(tmp_path / "labels.xyz")
    assert tape.refused_in_a_row == 0
    tape.refuse(LabelRefusal("ka", "not converged", 2, "/scratch/ka.2"))
    tape.append(entry(0))
    assert tape.refused_in_a_row == 0
    tape.refuse(LabelRefusal("kb", "crashed", 1, "/scratch/kb.1"))
    tape.refuse(LabelRefusal("kc", "crashed", 1, "/scratch/kc.1"))
    tape.refuse(LabelRefusal("kc", "other", 1, "/scratch/kc.1"))
    with open(tape.refused_path, "ab") as file:
        file.write(b'{"key": "kd", "rea')  # killed here
    again = LabelFile(tape.path)
    assert [r.key for r in again.refusals] == ["ka", "kb", "kc"] and again.refused_in_a_row == 2
    assert again.refusal("kc").reason == "crashed" and again.refusal("kd") is None
    again.refuse(LabelRefusal("kd", "crashed", 1, ""))
    assert LabelFile(tape.path).refused_in_a_row == 3


def test_refusal_on_a_full_disk(tmp_path, monkeypatch):
    tape = LabelFile(tmp_path / "labels.xyz")
    tape.refuse(LabelRefusal("ka", "crashed", 1, ""))
    whole = tape.refused_path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        with pytest.raises(UserError, match="could not be written"):
            tape.refuse(LabelRefusal("kb", "crashed", 1, ""))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tape.refused_path.read_bytes() == whole and tape.refusal("kb") is None


def test_no_place_and_no_labels(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        LabelFile(tmp_path / "nowhere" / "labels.xyz")
    with pytest.raises(UserError, match="holds no labels yet"):
        LabelFile(tmp_path / "labels.xyz").structures_and_targets()
    with pytest.raises(ValueError, match="cannot be the name of a note"):
        format_entry(entry(0, notes={"energy": 1.0}))


def test_moments_and_charges_are_part_of_a_label(tmp_path):
    """By site, as they were, numbers or vectors; another order of spins is another label, none is the label it always was."""
    plain = structure()
    assert key_of(plain, "o1") == PLAIN_KEY
    magnet = replace(
        plain,
        magnetic_moments=torch.tensor([0.1, -0.7]).double(),
        initial_charges=torch.tensor([-1.0, 1 / 3], dtype=torch.float64),
        charges=None,
    )
    other = replace(magnet, magnetic_moments=-magnet.magnetic_moments)
    tilted = replace(plain, magnetic_moments=torch.tensor([[0.1, 0, 1], [-1, 0, 0]]).double())
    zero = replace(plain, magnetic_moments=torch.zeros(2), initial_charges=-torch.zeros(2))
    alone = replace(magnet, initial_charges=None, charges=None)
    ion, other_ion = (replace(plain, charges=torch.tensor([q], dtype=torch.float64)) for q in (1.0, -1 / 3))
    keys = {key_of(s, "o1") for s in (plain, magnet, other, tilted, alone, ion, other_ion)}
    assert key_of(magnet, "o1") == CHARGED_KEY
    assert len(keys) == 7 and key_of(zero, "o1") == PLAIN_KEY
    file = LabelFile(tmp_path / "labels.xyz")
    for asked in (plain, magnet, other, tilted, ion, other_ion):
        file.append(replace(entry(), structure=asked, key=key_of(asked, "o1")))
    for asked, back in zip((plain, magnet, other, tilted, ion, other_ion), LabelFile(file.path), strict=True):
        assert key_of(back.structure, "o1") == key_of(asked, "o1") == back.key
        for name in ("magnetic_moments", "initial_charges", "charges"):
            was, now = getattr(asked, name), getattr(back.structure, name)
            assert (was is None) == (now is None) and (was is None or bits(was) == bits(now))
        assert key_of(canonical_structure(asked), "o1") == back.key
    read_again = gpmlp.read(file.path)[0]
    assert read_again.initial_charges.tolist() == [0, 0, -1, 1 / 3, -1, 1 / 3, *[0] * 6]
    assert read_again.charges.tolist() == [0, 1 / 3 - 1, 1 / 3 - 1, 0, 1, -1 / 3]


# ---------------------------------------------------------------- files that are not what was written

NUMBER = rb"(-?\d+\.\d+(?:e-?\d+)?)"
STRUCTURE = "its elements, positions, cell, `key` or `oracle` are not those"
LABEL = "its energy, forces, stress or notes are not those that were written"


def changed(frame: bytes, pattern: bytes, new: bytes) -> bytes:
    """A frame with the first match (its group 1) replaced."""
    match = re.search(pattern, frame, re.MULTILINE)
    assert match and match[1] != new
    return frame[: match.start(1)] + new + frame[match.end(1) :]


ALTERED = {
    "energy": (rb" energy=" + NUMBER, b"-3.25", LABEL),
    "free energy": (rb"free_energy=" + NUMBER, b"-3.25", LABEL),
    "no energy": (rb" (energy=\S+ free_energy=\S+)", b"step2=1", LABEL),
    "force": (rb"^Cu \S+ \S+ \S+ " + NUMBER, b"0.5", LABEL),
    "no force": (rb"^Cu \S+ \S+ \S+ " + NUMBER, b"NaN", "cannot be read"),
    "garbage": (rb"^Cu \S+ \S+ \S+ " + NUMBER, b"1.0.0", "cannot be read"),
    "one digit of a force": (rb"^Cu \S+ \S+ \S+ -?\d\.\d+(\d)", b"", LABEL),
    "stress": (rb'stress="' + NUMBER, b"0.5", LABEL),
    "step": (rb"step=(12)", b"13", LABEL),
    "reason": (rb"(novelty)", b"nowhere", LABEL),
    "element": (rb"^(Cu)", b"Ag", STRUCTURE),
    "position": (rb"^Cu " + NUMBER, b"0.5", STRUCTURE),
    "cell": (rb'Lattice="' + NUMBER, b"5.5", STRUCTURE),
    "periodicity": (rb'pbc="(T T T)', b"T T F", STRUCTURE),
    "key": (rb'key="?k(.)', b"x", STRUCTURE),
    "oracle": (rb'oracle="?(o1)', b"o2", STRUCTURE),
    "checksum": (rb"checksum=s(......)", b"000000", LABEL),
    "no checksum": (rb"( checksum=\S+)$", b"", "was not written by the run, or lost its checksum"),
}


@pytest.fixture
def three(tmp_path):
    """(path, frames) of a file."""
    tape = LabelFile(tmp_path / "labels.xyz")
    frames, before = [], 0
    for i in range(3):
        tape.append(entry(i, notes={"step": 12}))
        frames.append(tape.path.read_bytes()[before:])
        before = tape.path.stat().st_size
    return tape.path, frames


@pytest.mark.parametrize("i", [0, 1, 2])
@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_frame_is_refused(name, i, three):
    path, frames = three
    pattern, new, what = ALTERED[name]
    if name == "no checksum" and i == 0:
        i, what = 1, "was not written by the run"  # a first one alone may be of an older version
    frames[i] = changed(frames[i], pattern, new)
    path.write_bytes(b"".join(frames))
    with pytest.raises(UserError, match=re.escape(what)) as error:
        LabelFile(path)
    assert f"labels.xyz: frame {i} " in str(error.value)
    assert path.read_bytes() == b"".join(frames)


@pytest.mark.parametrize(
    ("order", "what"),
    [
        ([0, 2, 1], "frame 1 .* is whole but comes after frame 2"),
        ([1, 0, 2], "frame 0 .* is whole but comes after frame 1"),
        ([0, 2], "frame 1 .* was altered"),
        ([1, 2], "frame 0 .* was altered"),
        ([0, 1, 1, 2], "frame 2 .* is whole but comes after frame 0"),
        ([0, 1, 0, 2], "frame 2 .* is whole but is the first one"),
    ],
)
def test_another_order_is_refused(order, what, three):
    path, frames = three
    path.write_bytes(b"".join(frames[i] for i in order))
    with pytest.raises(UserError, match=what):
        LabelFile(path)


def test_what_a_checkpoint_knows(three, tmp_path):
    """A file may hold more than a checkpoint knows of, and never less; and not that of another run."""
    path, frames = three
    tape = LabelFile(path)
    for n in range(4):
        tape.check_frames(n, tape.checksums[n - 1] if n else "")
    path.write_bytes(frames[0] + frames[1])
    with pytest.raises(UserError, match="holds 2 labels, of 3 that the run had"):
        LabelFile(path).check_frames(3, tape.checksums[2])
    other = LabelFile(tmp_path / "other.xyz")
    for i in (3, 1, 2):
        other.append(entry(i))
    with pytest.raises(UserError, match="the first 3 labels are not those that the run wrote"):
        other.check_frames(3, tape.checksums[2])


def test_files_of_older_versions(tmp_path):
    """Without checksums: keys and missing numbers are checked, and new labels seal what was there before."""
    path = tmp_path / "labels.xyz"
    one, two = (format_entry(entry(i)) for i in range(2))
    path.write_bytes(one + two)
    tape = LabelFile(path)
    assert tape.unsealed == 2
    tape.append(entry(2))
    assert LabelFile(path).unsealed == 2 and len(LabelFile(path)) == 3
    whole = path.read_bytes()
    for name, what in (("element", STRUCTURE), ("key", STRUCTURE), ("no energy", "it has no energy or not all forces")):
        path.write_bytes(changed(whole, *ALTERED[name][:2]))
        with pytest.raises(UserError, match=re.escape(what)):
            LabelFile(path)
    path.write_bytes(changed(whole, *ALTERED["force"][:2]))  # seen by the checksum of the third
    with pytest.raises(UserError, match="frame 2 .* was altered"):
        LabelFile(path)


def test_lines_that_are_no_refusals(tmp_path):
    tape = LabelFile(tmp_path / "labels.xyz")
    tape.refuse(LabelRefusal("ka", "not converged", 2, ""))
    with open(tape.refused_path, "ab") as file:
        file.write(b'{"something": "else"}\n{}\n')
    with pytest.raises(UserError, match="refused.jsonl: a line of it is no refusal"):
        LabelFile(tape.path)
