"""Power spectra on GPUs by Triton: expansion, products and pull-back as three kernels, with nothing by pair in memory but gradients."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from gpmlp.descriptors.gpu import DenseExpansion, DenseTables
from gpmlp.descriptors.soap import PowerSpectrum
from gpmlp.descriptors.spherical_harmonics import harmonic_orders, recurrence_coefficients

TILE = 512  # numbers of a tile that one warp holds


def can_use_triton(like: Tensor) -> bool:
    """Whether Triton is installed and can reach this tensor: on CUDA devices, or anywhere with its interpreter (TRITON_INTERPRET=1)."""
    reached = like.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return reached and like.dtype in (torch.float32, torch.float64) and importlib.util.find_spec("triton") is not None


def failure_reason(kernels: TritonKernels, like: Tensor) -> str | None:
    """Why kernels cannot be compiled or run where a tensor is: the last line of what was raised; None if they can."""
    far = kernels.tables.descriptor.cutoff + 1.0
    vectors = torch.full((1, len(kernels.tables.descriptor.species), 8, 3), far, dtype=like.dtype, device=like.device)
    try:
        expansion = kernels.expand(vectors, torch.zeros(1, dtype=torch.long, device=like.device))
        kernels.pull_back(expansion, expansion.spectrum)
        if like.is_cuda:
            torch.cuda.synchronize(like.device)
    except Exception as error:  # of Triton, its assembler, a C compiler or the driver: there is no common type
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"
    return None


@dataclass(frozen=True, eq=False)
class TritonKernels:
    """A DenseBackend of Triton kernels.

    Attributes:
        tables: of the descriptor.
        per_length: (1,) intervals of the radial table per A.
        columns: of each harmonic, padded to a power of two: l, l - |m|, |m|, whether a sine (integers), Q_mm with its √2.
        a, b: (l_max + 1, harmonics) of the recurrence, by number of the step.
    """

    tables: DenseTables
    per_length: Tensor
    columns: tuple[Tensor, ...]
    a: Tensor
    b: Tensor

    @staticmethod
    def from_descriptor(descriptor: PowerSpectrum, like: Tensor) -> TritonKernels:
        """On the device of a tensor, of its type."""
        lm, side = harmonic_orders(descriptor.l_max), descriptor.l_max + 1
        size = _power(len(lm))
        coefficients = torch.from_numpy(recurrence_coefficients(descriptor.l_max))
        integers = torch.zeros(4, size, dtype=torch.int32)
        start, climb = torch.zeros(size, dtype=torch.float64), torch.zeros(2, side, size, dtype=torch.float64)
        for k, (l, m) in enumerate(lm):
            integers[:, k] = torch.tensor([l, l - abs(m), abs(m), m < 0])
            start[k] = coefficients[abs(m), abs(m), 0]
            climb[:, 1 : l - abs(m) + 1, k] = coefficients[abs(m) + 1 : l + 1, abs(m)].T
        columns = (*integers.to(like.device).unbind(), start.to(like))
        per_length = torch.tensor([1 / descriptor.radial_integrals.step], dtype=torch.float64).to(like)
        return TritonKernels(
            DenseTables.from_descriptor(descriptor, like), per_length, columns, *climb.to(like).unbind()
        )

    def expand(self, vectors: Tensor, center_slots: Tensor) -> DenseExpansion:
        """As in DenseBackend."""
        from gpmlp.descriptors import _triton_kernels

        descriptor, (n, _, width, _) = self.tables.descriptor, vectors.shape
        vectors = vectors.contiguous()
        weight, d_weight = (part.contiguous() for part in descriptor.weights(vectors.norm(dim=3)))
        density = vectors.new_empty(n, descriptor.channels, (descriptor.l_max + 1) ** 2)
        spectrum = vectors.new_empty(n, descriptor.n_features)
        if not n:
            return DenseExpansion(spectrum, density, (vectors, weight, d_weight))
        with torch.cuda.device_of(vectors):  # which Triton launches on
            inputs = vectors, weight, center_slots, self.tables.table, self.per_length, self.tables.center
            _triton_kernels.expand[(n,)](
                *inputs, *self.columns, self.a, self.b, density, width, len(self.tables.table), **self._shape()
            )
            sizes = {"CP": _power(descriptor.channels), "MP": _power(2 * descriptor.l_max + 1)}
            _triton_kernels.multiply[(n, descriptor.l_max + 1)](
                density,
                self.tables.factors,
                spectrum,
                C=descriptor.channels,
                L=descriptor.l_max + 1,
                num_warps=1,
                **sizes,
            )
        return DenseExpansion(spectrum, density, (vectors, weight, d_weight))

    def pull_back(self, expansion: DenseExpansion, on_spectrum: Tensor) -> Tensor:
        """As in DenseBackend."""
        from gpmlp.descriptors import _triton_kernels

        vectors, weight, d_weight = expansion.pairs
        gradients = torch.empty_like(vectors)
        if not len(vectors):
            return gradients
        with torch.cuda.device_of(vectors):
            inputs = vectors, weight, d_weight, self.tables.table, self.per_length
            outputs = expansion.density, self.tables.factors, on_spectrum.contiguous(), gradients
            sizes = vectors.shape[2], len(self.tables.table)
            _triton_kernels.pull_back[(len(vectors),)](
                *inputs, *self.columns, self.a, self.b, *outputs, *sizes, **self._shape()
            )
        return gradients

    def _shape(self) -> dict[str, int]:
        descriptor = self.tables.descriptor
        rows, columns = _power(descriptor.n_max), len(self.columns[0])
        sizes = {"S": len(descriptor.species), "N": descriptor.n_max, "L": descriptor.l_max + 1}
        tile = {"NP": rows, "LP": _power(descriptor.l_max + 1), "LM": columns}
        return sizes | tile | {"num_warps": min(8, max(1, rows * columns // TILE))}


def _power(size: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (size - 1).bit_length()
