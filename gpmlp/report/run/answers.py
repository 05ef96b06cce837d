"""Answers are the sentences that open the sections of the page about a run."""

from __future__ import annotations

import numpy as np

from gpmlp.report.model import numbers
from gpmlp.report.model.answers import listed
from gpmlp.report.run.data import RunData
from gpmlp.report.style import duration, number, percent

EXPECTED = 68.27  # % within one standard deviation
ENDS = {
    "converged": "all criteria are met",
    "labels": "as many labels as allowed",
    "time": "time is up",
    "steps": "all steps are made",
    "unstable": "given up: unstable",
    "": "interrupted, or still going on",
}
ROOM = 0.06  # by which a coverage may differ before it is called off


def why_stopped(data: RunData) -> str:
    """The verdict in one sentence or two."""
    if data.ended == "converged":
        return "Yes, it is converged: all criteria are met over the same recent frames."
    lead = {
        "labels": "It stopped because it had as many labels as it was allowed, and is not converged.",
        "time": "It stopped because its time was up, and is not converged.",
        "steps": "It stopped because all steps are made, and is not converged.",
        "unstable": "It was given up because a walker could not be kept stable; it is not converged.",
        "": "It has not stopped: it was interrupted or is still going on, and can be resumed (--resume).",
    }[data.ended]
    failed = [c["name"] for c in data.criteria if c["met"] is False]
    open_ = [c["name"] for c in data.criteria if c["met"] is None]
    parts = []
    if failed:
        parts.append(f"not met: {listed(failed)}")
    if open_:
        parts.append(f"cannot be judged yet: {listed(open_)}")
    return f"{lead} {'; '.join(parts)[:1].upper()}{'; '.join(parts)[1:]}." if parts else lead


def how_learned(data: RunData, found: dict) -> str:
    """Labels by reason, and when the last one came."""
    asked = data.asked
    first = len(data.labels) - len(asked)
    if not asked:
        return f"From the {first} first labels alone: the dynamics asked for none in {data.total_steps:,} steps."
    counts = {k: v for k, v in found["label_causes"].items() if k not in ("first", "given")}
    why = listed([f"{n} for {_cause(cause)}" for cause, n in counts.items()])
    since = data.total_steps - max(label.made for label in asked)
    limits = [label.limit for label in data.labels if np.isfinite(label.limit)]
    moved = ""
    if limits and number(limits[0]) != number(limits[-1]):
        moved = f" The limit of the force error went from {number(limits[0])} to {number(limits[-1])}\u00a0eV/Å as labels came."
    last = f"{since:,} steps before the end" if since > 0 else "at the very end"
    cut = sum(bool(label.surrogate) for label in data.labels)
    surrogates = (
        f" {cut} of these labels are of surrogates, cut out of frames that were too large for the oracle."
        if cut
        else ""
    )
    return (
        f"{first} labels before the dynamics, then {len(asked)} that it asked for in {data.total_steps:,} steps: {why}. The last "
        f"came {last}.{moved}{surrogates}"
    )


def _cause(cause: str) -> str:
    return {
        "force": "a force error that might exceed the limit",
        "novelty": "an environment outside the trust region",
        "force and novelty": "both force error and novelty",
        "local energy": "an uncertain local energy",
        "explored": "exploring on purpose",
        "guard": "a guard of physics that fired",
        "force, halted": "a force error so large that it went back",
    }.get(cause, cause)


def honest(data: RunData, found: dict) -> str:
    """Whether errors were as large as foretold."""
    honesty = found["honesty"]
    if not honesty:
        return "Unknown: no label was foreseen before it was learned, or the log does not say what was foreseen."
    shares = honesty["coverage"]["all"]
    cover = shares["coverage_68"]
    far = abs(cover - EXPECTED / 100)
    few = honesty["labels"] < 5
    verdict = "Yes" if far < ROOM else "Roughly" if far < 2 * ROOM else "No"
    if far >= ROOM and cover > EXPECTED / 100:
        verdict = "On the cautious side"
    if few:
        verdict = "Hard to say from so few labels"
    way = (
        "" if far < ROOM else ": error bars were too small" if cover < EXPECTED / 100 else ": error bars were too large"
    )
    over, n = honesty["bounds_exceeded"], honesty["bounds"]
    bound = ""
    if n:
        expected = n * data.probability
        bound = (
            f" The worst force error of a label went beyond its bound {over} of {n} times; about {number(expected, 2)} were to be "
            "expected."
        )
    return (
        f"{verdict}: of the force errors of {honesty['labels']} labels, foreseen before they were learned, {percent(cover)} lie "
        f"within one standard deviation (68\u202f% expected) and {percent(shares['coverage_90'])} within the 90\u202f% "
        f"interval{way}.{bound}"
    )


def what_cost(found: dict) -> str:
    """Calls, and how rare they were."""
    costs = found["costs"]
    calls = f"{costs['oracle_calls']:,} oracle calls"
    if costs["steps"]:
        calls += f" for {costs['steps']:,} steps of dynamics"
    if costs["steps_per_label"]:
        calls += (
            f": after the first labels one in {costs['steps_per_label']:,.0f} steps, so that "
            f"{percent(costs['share_of_steps_without_oracle'])} of the steps took none"
        )
    parts = []
    if costs["hours"] > 0:
        parts.append(f"{duration(3600 * costs['hours'])} in all")
    if costs["seconds_by_activity"].get("oracle") is not None:
        parts.append(f"{duration(costs['seconds_by_activity']['oracle'])} of them waiting for the oracle")
    if costs["seconds_per_step"]:
        parts.append(f"{number(1000 * costs['seconds_per_step'])} ms for a step")
    one = costs["refused"] == 1
    refused = f"{'One structure was' if one else str(costs['refused']) + ' structures were'} set aside without a label."
    refused = f" {refused}" if costs["refused"] else ""
    return f"{calls}.{' ' + _capital(', '.join(parts)) + '.' if parts else ''}{refused}"


def which(data: RunData, found: dict) -> str:
    """What stands out in the table."""
    rows = [r for r in found["labels"] if r["largest_error_eV_per_A"] == r["largest_error_eV_per_A"]]
    if not rows:
        return f"All {len(data.labels)} labels are below."
    worst = max(rows, key=lambda r: r["largest_error_eV_per_A"])
    over = [r for r in rows if r["largest_error_eV_per_A"] > r["limit_eV_per_A"]]
    needed = (
        f"{len(over)} of {len(rows)} had an error beyond the limit, so that these labels were needed" if over else ""
    )
    needed = needed or "No error was beyond the limit: the trigger was on the safe side"
    return (
        f"The largest error was found in label {worst['number']}: {number(worst['largest_error_eV_per_A'])}\u00a0eV/Å where "
        f"{number(worst['predicted_bound_eV_per_A'])} were thought possible. {needed}."
    )


def where_blind(data: RunData, blind_numbers: dict | None) -> str:
    """The trust region over the trajectory, under the model as it is now."""
    if data.blind is None or blind_numbers is None:
        return "Unknown: there is no trajectory yet to look at with the model that came of the run."
    region = blind_numbers["trust_region"]
    n = len(data.blind.names)
    lead = f"Seen with the final model, in {n} frames of the trajectory: "
    if region is None:
        return lead + "novelty was not computed, so atoms are ranked by their error bars alone."
    share = region["n_outside"] / max(region["n_atoms"], 1)
    std = data.blind.atom_std
    typical, largest = numbers.rms(1e3 * std), float(1e3 * np.nanmax(std))
    return (
        f"{lead}{region['n_outside']:,} of {region['n_atoms']:,} atoms ({percent(share)}) lie outside the trust region, where "
        f"about 1\u202f% is to be expected; a force component is known to ±\u00a0{number(typical)}\u00a0meV/Å, that of the worst "
        f"atom to ±\u00a0{number(largest)}."
    )


def how_made(data: RunData) -> str:
    """From what, when."""
    oracle, digest = data.oracle
    when = f", from {data.began} to {data.ended_at}" if data.began else ""
    columns = data.model.get("rank")
    size = f" The model has {columns:,} inducing variables." if columns else ""
    return f"With the oracle {oracle} (settings {digest}) and the choices below{when}.{size}"


def key_numbers(data: RunData, found: dict) -> list[tuple[str, str]]:
    """(number, what it is) for the head of the page."""
    costs, honesty = found["costs"], found["honesty"]
    tiles = [("Converged" if data.ended == "converged" else "Not converged", ENDS[data.ended])]
    tiles.append((f"{len(data.labels)}", f"labels, {costs['labels_asked_by_dynamics']} asked for by the dynamics"))
    if costs["steps"]:
        tiles.append((f"{costs['steps']:,}", "steps of dynamics"))
        tiles.append((percent(costs["share_of_steps_without_oracle"]), "of the steps without the oracle"))
    if honesty:
        tiles.append(
            (percent(honesty["coverage"]["all"]["coverage_90"]), "of foreseen force errors in the 90 % interval")
        )
    return tiles


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
