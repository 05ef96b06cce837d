"""LabelRequests is the queue of label requests of a run: what is in its label file is not asked of the oracle again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.errors import DataWarning, UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.learning.checkpoint import ActivityTimer, RunFiles
from gpmlp.learning.labels import LabelEntry, LabelFile, LabelRefusal, LabelResult, Note, key_of
from gpmlp.learning.oracles.labeller import Labeller, check_refusal
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.oracles.single_point import FORCES, STRESS
from gpmlp.learning.recipe import SurrogateRecipe
from gpmlp.learning.surrogate import SurrogateCluster, cut_surrogate
from gpmlp.learning.walker import WalkerSnapshot
from gpmlp.potential.potential import Potential

EVERYTHING = (FORCES, STRESS)
BELIEVED = 3  # labels in a row that are checked and agree, after which an oracle that has contradicted itself is believed again
FAR_FORCES = 0.5  # share of the forces (of label or model) by which a label is off that is unlikely
FAR_SIGMAS, FAR_ENERGY = 6.0, 0.003  # as much in the energy: standard deviations, and eV/atom
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
    """Label file and labeller of a run, and how far the oracle is believed.

    Energies and forces (and stress) of the first label that is asked for are compared by further calls of the oracle, and of each that
    the model finds unlikely. After a contradiction so are those of the next labels: of `BELIEVED` without another one, or the run ends.

    Attributes:
        calls: labels that came from the oracle in this process.
        refused: why there was no label for the last structure that was refused.
    """

    def __init__(self, recipe: OracleRecipe, folder: Path, files: RunFiles, timer: ActivityTimer) -> None:
        """Raises UserError if the label file cannot be read or the oracle cannot be used."""
        self.recipe, self.files, self.timer = recipe, files, timer
        self.labels = LabelFile(folder / "labels.xyz")
        self.labeller = Labeller(recipe, folder)
        self.calls, self.refused = 0, ""
        self._to_check = 1 if recipe.check_every else 0  # labels, until the oracle is believed
        self._first, self._failed = True, False
        self._contradictions: list[LabelRefusal] = []
        self._unchecked: list[str] = []  # keys of labels that were taken since the last that was checked
        if self.labels.repaired:
            files.log_time("repaired", what=self.labels.repaired)

    def verify(self, labelled: tuple[int, str] | None) -> None:
        """Compare the label file with what a checkpoint says of it (frames, running checksum); say so once where neither has checksums.

        Raises:
            UserError: it is not the file of that run.
        """
        frames, checksum = labelled or (0, "")
        self.labels.check_frames(frames, checksum)
        if self.labels.unsealed > frames:
            what = (
                f"{self.labels.path}: {self.labels.unsealed} labels of an older version carry no checksum: nobody knows whether they "
                "were altered"
            )
            self.files.log_time("unverified", what=what)
            warnings.warn(what, DataWarning, stacklevel=2)

    @property
    def n_surrogates(self) -> int:
        """Labels of surrogates."""
        return sum("surrogate" in entry.notes for entry in self.labels)

    def close(self) -> None:
        """End all that is under way. Failures of an oracle that ended the run, and all answers of one that is not believed any more, are
        removed from the spool, so that they are asked for again."""
        self.labeller.close()
        if self._failed:
            self.labeller.discard(labels=len(self._contradictions) > 1)

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
            check = EVERYTHING if self._to_check and self._first else ()
            self._first = False
            with self.timer("oracle"):
                self.labeller.submit(key, request.structure, check)

    def collect(
        self,
        request: LabelRequest,
        reason: str,
        notes: Mapping[str, Note],
        potential: Potential | None = None,
        needed: bool = False,
    ) -> LabelEntry | None:
        """The label of a structure, once it is in the file, of a surrogate as much as is trusted; None if it was refused.

        Args:
            potential: that judges how likely the label is; None while there is none.
            needed: whether the run has to end where it is refused, and the structure is asked for again when it goes on.

        Raises:
            UserError: the oracle contradicted itself twice, or failed so often, or at all, that the run has to end; the disk is full.
        """
        structure, surrogate = request.structure, request.surrogate
        key = self.key(structure)
        if key in self.labels:
            return self.labels.find(key)
        refusal = self.labels.refusal(key)
        if refusal is None:
            self.submit(request)
            answer = self._believed(request, potential)
            self.calls += 1
            if not isinstance(answer, LabelRefusal):
                notes = {**notes, **({} if surrogate is None else surrogate.notes())}
                targets = _trusted(answer, surrogate)
                entry = self.labels.append(
                    LabelEntry(structure, targets, key, reason, self.recipe.settings_hash, notes)
                )
                self.labeller.forget(key)
                how = {"seconds": answer.seconds, "attempts": answer.attempts, "calls": answer.calls}
                self.files.log_time("labelled", key=key, **how, checked=" ".join(answer.checked))
                return entry
            refusal = answer
        self.refused = refusal.reason
        try:
            self._refuse(refusal, recorded=not needed)
            if needed:
                raise UserError(
                    f"{reason}: the oracle gave no label for that frame, and without one the run cannot go on: {refusal.reason} (files in "
                    f"{refusal.folder}). Correct the oracle and go on (--resume): it is asked again."
                )
            in_a_row = self.labels.refused_in_a_row + len(self._contradictions)
            check_refusal(self.recipe, refusal, in_a_row, begun=len(self.labels) > 0)
        except UserError:
            self._failed = True
            raise
        self.files.log_event("refused", key=key, reason=refusal.reason)
        return None

    def _believed(self, request: LabelRequest, potential: Potential | None) -> LabelResult | LabelRefusal:
        """The answer of the oracle, checked where that is due."""
        key = self.key(request.structure)
        with self.timer("oracle"):
            answer = self.labeller.result(key)
            doubted = isinstance(answer, LabelResult) and (
                self._to_check > 0 or (self.recipe.check_every > 0 and _unlikely(request, answer, potential))
            )
            if doubted:
                self.labeller.submit(key, request.structure, EVERYTHING if self._to_check else (FORCES,))
                answer = self.labeller.result(key)
        if isinstance(answer, LabelRefusal):
            return answer
        if answer.checked:
            self._unchecked = []
            self._to_check = max(0, self._to_check - 1)
            for refusal in self._contradictions:  # it was that structure
                self.labels.refuse(refusal)
            self._contradictions = self._contradictions if self._to_check else []
        else:
            self._unchecked.append(key)
        return answer

    def _refuse(self, refusal: LabelRefusal, recorded: bool) -> None:
        """Write a refusal down, unless it is the oracle that is to blame, or the structure is asked for again when the run goes on."""
        if self.labels.refusal(refusal.key) is not None:
            return
        self.labeller.forget(refusal.key)
        if refusal.contradiction:
            self._to_check = BELIEVED
            self._contradictions.append(refusal)
        if len(self._contradictions) > 1:
            said = " And: ".join(f"{r.reason} (label {r.key}, files in {r.folder})." for r in self._contradictions)
            since = (
                f" Labels {len(self.labels) - len(self._unchecked) + 1} to {len(self.labels)} of {self.labels.path} came since the "
                "last that was checked, and may be wrong, too."
                if self._unchecked
                else ""
            )
            raise UserError(
                f"The oracle contradicts itself, so the run ends: {said}{since} Correct the oracle and go on (--resume): both structures "
                "are asked for again. Where it is right and only rough, converge it better; oracle.check_every: 0 believes it blindly."
            )
        if recorded and not refusal.contradiction and self.recipe.on_failure != "stop":
            self.labels.refuse(refusal)


def _trusted(answer: LabelResult, surrogate: SurrogateCluster | None) -> Targets:
    return answer.targets if surrogate is None else surrogate.trusted_targets(answer.targets)


def _unlikely(request: LabelRequest, answer: LabelResult, potential: Potential | None) -> bool:
    """Whether a label is so far from what the model predicts that the oracle may be wrong, rather than the model uncertain."""
    if potential is None:
        return False
    targets = _trusted(answer, request.surrogate)
    with torch.no_grad():
        predicted = potential(request.structure, variance=["energies"])
    forces = torch.stack([targets.forces, predicted.forces])[:, targets.forces.isfinite().all(dim=1)]
    if forces.numel() and bool((forces[0] - forces[1]).norm() > FAR_FORCES * forces.norm(dim=(1, 2)).max()):
        return True
    error = float((targets.energies - predicted.energies).abs()[0])
    assert predicted.energies_variance is not None
    sigma = float(predicted.energies_variance.total.clamp_min(0).sqrt()[0])
    return error > max(FAR_SIGMAS * sigma, FAR_ENERGY * request.structure.n_atoms)


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
