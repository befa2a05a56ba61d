#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash tests/run.sh [--full] [arguments of pytest]
#
# Without --full, tests marked `slow` or `torch` are left out. With it everything runs,
# torch, transformers, datasets and libtpu are installed, and a test that skips because a
# package is missing fails. The Python is chosen as launch/quickstart.sh does.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/../launch/environment.sh"

if [ "${1:-}" = --full ]; then
  shift
  # Pinned so that a CPU build of this version in pip's find-links or extra index, which
  # ranks above the plain one, is taken: the plain one brings gigabytes of CUDA on Linux.
  # By pip, because that configuration is pip's.
  prepare_environment pip test,text,torch,tpu torch==2.13.0
  export PYTHONPATH="$root/tests${PYTHONPATH:+:$PYTHONPATH}"
  set -- -p refuse_skips "$@"
else
  prepare_environment any test
  set -- -m 'not slow and not torch' "$@"
fi

cd "$root"
failed=''
"$venv/bin/python" -m flake8 || failed="$failed flake8"
"$venv/bin/python" -m mypy || failed="$failed mypy"
# A process for each core, for most of the time goes into compiling, on one; four at
# most, for they take 4 GB each. A file stays in one, with its fixtures, and
# tests/conftest.py says which come first.
"$venv/bin/python" -m pytest -n auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder --durations=10 "$@" || failed="$failed pytest"
if [ -n "$failed" ]; then
  echo "run.sh: failed:$failed" >&2
  exit 1
fi
