"""Labels that a fit says are wrong: residuals far beyond all others, of energies by leaving each out, of forces atom by atom."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.potential.potential import Potential

FAR = {
    "energies": 8.0,
    "forces": 20.0,
}  # times the trimmed scatter of the residuals; those of forces have heavier tails
SMALLEST = {"energies": 0.02, "forces": 1.0}  # eV/atom, eV/A: less may be what the model misses
CERTAIN = {"energies": 0.5, "forces": 20.0}  # eV/atom, eV/A: more is no misfit of a model
TRIMMED = 0.9  # share of the smallest residuals that the scatter is that of
NORMAL = 0.789  # root mean square of the 90 % smallest of normal numbers
FEWEST = 10  # residuals
LEFT_OUT = 50  # energies with the largest residuals whose leverage is computed
LARGEST_SHARE = (
    0.9  # of its noise variance that is left at a label: noise chosen too small must not make residuals of nothing
)
BEYOND_NOISE = 4.0  # training error over learned noise
ADVICE = (
    "The label is wrong, or the model misses such frames: compute it again, or fit with --robust (recipe: robust: true), "
    "which leaves it out."
)


@dataclass(frozen=True, eq=False)
class LabelOutliers:
    """Labels whose residuals are far beyond all others.

    Attributes:
        energies: (structures,) bool; forces: (atoms,) bool.
        energy_residuals: (structures,) eV/atom, label less prediction from the other labels; force_residuals: (atoms,) eV/A;
            NaN where there is no label.
        energy_scatter: (structures,) eV/atom, force_scatter: (atoms,) eV/A: of all residuals, or of the config_type if larger.
    """

    energies: Tensor
    forces: Tensor
    energy_residuals: Tensor
    force_residuals: Tensor
    energy_scatter: Tensor
    force_scatter: Tensor

    def __bool__(self) -> bool:
        return bool(self.energies.any() or self.forces.any())

    def remove_from(self, targets: Targets) -> Targets:
        """The targets without these labels."""
        return replace(
            targets,
            energies=targets.energies.masked_fill(self.energies.to(targets.energies.device), math.nan),
            forces=targets.forces.masked_fill(self.forces.to(targets.forces.device)[:, None], math.nan),
        )

    def findings(self, structures: Structures, removed: bool = False) -> list[Finding]:
        """One finding for energies, one for forces, the farthest first.

        Args:
            removed: whether the fit goes on without them.
        """
        owner = structures.structure_of_atom.cpu()
        end = "; left out of the fit (robust)." if removed else "."
        advice = "" if removed else ADVICE
        out = []
        if self.energies.any():
            index = _farthest(self.energies, self.energy_residuals)
            off, scatter = float(self.energy_residuals[index[0]]), float(self.energy_scatter[index[0]])
            severity: Severity = "error" if abs(off) > CERTAIN["energies"] and not removed else "warning"
            text = (
                f"the energy is {off:+.4g} eV/atom off what all other labels lead to, {abs(off) / scatter:.3g} times the "
                f"scatter{_more(index, 'energies')}{end}"
            )
            numbers = {
                "deviation_eV_per_atom": off,
                "scatter_eV_per_atom": scatter,
                "frames": float(len(index)),
            }
            frames = tuple(structures.names[i] for i in index)
            out.append(Finding("label-outlier-energy", severity, text, frames, numbers, advice))
        if self.forces.any():
            atoms = _farthest(self.forces, self.force_residuals)
            off, frame = float(self.force_residuals[atoms[0]]), int(owner[atoms[0]])
            scatter = float(self.force_scatter[atoms[0]])
            severity = "error" if off > CERTAIN["forces"] and not removed else "warning"
            text = (
                f"the force on atom {atoms[0] - int(structures.offsets[frame])} is {off:.4g} eV/A off what the model makes of all labels, "
                f"{off / scatter:.3g} times the scatter{_more(atoms, 'forces')}{end}"
            )
            numbers = {"deviation_eV_per_A": off, "scatter_eV_per_A": scatter, "atoms": float(len(atoms))}
            frames = tuple(structures.names[i] for i in dict.fromkeys(owner[atoms].tolist()))
            out.append(Finding("label-outlier-force", severity, text, frames, numbers, advice))
        return out


def _more(index: list[int], what: str) -> str:
    return f" (the farthest of {len(index)} {what})" if len(index) > 1 else ""


def _farthest(which: Tensor, residuals: Tensor) -> list[int]:
    index = which.nonzero().flatten()
    return index[residuals[index].abs().argsort(descending=True, stable=True)].tolist()


def find_label_outliers(potential: Potential, structures: Structures, targets: Targets) -> LabelOutliers:
    """Labels of the training data whose residuals are far beyond the others.

    The scatter is the root mean square of the 90 % smallest residuals, as a normal distribution has it: what is wrong does not enter.
    Of the energies with the largest residuals r the leave-one-out residual r / (1 - c / σ²) decides, with c the posterior variance and
    σ² the noise (Rasmussen & Williams 2006, section 5.4.2).
    """
    parts = list(chunk_structures(structures, CHUNK_ATOMS))
    prediction = Prediction.concatenate(parallel.map_pieces(lambda part: potential(part), parts))
    energies = ((targets.energies - prediction.energies) / structures.counts).double().cpu()
    forces = (targets.forces - prediction.forces).norm(dim=1).double().cpu()
    types = {label: k for k, label in enumerate(dict.fromkeys(targets.config_types))}
    group = torch.tensor([types[label] for label in targets.config_types], dtype=torch.long)
    around = _scatters(energies, group), _scatters(forces / 3**0.5, group[structures.structure_of_atom.cpu()])
    energies = _leave_out(potential, structures, targets, energies)
    far = [
        residuals.nan_to_num().abs() > (FAR[kind] * scatter).clamp_min(SMALLEST[kind])
        for kind, residuals, scatter in zip(FAR, (energies, forces), around, strict=True)
    ]
    return LabelOutliers(far[0], far[1], energies, forces, *around)


def _scatters(residuals: Tensor, group: Tensor) -> Tensor:
    """(n,) the scatter of all residuals, or of those of the same group where that is larger."""
    out = torch.full_like(residuals, _scatter(residuals))
    for k in group.unique().tolist():
        here = _scatter(residuals[group == k])
        out[group == k] = out[group == k].clamp_min(here if here < math.inf else 0.0)
    return out


def _scatter(residuals: Tensor) -> float:
    """Standard deviation of normal residuals from the smallest 90 % of them; infinite where there are too few."""
    size = residuals[~residuals.isnan()].abs().sort().values
    if len(size) < FEWEST:
        return math.inf
    return max(float(size[: int(TRIMMED * len(size))].square().mean().sqrt()) / NORMAL, 1e-9)


def _leave_out(potential: Potential, structures: Structures, targets: Targets, residuals: Tensor) -> Tensor:
    """Leave-one-out residuals in place of the LEFT_OUT largest ones."""
    noise = potential.noise.get("energies")
    index = residuals.nan_to_num().abs().argsort(descending=True)[:LEFT_OUT].sort().values
    if potential.variances is None or not noise or not (~residuals.isnan()).any():
        return residuals
    part = structures.select(index.to(structures.positions.device))
    pieces = list(chunk_structures(part, CHUNK_ATOMS))
    variance = Prediction.concatenate(
        parallel.map_pieces(lambda piece: potential(piece, "energies", calibrated=False), pieces)
    ).energies_variance
    assert variance is not None, "energies were asked for"
    own = targets.energies_noise.double().cpu()[index]
    share = (variance.data / part.counts.square()).double().cpu() / torch.where(own.isnan(), noise, own).square()
    return residuals.index_copy(0, index, residuals[index] / (1 - share.clamp(0, LARGEST_SHARE)))


def noise_finding(
    structures: Structures, outliers: LabelOutliers, train_rmse: dict[str, float], noise: dict[str, float]
) -> list[Finding]:
    """The frames with the largest residuals, where training errors are far beyond the learned noise."""
    out = []
    owner = structures.structure_of_atom.cpu()
    for kind, unit, residuals in (
        ("energies", "eV/atom", outliers.energy_residuals),
        ("forces", "eV/A", outliers.force_residuals),
    ):
        if kind not in noise or not train_rmse.get(kind, 0.0) > BEYOND_NOISE * noise[kind]:
            continue
        index = residuals.nan_to_num().abs().argsort(descending=True)[:10]
        frames = index.tolist() if kind == "energies" else list(dict.fromkeys(owner[index].tolist()))
        ratio = train_rmse[kind] / noise[kind]
        text = (
            f"training errors of {kind} ({train_rmse[kind]:.3g} {unit} rms) are {ratio:.3g} times the noise that was learned: labels "
            f"contradict one another, or the model cannot follow them; largest here, {float(residuals[index[0]].abs()):.3g} {unit}."
        )
        numbers = {"train_rmse": train_rmse[kind], "noise": noise[kind], "ratio": ratio}
        advice = "Look at these frames and at the findings about labels before the recipe is changed."
        names = tuple(structures.names[i] for i in frames)
        out.append(Finding("training-error-beyond-noise", "warning", text, names, numbers, advice))
    return out
