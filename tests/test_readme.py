"""The README does what it says: its Python blocks run, its commands exist; docs/recipe.md describes every key there is."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import gpmlp
from gpmlp.learning.recipe import LearnRecipe
from gpmlp.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """One after another in an empty folder that has only data/; each with names of its own, as a reader would paste them."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) == 3
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md python block {number}", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    # the cell edge that PBE gives silicon is 5.47 A; a small fit relaxes to within a few hundredths of it
    edges = [float(x) for x in re.search(r"\[(5\.\d+) +(5\.\d+) +(5\.\d+)\]", printed).groups()]
    assert edges == pytest.approx([5.47] * 3, abs=0.06)
    known, stretched = map(float, re.search(r"standard deviations tensor\(\[([\d.]+), ([\d.]+)\]", printed).groups())
    assert 0 < known < stretched
    # the model that the quickstart makes keeps its name
    assert [path.name for path in tmp_path.glob("*.gpmlp")] == ["small.gpmlp"]


def test_shell_commands_exist():
    """Scripts are there; sub-commands and options are known to the command line."""
    lines = [line.split() for block in blocks("sh") for line in block.splitlines() if line]
    assert lines
    helps: dict[str, str] = {}
    for words in lines:
        if words[0] == "sh":
            assert (ROOT / words[1]).is_file()
            continue
        if words[0] == "ase":
            continue
        assert words[0] == "gpmlp"
        if words[1] not in helps:
            command = [sys.executable, "-m", "gpmlp", words[1], "--help"]
            helps[words[1]] = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", helps[words[1]]), f"gpmlp {words[1]} has no {option}"


def _keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of the settings of a section and of those in it."""
    found = set()
    for name, field in model.model_fields.items():
        inner = _sections(field.annotation) - {model}
        found |= set.union(*(_keys(section, f"{prefix}{name}.") for section in inner)) if inner else {prefix + name}
    return found


def _sections(annotation: object) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {section for part in typing.get_args(annotation) for section in _sections(part)}


def test_every_recipe_key_is_described():
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    missing = sorted(key for key in _keys(Recipe) if f"`{key}`" not in text)
    assert not missing, f"docs/recipe.md says nothing of {missing}"


def _defaults(model: type[BaseModel], prefix: str = "") -> dict[str, object]:
    """Default of each setting that is a single value."""
    found: dict[str, object] = {}
    for name, field in model.model_fields.items():
        inner = _sections(field.annotation) - {model}
        for section in inner:
            found |= _defaults(section, f"{prefix}{name}.")
        if not inner:
            found[prefix + name] = field.default
    return found


def test_every_key_of_a_learning_run_is_described():
    """Those of `model` are in docs/recipe.md; numbers that stand for defaults are the defaults."""
    text = (ROOT / "docs/learning.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]* \| ([^|]*) \|", text, flags=re.MULTILINE))
    wanted = {key for key in _keys(LearnRecipe) if not key.startswith("model.")}
    assert not wanted - set(rows), f"docs/learning.md says nothing of {sorted(wanted - set(rows))}"
    assert not set(rows) - wanted, f"docs/learning.md tells of {sorted(set(rows) - wanted)}, which is not there"
    for key, default in _defaults(LearnRecipe).items():
        if key in wanted and isinstance(default, (int, float)) and not isinstance(default, bool):
            assert float(rows[key]) == default, f"docs/learning.md: {key} is {default} if left out, not {rows[key]}"
        elif key in wanted and isinstance(default, str):
            assert f"`{default}`" in rows[key], f"docs/learning.md: {key} is {default} if left out, not {rows[key]}"


def test_recipes_of_the_docs_are_valid():
    for page in ("learning", "oracles"):
        text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
        for block in re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            given = {"start": "start.xyz", "dynamics": {"temperature_K": 300}} if page == "oracles" else {}
            try:
                LearnRecipe.model_validate(given | yaml.safe_load(block))
            except ValueError as error:  # codes that are not installed here can be shown
                assert any(t in str(error) for t in ("is not installed", "No module", "cannot be imported")), block


def test_links_lead_somewhere():
    """Relative links of the README and the docs point to files that are there."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_python_interface_is_described():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    described = re.findall(r"auto(?:function|class):: (gpmlp\.[\w.]+)$", text, flags=re.MULTILINE)
    assert {name.removeprefix("gpmlp.") for name in described if name.count(".") == 1} == set(gpmlp.__all__)
    # the tables, which can be read without the site, have the same names in the same order, and arguments that there are
    rows = re.findall(r"^\| `(gpmlp\.[\w.]+)(?:\(([\w, ]*)\))?` \| .+\. \|$", text, flags=re.MULTILINE)
    assert [name for name, _ in rows] == described
    for name, arguments in rows:
        module, _, last = name.rpartition(".")
        if arguments and "torchsim" not in name:  # which not everybody has
            parameters = inspect.signature(getattr(importlib.import_module(module), last)).parameters
            assert [a for a in arguments.split(", ") if a not in parameters] == [], name
