"""Time to read many labelled frames of extended XYZ, by gpmlp.read and by ase.io alone.

python tests/benchmarks/reading.py [--frames 100000] [--atoms 20] [--ase-frames 2000] [--workers 2]

With workers also by them, in shards of the file: processor time of the process that asks, which is what is left where they are many.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ase.io

import gpmlp
from gpmlp.fitting.workers import open_executor, workers_of
from gpmlp.io.ase_atoms import read_labelled


def write(path: Path, frames: int, atoms: int) -> None:
    """Frames with energy, forces and stress, as ASE writes them."""
    generator = np.random.default_rng(0)
    line = "%-2s" + " %16.8f" * 6 + "\n"
    with open(path, "w") as file:
        for _ in range(frames):
            cell, stress = 9 * np.eye(3) + 0.01 * generator.normal(size=(3, 3)), generator.normal(size=(3, 3))
            words = [" ".join(f"{x!r}" for x in array.ravel().tolist()) for array in (cell, stress + stress.T)]
            file.write(
                f'{atoms}\nLattice="{words[0]}" Properties=species:S:1:pos:R:3:forces:R:3 '
                f'energy={generator.normal()!r} stress="{words[1]}" pbc="T T T"\n'
            )
            rows = np.hstack([generator.uniform(0, 9, (atoms, 3)), generator.normal(size=(atoms, 3))])
            file.writelines(line % ("Si" if i % 2 else "C", *row) for i, row in enumerate(rows.tolist()))


def seconds(function) -> float:
    """Processor time of one call."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def main() -> None:
    """Write the file, read it, print the times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--atoms", type=int, default=20)
    parser.add_argument("--ase-frames", type=int, default=2000)
    parser.add_argument("--workers", type=int)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames.xyz"
        write(path, chosen.frames, chosen.atoms)
        gpmlp.read(path, ":2")  # imports
        every = seconds(lambda: gpmlp.read(path))
        some = seconds(lambda: gpmlp.read(path, "::100"))
        few = min(chosen.ase_frames, chosen.frames)
        theirs = seconds(lambda: list(ase.io.iread(path, f":{few}", format="extxyz"))) * chosen.frames / few
        with open_executor(chosen.workers) as executor:
            each = workers_of(executor).each
            asking = seconds(lambda: read_labelled(path, each=each)) if executor is not None else None
    print(f"{chosen.frames} frames of {chosen.atoms} atoms, processor time:")
    print(f"gpmlp.read                {every:8.2f} s")
    print(f"gpmlp.read ::100          {some:8.2f} s")
    if asking is not None:
        print(f"asking {chosen.workers} workers          {asking:8.2f} s")
    print(f"ase.io alone, no labels   {theirs:8.2f} s (from {few} frames)")


if __name__ == "__main__":
    main()
