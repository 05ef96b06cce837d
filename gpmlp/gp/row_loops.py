"""Row loops are the compiled pass from products of Jacobians with inducing vectors to rows of forces and stresses.

Only covariances.py imports this, when there is something to do: numba takes half a second to import. Machine code is cached on disk.
"""

from __future__ import annotations

from numba import njit

# a product and the sum it goes into may be rounded once: that is all that is left to the compiler
FLAGS = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(**FLAGS)
def scatter(products, first, bend, targets, out, start, end):
    """out[target] -= d/dr of f(s), f' J x, and of f'(s) x.t, f' J t + f'' (x.t) J x, for each three rows of each environment.

    Args:
        products: (environments, rows, columns) J x of M centres, then J t by direction and centre.
        first: (environments, M) f'; bend: (environments, R, M) f'' x.t.
        targets: (environments, slots) rows // 3 where forces go; those behind the end of `out` go nowhere.
        out: (atoms, 3, columns).
        start, end: of the centres whose columns are done here; others are left to other threads.
    """
    m, directions = first.shape[1], bend.shape[1]
    for e in range(len(products)):
        slope = first[e]
        for slot in range(targets.shape[1]):
            target = targets[e, slot]
            if target >= len(out):
                continue
            for x in range(3):
                row, to = products[e, 3 * slot + x], out[target, x]
                for k in range(start, end):
                    to[k] -= slope[k] * row[k]
                for d in range(directions):
                    at, turn = m * (d + 1), bend[e, d]
                    for k in range(start, end):
                        to[at + k] -= slope[k] * row[at + k] + turn[k] * row[k]


@njit(**FLAGS)
def collect(products, first, bend, owner, weight, out):
    """out[structure] += weight × the same derivatives, for the last rows of each environment: those of its virial.

    Args:
        owner: (environments,) structures; weight: (environments,).
        out: (structures, 6, columns).
    """
    m, directions = first.shape[1], bend.shape[1]
    for e in range(len(products)):
        slope, w = first[e], weight[e]
        for x in range(6):
            row, to = products[e, products.shape[1] - 6 + x], out[owner[e], x]
            for k in range(m):
                to[k] += w * (slope[k] * row[k])
            for d in range(directions):
                at, turn = m * (d + 1), bend[e, d]
                for k in range(m):
                    to[at + k] += w * (slope[k] * row[at + k] + turn[k] * row[k])
