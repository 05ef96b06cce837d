"""What the benchmarks share: measured subprocesses, frames of extended XYZ as text, and the peer's command line.

Only the standard library is imported: on Linux a child's peak memory is never reported below what its parent held when it
forked, so the measuring process has to stay small.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPES = HERE / "recipes"
BOX = 60.0  # A, the cell that the peer gets around a molecule
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True)
class Cost:
    """What one process used: CPU and wall seconds, largest resident memory in GB (10^9 bytes)."""

    cpu_s: float
    wall_s: float
    peak_GB: float


def measured(command: Sequence[str | Path], folder: Path, log: str, threads: int) -> Cost:
    """Run a command in a folder, its output in a log file there, and return what this process alone used.

    Raises:
        SystemExit: the command failed; shows the end of the log.
    """
    environment = dict(os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads)))
    # the package beside these benchmarks, whatever is installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with open(folder / log, "w", encoding="utf-8") as out:
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], cwd=folder, env=environment, stdout=out, stderr=out)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = "\n".join((folder / log).read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{command[0]} failed with {process.returncode}; the end of {folder / log}:\n{tail}")
    per_GB = 1e9 if sys.platform == "darwin" else 1e9 / 1024
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / per_GB)


def frames(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Comment line and atom lines of each frame of an XYZ file."""
    with open(path, encoding="utf-8") as file:
        while (line := file.readline()).strip():
            n = int(line)
            yield file.readline().rstrip("\n"), [file.readline().rstrip("\n") for _ in range(n)]


def join(paths: Sequence[Path], target: Path, at_most: int | None = None, for_peer: bool = False) -> int:
    """Write all frames (of each file the first `at_most`) to one file, for the peer in its words; returns how many."""
    count = 0
    with open(target, "w", encoding="utf-8") as out:
        for path in paths:
            for k, (comment, atoms) in enumerate(frames(path)):
                if at_most is not None and k >= at_most:
                    break
                text = _peer_comment(comment, len(atoms)) if for_peer else comment
                out.write("\n".join([str(len(atoms)), text, *atoms, ""]))
                count += 1
    return count


def draw(paths: Sequence[Path], target: Path, n: int, seed: int = 0) -> None:
    """Write n frames at random, and all of one atom, to a file."""
    every = [(comment, atoms) for path in paths for comment, atoms in frames(path)]
    order = [k for k, (_, atoms) in enumerate(every) if len(atoms) > 1]
    random.Random(seed).shuffle(order)
    kept = [k for k, (_, atoms) in enumerate(every) if len(atoms) == 1] + order[:n]
    target.write_text(
        "".join("\n".join([str(len(atoms)), text, *atoms, ""]) for text, atoms in (every[k] for k in kept))
    )


def repeat(path: Path, target: Path, times: int) -> None:
    """Write a file of frames so many times over."""
    text = path.read_text(encoding="utf-8")
    with open(target, "w", encoding="utf-8") as out:
        for _ in range(times):
            out.write(text)


def _peer_comment(comment: str, n_atoms: int) -> str:
    """The keys gap_fit is told to read: ref_energy, ref_force; a wide box where there is no cell; no stress."""
    found = {
        key.lower(): quoted if quoted else plain
        for key, quoted, plain in re.findall(r'([\w-]+)=(?:"([^"]*)"|(\S+))', comment)
    }
    lattice = found.get("lattice", f"{BOX} 0 0 0 {BOX} 0 0 0 {BOX}")
    parts = [
        f'Lattice="{lattice}"',
        f"Properties={found['properties'].replace(':forces:', ':ref_force:')}",
        f'pbc="{found.get("pbc", "T T T")}"',
    ]
    energy = found.get("free_energy", found.get("energy"))
    parts += [f"ref_energy={energy}"] if energy is not None else []
    label = "isolated_atom" if n_atoms == 1 and "isolated" in comment.lower() else found.get("config_type", "default")
    return " ".join([*parts, f"config_type={label}"])


def fit_ours(folder: Path, recipe: Path | None, threads: int, name: str = "ours", settings: Sequence[str] = ()) -> Cost:
    """`gpmlp fit train.xyz` in a folder; settings: KEY=VALUE."""
    command = [sys.executable, "-m", "gpmlp", "fit", "train.xyz", "--output", f"{name}.gpmlp"]
    command += [*(["--recipe", recipe] if recipe else []), *(word for s in settings for word in ("--set", s))]
    return measured(command, folder, f"{name}_fit.log", threads)


def stages_ours(folder: Path, fit: Cost, threads: int, name: str = "ours") -> dict[str, float]:
    """Wall seconds of each stage of a fit, as the report in its model has them, and of all that is before and after."""
    found = {stage: seconds for stage, seconds, _ in report_ours(folder, threads, name)["stages"]}
    return found | {"imports, reading, writing": fit.wall_s - sum(found.values())}


def report_ours(folder: Path, threads: int, name: str = "ours") -> dict:
    """The report in a model, as `gpmlp info` has it."""
    measured([sys.executable, "-m", "gpmlp", "info", f"{name}.gpmlp", "--json"], folder, f"{name}_info.log", threads)
    return json.loads((folder / f"{name}_info.log").read_text())["header"]["report"]


def errors_ours(folder: Path, data: Path, threads: int, name: str = "ours") -> tuple[dict, Cost]:
    """`gpmlp evaluate` in a folder: the errors, and what it cost."""
    command = [sys.executable, "-m", "gpmlp", "evaluate", f"{name}.gpmlp", data, "--json", f"{name}_errors.json"]
    cost = measured(command, folder, f"{name}_evaluate.log", threads)
    return json.loads((folder / f"{name}_errors.json").read_text()), cost


def fit_peer(folder: Path, peer_python: Path, peer: dict[str, str], threads: int) -> Cost:
    """`gap_fit` on peer.xyz in a folder: energies and forces, no virials."""
    command = [
        peer_python.parent / "gap_fit",
        "at_file=peer.xyz",
        "gp_file=gap.xml",
        "energy_parameter_name=ref_energy",
        "force_parameter_name=ref_force",
        "virial_parameter_name=none",
        "do_copy_at_file=F",
        "sparse_separate_file=T",
        "sparse_jitter=1e-8",
        f"e0_method={peer['e0_method']}",
        f"default_sigma={{{peer['default_sigma']}}}",
        f"gap={{soap {peer['soap']} delta=1.0 f0=0.0 covariance_type=dot_product sparse_method=cur_points}}",
    ]
    return measured(command, folder, "peer_fit.log", threads)


def errors_peer(folder: Path, peer_python: Path, data: Path, threads: int) -> tuple[dict, Cost]:
    """Errors of gap.xml in a folder, with the keys of `gpmlp evaluate --json`, and what predicting cost."""
    command = [peer_python, HERE / "predict_peer.py", "gap.xml", data, "peer_errors.json"]
    cost = measured(command, folder, "peer_predict.log", threads)
    return json.loads((folder / "peer_errors.json").read_text()), cost


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns of text under a header, the first one to the left, the others to the right."""
    widths = [max(len(row[k]) for row in (header, *rows)) for k in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, rows)])
