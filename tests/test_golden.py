"""What the package computes is what it computed when golden/reference was made: compared number by number, half a minute.

    python -m pytest -m slow tests/test_golden.py                 compare with golden/reference
    GOLDEN=FOLDER python -m pytest -m slow tests/test_golden.py   compare with another folder
    python tests/golden_outputs.py FOLDER [PART ...]              make such a folder; parts are functions of golden_outputs.py

The reference was made anew when novelty, calibration, noises and triggers changed (docs/decisions/012 to 015). Last digits
depend on the machine, too (machine.json): elsewhere, make a reference there
from the commit to compare with. It is made anew only for a change that is meant to change numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
REFERENCE = Path(os.environ.get("GOLDEN", HERE / "golden" / "reference"))
# of the largest number of an array: some thousand times the rounding of one operation, which is what sums of as many terms in
# another order may differ by; what a search or a trajectory makes of such a difference may be more, and is then looked at
TOLERANCE = 1e-12

Outputs = tuple[dict[str, np.ndarray], dict[str, float | str]]


def load(folder: Path) -> Outputs:
    """Arrays and scalars of a folder that golden_outputs.py wrote."""
    with np.load(folder / "arrays.npz") as stored:
        arrays = {name.replace("|", "/"): stored[name] for name in stored.files}
    return arrays, json.loads((folder / "scalars.json").read_text())


def difference(now: np.ndarray, before: np.ndarray) -> tuple[float, str]:
    """Largest difference in units of the largest finite number of `before`, and where; infinite where shapes or NaN differ."""
    if now.shape != before.shape or not np.array_equal(np.isfinite(now), np.isfinite(before)):
        return np.inf, f"shape {now.shape}, was {before.shape}, or other numbers are NaN"
    if not before.size:
        return 0.0, ""
    apart = np.nan_to_num(np.abs(now - before))
    worst = np.unravel_index(int(apart.argmax()), apart.shape)
    scale = np.nan_to_num(np.abs(before)).max() or 1.0
    return float(apart[worst] / scale), f"at {tuple(map(int, worst))}: {now[worst]!r}, was {before[worst]!r}"


def compared(now: Outputs, before: Outputs) -> tuple[int, list[str]]:
    """How many arrays and scalars are equal to the last bit, and a line for each that differs by more than TOLERANCE, largest first."""
    equal, lines = 0, []
    for ours, theirs in zip(now, before, strict=True):
        lines += [(np.inf, f"{name}: is missing") for name in theirs.keys() - ours.keys()]
        lines += [(np.inf, f"{name}: is new") for name in ours.keys() - theirs.keys()]
        for name in theirs.keys() & ours.keys():
            a, b = ours[name], theirs[name]
            if isinstance(a, str) or isinstance(b, str):
                apart, where = (0.0, "") if a == b else (np.inf, f"{a!r}, was {b!r}")
            else:
                apart, where = difference(np.asarray(a), np.asarray(b))
            equal += apart == 0
            if apart > TOLERANCE:
                lines.append((apart, f"{name}: {apart:.1e} of the largest, {where}"))
    return equal, [line for _, line in sorted(lines, reverse=True)]


def made(folder: Path, *parts: str, **environment: str) -> Outputs:
    """Golden outputs of the package as it is now."""
    command = [sys.executable, str(HERE / "golden_outputs.py"), str(folder), *parts]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return load(folder)


@pytest.mark.slow
def test_numbers_are_what_they_were(tmp_path, capsys):
    before = load(REFERENCE)
    equal, lines = compared(made(tmp_path), before)
    summary = f"{equal} of {sum(map(len, before))} golden outputs are equal to the last bit, {len(lines)} differ"
    with capsys.disabled():
        print(f"\n{summary} by more than {TOLERANCE:g}")
    machines = [json.loads((folder / "machine.json").read_text()) for folder in (tmp_path, REFERENCE)]
    where = "" if machines[0] == machines[1] else f" (made here on {machines[0]}, before on {machines[1]})"
    assert not lines, "\n".join([summary + where, *lines])


@pytest.mark.slow
def test_another_process_computes_the_same(tmp_path):
    """To the last bit: a run that is resumed in another process has to repeat."""
    first, second = (made(tmp_path / name, "silicon", "ethanol") for name in ("first", "second"))
    equal, lines = compared(first, second)
    assert not lines and equal == sum(map(len, first))


def test_a_number_that_changed_is_named():
    arrays, scalars = load(REFERENCE)
    assert compared((arrays, scalars), (arrays, scalars)) == (len(arrays) + len(scalars), [])
    changed = dict(arrays)
    changed["silicon/calibrated/forces"] = arrays["silicon/calibrated/forces"].copy()
    changed["silicon/calibrated/forces"][3, 1] += 1e-9
    del changed["ethanol/calibrated/forces"]
    _, lines = compared((changed, scalars | {"silicon/report/rank": 1.0}), (arrays, scalars))
    assert len(lines) == 3 and lines[0] == "ethanol/calibrated/forces: is missing"
    assert lines[1].startswith("silicon/report/rank: ") and "was" in lines[1]
    assert lines[2].startswith("silicon/calibrated/forces: ") and "at (3, 1)" in lines[2]
