#!/bin/sh
# Install gpmlp with pinned versions into a virtual environment (.venv, or $VENV), fit the shipped silicon data, print the errors.
# Arguments go to the fit: sh fit_silicon.sh --set kernel.zeta=2
set -eu
cd "$(dirname "$0")"
. ./install.sh
"$VENV/bin/gpmlp" fit data/silicon/train.xyz --valid data/silicon/validation.xyz --output silicon.gpmlp "$@"
"$VENV/bin/gpmlp" evaluate silicon.gpmlp data/silicon/test.xyz
