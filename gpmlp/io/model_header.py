"""Header of a model file: what its parts must be for a potential to mean something, told by a schema and not by trying.

Nothing is built from it here but the recipe, whose own validation it is. Tensors are checked where they are used (Potential.from_state).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gpmlp.core import calculators, errors
from gpmlp.core.errors import UserError
from gpmlp.core.findings import Severity
from gpmlp.potential.evaluation import ErrorTable
from gpmlp.recipe import LONGEST, D3Recipe, DescriptorRecipe, Length, NetworkName, NetworkRecipe, R6Recipe, Recipe
from gpmlp.uncertainty.calibration import EVERYTHING, LEVELS

NUMBERS = (
    "noise",
    "baselines",
    "calibration",
    "variances",
    "novelty",
    "charges",
)  # parts in which every number is finite
LARGEST_LOG = 50.0  # of a factor on standard deviations
Species = Annotated[int, Field(ge=1, le=len(errors.SYMBOLS) - 1)]
Count = Annotated[int, Field(ge=0, le=10**15)]
Deviation = Annotated[float, Field(ge=1e-50, le=1e9)]  # its square is a number too
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
        network = descriptor if isinstance(descriptor, NetworkRecipe) else descriptor.beside
        missing = (
            [name for name in needed if getattr(descriptor, name, None) is None] if network is not descriptor else []
        )
        missing += [name for name in ("sha256", "layers", "weight") if network and getattr(network, name) is None]
        if isinstance(descriptor, DescriptorRecipe) and descriptor.name == "soap" and descriptor.radial_scaling:
            missing += [name for name, value in descriptor.radial_scaling if value is None]
        if isinstance(descriptor, DescriptorRecipe) and descriptor.compression:
            missing += [name for name, value in descriptor.compression if value is None]
        if missing:
            raise ValueError(f"descriptor {k} lacks {missing[0]}")
    return recipe


def _all_or_none(part: Any, needed: set[str]) -> Any:
    """A part of the header that has all of these keys, or none at all."""
    if isinstance(part, dict) and part and (missing := sorted(needed - part.keys())):
        raise ValueError(f"lacks {missing[0]}")
    return part


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
    pairs: Annotated[
        list[Annotated[list[Any], AfterValidator(lambda pair: _zbl_pair(pair))]],
        AfterValidator(lambda pairs: _each_once(pairs)),
    ]


class _Network(_Section):
    name: Literal["network"]
    network: str
    checkpoint: str
    sha256: str

    @model_validator(mode="after")
    def _known(self) -> _Network:
        NetworkName.model_validate({"name": self.network, "checkpoint": self.checkpoint, "sha256": self.sha256})
        return self


class _Calculator(_Section):
    name: Literal["calculator"]
    calculator: str
    kwargs: dict[str, Any]
    versions: dict[str, str]
    reuse: bool = False

    @model_validator(mode="after")
    def _known(self) -> _Calculator:
        calculators.check_calculator_name(self.calculator)
        return self


class _R6(_Section):
    name: Literal["r6"]
    pairs: Annotated[
        list[Annotated[list[Any], AfterValidator(lambda pair: _c6_pair(pair))]],
        AfterValidator(lambda pairs: _each_once(pairs)),
    ]
    begin: Length
    full: Length
    outer: Length

    @model_validator(mode="after")
    def _ordered(self) -> _R6:
        R6Recipe(begin=self.begin, full=self.full, outer=self.outer)
        return self


class _D3(_Section):
    name: Literal["d3"]
    functional: str
    damping: str
    atm: bool
    versions: dict[str, str]

    @model_validator(mode="after")
    def _known(self) -> _D3:
        D3Recipe.model_validate({"functional": self.functional, "damping": self.damping, "atm": self.atm})
        return self


def _each_once(pairs: list[list[Any]]) -> list[list[Any]]:
    for (a, b), n in Counter((pair[0], pair[1]) for pair in pairs).items():
        if n > 1:
            raise ValueError(f"the pair Z = {a}, {b} is given twice")
    return pairs


def _c6_pair(pair: list[Any]) -> list[Any]:
    numbers = len(pair) == 3 and all(type(z) is int for z in pair[:2]) and type(pair[2]) in (int, float)
    if not numbers or not 1 <= pair[0] <= pair[1] < len(errors.SYMBOLS) or not 0 <= pair[2] <= 1e6:
        raise ValueError(f"{pair} is no [Z, Z, C6] with Z <= Z and 0 <= C6 <= 1e6 eV A^6")
    return pair


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

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, source: Any) -> Any:
        return _all_or_none(source, {"held_out_structures", "held_out_atoms", "how", "names"})


class _LocalScale(_Section):
    slopes: Three
    middle: Three
    low: Three
    high: Three
    force: Deviation

    @model_validator(mode="after")
    def _bounded(self) -> _LocalScale:
        if any(a > b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError("low must not be above high")
        ends = zip(self.slopes, self.middle, self.low, self.high, strict=True)
        if (
            sum(abs(slope) * max(abs(low - middle), abs(high - middle)) for slope, middle, low, high in ends)
            > LARGEST_LOG
        ):
            raise ValueError(f"changes standard deviations by a factor beyond exp({LARGEST_LOG:g})")
        return self


class _GroupScale(_Section):
    std: Deviation = 1.0
    intervals: list[NotNegative] = []
    structures: Count = 0


class _KindCalibration(_Section):
    scale: Deviation
    n: Count
    multipliers: dict[
        Annotated[str, Field(pattern=rf"^({EVERYTHING}|(\*|[1-9]\d{{0,2}})/\d{{1,3}})$")], list[NotNegative]
    ]
    counts: dict[str, Count] = {}
    edges: list[NotNegative]
    floor: NotNegative = 0.0
    weights: list[Deviation]
    forbidden: NotNegative = 0.0
    local: _LocalScale | None = None
    groups: dict[str, _GroupScale] = {}
    unseen: _GroupScale = _GroupScale()

    @model_validator(mode="after")
    def _table(self) -> _KindCalibration:
        if EVERYTHING not in self.multipliers or any(len(row) != len(LEVELS) for row in self.multipliers.values()):
            raise ValueError(f"needs multipliers of '{EVERYTHING}', and {len(LEVELS)} of each group")
        if self.edges != sorted(self.edges) or len(self.weights) not in (0, 3):
            raise ValueError("edges must ascend, and weights be three or none")
        return self


class _Separation(_Section):
    begin: NotNegative
    full: NotNegative
    factors: dict[Kind, Annotated[float, Field(ge=1, le=1e9)]]
    structures: Count
    reach: Annotated[float, Field(gt=0, le=1e15)] | None = None
    prior: Deviation = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> _Separation:
        if self.begin > self.full:
            raise ValueError("begin must not be above full")
        return self


class _Calibration(_Section):
    levels: list[float]
    kinds: dict[Kind, _KindCalibration]
    source: _Source
    typical_novelty: Deviation | None = None
    spread: NotNegative | None = None
    posterior_scale: Deviation | None = None
    unsampled: NotNegative | None = None
    apart: _Separation | None = None

    @model_validator(mode="after")
    def _of_all_kinds(self) -> _Calibration:
        if missing := {"energies", "forces", "stresses"} - set(self.kinds):
            raise ValueError(f"lacks the {min(missing)}")
        return self


class _Block(_Section):
    species: Species
    centres: Count


class _Functionals(_Section):
    relative: Annotated[dict[Element, Deviation], Field(min_length=1)]


class _Variances(_Section):
    blocks: list[list[_Block | _Functionals]]
    signal: list[dict[Element, Deviation]]
    noise: dict[Kind, Deviation]
    label_noise: dict[Kind, NotNegative]
    of_fit: Count
    amplitude: NotNegative = 1.0
    shifts: Count | None = None
    reduced: dict[Element, list[Count]] = {}

    @model_validator(mode="after")
    def _have_signals(self) -> _Variances:
        for k, (blocks, signal) in enumerate(zip(self.blocks, self.signal, strict=True)):
            species = [z for b in blocks for z in (b.relative if isinstance(b, _Functionals) else [str(b.species)])]
            if lacking := [z for z in species if z not in signal]:
                raise ValueError(f"the signal of descriptor {k} lacks Z = {lacking[0]}")
        return self


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


class _Finding(_Section):
    kind: str
    severity: Severity
    message: str
    frames: list[str]
    numbers: dict[str, float]
    advice: str


class _VarianceSubset(_Section):
    """How variances from some columns compare with those from all: nothing, their numbers, or the comparison too."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, subset: Any) -> Any:
        subset = _all_or_none(subset, {"columns", "columns_of_fit"})
        compared = {"std_ratio_median", "std_ratio_low", "std_ratio_high", "covariance_error_scaled"}
        if isinstance(subset, dict) and any(type(value) not in (int, float) for value in subset.values()):
            raise ValueError("must hold numbers")
        return _all_or_none(subset, compared) if isinstance(subset, dict) and "covariance_error" in subset else subset


def _error_table(values: dict[str, float | None]) -> dict[str, float | None]:
    if values and values.keys() != {field.name for field in fields(ErrorTable)}:
        raise ValueError("is no table of errors")
    return values


class _LowRank(_Section):
    """What a mean of low rank changes."""

    rank: dict[str, Count]
    features: dict[str, Count]
    structures: Count
    change_of_forces_eV_per_A: NotNegative
    largest_change_of_forces_eV_per_A: NotNegative
    noise_of_forces_eV_per_A: Deviation

    @model_validator(mode="after")
    def _possible(self) -> _LowRank:
        if self.rank.keys() != self.features.keys() or any(n > self.features[label] for label, n in self.rank.items()):
            raise ValueError("rank must not be above features, of which there must be as many entries")
        return self


class _LocalVariance(_Section):
    """Variances of local energies of one species from fewer columns, and how standard deviations compare with those of all."""

    columns: Count
    columns_of_all: Count
    std_ratio_low: NotNegative
    std_ratio_median: NotNegative
    std_ratio_high: NotNegative
    std_ratio_low_moved: NotNegative
    std_ratio_median_moved: NotNegative
    std_ratio_high_moved: NotNegative


class _ChargesTold(_Section):
    sentence: str


class _Report(_Section):
    """Numbers of the fit that are shown; of a fit all of `OF_FIT`, of a model that learned label by label all of `LEARNED`."""

    rows: dict[str, Count] = {}
    independent_groups: Count = 0
    findings: list[_Finding] = []
    centres: dict[str, Count] = {}
    environments: dict[str, Count] = {}
    noise: dict[str, float] = {}
    label_noise: dict[str, float] = {}
    train_rmse: dict[str, float] = {}
    columns: Count = 0
    rank: Count = 0
    condition: float = 1.0
    jitter: float = 0.0
    drift: float = 0.0
    updates: Count = 0
    held_out: Count = 0
    events: list[str] = []
    variance_subset: _VarianceSubset | None = None
    local_variance: dict[str, _LocalVariance] | None = None
    low_rank: _LowRank | None = None
    charges: _ChargesTold | None = None
    validation_errors: Annotated[dict[str, float | None], AfterValidator(_error_table)] | None = None
    shortest: dict[str, float] = {}
    evidence_trace: list[list[float]] = []
    stages: list[Annotated[list[Any], AfterValidator(lambda stage: _stage(stage))]] = []
    warnings: list[str] = []
    choices: list[str] = []

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


class _Charges(_Section):
    kappa: Annotated[float, Field(ge=1e-2, le=1e4)] | None
    without_self: bool
    species: Annotated[list[Species], Field(min_length=1), AfterValidator(_sorted)]

    @model_validator(mode="after")
    def _of_family(self) -> _Charges:
        if self.kappa is None and self.without_self:
            raise ValueError("local charges have no self energy to leave out")
        return self


class ModelHeader(_Section):
    """Header of Potential.state()."""

    species: Annotated[list[Species], Field(min_length=1), AfterValidator(_sorted)]
    recipe: Annotated[dict[str, Any], AfterValidator(_complete)]
    noise: dict[Kind, Deviation]
    baselines: list[Annotated[_IsolatedAtoms | _ZBL | _Network | _Calculator | _R6 | _D3, Field(discriminator="name")]]
    provenance: _Provenance
    report: _Report
    calibration: _Calibration | None = None
    variances: _Variances | None = None
    novelty: _Novelty | None = None
    charges: _Charges | None = None

    @model_validator(mode="after")
    def _covers_species(self) -> ModelHeader:
        for name, n in Counter(baseline.name for baseline in self.baselines).items():
            if n > 1:
                raise ValueError(f"the baseline {name} is listed twice")
        for baseline in self.baselines:
            if isinstance(baseline, (_ZBL, _R6)):
                have = {(a, b) for a, b, *_ in baseline.pairs}
                lacking = [f"Z = {a}, {b}" for a in self.species for b in self.species if a <= b and (a, b) not in have]
            elif isinstance(baseline, _IsolatedAtoms):
                lacking = [f"Z = {z}" for z in self.species if str(z) not in baseline.energies]
            else:
                lacking = []
            if lacking:
                raise ValueError(f"the baseline {baseline.name} lacks {lacking[0]}")
        if self.charges is not None and self.charges.species != self.species:
            raise ValueError("the charges are of other species than the model")
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
