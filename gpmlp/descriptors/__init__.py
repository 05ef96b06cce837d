"""Descriptors of atomic environments, built from the `descriptor` section of a recipe."""

from __future__ import annotations

from dataclasses import replace

from gpmlp.core import errors
from gpmlp.core.environments import Descriptor
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.descriptors import networks

NAMES = ("soap", "dscribe-soap", "dscribe-acsf")  # of local descriptors


def make_descriptor(species: tuple[int, ...], parameters: dict, constants: StoredTensors | None = None) -> Descriptor:
    """Build a descriptor.

    Args:
        species: atomic numbers that may occur, sorted.
        parameters: the resolved `descriptor` section of a recipe, as a dictionary.
        constants: what it learned from training environments, of a model file; without them, of a descriptor that has such, only the
            part that learns nothing: of SOAP the power spectrum, not compressed, without four-body invariants or features of a network.
    """
    local, network = _parts(parameters)
    made = None if local is None else _make_local(species, local, constants)
    if network is None or (constants is None and made is not None):
        assert made is not None
        return made
    if constants is None:
        raise ValueError("features of a network are learned from structures: learn_descriptor")
    from gpmlp.descriptors.network_features import NetworkDescriptor, NetworkFeatures

    features = NetworkFeatures.from_stored(constants.part("network."), species, network)
    return NetworkDescriptor(made, features, network["weight"])


def learn_descriptor(species: tuple[int, ...], parameters: dict, structures: Structures, seed: int) -> Descriptor:
    """A descriptor that learns what it has to learn from these structures; other arguments as in `make_descriptor`."""
    local, network = _parts(parameters)
    made = None if local is None else _learn_local(species, local, structures, seed)
    if network is None:
        assert made is not None
        return made
    from gpmlp.descriptors.network_features import NetworkDescriptor, learn_features

    return NetworkDescriptor(made, learn_features(species, network, structures, seed), network["weight"])


def most_features(species: tuple[int, ...], parameters: dict) -> int:
    """Number of features of a descriptor, at most, before it has learned what it learns; arguments as in `make_descriptor`."""
    local, network = _parts(parameters)
    mine = 0 if local is None else _make_local(species, local).n_features
    if local is not None and local.get("compression"):
        kept = local["compression"]["channels"]
        mine = kept * (kept + 1) // 2 * (local["l_max"] + 1)
    return max(1, mine) + (network["components"] if network else 0)


def _parts(parameters: dict) -> tuple[dict | None, dict | None]:
    """The sections of the local descriptor and of the network, None where there is none."""
    errors.check_choice("descriptor", parameters["name"], (*NAMES, *networks.NAMES))
    if parameters["name"] in networks.NAMES:
        return None, parameters
    return parameters, parameters.get("beside") or None


def _make_local(species: tuple[int, ...], parameters: dict, constants: StoredTensors | None = None) -> Descriptor:
    name = parameters["name"]
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
    if constants is None:
        return spectrum
    if compression := parameters.get("compression"):
        from gpmlp.descriptors.compression import Compression

        sizes = spectrum.l_max + 1, spectrum.channels, compression["channels"]
        spectrum = replace(spectrum, compression=Compression.from_stored(constants, *sizes))
    if not parameters.get("four_body"):
        return spectrum
    from gpmlp.descriptors.backends import FourBodySoap
    from gpmlp.descriptors.four_body import FourBodyInvariants

    return FourBodySoap(spectrum, FourBodyInvariants.from_stored(constants, spectrum, parameters["four_body"]))


def _learn_local(species: tuple[int, ...], parameters: dict, structures: Structures, seed: int) -> Descriptor:
    made = _make_local(species, parameters)
    compression, four_body = parameters.get("compression"), parameters.get("four_body")
    if not (compression or four_body):
        return made
    from gpmlp.descriptors.backends import FourBodySoap, SoapPowerSpectrum
    from gpmlp.descriptors.compression import sample_environments
    from gpmlp.descriptors.four_body import learn_four_body

    assert isinstance(made, SoapPowerSpectrum), "DescriptorRecipe"
    sample = sample_environments(structures, species, made.cutoff, seed)
    if compression:
        made = made.compressed(compression["channels"], sample)
    return FourBodySoap(made, learn_four_body(made, four_body, sample)) if four_body else made
