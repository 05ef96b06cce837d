"""Features of a network beside those of a local descriptor: scalars of its layers, which message passing makes of whole structures.

The scalars of each central species less their mean, each layer divided by its typical length, on the leading principal components of
features and derivatives of the training environments; constants from then on (docs/decisions/022-pretrained-features.md).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core.environments import Descriptor, Environments, Surroundings
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.neighbors import Neighbors, find_neighbors
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures, chunk_ranges
from gpmlp.descriptors.networks import InvariantNetwork, find_network
from gpmlp.descriptors.whole import WholeStructures, point_offsets

BATCH_ATOMS = 64  # of structures in one graph, unless one has more
EDGE_TANGENTS = 4000  # edges times directions of derivatives in memory together
CACHE_BYTES = 1 << 30  # of features and Jacobians of structures that were asked for last
SAMPLE = 100  # environments of each species that constants are learned from, of LARGEST_SAMPLE structures at most
LARGEST_SAMPLE = 32


@dataclass(frozen=True, eq=False)
class LayerScalars:
    """Raw scalars of some layers of a network, and their derivatives, by autograd.

    Attributes:
        layers: 1 for the first one.
    """

    network: InvariantNetwork
    layers: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of scalars of an atom."""
        return sum(self.network.widths[layer - 1] for layer in self.layers)

    def __call__(self, species: Tensor, edges: Neighbors, points: Tensor, cells: Tensor, owners: Tensor) -> Tensor:
        """(atoms, width) of positions `points` and cells, differentiable in both."""
        shift = torch.einsum("pa,pab->pb", edges.shifts.to(cells), cells[owners[edges.centers]])
        vectors = points[edges.neighbors] + shift - points[edges.centers]
        wanted, last = [], max(self.layers)
        for number, values in enumerate(self.network.layers(species, edges.centers, edges.neighbors, vectors), 1):
            if number in self.layers:
                wanted.append(values)
            if number == last:
                break
        return torch.cat(wanted, dim=1)

    def batches(self, structures: Structures) -> list[tuple[Structures, Neighbors]]:
        """Structures together in one graph, and its edges."""
        near = find_neighbors(structures, self.network.cutoff)
        offsets, out = structures.offsets.tolist(), []
        for start, end in chunk_ranges(structures.counts.tolist(), BATCH_ATOMS):
            edges = near.of_structures(offsets[start], offsets[end])
            out.append((structures.select(range(start, end)), edges))
        return out

    def jacobian(self, structure: Structures, projections: Tensor | None = None) -> Tensor:
        """(atoms, atoms + k, 3, width) derivatives of one structure with respect to its atoms and k lattice vectors, in forward mode.

        Args:
            projections: (atoms, width, D) that the scalars of each atom are multiplied by, if they are; the last axis is then D.
        """
        edges, n, k = find_neighbors(structure, self.network.cutoff), structure.n_atoms, int(structure.periodic.sum())

        def scalars(points: Tensor) -> Tensor:
            cell = torch.cat([points[n:], points.new_zeros(3 - k, 3)])[None]
            made = self(structure.species, edges, points[:n], cell, structure.structure_of_atom)
            return made if projections is None else torch.einsum("nw,nwd->nd", made, projections)

        points = torch.cat([structure.positions, structure.cells[0, :k]])
        directions = torch.eye(points.numel(), dtype=points.dtype).unflatten(1, points.shape)[3:]

        def push_forward(direction: Tensor) -> Tensor:
            return torch.func.jvp(scalars, (points,), (direction,))[1]

        together = max(1, EDGE_TANGENTS // max(1, len(edges)))
        width = self.width if projections is None else projections.shape[2]
        slopes = points.new_zeros(points.numel(), n, width)  # (3 (n + k), n, width)
        if len(directions):
            slopes[3:] = torch.func.vmap(push_forward, chunk_size=together)(directions)
        slopes[:3] = -slopes[3 : 3 * n].unflatten(0, (-1, 3)).sum(0)  # moving all atoms together changes nothing
        return slopes.unflatten(0, points.shape).permute(2, 0, 1, 3).contiguous()


@dataclass(eq=False)
class _Known:
    """What was computed of a structure: features (atoms, D), Jacobian (atoms, atoms + k, 3, D)."""

    features: Tensor
    jacobian: Tensor | None = None

    @property
    def n_bytes(self) -> int:
        parts = [self.features, *([self.jacobian] if self.jacobian is not None else [])]
        return sum(part.numel() * part.element_size() for part in parts)


class _Cache:
    """The structures asked for last, by what they are, as many as CACHE_BYTES hold: a fit asks for each many times."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, key: bytes) -> _Known | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def put(self, key: bytes, known: _Known) -> None:
        with self._lock:
            old = self._known.pop(key, None)
            self._known[key] = known
            self._bytes += known.n_bytes - (old.n_bytes if old else 0)
            while self._bytes > CACHE_BYTES and len(self._known) > 1:
                self._bytes -= self._known.popitem(last=False)[1].n_bytes

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Cache, ()  # a copy in another process is empty


@dataclass(frozen=True, eq=False)
class NetworkFeatures:
    """v = V_zᵀ (φ - μ_z) of the scalars φ of an atom with atomic number z.

    Attributes:
        species: atomic numbers.
        name, checkpoint, sha256: of the network, as in networks.find_network; layers: as in LayerScalars.
        means: (species, width) μ.
        projections: (species, width, D) V; of the training environments |v|² is 1 on average, before components were left out.
        lost: (species,) share of features and derivatives, as squares, that the components leave out.
    """

    species: tuple[int, ...]
    name: str
    checkpoint: str
    sha256: str
    layers: tuple[int, ...]
    means: Tensor
    projections: Tensor
    lost: Tensor
    _cache: _Cache = field(default_factory=_Cache, repr=False)

    @cached_property
    def scalars(self) -> LayerScalars:
        """Of the network."""
        return LayerScalars(find_network(self.name, self.checkpoint, self.sha256).network, self.layers)

    def __getstate__(self) -> dict:
        """What other processes get: not the network, which they find by its name."""
        return {key: value for key, value in vars(self).items() if key != "scalars"}

    @property
    def n_features(self) -> int:
        """D."""
        return self.projections.shape[2]

    @property
    def constants(self) -> dict[str, Tensor]:
        """As in Descriptor."""
        return {"means": self.means, "projections": self.projections, "lost": self.lost}

    @staticmethod
    def from_stored(stored: StoredTensors, species: tuple[int, ...], parameters: dict) -> NetworkFeatures:
        """Those of a model file; UserError if the tensors do not fit each other and the network, or there is no such network."""
        about = check_network(parameters, species)
        width, n = LayerScalars(find_network(*about[:3]).network, about[3]).width, len(species)
        projections = stored.take("projections", (n, width, "components"))
        return NetworkFeatures(
            species, *about, stored.take("means", (n, width)), projections, stored.take("lost", (n,))
        )

    def slots(self, species: Tensor) -> Tensor:
        """Index of each atomic number within self.species."""
        return torch.searchsorted(torch.tensor(self.species), species)

    def values(self, whole: WholeStructures) -> Tensor:
        """(environments, D) v."""
        none = self.projections.new_zeros(0, self.n_features)
        return torch.cat([none, *(known.features for known in self._known(whole))])[whole.atoms]

    def jacobian(self, whole: WholeStructures) -> Tensor:
        """(pairs, 3, D) ∂v of the centre/∂r_ij."""
        known = self._known(whole, jacobians=True)
        rows = [self.projections.new_zeros(0, 3, self.n_features)]
        rows += [there.jacobian.flatten(0, 1) for there in known if there.jacobian is not None]
        structures, centers = whole.structures, whole.surroundings.centers
        # of each structure (atoms, points)
        widths = structures.counts + structures.periodic.sum(1)
        sizes = structures.counts * widths
        own = (whole.atoms - structures.offsets[whole.owners])[centers]
        s = whole.owners[centers]
        point = whole.points - point_offsets(structures)[s]
        return torch.cat(rows)[(sizes.cumsum(0) - sizes)[s] + own * widths[s] + point]

    def pull_back(self, whole: WholeStructures, cotangents: Tensor) -> Tensor:
        """(pairs, 3) ∂E/∂r_ij from ∂E/∂v (environments, D), all on the pairs of one environment of each structure."""
        on_v = cotangents.new_zeros(whole.structures.n_atoms, self.n_features).index_add_(0, whole.atoms, cotangents)
        on_atoms, on_cells, atom = [on_v.new_zeros(0, 3)], [on_v.new_zeros(0, 3, 3)], 0
        for part, edges in self.scalars.batches(whole.structures):
            positions, cells = self._gradients(part, edges, on_v[atom : atom + part.n_atoms])
            on_atoms.append(positions)
            on_cells.append(cells)
            atom += part.n_atoms
        return whole.on_pairs(torch.cat(on_atoms), torch.cat(on_cells))

    def _gradients(self, part: Structures, edges: Neighbors, on_v: Tensor) -> list[Tensor]:
        """Of Σ on_v · v with respect to positions and cells."""
        on_scalars = torch.einsum("nd,nwd->nw", on_v, self.projections[self.slots(part.species)])
        with torch.inference_mode(False), torch.enable_grad():
            positions, cells = (x.clone().requires_grad_() for x in (part.positions, part.cells))
            owners, species = part.structure_of_atom.clone(), part.species.clone()
            made = self.scalars(species, _plain(edges), positions, cells, owners)
            energy = (made * on_scalars.clone()).sum()
            if not energy.requires_grad:  # no edges
                return [torch.zeros_like(part.positions), torch.zeros_like(part.cells)]
            both = torch.autograd.grad(energy, (positions, cells), allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip((positions, cells), both, strict=True)]

    def _known(self, whole: WholeStructures, jacobians: bool = False) -> list[_Known]:
        """What is wanted of each structure, out of the cache or computed."""
        structures, keys = whole.structures, _keys(whole.structures)
        known = [self._cache.get(key) for key in keys]
        missing = [s for s, there in enumerate(known) if there is None]
        with torch.inference_mode(False), torch.no_grad():
            some = _cloned(structures.select(missing)) if missing else None
            made: list[Tensor] = []
            for part, edges in self.scalars.batches(some) if some is not None else ():
                about = part.species, edges, part.positions, part.cells, part.structure_of_atom
                made += self._project(part, self.scalars(*about)).split(part.counts.tolist())
            for s, features in zip(missing, made, strict=True):
                known[s] = _Known(features)
            for s, there in enumerate(known):
                assert there is not None
                if jacobians and there.jacobian is None:
                    one = _cloned(structures.select([s]))
                    projections = self.projections[self.slots(one.species)]
                    known[s] = _Known(there.features, self.scalars.jacobian(one, projections))
        for key, there in zip(keys, known, strict=True):
            assert there is not None
            self._cache.put(key, there)
        return [there for there in known if there is not None]

    def keep(self, structure: Structures, scalars: Tensor, jacobian: Tensor) -> None:
        """Do not compute these again of a structure as WholeStructures have it."""
        projected = jacobian @ self.projections[self.slots(structure.species)][:, None]
        self._cache.put(_keys(structure)[0], _Known(self._project(structure, scalars), projected))

    def _project(self, part: Structures, scalars: Tensor) -> Tensor:
        slots = self.slots(part.species)
        return torch.einsum("nw,nwd->nd", scalars - self.means[slots], self.projections[slots])


def _plain(edges: Neighbors) -> Neighbors:
    """Tensors that autograd may keep, also where these were made in inference mode."""
    return Neighbors(edges.centers.clone(), edges.neighbors.clone(), edges.shifts.clone(), edges.cutoff)


def _cloned(structures: Structures) -> Structures:
    names = "positions", "cells", "periodic", "species", "structure_of_atom"
    return Structures(*(getattr(structures, name).clone() for name in names))


def _keys(structures: Structures) -> list[bytes]:
    """What each structure is, to the bits of its positions."""
    offsets = structures.offsets.tolist()
    species, positions, cells = (x.numpy() for x in (structures.species, structures.positions, structures.cells))
    return [
        species[start:end].tobytes() + positions[start:end].tobytes() + cells[s].tobytes()
        for s, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False))
    ]


def check_network(parameters: dict, species: Sequence[int] = ()) -> tuple[str, str, str, tuple[int, ...]]:
    """Name, checkpoint, SHA-256 and layers of the network of a section of a recipe, which may leave the last two open.

    Raises:
        UserError: as find_network; the network knows a species or has a layer not.
    """
    name, checkpoint = parameters["name"], parameters["checkpoint"]
    known = find_network(name, checkpoint, parameters.get("sha256"))
    unknown = [] if known.network.species is None else [z for z in species if z not in known.network.species]
    if unknown:
        raise UserError(f"The network {checkpoint!r} does not know {', '.join(map(chemical_symbol, unknown))}.")
    n = len(known.network.widths)
    layers = parameters.get("layers") or tuple(range(min(2, n), n + 1))
    if min(layers) < 1 or max(layers) > n:
        raise UserError(f"The network {checkpoint!r} has the layers 1 to {n}; got {list(layers)}.")
    return name, checkpoint, known.sha256, tuple(sorted(set(layers)))


def learn_features(species: tuple[int, ...], parameters: dict, structures: Structures, seed: int) -> NetworkFeatures:
    """Constants from about SAMPLE environments of each species.

    Components are principal ones of features and their derivatives together: so directions count in which an environment hardly differs
    from others, but changes as atoms move.
    """
    name, checkpoint, sha256, layers = check_network(parameters, species)
    scalars = LayerScalars(find_network(name, checkpoint, sha256).network, layers)
    width, n = scalars.width, len(species)
    sample, kept = _sample(structures, species, seed), []
    rows: list[list[Tensor]] = [[] for _ in species]
    moments = torch.zeros(n, width, width, dtype=torch.float64)
    with torch.no_grad():
        for s in range(len(sample)):
            one = sample.select([s])
            edges = find_neighbors(one, scalars.network.cutoff)
            values = scalars(one.species, edges, one.positions, one.cells, one.structure_of_atom)
            jacobian = scalars.jacobian(one)
            if (s + 1) * jacobian.numel() * jacobian.element_size() < CACHE_BYTES:
                kept.append((one, values, jacobian))
            for slot, z in enumerate(species):
                mine = one.species == z
                rows[slot].append(values[mine])
                slopes = jacobian[mine].flatten(0, 2)
                moments[slot] += slopes.T @ slopes
    every = [torch.cat(part) for part in rows]
    means = torch.stack([part.mean(0) if len(part) else torch.zeros(width, dtype=torch.float64) for part in every])
    widths = [scalars.network.widths[layer - 1] for layer in layers]
    projections, lost, most = [], [], min(parameters["components"], width)
    for part, mean, moment in zip(every, means, moments, strict=True):
        centred = part - mean
        scale = torch.cat([_inverse_length(x).expand(w) for x, w in zip(centred.split(widths, 1), widths, strict=True)])
        moment = scale[:, None] * (moment + centred.T @ centred) * scale / len(layers)
        values, vectors = torch.linalg.eigh(moment)
        vectors = vectors.flip(1)[:, :most]
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        lost.append(values.flip(0)[most:].clamp_min(0).sum() / values.sum().clamp_min(1e-300))
        projections.append(scale[:, None] * vectors / len(layers) ** 0.5)
    about = means, torch.stack(projections), torch.stack(lost)
    made = NetworkFeatures(species, name, checkpoint, sha256, layers, *about)
    for one, values, jacobian in kept:
        made.keep(one, values, jacobian)
    return made


def _inverse_length(centred: Tensor) -> Tensor:
    """1 / root mean square of |row|; 1 where all rows are alike."""
    length = centred.square().sum(1).mean().sqrt() if len(centred) else centred.new_zeros(())
    return torch.where(length > 1e-9, 1 / length.clamp_min(1e-9), 1.0)


def _sample(structures: Structures, species: Sequence[int], seed: int) -> Structures:
    """Structures in random order, until each species has SAMPLE environments."""
    order = torch.randperm(len(structures), generator=torch.Generator().manual_seed(seed))
    counts = structures.composition(species)[order].long()
    before = counts.cumsum(0) - counts
    wanted = ((before < SAMPLE) & (counts > 0)).any(1)
    some = structures.select(order[wanted][:LARGEST_SAMPLE]).to(device="cpu", dtype=torch.float64)
    return WholeStructures.from_surroundings(Surroundings.from_structures(some, Neighbors.complete(some))).structures


@dataclass(frozen=True, eq=False)
class NetworkDescriptor:
    """Features [x, w v] of unit length: those x of a local descriptor (1, if there is none) with those v of a network beside them."""

    local: Descriptor | None
    network: NetworkFeatures
    weight: float

    cutoff = float("inf")

    @property
    def shown_cutoff(self) -> float:
        """Of the local descriptor, or of the network's edges: where environments are shown, as they end nowhere, A."""
        return self.network.scalars.network.cutoff if self.local is None else self.local.cutoff

    @property
    def n_features(self) -> int:
        return (1 if self.local is None else self.local.n_features) + self.network.n_features

    @property
    def constants(self) -> dict[str, Tensor]:
        """As in Descriptor."""
        mine = {f"network.{name}": value for name, value in self.network.constants.items()}
        return mine | ({} if self.local is None else self.local.constants)

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Environments of all surroundings, which have no cutoff."""
        whole, like = WholeStructures.from_surroundings(surroundings), surroundings.vectors
        near = None if self.local is None else whole.nearby(self.local.cutoff)
        made = None if near is None or self.local is None else self.local(near.surroundings)
        x = like.new_ones(len(surroundings), 1) if made is None else made.features
        both = torch.cat([x, self.weight * self.network.values(whole).to(like)], dim=1)
        norm = both.norm(dim=1, keepdim=True)
        features = both / norm

        def pull_back(cotangents: Tensor) -> Tensor:
            if cotangents.dim() == 3:
                return torch.stack([pull_back(one) for one in cotangents])
            on_both = (cotangents - features * (features * cotangents).sum(1, keepdim=True)) / norm
            on_x, on_v = on_both.split([x.shape[1], self.network.n_features], dim=1)
            out = self.network.pull_back(whole, self.weight * on_v.double()).to(like)
            return out if made is None or near is None else out + near.spread(made.pull_back(on_x))

        def jacobian() -> Tensor:
            of_v = self.weight * self.network.jacobian(whole).to(like)
            of_x = of_v.new_zeros(*of_v.shape[:2], 1)
            out = torch.cat([of_x if made is None or near is None else near.spread(made.jacobian()), of_v], dim=2)
            unit = features[surroundings.centers]
            out.addcmul_(out @ unit[:, :, None], unit[:, None, :], value=-1)
            return out.div_(norm[surroundings.centers][:, :, None])

        return Environments(surroundings, features, pull_back, jacobian)
