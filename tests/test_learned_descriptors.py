"""Fits with descriptors that learn constants from the data, four-body invariants and compressed channels: kept in files and online."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from systems import CUTOFF, KERNELS, cluster, descriptor, random_term, targets_of

import gpmlp
from gpmlp.core.errors import UserError
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.engines.ase import GPCalculator
from gpmlp.fitting.fit import fit
from gpmlp.fitting.online import OnlineFit
from gpmlp.io import archive, ase_atoms
from gpmlp.io.model_header import check_header
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe


@dataclass(frozen=True)
class Learned:
    """A case of `systems` whose random weights are the truth, what is learned of it, and names of the constants that are learned."""

    truth: str
    section: dict
    constants: tuple[str, ...]

    @cached_property
    def term(self):
        return random_term(descriptor(self.truth), KERNELS["polynomial 2"])

    @property
    def recipe(self) -> Recipe:
        shape = {"cutoff": CUTOFF, "n_max": 3, "l_max": 3} | self.section
        return Recipe.model_validate(
            {"descriptor": shape, "kernel": {"zeta": 2}, "inducing": {"n": 15, "gradients": 4}}
        )

    def labelled(self, seeds) -> tuple[Structures, Targets]:
        some = Structures.concatenate([cluster((6, 8, 1, 6), k, 2.8) for k in seeds])
        return some, targets_of(some, self.term(some))

    @cached_property
    def potential(self) -> Potential:
        return fit(*self.labelled(range(40)), self.recipe)[0]


LEARNED = {
    "four-body": Learned("four-body soap", {"four_body": {"channels": 3, "weight": 0.3}}, ("channels", "lengths")),
    "compressed": Learned("soap gto", {"compression": {"channels": 6}}, ("compression",)),
}


@pytest.fixture(params=LEARNED)
def learned(request) -> Learned:
    return LEARNED[request.param]


def test_a_fit_predicts_errors_and_forces_that_are_derivatives(learned):
    potential, (new, truth) = learned.potential, learned.labelled(range(100, 112))
    found = potential(new, variance="all", novelty=True)
    assert set(learned.constants) <= set(potential.terms[0].descriptor.constants)
    assert torch.isfinite(found.forces_variance.total).all() and torch.isfinite(found.novelty).all()
    # medians: a pair closer than any of the data is repelled by ZBL
    errors = (found.forces - truth.forces).abs().median()
    assert 0.25 < errors / found.forces_variance.total.sqrt().median() < 1.5
    step = torch.zeros_like(new.positions)
    step[5, 1] = 1e-4
    there, back = (potential(replace(new, positions=new.positions + s)).energies[1] for s in (step, -step))
    torch.testing.assert_close(found.forces[5, 1], -(there - back) / 2e-4, rtol=1e-6, atol=1e-7)
    atoms = ase_atoms.to_ase(new.select([0]))[0]
    atoms.calc = GPCalculator(potential)
    expected = potential(new.select([0])).forces
    torch.testing.assert_close(torch.from_numpy(atoms.get_forces()), expected, atol=1e-12, rtol=0)


def test_a_model_file_keeps_the_constants(learned, tmp_path):
    potential, path, (new, _) = learned.potential, tmp_path / "model.gpmlp", learned.labelled([200])
    archive.save(potential, path)
    again = gpmlp.load(path)
    for name, value in potential.terms[0].descriptor.constants.items():
        assert torch.equal(again.terms[0].descriptor.constants[name], value)
    assert torch.equal(again(new).forces, potential(new).forces)
    single = potential.to(descriptors="float32")
    torch.testing.assert_close(single(new).forces, potential(new).forces, atol=1e-4, rtol=1e-4)
    header, tensors = potential.state()
    gone = f"term0.descriptor.{learned.constants[0]}"
    with pytest.raises(UserError, match=gone):
        Potential.from_state(header, {name: t for name, t in tensors.items() if name != gone})


def test_a_file_whose_recipe_lacks_the_channels_is_refused():
    header, _ = LEARNED["compressed"].potential.state()
    header["recipe"]["descriptor"][0]["compression"] = {"channels": None}
    with pytest.raises(UserError, match="lacks channels"):
        check_header(json.loads(json.dumps(header)))


def test_constants_stay_as_labels_come(learned):
    online = OnlineFit.begin(*learned.labelled(range(10)), learned.recipe)
    before = online.models[0].descriptor
    grown = online.added(*learned.labelled(range(10, 14))).refreshed("")
    assert grown.models[0].descriptor is before
    new, truth = learned.labelled([301])
    assert (grown.potential(new).forces - truth.forces).abs().median() < truth.forces.abs().median()
