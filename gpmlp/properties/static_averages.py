"""Averages that do not depend on time (energy, pressure, radial distribution) from frames of the mean potential's trajectories: those over
samples of its posterior are the same frames, reweighted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np

from gpmlp.core.errors import chemical_symbol
from gpmlp.core.radial_distribution import radial_distributions
from gpmlp.core.structures import Structures
from gpmlp.core.units import BOLTZMANN, GPA
from gpmlp.potential.samples import PosteriorSamples
from gpmlp.properties.dynamics import Replicas
from gpmlp.properties.statistics import EFFECTIVE, FREEDOM, Reweighted, reweighted_averages
from gpmlp.properties.values import PropertyCurve, PropertyValue, spread, value_from_samples
from gpmlp.uncertainty.timeseries import series_mean

STATIC = ("energy", "pressure", "rdf")
CUTOFF, BINS = 6.0, 60  # A, of radial distributions
LEAST = 8  # frames of a trajectory below which nothing is averaged
UNITS = {"energy": ("potential_energy", "eV/atom"), "pressure": ("pressure", "GPa")}


class StaticFrames:
    """What the mean and its samples say of frames of the mean's trajectories.

    Attributes:
        energies: of each frame (1 + samples, copies) eV/atom, the mean's first; pressures: the same, GPa.
        rdf: where asked, of each frame (copies, pairs, BINS); pairs: of species, whose radial distributions these are.
        lost: what an earlier version had begun that cannot be gone on with, and why, in sentences.
    """

    def __init__(self, what: Sequence[str], replicas: Replicas, samples: PosteriorSamples | None) -> None:
        self.what, self.samples, self.replicas = tuple(what), samples, replicas
        self.energies: list[np.ndarray] = []
        self.pressures: list[np.ndarray] = []
        self.rdf: list[np.ndarray] = []
        self.lost: list[str] = []
        self.pairs = list(combinations_with_replacement(replicas.species, 2))

    def add(self, here: Structures) -> None:
        """Take the frames where the mean's copies are now."""
        replicas = self.replicas
        energies, stresses = replicas.energies[:1].copy(), replicas.stresses[:1].copy()
        if self.samples is not None:
            sampled = self.samples(here)
            energies = np.concatenate([energies, sampled.energies.detach().cpu().numpy()])
            stresses = np.concatenate([stresses, sampled.stresses.detach().cpu().numpy()])
        # the kinetic part is known: what velocities fluctuate is noise
        thermal = (replicas.n - 1) * BOLTZMANN * replicas.settings.copies_K / replicas.volume
        self.energies.append(energies / replicas.n)
        self.pressures.append((thermal - np.trace(stresses, axis1=-2, axis2=-1) / 3) / GPA)
        if "rdf" in self.what:
            self.rdf.append(radial_distributions(here, self.pairs, CUTOFF, BINS)[1].swapaxes(0, 1))

    def state(self) -> dict[str, np.ndarray]:
        frames = {"energies": self.energies, "pressures": self.pressures, "rdf": self.rdf}
        return {f"static/{name}": np.array(values) for name, values in frames.items() if values}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.energies, self.pressures, self.rdf = (
            list(state.get(f"static/{name}", ())) for name in ("energies", "pressures", "rdf")
        )
        if "rdf" not in self.what:
            return
        if self.rdf and self.rdf[0].ndim == 2 and len(self.pairs) == 1:  # of an earlier version: all elements alike
            self.rdf = [frame[:, None] for frame in self.rdf]
        if len(self.rdf) != len(self.energies) or any(frame.ndim == 2 for frame in self.rdf):
            self.what, self.rdf = tuple(name for name in self.what if name != "rdf"), []
            self.lost = [
                "Radial distributions are left out: an earlier version of gpmlp began this run with those of all elements together; "
                "those of pairs of elements take a new run."
            ]

    def precision(self) -> float:
        """Standard error of the mean's energy, in standard deviations of its fluctuations: the largest of all temperatures."""
        if len(self.energies) < LEAST:
            return math.inf
        means = [
            series_mean(self._series(self.energies, 0, k)) for k in range(len(self.replicas.settings.temperatures_K))
        ]
        if min(mean.freedom for mean in means) < FREEDOM:
            return math.inf
        return max(mean.sem / mean.spread if mean.spread else 0.0 for mean in means)

    def averages(self, about: Mapping[str, object]) -> tuple[list[PropertyValue], list[PropertyCurve], list[str]]:
        """Values, curves and notes."""
        values: list[PropertyValue] = []
        curves: list[PropertyCurve] = []
        notes: list[str] = []
        if len(self.energies) < LEAST:
            return values, curves, notes
        for k, temperature in enumerate(self.replicas.settings.temperatures_K):
            differences = (
                np.concatenate(self._series(self.energies, slice(1, None), k)).T - self._mean_energies(k)
            ) * self.replicas.n
            for name, frames in (("energy", self.energies), ("pressure", self.pressures)):
                if name not in self.what:
                    continue
                series = self._series(frames, 0, k)
                mean, (label, unit) = series_mean(series), UNITS[name]
                seen = np.concatenate(self._series(frames, slice(1, None), k)).T[:, :, None]
                found = reweighted_averages(seen, differences, temperature) if len(differences) else None
                sampled = np.zeros(0) if found is None else found.values[:, 0]
                said: dict[str, Any] = {"about": self._said(found, mean.n_effective), **about}
                values.append(
                    value_from_samples(
                        f"{label}_{temperature:g}K", unit, float(mean.value[0]), sampled, mean.sem, **said
                    )
                )
            if "rdf" in self.what:
                curves += [self._rdf(k, p, temperature, differences) for p in range(len(self.pairs))]
            if len(differences):
                notes += self._caution(
                    reweighted_averages(np.zeros((differences.shape[1], 1)), differences, temperature), temperature
                )
        return values, curves, notes

    def _rdf(self, k: int, p: int, temperature_K: float, differences: np.ndarray) -> PropertyCurve:
        """Of the k-th temperature and the p-th pair."""
        replicas = self.replicas.settings.replicas
        mine = np.array(self.rdf)[:, k * replicas : (k + 1) * replicas, p]
        frames = mine.swapaxes(0, 1).reshape(-1, BINS)
        value = frames.mean(0)
        noise = frames.std(0, ddof=1) / math.sqrt(max(2.0, series_mean(self._series(self.energies, 0, k)).n_effective))
        sampled = np.zeros(BINS)
        if len(differences):
            sampled = spread(reweighted_averages(frames, differences, temperature_K).values, value)
        r = (np.arange(BINS) + 0.5) * CUTOFF / BINS
        symbols, counts = [chemical_symbol(z) for z in self.pairs[p]], len(differences)
        name, said = f"radial_distribution_{'_'.join(symbols)}_{temperature_K:g}K", "samples by reweighting"
        return PropertyCurve(name, r, "distance", "A", value, np.hypot(sampled, noise), "", samples=counts, about=said)

    def _series(self, frames: list[np.ndarray], members: int | slice, k: int) -> list[np.ndarray]:
        """Of each trajectory of a temperature, (frames,) or (frames, members)."""
        replicas = self.replicas.settings.replicas
        values = np.array(frames)[:, members]
        return [values[..., copy] for copy in range(k * replicas, (k + 1) * replicas)]

    def _mean_energies(self, k: int) -> np.ndarray:
        return np.concatenate(self._series(self.energies, 0, k))

    def _said(self, found: Reweighted | None, effective: float) -> str:
        text = f"average over {effective:.0f} independent frames of the mean potential's dynamics"
        if found is None:
            return text
        return f"{text}; of the samples by reweighting, in which {np.median(found.effective):.0f} of {found.frames} frames count"

    def _caution(self, found: Reweighted, temperature_K: float) -> list[str]:
        many = int(found.cumulant.sum())
        if not many:
            return []
        return [
            f"{temperature_K:g} K: less than {100 * EFFECTIVE:.0f} % of the frames count for {many} of {len(found.cumulant)} samples, "
            "which lie far from the mean: their static averages are of first order in the difference."
        ]
