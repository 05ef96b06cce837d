"""The evidence (marginal likelihood) of noises and signal variances, from the whitened factors alone, and its maximum."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from gpmlp.gp.likelihood import Hyperparameters

EDGE = 1e-3  # of a logarithm: within it of a bound a parameter lies there
SETTLING_STEPS = 4  # of Newton's method from where L-BFGS-B ends
NEWTON_STEPS = 60  # each at least a factor of 1.6 in σ, far out, and quadratic near the root
RESTART_WIDTH = 2.5  # standard deviation of the logarithms of hyperparameters at restarts: a factor of twelve


@dataclass(frozen=True, eq=False)
class SufficientStatistics:
    """Sufficient statistics of one kind of observation with unit noise: G = AᵀA, h = Aᵀy, yy = yᵀy, n observations."""

    gram: Tensor
    projection: Tensor
    square: float
    count: int

    @staticmethod
    def from_factor(whitened: Tensor, count: int, columns: Tensor | None = None) -> SufficientStatistics:
        """From a whitened factor [A | y]; `columns` restricts the model to some of its columns."""
        a, y = whitened[:, :-1], whitened[:, -1]
        a = a if columns is None else a[:, columns]
        return SufficientStatistics(a.T @ a, a.T @ y, float(y @ y), count)


Statistics = dict[str, SufficientStatistics]  # by kind of observation
Objective = Callable[[np.ndarray], tuple[float, np.ndarray]]  # logarithms -> negative log posterior and its gradient
Progress = Callable[[int, float], None]  # evaluations so far, negative log posterior


@dataclass(frozen=True)
class AtBound:
    """A learned standard deviation at the 'lower' or 'upper' bound of its range: the noise of a kind, or number `index` of 'signal'."""

    name: str
    index: int
    side: str


@dataclass(frozen=True)
class EvidenceResult:
    """Where the optimisation ended: the negative log evidence, parameters at a bound, and how it got there."""

    negative_log_evidence: float
    at_bound: tuple[AtBound, ...]
    trace: tuple[tuple[int, float], ...]

    @property
    def evaluations(self) -> int:
        return len(self.trace)


def negative_log_evidence(
    statistics: Statistics, noise: dict[str, float], signal: Tensor, block_of_column: Tensor
) -> tuple[float, dict[str, float], Tensor]:
    """DTC: y ~ N(0, A D² Aᵀ + Σ) in the whitened basis, O(columns³) whatever the number of data.

    With S = I + Σ_k D G_k D / σ_k² and h = Σ_k D h_k / σ_k²:
    -2 log p = Σ_k [n_k log(2π σ_k²) + yy_k / σ_k²] + log det S - hᵀ S⁻¹ h   (Quiñonero-Candela, Rasmussen, JMLR 6, 1939, eq. 26).

    Returns:
        -log p, its derivatives with respect to log σ_k, and with respect to log δ of each block.
    """
    scale = signal[block_of_column]
    lower, right = _factorise(statistics, noise, scale)
    mean = torch.cholesky_solve(right[:, None], lower)[:, 0]
    # -2 log p = Σ_k [n_k log(2π σ_k²) + yy_k / σ_k²] + log det S - hᵀ S⁻¹ h
    total = _data_terms(statistics, noise) + float(2 * lower.diagonal().log().sum() - right @ mean)
    inverse = torch.cholesky_inverse(lower)
    # S⁻¹ (S - 1) = 1 - S⁻¹: its diagonal is the share of each column that the data determine, which their kinds have to share
    leverage = 1 - inverse.diagonal()
    determined = _by_kind(statistics, noise, inverse, scale, float(leverage.sum()))
    scaled_mean = scale * mean
    along, d_noise = torch.zeros_like(mean), {}
    for kind, s in statistics.items():
        tau = noise[kind] ** -2
        image = s.gram @ scaled_mean
        along.add_(image, alpha=tau)
        fit = s.square - 2 * float(s.projection @ scaled_mean) + float(scaled_mean @ image)
        # d/d log σ = -2 τ d/dτ, halved because total is -2 log p
        d_noise[kind] = -tau * fit - determined[kind] + s.count
    per_column = leverage - right * mean + scaled_mean * along
    d_signal = torch.zeros_like(signal).index_add(0, block_of_column, per_column)
    return 0.5 * total, d_noise, d_signal


def _by_kind(
    statistics: Statistics, noise: dict[str, float], inverse: Tensor, scale: Tensor, every: float
) -> dict[str, float]:
    """tr(S⁻¹ D G_k D) / σ_k², the number of parameters that each kind determines; `every` is their sum. Scales `inverse` in place."""
    most = max(statistics, key=lambda kind: statistics[kind].count)
    scaled = inverse.mul_(scale[:, None]).mul_(scale).flatten()
    others = {k: noise[k] ** -2 * float(scaled @ s.gram.flatten()) for k, s in statistics.items() if k != most}
    return others | {most: every - sum(others.values())}


def _factorise(statistics: Statistics, noise: dict[str, float], scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of S = I + Σ_k D G_k D / σ_k², and h = Σ_k D h_k / σ_k²; scale (columns,) is the diagonal of D."""
    system = torch.zeros(len(scale), len(scale), dtype=scale.dtype, device=scale.device)
    right = torch.zeros_like(scale)
    for kind, s in statistics.items():
        system.add_(s.gram, alpha=noise[kind] ** -2)
        right.add_(s.projection, alpha=noise[kind] ** -2)
    system.mul_(scale[:, None]).mul_(scale[None, :]).diagonal().add_(1)
    return _cholesky(system), right * scale


def _data_terms(statistics: Statistics, noise: dict[str, float]) -> float:
    """Σ_k [n_k log(2π σ_k²) + yy_k / σ_k²]."""
    total = 0.0
    for kind, s in statistics.items():
        tau = noise[kind] ** -2
        total += s.count * np.log(2 * np.pi / tau) + s.square * tau
    return total


def _cholesky(system: Tensor) -> Tensor:
    """Cholesky factor of S = I + Gram. In exact arithmetic S >= I; where its largest entries are so large (far from the optimum)
    that rounding makes it indefinite, the identity is enlarged to what rounding can resolve."""
    rounding = torch.finfo(system.dtype).eps * float(system.diagonal().max()) * len(system)
    for enlarged in (0.0, rounding, 30 * rounding, 1e3 * rounding):
        system.diagonal().add_(enlarged)
        lower, failed = torch.linalg.cholesky_ex(system)
        if not int(failed):
            return lower
    raise ArithmeticError(
        "the evidence could not be evaluated: the data rows hold numbers too large for double precision"
    )


def negative_log_posterior(
    statistics: Statistics, parameters: Hyperparameters, block_of_column: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """-log of evidence times priors at the present parameters, nats, and its slope along log σ_k and log δ of what is learned;
    that along what is given is zero."""
    noise = parameters.noise() | {"given": 1.0}
    signal = parameters.signal().to(block_of_column.device)
    return _with_priors(parameters, statistics, *negative_log_evidence(statistics, noise, signal, block_of_column))


def _with_priors(
    parameters: Hyperparameters, kinds: Container[str], value: float, d_noise: dict[str, float], d_signal: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Of a negative log evidence and its slopes along log σ_k and log δ, those of its product with the priors, by name."""
    slopes = {}
    for name in _learned(kinds, parameters):
        prior, d_prior = parameters.log_prior(name)
        value -= prior
        slope = d_signal.cpu() if name == "signal" else torch.tensor([d_noise[name]], dtype=torch.float64)
        slopes[name] = (slope - d_prior) * parameters.free(name)
    return value, slopes


def _learned(kinds: Container[str], parameters: Hyperparameters) -> list[str]:
    """What is learned of the kinds that there are data of, and 'signal'."""
    return [n for n in parameters.learned if n == "signal" or n in kinds]


@dataclass(frozen=True, eq=False)
class DenseData:
    """A few observations with their prior covariances in full.

    Attributes:
        covariances: (n, n) for each signal, with unit signal variance.
        values: (n,); rows: of each kind, which observations; scale: (n,) noise of each over that of its kind.
        fixed: (n,) variances of noises of their own, of those of no kind.
    """

    covariances: tuple[Tensor, ...]
    values: Tensor
    rows: dict[str, Tensor]
    scale: Tensor
    fixed: Tensor

    def negative_log_evidence(self, noise: dict[str, float], signal: Tensor) -> tuple[float, dict[str, float], Tensor]:
        """-log N(y; 0, C), C = Σ_b δ_b² K_b + diag(σ_k² s²), and its derivatives with respect to log σ_k and log δ_b:
        θ/2 tr[(C⁻¹ - ααᵀ) ∂C/∂θ] with α = C⁻¹ y (Rasmussen & Williams 2006, eqs. 5.8 and 5.9)."""
        variance = self.fixed.clone()
        for kind, rows in self.rows.items():
            variance[rows] = (noise[kind] * self.scale[rows]).square()
        system = torch.diag(variance)
        for k, delta in zip(self.covariances, signal.tolist(), strict=True):
            system.add_(k, alpha=delta**2)
        lower = _cholesky(system)
        alpha = torch.cholesky_solve(self.values[:, None], lower)[:, 0]
        value = 0.5 * float(self.values @ alpha) + float(lower.diagonal().log().sum())
        rest = torch.cholesky_inverse(lower).addr_(alpha, alpha, alpha=-1)
        d_signal = torch.stack([(rest * k).sum() for k in self.covariances]) * signal.square()
        along = rest.diagonal() * variance
        d_noise = {kind: float(along[rows].sum()) for kind, rows in self.rows.items()}
        return value + 0.5 * len(self.values) * np.log(2 * np.pi), d_noise, d_signal

    def maximise(self, parameters: Hyperparameters, max_evaluations: int = 40) -> EvidenceResult:
        """As `maximise_evidence`."""

        def evaluate() -> tuple[float, dict[str, Tensor]]:
            found = self.negative_log_evidence(parameters.noise(), parameters.signal())
            return _with_priors(parameters, self.rows, *found)

        return _maximise(evaluate, parameters, _learned(self.rows, parameters), max_evaluations)


def maximise_evidence(
    statistics: Statistics,
    parameters: Hyperparameters,
    block_of_column: Tensor,
    max_evaluations: int = 40,
    progress: Progress | None = None,
    settle: bool = False,
) -> EvidenceResult:
    """Maximise evidence times priors over log σ_k and log δ by L-BFGS-B inside the bounds of `parameters`, in place.

    Args:
        settle: whether to go on to where the gradient is zero to rounding, with p + 3 or so evaluations more for p parameters.
    """

    def evaluate() -> tuple[float, dict[str, Tensor]]:
        return negative_log_posterior(statistics, parameters, block_of_column)

    return _maximise(evaluate, parameters, _learned(statistics, parameters), max_evaluations, progress, settle)


def _maximise(
    evaluate: Callable[[], tuple[float, dict[str, Tensor]]],
    parameters: Hyperparameters,
    names: list[str],
    max_evaluations: int,
    progress: Progress | None = None,
    settle: bool = False,
) -> EvidenceResult:
    """`maximise_evidence` of what `evaluate` gives at the present parameters: a negative log density and its slopes by name."""
    sizes = [parameters.log_std(n).numel() for n in names]
    bounds = [pair for n in names for pair in zip(*(side.tolist() for side in parameters.bounds(n)), strict=True)]
    start = np.concatenate([parameters.log_std(n).detach().cpu().numpy() for n in names])
    trace: list[tuple[int, float]] = []

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        _assign(parameters, names, sizes, x)
        value, slopes = evaluate()
        trace.append((len(trace) + 1, value))
        if progress:
            progress(*trace[-1])
        return value, np.concatenate([slopes[name].numpy() for name in names])

    result = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxfun": max_evaluations, "ftol": 1e-8}
    )
    x, value = result.x, float(result.fun)
    if settle:
        learned = np.concatenate([parameters.free(n).cpu().numpy() for n in names])
        x, value = _settled(objective, x, value, np.array(bounds), learned)
    _assign(parameters, names, sizes, x)
    return EvidenceResult(value, at_bound(parameters), tuple(trace))


def _settled(
    objective: Objective, x: np.ndarray, value: float, bounds: np.ndarray, learned: np.ndarray
) -> tuple[np.ndarray, float]:
    """Where the gradient vanishes next to an optimum, and the value there: Newton steps of what is learned and not at a bound.

    From values alone an optimum is known to the square root of their rounding, and a fit would depend on the last digits of its
    sums a million times more than it must.
    """
    free = np.flatnonzero(learned & (x > bounds[:, 0] + EDGE) & (x < bounds[:, 1] - EDGE))
    if not len(free):
        return x, value
    gradient = objective(x)[1][free]
    steps = EDGE * np.eye(len(x))
    curvature = np.stack([(objective(x + steps[i])[1][free] - gradient) / EDGE for i in free])
    curvature = (curvature + curvature.T) / 2
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return x, value
    best = (x, value)
    for _ in range(SETTLING_STEPS):
        step = np.zeros_like(x)
        step[free] = -np.linalg.solve(curvature, gradient)
        x = (x + step).clip(*bounds.T)
        value, new = objective(x)
        if value > best[1] + 1e-9 * abs(best[1]) or np.abs(new[free]).max() >= np.abs(gradient).max():
            break
        best, gradient = (x, float(value)), new[free]
    return best


def restart_optimisation(
    statistics: Statistics, parameters: Hyperparameters, block_of_column: Tensor, restarts: int, seed: int
) -> None:
    """Set the parameters to the best optimum of those found from where they are and from `restarts` places drawn around it.

    Places are normal in the logarithms, within the bounds: noise can be mistaken for signal and the other way round, and each may be
    an optimum (Rasmussen & Williams 2006, section 5.4.1). For a few columns: each optimisation takes some twenty evaluations.
    """
    names = _learned(statistics, parameters)
    first = {n: parameters.log_std(n).detach().clone() for n in names}
    generator = torch.Generator().manual_seed(seed)
    best, optimum = np.inf, first
    for attempt in range(restarts + 1):
        for name in names:
            step = torch.randn(len(first[name]), generator=generator, dtype=torch.float64) if attempt else 0.0
            parameters.set(name, first[name] + RESTART_WIDTH * step)
        result = maximise_evidence(statistics, parameters, block_of_column)
        if result.negative_log_evidence < best - 1e-3:  # of equals the first, so that no rounding decides
            best, optimum = result.negative_log_evidence, {n: parameters.log_std(n).detach().clone() for n in names}
    for name, value in optimum.items():
        parameters.set(name, value)


def iterate_fixed_point(
    statistics: Statistics,
    parameters: Hyperparameters,
    block_of_column: Tensor,
    max_iterations: int = 10,
    tolerance: float = 0.02,
    n_probes: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvidenceResult:
    """MacKay's fixed point of the evidence, in place: one Cholesky factorisation per iteration, for many columns.

    With γ_k = tr(S⁻¹ D G_k D)/σ_k² the number of parameters that observations of kind k determine, and flat priors,
    σ_k² <- |y_k - A_k w|² / (n_k - γ_k) and δ² <- δ² |β|² / γ over the columns of a block (Neural Computation 4, 415 (1992),
    eqs. 4.7 to 4.9); with priors, to where evidence times priors has no slope. Traces are Hutchinson estimates with the same seeded
    probes throughout; they only steer, and at convergence their relative error is about sqrt(2 / (n_probes columns)).
    """
    size, device = len(block_of_column), block_of_column.device
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randint(0, 2, (size, n_probes), generator=generator).to(device=device, dtype=torch.float64) * 2 - 1
    trace: list[tuple[int, float]] = []
    for iteration in range(1, max_iterations + 1):
        scale = parameters.signal().to(device)[block_of_column]
        noise = parameters.noise() | {"given": 1.0}
        lower, right = _factorise(statistics, noise, scale)
        mean = torch.cholesky_solve(right[:, None], lower)[:, 0]
        constant, log_det = _data_terms(statistics, noise), 2 * lower.diagonal().log().sum()
        prior = sum(parameters.log_prior(n)[0] for n in _learned(statistics, parameters))
        trace.append((iteration, 0.5 * float(constant + log_det - right @ mean) - prior))
        images = {
            kind: noise[kind] ** -2 * scale[:, None] * (s.gram @ (scale[:, None] * probes))
            for kind, s in statistics.items()
        }
        determined = {kind: probes * torch.cholesky_solve(image, lower) for kind, image in images.items()}
        change = _fixed_point_step(statistics, parameters, block_of_column, noise, scale * mean, mean, determined)
        if progress:
            progress(*trace[-1])
        if change < tolerance:
            break
    return EvidenceResult(trace[-1][1], at_bound(parameters), tuple(trace))


def _fixed_point_step(
    statistics: Statistics,
    parameters: Hyperparameters,
    block_of_column: Tensor,
    noise: dict[str, float],
    weights: Tensor,
    mean: Tensor,
    determined: dict[str, Tensor],
) -> float:
    """Set new noises and signals; return the largest change of a logarithm."""
    changes = [0.0]
    for kind in _learned(statistics, parameters)[:-1]:
        s = statistics[kind]
        fit = s.square - 2 * float(s.projection @ weights) + float(weights @ (s.gram @ weights))
        gamma = float(determined[kind].mean(1).sum())
        left = max(s.count - gamma, 0.02 * s.count)
        changes.append(move(parameters, kind, torch.tensor([left]), torch.tensor([fit])))
    per_column = torch.zeros_like(mean)
    for d in determined.values():
        per_column += d.mean(1)
    zeros = torch.zeros(len(parameters.signal()), dtype=mean.dtype, device=mean.device)
    determined_by_block = zeros.index_add(0, block_of_column, per_column).clamp_min(1e-3)
    power = zeros.index_add(0, block_of_column, mean.square()) * parameters.signal().to(mean.device).square()
    changes.append(move(parameters, "signal", determined_by_block.cpu(), power.cpu()))
    return max(changes)


def move(parameters: Hyperparameters, name: str, count: Tensor, power: Tensor) -> float:
    """Set log σ of a kind, or of 'signal', to where count log σ + power / (2 σ²) less the log of its prior has no slope; its change."""
    old = parameters.log_std(name).detach().clone()
    target = _stationary(count, power, *parameters.prior(name))
    parameters.set(name, old + (target - old).clamp(-1.5, 1.5))  # no step by more than a factor of 4.5
    return float((parameters.log_std(name).detach() - old).abs().max())


def _stationary(count: Tensor, power: Tensor, middle: Tensor, width: Tensor) -> Tensor:
    """x = log σ at which count log σ + power / (2 σ²) - log N(x; middle, width²) has no slope.

    The slope rises with x and is concave, so Newton's method climbs to the root from any place left of it, and both the root without
    a prior and the middle of the prior are on the two sides of it.
    """
    count, power = count.double(), power.double().clamp_min(1e-300)
    x = torch.minimum(0.5 * (power / count).log(), middle)
    for _ in range(NEWTON_STEPS):
        slope = count - power * torch.exp(-2 * x) + (x - middle) / width**2
        x = x - slope / (2 * power * torch.exp(-2 * x) + width**-2)
    return x


def at_bound(parameters: Hyperparameters) -> tuple[AtBound, ...]:
    """The learned parameters that lie at a bound."""
    out = []
    for name in parameters.learned:
        values, free = parameters.log_std(name).detach(), parameters.free(name)
        for side, bound in zip(("lower", "upper"), parameters.bounds(name), strict=True):
            there = ((values - bound).abs() < EDGE).logical_and(free)
            out += [AtBound(name, i, side) for i in there.nonzero()[:, 0].tolist()]
    return tuple(out)


def _assign(parameters: Hyperparameters, names: list[str], sizes: list[int], x: np.ndarray) -> None:
    start = 0
    for name, size in zip(names, sizes, strict=True):
        parameters.set(name, torch.from_numpy(x[start : start + size]))
        start += size
