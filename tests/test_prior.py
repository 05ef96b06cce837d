"""Prior covariances by whichever way the environments come: made for the purpose, or cut out of those that are there."""

from __future__ import annotations

import pytest
import torch
from systems import cluster, crystal, descriptor

from gpmlp.core import environments
from gpmlp.core.environments import StructureEnvironments
from gpmlp.core.structures import Structures
from gpmlp.gp.kernels import PolynomialKernel
from gpmlp.gp.prior import PriorCovariance

SIGNAL = {1: 0.4, 6: 1.0, 8: 0.7}
KINDS = {
    "cluster": cluster,
    "crystal that sees its own images": lambda: crystal("triclinic"),
    "both": lambda: Structures.concatenate([cluster(seed=4), crystal("triclinic"), cluster((8, 8, 1))]),
}


@pytest.fixture(params=KINDS)
def seen(request):
    structures, made = KINDS[request.param](), descriptor("soap poly")
    view = StructureEnvironments.from_structures(made, structures)
    return structures, view, PriorCovariance(PolynomialKernel(3), SIGNAL)


def test_forces_with_jacobians_kept_and_made_anew(seen, monkeypatch):
    """The same rows of the Jacobian laid out, where no environment sees two images of an atom, or summed. Rounding of sums."""
    structures, view, prior = seen
    assert view.keep_jacobian()
    monkeypatch.setattr(environments, "JACOBIAN_BYTES", 0)
    unkept = StructureEnvironments.from_structures(view.descriptor, structures)
    for atoms in (torch.arange(structures.n_atoms), torch.tensor([structures.n_atoms - 1, 0])):
        expected = prior.forces(structures, unkept, atoms)
        assert not unkept.keep_jacobian()
        torch.testing.assert_close(prior.forces(structures, view, atoms), expected, rtol=1e-12, atol=1e-13)
        joint = prior.joint(structures, unkept)
        at = len(structures) + 3 * atoms[:, None] + torch.arange(3)
        torch.testing.assert_close(joint[at[:, :, None], at[:, None, :]], expected, rtol=1e-10, atol=1e-12)


def test_kept_environments_are_those_made_for_the_purpose(seen):
    """Consecutive centres share memory with the whole; others are gathered. A shift of everything changes no features."""
    structures, whole, _ = seen
    assert whole.keep_jacobian()
    for centers in (
        torch.arange(structures.n_atoms)[1:3],
        torch.tensor([structures.n_atoms - 1, 0]),
        torch.tensor([], dtype=torch.long),
    ):
        some = whole.surroundings.select(centers)
        fresh, cut = descriptor("soap poly")(some), whole.select(centers)
        torch.testing.assert_close(cut.features, fresh.features, rtol=0, atol=1e-13)
        torch.testing.assert_close(cut.jacobian(), fresh.jacobian(), rtol=0, atol=1e-12)
    shared = whole.select(torch.tensor([0, 1])).jacobian()
    assert shared.untyped_storage().data_ptr() == whole.jacobian.untyped_storage().data_ptr()
    of_centers = -whole.jacobian[whole.surroundings.centers == 1].sum(0)
    torch.testing.assert_close(whole.center_jacobian[1], of_centers, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="pull back through all of them"):
        whole.select(torch.tensor([0])).pull_back(whole.environments.features[:1])
