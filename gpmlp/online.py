"""Online is a fit that goes on: labels and inducing points come and go, and the posterior follows without starting again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gpmlp import checks, defaults, held_out, inducing, preparation, regression
from gpmlp.baselines import Baseline
from gpmlp.fit_report import Stages
from gpmlp.gp import covariances, leave_one_out, posterior
from gpmlp.gp.covariances import InducingBlock
from gpmlp.gp.posterior import FIXED, RowFactor
from gpmlp.gp.updates import DowndateError, Factor, bordered, shrunk
from gpmlp.potential import Potential
from gpmlp.quantities import KINDS, Prediction, Targets
from gpmlp.recipe import Recipe
from gpmlp.regression import Learned, Model
from gpmlp.structures import Structures
from gpmlp.terms import View
from gpmlp.uncertainty import label_noise, mahalanobis
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.mahalanobis import Mahalanobis
from gpmlp.variances import VarianceModel

LARGEST_ERROR = 1e-7  # drift x condition of the factor at which it is made again from the rows
FORESEEN = 40  # structures whose predictions before learning are kept for the calibration
FEWEST_ENERGIES = 10  # that leaving one out can judge
NOVELTY_ROWS = 4000  # environments of a species from which novelty is learned
HOW = "predicted before they were learned from, in the order in which they came (prequential)"


@dataclass(frozen=True, eq=False)
class Batch:
    """Structures labelled together.

    Attributes:
        targets: labels as they came; remaining: less the baselines.
        rows: by kind, whitened [A | y] with unit noise; 'given' divided by their own.
    """

    structures: Structures
    targets: Targets
    remaining: Targets
    rows: dict[str, Tensor]

    @property
    def count(self) -> int:
        return sum(len(rows) for rows in self.rows.values())


@dataclass(frozen=True, eq=False)
class Foreseen:
    """What was predicted of structures, uncalibrated, before their labels were learned from."""

    structures: Structures
    targets: Targets
    prediction: Prediction


@dataclass(frozen=True, eq=False)
class Online:
    """The state of a fit that goes on; every method returns a new one.

    Attributes:
        asked, recipe: choices as given, and with what was open filled in from the first data.
        models: descriptors with their inducing blocks; columns count through them in order.
        batches: all that was learned from.
        factor: the posterior at the present hyperparameters.
        noise, constant: standard deviations by kind in the fit, and of new labels; label_noise: as much as labels themselves show.
        signal: (blocks,) eV.
        events: what was done beside learning: refreshes, factors made again, and why.
    """

    asked: Recipe
    recipe: Recipe
    models: tuple[Model, ...]
    baselines: tuple[Baseline, ...]
    batches: tuple[Batch, ...]
    factor: Factor
    noise: dict[str, float]
    constant: dict[str, float]
    label_noise: dict[str, float]
    signal: Tensor
    calibration: Calibration = field(default_factory=Calibration.identity)
    novelty: Mahalanobis | None = None
    foreseen: tuple[Foreseen, ...] = ()
    events: tuple[str, ...] = ()

    @staticmethod
    def begin(structures: Structures, targets: Targets, recipe: Recipe | None = None) -> Online:
        """Learn from first structures: inducing points from them, noises by evidence, no calibration yet.

        Raises:
            checks.UserError: see `fit`; VFE evidence, which needs more than is kept.
        """
        asked = Recipe() if recipe is None else recipe
        if asked.evidence != "dtc":
            raise checks.UserError("An online model learns its noises by the DTC evidence; leave out `evidence: vfe`.")
        structures, targets = preparation.prepared(structures, targets, asked)
        found = defaults.survey(structures, targets)
        resolved = defaults.resolve(asked, found, len(structures.distinct_species))
        base = preparation.make_baselines(structures, targets, resolved, found)
        remaining = preparation.trust_isolated_atoms(structures, targets.minus(preparation.total(base, structures)))
        models, _ = regression.make_models(resolved, structures, [structures], Stages(None), lambda z, features: None)
        lowers = [lower for m in models for lower in m.lowers]
        rows = {
            k: posterior.whiten(r.double(), lowers)
            for k, r in regression.labelled_rows(models, structures, remaining).items()
        }
        columns = sum(len(lower) for lower in lowers)
        empty = Factor.of([], columns)
        batch = Batch(structures, targets, remaining, rows)
        ones = torch.ones(len(lowers), dtype=torch.float64)
        return Online(asked, resolved, tuple(models), base, (batch,), empty, {}, {}, {}, ones).refreshed("first data")

    @property
    def n_labels(self) -> int:
        """Structures learned from."""
        return sum(len(b.structures) for b in self.batches)

    @property
    def structures(self) -> Structures:
        return Structures.concatenate([b.structures for b in self.batches])

    @property
    def targets(self) -> Targets:
        return Targets.concatenate([b.targets for b in self.batches])

    @cached_property
    def lowers(self) -> list[Tensor]:
        return [lower for m in self.models for lower in m.lowers]

    @cached_property
    def columns_signal(self) -> Tensor:
        """(columns,) δ of each column."""
        return self.signal.repeat_interleave(torch.tensor([len(lower) for lower in self.lowers]))

    @cached_property
    def potential(self) -> Potential:
        """What has been learned so far."""
        weights = posterior.unwhitened(self.columns_signal * self.factor.mean, self.lowers)
        terms = regression.make_terms(self.models, weights)
        return Potential(
            terms,
            self.baselines,
            self.batches[0].structures.distinct_species,
            self.recipe,
            self.noise,
            report=self.report(),
            variances=self._variances(),
            calibration=self.calibration,
            novelty=self.novelty,
        )

    def report(self) -> dict:
        """Numbers of the fit as it stands, JSON-able."""
        labels = [f"{k}:{checks.symbol(b.species)}" for k, m in enumerate(self.models) for b in m.blocks]
        blocks = [b for m in self.models for b in m.blocks]
        return {
            "rows": self._counts(),
            "noise": self.noise,
            "label_noise": self.label_noise,
            "signal": dict(zip(labels, self.signal.tolist(), strict=True)),
            "centres": {label: len(b.features) for label, b in zip(labels, blocks, strict=True)},
            "rank": self.factor.columns,
            "condition": self.factor.condition,
            "drift": self.factor.drift,
            "updates": self.factor.changes,
            "events": list(self.events),
        }

    # ---------------------------------------------------------------- data

    def learned(self, structures: Structures, targets: Targets) -> Online:
        """Foresee the labels, learn from them, make new environments inducing points, and count them as seen.

        Raises:
            checks.UserError: labels that do not fit the structures, or a species that was not there at the beginning.
        """
        self.potential.check_species(structures)
        wanted = ["energies", "forces", *(["stresses"] if bool(targets.stresses.isfinite().any()) else [])]
        prediction = self.potential(structures, variance=wanted, novelty=self.novelty is not None, calibrated=False)
        foreseen = (*self.foreseen, Foreseen(structures, targets, prediction))[-FORESEEN:]
        new = replace(self.added(structures, targets).extended(structures), foreseen=foreseen)
        if new.novelty is None:
            return new
        features = View.of(new.models[0].descriptor, new.batches[-1].structures).environments.features
        return replace(new, novelty=new.novelty.updated(new.batches[-1].structures.species, features.double()))

    def added(self, structures: Structures, targets: Targets) -> Online:
        """With labels more at fixed inducing variables and hyperparameters: O(k columns²)."""
        structures, targets = preparation.prepared(structures, targets, self.recipe, whole=False)
        remaining = targets.minus(preparation.total(self.baselines, structures))
        remaining = preparation.trust_isolated_atoms(structures, remaining)
        made = regression.labelled_rows(self.models, structures, remaining)
        rows = {kind: posterior.whiten(r.double(), self.lowers) for kind, r in made.items()}
        batch = Batch(structures, targets, remaining, rows)
        factor = self.factor.appended(self._scaled(batch))
        return replace(self, batches=(*self.batches, batch), factor=factor)._checked()

    def removed(self, index: int) -> Online:
        """Without the labels of one batch: a downdate, O(k columns²); from the rows anew where that breaks down."""
        batch = self.batches[index]
        left = tuple(b for b in self.batches if b is not batch)
        if not left:
            raise checks.UserError("The last labels of an online model cannot be removed; begin a new one.")
        try:
            return replace(self, batches=left, factor=self.factor.removed(self._scaled(batch)))._checked()
        except DowndateError as why:
            return replace(self, batches=left)._from_rows(f"labels could not be removed by a downdate ({why})")

    # ---------------------------------------------------------------- inducing variables

    def extended(self, structures: Structures, at_most: int | None = None) -> Online:
        """With inducing points more, from environments that the present ones represent worst.

        Chosen by a pivoted Cholesky factorisation of the covariance that is left of them given the present inducing set, in units
        of energy, weighted with their novelty where that is above 1 (posterior variance and Mahalanobis distance together).

        Args:
            at_most: inducing points (centres) of each descriptor; as many as the data ask for if None.
        """
        structures = structures.to(device=self.recipe.device, dtype=getattr(torch, self.recipe.dtype))
        grown, start = [], 0
        for k, model in enumerate(self.models):
            here = self.signal[start : start + len(model.blocks)]
            start += len(model.blocks)
            room = self._room(k) if at_most is None else at_most
            novelty = self.novelty if k == 0 else None
            grown.append(
                inducing.choose_more(
                    model.descriptor, model.kernel, model.blocks, model.lowers, here, structures, room, novelty
                )
            )
        if not any(extra is not None for extras in grown for extra in extras):
            return self
        return self._bordered(grown)

    def _room(self, k: int) -> int:
        """How many centres more the data so far ask for, of descriptor k."""
        asked, resolved = self.asked.inducings[k], self.recipe.inducings[k]
        model = self.models[k]
        centres = sum(len(b.features) for b in model.blocks)
        if asked.n is not None:
            return max(0, asked.n - centres)
        periodic = bool(self.batches[0].structures.periodic.any(dim=1).double().mean() > 0.5)
        labels = sum(b.count for b in self.batches)
        wanted = defaults.columns_for(labels, periodic) // len(self.models)
        return max(0, wanted // (1 + resolved.gradients) - centres)

    def _bordered(self, grown: list[list[InducingBlock | None]]) -> Online:
        """The bordered factors of all blocks, and the new columns of all data in one pass over them."""
        models, changes = [], []
        for model, extras in zip(self.models, grown, strict=True):
            blocks, lowers = [], []
            for block, lower, new in zip(model.blocks, model.lowers, extras, strict=True):
                if new is None:
                    blocks.append(block), lowers.append(lower), changes.append(None)
                    continue
                double = [replace(b, features=b.features.double(), tangents=b.tangents.double()) for b in (block, new)]
                cross = covariances.covariance(model.kernel, *double)
                longer, kept = bordered(lower, cross, covariances.covariance(model.kernel, double[1], double[1]))
                taken = replace(new, kept=kept)
                blocks.append(inducing.joined(block, taken)), lowers.append(longer), changes.append((taken, longer))
            models.append(replace(model, blocks=tuple(blocks), lowers=tuple(lowers)))
        scale = [torch.full((len(c[0].kept),), float(s)) for c, s in zip(changes, self.signal, strict=True) if c]
        new_signal = torch.cat(scale).double()
        columns = [self._new_columns(batch, changes) for batch in self.batches]

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            for batch, new in zip(self.batches, columns, strict=True):
                noisy = [new[kind] / self._noise(kind) for kind in batch.rows]
                yield self._scaled(batch), torch.cat(noisy) * new_signal

        factor = self.factor.extended(passes)
        order, widths = _places([len(lower) for lower in self.lowers], [len(c[0].kept) if c else 0 for c in changes])
        if len(widths) > 1:
            factor = factor.turned(lambda rows: torch.cat([rows[:, order], rows[:, -1:]], dim=1))
        batches = tuple(
            replace(
                batch,
                rows={
                    kind: torch.cat([torch.cat([old[:, :-1], new[kind]], dim=1)[:, order], old[:, -1:]], dim=1)
                    for kind, old in batch.rows.items()
                },
            )
            for batch, new in zip(self.batches, columns, strict=True)
        )
        return replace(self, models=tuple(models), factor=factor, batches=batches)._checked()

    def _new_columns(self, batch: Batch, changes: list[tuple[InducingBlock, Tensor] | None]) -> dict[str, Tensor]:
        """By kind, whitened columns of new inducing variables: [K_on - A V ᵀ] C⁻ᵀ with [V C] the new rows of L."""
        it = iter(changes)
        blocks = [tuple(c[0] for c in (next(it) for _ in m.blocks) if c) for m in self.models]
        made = regression.labelled_rows(self.models, batch.structures, batch.remaining, blocks)
        out = {}
        for kind, raw in made.items():
            pieces, start, first = [], 0, 0
            for change, lower in zip(changes, self.lowers, strict=True):
                mine = batch.rows[kind][:, first : first + len(lower)]
                first += len(lower)
                if change is None:
                    continue
                width, bottom = len(change[0].kept), change[1][len(lower) :]
                new = raw[:, start : start + width].double() - mine @ bottom[:, : len(lower)].T
                start += width
                pieces.append(torch.linalg.solve_triangular(bottom[:, len(lower) :], new.T, upper=False).T)
            out[kind] = torch.cat(pieces, dim=1)
        return out

    def without(self, descriptor: int, species: int, centres: Sequence[int]) -> Online:
        """Without some inducing points (centres, with their gradients) of one block.

        Raises:
            checks.UserError: no such block or centre, or none would be left.
        """
        model = self.models[descriptor]
        at = next((i for i, b in enumerate(model.blocks) if b.species == species), None)
        if at is None:
            raise checks.UserError(f"There are no inducing points of {checks.symbol(species)} to remove.")
        block, lower = model.blocks[at], model.lowers[at]
        stays = torch.ones(len(block.features), dtype=torch.bool)
        stays[torch.as_tensor(list(centres), dtype=torch.long)] = False
        if not stays.any():
            raise checks.UserError(f"All {len(stays)} inducing points of {checks.symbol(species)} would be removed.")
        smaller, columns = inducing.restricted(block, stays)
        shorter, turn = shrunk(lower, columns)
        sizes = [len(low) for low in self.lowers]
        before = sum(len(m.blocks) for m in self.models[:descriptor]) + at
        first, behind = sum(sizes[:before]), sum(sizes[: before + 1])

        def turned(rows: Tensor) -> Tensor:
            return torch.cat([rows[:, :first], rows[:, first:behind] @ turn, rows[:, behind:]], dim=1)

        blocks = tuple(smaller if i == at else b for i, b in enumerate(model.blocks))
        lowers = tuple(shorter if i == at else low for i, low in enumerate(model.lowers))
        models = tuple(replace(model, blocks=blocks, lowers=lowers) if m is model else m for m in self.models)
        batches = tuple(replace(b, rows={kind: turned(rows) for kind, rows in b.rows.items()}) for b in self.batches)
        return replace(self, models=models, batches=batches, factor=self.factor.turned(turned))._checked()

    # ---------------------------------------------------------------- hyperparameters

    def refreshed(self, why: str) -> Online:
        """With noises and signals learned again from the rows, the calibration from what was foreseen, and novelty from what was seen."""
        whitened, counts = self._whitened(), self._counts()
        parameters, _, _ = regression.learn(self.recipe, self.models, whitened, counts, {}, Stages(None))
        noise, signal = parameters.noise(), parameters.signal().detach().double().cpu()
        columns = signal.repeat_interleave(torch.tensor([len(lower) for lower in self.lowers]))
        if "energies" in parameters.learned and counts.get("energies", 0) >= FEWEST_ENERGIES:
            noise["energies"] = leave_one_out.energy_noise(whitened, counts["energies"], noise, columns)
        scatter = label_noise.of_forces(self.structures, self.targets)
        constant = preparation.given_noise(self.targets) | parameters.noise()
        new = replace(
            self,
            noise=noise,
            constant=constant,
            label_noise={"forces": scatter} if scatter == scatter else {},
            signal=signal,
            novelty=self._novelty(),
        )
        new = new._from_rows(f"refreshed: {why}")
        return new.recalibrated()

    def recalibrated(self) -> Online:
        """With a calibration from the structures foreseen."""
        if not self.foreseen or self.recipe.calibration is False:
            return self
        structures = Structures.concatenate([f.structures for f in self.foreseen])
        targets = Targets.concatenate([f.targets for f in self.foreseen])
        names = [f.name for f in Prediction.__dataclass_fields__.values()]
        shared = [n for n in names if all(getattr(f.prediction, n) is not None for f in self.foreseen)]
        parts = [
            replace(f.prediction, **{n: None for n in names if n not in shared and n not in ("energies", "forces")})
            for f in self.foreseen
        ]
        return replace(self, calibration=held_out.learn(Prediction.concatenate(parts), structures, targets, HOW))

    def _novelty(self) -> Mahalanobis | None:
        """Distances with thresholds from structures left out of them, then with these counted too."""
        if self.recipe.novelty is False:
            return None
        seen: dict[int, list[Tensor]] = {}
        unseen: dict[int, list[Tensor]] = {}
        structures = self.structures
        for i in range(len(structures)):
            part = structures.select([i])
            features = View.of(self.models[0].descriptor, part).environments.features.double()
            for z in part.distinct_species:
                (unseen if i % 4 == 3 else seen).setdefault(z, []).append(features[part.species == z])
        joined = [{z: torch.cat(x)[-NOVELTY_ROWS:] for z, x in some.items()} for some in (seen, unseen)]
        found = mahalanobis.fit(*joined, self.recipe.novelty.quantile, self.recipe.seed)
        for z, x in joined[1].items():
            found = found.updated(torch.full((len(x),), z), x)
        return found

    # ---------------------------------------------------------------- linear algebra

    def _noise(self, kind: str) -> float:
        return 1.0 if kind == FIXED else self.noise[kind]

    def _scaled(self, batch: Batch) -> Tensor:
        """Rows [A D | y] / σ of a batch, as the factor has them."""
        rows = torch.cat([r / self._noise(kind) for kind, r in batch.rows.items()])
        rows[:, :-1] *= self.columns_signal
        return rows

    def _counts(self) -> dict[str, int]:
        kinds = [k for k in (*KINDS, FIXED) if any(k in b.rows for b in self.batches)]
        return {k: sum(len(b.rows[k]) for b in self.batches if k in b.rows) for k in kinds}

    def _whitened(self) -> dict[str, Tensor]:
        """Triangular factors of the rows of each kind."""
        columns = sum(len(lower) for lower in self.lowers)
        factors = {kind: RowFactor(columns, 2 * columns) for kind in self._counts()}
        for batch in self.batches:
            for kind, rows in batch.rows.items():
                factors[kind].add(rows[:, :-1], rows[:, -1])
        return {kind: f.factor() for kind, f in factors.items()}

    def _from_rows(self, why: str) -> Online:
        """With the factor made again from all rows."""
        columns = sum(len(lower) for lower in self.lowers)
        factor = Factor.of((self._scaled(b) for b in self.batches), columns)
        return replace(self, factor=factor, events=(*self.events, f"{self.n_labels} labels: {why}"))

    def _checked(self) -> Online:
        error = self.factor.drift * self.factor.condition
        return self if error < LARGEST_ERROR else self._from_rows(f"rounding of updates had grown to {error:.1e}")

    def _variances(self) -> VarianceModel | None:
        if self.recipe.variance is False:
            return None
        learned = Learned({}, self._counts(), self.noise, self.label_noise, self.columns_signal)
        if self.factor.columns > self.recipe.variance.columns:
            learned = replace(learned, whitened=self._whitened())
            return regression.make_variances(self.recipe, self.models, learned, self.constant)
        return VarianceModel(
            tuple(regression.make_priors(self.models, self.columns_signal)),
            tuple(m.blocks for m in self.models),
            tuple(self.lowers),
            self.columns_signal,
            self.factor.upper[:, :-1],
            self.constant,
            self.label_noise,
            self.factor.columns,
        )


def _places(old: list[int], new: list[int]) -> tuple[Tensor, list[int]]:
    """Where the columns [all old | all new] go when each block has its new ones behind its old ones, and the widths of the blocks."""
    order, first, behind = [], 0, sum(old)
    for a, b in zip(old, new, strict=True):
        order += [*range(first, first + a), *range(behind, behind + b)]
        first, behind = first + a, behind + b
    return torch.tensor(order, dtype=torch.long), [a + b for a, b in zip(old, new, strict=True)]
