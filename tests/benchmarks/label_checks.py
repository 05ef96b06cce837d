"""The table of healthy sets of docs/checks.md: findings of `gpmlp check` on files, and the slopes that energies have against works.

python tests/benchmarks/label_checks.py FILE...
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import gpmlp
from gpmlp.io.label_checks.near_frames import find_near_pairs
from gpmlp.io.label_checks.work import fit_work


def row(path: Path) -> str:
    """One line of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structures, targets = gpmlp.read(path)
    findings = gpmlp.check(structures, targets)
    told = {severity: [f.kind for f in findings if f.severity == severity] for severity in ("error", "warning")}
    fit = fit_work(find_near_pairs(structures, targets))
    slope = "–" if fit is None else f"{fit.force_slope:.3f} ({fit.pairs})"
    cells = (
        f"{path.parent.name}/{path.stem}",
        str(len(structures)),
        *(", ".join(k) or "–" for k in told.values()),
        slope,
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(row(Path(name)), flush=True)
