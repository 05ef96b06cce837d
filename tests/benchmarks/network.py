"""Explorations of the reactions of a molecule with GFN2-xTB, beside the oracle's own minima and barriers.

    python tests/benchmarks/network.py                          malonaldehyde and vinyl alcohol
    python tests/benchmarks/network.py tautomer --calls 150     one of the systems of paths.py, with other limits

A line for each search, and below it for what it found: of each minimum how much lower BFGS on the oracle gets from there, and of each
reaction the barrier beside that of ASE's climbing band (BFGS, 7 images) between its sides, with the calls that this took.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.optimize import BFGS
from paths import EVERY, SMALLEST, by_ase, rested

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.learning.paths.network import DEFAULT_WAYS, Minimum, Reaction, Search
from gpmlp.learning.paths.vibrations import saddle_modes

CALLS, HIGHEST = 200, 3.5


def told(network: gpmlp.GPReactionNetwork, make: object, chosen: argparse.Namespace) -> None:
    began, minima, reactions = time.monotonic(), 0, 0
    for event in network.irun(calls=chosen.calls, highest=chosen.highest):
        if isinstance(event, Search):
            what = f"search {event.number} from {event.minimum}, {event.way}: {event.outcome}"
            print(f"  {what} ({event.calls} calls, {time.monotonic() - began:.0f} s)", flush=True)
            said = [minimum_beside(m, make) for m in network.minima[minima:]]
            said += [reaction_beside(r, make, not chosen.no_bands) for r in network.reactions[reactions:]]
            minima, reactions = len(network.minima), len(network.reactions)
            print("".join(f"    {line}\n" for line in said), end="", flush=True)
    print(f"  {network.calls} calls; ended: {network.ended}", flush=True)


def minimum_beside(m: Minimum, make: object) -> str:
    atoms = rested(m.atoms.copy(), make())
    lower, energy = m.atoms.get_potential_energy() - atoms.get_potential_energy(), f"{m.energy:.4f} ± {m.sigma:.2g}"
    return f"minimum {m.number} ({m.fragments}): {energy} eV; BFGS gets {1000 * lower:.1f} meV lower"


def reaction_beside(r: Reaction, make: object, band: bool) -> str:
    what = f"reaction {r.number}: {r.first} → {r.second}, {r.bonds or 'no bond changes'}"
    imaginary = ", ".join(f"{f:.0f}i" for f in r.imaginary)
    barriers = f"{r.forward:.4f} ± {r.sigma:.2g} eV, back {r.backward:.4f}"
    beside = f"; {oracle_barrier(r, make)}" if band else ""
    return f"{what}: {barriers}, {imaginary} by the model, {alone(r, make)}{beside}"


@dataclass
class Own:
    """The oracle in the place of a model of it."""

    calculator: object

    def forces(self, images: list[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for image in images:
            image.calc = self.calculator
            found.append((image.get_potential_energy(), image.get_forces(apply_constraint=False)))
        energies, forces = zip(*found, strict=True)
        return np.array(energies), np.array(forces)


def oracle_barrier(reaction: Reaction, make: object) -> str:
    """What ASE's band on the oracle says of a reaction."""
    ends = tuple(rested(side.copy(), make()) for side in (reaction.start, reaction.end))
    try:
        calls, barrier, done = by_ase(ends, make, BFGS)
    except (UserError, RuntimeError) as error:
        return f"no band: {error}"
    apart = reaction.forward - barrier
    z = apart / max(reaction.sigma, SMALLEST)
    return f"band {barrier:.4f} eV in {calls} calls{'' if done else ', not converged'} ({1000 * apart:+.1f} meV, z {z:+.1f})"


def alone(reaction: Reaction, make: object) -> str:
    """The oracle's own largest force at the saddle, and imaginary frequencies, with turns of the whole left out."""
    atoms: Atoms = reaction.saddle.copy()
    atoms.calc = make()
    force = np.linalg.norm(atoms.get_forces(), axis=1).max()
    imaginary = ", ".join(f"{f:.0f}i" for f in saddle_modes(Own(make()), atoms).imaginary)
    return f"{imaginary or 'none'} by the oracle, largest force there {force:.3f} eV/A"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", metavar="SYSTEM", default=["malonaldehyde", "tautomer"])
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--highest", type=float, default=HIGHEST)
    parser.add_argument("--ways", nargs="+", default=DEFAULT_WAYS)
    parser.add_argument("--no-bands", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if unknown := set(chosen.systems) - set(EVERY):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in chosen.systems:
        print(name, flush=True)
        network = gpmlp.GPReactionNetwork(EVERY[name][0]()[0], EVERY[name][1](), chosen.ways)
        told(network, EVERY[name][1], chosen)


if __name__ == "__main__":
    main()
