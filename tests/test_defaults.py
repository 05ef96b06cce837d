"""What a recipe leaves open is chosen from the data; after resolve nothing is left open."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel
from systems import cluster, crystal, structure

from gpmlp import descriptors
from gpmlp.core.quantities import Targets
from gpmlp.core.structures import Structures
from gpmlp.descriptors import NAMES
from gpmlp.fitting import defaults
from gpmlp.gp.kernels import make_kernel
from gpmlp.recipe import Recipe

MOLECULES = Structures.concatenate([cluster(seed=s) for s in range(4)])
CRYSTALS = Structures.concatenate([crystal(kind) for kind in ("cubic", "triclinic", "left-handed")])


def _survey(structures: Structures, labels: int = 4000) -> defaults.DataSummary:
    found = defaults.summarise_data(structures, Targets.unlabelled(structures))
    return defaults.DataSummary(found.shortest, found.bond, found.periodic, labels, found.n_environments)


def open_choices(section: BaseModel, path: str = "") -> list[str]:
    """Names of the fields that are None, at any depth."""
    found = []
    for name in type(section).model_fields:
        value, here = getattr(section, name), f"{path}{name}"
        for k, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, BaseModel):
                found += open_choices(part, f"{here}[{k}].")
            elif part is None:
                found.append(here)
    return found


RECIPES = {
    "default": {},
    "nothing optional": {"descriptor": {"radial_scaling": False}, "baseline": {"zbl": False}},
    "sum of kernels": {"kernel": {"name": "sum", "terms": [{"name": "polynomial"}, {"name": "exponential"}]}},
    "two descriptors": {"descriptor": [{"cutoff": 3.0}, {}]},
    **{name: {"descriptor": {"name": name}} for name in NAMES},
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("structures", [MOLECULES, CRYSTALS], ids=["molecules", "crystals"])
def test_nothing_is_left_open(name, structures):
    recipe = defaults.resolve_recipe(
        Recipe.model_validate(RECIPES[name]), _survey(structures), len(structures.distinct_species)
    )
    # noises stay open until the evidence is maximised; inner and outer of ZBL belong to pairs of species, kappa to polarisable charges;
    # no functionals means centres
    meant = ("noise", "baseline", "long_range")
    left = [c for c in open_choices(recipe) if not c.startswith(meant)]
    assert [c for c in left if not c.endswith("functionals")] == []
    for d, k, i in zip(recipe.descriptors, recipe.kernels, recipe.inducings, strict=True):
        assert descriptors.make_descriptor(structures.distinct_species, d.model_dump()).n_features > 0
        assert float(make_kernel(k).profile(torch.ones(1).double())[0]) == pytest.approx(1.0)
        assert 1 <= i.n <= structures.n_atoms
        assert i.gradients >= 0
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # what a model file keeps


def test_given_choices_stay():
    given = {
        "descriptor": {
            "cutoff": 3.3,
            "n_max": 5,
            "l_max": 0,
            "sigma_atom": 0.7,
            "radial_scaling": {"exponent": 0},
            "shortest": 1.5,
        },
        "kernel": {"zeta": 1},
        "inducing": {"n": 3, "gradients": 0},
    }
    recipe = defaults.resolve_recipe(Recipe.model_validate(given), _survey(MOLECULES), 3)
    d = recipe.descriptors[0]
    assert (d.cutoff, d.n_max, d.l_max, d.sigma_atom, d.shortest) == (3.3, 5, 0, 0.7, 1.5)
    assert d.radial_scaling.exponent == 0
    assert recipe.kernels[0].zeta == 1
    assert (recipe.inducings[0].n, recipe.inducings[0].gradients) == (3, 0)


def test_the_survey_finds_distances_and_counts_labels():
    heap = structure([[0, 0, 0], [0, 0, 1.1], [0, 0, 3.3]], (6, 1, 8))
    targets = Targets.unlabelled(heap)
    targets.energies[0] = 1.0
    targets.forces[:2] = 0.0
    found = defaults.summarise_data(heap, targets)
    assert found.shortest == pytest.approx({(1, 6): 1.1, (1, 8): 2.2, (6, 8): 3.3})
    assert found.bond == pytest.approx(1.1)
    assert not found.periodic
    assert found.n_labels == 1 + 6
    assert found.n_environments == 3
    assert defaults.summarise_data(CRYSTALS, Targets.unlabelled(CRYSTALS)).periodic


def test_single_atoms_and_distant_atoms_are_surveyed():
    alone = structure([[0, 0, 0]], [6])
    assert defaults.summarise_data(alone, Targets.unlabelled(alone)).shortest == {}
    far = structure([[0, 0, 0], [0, 0, 7.0]], (6, 6))
    assert defaults.summarise_data(far, Targets.unlabelled(far)).bond == pytest.approx(7.0)


def test_more_memory_or_labels_never_mean_fewer_columns():
    def columns(labels: int, memory: float) -> int:
        big = defaults.DataSummary({(6, 6): 1.3}, 1.5, True, labels, 100_000)
        i = defaults.resolve_recipe(Recipe(memory_GB=memory), big, 1).inducings[0]
        return i.n * (1 + i.gradients)

    assert columns(1000, 3.0) <= columns(100_000, 3.0) <= columns(100_000, 12.0)
    # the factors that these columns need stay inside the budget
    assert 64 * columns(10**7, 2.0) ** 2 <= 2.1e9
