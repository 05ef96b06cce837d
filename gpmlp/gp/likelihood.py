"""The likelihood: one noise per kind of observation, learned or given, and a signal variance per descriptor and species."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.priors import NormalPrior
from torch import Tensor

from gpmlp import checks
from gpmlp.quantities import Targets

KINDS = ("energies", "forces", "stresses")
# start, lower bound, upper bound: eV/atom, eV/A, eV/A^3
NOISE_BOUNDS = {"energies": (2e-3, 1e-5, 1.0), "forces": (5e-2, 1e-4, 5.0), "stresses": (2e-3, 1e-6, 1.0)}
SIGNAL_BOUNDS = (1.0, 1e-3, 1e4)


class Hyperparameters(gpytorch.Module):
    """Logarithms of standard deviations, with bounds and weak normal priors; what evidence.py optimises.

    Args:
        kinds: kinds of observation, each with a noise.
        fixed: noise by kind that is given, not learned.
        n_blocks: number of (descriptor, species) blocks, each with its own signal standard deviation, eV.
    """

    def __init__(self, kinds: tuple[str, ...], fixed: dict[str, float], n_blocks: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.learned: list[str] = []
        for kind in kinds:
            start, low, high = NOISE_BOUNDS[kind]
            if kind in fixed:
                checks.positive(f"noise of {kind}", fixed[kind])
                start, low, high = fixed[kind], 0.5 * fixed[kind], 2 * fixed[kind]
            else:
                self.learned.append(kind)
            self._add(kind, torch.tensor([start], dtype=torch.float64), low, high)
        self._add("signal", torch.full((n_blocks,), SIGNAL_BOUNDS[0]), *SIGNAL_BOUNDS[1:])
        self.learned.append("signal")

    def _add(self, name: str, start: Tensor, low: float, high: float) -> None:
        self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros(len(start), dtype=torch.float64)))
        self.register_constraint(f"raw_{name}", Interval(math.log(low), math.log(high)))
        # a factor of 20 either way is one standard deviation of the prior
        prior = NormalPrior(start.double().log()[0], torch.tensor(3.0, dtype=torch.float64))
        self.register_prior(f"{name}_prior", prior, lambda m, n=name: m.log_std(n))
        self.set(name, start.double().log())

    def log_std(self, name: str) -> Tensor:
        """Logarithm of the standard deviation(s) of a kind, or of 'signal'."""
        return getattr(self, f"raw_{name}_constraint").transform(getattr(self, f"raw_{name}"))

    def set(self, name: str, log_std: Tensor) -> None:
        """Assign, clamped to just inside the bounds (the transform is infinite on them)."""
        low, high = self.bounds(name)
        margin = 1e-6 * (high - low)
        constraint = getattr(self, f"raw_{name}_constraint")
        inside = constraint.inverse_transform(log_std.double().clamp(low + margin, high - margin))
        getattr(self, f"raw_{name}").data.copy_(inside)

    def bounds(self, name: str) -> tuple[float, float]:
        """Bounds of log_std."""
        constraint = getattr(self, f"raw_{name}_constraint")
        return float(constraint.lower_bound), float(constraint.upper_bound)

    def log_prior(self, name: str) -> tuple[float, Tensor]:
        """Log density of the prior at the present log_std, and its gradient with respect to it."""
        with torch.enable_grad():
            x = self.log_std(name).detach().requires_grad_()
            value = getattr(self, f"{name}_prior").log_prob(x).sum()
            (gradient,) = torch.autograd.grad(value, x)
        return float(value.detach()), gradient

    def noise(self) -> dict[str, float]:
        """Standard deviation by kind."""
        return {kind: float(self.log_std(kind).detach().exp()[0]) for kind in self.kinds}

    def signal(self) -> Tensor:
        """(blocks,) signal standard deviations, eV."""
        return self.log_std("signal").detach().exp()


@dataclass(frozen=True, eq=False)
class Observations:
    """The known labels of one kind as scaled rows: which rows of the covariance, their factors, values and noise.

    Attributes:
        rows: (observations,) indices into the covariance rows of that kind.
        scale: (observations,) factor on the row and the value (1/atoms for energies per atom).
        values: (observations,) scaled label.
        noise: (observations,) given standard deviation, NaN where the common noise of the kind holds.
    """

    rows: Tensor
    scale: Tensor
    values: Tensor
    noise: Tensor


def observations(targets: Targets, counts: Tensor, voigt: tuple[tuple[int, int], ...]) -> dict[str, Observations]:
    """Sort the known labels by kind; the only place where unknown (NaN) labels are dropped."""
    a, b = (torch.tensor(axis, device=counts.device) for axis in zip(*voigt, strict=True))
    per_atom = 1 / counts.to(targets.energies.dtype)
    flat = {
        "energies": (targets.energies * per_atom, per_atom, targets.energies_noise),
        "forces": (targets.forces.flatten(), None, targets.forces_noise.flatten()),
        "stresses": (targets.stresses[:, a, b].flatten(), None, targets.stresses_noise.repeat_interleave(len(voigt))),
    }
    found = {}
    for kind, (values, scale, noise) in flat.items():
        known = (~torch.isnan(values)).nonzero()[:, 0]
        scale = torch.ones_like(values) if scale is None else scale
        found[kind] = Observations(known, scale[known], values[known], noise[known])
    return found
