"""Pair loops are the compiled passes over pairs of atoms: their vectors, the scatter to forces and virials.

Only neighbors.py imports this, when there is something to do: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from numba import njit

FLAGS = {"nogil": True, "cache": True, "error_model": "numpy"}


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
