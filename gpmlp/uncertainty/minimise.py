"""Minima of smooth functions of a few variables to all digits: L-BFGS-B, then Newton's method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NEWTON = 3  # steps, each of which doubles the digits: L-BFGS ends with half of them, and these by chance


def minimise(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    hessian: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    bounds: Sequence[tuple[float, float]] | None = None,
    **options: float,
) -> tuple[np.ndarray, float]:
    """Where it is least, and its value there.

    Args:
        objective: value and gradient; hessian: second derivatives.
        options: of scipy's L-BFGS-B.
    """
    from scipy.optimize import minimize

    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500} | options)
    x, value = found.x, float(found.fun)
    free = np.array([low < v < high for v, (low, high) in zip(x, bounds, strict=True)] if bounds else [True] * len(x))
    for _ in range(NEWTON):
        better = x.copy()
        step = np.linalg.pinv(hessian(x)[np.ix_(free, free)], hermitian=True) @ objective(x)[1][free]
        better[free] -= step
        lower = objective(better)[0]
        inside = bounds is None or all(low <= v <= high for v, (low, high) in zip(better, bounds, strict=True))
        if not inside or not lower <= value + 1e-12 * abs(value):
            break
        x, value = better, lower
    return x, value
