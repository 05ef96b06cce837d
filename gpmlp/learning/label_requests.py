"""A Desk is where a run asks for labels and where they come in: what is on the tape is not asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.learning.checkpoint import Stopwatch, Trail
from gpmlp.learning.labels import Entry, Note, Tape, key_of
from gpmlp.learning.oracles.job import Refusal
from gpmlp.learning.oracles.labeller import Labeller, stop_if_told
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.recipe import CarveRecipe
from gpmlp.learning.surrogate import Surrogate, carve
from gpmlp.learning.walker import Look
from gpmlp.potential.potential import Potential

ALIKE = 0.999  # covariance of unit environments above which two atoms that ask are one
ASKING = 3  # atoms of a decision that are compared


@dataclass(frozen=True, eq=False)
class Question:
    """A structure to be labelled, and the surrogate that it is where a frame was too large."""

    structure: Structures
    surrogate: Surrogate | None = None

    @staticmethod
    def about(frame: Structures, around: int, chosen: CarveRecipe | None, potential: Potential) -> Question:
        """A frame, or what is labelled in its place: the same whenever it is asked for.

        Args:
            around: an atom of it; -1 where all of it is to be labelled.
        """
        if chosen is None or around < 0 or frame.n_atoms <= chosen.above:
            return Question(frame)
        surrogate = carve(frame, around, potential.reach, chosen.core_A)
        return Question(frame if surrogate is None else surrogate.structure, surrogate)


class Desk:
    """Tape and labeller of a run.

    Attributes:
        calls: labels that came from the oracle since the desk was opened.
    """

    def __init__(self, recipe: OracleRecipe, folder: Path, trail: Trail, clock: Stopwatch) -> None:
        """Raises UserError if the tape cannot be read or the oracle cannot be used."""
        self.recipe, self.trail, self.clock = recipe, trail, clock
        self.tape = Tape(folder / "labels.xyz")
        self.labeller = Labeller(recipe, folder)
        self.calls = 0
        if self.tape.repaired:
            trail.tell("repaired", what=self.tape.repaired)

    @property
    def surrogates(self) -> int:
        """Labels of what was cut out of larger frames."""
        return sum("surrogate" in entry.notes for entry in self.tape)

    def close(self) -> None:
        self.labeller.close()

    def key(self, structure: Structures) -> str:
        """Of the label of a structure."""
        return key_of(structure, self.recipe.settings_hash)

    def entry(self, key: str) -> Entry:
        """What is on the tape.

        Raises:
            UserError: it is not there.
        """
        entry = self.tape.find(key)
        if entry is None:
            raise UserError(
                f"{self.tape.path}: the label {key} that the run learned from is gone; put the file back, or begin anew."
            )
        return entry

    def ask(self, question: Question) -> None:
        """Set the oracle to work, unless the answer is known or on its way."""
        key = self.key(question.structure)
        if key in self.tape or self.tape.refusal(key) is not None:
            return
        with self.clock("oracle"):
            self.labeller.submit(key, question.structure)

    def answer(self, question: Question, reason: str, notes: Mapping[str, Note]) -> Entry | None:
        """The label of a structure, once it is on the tape, of a surrogate as much as is believed; None if there is none.

        Raises:
            UserError: the oracle failed so often, or at all, that the run has to end; the disk is full.
        """
        structure, surrogate = question.structure, question.surrogate
        key = self.key(structure)
        if key in self.tape:
            return self.tape.find(key)
        refusal = self.tape.refusal(key)
        if refusal is None:
            self.ask(question)
            with self.clock("oracle"):
                found = self.labeller.result(key)
            self.calls += 1
            if not isinstance(found, Refusal):
                targets = found.targets if surrogate is None else surrogate.believed(found.targets)
                notes = {**notes, **({} if surrogate is None else surrogate.notes())}
                entry = self.tape.append(Entry(structure, targets, key, reason, self.recipe.settings_hash, notes))
                self.labeller.forget(key)
                self.trail.tell("labelled", key=key, seconds=found.seconds, attempts=found.attempts)
                return entry
            refusal = found
            if self.recipe.on_failure != "stop":  # else it is asked for again when the run goes on
                self.tape.refuse(refusal)
            self.labeller.forget(key)
        stop_if_told(self.recipe, refusal, self.tape.refused_in_a_row)
        self.trail.log("refused", key=key, reason=refusal.reason)
        return None


def alike(potential: Potential, look: Look, other: Structures) -> bool:
    """Whether an atom for whose sake a look asks is like an atom of another structure."""
    term = potential.terms[0]
    mine = StructureEnvironments.from_structures(term.descriptor, look.structure).environments.features
    known = StructureEnvironments.from_structures(term.descriptor, other).environments.features
    atoms = list(look.decision.atoms[:ASKING]) or list(range(len(mine)))
    same = look.structure.species[atoms][:, None] == other.species[None]
    return bool((same & (term.kernel.profile(mine[atoms] @ known.T)[0] > ALIKE)).any())
