"""Independent groups of structures: near-duplicates, as consecutive frames of a trajectory are, are found by their descriptors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, StructureEnvironments
from gpmlp.core.findings import Finding
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting.partitions import Partition, Partitions
from gpmlp.fitting.workers import Report, silent

DIMENSIONS = 48  # of a random projection: distances are right to a tenth (Johnson & Lindenstrauss 1984)
SLOTS = 64  # signs that tell the atoms of a structure apart
TYPICAL = 0.2  # the distance within which that share of the structures of its kind lie is typical of a structure;
NEAR = 0.25  # of it is near, where atoms come in the same order
NEAR_SHUFFLED = 0.05  # of it, where only the sum over the atoms is compared, in which differences of many atoms cancel
LEADING = (
    12  # principal components in which structures are searched: in more dimensions a tree has to look at everything
)
FLATTEST = 1e-4  # of the largest variance among components: those below count as if they had so much
SAME = 1e-4  # distance of structures that are the same to rounding
REFERENCES = 256  # structures of a kind to which distances are measured
ENOUGH = 10  # structures of a kind that have a typical distance of their own
WORTH_SAYING = 0.9  # of the structures: with more independent groups than that, nothing is said


@dataclass(frozen=True, eq=False)
class IndependentGroups:
    """Structures no two of which are near, and the structures near each of them.

    Attributes:
        leaders: (groups,) the structure that each group stands about, in the order of the structures.
        near: for each group, its leader first and then all structures near it, the nearest first; they may be near other leaders as
            well. What is learned from without these has seen nothing like the leader.
    """

    leaders: Tensor
    near: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.near)

    @staticmethod
    def of_one(n: int) -> IndependentGroups:
        """n structures that are independent of each other."""
        return IndependentGroups(torch.arange(n), tuple(torch.arange(n).split(1)))

    def among(self, chosen: Tensor, n: int) -> IndependentGroups:
        """The groups of some of n structures, counted among these; groups whose leader is not there are left out."""
        place = torch.full((n,), -1)
        place[chosen] = torch.arange(len(chosen))
        leaders = place[self.leaders]
        here = [i for i in range(len(self)) if leaders[i] >= 0]
        near = tuple(place[self.near[i]][place[self.near[i]] >= 0] for i in here)
        return IndependentGroups(leaders[here], near)

    def finding(self, structures: Structures) -> Finding | None:
        """What there is to say about structures that are not independent."""
        n = len(structures)
        if len(self) > WORTH_SAYING * n:
            return None
        twins = torch.cat([group[1:] for group in self.near]).unique().tolist()
        return Finding(
            "near-duplicates",
            "warning" if 2 * len(self) <= n else "note",
            f"{n} structures are {len(self)} independent groups: the others are near-duplicates, as consecutive frames of molecular "
            "dynamics or a set read twice.",
            tuple(structures.names[i] for i in twins),
            {"structures": n, "independent_groups": len(self)},
            "Groups are set aside and left out as a whole, so error bars stay honest; near-duplicates cost time and teach little.",
        )


def find_groups(
    structures: Structures,
    descriptor: Descriptor,
    config_types: Sequence[str],
    seed: int = 0,
    partitions: Partitions | None = None,
) -> IndependentGroups:
    """Group structures that are much nearer to each other than structures of their kind are.

    The distance of two structures of equal species is the root mean square of the distances of the features of their atoms, in the order
    of the atoms; or that of the sums of the features over the atoms, which no order changes. Both are measured in a random projection,
    in which components of large variance are made smaller (_evened).
    Near is what lies within NEAR (NEAR_SHUFFLED) of the smaller of the two structures' typical distances, or within SAME. Leaders are
    taken in random order, each with all that is near it (Hartigan, Clustering Algorithms (1975), chapter 3): chains, as a trajectory
    is one, break up. O(n log n) in the number of structures.

    Args:
        partitions: of the structures, if there are some already.
    """
    species = structures.distinct_species
    if partitions is None:
        found = [_project(silent, descriptor, species, seed, structures)]
    else:
        found = partitions.map(_project_partition, descriptor, species, seed)
    ordered, summed = (np.concatenate(parts) for parts in zip(*found, strict=True))
    kinds = _kinds(structures)
    generator = torch.Generator().manual_seed(seed)
    searches = [
        _Search.build(ordered, kinds[0], config_types, NEAR, generator),
        _Search.build(summed, kinds[1], config_types, NEAR_SHUFFLED, generator),
    ]
    alone = np.logical_and(*(search.alone for search in searches))
    free, near = np.ones(len(structures), dtype=bool), {}
    for i in torch.randperm(len(structures), generator=generator).tolist():
        if not free[i]:
            continue
        near[i] = torch.tensor([i])
        if not alone[i]:
            others = np.array(sorted(set().union(*(search.near(i) for search in searches)) - {i}), dtype=int)
            distance = np.linalg.norm(ordered[others] - ordered[i], axis=1)
            near[i] = torch.from_numpy(np.array([i, *others[np.argsort(distance, kind="stable")]]))
        free[near[i].numpy()] = False
    leaders = sorted(near)
    return IndependentGroups(torch.tensor(leaders, dtype=torch.long), tuple(near[i] for i in leaders))


def _project_partition(
    report: Report, descriptor: Descriptor, species: Sequence[int], seed: int, partition: Partition
) -> tuple[np.ndarray, np.ndarray]:
    return _project(report, descriptor, species, seed, partition.structures)


def _project(
    report: Report, descriptor: Descriptor, species: Sequence[int], seed: int, structures: Structures
) -> tuple[np.ndarray, np.ndarray]:
    """Projected features of each structure (structures, DIMENSIONS), in the order of its atoms and summed.

    Args:
        species: of all structures that are compared.
    """
    generator = torch.Generator().manual_seed(seed)
    like = structures.positions.new_zeros(0, dtype=torch.float64)

    def signs(rows: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, (rows, descriptor.n_features), generator=generator).to(like) - 1.0

    project = torch.randn(descriptor.n_features, DIMENSIONS, generator=generator, dtype=torch.float64).to(like.device)
    project /= DIMENSIONS**0.5
    by_slot, by_species = signs(SLOTS), signs(len(species))
    known = torch.tensor(species, device=like.device)

    def project_part(part: Structures) -> list[Tensor]:
        x = StructureEnvironments.from_structures(descriptor, part).environments.features.double()
        owner = part.structure_of_atom
        slot = (torch.arange(part.n_atoms, device=owner.device) - part.offsets[owner]) % SLOTS
        out = []
        for sign in (by_slot[slot], by_species[torch.searchsorted(known, part.species)]):
            sums = like.new_zeros(len(part), DIMENSIONS).index_add_(0, owner, (x * sign) @ project)
            out.append(sums / part.counts.to(sums)[:, None].sqrt())
        return out

    parts = parallel.map_pieces(project_part, list(chunk_structures(structures, CHUNK_ATOMS)))
    first, second = (torch.cat(out).cpu().numpy() for out in zip(*parts, strict=True))
    return first, second


def _kinds(structures: Structures) -> tuple[list[int], list[int]]:
    """What kind each structure is of: that of structures with the same species in the same order, and in any order."""
    every, offsets = structures.species.cpu().numpy(), structures.offsets.tolist()
    numbers: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
    kinds: tuple[list[int], list[int]] = ([], [])
    for a, b in zip(offsets, offsets[1:], strict=False):
        for number, kind, key in zip(numbers, kinds, (every[a:b], np.sort(every[a:b])), strict=True):
            kind.append(number.setdefault(key.tobytes(), len(number)))
    return kinds


@dataclass(frozen=True, eq=False)
class _Search:
    """Structures near a structure, by one kind of vectors.

    Attributes:
        vectors: (structures, DIMENSIONS); reach: (structures,) within which others are near.
        leading: (structures, LEADING) their leading components, within a kind: nearer to each other than the vectors.
        trees: by kind, of distinct `leading`; members: by kind, the structures at each point of the tree.
        kinds: of each structure; alone: (structures,) whether none is near.
    """

    vectors: np.ndarray
    reach: np.ndarray
    leading: np.ndarray
    trees: dict[int, KDTree]
    members: dict[int, list[np.ndarray]]
    kinds: list[int]
    alone: np.ndarray

    @staticmethod
    def build(
        vectors: np.ndarray, kinds: list[int], config_types: Sequence[str], ratio: float, generator: torch.Generator
    ) -> _Search:
        """With trees of each kind of which there are several structures."""
        vectors = _evened(vectors, kinds)
        reach = _reach(vectors, kinds, config_types, ratio, generator)
        trees, members, alone = {}, {}, np.ones(len(vectors), dtype=bool)
        leading = np.zeros((len(vectors), min(LEADING, vectors.shape[1])))
        for kind, here in _positions(kinds).items():
            if len(here) < 2:
                continue
            # many copies of one structure are one point of the tree
            leading[here] = _principal(vectors[here])
            cell = np.round(vectors[here] / SAME).astype(np.int64)
            _, first, which = np.unique(cell, axis=0, return_index=True, return_inverse=True)
            order, counts = np.argsort(which.ravel(), kind="stable"), np.bincount(which.ravel())
            members[kind] = np.split(here[order], counts.cumsum()[:-1])
            trees[kind] = KDTree(leading[here[first]])
            near = trees[kind].query_ball_point(leading[here[first]], reach[here[first]], return_length=True)
            alone[here] = ((near == 1) & (counts == 1))[which.ravel()]
        return _Search(vectors, reach, leading, trees, members, kinds, alone)

    def near(self, i: int) -> list[int]:
        """The structures near i, itself among them."""
        kind = self.kinds[i]
        if kind not in self.trees:
            return [i]
        points = self.trees[kind].query_ball_point(self.leading[i], self.reach[i] + SAME)
        near = np.concatenate([self.members[kind][p] for p in points])
        distance = np.linalg.norm(self.vectors[near] - self.vectors[i], axis=1)
        return near[distance <= np.minimum(self.reach[near], self.reach[i])].tolist()


def _evened(vectors: np.ndarray, kinds: list[int]) -> np.ndarray:
    """With principal components of each kind divided by the fourth root of their variances, the largest being one.

    Else the volume decides: cells of nearly one volume that are strained or displaced otherwise would all be near. Divided by the square
    root, all components would count the same, fast motions of hydrogen and what is next to nothing among them.
    """
    out = vectors.copy()
    for here in _positions(kinds).values():
        if len(here) >= ENOUGH:
            centred = vectors[here] - vectors[here].mean(0)
            values, axes = np.linalg.eigh(centred.T @ centred)
            values = np.maximum(values, max(FLATTEST * values[-1], np.finfo(float).tiny))
            out[here] = centred @ (axes * (values[-1] / values) ** 0.25) @ axes.T
    return out


def _principal(vectors: np.ndarray) -> np.ndarray:
    """(n, LEADING) leading principal components of vectors."""
    centred = vectors - vectors.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    return centred @ axes[:, : -LEADING - 1 : -1]


def _reach(
    vectors: np.ndarray, kinds: list[int], config_types: Sequence[str], ratio: float, generator: torch.Generator
) -> np.ndarray:
    """(structures,) distance within which others are near: `ratio` of the TYPICAL quantile of those to structures of the same kind and
    config_type; of the same kind, where these are few; where all are few, of the median of the others'."""
    out = np.full(len(vectors), np.nan)
    labelled = _positions(list(zip(kinds, config_types, strict=True)))
    for groups in (_positions(kinds), labelled):
        for here in groups.values():
            if len(here) < ENOUGH:
                continue
            drawn = here[torch.randperm(len(here), generator=generator)[:REFERENCES].numpy()]
            for part in np.array_split(here, 1 + len(here) // 4096):
                out[part] = np.quantile(cdist(vectors[part], vectors[drawn]), TYPICAL, axis=1)
    typical = np.nanmedian(out) if np.isfinite(out).any() else 0.0
    return np.maximum(ratio * np.nan_to_num(out, nan=typical), SAME)


def _positions(keys: Sequence) -> dict:
    """The indices of each key."""
    out: dict = {}
    for i, key in enumerate(keys):
        out.setdefault(key, []).append(i)
    return {key: np.array(here) for key, here in out.items()}
