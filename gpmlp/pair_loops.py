"""Pair loops are the compiled passes over pairs of atoms: the search for them in cells, their vectors, the scatter to forces and virials.

Only neighbors.py imports this, when there is something to do: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

FLAGS = {"nogil": True, "cache": True, "error_model": "numpy"}


class Grid(NamedTuple):
    """Atoms of several structures sorted into bins, each no narrower than the cutoff where the structure has room for that.

    Attributes:
        boxes: (structures, 3, 3) lattice vectors in rows, those of axes that are not periodic made up; periodic: (structures, 3).
        owner: (atoms,) structure of each atom.
        wrapped: (atoms, 3) positions within the box, A, and again as `sorted` by bin; turns: (atoms, 3) lattice vectors taken off for that.
        bins, reach: (structures, 3) number of bins along each axis, and how many bins further a neighbour may be.
        home: (atoms, 3) bin of each atom.
        starts: (all bins + 1,) where each begins in `order`, those of a structure from first[structure] on.
        order: (atoms,) atoms sorted by bin.
    """

    boxes: np.ndarray
    periodic: np.ndarray
    owner: np.ndarray
    wrapped: np.ndarray
    sorted: np.ndarray
    turns: np.ndarray
    bins: np.ndarray
    reach: np.ndarray
    home: np.ndarray
    first: np.ndarray
    starts: np.ndarray
    order: np.ndarray


@njit(**FLAGS)
def grid(positions, boxes, inverses, periodic, owner, offsets, cutoff):
    """Sort the atoms; structure s has the atoms offsets[s] to offsets[s + 1]."""
    n_atoms, n = len(positions), len(boxes)
    wrapped, turns = np.empty((n_atoms, 3)), np.zeros((n_atoms, 3), np.int64)
    bins, reach, home = np.ones((n, 3), np.int64), np.zeros((n, 3), np.int64), np.zeros((n_atoms, 3), np.int64)
    first = np.zeros(n + 1, np.int64)
    for s in range(n):
        lo, hi = offsets[s], offsets[s + 1]
        for i in range(lo, hi):
            for k in range(3):
                part = 0.0
                for x in range(3):
                    part += positions[i, x] * inverses[s, x, k]
                whole = np.floor(part) if periodic[s, k] else 0.0
                wrapped[i, k], turns[i, k] = part - whole, np.int64(whole)
        _divide(wrapped[lo:hi], inverses[s], periodic[s], cutoff, bins[s], reach[s], home[lo:hi])
        first[s + 1] = first[s] + bins[s, 0] * bins[s, 1] * bins[s, 2]
        for i in range(lo, hi):
            f, g, h = wrapped[i]
            for x in range(3):
                wrapped[i, x] = f * boxes[s, 0, x] + g * boxes[s, 1, x] + h * boxes[s, 2, x]
    starts, order, place = np.zeros(first[n] + 1, np.int64), np.empty(n_atoms, np.int64), np.empty(n_atoms, np.int64)
    for i in range(n_atoms):
        s, b = owner[i], home[i]
        place[i] = first[s] + (b[0] * bins[s, 1] + b[1]) * bins[s, 2] + b[2]
        starts[place[i] + 1] += 1
    for k in range(first[n]):
        starts[k + 1] += starts[k]
    filled = starts[:-1].copy()
    for i in range(n_atoms):
        order[filled[place[i]]] = i
        filled[place[i]] += 1
    return Grid(boxes, periodic, owner, wrapped, wrapped[order], turns, bins, reach, home, first, starts, order)


@njit(**FLAGS)
def _divide(fractions, inverse, periodic, cutoff, bins, reach, home):
    """Choose the bins of a structure from the fractional coordinates of its atoms, and say in which each atom is."""
    n_atoms = len(fractions)
    low, length = np.zeros(3), np.ones(3)
    for k in range(3):
        height = 1 / np.sqrt(inverse[0, k] ** 2 + inverse[1, k] ** 2 + inverse[2, k] ** 2)
        if not periodic[k] and n_atoms:
            low[k] = fractions[:, k].min()
            length[k] = max(fractions[:, k].max() - low[k], 1e-6 / height)
        bins[k] = max(1, np.int64(min(length[k] * height / cutoff, 1e6)))
        reach[k] = 0
        length[k] *= height
        low[k] *= height
    while bins[0] * bins[1] * bins[2] > max(n_atoms, 1):  # no more bins than atoms, however far these are spread
        widest = np.argmax(bins)
        bins[widest] = (bins[widest] + 1) // 2
    for k in range(3):
        reach[k] = np.int64(np.ceil(cutoff * bins[k] / length[k]))
        if not periodic[k]:
            reach[k] = min(reach[k], bins[k] - 1)
        height = 1 / np.sqrt(inverse[0, k] ** 2 + inverse[1, k] ** 2 + inverse[2, k] ** 2)
        for i in range(n_atoms):
            home[i, k] = min(bins[k] - 1, max(0, np.int64((fractions[i, k] * height - low[k]) / length[k] * bins[k])))


@njit(**FLAGS)
def search(lo, hi, grid, cutoff, counts):
    """Neighbours of atoms lo to hi; how many each has is written to `counts`.

    Returns:
        neighbours and lattice shifts; the square of the shortest distance, and the two atoms.
    """
    square, nearest, one, other, at = cutoff * cutoff, np.inf, -1, -1, 0
    neighbors, shifts = np.empty(64 * (hi - lo) + 64, np.int64), np.empty((64 * (hi - lo) + 64, 3), np.int64)
    for i in range(lo, hi):
        s, begin = grid.owner[i], at
        n, reach, box = grid.bins[s], grid.reach[s], grid.boxes[s]
        x, y, z = grid.wrapped[i]
        for a in range(grid.home[i, 0] - reach[0], grid.home[i, 0] + reach[0] + 1):
            ia = a // n[0]
            for b in range(grid.home[i, 1] - reach[1], grid.home[i, 1] + reach[1] + 1):
                ib = b // n[1]
                for c in range(grid.home[i, 2] - reach[2], grid.home[i, 2] + reach[2] + 1):
                    ic = c // n[2]
                    outside = ia and not grid.periodic[s, 0] or ib and not grid.periodic[s, 1]
                    if outside or ic and not grid.periodic[s, 2]:
                        continue
                    u = ia * box[0, 0] + ib * box[1, 0] + ic * box[2, 0] - x
                    v = ia * box[0, 1] + ib * box[1, 1] + ic * box[2, 1] - y
                    w = ia * box[0, 2] + ib * box[1, 2] + ic * box[2, 2] - z
                    place = grid.first[s] + ((a - ia * n[0]) * n[1] + b - ib * n[1]) * n[2] + c - ic * n[2]
                    while at + grid.starts[place + 1] - grid.starts[place] > len(neighbors):
                        neighbors = np.concatenate((neighbors, np.empty_like(neighbors)))
                        shifts = np.concatenate((shifts, np.empty_like(shifts)))
                    for k in range(grid.starts[place], grid.starts[place + 1]):
                        p, q, r = grid.sorted[k, 0] + u, grid.sorted[k, 1] + v, grid.sorted[k, 2] + w
                        d = p * p + q * q + r * r
                        if d >= square:
                            continue
                        j = grid.order[k]
                        if i == j and ia == 0 and ib == 0 and ic == 0:
                            continue
                        neighbors[at] = j
                        shifts[at, 0] = ia - grid.turns[j, 0] + grid.turns[i, 0]
                        shifts[at, 1] = ib - grid.turns[j, 1] + grid.turns[i, 1]
                        shifts[at, 2] = ic - grid.turns[j, 2] + grid.turns[i, 2]
                        at += 1
                        if d < nearest:
                            nearest, one, other = d, i, j
        counts[i] = at - begin
    return neighbors[:at], shifts[:at], (nearest, one, other)


@njit(**FLAGS)
def vectors(positions, cells, owner, centers, neighbors, shifts, out):
    """out[pair] = r_j + shift . cell - r_i."""
    for p in range(len(centers)):
        i, j = centers[p], neighbors[p]
        cell, a, b, c = cells[owner[i]], shifts[p, 0], shifts[p, 1], shifts[p, 2]
        for x in range(3):
            shift = a * cell[0, x] + b * cell[1, x] + c * cell[2, x]
            out[p, x] = (positions[j, x] + shift) - positions[i, x]


@njit(**FLAGS)
def collect(owner, centers, neighbors, vectors, gradients, forces, virials):
    """F_i = Σ_j (g_ij - g_ji) added to `forces` and Σ r_ij (x) g_ij to `virials`, in the order of pairs."""
    for p in range(len(centers)):
        i, j = centers[p], neighbors[p]
        virial = virials[owner[i]]
        for x in range(3):
            g = gradients[p, x]
            forces[i, x] += g
            forces[j, x] -= g
            for y in range(3):
                virial[y, x] += vectors[p, y] * g
