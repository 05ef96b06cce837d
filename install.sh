# Read by quickstart.sh, fit_silicon.sh and run_tests.sh (not run by itself): make the virtual environment $VENV and install gpmlp$EXTRAS into it.
# PYTHON names the interpreter, 3.11 or 3.12; the first of python3.11, python3.12, python3 that is one of these if it is not set.
VENV=${VENV:-.venv}
suits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }
if [ ! -x "$VENV/bin/python" ]; then
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if suits "$candidate"; then
            python=$candidate
            break
        fi
    done
    if [ -z "${python:-}" ]; then
        echo "gpmlp needs Python 3.11 or 3.12 with venv (Debian: apt install python3 python3-venv); set PYTHON to its name." >&2
        exit 1
    fi
    "$python" -m venv "$VENV"
fi
echo "installing into $VENV (torch is large: this takes minutes the first time)"
if "$VENV/bin/python" -c 'import torch' 2>/dev/null; then quiet=--quiet; else quiet=; fi # says what it downloads the first time
"$VENV/bin/python" -m pip install $quiet --disable-pip-version-check --requirement requirements.txt
echo "building gpmlp"
rm -rf build # what setuptools left of an older version would be installed again
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ".$EXTRAS"
