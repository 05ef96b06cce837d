"""The zero and the unit of total energies: isolated atoms, binding energies, energies of all electrons, undetermined elements.

No energy of a neutral system lies far below that of all its electrons. For neutral atoms it is, in Hartree (Schwinger, Phys. Rev. A 24,
2353 (1981), eq. 1; Englert, Semiclassical Theory of Atoms, Springer 1988),

    E(Z) = -0.768745 Z^(7/3) + Z^2 / 2 - 0.269900 Z^(5/3),

to 0.5 % from carbon to krypton; relativity adds up to 7 % for the heaviest. Energies that have this value in another unit are all-electron
energies in that unit. Pseudopotential energies are anything above it, so that of them only values beyond it can be told to be wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpmlp.core.errors import chemical_symbol, hill_formula
from gpmlp.core.findings import Finding, Severity
from gpmlp.core.quantities import Targets, is_isolated_atom
from gpmlp.core.structures import Structures
from gpmlp.core.units import HARTREE
from gpmlp.io.label_checks.units import ENERGY_UNITS
from gpmlp.potential.baselines import IsolatedAtoms

BINDING = (-20.0, 10.0)  # eV/atom: no bound or strongly compressed structure lies outside
ATOMS_DIFFER, ATOMS_CONTRADICT = 1e-3, 0.05  # eV
LOWEST = 1.15  # times the energy of all electrons: below it nothing can be
FEWEST = 5  # frames of different sizes that tell totals from energies per atom
SIZES = 1.5  # ratio of the largest to the smallest number of atoms among them


def all_electron_energy(z: Tensor) -> Tensor:
    """Energy of a neutral atom with all its electrons, eV."""
    z = z.double()
    return HARTREE * (-0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.269900 * z ** (5 / 3))


def isolated_frames(structures: Structures, targets: Targets) -> Tensor:
    """(structures,) bool: single atoms that the file marks as isolated."""
    named = torch.tensor([is_isolated_atom(label) for label in targets.config_types], dtype=torch.bool)
    return named & (structures.counts.cpu() == 1)


def binding_energy(structures: Structures, targets: Targets) -> float:
    """Median energy of the frames less that of their isolated atoms, eV/atom; NaN unless there are isolated atoms of all elements."""
    atoms = IsolatedAtoms.from_frames(structures, targets)
    species = structures.distinct_species
    if not set(atoms) >= set(species):
        return math.nan
    energies = torch.tensor([atoms[z] for z in species], dtype=torch.float64)
    bound = targets.energies.double().cpu() - structures.composition(species).double().cpu() @ energies
    per_atom = (bound / structures.counts.cpu())[~isolated_frames(structures, targets)]
    return float(per_atom.nanmedian()) if len(per_atom) else math.nan


def atoms_of_another_reference(structures: Structures, targets: Targets) -> bool:
    """Whether energies less those of isolated atoms are no binding energies, so that no baseline can be made of these atoms."""
    binding = binding_energy(structures, targets)
    return not math.isnan(binding) and not BINDING[0] <= binding <= BINDING[1]


def check_totals(structures: Structures, targets: Targets) -> list[Finding]:
    """Findings about the zero and the unit of energies."""
    if targets.energies.isnan().all():
        text = "there are no energies: the zero of predicted energies is arbitrary, and they are not judged."
        return [Finding("no-energies", "warning", text)]
    return [
        *_isolated_atoms_differ(structures, targets),
        *_binding(structures, targets),
        *_missing_atoms(structures, targets),
        *(_energies_per_atom(structures, targets) or _all_electrons(structures, targets)),
        *_undetermined(structures, targets),
    ]


def _isolated_atoms_differ(structures: Structures, targets: Targets) -> list[Finding]:
    out = []
    known = isolated_frames(structures, targets) & ~targets.energies.isnan()
    for z in structures.distinct_species:
        here = (known & (structures.species[structures.offsets[:-1].clamp_max(structures.n_atoms - 1)] == z)).nonzero()[
            :, 0
        ]
        if len(here) < 2:
            continue
        energies = targets.energies[here].double()
        low, high = float(energies.min()), float(energies.max())
        if high - low <= ATOMS_DIFFER:
            continue
        text = f"{len(here)} isolated atoms of {chemical_symbol(z)} differ: {low:.6g} to {high:.6g} eV; the last one is taken."
        severity: Severity = "error" if high - low > ATOMS_CONTRADICT else "warning"
        names = tuple(structures.names[i] for i in here.tolist())
        numbers = {"lowest_eV": low, "highest_eV": high}
        out.append(
            Finding("isolated-atoms-differ", severity, text, names, numbers, "Keep the one of the reference method.")
        )
    return out


def _binding(structures: Structures, targets: Targets) -> list[Finding]:
    if not atoms_of_another_reference(structures, targets):
        return []
    binding = binding_energy(structures, targets)
    text = (
        f"isolated atoms of another reference than the other frames: these are bound by {binding:.4g} eV/atom (median of E less isolated "
        f"atoms; {BINDING[0]:g} to {BINDING[1]:g} can be). A fit leaves these atoms out and takes energies of atoms by least squares."
    )
    names = tuple(structures.names[i] for i in isolated_frames(structures, targets).nonzero().flatten().tolist())
    advice = (
        "Compute the isolated atoms with the method, pseudopotentials and unit of the other frames, or remove them."
    )
    return [
        Finding("isolated-atoms-of-another-reference", "error", text, names, {"binding_eV_per_atom": binding}, advice)
    ]


def _missing_atoms(structures: Structures, targets: Targets) -> list[Finding]:
    isolated = IsolatedAtoms.from_frames(structures, targets)
    missing = [chemical_symbol(z) for z in structures.distinct_species if z not in isolated]
    if not isolated or not missing:
        return []
    symbols = ", ".join(chemical_symbol(z) for z in sorted(isolated))
    text = (
        f"there are isolated_atom frames of {symbols} but none of {', '.join(missing)}: energies of atoms are least squares over the "
        "compositions, as if there were none."
    )
    advice = "Add the missing ones, or give all in baseline.isolated_atoms."
    return [Finding("isolated-atoms-missing", "warning", text, advice=advice)]


def _undetermined(structures: Structures, targets: Targets) -> list[Finding]:
    """Elements whose energies the compositions cannot tell apart, where no isolated atoms do."""
    species = structures.distinct_species
    known = ~targets.energies.isnan()
    compositions = structures.composition(species).double()[known].unique(dim=0)
    rank = int(torch.linalg.matrix_rank(compositions))
    if rank == len(species):
        return []
    formula = hill_formula(dict(zip(species, compositions[0].tolist(), strict=True)))
    which = (
        f"all have the composition {formula}"
        if len(compositions) == 1
        else f"their {len(compositions)} compositions span {rank}"
    )
    text = (
        f"the energies of the {len(species)} elements are not determined by those of the frames ({which}): energies of other compositions "
        "are arbitrary."
    )
    advice = "Add an isolated_atom frame of each element, or give baseline.isolated_atoms, if energies of other compositions matter."
    numbers = {"elements": float(len(species)), "independent_compositions": float(rank)}
    return [Finding("energies-of-elements-undetermined", "warning", text, (), numbers, advice)]


def _energies_per_atom(structures: Structures, targets: Targets) -> list[Finding]:
    """Energies that do not grow with the number of atoms."""
    known = ~targets.energies.isnan() & (structures.counts > 1)
    counts, energies = structures.counts[known].double(), targets.energies[known].double()
    if len(counts) < FEWEST or counts.max() < SIZES * counts.min():
        return []
    spread, spread_per_atom = (
        float((1.4826 * (x - x.median()).abs().median()) / x.median().abs().clamp_min(1e-9))
        for x in (energies, energies / counts)
    )
    apart = (counts / counts.median()).log().abs() > math.log(SIZES) / 2
    if not apart.any() or spread > 0.3 or spread > 0.3 * spread_per_atom:
        return []
    other = (energies[apart] / energies.median() - 1).abs().median()
    if other > 0.2:
        return []
    text = (
        f"energies do not grow with the number of atoms ({energies.min():.4g} to {energies.max():.4g} eV for {int(counts.min())} to "
        f"{int(counts.max())} atoms): they are probably per atom, and total energies are meant."
    )
    return [
        Finding(
            "energies-per-atom", "error", text, (), {"relative_spread": spread}, "Multiply them by the number of atoms."
        )
    ]


def _all_electrons(structures: Structures, targets: Targets) -> list[Finding]:
    """Energies that are those of all electrons in another unit, or lower than these."""
    known = ~targets.energies.isnan() & ~isolated_frames(structures, targets)
    if not known.any():
        return []
    atoms = all_electron_energy(structures.species)
    totals = torch.zeros(len(structures), dtype=torch.float64).index_add_(0, structures.structure_of_atom, atoms)[known]
    heaviest = max(structures.distinct_species)
    ratio = float((targets.energies[known].double() / totals).median())
    within = 0.015 + 0.07 * (heaviest / 80) ** 2
    per_atom = targets.energies[known].double() * structures.counts[known] / totals
    candidates = {unit: ratio / x for unit, x in ENERGY_UNITS.items() if unit not in ("eV", "meV")}
    candidates["eV per atom"] = float(per_atom.median()) if structures.counts[known].min() > 1 else 0.0
    fits = [unit for unit, x in candidates.items() if abs(x - 1) < within]
    mean = float((targets.energies[known].double() / structures.counts[known]).mean())
    numbers = {"energy_per_atom": mean, "ratio_to_all_electrons": ratio}
    if fits and min(structures.distinct_species) < heaviest or fits and heaviest > 1:
        text = (
            f"energies ({mean:.6g} per atom on average) are what all electrons of these atoms have in {fits[0]}: they are probably in "
            f"{fits[0]}, and eV are meant."
        )
        return [
            Finding(
                "energies-in-another-unit", "warning", text, (), numbers, "Convert energies to eV (and check forces)."
            )
        ]
    if ratio > LOWEST:
        text = (
            f"energies ({mean:.6g} eV/atom on average) are {ratio:.3g} times those of all electrons of these atoms: they are not in eV, "
            "or not total energies."
        )
        return [
            Finding(
                "energies-in-another-unit", "error", text, (), numbers, "Convert energies to eV (and check forces)."
            )
        ]
    return []
