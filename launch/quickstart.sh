#!/usr/bin/env bash
# From text to a trained, evaluated and pictured sparse autoencoder on this machine.
#
#   bash launch/quickstart.sh [flags of `sae-jax quickstart`]
#
# Makes .venv in the repository if it is missing. The Python is $PYTHON, or the first of
# python3, python3.13, python3.12 and python3.11 that is 3.11 to 3.13.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment any ''
exec "$venv/bin/sae-jax" quickstart "$@"
