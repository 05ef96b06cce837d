"""Descriptors of atomic environments, built from the `descriptor` section of a recipe."""

from __future__ import annotations

from gpmlp.core import errors
from gpmlp.core.environments import Descriptor
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures

NAMES = ("soap", "dscribe-soap", "dscribe-acsf")


def make_descriptor(species: tuple[int, ...], parameters: dict, constants: StoredTensors | None = None) -> Descriptor:
    """Build a descriptor.

    Args:
        species: atomic numbers that may occur, sorted.
        parameters: the resolved `descriptor` section of a recipe, as a dictionary.
        constants: what it learned from training environments, of a model file; without them, of a descriptor that has such, only the
            part that learns nothing: the power spectrum of SOAP with four-body invariants.
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
    spectrum = SoapPowerSpectrum(
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
    if constants is None or not parameters.get("four_body"):
        return spectrum
    from gpmlp.descriptors.backends import FourBodySoap
    from gpmlp.descriptors.four_body import FourBodyInvariants

    return FourBodySoap(spectrum, FourBodyInvariants.from_stored(constants, spectrum, parameters["four_body"]))


def learn_descriptor(species: tuple[int, ...], parameters: dict, structures: Structures, seed: int) -> Descriptor:
    """A descriptor that learns what it has to learn from these structures; other arguments as in `make_descriptor`."""
    made, four_body = make_descriptor(species, parameters), parameters.get("four_body")
    if not four_body:
        return made
    from gpmlp.descriptors.backends import FourBodySoap, SoapPowerSpectrum
    from gpmlp.descriptors.four_body import learn_four_body

    assert isinstance(made, SoapPowerSpectrum), "DescriptorRecipe"
    return FourBodySoap(made, learn_four_body(made, four_body, structures, seed))
