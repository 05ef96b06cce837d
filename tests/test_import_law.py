"""The floors of the house: who may import whom, and what importing gpmlp may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpmlp

PACKAGE = Path(gpmlp.__file__).parent
# A module imports only from lower floors, or from its own folder: a folder stands for all that is in it, and modules at the top
# that share a floor may know each other, but not in a circle.
FLOORS = {
    "units": 1, "checks": 1, "versions": 1, "threads": 1, "pair_loops": 1,
    "structures": 2, "quantities": 2, "selection": 2,
    "cells": 3, "neighbors": 3, "padded": 3, "skin": 3, "uncertainty": 3,
    "environments": 4, "baselines": 4,
    "descriptors": 5, "gp": 5,
    "potential": 6, "recipe": 6, "consistency": 6, "defaults": 6, "inducing": 6,
    "terms": 6, "spread": 6, "variances": 6, "samples": 6, "held_out": 6, "left_out": 6, "regression": 6, "preparation": 6,
    "batches": 6, "growth": 6, "conditioning": 6, "foreseen": 6, "centres": 6, "stepping": 7, "portions": 6, "rescaling": 6,
    "hyperpriors": 6, "subset": 6, "local_variances": 6,
    "fit": 7, "online": 7, "fit_report": 6, "io": 7, "report": 7, "evaluation": 7, "references": 7, "picking": 7,
    "engines": 8, "reporting": 8, "search_space": 8, "tuning": 8,
    "active": 9,
    "cli": 10, "cli_md": 10, "cli_tune": 10, "cli_learn": 10, "console_learn": 10, "console": 10,
}  # fmt: skip
# External packages that only some parts may know
CONFINED = {
    "gpytorch": {"gp"},
    "linear_operator": {"gp"},
    "ase": {"io", "engines", "active", "cli"},
    "torch_sim": {"engines"},
    "dscribe": {"descriptors"},
    "sphericart": {"descriptors"},
    "numba": {"descriptors", "pair_loops", "gp"},
    "llvmlite": {"descriptors"},
    "triton": {"descriptors"},
    "vesin": {"neighbors"},
    "safetensors": {"io"},
    "yaml": {"io", "console"},
    "typer": {"cli", "cli_md", "cli_tune", "cli_learn"},
    "rich": {"console", "console_learn"},
    "optuna": {"search_space"},
    "matplotlib": {"report"},
    "plotly": {"report"},
}
FORBIDDEN = {"botorch", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))


def part(path: Path) -> str:
    """The folder of the package that a file is in, or its own name at the top."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            if node.module == "gpmlp":
                found += [(node.lineno, f"gpmlp.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_floors(path):
    own = part(path)
    assert own in FLOORS, f"{own} has no floor; give it one here and in docs/architecture.md"
    for line, name in imports(path):
        if name.startswith("gpmlp."):
            other = name.split(".")[1]
            assert other in FLOORS, f"{path}:{line}: {name} has no floor"
            neighbours = path.parent == PACKAGE and (PACKAGE / f"{other}.py").exists()
            allowed = other == own or FLOORS[other] < FLOORS[own] or (neighbours and FLOORS[other] == FLOORS[own])
            assert allowed, f"{path}:{line}: {own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_confined_and_forbidden_packages(path):
    for line, name in imports(path):
        package = name.split(".")[0]
        assert package not in FORBIDDEN, f"{path}:{line}: {package} is not used here"
        if package in CONFINED:
            assert part(path) in CONFINED[package], f"{path}:{line}: {package} is known only to {CONFINED[package]}"


def test_no_circles():
    known = {
        part(p): {n.split(".")[1] for _, n in imports(p) if n.startswith("gpmlp.")}
        for p in MODULES
        if p.parent == PACKAGE
    }
    remaining = dict(known)
    while remaining:
        free = [name for name, others in remaining.items() if not (others - {name}) & set(remaining)]
        assert free, f"these import each other: {sorted(remaining)}"
        for name in free:
            del remaining[name]


def test_descriptors_and_gp_do_not_know_each_other():
    for path in MODULES:
        for other in {"descriptors": "gp", "gp": "descriptors"}.get(part(path), "").split():
            assert not any(name.startswith(f"gpmlp.{other}") for _, name in imports(path)), path


MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "defaultdict", "OrderedDict", "Counter", "deque", "bytearray"}


def assigned(statement: ast.stmt) -> tuple[list[str], ast.expr | None]:
    if isinstance(statement, ast.Assign):
        return [t.id for t in statement.targets if isinstance(t, ast.Name)], statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return [statement.target.id], statement.value
    return [], None


@pytest.mark.parametrize("path", MODULES + [PACKAGE / "__init__.py"], ids=identify)
def test_no_mutable_module_state(path):
    tree = ast.parse(path.read_text())
    for statement in tree.body:
        names, value = assigned(statement)
        made = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in MAKERS
        if isinstance(value, MUTABLE) or made:
            for name in names:
                constant = name.strip("_").isupper() or name == "__all__"
                assert constant, f"{path}:{statement.lineno}: {name} is mutable state of the module"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}: global"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_no_unseeded_randomness(path):
    """torch.rand... needs a generator, numpy only default_rng(seed), and the random module is not used."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        called = ast.unparse(node.func)
        if "(" in called:
            continue
        if called.startswith("torch.rand") or called in ("torch.normal", "torch.multinomial"):
            assert any(k.arg == "generator" for k in node.keywords), (
                f"{path}:{node.lineno}: {called} without a generator"
            )
        if called.startswith(("np.random.", "numpy.random.")):
            assert called.endswith(".default_rng") and node.args, f"{path}:{node.lineno}: {called} is not seeded"
        assert called not in ("torch.manual_seed", "torch.set_default_dtype", "torch.set_num_threads"), (
            f"{path}: {called}"
        )
    assert not any(name == "random" for _, name in imports(path)), path


@pytest.mark.parametrize("path", MODULES + [PACKAGE / "__init__.py"], ids=identify)
def test_first_sentence_says_what_the_module_is(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text and text.splitlines()[0].strip(), f"{path} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_small(path):
    tree = ast.parse(path.read_text())
    assert len(path.read_text().splitlines()) <= 420, f"{path} is too long"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.body[0].lineno + 1
            assert length <= 65, f"{path}:{node.lineno}: {node.name} has {length} lines"


PROBE = """
import logging, random, sys, warnings
import numpy, torch
def state():
    return (
        torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), list(warnings.filters), warnings.showwarning,
        list(logging.getLogger().handlers), logging.getLogger().level, random.getstate(),
        str(numpy.random.get_state()), numpy.geterr(), sys.excepthook,
    )
{first}
before = state()
{imports}
after = state()
changed = [k for k, (a, b) in enumerate(zip(before, after)) if a != b]
assert not changed, changed
"""


def in_process(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_changes_nothing_global():
    """No numbers, threads, warnings or logging; what packages beneath do on import is not ours and comes first."""
    beneath = "import ase.io, ase.md, gpytorch, linear_operator, pydantic, safetensors.torch, scipy, sphericart.torch"
    beneath += ", vesin, yaml, rich.progress, rich.table, typer"
    names = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for p in MODULES]
    for extra in ("engines.torchsim", "descriptors.triton_kernels"):  # these import what need not be there
        names.remove(f"gpmlp.{extra}")
    in_process(PROBE.format(first=beneath, imports="\n".join(f"import {name}" for name in ["gpmlp", *names])))


def test_import_is_light():
    code = "import sys, gpmlp; heavy = {'torch', 'ase', 'numpy', 'scipy', 'gpytorch'} & set(sys.modules); assert not heavy, heavy"
    in_process(code)


def test_fit_is_the_function_even_after_its_module_was_imported():
    code = "import gpmlp.fit, gpmlp; from gpmlp.fit import FitReport; assert callable(gpmlp.fit) and FitReport"
    in_process(code)
    names = "fit, read, load, save, Structures, Targets, Prediction, Potential, __version__"
    in_process(f"from gpmlp import {names}; assert fit.__name__ == 'fit'")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = gpmlp.nothing


def test_products_do_not_depend_on_where_memory_lies():
    """Else a run that is resumed would differ in its last digits; asked of a fresh process, as MKL reads its setting once."""
    code = """
import numpy as np, torch, gpmlp
rng, differ = np.random.default_rng(0), 0
for _ in range(60):
    m, k = rng.integers(1, 130, 2)
    numbers, results = rng.normal(size=m * k), []
    for offset in (0, 8, 16, 32, 48):
        memory = np.empty(8 * m * k + 128, np.uint8)
        start = -memory.ctypes.data % 64 + offset
        matrix = memory[start : start + 8 * m * k].view(np.float64)
        matrix[:] = numbers
        matrix = torch.from_numpy(matrix.reshape(m, k))
        results.append(matrix @ torch.arange(float(k), dtype=torch.float64))
    differ += any(not torch.equal(r, results[0]) for r in results)
print(differ)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "0"
