"""A fit that goes on is, after whatever came and went, the fit of what is there: rows and factors made anew from the structures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from systems import KERNELS, cluster, crystal, descriptor, random_term, structure, targets_of

from gpmlp import batches, checks, defaults, regression
from gpmlp.fit import fit
from gpmlp.fit_report import Stages
from gpmlp.gp import covariances, posterior
from gpmlp.online import FORESEEN, Online
from gpmlp.potential import Potential
from gpmlp.quantities import KINDS, Targets
from gpmlp.recipe import Recipe
from gpmlp.structures import Structures
from gpmlp.variances import VARIANCES, VarianceModel

SMALL = {
    "descriptor": {"cutoff": 3.2, "n_max": 3, "l_max": 2, "sigma_atom": 0.5},
    "kernel": {"zeta": 2},
    "inducing": {"n": 8, "gradients": 2},
    "baseline": {"zbl": False, "isolated_atoms": {"C": -2.0, "O": -3.0}},
    "noise": {"config_types": {"rough": {"force": 0.4, "energy_per_atom": 0.02}}},
}
FULL, ENERGY, HOLES, GIVEN, ROUGH = "full", "energy", "holes", "given", "rough"


def recipe(**changes) -> Recipe:
    return Recipe.model_validate(SMALL | changes)


TRUTH = random_term(descriptor("soap gto"), KERNELS["polynomial 3"])


def labelled(seed: int, kind: str = FULL, periodic: bool | None = None) -> tuple[Structures, Targets]:
    """A structure of two species with labels of an energy surface and some noise: all, energy alone, with holes in the forces, or
    with a noise of their own."""
    periodic = seed % 3 == 0 if periodic is None else periodic
    one = crystal("cubic", (6, 8), seed) if periodic else cluster((6, 8, 6, 8)[: 3 + seed % 2], seed, 2.6)
    generator = torch.Generator().manual_seed(1000 + seed)
    true = TRUTH(one)
    forces = true.forces + 0.01 * torch.randn(one.n_atoms, 3, generator=generator, dtype=torch.float64)
    energies = true.energies - 2.0 * (one.species == 6).sum() - 3.0 * (one.species == 8).sum()
    targets = replace(targets_of(one, true), energies=energies, forces=forces)
    if kind == ENERGY:
        targets = replace(Targets.unknown(one), energies=energies)
    if kind == HOLES:
        forces[0], forces[-1, 1] = float("nan"), float("nan")
    if kind == GIVEN:
        targets = replace(targets, energies_noise=torch.full_like(energies, 0.01), forces_noise=torch.full_like(forces, 0.02))
    return one, replace(targets, config_types=(kind,))


def together(*parts: tuple[Structures, Targets]) -> tuple[Structures, Targets]:
    return Structures.concatenate([s for s, _ in parts]), Targets.concatenate([t for _, t in parts])


def first_data(n: int = 8) -> tuple[Structures, Targets]:
    return together(*(labelled(seed, (FULL, HOLES, GIVEN, ENERGY)[seed % 4]) for seed in range(n)))


def begun(n: int = 8, **changes) -> Online:
    return Online.begin(*first_data(n), recipe(**changes))


def probes() -> Structures:
    return together(*(labelled(seed) for seed in (901, 903, 904)))[0]


def refit(online: Online) -> Potential:
    """The potential of the same inducing variables, hyperparameters and labels, all made anew from the structures."""
    lowers, models = [], []
    for m in online.models:
        own = []
        for block in m.blocks:
            double = replace(block, features=block.features.double(), tangents=block.tangents.double())
            own.append(torch.linalg.cholesky(covariances.covariance(m.kernel, double, double)))
        lowers += own
        models.append(replace(m, lowers=tuple(own)))
    remaining = Targets.concatenate([b.remaining for b in online.batches])
    made = regression.labelled_rows(models, online.structures, remaining)
    whitened = {kind: posterior.whiten(rows.double(), lowers) for kind, rows in made.items()}
    signal = online.signal.repeat_interleave(torch.tensor([len(lower) for lower in lowers]))
    noise = online.noise | {posterior.FIXED: 1.0}
    solved = posterior.solve(whitened, {k: len(r) for k, r in whitened.items()}, noise, signal, lowers)
    about = tuple(m.blocks for m in models), tuple(lowers), signal, solved.factor, online.constant, online.label_noise
    variances = VarianceModel(tuple(regression.make_priors(models, signal)), *about, len(signal))
    terms = regression.make_terms(models, solved.weights)
    return Potential(terms, online.baselines, (6, 8), online.recipe, online.noise, variances=variances)


def difference(a: Potential, b: Potential, structures: Structures) -> float:
    """The largest of energies, forces, stresses, and of the parts of all variances, these relative to the largest of their sum."""
    p, q = (x(structures, variance=VARIANCES, calibrated=False) for x in (a, b))
    found = [(getattr(p, n) - getattr(q, n)).nan_to_num().abs().max() for n in KINDS]
    for name in ("energies_variance", "atom_energies_variance", "forces_covariance", "stresses_covariance"):
        for part in ("inducing", "data"):
            x, y = (getattr(getattr(r, name), part).nan_to_num() for r in (p, q))
            found.append((x - y).abs().max() / getattr(q, name).total.nan_to_num().abs().max())
    return float(max(found))


def test_five_hundred_mixed_updates_equal_a_refit():
    """Data and inducing points of two species, with gradients, added and removed at random; labels of every sort."""
    online, generator = begun(), torch.Generator().manual_seed(0)
    structures = probes()
    seen, worst, largest = {}, 0.0, 0.0

    def chance(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    for k in range(500):
        n_centres = [len(b.features) for b in online.models[0].blocks]
        choice = ("add", "add", "remove", "more", "fewer")[chance(5)]
        if choice == "add" or choice == "remove" and len(online.batches) < 6:
            choice = "add" if len(online.batches) < 16 else "remove"
        if choice == "fewer" and min(n_centres) < 4 or choice == "more":
            choice = "more" if sum(n_centres) < 24 else "fewer"
        if choice == "add":
            online = online.added(*labelled(100 + k, (FULL, ENERGY, HOLES, GIVEN, ROUGH)[chance(5)]))
        elif choice == "remove":
            online = online.removed(chance(len(online.batches)))
        elif choice == "more":
            online = online.extended(labelled(100 + k)[0], 1 + chance(2))
        else:
            block = online.models[0].blocks[chance(2)]
            online = online.without(0, block.species, [chance(len(block.features))])
        seen[choice] = seen.get(choice, 0) + 1
        largest = max(largest, online.factor.condition)
        if k % 25 == 24:
            worst = max(worst, difference(online.potential, refit(online), structures))
    print(seen, worst, largest, online.factor.drift, len(online.events))
    assert worst < 1e-8
    assert min(seen.values()) > 60 and len(seen) == 4
