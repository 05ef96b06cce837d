"""Labels that a fit says are wrong: residuals far beyond all others, kinds that it cannot follow, stresses in another order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Prediction, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.core.units import GPA
from gpmlp.gp.energy_scale import EnergyScale
from gpmlp.io.label_checks import stresses, work
from gpmlp.io.label_checks.totals import isolated_frames
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
# a kind of labels is followed by a fit unless its errors exceed its scatter, or it is that correlated and its slope is outside
UNFOLLOWED, CORRELATED, SLOPES = 1.1, 0.8, (0.5, 2.0)
GIVEN_UP = 0.9  # of their scatter: labels of a kind that were taken for noise while the other kind is followed
TELLING = 0.3  # correlation of which a slope says something about signs and units
SMALLEST_UNFOLLOWED = {
    "energies": 5e-3,
    "forces": 0.1,
    "stresses": 2e-3,
}  # eV/atom, eV/A, eV/A^3: errors that may be anything
# a scale of energies is another one where that is likelier by GAIN nats, leaves half of the noise, and a unit explains it within RECOGNISED
SCALES_RIGHT, GAIN, EXPLAINED, RECOGNISED = (0.67, 1.5), 20.0, 0.5, 0.25
OPPOSITE = 2.0  # standard deviations of the cosine of unrelated forces: beyond it they point against the fit
SMALLEST_FORCE, FEWEST_OPPOSITE, SHARE_OPPOSITE = 0.1, 3, 0.02  # eV/A; frames; of the frames with larger forces
OFF_DIAGONAL = {"yz": (1, 2), "xz": (0, 2), "xy": (0, 1)}
EXCHANGED, MOST = 0.5, 2 / 3  # of the error, in another order; of the frames that then agree better
ADVICE = (
    "The label is wrong, or the model misses such frames: compute it again, or fit with --robust (recipe: robust: true), "
    "which leaves it out."
)


@dataclass(frozen=True)
class Agreement:
    """How labels of a kind agree with the fit to all labels.

    Attributes:
        slope: of labels on predictions; 1 where right.
        correlation: of the two.
        error, scatter: root mean squares of label less prediction, and of the labels; energies less those of the composition, eV/atom.
    """

    slope: float
    correlation: float
    error: float
    scatter: float

    @staticmethod
    def between(predictions: Tensor, labels: Tensor) -> Agreement:
        """Of (n,) predictions and labels without their means."""
        xx, yy, xy = (float(a @ b) for a, b in ((predictions, predictions), (labels, labels), (predictions, labels)))
        error, scatter = float((labels - predictions).square().mean().sqrt()), float(labels.square().mean().sqrt())
        return Agreement(xy / max(xx, 1e-300), xy / max((xx * yy) ** 0.5, 1e-300), error, scatter)

    def contradicts(self, kind: str) -> bool:
        """Whether the fit took the labels for noise, or follows them but for a factor."""
        if self.error < SMALLEST_UNFOLLOWED[kind]:
            return False
        factor = abs(self.correlation) > CORRELATED and not SLOPES[0] < self.slope < SLOPES[1]
        return factor or self.error > UNFOLLOWED * self.scatter

    def is_noise_beside(self, other: Agreement, kind: str) -> bool:
        """Whether the fit follows the other kind of labels, and these not at all."""
        followed = other.correlation > CORRELATED and other.error < 0.5 * other.scatter
        return followed and self.error > max(SMALLEST_UNFOLLOWED[kind], GIVEN_UP * self.scatter)


@dataclass(frozen=True, eq=False)
class LabelOutliers:
    """Labels whose residuals are far beyond all others.

    Attributes:
        energies: (structures,) bool; forces: (atoms,) bool.
        energy_residuals: (structures,) eV/atom, label less prediction from the other labels; force_residuals: (atoms,) eV/A;
            NaN where there is no label.
        energy_scatter: (structures,) eV/atom, force_scatter: (atoms,) eV/A: of all residuals, or of the config_type if larger.
        agreement: of the kinds that a fit may give up as noise where others contradict them, 'energies' and 'stresses'.
    """

    energies: Tensor
    forces: Tensor
    energy_residuals: Tensor
    force_residuals: Tensor
    energy_scatter: Tensor
    force_scatter: Tensor
    agreement: dict[str, Agreement] = field(default_factory=dict)

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


def find_label_outliers(
    potential: Potential, structures: Structures, targets: Targets, prediction: Prediction
) -> LabelOutliers:
    """Labels of the training data whose residuals are far beyond the others.

    The scatter is the root mean square of the 90 % smallest residuals, as a normal distribution has it: what is wrong does not enter.
    Of the energies with the largest residuals r the leave-one-out residual r / (1 - c / σ²) decides, with c the posterior variance and
    σ² the noise (Rasmussen & Williams 2006, section 5.4.2).

    Args:
        prediction: of these structures by the potential.
    """
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
    agreement = _agreement(structures, targets, prediction, ~far[0])
    return LabelOutliers(far[0], far[1], energies, forces, *around, agreement)


def _agreement(structures: Structures, targets: Targets, prediction: Prediction, used: Tensor) -> dict[str, Agreement]:
    """Agreement of energies, forces and stresses, of the frames that are used, where there are enough."""
    used = used & ~isolated_frames(structures, targets)
    shares = structures.composition(structures.distinct_species).double().cpu()
    shares = shares / shares.sum(1, keepdim=True)
    energies = (torch.stack([prediction.energies, targets.energies], 1) / structures.counts[:, None]).double().cpu()
    known = used & ~energies.isnan().any(1)
    energies, shares = energies[known], shares[known]
    out = {}
    if len(energies) >= FEWEST + shares.shape[1]:
        energies = energies - shares @ torch.linalg.lstsq(shares, energies, driver="gelsd").solution
        out["energies"] = Agreement.between(*energies.unbind(1))
    of_atoms = used[structures.structure_of_atom.cpu()]
    vectors = torch.stack([prediction.forces, targets.forces], 1).double().cpu()[of_atoms]
    vectors = vectors[~vectors.flatten(1).isnan().any(1)]
    if len(vectors) >= FEWEST:
        out["forces"] = Agreement.between(vectors[:, 0].flatten(), vectors[:, 1].flatten())
    tensors = torch.stack([prediction.stresses, targets.stresses], 1).double().cpu()[used]
    tensors = tensors[~tensors.flatten(1).isnan().any(1)].flatten(2)
    if len(tensors) >= FEWEST:
        tensors = tensors - tensors.mean(0)
        out["stresses"] = Agreement.between(tensors[:, 0].flatten(), tensors[:, 1].flatten())
    return out


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


def contradictions(
    structures: Structures,
    targets: Targets,
    prediction: Prediction,
    outliers: LabelOutliers,
    scale: EnergyScale | None,
    known: Sequence[Finding],
) -> list[Finding]:
    """What the fit says of labels that contradict each other; the first of these that is found, and exchanged stresses.

    Args:
        prediction: of these structures by the fit. scale: of the energies against the forces.
        known: findings of the labels themselves; what is said there is not said again.
    """
    said = {finding.kind for finding in known if finding.severity == "error"}
    found = opposite_forces(structures, targets, prediction)
    if not found and scale is not None and "energies-against-forces" not in said:
        found = scaled_energies(scale)
    found = found or contradicted_kinds(structures, outliers, known)
    return [*found, *exchanged_shears(structures, targets, prediction)]


def contradicted_kinds(structures: Structures, outliers: LabelOutliers, known: Sequence[Finding]) -> list[Finding]:
    """Energies, forces and stresses that the fit took for noise, or that follow it but for a sign or a unit.

    Args:
        known: findings of the labels themselves; what is said there is not said again.
    """
    said = {finding.kind for finding in known if finding.severity == "error"}
    failed = outliers.forces & (outliers.force_residuals > CERTAIN["forces"])  # these alone may upset energies
    if failed.any() or said & {"energies-against-forces", "energies-per-atom", stresses.KIND}:
        return []
    energies, tensors = (outliers.agreement.get(kind) for kind in ("energies", "stresses"))
    if energies is not None and energies.contradicts("energies"):
        return [_contradicted_energies(structures, energies)]
    forces = outliers.agreement.get("forces")
    if energies is not None and forces is not None:
        if forces.is_noise_beside(energies, "forces"):
            return [_contradicted_forces(energies, forces)]
        if energies.is_noise_beside(forces, "energies"):
            return [_contradicted_energies(structures, energies)]
    if tensors is None or not tensors.contradicts("stresses"):
        return []
    evidence = f"by a fit to all labels, which misses stresses by {tensors.error / GPA:.3g} GPa rms"
    numbers = {"error_GPa": tensors.error / GPA, "scatter_GPa": tensors.scatter / GPA}
    if abs(tensors.correlation) > CORRELATED:
        volume = float(structures.volumes.nanmean())
        return [stresses.scale_finding(1 / tensors.slope, volume, evidence, (), numbers)]
    text = f"the stresses contradict the other labels, and scatter by {tensors.scatter / GPA:.3g} GPa ({evidence})."
    advice = "Check their unit, eV/A^3, their sign and order, or leave them out (use_stresses: false)."
    return [Finding(stresses.KIND, "error", text, (), numbers, advice)]


def opposite_forces(structures: Structures, targets: Targets, prediction: Prediction) -> list[Finding]:
    """Frames whose forces point against those of the fit, where it follows others: they are gradients.

    Of unrelated forces without a net force the cosine of the 3n components scatters by 1/√(3n - 3).
    """
    owner, forces, fitted = (
        structures.structure_of_atom.cpu(),
        targets.forces.double().cpu(),
        prediction.forces.double().cpu(),
    )
    known = ~forces.isnan()
    products = [
        torch.where(known, a * b, 0.0).sum(1) for a, b in ((forces, fitted), (forces, forces), (fitted, fitted))
    ]
    along, labels, model = (torch.zeros(len(structures)).double().index_add(0, owner, p) for p in products)
    components = torch.zeros(len(structures)).double().index_add(0, owner, known.double().sum(1))
    large = labels > SMALLEST_FORCE**2 * components
    significance = along / (labels * model).sqrt().clamp_min(1e-300) * (components - 3).clamp_min(0).sqrt()
    against = (large & (significance < -OPPOSITE)).nonzero()[:, 0].tolist()
    with_it, all_large = int((large & (significance > OPPOSITE)).sum()), int(large.sum())
    clear = 2 * (len(against) + with_it) > all_large and 2 * with_it >= len(against)
    if len(against) < max(FEWEST_OPPOSITE, SHARE_OPPOSITE * all_large) or not clear:
        return []
    text = (
        f"the forces of {len(against)} of {all_large} frames point against those of a fit to all labels, and those of {with_it} "
        "along them: in some of the frames they have the wrong sign (they are gradients)."
    )
    numbers = {"frames_against": float(len(against)), "frames_along": float(with_it)}
    names = tuple(structures.names[i] for i in against)
    advice = "Turn the sign of the forces of these frames (F = -dE/dr), or of the others, whichever are gradients."
    return [Finding("forces-of-opposite-signs", "error", text, names, numbers, advice)]


def scaled_energies(scale: EnergyScale) -> list[Finding]:
    """Energies that are most likely a multiple of what the forces lead to, if a unit explains that."""
    low, high = SCALES_RIGHT
    if low < scale.factor < high or scale.gain < GAIN or scale.noise > EXPLAINED * scale.noise_at_one:
        return []
    reasons = work.explain_slope(scale.factor, within=RECOGNISED, causes=1)
    if not reasons:
        return []
    text = (
        f"the energies contradict the forces: {scale.factor:.3g} times what the forces lead to is likelier than once (by {scale.gain:.0f} "
        f"nats), and misses energies {scale.noise_at_one / scale.noise:.2g} times less; probably {' or '.join(reasons)}."
    )
    numbers = {"scale": scale.factor, "gain_nats": scale.gain}
    return [Finding("energies-against-forces", "error", text, (), numbers, work.ADVICE)]


def _contradicted_energies(structures: Structures, energies: Agreement) -> Finding:
    counts = structures.counts.unique()
    reasons: list[str] = []
    if (
        energies.error < UNFOLLOWED * energies.scatter and abs(energies.correlation) < CORRELATED
    ):  # the slope is not known
        reasons = ["they are of two zeros (files, codes, settings)", "in another unit than the forces"]
    elif abs(energies.correlation) > TELLING:
        reasons = work.explain_slope(energies.slope, float(counts[0]) if len(counts) == 1 else math.nan)
        reasons = [text for text in reasons if " and " not in text]  # one cause: the slope is no better known
        if energies.slope < 0:
            reasons = reasons or ["the forces have the wrong sign (they are gradients)"]
    text = (
        f"the energies contradict the forces: they scatter by {energies.scatter:.3g} eV/atom, and a fit to all labels misses them by "
        f"{energies.error:.3g} eV/atom rms{'; probably ' + ' or '.join(reasons) if reasons else ''}."
    )
    numbers = {"error_eV_per_atom": energies.error, "scatter_eV_per_atom": energies.scatter, "slope": energies.slope}
    return Finding("energies-against-forces", "error", text, (), numbers, work.ADVICE)


def _contradicted_forces(energies: Agreement, forces: Agreement) -> Finding:
    text = (
        f"the forces contradict the energies: they scatter by {forces.scatter:.3g} eV/A, and a fit to all labels that follows the energies "
        f"(to {1e3 * energies.error:.3g} of {1e3 * energies.scatter:.3g} meV/atom) misses them by {forces.error:.3g} eV/A (correlation "
        f"{forces.correlation:.2f})."
    )
    advice = (
        "Check that they belong to the same frames, with the atoms in the same order and the axes the same way round."
    )
    numbers = {
        "error_eV_per_A": forces.error,
        "scatter_eV_per_A": forces.scatter,
        "correlation": forces.correlation,
    }
    return Finding("energies-against-forces", "error", text, (), numbers, advice)


def exchanged_shears(structures: Structures, targets: Targets, prediction: Prediction) -> list[Finding]:
    """Config_types whose off-diagonal stresses agree with the fit in another order: codes differ in it (VASP has xx yy zz xy yz zx).

    Forces and energies decide about the fit, so it tells; if there are none, or too few, nothing is found.
    """
    rows, columns = zip(*OFF_DIAGONAL.values(), strict=True)
    labels, fitted = (s[:, rows, columns].double().cpu() for s in (targets.stresses, prediction.stresses))
    known = ~(labels.isnan() | fitted.isnan()).any(1)
    orders, out = list(itertools.permutations(range(3))), []
    for name in dict.fromkeys(targets.config_types):
        members = known & torch.tensor([label == name for label in targets.config_types])
        frames = members.nonzero()[:, 0].tolist()
        squares = torch.stack([(fitted[members] - labels[members][:, order]).square().mean(1) for order in orders])
        if len(frames) < FEWEST:
            continue
        error = squares.mean(1).sqrt()
        best = int(error.argmin())
        most = (squares[best] < squares[0]).double().mean() > MOST
        if error[best] > EXCHANGED * error[0] or error[0] < SMALLEST_UNFOLLOWED["stresses"] or not most:
            continue
        words = ", ".join(OFF_DIAGONAL), ", ".join(list(OFF_DIAGONAL)[k] for k in np.argsort(orders[best]))
        numbers = {"error_GPa": float(error[0]) / GPA, "error_in_that_order_GPa": float(error[best]) / GPA}
        text = (
            f"what these frames{f' ({name})' if name else ''} have as {words[0]} of their stresses seems to be {words[1]}: "
            f"the fit then misses off-diagonal stresses by {float(error[best]) / GPA:.2g} GPa rms, "
            f"and by {float(error[0]) / GPA:.2g} as they are."
        )
        advice = "Put the components in order (ASE: xx yy zz yz xz xy), or leave stresses out (use_stresses: false)."
        names = tuple(structures.names[i] for i in frames)
        out.append(Finding("stress-components-exchanged", "warning", text, names, numbers, advice))
    return out


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
