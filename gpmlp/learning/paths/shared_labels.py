"""Labels of other runs, which a run begins with: copied into its folder, so that a run that is resumed goes the same way."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.io.charges import SAME as SAME_CHARGE
from gpmlp.io.files import atomic_write
from gpmlp.learning.labels import LabelEntry, LabelFile

FOLDER = "taken"


@dataclass(frozen=True, eq=False)
class SharedLabels:
    """Label files of other runs of the same oracle.

    Attributes:
        entries: labels by key; data: bytes of each file.
    """

    entries: dict[str, LabelEntry]
    data: tuple[bytes, ...]

    @staticmethod
    def read(files: Sequence[Path], folder: Path | None, settings: str, start: Atoms) -> SharedLabels:
        """From the copies in folder/taken, or where there are none from the files themselves, which stay as they are.

        Args:
            folder: of a run that has labels; None for one that has none yet, whose copies, if any, a kill left half made.
            settings: hash of the oracle's settings (OracleRecipe.settings_hash).

        Raises:
            UserError: a file cannot be read, was altered, or holds labels of another oracle or total charge.
        """
        entries: dict[str, LabelEntry] = {}
        data = []
        charge = float(structures_from_ase([start]).charges[0])
        for i, path in enumerate(files):
            copy = _copy(folder, i) if folder else None
            source = copy if copy and copy.exists() else path
            if not source.is_file():
                raise UserError(f"labels: {path}: there is no such file; give the labels.xyz of another run.")
            data.append(source.read_bytes())
            found = _verified(data[-1], source)
            if not found:
                raise UserError(f"labels: {source}: holds no labels.")
            for k, entry in enumerate(found):
                _check(entry, f"labels: {source}: label {k + 1}", settings, charge)
                entries.setdefault(entry.key, entry)
        return SharedLabels(entries, tuple(data))

    def keep(self, folder: Path, begun: bool) -> None:
        """Copy the files; those that are there stay if the run has begun.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        for i, data in enumerate(self.data):
            copy = _copy(folder, i)
            if not (begun and copy.exists()):
                copy.parent.mkdir(exist_ok=True)
                with atomic_write(copy) as file:
                    file.write(data)

    def atoms(self) -> tuple[Atoms, ...]:
        """Structures with energy and forces as results of their calculators."""
        return tuple(to_ase(entry.structure, entry.targets)[0] for entry in self.entries.values())


def _copy(folder: Path, i: int) -> Path:
    return folder / FOLDER / f"{i + 1}.xyz"


def _verified(data: bytes, source: Path) -> list[LabelEntry]:
    """The labels of a file; opening a label file repairs it, which is for its own run to do."""
    with tempfile.TemporaryDirectory(prefix="gpmlp-labels-") as apart:
        path = Path(apart) / "labels.xyz"
        path.write_bytes(data)
        try:
            return list(LabelFile(path))
        except UserError as error:
            raise UserError(f"labels: {str(error).replace(str(path), str(source))}") from error


def _check(entry: LabelEntry, where: str, settings: str, charge: float) -> None:
    if entry.oracle != settings:
        whose = (
            "another oracle, or other settings of it"
            if entry.oracle
            else "an oracle that nobody knows: no run wrote it"
        )
        raise UserError(f"{where} is of {whose}. All labels of a model have to be of one: leave that file out.")
    given = float(entry.structure.charges[0])
    if abs(given - charge) > SAME_CHARGE:
        raise UserError(
            f"{where} has the total charge {given:g} e and the start {charge:g} e, which are two energy surfaces: leave that file out."
        )
