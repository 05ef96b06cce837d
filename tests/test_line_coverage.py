"""Marks are where lines run: what .ci/run says of coverage is what coverage.py would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parent / "line_coverage"
SOURCE = '''"""A docstring stays the first statement."""
from __future__ import annotations
import functools
@functools.cache
def chosen(x):
    """Another."""
    if x:
        return "yes"
    elif x is None:
        return "none"
    try:
        raise KeyError
    except ValueError:
        return "never"
    except KeyError:
        pass
    match x:
        case 1:
            return "one"
        case _:
            return "other"
class Empty:
    a = [
        1,
    ]
chosen(0)
'''
RUN = {3, 4, 5, 7, 9, 11, 12, 15, 16, 17, 20, 21, 22, 23, 26}


def test_marks_are_where_lines_run(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    code = (
        "import marks, pathlib\n"
        f"lines = {{}}; names = dict(__lines__=lines, __name__='m'); exec(marks.compiled(pathlib.Path({str(path)!r})), names)\n"
        "assert names['__doc__'] and names['chosen'].__doc__, names\n"
        "print(*sorted(lines))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(TOOL)}, capture_output=True)
    assert {int(line) for line in done.stdout.split()} == RUN, done.stderr.decode()


def test_lines_of_several_processes_are_counted(tmp_path):
    """Of processes that are killed, too; modules that numba compiles are left alone."""
    environment = os.environ | {"GPMLP_LINES": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(TOOL), *sys.path])}
    for used in ("units.GPA", "units.__doc__"):
        code = f"import os; from gpmlp.core import units, _pair_kernels; {used}; os._exit(0)"
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert {path.name for path in tmp_path.glob("*units*")} == {"gpmlp.core.units.code", "gpmlp.core.units.lines"}
    assert sum((tmp_path / "gpmlp.core.units.lines").read_bytes()) > 0
    assert not list(tmp_path.glob("*_pair_kernels*"))
    report = [sys.executable, TOOL / "report.py", tmp_path]
    done = subprocess.run(report, env=environment, capture_output=True, text=True)
    assert "TOTAL" in done.stdout and "_pair_kernels" not in done.stdout, done.stderr
