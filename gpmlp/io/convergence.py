"""Steps in outputs of electronic-structure codes whose self-consistency loop ended without convergence.

VASP (vasprun.xml, OUTCAR), Quantum ESPRESSO (pw.x) and FHI-aims; each reader yields the steps that ASE's reader of the same file
makes frames of, in the same order.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpmlp.io.extxyz import open_decompressed

HEAD = 1 << 14  # characters that a code is told by
EDIFF = 1e-4  # eV, VASP's default


@dataclass(frozen=True)
class UnconvergedSteps:
    """Numbers of the steps, counted from 0, and how the code said so."""

    steps: frozenset[int] = frozenset()
    reason: str = ""


def unconverged_steps(path: Path, n_frames: int) -> UnconvergedSteps:
    """The steps of a file that did not converge; none where the file is of no code that is known here.

    Args:
        n_frames: that ASE made of it; a last step that it left out counts no more.
    """
    with open_decompressed(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace")
        head = text.read(HEAD)
        found = next(((find, reason) for mark, find, reason in _CODES if re.search(mark, head)), None)
        if found is None:
            text.detach()
            return UnconvergedSteps()
        find, reason = found
        text.seek(0)
        steps = [i for i, failed in enumerate(find(text)) if failed and i < n_frames]
        text.detach()
    return UnconvergedSteps(frozenset(steps), reason if steps else "")


def _vasprun(lines: Iterator[str]) -> Iterator[bool]:
    """Steps with as many electronic steps as NELM allows, the last of which still changed the energy by more than EDIFF."""
    # elements may share a line, so that the text is cut at the tags that matter
    tags = re.compile(
        r'<i[^>]*name="(NELM|EDIFF)"[^>]*>\s*([-+.\deE]+)|<(calculation|scstep|/scstep|/calculation)\b|'
        r'<i[^>]*name="e_fr_energy"[^>]*>\s*(\S+?)\s*</i>'
    )
    limit, ediff, inside = 60, EDIFF, False
    energies: list[float] = []
    for line in lines:
        for name, value, tag, energy in tags.findall(line):
            if name == "NELM":
                limit = int(float(value))
            elif name == "EDIFF":
                ediff = abs(float(value))
            elif tag == "calculation":
                energies = []
            elif tag:
                inside = tag == "scstep"
                if tag == "/calculation":
                    yield len(energies) >= limit and (
                        len(energies) < 2 or not abs(energies[-1] - energies[-2]) <= ediff
                    )
            elif inside:
                energies.append(_number(energy))
                inside = False  # the first of a step's energies is the one


def _outcar(lines: Iterator[str]) -> Iterator[bool]:
    """Steps of an OUTCAR: it says when EDIFF was reached, and since VASP 6 when it was not."""
    limit, reached, said, last = 60, False, False, 0
    for line in lines:
        if match := re.match(r"\s*NELM\s*=\s*(\d+)", line):
            limit = int(match[1])
        elif match := re.search(r"Iteration\s+\d+\(\s*(\d+)\)", line):
            last = int(match[1])
        elif "aborting loop" in line:
            said = "not reached" in line or "unconverged" in line
            reached = not said
        elif "POSITION" in line and "TOTAL-FORCE" in line:
            yield said or (not reached and last >= limit)
            reached, said, last = False, False, 0


# what makes a frame of ASE's out of a structure of pw.x
_RESULTS = (
    "!    total energy",
    "Forces acting on atoms",
    "total   stress",
    "Magnetic moment per site",
    "End of self-consistent calculation",
    "End of band structure calculation",
)


def _pwscf(lines: Iterator[str]) -> Iterator[bool]:
    """Structures of an output of pw.x with results, by the verdict of their last self-consistency loop.

    With scf_must_converge = .false. pw.x says 'convergence has been achieved' in any case: the accuracy that it estimates decides.
    """
    failed, holds, threshold, accuracy = False, False, float("inf"), 0.0
    for line in lines:
        if "Program PWSCF" in line or "ATOMIC_POSITIONS" in line:
            if holds:
                yield failed
            failed, holds = False, False
        elif "scf convergence threshold" in line:
            threshold = _number(line.split("=")[1])
        elif "estimated scf accuracy" in line:
            accuracy = _number(line.split("<")[1].split()[0])
        elif "convergence NOT achieved" in line:
            failed = True
        elif "convergence has been achieved" in line:
            failed = accuracy > threshold
        holds = holds or any(mark in line for mark in _RESULTS)
    if holds:
        yield failed


def _aims(lines: Iterator[str]) -> Iterator[bool]:
    """Steps of an output of FHI-aims: each ends where the geometry is predicted anew, or where the next loop begins."""
    converged, iterated, again, relaxes = False, False, False, False
    for line in lines:
        if "Geometry relaxation:" in line or "Geometry optimization:" in line:
            relaxes = True
        if "Self-consistency cycle converged." in line:
            converged = True
        elif "restarting mixer" in line:
            again = True
        elif "Begin self-consistency iteration" in line:
            iterated = True
        ends = (
            "Attempting to predict improved coordinates" in line
            if relaxes
            else "loop: Re-initialization" in line and not again
        )
        again = again and "loop: Re-initialization" not in line
        if ends:
            yield not converged
            converged, iterated = False, False
    if iterated:
        yield not converged


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # stars where a number did not fit its field
        return float("nan")


_CODES: tuple[tuple[str, Callable[[Iterator[str]], Iterator[bool]], str], ...] = (
    ("<modeling>", _vasprun, "VASP used all NELM electronic steps without reaching EDIFF"),
    (r"\A\s*vasp\.\d", _outcar, "VASP did not reach EDIFF"),
    ("Program PWSCF", _pwscf, "pw.x did not reach conv_thr"),
    ("Invoking FHI-aims", _aims, "FHI-aims does not say 'Self-consistency cycle converged'"),
)
