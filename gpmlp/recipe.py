"""Recipe of a potential: the validated choices of a fit; None = chosen from the data."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from gpmlp.core import errors

MEANS = ("exact", "low_rank")
LOCAL_VARIANCES = ("exact", "reduced")
SEVENNET = ("7net-0", "7net-l3i5")  # checkpoints that come with the package
SHORTEST, LONGEST = 0.5, 100.0  # A, that a cutoff can mean
WIDTHS = 0.05, 10.0  # A, of atoms: integrals of narrower ones take grids that fit no memory
R6_OFF = 2.0  # A, within which a dispersion tail goes to zero at its outer end
NARROWEST = 0.1  # A, of a switch: across a narrower one forces jump


def _within(low: float, high: float) -> AfterValidator:
    """Refuse positive numbers that are typing errors or would lose all digits."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"must be between {low:g} and {high:g}; got {value:g}")
        return value

    return AfterValidator(check)


Finite = Annotated[float, Field(allow_inf_nan=False), _within(-1e15, 1e15)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _within(1e-15, 1e15)]
Length = Annotated[float, Field(gt=0, allow_inf_nan=False), _within(NARROWEST, LONGEST)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False), _within(1e-9, 1e6)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _kind_of_device(name: str) -> str:
    """Refuse names of no device; whether this machine has it is checked where it is used, as a model may come from another."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(
            f"'{name}' is no device of gpmlp; torch has {', '.join(errors.available_devices())} on this machine"
        )
    return name


Device = Annotated[str, AfterValidator(_kind_of_device)]


def _only_evidence(name: object) -> object:
    """Refuse the evidence of older versions with a message of its own."""
    if name == "vfe":
        raise ValueError(
            "'vfe' is no longer offered: noises and signals maximise the evidence 'dtc'; leave `evidence` out"
        )
    return name


def _by_symbol(values: dict[str, Any]) -> dict[str, Any]:
    for name in values:
        errors.atomic_number(name)
    return values


def _not_empty(values: Collection) -> Collection:
    if not values:
        raise ValueError("must not be empty; leave the key out instead")
    return values


def _word_or_number(value: Any) -> str:
    return "word" if isinstance(value, str) and not value.isdigit() else "number"


def _plain(value: Any) -> Any:
    """Refuse what no file can hold."""
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must hold plain values (numbers, texts, lists, mappings): {error}") from error
    return value


def _without_nan(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse numbers with which no model file can be loaded again."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise ValueError("must not hold NaN or infinite numbers; leave them out, or write a large one") from error
    return value


PlainValues = Annotated[dict[str, Any], AfterValidator(_plain)]


def _section_if_true(value: Any) -> Any:
    """A section with its defaults where it is switched on."""
    return {} if value is True else value


T = TypeVar("T")
BySymbol = Annotated[dict[str, T], AfterValidator(_by_symbol)]
WordOrCount = Annotated[
    Annotated[Count, Tag("number")] | Annotated[Literal["all"], Tag("word")], Discriminator(_word_or_number)
]
Functionals = Annotated[
    Annotated[Count, Tag("number")] | Annotated[Literal["all", "auto", "none"], Tag("word")],
    Discriminator(_word_or_number),
]


class RecipeSection(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing in it changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false (in YAML also yes, no, on, off) where they would count as 1 and 0."""
        if _holds_bool(value) and not _takes_bool(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("must not be a truth value (true, false, yes, no, on, off)")
        return value


def _holds_bool(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return isinstance(value, bool) or any(map(_holds_bool, inside))


def _takes_bool(annotation: Any) -> bool:
    """Whether values of a type may hold a truth value; sections check their own."""
    section = isinstance(annotation, type) and issubclass(annotation, RecipeSection)
    return (
        annotation in (bool, Any)
        or isinstance(annotation, bool)
        or section
        or any(map(_takes_bool, get_args(annotation)))
    )


class RadialScaling(RecipeSection):
    """Neighbour weights 1 / (1 + (r / scale)^exponent); Willatt, Musil, Ceriotti, PCCP 20, 29661 (2018)."""

    scale: Length | None = None
    exponent: Annotated[float, Field(ge=0, le=20)] | None = None


class CompressionRecipe(RecipeSection):
    """Principal channels of the density, species and radial functions together, for each l: so many in place of all."""

    channels: Annotated[int, Field(ge=1, le=4096)] | None = None


class FourBodyRecipe(RecipeSection):
    """Four-body invariants beside the power spectrum: of so many principal channels, up to a degree, with a weight."""

    channels: Annotated[int, Field(ge=1, le=12)] = 5
    l_max: Annotated[int, Field(ge=2, le=8)] | None = None
    weight: Annotated[Positive, _within(1e-3, 1e3)] | None = 0.1


class NetworkName(RecipeSection):
    """A network: one of sevennet by its checkpoint, or one registered in Python (descriptors/networks.py). sha256: of its weights; a model
    keeps it, and none but these are taken for it."""

    name: Literal["sevennet", "network"]
    checkpoint: Annotated[str, Field(min_length=1, max_length=100)] = "7net-l3i5"
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> NetworkName:
        if self.name == "sevennet" and self.checkpoint not in SEVENNET:
            raise ValueError(
                f"checkpoint '{self.checkpoint}' is none of {', '.join(SEVENNET)}, whose weights come with the package sevenn; files are "
                "not read: register_network makes other networks known in Python"
            )
        return self


class NetworkRecipe(NetworkName):
    """Scalars of a network's layers as features, on so many principal components; weight: against the features that they stand beside."""

    layers: Annotated[tuple[Count, ...], AfterValidator(_not_empty)] | None = None
    weight: Annotated[Positive, _within(1e-3, 1e3)] | None = None
    components: Annotated[int, Field(ge=1, le=4096)] = 128

    @property
    def cutoff(self) -> None:
        """None: features are of whole structures."""
        return None

    @property
    def four_body(self) -> Literal[False]:
        """There is no density to make them of."""
        return False


class DescriptorRecipe(RecipeSection):
    """One descriptor; lengths in A. four_body: 'auto' where the evidence asks for them, which a fit does that is not told. beside: features
    of a network beside its own, as one descriptor."""

    name: Literal["soap", "dscribe-soap", "dscribe-acsf"] = "soap"
    cutoff: Annotated[Positive, _within(SHORTEST, LONGEST)] | None = None
    n_max: Annotated[int, Field(ge=1, le=40)] | None = None
    l_max: Annotated[int, Field(ge=0, le=20)] | None = None
    sigma_atom: Annotated[Positive, _within(*WIDTHS)] | None = None
    basis: Literal["optimal", "gto"] | None = None
    radial_scaling: RadialScaling | Literal[False] = RadialScaling()
    cutoff_function: Literal["smoothstep", "poly", "none"] = "smoothstep"
    cutoff_width: Length | None = None
    cutoff_exponent: Annotated[float, Field(ge=2, le=10)] = 2.0
    central_weight: Annotated[float, Field(ge=0, le=1e4)] = 1.0
    shortest: Length | None = None
    compression: Annotated[CompressionRecipe | Literal[False], BeforeValidator(_section_if_true)] = False
    four_body: Annotated[FourBodyRecipe | Literal["auto", False] | None, BeforeValidator(_section_if_true)] = None
    beside: NetworkRecipe | Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> DescriptorRecipe:
        if self.four_body and self.name != "soap":
            raise ValueError(f"four_body needs the descriptor soap; {self.name} has no density to take channels from")
        if self.compression and self.name != "soap":
            raise ValueError(f"compression needs the descriptor soap; {self.name} has no density to compress")
        given = self.four_body if isinstance(self.four_body, FourBodyRecipe) else None
        if given and self.l_max is not None and (given.l_max or 2) > self.l_max:
            raise ValueError(
                f"four_body.l_max must be 2 or more, and not above the l_max of the descriptor, {self.l_max}"
            )
        for name in ("cutoff_width", "shortest"):
            value = getattr(self, name)
            if self.cutoff is not None and value is not None and value > self.cutoff:
                raise ValueError(f"{name} {value} A is larger than the cutoff {self.cutoff} A")
        return self


def _network_or_local(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return "NetworkRecipe" if name in ("sevennet", "network") else "DescriptorRecipe"


AnyDescriptor = Annotated[
    Annotated[DescriptorRecipe, Tag("DescriptorRecipe")] | Annotated[NetworkRecipe, Tag("NetworkRecipe")],
    Discriminator(_network_or_local),
]


def _join_networks(value: Any) -> Any:
    """A network with a weight that is listed after a local descriptor stands beside that, unless `beside` says what does: so it is in
    recipes that leave nothing open, which have to mean the same again."""
    if not isinstance(value, (list, tuple)):
        return value
    out: list[Any] = []
    for entry in value:
        before = out[-1] if out else None
        weighted = isinstance(entry, dict) and entry.get("weight") is not None
        if (
            weighted
            and isinstance(before, dict)
            and _network_or_local(entry) == "NetworkRecipe"
            and "beside" not in before
        ):
            if _network_or_local(before) == "DescriptorRecipe":
                out[-1] = before | {"beside": entry}
                continue
        out.append(entry)
    return out


class KernelRecipe(RecipeSection):
    """A zonal kernel f(x.x'): polynomial (x.x')^zeta, exponential exp((x.x' - 1)/length^2), or a sum of weighted terms."""

    name: Literal["polynomial", "exponential", "sum"] = "polynomial"
    zeta: Annotated[int, Field(ge=1, le=16)] | None = None
    length: Annotated[Positive, _within(1e-3, 1e3)] | None = None
    weight: Annotated[Positive, _within(1e-6, 1e6)] = 1.0
    terms: tuple[KernelRecipe, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> KernelRecipe:
        if (self.name == "sum") != bool(self.terms):
            raise ValueError("`terms` lists the kernels of name: sum, and only of it")
        return self


class InducingRecipe(RecipeSection):
    """Inducing variables: n centres of each descriptor, each with its value and up to `gradients` directional derivatives; or functionals
    of the data themselves (energies, internal forces, stresses), 'all' or those of as many structures at random as have that number. With
    all of them the centres are for variances. 'auto': all where they pay and can be had, else none; so does a fit that is told nothing of
    inducing variables."""

    method: Literal["greedy", "farthest", "cur", "random"] = "greedy"
    n: Count | None = None
    gradients: Annotated[int, Field(ge=0, le=300)] | None = None
    shares: Literal["species", "total"] | Annotated[BySymbol[Count], AfterValidator(_not_empty)] = "species"
    functionals: Functionals | None = None

    @model_validator(mode="after")
    def _consistent(self) -> InducingRecipe:
        if self.functionals not in (None, "none", "all") and (
            others := {"n", "gradients", "shares", "method"} & self.model_fields_set
        ):
            given = next(
                (name for name in sorted(others) if getattr(self, name) != InducingRecipe.model_fields[name].default),
                "",
            )
            if given:
                raise ValueError(f"`functionals` take the place of centres: leave `{given}` out")
        return self


class PriorRecipe(RecipeSection):
    """A log-normal prior: 68 % of it lie between median / factor and median * factor."""

    median: Deviation
    factor: Annotated[Finite, Field(gt=1)]


def _bounds(value: Any) -> Any:
    """Refuse all but a pair of a lower and a higher positive number."""
    numbers = isinstance(value, (list, tuple)) and len(value) == 2 and not any(isinstance(v, bool) for v in value)
    try:
        low, high = (float(v) for v in value) if numbers else (0.0, 0.0)
    except (TypeError, ValueError):
        low = high = 0.0
    if not 0 < low < high <= 1e15:
        raise ValueError(
            f"must be [lowest, highest], two positive numbers, the smaller one first; got {reprlib.repr(value)}"
        )
    return low, high


class LearnedRecipe(RecipeSection):
    """A standard deviation to be learned, in the unit of its key: start of the optimisation, prior, bounds."""

    start: Deviation | None = None
    prior: PriorRecipe | None = None
    bounds: Annotated[tuple[float, float], BeforeValidator(_bounds)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> LearnedRecipe:
        for name, value in (("start", self.start), ("prior.median", self.prior and self.prior.median)):
            if value and self.bounds and not self.bounds[0] <= value <= self.bounds[1]:
                low, high = self.bounds
                raise ValueError(f"{name} {value:g} lies outside the bounds, {low:g} to {high:g}")
        return self


def _tag(value: Any) -> str:
    return "LearnedRecipe" if isinstance(value, (dict, LearnedRecipe)) else "number"


# a number is fixed, a section is learned; a tag chosen by type, so that a mistake gives the message of one of them only
Std = Annotated[
    Annotated[Deviation, Tag("number")] | Annotated[LearnedRecipe, Tag("LearnedRecipe")], Discriminator(_tag)
]


Signal = BySymbol[Std]


class NoiseRecipe(RecipeSection):
    """Standard deviations: energy_per_atom eV/atom, force eV/A, stress eV/A^3; learned by evidence where None."""

    energy_per_atom: Std | None = None
    force: Std | None = None
    stress: Std | None = None
    config_types: dict[str, NoiseOverride] = {}


class NoiseOverride(RecipeSection):
    """Standard deviations for the structures of one config_type; where None, the common ones."""

    energy_per_atom: Deviation | None = None
    force: Deviation | None = None
    stress: Deviation | None = None


class ZBLRecipe(RecipeSection):
    """Screened nuclear repulsion, switched off smoothly between inner and outer (A)."""

    inner: Positive | None = None
    outer: Length | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ZBLRecipe:
        if self.inner is not None and self.outer is not None and self.outer - self.inner < NARROWEST:
            raise ValueError(
                f"outer {self.outer:g} A must be larger than inner {self.inner:g} A by {NARROWEST:g} A or more"
            )
        return self


class CalculatorRecipe(RecipeSection):
    """An ASE calculator: a ready-made name, or 'module:Class'. reuse: whether one serves all structures, where making it takes long."""

    name: str
    kwargs: Annotated[PlainValues, AfterValidator(_without_nan)] = {}
    reuse: bool = False


class BaselineRecipe(RecipeSection):
    """Energy terms that are added, not learned. isolated_atoms: 'auto' (from frames with config_type=isolated_atom if there are any,
    else least squares over compositions), 'least_squares', 'none', or energies in eV by chemical symbol. network, calculator: what they
    say of whole structures."""

    isolated_atoms: Literal["auto", "least_squares", "none"] | BySymbol[Finite] = "auto"
    zbl: ZBLRecipe | Literal[False] = ZBLRecipe()
    network: NetworkName | Literal[False] = False
    calculator: CalculatorRecipe | Literal[False] = False


def _by_pair(values: dict[str, Any]) -> dict[str, Any]:
    seen = set()
    for name in values:
        for symbol in (pair := name.split("-")):
            errors.atomic_number(symbol)
        if len(pair) != 2:
            raise ValueError(f"'{name}' is no pair of elements, as C-H")
        if frozenset(pair) in seen:
            raise ValueError(f"{name} is given twice")
        seen.add(frozenset(pair))
    return values


class R6Recipe(RecipeSection):
    """A tail -C6/r^6 between elements, switched on from `begin` to `full` and off at `outer` (A). c6: of free atoms, learned from the
    labels, or in eV A^6 by pair ('C-H')."""

    outer: Length = 25.0
    begin: Length | None = None
    full: Length | None = None
    c6: (
        Literal["free_atoms", "learned"]
        | Annotated[dict[str, Annotated[float, Field(ge=0, le=1e6)]], AfterValidator(_by_pair)]
    ) = "free_atoms"

    @model_validator(mode="after")
    def _consistent(self) -> R6Recipe:
        known = [value for value in (self.begin, self.full, self.outer - R6_OFF) if value is not None]
        for low, high in pairwise(known):
            if high - low < NARROWEST:
                raise ValueError(
                    f"begin, full and outer - {R6_OFF:g} A, where the tail begins to go to zero, must grow by {NARROWEST:g} A or more: "
                    f"{low:g} A comes before {high:g} A"
                )
        return self


class D3Recipe(RecipeSection):
    """DFT-D3 with the parameters of a functional, as dftd3 calls it; atm: with the three-body term."""

    functional: Annotated[str, Field(min_length=1, max_length=100)]
    damping: Literal["bj", "zero", "bjm", "zerom", "op"] = "bj"
    atm: bool = False


class DispersionRecipe(RecipeSection):
    """What is subtracted from the labels and added at prediction: one of both."""

    r6: Annotated[R6Recipe | Literal[False], BeforeValidator(_section_if_true)] = False
    d3: D3Recipe | Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> DispersionRecipe:
        if bool(self.r6) == bool(self.d3):
            raise ValueError("give one of r6 and d3, or dispersion: false")
        return self


class VarianceRecipe(RecipeSection):
    """Posterior for variances: of at most `columns` inducing variables, the most important ones, or of all. local: whether those of local
    energies, for dynamics, are of all of these or of as few as come near."""

    columns: WordOrCount | None = None
    local: Literal["exact", "reduced"] = "exact"

    def at_most(self, columns: int) -> int:
        """How many of so many inducing variables variances are computed from."""
        return columns if self.columns in (None, "all") else min(columns, int(self.columns))


class CalibrationRecipe(RecipeSection):
    """Held-out data for the calibration of variances: a fraction of the structures, with at most about so many atoms."""

    fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    atoms: Count = 1000


class NoveltyRecipe(RecipeSection):
    """Mahalanobis distances from at most `samples` environments per species; threshold at this quantile of environments left out."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.99
    samples: Annotated[Count, Field(ge=10)] = 2000


class LongRangeRecipe(RecipeSection):
    """Interactions beyond the cutoff. charges: 'off'; 'local' or 'polarisable' ones (kappa: how stiff, by evidence where None); 'auto':
    tried where the data ask for them, kept where the evidence rises; None: 'auto' of molecules that need them, else 'off'. labels: of
    charges and dipoles: left aside, learned from beside energies and forces, or alone. dispersion: subtracted, and added again."""

    charges: Annotated[
        Literal["auto", "off", "local", "polarisable", False] | None,
        AfterValidator(lambda v: "off" if v is False else v),
    ] = None
    kappa: Annotated[Positive, _within(0.01, 1e4)] | None = None
    labels: Literal["ignore", "use", "only"] = "ignore"
    dispersion: DispersionRecipe | Literal[False] = False

    @model_validator(mode="after")
    def _consistent(self) -> LongRangeRecipe:
        if self.labels != "ignore" and self.charges in (None, "off"):
            raise ValueError(f"labels: {self.labels} has no meaning where charges are off")
        if self.kappa is not None and self.charges != "polarisable":
            raise ValueError("kappa is the stiffness of polarisable charges: set charges: polarisable, or leave it out")
        return self


class Recipe(RecipeSection):
    """All choices of a fit. signal: standard deviations of local energies by chemical symbol, eV, learned where left out; mean: how the
    posterior mean is evaluated where the kernel is quadratic; memory_GB: bound on the factors of the fit."""

    descriptor: Annotated[AnyDescriptor | tuple[AnyDescriptor, ...], BeforeValidator(_join_networks)] = (
        DescriptorRecipe()
    )
    kernel: KernelRecipe | tuple[KernelRecipe, ...] = KernelRecipe()
    inducing: InducingRecipe | tuple[InducingRecipe, ...] = InducingRecipe()
    noise: NoiseRecipe = NoiseRecipe()
    signal: Signal | tuple[Signal, ...] = {}
    baseline: BaselineRecipe = BaselineRecipe()
    evidence: Annotated[Literal["dtc"], BeforeValidator(_only_evidence)] = "dtc"  # a key of older recipes and runs
    variance: VarianceRecipe | Literal[False] = VarianceRecipe()
    calibration: CalibrationRecipe | Literal[False] = CalibrationRecipe()
    novelty: NoveltyRecipe | Literal[False] = NoveltyRecipe()
    mean: Literal["exact", "low_rank"] = "low_rank"
    use_energies: bool = True
    use_forces: bool = True
    use_stresses: bool = True
    robust: bool = False
    long_range: LongRangeRecipe = LongRangeRecipe()
    memory_GB: Positive | None = None
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Literal["float64", "float32"] = "float64"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        n = len(self.descriptors)
        if not n:
            raise ValueError("`descriptor` must not be empty; leave the key out instead")
        for name in ("kernel", "inducing", "signal"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n:
                raise ValueError(f"`{name}` lists {len(value)} entries for {n} descriptors; give one, or one for each")
        if not (self.use_energies or self.use_forces or self.use_stresses):
            raise ValueError("nothing to learn from: use_energies, use_forces and use_stresses are all false")
        return self

    @classmethod
    def from_header(cls, stored: dict[str, Any]) -> Recipe:
        """The recipe in the header of a model file, whose evidence may be one that is no longer offered: a model does not need it."""
        return cls.model_validate({"mean": "exact"} | stored | {"evidence": "dtc"})

    @property
    def descriptors(self) -> tuple[DescriptorRecipe | NetworkRecipe, ...]:
        return self.descriptor if isinstance(self.descriptor, tuple) else (self.descriptor,)

    @property
    def kernels(self) -> tuple[KernelRecipe, ...]:
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel,) * len(self.descriptors)

    @property
    def inducings(self) -> tuple[InducingRecipe, ...]:
        return self.inducing if isinstance(self.inducing, tuple) else (self.inducing,) * len(self.descriptors)

    @property
    def signals(self) -> tuple[dict[str, float | LearnedRecipe], ...]:
        return self.signal if isinstance(self.signal, tuple) else (self.signal,) * len(self.descriptors)


KernelRecipe.model_rebuild()
NoiseRecipe.model_rebuild()
Recipe.model_rebuild()
