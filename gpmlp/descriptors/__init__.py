"""Descriptors of atomic environments, built from the `descriptor` section of a recipe."""

from __future__ import annotations

from gpmlp.core import errors
from gpmlp.core.environments import Descriptor

NAMES = ("soap", "dscribe-soap", "dscribe-acsf")


def make_descriptor(species: tuple[int, ...], parameters: dict) -> Descriptor:
    """Build a descriptor.

    Args:
        species: atomic numbers that may occur, sorted.
        parameters: the resolved `descriptor` section of a recipe, as a dictionary.
    """
    name = parameters["name"]
    errors.check_choice("descriptor", name, NAMES)
    if name != "soap":
        from gpmlp.descriptors import dscribe

        return dscribe.make_dscribe(species, parameters)
    from gpmlp.descriptors.backends import SoapPowerSpectrum
    from gpmlp.descriptors.radial import NeighborWeights

    scaling = parameters["radial_scaling"] or {"scale": 1.0, "exponent": 0.0}
    weights = NeighborWeights(
        cutoff=parameters["cutoff"],
        function=parameters["cutoff_function"],
        width=parameters["cutoff_width"],
        cutoff_exponent=parameters["cutoff_exponent"],
        scale=scaling["scale"],
        exponent=scaling["exponent"],
    )
    return SoapPowerSpectrum(
        species=species,
        cutoff=parameters["cutoff"],
        n_max=parameters["n_max"],
        l_max=parameters["l_max"],
        sigma_atom=parameters["sigma_atom"],
        weights=weights,
        basis=parameters["basis"],
        shortest=parameters["shortest"],
        central_weight=parameters["central_weight"],
    )
