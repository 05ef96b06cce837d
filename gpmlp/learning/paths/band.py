"""GPNEB finds a minimum-energy path: a climbing-image nudged elastic band on the posterior, whose labels are chosen where they matter.

The band (Henkelman, Uberuaga and Jónsson 2000) is relaxed by ASE on the posterior mean of all labels so far. Then one image is labelled:
the top one and the most uncertain one in turn. It ends when the oracle itself says that the top is a stationary point, and the model
had foreseen its energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.mep import NEB
from ase.optimize import FIRE

from gpmlp.core.errors import UserError
from gpmlp.learning.paths.ends import check_ends, lay_on
from gpmlp.learning.paths.minimizer import relaxed_surface
from gpmlp.learning.paths.oracle import OracleCalculator
from gpmlp.learning.paths.surface import Prediction, Surface, surface_recipe

FEWEST_IMAGES = 3
SURE = 0.1  # eV; an image with a smaller standard deviation is not labelled for its own sake
TRUST = 0.3  # eV; of the most uncertain image, at which the relaxation of the band is broken off for a label
FARTHEST = 0.3  # A that an atom of an image may move before the next label
EVERY = 5  # steps, of the relaxation, between two looks at standard deviations
SHARPER = 0.7  # of the limit of forces, to which the band is relaxed
STEPS = 250  # of the relaxation of the band at most
LONGEST_STEP = 0.1  # A
SPRING = 0.1  # eV/A^2
FEW_STEPS = 5  # a relaxation that was broken off before has not shown that the band rests
TOP, UNSURE, MIDDLE = "the top", "the most uncertain", "the middle of the first path"


@dataclass(frozen=True)
class BandLabel:
    """One label on a path, and what was foreseen of it.

    Attributes:
        number: of the label, from 1, end points and their relaxations included.
        image: which, from 0 (the start); reason: why that one.
        barrier, sigma: as foreseen before the label, eV; largest_sigma: of all images; image_sigma: of this one.
        error: foreseen energy of the image less the oracle's, eV; force: the oracle's largest on a free atom, eV/A.
        converged: whether the search ends with it.
    """

    number: int
    image: int
    reason: str
    barrier: float
    sigma: float
    largest_sigma: float
    image_sigma: float
    error: float
    force: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Path:
    """A minimum-energy path as the model has it after the last label.

    Attributes:
        images: with energy and forces as results of their calculators: the oracle's where an image is labelled, as the end points are, and
            where a search that converged has its top; else of the posterior mean.
        energies: (images,) eV, less that of the start; sigmas: (images,) eV, of these differences; distances: (images,) A along the path.
        top: the highest image.
        barrier, sigma: energy of the top less that of the start, eV, and its standard deviation.
        reaction_energy, reaction_sigma: the same of the end.
    """

    images: tuple[Atoms, ...]
    energies: np.ndarray
    sigmas: np.ndarray
    distances: np.ndarray

    @property
    def slopes(self) -> np.ndarray:
        """(images,) eV/A, of the energy along the path, by the forces."""
        places = np.array([image.positions.ravel() for image in self.images])
        forces = np.array([image.get_forces(apply_constraint=False).ravel() for image in self.images])
        tangents = np.gradient(places, axis=0)
        tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
        return -(forces * tangents).sum(axis=1)

    @property
    def top(self) -> int:
        return int(self.energies.argmax())

    @property
    def barrier(self) -> float:
        return float(self.energies[self.top])

    @property
    def sigma(self) -> float:
        return float(self.sigmas[self.top])

    @property
    def reaction_energy(self) -> float:
        return float(self.energies[-1])

    @property
    def reaction_sigma(self) -> float:
        return float(self.sigmas[-1])


class _PosteriorBand(NEB):
    """An elastic band whose images are predicted in one batch."""

    def __init__(self, images: list[Atoms], surface: Surface, **about: Any) -> None:
        super().__init__(images, method="improvedtangent", k=SPRING, **about)
        self.surface = surface

    def get_forces(self) -> np.ndarray:
        energies, forces = self.surface.forces(self.images)
        _attach(self.images, energies, forces)
        return super().get_forces()


def _attach(images: list[Atoms], energies: np.ndarray, forces: np.ndarray) -> None:
    for image, energy, force in zip(images, energies, forces, strict=True):
        image.calc = SinglePointCalculator(image, energy=float(energy), forces=force)


class GPNEB:
    """Finds the minimum-energy path between two structures with few calls of a calculator of ASE (the oracle).

        neb = GPNEB(start, end, EMT())
        neb.run(fmax=0.05)
        print(neb.path.barrier, neb.path.sigma)

    Isolated or periodic; the cell does not change. Constraints of the start hold for all images.

    Attributes:
        images: of the band, the end points with it.
        surface: labels so far, and their posterior.
        labels: those on the path, in order, and what was foreseen of each; calls: of the oracle for them.
        path: after the last label; None before there is one.
        converged: whether the oracle's forces at the top are below fmax and its energy was foreseen.
    """

    def __init__(
        self,
        start: Atoms,
        end: Atoms,
        calculator: Any = None,
        images: int = 7,
        relax_ends: bool = True,
        surface: Surface | None = None,
    ) -> None:
        """Take end points, which are not changed.

        Args:
            calculator: the oracle; that of the start if not given.
            images: between the end points, FEWEST_IMAGES at least.
            relax_ends: relax end points whose forces are above fmax (GPMinimizer); otherwise they stay as they are.
            surface: labels that are there already.

        Raises:
            UserError: too few images, no calculator, end points of other atoms, in another order or cell, or a constraint that is not
                supported.
        """
        if not isinstance(images, int) or images < FEWEST_IMAGES:
            raise UserError(
                f"images: a path needs {FEWEST_IMAGES} images between its end points at least, the top and a neighbour on either side; "
                f"got {images}."
            )
        check_ends(start, end)
        lay_on(start, end)
        calculator = start.calc if calculator is None else calculator
        if calculator is None:
            raise UserError("There is no calculator to label structures: give `calculator`, or set that of the start.")
        self.oracle = OracleCalculator.around(calculator)
        self.ends = [start.copy(), end.copy()]
        self.n_images, self.relax_ends = images, relax_ends
        self.images: list[Atoms] = []
        self.surface = Surface(surface_recipe()) if surface is None else surface
        self._given_labels = len(self.surface.labels)
        self.labels: list[BandLabel] = []
        self.path: Path | None = None
        self.calls = 0
        self.converged = False

    def run(self, fmax: float = 0.05, steps: int = 60, foreseen: float = 0.01) -> bool:
        """Search until converged; see `irun`. Returns whether it has."""
        for _ in self.irun(fmax, steps, foreseen):
            pass
        return self.converged

    def irun(self, fmax: float = 0.05, steps: int = 60, foreseen: float = 0.01) -> Iterator[BandLabel]:
        """Yield each label of the path, until the oracle's largest force at the top is below fmax (eV/A) and its energy was foreseen to
        `foreseen` (eV), or there are as many labels on the path as `steps`.

        Raises:
            UserError: the oracle failed, at which image; both end points relaxed to one minimum.
        """
        if not self.images:
            self._begin(fmax)
        while not self.converged and len(self.labels) < steps:
            if self.labels:
                rested = self._relax_band(fmax)
                image, reason = self._choose()
            else:
                rested, image, reason = False, (self.n_images + 1) // 2, MIDDLE
            label = self._label_image(image, reason, fmax, foreseen, rested)
            self.labels.append(label)
            self.converged = label.converged
            if self.converged or len(self.labels) >= steps:
                if not self.converged:  # else the top stays where it was labelled
                    self._relax_band(fmax)
                self.path = self._path()
            yield label

    # ---------------------------------------------------------------- the course of a search

    def _begin(self, fmax: float) -> None:
        """Label the end points, relax them if need be, and lay a first path between them."""
        for atoms, what in zip(self.ends, ("The start", "The end"), strict=True):
            atoms.calc, self.oracle.reason = self.oracle, what
            if self.relax_ends:
                self.surface = relaxed_surface(atoms, self.surface, fmax, what)
            else:
                self.surface = self.surface.with_oracle(atoms)
        start, end = self.ends
        images = [start.copy() for _ in range(self.n_images + 1)] + [lay_on(start, end)]
        NEB(images, method="improvedtangent").interpolate("idpp", mic=False, apply_constraint=True)
        self.images = images

    def _relax_band(self, fmax: float) -> bool:
        """Relax the band on the posterior; return whether it came to rest (or nearly) rather than to where it is uncertain."""
        band, before = _PosteriorBand(self.images, self.surface, climb=True), self._positions()
        relaxation = FIRE(band, logfile=None, maxstep=LONGEST_STEP)
        for step, _ in enumerate(relaxation.irun(fmax=SHARPER * fmax, steps=STEPS)):
            if np.linalg.norm(self._positions() - before, axis=2).max() > FARTHEST:
                return False
            if step and step % EVERY == 0 and self._predict().sigmas.max() > TRUST:
                return step > FEW_STEPS
        return True

    def _positions(self) -> np.ndarray:
        return np.array([image.positions for image in self.images])

    def _predict(self) -> Prediction:
        return self.surface.predict(self.images)

    def _choose(self) -> tuple[int, str]:
        """Which image to label: the top one and the most uncertain one in turn, the latter only where it is not sure."""
        foreseen, last = self._predict(), self.labels[-1]
        top, unsure = (1 + int(x[1:-1].argmax()) for x in (foreseen.energies, foreseen.sigmas))
        if last.reason == TOP and foreseen.sigmas[unsure] >= SURE:
            return unsure, UNSURE
        return top, TOP

    def _label_image(self, i: int, reason: str, fmax: float, foreseen: float, rested: bool) -> BandLabel:
        before, image = self._predict(), self.images[i].copy()
        top = 1 + int(before.energies[1:-1].argmax())
        image.calc, self.oracle.reason = self.oracle, f"image {i} of {self.n_images + 1} ({reason})"
        calls = self.oracle.calls
        self.surface = self.surface.with_oracle(image)
        self.calls += self.oracle.calls - calls
        error = float(before.energies[i]) - self.surface.labels[-1].get_potential_energy()
        force = float(np.linalg.norm(image.get_forces(), axis=1).max())
        done = rested and i == top and force < fmax and abs(error) < foreseen
        return BandLabel(
            number=len(self.surface.labels) - self._given_labels,
            image=i,
            reason=reason,
            barrier=float(before.energies[top] - before.energies[0]),
            sigma=float(before.difference_sigmas[top]),
            largest_sigma=float(before.sigmas.max()),
            image_sigma=float(before.sigmas[i]),
            error=error,
            force=force,
            converged=done,
        )

    def _path(self) -> Path:
        predicted = self.surface.known(self.images)
        images = [image.copy() for image in self.images]
        _attach(images, predicted.energies, predicted.forces)
        steps = [np.linalg.norm(b.positions - a.positions) for a, b in zip(images[:-1], images[1:], strict=True)]
        energies = predicted.energies - predicted.energies[0]
        return Path(tuple(images), energies, predicted.difference_sigmas, np.array([0.0, *np.cumsum(steps)]))
