#!/bin/sh
# Install gpmlp with pinned versions into a virtual environment (.venv, or $VENV) and run the tests on the installed package.
# Arguments go to pytest: sh run_tests.sh -k archive
set -eu
cd "$(dirname "$0")"
. ./install.sh
exec "$VENV/bin/pytest" -n logical --maxprocesses 4 --dist loadfile "$@"
