"""A model for engines (LAMMPS, KIM): a file that records the calls by which the compiled core builds it.

The same calls that build the mean in this process (potential/compiled.py) are written down in place of being made;
gpmlp/native/src/model_file.hpp makes them, and describes the file.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor

from gpmlp.core.errors import DataWarning, UserError, chemical_symbol
from gpmlp.io.files import atomic_write
from gpmlp.io.provenance import version_of
from gpmlp.native.library import ABI, NOT_ARRAYS, SIGNATURES, precision_of
from gpmlp.potential.compiled import (
    build_calibration,
    build_mean,
    build_novelty,
    build_tail,
    build_variances,
    without_form,
)
from gpmlp.potential.dispersion import R6Tail
from gpmlp.potential.potential import Potential

FORMAT = 1
WORD = 8  # bytes
NOTHING = -1  # a reference to no object
PRECISE = {torch.float32: "F", torch.float64: "D", torch.int64: "I", torch.int32: "S"}


def export_model(potential: Potential, path: str | os.PathLike[str], source: str = "") -> None:
    """Write a potential for engines that have the compiled core, atomically.

    Args:
        source: hash of the model file that it comes from, to be told by.

    Raises:
        UserError: the core has no form for a part of it; the file cannot be written.
    """
    if potential.recipe.device != "cpu":
        potential = potential.to(device="cpu")
    if potential.charges is not None:
        raise UserError(
            "This model cannot be exported: its charges act on each other at any distance, for which engines have no form yet. Fit it with "
            "`long_range: {charges: off}`, or use it through ASE."
        )
    tails = [b for b in potential.baselines if isinstance(b, R6Tail)]
    others = [b for b in potential.baselines if not isinstance(b, R6Tail)]
    lacking = without_form(potential.terms, others) or ("several dispersion tails" if len(tails) > 1 else "")
    if lacking:
        raise UserError(
            f"This model cannot be exported: the compiled core has no form for {lacking}. Engines take models with the descriptor "
            "soap, kernels of whole zeta, exponential ones and sums of these, isolated atoms, ZBL and dispersion of "
            "`long_range: {dispersion: {r6: ...}}`. Fit it without what is named, or use it through ASE."
        )
    variances = potential.variances
    if variances is not None and variances.local_blocks is None:
        variances = None
        warnings.warn(
            "The file has no variances: the compiled core has no form for inducing functionals. Fit with centres "
            "(without inducing.functionals) where engines need them.",
            DataWarning,
            stacklevel=2,
        )
    head = {
        "abi": ABI,
        "gpmlp": version_of("gpmlp"),
        "units": "eV,A",
        "species": ",".join(map(chemical_symbol, potential.species)),
        "cutoff": f"{potential.reach:.17g}",
        "sha256": source or "unknown",
    }
    line = f"gpmlp-export {FORMAT} " + " ".join(f"{key} {value}" for key, value in head.items())
    with atomic_write(path) as file:
        record = _Record(file)
        record.write(line.encode().ljust(-(-(len(line) + 1) // WORD) * WORD - 1) + b"\n")
        model = build_mean(potential.terms, others, potential.species, record)
        for tail in tails:
            build_tail(model, tail, potential.species, record)
        if variances is not None:
            build_variances(model, variances, potential.species, record, forces=True)
            build_calibration(model, potential.calibration, variances, record)
        if potential.novelty is not None:
            build_novelty(model, potential.novelty, potential.species, record)
        record.write(_words(record.checksum))


class _Record:
    """Writes calls as gpmlp.native.library.build makes them; what a call makes is referred to by the number of its record."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.checksum, self.n = file, 0, 0

    def write(self, data: bytes) -> None:
        self.checksum = zlib.crc32(data, self.checksum)
        self.file.write(data)

    def __call__(self, name: str, *arguments: Any) -> int:
        function = (name + precision_of(name, arguments)).encode()
        self.write(_words(len(function)) + _padded(function) + _words(len(arguments)))
        for letter, argument in zip(SIGNATURES[name], arguments, strict=True):
            for part in _encoded(letter, argument):
                self.write(part)
        self.n += 1
        return self.n - 1


def _encoded(letter: str, argument: Any) -> Iterator[bytes]:
    if letter == "O":
        yield _words(ord("O"), len(argument), *(NOTHING if record is None else record for record in argument))
    elif isinstance(argument, Tensor):
        yield _words(ord(PRECISE[argument.dtype]), argument.numel())
        yield _padded(argument.detach().numpy().tobytes())
    elif letter == "x":
        yield _words(ord("x")) + struct.pack("<d", argument)
    else:  # whole numbers, references, and arrays that are left out
        yield _words(ord(letter if letter in NOT_ARRAYS else "n"), argument)


def _words(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % WORD)
