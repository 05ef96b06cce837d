"""Labels far from all others: energies against a robust fit of the composition, and forces against those of the same element."""

from __future__ import annotations

import torch
from torch import Tensor

from gpmlp.core.errors import chemical_symbol
from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.io.label_checks.totals import isolated_frames
from gpmlp.io.label_checks.units import FORCE_UNITS

MANY_DEVIATIONS = 30.0  # times the median absolute deviation (x 1.4826)
FAILED = 10.0  # eV/atom: more is no structure among others of the set, unless forces are as wild
SUSPICIOUS = 3.0  # eV/atom
WILD_FORCE = 10.0  # eV/A: with forces like that large energies are believed
FEWEST = 10  # frames
FORCE_FACTOR, LARGE_FORCE = 30.0, 100.0  # times the 95 % quantile of the element; eV/A
LARGEST_MEDIAN = 18.0  # eV/A, of forces; in sets of solids, liquids and molecules to 2000 K it is 0.01 to 3, in cells displaced by 0.4 A 14
SMALL_UNITS = ("kcal/mol/A", "kJ/mol/A", "meV/A")
ITERATIONS = 30
# what may be the cause of energies far from others, and what to do
AS_FOUND = {
    "error": (
        ": probably a failed calculation",
        "Compute it again or remove it; a fit gives it a noise as large as that, so that it does not decide the noise of all others.",
    ),
    "warning": ("", "Nothing is wrong if it is meant (a dimer, a strongly compressed or torn structure)."),
}
AS_SINGLE = (
    ": a single atom that is not marked as isolated",
    "Mark it by config_type=isolated_atom if that is what it is.",
)


def energy_deviations(structures: Structures, targets: Targets) -> Tensor:
    """(structures,) energies per atom less a robust fit of energies of elements, eV/atom; NaN where there is none, and of isolated atoms.

    Least absolute deviations by iterated reweighting: half of the frames less one may be wrong.
    """
    out = torch.full((len(structures),), torch.nan, dtype=torch.float64)
    used = (~targets.energies.isnan()).cpu() & ~isolated_frames(structures, targets)
    if not used.any():
        return out
    shares = structures.composition(structures.distinct_species).double().cpu()[used]
    shares = shares / shares.sum(1, keepdim=True)
    energies = (targets.energies / structures.counts).double().cpu()[used]
    weight = torch.ones_like(energies)
    for _ in range(ITERATIONS):
        root = weight.sqrt()
        solution = torch.linalg.lstsq(shares * root[:, None], (energies * root)[:, None], driver="gelsd").solution[:, 0]
        deviation = energies - shares @ solution
        scale = deviation.abs().median().clamp_min(1e-9)
        weight = 1 / deviation.abs().clamp_min(0.01 * scale)
    out[used] = deviation - deviation.median()
    return out


def failed_energies(structures: Structures, targets: Targets) -> Tensor:
    """(structures,) bool: energies that are no energies of these structures: exactly zero, or eV/atom from all others at quiet forces."""
    deviation = energy_deviations(structures, targets)
    known = ~deviation.isnan()
    if int(known.sum()) < FEWEST:
        return torch.zeros(len(structures), dtype=torch.bool)
    scale = float(1.4826 * deviation[known].abs().median())
    far = deviation.nan_to_num().abs() > max(MANY_DEVIATIONS * scale, 1e-3)
    zero = (targets.energies.cpu() == 0) & far & (deviation.nan_to_num().abs() > 0.5)
    wild = _largest_force(structures, targets) > WILD_FORCE
    return zero | (far & (deviation.nan_to_num().abs() > FAILED) & ~wild)


def check_outliers(structures: Structures, targets: Targets) -> list[Finding]:
    """Findings about single energies and forces that are far from all others."""
    return [
        *_energy_outliers(structures, targets),
        *_exact_zeros(structures, targets),
        *_force_outliers(structures, targets),
        *_force_size(structures, targets),
    ]


def _energy_outliers(structures: Structures, targets: Targets) -> list[Finding]:
    deviation = energy_deviations(structures, targets)
    known = ~deviation.isnan()
    if int(known.sum()) < FEWEST:
        return []
    scale = float(1.4826 * deviation[known].abs().median())
    failed = failed_energies(structures, targets)
    far = deviation.nan_to_num().abs() > max(MANY_DEVIATIONS * scale, SUSPICIOUS)
    wild = _largest_force(structures, targets) > WILD_FORCE
    out = []
    levels: list[tuple[Severity, Tensor]] = [("error", failed), ("warning", far & ~failed & ~wild)]
    for severity, which in levels:
        index = which.nonzero().flatten()
        if not len(index):
            continue
        index = index[deviation[index].abs().argsort(descending=True, stable=True)]
        first, several = int(index[0]), len(index) > 1
        cause, advice = AS_SINGLE if int(structures.counts[index].max()) == 1 else AS_FOUND[severity]
        text = (
            f"{f'the energies of {len(index)} frames are up to' if several else 'the energy is'} {deviation[first]:+.4g} eV/atom from all "
            f"others of the composition ({float(targets.energies[first]):.6g} eV; the others scatter by {scale:.2g} eV/atom){cause}."
        )
        numbers = {
            "deviation_eV_per_atom": float(deviation[first]),
            "frames": float(len(index)),
        }
        names = tuple(structures.names[i] for i in index.tolist())
        out.append(Finding("energy-outlier", severity, text, names, numbers, advice))
    return out


def _exact_zeros(structures: Structures, targets: Targets) -> list[Finding]:
    """Energies of exactly zero in several frames under forces, where other frames have others; failed ones are said apart."""
    zero = (targets.energies.cpu() == 0) & (_largest_force(structures, targets) > 0)
    others = ~targets.energies.cpu().isnan() & ~zero & ~isolated_frames(structures, targets)
    index = (zero & ~failed_energies(structures, targets)).nonzero().flatten().tolist()
    if len(index) < 2 or not others.any():
        return []
    text = f"the energy of {len(index)} frames is exactly 0 eV while forces act, and that of {int(others.sum())} frames is not."
    numbers = {"frames": float(len(index))}
    advice = "Probably these were not computed: compute them again, or remove their energies."
    return [
        Finding("energies-exactly-zero", "warning", text, tuple(structures.names[i] for i in index), numbers, advice)
    ]


def _largest_force(structures: Structures, targets: Targets) -> Tensor:
    """(structures,) eV/A; 0 where no force is known."""
    size = targets.forces.double().cpu().norm(dim=1).nan_to_num()
    return torch.zeros(len(structures), dtype=torch.float64).scatter_reduce(
        0, structures.structure_of_atom.cpu(), size, "amax"
    )


def _force_size(structures: Structures, targets: Targets) -> list[Finding]:
    """Forces that are large everywhere: in another unit, which energies in a unit of the same system do not contradict."""
    size = targets.forces.double().norm(dim=1)
    size = size[~size.isnan() & (size > 0)]
    if len(size) < FEWEST or not float(size.median()) > LARGEST_MEDIAN:
        return []
    median = float(size.median())
    units = [f"{median / x:.2g} if they are in {name}" for name, x in FORCE_UNITS.items() if name in SMALL_UNITS]
    text = (
        f"half of the forces are larger than {median:.3g} eV/A, where 0.01 to 3 eV/A are usual: they are probably in another unit ("
        f"{', '.join(units)}), and energies in a unit of the same kind would not contradict them."
    )
    advice = "Convert energies to eV and forces to eV/A, unless atoms are meant to be that far displaced or compressed."
    return [Finding("forces-in-another-unit", "warning", text, (), {"median_eV_per_A": median}, advice)]


def _force_outliers(structures: Structures, targets: Targets) -> list[Finding]:
    """Forces on single atoms that are huge beside those on all others of their element."""
    size, owner = targets.forces.double().norm(dim=1), structures.structure_of_atom
    out = []
    for z in structures.distinct_species:
        atoms = ((structures.species == z) & ~size.isnan()).nonzero().flatten()
        if len(atoms) < FEWEST:
            continue
        here = size[atoms]
        usual = float(here.kthvalue(max(1, int(0.95 * len(here)))).values)
        wild = atoms[here > max(FORCE_FACTOR * usual, LARGE_FORCE)]
        if not len(wild):
            continue
        worst = int(wild[size[wild].argmax()])
        place = worst - int(structures.offsets[owner[worst]])
        frames = owner[wild].unique().tolist()
        frames = [int(owner[worst]), *(f for f in frames if f != int(owner[worst]))]
        text = (
            f"the force on atom {place} ({chemical_symbol(z)}) is {float(size[worst]):.4g} eV/A, where 95 % of this element are below "
            f"{usual:.3g} eV/A{f'; so on {len(wild)} atoms' if len(wild) > 1 else ''}."
        )
        numbers = {"force_eV_per_A": float(size[worst]), "quantile_95_eV_per_A": usual, "atoms": float(len(wild))}
        advice = "Compute the frame again or remove it, unless atoms are meant to be that close."
        out.append(
            Finding("force-outlier", "warning", text, tuple(structures.names[f] for f in frames), numbers, advice)
        )
    return out
