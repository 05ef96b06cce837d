"""docs/notation.md is true: each name in its tables exists, and the docstring of each function that holds a formula gives an equation."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs/notation.md").read_text(encoding="utf-8")
# a name may be written in two parts, `module` `.Class.method`, so that its line can be broken
ROWS = [re.split(r"(?<!\\)\|", line.replace("` `.", "."))[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
NAMES = sorted({name for row in ROWS for cell in row for name in re.findall(r"`([\w.]+\.[\w.]+)`", cell)})
# formula | on paper | where
FORMULAS = sorted({name for row in ROWS if len(row) == 3 for name in re.findall(r"`([\w.]+\.[\w.]+)`", row[2])})


def find(name: str) -> object:
    """The function, class or attribute of that name within gpmlp; of a dataclass its annotation where a field has no default."""
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            value: object = importlib.import_module(".".join(["gpmlp", *parts[:n]]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            value = getattr(value, part, None) or getattr(value, "__dataclass_fields__", {}).get(part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_page_exist(name):
    assert find(name) is not None


@pytest.mark.parametrize("name", FORMULAS)
def test_docstrings_give_the_equation(name):
    assert re.search("[=≥⌈/ΠΣ⁻']", find(name).__doc__ or ""), f"{name} does not say what it computes"


def test_every_formula_has_a_place():
    assert len(FORMULAS) > 40
    for what in (
        "power spectrum", "K_fu, energy, force and stress rows", "posterior variance of an energy", "of a force", "of a stress", "evidence",
        "leave-one-out energy noise", "Mahalanobis distance", "novelty", "calibration weights", "conformal interval", "rank-k update",
    ):  # fmt: skip
        (row,) = (row for row in ROWS if row[0].strip() == what)
        assert re.search(r"`[\w.]+`", row[2]), what
    for rule in ("trigger", "plateau", "observable", "coverage"):
        assert any(row[0].startswith(f" {rule}") for row in ROWS)
