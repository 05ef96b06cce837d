"""Evaluation is the comparison of a potential with reference labels: errors in all and by config_type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from gpmlp import units
from gpmlp.potential import Potential, chunks
from gpmlp.quantities import ErrorTable, Prediction, Targets, errors
from gpmlp.structures import Structures

CHUNK_ATOMS = 2000  # atoms between two calls of progress


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A prediction and its errors.

    Attributes:
        prediction: of all structures.
        overall: errors over all structures.
        by_config_type: errors over the structures of each config_type; empty if no structure has one.
    """

    prediction: Prediction
    overall: ErrorTable
    by_config_type: dict[str, ErrorTable]

    def as_dict(self) -> dict:
        """JSON-able form, units in the names; None where there is no label of the kind."""

        def plain(table: ErrorTable) -> dict:
            return {key: None if value != value else value for key, value in asdict(table).items()}

        return plain(self.overall) | {"by_config_type": {name: plain(t) for name, t in self.by_config_type.items()}}


def evaluate(
    potential: Potential,
    structures: Structures,
    targets: Targets,
    progress: Callable[[str, float, float, str], None] | None = None,
) -> Evaluation:
    """Predict all structures and compare with what is known of them.

    Args:
        progress: called as progress(stage, done, total, note), in atoms.
    """
    parts, done = [], 0
    if progress:
        progress("prediction", 0, structures.n_atoms, "")
    for chunk in chunks(structures, CHUNK_ATOMS):
        parts.append(potential(chunk))
        done += chunk.n_atoms
        if progress:
            progress("prediction", done, structures.n_atoms, f"{done} atoms")
    prediction = Prediction.concatenate(parts)
    tables = {}
    for name in sorted(set(targets.config_types) - {""}):
        members = [i for i, label in enumerate(targets.config_types) if label == name]
        part = select(prediction, structures, members)
        tables[name] = errors(structures.select(members), targets.select(structures, members), part, units.GPA)
    return Evaluation(prediction, errors(structures, targets, prediction, units.GPA), tables)


def select(prediction: Prediction, structures: Structures, members: list[int]) -> Prediction:
    """The prediction for structures.select(members)."""
    offsets = structures.offsets.tolist()
    atoms = [a for i in members for a in range(offsets[i], offsets[i + 1])]
    return Prediction(
        prediction.energies[members],
        prediction.atom_energies[atoms],
        prediction.forces[atoms],
        prediction.stresses[members],
    )
