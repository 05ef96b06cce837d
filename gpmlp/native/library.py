"""The compiled library of `src/core.cpp`: which one this processor runs, its functions and their types, calls with tensors.

Without it (no compiler when gpmlp was installed) PyTorch computes the same, slower. ctypes releases Python's lock during a call.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

ABI = 7  # of gpmlp_abi_version: raised with every change of SIGNATURES or of what an argument means
VARIANTS = ("v3", "baseline")
CHOICES = (*VARIANTS, "off")  # of the environment variable GPMLP_NATIVE
# name without gpmlp_: tensors I of int64, S of int32, E of float32, D of float64, F of float32 or float64 (then there are NAME_f32 and
# NAME_f64), or 0 for one that is left out; numbers n whole, x not; objects o by their Handle, O several of them, each perhaps none;
# texts s to read, c to write to
SIGNATURES: dict[str, str] = {
    "abi_version": "",
    "supports_v3": "",
    "free": "n",
    "sort_pairs": "nISnnIII",
    "pair_vectors": "nFFIIIIFDn",
    "shortest_vector": "nFD",
    "pairs_within": "nFFIIIIxIIIFDn",
    "displacements": "nIFFnF",
    "add_pair_gradients": "nIIIFFFF",
    "add_rows": "FnnnnFFnnIIIIFFFnFn",
    "spectrum": "IIFFFFxnxxxxx",
    "compress": "onFF",
    "add_four_body": "oIIIIFFFF",
    "expand": "onnIIIFFn",
    "pull_back": "oFFn",
    "jacobian": "onnFn",
    "quadratic_form": "nFF",
    "low_rank_form": "nnFFF",
    "projected_mean": "nnxDDo",
    "widened_mean": "no",
    "inducing_centres": "nnnnDDDD",
    "model": "nIDDDx",
    "add_term": "oonnO",
    "add_tail": "onDxxxx",
    "inducing_columns": "nnnnnDDIID",
    "local_variance": "xnOInnDDDEEE",
    "clusters": "nnnxDDDDD",
    "add_variances": "onO",
    "add_novelty": "onO",
    "calibrate": "oD",
    "add_posterior": "onnnIIODDDDD",
    "evaluate": "onnIIIDDDDDDn",
    "predict": "onnnIIIIIDDDDDDDDDDn",
    "predict_moved": "onnnIIIIIIDDDDDxDDDDDDnn",
    "force_sigma": "onnIIIIDnIDn",
    "load_model": "scn",
    "model_cutoff": "oD",
    "model_species": "oI",
}
NOT_ARRAYS = {"n": ctypes.c_int64, "x": ctypes.c_double, "o": ctypes.c_int64} | dict.fromkeys("sc", ctypes.c_char_p)
DTYPES = {"I": torch.int64, "S": torch.int32, "E": torch.float32, "D": torch.float64}
SUFFIXES = {torch.float32: "_f32", torch.float64: "_f64"}


@cache
def compiled() -> ctypes.CDLL | None:
    """The library for this processor, or the one that GPMLP_NATIVE asks for; None, with a warning, where there is none."""
    wanted = os.environ.get("GPMLP_NATIVE", "")
    if wanted and wanted not in CHOICES:
        warnings.warn(f"GPMLP_NATIVE={wanted} is left out of account: use {', '.join(CHOICES)}.", stacklevel=2)
        wanted = ""
    try:
        if wanted == "off":
            raise OSError("GPMLP_NATIVE=off")
        baseline = _load("baseline")
        if wanted == "baseline" or not baseline.gpmlp_supports_v3():
            return baseline
        return _load("v3")
    except OSError as error:
        warnings.warn(
            f"gpmlp computes without its compiled core, several times slower ({error}). To have it, install a C++ compiler "
            "(Debian: apt install g++) and then gpmlp again; in a source tree: python setup.py build_ext --inplace.",
            stacklevel=2,
        )
        return None


def instruction_set() -> str:
    """'v3' (x86-64-v3: AVX2, FMA) or 'baseline', as the library in use was compiled; 'none' without one."""
    library = compiled()
    return "none" if library is None else Path(library._name).stem.removeprefix("_core_")


class Handle:
    """An object of the library, by its address; freed when nothing refers to it any more."""

    def __init__(self, address: int, *needs: object) -> None:
        self.address = address
        self.needs = needs  # what must live as long
        weakref.finalize(self, compiled().gpmlp_free, address)  # type: ignore[union-attr]

    def __reduce__(self) -> NoReturn:
        raise TypeError("an object of the compiled core is of its process: it cannot be copied or sent to another")


def call(name: str, *arguments: Any) -> int:
    """The result of gpmlp_NAME; tensors go by the address of their numbers, in the memory of the CPU, objects by their Handles.

    Raises:
        MemoryError: there was no room for what the function needs beside its arguments.
        TypeError: an argument is not what SIGNATURES says.
    """
    function = f"gpmlp_{name}{precision_of(name, arguments)}"
    passed, kept = [], []
    for letter, argument in zip(SIGNATURES[name], arguments, strict=True):
        if letter == "O":
            argument = torch.tensor([handle.address if handle else 0 for handle in argument], dtype=torch.int64)
            kept.append(argument)
        if isinstance(argument, Tensor):
            passed.append(argument.data_ptr())
        else:
            passed.append(argument.address if isinstance(argument, Handle) else argument)
    status = getattr(compiled(), function)(*passed)
    if status < 0:
        raise MemoryError(f"gpmlp_{name}: no room")
    return status


def precision_of(name: str, arguments: Sequence[Any]) -> str:
    """What the name of the function ends with for tensors of this precision, '' where there is but one; TypeError as `call`."""
    suffixes = set()
    for k, (letter, argument) in enumerate(zip(SIGNATURES[name], arguments, strict=True)):
        if not isinstance(argument, Tensor):
            continue
        if letter == "F":
            suffixes.add(SUFFIXES[argument.dtype])
        fits = len(suffixes) <= 1 and argument.dtype is DTYPES.get(letter, argument.dtype)
        if not (fits and argument.is_contiguous() and argument.is_cpu):
            raise TypeError(f"gpmlp_{name}: argument {k} is {argument.dtype}, strides {argument.stride()}")
    return "".join(suffixes)


def build(name: str, *arguments: Any) -> Handle:
    """The object that gpmlp_NAME makes, or, where it makes none, its first argument, to which it adds the others.

    It lives as long as whatever it was made of; see gpmlp.io.export for another that writes down what is to be built.
    """
    address = call(name, *arguments)
    several = [handle for argument in arguments if isinstance(argument, (list, tuple)) for handle in argument if handle]
    handles = [argument for argument in arguments if isinstance(argument, Handle)] + several
    if address:
        return Handle(address, *handles)
    first, *added = handles
    first.needs += tuple(added)
    return first


def _load(variant: str) -> ctypes.CDLL:
    """A library with the types of its functions; OSError if it is not there or was made of other sources."""
    path = Path(__file__).with_name(f"_core_{variant}.so")
    if not path.exists():
        raise OSError(f"there is no {path.name}")
    library = ctypes.CDLL(str(path))
    names = {f"gpmlp_{n}{s}": k for n, k in SIGNATURES.items() for s in (SUFFIXES.values() if "F" in k else ("",))}
    if not all(hasattr(library, name) for name in names) or library.gpmlp_abi_version() != ABI:
        raise OSError(f"{path.name} was made of other sources")
    for name, letters in names.items():
        function = getattr(library, name)
        function.argtypes, function.restype = (
            [NOT_ARRAYS.get(letter, ctypes.c_void_p) for letter in letters],
            ctypes.c_int64,
        )
    return library
