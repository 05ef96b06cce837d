"""Tensors read from a file, taken one by one: each must be there, of the right type, shape and size, and none may be left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from gpmlp.core.errors import UserError, check_shape

LARGEST = 1e15  # of any number: far above all that a fit makes, and its square is finite


class StoredTensors(Mapping[str, Tensor]):
    """Named tensors of a file. What is taken from a `part` counts as taken from the whole."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "", taken: set[str] | None = None) -> None:
        self._tensors, self._prefix = tensors, prefix
        self._taken: set[str] = set() if taken is None else taken

    def __iter__(self) -> Iterator[str]:
        n = len(self._prefix)
        return (name[n:] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        full = self._prefix + name
        if full not in self._tensors:
            raise UserError(f"the tensor `{full}` is missing.")
        tensor = self._tensors[full]
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UserError(f"the tensor `{full}` holds a NaN or infinite number.")
        if tensor.is_floating_point() and not bool((tensor.abs() <= LARGEST).all()):
            raise UserError(f"the tensor `{full}` holds a number beyond {LARGEST:g}.")
        self._taken.add(full)
        return tensor

    def part(self, prefix: str) -> StoredTensors:
        """Those whose names begin with a prefix, by what follows it."""
        return StoredTensors(self._tensors, self._prefix + prefix, self._taken)

    def take(self, name: str, shape: tuple[int | str, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        """One tensor of this type and shape; a string stands for any size and names the axis.

        Raises:
            UserError: it is missing, of another type or shape, not finite, or beyond LARGEST.
        """
        tensor, full = self[name], self._prefix + name
        check_shape(full, tensor, shape)
        if tensor.dtype != dtype:
            wanted, got = (str(t).removeprefix("torch.") for t in (dtype, tensor.dtype))
            raise UserError(f"the tensor `{full}` must be of type {wanted}; got {got}.")
        return tensor

    def check_all_taken(self) -> None:
        """Raise UserError if there are others than those that were taken."""
        others = sorted(set(self._tensors) - self._taken)
        if others:
            raise UserError(f"{len(others)} tensors of unknown meaning, as `{others[0]}`.")
