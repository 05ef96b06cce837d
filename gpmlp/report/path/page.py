"""The page about a reaction path, a saddle or a relaxation: what came of it, how sure it is, and what was labelled and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from gpmlp.learning.paths.band import BandLabel
from gpmlp.learning.paths.run import PathOutcome, RelaxOutcome, RelaxStep, SaddleOutcome
from gpmlp.learning.paths.saddle import SaddleLabel
from gpmlp.learning.paths.vibrations import SOFT, SaddleModes
from gpmlp.report.drawing import TURN, draw_atoms
from gpmlp.report.figures import Picture
from gpmlp.report.page import Page, Section
from gpmlp.report.path.figures import foreseen_picture, path_picture, relaxation_picture, saddle_picture
from gpmlp.report.style import format_number, join_words, species_colours

MOST = 56  # atoms of a drawing, the nearest to what moves
FARTHEST = 6.0  # A from what moves, in a periodic structure
ARROW = 1.2  # A, the longest
LEAST_SIGMA = 5e-4  # eV; errors are compared with no less
SETTINGS = Section("recipe", "Which settings were used?", "", "Those of the recipe, and defaults.")
FILES = {"neb": "path.html", "saddle": "saddle.html", "relax": "relaxed.html", "network": "network.html"}
RINGED = "Ringed: the atom that moves most. In periodic structures the atoms around it are drawn."
PATH_WORDS = {
    "caption": "Energies less that of the start, by the model after the last label; rings and counts: images that were labelled.",
    "drawn": RINGED,
}
SADDLE_WORDS = {
    "caption": "Energies less that of the start. The bar is the model's; energies of minima are the oracle's.",
    "drawn": "Arrows: the mode that goes down on both sides. " + RINGED,
}
RELAX_WORDS = {"caption": "Energies and forces of the oracle, label by label.", "drawn": RINGED}


@dataclass(frozen=True, eq=False)
class _Search:
    """What the pages of a path and of a saddle share.

    Attributes:
        answer: to how high the barrier is; structures: name, energy and drawing of each, and no warning.
        errors, sigmas: (labels,) eV, of energies as they were foreseen; places: (labels,) words, where and why.
        more_calls: of relaxations; course: the figure; words: caption, and what drawings show.
    """

    answer: str
    structures: Sequence[tuple[str, str, Markup, str]]
    modes: SaddleModes
    labels: Sequence[BandLabel] | Sequence[SaddleLabel]
    places: Sequence[str]
    errors: np.ndarray
    sigmas: np.ndarray
    more_calls: int
    course: Picture
    words: Mapping[str, str]


def path_page(outcome: PathOutcome, labels: Sequence[BandLabel], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp neb`. Raises UserError: matplotlib is not installed."""
    path, numbers = outcome.path, outcome.numbers
    drawn = [(0, "start"), (path.top, "top"), (len(path.images) - 1, "end")]
    moved = path.images[-1].positions - path.images[0].positions
    structures = [
        (name, f"{_signed(path.energies[i])} eV", draw_structure(path.images[i], moved, name), "") for i, name in drawn
    ]
    answer = (
        f"{path.barrier:.3f} ± {path.sigma:.2g} eV, and {numbers['reverse_barrier_eV']:.3f} eV from the other end; the reaction takes "
        f"{_signed(path.reaction_energy)} ± {path.reaction_sigma:.2g} eV.{_ended(outcome.converged, labels[-1].force, 'top')}"
    )
    places = [f"image {label.image}: {label.reason}" for label in labels]
    errors, sigmas = (np.array([getattr(x, name) for x in labels]) for name in ("error", "image_sigma"))
    calls, course = numbers["oracle_calls_end_points"], path_picture(path, labels)
    search = _Search(answer, structures, outcome.modes, labels, places, errors, sigmas, calls, course, PATH_WORDS)
    return _search_page("Reaction path", "neb", path.images[0], search, numbers, recipe)


def saddle_page(outcome: SaddleOutcome, labels: Sequence[SaddleLabel], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp saddle`. Raises UserError: matplotlib is not installed."""
    saddle, numbers = outcome.saddle, outcome.numbers
    start, mode = saddle.start.get_potential_energy(), saddle.mode
    sides = [
        (f"side {i + 1}", side, side.get_potential_energy() - start)
        for i, side in enumerate(saddle.sides)
        if side is not saddle.start
    ]
    shown = [("start", saddle.start, 0.0), ("saddle", saddle.atoms, saddle.barrier), *sides]
    structures = [
        (name, f"{_signed(energy)} eV", draw_structure(atoms, mode, name, mode if name == "saddle" else None), "")
        for name, atoms, energy in shown
    ]
    joins = {
        True: " The start lies on one side: this is the barrier of one step from it.",
        False: " Neither side is the start: this is not the barrier of one step from it.",
        None: "",
    }[saddle.joins_start]
    ended = _ended(outcome.converged, numbers["largest_force_eV_per_A"], "saddle")
    limit = f" It went higher than highest_eV, {recipe['highest_eV']:g} eV." if numbers["highest_eV_met"] else ""
    answer = f"{saddle.barrier:.3f} ± {saddle.sigma:.2g} eV above the start.{joins}{ended}{limit}"
    errors, sigmas = (np.array([getattr(x, name) for x in labels]) for name in ("error", "sigma"))
    calls, places = numbers["oracle_calls_relaxations"], [label.reason for label in labels]
    course = saddle_picture(saddle)
    search = _Search(answer, structures, outcome.modes, labels, places, errors, sigmas, calls, course, SADDLE_WORDS)
    return _search_page("Saddle", "saddle", saddle.start, search, numbers, recipe)


def relaxation_page(outcome: RelaxOutcome, steps: Sequence[RelaxStep], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp relax`. Raises UserError: matplotlib is not installed."""
    start, atoms, last = outcome.start, outcome.atoms, steps[-1]
    moved = atoms.positions - start.positions
    structures = [(name, "", draw_structure(x, moved, name), "") for name, x in (("start", start), ("relaxed", atoms))]
    ended = "" if outcome.converged else " It did not come to rest: go on with more labels."
    answer = (
        f"{steps[0].energy - last.energy:.3f} eV below where it began, no atom farther than {np.linalg.norm(moved, axis=1).max():.2f} Å "
        f"from there; the largest force is {last.force:.3f} eV/Å.{ended}"
    )
    learned = f"{len(steps)} structures, each where the model of those before it came to rest, or had moved 0.3 Å."
    sections = [
        Section("course", "Where did it come to rest?", "", answer),
        Section("steps", "What was labelled?", "", learned),
        SETTINGS,
    ]
    tiles = [
        (f"{last.energy:.4f} eV", "energy"),
        (str(outcome.numbers["oracle_calls"]), "oracle calls"),
        (f"{last.force:.3f} eV/Å", "largest force"),
    ]
    values = {"structures": structures, "steps": steps, "recipe": recipe, **RELAX_WORDS}
    return reaction_page("Relaxation", "relax", start, tiles, sections, {"course": relaxation_picture(steps)}, values)


def _search_page(
    kind: str, name: str, start: Any, search: _Search, numbers: Mapping[str, Any], recipe: Mapping[str, Any]
) -> Page:
    errors, sigmas, calls = search.errors, search.sigmas, search.more_calls
    height = "energy_above_start" if numbers["barrier_eV"] is None else "barrier"
    sections = [
        Section("course", "How high is the barrier?", "", search.answer),
        Section("modes", "Is the top a saddle?", "", modes_answer(search.modes)),
        Section("labels", "What was labelled, and was it foreseen?", "", foreseen_answer(errors, sigmas, calls)),
        SETTINGS,
    ]
    tiles = [
        (f"{numbers[f'{height}_eV']:.3f} eV", height.replace("_", " ")),
        (f"± {numbers[f'{height}_sigma_eV']:.2g} eV", "its standard deviation"),
        (str(numbers["oracle_calls"]), "oracle calls of the search"),
        (str(calls), "of relaxations"),
    ]
    found = zip(search.labels, search.places, errors, sigmas, strict=True)
    rows = [
        {"label": label, "where": place, "error": 1000 * error, "z": error / max(sigma, LEAST_SIGMA)}
        for label, place, error, sigma in found
    ]
    frequencies = [(format_number(abs(f)), f < 0) for f in search.modes.frequencies if abs(f) > SOFT]
    pictures = {"course": search.course, "foreseen": foreseen_picture(search.labels, errors, sigmas)}
    values = {"structures": search.structures, "rows": rows, "frequencies": frequencies, "recipe": recipe}
    return reaction_page(kind, name, start, tiles, sections, pictures, {**values, **search.words})


def reaction_page(
    kind: str,
    name: str,
    start: Any,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    pictures: Mapping[str, Picture],
    values: Mapping[str, Any],
) -> Page:
    """What is common to the pages of this folder; `name`: of the file with its numbers."""
    return Page(
        template="network.html" if name == "network" else "path.html",
        kind=kind,
        title=f"{kind} of {start.get_chemical_formula()}",
        about=[("Atoms", str(len(start))), ("Periodic", "yes" if start.pbc.any() else "no")],
        tiles=tiles,
        sections=sections,
        pictures=pictures,
        values=values,
        file=FILES[name],
        numbers_in=f"{name}.json",
    )


def _signed(energy: float) -> str:
    """With its sign, to a meV; never −0."""
    return f"{round(energy, 3) + 0.0:+.3f}".replace("-", "−")


def _ended(converged: bool, force: float, what: str) -> str:
    if not converged:
        return f" It has not converged: the largest force at the last label is {force:.3f} eV/Å."
    return f" The oracle's own largest force at the {what} is {force:.3f} eV/Å or less."


def modes_answer(modes: SaddleModes) -> str:
    """Whether it is a saddle of first order, by the model's frequencies."""
    imaginary = [f"{f:.0f}i\u00a0cm⁻¹" for f in modes.imaginary]
    if len(imaginary) == 1:
        return f"Yes: one imaginary frequency, {imaginary[0]}, by the model."
    if not imaginary:
        return "No: the model has no imaginary frequency there. It is a minimum, or the model is not sure of its curvature."
    return f"Not of first order: {len(imaginary)} imaginary frequencies, {join_words(imaginary)}, by the model."


def foreseen_answer(errors: np.ndarray, sigmas: np.ndarray, more_calls: int) -> str:
    """How many labels, and how many within two standard deviations of what was foreseen."""
    within = int((np.abs(errors) < 2 * np.maximum(sigmas, LEAST_SIGMA)).sum())
    more = f", besides {more_calls} of relaxations" if more_calls else ""
    return (
        f"{len(errors)} structures{more}. Of their energies {within} lay within 2 σ of what the model foresaw; the last one was off by "
        f"{format_number(1000 * abs(float(errors[-1])), 2)} meV."
    )


def draw_structure(
    atoms: Any, moved: np.ndarray, name: str, motion: np.ndarray | None = None, ring: bool = True
) -> Markup:
    """Inline SVG of a molecule in its own plane, or of the atoms of a periodic structure around the one that moves most.

    Args:
        atoms: of ASE; moved: (atoms, 3), in which that atom moves most; motion: drawn as arrows; ring: around that atom, where there are
            no arrows.
    """
    far = int(np.linalg.norm(moved, axis=1).argmax())
    if atoms.pbc.any():
        vectors = atoms.get_distances(far, range(len(atoms)), mic=True, vector=True)
        turn = TURN @ np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # surfaces are above
        order = np.argsort(np.linalg.norm(vectors, axis=1), kind="stable")[:MOST]
        shown = order[np.linalg.norm(vectors[order], axis=1) < FARTHEST]
    else:
        vectors, shown = atoms.positions - atoms.positions.mean(axis=0), np.arange(len(atoms))
        turn = np.linalg.svd(vectors, full_matrices=True)[2]
    vectors, numbers = vectors[shown], atoms.numbers[shown]
    view = vectors @ turn.T
    view -= 0.5 * (view.min(axis=0) + view.max(axis=0))
    reach = 0.8 + float(np.linalg.norm(view, axis=1).max())
    arrows = None
    if motion is not None:
        arrows = ARROW * motion[shown] @ turn.T / np.linalg.norm(motion, axis=1).max()
    colours = species_colours(np.unique(atoms.numbers).tolist())
    ringed = int(np.flatnonzero(shown == far)[0]) if ring and motion is None else None
    return draw_atoms(vectors, numbers, view, reach, colours, name, ringed, arrows)
