"""The reader of extended XYZ: what ASE gives, quicker; compression, cut off and claimed frames, names in any case."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import resource
import time

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from hypothesis import given, settings
from hypothesis import strategies as st

from gpmlp.core.errors import UserError
from gpmlp.io import extxyz
from gpmlp.io.ase_atoms import read, read_frames
from gpmlp.io.structure_files import read_file


def labelled(atoms: Atoms, seed: int = 0) -> Atoms:
    generator = np.random.default_rng(seed)
    atoms.rattle(0.1, rng=generator)
    results = {"energy": generator.normal(), "forces": generator.normal(size=(len(atoms), 3))}
    if atoms.pbc.all():
        results["stress"] = generator.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def rich() -> list[Atoms]:
    """Frames with all that extended XYZ can hold."""
    crystal, water, slab = labelled(bulk("SiC", "zincblende", 4.36, cubic=True)), labelled(molecule("H2O")), bulk("Cu")
    crystal.info |= {
        "config_type": "a b",
        "flag": True,
        "n": 3,
        "vector": np.arange(4),
        "text": 'it\'s "quoted"',
        "uid": "12",
    }
    crystal.info |= {"nested": {"a": [1, 2]}, "matrix": np.eye(2), "virial": np.arange(9.0).reshape(3, 3), "empty": ""}
    crystal.info |= {"words": "T F T", "mixed": "1 two", "negative": -2.5e-7, "big": 10**25, "nan": float("nan")}
    crystal.set_array("tags", np.arange(8))
    crystal.set_array("force_noise", np.linspace(1, 2, 8))
    crystal.set_array("flags", np.arange(8) % 2 == 0)
    crystal.set_velocities(np.random.default_rng(0).normal(size=(8, 3)))
    crystal.set_constraint(FixAtoms([0, 3]))
    water.set_constraint(FixCartesian([1], mask=[True, False, True]))
    slab.pbc = (True, True, False)
    return [crystal, water, slab, Atoms("H")]


def written(atoms) -> bytes:
    file = io.StringIO()
    ase.io.write(file, atoms, format="extxyz")
    return file.getvalue().encode()


def by_ase(text: bytes) -> Atoms:
    return ase.io.read(io.StringIO(text.decode()), index=0, format="extxyz")


def assert_equal(ours: Atoms, theirs: Atoms) -> None:
    np.testing.assert_array_equal(ours.numbers, theirs.numbers)
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    np.testing.assert_array_equal(ours.cell.array, theirs.cell.array)
    np.testing.assert_array_equal(ours.pbc, theirs.pbc)
    assert ours.info.keys() == theirs.info.keys()
    assert ours.arrays.keys() == theirs.arrays.keys()
    for mine, other in ((ours.info, theirs.info), (ours.arrays, theirs.arrays)):
        for key, value in other.items():
            np.testing.assert_array_equal(mine[key], value, err_msg=key)
            assert np.asarray(mine[key]).dtype.kind == np.asarray(value).dtype.kind, key
    assert (ours.calc is None) == (theirs.calc is None)
    if theirs.calc is not None:
        assert ours.calc.results.keys() == theirs.calc.results.keys()
        for key, value in theirs.calc.results.items():
            np.testing.assert_array_equal(ours.calc.results[key], value)
    assert [c.todict() for c in ours.constraints].__repr__() == [c.todict() for c in theirs.constraints].__repr__()


def test_frames_are_those_of_ase():
    for frame in rich():
        text = written(frame)
        assert_equal(extxyz.parse_frame(text).to_atoms(), by_ase(text))


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "a comment of words, with 3 numbers",
        "i =        0, time =        0.000, E =       -17.1643447024",
        'Lattice="1 0 0 0 2 0 0 0 3"',
        "Lattice='1 0 0 0 2 0 0 0 3' pbc=[T, F, T]",
        'Properties=species:S:1:pos:R:3 energy = -3.5 note="a\\"b" list={1 2 3}',
        "energy=-1.5e3 name=a=b flag",
        'words="1,2,3" value="1.5" other=1_000 code=0x10 exp=1d5 inf=inf',
    ],
)
def test_comments_are_parsed_as_ase_parses_them(comment):
    text = f"1\n{comment}\nH 0.5 1 -2e-3\n".encode()
    assert_equal(extxyz.parse_frame(text).to_atoms(), by_ase(text))


WORDS = st.text("abcXYZ019_.+-, =\"'{}[]\\", max_size=30)


@given(WORDS)
@settings(max_examples=300, deadline=None)
def test_any_comment_is_parsed_as_ase_parses_it_or_refused(comment):
    try:
        expected = extxyz.key_val_str_to_dict(comment) if comment.strip() else {}
    except (ValueError, LookupError):
        expected = None
    try:
        got = extxyz.parse_comment(comment)
    except extxyz.ParseError as error:
        assert expected is None or "given twice" in str(error)
        return
    assert expected is not None
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(got[key], value)


def test_columns_of_every_type():
    text = (
        b"2\nProperties=Z:I:1:pos:R:3:name:S:1:pair:I:2:ok:L:1:word:S:2\n"
        b"14 0 0 0 a 1 2 T x y\n6 1 1 1.5 b 3 4 False z w\n"
    )
    ours, theirs = extxyz.parse_frame(text).to_atoms(), by_ase(text)
    assert_equal(ours, theirs)
    assert ours.numbers.tolist() == [14, 6] and ours.arrays["ok"].tolist() == [True, False]


@pytest.mark.parametrize("lattice", ["lattice", "LATTICE", "Lattice"])
@pytest.mark.parametrize("pbc", ["", ' PBC="T T F"', " pbc='1 1 0'"])
def test_names_in_any_case(lattice, pbc):
    text = (
        f'1\n{lattice}="3 0 0 1 4 0 0 0 5"{pbc} properties=SPECIES:S:1:Pos:R:3:force:R:3 energy = -1\ncu 0 0 0 1 2 3\n'
    )
    frame = extxyz.parse_frame(text.encode())
    assert frame.cell.tolist() == [[3, 0, 0], [1, 4, 0], [0, 0, 5]]
    assert frame.pbc.tolist() == [True, True, not pbc]
    assert frame.numbers.tolist() == [29] and frame.info == {"energy": -1}
    np.testing.assert_array_equal(frame.arrays["force"], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("comment", "line", "message"),
    [
        ('Lattice="1 2 3"', "H 0 0 0", r"Lattice must hold nine numbers.*\(line 5\)"),
        ('pbc="maybe"', "H 0 0 0", r"pbc must hold three of T and F.*\(line 5\)"),
        ("Properties=species:S:1:pos:R:3:forces:R:3", "H 0 0 0 1 2", r"6 columns where Properties name 7 \(line 6\)"),
        ("Properties=species:S:1:pos:R", "H 0 0 0", r"Properties must be name:type:columns.*\(line 5\)"),
        ("Properties=species:S:1:pos:R:3:pos:R:3", "H 0 0 0 0 0 0", r"Properties name 'positions' twice \(line 5\)"),
        ("Properties=species:S:1:force:R:3", "H 0 0 0", r"Properties name no positions"),
        ("Properties=pos:R:3", "0 0 0", r"Properties name no elements"),
        ("energy=1 energy=2", "H 0 0 0", r"'energy' is given twice, as 1 and as 2 \(line 5\)"),
        ("", "H 0 zero 0", r"could not convert string to float: 'zero' \(line 6\)"),
        ("", "Qq 0 0 0", r"'Qq' is no element \(line 6\)"),
        ("", "1 0 0 0", r"'1' is no element"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, comment, line, message):
    (tmp_path / "a.xyz").write_text(f"1\n\nH 0 0 0\n1\n{comment}\n{line}\n")
    with pytest.raises(UserError, match=r"a\.xyz: frame 1 of it cannot be read: " + message):
        read(tmp_path / "a.xyz")


# --- files

OPEN = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}


@pytest.mark.parametrize(
    "name", ["a.XYZ", "a.xyz.gz", "a.xyz.bz2", "a.xyz.xz", "a.extxyz.GZ", "plain", "a.txt", "zipped.dat"]
)
def test_format_and_compression_are_told_by_content(tmp_path, name, small_atoms):
    packing = name.lower().rsplit(".", 1)[-1]
    opener = gzip.open if name == "zipped.dat" else OPEN.get(packing, open)
    text = written(small_atoms[:4])
    with opener(tmp_path / name, "wb") as file:
        file.write(text)
    structures, targets = read(tmp_path / name)
    assert len(structures) == 4 and not targets.forces.isnan().any()
    # and a blank line between frames is refused there as everywhere
    lines = text.split(b"\n")
    with opener(tmp_path / name, "wb") as file:
        file.write(b"\n".join([*lines[:6], b"", *lines[6:]]))
    with pytest.raises(UserError, match="line 7 is blank but more follows; frames after frame 0 would be lost"):
        read(tmp_path / name)


def test_broken_compression(tmp_path, small_atoms):
    packed = gzip.compress(written(small_atoms))
    (tmp_path / "a.xyz.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"a\.xyz\.gz: cannot be decompressed: .*is the file complete"):
        read(tmp_path / "a.xyz.gz")


def test_zstd_without_a_library(tmp_path, monkeypatch):
    (tmp_path / "a.xyz.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(extxyz.importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"a\.xyz\.zst: is compressed by zstd, which this Python cannot read"):
        read(tmp_path / "a.xyz.zst")


@pytest.mark.parametrize("count", ["1000000000000", "9" * 15, "9" * 400, "99999"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_count_that_the_file_does_not_hold(tmp_path, count, pack, small_atoms):
    path = tmp_path / ("a.xyz.gz" if pack else "a.xyz")
    text = written(small_atoms[:2]) + f"{count}\n\n".encode() + b"H 0 0 0\n" * 1000
    path.write_bytes(gzip.compress(text) if pack else text)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cut = (
        r"frame 2 is cut off: 1000 of \d+ atoms"
        if pack
        else r"frame 2 \(line \d+\) is cut off: the file is too short for the"
    )
    with pytest.raises(UserError, match="a number of atoms must stand there" if len(count) > 15 else cut):
        read(path)
    assert time.perf_counter() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_frames_that_are_left_out_are_not_parsed(tmp_path, small_atoms, monkeypatch):
    (tmp_path / "a.xyz").write_bytes(written(small_atoms))
    parsed, parse = [], extxyz.parse_frame
    monkeypatch.setattr(extxyz, "parse_frame", lambda text: parsed.append(1) or parse(text))
    assert read_file(tmp_path / "a.xyz", "::5").numbers == [0, 5, 10, 15]
    assert len(parsed) == 4
    frames, numbers = read_frames(tmp_path / "a.xyz", -1)
    assert numbers == [15] and len(parsed) == 5
    assert_equal(frames[0], by_ase(written(small_atoms[15])))


def test_carriage_returns(tmp_path, small_atoms):
    (tmp_path / "a.xyz").write_bytes(written(small_atoms[:3]).replace(b"\n", b"\r\n"))
    frames, _ = read_frames(tmp_path / "a.xyz")
    for frame, expected in zip(frames, small_atoms[:3], strict=True):
        assert_equal(frame, by_ase(written(expected)))


def test_numbers_of_fortran_and_a_mark_of_byte_order(tmp_path):
    """As programs in Fortran and editors of Windows write them."""
    text = '1\nLattice="3.0D0 0 0 0 3 0 0 0 3.D+00" energy=-1.25D-01 note=1.0Dx Properties=species:S:1:pos:R:3\nCu 1.0d0 -2.5D-1 0\n'
    (tmp_path / "a.xyz").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "b.dat").write_bytes(b"\xef\xbb\xbf" + 2 * text.encode())
    for name, n in (("a.xyz", 1), ("b.dat", 2)):
        structures, targets = read(tmp_path / name)
        assert len(structures) == n and targets.energies.tolist() == n * [-0.125]
        assert structures.positions[0].tolist() == [1.0, -0.25, 0.0] and structures.volumes[0] == 27
    (tmp_path / "c.xyz").write_text(text.replace("-2.5D-1", "-2.5Q-1"))
    with pytest.raises(
        UserError, match="frame 0 of it cannot be read: could not convert string to float: '-2.5Q-1' .line 3"
    ):
        read(tmp_path / "c.xyz")


def test_text_of_another_encoding_and_leading_blank_lines(tmp_path):
    """Said in a sentence, whatever the file is called and however it is compressed."""
    text = io.StringIO()
    ase.io.write(text, rich()[:2], format="extxyz")
    (tmp_path / "a.xyz").write_bytes(text.getvalue().encode("utf-16"))
    (tmp_path / "b.dat").write_bytes(gzip.compress(b"\n\n" + text.getvalue().encode()))
    with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
        read_file(tmp_path / "a.xyz")
    with pytest.raises(UserError, match="line 1 is blank; a number of atoms must stand there"):
        read_file(tmp_path / "b.dat")
