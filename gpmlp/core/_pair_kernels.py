"""Compiled loops over pairs of atoms: their order, their vectors, sums to forces and virials.

Only neighbors.py imports this, when it has pairs: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FLAGS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(inline="always", **FLAGS)
def pair_vector(positions, cell, i, j, shift, out):
    """out = r_j + shift . cell - r_i; the one place where the order of these sums is laid down."""
    for x in range(3):
        shifted = shift[0] * cell[0, x] + shift[1] * cell[1, x] + shift[2] * cell[2, x]
        out[x] = (positions[j, x] + shifted) - positions[i, x]


@njit(**FLAGS)
def sort_pairs(pairs, shifts, n_atoms, first):
    """Pairs (i, j) and their shifts, from any order into that of i, j and shift: two stable passes, by j and then by i.

    Args:
        pairs: (pairs, 2), both directions of each; atoms counted from 0 to n_atoms, and from `first` in what is returned.

    Returns:
        i, j and shifts.
    """
    n = len(pairs)
    starts = np.zeros(n_atoms + 1, np.int64)
    for p in range(n):
        starts[pairs[p, 0] + 1] += 1
    starts = np.cumsum(starts)  # as often as an atom is i it is j
    order, at = np.empty(n, np.int64), starts.copy()
    for p in range(n):
        order[at[pairs[p, 1]]] = p
        at[pairs[p, 1]] += 1
    i, j, images = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((n, 3), np.int64)
    for p in order:
        k = starts[pairs[p, 0]]
        starts[pairs[p, 0]] += 1
        i[k], j[k] = pairs[p, 0] + first, pairs[p, 1] + first
        for x in range(3):
            images[k, x] = shifts[p, x]
    for k in range(1, n):  # an atom and several images i another, in small cells
        t = k
        while t and i[t] == i[t - 1] and j[t] == j[t - 1] and _before(images[t], images[t - 1]):
            for x in range(3):
                images[t, x], images[t - 1, x] = images[t - 1, x], images[t, x]
            t -= 1
    return i, j, images


@njit(**FLAGS)
def _before(a, b):
    for x in range(3):
        if a[x] != b[x]:
            return a[x] < b[x]
    return False


@njit(**FLAGS)
def shortest_vector(vectors):
    """Place and length of the shortest of these."""
    where, least = 0, np.inf
    for p in range(len(vectors)):
        square = vectors[p, 0] * vectors[p, 0] + vectors[p, 1] * vectors[p, 1] + vectors[p, 2] * vectors[p, 2]
        if square < least:
            where, least = p, square
    return where, np.sqrt(least)


@njit(**FLAGS)
def pair_vectors(positions, cells, owner, centers, neighbors, shifts, out):
    """out[pair] = r_j + shift . cell - r_i."""
    for p in range(len(centers)):
        pair_vector(positions, cells[owner[centers[p]]], centers[p], neighbors[p], shifts[p], out[p])


@njit(**FLAGS)
def pairs_within(first, last, positions, cells, owner, centers, neighbors, shifts, cutoff):
    """Of the pairs first to last, in their order, those closer than the cutoff.

    Returns:
        centres, neighbours, shifts and vectors of these, and the shortest distance of all, A.
    """
    room, n, closest = last - first, 0, np.inf
    i, j, images = np.empty(room, np.int64), np.empty(room, np.int64), np.empty((room, 3), np.int64)
    r = np.empty((room, 3), positions.dtype)
    pair_vectors(positions, cells, owner, centers[first:last], neighbors[first:last], shifts[first:last], r)
    for k in range(room):
        p = first + k
        square = r[k, 0] * r[k, 0] + r[k, 1] * r[k, 1] + r[k, 2] * r[k, 2]
        closest = min(closest, square)
        i[n], j[n] = centers[p], neighbors[p]
        for x in range(3):
            images[n, x], r[n, x] = shifts[p, x], r[k, x]
        n += square < cutoff * cutoff
    return i[:n], j[:n], images[:n], r[:n], np.sqrt(closest)


@njit(**FLAGS)
def add_pair_gradients(owner, centers, neighbors, vectors, gradients, forces, virials):
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
