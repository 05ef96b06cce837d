"""Marks every line of gpmlp that runs, in this process and all that it starts, where $GPMLP_LINES names a folder and PYTHONPATH this one.

Tracing by the interpreter, as coverage.py does it before Python 3.12, slows torch, scipy and numba's compiler too, which are most of
what runs: heavy tests took 20 % longer, and compiling 45 %. Here a module of gpmlp gets one more statement before each of its own,
`__lines__[n] = 1`, in a file in memory that all processes share, so that none has to end well. Modules `_name`, compiled by numba or
Triton, are left as they are. `report.py` reads the files.
"""

import importlib.machinery
import marshal
import mmap
import os
import sys
from pathlib import Path


class Marked(importlib.machinery.SourceFileLoader):
    """Loads a module with marks; its code is made once and kept in the folder."""

    def get_code(self, fullname):
        kept = FOLDER / f"{fullname}.code"
        if not kept.exists():
            import marks

            code = marks.compiled(Path(self.path))
            mine = kept.with_suffix(f".{os.getpid()}")
            mine.write_bytes(marshal.dumps(code))
            mine.rename(kept)  # whole, whoever reads
        return marshal.loads(kept.read_bytes())

    def exec_module(self, module):
        with open(FOLDER / f"{module.__name__}.lines", "a+b") as file:
            file.truncate(1 + Path(self.path).read_bytes().count(b"\n") + 1)
            module.__lines__ = mmap.mmap(file.fileno(), 0)
        super().exec_module(module)


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] != "gpmlp" or fullname.rpartition(".")[2].startswith("_"):
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Marked(spec.loader.name, spec.loader.path)
        return spec


if folder := os.environ.get("GPMLP_LINES"):
    FOLDER = Path(folder)
    sys.meta_path.insert(0, Finder)
