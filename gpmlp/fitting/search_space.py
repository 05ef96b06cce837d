"""Search space of tuning: the keys of a recipe that vary, between which values, and the next point to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpmlp.core.errors import UserError
from gpmlp.io import recipe_files
from gpmlp.recipe import KernelRecipe, NetworkRecipe, Recipe

DIGITS = 4  # of proposed numbers, so that recipes can be read
ATTEMPTS = (10, 500)  # proposals by TPE, then at random, for a point not tried yet
NOT_SEARCHED = {
    "inducing.n",
    "noise",
    "signal",
    "variance",
    "calibration",
    "novelty",
    "memory_GB",
    "seed",
    "device",
    "dtype",
}
OTHER_DATA = {"use_energies", "use_forces", "use_stresses", "evidence"}  # evidences would be of different things


@dataclass(frozen=True)
class SearchParameter:
    """A key of the recipe and what is tried for it: numbers from low to high, or one of `choices`."""

    key: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()
    integer: bool = False

    def __str__(self) -> str:
        values = ",".join(map(str, self.choices)) if self.choices else f"{self.low:.10g}:{self.high:.10g}"
        return f"{self.key}={values}"

    def contains(self, value: Any) -> bool:
        """Whether the value is one that may be tried."""
        if self.choices:
            return value in self.choices
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def rounded(self, value: Any) -> Any:
        """The value with few digits, still within the range."""
        if self.choices or self.integer:
            return value
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def parse_search(texts: Sequence[str], start: Recipe, objective: str = "likelihood") -> tuple[SearchParameter, ...]:
    """Read KEY=LOW:HIGH (numbers between; whole ones where the key takes only these) and KEY=a,b,c (one of these)."""
    out: dict[str, SearchParameter] = {}
    for text in texts:
        where = f"--search {text}"
        key, sign, values = (piece.strip() for piece in text.partition("="))
        if not sign or not values or not all(key.split(".")) or (":" in values and "," in values):
            raise UserError(
                f"{where}: must look like KEY=LOW:HIGH or KEY=a,b,c, e.g. descriptor.cutoff=4:6 or kernel.zeta=2,3,4."
            )
        if key in out:
            raise UserError(f"{where}: '{key}' is given twice.")
        steps = [step for step in key.split(".") if not step.isdigit()]
        named = {steps[0], ".".join(steps[:2])} if steps else set()
        if named & (NOT_SEARCHED | (OTHER_DATA if objective == "evidence" else set())):
            raise UserError(
                f"{where}: '{key}' cannot be searched: the fit chooses it itself, or trials would not be comparable."
            )
        out[key] = _range(key, values, where, start) if ":" in values else _choices(key, values, where, start)
    return tuple(out.values())


def _range(key: str, values: str, where: str, start: Recipe) -> SearchParameter:
    try:
        low, high = (float(v) for v in values.split(":"))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{where}: LOW and HIGH must be two numbers, the smaller one first; got '{values}'.")
    for value in (low, high):
        recipe_files.changed_recipe(start, {key: value}, where)
    integer = isinstance(recipe_files.value_at(recipe_files.changed_recipe(start, {key: low}), key), int)
    return SearchParameter(key, low, high, integer=integer)


def _choices(key: str, values: str, where: str, start: Recipe) -> SearchParameter:
    part = tuple(recipe_files.parse_value(v, where) for v in values.split(","))
    if len(part) < 2 or len({(type(v), str(v)) for v in part}) < len(part):
        raise UserError(f"{where}: needs two values or more, all different; use --set for one.")
    for value in part:
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{where}: each value must be a number, a word, true or false; got {value!r}.")
        recipe_files.changed_recipe(start, {key: value}, where)
    return SearchParameter(key, choices=part)


def default_space(full: Recipe) -> tuple[SearchParameter, ...]:
    """The default search around a resolved recipe."""
    out: list[SearchParameter] = []
    for d, prefix in zip(full.descriptors, _prefixes(full.descriptor, "descriptor"), strict=True):
        if isinstance(d, NetworkRecipe):
            continue
        cutoff, sigma, n_max, l_max = d.cutoff or 0.0, d.sigma_atom or 0.0, d.n_max or 0, d.l_max or 0
        out.append(_around(f"{prefix}.cutoff", cutoff, 0.75, 1.3))
        if d.name == "dscribe-acsf":
            continue
        out.append(SearchParameter(f"{prefix}.sigma_atom", min(0.2, sigma), max(0.6, sigma)))
        if d.radial_scaling is not False:
            scale, exponent = d.radial_scaling.scale or 0.0, d.radial_scaling.exponent or 0.0
            out.append(_around(f"{prefix}.radial_scaling.scale", scale, 0.5, 1.6))
            out.append(SearchParameter(f"{prefix}.radial_scaling.exponent", min(1.0, exponent), max(7.0, exponent)))
        out.append(SearchParameter(f"{prefix}.n_max", max(1, n_max - 4), min(40, n_max + 4), integer=True))
        out.append(SearchParameter(f"{prefix}.l_max", max(0, l_max - 3), min(20, l_max + 2), integer=True))
    kernels = full.kernel if isinstance(full.kernel, tuple) else (full.kernel,)
    for k, prefix in zip(kernels, _prefixes(full.kernel, "kernel"), strict=True):
        out += _of_kernel(k, prefix)
    return tuple(out)


def _of_kernel(kernel: KernelRecipe, prefix: str) -> list[SearchParameter]:
    if kernel.name == "exponential":
        return [_around(f"{prefix}.length", kernel.length or 0.0, 0.4, 2.5)]
    if kernel.name == "polynomial":
        return [SearchParameter(f"{prefix}.zeta", 1, max(5, kernel.zeta or 0), integer=True)]
    return [p for i, term in enumerate(kernel.terms) for p in _of_kernel(term, f"{prefix}.terms.{i}")]


def _around(key: str, value: float, low: float, high: float) -> SearchParameter:
    return SearchParameter(key, float(f"{low * value:.3g}"), float(f"{high * value:.3g}"))


def _prefixes(section: object, name: str) -> list[str]:
    """The dotted key of each section, whether there is one or a list."""
    return [f"{name}.{i}" for i in range(len(section))] if isinstance(section, tuple) else [name]


def propose(
    space: Sequence[SearchParameter], history: Sequence[tuple[Mapping[str, Any], float | None]], seed: int
) -> dict[str, Any] | None:
    """Values not tried yet, by the tree-structured Parzen estimator (Bergstra et al., NeurIPS 24 (2011)); None if there are none.

    A function of its arguments alone, without a state between two proposals.

    Args:
        history: (values, objective) of what was tried; larger is better, None failed: worse than all others.
    """
    optuna = load_optuna()
    distributions = {p.key: _distribution(p) for p in space}
    tried = {_point(values) for values, _ in history}
    earlier = [frozen_trial(space, *one) for one in history]
    with quiet_optuna():
        for k in range(sum(ATTEMPTS)):
            here = (1_000_003 * seed + 1009 * len(history) + k) % 2**32
            samplers = optuna.samplers
            sampler = (
                samplers.TPESampler(seed=here, multivariate=True) if k < ATTEMPTS[0] else samplers.RandomSampler(here)
            )
            study = optuna.create_study(sampler=sampler, direction="maximize")
            study.add_trials([t for t in earlier if t.params])
            asked = study.ask(distributions).params
            values = {p.key: p.rounded(asked[p.key]) for p in space}
            if _point(values) not in tried:
                return values
    return None


def frozen_trial(
    space: Sequence[SearchParameter],
    values: Mapping[str, Any],
    objective: float | None,
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """A finished trial for optuna; without parameters where the values, those of the start recipe, lie outside of the space."""
    optuna = load_optuna()
    inside = [p for p in space if all(q.contains(values.get(q.key)) for q in space)]
    return optuna.trial.create_trial(
        params={p.key: values[p.key] for p in inside},
        distributions={p.key: _distribution(p) for p in inside},
        value=objective,
        state=optuna.trial.TrialState.PRUNED if objective is None else optuna.trial.TrialState.COMPLETE,
        user_attrs=dict(attributes or {}),
    )


def load_optuna() -> Any:
    """The module optuna, an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("`gpmlp tune` needs optuna, which is not installed: pip install 'gpmlp[tune]'.") from error
    return optuna


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Without optuna's remarks about each study."""
    logging = load_optuna().logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _distribution(parameter: SearchParameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if parameter.integer:
        return IntDistribution(int(parameter.low), int(parameter.high))
    return FloatDistribution(parameter.low, parameter.high)


def _point(values: Mapping[str, Any]) -> tuple:
    return tuple(sorted((key, repr(value)) for key, value in values.items()))
