"""Calculators: those of ASE by a ready-made name or by an import path, and how they are made; no torch."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.units import Bohr, Hartree

ANSWERS = ("calculate", "label")  # methods of a class, one of which an oracle has
# of ASE's calculators in general, and of tblite
FILE_KEYWORDS = frozenset(
    ("parameters", "restart", "ignore_bad_restart_file", "label", "directory", "atoms", "command", "xtb_config")
)
PSEUDO_DIRS = ("/usr/share/espresso/pseudo", "/usr/local/share/espresso/pseudo")


class CalculatorError(ValueError):
    """A calculator that cannot compute anything as it is set up; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class CalculatorEntry:
    """A ready-made calculator.

    Attributes:
        path: "module:name" of the class or function that makes it.
        install: how to get what it needs.
        defaults: keyword arguments, before those of the recipe.
        program: that has to be there, '' if none.
        closed: whether it takes no keyword but those in its list of defaults, without saying so itself.
        charge: keyword of the total charge; '' = the code knows no charge.
        moments: whether it begins with the atoms' magnetic moments.
        package: that computes, whose version decides about results.
        harmless: whether no keyword argument but FILE_KEYWORDS can start a program, read or write a file, so that a model file may
            name it.
    """

    path: str
    install: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    program: str = ""
    closed: bool = False
    charge: str = ""
    moments: bool = True
    package: str = "ase"
    harmless: bool = False


HERE = "gpmlp.core.calculators"
READY = {
    "emt": CalculatorEntry("ase.calculators.emt:EMT", "", closed=True, harmless=True),
    "lennard-jones": CalculatorEntry("ase.calculators.lj:LennardJones", "", closed=True, harmless=True),
    "stillinger-weber": CalculatorEntry(
        f"{HERE}:stillinger_weber",
        "pip install matscipy",
        {"parameters": "Stillinger_Weber_PRB_31_5262_Si"},
        package="matscipy",
        harmless=True,
    ),
    "tblite": CalculatorEntry(
        "tblite.ase:TBLite",
        "pip install tblite",
        {"method": "GFN2-xTB", "verbosity": 0},
        charge="charge",
        package="tblite",
        harmless=True,
    ),
    "pyscf": CalculatorEntry(f"{HERE}:PySCF", "pip install pyscf", charge="charge", moments=False, package="pyscf"),
    "quantum-espresso": CalculatorEntry(
        f"{HERE}:quantum_espresso",
        "apt install quantum-espresso quantum-espresso-data",
        program="pw.x",
        charge="tot_charge",
    ),
    "gpaw": CalculatorEntry(f"{HERE}:gpaw", "conda install -c conda-forge gpaw", charge="charge", package="gpaw"),
    "dftb+": CalculatorEntry(
        "ase.calculators.dftb:Dftb",
        "conda install -c conda-forge dftbplus",
        charge="Hamiltonian_Charge",
        moments=False,
    ),
    "vasp": CalculatorEntry("ase.calculators.vasp:Vasp", "", charge="net_charge"),
    "cp2k": CalculatorEntry("ase.calculators.cp2k:CP2K", "", charge="charge", moments=False),
    "orca": CalculatorEntry("ase.calculators.orca:ORCA", "", charge="charge", moments=False),
    "aims": CalculatorEntry("ase.calculators.aims:Aims", "", charge="charge"),
}


def find_calculator(name: str) -> Callable[..., Any]:
    """What makes the calculator called name.

    Raises:
        CalculatorError: no such ready-made entry, module or class, or one that cannot answer; says what is near or how to install it.
    """
    if name in READY:
        return _imported(READY[name].path, READY[name].install)
    check_calculator_name(name)
    maker = _imported(name, "")
    if not inspect.isclass(maker) or not any(callable(getattr(maker, method, None)) for method in ANSWERS):
        raise CalculatorError(
            f"'{name}' is no oracle: it has to be a class with `calculate`, as ASE calculators have, or with `label(structures)`; "
            "it was not called. Of a function that makes a calculator, write such a class (docs/oracles.md, Your own oracle)"
        )
    return maker


def check_calculator_name(name: str) -> None:
    """Raise CalculatorError unless a name is a ready-made one or has the form of an import path; nothing is imported."""
    if name in READY:
        return
    module, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise CalculatorError(
            f"there is no calculator '{name}'.{_suggestion(name, READY)} Any other goes by its import path, 'module:Class', "
            "e.g. ase.calculators.emt:EMT"
        )


def package_versions(name: str, kwargs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """What decides about the numbers of the calculator `name`: the version of its package or, where its class or one that it inherits
    from is of none that is installed, the SHA-256 of the module or of all .py files of the package; and that of each file whose path is
    among kwargs. What is not installed is left out. A class that is not ready-made is imported.

    Raises:
        CalculatorError: there is no such class.
    """
    kwargs = {} if kwargs is None else kwargs
    if name not in READY:
        return _source_versions(name, find_calculator(name)) | _file_versions(kwargs)
    opened = file_keywords(name, kwargs) if READY[name].harmless else kwargs.keys()
    files = _file_versions({key: kwargs[key] for key in opened})
    try:
        return {READY[name].package: metadata.version(READY[name].package)} | files
    except metadata.PackageNotFoundError:
        return {}


def file_keywords(name: str, kwargs: Mapping[str, Any]) -> list[str]:
    """Those keyword arguments of a ready-made calculator by which it may read or write files."""
    return sorted(kwargs.keys() & FILE_KEYWORDS - READY[name].defaults.keys())


@functools.cache  # a class that is imported stays what it is when its file changes
def _source_versions(name: str, maker: type) -> dict[str, str]:
    installed, out = metadata.packages_distributions(), {}
    named = (name.partition(":")[0], maker.__module__)
    for module_name in (*named, *(base.__module__ for base in inspect.getmro(maker))):
        module, top = sys.modules.get(module_name), module_name.partition(".")[0]
        file = getattr(module, "__file__", None)
        if file is None or top in sys.stdlib_module_names:
            continue
        # another of the same name, or an editable one, lies elsewhere
        packages = [
            package
            for package in map(metadata.distribution, sorted(set(installed.get(top, ()))))
            if Path(file).resolve().is_relative_to(Path(str(package.locate_file(""))).resolve())
        ]
        if not packages:
            out[top] = _digest(_source_files(top, Path(file)))
        elif module_name in named:
            out |= {package.metadata["Name"]: package.version for package in packages}
    return out


def _source_files(top: str, file: Path) -> list[Path]:
    """All .py files of the package that a module is in, or the file of the module."""
    folders = getattr(sys.modules[top], "__path__", ())
    return sorted(path for folder in folders for path in Path(folder).rglob("*.py")) or [file]


def _file_versions(value: Any) -> dict[str, str]:
    """SHA-256 of all files whose paths are among (nested) keyword arguments, `command` left out."""
    if isinstance(value, str):
        return {value: _digest([Path(value)])} if os.path.isfile(value) else {}
    if isinstance(value, Mapping):
        value = [entry for key, entry in value.items() if key != "command"]
    return (
        {k: v for entry in value for k, v in _file_versions(entry).items()} if isinstance(value, (list, tuple)) else {}
    )


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            content = file.read_bytes()
            digest.update(content if len(files) == 1 else hashlib.sha256(content).digest() + str(file.name).encode())
    except OSError as error:
        raise CalculatorError(f"{error.filename} cannot be read: {error.strerror}") from error
    return "sha256 " + digest.hexdigest()[:16]


def add_import_folder(folder: Path) -> None:
    """Have Python find the modules of a folder, too; those that it finds elsewhere come first."""
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


def _suggestion(name: str, names: Iterable[str]) -> str:
    """Of the names one that is near."""
    from gpmlp.core.errors import suggest_name

    return suggest_name(name, names)


def _imported(path: str, install: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if "" not in sys.path:
        add_import_folder(Path())  # console scripts do not look there by themselves
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = (getattr(error, "name", None) or module_name).partition(".")[0]
        hint = install or f"install what holds {missing}, work in the folder where it is, or correct the name"
        if importlib.util.find_spec(module_name.partition(".")[0]) is not None and error.__cause__ is not None:
            hint = (
                f"{error.__cause__}: it is installed, but another library stands in its way; pip install a newer torch"
            )
        raise CalculatorError(f"'{path}' cannot be imported: {error}; {hint}") from error
    except (Exception, SystemExit) as error:  # whatever the module does on import
        raise CalculatorError(
            f"'{path}' cannot be imported: {type(error).__name__}: {error}; correct the module"
        ) from error
    maker = getattr(module, attribute, None)
    if not callable(maker):
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise CalculatorError(
            f"module {module_name} has no class '{attribute}'.{_suggestion(attribute, names) if names else ''}"
        )
    return maker


def build_calculator(name: str, kwargs: Mapping[str, Any], directory: Path) -> Any:
    """A new calculator that works in directory. Raises CalculatorError: it cannot be made with these keyword arguments."""
    maker = find_calculator(name)
    arguments = {**(READY[name].defaults if name in READY else {}), **kwargs}
    _refuse_misspelt(name, maker, arguments)
    takes_folder = inspect.isfunction(maker) and maker.__module__ == HERE
    try:
        calculator = maker(directory, **arguments) if takes_folder else maker(**arguments)
    except CalculatorError:
        raise
    except Exception as error:
        raise CalculatorError(
            f"{name} cannot be made with kwargs {', '.join(arguments) or '(none)'}: {type(error).__name__}: {error}."
            f"{_near_names(maker, arguments)}"
        ) from error
    if not takes_folder and hasattr(calculator, "directory"):
        calculator.directory = str(directory)
    return calculator


def _keywords(maker: Callable[..., Any]) -> list[str]:
    """Keyword arguments that a maker takes, as far as it says so."""
    try:
        names = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is not p.VAR_KEYWORD]
    except (TypeError, ValueError):
        return []
    names += [str(k) for k in getattr(maker, "default_parameters", None) or {}]
    return [name for name in names if name not in ("self", "atoms", "directory", "args")]


def _near_names(maker: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """Names that the maker does take, near those it does not."""
    names = _keywords(maker)
    return "".join(f" '{name}':{_suggestion(name, names)}" for name in arguments if names and name not in names)


def _refuse_misspelt(name: str, maker: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """ASE's own calculators swallow any keyword: one that is nearly one of theirs is a slip, and any other where theirs are all listed."""
    names, closed = _keywords(maker), name in READY and READY[name].closed
    for given in arguments:
        close = difflib.get_close_matches(given, names, n=1, cutoff=0.85)
        if given not in names and close:
            raise CalculatorError(f"{name} knows no kwargs.{given}. Perhaps you meant '{close[0]}'")
        if given not in names and closed:
            raise CalculatorError(f"{name} knows no kwargs.{given}; it takes {', '.join(names)}")


def electronic_kwargs(
    name: str, kwargs: Mapping[str, Any], structure: Mapping[str, Any], needed: bool = True
) -> dict[str, Any]:
    """Keyword arguments with the total charge of a structure, where a ready-made calculator has a keyword for it.

    Args:
        structure: of a job, with its `charge` and `magnetic_moments` if there are any.
        needed: whether a ready-made calculator that knows no charge is refused where there is one.

    Raises:
        CalculatorError: another charge is given, or the calculator would not see the charge or the magnetic moments.
    """
    entry, out = READY.get(name), dict(kwargs)
    if entry is None:
        return out
    if "magnetic_moments" in structure and not entry.moments:
        raise CalculatorError(
            f"{name} takes no magnetic moments of atoms through ASE; remove initial_magmoms from the start, and give the spin in kwargs"
        )
    total = round(structure.get("charge", 0.0), 6)
    if total and not entry.charge and needed:
        raise CalculatorError(f"{name} knows no charge, and the structure has the total charge {total:g}")
    if total and entry.charge:
        given = out.setdefault(entry.charge, int(total) if total == int(total) else total)
        if abs(given - total) > 1e-6:
            raise CalculatorError(
                f"kwargs.{entry.charge} is {given}, but the structure has the total charge {total:g}; give one of them"
            )
    return out


def merge_kwargs(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """The first updated with the second, sections within sections."""
    both = dict(first)
    for key, value in second.items():
        inner = both.get(key)
        both[key] = merge_kwargs(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return both


def stillinger_weber(directory: Path, parameters: str) -> Any:
    """matscipy's Stillinger-Weber potential; parameters by the name that matscipy gives them."""
    try:
        from matscipy.calculators.manybody import Manybody
        from matscipy.calculators.manybody.explicit_forms import stillinger_weber as forms
    except ImportError as error:
        raise CalculatorError(f"stillinger-weber cannot be imported: {error}; pip install matscipy") from error
    if not hasattr(forms, parameters):
        names = [name for name in vars(forms) if name.startswith("Stillinger_Weber_")]
        raise CalculatorError(
            f"matscipy has no Stillinger-Weber parameters '{parameters}'.{_suggestion(parameters, names)}"
        )
    return Manybody(**forms.StillingerWeber(getattr(forms, parameters)))


def gpaw(directory: Path, **kwargs: Any) -> Any:
    """GPAW, its text output with the other files of the label."""
    try:
        from gpaw import GPAW
    except ImportError as error:
        raise CalculatorError(f"gpaw cannot be imported: {error}; {READY['gpaw'].install}") from error
    return GPAW(**{"txt": str(Path(directory) / "gpaw.txt"), **kwargs})


def quantum_espresso(
    directory: Path,
    *,
    pseudopotentials: Mapping[str, str] | None = None,
    ecutwfc_Ry: float | None = None,
    ecutrho_Ry: float | None = None,
    degauss_Ry: float | None = None,
    smearing: str = "mv",
    mixing_beta: float | None = None,
    kpts: Any = None,
    koffset: Any = (0, 0, 0),
    kspacing: float | None = None,
    tot_charge: float | None = None,
    command: str = "pw.x",
    pseudo_dir: str | None = None,
    input_data: Mapping[str, Any] | None = None,
    **more: Any,
) -> Any:
    """pw.x through ASE, with forces and stress, and nothing left on disk but its input and output.

    Args:
        pseudopotentials: file by chemical symbol.
        ecutwfc_Ry, ecutrho_Ry, degauss_Ry: cutoffs and width of the smearing; a metal needs degauss_Ry.
        kspacing: distance of k-points in 1/A, without 2 pi; a mesh that changes with the cell makes steps in the energy, so give
            kpts where the cell changes. Only Gamma if neither is given.
        tot_charge: of the cell, elementary charges; else the sum of the atoms' initial charges.
        pseudo_dir: else $ESPRESSO_PSEUDO, else where Debian's quantum-espresso-data puts them.
        input_data: any keyword of pw.x, flat or by namelist; comes last.
    """
    from ase.calculators.espresso import Espresso, EspressoProfile

    folder = _pseudo_dir(pseudo_dir)
    _check_pseudopotentials(pseudopotentials, folder)
    data: dict[str, Any] = {"tprnfor": True, "tstress": True, "disk_io": "none"}
    data |= {} if degauss_Ry is None else {"occupations": "smearing", "smearing": smearing, "degauss": degauss_Ry}
    for key, value in (
        ("ecutwfc", ecutwfc_Ry),
        ("ecutrho", ecutrho_Ry),
        ("mixing_beta", mixing_beta),
        ("tot_charge", tot_charge),
    ):
        data |= {} if value is None else {key: value}
    for key, value in (input_data or {}).items():
        data |= dict(value) if isinstance(value, Mapping) else {key: value}
    if "ecutwfc" not in data:
        raise CalculatorError("quantum-espresso needs kwargs.ecutwfc_Ry, the cutoff of plane waves (Ry), e.g. 30")
    points = {"kspacing": kspacing} if kspacing is not None else {"kpts": kpts}
    return Espresso(
        profile=EspressoProfile(command=command, pseudo_dir=folder),
        directory=directory,
        pseudopotentials=dict(pseudopotentials or {}),
        input_data=data,
        koffset=tuple(koffset),
        **points,
        **more,
    )


def _pseudo_dir(given: str | None) -> str:
    tried = [p for p in (given, os.environ.get("ESPRESSO_PSEUDO")) if p][:1] or list(PSEUDO_DIRS)
    for folder in tried:
        if Path(folder).expanduser().is_dir():
            return str(Path(folder).expanduser().resolve())
    raise CalculatorError(
        f"no folder of pseudopotentials at {' or '.join(tried)}; give kwargs.pseudo_dir, or apt install quantum-espresso-data"
    )


def _check_pseudopotentials(files: Mapping[str, str] | None, folder: str) -> None:
    if not files:
        listing = ", ".join(sorted(os.listdir(folder))[:8])
        raise CalculatorError(
            f"quantum-espresso needs kwargs.pseudopotentials, a file for each element, e.g. {{Si: Si.pbe-rrkj.UPF}}; {folder} "
            f"holds {listing}, ..."
        )
    for symbol, name in files.items():
        if not (Path(folder) / name).is_file():
            near = [f for f in sorted(os.listdir(folder)) if f.split(".")[0].split("_")[0] == symbol]
            raise CalculatorError(
                f"there is no pseudopotential {name} in {folder}; for {symbol} it holds {', '.join(near) or 'none'}"
            )


class PySCF(Calculator):
    """xc: a functional, or 'hf'; charge and spin (unpaired electrons) of the whole molecule; grid_level and conv_tol (Hartree) as in
    pyscf; density_fit for speed."""

    implemented_properties = ["energy", "free_energy", "forces"]
    default_parameters = {
        "xc": "pbe",
        "basis": "def2-svp",
        "charge": 0,
        "spin": 0,
        "density_fit": True,
        "grid_level": 3,
        "conv_tol": 1e-9,
        "max_cycle": 100,
    }
    discard_results_on_any_change = True

    def __init__(self, **kwargs: Any) -> None:
        unknown = set(kwargs) - set(self.default_parameters)
        if unknown:
            raise TypeError(f"unknown keyword arguments {sorted(unknown)}")
        import pyscf  # noqa: F401 - so that its absence shows when the recipe is read

        super().__init__(**kwargs)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise ValueError("pyscf labels isolated molecules here; switch periodicity off or take a periodic code")
        field = self._field()
        energy = field.kernel()
        if not field.converged:
            field = field.newton()  # second order: slower and surer
            energy = field.kernel()
        if not field.converged:
            raise RuntimeError("self-consistency was not reached")
        gradient = field.nuc_grad_method()
        if self.parameters["xc"].lower() != "hf":
            gradient.grid_response = True  # else forces are not the slope of the energy to better than the grid
        forces = -np.asarray(gradient.kernel()) * (Hartree / Bohr)
        self.results = {"energy": energy * Hartree, "free_energy": energy * Hartree, "forces": forces}

    def _field(self) -> Any:
        """The unsolved self-consistent field."""
        from pyscf import dft, gto, scf

        p = self.parameters
        molecule = gto.M(
            atom=list(zip(self.atoms.get_chemical_symbols(), self.atoms.positions.tolist(), strict=True)),
            unit="Angstrom",
            basis=p["basis"],
            charge=p["charge"],
            spin=p["spin"],
            verbose=0,
        )
        open_shell = p["spin"] != 0
        if p["xc"].lower() == "hf":
            field = scf.UHF(molecule) if open_shell else scf.RHF(molecule)
        else:
            field = (dft.UKS if open_shell else dft.RKS)(molecule, xc=p["xc"])
            field.grids.level = p["grid_level"]
        field.conv_tol, field.max_cycle = p["conv_tol"], p["max_cycle"]
        return field.density_fit() if p["density_fit"] else field
