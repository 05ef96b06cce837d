"""Builds the compiled core of gpmlp/native beside the package: a shared library for every processor, on x86-64 one more for newer ones."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCE = Path("gpmlp/native/src/core.cpp")
VARIANTS = {"baseline": []} | ({"v3": ["-march=x86-64-v3"]} if sysconfig.get_platform().endswith("x86_64") else {})
# products and sums may be contracted; NaN and infinity keep their meaning
FLAGS = (
    "-std=c++17 -O3 -fPIC -shared -pthread -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-Wno-psabi"  # vectors are arguments of inlined functions only
)


class BuildCore(build_ext):
    """Plain libraries, loaded by ctypes: nothing of Python in them, and no suffix of one of its versions."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or len(VARIANTS)

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        target = Path(self.get_ext_fullpath(extension.name))
        made_of = [SOURCE, *SOURCE.parent.glob("*.hpp"), Path(__file__)]
        if not self.force and target.exists() and target.stat().st_mtime > max(p.stat().st_mtime for p in made_of):
            return
        compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or "clang++"]
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")  # a process may have the other loaded
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        command = [*compiler, *FLAGS.split(), *extension.extra_compile_args, *extra, str(SOURCE), "-o", str(fresh)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"{target.name} could not be compiled ({error}). gpmlp works without it, several times slower; "
                "to have it, install a C++ compiler (Debian: apt install g++) and then gpmlp again."
            ) from error
        fresh.replace(target)


def core(variant, flags):
    return Extension(f"gpmlp.native._core_{variant}", [str(SOURCE)], extra_compile_args=flags, optional=True)


os.chdir(Path(__file__).resolve().parent)
setup(ext_modules=[core(*item) for item in VARIANTS.items()], cmdclass={"build_ext": BuildCore})
