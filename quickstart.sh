#!/bin/sh
# Install gpmlp with pinned versions into a virtual environment (.venv, or $VENV), let it learn a molecule on the fly, with GFN2-xTB as
# oracle, and print frequencies and rotational barriers with error bars beside GFN2-xTB's own. Arguments go to the run:
# sh quickstart.sh --set dynamics.temperature_K=500
set -eu
cd "$(dirname "$0")"
. ./install.sh
"$VENV/bin/gpmlp" learn data/learning/ethanol.yaml "$@"
"$VENV/bin/gpmlp" properties data/learning/ethanol-learned/model.gpmlp data/learning/ethanol.xyz --oracle data/learning/ethanol.yaml \
    --output data/learning/ethanol-learned/properties
