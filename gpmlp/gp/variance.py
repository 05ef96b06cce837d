"""Posterior variances of energies, forces and stresses, split by cause: inducing set, data, misspecification, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from gpmlp.core import parallel
from gpmlp.core.environments import Descriptor, Environments, StructureEnvironments
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import KINDS, Variance
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.gp import covariances, inducing
from gpmlp.gp.covariances import Block, CovarianceRows
from gpmlp.gp.functionals import FunctionalBlock
from gpmlp.gp.inducing import InducingBlock
from gpmlp.gp.kernels import Profile, ZonalKernel
from gpmlp.gp.local_variance import LocalVariance, ReducedVariance, check_leading, inducing_variance
from gpmlp.gp.prior import PriorCovariance, near_together
from gpmlp.gp.stored_factors import STORED, check_factor, pack_triangle, stored_triangle

ByDescriptor = Sequence[StructureEnvironments]  # environments of the same structures, by each descriptor
VARIANCES = ("atom_energies", "energies", "forces", "stresses")
SAMPLED = "sampled_forces"  # an estimate of the variances of forces
FORMS = ("scaled", "dtc")
FREE = (
    1e-6  # of the misspecification: where the data leave far less, symmetry forbids a force; rounding is 1e-10 of that
)
ROUNDING = 1e-12  # of prior variances: less than that of their difference to what is explained is rounding
KEPT = 1e-6  # of the misspecification, there
FORCE_ATOMS = 512  # atoms whose force rows are in memory together


@dataclass(frozen=True)
class VarianceRequest:
    """Which variances to compute.

    Attributes:
        atom_energies, energies, stresses: whether.
        forces: whether; for `atoms` only, if given (indices).
        sampled_forces: whether those of all forces, estimated from posterior samples.
        form: how much of what the inducing set cannot represent counts: 'dtc', all of it (Quiñonero-Candela, Rasmussen 2005, eq. 20);
            'scaled', VarianceModel.amplitude of it.
    """

    atom_energies: bool = False
    energies: bool = False
    forces: bool = False
    stresses: bool = False
    atoms: Tensor | None = None
    form: str = "scaled"
    sampled_forces: bool = False

    @property
    def any(self) -> bool:
        return self.atom_energies or self.sampled_forces or self.correlated

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
class WhitenedRows:
    """Rows of energies, forces and stresses as `VarianceModel.whiten` has them."""

    a: CovarianceRows
    b: CovarianceRows


@dataclass(frozen=True, eq=False)
class VarianceModel:
    """The posterior covariance of a set of inducing variables u, as factors.

    For a linear functional g of local energies, k_gu its covariances with u, and a = D L⁻¹ k_ug (`whiten`):

        var = w [k_gg - k_gu K_uu⁻¹ k_ug] + k_gu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_ug + misspecification + noise
            = w [k_gg - a.a]              + |R⁻ᵀ a|²                            + ...

    with RᵀR = I + D L⁻¹ K_uo Σ⁻¹ K_ou L⁻ᵀ D (Quiñonero-Candela, Rasmussen, JMLR 6, 1939 (2005), eq. 20, where w = 1).

    Attributes:
        priors: one for each descriptor.
        blocks: for each descriptor, the inducing variables of its species.
        lowers: L of every block, in order.
        signal: (columns,) δ of each column, eV: the diagonal of D.
        factor: (columns, columns) R, upper triangular.
        noise: standard deviation by kind, as learned: of the labels and of what the model class cannot express together.
        label_noise: by kind, as much of `noise` as the labels themselves show (uncertainty/residuals.py); absent = all of it.
        of_fit: number of columns of the mean; these are a subset if they are fewer.
        amplitude: w of the form 'scaled': DTC's evidence knows the process at the inducing variables only, and that of what lies
            between them may be of another size (fitting/left_out.py).
        reduced: by species, nearly the variances of local energies from fewer columns, where a fit was asked for them; exact: whether
            they are left aside.
        shifts: (structures, columns) by which leaving a structure out moves the fit, b.s for a row b (fitting/influence.py), as large
            as calibrated samples need them; of columns and those of charges behind them. None where they are not known.
    """

    priors: tuple[PriorCovariance, ...]
    blocks: tuple[tuple[Block, ...], ...]
    lowers: tuple[Tensor, ...]
    signal: Tensor
    factor: Tensor
    noise: dict[str, float]
    label_noise: dict[str, float]
    of_fit: int
    amplitude: float = 1.0
    reduced: dict[int, ReducedVariance] = field(default_factory=dict)
    exact: bool = True
    shifts: Tensor | None = None

    @property
    def n_columns(self) -> int:
        return len(self.signal)

    @property
    def local_blocks(self) -> tuple[tuple[InducingBlock, ...], ...] | None:
        """`blocks` where all are values and gradients at centres; None where there are functionals, for which the core has no form."""
        local = tuple(tuple(b for b in blocks if isinstance(b, InducingBlock)) for blocks in self.blocks)
        return local if sum(map(len, local)) == sum(map(len, self.blocks)) else None

    def __call__(
        self,
        structures: Structures,
        environments: ByDescriptor,
        request: VarianceRequest,
        rows: WhitenedRows | None = None,
    ) -> dict[str, Variance]:
        """Variances of energies, forces and stresses, by name of the field of Prediction that holds them.

        Args:
            rows: of all that is asked for, if they are there already.
        """
        out: dict[str, Variance] = {}
        share = self.inducing_share(request.form)
        all_forces = request.forces and request.atoms is None and structures.n_atoms <= FORCE_ATOMS
        if rows is None and all_forces and request.stresses:
            rows = self.whitened(self.covariance_rows(structures, environments))
        if request.energies:
            out["energies_variance"] = self.energy_variance(structures, environments, share, rows)
        if request.forces:
            out["forces_covariance"] = self.force_covariance(structures, environments, share, request.atoms, rows)
        if request.stresses:
            out["stresses_covariance"] = self.stress_covariance(structures, environments, share, rows)
        return out

    def inducing_share(self, form: str) -> float:
        """w: how much of what the inducing set cannot represent counts in that form."""
        return self.amplitude if form == "scaled" else 1.0

    def whiten(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """a = D L⁻¹ k_ug and b = R⁻ᵀ a, as rows (n, columns), from rows k_gu of unit signal variance.

        Their products are a.a' = k_gu K_uu⁻¹ k_ug', what the inducing set explains, and b.b' = k_gu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_ug',
        what the data leave of that.
        """
        a = inducing.whiten_rows(rows.to(self.signal, copy=True), self.lowers) * self.signal
        return a, torch.linalg.solve_triangular(self.factor.T, a.T, upper=False).T

    def whitened(self, rows: CovarianceRows) -> WhitenedRows:
        """`whiten` of all rows at once."""
        every = rows.energies, rows.forces, rows.stresses
        a, b = (CovarianceRows(*part.split([len(r) for r in every])) for part in self.whiten(torch.cat(every)))
        return WhitenedRows(a, b)

    def covariance_rows(
        self,
        structures: Structures,
        environments: ByDescriptor,
        forces: bool = True,
        stresses: bool = True,
        atoms: Tensor | None = None,
    ) -> CovarianceRows:
        """K_fu: covariances of energies, of forces (of some atoms) and of stresses with all columns, unit signal variance."""
        n = structures.n_atoms if atoms is None else len(atoms)
        parts = []
        for p, blocks, v in zip(self.priors, self.blocks, environments, strict=True):
            v.keep_jacobian(n)
            parts.append(covariances.covariance_rows(structures, v, p.kernel, blocks, forces, stresses, atoms))
        return CovarianceRows.side_by_side(parts)

    def atom_rows(self, environments: Sequence[Environments]) -> Tensor:
        """(environments, columns) covariances of local energies, unit signal variance, from the environments for each descriptor."""
        product = [
            covariances.atom_rows(e.features, e.species, p.kernel, b)
            for p, b, e in zip(self.priors, self.blocks, environments, strict=True)
        ]
        return torch.cat(product, dim=1) if len(product) > 1 else product[0]

    def energy_variance(
        self, structures: Structures, environments: ByDescriptor, share: float, rows: WhitenedRows | None = None
    ) -> Variance:
        """(structures,) variance of total energies, eV²; misspecification and noise are those of energies per atom times n_atoms².

            var(E) = w [k_EE - k_Eu K_uu⁻¹ k_uE] + k_Eu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_uE + misspecification + noise

        (Quiñonero-Candela, Rasmussen 2005, eq. 20), with k_Eu the sum of the rows k_xu of its atoms.
        """
        if rows is None:
            k_xu = self.atom_rows([v.environments for v in environments])
            # k_Eu = Σ_i k_xi,u
            k_Eu = k_xu.new_zeros(len(structures), k_xu.shape[1]).index_add(0, structures.structure_of_atom, k_xu)
            a, b = self.whiten(k_Eu)
        else:
            a, b = rows.a.energies, rows.b.energies
        features = [v.environments.features for v in environments]
        k_EE = _total([p.energies(structures, x) for p, x in zip(self.priors, features, strict=True)])
        unexplained = inducing_variance(k_EE, a.square().sum(1), share)
        counts = structures.counts.to(a.dtype).square()
        misfit, noise = (counts * part for part in self.noise_parts("energies"))
        return Variance(unexplained, b.square().sum(1), misfit, noise)

    def force_covariance(
        self,
        structures: Structures,
        environments: ByDescriptor,
        share: float,
        atoms: Tensor | None = None,
        rows: WhitenedRows | None = None,
    ) -> Variance:
        """(atoms, 3, 3) covariance of the components of the force on each atom, (eV/A)²; NaN for atoms that were not asked for.

            cov(F, F) = w [k_FF - k_Fu K_uu⁻¹ k_uF] + k_Fu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_uF + misspecification + noise

        (Quiñonero-Candela, Rasmussen 2005, eq. 20; k_FF holds mixed second derivatives of the kernel, PriorCovariance.forces).

        Args:
            share: w.
            atoms: indices; all if None. rows: of all forces, if they are there.
        """
        chosen = torch.arange(structures.n_atoms, device=structures.species.device) if atoms is None else atoms
        like = structures.positions.to(self.signal.dtype)
        unexplained, data, misfit, noise = (like.new_full((structures.n_atoms, 3, 3), math.nan) for _ in range(4))
        constant, labels = self.noise_parts("forces")
        noise[chosen] = labels * torch.eye(3).to(like)
        for chunk in near_together(structures, chosen).split(FORCE_ATOMS):
            here = chosen[chunk]
            if not len(here):
                continue
            if rows is None:
                k_Fu = self.covariance_rows(structures, environments, stresses=False, atoms=here).forces
                a, b = (part.unflatten(0, (len(here), 3)) for part in self.whiten(k_Fu))
            else:
                a, b = (part.forces.unflatten(0, (-1, 3))[here] for part in (rows.a, rows.b))
            k_FF = _total([p.forces(structures, v, here) for p, v in zip(self.priors, environments, strict=True)])
            # a aᵀ = k_Fu K_uu⁻¹ k_uF and b bᵀ = k_Fu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_uF
            unexplained[here] = share * _above_rounding(k_FF - a @ a.mT, k_FF)
            data[here] = b @ b.mT
            misfit[here] = _where_free(data[here], constant)
        return Variance(unexplained, data, misfit, noise)

    def sampled_force_covariance(self, deviations: Tensor) -> Variance:
        """(atoms, 3, 3) covariance of the force on each atom, (eV/A)², estimated from samples of the posterior.

            cov(F, F) ≈ 1/k Σ_s δF_s δF_sᵀ + misspecification + noise

        What the inducing set cannot represent is not in it: samples do not show it.

        Args:
            deviations: (k, atoms, 3) forces of samples less those of the mean, eV/A.
        """
        data = torch.einsum("kna,knb->nab", deviations, deviations).to(self.signal.dtype) / len(deviations)
        constant, labels = self.noise_parts("forces")
        noise = (labels * torch.eye(3).to(data)).expand_as(data)
        return Variance(torch.zeros_like(data), data, _where_free(data, constant), noise)

    def stress_covariance(
        self, structures: Structures, environments: ByDescriptor, share: float, rows: WhitenedRows | None = None
    ) -> Variance:
        """(structures, 6, 6) covariance of stress components in Voigt order, (eV/A³)²; NaN without volume.

        cov(S, S) = w [k_SS - k_Su K_uu⁻¹ k_uS] + k_Su (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_uS + misspecification + noise
        """
        if rows is None:
            rows = self.whitened(self.covariance_rows(structures, environments, forces=False))
        a, b = (part.stresses.unflatten(0, (len(structures), 6)) for part in (rows.a, rows.b))
        k_SS = _total([p.stresses(structures, v) for p, v in zip(self.priors, environments, strict=True)])
        unknown = structures.volumes.isnan()
        data = b @ b.mT
        unexplained = torch.full_like(data, math.nan)
        unexplained[~unknown] = share * _above_rounding((k_SS - a @ a.mT)[~unknown], k_SS[~unknown])
        unit = torch.eye(6).to(data).expand_as(data)
        misfit, noise = (part * unit for part in self.noise_parts("stresses"))
        for part in (data, misfit, noise):
            part[unknown] = math.nan
        return Variance(unexplained, data, misfit, noise)

    def unexplained(
        self,
        structures: Structures,
        environments: ByDescriptor,
        a: Tensor,
        kinds: Sequence[str] = KINDS,
        weights: Tensor | None = None,
    ) -> Tensor:
        """w [k_gg' - k_gu K_uu⁻¹ k_ug'] of energies, forces and stresses, each with each, or of sums of them.

        Args:
            a: their whitened rows. kinds, weights, rows and columns of the result: as in PriorCovariance.joint.
        """
        k_gg = _total([p.joint(structures, v, kinds, weights) for p, v in zip(self.priors, environments, strict=True)])
        return self.amplitude * (k_gg - a @ a.T)

    def atom_energies(
        self, environments: Sequence[Environments], form: str = "scaled", profiles: Sequence[dict[int, Profile]] = ()
    ) -> Variance:
        """Variances of local energies (environments,), eV^2: those by `whiten`, to rounding (LocalVariance).

        Args:
            environments: for each descriptor, the same atoms.
            form: as in VarianceRequest.
            profiles: by species, kernels with the centres of the mean, if they are known: those of the variances are the first of them.
        """
        species, share = environments[0].species, self.inducing_share(form)
        # local energies are never observed, so no label noise belongs to them
        unexplained, data, none = (self.signal.new_zeros(len(species)) for _ in range(3))
        for z in species.unique().tolist():
            at = species == z
            mine = slice(None) if at.all() else at
            given = [profile.get(z) for profile in profiles or [{}] * len(environments)]
            pieces = self.local_pieces(z, [e.features[mine] for e in environments], given)
            unexplained[mine], data[mine] = self.local_energy_variance(z, pieces, unexplained[mine], share)
        return Variance(unexplained, data, none, none)

    def local_energy_variance(
        self, z: int, pieces: Sequence[Tensor], like: Tensor, share: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """w [k_xx - k_xu K_uu⁻¹ k_ux] and k_xu (K_uu + K_uo Σ⁻¹ K_ou)⁻¹ k_ux of local energies of species z, (environments,) eV².

        Args:
            pieces: k_xu, for each block of the species (environments, columns), unit signal variance.
            like: (environments,) of the result's type.
            share: w; the amplitude if None.
        """
        if z in self.cheap:
            return torch.zeros_like(like), self.cheap[z](pieces)
        share = self.amplitude if share is None else share
        k_xx = self.prior_variance(z)
        if z not in self.local:
            return torch.full_like(like, share * k_xx), torch.zeros_like(like)
        explained, left = self.local[z](pieces)
        return inducing_variance(k_xx, explained, share), left

    def prior_variance(self, z: int) -> float:
        """k_xx of local energies of species z, eV²: δ_z² f(1) of all descriptors, f(1) = 1."""
        return float(sum(p.signal.get(z, 0.0) ** 2 for p in self.priors))

    @property
    def cheap(self) -> dict[int, ReducedVariance]:
        """By species, what stands for the exact variances of local energies."""
        return {} if self.exact else self.reduced

    @cached_property
    def local(self) -> dict[int, LocalVariance]:
        """By species, what stands for `whiten` of its local energies. By one thread, whose rounding is always the same."""
        widths = [len(lower) for lower in self.lowers]
        columns = torch.arange(self.n_columns, device=self.signal.device).split(widths)
        species = [block.central_species for blocks in self.blocks for block in blocks]
        out: dict[int, LocalVariance] = {}
        with parallel.one_core():
            p = torch.cholesky_inverse(self.factor, upper=True)  # (RᵀR)⁻¹
            for z in set().union(*species):
                mine = [i for i, others in enumerate(species) if z in others]
                if same := next(
                    (other for other in out if mine == [i for i, s in enumerate(species) if other in s]), None
                ):
                    out[z] = out[same]
                    continue
                here = torch.cat([columns[i] for i in mine])
                lowers, covariance = [self.lowers[i] for i in mine], p[here][:, here]
                out[z] = LocalVariance.from_posterior(lowers, self.signal[here], covariance, self.amplitude)
        return out

    def check_shifts(self, of_charges: int) -> None:
        """UserError unless shifts, where there are any, are of the columns and of so many of charges behind them."""
        width, columns = None if self.shifts is None else self.shifts.shape[1], self.n_columns + of_charges
        if width not in (None, columns):
            raise UserError(f"{width} columns of shifts, and {columns} of the posterior factor.")

    def prepare(self) -> None:
        """Make `local` now, rather than in each of several threads."""
        if not self.exact and self.reduced.keys() >= {z for p in self.priors for z in p.signal}:
            return
        _ = self.local

    def local_pieces(
        self, z: int, features: Sequence[Tensor], given: Sequence[Profile | None] | None = None
    ) -> list[Tensor]:
        """k_xu of local energies of one species with each of its blocks; `given`: kernels as in atom_energies, if they are known."""
        return [
            covariances.local_rows(p.kernel, block, z, x, k)
            for p, blocks, x, k in zip(self.priors, self.blocks, features, given or [None] * len(features), strict=True)
            for block in blocks
            if z in block.central_species
        ]

    def noise_parts(self, kind: str) -> tuple[float, float]:
        """Variances that are the same everywhere: what the model class cannot express, and noise of the labels."""
        everything = self.noise.get(kind, 0.0) ** 2
        noise = min(everything, self.label_noise.get(kind, math.inf) ** 2)
        return everything - noise, noise

    def state(self) -> tuple[dict, dict[str, Tensor]]:
        """What a model file holds of it: a JSON-able header and tensors. Centres are the first ones of the mean's."""
        header = {
            "noise": self.noise,
            "label_noise": self.label_noise,
            "of_fit": self.of_fit,
            "amplitude": self.amplitude,
            "blocks": [[_block_header(b) for b in blocks] for blocks in self.blocks],
            "signal": [{str(z): s for z, s in prior.signal.items()} for prior in self.priors],
            "reduced": {str(z): list(form.leading) for z, form in self.reduced.items()},
        }
        every = [b for blocks in self.blocks for b in blocks]
        factor = pack_triangle(self.factor.T)
        single = factor.float()  # of a factor that was rounded (`rounded_factor`) nothing is lost
        tensors = {"factor": single if torch.equal(single.to(factor), factor) else factor, "signal": self.signal}
        for i, (block, lower) in enumerate(zip(every, self.lowers, strict=True)):
            tensors |= {f"{i}.{name}": t for name, t in (block.stored() | {"lower": pack_triangle(lower)}).items()}
        tensors |= {f"reduced.{z}": pack_triangle(form.triangle) for z, form in self.reduced.items()}
        if self.shifts is not None:
            header["shifts"] = self.shifts.shape[1]
            tensors["shifts"] = self.shifts
        return header, tensors

    @staticmethod
    def from_state(
        header: dict,
        stored: StoredTensors,
        descriptors: Sequence[Descriptor],
        kernels: Sequence[ZonalKernel],
        features: Sequence[dict[int, Tensor]],
        exact: bool = True,
    ) -> VarianceModel:
        """Restore what state gave, with the descriptors, kernels and centres (by Z) of the mean; `exact` as the attribute.

        Raises:
            UserError: parts that do not fit each other, or numbers that mean nothing, as a negative variance.
        """
        priors, blocks = [], []
        lowers: list[Tensor] = []
        for k, kernel in enumerate(kernels):
            priors.append(PriorCovariance(kernel, {int(z): s for z, s in header["signal"][k].items()}))
            mine: list[Block] = []
            for entry in header["blocks"][k]:
                i = len(lowers)
                mine.append(_stored_block(entry, stored.part(f"{i}."), descriptors[k], features[k]))
                lowers.append(stored_triangle(stored, f"{i}.lower", mine[-1].n_columns))
                check_factor(lowers[-1], kernel, mine[-1])
            blocks.append(tuple(mine))
        columns = sum(len(lower) for lower in lowers)
        signal, factor = stored.take("signal", (columns,)), stored_triangle(stored, "factor", columns, single=True)
        stds = [
            torch.full((b.n_columns,), p.signal[z] / b.relative[z])
            for p, mine in zip(priors, blocks, strict=True)
            for b in mine
            for z in b.central_species[:1]
        ]
        if not torch.allclose(
            signal.cpu(), torch.cat([signal.new_zeros(0).cpu(), *stds]).to(torch.float64), rtol=1e-6, atol=0
        ):
            raise UserError("the standard deviations of columns are not those of the prior.")
        if columns and float(factor.diagonal().abs().min()) < 1 - STORED:
            raise UserError("the posterior factor is smaller than that without any data.")
        about = dict(header["noise"]), dict(header["label_noise"]), header["of_fit"], header.get("amplitude", 1.0)
        positive = [*about[0].values(), *(s for p in priors for s in p.signal.values())]
        if min(positive, default=1.0) <= 0 or bool((signal <= 0).any()) or about[3] < 0 or about[2] < columns:
            raise UserError(
                "the posterior factor has a standard deviation that is not positive, or more columns than the fit."
            )
        reduced = {}
        for z, leading in (header.get("reduced") or {}).items():
            check_leading(leading, [b.n_columns for mine in blocks for b in mine if int(z) in b.central_species])
            triangle = stored_triangle(stored, f"reduced.{z}", sum(leading))
            reduced[int(z)] = ReducedVariance(tuple(leading), triangle)
        width = header.get("shifts")  # of columns, and of those of charges: check_shifts
        shifts = None if width is None else stored.take("shifts", ("structures", width))
        return VarianceModel(
            tuple(priors), tuple(blocks), tuple(lowers), signal, factor.T, *about, reduced, exact, shifts
        )


def _block_header(block: Block) -> dict:
    """What the header of a model file says of inducing variables; centres are the first ones of the mean's."""
    if isinstance(block, FunctionalBlock):
        return {"relative": {str(z): std for z, std in block.relative.items()}}
    return {"species": block.species, "centres": len(block.features)}


def _stored_block(entry: dict, stored: StoredTensors, descriptor: Descriptor, features: dict[int, Tensor]) -> Block:
    """Inducing variables of a model file, with the descriptor and centres (by Z) of the mean."""
    if "relative" in entry:
        relative = {int(z): std for z, std in entry["relative"].items()}
        dtype = next((x.dtype for x in features.values()), torch.float64)
        return FunctionalBlock.from_stored(stored, descriptor, relative, dtype)
    z, n = entry["species"], entry["centres"]
    centres = features[z][:n] if z in features else stored["tangents"][:0, 0]
    if len(centres) != n:
        raise UserError(f"the posterior factor has {n} centres of Z = {z}; the mean has {len(centres)}.")
    return InducingBlock.from_stored(z, centres, stored)


def _total(parts: Sequence[Tensor]) -> Tensor:
    """The prior covariance of the sum over descriptors."""
    first, *others = parts
    return sum(others, first)


def _where_free(data: Tensor, constant: float) -> Tensor:
    """c (D + ε c)(D + τ c)⁻¹: the variance c of what the model class misses of a force, in directions in which there can be any.

    Where symmetry forbids a force, every model of the class gives none and is right; the covariance D (n, 3, 3) that the data leave is
    then zero to rounding, and elsewhere far above τ c. As with labels, which are not exact there either, something is kept.
    """
    if not constant:
        return torch.zeros_like(data)
    values, vectors = torch.linalg.eigh(0.5 * (data + data.mT))
    values = values.clamp_min(0)
    independent = constant * (values + KEPT * FREE * constant) / (values + FREE * constant)
    return (vectors * independent[..., None, :]) @ vectors.mT


def _above_rounding(differences: Tensor, prior: Tensor) -> Tensor:
    """Differences (n, k, k) of covariances from `prior` ones, v² / (v + θ) for each eigenvalue v, none for negative ones.

    Exact differences are positive semi-definite. Rounding leaves some 1e-16 of the prior, which turns with the machine and not with the
    structure; θ is far above that and far below what counts.
    """
    values, vectors = torch.linalg.eigh(0.5 * (differences + differences.mT))
    values, least = values.clamp_min(0), ROUNDING * prior.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    values = torch.where(values > 0, values * (values / (values + least)), values)
    return (vectors * values[..., None, :]) @ vectors.mT
