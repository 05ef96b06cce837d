"""Header of a model file: what its parts must be for a potential to mean something, told by a schema and not by trying.

Nothing is built from it here but the recipe, whose own validation it is. Tensors are checked where they are used (Potential.from_state).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gpmlp.core import errors
from gpmlp.core.errors import UserError
from gpmlp.recipe import LONGEST, Recipe

NUMBERS = ("noise", "baselines", "calibration", "variances", "novelty")  # parts in which every number is finite
Species = Annotated[int, Field(ge=1, le=len(errors.SYMBOLS) - 1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Deviation = Annotated[float, Field(gt=0, le=1e9)]
NotNegative = Annotated[float, Field(ge=0, le=1e15)]
Three = Annotated[list[Annotated[float, Field(ge=-1e4, le=1e4)]], Field(min_length=3, max_length=3)]
Kind = Literal["energies", "forces", "stresses"]


def _element(key: object) -> str:
    """An atomic number as JSON keys have it."""
    if not (isinstance(key, str) and key.isascii() and key.isdigit() and 1 <= int(key[:9]) < len(errors.SYMBOLS)):
        raise ValueError(f"{key!r} is no atomic number")
    return key


def _sorted(species: list[int]) -> list[int]:
    if sorted(set(species)) != species:
        raise ValueError("must be sorted, each once")
    return species


def _complete(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that is valid and leaves open nothing that descriptors need."""
    for k, descriptor in enumerate(Recipe.from_header(recipe).descriptors):
        needed = ("cutoff", "n_max", "l_max", "sigma_atom", "basis") if descriptor.name == "soap" else ("cutoff",)
        missing = [name for name in needed if getattr(descriptor, name) is None]
        if descriptor.name == "soap" and descriptor.radial_scaling:
            missing += [name for name, value in descriptor.radial_scaling if value is None]
        if missing:
            raise ValueError(f"descriptor {k} lacks {missing[0]}")
    return recipe


Element = Annotated[str, BeforeValidator(_element)]


class _Section(BaseModel):
    """A part of the header; keys that other versions may add pass."""

    model_config = ConfigDict(extra="allow", strict=True)


class _IsolatedAtoms(_Section):
    name: Literal["isolated_atoms"]
    energies: dict[Element, Annotated[float, Field(ge=-1e9, le=1e9)]]
    open_directions: list[dict[Element, Annotated[float, Field(ge=-1e9, le=1e9)]]] = []


class _ZBL(_Section):
    name: Literal["zbl"]
    pairs: list[Annotated[list[Any], AfterValidator(lambda pair: _zbl_pair(pair))]]


def _zbl_pair(pair: list[Any]) -> list[Any]:
    numbers = len(pair) == 4 and all(type(x) in (int, float) for x in pair) and all(type(z) is int for z in pair[:2])
    if not numbers or not 1 <= pair[0] <= pair[1] < len(errors.SYMBOLS) or not 0 <= pair[2] < pair[3] <= LONGEST:
        raise ValueError(f"{pair} is no [Z, Z, inner, outer] with Z <= Z and 0 <= inner < outer <= {LONGEST:g} A")
    return pair


class _Source(_Section):
    """Structures that a calibration was learned from; empty where it was not."""

    held_out_structures: Count = 0
    held_out_atoms: Count = 0
    how: str = ""
    names: list[str] = []
    fingerprints: list[str] = []


class _LocalScale(_Section):
    slopes: Three
    middle: Three
    low: Three
    high: Three
    force: Deviation

    @model_validator(mode="after")
    def _ordered(self) -> _LocalScale:
        if any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low must not be above high")
        return self


class _GroupScale(_Section):
    std: Deviation = 1.0
    intervals: list[NotNegative] = []
    structures: Count = 0


class _KindCalibration(_Section):
    scale: Deviation
    n: Count
    multipliers: dict[str, list[NotNegative]]
    edges: list[NotNegative] = []
    floor: NotNegative = 0.0
    weights: list[NotNegative] = []
    forbidden: NotNegative = 0.0
    local: _LocalScale | None = None
    groups: dict[str, _GroupScale] = {}
    unseen: _GroupScale = _GroupScale()


class _Calibration(_Section):
    levels: list[float]
    kinds: dict[Kind, _KindCalibration]
    source: _Source = _Source()


class _Block(_Section):
    species: Species
    centres: Count


class _Variances(_Section):
    blocks: list[list[_Block]]
    signal: list[dict[Element, Deviation]]
    noise: dict[Kind, Deviation]
    label_noise: dict[Kind, Deviation]
    of_fit: Count
    amplitude: NotNegative = 1.0


class _Novelty(_Section):
    quantile: Annotated[float, Field(gt=0, lt=1)]
    thresholds: dict[Element, Deviation]


class _File(_Section):
    name: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Learned(_Section):
    labels: Count
    oracle: str


class _Sample(_Section):
    how: Literal["posterior", "label_noise"]
    index: Count
    of: Count
    seed: int
    calibrated: bool


class _Provenance(_Section):
    files: dict[str, _File] = {}
    created: str = ""
    learned: _Learned | None = None
    sample: _Sample | None = None


class _Report(_Section):
    """Numbers of the fit that are shown; of a fit all of `OF_FIT`, of a model that learned label by label all of `LEARNED`."""

    rows: dict[str, Count] = {}
    centres: dict[str, Count] = {}
    environments: dict[str, Count] = {}
    noise: dict[str, float] = {}
    train_rmse: dict[str, float] = {}
    columns: Count = 0
    rank: Count = 0
    condition: float = 1.0
    jitter: float = 0.0
    drift: float = 0.0
    updates: Count = 0
    held_out: Count = 0
    events: list[str] = []
    variance_subset: dict[str, float] | None = None
    validation_errors: dict[str, float | None] | None = None
    shortest: dict[str, float] = {}
    evidence_trace: list[list[float]] = []
    stages: list[Annotated[list[Any], AfterValidator(lambda stage: _stage(stage))]] = []
    warnings: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, report: Any) -> Any:
        if isinstance(report, dict) and report:
            shown = {"rows", "centres", "columns", "rank", "condition", "noise"}
            fit, learned = {"environments", "jitter", "stages", "train_rmse"}, {"updates", "drift", "events"}
            missing = sorted((shown | (fit if "train_rmse" in report else learned)) - report.keys())
            if missing:
                raise ValueError(f"lacks {missing[0]}")
        return report


def _stage(stage: list[Any]) -> list[Any]:
    if len(stage) != 3 or not isinstance(stage[0], str) or any(type(x) not in (int, float) for x in stage[1:]):
        raise ValueError(f"{stage} is no [name, seconds, MB]")
    return stage


class ModelHeader(_Section):
    """Header of Potential.state()."""

    species: Annotated[list[Species], Field(min_length=1), AfterValidator(_sorted)]
    recipe: Annotated[dict[str, Any], AfterValidator(_complete)]
    noise: dict[Kind, Deviation]
    baselines: list[Annotated[_IsolatedAtoms | _ZBL, Field(discriminator="name")]]
    provenance: _Provenance
    report: _Report
    calibration: _Calibration | None = None
    variances: _Variances | None = None
    novelty: _Novelty | None = None

    @model_validator(mode="after")
    def _covers_species(self) -> ModelHeader:
        for baseline in self.baselines:
            if isinstance(baseline, _ZBL):
                have = {(a, b) for a, b, *_ in baseline.pairs}
                lacking = [f"Z = {a}, {b}" for a in self.species for b in self.species if a <= b and (a, b) not in have]
            else:
                lacking = [f"Z = {z}" for z in self.species if str(z) not in baseline.energies]
            if lacking:
                raise ValueError(f"the baseline {baseline.name} lacks {lacking[0]}")
        return self


def check_header(header: Any) -> None:
    """Raise UserError unless this is the header of a potential."""
    try:
        ModelHeader.model_validate(header)
    except ValidationError as error:
        # of a union only the branch that went deepest
        first = max(error.errors(include_url=False), key=lambda entry: len(entry["loc"]))
        place = ".".join(str(step) for step in first["loc"])
        text = first["msg"].removeprefix("Value error, ").replace("Input should", "should").splitlines()[0]
        raise UserError(
            f"the header says what no model can mean{f', at `{place}`' if place else ''}: {text}."
        ) from error
    for part in NUMBERS:
        for place in _not_finite(header.get(part), part):
            raise UserError(f"the header holds a NaN or infinite number, at `{place}`.")


def _not_finite(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _not_finite(entry, f"{place}.{key}")
    elif isinstance(value, list):
        for k, entry in enumerate(value):
            yield from _not_finite(entry, f"{place}.{k}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield place
