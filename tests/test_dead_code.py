"""What the package defines, the package uses; names that only others call are listed here, with who does."""

from __future__ import annotations

from pathlib import Path

import vulture

PACKAGE = Path(__file__).resolve().parents[1] / "gpmlp"
KINDS = {"class", "function", "import", "method", "property", "unreachable_code"}
BY_DECORATORS = ["@app.callback*", "@app.command*", "@*_validator*", "@overload*"]
USED_BY = {
    "exec_module": "Python's import system",
    "gpaw": "recipes, by name",
    "quantum_espresso": "recipes, by name",
    "PySCF": "recipes, by name",
    "Oracle": "the protocol that oracles of users follow",
    "CalculatorOracle": "users (docs/oracles.md)",
    "committee": "users (docs/uncertainty.md)",
    "structures_and_targets": "users, to fit to the labels of a run",
    "diffusion_of": "users, of a whole trajectory",
    "student": "users of versions before 0.2",
    "_energies": "report.model.data, by kind",
    "_stresses": "report.model.data, by kind",
    "evaluations": "tests",
    "ExternalPotential": "users (docs/engines.md)",
    "open_lammps": "users (docs/engines.md)",
    "register_network": "users (docs/pretrained.md)",
    "diffusion_at": "users (docs/multiscale.md)",
    "allow_calculator": "users (docs/long-range.md)",
    "PartitionedCalculator": "users (docs/multiscale.md)",
}


def test_nothing_is_defined_in_vain():
    search = vulture.Vulture(ignore_names=["__*__"], ignore_decorators=BY_DECORATORS)
    search.scavenge([PACKAGE])
    unused = {
        item.name: f"{item.filename}:{item.first_lineno}" for item in search.get_unused_code() if item.typ in KINDS
    }
    assert not {name: where for name, where in unused.items() if name not in USED_BY}
    assert not set(USED_BY) - set(unused), "these are used by now, or gone: take them off the list"
