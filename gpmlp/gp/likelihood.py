"""The likelihood: one noise per kind of observation, learned or given, and a signal variance per descriptor and species."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gpytorch
import torch
from gpytorch.constraints import Interval
from gpytorch.priors import NormalPrior
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.quantities import Targets
from gpmlp.core.units import VOIGT


@dataclass(frozen=True)
class StdPrior:
    """Prior distribution of a standard deviation: log σ ~ N(log median, log_width²) between bounds.

    Attributes:
        median, low, high: in the unit of σ; log_width: of log σ, 3 being a factor of 20 either way.
        start: where the search for the optimum begins, or σ itself where it is fixed; the median if None.
        fixed: whether σ is given and not learned.
    """

    median: float
    low: float
    high: float
    log_width: float = 3.0
    start: float | None = None
    fixed: bool = False

    @staticmethod
    def fixed_at(value: float) -> StdPrior:
        """For a standard deviation that is given and not learned."""
        errors.check_positive("a given standard deviation", value)
        return StdPrior(value, 0.5 * value, 2 * value, fixed=True)


# eV/atom, eV/A, eV/A^3
NOISE_PRIORS = {
    "energies": StdPrior(2e-3, 1e-5, 1.0),
    "forces": StdPrior(5e-2, 1e-4, 5.0),
    "stresses": StdPrior(2e-3, 1e-6, 1.0),
}
SIGNAL_PRIOR = StdPrior(1.0, 1e-3, 1e4)  # eV


class Hyperparameters(gpytorch.Module):
    """Logarithms of standard deviations, with bounds and normal priors; what evidence.py optimises.

    Args:
        noise: by kind of observation.
        signal: of local energies, for each (descriptor, species) block.
    """

    def __init__(self, noise: Mapping[str, StdPrior], signal: Sequence[StdPrior]) -> None:
        super().__init__()
        self.kinds = tuple(noise)
        self.learned = [*(kind for kind, prior in noise.items() if not prior.fixed), "signal"]
        for kind, prior in noise.items():
            self._add(kind, [prior])
        self._add("signal", signal)

    def _add(self, name: str, priors: Sequence[StdPrior]) -> None:
        logs = {
            key: torch.tensor([getattr(p, key) for p in priors], dtype=torch.float64).log()
            for key in ("median", "low", "high")
        }
        start = torch.tensor([p.start or p.median for p in priors], dtype=torch.float64).log()
        self.register_buffer(f"free_{name}", torch.tensor([not p.fixed for p in priors]))
        self.register_buffer(f"fixed_{name}", start)
        self.register_parameter(f"raw_{name}", torch.nn.Parameter(torch.zeros_like(start)))
        self.register_constraint(f"raw_{name}", Interval(logs["low"], logs["high"]))
        widths = torch.tensor([p.log_width for p in priors], dtype=torch.float64)
        self.register_prior(f"{name}_prior", NormalPrior(logs["median"], widths), lambda m, n=name: m.log_std(n))
        self.set(name, start)

    def log_std(self, name: str) -> Tensor:
        """Logarithm of the standard deviation(s) of a kind, or of 'signal'."""
        return getattr(self, f"raw_{name}_constraint").transform(getattr(self, f"raw_{name}"))

    def set(self, name: str, log_std: Tensor) -> None:
        """Assign what is learned, clamped to just inside the bounds (the transform is infinite on them)."""
        low, high = self.bounds(name)
        margin = 1e-6 * (high - low)
        wanted = torch.where(self.free(name), log_std.double(), getattr(self, f"fixed_{name}"))
        inside = getattr(self, f"raw_{name}_constraint").inverse_transform(wanted.clamp(low + margin, high - margin))
        getattr(self, f"raw_{name}").data.copy_(inside)

    def free(self, name: str) -> Tensor:
        """(values,) bool: which of them are learned."""
        return getattr(self, f"free_{name}")

    def bounds(self, name: str) -> tuple[Tensor, Tensor]:
        """Bounds of log_std."""
        constraint = getattr(self, f"raw_{name}_constraint")
        return constraint.lower_bound, constraint.upper_bound

    def prior(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the prior of log_std."""
        prior = getattr(self, f"{name}_prior")
        return prior.loc, prior.scale

    def log_prior(self, name: str) -> tuple[float, Tensor]:
        """Log density of the prior of what is learned at the present log_std, and its gradient with respect to it."""
        with torch.enable_grad():
            x = self.log_std(name).detach().requires_grad_()
            value = (getattr(self, f"{name}_prior").log_prob(x) * self.free(name)).sum()
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
    """The labels of one kind that are there, as scaled rows: which rows of the covariance, their factors, values and noise.

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


def observed_labels(targets: Targets, counts: Tensor) -> dict[str, Observations]:
    """The labels by kind; the only place where unknown (NaN) labels are dropped."""
    a, b = (torch.tensor(axis, device=counts.device) for axis in zip(*VOIGT, strict=True))
    per_atom = 1 / counts.to(targets.energies.dtype)
    flat = {
        "energies": (targets.energies * per_atom, per_atom, targets.energies_noise),
        "forces": (targets.forces.flatten(), None, targets.forces_noise.flatten()),
        "stresses": (targets.stresses[:, a, b].flatten(), None, targets.stresses_noise.repeat_interleave(len(VOIGT))),
    }
    out = {}
    for kind, (values, scale, noise) in flat.items():
        present = (~torch.isnan(values)).nonzero()[:, 0]
        scale = torch.ones_like(values) if scale is None else scale
        out[kind] = Observations(present, scale[present], values[present], noise[present])
    return out
