"""Exported models: what a file gives is what was exported, to the bit, and no altered file is taken for one."""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from systems import (
    BASELINES,
    DESCRIPTORS,
    KERNELS,
    SPECIES,
    descriptor,
    evaluate_by_core,
    everything,
    low_rank_term,
    random_term,
)
from test_compiled_errors import distances_of, terms_of
from test_local_variance import model_of, shaken

import gpmlp
from gpmlp.cli import main
from gpmlp.core import neighbors
from gpmlp.core.environments import SinglePrecisionDescriptor, Surroundings
from gpmlp.core.errors import UserError
from gpmlp.gp.kernels import PolynomialKernel, SumKernel
from gpmlp.io.export import export_model
from gpmlp.native import library
from gpmlp.potential.baselines import Baseline
from gpmlp.potential.compiled import compile_mean
from gpmlp.potential.mean import EnergyTerm
from gpmlp.potential.potential import Potential
from gpmlp.recipe import Recipe
from gpmlp.uncertainty.calibration import Calibration

pytestmark = pytest.mark.skipif(library.compiled() is None, reason="gpmlp was built without a compiler")
SOAPS = [name for name in DESCRIPTORS if not name.startswith("dscribe")]
ZETA_2 = KERNELS["polynomial 2"]


def potential_of(terms: Sequence[EnergyTerm], baselines: Sequence[Baseline] = ()) -> Potential:
    return Potential(tuple(terms), tuple(baselines), tuple(sorted(SPECIES)), Recipe())


def load(path: Path) -> library.Handle:
    """The model of an exported file; ValueError with what the core says of it."""
    said = ctypes.create_string_buffer(1000)
    address = library.call("load_model", str(path).encode(), said, len(said))
    if not address:
        raise ValueError(said.value.decode())
    return library.Handle(address)


def cases() -> dict[str, tuple[list[EnergyTerm], list[Baseline]]]:
    polynomials = {f"zeta {zeta}": PolynomialKernel(zeta) for zeta in range(1, 7)}
    nested = SumKernel([KERNELS["sum"], PolynomialKernel(5)], [0.3, 1.1])
    kernels = polynomials | {name: KERNELS[name] for name in ("exponential", "sum")} | {"sum of sums": nested}
    first = descriptor(SOAPS[0])
    out = {name: ([random_term(first, kernel)], []) for name, kernel in kernels.items()}
    for name in SOAPS:
        out[name] = ([random_term(descriptor(name), ZETA_2)], [])
    single = SinglePrecisionDescriptor(first)
    out["single precision"] = ([random_term(single, ZETA_2)], [])
    out["low rank"] = ([low_rank_term(first, 5)], [])
    out["low rank, sum"] = ([low_rank_term(first, 5, "sum")], [])
    lacking = random_term(first, KERNELS["polynomial 4"])
    del lacking.blocks[SPECIES[1]]
    out["nothing of a species"] = ([lacking], [])
    for name, baseline in BASELINES.items():
        out[name] = ([random_term(first, ZETA_2)], [baseline()])
    several = [random_term(first, ZETA_2), low_rank_term(descriptor(SOAPS[1]), 3), random_term(single, KERNELS["sum"])]
    out["everything"] = (several, [baseline() for baseline in BASELINES.values()])
    return out


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_exported(case, tmp_path):
    terms, baselines = CASES[case]
    potential = potential_of(terms, baselines)
    export_model(potential, tmp_path / "model", "some-hash")
    compiled = compile_mean(terms, baselines, potential.species)
    structures = everything()
    given = Surroundings.from_structures(structures, neighbors.find_neighbors(structures, potential.reach))
    loaded = load(tmp_path / "model")
    energies, gradients = evaluate_by_core(compiled.model, given)
    again = evaluate_by_core(loaded, given)
    assert torch.equal(energies, again[0]) and torch.equal(gradients, again[1]) and energies.abs().max() > 0.1

    cutoff, species = torch.zeros(1, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    library.call("model_cutoff", loaded, cutoff)
    assert library.call("model_species", loaded, species) == 3
    assert cutoff.item() == potential.reach and species.tolist() == sorted(SPECIES)
    line = (tmp_path / "model").read_bytes().split(b"\n")[0].decode()
    assert f"gpmlp-export 1 abi {library.ABI} " in line and "species H,C,O" in line and "sha256 some-hash" in line


@pytest.mark.parametrize("case", ["polynomial 2", "tangents", "two descriptors"])
def test_errors_are_those_of_the_potential(case, tmp_path):
    """Calibrated standard deviations of local energies, and novelties."""
    model = model_of(case)
    calibration = replace(Calibration.identity(), typical_novelty=0.5)
    kinds = {name: replace(kind, n=9, weights=(0.4, 1.9, 1.0), scale=1.3) for name, kind in calibration.kinds.items()}
    potential = replace(
        potential_of(terms_of(model)),
        variances=model,
        novelty=distances_of(model),
        calibration=replace(calibration, kinds=kinds),
    )
    recipe = Recipe.model_validate({"descriptor": [{}] * len(model.priors), "kernel": [{}] * len(model.priors)})
    potential = replace(potential, recipe=recipe)
    export_model(potential, tmp_path / "model")
    structures = shaken(everything(), 0.1, 3)
    given = Surroundings.from_structures(structures, neighbors.find_neighbors(structures, potential.reach))
    *_, sigma, novelty = evaluate_by_core(load(tmp_path / "model"), given, True)
    wanted = potential(structures, "atom_energies", novelty=True)
    torch.testing.assert_close(sigma, wanted.atom_energies_variance.total.sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(novelty, wanted.novelty)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> bytes:
    """A small file."""
    path = tmp_path_factory.mktemp("export") / "model"
    term = low_rank_term(descriptor(SOAPS[0], n_max=1, l_max=1), 1)
    export_model(potential_of([term], [made() for made in BASELINES.values()]), path)
    return path.read_bytes()


def test_no_altered_file_is_loaded(exported, tmp_path):
    """Each byte of the beginning and the end, and some between, in three ways; every length near the ends, and some."""
    path, n = tmp_path / "model", len(exported)
    places = [*range(600), *range(600, n - 200, n // 200), *range(n - 200, n)]
    for place in places:
        for change in (1, 0x80, 0xFF):
            data = bytearray(exported)
            data[place] ^= change
            path.write_bytes(data)
            with pytest.raises(ValueError, match=f"{path}: (is damaged|is no model for engines)"):
                load(path)
    for length in places:
        path.write_bytes(exported[:length])
        with pytest.raises(ValueError, match="is damaged|is no model for engines"):
            load(path)
    path.write_bytes(exported + bytes(8))
    with pytest.raises(ValueError, match="is damaged"):
        load(path)


def resealed(data: bytes) -> bytes:
    """With a checksum that fits."""
    return data[:-8] + struct.pack("<q", zlib.crc32(data[:-8]))


def test_sizes_and_references_are_checked_even_if_the_checksum_fits(exported, tmp_path):
    """Lengths of names, numbers of arguments, letters, counts of arrays and references, of every record."""
    path = tmp_path / "model"
    begin, end = exported.index(b"\n") + 1, len(exported) - 8
    heads = []  # places of words that say how to read others
    at = begin
    while at < end:
        length, *_ = struct.unpack_from("<q", exported, at)
        heads += [at, at + 8 + -(-length // 8) * 8]
        at = heads[-1] + 8
        for _ in range(struct.unpack_from("<q", exported, heads[-1])[0]):
            letter, number = struct.unpack_from("<qq", exported, at)
            heads += [at] + [at + 8] * (chr(letter) in "oOISDF")
            size = {"O": 8, "I": 8, "D": 8, "S": 4, "F": 4}.get(chr(letter), 0)
            at += 16 + -(-number * size // 8) * 8
    assert at == end and len(heads) > 60
    for place in heads:
        for value in (-2, -(1 << 63), 1 << 40, (1 << 63) - 1, (1 << 61) + 1):
            data = bytearray(exported)
            struct.pack_into("<q", data, place, value)
            path.write_bytes(resealed(bytes(data)))
            with pytest.raises(ValueError, match="is damaged|other arguments|another version|this version"):
                load(path)


def test_other_versions_are_named(exported, tmp_path):
    path = tmp_path / "model"
    for old, new in ((f" abi {library.ABI} ", f" abi {library.ABI + 1} "), ("gpmlp-export 1", "gpmlp-export 2")):
        path.write_bytes(resealed(exported.replace(old.encode(), new.encode())))
        with pytest.raises(ValueError, match="was written by another version of gpmlp .*export the model again"):
            load(path)
    path.write_bytes(resealed(exported.replace(b"low_rank_form", b"low_rank_farm")))
    with pytest.raises(ValueError, match="needs low_rank_farm_f64, which this version of gpmlp has not"):
        load(path)


def test_other_files_are_named(model_file, tmp_path):
    with pytest.raises(ValueError, match="is no model for engines; write one by: gpmlp export"):
        load(model_file)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="is no model for engines"):
        load(tmp_path / "empty")


def test_what_the_core_has_no_form_for_is_refused(tmp_path):
    class Dispersion:
        cutoff = 9.0

    term = random_term(descriptor(SOAPS[0]), ZETA_2)
    others = [name for name in DESCRIPTORS if name not in SOAPS]
    refused = {"the baseline Dispersion": ([term], [Dispersion()])}
    refused["several ZBL"] = ([term], [BASELINES["ZBL"]()] * 2)
    refused["the descriptor "] = ([random_term(descriptor(others[0]), ZETA_2)], [])
    for what, (terms, baselines) in refused.items():
        (tmp_path / "model").write_text("old")
        with pytest.raises(UserError, match=f"This model cannot be exported: .* no form for {what}"):
            export_model(potential_of(terms, baselines), tmp_path / "model")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_the_command(model_file, small_set, tmp_path, capsys):
    out = tmp_path / "copper.gpmlp-lammps"
    assert main.main(["export", str(model_file), "--to", "lammps", "-o", str(out), "--descriptors", "float32"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out.replace("\n", "")
    potential = gpmlp.load(model_file).to(descriptors="float32")
    structures = small_set[0]
    given = Surroundings.from_structures(structures, neighbors.find_neighbors(structures, potential.reach))
    ours, core = (evaluate_by_core(model, given)[0] for model in (load(out), potential.compiled_mean.model))
    assert torch.equal(ours, core)

    before = out.read_bytes()
    assert main.main(["export", str(model_file), "--to", "lammps", "-o", str(out), "--mean", "low_rank"]) == 2
    assert "has no mean of low rank" in capsys.readouterr().err.replace("\n", " ")
    assert main.main(["export", str(model_file), "--to", "lammps", "-o", str(model_file)]) == 2
    assert main.main(["export", str(tmp_path / "none"), "--to", "lammps", "-o", str(out)]) == 2
    assert out.read_bytes() == before
