"""Model files that were altered, with their checksum made anew: each is refused with a sentence that names the file, within a second."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gpmlp.cli import console, main
from gpmlp.core.errors import UserError
from gpmlp.core.stored_tensors import StoredTensors
from gpmlp.core.structures import Structures
from gpmlp.io import archive
from gpmlp.io.model_header import check_header
from gpmlp.potential.baselines import IsolatedAtoms
from gpmlp.uncertainty.calibration import Calibration, KnownErrors
from gpmlp.uncertainty.separation import SeparationScale

NAN, INF = float("nan"), float("inf")
Tensors = dict[str, torch.Tensor]


def sealed(data: bytes) -> bytes:
    """The bytes with the checksum that they then have."""
    match = archive.CHECKSUM.search(data)
    if match is None:
        return data  # nothing is sealed there any more
    blank = data[: match.start(1)] + archive.BLANK.encode() + data[match.end(1) :]
    return data[: match.start(1)] + hashlib.sha256(blank).hexdigest().encode() + data[match.end(1) :]


def packed(content: dict[str, Any], tensors: Tensors) -> bytes:
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(plain, metadata={"gpmlp": json.dumps(content, separators=(",", ":"))})


def outer(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON text of safetensors, and the bytes of the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(text: str | dict[str, Any], rest: bytes) -> bytes:
    raw = (text if isinstance(text, str) else json.dumps(text, separators=(",", ":"))).encode()
    return struct.pack("<Q", len(raw)) + raw + rest


@pytest.fixture(scope="module")
def whole(model_file) -> tuple[dict[str, Any], Tensors]:
    content = archive.read_header(model_file)
    return content, safetensors.torch.load(Path(model_file).read_bytes())


def put(*path: Any) -> Callable:
    """Put the last argument at the place of `header` that the others lead to; of two values, the first is a key."""
    *places, last, value = path

    def alter(content: dict[str, Any], _: Tensors) -> None:
        here = content["header"]
        for step in places:
            here = here[step]
        here[last] = value

    return alter


def with_r6(*changes: dict[str, Any]) -> Callable:
    """Append a tail of copper for each of these changes of it."""

    def alter(content: dict[str, Any], _: Tensors) -> None:
        for change in changes:
            tail = {"name": "r6", "pairs": [[29, 29, 60.0]], "begin": 2.0, "full": 3.0, "outer": 20.0}
            content["header"]["baselines"].append(tail | change)

    return alter


def drop(*path: Any) -> Callable:
    *places, last = path

    def alter(content: dict[str, Any], _: Tensors) -> None:
        here = content["header"]
        for step in places:
            here = here[step]
        del here[last]

    return alter


def top(key: str, value: Any) -> Callable:
    return lambda content, _: content.__setitem__(key, value)


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    return lambda _, tensors: tensors.__setitem__(name, change(tensors[name]))


def entry(name: str, value: float, place: int = 0) -> Callable:
    """One number of a tensor."""

    def change(old: torch.Tensor) -> torch.Tensor:
        new = old.clone()
        new.view(-1)[place] = value
        return new

    return tensor(name, change)


FORCES = ("calibration", "kinds", "forces")
DESCRIPTOR = ("recipe", "descriptor", 0)
ZBL, ATOMS = ("baselines", 0), ("baselines", 1)
NOVELTY = "novelty.29."
CU = "term0.Z29."
HEADERS: dict[str, Callable] = {
    # format
    "format is text": top("format", "2"),
    "format is a fraction": top("format", 2.5),
    "format is true": top("format", True),
    "format is negative": top("format", -1),
    "format is none": top("format", None),
    "format is of the future": top("format", 10**30),
    "version is a number": top("version", 3),
    "other units": top("units", "hartree, bohr"),
    "no units": lambda content, _: content.pop("units"),
    "header is a list": top("header", []),
    "header is empty": top("header", {}),
    "header is text": top("header", "model"),
    # species
    "species 0": put("species", [0]),
    "species 200": put("species", [200]),
    "species negative": put("species", [-29]),
    "species twice": put("species", [29, 29]),
    "species unsorted": put("species", [29, 13]),
    "species text": put("species", ["29"]),
    "species symbol": put("species", ["Cu"]),
    "species fraction": put("species", [29.0]),
    "species none": put("species", []),
    "species a number": put("species", 29),
    "species of another model": put("species", [13]),
    "species more": put("species", [13, 29]),
    "no species": drop("species"),
    # recipe
    "no recipe": drop("recipe"),
    "recipe a list": put("recipe", [1]),
    "recipe with a key": put("recipe", "colour", "red"),
    "cutoff 0": put(*DESCRIPTOR, "cutoff", 0.0),
    "cutoff negative": put(*DESCRIPTOR, "cutoff", -4.0),
    "cutoff 1e9": put(*DESCRIPTOR, "cutoff", 1e9),
    "cutoff 1e-9": put(*DESCRIPTOR, "cutoff", 1e-9),
    "cutoff NaN": put(*DESCRIPTOR, "cutoff", NAN),
    "cutoff infinite": put(*DESCRIPTOR, "cutoff", INF),
    "cutoff text": put(*DESCRIPTOR, "cutoff", "four"),
    "cutoff open": put(*DESCRIPTOR, "cutoff", None),
    "n_max 0": put(*DESCRIPTOR, "n_max", 0),
    "n_max 1e12": put(*DESCRIPTOR, "n_max", 10**12),
    "n_max another": put(*DESCRIPTOR, "n_max", 4),
    "l_max another": put(*DESCRIPTOR, "l_max", 4),
    "l_max 1e6": put(*DESCRIPTOR, "l_max", 10**6),
    "sigma_atom 0": put(*DESCRIPTOR, "sigma_atom", 0.0),
    "descriptor unknown": put(*DESCRIPTOR, "name", "os.system"),
    "basis unknown": put(*DESCRIPTOR, "basis", "plane waves"),
    "kernel unknown": put("recipe", "kernel", {"name": "pickle"}),
    "zeta 0": put("recipe", "kernel", 0, "zeta", 0),
    "zeta 1e9": put("recipe", "kernel", 0, "zeta", 10**9),
    "dtype unknown": put("recipe", "dtype", "float8"),
    "dtype another": put("recipe", "dtype", "float32"),
    "device unknown": put("recipe", "device", "/dev/null"),
    "seed negative": put("recipe", "seed", -1),
    # noise
    "noise negative": put("noise", "forces", -0.1),
    "noise zero": put("noise", "energies", 0.0),
    "noise NaN": put("noise", "energies", NAN),
    "noise infinite": put("noise", "forces", INF),
    "noise text": put("noise", "forces", "0.1"),
    "noise huge": put("noise", "forces", 1e300),
    "noise of something": put("noise", "charges", 0.1),
    "noise a list": put("noise", [0.1]),
    "no noise": drop("noise"),
    # baselines
    "no baselines": drop("baselines"),
    "baseline unknown": put("baselines", [{"name": "d3"}]),
    "ZBL listed twice": lambda content, _: content["header"]["baselines"].append(content["header"]["baselines"][0]),
    "atoms listed twice": lambda content, _: content["header"]["baselines"].append(content["header"]["baselines"][1]),
    "ZBL gives a pair twice": lambda content, _: content["header"]["baselines"][0]["pairs"].append(
        content["header"]["baselines"][0]["pairs"][0]
    ),
    "r6 gives a pair twice": with_r6({"pairs": [[29, 29, 60.0], [29, 29, 1.0]]}),
    "r6 listed twice": with_r6({}, {}),
    "baseline without a name": put("baselines", [{"energies": {"29": 0.0}}]),
    "isolated atom NaN": put(*ATOMS, "energies", {"29": NAN}),
    "isolated atom of another": put(*ATOMS, "energies", {"13": -1.0}),
    "isolated atom text": put(*ATOMS, "energies", {"29": "low"}),
    "isolated atom symbol": put(*ATOMS, "energies", {"Cu": -1.0}),
    "isolated atom 1e300": put(*ATOMS, "energies", {"29": 1e300}),
    "ZBL outer below inner": put(*ZBL, "pairs", [[29, 29, 2.0, 1.0]]),
    "ZBL outer 1e9": put(*ZBL, "pairs", [[29, 29, 1.0, 1e9]]),
    "ZBL inner negative": put(*ZBL, "pairs", [[29, 29, -1.0, 1.0]]),
    "ZBL NaN": put(*ZBL, "pairs", [[29, 29, NAN, 1.0]]),
    "ZBL of others": put(*ZBL, "pairs", [[13, 13, 1.0, 2.0]]),
    "ZBL without pairs": put(*ZBL, "pairs", []),
    "ZBL species 1e9": put(*ZBL, "pairs", [[29, 10**9, 1.0, 2.0]]),
    "ZBL three numbers": put(*ZBL, "pairs", [[29, 29, 1.0]]),
    # provenance and report
    "no provenance": drop("provenance"),
    "provenance text": put("provenance", "ours"),
    "provenance without hash": put("provenance", {"files": {"training": {"name": "a.xyz"}}}),
    "provenance file a number": put("provenance", {"files": {"training": 3}}),
    "sample of nothing": put("provenance", {"sample": {"how": "magic"}}),
    "no report": drop("report"),
    "report a list": put("report", [1, 2]),
    "report without rows": drop("report", "rows"),
    "report rows negative": put("report", "rows", {"forces": -3}),
    "report columns text": put("report", "columns", "many"),
    "report condition none": put("report", "condition", None),
    "report stages broken": put("report", "stages", [["fit"]]),
    "report warnings a number": put("report", "warnings", 3),
    # calibration
    "calibration a list": put("calibration", []),
    "calibration without kinds": drop("calibration", "kinds"),
    "calibration other levels": put("calibration", "levels", [0.1, 0.2]),
    "calibration scale NaN": put(*FORCES, "scale", NAN),
    "calibration scale negative": put(*FORCES, "scale", -1.0),
    "calibration scale text": put(*FORCES, "scale", "wide"),
    "calibration multipliers negative": put(*FORCES, "multipliers", {"all": [-1.0] * 6}),
    "calibration kind": put("calibration", "kinds", "charges", {}),
    "calibration source a list": put("calibration", "source", [1]),
    "calibration source count": put("calibration", "source", {"held_out_structures": -1}),
    "calibration posterior_scale zero": put("calibration", "posterior_scale", 0.0),
    "choices a text": put("report", "choices", "all"),
    "choices numbers": put("report", "choices", [1, 2]),
    # variances
    "variances a list": put("variances", []),
    "variances without blocks": drop("variances", "blocks"),
    "variances of another species": put("variances", "blocks", [[{"species": 13, "centres": 20}]]),
    "variances more centres": put("variances", "blocks", [[{"species": 29, "centres": 10**12}]]),
    "variances negative centres": put("variances", "blocks", [[{"species": 29, "centres": -1}]]),
    "variances fewer of fit": put("variances", "of_fit", 1),
    "variances noise negative": put("variances", "noise", {"forces": -0.1}),
    "variances signal negative": put("variances", "signal", [{"29": -1.0}]),
    "variances signal NaN": put("variances", "signal", [{"29": NAN}]),
    "variances amplitude NaN": put("variances", "amplitude", NAN),
    "variances amplitude negative": put("variances", "amplitude", -1.0),
    "variances dropped": drop("variances"),
    # novelty
    "novelty a list": put("novelty", []),
    "novelty threshold 0": put("novelty", "thresholds", {"29": 0.0}),
    "novelty threshold negative": put("novelty", "thresholds", {"29": -2.0}),
    "novelty threshold NaN": put("novelty", "thresholds", {"29": NAN}),
    "novelty threshold text": put("novelty", "thresholds", {"29": "far"}),
    "novelty of another species": put("novelty", "thresholds", {"13": 1.0}),
    "novelty quantile 2": put("novelty", "quantile", 2.0),
    "novelty dropped": drop("novelty"),
    **{f"novelty {name} shorter": tensor(NOVELTY + name, lambda t: t[:-1]) for name in ("centre", "components", "mean", "residual")},
    "novelty variance a vector": tensor(NOVELTY + "variance", lambda t: t.repeat(2)),
    "novelty variance negative": entry(NOVELTY + "variance", -1.0),
    "novelty components huge": entry(NOVELTY + "components", 1e200),
    "novelty centre huge": entry(NOVELTY + "centre", 1e200),
    "novelty mean huge": entry(NOVELTY + "mean", 1e200),
    "novelty scatter indefinite": tensor(NOVELTY + "scatter", lambda t: -t),
    "novelty count 0": entry(NOVELTY + "count", 0.0),
    "novelty residual negative": entry(NOVELTY + "residual", -1.0),
    "novelty spread single": tensor(NOVELTY + "spread", lambda t: t.float()),
    "novelty centre dropped": lambda _, tensors: tensors.pop(NOVELTY + "centre"),
    # tensors
    "features NaN": entry(CU + "features", NAN),
    "features not of length 1": tensor(CU + "features", lambda t: 3 * t),
    "features of another width": tensor(CU + "features", lambda t: t[:, 1:]),
    "features a vector": tensor(CU + "features", lambda t: t[0]),
    "features single": tensor(CU + "features", lambda t: t.float()),
    "features whole numbers": tensor(CU + "features", lambda t: t.long()),
    "features of 16 bits": tensor(CU + "features", lambda t: t.bfloat16()),
    "weights NaN": entry(CU + "weights", NAN),
    "weights infinite": entry(CU + "weights", INF),
    "weights fewer": tensor(CU + "weights", lambda t: t[:-1]),
    "weights none": tensor(CU + "weights", lambda t: t[:0]),
    "weights half": tensor(CU + "weights", lambda t: t.half()),
    "weights a matrix": tensor(CU + "weights", lambda t: t[None]),
    "tangents fewer": tensor(CU + "tangents", lambda t: t[:-1]),
    "tangents infinite": entry(CU + "tangents", -INF),
    "no weights": lambda _, tensors: tensors.pop(CU + "weights"),
    "no features": lambda _, tensors: tensors.pop(CU + "features"),
    "no factor": lambda _, tensors: tensors.pop("variances.factor"),
    "no tensors": lambda _, tensors: tensors.clear(),
    "a tensor more": lambda _, tensors: tensors.update(more=torch.zeros(2)),
    "a species more": lambda _, tensors: tensors.update({"term0.Z13.weights": torch.zeros(2)}),
    "factor NaN": entry("variances.factor", NAN, 7),
    "factor singular": entry("variances.factor", 0.0),
    "factor smaller": tensor("variances.factor", lambda t: t[:-3]),
    "signal negative": entry("variances.signal", -1.0),
    "signal shorter": tensor("variances.signal", lambda t: t[:-1]),
    "columns out of range": entry("variances.0.kept", 10**9),
    "columns negative": entry("variances.0.kept", -1),
    "columns twice": entry("variances.0.kept", 1),
    "columns fractions": tensor("variances.0.kept", lambda t: t.double()),
    "lower infinite": entry("variances.0.lower", INF),
    "tangents of variances": tensor("variances.0.tangents", lambda t: t[..., :-1]),
}  # fmt: skip


def check_refused(path: Path, capsys) -> None:
    """By every command that reads a model, within a second, in one sentence about this file."""
    begun = time.monotonic()
    with pytest.raises(UserError) as error:
        archive.load(path)
    assert time.monotonic() - begun < 1.0
    text = str(error.value)
    assert text.startswith(f"{path}: ") and text.endswith(".") and "\n" not in text and len(text) < 400, text
    assert "no version of gpmlp writes" not in text or "KeyError" not in text, text
    assert main.main(["evaluate", str(path), str(path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", HEADERS)
def test_altered(name, whole, tmp_path, capsys):
    content, tensors = copy.deepcopy(whole[0]), dict(whole[1])
    HEADERS[name](content, tensors)
    path = tmp_path / "altered.gpmlp"
    path.write_bytes(sealed(packed(content, tensors)))
    check_refused(path, capsys)


# ---------------------------------------------------------------- every tensor and every number that enters predictions


@pytest.fixture(scope="module")
def calibrated(potential) -> tuple[dict[str, Any], Tensors]:
    """The model with everything that a calibration can hold."""
    generator = torch.Generator().manual_seed(0)
    known = {}
    for kind in ("energies", "forces", "stresses"):
        std = torch.rand(600, generator=generator, dtype=torch.float64) + 0.1
        parts = torch.rand(600, 3, generator=generator, dtype=torch.float64) * std[:, None] ** 2
        errors, structure = std * torch.randn(600, generator=generator, dtype=torch.float64), torch.arange(600) // 20
        groups = tuple("ab"[int(s) % 2] for s in structure)
        known[kind] = KnownErrors(
            errors, std, torch.full((600,), 29), structure=structure, groups=groups, parts=parts, squared_force=std**2
        )
    source = {"held_out_structures": 30, "held_out_atoms": 600, "how": "here", "names": ["a"]}
    calibration = Calibration.fit(known, source, {kind: torch.ones(3) for kind in known})
    calibration = replace(calibration, typical_novelty=0.5, sample_scale=1.1, unsampled=2.0)
    apart = SeparationScale(5.0, 6.0, {"energies": 2.0, "forces": 1.5}, 9, 10.0, 2.0)
    calibration = replace(calibration, posterior_scale=1.2, apart=apart)
    open_ = [
        replace(b, open_directions=({29: 0.1},)) if isinstance(b, IsolatedAtoms) else b for b in potential.baselines
    ]
    header, tensors = replace(potential, calibration=calibration, baselines=tuple(open_)).state()
    content = {
        "archive_sha256": archive.BLANK, "format": archive.FORMAT_VERSION, "version": "0", "units": archive.UNITS, "header": header,
    }  # fmt: skip
    return json.loads(json.dumps(content)), tensors


def refused_or_right(content: dict[str, Any], tensors: Tensors, path: Path, structures: Structures) -> bool:
    """Whether the file is refused in a sentence; else all that it predicts has to be numbers, and no variance negative."""
    path.write_bytes(sealed(packed(content, tensors)))
    try:
        potential = archive.load(path)
    except UserError as error:
        text = str(error)
        assert text.startswith(f"{path}: ") and text.endswith(".") and "no version of gpmlp writes" not in text, text
        return True
    console.model_summary(content, ["Cu"])
    prediction = potential(structures, variance="all", novelty=True, config_types=["a"])
    sampled = potential(structures, variance="sampled_forces")
    stds = [
        v.total for v in (prediction.energies_variance, prediction.forces_variance, sampled.sampled_forces_covariance)
    ]
    level = potential.calibration.half_width(
        "forces", prediction.forces_variance.total.sqrt()[:, 0], 0.9, groups=["a"] * 4
    )
    stds[2] = stds[2].diagonal(dim1=1, dim2=2)
    for value in (prediction.energies, prediction.forces, prediction.novelty, level, *stds):
        assert value.isfinite().all()
    assert min(float(v.min()) for v in stds) >= 0
    return False


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one 1e200": lambda t: torch.cat([t.new_tensor([1e200 if t.is_floating_point() else 2**62]), t.reshape(-1)[1:]]).view(t.shape),
    "all 1e200": lambda t: torch.full_like(t, 1e200 if t.is_floating_point() else 2**62),
    "all NaN": lambda t: t.double() * NAN,
    "all infinite": lambda t: t.double() + INF,
    "all zero": torch.zeros_like,
    "all 1e-200": lambda t: torch.full_like(t, 1e-200),
    "sign of all": lambda t: -t,
    "sign of the last": lambda t: torch.cat([t.reshape(-1)[:-1], -t.reshape(-1)[-1:]]).view(t.shape),
    "ten times": lambda t: 10 * t,
    "fewer": lambda t: t.reshape(-1)[:-1],
    "a dimension more": lambda t: t[None],
    "single": lambda t: t.float(),
    "whole numbers": lambda t: t.to(torch.int32),
    "truth values": lambda t: t.bool(),
}  # fmt: skip
MUST = (
    "one 1e200",
    "all 1e200",
    "all NaN",
    "all infinite",
    "fewer",
    "a dimension more",
    "single",
    "whole numbers",
    "truth values",
)
# what the file itself shows to be wrong
CONTRADICTIONS = {
    "variances.0.tangents": ("all zero", "all 1e-200", "ten times"),
    "variances.0.lower": ("all zero", "all 1e-200", "ten times", "sign of all", "sign of the last"),
    "variances.0.kept": ("all zero", "all 1e-200", "sign of all", "ten times"),
    "variances.signal": ("all zero", "all 1e-200", "sign of all", "ten times"),
    "variances.factor": ("all zero", "all 1e-200"),
    CU + "features": ("ten times",),
}


@pytest.mark.parametrize("change", TENSORS)
def test_every_tensor(change, calibrated, small_set, tmp_path):
    content, tensors = calibrated
    for name, old in tensors.items():
        new = TENSORS[change](old)
        if new.dtype == old.dtype and new.shape == old.shape and torch.equal(new, old):
            continue
        refused = refused_or_right(content, tensors | {name: new}, tmp_path / "m.gpmlp", small_set[0].select([0]))
        if (name, change) == ("variances.factor", "single"):
            assert not refused  # files of many columns keep it so
            continue
        assert refused or change not in (*MUST, *CONTRADICTIONS.get(name, ())), name


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Of everything in plain data; of a list the first two."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, entry in inside:
        if path == ("calibration", "kinds") and key != "forces":  # the others are of the same kind
            continue
        yield from places(entry, (*path, key))


VALUES = {
    "NaN": NAN,
    "infinite": INF,
    "1e200": 1e200,
    "1e-300": 1e-300,
    "-1.5": -1.5,
    "0": 0,
    "text": "x",
    "none": None,
    "a list": ["x"],
}


@pytest.mark.parametrize("value", [*VALUES, "dropped"])
@pytest.mark.parametrize("part", ["noise", "baselines", "calibration", "variances", "novelty"])
def test_every_number_of_the_header(part, value, calibrated, small_set, tmp_path):
    content, tensors = calibrated
    refused = 0
    for place in places(content["header"][part], (part,)):
        changed = copy.deepcopy(content)
        if value == "dropped":
            drop(*place)(changed, tensors)
        else:
            put(*place, VALUES[value])(changed, tensors)
        refused += refused_or_right(changed, tensors, tmp_path / "m.gpmlp", small_set[0].select([0]))
    assert refused


@pytest.mark.parametrize("value", [*VALUES, "dropped"])
def test_every_entry_that_is_shown(value, calibrated):
    """Of the header: refused, or `gpmlp info` has something to say of it."""
    content, refused = calibrated[0], 0
    for place in places(content["header"]):
        if place[0] in ("calibration", "variances", "novelty"):
            continue
        changed = copy.deepcopy(content)
        alter = drop(*place) if value == "dropped" else put(*place, VALUES[value])
        alter(changed, {})
        try:
            check_header(changed["header"])
        except UserError:
            refused += 1
            continue
        console.model_summary(changed, ["Cu"])
        if changed["header"]["report"]:
            console.report_summary(changed["header"]["report"])
    assert refused


def claim(size: int, shape: list[int]) -> Callable[[bytes], bytes]:
    """A tensor that claims to be large."""

    def alter(data: bytes) -> bytes:
        text, rest = outer(data)
        text[CU + "weights"] = text[CU + "weights"] | {"shape": shape, "data_offsets": [0, size]}
        return joined(text, rest)

    return alter


def again(key: str) -> Callable[[bytes], bytes]:
    """A key of the outer JSON, or of that in it, given twice."""

    def alter(data: bytes) -> bytes:
        text, rest = outer(data)
        raw = json.dumps(text, separators=(",", ":"))
        if key == "tensor":
            name = f'"{CU}weights"'
            place = raw.index(name)
            return joined(raw[:place] + f"{name}:" + json.dumps(text[CU + "weights"]) + "," + raw[place:], rest)
        return joined(raw.replace('\\"format\\":', '\\"format\\":1,\\"format\\":', 1), rest)

    return alter


def deep(data: bytes) -> bytes:
    text, rest = outer(data)
    content = text["__metadata__"]["gpmlp"]
    text["__metadata__"]["gpmlp"] = content[:-1] + ',"more":' + "[" * 100_000 + "]" * 100_000 + "}"
    return joined(text, rest)


def rewritten(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def alter(data: bytes) -> bytes:
        text, rest = outer(data)
        change(text)
        return joined(text, rest)

    return alter


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "1e12 elements": claim(8 * 10**12, [10**12]),
    "1e12 elements in few bytes": claim(64, [10**12]),
    "2^63 elements": claim(64, [2**63 - 1, 2**62]),
    "negative elements": claim(64, [-8]),
    "offsets beyond the end": claim(1 << 60, [8]),
    "header of 2^60 bytes": lambda data: struct.pack("<Q", 1 << 60) + data[8:],
    "header cut": lambda data: struct.pack("<Q", 40) + data[8:],
    "a tensor twice": again("tensor"),
    "the format twice": again("format"),
    "nested deeply": deep,
    "a number of 1e5 digits": lambda data: data.replace(b'\\"format\\":4', b'\\"format\\":4' + b"0" * 99_999, 1),
    "type unknown": rewritten(lambda text: text[CU + "weights"].update(dtype="F7")),
    "offsets text": rewritten(lambda text: text[CU + "weights"].update(data_offsets=["a", "b"])),
    "offsets missing": rewritten(lambda text: text[CU + "weights"].pop("data_offsets")),
    "tensor a number": rewritten(lambda text: text.update({CU + "weights": 3})),
    "metadata a list": rewritten(lambda text: text.update(__metadata__=[text["__metadata__"]["gpmlp"]])),
    "metadata no JSON": rewritten(lambda text: text["__metadata__"].update(gpmlp="{" + text["__metadata__"]["gpmlp"])),
    "bytes too many": lambda data: data + b"\0" * 64,
    "not UTF-8": lambda data: data.replace(b"hartree", b"\xff\xfe").replace(b"eV, ang", b"eV\xff\xfe\xfdng", 1),
}


@pytest.mark.parametrize("name", BYTES)
def test_altered_bytes(name, model_file, tmp_path, capsys):
    data = BYTES[name](Path(model_file).read_bytes())
    if name == "a number of 1e5 digits":
        data = struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + 99_999) + data[8:]
    path = tmp_path / "altered.gpmlp"
    path.write_bytes(sealed(data))
    check_refused(path, capsys)


def test_the_table_is_long_and_the_unaltered_file_loads(whole, tmp_path):
    """And it is the alteration that is refused: the same file, packed and sealed as it was, is read."""
    assert len(HEADERS) + len(BYTES) >= 107
    path = tmp_path / "whole.gpmlp"
    path.write_bytes(sealed(packed(*whole)))
    archive.load(path)


def test_what_is_not_there_is_not_there():
    """Parts of files of older versions are looked for by name."""
    stored = StoredTensors({"a.b": torch.zeros(1)}).part("a.")
    assert "b" in stored and "c" not in stored and list(stored) == ["b"] and len(stored) == 1
    with pytest.raises(UserError, match="`a.c` is missing"):
        stored["c"]


def test_special_files_are_no_models(tmp_path, capsys):
    import os

    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        check_refused(path, capsys)
