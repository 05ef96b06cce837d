"""LabelRequests is the queue of label requests of a run: what is in its label file is not asked of the oracle again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.structures import Structures
from gpmlp.learning.checkpoint import ActivityTimer, RunFiles
from gpmlp.learning.labels import LabelEntry, LabelFile, LabelRefusal, Note, key_of
from gpmlp.learning.oracles.labeller import Labeller, check_refusal
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.recipe import SurrogateRecipe
from gpmlp.learning.surrogate import SurrogateCluster, cut_surrogate
from gpmlp.learning.walker import WalkerSnapshot
from gpmlp.potential.potential import Potential

ALIKE = 0.999  # kernel of two unit environments above which one label will do for both
COMPARED = 3  # atoms of a decision that are compared


@dataclass(frozen=True, eq=False)
class LabelRequest:
    """A structure to be labelled, and the surrogate that it is where a frame is too large."""

    structure: Structures
    surrogate: SurrogateCluster | None = None

    @staticmethod
    def from_frame(frame: Structures, atom: int, chosen: SurrogateRecipe | None, potential: Potential) -> LabelRequest:
        """For a frame, or for the surrogate around an atom of it (-1: the whole frame); always the same one."""
        if chosen is None or atom < 0 or frame.n_atoms <= chosen.above:
            return LabelRequest(frame)
        surrogate = cut_surrogate(frame, atom, potential.reach, chosen.core_A)
        return LabelRequest(frame if surrogate is None else surrogate.structure, surrogate)


class LabelRequests:
    """Label file and labeller of a run.

    Attributes:
        calls: labels that came from the oracle in this process.
    """

    def __init__(self, recipe: OracleRecipe, folder: Path, files: RunFiles, timer: ActivityTimer) -> None:
        """Raises UserError if the label file cannot be read or the oracle cannot be used."""
        self.recipe, self.files, self.timer = recipe, files, timer
        self.labels = LabelFile(folder / "labels.xyz")
        self.labeller = Labeller(recipe, folder)
        self.calls = 0
        if self.labels.repaired:
            files.log_time("repaired", what=self.labels.repaired)

    @property
    def n_surrogates(self) -> int:
        """Labels of surrogates."""
        return sum("surrogate" in entry.notes for entry in self.labels)

    def close(self) -> None:
        self.labeller.close()

    def key(self, structure: Structures) -> str:
        """Of the label of a structure."""
        return key_of(structure, self.recipe.settings_hash)

    def entry(self, key: str) -> LabelEntry:
        """A label of the file. Raises UserError: it is not there."""
        entry = self.labels.find(key)
        if entry is None:
            raise UserError(
                f"{self.labels.path}: the label {key} that the run learned from is gone; put the file back, or begin anew."
            )
        return entry

    def submit(self, request: LabelRequest) -> None:
        """Set the oracle to work, unless there is a label or a refusal, or one is on its way."""
        key = self.key(request.structure)
        if key not in self.labels and self.labels.refusal(key) is None:
            with self.timer("oracle"):
                self.labeller.submit(key, request.structure)

    def collect(self, request: LabelRequest, reason: str, notes: Mapping[str, Note]) -> LabelEntry | None:
        """The label of a structure, once it is in the file, of a surrogate as much as is trusted; None if it was refused.

        Raises:
            UserError: the oracle failed so often, or at all, that the run has to end; the disk is full.
        """
        structure, surrogate = request.structure, request.surrogate
        key = self.key(structure)
        if key in self.labels:
            return self.labels.find(key)
        refusal = self.labels.refusal(key)
        if refusal is None:
            self.submit(request)
            with self.timer("oracle"):
                answer = self.labeller.result(key)
            self.calls += 1
            if not isinstance(answer, LabelRefusal):
                targets = answer.targets if surrogate is None else surrogate.trusted_targets(answer.targets)
                notes = {**notes, **({} if surrogate is None else surrogate.notes())}
                entry = self.labels.append(
                    LabelEntry(structure, targets, key, reason, self.recipe.settings_hash, notes)
                )
                self.labeller.forget(key)
                self.files.log_time("labelled", key=key, seconds=answer.seconds, attempts=answer.attempts)
                return entry
            refusal = answer
            if self.recipe.on_failure != "stop":  # else it is asked for again when the run goes on
                self.labels.refuse(refusal)
            self.labeller.forget(key)
        check_refusal(self.recipe, refusal, self.labels.refused_in_a_row)
        self.files.log_event("refused", key=key, reason=refusal.reason)
        return None


def share_environment(potential: Potential, snapshot: WalkerSnapshot, other: Structures) -> bool:
    """Whether an atom for whose sake a label is asked has nearly the environment of an atom of another structure."""
    term = potential.terms[0]
    mine, theirs = (
        StructureEnvironments.from_structures(term.descriptor, s).environments.features
        for s in (snapshot.structure, other)
    )
    atoms = list(snapshot.decision.atoms[:COMPARED]) or list(range(len(mine)))
    same = snapshot.structure.species[atoms][:, None] == other.species[None]
    return bool((same & (term.kernel.profile(mine[atoms] @ theirs.T)[0] > ALIKE)).any())
