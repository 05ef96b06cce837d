#!/bin/sh
# Install gpmlp with pinned versions into a virtual environment (.venv, or $VENV) and let it learn a molecule on the fly, with
# GFN2-xTB as oracle. Arguments go to the run: sh quickstart.sh --set dynamics.temperature_K=500
set -eu
cd "$(dirname "$0")"
. ./install.sh
"$VENV/bin/gpmlp" learn data/learning/ethanol.yaml "$@"
