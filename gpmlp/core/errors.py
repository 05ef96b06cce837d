"""Types of errors and warnings, and checks of shapes and values, with the messages that users read.

The command line imports this before it does anything: torch and numpy come only with what needs them.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 1e9  # A, of positions and lattice vectors: their differences keep 1e-7 A in double precision


class UserError(ValueError):
    """Input that gpmlp cannot use; the message says what is wrong, where, and what to do. The command line exits with 2."""


class DataWarning(UserWarning):
    """Data that can be used but are suspicious; the message gives the numbers."""


class ProgressNotice(UserWarning):
    """Progress of a long computation; nothing is wrong."""


def visible_text(text: str) -> str:
    """The same with control characters, terminal escapes and marks that turn the direction of writing as \\x1b, \\u202e, ...; lines and
    tabs stay."""

    def shown(c: str) -> str:
        return (
            c
            if c.isprintable() or c in "\n\t" or c.isspace() and ord(c) > 0x9F
            else c.encode("unicode_escape").decode()
        )

    return text if text.isprintable() else "".join(map(shown, text))


def suggest_name(name: str, valid: Iterable[str]) -> str:
    """Return `` Perhaps you meant '...'.`` for the nearest valid name, or the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f" Perhaps you meant '{close[0]}'." if close else f" Valid names: {', '.join(valid)}."


def check_choice(kind: str, name: str, options: Sequence[str] | dict) -> None:
    """Raise UserError unless name is one of options."""
    if name not in options:
        raise UserError(f"Unknown {kind} '{name}'.{suggest_name(name, options)}")


def available_devices() -> tuple[str, ...]:
    """Kinds of devices that torch can use here: 'cpu', and 'cuda' and 'mps' where they are there."""
    import torch

    others = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ("cpu", *(kind for kind, there in others.items() if there))


def check_device(name: str) -> None:
    """Raise UserError unless torch can use the device called name ('cpu', 'cuda', 'cuda:1', ...) on this machine."""
    if name == "cpu":
        return
    import torch

    kind, _, index = name.partition(":")
    have = available_devices()
    there = kind in have and (not index or index.isdigit())
    if there and kind == "cuda":
        there = int(index or 0) < torch.cuda.device_count()
    if not there:
        count = f" ({torch.cuda.device_count()} of them)" if "cuda" in have else ""
        raise UserError(
            f"device '{name}' cannot be used: torch has {', '.join(have)}{count} on this machine; choose one of these."
        )


def check_shape(name: str, tensor: Tensor, required: tuple[int | str, ...], hint: str = "") -> None:
    """Raise UserError unless tensor has the required shape; a string stands for any size and names the axis."""
    got = tuple(tensor.shape)
    fits = len(got) == len(required) and all(isinstance(r, str) or r == g for r, g in zip(required, got, strict=True))
    if not fits:
        wanted = ", ".join(str(r) for r in required)
        raise UserError(f"`{name}` must have shape ({wanted}); got {got}.{' ' + hint if hint else ''}")


def check_positive(name: str, value: float, allow_zero: bool = False) -> None:
    """Raise UserError unless value is positive (or zero, where allowed) and finite."""
    ok = value == value and value < float("inf") and (value >= 0 if allow_zero else value > 0)
    if not ok:
        raise UserError(f"`{name}` must be {'zero or ' if allow_zero else ''}positive; got {value}.")


def check_integer(name: str, value: int, least: int) -> int:
    """A whole number, of any type that says it is one; raise a UserError naming it if it is none or too small."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"The {name} must be a whole number, as {least + 1}; got {value!r}.") from None
    if number < least:
        raise UserError(f"The {name} must be {least} or more; got {number}.")
    return number


def check_cells(cells: Tensor, periodic: Tensor, names: Sequence[str]) -> None:
    """Raise UserError if the periodic lattice vectors of a structure are zero, flat or not finite; all structures at once.

    Args:
        cells: (structures, 3, 3) rows are lattice vectors, A.
        periodic: (structures, 3) bool.
        names: of the structures, for the message.
    """
    rows, along = cells.detach().cpu().numpy(), periodic.cpu().numpy()
    if fault := _find_bad_cell(rows.tobytes(), rows.dtype.str, along.tobytes()):
        which, why = fault
        raise UserError(f"{names[which]}: {why}")


@lru_cache(maxsize=16)  # dynamics asks for the same cells at every step
def _find_bad_cell(cells: bytes, dtype: str, periodic: bytes) -> tuple[int, str] | None:
    """Index of the first structure whose cell cannot be used, and what is wrong with it."""
    import numpy as np

    rows = np.frombuffer(cells, dtype).reshape(-1, 3, 3)
    along = np.frombuffer(periodic, bool).reshape(-1, 3)
    if (bad := ~np.isfinite(rows).all((1, 2))).any():
        return int(bad.argmax()), "the cell holds a NaN or infinite number."
    if not along.any():
        return None
    if (bad := ((np.abs(rows) >= LARGEST).any(axis=2) & along).any(1)).any():
        return int(bad.argmax()), f"a lattice vector is longer than {LARGEST:g} A."
    lengths = np.sqrt((rows * rows).sum(2))
    if (bad := ((lengths < 1e-3) & along).any(1)).any():
        why = "periodic along a lattice vector of zero length; give the cell, or set pbc to F there."
        return int(bad.argmax()), why
    # the volume spanned by unit vectors along the periodic axes, and any normal to these: 0 when they lie in a line or a plane
    units = rows * (along / np.where(along, lengths, 1.0))[:, :, None]
    gram = units @ units.transpose(0, 2, 1) + ~along[:, :, None] * np.eye(3)
    span = np.sqrt(np.linalg.det(gram).clip(0.0))
    if (bad := span < 1e-3).any():
        volume = float(span[int(bad.argmax())])
        why = f"the cell is flat (its periodic lattice vectors span no volume, normalised volume {volume:.1e})."
        return int(bad.argmax()), why
    return None


SYMBOLS = tuple(
    (
        "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb Mo "
        "Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb "
        "Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
    ).split()
)


def chemical_symbol(atomic_number: int) -> str:
    """Chemical symbol of an atomic number."""
    return SYMBOLS[atomic_number] if 0 <= atomic_number < len(SYMBOLS) else f"Z{atomic_number}"


def hill_formula(counts: Mapping[int, float]) -> str:
    """Chemical formula of numbers of atoms by atomic number, in Hill's order: C, H, then by symbol; without C all by symbol."""
    from ase.formula import Formula

    return Formula.from_dict({chemical_symbol(z): int(n) for z, n in counts.items() if n}).format("hill")


def atomic_number(symbol: str) -> int:
    """Atomic number of a chemical symbol; UserError for anything else."""
    if symbol not in SYMBOLS[1:]:
        raise UserError(f"'{symbol}' is not a chemical symbol.{suggest_name(symbol, SYMBOLS[1:]) if symbol else ''}")
    return SYMBOLS.index(symbol)
