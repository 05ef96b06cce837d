"""Files of structures: several of them, patterns, progress, special files and links."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import bulk
from ase.constraints import FixBondLength

from gpmlp.cli import main
from gpmlp.core.errors import UserError
from gpmlp.io import ase_atoms, structure_files
from gpmlp.io.ase_atoms import read, read_frames, write_frames
from gpmlp.learning.initial_structures import read_starts


@pytest.fixture
def two(tmp_path, small_atoms):
    (tmp_path / "b").mkdir()
    write_frames(tmp_path / "one.xyz", small_atoms[:3])
    write_frames(tmp_path / "two.xyz", small_atoms[3:5])
    write_frames(tmp_path / "b/one.xyz", small_atoms[5:6])
    return tmp_path


def test_several_files_and_patterns(two, small_atoms):
    structures, targets = read([two / "two.xyz", str(two / "on*.xyz")])
    assert structures.names == ("two.xyz frame 0", "two.xyz frame 1", *(f"one.xyz frame {i}" for i in range(3)))
    assert len(targets) == 5 and targets.energies[2] == small_atoms[0].get_potential_energy()
    # the name of a file that is not alone with it has its folder
    structures, _ = read(str(two / "**/one.xyz"), ":1")
    assert set(structures.names) == {f"{two / 'one.xyz'} frame 0", f"{two / 'b/one.xyz'} frame 0"}
    with pytest.raises(UserError, match=r"\*\.abc: no file fits this pattern"):
        read(str(two / "*.abc"))
    for twice in ([two / "one.xyz", two / "*.xyz"], [two / "one.xyz", two / "b/../one.xyz"]):
        with pytest.raises(UserError, match="is given twice"):
            read(twice)
    with pytest.raises(UserError, match="No file of structures was given"):
        read([])


def test_files_with_names_of_their_own(two, small_atoms):
    """Each file is of one source, which need not be that of another."""
    frames = [frame.copy() for frame in small_atoms[:2]]
    for frame, labelled in zip(frames, small_atoms, strict=False):
        frame.info["REF_energy"], frame.arrays["REF_forces"] = labelled.get_potential_energy(), labelled.get_forces()
    write_frames(two / "ref.xyz", frames)
    data = ase_atoms.read_labelled([two / "one.xyz", two / "ref.xyz"])
    assert not data.targets.energies.isnan().any()
    first, second = (finding.message for finding in data.findings)
    assert "one.xyz: energies from `free_energy` or `energy` in 3" in first
    assert "ref.xyz: energies from `REF_energy` in 2" in second


def test_a_name_with_brackets_is_a_file(tmp_path, small_atoms):
    write_frames(tmp_path / "a[1].xyz", small_atoms[:1])
    assert len(read(tmp_path / "a[1].xyz")[0]) == 1


def test_fit_takes_several_files(two, monkeypatch, capsys):
    monkeypatch.chdir(two)
    write_frames("more.xyz", read_frames("one.xyz")[0] + read_frames("two.xyz")[0])
    options = ["--set", "inducing.n=4", "--set", "inducing.gradients=0", "--set", "descriptor.cutoff=4"]
    assert main.main(["fit", "more.xyz", "b/*.xyz", "-o", "m.gpmlp", *options]) == 0, capsys.readouterr().err
    assert main.main(["info", "m.gpmlp"]) == 0
    shown = capsys.readouterr().out
    assert "training more.xyz" in shown and "training 2 one.xyz" in shown
    assert main.main(["evaluate", "m.gpmlp", "b/one.xyz", "two.xyz", "--no-variance"]) == 0
    assert "b/one.xyz: is the file this model was trained on" in capsys.readouterr().err
    assert main.main(["fit", "one.xyz", "two.xyz", "-o", "two.xyz"]) == 2
    assert "two.xyz: is to be written as the model" in capsys.readouterr().err


def test_progress(two, monkeypatch):
    monkeypatch.setattr(structure_files, "EVERY", 2)
    said = []
    read(two / "one.xyz", progress=lambda *report: said.append(report))
    assert said == [("reading", 2, 3, "one.xyz"), ("reading", 3, 3, "one.xyz")]


def test_special_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.xyz")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path, kind in (("/dev/zero", "a device"), (tmp_path / "pipe.xyz", "a pipe"), (tmp_path / "s", "a socket")):
            with pytest.raises(UserError, match=f"is {kind}; give an ordinary file of structures"):
                read(path)
    assert main.main(["fit", "/dev/zero", "-o", str(tmp_path / "m.gpmlp")]) == 2


def test_links(tmp_path, small_atoms):
    write_frames(tmp_path / "a.xyz", small_atoms[:1])
    (tmp_path / "link.xyz").symlink_to("a.xyz")
    assert len(read(tmp_path / "link.xyz")[0]) == 1
    (tmp_path / "loop.xyz").symlink_to("loop2.xyz")
    (tmp_path / "loop2.xyz").symlink_to("loop.xyz")
    with pytest.raises(UserError, match=r"loop\.xyz: "):
        read(tmp_path / "loop.xyz")
    (tmp_path / "gone.xyz").symlink_to("nowhere.xyz")
    with pytest.raises(UserError, match=r"gone\.xyz: there is no such file \(a link to a file that is gone\)"):
        read(tmp_path / "gone.xyz")


def test_columns_and_cells_that_are_not_read_are_said(tmp_path):
    (tmp_path / "a.xyz").write_text('1\ncell="3 0 0 0 3 0 0 0 3"\nCu 0 0 0 0.1 0.2 0.3\n')
    findings = ase_atoms.read_labelled(tmp_path / "a.xyz").findings
    said = {finding.kind: str(finding) for finding in findings}
    assert "up to 3 more columns than Properties name" in said["columns-without-a-name"]
    assert "`cell` is not known as a cell; the structures are taken as not periodic" in said["cell-of-unknown-name"]


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ("converged=F", True), ("scf_converged=no", True), ("unconverged=T", True), ("Converged=0", True),
        ("converged=T", False), ("unconverged=F", False), ("relax_converged=F", False), ('convergence="1e-6"', False),
    ],
)  # fmt: skip
def test_frames_that_say_they_have_not_converged_are_named(mark, said, tmp_path):
    (tmp_path / "a.xyz").write_text(f"1\nenergy=1.0 converged_in=0\nCu 0 0 0\n1\nenergy=1.0 {mark}\nCu 0 0 0\n")
    found = [f for f in ase_atoms.read_labelled(tmp_path / "a.xyz").findings if f.kind == "marked-as-not-converged"]
    assert [f.frames for f in found] == ([("a.xyz frame 1",)] if said else [])


def test_starts_keep_what_only_atoms_hold(tmp_path):
    start = bulk("Cu", cubic=True)
    start.set_constraint(FixBondLength(0, 1))
    start.write(tmp_path / "start.traj")
    with pytest.raises(UserError, match="The start has a FixBondLengths"):
        read_starts(tmp_path / "start.traj")


def test_the_benchmark_of_reading_runs():
    root = Path(__file__).resolve().parents[1]
    options = ["--frames", "30", "--atoms", "3", "--ase-frames", "5"]
    command = [sys.executable, str(root / "tests/benchmarks/reading.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("30 frames of 3 atoms") and done.stdout.count(" s") >= 3


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_starts_with_atoms_on_top_of_one_another(tmp_path, scale):
    """Or in a cell of another unit: said before any oracle is asked."""
    start = bulk("Al", cubic=True)
    if scale == 1.0:
        start.positions[1] = start.positions[0]
    start.set_cell(scale * start.cell, scale_atoms=True)
    write_frames(tmp_path / "start.xyz", [bulk("Al", cubic=True), start])
    with pytest.raises(UserError, match="start.xyz: frame 1: .*closer than 0.3 A"):
        read_starts(tmp_path / "start.xyz")
