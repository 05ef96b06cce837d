"""Networks that give invariants of atoms, by the names that recipes and model files call them.

A network is any object with the attributes of `InvariantNetwork`, as a rule a torch.nn.Module. `register_network` makes one known under
a name; those of SevenNet are known by their own names. A model file holds the name and the SHA-256 of the weights, never a path or code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from gpmlp.core import errors

NAMES = ("sevennet", "network")


class InvariantNetwork(Protocol):
    """Invariants of atoms from a graph of neighbours, in double precision.

    Attributes:
        cutoff: of the edges of the graph, A; what comes along an edge must vanish there, with two derivatives.
        widths: number of invariants of an atom in each layer.
        species: atomic numbers that it knows; None = all.
    """

    @property
    def cutoff(self) -> float: ...

    @property
    def widths(self) -> tuple[int, ...]: ...

    @property
    def species(self) -> tuple[int, ...] | None: ...

    def layers(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Iterator[Tensor]:
        """(atoms, width) of each layer in turn, unchanged by rotations, reflections and the order of atoms and edges.

        Several structures may be given at once, with no edge between them. Operations must have forward-mode and reverse-mode derivatives
        with respect to `vectors`, as those of PyTorch have, and must not change tensors in place.

        Args:
            species: (atoms,) atomic numbers.
            centers, neighbors: (edges,) indices of atoms, each edge in both directions; vectors: (edges, 3) from centre to neighbour, A.
        """
        ...

    def atom_energies(self, species: Tensor, centers: Tensor, neighbors: Tensor, vectors: Tensor) -> Tensor:
        """(atoms,) eV, for a baseline; needed of no network that gives features only."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """All weights and constants, by name."""
        ...


@dataclass(frozen=True, eq=False)
class KnownNetwork:
    """A network and the SHA-256 of its weights."""

    network: InvariantNetwork
    sha256: str


REGISTERED: dict[str, KnownNetwork] = {}


def register_network(name: str, network: InvariantNetwork) -> str:
    """Make a network known as `{name: network, checkpoint: NAME}` of recipes, in this process; other processes must do the same before they
    load a model that uses it. It is not to be changed after that.

    Returns:
        the SHA-256 of its weights, which models keep.

    Raises:
        UserError: it lacks what InvariantNetwork asks for, has weights that are not in double precision, or another one has the name.
    """
    for what in ("cutoff", "widths", "layers", "state_dict"):
        if not hasattr(network, what):
            raise errors.UserError(
                f"The network {name!r} has no `{what}`; gpmlp.descriptors.networks.InvariantNetwork says what it needs."
            )
    digest = hashlib.sha256(repr((float(network.cutoff), tuple(network.widths))).encode())
    for key, value in sorted(network.state_dict().items()):
        if value.dtype not in (torch.float64, torch.complex128) and (value.is_floating_point() or value.is_complex()):
            raise errors.UserError(
                f"The network {name!r} has {key!r} in {str(value.dtype).removeprefix('torch.')}; all it computes must be in double "
                "precision: register network.double()."
            )
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)} ".encode() + value.numpy().tobytes())
    known = KnownNetwork(network, digest.hexdigest())
    if REGISTERED.get(name, known).sha256 != known.sha256:
        raise errors.UserError(f"Another network is registered as {name!r}; give this one another name.")
    REGISTERED[name] = known
    return known.sha256


def find_network(name: str, checkpoint: str, sha256: str | None = None) -> KnownNetwork:
    """The network that a recipe or a model file calls so.

    Args:
        name: of NAMES; checkpoint: of SevenNet, or as registered.
        sha256: of the weights, where they are known.

    Raises:
        UserError: there is none, its package is not installed, or its weights are not those of the SHA-256.
    """
    errors.check_choice("network", name, NAMES)
    if name == "sevennet":
        known = _sevennet(checkpoint)
    elif checkpoint in REGISTERED:
        known = REGISTERED[checkpoint]
    else:
        there = ", ".join(map(repr, REGISTERED)) or "none"
        raise errors.UserError(
            f"There is no network {checkpoint!r}; registered in this process: {there}. Call "
            f"gpmlp.register_network({checkpoint!r}, network) before; the command line knows those of sevennet only."
        )
    if sha256 is not None and known.sha256 != sha256:
        raise errors.UserError(
            f"The weights of the network {checkpoint!r} are not those that the model was fitted with: their SHA-256 is {known.sha256}, the "
            f"model's is {sha256}. Use the version that the model was fitted with, or fit it again."
        )
    return known


@lru_cache
def _sevennet(checkpoint: str) -> KnownNetwork:
    from gpmlp.descriptors import sevennet

    return KnownNetwork(*sevennet.load_sevennet(checkpoint))
