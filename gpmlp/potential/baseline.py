"""What a baseline offers: an energy term with its forces and stress that is added, not learned, atom by atom or of whole structures."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from gpmlp.core import errors, neighbors
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import Prediction
from gpmlp.core.structures import Structures


class Baseline(ABC):
    """A term of the energy with its forces and stress that was not learned. It is asked of whole structures, beside what is learned."""

    @abstractmethod
    def __call__(self, structures: Structures) -> Prediction:
        """Of all atoms."""

    def state(self) -> dict:
        """What `baseline_from_state` makes it of again, JSON-able. Raises UserError: a term that files do not know."""
        raise errors.UserError(
            f"The baseline {type(self).__name__} is not of gpmlp and cannot be kept in a file: save the model without it, and add it "
            "again after loading."
        )


class LocalBaseline(Baseline):
    """A baseline of pairs within a cutoff, computed with what is learned.

    Attributes:
        whole_structures: whether `of_atoms` is to be asked of all atoms of a structure at once.
    """

    whole_structures: bool = False

    @property
    @abstractmethod
    def cutoff(self) -> float:
        """Range of the interaction, A."""

    @abstractmethod
    def of_atoms(
        self, structures: Structures, pairs: Neighbors, start: int, end: int
    ) -> tuple[Tensor, Neighbors, Tensor]:
        """Local energies (atoms,), eV, of the atoms start to end, the pairs within the cutoff, and dE/dr_ij of these (pairs, 3), eV/A.

        Args:
            pairs: neighbours of these atoms within `cutoff` or more.
        """

    def __call__(self, structures: Structures, pairs: Neighbors | None = None) -> Prediction:
        """Of all atoms; `pairs`: neighbours within `cutoff` or more, if they are there already."""
        if pairs is None:
            pairs = neighbors.find_neighbors(structures, self.cutoff) if self.cutoff else Neighbors.empty(structures)
        local, near, gradients = self.of_atoms(structures, pairs, 0, structures.n_atoms)
        return neighbors.assemble_prediction(structures, near, near.vectors(structures), local, gradients)
