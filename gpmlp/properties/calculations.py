"""The registry: every calculation by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ase import Atoms

from gpmlp.core.errors import UserError, check_choice
from gpmlp.io.recipe_files import validate_as
from gpmlp.properties.defects import Interstitials, Vacancies
from gpmlp.properties.elastic import ElasticConstants
from gpmlp.properties.equation_of_state import EquationOfState
from gpmlp.properties.hop import Hop
from gpmlp.properties.lattice import LatticeConstants
from gpmlp.properties.molecules import Frequencies
from gpmlp.properties.motion import MeanSquareDisplacements, RadialDistributions
from gpmlp.properties.phases import PhaseEnergies
from gpmlp.properties.phonons import Phonons
from gpmlp.properties.plan import Calculation
from gpmlp.properties.quasi_harmonic import QuasiHarmonic
from gpmlp.properties.scans import Dimers, Torsions
from gpmlp.properties.surfaces import AdsorptionEnergies, SurfaceEnergies

CALCULATIONS: dict[str, type[Calculation]] = {
    kind.name: kind
    for kind in (
        EquationOfState,
        LatticeConstants,
        ElasticConstants,
        PhaseEnergies,
        Phonons,
        QuasiHarmonic,
        Vacancies,
        Interstitials,
        SurfaceEnergies,
        AdsorptionEnergies,
        Frequencies,
        Torsions,
        Dimers,
        Hop,
        RadialDistributions,
        MeanSquareDisplacements,
    )
}  # fmt: skip


def choose_calculations(
    structures: Sequence[Atoms],
    names: Sequence[str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Calculation]:
    """Calculations by name with their options; those that make sense for some of the structures where no names are given.

    Args:
        options: by name of a calculation, as {'elastic': {'strain': 0.01}}.

    Raises:
        UserError: an unknown name or option, a calculation that suits no structure, options of one that is not made.
    """
    options = options or {}
    for name in (*(names or ()), *options):
        check_choice("property", name, CALCULATIONS)
    if bare := [name for name, given in options.items() if not isinstance(given, Mapping)]:
        raise UserError(f"{bare[0]}: options have names; write {bare[0]}.OPTION=VALUE.")
    made = [validate_as(kind, dict(options.get(name, {})), name) for name, kind in CALCULATIONS.items()]
    if names is None:
        chosen = [
            each for each in made if (each.by_default or each.name in options) and not all(each.refusals(structures))
        ]
        if not chosen:
            why = next(f"{each.name}: {each.refusal(structures)}" for each in made if each.by_default)
            raise UserError(f"There is no property that suits these structures; name what is wanted (--only). {why}.")
    else:
        chosen = [each for each in made if each.name in names]
        check_suited(chosen, structures)
    if idle := [name for name in options if name not in {each.name for each in chosen}]:
        raise UserError(f"--set {idle[0]}...: {idle[0]} is not computed; add it to --only.")
    return chosen


def check_suited(chosen: Sequence[Calculation], structures: Sequence[Atoms]) -> None:
    """Each suits some of the structures.

    Raises:
        UserError: one does not.
    """
    for each in chosen:
        if all(reasons := each.refusals(structures)):
            raise UserError(f"{each.name}: {reasons[0]}.")
