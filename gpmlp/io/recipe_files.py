"""Recipe files: YAML and --set overrides to a validated Recipe and back; errors name the key and the nearest valid one."""

from __future__ import annotations

import os
import reprlib
import typing
from collections.abc import Hashable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gpmlp.core import errors
from gpmlp.core.errors import UserError, suggest_name
from gpmlp.io.files import atomic_write, check_readable
from gpmlp.recipe import Recipe

T = TypeVar("T", bound=BaseModel)
LARGEST = 1 << 20  # bytes of a recipe
DEEPEST, MOST_SECTIONS = 20, 2000  # of a recipe with all aliases written out
MERGE = "tag:yaml.org,2002:merge"


def load_recipe(path: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides like ``kernel.zeta=2`` or ``descriptor.0.cutoff=5``.

    Args:
        path: YAML file; None for the default recipe.
        overrides: KEY=VALUE with dotted keys, numbers for places in a list; values are read as YAML.

    Raises:
        UserError: the file cannot be read, a key or a value in it is not valid, or this machine has no such device.
    """
    recipe = load_recipe_as(Recipe, path, overrides)
    errors.check_device(recipe.device)
    return recipe


def load_recipe_as(
    model: type[T], path: str | os.PathLike[str] | None, overrides: Sequence[str] = (), section: str = ""
) -> T:
    """Read a recipe of another kind in the same way.

    Args:
        section: of a larger recipe, to be read alone where the file has it.
    """
    data = _read(Path(path)) if path is not None else {}
    data = data.get(section, data) if isinstance(data.get(section), dict) else data
    data = parse_settings(overrides, data)
    places = ([str(path)] if path is not None else []) + (["--set"] if overrides else [])
    return validate_as(model, data, " and ".join(places) or "recipe")


def sections_of(path: Path, overrides: Sequence[str]) -> tuple[str, ...]:
    """Keys of a recipe file with its overrides. Raises UserError: the file cannot be read."""
    return tuple(str(key) for key in parse_settings(overrides, _read(path)))


def parse_settings(overrides: Sequence[str], data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Nested dictionaries with KEY=VALUE put into them, as --set does."""
    data = {} if data is None else data
    for override in overrides:
        _set(data, override)
    return data


def validate_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe that nested dictionaries describe; `where` names the source in messages."""
    return validate_as(Recipe, data, where)


def validate_as(model: type[T], data: dict[str, Any], where: str = "recipe") -> T:
    """Return the recipe of another kind that nested dictionaries describe."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error, data, model)}") from error


def changed_recipe(recipe: Recipe, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Return the recipe with other values at dotted keys, e.g. {'kernel.zeta': 2}.

    Args:
        where: name of the source, for messages.
    """
    data = _plain(recipe.model_dump())
    for key, value in values.items():
        _put(data, key, value, where)
    return validate_recipe(data, where)


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a recipe at a dotted key; None where the key leads nowhere."""
    value: Any = _plain(recipe.model_dump())
    for step in key.split("."):
        if isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def save_recipe(recipe: Recipe, path: str | os.PathLike[str], comment: Sequence[str] = ()) -> None:
    """Write a recipe to a YAML file under lines of comment; what it leaves open is left out."""
    lines = [f"# {' '.join(line.split())}".rstrip() for line in comment]
    text = yaml.safe_dump(_given(_plain(recipe.model_dump())), sort_keys=False, allow_unicode=True)
    with atomic_write(path, text=True) as file:
        file.write("\n".join([*lines, text]))


def _plain(value: Any) -> Any:
    """The same value with lists for tuples."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _given(value: Any) -> Any:
    """The same value without what is None or, in a section, empty."""
    if isinstance(value, dict):
        inner = {key: _given(entry) for key, entry in value.items() if entry is not None}
        return {key: entry for key, entry in inner.items() if entry not in ({}, [])}
    return [_given(entry) for entry in value] if isinstance(value, list) else value


class _Loader(yaml.SafeLoader):
    """YAML in which a key may be given only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            problem = "" if isinstance(key, (str, int, float)) else f"a key must be a word; got {reprlib.repr(key)}"
            if problem or key in keys:
                problem = problem or f"the key '{key}' is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def parse_value(text: str, where: str) -> Any:
    """Read one value as YAML, as --set does."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - derived from SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}: is not valid YAML{place}: {problem}.") from error
    except RecursionError as error:
        raise UserError(f"{where}: is nested too deeply for a recipe.") from error
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, the 99th of a month
        raise UserError(f"{where}: holds a value that is none: {error}.") from error
    _check_size(value, where)
    return value


def _check_size(value: Any, where: str) -> None:
    """Raise UserError for what is nested too deeply, or grows without end once its aliases (&a, *a) are written out."""
    sections, level = 0, [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        inside = (v for section in level for v in (section.values() if isinstance(section, dict) else section))
        level = list(islice((v for v in inside if isinstance(v, (dict, list))), MOST_SECTIONS))
        sections += len(level)
        if not level or sections >= MOST_SECTIONS:
            break
    if level:
        raise UserError(f"{where}: is nested too deeply, or repeats itself too often (&a, *a), for a recipe.")


def _read(path: Path) -> dict[str, Any]:
    if path.exists():
        check_readable(path, "a recipe")
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path}: is no recipe: it has more than {LARGEST >> 20} MB.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the recipe cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    data = parse_value(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values; got {type(data).__name__}.")
    return data


def _set(data: dict[str, Any], override: str) -> None:
    """Put one KEY=VALUE into nested dictionaries and lists, creating them as needed."""
    key, sign, text = override.partition("=")
    steps = key.strip().split(".")
    if not sign or not all(steps) or steps[0].isdigit():
        raise UserError(f"--set {override}: must look like KEY=VALUE with a dotted key, e.g. --set kernel.zeta=2.")
    _put(data, key.strip(), parse_value(text, f"--set {override}"), f"--set {override}")


def _put(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Put a value at a dotted key into nested dictionaries and lists, creating them as needed."""
    steps = key.split(".")
    holder: Any = {"": data}
    place: str | int = ""
    for step in steps:
        inner = holder[place]
        if step.isdigit():
            if not isinstance(inner, list):
                # a single section is a list of one
                inner = [inner] if isinstance(inner, dict) and inner else []
            if int(step) > len(inner):
                raise UserError(f"{where}: there are only {len(inner)} entries before place {step}.")
            inner += [{}] * (int(step) == len(inner))
            holder[place], holder, place = inner, inner, int(step)
        else:
            if isinstance(inner, list):
                raise UserError(f"{where}: a list stands before '{step}'; number the entry, e.g. {steps[0]}.0.{step}.")
            if not isinstance(inner, dict):
                inner = {}
            inner.setdefault(step, {})
            holder[place], holder, place = inner, inner, step
    holder[place] = value


def _explain(error: ValidationError, data: Any, model: type[BaseModel]) -> str:
    """Turn pydantic's list of errors, one for each branch of each union, into one sentence about one key."""
    located = [(*_locate(entry["loc"], data, entry["type"]), entry) for entry in error.errors()]
    # errors of branches that suit the value, then of the deepest place: a typo is found before its consequences
    path, _, first = min(located, key=lambda item: (not item[1], item[2]["type"] != "extra_forbidden"))
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key '{dotted}'.{_nearest(path, model, first['loc'])}"
    if first["type"] == "invalid_key":
        return f"a key must be a word; got {dotted or reprlib.repr(first['input'])}."
    if first["type"] == "missing":
        return f"`{dotted}` is missing and has to be given."
    if first["type"] == "value_error":
        text = str(first["ctx"]["error"]).removesuffix(".")
        return f"`{dotted}` {text}." if text.startswith("must be ") else f"{dotted}: {text}." if dotted else f"{text}."
    same = [entry for other, _, entry in located if other == path]
    # what is wrong with a list first: typing caches unions, so that `A | B` may be the `B | A` of another annotation
    same.sort(key=lambda entry: entry["type"] not in ("too_long", "too_short"))
    required = " or ".join(dict.fromkeys(_required(entry) for entry in same))
    names = [name for entry in same if entry["type"] == "literal_error" for name in _words(entry["ctx"]["expected"])]
    hint = suggest_name(first["input"], names) if names and isinstance(first["input"], str) else ""
    return f"`{dotted}` must be {required}; got {reprlib.repr(first['input'])}.{hint if 'Perhaps' in hint else ''}"


def _locate(location: tuple[int | str, ...], data: Any, kind: str) -> tuple[tuple[str, ...], bool]:
    """Split a pydantic location into the dotted key, and whether its union branches suit the value."""
    path: list[str] = []
    suits, value = True, data
    for k, step in enumerate(location):
        last = k == len(location) - 1
        if isinstance(value, dict) and step in value:
            path, value = [*path, str(step)], value[step]
        elif isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value):
            path, value = [*path, str(step)], value[step]
        elif last and kind == "missing":
            path = [*path, str(step)]
        else:
            suits = suits and _branch_suits(str(step), value)
    return tuple(path), suits


def _branch_suits(branch: str, value: Any) -> bool:
    if branch.startswith("tuple"):
        return isinstance(value, (list, tuple))
    if (
        "dict[" in branch
        or branch.rstrip("]").endswith("Recipe")
        or branch == "RadialScaling"
        or branch == "NoiseOverride"
    ):
        return isinstance(value, dict)
    return not isinstance(value, (dict, list, tuple))


def _required(entry: Mapping[str, Any]) -> str:
    """The requirement of pydantic, as the end of "must be ..."."""
    context = entry.get("ctx", {})
    if entry["type"] == "literal_error":
        return context["expected"]
    for key, words in (("gt", "greater than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most")):
        if key in context:
            return f"{words} {context[key]:{'d' if isinstance(context[key], int) else 'g'}}"
    if entry["type"] in ("model_type", "dict_type"):
        return "a mapping of keys to values"
    if entry["type"] == "tuple_type":
        return "a list of such"
    if entry["type"] in ("too_long", "too_short"):
        return f"a list of {context.get('max_length', context.get('min_length'))} values"
    return entry["msg"].removeprefix("Input should be ").split(", unable")[0]


def _words(expected: str) -> list[str]:
    return [word.strip("' ") for word in expected.replace(" or ", ",").split(",") if word.strip("' ")]


def _nearest(path: tuple[str, ...], model: type[BaseModel], branches: tuple[int | str, ...]) -> str:
    """Suggest the same key in another section; else the nearest key of the section, which is the one of pydantic's branches; else list
    the section's keys."""
    *section, key = path
    elsewhere = {name.rsplit(".", 1)[-1]: name for name in reversed(_all_keys(model))}
    here = [".".join([*section, name]) for name in _keys(tuple(section), model, branches)]
    if elsewhere.get(key) == ".".join(step for step in path if not step.isdigit()):  # of another kind of this section
        return f" Valid names: {', '.join(here)}."
    if key in elsewhere:
        return f" Perhaps you meant '{elsewhere[key]}'."
    local = suggest_name(key, [name.rsplit(".", 1)[-1] for name in here])
    if "Perhaps" in local:
        prefix = "".join(step + "." for step in section)
        return local.replace("meant '", f"meant '{prefix}")
    return suggest_name(".".join(path), here)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Sections that an annotation allows, through unions, tuples and dictionaries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _keys(section: tuple[str, ...], model: type[BaseModel], branches: tuple[int | str, ...]) -> list[str]:
    """Valid keys of a section."""
    for step in section:
        # places in lists and free names (config types) stay with the section they belong to
        if step in model.model_fields:
            inner = _models(model.model_fields[step].annotation)
            model = next((one for one in inner if one.__name__ in branches), inner[0] if inner else model)
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], prefix: str = "", depth: int = 0) -> list[str]:
    """All dotted keys, outer ones first; depth ends the recursion of kernels within kernels."""
    names = [prefix + name for name in model.model_fields]
    if depth < 3:
        for name, field in model.model_fields.items():
            for inner in _models(field.annotation)[:1]:
                names += _all_keys(inner, f"{prefix}{name}.", depth + 1)
    return names
