"""Posterior variances of what a potential predicts, told apart by cause: inducing set, data, misspecification, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments
from gpmlp.core.quantities import Variance
from gpmlp.core.structures import Structures
from gpmlp.gp import covariances
from gpmlp.gp import inducing as inducing_module
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import Profile, ZonalKernel
from gpmlp.gp.local_variance import LocalVariance
from gpmlp.gp.prior import PriorCovariance, near_together

VARIANCES = ("atom_energies", "energies", "forces", "stresses")
FORMS = ("scaled", "dtc")
FREE = 1e-12  # of the misspecification: a variance left by the data that is far below is one that symmetry makes zero
KEPT = 1e-6  # of the misspecification, there
FORCE_ATOMS = 512  # atoms whose force rows are in memory together


@dataclass(frozen=True)
class VarianceRequest:
    """Which variances to compute.

    Attributes:
        atom_energies, energies, stresses: whether.
        forces: whether; for `atoms` only, if given (indices).
        form: how much of what the inducing set cannot represent counts: 'dtc', all of it (Quiñonero-Candela, Rasmussen 2005, eq. 20);
            'scaled', VarianceModel.amplitude of it.
    """

    atom_energies: bool = False
    energies: bool = False
    forces: bool = False
    stresses: bool = False
    atoms: Tensor | None = None
    form: str = "scaled"

    @property
    def any(self) -> bool:
        return self.atom_energies or self.correlated

    @property
    def correlated(self) -> bool:
        """Whether any is of several environments together, which then have to be there at once."""
        return self.energies or self.forces or self.stresses

    def within(self, first: int, n_atoms: int) -> VarianceRequest:
        """The same for a chunk of structures that begins with atom `first`; atoms are counted from there."""
        if self.atoms is None:
            return self
        here = self.atoms[(self.atoms >= first) & (self.atoms < first + n_atoms)] - first
        return replace(self, atoms=here)


@dataclass(frozen=True, eq=False)
class VarianceModel:
    """The posterior of a set of inducing variables, kept for variances.

    For a linear functional g of local energies with covariances k_gu and a = D L⁻¹ k_ug:
    var = w [k_gg - a.a] + |R⁻ᵀ a|² + noise,
    RᵀR = I + D L⁻¹ K_uo Σ⁻¹ K_ou L⁻ᵀ D (Quiñonero-Candela, Rasmussen, JMLR 6, 1939 (2005), eq. 20).

    Attributes:
        priors: one for each descriptor.
        blocks: for each descriptor, the inducing variables of its species.
        lowers: L of every block, in order.
        signal: (columns,) δ of each column, eV.
        factor: (columns, columns) R, upper triangular.
        noise: standard deviation by kind, as learned: of the labels and of what the model class cannot express together.
        label_noise: by kind, as much of `noise` as the labels themselves show (uncertainty/label_noise.py); absent = all of it.
        of_fit: number of columns of the mean; these are a subset if they are fewer.
        amplitude: w of the form 'scaled': DTC's evidence knows the process at the inducing variables only, and that of what lies
            between them may be of another size (left_out.py).
    """

    priors: tuple[PriorCovariance, ...]
    blocks: tuple[tuple[InducingBlock, ...], ...]
    lowers: tuple[Tensor, ...]
    signal: Tensor
    factor: Tensor
    noise: dict[str, float]
    label_noise: dict[str, float]
    of_fit: int
    amplitude: float = 1.0

    @property
    def n_columns(self) -> int:
        return len(self.signal)

    def whiten(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """a = D L⁻¹ k_ug and R⁻ᵀ a, as rows (n, columns): their squares are what the inducing set explains and the data leave."""
        a = inducing_module.whiten_rows(rows.to(self.signal, copy=True), self.lowers) * self.signal
        return a, torch.linalg.solve_triangular(self.factor.T, a.T, upper=False).T

    @cached_property
    def local(self) -> dict[int, LocalVariance]:
        """By species, what stands for `whiten` of its local energies. By one thread, whose rounding is always the same."""
        widths = [len(lower) for lower in self.lowers]
        columns = torch.arange(self.n_columns, device=self.signal.device).split(widths)
        species = [block.species for blocks in self.blocks for block in blocks]
        with parallel.one_core():
            p = torch.cholesky_inverse(self.factor, upper=True)  # (RᵀR)⁻¹
            return {z: self._local(z, species, columns, p) for z in set(species)}

    def _local(self, z: int, species: Sequence[int], columns: Sequence[Tensor], p: Tensor) -> LocalVariance:
        mine = [i for i, other in enumerate(species) if other == z]
        here = torch.cat([columns[i] for i in mine])
        lowers, own = [self.lowers[i] for i in mine], p[here][:, here]
        return LocalVariance.from_posterior(lowers, self.signal[here], own, self.amplitude)

    def prepare(self) -> None:
        """Make what `atom_energies` needs, once, rather than in each of several threads."""
        _ = self.local

    def share(self, form: str) -> float:
        """How much of what the inducing set cannot represent counts in that form."""
        return self.amplitude if form == "scaled" else 1.0

    def __call__(
        self, structures: Structures, views: Sequence[StructureEnvironments], wanted: VarianceRequest
    ) -> dict[str, Variance]:
        """Variances of energies, forces and stresses, by name of the field of Prediction that holds them."""
        out: dict[str, Variance] = {}
        share = self.share(wanted.form)
        if wanted.energies:
            out["energies_variance"] = self._energies(structures, views, share)
        together = wanted.forces and wanted.stresses and wanted.atoms is None and structures.n_atoms <= FORCE_ATOMS
        forces, stresses = self._rows(structures, views, True, True) if together else (None, None)
        if wanted.forces:
            out["forces_covariance"] = self._forces(structures, views, wanted.atoms, share, forces)
        if wanted.stresses:
            out["stresses_covariance"] = self._stresses(structures, views, share, stresses)
        return out

    def _rows(
        self,
        structures: Structures,
        views: Sequence[StructureEnvironments],
        forces: bool,
        stresses: bool,
        atoms: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Covariances of forces and of stresses with all columns."""
        n = structures.n_atoms if atoms is None else len(atoms)
        made = [
            covariances.covariance_rows(
                structures, v.neighbors, p.descriptor, p.kernel, b, forces, stresses, atoms, v.look_at(n)
            )
            for p, b, v in zip(self.priors, self.blocks, views, strict=True)
        ]
        return (
            torch.cat([r.forces for r in made], dim=1) if forces else None,
            torch.cat([r.stresses for r in made], dim=1) if stresses else None,
        )

    def atom_rows(self, seen: Sequence[Environments]) -> Tensor:
        """(environments, columns) covariances of local energies."""
        made = [
            covariances.atom_rows(e.features, e.species, p.kernel, b)
            for p, b, e in zip(self.priors, self.blocks, seen, strict=True)
        ]
        return torch.cat(made, dim=1) if len(made) > 1 else made[0]

    def atom_energies(
        self,
        seen: Sequence[Environments],
        form: str = "scaled",
        profiles: Sequence[dict[int, Profile]] | None = None,
    ) -> Variance:
        """Variances of local energies (environments,), eV^2: those by `whiten`, to rounding (LocalVariance).

        Args:
            seen: for each descriptor, the same environments.
            form: as in Wanted; profiles: kernels of the environments with the centres of the mean, if they are known: those of
                the variances are the first ones of them.
        """
        species, known = seen[0].species, profiles or [{}] * len(seen)
        prior = sum(p.atom_energies(species, seen[0].features.to(self.signal)) for p in self.priors)
        explained, left = torch.zeros_like(prior), torch.zeros_like(prior)
        for z in species.unique().tolist():
            if z in self.local:
                mine = species == z
                mine = slice(None) if mine.all() else mine
                pieces = self._pieces(z, [e.features[mine] for e in seen], known)
                explained[mine], left[mine] = self.local[z](pieces)
        inducing = self.share(form) * (prior - explained).clamp_min(0)
        # local energies are never observed, so no label noise belongs to them
        none = torch.zeros_like(prior)
        return Variance(inducing, left, none, none)

    def _pieces(self, z: int, features: Sequence[Tensor], known: Sequence[dict[int, Profile]]) -> list[Tensor]:
        """Covariances of local energies of one species with each of its blocks."""
        return [
            covariances.local_rows(p.kernel, block, x, k.get(z))
            for p, blocks, x, k in zip(self.priors, self.blocks, features, known, strict=True)
            for block in blocks
            if block.species == z
        ]

    def _energies(self, structures: Structures, views: Sequence[StructureEnvironments], share: float) -> Variance:
        rows = self.atom_rows([v.environments for v in views])
        summed = rows.new_zeros(len(structures), rows.shape[1]).index_add(0, structures.structure_of_atom, rows)
        a, left = self.whiten(summed)
        prior = sum(p.energies(structures, v.environments.features) for p, v in zip(self.priors, views, strict=True))
        inducing = share * (prior - a.square().sum(1)).clamp_min(0)
        counts = structures.counts.to(a.dtype).square()
        misfit, noise = (counts * part for part in self._constant("energies"))
        return Variance(inducing, left.square().sum(1), misfit, noise)

    def _forces(
        self,
        structures: Structures,
        views: Sequence[StructureEnvironments],
        atoms: Tensor | None,
        share: float,
        rows: Tensor | None,
    ) -> Variance:
        chosen = torch.arange(structures.n_atoms, device=structures.species.device) if atoms is None else atoms
        like = structures.positions.to(self.signal.dtype)
        inducing, data, misfit, noise = (like.new_full((structures.n_atoms, 3, 3), float("nan")) for _ in range(4))
        constant, labels = self._constant("forces")
        noise[chosen] = labels * torch.eye(3).to(like)
        for some in near_together(structures, chosen).split(FORCE_ATOMS):
            here = chosen[some]
            if not len(here):
                continue
            mine = rows.unflatten(0, (-1, 3))[some].flatten(0, 1) if rows is not None else None
            mine = self._rows(structures, views, True, False, here)[0] if mine is None else mine
            a, left = (part.unflatten(0, (len(here), 3)) for part in self.whiten(mine))
            data[here] = left @ left.mT
            misfit[here] = _where_free(data[here], constant)
            prior = sum(
                p.with_environments(v.look_at(len(here))).forces(structures, v.neighbors, v.surroundings, here)
                for p, v in zip(self.priors, views, strict=True)
            )
            inducing[here] = share * _without_rounding(prior - a @ a.mT)
        return Variance(inducing, data, misfit, noise)

    def _stresses(
        self, structures: Structures, views: Sequence[StructureEnvironments], share: float, rows: Tensor | None
    ) -> Variance:
        rows = self._rows(structures, views, False, True)[1] if rows is None else rows
        a, left = (part.unflatten(0, (len(structures), 6)) for part in self.whiten(rows))
        unknown = structures.volumes.isnan()
        data = left @ left.mT
        data[unknown] = float("nan")
        inducing = torch.full_like(data, float("nan"))
        prior = sum(
            p.with_environments(v.look).stresses(structures, v.surroundings)
            for p, v in zip(self.priors, views, strict=True)
        )
        inducing[~unknown] = share * _without_rounding((prior - a @ a.mT)[~unknown])
        parts = [(part * torch.eye(6).to(data)).expand_as(data).clone() for part in self._constant("stresses")]
        for part in parts:
            part[unknown] = float("nan")
        return Variance(inducing, data, *parts)

    def _constant(self, kind: str) -> tuple[float, float]:
        """Variances that are the same everywhere: what the model class cannot express, and noise of the labels."""
        everything = self.noise.get(kind, 0.0) ** 2
        noise = min(everything, self.label_noise.get(kind, math.inf) ** 2)
        return everything - noise, noise

    def joint_covariance(self, structures: Structures, views: Sequence[StructureEnvironments]) -> Tensor:
        """Posterior covariance (without noise) of all energies, force components and stress components, each with each.

        Rows and columns: energies (structures), forces (3 atoms), stresses (6 structures, Voigt; zero where there is no volume).
        """
        made = [
            covariances.covariance_rows(structures, v.neighbors, p.descriptor, p.kernel, b, environments_of=v.look)
            for p, b, v in zip(self.priors, self.blocks, views, strict=True)
        ]
        rows = torch.cat([torch.cat([r.energies, r.forces, r.stresses]) for r in made], dim=1)
        a, left = self.whiten(rows)
        prior = sum(
            p.with_environments(v.look).joint(structures, v.neighbors, v.surroundings)
            for p, v in zip(self.priors, views, strict=True)
        )
        return self.amplitude * (prior - a @ a.T) + left @ left.T

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a model file holds beside the mean: a JSON-able header and tensors. Centres are the first ones of the mean's."""
        header = {
            "noise": self.noise,
            "label_noise": self.label_noise,
            "of_fit": self.of_fit,
            "amplitude": self.amplitude,
            "blocks": [[{"species": b.species, "centres": len(b.features)} for b in blocks] for blocks in self.blocks],
            "signal": [{str(z): s for z, s in prior.signal.items()} for prior in self.priors],
        }
        every = [b for blocks in self.blocks for b in blocks]
        tensors = {"factor": _packed(self.factor.T), "signal": self.signal}
        for i, (block, lower) in enumerate(zip(every, self.lowers, strict=True)):
            tensors |= {f"{i}.tangents": block.tangents, f"{i}.kept": block.columns, f"{i}.lower": _packed(lower)}
        return header, tensors

    @staticmethod
    def from_state(
        header: dict,
        tensors: dict[str, Tensor],
        models: Sequence[tuple[Descriptor, ZonalKernel]],
        features: Sequence[dict[int, Tensor]],
    ) -> VarianceModel:
        """Restore what state gave, with the descriptors, kernels and centres (by Z) of the mean."""
        priors, blocks, lowers, i = [], [], [], 0
        for k, (descriptor, kernel) in enumerate(models):
            priors.append(PriorCovariance(descriptor, kernel, {int(z): s for z, s in header["signal"][k].items()}))
            mine = []
            for entry in header["blocks"][k]:
                centres = features[k][entry["species"]][: entry["centres"]]
                mine.append(InducingBlock(entry["species"], centres, tensors[f"{i}.tangents"], tensors[f"{i}.kept"]))
                lowers.append(_unpacked(tensors[f"{i}.lower"]))
                i += 1
            blocks.append(tuple(mine))
        factor = _unpacked(tensors["factor"]).T
        about = dict(header["noise"]), dict(header["label_noise"]), header["of_fit"], header.get("amplitude", 1.0)
        return VarianceModel(tuple(priors), tuple(blocks), tuple(lowers), tensors["signal"], factor, *about)


def _where_free(data: Tensor, constant: float) -> Tensor:
    """c (D + ε c)(D + τ c)⁻¹: the variance c of what the model class misses of a force, in directions in which there can be any.

    Where symmetry forbids a force, every model of the class gives none and is right; the covariance D (n, 3, 3) that the data leave is
    then zero to rounding, and elsewhere far above τ c. As with labels, which are not exact there either, something is kept.
    """
    if not constant:
        return torch.zeros_like(data)
    values, vectors = torch.linalg.eigh(0.5 * (data + data.mT))
    values = values.clamp_min(0)
    kept = constant * (values + KEPT * FREE * constant) / (values + FREE * constant)
    return (vectors * kept[..., None, :]) @ vectors.mT


def _packed(lower: Tensor) -> Tensor:
    """The entries of a lower triangular matrix, row by row."""
    rows, columns = torch.tril_indices(*lower.shape, device=lower.device)
    return lower[rows, columns]


def _unpacked(entries: Tensor) -> Tensor:
    size = int(((8 * len(entries) + 1) ** 0.5 - 1) / 2 + 0.5)
    out = entries.new_zeros(size, size)
    rows, columns = torch.tril_indices(size, size, device=entries.device)
    out[rows, columns] = entries
    return out


def _without_rounding(matrices: Tensor) -> Tensor:
    """The nearest positive semi-definite matrices: exact differences are, and only rounding makes them not."""
    values, vectors = torch.linalg.eigh(0.5 * (matrices + matrices.mT))
    return (vectors * values.clamp_min(0)[..., None, :]) @ vectors.mT
