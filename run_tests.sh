#!/bin/sh
# Install gpmlp with pinned versions into a virtual environment (.venv, or $VENV) and run the tests on the installed package.
# Arguments go to pytest: sh run_tests.sh -k archive. COVERAGE: options of python that run pytest under another program (.ci/run).
set -eu
cd "$(dirname "$0")"
. ./install.sh
set -f # the options may hold patterns
export OMP_NUM_THREADS=1 # a process for each core: threads of theirs would wait for one another
exec "$VENV/bin/python" -P ${COVERAGE:-} -m pytest -n logical --maxprocesses 4 --dist loadfile "$@"
