"""Recipe files and overrides: what they give, and what is said about every mistake."""

from __future__ import annotations

import os

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
        ("descriptor: [{cutoff: -1}]", r"`descriptor.0.cutoff` must be greater than 0; got -1"),
        ("noise: {force: 0}", r"`noise.force` must be greater than 0; got 0"),
        ("noise: {energy_per_atom: -0.1}", r"`noise.energy_per_atom` must be greater than 0; got -0.1"),
        ("kernel: {zeta: 2.5}", r"`kernel.zeta` must be a valid integer.*got 2.5"),
        ("inducing: {n: many}", r"`inducing.n` must be a valid integer; got 'many'"),
        ("inducing: {shares: {Si: 0}}", r"`inducing.shares.Si` must be at least 1; got 0"),
        ("dtype: float16", r"`dtype` must be 'float64' or 'float32'; got 'float16'. Perhaps you meant 'float64'"),
        ("descriptor: {name: sop}", r"`descriptor.name` must be 'soap', .*got 'sop'. Perhaps you meant 'soap'"),
        ("baseline: {zbl: true}", r"`baseline.zbl` must be a mapping of keys to values or False; got True"),
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


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(10 * ['*' + old])}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
NONSENSE = {
    "seed: -1": "`seed` must be at least 0; got -1",
    f"seed: {2**70}": "`seed` must be less than 2147483648",
    "seed: 2^70": "`seed` must be a valid integer; got '2\\^70'",
    "seed: yes": "seed: must not be a truth value",
    "seed: true": "seed: must not be a truth value",
    "dtype: on": "`?dtype`?.*must",
    "kernel: {zeta: true}": "kernel.zeta: must not be a truth value",
    "descriptor: {cutoff: true}": "descriptor.cutoff: must not be a truth value",
    "noise: {force: off}": "noise.force",
    "inducing: {n: {Si: yes}}": "inducing.n",
    "baseline: {isolated_atoms: {Si: true}}": "baseline.isolated_atoms: must not be a truth value",
    "seed: .inf": "`seed` must be a finite number",
    "seed: " + 5000 * "9": "holds a value that is none",
    "seed: 2020-99-99": "holds a value that is none: month must be in 1..12",
    "descriptor: {cutoff: 1.0e-9}": "`descriptor.cutoff` must be between 0.5 and 100; got 1e-09",
    "descriptor: {cutoff: 1.0e+9}": "`descriptor.cutoff` must be between 0.5 and 100",
    "descriptor: {sigma_atom: 1.0e-12}": "`descriptor.sigma_atom` must be between 0.05 and 10; got 1e-12",
    "descriptor: {cutoff_width: 1.0e-12}": "`descriptor.cutoff_width` must be between 0.1 and 100; got 1e-12",
    "descriptor: {cutoff_width: 1.0e+9}": "`descriptor.cutoff_width` must be between 0.1 and 100",
    "descriptor: {radial_scaling: {scale: 1.0e-12}}": "scale.* must be between 0.1 and 100; got 1e-12",
    "descriptor: {cutoff: 3, shortest: 4}": "shortest 4.0 A is larger than the cutoff 3.0 A",
    "descriptor: {shortest: 1.0e-12}": "`descriptor.shortest` must be between 0.1 and 100",
    "descriptor: {central_weight: 1.0e+12}": "`descriptor.central_weight` must be at most 10000",
    "baseline: {zbl: {inner: 1.0, outer: 1.000000001}}": "outer 1 A must be larger than inner 1 A by 0.1 A or more",
    "baseline: {zbl: {outer: 1.0e-12}}": "outer.* must be between 0.1 and 100; got 1e-12",
    "kernel: {length: 1.0e-12}": "`kernel.length` must be between 0.001 and 1000; got 1e-12",
    "kernel: {weight: 1.0e-12}": "`kernel.weight` must be between 1e-06 and 1e.06; got 1e-12",
    "descriptor: []": "descriptor.* must not be empty; leave the key out",
    "kernel: []": "`kernel` lists 0 entries for 1 descriptors",
    "inducing: {shares: {}}": "inducing.shares.* must not be empty; leave the key out",
    "noise: {force: 1.0e+300}": "`noise.force` must be between 1e-09 and 1e\\+06",
    "noise: {force: 1.0e-300}": "`noise.force` must be between 1e-09",
    "noise: {energy_per_atom: .nan}": "`noise.energy_per_atom` must be a finite number",
    "noise: {force: {bounds: [1.0e-300, 1.0e+300]}}": "`noise.force.bounds` must be \\[lowest, highest\\]",
    "memory_GB: 1.0e-30": "`memory_GB` must be between",
    "inducing: {n: 1000000000000}": "`inducing.n` must be at most 1000000000",
    "inducing: {shares: {Qq: 3}}": "'Qq' is not a chemical symbol",
    "baseline: {isolated_atoms: {Xx: 1}}": "'Xx' is not a chemical symbol",
    "baseline: {isolated_atoms: {Si: .inf}}": "`baseline.isolated_atoms.Si` must be a finite number",
    "? [a, b]\n: 1": "line 1, column 3.: a key must be a word; got",
    "? {a: b}\n: 1": "a key must be a word",
    "null: 3": "a key must be a word; got None",
    "3: 4": "a key must be a word; got 3",
    "2020-01-01: 3": "a key must be a word",
    "seed: 1\nseed: 2": "line 2, column 1.: the key 'seed' is given twice",
    "descriptor: {cutoff: 4, cutoff: 5}": "the key 'cutoff' is given twice",
    "a: " + 3000 * "[" + 3000 * "]": "is nested too deeply",
    "kernel: " + 40 * "{name: sum, terms: [" + "{zeta: 2}" + 40 * "]}": "is nested too deeply",
    BOMB: "repeats itself too often",
    BOMB + "descriptor: *i": "repeats itself too often",
    "descriptor: &a {x: *a}": "repeats itself too often",
    "&a [*a]": "repeats itself too often",
    "descriptor:\n\tcutoff: 4": "line 2, column 1.: found character",
    "seed: \0": "is not valid YAML: unacceptable character",
    "seed: \x1b[31m": "is not valid YAML: unacceptable character",
    "!!python/object/apply:os.system ['true']": "could not determine a constructor",
    "--- \na: 1\n---\nb: 2": "another document",
    "[1, 2]": "a recipe is a mapping of keys to values; got list",
}


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: text[:30])
def test_nonsense_is_refused_in_one_sentence(text, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"r.yaml: .*{NONSENSE[text]}") as error:
        load_recipe(path)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


def test_files_that_are_no_recipes(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long.yaml").write_text("# " + "x" * (1 << 20))
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9")
    for path, said in (
        (tmp_path / "fifo", "is a device or a pipe, not a recipe"),
        ("/dev/zero", "is a device or a pipe"),
        (tmp_path, "is a folder, not a recipe"),
        (tmp_path / "none.yaml", "cannot be read: No such file"),
        (tmp_path / "long.yaml", "has more than 1 MB"),
        (tmp_path / "latin.yaml", "cannot be read: 'utf-8'"),
    ):
        with pytest.raises(UserError, match=said):
            load_recipe(path)


def test_aliases_and_merges_of_a_sensible_size_are_read(tmp_path):
    (tmp_path / "r.yaml").write_text("descriptor: [&d {cutoff: 4.0}, {<<: *d, n_max: 3}]")
    first, second = load_recipe(tmp_path / "r.yaml").descriptors
    assert first.cutoff == second.cutoff == 4.0 and second.n_max == 3


def test_an_override_never_vanishes():
    with pytest.raises(UserError, match="--set 0.seed=3: must look like KEY=VALUE"):
        load_recipe(None, ["0.seed=3"])
