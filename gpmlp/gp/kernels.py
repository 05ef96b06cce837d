"""Zonal kernels: functions f(s) of the dot product s = x.x' of unit features, with f' and f'', all that derivatives need."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import gpytorch
import torch
from gpytorch.constraints import GreaterThan, Positive
from torch import Tensor

from gpmlp.core import errors
from gpmlp.recipe import KernelRecipe

Profile = tuple[Tensor, Tensor, Tensor]  # f, f', f'' of the dot products of environments with centres


class ZonalKernel(gpytorch.kernels.Kernel):
    """k(x, x') = f(x.x') with f(1) = 1 for unit vectors, as a gpytorch kernel. Subclasses give `profile`."""

    has_lengthscale = False

    def profile(self, s: Tensor) -> Profile:
        """Return f(s), f'(s), f''(s)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def value(self, s: Tensor) -> Tensor:
        """Return f(s) alone, to the last bit that of `profile`."""
        return self.profile(s)[0]

    @property
    def quadratic(self) -> tuple[float, float] | None:
        """a and b if f(s) = a s + b s², else None."""
        return None

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: object) -> Tensor:
        s = (x1 * x2).sum(-1) if diag else x1 @ x2.transpose(-1, -2)
        return self.profile(s)[0]

    def __add__(self, other: ZonalKernel) -> SumKernel:
        return SumKernel([self, other], [1.0, 1.0])


class PolynomialKernel(ZonalKernel):
    """f(s) = s^zeta, zeta = 1, 2, 3, ...; body order 2 zeta + 1 with the SOAP power spectrum."""

    def __init__(self, zeta: int) -> None:
        super().__init__()
        if zeta < 1 or zeta != int(zeta):
            raise errors.UserError(f"`kernel.zeta` must be a whole number of 1 or more; got {zeta}.")
        self.zeta = int(zeta)

    def profile(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.zeta
        if z == 1:
            return s, torch.ones_like(s), torch.zeros_like(s)
        lowest = s ** (z - 2)
        first = lowest * s
        return first * s, first * z, lowest * (z * (z - 1))

    def value(self, s: Tensor) -> Tensor:
        if self.zeta <= 2:
            return s * s if self.zeta == 2 else s
        return s ** (self.zeta - 2) * s * s

    @property
    def quadratic(self) -> tuple[float, float] | None:
        return {1: (1.0, 0.0), 2: (0.0, 1.0)}.get(self.zeta)


class ExponentialKernel(ZonalKernel):
    """f(s) = exp((s - 1) / length^2): the squared exponential of the distance |x - x'| on the unit sphere."""

    def __init__(self, length: float) -> None:
        super().__init__()
        errors.check_positive("kernel.length", length)
        self.register_parameter("raw_length", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
        self.register_constraint("raw_length", Positive())
        self.initialize(
            raw_length=self.raw_length_constraint.inverse_transform(torch.tensor(length, dtype=torch.float64))
        )

    @property
    def length(self) -> Tensor:
        return self.raw_length_constraint.transform(self.raw_length)

    def profile(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse = self.length.detach().to(s) ** -2
        value = torch.exp((s - 1) * inverse)
        first = value * inverse
        return value, first, first * inverse


class SumKernel(ZonalKernel):
    """A weighted sum of zonal kernels; weights are scaled so that f(1) = 1."""

    def __init__(self, kernels: Sequence[ZonalKernel], weights: Sequence[float]) -> None:
        super().__init__()
        self.kernels = torch.nn.ModuleList(kernels)
        total = torch.tensor(list(weights), dtype=torch.float64)
        self.register_parameter("raw_weights", torch.nn.Parameter(torch.zeros_like(total)))
        self.register_constraint("raw_weights", GreaterThan(0.0))
        self.initialize(raw_weights=self.raw_weights_constraint.inverse_transform(total / total.sum()))

    @property
    def terms(self) -> list[ZonalKernel]:
        return [kernel for kernel in self.kernels if isinstance(kernel, ZonalKernel)]

    @property
    def weights(self) -> Tensor:
        positive = self.raw_weights_constraint.transform(self.raw_weights)
        return positive / positive.sum()

    def profile(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        profiles = [k.profile(s) for k in self.terms]
        weights = self.weights.detach().to(s).unbind()
        scaled = ([w * part for part in p] for w, p in zip(weights, profiles, strict=True))
        value, first, second = (reduce(torch.add, parts) for parts in zip(*scaled, strict=True))
        return value, first, second

    @property
    def quadratic(self) -> tuple[float, float] | None:
        parts = [k.quadratic for k in self.terms]
        given = [part for part in parts if part is not None]
        if len(given) < len(parts):
            return None
        a, b = (sum(w * part[k] for w, part in zip(self.weights.tolist(), given, strict=True)) for k in range(2))
        return a, b


def make_kernel(recipe: KernelRecipe) -> ZonalKernel:
    """The kernel that a recipe describes: 'polynomial' (zeta), 'exponential' (length) or the 'sum' of its weighted terms."""
    if recipe.name == "polynomial":
        return PolynomialKernel(2 if recipe.zeta is None else recipe.zeta)
    if recipe.name == "exponential":
        return ExponentialKernel(0.5 if recipe.length is None else recipe.length)
    return SumKernel([make_kernel(term) for term in recipe.terms], [term.weight for term in recipe.terms])
