"""Second roads to the package's numbers: brute force, short and obvious, never optimised."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import scipy.special
import torch
from torch import Tensor

from gpmlp.core import neighbors
from gpmlp.core.environments import Descriptor, StructureEnvironments, Surroundings
from gpmlp.core.structures import Structures
from gpmlp.fitting import regression
from gpmlp.gp import inducing, posterior
from gpmlp.gp.functionals import FunctionalBlock

# neighbours -----------------------------------------------------------------------------------------------------------------


def neighbor_set(one: Structures, cutoff: float, reach: int = 6) -> set[tuple[int, int, int, int, int]]:
    """All (i, j, shift) of one structure with |r_j + shift . cell - r_i| < cutoff, trying every shift up to `reach`."""
    cell, x = one.cells[0].numpy(), one.positions.numpy()
    ranges = [range(-reach, reach + 1) if p else (0,) for p in one.periodic[0].tolist()]
    found = set()
    for i, j in itertools.product(range(len(x)), repeat=2):
        for shift in itertools.product(*ranges):
            if (i != j or any(shift)) and np.linalg.norm(x[j] + np.array(shift) @ cell - x[i]) < cutoff:
                found.add((i, j, *shift))
    return found


# SOAP -----------------------------------------------------------------------------------------------------------------------


def gto_coefficients(
    vectors: np.ndarray, weights: np.ndarray, n_max: int, l_max: int, sigma: float, cutoff: float
) -> np.ndarray:
    """(n, (l_max+1)^2) overlap of sum_j w_j exp(-|x - r_j|^2 / (2 sigma^2)) with g_nl(x) Y_lm(x), by quadrature over space.

    The radial functions are orthonormalised numerically too. Gauss-Legendre in r and cos(theta), equidistant in phi.
    """
    r, dr = np.polynomial.legendre.leggauss(90)
    r, dr = (r + 1) * cutoff, dr * cutoff  # out to twice the cutoff: the orbitals are below 1e-12 there
    u, du = np.polynomial.legendre.leggauss(60)
    phi = np.arange(120) * 2 * np.pi / 120
    sin = np.sqrt(1 - u**2)
    directions = np.stack(
        [np.outer(sin, np.cos(phi)), np.outer(sin, np.sin(phi)), np.outer(u, np.ones_like(phi))], axis=-1
    ).reshape(-1, 3)
    solid = np.repeat(du, len(phi)) * 2 * np.pi / 120
    points = r[:, None, None] * directions
    density = sum(
        w * np.exp(-((points - v) ** 2).sum(-1) / (2 * sigma**2)) for v, w in zip(vectors, weights, strict=True)
    )
    out = np.zeros((n_max, (l_max + 1) ** 2))
    radii = np.linspace(1.0, cutoff, n_max)
    for l in range(l_max + 1):
        raw = np.stack([r**l * np.exp(-(-np.log(1e-3 / x**l) / x**2) * r**2) for x in radii])
        values, vecs = np.linalg.eigh((raw * r**2 * dr) @ raw.T)
        g = vecs @ np.diag(values**-0.5) @ vecs.T @ raw  # Loewdin: S^(-1/2)
        for m in range(-l, l + 1):
            y = scipy.special.sph_harm_y(
                l, abs(m), np.arccos(directions[:, 2]), np.arctan2(directions[:, 1], directions[:, 0])
            )
            real = y.real if m == 0 else math.sqrt(2) * (y.real if m > 0 else y.imag)
            out[:, l * l + l + m] = (g * r**2 * dr) @ (density @ (solid * real))
    return out


def legendre(l: int, u: Tensor) -> Tensor:
    """P_l(u) by Bonnet's recursion."""
    before, now = torch.ones_like(u), u
    if l == 0:
        return before
    for k in range(1, l):
        before, now = now, ((2 * k + 1) * u * now - k * before) / (k + 1)
    return now


def soap_by_pairs(soap, species: int, neighbor_species: Tensor, vectors: Tensor) -> dict[tuple[int, int], Tensor]:
    """Unnormalised power spectrum of one environment as a double sum over neighbours, without any spherical harmonics.

    sum_m Y_lm(a) Y_lm(b) = (2l+1)/(4 pi) P_l(a.b), so p^{zz'}_{nn'l} = pi sqrt(8/(2l+1)) (2l+1)/(4 pi) sum_jk W_j I_nl(r_j) W_k I_n'l(r_k)
    P_l(cos theta_jk), the central atom at r = 0 being one of them. Differentiable by autograd.

    Returns:
        (n, n', l) by (Z, Z'), every ordered pair: the full spectrum.
    """
    r = vectors.norm(dim=1)
    radial = soap.radial_integrals(r)[0] * soap.weights(r)[0][:, None, None]
    center = soap.radial_integrals(r.new_zeros(1))[0] * soap.central_weight
    values = torch.cat([radial, center])
    z = torch.cat([neighbor_species, torch.tensor([species])])
    units = torch.cat([vectors / r[:, None], vectors.new_zeros(1, 3)])
    out = {}
    for a, b in itertools.product(soap.species, repeat=2):
        first, second = (z == a).nonzero()[:, 0], (z == b).nonzero()[:, 0]
        cosines = units[first] @ units[second].T
        blocks = []
        for l in range(soap.l_max + 1):
            angular = legendre(l, cosines) * math.pi * math.sqrt(8 / (2 * l + 1)) * (2 * l + 1) / (4 * math.pi)
            blocks.append(values[first, :, l].T @ angular @ values[second, :, l])
        out[a, b] = torch.stack(blocks, dim=-1)
    return out


def full_spectrum(soap, surroundings: Surroundings, environment: int, vectors: Tensor) -> Tensor:
    """The normalised full spectrum of one environment, flat."""
    mine = surroundings.centers == environment
    blocks = soap_by_pairs(soap, int(surroundings.species[environment]), surroundings.neighbor_species[mine], vectors)
    flat = torch.cat([blocks[key].flatten() for key in sorted(blocks)])
    return flat / flat.norm()


def four_body_by_triples(made, neighbor_species: Tensor, vectors: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """Four-body invariants of one environment as a sum over all triples of neighbours, without harmonics or coupling coefficients.

    Σ_m G Y_m1(a) Y_m2(b) Y_m3(c) is the integral over all directions t of P_l1(a.t) P_l2(b.t) P_l3(c.t), each times (2 l + 1) / (4 pi).
    Differentiable by autograd.

    Returns:
        (q1, q2, q3) by degrees l1 <= l2 <= l3, for every triple of channels.
    """
    spectrum, channels = made.spectrum, made.four_body.channels
    u, du = np.polynomial.legendre.leggauss(12)
    phi = np.arange(24) * 2 * np.pi / 24
    sin = np.sqrt(1 - u**2)
    t = np.stack([np.outer(sin, np.cos(phi)), np.outer(sin, np.sin(phi)), np.outer(u, np.ones(24))], axis=-1)
    t, dt = torch.from_numpy(t.reshape(-1, 3)), torch.from_numpy(np.repeat(du, 24) * 2 * np.pi / 24)
    r = vectors.norm(dim=1)
    radial = spectrum.radial_integrals(r)[0] * spectrum.weights(r)[0][:, None, None]
    cosines = (vectors / r[:, None]) @ t.T
    slots = [spectrum.species.index(z) for z in neighbor_species.tolist()]
    own, angular = {}, {}
    for l in range(1, len(channels) + 1):
        of_species = channels[l - 1].unflatten(0, (-1, spectrum.n_max))[slots]
        own[l] = torch.einsum("jn,jnq->jq", radial[:, :, l], of_species)
        angular[l] = legendre(l, cosines) * (2 * l + 1) / (4 * math.pi)
    out = {}
    for a, b, c in itertools.combinations_with_replacement(range(1, len(channels) + 1), 3):
        coupled = torch.einsum("t,it,jt,kt->ijk", dt, angular[a], angular[b], angular[c])
        if (a + b + c) % 2 == 0 and c <= a + b:
            out[a, b, c] = torch.einsum("ijk,ip,jq,kr->pqr", coupled, own[a], own[b], own[c])
    return out


def gaussian_overlap(r: float, s: float, l: int, sigma: float) -> float:
    """2 pi int_{-1}^{1} P_l(u) <Gaussian at r | Gaussian at s, angle arccos u> du: the complete-basis limit of sum_n I_nl(r) I_nl(s)."""
    u, du = np.polynomial.legendre.leggauss(80)
    overlap = (math.pi * sigma**2) ** 1.5 * np.exp(-(r * r + s * s - 2 * r * s * u) / (4 * sigma**2))
    return 2 * math.pi * float((du * scipy.special.eval_legendre(l, u) * overlap).sum())


# Gaussian processes ---------------------------------------------------------------------------------------------------------


class Functional:
    """A linear functional of the local energies: sum over items (environment, a, v) of a eps(x) + v . d(eps)/dx."""

    def __init__(self) -> None:
        self.items: list[tuple[int, float, Tensor]] = []

    def add(self, environment: int, value: float, direction: Tensor) -> None:
        self.items.append((environment, value, direction))


class DenseGP:
    """A dense Gaussian process over local energies whose covariances are explicit double sums over environments.

    Args:
        profile: s -> f(s), f'(s), f''(s) of the kernel.
        signal: standard deviation of local energies by species, eV.
    """

    def __init__(self, descriptor: Descriptor, profile, signal: dict[int, float]) -> None:
        self.descriptor, self.profile, self.signal = descriptor, profile, signal

    def functionals(self, structures: Structures) -> tuple[dict[str, list[Functional]], Tensor, Tensor]:
        """Energies per atom, force components and stress components (Voigt) as functionals; features; species."""
        pairs = neighbors.find_neighbors(structures, self.descriptor.cutoff)
        surroundings = Surroundings.from_structures(structures, pairs)
        made = self.descriptor(surroundings)
        x, jacobian = made.features, made.jacobian()
        nothing = torch.zeros_like(x[0])
        n_atoms, n = structures.n_atoms, len(structures)
        energies = [Functional() for _ in range(n)]
        for i in range(n_atoms):
            s = int(structures.structure_of_atom[i])
            energies[s].add(i, 1 / float(structures.counts[s]), nothing)
        forces = [Functional() for _ in range(3 * n_atoms)]
        voigt = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]
        stresses = [Functional() for _ in range(6 * n)]
        for p in range(len(pairs)):
            i, j = int(pairs.centers[p]), int(pairs.neighbors[p])
            s = int(structures.structure_of_atom[i])
            for axis in range(3):  # F = -dE/dr: x_i changes when j moves, and oppositely when i moves
                forces[3 * j + axis].add(i, 0.0, -jacobian[p, axis])
                forces[3 * i + axis].add(i, 0.0, jacobian[p, axis])
            if structures.volumes[s] == structures.volumes[s]:
                for k, (a, b) in enumerate(voigt):
                    r = surroundings.vectors[p]
                    strained = 0.5 * (jacobian[p, a] * r[b] + jacobian[p, b] * r[a])
                    stresses[6 * s + k].add(i, 0.0, strained / structures.volumes[s])
        return {"energies": energies, "forces": forces, "stresses": stresses}, x, structures.species

    def covariance(self, left, x_left: Tensor, z_left: Tensor, right, x_right: Tensor, z_right: Tensor) -> Tensor:
        """Cov of every functional of the left list with every one of the right list."""
        out = torch.zeros(len(left), len(right), dtype=x_left.dtype)
        for p, one in enumerate(left):
            if not one.items:
                continue
            e, a, v = (list(part) for part in zip(*one.items, strict=True))
            x, a, v = x_left[e], torch.tensor(a, dtype=x_left.dtype)[:, None], torch.stack(v)
            for q, other in enumerate(right):
                if not other.items:
                    continue
                g, b, w = (list(part) for part in zip(*other.items, strict=True))
                y, b, w = x_right[g], torch.tensor(b, dtype=x_left.dtype)[None, :], torch.stack(w)
                f0, f1, f2 = self.profile(x @ y.T)
                # (a + v.d/dx)(b + w.d/dy) f(x.y)
                terms = (
                    a * b * f0 + a * f1 * (x @ w.T) + b * f1 * (v @ y.T) + f1 * (v @ w.T) + f2 * (x @ w.T) * (v @ y.T)
                )
                same = z_left[e][:, None] == z_right[g][None, :]
                scale = torch.tensor([self.signal[int(z)] for z in z_left[e]], dtype=x_left.dtype)[:, None] ** 2
                out[p, q] = (terms * same * scale).sum()
        return out

    def condition(self, structures: Structures, values: dict[str, Tensor], noise: dict[str, Tensor]) -> DenseGP:
        """Condition on all observations of the kinds in `values`: (observations,) each, with a standard deviation each."""
        every, self.x, self.z = self.functionals(structures)
        self.seen = [f for kind in values for f in every[kind]]
        y = torch.cat(list(values.values()))
        sigma = torch.cat([noise[kind] for kind in values])
        self.seen = [f for f, known in zip(self.seen, ~torch.isnan(y), strict=True) if known]
        sigma, y = sigma[~torch.isnan(y)], y[~torch.isnan(y)]
        k = self.covariance(self.seen, self.x, self.z, self.seen, self.x, self.z) + torch.diag(sigma**2)
        self.lower = lower = torch.linalg.cholesky(k)
        self.weights = torch.cholesky_solve(y[:, None], lower)[:, 0]
        self.log_evidence = float(
            -0.5 * y @ self.weights - lower.diagonal().log().sum() - 0.5 * len(y) * math.log(2 * math.pi)
        )
        return self

    def posterior_covariance(self, functionals: list[Functional], x: Tensor, z: Tensor) -> Tensor:
        """k_gg - k_gs (K + noise)^-1 k_sg of every functional with every other."""
        cross = self.covariance(functionals, x, z, self.seen, self.x, self.z)
        prior = self.covariance(functionals, x, z, functionals, x, z)
        return prior - cross @ torch.cholesky_solve(cross.T, self.lower)

    def predict(self, structures: Structures) -> dict[str, Tensor]:
        """Posterior means of energies per atom, force components and stress components."""
        every, x, z = self.functionals(structures)
        return {kind: self.covariance(fs, x, z, self.seen, self.x, self.z) @ self.weights for kind, fs in every.items()}


def without_columns_of(models, structures, numbers):
    """The models without the inducing variables at environments of some structures, or that are their functionals, and the positions
    of the other columns.

    Args:
        structures: all; numbers: which of them.
    """
    out, kept, start = [], [], 0
    for m in models:
        here = StructureEnvironments.from_structures(m.descriptor, structures.select(numbers)).environments.features
        blocks, lowers = [], []
        for block, lower in zip(m.blocks, m.lowers, strict=True):
            if isinstance(block, FunctionalBlock):
                others = [torch.arange(*block.starts[s : s + 2]) for s, i in enumerate(m.of) if i not in numbers]
                chosen = torch.cat(others)
            else:
                of_them = (torch.cdist(block.features, here) < 1e-6).any(1)
                chosen = (~of_them[block.column_addresses[0]]).nonzero()[:, 0]
            kept.append(start + chosen)
            start += block.n_columns
            blocks.append(block.select(chosen))
            lowers.append(torch.linalg.cholesky((lower @ lower.T)[chosen][:, chosen]))
        out.append(replace(m, blocks=tuple(blocks), lowers=tuple(lowers)))
    return out, torch.cat(kept)


def fitted_without(arguments, out: list[int]):
    """The potential of the same hyperparameters from the rows of the other structures, with inducing variables at these only.

    Args:
        arguments: those of fitting.left_out.predict_left_out; out: indices of structures.
    """
    potential, models, learned, _, structures, _, remaining, _ = arguments[:8]
    models, kept = without_columns_of(models, structures, out)
    lowers, signal = [low for m in models for low in m.lowers], learned.signal[kept]
    rows: dict[str, list[Tensor]] = {}
    for k in (k for k in range(len(structures)) if k not in out):
        here = regression.labelled_rows(models, structures.select([k]), remaining.select(structures, [k]))
        for kind, part in here.items():
            rows.setdefault(kind, []).append(part.double())
    whitened = {kind: inducing.whiten_rows(torch.cat(parts), lowers) for kind, parts in rows.items()}
    counts = {kind: len(part) for kind, part in whitened.items()}
    solved = posterior.solve_posterior(whitened, counts, learned.noise | {posterior.FIXED: 1.0}, signal, lowers)
    old = potential.variances
    variances = regression.variance_model(models, signal, solved.factor, old.noise, old.label_noise)
    variances = replace(variances, amplitude=old.amplitude)
    return replace(potential, terms=regression.make_terms(models, solved.weights), variances=variances)
