"""The pair search finds who sees whom on CPUs: compiled cell lists, whose runs of centres can be searched side by side.

Atoms are sorted into bins at least as wide as the cutoff (Quentrec, Brot, J. Comput. Phys. 13, 430 (1973)); bins along the third axis lie
side by side in memory, so that a centre compares itself with nine runs of atoms. `cells.py` does the same on devices.
Only neighbors.py imports this, when there is something to do: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from gpmlp.pair_loops import FLAGS, pair_vector

AHEAD = 20  # bits of the number of a neighbour
FEW = 192  # numbers that are sorted soonest by counting
AT_ONCE = 256  # neighbours of an atom for which there is room from the beginning


class Grid(NamedTuple):
    """Atoms of a batch of structures sorted by bin.

    Attributes:
        owner: (atoms,) index of the structure; boxes: (structures, 3, 3) A; periodic: (structures, 3).
        sides: (structures, 3) number of bins along each axis; reach: (structures, 3) bins to look at on either side.
        first: (structures,) number of the first bin of each structure; starts: (bins + 1,) where each bin begins.
        places: (atoms, 3) bin of each atom; wraps: (atoms, 3) lattice vectors taken off to be within the box along periodic axes.
        slots: (atoms,) place of each atom in the order of bins; atoms: (atoms,) in that order.
        positions: (3, atoms) within the box, A, in the order of bins.
        cutoff: A.
    """

    owner: np.ndarray
    boxes: np.ndarray
    periodic: np.ndarray
    sides: np.ndarray
    reach: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    places: np.ndarray
    wraps: np.ndarray
    slots: np.ndarray
    atoms: np.ndarray
    positions: np.ndarray
    cutoff: float


@njit(**FLAGS)
def grid(positions, boxes, periodic, owner, offsets, cutoff):
    """Sort the atoms of structures whose `boxes` have three axes each (cells.boxes)."""
    n, n_boxes = len(positions), len(boxes)
    sides, reach, first = (
        np.empty((n_boxes, 3), np.int64),
        np.empty((n_boxes, 3), np.int64),
        np.empty(n_boxes, np.int64),
    )
    places, wraps, keys = np.empty((n, 3), np.int64), np.empty((n, 3), np.int64), np.empty(n, np.int64)
    fractions, normals, bins = np.empty((n, 3)), np.empty((3, 3)), np.int64(0)
    for s in range(n_boxes):
        begin, end = offsets[s], offsets[s + 1]
        _normals(boxes[s], normals)
        for k in range(3):
            height = 1 / np.sqrt(normals[k, 0] ** 2 + normals[k, 1] ** 2 + normals[k, 2] ** 2)
            low, high = (0.0, 1.0) if periodic[s, k] or begin == end else (np.inf, -np.inf)
            for i in range(begin, end):
                f = positions[i, 0] * normals[k, 0] + positions[i, 1] * normals[k, 1] + positions[i, 2] * normals[k, 2]
                wraps[i, k] = np.int64(np.floor(f)) if periodic[s, k] else 0
                fractions[i, k] = f - wraps[i, k]
                if not periodic[s, k]:
                    low, high = min(low, f), max(high, f)
            extent = (high - low) * height
            # no more bins along an axis than atoms: few atoms far apart need no fine grid
            n_bins = np.int64(max(1.0, min(np.floor(extent / cutoff), 1.0 + 2 * (end - begin) ** (1 / 3))))
            # a hair more than the cutoff: a pair must not be lost to the rounding of a fraction
            far = np.int64(np.ceil(cutoff * (1 + 1e-12) * n_bins / max(extent, 1e-9 * cutoff)))
            sides[s, k], reach[s, k] = n_bins, far if periodic[s, k] else min(far, n_bins - 1)
            scale = n_bins / max(high - low, 1e-300)
            for i in range(begin, end):
                places[i, k] = min(max(np.int64((fractions[i, k] - low) * scale), 0), n_bins - 1)
        first[s] = bins
        for i in range(begin, end):
            keys[i] = bins + (places[i, 0] * sides[s, 1] + places[i, 1]) * sides[s, 2] + places[i, 2]
        bins += sides[s, 0] * sides[s, 1] * sides[s, 2]
    return Grid(owner, boxes, periodic, sides, reach, first, *_sorted(positions, boxes, owner, wraps, keys, bins, places),
                cutoff)  # fmt: skip


@njit(**FLAGS)
def _normals(box, out):
    """Columns of the inverse: fractions are products of positions with these."""
    for k in range(3):
        u, v = box[(k + 1) % 3], box[(k + 2) % 3]
        out[k, 0] = u[1] * v[2] - u[2] * v[1]
        out[k, 1] = u[2] * v[0] - u[0] * v[2]
        out[k, 2] = u[0] * v[1] - u[1] * v[0]
    volume = box[0, 0] * out[0, 0] + box[0, 1] * out[0, 1] + box[0, 2] * out[0, 2]
    for k in range(3):
        for x in range(3):
            out[k, x] /= volume


@njit(**FLAGS)
def _sorted(positions, boxes, owner, wraps, keys, bins, places):
    n = len(positions)
    starts, slots, atoms, moved = (
        np.zeros(bins + 2, np.int64),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
        np.empty((3, n)),
    )
    for i in range(n):
        starts[keys[i] + 2] += 1
    for b in range(bins):
        starts[b + 2] += starts[b + 1]
    for i in range(n):
        at, box = starts[keys[i] + 1], boxes[owner[i]]
        starts[keys[i] + 1] += 1
        slots[i], atoms[at] = at, i
        for x in range(3):
            back = wraps[i, 0] * box[0, x] + wraps[i, 1] * box[1, x] + wraps[i, 2] * box[2, x]
            moved[x, at] = positions[i, x] - back
    return starts[: bins + 1], places, wraps, slots, atoms, moved


@njit(**FLAGS)
def pairs(lo, hi, positions, cells, grid):
    """The pairs of the atoms lo to hi as centres, in the order of centres, neighbours and shifts.

    Returns:
        centres and neighbours (pairs,), shifts and vectors (pairs, 3), the latter from `positions` and `cells` as they came; the
        shortest distance, A, and which pair that is.
    """
    room = 64 * (hi - lo) + AT_ONCE
    centers, neighbors, shifts = np.empty(room, np.int64), np.empty(room, np.int64), np.empty((room, 3), np.int64)
    vectors = np.empty((room, 3), positions.dtype)
    hits, squares, images = np.empty(AT_ONCE, np.int64), np.empty(AT_ONCE), np.empty((AT_ONCE, 3), np.int64)
    keys, total, closest, where = np.empty(AT_ONCE, np.int64), np.int64(0), np.inf, np.int64(0)
    for i in range(lo, hi):
        n, hits, squares, images = _around(i, grid, hits, squares, images)
        if total + n > room:
            room = 2 * room + n
            centers, neighbors, shifts = _longer(centers, room), _longer(neighbors, room), _longer(shifts, room)
            vectors = _longer(vectors, room)
        if n > len(keys):
            keys = np.empty(len(hits), np.int64)
        _sort(hits, n, keys)
        for k in range(n):
            j, found = keys[k] >> AHEAD, keys[k] & (1 << AHEAD) - 1
            centers[total], neighbors[total] = i, j
            for x in range(3):
                shifts[total, x] = images[found, x] + grid.wraps[i, x] - grid.wraps[j, x]
            pair_vector(positions, cells[grid.owner[i]], i, j, shifts[total], vectors[total])
            if squares[found] < closest:
                closest, where = squares[found], total
            total += 1
    return centers[:total], neighbors[:total], shifts[:total], vectors[:total], np.sqrt(closest), where


@njit(**FLAGS)
def _around(i, grid, hits, squares, images):
    """Number of neighbours of atom i; them and the order in which they were found in one number each, squared distances, images of the box.

    Arrays are replaced by larger ones where they are too short.
    """
    s, n, cut = grid.owner[i], np.int64(0), grid.cutoff * grid.cutoff
    box, sides, reach, periodic = grid.boxes[s], grid.sides[s], grid.reach[s], grid.periodic[s]
    place, own, starts = grid.places[i], grid.slots[i], grid.starts
    of_x, of_y, of_z = grid.positions[0], grid.positions[1], grid.positions[2]
    for a in range(place[0] - reach[0], place[0] + reach[0] + 1):
        p = a // sides[0]
        for b in range(place[1] - reach[1], place[1] + reach[1] + 1):
            q = b // sides[1]
            row = grid.first[s] + ((a - p * sides[0]) * sides[1] + b - q * sides[1]) * sides[2]
            if (p and not periodic[0]) or (q and not periodic[1]):
                continue
            low, high = place[2] - reach[2], place[2] + reach[2]
            for r in range(low // sides[2], high // sides[2] + 1):
                if r and not periodic[2]:
                    continue
                begin = starts[row + max(low - r * sides[2], 0)]
                end = starts[row + min(high - r * sides[2], sides[2] - 1) + 1]
                if n + end - begin > len(hits):
                    room = 2 * (n + end - begin)
                    hits, squares, images = _longer(hits, room), _longer(squares, room), _longer(images, room)
                x = p * box[0, 0] + q * box[1, 0] + r * box[2, 0] - of_x[own]
                y = p * box[0, 1] + q * box[1, 1] + r * box[2, 1] - of_y[own]
                z = p * box[0, 2] + q * box[1, 2] + r * box[2, 2] - of_z[own]
                before, k = n, np.uint64(n)  # unsigned: no place is counted from the end
                for at in range(np.uint64(begin), np.uint64(end)):
                    u, v, w = of_x[at] + x, of_y[at] + y, of_z[at] + z
                    square = u * u + v * v + w * w
                    # written always, kept where it counts: a branch that cannot be foreseen takes longer
                    hits[k], squares[k] = at, square
                    k += np.uint64(1) if square < cut else np.uint64(0)
                n = np.int64(k)
                if p == q == r == 0:
                    n = _without(own, before, n, hits, squares)
                for m in range(before, n):
                    images[m, 0], images[m, 1], images[m, 2] = p, q, r
    for m in range(n):
        hits[m] = grid.atoms[hits[m]] << AHEAD | m
    return n, hits, squares, images


@njit(**FLAGS)
def _without(own, before, n, hits, squares):
    """Take an atom out of its own neighbours; how many are left."""
    kept = before
    for k in range(before, n):
        hits[kept], squares[kept] = hits[k], squares[k]
        kept += hits[k] != own
    return kept


@njit(**FLAGS)
def _longer(array, room):
    out = np.empty((room, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out


@njit(**FLAGS)
def _sort(numbers, n, out):
    """The first n, all different, in ascending order: few by how many are smaller than each, which takes no branches."""
    if n > FEW:
        out[:n] = numbers[:n]
        out[:n].sort()
        return
    for k in range(n):
        number, smaller = numbers[k], 0
        for m in range(n):
            smaller += numbers[m] < number
        out[smaller] = number
