"""Online fit: labels and inducing points are added and removed by updates of posterior factors, without a new fit.

Where the mean is that of all functionals of the data (inducing.functionals), it has a factor of its own that labels border (gp/exact.py);
inducing points are then for variances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.quantities import KINDS, Targets
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.fitting import (
    calibrate,
    charge_fit,
    exact_model,
    four_body_choice,
    inducing_sets,
    left_out,
    online_updates,
    prepare,
    regression,
    sparse_points,
    variance_checks,
)
from gpmlp.fitting.calibrate import PrequentialPrediction
from gpmlp.fitting.left_out import LeftOut
from gpmlp.fitting.online_charges import OnlineCharges, noise_scaled
from gpmlp.fitting.online_updates import LabelBatch, RowScales
from gpmlp.fitting.regression import InducingModel, VarianceSubset, WhitenedData
from gpmlp.fitting.report import StageTimer
from gpmlp.gp import hyperparameters, inducing
from gpmlp.gp.exact import ExactPosterior
from gpmlp.gp.posterior import FIXED, SparsePosterior
from gpmlp.gp.qr import DowndateError, PosteriorFactor, RowFactor
from gpmlp.gp.variance import VarianceModel
from gpmlp.potential.baseline import Baseline
from gpmlp.potential.charges import ChargeModel
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration
from gpmlp.uncertainty.mahalanobis import Mahalanobis
from gpmlp.uncertainty.residuals import force_label_noise

LARGEST_ERROR = 1e-9  # measured error of the factor at which it is computed again from the rows
WORSE = 10.0  # times that when it was computed: where rounding allows no better, there is no use in computing it again
LEFT_OUT = 600  # atoms of structures that are left out in turn at a refresh
EDGE = 1.25  # novelty beyond which standard deviations grow with it: nearer, errors are measured to be no larger than these
INSTEAD = "centres in place of all functionals"
NOVELTY_GROWTH = 1.05  # of the structures, after which novelty is fitted again; before that it hardly changes


@dataclass(frozen=True, eq=False)
class OnlineFit:
    """A fit as a value; every method returns a new one.

    Attributes:
        asked, recipe: choices as given, and with what was open filled in from the first data.
        models: descriptors with their inducing blocks; columns count through them in order.
        batches: the labels, in the order in which they came.
        factor: the posterior at the present hyperparameters.
        noise, constant: standard deviations by kind in the fit, and of new labels; label_noise: the part that labels themselves show.
        signal: (blocks,) eV.
        novelty_labels: structures when novelty was last fitted; since then it was updated.
        prequential: the latest predictions before conditioning on labels.
        subset: variances from a subset of the columns against those from all, at the last refresh (variance_checks.subset_error).
        events: refreshes, factors computed again, and why.
        exact: the posterior of all functionals of the labels, which the mean is of; None where the mean is of the inducing points.
        amplitude: of what these miss, in variances where the mean is exact: by structures left out at the last refresh.
        moves: of the fit by leaving structures out at the last refresh, where calibrated samples have them.
        charges: as they were fitted last, when the fit began or was made anew; None where there are none.
        charge_record: what the report has of charges that were tried and left out.
    """

    asked: Recipe
    recipe: Recipe
    models: tuple[InducingModel, ...]
    baselines: tuple[Baseline, ...]
    batches: tuple[LabelBatch, ...]
    factor: PosteriorFactor
    noise: dict[str, float]
    constant: dict[str, float]
    label_noise: dict[str, float]
    signal: Tensor
    calibration: Calibration = field(default_factory=Calibration.identity)
    novelty: Mahalanobis | None = None
    novelty_labels: int = 0
    prequential: tuple[PrequentialPrediction, ...] = ()
    subset: dict[str, float] = field(default_factory=dict)
    events: tuple[str, ...] = ()
    exact: ExactPosterior | None = None
    amplitude: float = 1.0
    moves: online_updates.StructureMoves | None = None
    charges: OnlineCharges | None = None
    charge_record: dict | None = None

    @staticmethod
    def begin(structures: Structures, targets: Targets, recipe: Recipe | None = None) -> OnlineFit:
        """Fit the first structures: inducing points from them, noises by evidence, no calibration yet.

        As many inducing points as the labels ask for (defaults.columns_for), `inducing.n` at most, now and as labels come.

        Raises:
            UserError: see `fit`; a device other than the CPU.
        """
        asked = Recipe() if recipe is None else recipe
        if torch.device(asked.device).type != "cpu":
            raise errors.UserError(f"An online model is updated on the CPU; leave out `device: {asked.device}`.")
        if any(i.functionals not in (None, "none", "auto", "all") for i in asked.inducings):
            raise errors.UserError(
                "An online model has centres as inducing variables, to which new ones can be added, or all functionals: leave out "
                "`inducing.functionals`, or give `all`."
            )
        dispersion = asked.long_range.dispersion
        if dispersion and dispersion.r6 and dispersion.r6.c6 == "learned":
            raise errors.UserError(
                "A model that learns label by label takes its C6 as they are: give long_range.dispersion.r6.c6 in numbers (a fit with `c6: "
                "learned` says them), or leave it out for those of free atoms."
            )
        begun = _without_noises(asked, [prepare.prepare_data(structures, targets, asked, whole=False)])
        wanted = "mean" in asked.model_fields_set and asked.mean != "exact"
        return begun.refreshed("first data" + ("; the mean stays exact while labels come" if wanted else ""))

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
    def columns_signal(self) -> Tensor:
        """(columns,) δ of each column."""
        return self._scales.columns(regression.block_widths(self.models))

    @property
    def noise_of_mean(self) -> dict[str, float]:
        """By kind, in the fit that the mean is of."""
        return self.exact.noise if self.exact else self.noise

    @property
    def rank(self) -> int:
        """Inducing variables of the mean."""
        return len(self.exact.alpha) if self.exact else self.factor.columns

    @property
    def _weights(self) -> Tensor:
        """(columns,) of the inducing points."""
        return inducing.unwhiten_weights(self.columns_signal * self.factor.mean, regression.lowers_of(self.models))

    @property
    def _scales(self) -> RowScales:
        return RowScales(self.noise, self.signal)

    @cached_property
    def potential(self) -> Potential:
        """The potential of this fit."""
        return Potential(
            regression.make_terms(self.models, self.exact.weights if self.exact else self._weights),
            self.baselines,
            self.batches[0].structures.distinct_species,
            self.recipe,
            self.noise_of_mean,
            report=self.report(),
            variances=self._variances(),
            calibration=self.calibration,
            novelty=self.novelty,
            charges=self._charges(),
        )

    def report(self) -> dict:
        """Numbers of the fit as it stands, JSON-able."""
        return {
            "rows": self._counts(),
            "noise": self.noise_of_mean,
            "label_noise": self.label_noise,
            **regression.block_numbers(
                self.models, self.signal.new_tensor([self.exact.signal]) if self.exact else self.signal
            ),
            "columns": self.rank if self.exact else sum(len(b.vectors) for m in self.models for b in m.local_blocks),
            "rank": self.rank,
            "condition": self.exact.condition if self.exact else self.factor.condition,
            "variance_subset": self.subset,
            "drift": self.factor.drift,
            "updates": self.factor.changes,
            "events": list(self.events),
        } | ({"charges": self.charges.report(self.structures)} if self.charges else self._without_charges)

    @property
    def _without_charges(self) -> dict:
        return {"charges": self.charge_record} if self.charge_record else {}

    # ---------------------------------------------------------------- data

    def learned(self, structures: Structures, targets: Targets) -> OnlineFit:
        """Predict the labels (prequential errors), condition on them, add inducing points, and update the novelty.

        Raises:
            UserError: labels that do not fit the structures, or a species that was not there at the beginning.
        """
        self._check_species(structures)
        here = structures.to(device=self.recipe.device, dtype=getattr(torch, self.recipe.dtype))
        # computed once for everything that follows, unless these are many
        environments = (
            [StructureEnvironments.from_structures(m.descriptor, here) for m in self.models]
            if here.n_atoms <= CHUNK_ATOMS
            else []
        )
        predicted = self._predicted(structures, targets, environments)
        new = self.added(structures, targets, environments).extended(structures, None, environments)
        new = replace(new, prequential=calibrate.latest_prequential((*self.prequential, *predicted)))
        return new._with_newer_novelty()

    def _predicted(
        self, structures: Structures, targets: Targets, environments: Sequence[StructureEnvironments]
    ) -> tuple[PrequentialPrediction, ...]:
        if self.recipe.variance is False:
            return ()
        stressed = "stresses" in self.noise or bool(targets.stresses.isfinite().any())
        wanted = ["energies", "forces", *(["stresses"] if stressed else [])]
        novelty = self.novelty is not None
        prediction = self.potential(
            structures, variance=wanted, novelty=novelty, calibrated=False, environments=environments
        )
        return (PrequentialPrediction(structures, targets, prediction),)

    def added(
        self, structures: Structures, targets: Targets, environments: Sequence[StructureEnvironments] = ()
    ) -> OnlineFit:
        """With k more labels at fixed inducing variables and hyperparameters: O(k columns²).

        Where they are the first of their kind (a stress, say), its noise has to be learned, and all is refreshed.

        Args:
            environments: the environments of the structures, if they are there already.

        Raises:
            UserError: labels that do not fit the structures, or a species that was not there at the beginning.
        """
        self._check_species(structures)
        structures, targets = prepare.prepare_data(structures, targets, self.recipe, whole=False)
        remaining = self._remaining(structures, targets)
        room = online_updates.JACOBIAN_BYTES - sum(b.n_bytes for b in self.batches)
        batch = LabelBatch.from_labels(self.models, structures, targets, remaining, self._scales, room, environments)
        if self.charges:
            batch = replace(batch, charges=self.charges.rows(structures, remaining))
        new = replace(self, batches=(*self.batches, batch))._with_functionals(batch)
        unknown = [kind for kind in batch.rows if kind != FIXED and kind not in self.noise]
        if unknown:
            return new.refreshed(f"first {' and '.join(unknown)}")
        factor, every = self.factor, new.models[0].exact
        for rows in batch.rows.values():
            factor = factor.append_rows(rows)
        exact = self.exact.bordered(every.process) if self.exact and every else None
        return replace(new, factor=factor, exact=exact)

    def _remaining(self, structures: Structures, targets: Targets) -> Targets:
        """Labels less the charges and the baselines."""
        targets = self.charges.subtract(structures, targets) if self.charges else targets
        return prepare.subtract_baselines(structures, targets, self.baselines)

    def _with_functionals(self, batch: LabelBatch) -> OnlineFit:
        """With those of the last labels among all functionals, where there are these and nothing stands in their way."""
        if (every := self.models[0].exact) is None:
            return self
        if why := exact_model.why_not_exact(self.recipe, batch.structures, batch.remaining):
            every, events = None, (*self.events, f"{self.n_labels} labels: {INSTEAD} ({why})")
            return replace(self, models=(replace(self.models[0], exact=every),), exact=None, events=events)
        grown = every.bordered(self.models[0].kernel, batch.structures, batch.remaining)
        return replace(self, models=(replace(self.models[0], exact=grown),))

    def removed(self, index: int) -> OnlineFit:
        """Without the k labels of one batch: a downdate, O(k columns²); from the rows anew where that breaks down."""
        batch = self.batches[index]
        left = tuple(b for b in self.batches if b is not batch)
        if not left:
            raise errors.UserError("The last labels of an online model cannot be removed; begin a new one.")
        new, factor = replace(self, batches=left)._without_functionals(index), self.factor
        try:
            for rows in batch.rows.values():
                factor = factor.remove_rows(rows)
        except DowndateError as why:
            return new._from_rows(f"labels could not be removed by a downdate ({why})")
        return replace(new, factor=factor)._checked()

    def _without_functionals(self, index: int) -> OnlineFit:
        """Without a batch in the exact process too, `batches` being those that are left: factorised anew, O(n³)."""
        if self.exact is None or (every := self.models[0].exact) is None:
            return self
        before = sum(len(b.structures) for b in self.batches[:index])
        after = len(every.of) - sum(len(b.structures) for b in self.batches[index:])
        left = every.select([*range(before), *range(after, len(every.of))])
        exact = left.process.condition(self.exact.noise, self.exact.signal)
        return replace(self, models=(replace(self.models[0], exact=left),), exact=exact)

    def _check_species(self, structures: Structures) -> None:
        online_updates.check_species(self.batches[0].structures.distinct_species, structures)

    # ---------------------------------------------------------------- inducing variables

    def extended(
        self, structures: Structures, at_most: int | None = None, environments: Sequence[StructureEnvironments] = ()
    ) -> OnlineFit:
        """With more inducing points, from environments that the present ones represent worst.

        See sparse_points.choose_more.

        Args:
            at_most: inducing points (centres) of each descriptor; as many as the data ask for if None.
            environments: the environments of the structures, if they are there already.
        """
        self._check_species(structures)
        structures = structures.to(device=self.recipe.device, dtype=getattr(torch, self.recipe.dtype))
        periodic = bool(self.batches[0].structures.periodic.any(dim=1).double().mean() > 0.5)
        labels = sum(b.count for b in self.batches)
        grown, start = [], 0
        for k, model in enumerate(self.models):
            here = self.signal[start : start + len(model.blocks)]
            start += len(model.blocks)
            room = at_most
            if room is None:
                room = online_updates.missing_centres(self.asked, self.recipe, self.models, k, labels, periodic)
            novelty = self.novelty if k == 0 else None
            about = model.descriptor, model.kernel, model.local_blocks, model.lowers, here
            grown.append(
                sparse_points.choose_more(*about, structures, room, novelty, environments[k] if environments else None)
            )
        models, after, factor = online_updates.add_inducing(self.models, self.batches, self.factor, self._scales, grown)
        return self if factor is self.factor else replace(self, models=models, batches=after, factor=factor)._checked()

    def without(self, descriptor: int, species: int, centres: Sequence[int]) -> OnlineFit:
        """Without some inducing points (centres, with their gradients) of one block.

        Raises:
            UserError: no such block or centre, or none would be left.
        """
        models, after, factor = online_updates.remove_inducing(
            self.models, self.batches, self.factor, descriptor, species, centres
        )
        return replace(self, models=models, batches=after, factor=factor)._checked()

    # ---------------------------------------------------------------- hyperparameters

    def rebuilt(self, why: str) -> OnlineFit:
        """The online fit that `begin` gives for all these labels: recipe, baselines and inducing points chosen anew, noises learned again.

        Prequential predictions stay, so that the calibration goes on. Takes as long as a fit.
        """
        new = _without_noises(self.asked, [(b.structures, b.targets) for b in self.batches])
        foreseen, events = self._with_amplitude(1.0).prequential, (*self.events, *new.events)
        return replace(new, prequential=foreseen, events=events).refreshed(f"made anew, {why}")

    def refreshed(self, why: str) -> OnlineFit:
        """With noises and signals learned again from the rows, and calibration and novelty fitted again.

        Of an exact mean too, as a fit learns them: relative signals of species as long as labels come that these depend on.
        """
        whitened, counts = self._whitened(), self._counts()
        parameters, block_of_column, _ = regression.learn_hyperparameters(
            self.recipe, self.models, whitened, counts, StageTimer(None), restarts=0
        )
        signal = parameters.signal().detach().double().cpu()
        noise = regression.fit_noise(self.recipe, parameters, whitened, counts, signal[block_of_column])
        scatter = force_label_noise(self.structures, self.targets)
        sizes, scales = regression.block_widths(self.models), RowScales(noise, signal)
        exact, of_mean, models = None, parameters, self.models
        if every := models[0].exact:
            remaining = Targets.concatenate([b.remaining for b in self.batches]).select(self.structures, list(every.of))
            every = every.relearned(self.recipe, models[0].kernel, remaining)
            if self.exact and every is models[0].exact:  # the square of that is still needed
                every = every.select(range(len(every.of)))
            of_mean, _ = regression.learn_exactly(self.recipe, every, StageTimer(None))
            exact = every.process.condition(of_mean.noise(), float(of_mean.signal()[0]))
            models = (replace(models[0], exact=every),)
        new = replace(
            self,
            models=models,
            exact=exact,
            batches=tuple(b.rescaled(self._scales, scales, sizes) for b in self.batches),
            noise=noise,
            constant=prepare.labels_noise(self.targets)
            | regression.label_scatter(of_mean, of_mean.noise() if exact else noise),
            label_noise={"forces": scatter} if scatter == scatter else {},
            signal=signal,
            novelty=self._novelty(),
            novelty_labels=self.n_labels,
        )
        rows = [
            online_updates.rescaled_rows(w, k, RowScales.unit(len(sizes)), scales, sizes) for k, w in whitened.items()
        ]
        return new._from_rows(f"refreshed: {why}", rows)._calibrated()._compared()

    def _compared(self) -> OnlineFit:
        """With `subset` measured anew."""
        of_all = self.exact or self.factor.upper[:, :-1]
        about = self.potential, self.models, self.columns_signal, of_all, self.structures, self.recipe.seed
        return replace(self, subset=variance_checks.subset_error(*about))

    def recalibrated(self) -> OnlineFit:
        """With a calibration from prequential errors, as long as there is none from structures left out.

        Standard deviations grow with novelty well outside the trust region.
        """
        known = self.calibration.source.get("how") == calibrate.LEFT_OUT
        if known or not self.prequential or self.recipe.calibration is False:
            return self
        return self._with_calibration(calibrate.prequential_calibration(self.prequential))

    def _calibrated(self) -> OnlineFit:
        """With a calibration from structures left out in turn, where there are enough of them; it holds until the next refresh. Where the
        mean is exact, of any number with the amplitude of what inducing points miss."""
        wanted = self.recipe.calibration is not False and self.n_labels >= calibrate.FEWEST_ONLINE
        if self.recipe.variance is False or not (wanted or self.exact):
            return self.recalibrated()
        plain = replace(self._with_amplitude(1.0), moves=None)
        structures, targets = plain.structures, plain.targets
        solved = SparsePosterior(plain._weights, plain.factor.upper[:, :-1], {}, plain.factor.condition)
        learned = WhitenedData({}, {}, plain.noise, plain.label_noise, plain.columns_signal)
        nothing = torch.zeros(0, dtype=torch.long)
        chosen = left_out.choose_left_out(structures, targets, nothing, LEFT_OUT, plain.recipe.seed)
        about = structures, targets, plain._remaining(structures, targets), chosen
        found = left_out.predict_left_out(plain.potential, plain.models, learned, solved, *about, given=plain.exact)
        if found is None:
            return plain.recalibrated()
        new = plain
        if wanted:
            calibration = plain._learned_calibration(found)
            calibration, shifts = calibrate.with_shifts(calibration, found.influence, len(structures))
            widths = regression.block_widths(self.models)
            moves = online_updates.StructureMoves.from_shifts(shifts, solved.factor, widths)
            new = replace(plain._with_calibration(calibration), moves=moves)
        new = new._with_amplitude(found.amplitude(plain.noise_of_mean)) if plain.exact else new
        return new if wanted else new.recalibrated()

    def _learned_calibration(self, found: LeftOut) -> Calibration:
        """From structures left out; of the kinds ANEW, where data are few, from fits made anew without a part of them (decision 013)."""
        learned, recipe = calibrate.left_out_calibration(found), self.recipe
        few = self.n_labels <= calibrate.FEW_ANEW and self.structures.n_atoms <= LEFT_OUT
        apart = recipe.long_range.charges != "off" or any(isinstance(i.shares, dict) for i in recipe.inducings)
        if not few or self.exact or apart:
            return learned
        anew = calibrate.predict_in_folds(self.structures, self.targets, self._anew)
        found_anew = calibrate.left_out_calibration(anew).kinds if anew else {}
        return replace(learned, kinds=learned.kinds | {k: v for k, v in found_anew.items() if k in calibrate.ANEW})

    def _anew(self, structures: Structures, targets: Targets) -> Potential:
        """The potential of other labels with these hyperparameters, inducing variables chosen anew; not calibrated."""
        fewer = tuple(i.model_copy(update={"n": min(i.n or 1, structures.n_atoms)}) for i in self.recipe.inducings)
        new = _without_noises(self.recipe.model_copy(update={"inducing": fewer}), [(structures, targets)])
        sizes = regression.block_widths(new.models)
        batches = tuple(b.rescaled(RowScales.unit(len(sizes)), self._scales, sizes) for b in new.batches)
        noises: dict[str, Any] = {"noise": self.noise, "constant": self.constant, "label_noise": self.label_noise}
        new = replace(new, **noises, signal=self.signal, batches=batches, novelty=new._novelty())
        return new._from_rows("made anew").potential

    def _with_amplitude(self, amplitude: float) -> OnlineFit:
        """With another amplitude, in what was predicted as well; calibrated variances stay as they are."""
        if (ratio := amplitude / self.amplitude) == 1.0:
            return self
        calibration = self.calibration.with_amplitude(ratio)
        foreseen = tuple(one.with_amplitude(ratio) for one in self.prequential)
        return replace(self, amplitude=amplitude, calibration=calibration, prequential=foreseen)

    def _with_calibration(self, calibration: Calibration) -> OnlineFit:
        edge = None if self.novelty is None else EDGE
        return replace(self, calibration=replace(calibration, typical_novelty=edge))

    def _with_newer_novelty(self) -> OnlineFit:
        """With the novelty of the last batch too: fitted again where structures have become so many more, else by an update."""
        if self.novelty is None or self.n_labels == self.novelty_labels:
            return self
        if self.n_labels >= NOVELTY_GROWTH * self.novelty_labels:
            return replace(self, novelty=self._novelty(), novelty_labels=self.n_labels)
        batch = self.batches[-1]
        labelled = batch.labelled_atoms
        novelty = self.novelty.updated(batch.structures.species[labelled], batch.features[labelled])
        return replace(self, novelty=novelty)

    def _novelty(self) -> Mahalanobis | None:
        """Mahalanobis distances from the environments of labelled atoms, as a fit has them."""
        return None if self.recipe.novelty is False else online_updates.fit_novelty(self.batches, self.recipe)

    # ---------------------------------------------------------------- linear algebra

    def _rows(self) -> Iterator[Tensor]:
        """All rows, as the factor has them."""
        return (rows for b in self.batches for rows in b.rows.values())

    def _counts(self) -> dict[str, int]:
        kinds = [k for k in (*KINDS, FIXED) if any(k in b.rows for b in self.batches)]
        return {k: sum(len(b.rows[k]) for b in self.batches if k in b.rows) for k in kinds}

    def _whitened(self) -> dict[str, Tensor]:
        """Triangular factors of the rows of each kind, with unit noise and signal."""
        sizes = regression.block_widths(self.models)
        columns, unit, out = sum(sizes), RowScales.unit(len(sizes)), {}
        for kind in self._counts():
            folded = RowFactor(columns, 2 * columns)
            for batch in self.batches:
                if kind in batch.rows:
                    folded.add(batch.rows[kind][:, :-1], batch.rows[kind][:, -1])
            out[kind] = online_updates.rescaled_rows(folded.factor(), kind, self._scales, unit, sizes)
        return out

    def _from_rows(self, why: str, rows: Iterable[Tensor] | None = None) -> OnlineFit:
        """With the factor computed again from all rows, or from others with the same RᵀR."""
        columns = sum(regression.block_widths(self.models))
        factor = PosteriorFactor.from_rows(self._rows() if rows is None else rows, columns)
        events = (*self.events, f"{self.n_labels} labels: {why}")
        return replace(self, factor=factor.measure_drift(self._rows()), events=events)

    def _checked(self) -> OnlineFit:
        """With the error of the factor measured, and the factor computed again where that has grown."""
        factor = self.factor.measure_drift(self._rows())
        if factor.drift <= max(LARGEST_ERROR, WORSE * factor.initial_drift):
            return replace(self, factor=factor)
        return self._from_rows(f"rounding of {factor.changes} updates had grown to {factor.drift:.1e}")

    def _charges(self) -> ChargeModel | None:
        """Charges, with a posterior where there are variances."""
        if self.charges is None or self.recipe.variance is False:
            return self.charges.model if self.charges else None
        factor, _, rotate = self._variance_columns()
        rows = []
        for batch in self.batches:
            kinds = list(batch.rows)
            of_charges = noise_scaled(batch.charges, self.noise, kinds)
            rows += [(rotate(batch.rows[k])[:, :-1], c) for k, c in zip(kinds, of_charges, strict=True)]
        return self.charges.with_posterior(factor, rows)

    def _variance_columns(self) -> tuple[Tensor, VarianceSubset | None, Callable[[Tensor], Tensor]]:
        """R of the columns of variances, these where they are a subset, and what makes their rows from those of all."""
        most = self.recipe.variance.at_most(self.factor.columns) if self.recipe.variance else 0
        if self.factor.columns <= most:
            return self.factor.upper[:, :-1], None, lambda rows: rows
        return online_updates.variance_factor(self.models, self.factor, self._scales, most)

    def _variances(self) -> VarianceModel | None:
        if self.recipe.variance is False:
            return None
        factor, subset, _ = self._variance_columns()
        noises = self.constant, self.label_noise
        variances = regression.variance_model(self.models, self.columns_signal, factor, *noises, subset)
        known = self.moves if subset is None else None
        shifts = known.shifts(factor, regression.block_widths(self.models)) if known else None
        return replace(variances, of_fit=max(variances.of_fit, self.rank), amplitude=self.amplitude, shifts=shifts)


def _without_noises(asked: Recipe, parts: Sequence[tuple[Structures, Targets]]) -> OnlineFit:
    """An online fit of prepared labels, a batch of each part, whose noises are still to be learned.

    Its mean is exact: directions chosen for some labels need not be those of the next ones.
    """
    structures = Structures.concatenate([s for s, _ in parts])
    targets = Targets.concatenate([t for _, t in parts])
    hyperparameters.check_species(asked, structures)
    wanted, why = prepare.affordable_functionals(asked, structures, targets)
    recipe, base, *_ = prepare.set_up(structures, targets, wanted.model_copy(update={"mean": "exact"}), growing=True)
    remaining, pieces = (
        prepare.subtract_baselines(structures, targets, base),
        [*chunk_structures(structures, CHUNK_ATOMS)],
    )
    recipe, _ = four_body_choice.settle(recipe, structures, remaining, growing=True)
    models, _ = inducing_sets.make_models(
        recipe,
        structures,
        lambda k, choice: sparse_points.Candidates(choice).collect(pieces),
        structures,
        remaining,
        growing=True,
    )
    found, record = charge_fit.tried_charges(recipe, structures, remaining, models)
    charges = OnlineCharges.from_fit(found) if found else None
    if found:
        base, _ = prepare.subtract_charges(structures, targets, targets, recipe, base, found.model)
    widths = regression.block_widths(models)
    unit, room = RowScales.unit(len(widths)), online_updates.JACOBIAN_BYTES
    batches: list[LabelBatch] = []
    for part, labels in parts:
        left = prepare.subtract_baselines(part, charges.subtract(part, labels) if charges else labels, base)
        batch = LabelBatch.from_labels(models, part, labels, left, unit, room)
        batches.append(replace(batch, charges=charges.rows(part, left)) if charges else batch)
        room -= batches[-1].n_bytes
    about = recipe, tuple(models), base, tuple(batches), PosteriorFactor.from_rows([], sum(widths))
    events = (f"{len(structures)} labels: {INSTEAD} ({why})",) if why else ()
    return OnlineFit(asked, *about, {}, {}, {}, unit.signal, events=events, charges=charges, charge_record=record)
