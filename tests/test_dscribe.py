"""SOAP against dscribe itself on the whole structure, periodic and not; and dscribe's descriptors through Environments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from dscribe.descriptors import ACSF, SOAP
from systems import CUTOFF, cluster, crystal, descriptor, structure

from gpmlp.core import neighbors
from gpmlp.core.environments import Surroundings
from gpmlp.core.errors import UserError

# both are double precision throughout; ours interpolates radial integrals to 1e-10 of the largest
AGREEMENT = 1e-8
SYSTEMS = {
    "cluster": (cluster(), (1, 6, 8)),
    "one species": (cluster((6, 6, 6, 6), 3), (6,)),
    "more species than present": (cluster((6, 6, 8), 3), (1, 6, 8)),
    "periodic": (crystal("cubic"), (6, 8)),
    "periodic, one species": (crystal("triclinic", (6, 6)), (6,)),
    "left-handed": (crystal("left-handed", (6, 8, 1)), (1, 6, 8)),
    "slab": (crystal("slab"), (6, 8)),
}


def _ase(one) -> Atoms:
    return Atoms(one.species.numpy(), one.positions.numpy(), cell=one.cells[0].numpy(), pbc=one.periodic[0].numpy())


def _environments(made, one):
    return made(Surroundings.from_structures(one, neighbors.find_neighbors(one, made.cutoff)))


def _soap(species, weighting, periodic, **changes) -> SOAP:
    sizes = {"r_cut": CUTOFF, "n_max": 4, "l_max": 4, "sigma": 0.5, "rbf": "gto"} | changes
    return SOAP(species=list(species), periodic=periodic, weighting=weighting, **sizes)


def _full(soap: SOAP, entries: np.ndarray, species, n_max: int) -> np.ndarray:
    """dscribe's stored entries -> the full spectrum: an entry stored once for (n, n') and (n', n) is written twice."""
    blocks = []
    for a in species:
        for b in species:
            part = entries[:, soap.get_location((a, b))]
            if a != b:
                blocks.append(part)
                continue
            upper = part.reshape(len(part), -1, n_max * (n_max + 1) // 2)
            square = np.zeros((*upper.shape[:2], n_max, n_max))
            rows, columns = np.triu_indices(n_max)
            square[..., rows, columns] = upper
            square[..., columns, rows] = upper
            blocks.append(square.reshape(len(part), -1))
    return np.concatenate(blocks, axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_our_soap_is_dscribes(system, exponent):
    one, species = SYSTEMS[system]
    ours = descriptor(
        "soap gto", species, n_max=4, l_max=4, cutoff_function="poly", cutoff_exponent=exponent, radial_scaling=False
    )
    theirs = _soap(species, {"function": "poly", "r0": CUTOFF, "c": 1, "m": exponent}, bool(one.periodic.any()))
    full = _unit(_full(theirs, theirs.create(_ase(one)), species, 4))
    features = _environments(ours, one).features
    np.testing.assert_allclose((features @ features.T).numpy(), full @ full.T, atol=AGREEMENT)


@pytest.mark.parametrize("system", ["cluster", "one species", "more species than present"])
def test_our_soap_without_weights_is_dscribes(system):
    """Only where no atom is between the cutoff and the cutoff plus dscribe's padding: unweighted dscribe counts those too."""
    one, species = SYSTEMS[system]
    ours = descriptor("soap gto", species, cutoff=5.6, n_max=4, l_max=4, cutoff_function="none", radial_scaling=False)
    theirs = _soap(species, None, False, r_cut=5.6)
    full = _unit(_full(theirs, theirs.create(_ase(one)), species, 4))
    features = _environments(ours, one).features
    assert float((one.positions[:, None] - one.positions[None]).norm(dim=-1).max()) < 5.6
    np.testing.assert_allclose((features @ features.T).numpy(), full @ full.T, atol=AGREEMENT)


def test_central_weight_is_dscribes_w0():
    one, species = SYSTEMS["cluster"]
    poly = {"cutoff_function": "poly", "radial_scaling": False, "central_weight": 0.35}
    features = _environments(descriptor("soap gto", species, n_max=4, l_max=4, **poly), one).features
    theirs = _soap(species, {"function": "poly", "r0": CUTOFF, "c": 1, "m": 2, "w0": 0.35}, False)
    full = _unit(_full(theirs, theirs.create(_ase(one)), species, 4))
    np.testing.assert_allclose((features @ features.T).numpy(), full @ full.T, atol=AGREEMENT)


@pytest.mark.parametrize("system", SYSTEMS)
def test_dscribe_soap_is_our_soap(system):
    """The same kernel and the same derivatives of it, through Environments, for matched parameters."""
    one, species = SYSTEMS[system]
    matched = {"cutoff_function": "poly", "radial_scaling": False}
    ours = _environments(descriptor("soap gto", species, **matched), one)
    theirs = _environments(descriptor("dscribe-soap", species, **matched), one)
    assert ours.features.shape == theirs.features.shape
    dots = [e.features @ e.features.T for e in (ours, theirs)]
    torch.testing.assert_close(*dots, atol=AGREEMENT, rtol=0)
    jacobians = [e.jacobian().flatten(0, 1) for e in (ours, theirs)]
    torch.testing.assert_close(
        *(j @ e.features.T for j, e in zip(jacobians, (ours, theirs), strict=True)), atol=AGREEMENT, rtol=0
    )
    torch.testing.assert_close(*(j @ j.T for j in jacobians), atol=AGREEMENT, rtol=0)


def test_dscribes_analytic_derivatives_are_ours():
    """Without weights dscribe differentiates analytically (it drops coefficients below 1e-8, which bounds the agreement)."""
    one, species = SYSTEMS["cluster"]
    plain = {"cutoff_function": "none", "radial_scaling": False, "cutoff": 5.6}
    ours, theirs = descriptor("soap gto", species, **plain), descriptor("dscribe-soap", species, **plain)
    assert theirs.analytic
    ours, theirs = _environments(ours, one), _environments(theirs, one)
    jacobians = [e.jacobian().flatten(0, 1) for e in (ours, theirs)]
    torch.testing.assert_close(*(j @ j.T for j in jacobians), atol=AGREEMENT, rtol=0)
    torch.testing.assert_close(
        *(j @ e.features.T for j, e in zip(jacobians, (ours, theirs), strict=True)), atol=AGREEMENT, rtol=0
    )


def test_dscribes_own_derivatives_of_a_whole_molecule_are_ours():
    """SOAP.derivatives(attach=True) of every centre by every atom, against pair gradients added up: x_i moves with atoms i and j."""
    one, species = SYSTEMS["cluster"]
    ours = descriptor("soap gto", species, cutoff=5.6, n_max=4, l_max=4, cutoff_function="none", radial_scaling=False)
    pairs = neighbors.find_neighbors(one, 5.6)
    environments = ours(Surroundings.from_structures(one, pairs))
    n = one.n_atoms
    by_atom = torch.zeros(n, n, 3, ours.n_features, dtype=torch.float64)
    jacobian = environments.jacobian()
    for p in range(len(pairs)):
        i, j = int(pairs.centers[p]), int(pairs.neighbors[p])
        by_atom[i, j] += jacobian[p]
        by_atom[i, i] -= jacobian[p]
    theirs = _soap(species, None, False, r_cut=5.6)
    derivatives, entries = theirs.derivatives(_ase(one), attach=True, method="analytical")
    full = _full(theirs, entries, species, 4)
    norms, full = np.linalg.norm(full, axis=1)[:, None, None, None], _unit(full)
    raw = _full(theirs, derivatives.reshape(n * n * 3, -1), species, 4).reshape(n, n, 3, -1)
    raw = (raw - np.einsum("iaxf,if->iax", raw, full)[..., None] * full[:, None, None]) / norms
    dots = np.einsum("iaxf,kf->iaxk", raw, full)
    np.testing.assert_allclose((by_atom @ environments.features.T).numpy(), dots, atol=AGREEMENT)


def test_dscribe_acsf_is_dscribes_on_the_whole_crystal():
    """Clusters of pair vectors give the symmetry functions of the periodic structure, after the constant and the norm."""
    one, species = SYSTEMS["periodic"]
    made = descriptor("dscribe-acsf", species)
    calculator = made.calculator
    whole = ACSF(
        r_cut=CUTOFF,
        species=list(species),
        periodic=True,
        g2_params=calculator.g2_params,
        g4_params=calculator.g4_params,
    )
    entries = whole.create(_ase(one))
    entries = np.hstack([np.ones((len(entries), 1)), entries])
    expected = entries / np.linalg.norm(entries, axis=1, keepdims=True)
    np.testing.assert_allclose(_environments(made, one).features.numpy(), expected, atol=1e-12)  # order of sums


def test_acsf_has_more_functions_for_larger_settings_and_tells_angles_apart():
    small, large = (descriptor("dscribe-acsf", (6,), n_max=n, l_max=l) for n, l in ((2, 1), (6, 4)))
    assert small.n_features == 1 + 1 + 4 + 2
    assert large.n_features == 1 + 1 + 12 + 3 * 3 * 2
    bent, straight = (
        structure([[0, 0, 0], [1.2, 0, 0], [-1.2 * c, 1.2 * (1 - c * c) ** 0.5, 0]], [6, 6, 6]) for c in (0.5, 1.0)
    )
    assert (_environments(large, bent).features[0] - _environments(large, straight).features[0]).norm() > 1e-3


def test_recipe_choices_dscribe_has_not_are_left_out():
    """smoothstep, cutoff_width, radial_scaling and basis do not change dscribe-soap (its docstring says so)."""
    one, species = SYSTEMS["cluster"]
    plain = _environments(
        descriptor("dscribe-soap", species, cutoff_function="poly", radial_scaling=False, basis="gto"), one
    )
    other = _environments(descriptor("dscribe-soap", species, cutoff_function="smoothstep", basis="optimal"), one)
    assert torch.equal(plain.features, other.features)
    with pytest.raises(UserError, match="dscribe-soap needs a cutoff above 1 A; got 0.8"):
        descriptor("dscribe-soap", species, cutoff=0.8)
