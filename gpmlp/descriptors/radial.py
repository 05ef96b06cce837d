"""Weights of neighbours by distance, and radial integrals of a Gaussian density on an orthonormal basis, tabulated as splines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.interpolate import make_interp_spline
from scipy.linalg import sqrtm
from scipy.special import factorial, gamma, ive
from torch import Tensor

from gpmlp.core import errors

BASES = ("optimal", "gto")
_DEGREE = 5
CUTOFF_FUNCTIONS = ("smoothstep", "poly", "none")


@dataclass(frozen=True)
class NeighborWeights:
    """w(r) = f_c(r) / (1 + (r / scale)^exponent).

    f_c is 'smoothstep', 1 - 10 x^3 + 15 x^4 - 6 x^5 with x = (r - cutoff + width) / width clamped to [0, 1] (C2); or
    'poly', ((1 - x)^2 (1 + 2 x))^cutoff_exponent with x = r / cutoff (dscribe's `poly` weighting; C2 for exponents of 2 or more);
    or 'none', a step, not smooth: only for comparison with dscribe.
    The radial scaling is that of Willatt, Musil, Ceriotti, PCCP 20, 29661 (2018), eq. 20; exponent 0 switches it off.
    """

    cutoff: float
    function: str = "smoothstep"
    width: float = 1.0
    cutoff_exponent: float = 2.0
    scale: float = 2.0
    exponent: float = 0.0

    def __post_init__(self) -> None:
        errors.check_choice("cutoff_function", self.function, CUTOFF_FUNCTIONS)
        errors.check_positive("cutoff", self.cutoff)
        errors.check_positive("cutoff_width", self.width)
        errors.check_positive("radial_scaling.scale", self.scale)

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return w(r) and dw/dr."""
        cut, d_cut = self._cutoff(r)
        if self.exponent == 0:
            return cut, d_cut
        power = (r / self.scale) ** self.exponent
        scaling = 1 / (1 + power)
        # d/dr 1/(1+u) = -u'/(1+u)^2 with u' = m u / r
        d_scaling = -self.exponent * power / r.clamp_min(1e-12) * scaling**2
        return cut * scaling, d_cut * scaling + cut * d_scaling

    def _cutoff(self, r: Tensor) -> tuple[Tensor, Tensor]:
        if self.function == "none":
            inside = (r < self.cutoff).to(r.dtype)
            return inside, torch.zeros_like(r)
        if self.function == "poly":
            x = (r / self.cutoff).clamp(0, 1)
            base = (1 - x) ** 2 * (1 + 2 * x)
            m = self.cutoff_exponent
            return base**m, m * base ** (m - 1) * (-6 * x * (1 - x)) / self.cutoff
        x = ((r - self.cutoff + self.width) / self.width).clamp(0, 1)
        return 1 - x**3 * (10 - 15 * x + 6 * x**2), -30 * x**2 * (1 - x) ** 2 / self.width


@dataclass(frozen=True)
class RadialIntegrals:
    """I_nl(r), the projection of exp(-|x - r|^2 / (2 sigma^2)) on radial function n and harmonic l, as quintic splines.

    Attributes:
        coefficients: (intervals, degree + 1, n_max * (l_max + 1)), highest power first, in the local coordinate (r - r_k) / step.
        step: A, length of an interval.
    """

    coefficients: Tensor
    step: float
    n_max: int
    l_max: int

    def __call__(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Return I_nl(r) and dI_nl/dr, each (pairs, n_max, l_max + 1)."""
        value, slope = evaluate_splines(self.coefficients.to(device=r.device, dtype=r.dtype), r / self.step)
        shape = (-1, self.n_max, self.l_max + 1)
        return value.reshape(shape), (slope / self.step).reshape(shape)


def evaluate_splines(table: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """Piecewise polynomials (..., functions) and their slopes by Horner's rule for both together.

    Args:
        table: (intervals, degree + 1, functions) coefficients, highest power first.
        scaled: (...,) distances in units of an interval.
    """
    interval = scaled.detach().floor().long().clamp(0, len(table) - 1)
    t = (scaled - interval)[..., None]
    value = table[interval, 0]
    slope = torch.zeros_like(value)
    for k in range(1, table.shape[1]):
        slope = torch.addcmul(value, slope, t)
        value = torch.addcmul(table[interval, k], value, t)
    return value, slope


def gto_integrals(n_max: int, l_max: int, sigma: float, cutoff: float) -> RadialIntegrals:
    """Gaussian-type orbitals r^l exp(-alpha_nl r^2), Loewdin-orthonormalised; dscribe's definition (CPC 247, 106949 (2020)).

    alpha_nl makes the n-th orbital fall to 1e-3 at the n-th of n_max equidistant radii between 1 A and the cutoff.
    """
    if cutoff <= 1:
        raise errors.UserError(f"The gto basis needs a cutoff above 1 A; got {cutoff}.")
    radii, a = np.linspace(1.0, cutoff, n_max), 1 / (2 * sigma**2)

    def integrals(r: np.ndarray) -> np.ndarray:
        out = np.empty((len(r), n_max, l_max + 1))
        for l in range(l_max + 1):
            alpha = -np.log(1e-3 / radii**l) / radii**2
            total = alpha[:, None] + alpha[None, :]
            overlap = 0.5 * gamma(l + 1.5) * total ** (-l - 1.5)
            beta = np.real(sqrtm(np.linalg.inv(overlap)))
            # ∫ x^l Y_lm exp(-alpha x²) exp(-a |x - r|²) d³x = (pi/(alpha+a))^(3/2) (a/(alpha+a))^l exp(-alpha a/(alpha+a) r²) r^l Y_lm(r)
            s = alpha + a
            raw = (np.pi / s) ** 1.5 * (a / s) ** l * np.exp(-(alpha * a / s) * r[:, None] ** 2) * r[:, None] ** l
            out[:, :, l] = raw @ beta.T
        return out

    return _spline(integrals, n_max, l_max, sigma, cutoff)


def optimal_integrals(
    n_max: int, l_max: int, sigma: float, cutoff: float, shortest: float, importance: Callable[[np.ndarray], np.ndarray]
) -> RadialIntegrals:
    """The n_max radial functions that keep most of the density overlap: principal components over neighbour distances.

    The complete-basis sum  C_l(r, r') = sum_n I_nl(r) I_nl(r') = 4 pi (pi sigma^2)^(3/2) exp(-(r^2+r'^2)/(4 sigma^2)) i_l(r r'/(2 sigma^2))
    is diagonalised under the measure importance(r) dr on [shortest, cutoff]; its leading eigenfunctions, extended by Nystroem, are
    orthogonal and ordered by how much they matter. Cf. Goscinski et al., J. Chem. Phys. 155, 104106 (2021).
    """
    nodes, weights = np.polynomial.legendre.leggauss(max(120, int(8 * cutoff / sigma)))
    nodes = shortest + (cutoff - shortest) * (nodes + 1) / 2
    root = np.sqrt(weights * (cutoff - shortest) / 2 * importance(nodes))

    def integrals(r: np.ndarray) -> np.ndarray:
        out = np.zeros((len(r), n_max, l_max + 1))
        for l in range(l_max + 1):
            matrix = root[:, None] * _overlap(nodes, nodes, l, sigma) * root[None, :]
            values, vectors = np.linalg.eigh(matrix)
            values, vectors = values[::-1][:n_max], vectors[:, ::-1][:, :n_max]
            used = values > 1e-11 * values[0]  # what rounding leaves of smaller ones is noise
            vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
            extended = _overlap(r, nodes, l, sigma) @ (root[:, None] * vectors)
            out[:, : used.sum(), l] = extended[:, used] / np.sqrt(values[used])
        return out

    return _spline(integrals, n_max, l_max, sigma, cutoff)


def _overlap(r: np.ndarray, s: np.ndarray, l: int, sigma: float) -> np.ndarray:
    """The l-th component of the overlap of two unnormalised Gaussians at distances r and s from the centre."""
    x = r[:, None] * s[None, :] / (2 * sigma**2)
    safe = np.where(x > 0, x, 1.0)
    scaled_bessel = np.where(x > 0, np.sqrt(np.pi / (2 * safe)) * ive(l + 0.5, safe), float(l == 0))
    gaussian = np.exp(-((r[:, None] - s[None, :]) ** 2) / (4 * sigma**2))
    return 4 * np.pi * (np.pi * sigma**2) ** 1.5 * gaussian * scaled_bessel


def _spline(
    integrals: Callable[[np.ndarray], np.ndarray], n_max: int, l_max: int, sigma: float, cutoff: float
) -> RadialIntegrals:
    """Tabulate on a grid so fine that quintic interpolation is exact to about 1e-10 of the largest integral."""
    n = int(np.ceil(cutoff / min(0.02, sigma / 20))) + 1
    r = np.linspace(0, cutoff, n)
    values = integrals(r).reshape(n, -1)
    spline = make_interp_spline(r, values, k=_DEGREE)
    step = cutoff / (n - 1)
    # Taylor coefficients at the left end of every interval, in powers of (r - r_k) / step
    powers = [spline(r[:-1], nu=k) * step**k / factorial(k) for k in range(_DEGREE, -1, -1)]
    coefficients = np.stack(powers, axis=1)
    return RadialIntegrals(torch.from_numpy(coefficients), step, n_max, l_max)


@lru_cache(maxsize=32)
def tabulate_integrals(
    basis: str, n_max: int, l_max: int, sigma: float, cutoff: float, shortest: float, weights: Callable[[Tensor], tuple]
) -> RadialIntegrals:
    """Return the table of the named basis; equal arguments share one table."""
    errors.check_choice("radial basis", basis, BASES)
    if basis == "gto":
        return gto_integrals(n_max, l_max, sigma, cutoff)

    def importance(r: np.ndarray) -> np.ndarray:
        return weights(torch.from_numpy(r))[0].numpy() ** 2 * r

    return optimal_integrals(n_max, l_max, sigma, cutoff, shortest, importance)
