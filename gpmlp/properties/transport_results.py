"""Diffusion, viscosity and activation energies from the segments of replicas, with what is statistical and what is of the model apart.

Each segment gives each copy a slope of a mean-square displacement over the second part of its lags. The mean over segments and replicas is
a member's value; its error follows from the scatter of segments within members, all members of a temperature together; the scatter of
members beyond that is the model's part (statistics.random_effects).

| on paper | here |
|---|---|
| D_L = D_∞ − ξ kT/(6π η L), ξ = 2.837297: Yeh, Hummer, J. Phys. Chem. B 108, 15873 (2004), eq. 12 | `add_image_correction` |
| ln D = ln D₀ − E_a/kT, by weighted least squares for each member | `Arrhenius` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpmlp.core.errors import UserError, check_positive, chemical_symbol
from gpmlp.core.units import BOLTZMANN, GPA
from gpmlp.properties.dynamics import Replicas
from gpmlp.properties.statistics import FREEDOM, RandomEffects, random_effects
from gpmlp.properties.values import PropertyCurve, PropertyValue
from gpmlp.uncertainty.timeseries import correlation_time

FIRST = 0.25  # share of the lags that is left out: ballistic motion and cages
MPA_S = 1e-3 / GPA  # 1 eV fs/A^3 in mPa s
PER_PS = 1e3  # A^2/fs in A^2/ps
IMAGES = 2.837297  # of a cubic lattice
ROUGHEST = 0.35  # relative error of a member's D up to which its logarithm is taken
UNCORRECTED = "of D in the periodic cell, without correction for its images"
DISAGREE = 3.0  # standard errors
GROWN = (
    1.5  # times a mean-square displacement grows over the late lags where atoms diffuse; 4 without cages, 1 in a solid
)
REACH_90 = 1.645  # standard deviations
CUBIC = 1.1  # largest ratio of heights of a cell that is taken for a cube


@dataclass(frozen=True, eq=False)
class MemberAverages:
    """A quantity of each member at each temperature.

    Attributes:
        values, errors: (members, temperatures), NaN for members that failed.
        correlation: of successive segments, >= 1, by temperature; freedom: degrees of freedom of the errors, by temperature.
    """

    values: np.ndarray
    errors: np.ndarray
    correlation: np.ndarray
    freedom: np.ndarray

    def effects(self, k: int) -> RandomEffects:
        """Of the k-th temperature."""
        return random_effects(
            self.values[1:, k], self.errors[1:, k], self.values[0, k], self.errors[0, k], self.freedom[k]
        )


def average_members(segments: np.ndarray, replicas: int) -> MemberAverages:
    """Means over segments and replicas, with errors from the scatter within members.

    Args:
        segments: (segments, members, copies) of the quantity, copies of one temperature next to each other.
    """
    n, members, copies = segments.shape
    by_temperature = segments.reshape(n, members, copies // replicas, replicas)
    values = by_temperature.mean((0, 3))
    errors, correlation, freedom = np.full_like(values, np.nan), np.ones(values.shape[1]), np.zeros(values.shape[1])
    for k in range(values.shape[1]):
        there = np.isfinite(values[:, k])
        rest = by_temperature[:, there, k] - values[there, k][:, None]
        count = there.sum() * (n * replicas - 1)
        if not count:
            continue
        if n > 3:
            trajectories = rest.reshape(n, -1).T
            correlation[k] = max(1.0, correlation_time([t[:, None] for t in trajectories], int(there.sum()))[0])
        variance = (rest**2).sum() / count
        freedom[k] = count / correlation[k]
        errors[there, k] = math.sqrt(variance * correlation[k] / (n * replicas))
    return MemberAverages(values, errors, correlation, freedom)


@dataclass(frozen=True, eq=False)
class Arrhenius:
    """ln D = ln D₀ − E_a/kT of each member.

    Attributes:
        symbol: of the species. temperatures_K: to which it was fitted.
        middle: 1/kT at which `logarithms` are, 1/eV; energies: (members,) E_a, eV; logarithms: (members,) ln(D ps/A²).
        errors: (2,) standard errors of both, independent of each other; freedom: degrees of freedom of these, the fewest of a temperature.
        misfit: of the line, in standard errors (NaN of two temperatures).
    """

    symbol: str
    temperatures_K: tuple[float, ...]
    middle: float
    energies: np.ndarray
    logarithms: np.ndarray
    errors: np.ndarray
    freedom: float
    misfit: float

    @staticmethod
    def from_members(symbol: str, temperatures_K: Sequence[float], averages: MemberAverages) -> Arrhenius | None:
        """Fit ln D = ln D₀ − E_a/kT; None where some D is not known well enough to take its logarithm."""
        typical = np.nanmean(averages.values, axis=0)
        error = np.nanmean(averages.errors, axis=0) / typical
        if not ((error > 0) & (error < ROUGHEST)).all():
            return None
        x, weights = 1 / (BOLTZMANN * np.array(temperatures_K)), 1 / error**2
        weights /= weights.sum()
        middle = float(weights @ x)
        values = np.where(averages.values > 0, averages.values, np.nan) * PER_PS
        logarithms = np.log(values) + 0.5 * error**2  # ⟨ln(D + e)⟩ = ln D − e²/2D²
        at_middle = logarithms @ weights
        moment = weights @ (x - middle) ** 2
        energies = -(logarithms @ (weights * (x - middle))) / moment
        rest = logarithms - at_middle[:, None] + energies[:, None] * (x - middle)
        total = (1 / error**2).sum()
        errors = np.array([1 / math.sqrt(total * moment), 1 / math.sqrt(total)])
        common = np.nanmean(rest, axis=0) / (error / math.sqrt(max(1, np.isfinite(energies).sum())))
        misfit = math.sqrt((common**2).sum() / (len(x) - 2)) if len(x) > 2 else math.nan
        return Arrhenius(
            symbol, tuple(temperatures_K), middle, energies, at_middle, errors, float(averages.freedom.min()), misfit
        )

    def activation_energy(self) -> PropertyValue:
        """E_a, eV."""
        noise = np.full(len(self.energies), self.errors[0])
        effects = random_effects(self.energies[1:], noise[1:], self.energies[0], noise[0], self.freedom)
        kelvins = f"{min(self.temperatures_K):g} and {max(self.temperatures_K):g} K"
        about = f"slope of ln D of {self.symbol} against -1/kT between {kelvins}, at constant volume, {UNCORRECTED}"
        return effects.as_value(f"activation_energy_{self.symbol}", "eV", about=about)

    def prefactor(self) -> PropertyValue:
        """D₀, A²/ps."""
        return self._exponential(
            0.0,
            f"diffusion_prefactor_{self.symbol}",
            f"D at infinite temperature, of the Arrhenius line, {UNCORRECTED}",
        )

    def diffusion_at(self, temperature_K: float) -> PropertyValue:
        """D at another temperature on the line, A²/ps: between those of the runs, or beyond, with an interval that grows."""
        check_positive("temperature_K", temperature_K)
        name = f"diffusion_coefficient_{self.symbol}_{temperature_K:g}K"
        return self._exponential(
            1 / (BOLTZMANN * temperature_K),
            name,
            f"of the Arrhenius line, not of a run at this temperature, {UNCORRECTED}",
        )

    def _exponential(self, x: float, name: str, about: str) -> PropertyValue:
        values = self.logarithms - self.energies * (x - self.middle)
        noise = np.full(len(values), math.hypot(self.errors[1], self.errors[0] * (x - self.middle)))
        log = random_effects(values[1:], noise[1:], values[0], noise[0], self.freedom)
        value = math.exp(log.value)
        effects = replace(
            log, value=value, sigma=value * log.sigma, low_90=math.exp(log.low_90), high_90=math.exp(log.high_90),
            sampled=value * log.sampled, statistical=value * log.statistical,
        )  # fmt: skip
        return effects.as_value(name, "A^2/ps", about=about)


@dataclass(eq=False)
class TransportResults:
    """What a run says so far.

    Attributes:
        values, curves: with error bars. arrhenius: by symbol, where it could be fitted. notes: sentences on what to know of them.
        time_ps: length of each trajectory. stopped: why the run is over; empty while it goes on.
        needed: by how much longer it has to run to be as precise as was asked for; 1 = it is; NaN = not known yet.
        freedom: degrees of freedom of statistical errors, the fewest. doubts: those of the notes that longer runs may settle: that a slope
            is not one of a line, or disagrees with what velocities say.
    """

    values: list[PropertyValue] = field(default_factory=list)
    curves: list[PropertyCurve] = field(default_factory=list)
    arrhenius: dict[str, Arrhenius] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    time_ps: float = 0.0
    stopped: str = ""
    needed: float = math.nan
    freedom: float = math.inf
    doubts: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> PropertyValue:
        """The value of this name."""
        found = {value.name: value for value in self.values}
        if name not in found:
            raise UserError(f"There is no '{name}' among the results: {', '.join(found) or 'none yet'}.")
        return found[name]


class SegmentAnalysis:
    """Slopes of all segments of replicas, and what follows from them."""

    def __init__(self, replicas: Replicas) -> None:
        self.settings, self.replicas = replicas.settings, replicas
        self.lags = replicas.lags_fs
        self.sums = {name: np.stack([s[name] for s in replicas.sums]) for name in replicas.sums[0]}
        self.late = self.lags >= FIRST * self.lags[-1]
        left = len(replicas.members) - 1 - len(replicas.failures)
        self.failed = f"{len(replicas.failures)} samples failed: {next(iter(replicas.failures.values()), '')}"
        self.failed += "; of fewer than three, what they scatter is unknown" if left < 3 else ""

    def slopes(self, curves: np.ndarray, part: np.ndarray | None = None) -> np.ndarray:
        """Least-squares slope of curves (..., lags) over the late lags, or a part of them, per fs."""
        chosen = self.late if part is None else part
        t = self.lags[chosen] - self.lags[chosen].mean()
        return curves[..., chosen] @ t / (t @ t)

    def diffusion(self) -> dict[str, MemberAverages]:
        """D = MSD'/6 of each species, A²/fs."""
        return self._by_species(self.slopes(self.sums["msd"]) / 6)

    def diffusion_of_velocities(self) -> dict[str, MemberAverages]:
        """D by the integral of the velocity autocorrelation, up to the same lags on average, A²/fs."""
        step = np.diff(self.lags)
        vacf = self.sums["vacf"]
        integral = np.cumsum((vacf[..., 1:] + vacf[..., :-1]) / 2 * step, axis=-1) / 3
        return self._by_species(integral[..., self.late[1:]].mean(-1))

    def linearity(self) -> dict[str, np.ndarray]:
        """(temperatures,) of the mean-square displacement of each species: `_change` of its slope."""
        by_species = self._by_species(self._bend(self.sums["msd"]))
        return {symbol: self._change(averages) for symbol, averages in by_species.items()}

    def viscosity_linearity(self) -> np.ndarray:
        """(temperatures,) of the mean-square displacement of Helfand's moments: `_change` of its slope."""
        return self._change(average_members(self._bend(self.sums["helfand"]), self.settings.replicas))

    def _bend(self, curves: np.ndarray) -> np.ndarray:
        """Slope of curves (..., lags) over the later half of the late lags − over the earlier half."""
        early, later = (
            np.isin(np.arange(len(self.lags)), half) for half in np.array_split(np.flatnonzero(self.late), 2)
        )
        return self.slopes(curves, later) - self.slopes(curves, early)

    @staticmethod
    def _change(bends: MemberAverages) -> np.ndarray:
        """Mean over members / standard error."""
        errors = np.nanmean(bends.errors, axis=0) / np.sqrt(np.isfinite(bends.values).sum(0))
        return np.nan_to_num(np.nanmean(bends.values, axis=0) / np.where(errors > 0, errors, np.nan))

    def growth(self, s: int, k: int) -> float:
        """By what factor the mean-square displacement of a species at the k-th temperature grows over the late lags."""
        late = self.curve("msd", s, k)[0][self.late]
        return float(late[-1] / late[0]) if late[0] > 0 else math.nan

    def viscosity(self) -> MemberAverages:
        """η = ⟨ΔG²⟩'/(2 V kT), mPa s."""
        thermal = BOLTZMANN * self.settings.copies_K
        slopes = self.slopes(self.sums["helfand"]) / (2 * self.replicas.volume * thermal)
        return average_members(slopes * MPA_S, self.settings.replicas)

    def _by_species(self, segments: np.ndarray) -> dict[str, MemberAverages]:
        return {
            chemical_symbol(z): average_members(segments[..., s], self.settings.replicas)
            for s, z in enumerate(self.replicas.species)
        }

    def curve(self, name: str, s: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(lags,) of a sum of a species at the k-th temperature, mean over members, and its standard deviation: that of members."""
        per_member = (
            self.sums[name].mean(0)[:, k * self.settings.replicas : (k + 1) * self.settings.replicas, s].mean(1)
        )
        centre = per_member[0]
        others = per_member[1:][np.isfinite(per_member[1:, 0])]
        if len(others) < 2:
            return centre, np.full_like(centre, np.nan)
        return np.concatenate([centre[None], others]).mean(0), np.sqrt(
            ((others - others.mean(0)) ** 2).sum(0) / (len(others) - 1)
        )


def analyse_segments(replicas: Replicas, what: Sequence[str], novelty: float | None, name: str) -> TransportResults:
    """Values, curves and notes of the segments that are over."""
    analysis, results = SegmentAnalysis(replicas), TransportResults(time_ps=replicas.time_ps)
    if not what:
        return results
    about: dict[str, Any] = {"novelty": novelty, "structures": (name,)}
    temperatures = replicas.settings.temperatures_K
    viscosities: list[PropertyValue] = []
    if "viscosity" in what:
        averages, linearity = analysis.viscosity(), analysis.viscosity_linearity()
        results.freedom = averages.freedom.min()
        for k, t in enumerate(temperatures):
            if abs(linearity[k]) > DISAGREE:
                results.doubts.append(
                    f"The viscosity at {t:g} K has not converged within the lags ({linearity[k]:+.1f} standard errors between the slopes "
                    "of the later and earlier half of Helfand's moments): take longer segments."
                )
            said = f"from fluctuations of the stress (Green-Kubo) over {replicas.time_ps:.3g} ps of each trajectory"
            viscosities.append(
                averages.effects(k).as_value(f"viscosity_{t:g}K", "mPa s", least=0.0, about=said, **about)
            )
    if "diffusion" in what:
        _add_diffusion(results, analysis, viscosities, about)
    results.values += viscosities
    results.notes += results.doubts
    if replicas.failures:
        results.notes.append(analysis.failed)
    return results


def _add_diffusion(
    results: TransportResults, analysis: SegmentAnalysis, viscosities: list[PropertyValue], about: dict
) -> None:
    """D of each species and temperature, their Arrhenius line, and whether they can be trusted."""
    temperatures = analysis.settings.temperatures_K
    by_velocities, linearity = analysis.diffusion_of_velocities(), analysis.linearity()
    said = f"slope of the mean-square displacement from {FIRST * analysis.lags[-1] / 1000:.3g} to {analysis.lags[-1] / 1000:.3g} ps"
    for s, (symbol, averages) in enumerate(analysis.diffusion().items()):
        results.freedom = min(results.freedom, averages.freedom.min())
        doubtful = False
        for k, t in enumerate(temperatures):
            effects, other = averages.effects(k), by_velocities[symbol].effects(k)
            value = effects.as_value(
                f"diffusion_coefficient_{symbol}_{t:g}K", "A^2/ps", PER_PS, 0.0, about=said, **about
            )
            for kind, label, unit in (
                ("msd", "mean_square_displacement", "A^2"),
                ("vacf", "velocity_autocorrelation", "(A/fs)^2"),
            ):
                value_of, sigma = analysis.curve(kind, s, k)
                results.curves.append(
                    PropertyCurve(f"{label}_{symbol}_{t:g}K", analysis.lags, "time", "fs", value_of, sigma, unit)
                )
            doubts = _doubts(f"D of {symbol} at {t:g} K", effects, other, analysis.growth(s, k))
            results.doubts += doubts
            few = averages.freedom[k] < FREEDOM
            if few:
                results.notes.append(
                    f"D of {symbol} at {t:g} K is from too few segments to tell whether motion is diffusive: its interval holds zero."
                )
            if few or doubts or abs(linearity[symbol][k]) > DISAGREE:
                value, doubtful = _in_doubt(value, PER_PS * other.value), True
            results.values.append(value)
        bend = max(linearity[symbol], key=abs)
        if abs(bend) > DISAGREE:
            results.doubts.append(
                f"The mean-square displacement of {symbol} is not a line yet within the lags ({bend:+.1f} standard errors "
                "between the slopes of its later and earlier half): take longer segments."
            )
        if doubtful and len(temperatures) > 1:
            results.notes.append(f"No activation energy of {symbol}: some D is in doubt.")
        else:
            _add_arrhenius(results, symbol, temperatures, averages, about)
    if viscosities:
        _add_infinite(results, analysis, viscosities)
        return
    results.notes.append(
        "D is that of a periodic cell, smaller than in a large system by 2.84 kT/(6 pi viscosity L) in a fluid; with viscosity among what "
        "is asked for it is corrected (Yeh, Hummer) in cells that are nearly cubes."
    )


def _doubts(what: str, displacements: RandomEffects, velocities: RandomEffects, growth: float) -> list[str]:
    """Why this D may be none, beyond statistics."""
    found = []
    if abs(velocities.value - displacements.value) > DISAGREE * math.hypot(
        velocities.statistical, displacements.statistical
    ):
        slope, integral = PER_PS * displacements.value, PER_PS * velocities.value
        found.append(
            f"{what} is {slope:.3g} A^2/ps by displacements and {integral:.3g} by velocities: motion is not "
            "diffusive yet within these lags, or records are too far apart; take longer segments."
        )
    if not growth > GROWN:
        found.append(
            f"{what} may be zero: the mean-square displacement grows by a factor of {growth:.2f} only over these lags, "
            "as in a solid; if atoms do diffuse, take longer segments."
        )
    return found


def _in_doubt(value: PropertyValue, other: float) -> PropertyValue:
    """D with an interval that holds zero and the other estimate, as a slope that is none of diffusion says no more."""
    low, high = min(value.low_90, 0.0), max(value.high_90, other)
    sigma = max(value.sigma, max(value.value - low, high - value.value) / REACH_90)
    about = f"{value.about}; in doubt, so that the interval holds zero and the value by velocities"
    return replace(value, low_90=low, high_90=high, sigma=sigma, about=about)


def _add_infinite(results: TransportResults, analysis: SegmentAnalysis, viscosities: list[PropertyValue]) -> None:
    """D without periodic images at the temperatures at which the correction holds; of the others, why it does not."""
    found = results.values.copy()
    bends = np.abs([*analysis.linearity().values(), analysis.viscosity_linearity()]).max(0)
    for t, viscosity, bend in zip(analysis.settings.temperatures_K, viscosities, bends, strict=True):
        here = [v for v in found if v.name.startswith("diffusion_coefficient_") and v.name.endswith(f"_{t:g}K")]
        reason = _no_correction(here, viscosity, float(bend), analysis.replicas.heights)
        if reason:
            results.notes.append(f"D at {t:g} K is not corrected for periodic images: {reason}.")
            continue
        results.values += [add_image_correction(d, viscosity, t, analysis.replicas.volume) for d in here]


def _no_correction(
    diffusion: Sequence[PropertyValue], viscosity: PropertyValue, bend: float, heights: np.ndarray
) -> str:
    """Why the correction of a cubic cell of a fluid does not hold; empty where it does."""
    if heights.max() > CUBIC * heights.min():
        sides = ", ".join(f"{height:.3g}" for height in heights)
        return f"it is that of a cubic cell, and this one has heights of {sides} A"
    if bend > DISAGREE:
        return "displacements, or the moments of the viscosity, are not lines yet within the lags"
    for d in diffusion:
        if d.value <= DISAGREE * d.parts["statistical"] or not d.low_90 > 0:
            return f"it is that of a fluid, and {d.name} is not above zero beyond its error, as in a solid"
    if not 0 < viscosity.parts["statistical"] < ROUGHEST * viscosity.value:
        return f"the viscosity is not known to {100 * ROUGHEST:.0f} % yet"
    return ""


def _add_arrhenius(
    results: TransportResults, symbol: str, temperatures: Sequence[float], averages: MemberAverages, about: dict
) -> None:
    if len(temperatures) < 2:
        return
    line = Arrhenius.from_members(symbol, temperatures, averages)
    if line is None:
        results.notes.append(
            f"No activation energy of {symbol}: some D is not known to {100 * ROUGHEST:.0f} % yet, or not above zero."
        )
        return
    results.arrhenius[symbol] = line
    points = [value for value in results.values if value.name.startswith(f"diffusion_coefficient_{symbol}_")]
    d, sigma = (np.array([getattr(value, name) for value in points]) for name in ("value", "sigma"))
    curve = PropertyCurve(
        f"diffusion_coefficient_{symbol}", np.array(temperatures), "temperature", "K", d, sigma, "A^2/ps"
    )
    results.curves.append(curve)
    results.values += [replace(value, **about) for value in (line.activation_energy(), line.prefactor())]
    if line.misfit > DISAGREE:
        results.notes.append(
            f"ln D of {symbol} is not a line in 1/T ({line.misfit:.1f} standard errors): one activation energy does not describe it."
        )


def add_image_correction(
    d: PropertyValue, viscosity: PropertyValue, temperature_K: float, volume: float
) -> PropertyValue:
    """D_∞ = D_L + ξ kT/(6π η L) of an infinite fluid, from D in a cubic cell and the viscosity, L the cube root of the volume."""
    shift = PER_PS * IMAGES * BOLTZMANN * temperature_K / (6 * math.pi * (viscosity.value / MPA_S) * volume ** (1 / 3))
    error, reach = (shift * e / viscosity.value for e in (viscosity.sigma, viscosity.high_90 - viscosity.value))
    value = d.value + shift
    low, high = (math.copysign(math.hypot(bound - d.value, reach), bound - d.value) for bound in (d.low_90, d.high_90))
    parts = dict(d.parts) | {"statistical": math.hypot(d.parts["statistical"], error)}
    return replace(
        d, name=d.name.replace("coefficient", "coefficient_infinite"), value=value, sigma=math.hypot(d.sigma, error),
        low_90=value + low, high_90=value + high, parts=parts,
        about=f"in an infinite fluid: {shift:.2g} A^2/ps more than in the periodic cell, by the viscosity (Yeh, Hummer)",
    )  # fmt: skip
