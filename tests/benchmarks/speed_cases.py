"""What the benchmarks of speed predict, and with what: structures, and models that are fitted once and kept in a folder."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

import ase.io
from ase import Atoms
from ase.build import bulk

import gpmlp
from gpmlp.core.structures import Structures
from gpmlp.io.ase_atoms import structures_from_ase
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

SILICON = {"cutoff": 5.0, "n_max": 8, "l_max": 6}
MOLECULES = {"cutoff": 5.0, "n_max": 6, "l_max": 4}
FRAMES = 100  # of molecules: at most so many are fitted to, and predicted together
_SOAP = "n_max={n_max} l_max={l_max} cutoff={cutoff} "


def silicon_atoms(cells: int) -> Atoms:
    """Diamond rattled by 0.05 A, 8 cells³ atoms."""
    atoms = bulk("Si", cubic=True).repeat(cells)
    atoms.rattle(0.05, seed=0)
    return atoms


def silicon(cells: int) -> Structures:
    """The same as structures."""
    return structures_from_ase([silicon_atoms(cells)])


@dataclass(frozen=True)
class Case:
    """A system: what is predicted, what models are fitted to, and how.

    Attributes:
        frames: what is predicted, all together.
        train: extended XYZ, and how many of its frames at most.
        shape: of the descriptor; columns: inducing values of each model, without derivatives.
        gap: the rest of the peer's settings.
        work: folder of models.
    """

    name: str
    frames: list[Atoms]
    train: Path
    at_most: int | None
    shape: dict
    columns: int
    gap: dict[str, str]
    work: Path

    @cached_property
    def structures(self) -> Structures:
        return structures_from_ase(self.frames)

    @cached_property
    def path(self) -> Path:
        """The frames as a file."""
        path = self.work / f"{self.name}_{self.structures.n_atoms}.xyz"
        self.work.mkdir(parents=True, exist_ok=True)
        ase.io.write(path, [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in self.frames])
        return path

    def model(self, zeta: int) -> Path:
        """The file of a potential, fitted if it is not there."""
        path = self.work / f"{self.name}_zeta{zeta}_{self.columns}.gpmlp"
        if not path.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            choices = {
                "descriptor": self.shape,
                "kernel": {"zeta": zeta},
                "variance": {"columns": self.columns, "local": "reduced"},
            }
            recipe = Recipe.model_validate(choices | {"inducing": {"n": self.columns, "gradients": 0}})
            print(f"{self.name}: fitting zeta {zeta}", file=sys.stderr)
            gpmlp.save(gpmlp.fit(*gpmlp.read(self.train, slice(self.at_most)), recipe)[0], path)
        return path

    def potential(self, zeta: int) -> Potential:
        """With variances from all columns; those of fewer are in the file."""
        return gpmlp.load(self.model(zeta)).to(local_variance="exact")

    def peer(self, python: Path) -> Path:
        """The file of a GAP (zeta 4), fitted to the same frames if it is not there.

        Raises:
            SystemExit: there is no gap_fit beside that Python, or it failed.
        """
        folder = self.work / f"gap_{self.name}_{self.columns}"
        if not (folder / "done").exists():
            if not (python.parent / "gap_fit").exists():
                raise SystemExit(f"--gap-python {python}: there is no gap_fit beside it; pip install quippy-ase there.")
            folder.mkdir(parents=True, exist_ok=True)
            common.join([self.train], folder / "peer.xyz", self.at_most, for_peer=True)
            print(f"{self.name}: fitting GAP", file=sys.stderr)
            common.fit_peer(folder, python, self.gap, 1)
            (folder / "done").touch()
        return folder / "gap.xml"


def silicon_case(cells: int, columns: int, work: Path) -> Case:
    """Rattled diamond; models of data/silicon."""
    soap = _SOAP.format(**SILICON) + f"cutoff_transition_width=0.5 atom_sigma=0.5 zeta=4 n_sparse={columns}"
    gap = {"soap": soap, "default_sigma": "0.001 0.05 0.05 0.0", "e0_method": "isolated"}
    return Case("si", [silicon_atoms(cells)], common.ROOT / "data/silicon/train.xyz", None, SILICON, columns, gap, work)


def molecules_case(train: Path, test: Path, columns: int, work: Path) -> Case:
    """The first molecules of a file; models of the first ones of another, of as many columns as these have atoms at most."""
    frames = ase.io.read(test, f":{FRAMES}")
    columns = min(columns, sum(len(atoms) for _, atoms in islice(common.frames(train), FRAMES)))
    sparse = max(
        1, columns // len({z for atoms in frames for z in atoms.numbers})
    )  # gap_fit counts them for each species
    alone = any(len(atoms) == 1 for _, atoms in common.frames(train))
    soap = _SOAP.format(**MOLECULES) + (
        f"cutoff_transition_width=1.0 atom_sigma=0.4 zeta=4 n_sparse={sparse} add_species=T"
    )
    gap = {"soap": soap, "default_sigma": "0.001 0.02 0.0 0.0", "e0_method": "isolated" if alone else "average"}
    name = f"{train.resolve().parent.name}_{train.stem}"
    return Case(name, frames, train, FRAMES, MOLECULES, columns, gap, work)
