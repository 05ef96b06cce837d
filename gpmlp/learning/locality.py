"""Locality: how much of a force depends on atoms beyond a cutoff, so that a potential of that cutoff cannot know it.

With an oracle, atoms farther than R from a central one are redrawn, and the spread of the force on it is measured (Deringer and Csányi,
Phys. Rev. B 95, 094203 (2017)). Without one, small fits say from which cutoff on a longer one does not help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.geometry import get_distances
from scipy.optimize import minimize_scalar

from gpmlp.core import errors
from gpmlp.core.errors import UserError, chemical_symbol
from gpmlp.core.quantities import Targets, json_value
from gpmlp.core.structures import Structures
from gpmlp.fitting.cutoff_fits import CUTOFFS, CutoffFit, default_cutoff, fit_cutoffs
from gpmlp.fitting.report import Progress
from gpmlp.io.ase_atoms import structures_from_ase, to_ase
from gpmlp.io.files import check_folder
from gpmlp.learning.checkpoint import open_locked
from gpmlp.learning.labels import LabelEntry, LabelFile, LabelRefusal, canonical_structure, key_of
from gpmlp.learning.oracles.labeller import Labeller, check_refusal
from gpmlp.learning.oracles.oracle import OracleRecipe
from gpmlp.learning.oracles.single_point import FORCES
from gpmlp.potential.evaluation import evaluate
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe

RADII = (3.5, 4.5, 5.5, 6.5, 8.0)  # A
FEWEST_RADII = 3  # of these that there is room for; otherwise so many between half of the room and all of it
LEAST_ROOM = 2.0  # A, for any radius, unless they are given
MARGIN = 1.0  # A, around the sphere, of atoms to redraw before it meets its own images
CANDIDATES = 64  # atoms among which central ones with room are chosen
NEGLIGIBLE = 0.3  # share of the force error (9 % of its square) up to which what is beyond the cutoff does not matter
FLAT = 1.2  # noise, or error, of a small fit over that with a longer cutoff, up to which that does not help
FORESEEN = 20  # structures, whose error bars say what the force error is where there are no labels
LONGEST = 8.0  # A, that a cutoff may reasonably have
RESOLVED = 1e-6  # eV/A; smaller spreads are rounding
TAIL = 3  # of the radii, the longest, that tell how force constants decay
# exponents up to which that is called so; they are 3 between charges, and 8 where energies fall as r^-6
COULOMB, DISPERSION = 5.5, 10.5
BONDED = 4.5  # A, to which radii have to reach for any: nearer are bonds and what they hold together
DISTANT = 6.0  # A, the same for r^-6: nearer, what falls exponentially is as steep


@dataclass(frozen=True)
class Redraws:
    """What is redrawn.

    Attributes:
        radii: A; () for those of RADII that the structures have room for.
        displacement: standard deviation of each component, A.
        draws: for each radius and central atom; centres: number of central atoms.
        repeat: whether periodic cells that are too small for the longest radius are repeated.
    """

    radii: tuple[float, ...] = ()
    displacement: float = 0.1
    draws: int = 8
    centres: int = 8
    repeat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", tuple(sorted({float(radius) for radius in self.radii})))
        for name, value in (("displacement", self.displacement), *(("radii", radius) for radius in self.radii)):
            errors.check_positive(name, value)
        errors.check_integer("number of draws", self.draws, 2)
        errors.check_integer("number of central atoms", self.centres, 1)


@dataclass(frozen=True)
class LocalityFloor:
    """The spread of forces due to atoms beyond a radius.

    Attributes:
        radius: A.
        spread: rms over components and central atoms of the standard deviation of the force, eV/A; error: its standard error.
        species: the spread by symbol of the central atom.
        labels: that it is made of.
    """

    radius: float
    spread: float
    error: float
    species: dict[str, float]
    labels: int


@dataclass(frozen=True)
class DecayLaw:
    """How force constants fall off with distance.

    Attributes:
        kind: 'Coulomb', 'r^-6', 'exponential', or 'none' where nothing is left that could fall off, or radii are too few or short to tell.
        exponent: n of r^-n; length: λ of exp(-r/λ), A: the best of each kind, NaN where there is nothing to fit.
    """

    kind: str
    exponent: float = math.nan
    length: float = math.nan

    def ratio(self, start: float, end: float) -> float:
        """Spread beyond radius `end` over that beyond `start` (A) in bulk, where Σ r^-2n over all atoms beyond R falls as R^(3 - 2n)."""
        if self.kind == "none":
            return 1.0
        if self.kind == "exponential":
            return math.exp((start - end) / self.length)
        return (end / start) ** (1.5 - self.exponent)

    def reach(self, start: float, factor: float) -> float:
        """Radius (A) beyond which the spread is that factor, below 1, times that beyond `start`; infinite where nothing tells."""
        if self.kind == "none":
            return math.inf
        if self.kind == "exponential":
            return start - self.length * math.log(factor)
        return start * factor ** (1 / (1.5 - self.exponent)) if self.exponent > 1.5 else math.inf


@dataclass(frozen=True)
class Locality:
    """Whether a cutoff is long enough, and what that is judged by.

    Attributes:
        floors: by radius, with an oracle; law: of their decay; fits: by cutoff, without one.
        cutoff: that is judged, A; force_error: rmse of a model with it, eV/A; error_of: which model, on what.
        whole: radius of a sphere that holds every structure, A; infinite where one is periodic.
        settings: of the redraws.
    """

    floors: tuple[LocalityFloor, ...]
    fits: tuple[CutoffFit, ...]
    law: DecayLaw
    cutoff: float
    force_error: float
    error_of: str
    whole: float
    settings: Redraws

    @property
    def verdict(self) -> str:
        """'fine', 'longer cutoff', 'charges' or 'dispersion'; 'unknown' where there is no force error to compare with."""
        return self._judged[0]

    @property
    def sentence(self) -> str:
        """The verdict with its reasons."""
        return self._judged[1]

    @property
    def floor(self) -> float:
        """Spread due to atoms beyond the cutoff that is judged, eV/A, between radii and beyond them by the law."""
        known = [(f.radius, f.spread) for f in self.floors]
        for (a, low), (b, high) in zip(known, known[1:], strict=False):
            if a <= self.cutoff <= b and min(low, high) > RESOLVED:
                return low * (high / low) ** ((self.cutoff - a) / (b - a))
        radius, spread = min(known, key=lambda one: abs(one[0] - self.cutoff))
        return spread * (1.0 if radius == self.cutoff else self.law.ratio(radius, self.cutoff))

    @property
    def _judged(self) -> tuple[str, str]:
        return _judge_floors(self) if self.floors else _judge_fits(self.fits, self.cutoff)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, units in the keys; null where there is no number."""
        floors = [
            {
                "radius_A": one.radius,
                "spread_meV_per_A": 1e3 * one.spread,
                "standard_error_meV_per_A": 1e3 * one.error,
                "spread_by_species_meV_per_A": {symbol: 1e3 * value for symbol, value in one.species.items()},
                "labels": one.labels,
            }
            for one in self.floors
        ]
        fits = [
            {"cutoff_A": one.cutoff, "noise_meV_per_A": 1e3 * one.noise, "force_rmse_meV_per_A": 1e3 * one.rmse}
            for one in self.fits
        ]
        content = {
            "verdict": self.verdict,
            "sentence": self.sentence,
            "floors": floors,
            "decay": {"kind": self.law.kind, "exponent": self.law.exponent, "length_A": self.law.length},
            "fits": fits,
            "cutoff_A": self.cutoff,
            "floor_at_cutoff_meV_per_A": 1e3 * self.floor if floors and self.cutoff == self.cutoff else None,
            "force_error_meV_per_A": 1e3 * self.force_error,
            "force_error_of": self.error_of,
        }
        if floors:
            chosen = self.settings
            content |= {"displacement_A": chosen.displacement, "draws": chosen.draws, "seed": chosen.seed}
        return json_value(content)


def _judge_floors(found: Locality) -> tuple[str, str]:
    last = found.floors[-1]
    if found.law.kind == "none":
        left = (
            "the radii are too few or too short to tell how that decays"
            if last.spread > RESOLVED
            else "nothing is left"
        )
        decay = f"{left} beyond {last.radius:g} A"
    elif found.law.kind == "exponential":
        decay = f"it falls exponentially, by a factor e every {found.law.length:.2g} A"
    else:
        what = "as between charges" if found.law.kind == "Coulomb" else "as dispersion does"
        decay = f"force constants fall as r^-{found.law.exponent:.1f}, {what}"
    if not found.force_error == found.force_error:
        text = f"The spread due to atoms beyond {last.radius:g} A is {1e3 * last.spread:.2g} meV/A; {decay}."
        return "unknown", f"{text} With a model, or labels, it would be compared with a force error."
    floor, error = found.floor, found.force_error
    text = (
        f"Atoms beyond the cutoff of {found.cutoff:.3g} A move forces by {1e3 * floor:.2g} meV/A, {100 * floor / error:.0f} % of "
        f"the force error ({1e3 * error:.3g} meV/A, {found.error_of}); {decay}."
    )
    if floor <= NEGLIGIBLE * error:
        return "fine", f"Fine as it is: {text[0].lower()}{text[1:]}"
    enough = min(
        found.law.reach(found.cutoff, NEGLIGIBLE * error / floor),
        found.whole,
        *(f.radius for f in found.floors if f.radius > found.cutoff and f.spread <= NEGLIGIBLE * error),
    )
    cutoff = f"a cutoff of {enough:.1f} A would make that {100 * NEGLIGIBLE:.0f} %"
    cutoff = cutoff if enough < math.inf else "longer radii would say which"
    if found.law.kind in ("exponential", "none") or found.whole <= LONGEST:
        return "longer cutoff", f"Take a longer cutoff: {cutoff}. {text}"
    advice = f"; {cutoff}" if enough <= LONGEST else ""
    if found.law.kind == "Coulomb":
        return "charges", f"Add charges (long_range: {{charges: auto}}){advice}. {text}"
    return "dispersion", f"Add dispersion (long_range: {{dispersion: ...}}){advice}. {text}"


def _judge_fits(fits: Sequence[CutoffFit], cutoff: float) -> tuple[str, str]:
    flat = next(
        f
        for i, f in enumerate(fits)
        if all(f.noise <= FLAT * g.noise and f.rmse <= FLAT * g.rmse for g in fits[i + 1 :])
    )
    at = min(fits, key=lambda f: abs(f.cutoff - cutoff))
    numbers = f"{1e3 * flat.noise:.3g} and {1e3 * flat.rmse:.3g} meV/A; with {at.cutoff:.3g} A {1e3 * at.noise:.3g} and {1e3 * at.rmse:.3g}"
    what = "Noise of forces and error on held-out structures of small fits"
    text = f"{what} are flat from {flat.cutoff:.3g} A on ({numbers})"
    if flat.cutoff <= cutoff:
        return "fine", f"{text}: the cutoff of {cutoff:.3g} A is fine as it is."
    if flat is not fits[-1]:
        return "longer cutoff", f"{text}: take a longer cutoff than {cutoff:.3g} A."
    return "longer cutoff", (
        f"{what} still fall at the longest cutoff, {flat.cutoff:.3g} A ({numbers}): take a longer one. With an oracle (--oracle) it can be "
        "told whether charges or dispersion are what is missing."
    )


# ------------------------------------------------------------ with an oracle


@dataclass(frozen=True)
class Sphere:
    """A central atom and how far all atoms are from it.

    Attributes:
        structure: one structure; atom: the central one.
        distances: (atoms,) A, of the nearest image.
    """

    structure: Structures
    atom: int
    distances: np.ndarray

    @staticmethod
    def around(structure: Structures, atom: int) -> Sphere:
        where, cell = structure.positions.cpu().double().numpy(), structure.cells[0].cpu().double().numpy()
        _, distances = get_distances(where[[atom]], where, cell=cell, pbc=structure.periodic[0].numpy())
        return Sphere(structure, atom, distances[0])

    @property
    def symbol(self) -> str:
        return chemical_symbol(int(self.structure.species[self.atom]))

    @property
    def room(self) -> float:
        """Radius (A) beyond which there are atoms to redraw, and that leaves MARGIN between the sphere and its images."""
        return min(float(self.distances.max()), 0.5 * _least_height(self.structure) - MARGIN)


def _heights(structure: Structures) -> np.ndarray:
    """(3,) A, of the cell along its three axes; infinite along those that are not periodic."""
    cell, periodic = structure.cells[0].cpu().double().numpy(), structure.periodic[0].numpy()
    filled = np.where(periodic[:, None], cell, 0.0)
    if not periodic.any():
        return np.full(3, np.inf)
    # 1/|b*| with reciprocal vectors within the space of the periodic axes
    return np.where(periodic, 1 / np.maximum(np.linalg.norm(np.linalg.pinv(filled), axis=0), 1e-12), np.inf)


def _least_height(structure: Structures) -> float:
    return float(_heights(structure).min())


def _repeated(structure: Structures, radius: float) -> Structures:
    heights = _heights(structure)
    times = [1 if math.isinf(h) else max(1, math.ceil(2 * (radius + MARGIN) / h + 1e-9)) for h in heights]
    if max(times) == 1:
        return structure
    return structures_from_ase(
        [to_ase(structure)[0].repeat(times)], [f"{structure.names[0]}, {'x'.join(map(str, times))}"]
    )


def _candidates(structures: Structures, chosen: Redraws, radius: float) -> Iterator[Sphere]:
    """Atoms drawn at random: of each structure in turn one of each species, until all are used up."""
    rng = np.random.default_rng([chosen.seed, 0])
    order, turn, left = rng.permutation(len(structures)), 0, True
    while left:
        left = False
        for s in order:
            structure = structures.select([int(s)])
            if chosen.repeat:
                structure = _repeated(structure, radius)
            for z in structure.distinct_species:
                atoms = (structure.species == z).nonzero()[:, 0].numpy()
                if turn < len(atoms):
                    left = True
                    shuffled = np.random.default_rng([chosen.seed, 1, int(s), z]).permutation(atoms)
                    yield Sphere.around(structure, int(shuffled[turn]))
        turn += 1


def draw_spheres(
    structures: Structures, chosen: Redraws, cutoff: float = math.nan
) -> tuple[list[Sphere], tuple[float, ...]]:
    """Central atoms with room for all radii, and these.

    Args:
        cutoff: A, that becomes one of the radii where they are not given and there is room; NaN = none.

    Raises:
        UserError: no structure has room; says which has most.
    """
    longest = chosen.radii[-1] if chosen.radii else RADII[-1]
    candidates = []
    for sphere in _candidates(structures, chosen, longest):
        candidates.append(sphere)
        if len(candidates) >= max(CANDIDATES, chosen.centres):
            break
    roomy = sorted(candidates, key=lambda sphere: -sphere.room)
    needed = chosen.radii[-1] if chosen.radii else LEAST_ROOM
    if roomy[0].room <= needed:
        raise UserError(_no_room(roomy[0], needed, chosen.repeat))
    radii = chosen.radii
    if not radii:
        room = max(roomy[min(chosen.centres, len(roomy)) - 1].room, LEAST_ROOM)
        radii = tuple(sorted(r for r in {*RADII, *([cutoff] if cutoff == cutoff else [])} if r < room))
        if len(radii) < FEWEST_RADII:
            radii = tuple(round(r, 2) for r in np.linspace(0.5, 0.95, FEWEST_RADII + 1) * room)
    return [sphere for sphere in candidates if sphere.room > radii[-1]][: chosen.centres], radii


def _no_room(best: Sphere, radius: float, repeated: bool) -> str:
    name, farthest = best.structure.names[0], float(best.distances.max())
    if best.room < farthest:
        height = _least_height(best.structure)
        return (
            f"The cells are too small for R = {radius:g} A: that of {name}, which has most room, is {height:.3g} A across, and "
            f"2 (R + {MARGIN:g} A) are needed, so that R is at most {max(best.room, 0):.2f} A. Take shorter radii (--radii), larger "
            "cells, or let them be repeated (--repeat)."
        )
    return (
        f"No atom lies beyond R = {radius:g} A of another one: in {name}, which has most room, the farthest is at {farthest:.2f} A. "
        f"Take shorter radii (--radii){'' if repeated else ', or larger structures'}."
    )


def measure_floors(
    spheres: Sequence[Sphere],
    radii: Sequence[float],
    oracle: OracleRecipe,
    folder: Path,
    chosen: Redraws,
    progress: Progress = lambda *_: None,
) -> tuple[LocalityFloor, ...]:
    """Spread of the force on each central atom over draws in which all atoms beyond a radius are displaced.

    Labels are appended to FOLDER/labels.xyz as they come, and not asked for again.

    Raises:
        UserError: the oracle cannot be used, contradicts itself, or failed too often (names the structure).
    """
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [(i, j, k) for i in range(len(spheres)) for j in range(len(radii)) for k in range(chosen.draws)]
    forces = np.full((len(spheres), len(radii), chosen.draws, 3), np.nan)
    with closing(open_locked(folder / "locality.lock")), Labeller(oracle, folder) as labeller:
        labels = LabelFile(folder / "labels.xyz")
        sent = 0
        progress("oracle", 0, len(tasks), "")
        for n, (i, j, k) in enumerate(tasks):
            while sent < min(len(tasks), n + 2 * oracle.workers):
                a, b, c = tasks[sent]
                _submit(labeller, labels, _redrawn(spheres[a], radii[b], c, a, chosen))
                sent += 1
            structure = _redrawn(spheres[i], radii[j], k, i, chosen)
            found = _collect(labeller, labels, structure)
            if found is not None:
                forces[i, j, k] = found.forces[spheres[i].atom].numpy()
            progress("oracle", n + 1, len(tasks), structure.names[0])
    return tuple(_floor(spheres, radii[j], forces[:, j]) for j in range(len(radii)))


def _redrawn(sphere: Sphere, radius: float, draw: int, number: int, chosen: Redraws) -> Structures:
    """The structure with all atoms beyond the radius displaced; the same deviates for each radius, so that floors compare."""
    deviates = np.random.default_rng([chosen.seed, 2, number, draw]).standard_normal((len(sphere.distances), 3))
    moved = torch.from_numpy(chosen.displacement * deviates * (sphere.distances > radius)[:, None])
    structure = sphere.structure
    where = f"{structure.names[0]}, all beyond {radius:g} A of {sphere.symbol} atom {sphere.atom} redrawn, draw {draw}"
    return canonical_structure(replace(structure, positions=structure.positions.cpu().double() + moved, names=(where,)))


def _submit(labeller: Labeller, labels: LabelFile, structure: Structures) -> None:
    key = key_of(structure, labeller.recipe.settings_hash)
    if key not in labels and labels.refusal(key) is None:
        first = not len(labels) and labeller.recipe.check_every
        labeller.submit(key, structure, (FORCES,) if first else ())


def _collect(labeller: Labeller, labels: LabelFile, structure: Structures) -> Targets | None:
    """The label of a structure, once it is in the file; None if the oracle has none."""
    oracle, name = labeller.recipe, structure.names[0]
    key = key_of(structure, oracle.settings_hash)
    if (entry := labels.find(key)) is not None:
        return entry.targets
    refusal = labels.refusal(key)
    if refusal is None:
        answer = labeller.result(key)
        if not isinstance(answer, LabelRefusal):
            entry = LabelEntry(structure, answer.targets, key, name, oracle.settings_hash)
            targets = labels.append(entry).targets
            labeller.forget(key)
            return targets
        if answer.contradiction:
            raise UserError(
                f"{name}: the oracle contradicts itself: {answer.reason} (its files are in {answer.folder})."
            )
        labels.refuse(refusal := answer)
        labeller.forget(key)
    try:
        check_refusal(oracle, refusal, labels.refused_in_a_row, begun=len(labels) > 0)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return None


def _floor(spheres: Sequence[Sphere], radius: float, forces: np.ndarray) -> LocalityFloor:
    """From forces (spheres, draws, 3); NaN where there is no label."""
    known = np.isfinite(forces[..., 0])
    if not (known.sum(1) > 1).any():
        raise UserError(
            f"The oracle gave less than two labels for each central atom at R = {radius:g} A; see refused.jsonl."
        )
    enough = known.sum(1) > 1
    variances = np.array([f[k].var(axis=0, ddof=1).mean() for f, k in zip(forces[enough], known[enough], strict=True)])
    spread = math.sqrt(variances.mean())
    if len(variances) > 1:
        scatter = variances.std(ddof=1) / math.sqrt(len(variances))
    else:  # of χ² with 3 (draws - 1) degrees of freedom
        scatter = variances[0] * math.sqrt(2 / (3 * (known[enough].sum() - 1)))
    error = float(scatter / (2 * spread)) if spread > 0 else 0.0
    symbols = np.array([sphere.symbol for sphere in spheres])[enough]
    species = {str(symbol): math.sqrt(variances[symbols == symbol].mean()) for symbol in dict.fromkeys(symbols)}
    return LocalityFloor(radius, spread, error, species, int(known.sum()))


def fit_decay(floors: Sequence[LocalityFloor], spheres: Sequence[Sphere]) -> DecayLaw:
    """The decay of force constants Φ that the spreads beyond the longest radii agree with.

    spread² ∝ Σ Φ(r)² over the atoms that are redrawn, at their distances r: Φ = r^-n and Φ = exp(-r/λ) are fitted to the logarithms.
    Radii beyond which the same atoms lie are one point.
    """
    # atoms that a longer radius redraws are among those of a shorter one, so that equal numbers are the same atoms
    redrawn = {sum(int((s.distances > f.radius).sum()) for s in spheres): f for f in floors}
    resolved = [f for f in redrawn.values() if f.spread > RESOLVED][-TAIL:]
    if len(resolved) < 2:
        return DecayLaw("none")
    logs = np.log([f.spread for f in resolved])
    far = [sphere.distances[sphere.distances > resolved[0].radius] for sphere in spheres]

    def misfit(log_phi: list[np.ndarray]) -> float:
        shift = max(float(values.max()) for values in log_phi)
        sums = [
            sum(np.exp(2 * (v - shift))[r > f.radius].sum() for v, r in zip(log_phi, far, strict=True))
            for f in resolved
        ]
        return float((logs - 0.5 * np.log(np.maximum(sums, 1e-300))).var())

    def best(log_phi: Callable[[float, np.ndarray], np.ndarray], bounds: tuple[float, float]) -> float:
        return float(minimize_scalar(lambda v: misfit([log_phi(v, r) for r in far]), bounds=bounds, method="bounded").x)

    exponent = best(lambda n, r: -n * np.log(r), (0.5, 60.0))
    length = 1 / best(lambda rate, r: -rate * r, (0.02, 15.0))
    if exponent <= COULOMB:
        return DecayLaw("Coulomb" if resolved[-1].radius >= BONDED else "none", exponent, length)
    dispersion = exponent <= DISPERSION and resolved[-1].radius >= DISTANT
    return DecayLaw("r^-6" if dispersion else "exponential", exponent, length)


# ------------------------------------------------------------ both


def locality(
    structures: Structures,
    targets: Targets | None = None,
    oracle: OracleRecipe | None = None,
    potential: Potential | None = None,
    folder: Path = Path("locality"),
    redraws: Redraws | None = None,
    recipe: Recipe | None = None,
    progress: Progress = lambda *_: None,
) -> Locality:
    """Judge whether a cutoff is long enough for the forces in structures like these.

    With an oracle all atoms farther than R from a central one are redrawn, and the spread of the force on it is compared with the force
    error of the potential. Without one, small fits with different cutoffs show where a longer one stops to help. A force F = -∂E/∂r of
    local energies sees up to twice their cutoff, through neighbours in common; what is compared is what no direct term of that cutoff has.

    Args:
        targets: labels; needed without an oracle, and for the force error.
        oracle: which code computes forces, as in a learning run.
        potential: whose cutoff and force error are judged; None: those of a small fit to the labels by `recipe`.
        folder: keeps the labels of the oracle (labels.xyz), so that the same call goes on after an interruption.
        redraws: what is redrawn; its radii are the cutoffs of the small fits where there is no oracle.
        progress: called as progress(stage, done, total, note).

    Raises:
        UserError: a radius for which no structure has room; an oracle that fails (names the structure); neither oracle nor forces.
    """
    chosen, recipe = redraws or Redraws(), recipe or Recipe()
    labelled = targets is not None and bool(targets.forces.isfinite().any())
    if oracle is None and not labelled:
        raise UserError(
            "The data have no forces that small fits could learn; give labelled data, or an oracle (--oracle RECIPE)."
        )
    cutoff, error, error_of = math.nan, math.nan, ""
    if potential is not None:
        cutoff = potential.cutoff
        error, error_of = _model_error(potential, structures, targets if labelled else None, chosen.seed, progress)
    elif labelled:
        assert targets is not None
        cutoff = default_cutoff(structures, targets, recipe)
    if oracle is None:
        assert targets is not None
        cutoffs = sorted({*(chosen.radii or CUTOFFS), cutoff})
        fits = fit_cutoffs(structures, targets, recipe, cutoffs, chosen.seed, progress)
        return Locality((), fits, DecayLaw("none"), cutoff, error, error_of, math.inf, chosen)
    if potential is None and labelled:
        assert targets is not None
        (one,) = fit_cutoffs(structures, targets, recipe, [cutoff], chosen.seed, progress)
        error, error_of = one.rmse, "small fit, held-out structures"
    spheres, radii = draw_spheres(structures, chosen, cutoff)
    floors = measure_floors(spheres, radii, oracle, folder, chosen, progress)
    isolated = not bool(structures.periodic.any())
    whole = max(float(sphere.distances.max()) for sphere in spheres) if isolated else math.inf
    return Locality(floors, (), fit_decay(floors, spheres), cutoff, error, error_of, whole, chosen)


def _model_error(
    potential: Potential, structures: Structures, targets: Targets | None, seed: int, progress: Progress
) -> tuple[float, str]:
    """Rmse of force components (eV/A), by the labels or, without them, as the potential itself predicts it; and which it is."""
    if targets is not None:
        return 1e-3 * evaluate(
            potential, structures, targets, progress, False
        ).overall.force_rmse_meV_per_A, "model, labels of the data"
    if potential.variances is None:
        raise UserError(
            "The data have no forces and the model no error bars to judge it by; give labelled data, or another model."
        )
    some = np.random.default_rng([seed, 3]).permutation(len(structures))[:FORESEEN].tolist()
    variance = potential(structures.select(some), variance="forces").forces_variance
    assert variance is not None
    return float(variance.total.mean().sqrt()), "model, its own error bars"
