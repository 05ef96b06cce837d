"""Files that survive a power cut: data are on the disk before their name is, and the name before anybody relies on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_label_file import entry

from gpmlp.io import files
from gpmlp.learning.labels import LabelFile, LabelRefusal
from gpmlp.learning.oracles import results


@pytest.fixture
def calls(monkeypatch):
    """What the system is asked, in order: (call, path, bytes that the file had then)."""
    made: list[tuple[str, str, int]] = []
    fsync, replace, write = os.fsync, os.replace, os.write

    def path_of(descriptor: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def note(call: str, path: Path) -> None:
        made.append((call, "folder" if path.is_dir() else path.name, path.stat().st_size if path.is_file() else 0))

    def fsync_noted(descriptor: int) -> None:
        note("fsync", path_of(descriptor))
        fsync(descriptor)

    def replace_noted(source, target) -> None:
        note("replace", Path(source))
        replace(source, target)

    def write_noted(descriptor: int, data: bytes) -> int:
        written = write(descriptor, data)
        note("write", path_of(descriptor))
        return written

    monkeypatch.setattr(os, "fsync", fsync_noted)
    monkeypatch.setattr(os, "replace", replace_noted)
    monkeypatch.setattr(os, "write", write_noted)
    return made


def assert_atomic(made: list[tuple[str, str, int]], size: int) -> None:
    """All bytes are synced under a temporary name, then the name is given, then the folder synced."""
    assert [call for call, _, _ in made] == ["fsync", "replace", "fsync"]
    (_, temporary, synced), (_, renamed, _), (_, folder, _) = made
    assert temporary == renamed and temporary.startswith(".") and temporary.endswith(".tmp")
    assert synced == size > 0 and folder == "folder"


def test_atomic_writing(tmp_path, calls):
    with files.atomic_write(tmp_path / "a.txt", text=True) as file:
        file.write("some text")  # not flushed by the one who writes
    assert_atomic(calls, 9)
    assert (tmp_path / "a.txt").read_text() == "some text"


def test_records_of_oracles(tmp_path, calls):
    results.write_record(tmp_path, {"key": "k", "attempt": 1, "kind": results.LABEL, "energy": 1.0})
    assert_atomic(calls, results.record_path(tmp_path, "k", 1).stat().st_size)


def test_appending(tmp_path, calls):
    """Synced after the last byte; a new file's folder, too."""
    path = tmp_path / "a.txt"
    files.append_whole(path, b"first")
    assert calls == [("write", "a.txt", 5), ("fsync", "a.txt", 5), ("fsync", "folder", 0)]
    calls.clear()
    files.append_whole(path, b"second")
    assert calls == [("write", "a.txt", 11), ("fsync", "a.txt", 11)]


def test_labels_and_refusals(tmp_path, calls):
    """Each is on the disk before the caller gets it."""
    tape = LabelFile(tmp_path / "labels.xyz")
    for i in range(2):
        calls.clear()
        tape.append(entry(i))
        size = tape.path.stat().st_size
        assert ("fsync", "labels.xyz", size) in calls and calls[0] == ("write", "labels.xyz", size)
    calls.clear()
    tape.refuse(LabelRefusal("ka", "crashed", 1, ""))
    assert ("fsync", "refused.jsonl", tape.refused_path.stat().st_size) in calls


def test_what_was_cut_off_is_on_the_disk_first(tmp_path, calls):
    path, aside = tmp_path / "a.txt", tmp_path / "a.txt.broken"
    path.write_bytes(b"whole|torn")
    assert files.cut_tail(path, 6, aside) == 4
    assert ("fsync", "a.txt.broken", 4) in calls and aside.read_bytes() == b"torn" and path.read_bytes() == b"whole|"
