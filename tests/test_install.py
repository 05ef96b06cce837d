"""install.sh installs what changed and nothing else; setup.cfg and requirements.txt name what the package imports."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# a python that writes down how pip is called, and makes the command that the package brings; fails while there is a file `broken`
STUB = """#!/bin/sh
CORE="$VENV/lib/python3.11/site-packages/gpmlp/native"
case "$*" in
*pip*)
    echo "$@" >>calls
    [ ! -e broken ] || exit 1
    case "$*" in *"--no-deps .")
        touch "$VENV/bin/gpmlp"
        [ ! -e compiler ] || { mkdir -p "$CORE" && cp compiler "$CORE/_core_baseline.so"; } ;;
    esac ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A folder with install.sh, what it reads, and a virtual environment of which python is STUB."""
    for name in ("install.sh", "requirements.txt", "setup.py", "setup.cfg"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "gpmlp/report").mkdir(parents=True)
    (tmp_path / "gpmlp/units.py").write_text("ONE = 1\n")
    (tmp_path / "gpmlp/report/page.css").write_text("p {}\n")
    python = tmp_path / "environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB)
    python.chmod(0o755)
    return tmp_path


def installs(tree: Path, works: bool = True) -> list[str]:
    """What a run of install.sh gave to pip: 'packages' (of requirements.txt) and 'gpmlp', in their order."""
    (tree / "calls").unlink(missing_ok=True)
    command = ["sh", "-c", "set -eu; . ./install.sh"]
    done = subprocess.run(command, cwd=tree, env=os.environ | {"VENV": "environment"}, capture_output=True, text=True)
    assert (done.returncode == 0) == works, done.stderr
    calls = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    return ["packages" if "requirements.txt" in call else "gpmlp" for call in calls]


def test_nothing_is_installed_twice(tree):
    assert installs(tree) == ["packages", "gpmlp"]
    assert installs(tree) == []
    (tree / "gpmlp/__pycache__").mkdir()
    (tree / "gpmlp/__pycache__/units.cpython-311.pyc").write_text("compiled")
    assert installs(tree) == []


@pytest.mark.parametrize("changed", ["gpmlp/units.py", "gpmlp/report/page.css", "gpmlp/new.py", "setup.cfg"])
def test_changed_sources_bring_only_the_package(tree, changed):
    installs(tree)
    with open(tree / changed, "a") as file:
        file.write("# changed\n")
    assert installs(tree) == ["gpmlp"]
    assert installs(tree) == []
    (tree / "gpmlp/units.py").rename(tree / "gpmlp/measures.py")
    assert installs(tree) == ["gpmlp"]


def test_changed_requirements_bring_the_packages(tree):
    installs(tree)
    with open(tree / "requirements.txt", "a") as file:
        file.write("jinja2\n")
    assert installs(tree) == ["packages"]
    assert installs(tree) == []


def test_what_failed_is_tried_again(tree):
    (tree / "broken").touch()
    assert installs(tree, works=False) == ["packages"]
    (tree / "broken").unlink()
    assert installs(tree) == ["packages", "gpmlp"]
    before = (tree / "gpmlp/units.py").read_text()
    (tree / "gpmlp/units.py").write_text("ONE = 2\n")
    (tree / "broken").touch()
    assert installs(tree, works=False) == ["gpmlp"]
    (tree / "broken").unlink()
    (tree / "gpmlp/units.py").write_text(before)  # not the sources that the failed attempt left behind
    assert installs(tree) == ["gpmlp"]


def test_a_package_that_was_removed_is_installed_again(tree):
    installs(tree)
    (tree / "environment/bin/gpmlp").unlink()
    assert installs(tree) == ["gpmlp"]


def test_python_started_in_the_source_tree_has_the_compiled_core(tree):
    (tree / "gpmlp/native").mkdir()
    core = tree / "gpmlp/native/_core_baseline.so"
    (tree / "compiler").write_text("first")
    assert installs(tree) == ["packages", "gpmlp"] and core.read_text() == "first"
    loaded = core.stat().st_ino
    (tree / "compiler").write_text("second")
    (tree / "gpmlp/units.py").write_text("ONE = 2\n")
    with open(core) as held:  # as a process that has it loaded
        assert installs(tree) == ["gpmlp"] and core.read_text() == "second" and core.stat().st_ino != loaded
        assert held.read() == "first"


def test_no_suitable_python_is_said(tree):
    shutil.rmtree(tree / "environment")
    command = ["sh", "-c", "set -eu; . ./install.sh"]
    done = subprocess.run(
        command, cwd=tree, env=os.environ | {"VENV": "environment", "PYTHON": "false"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "gpmlp needs Python 3.11, 3.12 or 3.13" in done.stderr


def _setup() -> tuple[dict[str, Requirement], dict[str, Requirement]]:
    """What setup.cfg requires always, and with one extra or another."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")

    def listed(text: str) -> dict[str, Requirement]:
        found = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
        return {canonicalize_name(r.name): r for r in found}

    extras: dict[str, Requirement] = {}
    for text in config["options.extras_require"].values():
        extras |= listed(text)
    return listed(config["options"]["install_requires"]), extras


def test_every_requirement_is_pinned():
    """install.sh takes from requirements.txt all that gpmlp requires, with any extra: so each is there, in a version that suits."""
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    always, extras = _setup()
    for name, requirement in (always | extras).items():
        assert name in pins, f"requirements.txt has no {name}"
        for pin in pins[name]:
            (version,) = (s.version for s in pin.specifier)
            assert requirement.specifier.contains(version), f"{pin} does not suit setup.cfg: {requirement}"


def test_imports_and_requirements_are_the_same():
    """Each outside package that a module imports is required, by an extra at least; each that is always required is imported."""
    imported = set()
    for path in (ROOT / "gpmlp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "gpmlp"}
    brought = {
        name: {canonicalize_name(d) for d in owners} for name, owners in metadata.packages_distributions().items()
    }
    always, extras = _setup()
    by_calculators = {"gpaw", "triton"}  # used where they happen to be installed
    for name in imported - by_calculators:
        assert brought.get(name, {name}) & {*always, *extras}, f"{name} is imported, and not in setup.cfg"
    used = set().union(*(brought.get(name, {name}) for name in imported))
    idle = set(always) - used
    assert not idle, f"required by setup.cfg, and not imported: {sorted(idle)}"
