"""Fit turns structures with targets into a Potential and a FitReport, in two passes over the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmlp import baselines, checks, defaults, descriptors, inducing, neighbors, units
from gpmlp.baselines import Baseline
from gpmlp.consistency import check_stress_consistency
from gpmlp.environments import Descriptor
from gpmlp.fit_report import FitReport, Progress, Stages
from gpmlp.gp import covariances, evidence, leave_one_out, likelihood, posterior
from gpmlp.gp.covariances import InducingBlock
from gpmlp.gp.kernels import ZonalKernel
from gpmlp.gp.likelihood import Hyperparameters
from gpmlp.gp.posterior import FIXED, RowFactor, SparsePosterior
from gpmlp.potential import MeanBlock, Potential, Term, chunks, make_kernel
from gpmlp.quantities import KINDS, ErrorTable, Prediction, Targets, errors
from gpmlp.recipe import Recipe
from gpmlp.structures import Structures

EVIDENCE_COLUMNS = 1200  # columns with which noises are learned first; the rest only refines them
ISOLATED_NOISE = 1e-3  # eV
PASS_ATOMS = 128  # atoms of a chunk of rows
NOISE_FIELDS = {"energies": "energy_per_atom", "forces": "force", "stresses": "stress"}


@dataclass(frozen=True, eq=False)
class _Model:
    """One descriptor of the model with its kernel and inducing blocks and their Cholesky factors."""

    descriptor: Descriptor
    kernel: ZonalKernel
    blocks: tuple[InducingBlock, ...]
    lowers: tuple[Tensor, ...]
    jitter: float
    asked: int


def fit(
    structures: Structures,
    targets: Targets,
    recipe: Recipe | None = None,
    validation: tuple[Structures, Targets] | None = None,
    progress: Progress | None = None,
    provenance: dict | None = None,
) -> tuple[Potential, FitReport]:
    """Fit a sparse Gaussian process over SOAP power spectra to energies, forces and stresses together.

    Args:
        structures, targets: training data; unknown labels are NaN.
        recipe: choices; what it leaves open is chosen from the data (defaults.py).
        validation: data that are only predicted, for the report.
        progress: called as progress(stage, done, total, note).
        provenance: where the data came from, kept in the model.

    Raises:
        checks.UserError: no labels, labels that do not belong to the structures, more inducing points than environments,
            atoms on top of each other.
    """
    recipe = Recipe() if recipe is None else recipe
    stages = Stages(progress)
    stages.begin("data")
    structures, targets = _prepared(structures, targets, recipe)
    suspicions = check_stress_consistency(structures, targets)
    found = defaults.survey(structures, targets)
    recipe = defaults.resolve(recipe, found, len(structures.distinct_species))
    base = _baselines(structures, targets, recipe, found)
    remaining = _trust_isolated_atoms(structures, targets.minus(_sum(base, structures)))
    parts = list(chunks(structures, PASS_ATOMS))

    stages.begin("inducing points")
    models, seen = _models(recipe, structures, parts, stages)
    stages.begin("covariances")
    factors = _stream(recipe, models, parts, _split(remaining, parts), stages)
    stages.begin("evidence")
    lowers = [lower for m in models for lower in m.lowers]
    counts = {kind: f.count for kind, f in factors.items()}
    whitened = {kind: posterior.whiten(f.factor().double(), lowers) for kind, f in factors.items()}
    factors.clear()
    parameters, block_of_column, result = _learn(recipe, models, whitened, counts, stages)
    stages.begin("posterior")
    noise, signal = parameters.noise(), parameters.signal().to(block_of_column.device)
    if "energies" in parameters.learned and 10 <= counts["energies"] <= len(block_of_column):
        noise["energies"] = leave_one_out.energy_noise(whitened, noise, signal[block_of_column])
    solved = posterior.solve(whitened, counts, noise | {FIXED: 1.0}, signal[block_of_column], lowers)
    potential = Potential(
        tuple(_terms(models, solved)), base, structures.distinct_species, recipe, noise, dict(provenance or {})
    )
    stages.begin("validation")
    validation_errors = None
    if validation is not None:
        validation_errors = errors(*validation, potential(validation[0]), units.GPA)
    stages.end()
    report = _report(models, seen, noise, parameters, counts, solved, result, validation_errors, stages, suspicions)
    return replace(potential, report=report.as_dict()), report


def _prepared(structures: Structures, targets: Targets, recipe: Recipe) -> tuple[Structures, Targets]:
    """Check that labels and structures belong together, move them to the device, and blank labels not to be used."""
    if not len(structures):
        raise checks.UserError("There are no training structures.")
    if len(targets) != len(structures) or targets.forces.shape[0] != structures.n_atoms:
        raise checks.UserError(
            f"The targets are of {len(targets)} structures with {targets.forces.shape[0]} atoms, "
            f"the structures are {len(structures)} with {structures.n_atoms} atoms."
        )
    for name in ("energies", "forces", "stresses"):
        if not getattr(recipe, f"use_{name}"):
            targets = replace(targets, **{name: torch.full_like(getattr(targets, name), float("nan"))})
    no_volume = structures.volumes.isnan() & ~targets.stresses.isnan().all(2).all(1)
    if no_volume.any():
        name = structures.names[int(no_volume.nonzero()[0, 0])]
        raise checks.UserError(
            f"{name}: has a stress but is not periodic or has no volume; remove the stress or set pbc."
        )
    known = {kind: int((~getattr(targets, kind).isnan()).sum()) for kind in KINDS}
    if not sum(known.values()):
        raise checks.UserError(
            "No structure has an energy, forces or a stress to learn from; check the names of the labels in the file."
        )
    targets = _with_config_noise(targets, structures, recipe)
    device, dtype = torch.device(recipe.device), getattr(torch, recipe.dtype)
    return structures.to(device=device, dtype=dtype), targets.to(device=device, dtype=dtype)


def _with_config_noise(targets: Targets, structures: Structures, recipe: Recipe) -> Targets:
    """Write the recipe's noise per config_type where a structure has none of its own."""
    given = recipe.noise.config_types
    unknown = set(given) - set(targets.config_types)
    if unknown:
        name = sorted(unknown)[0]
        hint = checks.suggest(name, {c for c in targets.config_types if c})
        raise checks.UserError(
            f"noise.config_types names '{name}', but no training structure has this config_type.{hint}"
        )
    if not given:
        return targets
    values = {f"{kind}_noise": getattr(targets, f"{kind}_noise").clone() for kind in KINDS}
    for kind, key in NOISE_FIELDS.items():
        for i, label in enumerate(targets.config_types):
            value = getattr(given[label], key) if label in given else None
            if value is None:
                continue
            here = slice(int(structures.offsets[i]), int(structures.offsets[i + 1])) if kind == "forces" else i
            field_ = values[f"{kind}_noise"]
            field_[here] = torch.where(field_[here].isnan(), torch.full_like(field_[here], value), field_[here])
    return replace(targets, **values)


def _baselines(
    structures: Structures, targets: Targets, recipe: Recipe, found: defaults.Survey
) -> tuple[Baseline, ...]:
    """Isolated-atom energies (given, from frames, or by least squares) and ZBL that ends where the data begin."""
    out: list[Baseline] = []
    zbl = recipe.baseline.zbl
    species = structures.distinct_species
    if zbl is not False:
        pairs = [(a, b) for a in species for b in species if a <= b]
        outer = {p: zbl.outer or found.shortest.get(p, 0.6 * found.bond) for p in pairs}
        out.append(baselines.ZBL({p: zbl.inner or 0.4 * outer[p] for p in pairs}, outer))
    choice = recipe.baseline.isolated_atoms
    if choice == "none":
        return tuple(out)
    if isinstance(choice, dict):
        energies = {checks.atomic_number(s): e for s, e in choice.items()}
        missing = [checks.symbol(z) for z in species if z not in energies]
        if missing:
            raise checks.UserError(f"baseline.isolated_atoms gives no energy for {', '.join(missing)}.")
    else:
        from_frames = baselines.IsolatedAtoms.from_frames(structures, targets) if choice == "auto" else {}
        remaining = targets.minus(_sum(tuple(out), structures)) if out else targets
        energies = baselines.IsolatedAtoms.least_squares(structures, remaining)
        if set(from_frames) >= set(species):
            energies = from_frames
    return (*out, baselines.IsolatedAtoms(energies))


def _trust_isolated_atoms(structures: Structures, targets: Targets) -> Targets:
    """Give isolated-atom energies a small noise of their own: they lie far from all else and would inflate the common one."""
    alone = torch.tensor([baselines.is_isolated_atom(label) for label in targets.config_types]) & (
        structures.counts.cpu() == 1
    )
    given = torch.where(
        alone.to(targets.energies.device) & targets.energies_noise.isnan(), ISOLATED_NOISE, targets.energies_noise
    )
    return replace(targets, energies_noise=given)


def _sum(base: Sequence[Baseline], structures: Structures) -> Prediction:
    if not base:
        zero = baselines.IsolatedAtoms(dict.fromkeys(structures.distinct_species, 0.0))
        return zero(structures)
    total = base[0](structures)
    for term in base[1:]:
        total = total + term(structures)
    return total


def _split(targets: Targets, parts: Sequence[Structures]) -> list[Targets]:
    """The targets of each chunk."""
    out, first, atom = [], 0, 0
    for part in parts:
        here, atoms = slice(first, first + len(part)), slice(atom, atom + part.n_atoms)
        values = {
            name: value[atoms] if name.startswith("forces") else value[here] for name, value in vars(targets).items()
        }
        out.append(Targets(**values))
        first, atom = here.stop, atoms.stop
    return out


def _models(
    recipe: Recipe, structures: Structures, parts: Sequence[Structures], stages: Stages
) -> tuple[list[_Model], dict[int, int]]:
    models: list[_Model] = []
    seen: dict[int, int] = {}
    species = structures.distinct_species
    for k, (d, kern, ind) in enumerate(zip(recipe.descriptors, recipe.kernels, recipe.inducings, strict=True)):
        descriptor, kernel = descriptors.make(species, d.model_dump()), make_kernel(kern)
        wanted = sum(ind.shares.values()) if isinstance(ind.shares, dict) else ind.n
        if wanted > structures.n_atoms:
            raise checks.UserError(
                f"inducing.n asks for {wanted} inducing points, but the training data hold only {structures.n_atoms} "
                "environments (atoms); ask for fewer."
            )
        shares = ind.shares
        if isinstance(shares, dict):
            shares = {checks.atomic_number(s): n for s, n in shares.items()}

        def tell(done: float, k: int = k) -> None:
            stages.tell(done + k * len(parts), len(parts) * len(recipe.descriptors))

        chosen, seen = inducing.choose_centers(parts, descriptor, kernel, ind.method, wanted, shares, recipe.seed, tell)
        made = [
            inducing.make_block(z, features, surroundings, descriptor, kernel, ind.gradients)
            for z, (features, surroundings) in chosen.items()
        ]
        blocks, lowers = tuple(m[0] for m in made), tuple(m[1] for m in made)
        asked = sum(len(b.features) * (1 + ind.gradients) for b in blocks)
        models.append(_Model(descriptor, kernel, blocks, lowers, max(m[2] for m in made), asked))
    return models, seen


def _stream(
    recipe: Recipe, models: Sequence[_Model], parts: Sequence[Structures], targets: Sequence[Targets], stages: Stages
) -> dict[str, RowFactor]:
    """Make the rows of each chunk once and fold them into one triangular factor for each kind of observation."""
    columns = sum(b.n_columns for m in models for b in m.blocks)
    factors = {kind: RowFactor(columns, 2 * columns) for kind in (*KINDS, FIXED)}
    for done, (part, target) in enumerate(zip(parts, targets, strict=True)):
        known = likelihood.observations(target, part.counts, covariances.VOIGT)
        forces, stresses = len(known["forces"].rows) > 0, len(known["stresses"].rows) > 0
        made = [
            covariances.rows(
                part, neighbors.find(part, m.descriptor.cutoff), m.descriptor, m.kernel, m.blocks, forces, stresses
            )
            for m in models
        ]
        for kind, seen in known.items():
            if not len(seen.rows):
                continue
            pieces = [getattr(r, kind)[seen.rows] for r in made]
            rows = torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]
            rows = rows * seen.scale[:, None] if kind == "energies" else rows
            common = seen.noise.isnan()
            if common.all():
                factors[kind].add(rows, seen.values)
            else:
                factors[kind].add(rows[common], seen.values[common])
                own = ~common
                factors[FIXED].add(rows[own] / seen.noise[own, None], seen.values[own] / seen.noise[own])
        stages.tell(done + 1, len(parts), f"{sum(f.count for f in factors.values())} rows x {columns} columns")
    return {kind: f for kind, f in factors.items() if f.count}


def _learn(
    recipe: Recipe, models: Sequence[_Model], whitened: dict[str, Tensor], counts: dict[str, int], stages: Stages
) -> tuple[Hyperparameters, Tensor, evidence.EvidenceResult]:
    """Learn noises and signal variances: first with some of the columns, then with all."""
    given = {kind: getattr(recipe.noise, key) for kind, key in NOISE_FIELDS.items()}
    fixed = {kind: value for kind, value in given.items() if value is not None}
    widths = [b.n_columns for m in models for b in m.blocks]
    device = next(iter(whitened.values())).device
    block_of_column = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(device)
    parameters = Hyperparameters(tuple(k for k in KINDS if k in whitened), fixed, len(widths))

    def tell(calls: int, value: float) -> None:
        noises = ", ".join(f"{k} {v:.2g}" for k, v in parameters.noise().items())
        stages.tell(min(calls, 39), 40, f"-log evidence {value:.0f}; {noises}")

    total = sum(widths)
    if total > EVIDENCE_COLUMNS:
        # columns of each block come most important first, so leading ones are a smaller model of the same data
        share = EVIDENCE_COLUMNS / total
        starts = torch.tensor([0, *widths]).cumsum(0).tolist()
        some = torch.cat([torch.arange(s, s + max(1, int(share * w))) for s, w in zip(starts, widths, strict=False)])
        some = some.to(device)
        small = {k: evidence.Statistics.of(w, counts[k], some) for k, w in whitened.items()}
        evidence.optimise(small, parameters, block_of_column[some], progress=tell)
    statistics = {k: evidence.Statistics.of(w, counts[k]) for k, w in whitened.items()}
    learn = evidence.refine if total > EVIDENCE_COLUMNS else evidence.optimise
    return parameters, block_of_column, learn(statistics, parameters, block_of_column, progress=tell)


def _terms(models: Sequence[_Model], solved: SparsePosterior) -> list[Term]:
    terms, start = [], 0
    for m in models:
        blocks = {}
        for block in m.blocks:
            weights = solved.weights[start : start + block.n_columns]
            start += block.n_columns
            alpha, tau = posterior.collapse(block, weights.to(block.features))
            blocks[block.species] = MeanBlock(block.features, alpha, tau if block.tangents.shape[1] else tau[:0])
        terms.append(Term(m.descriptor, m.kernel, blocks))
    return terms


def _report(
    models: Sequence[_Model],
    seen: dict[int, int],
    noise: dict[str, float],
    parameters: Hyperparameters,
    counts: dict[str, int],
    solved: SparsePosterior,
    result: evidence.EvidenceResult,
    validation_errors: ErrorTable | None,
    stages: Stages,
    suspicions: Sequence[str],
) -> FitReport:
    labels = [f"{k}:{checks.symbol(b.species)}" for k, m in enumerate(models) for b in m.blocks]
    every = [b for m in models for b in m.blocks]
    warnings = [
        *suspicions,
        *(f"{name} ended at a bound of its allowed range; the data may not determine it." for name in result.at_bound),
    ]
    jitter = max(m.jitter for m in models)
    if jitter:
        warnings.append(f"A jitter of {jitter:.0e} was added to the covariance of the inducing variables.")
    return FitReport(
        rows=counts,
        noise=noise,
        noise_by_evidence=parameters.noise(),
        signal=dict(zip(labels, parameters.signal().tolist(), strict=True)),
        environments={checks.symbol(z): n for z, n in sorted(seen.items())},
        centres={label: len(b.features) for label, b in zip(labels, every, strict=True)},
        columns=sum(m.asked for m in models),
        rank=sum(b.n_columns for b in every),
        condition=solved.condition,
        jitter=jitter,
        negative_log_evidence=result.negative_log_evidence,
        train_rmse=solved.rms,
        validation_errors=validation_errors,
        stages=tuple(stages.done),
        warnings=tuple(warnings),
    )
