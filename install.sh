# Read by quickstart.sh, fit_silicon.sh and run_tests.sh (not run by itself): make the virtual environment $VENV, with the packages
# pinned in requirements.txt, and install gpmlp into it. Hashes of what was installed are kept in it: what has not changed since is not
# installed again, so that a job that runs in it beside this script keeps its package. To start afresh, remove $VENV.
# PYTHON names the interpreter, 3.11 to 3.13; the first of python3.11, python3.12, python3.13, python3 that is one of these if not set.
VENV=${VENV:-.venv}
suits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }
digest() { find "$@" -type f ! -path '*/__pycache__/*' ! -name '*.so' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum; }
if [ ! -x "$VENV/bin/python" ]; then
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if suits "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "${python:-}" ]; then
        echo "gpmlp needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3 python3-venv); set PYTHON to its name." >&2
        exit 1
    fi
    "$python" -m venv "$VENV"
fi
packages=$(digest requirements.txt)
if [ "$packages" != "$(cat "$VENV/packages.sha256" 2>/dev/null)" ]; then
    echo "installing into $VENV (torch is large: this takes minutes the first time)"
    rm -f "$VENV/packages.sha256"
    if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then quiet=--quiet; else quiet=; fi # says what it downloads the first time
    "$VENV/bin/python" -m pip install $quiet --disable-pip-version-check --requirement requirements.txt
    echo "$packages" >"$VENV/packages.sha256"
fi
compiler=$(for name in ${CXX:-g++ c++ clang++}; do command -v "$name" 2>/dev/null && break; done || true) # one may have come since
sources="$(digest gpmlp setup.py setup.cfg) $compiler"
if [ ! -e "$VENV/bin/gpmlp" ] || [ "$sources" != "$(cat "$VENV/sources.sha256" 2>/dev/null)" ]; then
    echo "building gpmlp"
    rm -rf build "$VENV/sources.sha256" # what setuptools left of an older version would be installed again
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps . # all that it needs is in requirements.txt
    # python started in this folder imports the sources: they need the compiled core too (a process may have the old one loaded)
    if ! cp --remove-destination "$VENV"/lib/python3*/site-packages/gpmlp/native/_core_*.so gpmlp/native 2>/dev/null; then
        echo "without a C++ compiler gpmlp has no compiled core and is several times slower (Debian: apt install g++; then run this again)" >&2
    fi
    echo "$sources" >"$VENV/sources.sha256"
fi
