"""Potential is a potential energy surface: potential(structures) -> Prediction."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gpmlp.core import errors, neighbors, parallel
from gpmlp.core.environments import SinglePrecisionDescriptor, StructureEnvironments
from gpmlp.core.neighbors import Neighbors
from gpmlp.core.quantities import KINDS, Prediction
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import CHUNK_ATOMS, Structures, chunk_structures
from gpmlp.descriptors import make_descriptor
from gpmlp.gp import posterior
from gpmlp.gp.kernels import make_kernel
from gpmlp.gp.variance import FORMS, SAMPLED, VARIANCES, VarianceModel, VarianceRequest
from gpmlp.potential import baselines, chunked, samples
from gpmlp.potential import covariance as covariances
from gpmlp.potential.baseline import Baseline, LocalBaseline
from gpmlp.potential.charges import ChargeModel, warn_of_total_charges
from gpmlp.potential.compiled import CompiledMean, compile_mean
from gpmlp.potential.force_samples import ForceSamples
from gpmlp.potential.local_errors import LocalErrors
from gpmlp.potential.mean import EnergyTerm, MeanBlock, stored_low_rank
from gpmlp.recipe import LOCAL_VARIANCES, MEANS, Recipe
from gpmlp.uncertainty.calibration import Calibration, calibrate_prediction
from gpmlp.uncertainty.mahalanobis import Mahalanobis

LIST_ATOMS = 1 << 14  # atoms whose neighbours are in memory together, unless a structure has more


@dataclass(frozen=True, eq=False)
class Potential:
    """A fitted potential: call it on structures. Holds no training data and needs no optimiser.

    Attributes:
        terms: one for each descriptor; their energies add up.
        baselines: terms that were not learned; those that are no LocalBaseline are asked of whole structures.
        species: atomic numbers it was trained on.
        recipe: the choices made, those left to the data filled in; learned noises are in `noise`, see also the baselines.
        noise: standard deviations of the likelihood, 'energies' eV/atom, 'forces' eV/A, 'stresses' eV/A^3.
        provenance: training files with hashes, package versions.
        report: the FitReport as a dictionary.
        variances: the posterior factor, for variances; None where only the mean was kept.
        calibration: what makes variances agree with errors on held-out data.
        novelty: Mahalanobis distances in the space of the first descriptor; None where none was kept.
        charges: of atoms, whose electrostatic energy is added; None where the model is local.
    """

    terms: tuple[EnergyTerm, ...]
    baselines: tuple[Baseline, ...]
    species: tuple[int, ...]
    recipe: Recipe
    noise: dict[str, float] = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)
    report: dict = field(default_factory=dict)
    variances: VarianceModel | None = None
    calibration: Calibration = field(default_factory=Calibration.identity)
    novelty: Mahalanobis | None = None
    charges: ChargeModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and other processes get: the fields, without what was compiled of them here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def cutoff(self) -> float:
        """Largest cutoff of descriptors, A; of those with features of a network, which have none, what they name in its place."""
        return max(getattr(term.descriptor, "shown_cutoff", term.descriptor.cutoff) for term in self.terms)

    @property
    def is_local(self) -> bool:
        """Whether the energy of an atom depends on its neighbours within a cutoff only, without a network, charges or another baseline."""
        whole = any(term.descriptor.cutoff == math.inf for term in self.terms)
        outer = self.outer_baselines or self.charges is not None
        return not whole and not outer and not any(b.whole_structures for b in self.local_baselines)

    @cached_property
    def local_baselines(self) -> tuple[LocalBaseline, ...]:
        """Baselines that are computed atom by atom, with the terms."""
        return tuple(b for b in self.baselines if isinstance(b, LocalBaseline))

    @cached_property
    def outer_baselines(self) -> tuple[Baseline, ...]:
        """Baselines that are asked of whole structures."""
        return tuple(b for b in self.baselines if not isinstance(b, LocalBaseline))

    @cached_property
    def reach(self) -> float:
        """Largest cutoff of descriptors that have one, and baselines, A: of the neighbours to look for."""
        cutoffs = *(term.descriptor.cutoff for term in self.terms), *(term.cutoff for term in self.local_baselines)
        return max(neighbors.CLOSEST, *(c for c in cutoffs if c < math.inf))

    @property
    def has_energy_zero(self) -> bool:
        """Whether it was fitted to any energies; forces and stresses alone leave the zero of energy open."""
        rows = self.report.get("rows", {})
        return not rows or bool(rows.get("energies") or rows.get(posterior.FIXED))

    def __call__(
        self,
        structures: Structures,
        variance: str | Sequence[str] | None = None,
        novelty: bool = False,
        atoms: Sequence[int] | Tensor | None = None,
        form: str = "scaled",
        calibrated: bool = True,
        environments: Sequence[StructureEnvironments] = (),
        pairs: Neighbors | None = None,
        config_types: Sequence[str] = (),
        atom_virials: bool = False,
    ) -> Prediction:
        """Predict energies, forces and stresses, and variances of them where asked for.

        Args:
            variance: one or more of VARIANCES ('atom_energies', 'energies', 'forces', 'stresses'), or 'all'; 'sampled_forces', an
                estimate of those of all forces from a few posterior samples (force_samples.py), at the price of a few predictions.
            novelty: whether to compute the Mahalanobis distance of each environment from the training data, relative to its threshold.
            atoms: indices of the atoms whose force variances are wanted (others NaN); all if not given.
            form: how much of what the inducing set cannot represent counts: 'dtc' all, 'scaled' what the training data show there is
                (VarianceModel.amplitude). Where a calibration was learned both are the same: it has weights of its own.
            calibrated: whether variances are rescaled as `calibration` learned from held-out data, or are the posterior's own.
            environments: of all the structures, one entry for each term, if they are there already; one chunk is predicted then.
            pairs: all neighbours within `reach`, or more, if they are there already (verlet_list.VerletList).
            config_types: of the structures, where they are known ('' = not known): the calibration has factors of each that it has seen,
                and one for others.
            atom_virials: whether to predict what each atom adds to stress times volume.

        Raises:
            UserError: a species that was not in the training data; atoms on top of each other; an unknown variance or form; a model
                without variances; virials of atoms of a model with a network.
        """
        if atom_virials:
            self.check_atom_virials()
        if not len(structures):
            raise errors.UserError("There are no structures to predict.")
        self.check_species(structures)
        learned = calibrated and any(kind.n for kind in self.calibration.kinds.values())
        form = "scaled" if learned and form == "dtc" else form
        request = self._variance_request(variance, form, atoms, structures.n_atoms)
        if novelty and self.novelty is None:
            raise errors.UserError(
                "This model holds no Mahalanobis distances: fitted with novelty: false, or a file of format 1. Fit it again."
            )
        calibrated = calibrated and request.any
        widened = calibrated and self.calibration.typical_novelty is not None and self.novelty is not None
        about = request, pairs, novelty or widened, environments, atom_virials
        prediction = self._predict_chunks(structures, *about)
        if calibrated:
            moved = structures.to(device=self.recipe.device)
            prediction = calibrate_prediction(prediction, moved, self.calibration, config_types)
            prediction = prediction if novelty else replace(prediction, novelty=None)
        prediction = self._with_open_energies(prediction, structures)
        like = structures.positions
        if prediction.forces.dtype == like.dtype and prediction.forces.device == like.device:
            return prediction
        return prediction.map(lambda v: v.to(like))

    def _with_open_energies(self, prediction: Prediction, structures: Structures) -> Prediction:
        """With what the compositions of the training data leave open in the variances of energies."""
        variance = prediction.energies_variance
        if variance is None:
            return prediction
        left_open = self.energy_deviations(structures).square().sum(1).to(variance.data)
        return replace(prediction, energies_variance=replace(variance, data=variance.data + left_open))

    def energy_deviations(self, structures: Structures) -> Tensor:
        """(structures, directions) how far energies move along what the compositions of the training data leave open, eV."""
        isolated = [b for b in self.baselines if isinstance(b, baselines.IsolatedAtoms)]
        none = structures.positions.new_zeros(len(structures), 0)
        return torch.cat([none, *(b.energy_deviations(structures) for b in isolated)], dim=1)

    def to_own_device(self, structures: Structures) -> Structures:
        """Structures on the potential's device, in its precision."""
        return structures.to(device=self.recipe.device, dtype=getattr(torch, self.recipe.dtype))

    def check_variance(self, variance: str | Sequence[str] | None) -> None:
        """Raise a UserError if these variances are unknown, or the model cannot give them."""
        self._variance_request(variance, "scaled", None, 0)

    def _atom_indices(self, atoms: Sequence[int] | Tensor, n_atoms: int) -> Tensor:
        """Indices of atoms, each once, from indices or a mask."""
        chosen = torch.as_tensor(atoms)
        if chosen.dtype == torch.bool:
            errors.check_shape("atoms", chosen, (n_atoms,), "One entry for each atom, or indices.")
            chosen = chosen.nonzero()[:, 0]
        if len(chosen) and not (0 <= int(chosen.min()) and int(chosen.max()) < n_atoms):
            raise errors.UserError(
                f"`atoms` must hold indices of atoms, 0 to {n_atoms - 1}; got {chosen.tolist()[:5]}."
            )
        return chosen.to(dtype=torch.long, device=self.recipe.device).unique()

    def _variance_request(
        self, variance: str | Sequence[str] | None, form: str, atoms: Sequence[int] | Tensor | None, n_atoms: int
    ) -> VarianceRequest:
        names = () if variance is None else (variance,) if isinstance(variance, str) else tuple(variance)
        for name in names:
            errors.check_choice("variance", name, (*VARIANCES, SAMPLED, "all"))
        errors.check_choice("form of the variance", form, FORMS)
        if names:
            self.variance_model()
        chosen = None if atoms is None else self._atom_indices(atoms, n_atoms)
        kinds = {name: name in names or "all" in names for name in VARIANCES}
        return VarianceRequest(**kinds, atoms=chosen, form=form, sampled_forces=SAMPLED in names)  # type: ignore[arg-type]

    def variance_model(self) -> VarianceModel:
        """The posterior factor; a UserError that says why where there is none."""
        if self.variances is not None:
            return self.variances
        if self.recipe.variance is False:
            why = "it was fitted with variance: false. Fit it again with variance left to the recipe's default."
        elif "sample" in self.provenance:
            why = "it is a sample of a posterior. Ask the potential that it was drawn from."
        else:
            why = "its file is of format 1. Fit it again."
        raise errors.UserError(f"This model holds no posterior factor, so it can give no variances: {why}")

    @cached_property
    def compiled_mean(self) -> CompiledMean | None:
        """The mean of terms and local baselines in the compiled core; None where PyTorch computes it."""
        return compile_mean(self.terms, self.local_baselines, self.species)

    @property
    def compiled_prediction(self) -> CompiledMean | None:
        """That mean where it is all that is predicted: charges and baselines of whole structures come on top of it."""
        return None if self.charges is not None or self.outer_baselines else self.compiled_mean

    @cached_property
    def force_samples(self) -> ForceSamples:
        """What force covariances are estimated from."""
        return ForceSamples.from_potential(self)

    def _predict_chunks(
        self,
        structures: Structures,
        request: VarianceRequest,
        pairs: Neighbors | None,
        novelty: bool,
        environments: Sequence[StructureEnvironments],
        atom_virials: bool,
    ) -> Prediction:
        """Uncalibrated, as many atoms at a time as fit in memory."""
        parts, first = [], 0
        atoms_together = CHUNK_ATOMS if request.correlated else LIST_ATOMS
        for chunk in [structures] if environments else chunk_structures(structures, atoms_together):
            # products of correlated variances are large enough for many cores; elsewhere threads share chunks of atoms
            with nullcontext() if request.correlated else parallel.one_core():
                end = first + chunk.n_atoms
                near = None if pairs is None else pairs.of_structures(first, end).to(self.recipe.device)
                here = request.within(first, chunk.n_atoms)
                about = here, near, novelty, environments, atom_virials
                moved = self.to_own_device(chunk)
                outer = (baseline(moved) for baseline in self.outer_baselines)
                parts.append(functools.reduce(operator.add, outer, self._predict(moved, *about)))
                first = end
        return Prediction.concatenate(parts)

    def _predict(
        self,
        structures: Structures,
        request: VarianceRequest,
        pairs: Neighbors | None,
        novelty: bool,
        environments: Sequence[StructureEnvironments],
        atom_virials: bool,
    ) -> Prediction:
        if environments:
            lists = (e.neighbors for e in environments if e.neighbors.cutoff < math.inf)
            pairs = max(lists, key=lambda near: near.cutoff, default=None)
        if pairs is None or pairs.cutoff < self.reach:
            pairs = neighbors.find_neighbors(structures, self.reach)
        model = self.variance_model() if request.any else None
        distances = self.novelty if novelty else None
        if model and request.atom_energies:
            model.prepare()

        wanted = LocalErrors(model if request.atom_energies else None, distances, request.form)
        mean = chunked.predict_mean(
            self.terms, structures, pairs.of_centers, wanted, self.local_baselines,
            self.force_samples if request.sampled_forces else None, self.compiled_mean, atom_virials,
        )  # fmt: skip
        if self.charges is not None:
            double = structures.to(dtype=torch.float64)
            known = (self.report.get("charges") or {}).get("total_charges_e")
            if known:
                warn_of_total_charges(double, known)
            mean = mean + self.charges(double, pairs).map(lambda value: value.to(structures.positions))
        if not model or not request.correlated:
            return mean
        environments = environments or [term.environments(structures, pairs) for term in self.terms]
        rows = None
        if self.charges is not None:
            rows = self.charges.with_charges(
                structures, model.whitened(model.covariance_rows(structures, environments))
            )
        variances: dict[str, Any] = dict(model(structures, environments, request, rows))
        return replace(mean, **variances)

    def sample(self, k: int, seed: int, calibrated: bool = True) -> samples.PosteriorSamples:
        """Draw k potentials from the posterior (samples.draw_samples): each with consistent energies, forces and stresses."""
        return samples.draw_samples(self, k, seed, "posterior", calibrated)

    def committee(self, k: int, seed: int, calibrated: bool = True) -> samples.PosteriorSamples:
        """k potentials as fitted to labels that scatter by their noise (samples.draw_samples), without fitting again."""
        return samples.draw_samples(self, k, seed, "label_noise", calibrated)

    def as_sample(self, terms: tuple[EnergyTerm, ...], charges: ChargeModel | None, origin: dict) -> Potential:
        """A potential with the weights of a sample, which has no variances; `origin`: how it was drawn, for the provenance."""
        provenance, recipe = self.provenance | {"sample": origin}, self.recipe.model_copy(update={"mean": "exact"})
        return replace(self, terms=terms, charges=charges, recipe=recipe, variances=None, provenance=provenance)

    def covariance(self, structures: Structures, calibrated: bool = True, kinds: Sequence[str] = KINDS) -> Tensor:
        """Posterior covariance (no noise) of energies, forces and stresses of a few structures, each with each.

        Rows and columns: energies (structures) eV, forces (3 atoms) eV/A, stresses (6 structures, Voigt; zero without volume) eV/A^3, of
        these the `kinds` that are asked for.

        Args:
            calibrated: the covariance from which calibrated samples are drawn (`sample`), or the posterior's own, with what the
                inducing set misses. Where nothing was learned (calibration.sample_scale) both are the latter.
            kinds: some of 'energies', 'forces', 'stresses'; what is not asked for costs nothing.

        Raises:
            UserError: as `__call__`; an unknown kind.
        """
        return covariances.covariance(self, structures, calibrated, kinds)

    def functional(
        self, structures: Structures, weights: Mapping[str, Tensor], calibrated: bool = True
    ) -> covariances.Functional:
        """Value and covariance of linear functionals Σ of weights times energies, forces and stresses: of an energy difference, say.

        Args:
            weights: by kind, for one functional: 'energies' (structures,), 'forces' (atoms, 3), 'stresses' (structures, 3, 3); for several
                with one axis more in front. Kinds that are absent do not count, and cost nothing.
            calibrated: as of `covariance`.

        Raises:
            UserError: as `__call__`; weights of another shape, or of an unknown kind.
        """
        return covariances.functional(self, structures, weights, calibrated)

    def to(
        self,
        device: str | None = None,
        descriptors: str | None = None,
        mean: str | None = None,
        local_variance: str | None = None,
    ) -> Potential:
        """The same on another device, with descriptors in another precision ('float64', 'float32'), which model files do not keep, with
        the mean in another form ('exact', 'low_rank'), or the variance of local energies ('exact', 'reduced').

        What is not given stays as it is. Single precision is faster, above all on GPUs, and changes predictions by far less than their
        errors (environments.SinglePrecisionDescriptor); so does a low rank (fitting/low_rank.py), by what the report says. Variances of
        fewer columns (fitting/reduced_variance.py) are some per cent from the exact ones.

        Raises:
            UserError: a device that is not available, another precision, or a form that this model does not have.
        """
        errors.check_choice("form of the mean", mean or "exact", MEANS)
        if mean == "low_rank" and not any(term.low_rank for term in self.terms):
            raise errors.UserError(
                "This model has no mean of low rank. Fit it with `mean: low_rank` in the recipe, and forces of enough structures."
            )
        errors.check_choice("form of the variance of local energies", local_variance or "exact", LOCAL_VARIANCES)
        if local_variance == "reduced" and not (self.variances and self.variances.reduced):
            raise errors.UserError(
                "This model has no variances of fewer columns. Fit it with `variance: {local: reduced}` in the recipe."
            )
        errors.check_choice("precision of the descriptors", descriptors or "float64", ("float64", "float32"))
        if descriptors is None and any(isinstance(t.descriptor, SinglePrecisionDescriptor) for t in self.terms):
            descriptors = "float32"
        header, tensors = self.state()
        if device is not None:
            errors.check_device(device)
            header["recipe"] = header["recipe"] | {"device": device}
        if mean is not None:
            header["recipe"] = header["recipe"] | {"mean": mean}
        if local_variance is not None and self.recipe.variance is not False:
            variance = header["recipe"]["variance"] | {"local": local_variance}
            header["recipe"] = header["recipe"] | {"variance": variance}
        moved = self.from_state(header, tensors)
        if descriptors != "float32":
            return moved
        single = (replace(t, descriptor=SinglePrecisionDescriptor(t.descriptor)) for t in moved.terms)
        return replace(moved, terms=tuple(single))

    def __repr__(self) -> str:
        """Species, descriptors and sizes; not the tensors."""
        species = ", ".join(errors.chemical_symbol(z) for z in self.species)
        names = ", ".join(descriptor.name for descriptor in self.recipe.descriptors)
        columns = f"{self.report['columns']} columns" if "columns" in self.report else "no report"
        what = "a baseline" if self.outer_baselines else "charges" if self.charges is not None else "a network"
        what = "" if self.is_local else f", {what} beyond"
        reach = f"cutoff {self.cutoff:g} A{what}"
        return f"Potential({species}; {names}; {reach}; {columns})"

    def check_atom_virials(self) -> None:
        """UserError if virials cannot be laid on atoms."""
        if self.charges is not None:
            raise errors.UserError(
                "Virials of atoms have no meaning with charges, which act on each other at any distance: take forces and stresses of "
                "structures."
            )
        if not self.is_local:
            raise errors.UserError(
                "Virials of atoms have no meaning with a network or a baseline whose energies are functions of whole structures: take "
                "forces and stresses of structures."
            )

    def check_species(self, structures: Structures) -> None:
        if not isinstance(structures, Structures):
            raise errors.UserError(
                f"A potential takes gpmlp.Structures; got {type(structures).__name__}. Convert ASE's Atoms by "
                "gpmlp.io.ase_atoms.structures_from_ase([atoms]), or read a file by gpmlp.read."
            )
        for i, z in enumerate(structures.distinct_species):
            if z not in self.species:
                atom = int((structures.species == structures.distinct_species[i]).nonzero()[0, 0])
                name = structures.names[int(structures.structure_of_atom[atom])]
                raise errors.UserError(
                    f"{name}: the potential was not trained on {errors.chemical_symbol(z)} (Z = {z}); "
                    f"it knows {', '.join(errors.chemical_symbol(k) for k in self.species)}."
                )

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a model file holds: a JSON-able header and named tensors."""
        header = {
            "species": list(self.species),
            "recipe": self.recipe.model_dump(mode="json"),
            "noise": self.noise,
            "provenance": self.provenance,
            "report": self.report,
            "baselines": [b.state() for b in self.baselines],
            "calibration": self.calibration.as_dict(),
        }
        tensors = {
            f"term{k}.Z{z}.{name}": value
            for k, term in enumerate(self.terms)
            for z, block in term.blocks.items()
            for name, value in vars(block).items()
        }
        tensors |= {
            f"term{k}.descriptor.{name}": value
            for k, term in enumerate(self.terms)
            for name, value in term.descriptor.constants.items()
        }
        tensors |= {
            f"term{k}.Z{z}.low_rank.{name}": value
            for k, term in enumerate(self.terms)
            for z, form in term.low_rank.items()
            for name, value in form.stored().items()
        }
        if self.variances is not None:
            header["variances"], more = self.variances.state()
            tensors |= {f"variances.{name}": value for name, value in more.items()}
        if self.novelty is not None:
            header["novelty"], more = self.novelty.state()
            tensors |= {f"novelty.{name}": value for name, value in more.items()}
        if self.charges is not None:
            header["charges"], more = self.charges.state()
            tensors |= {f"charges.{name}": value for name, value in more.items()}
        return header, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    @classmethod
    def from_state(cls, header: dict, tensors: dict[str, Tensor]) -> Potential:
        """Build a potential again from state().

        Raises:
            UserError: a tensor is missing, too many, not finite, or of a shape, type or range that does not fit the header.
        """
        recipe = Recipe.from_header(header["recipe"])
        try:
            errors.check_device(recipe.device)
        except errors.UserError:
            recipe = recipe.model_copy(update={"device": "cpu"})  # fitted on a GPU, used where there is none
        dtype = getattr(torch, recipe.dtype)
        stored = StoredTensors({name: value.to(recipe.device) for name, value in tensors.items()})
        species = tuple(header["species"])
        terms = []
        for k, (descriptor, kernel) in enumerate(zip(recipe.descriptors, recipe.kernels, strict=True)):
            made = make_descriptor(species, descriptor.model_dump(), stored.part(f"term{k}.descriptor."))
            parts = {z: stored.part(f"term{k}.Z{z}.") for z in species}
            blocks = {z: MeanBlock.from_stored(part, made.n_features, dtype) for z, part in parts.items()}
            function = make_kernel(kernel)
            low_rank = {
                z: stored_low_rank(part.part("low_rank."), blocks[z], function)
                for z, part in parts.items()
                if len(part.part("low_rank."))
            }
            terms.append(EnergyTerm(made, function, blocks, low_rank, recipe.mean == "exact"))
        variances = novelty = None
        if header.get("variances") is not None:
            features = [{z: block.features for z, block in term.blocks.items()} for term in terms]
            kernels, part = [term.kernel for term in terms], stored.part("variances.")
            made_by = [term.descriptor for term in terms]
            exact = recipe.variance is False or recipe.variance.local == "exact"
            variances = VarianceModel.from_state(header["variances"], part, made_by, kernels, features, exact)
        if header.get("novelty") is not None:
            novelty = Mahalanobis.from_state(header["novelty"], stored.part("novelty."))
        charges = None
        if header.get("charges") is not None:
            about = terms[0].descriptor, terms[0].kernel, 0 if variances is None else variances.n_columns
            charges = ChargeModel.from_state(header["charges"], stored.part("charges."), *about)
        if variances is not None:
            variances.check_shifts(0 if charges is None or charges.posterior is None else len(charges.posterior.scale))
        stored.check_all_taken()
        learned = header.get("calibration")
        return cls(
            tuple(terms),
            tuple(baselines.baseline_from_state(state) for state in header["baselines"]),
            species,
            recipe,
            dict(header["noise"]),
            dict(header["provenance"]),
            dict(header["report"]),
            variances,
            Calibration.identity() if learned is None else Calibration.from_dict(learned),
            novelty,
            charges,
        )
