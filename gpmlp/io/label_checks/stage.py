"""The stage of label checks: all findings about labelled structures, the gravest first."""

from __future__ import annotations

from collections.abc import Sequence

from gpmlp.core.findings import SEVERITIES, Finding
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.label_checks import stresses
from gpmlp.io.label_checks.charges import check_charges
from gpmlp.io.label_checks.coincident import check_coincident
from gpmlp.io.label_checks.lengths import check_lengths
from gpmlp.io.label_checks.near_frames import find_near_pairs
from gpmlp.io.label_checks.net_forces import check_net_forces
from gpmlp.io.label_checks.outliers import check_outliers
from gpmlp.io.label_checks.repeats import check_repeats
from gpmlp.io.label_checks.totals import check_totals
from gpmlp.io.label_checks.work import check_work

OF_A_FIT = ("energies-of-elements-undetermined", "isolated-atoms-missing", "no-energies")


def check(structures: Structures, targets: Targets) -> tuple[Finding, ...]:
    """Check labels against one another: contradictions, units, signs, references, outliers; nothing is fitted.

    The cost grows as the number of frames. What the findings are called and when they come is in the page "Checks of labels".

    Args:
        structures, targets: labelled data; unknown labels are NaN.

    Returns:
        Findings of severity 'error', 'warning' and 'note', in this order.
    """
    structures, targets = structures.to(device="cpu"), targets.to(device="cpu")
    work = check_work(structures, targets, find_near_pairs(structures, targets))
    strained = stresses.check_stresses(structures, targets)
    if any(f.kind == "energies-against-forces" for f in work):
        strained = []  # stresses contradict such energies too; it is said once
    elif strained:
        work = [f for f in work if f.kind != stresses.KIND]
    far = check_outliers(structures, targets)
    named = {frame for f in far for frame in f.frames}
    work = [f for f in work if f.kind != "energy-against-near-frames" or not named & set(f.frames)]
    coincident = check_coincident(structures)
    findings = [
        *(coincident or check_lengths(structures)),
        *check_repeats(structures, targets),
        *work,
        *strained,
        *check_totals(structures, targets),
        *check_charges(structures, targets),
        *check_net_forces(structures, targets),
        *far,
    ]
    return sort_findings(findings)


def check_evaluated(structures: Structures, targets: Targets, found: Sequence[Finding] = ()) -> tuple[Finding, ...]:
    """Findings about labels that a model is compared with: those of reading and of `check`, but what matters only to a fit."""
    return sort_findings([*found, *(f for f in check(structures, targets) if f.kind not in OF_A_FIT)])


def sort_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The gravest first, each once."""
    once = {(f.kind, str(f)): f for f in findings}
    return tuple(sorted(once.values(), key=lambda f: SEVERITIES.index(f.severity)))
