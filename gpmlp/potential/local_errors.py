"""What is known of the errors of local energies from the environments: their posterior variance, and how far from the data they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gpmlp.core.environments import Environments
from gpmlp.core.quantities import Variance
from gpmlp.gp.kernels import Profile
from gpmlp.gp.variance import VarianceModel
from gpmlp.uncertainty.mahalanobis import Mahalanobis


@dataclass(frozen=True, eq=False)
class LocalErrors:
    """Which of the two are asked for, and what they are computed from.

    Attributes:
        variances: None where no variance is wanted; form: as in VarianceRequest.
        distances: in the space of the first descriptor; None where no novelty is wanted.
    """

    variances: VarianceModel | None = None
    distances: Mahalanobis | None = None
    form: str = "scaled"

    def __call__(
        self, environments: Sequence[Environments], profiles: Sequence[dict[int, Profile]]
    ) -> tuple[Variance | None, Tensor | None]:
        """Variances of local energies and novelties of environments, given for each descriptor.

        Args:
            profiles: as in VarianceModel.atom_energies.
        """
        variances, distances, first = self.variances, self.distances, environments[0]
        variance = None if variances is None else variances.atom_energies(environments, self.form, profiles)
        return variance, None if distances is None else distances.novelty(first.species, first.features)


NOTHING = LocalErrors()
