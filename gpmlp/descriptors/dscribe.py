"""Descriptors of the dscribe library (SOAP, ACSF) as Environments: for comparison, not for speed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dscribe.core import System
from dscribe.descriptors import ACSF, SOAP
from torch import Tensor

from gpmlp.core import errors
from gpmlp.core.environments import Environments, Surroundings

STEP = 3e-4  # A, of the numerical derivatives: truncation and rounding errors are both below 1e-10 of the derivative
STENCIL = ((-2, 1 / 12), (-1, -8 / 12), (1, 8 / 12), (2, -1 / 12))  # central differences, error STEP^4


def make_dscribe(species: tuple[int, ...], parameters: dict) -> DscribeDescriptor:
    """Build 'dscribe-soap' or 'dscribe-acsf' from the resolved `descriptor` section of a recipe.

    dscribe-soap is Himanen et al., Comput. Phys. Commun. 247, 106949 (2020), with r_cut = cutoff, sigma = sigma_atom and the gto
    basis whatever `basis` says. Its weighting is dscribe's `poly` with r0 = cutoff and m = cutoff_exponent: dscribe has neither the
    smoothstep cutoff nor a cutoff times a radial scaling, so cutoff_function 'smoothstep', cutoff_width and radial_scaling
    are not used. cutoff_function 'none' switches the weighting off; only then are dscribe's derivatives analytic.

    dscribe-acsf is Behler, J. Chem. Phys. 134, 074106 (2011), with dscribe's G1, 2 n_max G2 and about n_max log2(2 l_max) G4
    functions on the grids of Imbalzano et al., J. Chem. Phys. 148, 241730 (2018); its cutoff is the cosine, so that forces are
    continuous but not smooth at the cutoff. A constant central_weight is the first feature: it stands for the central atom
    and gives an atom without neighbours features.
    """
    cutoff, name = parameters["cutoff"], parameters["name"]
    if name == "dscribe-acsf":
        calculator = ACSF(
            r_cut=cutoff, species=list(species), **_acsf_grids(cutoff, parameters["n_max"], parameters["l_max"])
        )
        n = calculator.get_number_of_features()
        return DscribeDescriptor(cutoff, calculator, np.ones(n), parameters["central_weight"], False)
    if cutoff <= 1:
        raise errors.UserError(f"dscribe-soap needs a cutoff above 1 A; got {cutoff}.")
    analytic = parameters["cutoff_function"] == "none" and parameters["central_weight"] == 1
    weighting: dict[str, Any] = {}
    if parameters["cutoff_function"] != "none":
        weighting = {"function": "poly", "r0": cutoff, "c": 1, "m": parameters["cutoff_exponent"]}
    if parameters["central_weight"] != 1:
        weighting["w0"] = parameters["central_weight"]
    calculator = SOAP(
        r_cut=cutoff,
        n_max=parameters["n_max"],
        l_max=parameters["l_max"],
        sigma=parameters["sigma_atom"],
        rbf="gto",
        weighting=weighting or None,
        species=list(species),
        periodic=False,
    )
    return DscribeDescriptor(
        cutoff, calculator, _full_product(calculator, species, parameters["n_max"]), None, analytic
    )


def _full_product(calculator: SOAP, species: tuple[int, ...], n_max: int) -> np.ndarray:
    """Factors by which the dot product of stored entries is that of the full spectrum: sqrt(2) for entries stored once for two."""
    scale = np.full(calculator.get_number_of_features(), 2**0.5)
    diagonal = np.array([n == m for n in range(n_max) for m in range(n, n_max)])
    for z in species:  # entries of a species with itself are (l, pairs n <= n')
        scale[calculator.get_location((z, z))].reshape(-1, len(diagonal))[:, diagonal] = 1.0
    return scale


def _acsf_grids(cutoff: float, n: int, l_max: int) -> dict[str, list[list[float]]]:
    """G2 (eta, R_s), one set of widths around the centre and one of shells around it; G4 (eta, zeta, lambda)."""
    # Imbalzano et al., eqs. 5 to 8: eta_m = (n^(m/n) / r_c)^2;  R_m = r_c / n^(m/n), eta_m = 1 / (R_{m-1} - R_m)^2
    growth = max(n, 2) ** (np.arange(n + 1) / n)
    widths = (growth / cutoff) ** 2
    shells = cutoff / growth
    g2 = [[eta, 0.0] for eta in widths[:n]]
    g2 += [[(inside - shell) ** -2, shell] for inside, shell in zip(shells[:-1], shells[1:], strict=True)]
    zetas = [2.0**k for k in range(max(l_max, 1).bit_length())]
    g4 = [[eta, zeta, sign] for eta in widths[:n:2] for zeta in zetas for sign in (-1.0, 1.0)]
    return {"g2_params": g2, "g4_params": g4}


@dataclass(frozen=True, eq=False)
class DscribeDescriptor:
    """A local descriptor of dscribe, evaluated on one finite cluster per environment: the centre and its neighbours.

    Features are scaled to unit norm (zero where there is nothing to scale). Runs on the processor in double precision, whatever
    device and type the surroundings have.

    Attributes:
        cutoff: A.
        calculator: the dscribe object.
        scale: (entries,) factors on dscribe's entries.
        constant: a first feature of this value, None for none.
        analytic: whether dscribe's analytic derivatives are used; else central differences (STEP, STENCIL).
    """

    cutoff: float
    calculator: Any
    scale: np.ndarray
    constant: float | None
    analytic: bool

    @property
    def n_features(self) -> int:
        return len(self.scale) + (self.constant is not None)

    @property
    def constants(self) -> dict[str, Tensor]:
        """As in Descriptor."""
        return {}

    def __call__(self, surroundings: Surroundings) -> Environments:
        clusters = _clusters(surroundings)
        raw = np.array([self._raw(*cluster) for cluster in clusters]).reshape(len(clusters), self.n_features)
        norms = np.linalg.norm(raw, axis=1, keepdims=True)
        unit = raw / np.maximum(norms, 1e-300)
        like = surroundings.vectors

        def jacobians() -> Iterator[np.ndarray]:
            for cluster, x, norm in zip(clusters, unit, norms, strict=True):
                slopes = self._slopes(*cluster)
                # x = p/|p|:  dx = (dp - x (x . dp)) / |p|
                yield (slopes - (slopes @ x)[..., None] * x) / np.maximum(norm, 1e-300)

        def pull_back(cotangents: Tensor) -> Tensor:
            on_features = np.moveaxis(cotangents.detach().cpu().double().numpy(), -2, 0)
            parts = [np.moveaxis(j @ c.T, (0, 1), (-2, -1)) for j, c in zip(jacobians(), on_features, strict=True)]
            return torch.as_tensor(np.concatenate(parts or [np.zeros((*cotangents.shape[:-2], 0, 3))], axis=-2)).to(
                like
            )

        def jacobian() -> Tensor:
            return torch.as_tensor(np.concatenate(list(jacobians()) or [np.zeros((0, 3, self.n_features))])).to(like)

        return Environments(surroundings, torch.as_tensor(unit).to(like), pull_back, jacobian)

    def _raw(self, numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(features,) of the first atom of a cluster, not normalised."""
        entries = self.calculator.create(System(numbers=numbers, positions=positions), centers=[0])[0] * self.scale
        return entries if self.constant is None else np.concatenate([[self.constant], entries])

    def _slopes(self, numbers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(neighbours, 3, features) derivatives of _raw with respect to the neighbours' positions."""
        n = len(numbers) - 1
        if self.analytic and n:
            cluster, others = System(numbers=numbers, positions=positions), list(range(1, n + 1))
            slopes = self.calculator.derivatives(
                cluster, centers=[0], include=others, method="analytical", attach=True, return_descriptor=False
            )
            return slopes[0] * self.scale
        out = np.zeros((n, 3, self.n_features))
        for atom in range(n):
            for axis in range(3):
                for steps, factor in STENCIL:
                    moved = positions.copy()
                    moved[atom + 1, axis] += steps * STEP
                    out[atom, axis] += factor / STEP * self._raw(numbers, moved)
        return out


def _clusters(surroundings: Surroundings) -> list[tuple[np.ndarray, np.ndarray]]:
    """Atomic numbers and positions of each environment as a finite cluster, its centre first and at the origin."""
    counts = torch.bincount(surroundings.centers, minlength=len(surroundings)).cpu().numpy()
    ends = np.cumsum(counts)
    centers, others = surroundings.species.cpu().numpy(), surroundings.neighbor_species.cpu().numpy()
    vectors = surroundings.vectors.detach().cpu().double().numpy()
    return [
        (np.append(centers[e], others[end - n : end]), np.vstack([np.zeros((1, 3)), vectors[end - n : end]]))
        for e, (end, n) in enumerate(zip(ends, counts, strict=True))
    ]
