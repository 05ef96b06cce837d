"""The page about a reaction path, a saddle or a relaxation: what came of it, how sure it is, and what was labelled and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from gpmlp.learning.paths.band import BandLabel
from gpmlp.learning.paths.run import PathOutcome, RelaxOutcome, RelaxStep, SaddleOutcome
from gpmlp.learning.paths.saddle import SaddleLabel
from gpmlp.learning.paths.vibrations import SOFT, SaddleModes
from gpmlp.report.drawing import TURN, draw_atoms
from gpmlp.report.figures import Picture, PointLabels
from gpmlp.report.page import Page, Section
from gpmlp.report.path.figures import foreseen_picture, path_picture, relaxation_picture, saddle_picture
from gpmlp.report.style import format_number, join_words, species_colours

if TYPE_CHECKING:
    from ase import Atoms

MOST = 56  # atoms of a drawing, the nearest to what moves
FARTHEST = 6.0  # A from what moves, in a periodic structure
ARROW = 1.2  # A, the longest
LEAST_SIGMA = 5e-4  # eV; errors are compared with no less
FILES = {"neb": "path.html", "saddle": "saddle.html", "relax": "relaxed.html"}
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


def path_page(outcome: PathOutcome, labels: Sequence[BandLabel], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp neb`. Raises UserError: matplotlib is not installed."""
    path, numbers = outcome.path, outcome.numbers
    drawn = [(0, "start"), (path.top, "top"), (len(path.images) - 1, "end")]
    moved = path.images[-1].positions - path.images[0].positions
    structures = [
        (name, f"{path.energies[i]:+.3f} eV", draw_structure(path.images[i], moved, name)) for i, name in drawn
    ]
    errors, sigmas = np.array([label.error for label in labels]), np.array([label.image_sigma for label in labels])
    rows = [_row(x, f"image {x.image}: {x.reason}", x.image_sigma) for x in labels]
    answer = (
        f"{numbers['barrier_eV']:.3f} ± {numbers['barrier_sigma_eV']:.2g} eV, and {numbers['reverse_barrier_eV']:.3f} eV from the other end; the "
        f"reaction takes {numbers['reaction_energy_eV']:+.3f} ± {numbers['reaction_energy_sigma_eV']:.2g} eV."
    )
    return _page(
        "Reaction path", "neb", path.images[0], answer + _ended(outcome.converged, labels[-1].force, "top"), numbers["oracle_calls_end_points"],
        structures, outcome.modes, rows, {"course": path_picture(path, labels), "foreseen": foreseen_picture(labels, errors, sigmas)},
        (errors, sigmas), recipe, numbers, PATH_WORDS,
    )  # fmt: skip


def saddle_page(outcome: SaddleOutcome, labels: Sequence[SaddleLabel], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp saddle`. Raises UserError: matplotlib is not installed."""
    saddle, numbers = outcome.saddle, outcome.numbers
    start = saddle.start.get_potential_energy()
    sides = [(f"side {i + 1}", side, side.get_potential_energy() - start) for i, side in enumerate(saddle.sides)]
    structures = [
        (name, f"{energy:+.3f} eV", draw_structure(atoms, saddle.mode, name, saddle.mode if name == "saddle" else None))
        for name, atoms, energy in [("start", saddle.start, 0.0), ("saddle", saddle.atoms, saddle.barrier), *sides]
    ]
    errors, sigmas = np.array([label.error for label in labels]), np.array([label.sigma for label in labels])
    rows = [_row(x, x.reason, x.sigma) for x in labels]
    joins = {
        True: " The start lies on one side: this is the barrier of one step from it.",
        False: " Neither side is the start: this is not the barrier of one step from it.",
        None: "",
    }[saddle.joins_start]
    answer = f"{saddle.barrier:.3f} ± {saddle.sigma:.2g} eV above the start.{joins}"
    return _page(
        "Saddle", "saddle", saddle.start, answer + _ended(outcome.converged, labels[-1].force, "saddle"), numbers["oracle_calls_relaxations"],
        structures, outcome.modes, rows, {"course": saddle_picture(saddle), "foreseen": foreseen_picture(labels, errors, sigmas)},
        (errors, sigmas), recipe, numbers, SADDLE_WORDS,
    )  # fmt: skip


def relaxation_page(outcome: RelaxOutcome, steps: Sequence[RelaxStep], recipe: Mapping[str, Any]) -> Page:
    """Of `gpmlp relax`. Raises UserError: matplotlib is not installed."""
    moved = outcome.atoms.positions - outcome.start.positions
    structures = [
        ("start", "", draw_structure(outcome.start, moved, "start")),
        ("relaxed", "", draw_structure(outcome.atoms, moved, "relaxed")),
    ]
    fallen = steps[0].energy - steps[-1].energy
    away = float(np.linalg.norm(moved, axis=1).max())
    ended = "" if outcome.converged else " It did not come to rest: go on with more labels."
    answer = (
        f"{fallen:.3f} eV below where it began, with no atom farther than {away:.2f} Å from there; the largest force is "
        f"{steps[-1].force:.3f} eV/Å.{ended}"
    )
    sections = [
        Section("course", "Where did it come to rest?", "", answer),
        Section(
            "steps",
            "What was labelled?",
            "",
            f"{len(steps)} structures, each where the model of those before it came to rest, or had moved 0.3 Å.",
        ),
        Section("recipe", "Which settings were used?", "", "Those of the recipe, and defaults."),
    ]
    tiles = [
        (f"{outcome.numbers['energy_eV']:.4f} eV", "energy"),
        (str(len(steps)), "oracle calls"),
        (f"{steps[-1].force:.3f} eV/Å", "largest force"),
    ]
    return _made(
        "Relaxation",
        "relax",
        outcome.start,
        tiles,
        sections,
        {"course": relaxation_picture(steps)},
        {"structures": structures, "steps": steps, "recipe": recipe, **RELAX_WORDS},
    )


def _page(
    kind: str, name: str, start: Atoms, answer: str, more_calls: int, structures: Sequence[tuple[str, str, Markup]], modes: SaddleModes,
    rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Picture], foreseen: tuple[np.ndarray, np.ndarray], recipe: Mapping[str, Any],
    numbers: Mapping[str, Any], words: Mapping[str, str],
) -> Page:  # fmt: skip
    """What the pages of paths and saddles share."""
    sections = [
        Section("course", "How high is the barrier?", "", answer),
        Section("modes", "Is the top a saddle?", "", modes_answer(modes)),
        Section("labels", "What was labelled, and was it foreseen?", "", foreseen_answer(*foreseen, more_calls)),
        Section("recipe", "Which settings were used?", "", "Those of the recipe, and defaults."),
    ]
    tiles = [
        (f"{numbers['barrier_eV']:.3f} eV", "barrier"),
        (f"± {numbers['barrier_sigma_eV']:.2g} eV", "its standard deviation"),
        (str(numbers["oracle_calls"]), "oracle calls of the search"),
        (str(more_calls), "of relaxations"),
    ]
    frequencies = [(format_number(abs(f)), "i" if f < 0 else "") for f in modes.frequencies if abs(f) > SOFT]
    values = {"structures": structures, "rows": rows, "frequencies": frequencies, "recipe": recipe, **words}
    return _made(kind, name, start, tiles, sections, pictures, values)


def _made(
    kind: str, name: str, start: Atoms, tiles: Sequence[tuple[str, str]], sections: Sequence[Section], pictures: Mapping[str, Picture],
    values: Mapping[str, Any],
) -> Page:  # fmt: skip
    return Page(
        template="path.html",
        kind=kind,
        title=f"{kind} of {start.get_chemical_formula()}",
        about=[("Atoms", str(len(start))), ("Periodic", "yes" if start.pbc.any() else "no")],
        tiles=tiles,
        sections=sections,
        record={},
        scatters={},
        pictures=pictures,
        labels=PointLabels((), (), np.zeros(0, int), np.zeros(0, int)),
        whole="",
        values=values,
        file=FILES[name],
        numbers_in=f"{name}.json",
    )


def _row(label: BandLabel | SaddleLabel, where: str, sigma: float) -> dict[str, Any]:
    """One row of the table of labels, meV."""
    z = label.error / max(sigma, LEAST_SIGMA)
    return {
        "number": label.number,
        "where": where,
        "barrier": label.barrier,
        "sigma": label.sigma,
        "error": 1000 * label.error,
        "z": z,
        "force": label.force,
    }


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


def draw_structure(atoms: Atoms, moved: np.ndarray, name: str, motion: np.ndarray | None = None) -> Markup:
    """Inline SVG of a molecule in its own plane, or of the atoms of a periodic structure around the one that moves most.

    Args:
        moved: (atoms, 3), in which that atom moves most; motion: drawn as arrows.
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
    view, reach = vectors @ turn.T, 0.8 + float(np.linalg.norm(vectors, axis=1).max())
    arrows = None
    if motion is not None:
        arrows = ARROW * motion[shown] @ turn.T / np.linalg.norm(motion, axis=1).max()
    colours = species_colours(np.unique(atoms.numbers).tolist())
    ringed = int(np.flatnonzero(shown == far)[0]) if motion is None else None
    return draw_atoms(vectors, numbers, view, reach, colours, name, ringed, arrows)
