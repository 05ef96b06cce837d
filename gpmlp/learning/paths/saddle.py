"""GPSaddle finds a saddle without an end point: eigenvector following on the posterior, with a label where it arrives.

From a minimum the atoms are pushed along a direction while all else relaxes, until the posterior's lowest curvature is negative; then
they go up along that mode and down along all others, by Newton's step with the posterior's whole Hessian (Cerjan and Miller 1981). A
Hessian costs milliseconds here, so that the mode is exact; of isolated atoms, whole translations and rotations are left out, into which
a dimer can turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic

from gpmlp.core.errors import UserError
from gpmlp.learning.paths.minimizer import descend, relaxed_surface
from gpmlp.learning.paths.motions import Motion
from gpmlp.learning.paths.oracle import OracleCalculator
from gpmlp.learning.paths.same import SAME_ENERGY, find_same
from gpmlp.learning.paths.surface import Surface, surface_recipe
from gpmlp.learning.paths.vibrations import hessian
from gpmlp.properties.constraints import check_constraints, free_motions

LONGEST_STEP = 0.1  # A, of an atom on the posterior
SHORTEST_STEP = 0.01  # A, of a push that goes back to the top
FARTHEST = 0.2  # A that an atom may move before the next label; twice that where the model is sure
TRUST = 0.15  # eV, standard deviation at which a label is asked for
FARTHEST_SIGMA = 0.3  # eV, beyond which a step is halved
SHARPER = 0.7  # of the limit of forces, to which the saddle is found on the posterior
STEPS = 60  # on the posterior between two labels at most
RELAXING = 3  # steps at right angles to each that is pushed
NEGATIVE = 0.05  # eV/A^2; a curvature below minus that is followed
SOFTEST = 0.2  # eV/A^2; softer modes are taken for that stiff by Newton's step
ALIKE = 0.3  # overlap with the direction of a mode that takes over from it
SAME_MODE = 0.7  # overlap of modes, of which one label beside the saddle is enough
SURE = 2.0  # standard deviations from zero of a curvature that the model is sure of
REACH = 2.0  # A, of a random direction around its atom
CANDIDATES = 32  # random directions, of which the most uncertain one is taken
DOWNHILL = 0.1  # eV/A along a direction, which is then turned round
APART = 0.1  # A from the saddle to where its sides begin, and where its curvature is asked for
SAME = 0.1  # A; minima in which no atom is farther from its place in the other are one
MOVES = 1e-6  # A, of a direction; less is nothing
DIRECTIONS = ("random", "softest", "uncertain")
PUSHED, FOLLOWED, ARRIVED, BESIDE = "pushed", "following the mode", "the saddle", "beside it, for its curvature"


@dataclass(frozen=True)
class SaddleLabel:
    """One label of a search, and what was foreseen of it.

    Attributes:
        number: of the label, from 1, those of relaxations included.
        reason: why there; curvature: the posterior's lowest of the search's place with the label, eV/A^2.
        barrier, sigma: energy above the start as foreseen before the label, eV; error: that less the oracle's, eV.
        force: the oracle's largest on a free atom, eV/A.
        converged: whether the search ends with it.
    """

    number: int
    reason: str
    curvature: float
    barrier: float
    sigma: float
    error: float
    force: float
    converged: bool


@dataclass(frozen=True, eq=False)
class Saddle:
    """A saddle as the model has it after the last label.

    Attributes:
        start, atoms: the minimum and the saddle, with energy and forces of the oracle.
        sides: minima on either side, with the oracle's results; empty where they were not asked for.
        barrier, sigma: energy above the start, the difference of their labels, eV, and the standard deviation that the noise of labels
            leaves it.
        mode: (atoms, 3) the one that goes down, of length 1; curvature: along it, eV/A^2.
    """

    start: Atoms
    atoms: Atoms
    sides: tuple[Atoms, ...]
    barrier: float
    sigma: float
    mode: np.ndarray
    curvature: float

    @property
    def joins_start(self) -> bool | None:
        """Whether one side is the start, so that the barrier is that of a reaction from it; None where sides were not sought."""
        return any(distance(self.start, side) < SAME for side in self.sides) if self.sides else None


class GPSaddle:
    """Finds a saddle near a minimum, without an end point, with few calls of a calculator of ASE (the oracle).

        search = GPSaddle(start, EMT(), direction="random", seed=1)
        search.run(fmax=0.05)
        print(search.saddle.barrier, search.saddle.sigma)

    Isolated or periodic; the cell does not change, constraints of the start hold.

    Attributes:
        atoms: where the search is.
        surface: labels so far, and their posterior; labels: those of the search, and what was foreseen of each; calls: of the
            oracle for them.
        saddle: after the last label; None before there is one.
        converged: whether the oracle's forces are below fmax, its energy was foreseen, and the posterior has one negative mode there.
        too_high: whether the last label is higher above the start than the search may go.
        known: which of the saddles that were given it arrived at; None where it did at none.
    """

    def __init__(
        self,
        start: Atoms,
        calculator: Any = None,
        direction: str | np.ndarray | Motion | Mapping[int, Sequence[float]] = "random",
        seed: int = 0,
        relax_start: bool = True,
        sides: bool = True,
        surface: Surface | None = None,
        minima: Sequence[Atoms] = (),
        saddles: Sequence[Atoms] = (),
        softens: bool = False,
    ) -> None:
        """Take a structure near a minimum, which is not changed.

        Args:
            calculator: the oracle; that of the start if not given.
            direction: one of DIRECTIONS (around a random atom; the posterior's softest mode; of some random ones that in which the
                posterior is the least sure), (atoms, 3), vectors of some atoms by index, or a Motion.
            seed: of directions that are random, and of the sign of the softest one.
            relax_start: relax it first if its forces are above fmax; otherwise it stays as it is.
            sides: relax from the saddle to both sides, to the minima that it joins.
            surface: labels that are there already.
            minima, saddles: that are known, with the oracle's energies. A search that arrives at such a saddle ends without a label
                (`known`), and sides that are such a minimum, in whatever order its atoms are, cost none.

            softens: turn a direction that is given to soft modes on the way, as the others do.

        Raises:
            UserError: no calculator, a constraint that is not supported, atoms that cannot move against each other, a direction that is
                none, or that nothing can move along.
        """
        check_constraints(start, "The start")
        check_movable(start)
        calculator = start.calc if calculator is None else calculator
        if calculator is None:
            raise UserError("There is no calculator to label structures: give `calculator`, or set that of the start.")
        self.oracle = OracleCalculator.around(calculator)
        self.start, self.relax_start, self.with_sides = start.copy(), relax_start, sides
        self._given: Any = direction
        self._rng = np.random.default_rng(seed)
        if isinstance(direction, Motion):
            given_direction(start, direction.vectors(start))
        elif not isinstance(direction, str):
            self._given = given_direction(start, direction)
        elif direction not in DIRECTIONS:
            raise UserError(f"direction: there is no {direction!r}; give {', '.join(DIRECTIONS)}, or vectors of atoms.")
        self.surface = Surface(surface_recipe()) if surface is None else surface
        self._softens = softens or isinstance(direction, str)
        self.minima, self.saddles = tuple(minima), tuple(saddles)
        self.known: int | None = None
        self._given_labels = len(self.surface.labels)
        self.atoms, self._begun = self.start.copy(), False
        self._rests, self._stride = False, LONGEST_STEP
        self._hessian: tuple[Surface, np.ndarray, np.ndarray] | None = None
        self._doubtful: np.ndarray | None = None  # mode of whose curvature the model is not sure
        self._checked: list[np.ndarray] = []
        self.labels: list[SaddleLabel] = []
        self.saddle: Saddle | None = None
        self.calls = 0
        self.too_high = False
        self.converged = False

    def run(self, fmax: float = 0.05, steps: int = 60, foreseen: float = 0.01, highest: float = 5.0) -> bool:
        """Search until converged; see `irun`. Returns whether it has."""
        for _ in self.irun(fmax, steps, foreseen, highest):
            pass
        return self.converged

    def irun(
        self, fmax: float = 0.05, steps: int = 60, foreseen: float = 0.01, highest: float = 5.0
    ) -> Iterator[SaddleLabel]:
        """Yield each label of the search, until the oracle's largest force is below fmax (eV/A), its energy was foreseen to `foreseen`
        (eV) and the posterior has one negative mode; or, not converged, there are as many labels as `steps`, or one is more than `highest`
        (eV) above the start.

        Raises:
            UserError: the oracle failed, and where; the start did not come to rest.
        """
        if not self._begun:
            self.begin(fmax)
        while not self.converged and len(self.labels) < steps and not self._too_high(highest):
            if self._doubtful is None:
                reason = self._climb(fmax, foreseen)
                place = self.atoms
                if reason == ARRIVED and (known := self._known_saddle()) is not None:
                    self.known = known
                    return
            else:
                reason, place = BESIDE, self._beside(self.atoms, self._doubtful)
            label = self._label(place, reason, fmax, foreseen)
            self.labels.append(label)
            self.converged = label.converged
            if self.converged or len(self.labels) >= steps or self._too_high(highest):
                self.saddle = self._result(fmax)
            yield label

    def _too_high(self, highest: float) -> bool:
        self.too_high = bool(self.labels) and self.labels[-1].barrier - self.labels[-1].error > highest
        return self.too_high

    def _known_saddle(self) -> int | None:
        """Which of the known saddles this place is, by the model where it is sure."""
        energy, sigma = self._foreseen_energy(self.atoms)
        return None if sigma > SAME_ENERGY else find_same(self.atoms, self.saddles, energy)

    def _foreseen_energy(self, atoms: Atoms) -> tuple[float, float]:
        """By the model, on the oracle's scale, and the standard deviation of what lies between it and the start, eV."""
        foreseen = self.surface.predict([self.start, atoms])
        above = float(foreseen.energies[1] - foreseen.energies[0])
        return self.start.get_potential_energy() + above, float(foreseen.difference_sigmas[1])

    # ---------------------------------------------------------------- the course of a search

    def begin(self, fmax: float) -> None:
        self.start.calc, self.oracle.reason = self.oracle, "The start"
        if self.relax_start:
            self.start = self._relaxed(self.start, fmax)
        elif (label := self.surface.label_of(self.start)) is not None:
            self.start.calc = label.calc
        else:
            self.surface = self.surface.with_oracle(self.start)
            self.start = self._last()
        self.atoms = self.start.copy()
        self._motions = free_motions(self.atoms)
        moves = np.abs(self._motions).reshape(len(self.atoms), -1).max(axis=1) > 0
        self._free = [int(i) for i in moves.nonzero()[0]]
        direction = self._direction()
        self.direction = direction / np.linalg.norm(direction)
        self._begun = True

    def _direction(self) -> np.ndarray:
        """(3 atoms,) of what can move."""
        if not isinstance(self._given, str):
            return self._given_way()
        if self._given == "random":
            return self._random()
        if self._given == "softest":
            _, vectors = self._curvatures(self.atoms, self._motions)
            return vectors[:, 0] * self._rng.choice([-1.0, 1.0])
        candidates = [self._random() for _ in range(CANDIDATES)]
        images = [self.atoms.copy() for _ in candidates]
        for image, way in zip(images, candidates, strict=True):
            image.positions += FARTHEST * longest_one(way)
        return candidates[int(self.surface.predict(images).sigmas.argmax())]

    def _given_way(self) -> np.ndarray:
        """(3 atoms,) the direction that was given, at the present place."""
        vectors = self._given.vectors(self.atoms) if isinstance(self._given, Motion) else self._given
        return self._along(vectors.ravel())

    def _random(self) -> np.ndarray:
        centre = self._rng.choice(self._free)
        away = self.atoms.get_distances(centre, range(len(self.atoms)), mic=bool(self.atoms.pbc.any()))
        vectors = self._rng.normal(size=(len(self.atoms), 3)) * np.exp(-0.5 * (away / REACH) ** 2)[:, None]
        return self._along(vectors.ravel())

    def _along(self, vector: np.ndarray) -> np.ndarray:
        return self._motions @ (self._motions.T @ vector)

    def _climb(self, fmax: float, foreseen: float) -> str:
        """Go towards the saddle on the posterior until it is reached or a label is needed; why."""
        before, self._stride = self.atoms.positions.copy(), LONGEST_STEP
        for _ in range(STEPS):
            forces = self.surface.forces([self.atoms])[1][0].ravel()
            self._motions = free_motions(self.atoms)
            curvatures, vectors = self._curvatures(self.atoms, self._motions)
            followed = self._followed(curvatures, vectors)
            rests = np.linalg.norm(self._along(forces).reshape(-1, 3), axis=1).max() < SHARPER * fmax
            others = np.delete(curvatures, followed or 0)
            if rests and followed is not None and (self._moved(before) > 0 or (others >= -NEGATIVE).all()):
                return ARRIVED
            last = self.atoms.positions.copy()
            if followed is None:
                self._push(forces)
            else:
                step = _newton(forces, curvatures, vectors, followed)
                if rests:  # a saddle of higher order, and it is known to be one
                    step = step + LONGEST_STEP * np.delete(vectors, followed, axis=1)[:, 0]
                self.atoms.positions += _shortened(step)
            sigma = self._sigma()
            while sigma > FARTHEST_SIGMA:  # a step into what the model does not know at all
                self.atoms.positions = 0.5 * (last + self.atoms.positions)
                sigma = self._sigma()
            if sigma > TRUST or self._moved(before) > FARTHEST * (2 if sigma < foreseen else 1):
                break
        return PUSHED if followed is None else FOLLOWED

    def _sigma(self) -> float:
        return float(self.surface.predict([self.atoms]).sigmas[0])

    def _moved(self, before: np.ndarray) -> float:
        return float(np.linalg.norm(self.atoms.positions - before, axis=1).max())

    def _curvatures(self, atoms: Atoms, motions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, rising, eV/A^2, and vectors (3 atoms, k) of the Hessian within some motions."""
        if self._hessian is None or self._hessian[0] is not self.surface or (self._hessian[1] != atoms.positions).any():
            whole = np.zeros((len(motions), len(motions)))
            rows = (3 * np.array(self._free)[:, None] + np.arange(3)).ravel()
            whole[np.ix_(rows, rows)] = hessian(self.surface, atoms, self._free)
            self._hessian = self.surface, atoms.positions.copy(), whole
        values, vectors = np.linalg.eigh(motions.T @ self._hessian[2] @ motions)
        return values, motions @ vectors

    def _followed(self, curvatures: np.ndarray, vectors: np.ndarray) -> int | None:
        """Which mode is followed, which becomes the direction: of those that go down the one that is most like it, once the start, where
        none does, is left behind; None while the direction itself is."""
        overlaps = (vectors.T @ self.direction)[curvatures < -NEGATIVE]
        if not len(overlaps) or np.abs(overlaps).max() < ALIKE or self._moved(self.start.positions) < FARTHEST:
            return None
        i = int(np.abs(overlaps).argmax())
        self.direction = vectors[:, i] * np.sign(overlaps[i])
        return i

    def _push(self, forces: np.ndarray) -> None:
        """Up along the direction, as at first from where nothing is up or down, and then down along what is at right angles to it: the
        Hessian of a bond that is stretched hides that a turn about it goes down."""
        if not self._softens:  # whatever mode was followed where the model did not know better
            self.direction = self._given_way()
            self.direction /= np.linalg.norm(self.direction)
        beyond = self._moved(self.start.positions) >= FARTHEST and forces @ self.direction > DOWNHILL
        if beyond:  # the top, back to which it goes in shorter steps
            self._stride = max(0.5 * self._stride, SHORTEST_STEP)
        if self._softens:  # one step of inverse iteration: what is stiff leads nowhere
            curvatures, vectors = self._curvatures(self.atoms, self._motions)
            self.direction = vectors @ (vectors.T @ self.direction / np.maximum(np.abs(curvatures), SOFTEST))
            self.direction /= np.linalg.norm(self.direction)
        across = self._motions - np.outer(self.direction, self.direction @ self._motions)
        left, sizes, _ = np.linalg.svd(across, full_matrices=False)
        curvatures, vectors = self._curvatures(self.atoms, left[:, sizes > 0.5])
        self.atoms.positions += (-1 if beyond else 1) * self._stride * longest_one(self.direction)
        for _ in range(RELAXING):
            forces = self.surface.forces([self.atoms])[1][0].ravel()
            relaxing = vectors @ (vectors.T @ forces / np.maximum(np.abs(curvatures), SOFTEST))
            self.atoms.positions += _shortened(relaxing)

    def _label(self, place: Atoms, reason: str, fmax: float, foreseen: float) -> SaddleLabel:
        before = self.surface.predict([self.start, place])
        here = place.copy()
        here.calc, self.oracle.reason = self.oracle, reason
        calls = self.oracle.calls
        self.surface = self.surface.with_oracle(here)
        self.calls += self.oracle.calls - calls
        error = float(before.energies[1]) - self.surface.labels[-1].get_potential_energy()
        force = float(np.linalg.norm(here.get_forces(), axis=1).max())
        if self._doubtful is not None:
            self._checked.append(self._doubtful)
        else:
            self._rests, self._checked = force < fmax and abs(error) < foreseen, []
        curvatures, vectors = self._curvatures(self.atoms, free_motions(self.atoms))
        return SaddleLabel(
            number=len(self.surface.labels) - self._given_labels,
            reason=reason,
            curvature=float(curvatures[0]),
            barrier=float(before.energies[1] - before.energies[0]),
            sigma=float(before.difference_sigmas[1]),
            error=error,
            force=force,
            converged=self._rests and self._is_saddle(curvatures, vectors),
        )

    def _is_saddle(self, curvatures: np.ndarray, vectors: np.ndarray) -> bool:
        """Of a stationary point: whether one mode goes down, of which the model is sure; otherwise what to do next."""
        self._doubtful = None
        for i in np.flatnonzero(curvatures < -NEGATIVE)[:2]:
            if any(abs(vectors[:, i] @ checked) > SAME_MODE for checked in self._checked):
                continue
            place = self._beside(self.atoms, vectors[:, i])
            length = np.linalg.norm(place.positions - self.atoms.positions)
            if 2 * SURE * self.surface.predict([place]).sigmas[0] / length**2 > -curvatures[i]:
                self._doubtful = vectors[:, i]
                return False
        if curvatures[0] >= -NEGATIVE:  # a minimum; a saddle lies on the way back
            self.direction = self._along((self.start.positions - self.atoms.positions).ravel())
            self.direction /= np.linalg.norm(self.direction)
        return bool(curvatures[0] < -NEGATIVE and (curvatures[1:] >= -NEGATIVE).all())

    @staticmethod
    def _beside(atoms: Atoms, mode: np.ndarray) -> Atoms:
        place = atoms.copy()
        place.positions += APART * longest_one(mode)
        return place

    # ---------------------------------------------------------------- what it comes to

    def _relaxed(self, atoms: Atoms, fmax: float) -> Atoms:
        """The minimum that the oracle has below some atoms, learned."""
        atoms.calc = self.oracle
        self.surface = relaxed_surface(atoms, self.surface, fmax, self.oracle.reason)
        return self._last()

    def _last(self) -> Atoms:
        """The structure that was labelled last, with the constraints of the start."""
        last = self.surface.labels[-1].copy()
        last.calc = self.surface.labels[-1].calc
        last.set_constraint(self.start.constraints)
        return last

    def _result(self, fmax: float) -> Saddle:
        atoms = self.atoms.copy()
        label = self.surface.label_of(atoms)
        assert label is not None  # a search ends where it was labelled
        atoms.calc = label.calc
        curvatures, vectors = self._curvatures(atoms, free_motions(atoms))
        energies = self.surface.known([self.start, atoms])
        mode = vectors[:, 0].reshape(-1, 3)
        sides = self._sides(atoms, mode, fmax) if self.with_sides and self.converged else ()
        barrier = float(energies.energies[1] - energies.energies[0])
        return Saddle(self.start, atoms, sides, barrier, float(energies.difference_sigmas[1]), mode, curvatures[0])

    def _sides(self, saddle: Atoms, mode: np.ndarray, fmax: float) -> tuple[Atoms, ...]:
        """Down from the saddle both ways: on the posterior as far as it is sure, then with labels, unless it leads to a minimum that is
        known."""
        sides: list[Atoms] = []
        for sign in (-1, 1):
            atoms = self._beside(saddle, sign * mode)
            descend(atoms, self.surface, fmax, partial(self._is_unsure, atoms))
            self.oracle.reason = f"side {len(sides) + 1} of the saddle"
            side = self._same_side(atoms, sides) or self._known_minimum(atoms) or self._relaxed(atoms, fmax)
            sides.append(self._same_side(side, sides) or side)
        return tuple(sides)

    def _same_side(self, atoms: Atoms, sides: Sequence[Atoms]) -> Atoms | None:
        """The start or a side that is in this very place."""
        return next((minimum for minimum in (self.start, *sides) if distance(minimum, atoms) < SAME), None)

    def _known_minimum(self, atoms: Atoms) -> Atoms | None:
        """These atoms with the energy of the minimum that they are, if it is known, by shape and the model's energy, and it is sure."""
        if self._is_unsure(atoms):
            return None
        i = find_same(atoms, self.minima, self._foreseen_energy(atoms)[0])
        if i is None:
            return None
        side = atoms.copy()
        side.calc = SinglePointCalculator(side, energy=self.minima[i].get_potential_energy())
        return side

    def _is_unsure(self, atoms: Atoms) -> bool:
        return bool(self.surface.predict([atoms]).sigmas[0] > TRUST)


def check_movable(start: Atoms) -> None:
    """Raise UserError for atoms that cannot move against each other or what is held: one atom, for instance."""
    if not free_motions(start).shape[1]:
        atoms = "it has one atom" if len(start) == 1 else f"its {len(start)} atoms cannot move against each other"
        raise UserError(
            f"The start: {atoms}, so that no reaction leads away from it; give a structure that can change."
        )


def given_direction(atoms: Atoms, direction: np.ndarray | Mapping[int, Sequence[float]]) -> np.ndarray:
    """(atoms, 3), of what is given: an array, or vectors of some atoms.

    Raises:
        UserError: the shape is another one, there is no such atom, a number is not finite, nothing can move that way.
    """
    vectors = np.zeros((len(atoms), 3))
    if isinstance(direction, Mapping):
        for i, vector in direction.items():
            if not 0 <= i < len(atoms):
                raise UserError(f"direction: the start has atoms 0 to {len(atoms) - 1}; there is no atom {i}.")
            vectors[i] = vector
    elif np.shape(direction) != vectors.shape:
        raise UserError(f"direction: must have shape {vectors.shape} (atoms, 3); got {np.shape(direction)}.")
    else:
        vectors = np.array(direction, dtype=float)
    motions = free_motions(atoms)
    if not np.isfinite(vectors).all() or np.linalg.norm(motions.T @ vectors.ravel()) < MOVES * max(
        1.0, np.abs(vectors).max()
    ):
        raise UserError(
            "direction: nothing moves that way: it is zero or not finite, moves atoms that are held only, or moves or turns all atoms as "
            "one."
        )
    return vectors


def distance(first: Atoms, second: Atoms) -> float:
    """The farthest that an atom of the second has from its place in the first, A, after the whole is laid on it."""
    laid = second.copy()
    if first.pbc.any():
        return float(
            np.linalg.norm(find_mic(second.positions - first.positions, first.cell, first.pbc)[0], axis=1).max()
        )
    if not first.constraints:
        minimize_rotation_and_translation(first, laid)
    return float(np.linalg.norm(laid.positions - first.positions, axis=1).max())


def _newton(forces: np.ndarray, curvatures: np.ndarray, vectors: np.ndarray, followed: int) -> np.ndarray:
    """Up along one mode and down along the others."""
    stiffness = np.maximum(np.abs(curvatures), SOFTEST)
    stiffness[followed] *= -1
    return vectors @ (vectors.T @ forces / stiffness)


def longest_one(vector: np.ndarray) -> np.ndarray:
    """(atoms, 3) in which the atom that moves farthest moves by 1."""
    vectors = vector.reshape(-1, 3)
    return vectors / np.linalg.norm(vectors, axis=1).max()


def _shortened(step: np.ndarray) -> np.ndarray:
    """(atoms, 3) in which no atom moves by more than LONGEST_STEP."""
    vectors = step.reshape(-1, 3)
    return vectors * min(1.0, LONGEST_STEP / max(np.linalg.norm(vectors, axis=1).max(), 1e-12))
