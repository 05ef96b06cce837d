"""The total charge of a frame, by the names that files give it, and how Atoms carry it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms

from gpmlp.core.errors import UserError
from gpmlp.io.frames import Frame

CHARGE = "charge"  # as it is written
_NAME = re.compile(
    r"^(((total|tot|net|system|molecular|mol|cell)[_\-. ]?)?charge|charge[_\-. ]?(total|tot)|q[_\-. ]?tot(al)?)$"
)
SAME = 1e-6  # e, two names of one number
ROUNDED = 0.1  # e, by which rounded charges of atoms may sum to other than the total charge


@cache
def is_total_charge(key: str) -> bool:
    """Whether a key of info names the total charge: charge, total_charge, tot_charge, net_charge, qtot, ... in any case."""
    return isinstance(key, str) and _NAME.match(key.lower()) is not None


def charge_entries(info: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of info that name the total charge."""
    return {key: value for key, value in info.items() if is_total_charge(key)}


def stated_charge(info: Mapping[str, Any], name: str) -> float | None:
    """The total charge (e) that info of a frame states; None if it states none.

    Raises:
        UserError: it is no finite number, or two names give different ones; names the frame.
    """
    found: dict[str, float] = {}
    for key, value in charge_entries(info).items():
        array = np.asarray(value)
        if array.dtype.kind not in "iuf" or array.size != 1 or not np.isfinite(array).all():
            raise UserError(
                f"{name}: `{key}` must be the total charge of the structure, one finite number in elementary charges; got "
                f"{str(value)[:60]!r}."
            )
        found[key] = float(array.reshape(()))
    if not found:
        return None
    (first, charge), *others = found.items()
    for key, other in others:
        if abs(other - charge) > SAME:
            raise UserError(
                f"{name}: `{first}` is {charge:g} and `{key}` is {other:g}; a structure has one total charge: keep the right one."
            )
    return charge


def total_charge(frame: Frame, name: str) -> float | None:
    """The total charge (e) that a frame states, which the initial charges of its atoms must sum to; None if it states none.

    Raises:
        UserError: see `stated_charge`, or the initial charges are not zero and sum to another number.
    """
    charge, initial = stated_charge(frame.info, name), frame.arrays.get("initial_charges")
    if charge is None or initial is None or not np.any(initial):
        return charge
    total = float(np.sum(initial))
    if abs(total - charge) > ROUNDED:
        key = next(iter(charge_entries(frame.info)))
        raise UserError(
            f"{name}: `{key}` is {charge:g}, but the initial charges of the atoms sum to {total:.4g}, which codes take as the total "
            "charge; correct one of them, or remove `initial_charges`."
        )
    return charge


def set_charge(atoms: Atoms, charge: float) -> None:
    """Have Atoms say their total charge, under one name."""
    for key in charge_entries(atoms.info):
        del atoms.info[key]
    atoms.info[CHARGE] = int(charge) if charge == int(charge) else charge
