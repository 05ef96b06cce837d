"""Backends: the SOAP power spectrum, and with four-body invariants, by compiled loops on CPUs, by batched products or Triton's kernels
on GPUs (the spectrum alone), or in plain PyTorch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gpmlp.core.environments import Environments, Surroundings
from gpmlp.core.errors import DataWarning
from gpmlp.core.neighbors import fits_compiled_loops
from gpmlp.descriptors import _triton, cpu, gpu
from gpmlp.descriptors.four_body import FourBodySpectrum
from gpmlp.descriptors.gpu import BatchedProducts, DenseBackend
from gpmlp.descriptors.soap import PowerSpectrum


@dataclass(frozen=True)
class SoapPowerSpectrum(PowerSpectrum):
    """A PowerSpectrum computed the fastest way that the device and autograd allow: the same numbers to rounding."""

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Environments of all surroundings."""
        vectors = surroundings.vectors
        if fits_compiled_loops(vectors):
            return cpu.compiled_environments(self, surroundings)
        if vectors.is_cuda and not (vectors.requires_grad and torch.is_grad_enabled()):
            return gpu.dense_environments(self, surroundings, fastest_backend(self, vectors))
        return self.reference(surroundings)


@dataclass(frozen=True, eq=False)
class FourBodySoap(FourBodySpectrum):
    """A FourBodySpectrum computed by compiled loops on CPUs, elsewhere in plain PyTorch."""

    def __call__(self, surroundings: Surroundings) -> Environments:
        """Environments of all surroundings."""
        if fits_compiled_loops(surroundings.vectors):
            return cpu.compiled_environments(self, surroundings)
        return self.reference(surroundings)


def fastest_backend(descriptor: SoapPowerSpectrum, like: Tensor) -> DenseBackend:
    """The fastest backend that works for the device and type of a tensor: Triton's kernels on CUDA devices, if the density is
    not compressed, and Triton is there and can compile them, which is tried once; a DataWarning says if it cannot."""
    return _form(descriptor, like.device, like.dtype)


@lru_cache(maxsize=32)
def _form(descriptor: SoapPowerSpectrum, device: torch.device, dtype: torch.dtype) -> DenseBackend:
    """Equal descriptors share one."""
    like = torch.zeros(0, dtype=dtype, device=device)
    if descriptor.compression is None and _triton.can_use_triton(like):
        kernels = _triton.TritonKernels.from_descriptor(descriptor, like)
        why = _triton.failure_reason(kernels, like)
        if why is None:
            return kernels
        warnings.warn(
            f"Triton's kernels do not work on {device} ({why}): descriptors are made by PyTorch's products, which is slower. Triton needs "
            "a C compiler (Debian: apt install gcc) and a driver that is not older than it.",
            DataWarning,
            stacklevel=2,
        )
    return BatchedProducts.from_descriptor(descriptor, like)
