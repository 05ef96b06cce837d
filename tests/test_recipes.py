"""Recipe files and overrides: what they give, and what is said about every mistake."""

from __future__ import annotations

import pytest

from gpmlp.core.errors import UserError
from gpmlp.io.recipe_files import load_recipe
from gpmlp.recipe import Recipe


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_no_recipe_is_the_default():
    assert load_recipe() == Recipe()


def test_file_and_overrides(recipe_file):
    path = recipe_file("descriptor: {cutoff: 5.5, n_max: 6}\nnoise: {force: 1e-3}\nseed: 3\n")
    recipe = load_recipe(path, ["kernel.zeta=2", "descriptor.n_max=7", "descriptor.radial_scaling=false"])
    assert recipe.descriptors[0].cutoff == 5.5
    assert recipe.descriptors[0].n_max == 7
    assert recipe.descriptors[0].radial_scaling is False
    assert recipe.noise.force == 1e-3  # YAML reads 1e-3 as text
    assert (recipe.kernels[0].zeta, recipe.seed) == (2, 3)


def test_an_empty_file_is_the_default(recipe_file):
    assert load_recipe(recipe_file("# nothing\n")) == Recipe()


def test_places_in_lists(recipe_file):
    recipe = load_recipe(None, ["descriptor.0.cutoff=4", "descriptor.1.cutoff=7"])
    assert [d.cutoff for d in recipe.descriptors] == [4, 7]
    # a single section becomes the first of a list
    recipe = load_recipe(recipe_file("descriptor: {n_max: 5}\n"), ["descriptor.0.cutoff=4", "descriptor.1.cutoff=7"])
    assert [(d.cutoff, d.n_max) for d in recipe.descriptors] == [(4, 5), (7, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "descriptor: {cutof: 5}",
            r"recipe.yaml: unknown key 'descriptor.cutof'. Perhaps you meant 'descriptor.cutoff'",
        ),
        ("evidence: vfe", r"evidence: 'vfe' is no longer offered: .*leave `evidence` out"),
        ("cutoff: 5", r"unknown key 'cutoff'. Perhaps you meant 'descriptor.cutoff'"),
        ("zeta: 5", r"unknown key 'zeta'. Perhaps you meant 'kernel.zeta'"),
        ("descriptor: [{cutoff: 5}, {nmax: 3}]", r"'descriptor.1.nmax'. Perhaps you meant 'descriptor.1.n_max'"),
        ("baseline: {zbl: {iner: 1}}", r"'baseline.zbl.iner'. Perhaps you meant 'baseline.zbl.inner'"),
        ("noise: {config_types: {liquid: {forc: 1}}}", r"'noise.config_types.liquid.forc'. Perhaps .*liquid.force'"),
        ("qwertz: 5", r"unknown key 'qwertz'. Valid names: baseline, calibration, descriptor"),
        ("descriptor: {cutoff: -1}", r"`descriptor.cutoff` must be greater than 0; got -1"),
        ("noise: {force: 0}", r"`noise.force` must be greater than 0; got 0"),
        ("noise: {energy_per_atom: -0.1}", r"`noise.energy_per_atom` must be greater than 0; got -0.1"),
        ("kernel: {zeta: 2.5}", r"`kernel.zeta` must be a valid integer.*got 2.5"),
        ("inducing: {n: many}", r"`inducing.n` must be a valid integer; got 'many'"),
        ("inducing: {shares: {Si: 0}}", r"`inducing.shares.Si` must be at least 1; got 0"),
        ("dtype: float16", r"`dtype` must be 'float64' or 'float32'; got 'float16'. Perhaps you meant 'float64'"),
        ("descriptor: {name: sop}", r"`descriptor.name` must be 'soap', .*got 'sop'. Perhaps you meant 'soap'"),
        ("baseline: {zbl: true}", r"`baseline.zbl` must be False or a mapping of keys to values; got True"),
        ("descriptor: 5", r"`descriptor` must be a mapping of keys to values or a list of such; got 5"),
        ("descriptor: {cutoff: 3, cutoff_width: 4}", r"descriptor: cutoff_width 4.0 A is larger than the cutoff 3.0 A"),
        ("kernel: [{zeta: 2}, {zeta: 3}]", r"`kernel` lists 2 entries for 1 descriptors"),
        ("seed: 1\nseed: 2", r"not valid YAML \(line 2, column 1\): the key 'seed' is given twice"),
        ("a: [", r"recipe.yaml: is not valid YAML \(line 1"),
        ("- 1", r"a recipe is a mapping of keys to values; got list"),
    ],
)
def test_mistakes_in_a_file(recipe_file, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_file(text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kernel.zta=2", r"--set: unknown key 'kernel.zta'. Perhaps you meant 'kernel.zeta'"),
        ("kernel.zeta", r"--set kernel.zeta: must look like KEY=VALUE"),
        ("=2", r"must look like KEY=VALUE"),
        ("descriptor.2.cutoff=1", r"there are only 0 entries before place 2"),
        ("kernel.zeta=[", r"--set kernel.zeta=\[: is not valid YAML"),
    ],
)
def test_mistakes_in_overrides(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, [override])


def test_a_list_needs_a_place(recipe_file):
    with pytest.raises(UserError, match="number the entry, e.g. descriptor.0.cutoff"):
        load_recipe(recipe_file("descriptor: [{cutoff: 5}]"), ["descriptor.cutoff=4"])


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="the recipe cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
