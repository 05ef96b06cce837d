"""GPReactionNetwork explores from a minimum: the minima that single steps lead to, the saddles between them, and so on from these.

From each minimum saddles are searched (saddle.py) along motions of its bonds, the posterior's softest modes and directions in which it is
least sure. All searches share their labels. Structures count as one whatever the order of equal atoms (same.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.learning.paths.minimizer import relaxed_surface
from gpmlp.learning.paths.motions import Motion, bond_changes, fragments, proposed_motions
from gpmlp.learning.paths.oracle import OracleCalculator, SearchError
from gpmlp.learning.paths.saddle import (
    APART,
    FARTHEST,
    SAME,
    GPSaddle,
    SaddleLabel,
    check_movable,
    distance,
    longest_one,
)
from gpmlp.learning.paths.same import difference, find_same
from gpmlp.learning.paths.surface import Surface, surface_recipe
from gpmlp.learning.paths.vibrations import hessian, saddle_modes
from gpmlp.properties.constraints import allowed_forces, check_constraints, free_motions

Name = Literal["rotate", "transfer", "stretch", "soft", "uncertain"]
WAYS: tuple[Name, ...] = ("rotate", "transfer", "stretch", "soft", "uncertain")
DEFAULT_WAYS: tuple[Name, ...] = ("rotate", "transfer", "soft", "uncertain")
SOFT_MODES = 2  # of a minimum, both ways each
NEAREST = 16  # labels that a search begins with: a fit of all of a long exploration would take minutes
PER_SEARCH = 20  # labels, after which a search is given up
OVER = 1.0  # eV; the way to a saddle may lead so much higher than it
ALIKE = 0.05  # A; ways whose first steps differ by less are one by symmetry
ONE_WAY = 0.8  # overlap with another way, of which a soft mode is no other one
SOFTEST = 0.2  # eV/A^2; softer modes count as that stiff where forces are left
LEVEL_90 = 1.645
FLAT = 0.02  # eV/A^2; a minimum has no curvature below minus that
SETTLED = 0.1  # of the limit of forces, below which a flat mode would stop where it was pushed
PUSHES = 3  # off what is at rest and no minimum, each twice as far as the one before


@dataclass(frozen=True, eq=False)
class Minimum:
    """A minimum, at rest by the oracle.

    Attributes:
        number: from 1; atoms: with the oracle's energy and forces.
        energy: above the start's, eV; sigma: of that difference, eV; own_sigma: of its own energy, eV: noise of its label, and what the
            forces that are left may hide.
        fragments: formulas of what is bonded together; softest: lowest curvature by the model, eV/A^2.
        found_in: the search; 0 for the start.
    """

    number: int
    atoms: Atoms
    energy: float
    sigma: float
    own_sigma: float
    fragments: str
    softest: float
    found_in: int

    @property
    def doubt(self) -> str:
        """Why it is none, in words; '' where it is one."""
        return f"not a minimum: curvature {self.softest:.2f} eV/A^2" if self.softest < -FLAT else ""


@dataclass(frozen=True, eq=False)
class Reaction:
    """A saddle and the two minima on its sides.

    Attributes:
        number: from 1; first, second: numbers of the minima, equal where both are one but for the order of its atoms.
        doubtful_ends: numbers of those that are no minima.
        start, saddle, end: in one order of atoms; mode: (atoms, 3), that which goes down, from the start to the end.
        energy: above that of the first structure of all, eV; forward, backward: barriers, eV; sigma, sigma_backward: as of a minimum, eV.
        bonds: lost and won from the first to the second; imaginary: frequencies by the model, cm^-1.
        found_in: the search.
    """

    number: int
    first: int
    second: int
    start: Atoms
    saddle: Atoms
    end: Atoms
    mode: np.ndarray
    energy: float
    forward: float
    backward: float
    sigma: float
    sigma_backward: float
    bonds: str
    imaginary: list[float]
    found_in: int
    doubtful_ends: tuple[int, ...] = ()

    @property
    def doubt(self) -> str:
        """Why it is no reaction over a barrier, in words; '' where it is one."""
        said = [f"{n} is not a minimum" for n in self.doubtful_ends]
        if min(self.interval[0], self.interval_backward[0]) <= 0:
            said.append("no barrier above zero within its 90 % interval")
        return "; ".join(said)

    @property
    def interval(self) -> tuple[float, float]:
        """90 % interval of the forward barrier, eV."""
        return self.forward - LEVEL_90 * self.sigma, self.forward + LEVEL_90 * self.sigma

    @property
    def interval_backward(self) -> tuple[float, float]:
        """90 % interval of the backward barrier, eV."""
        return self.backward - LEVEL_90 * self.sigma_backward, self.backward + LEVEL_90 * self.sigma_backward


@dataclass(frozen=True)
class Search:
    """A search for a saddle that is over.

    Attributes:
        number: from 1; minimum: number of that from which it went; way: in words; outcome: in words.
        reaction: number of that which it found or came to again; None for none. calls: of the oracle.
    """

    number: int
    minimum: int
    way: str
    outcome: str
    reaction: int | None
    calls: int


@dataclass(frozen=True)
class NetworkLabel:
    """A label of a search under way, and what was foreseen of it; calls: of the oracle so far."""

    search: int
    minimum: int
    way: str
    calls: int
    label: SaddleLabel


@dataclass(frozen=True, eq=False)
class _Way:
    """A direction from a minimum, and its name."""

    name: str
    direction: str | np.ndarray | Motion
    vectors: np.ndarray  # (atoms, 3), the first step; zeros where it is drawn later
    softens: bool = False


class _CallsSpentError(Exception):
    """The oracle was called as often as it may be."""


class _Counted(OracleCalculator):
    """The calls of another oracle, of which there are so many at most."""

    def __init__(self, oracle: OracleCalculator, at_most: int) -> None:
        super().__init__(oracle)
        self.oracle, self.at_most = oracle, at_most

    @property
    def spent(self) -> int:
        """Calls of the oracle itself; labels that were there already are none."""
        return self.oracle.calls

    def _label(self, atoms: Atoms) -> tuple[float, np.ndarray]:
        self.oracle.reason = self.reason
        if self.oracle.calls >= self.at_most and not self.oracle.is_shared(atoms):
            raise _CallsSpentError
        atoms.calc = self.oracle
        return atoms.get_potential_energy(), atoms.get_forces()


class GPReactionNetwork:
    """Explores the reactions around a minimum with few calls of a calculator of ASE (the oracle)::

        network = GPReactionNetwork(start, EMT())
        network.run(calls=100)
        for reaction in network.reactions:
            print(reaction.first, reaction.second, reaction.forward, reaction.sigma)

    Isolated or periodic; the cell does not change, constraints of the start hold.

    Attributes:
        minima, reactions, searches: found so far.
        surface: all labels so far; calls: of the oracle.
        ended: why the exploration ended; '' while it goes on.
    """

    def __init__(
        self,
        start: Atoms,
        calculator: Any = None,
        ways: Sequence[str] = DEFAULT_WAYS,
        seed: int = 0,
        surface: Surface | None = None,
    ) -> None:
        """Take a structure near a minimum, which is not changed and is relaxed first.

        Args:
            calculator: the oracle; that of the start if not given.
            ways: some of WAYS: turns about bonds, atoms that go over to others, bonds that break, the softest modes, the most uncertain of
                random directions.
            seed: of what is random.
            surface: labels that are there already.

        Raises:
            UserError: no calculator, a constraint that is not supported, atoms that cannot move against each other, an unknown way or none.
        """
        check_constraints(start, "The start")
        check_movable(start)
        calculator = start.calc if calculator is None else calculator
        if calculator is None:
            raise UserError("There is no calculator to label structures: give `calculator`, or set that of the start.")
        if not ways or (unknown := set(ways) - set(WAYS)):
            raise UserError(
                f"ways: there is no {', '.join(sorted(unknown)) if ways else 'way'}; give some of {', '.join(WAYS)}."
            )
        self.start, self.ways, self.seed = start.copy(), tuple(ways), seed
        self.oracle = OracleCalculator.around(calculator)
        self.surface = Surface(surface_recipe()) if surface is None else surface
        self.minima: list[Minimum] = []
        self.reactions: list[Reaction] = []
        self.searches: list[Search] = []
        self._open: list[list[_Way]] = []  # ways of each minimum that are still to be tried
        self.ended = ""

    @property
    def calls(self) -> int:
        """Of the oracle."""
        return self.oracle.calls

    def ways_left(self, minimum: Minimum) -> int:
        """How many ways out of a minimum were not tried yet."""
        return len(self._open[minimum.number - 1])

    def run(
        self, fmax: float = 0.03, calls: int = 200, highest: float = 3.0, foreseen: float = 0.01, minima: int = 20
    ) -> str:
        """Explore until it ends; see `irun`. Returns why."""
        for _ in self.irun(fmax, calls, highest, foreseen, minima):
            pass
        return self.ended

    def irun(
        self, fmax: float = 0.03, calls: int = 200, highest: float = 3.0, foreseen: float = 0.01, minima: int = 20
    ) -> Iterator[NetworkLabel | Search]:
        """Yield each label of a search and each search that is over, until every way of every minimum was tried, or there were so many
        calls of the oracle, or there are so many minima.

        Args:
            fmax, foreseen: of each search (GPSaddle.irun), eV/A and eV; fmax of relaxations too.
            highest: above the start, eV, to which minima are explored, and searches go, which on their way may be OVER higher.

        Raises:
            UserError: the start cannot be labelled or does not come to rest.
        """
        oracle = _Counted(self.oracle, calls)
        try:
            if not self.minima:
                self._begin(oracle, fmax)
            while (i := self._next_minimum(highest)) is not None:
                if len(self.minima) >= minima:
                    self.ended = f"there are {len(self.minima)} minima"
                    return
                yield from self._searched(i, self._open[i].pop(0), oracle, fmax, foreseen, highest)
            self.ended = f"every way of every minimum up to {highest:g} eV above the start was tried"
        except _CallsSpentError:
            self.ended = f"{calls} oracle calls were spent{'' if self.minima else ' before the start was at rest'}"

    def _begin(self, oracle: _Counted, fmax: float) -> None:
        """The start, relaxed."""
        search = GPSaddle(self.start, oracle, "random", surface=self.surface)
        search.begin(fmax)
        start, self.surface = _settled(search.start, search.surface, oracle, fmax, "the start")
        self._add_minimum(start, self.surface, 0)

    def _next_minimum(self, highest: float) -> int | None:
        """That of which the fewest ways were tried, among these the lowest."""
        tried = [sum(s.minimum == m.number for s in self.searches) for m in self.minima]
        left = [i for i, m in enumerate(self.minima) if self._open[i] and m.energy < highest]
        return min(left, key=lambda i: (tried[i], self.minima[i].energy), default=None)

    def _searched(
        self, i: int, way: _Way, oracle: _Counted, fmax: float, foreseen: float, highest: float
    ) -> Iterator[NetworkLabel | Search]:
        minimum, number, before = self.minima[i], len(self.searches) + 1, oracle.spent
        near = self._nearest(minimum.atoms)
        search = GPSaddle(
            minimum.atoms,
            oracle,
            way.direction,
            seed=self.seed + number,
            relax_start=False,
            surface=near,
            minima=[m.atoms for m in self.minima],
            saddles=[r.saddle for r in self.reactions],
            softens=way.softens,
        )
        reaction, spent = None, False
        try:
            for label in search.irun(fmax, PER_SEARCH, foreseen, highest + OVER - minimum.energy):
                yield NetworkLabel(number, minimum.number, way.name, oracle.spent, label)
            reaction, outcome = self._outcome(search, number, oracle, fmax)
        except SearchError as error:
            outcome = f"given up: {error}"
        except _CallsSpentError:
            outcome, spent = "cut off: the oracle calls were spent", True
            self._open[i].insert(0, way)
        finally:
            new = search.surface.labels[len(near.labels) :]
            self.surface = replace(self.surface, labels=(*self.surface.labels, *new), scores=search.surface.scores)
        self.searches.append(Search(number, minimum.number, way.name, outcome, reaction, oracle.spent - before))
        yield self.searches[-1]
        if spent:
            raise _CallsSpentError

    def _nearest(self, atoms: Atoms) -> Surface:
        """The surface of the labels that are nearest to a structure."""
        away = [difference(atoms, label) for label in self.surface.labels]
        chosen = sorted(k for k in np.argsort(away, kind="stable")[:NEAREST] if np.isfinite(away[k]))
        return replace(self.surface, labels=tuple(self.surface.labels[k] for k in chosen))

    def _outcome(self, search: GPSaddle, number: int, oracle: _Counted, fmax: float) -> tuple[int | None, str]:
        if search.known is not None:
            return search.known + 1, f"reaction {search.known + 1} again"
        if search.too_high and not search.converged:
            return None, "too high"
        if not search.converged or search.saddle is None:
            return None, "no saddle found"
        found = search.saddle
        again = find_same(found.atoms, [r.saddle for r in self.reactions], found.atoms.get_potential_energy())
        if again is not None:
            return again + 1, f"reaction {again + 1} again"
        if distance(*found.sides) < SAME:
            return None, "both sides are one minimum"
        numbers, sides = [], []
        for side in found.sides:
            at, place = self._minimum_of(side, search, number, oracle, fmax)
            numbers.append(at)
            sides.append(place)
        if distance(*sides) < SAME:
            return None, "both sides are one minimum"
        self._add_reaction(search, numbers, sides, number)
        reaction = self.reactions[-1]
        doubt = f" ({reaction.doubt})" if reaction.doubt else ""
        return reaction.number, f"reaction {reaction.number}: {reaction.first} → {reaction.second}{doubt}"

    def _minimum_of(
        self, side: Atoms, search: GPSaddle, number: int, oracle: _Counted, fmax: float
    ) -> tuple[int, Atoms]:
        """The number of a side among the minima, to which it is added if it is new, and where it is at rest."""
        for _ in range(2):  # where it was and where it settled
            i = find_same(side, [m.atoms for m in self.minima], side.get_potential_energy())
            if i is not None:
                return self.minima[i].number, side
            side, search.surface = _settled(side, search.surface, oracle, fmax, "a side of the saddle", search.atoms)
        return self._add_minimum(side, search.surface, number), side

    def _add_minimum(self, atoms: Atoms, surface: Surface, found_in: int) -> int:
        curvatures, vectors = _curvatures(surface, atoms)
        own, energy, sigma = _sigma(surface, atoms, curvatures, vectors), 0.0, 0.0
        if self.minima:
            first = self.minima[0]
            energy = atoms.get_potential_energy() - first.atoms.get_potential_energy()
            sigma = float(np.hypot(own, first.own_sigma))
        number, softest = len(self.minima) + 1, float(curvatures[0])
        self.minima.append(Minimum(number, atoms, energy, sigma, own, fragments(atoms), softest, found_in))
        self._open.append(self._ways(atoms, vectors))
        return len(self.minima)

    def _add_reaction(self, search: GPSaddle, numbers: list[int], sides: list[Atoms], found_in: int) -> None:
        found = search.saddle
        assert found is not None
        minima, mode = [self.minima[n - 1] for n in numbers], found.mode
        if numbers[0] > numbers[1]:
            minima, sides, mode = minima[::-1], sides[::-1], -mode
        energy = found.atoms.get_potential_energy()
        own = _sigma(search.surface, found.atoms, *_curvatures(search.surface, found.atoms))
        barriers = [energy - m.atoms.get_potential_energy() for m in minima]
        sigmas = [float(np.hypot(own, m.own_sigma)) for m in minima]
        self.reactions.append(
            Reaction(
                len(self.reactions) + 1,
                minima[0].number,
                minima[1].number,
                sides[0],
                found.atoms,
                sides[1],
                mode,
                energy - self.minima[0].atoms.get_potential_energy(),
                barriers[0],
                barriers[1],
                sigmas[0],
                sigmas[1],
                bond_changes(*sides),
                saddle_modes(search.surface, found.atoms).imaginary,
                found_in,
                tuple(dict.fromkeys(m.number for m in minima if m.doubt)),
            )
        )

    def _ways(self, atoms: Atoms, modes: np.ndarray) -> list[_Way]:
        """What is tried from a minimum, in order; ways that are one by symmetry once."""
        motions = free_motions(atoms)
        movable = np.flatnonzero(np.abs(motions).reshape(len(atoms), -1).max(axis=1) > 0).tolist()
        found = []
        for motion in proposed_motions(atoms, self.ways, movable):
            vectors = motions @ (motions.T @ motion.vectors(atoms).ravel())
            if np.linalg.norm(vectors) > 0:
                found.append(_Way(motion.name(atoms), motion, vectors.reshape(-1, 3)))
        for k in range(min(SOFT_MODES, modes.shape[1]) if "soft" in self.ways else 0):
            if all(abs(modes[:, k] @ way.vectors.ravel()) < ONE_WAY * np.linalg.norm(way.vectors) for way in found):
                for sign, name in ((1, ""), (-1, ", the other way")):
                    vectors = sign * modes[:, k].reshape(-1, 3)
                    found.append(_Way(f"soft mode {k + 1}{name}", vectors, vectors, True))
        ways: list[_Way] = []
        steps: list[Atoms] = []
        for way in found:
            step = atoms.copy()
            step.positions += FARTHEST * longest_one(way.vectors)
            if all(difference(step, other) > ALIKE for other in steps):
                ways, steps = [*ways, way], [*steps, step]
        return [*ways, *([_Way("uncertain", "uncertain", np.zeros(0))] if "uncertain" in self.ways else [])]


def _settled(
    atoms: Atoms, surface: Surface, oracle: _Counted, fmax: float, what: str, saddle: Atoms | None = None
) -> tuple[Atoms, Surface]:
    """Atoms at rest, pushed along a mode that goes down, away from a saddle, and relaxed again while there is one, and the surface with
    the labels of that; as far as it comes with PUSHES and the calls of the oracle."""
    for k in range(PUSHES):
        curvatures, vectors = _curvatures(surface, atoms)
        if curvatures[0] >= -FLAT:
            break
        away = atoms.get_forces(apply_constraint=False) if saddle is None else atoms.positions - saddle.positions
        pushed = atoms.copy()
        pushed.positions += (-1 if away.ravel() @ vectors[:, 0] < 0 else 1) * 2**k * APART * longest_one(vectors[:, 0])
        pushed.calc, oracle.reason = oracle, f"{what}, off a place that is no minimum"
        try:
            surface = relaxed_surface(pushed, surface, SETTLED * fmax, what)
        except (_CallsSpentError, SearchError):
            break
        pushed.calc = surface.labels[-1].calc
        atoms = pushed
    return atoms, surface


def _curvatures(surface: Surface, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, rising, eV/A^2, and vectors (3 atoms, k) of the model's Hessian within what can move."""
    motions = free_motions(atoms)
    moved = np.abs(motions).reshape(len(atoms), -1).max(axis=1) > 0
    rows = np.repeat(moved, 3)
    matrix = hessian(surface, atoms, np.flatnonzero(moved).tolist())
    values, vectors = np.linalg.eigh(motions[rows].T @ matrix @ motions[rows])
    return values, motions @ vectors


def _sigma(surface: Surface, atoms: Atoms, curvatures: np.ndarray, vectors: np.ndarray) -> float:
    """Standard deviation of the energy of a stationary point, eV: noise of its label, and ½ Σ f²/|κ|, which the forces that are left along
    its modes hide."""
    forces = vectors.T @ allowed_forces(atoms, atoms.get_forces(apply_constraint=False)).ravel()
    hidden = 0.5 * float((forces**2 / np.maximum(np.abs(curvatures), SOFTEST)).sum())
    return float(np.hypot(surface.potential.noise["energies"] * len(atoms), hidden))
