# Sourced by launch/quickstart.sh and tests/run.sh; needs bash 3.2 and a Python.
#
# Sets $root (the repository) and $venv, and defines prepare_environment. One process
# installs at a time: it holds a lock of the system (flock) on the file `.venv.lock`,
# which ends when the process and all that it started have ended. The file is empty
# unless an install has begun and not ended; a lock that is free with a file that is
# not empty means a half-made .venv, which is thrown away.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
lock=$root/.venv.lock

# prepare_environment INSTALLER EXTRAS [REQUIREMENT...]: leaves a whole .venv that has
# the package (editable), its EXTRAS and the REQUIREMENTs. INSTALLER is pip, or any for
# uv where it works. Nothing is installed while the same was installed before.
prepare_environment() {
  local installer=$1 extras=$2
  shift 2
  local wanted stamp=$venv/sae_jax-$extras.stamp
  wanted="$root[$extras] $* $(cat "$root/setup.cfg" "$root/pyproject.toml" | cksum)"
  if [ ! -s "$lock" ] && is_venv_whole && is_stamped "$stamp" "$wanted"; then
    return
  fi
  take_lock
  if ! is_venv_whole; then
    make_venv
  fi
  if ! is_stamped "$stamp" "$wanted"; then
    echo "installing sae_jax${extras:+[$extras]} ${*:+and $* }into $venv" >&2
    # compat: a plain path. The default's import hook loses to any folder that is called
    # sae_jax, as a clone's is, in the folder that Python was started in.
    install "$installer" "$@" --config-settings editable_mode=compat \
      -e "$root${extras:+[$extras]}" ||
      fail "the install failed: cure what is said above, then run this again"
    echo "$wanted" >"$stamp"
  fi
  : >"$lock"
  exec 9>&-
}

fail() {
  [ -z "${holds_lock:-}" ] || : >"$lock"
  echo "$(basename -- "$0"): $1" >&2
  exit 1
}

is_stamped() {
  [ "$(cat "$1" 2>/dev/null)" = "$2" ]
}

# A Python that fits and runs in $venv, and is the one that $PYTHON asks for, if it does.
is_venv_whole() {
  fits "$venv/bin/python" &&
    { [ -z "${PYTHON:-}" ] || [ "$(version "$venv/bin/python")" = "$(version "$PYTHON")" ]; }
}

fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

version() {
  "$1" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null
}

# Descriptor 9 is the lock: Python locks it, and it stays locked while bash has it open.
take_lock() {
  local python
  python=$(choose_python 2>/dev/null) ||
    { python=$venv/bin/python && fits "$python"; } ||
    choose_python >/dev/null # tells what is missing, and exits
  exec 9>>"$lock" || fail "cannot write $lock"
  "$python" -c 'import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("waiting for the install that holds", sys.argv[1], file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)' "$lock" || fail "cannot lock $lock"
  if [ -s "$lock" ]; then
    echo "an install was cut off: making $venv anew" >&2
    rm -rf "$venv"
  fi
  holds_lock=1
  echo installing >"$lock"
}

make_venv() {
  local python
  python=$(choose_python) || exit 1
  rm -rf "$venv"
  # `python -m venv` fails where a distribution ships Python without ensurepip.
  "$python" -m venv "$venv" >/dev/null 2>&1 ||
    { has_uv && uv venv --quiet --clear --seed --python "$python" "$venv"; } ||
    { rm -rf "$venv"; false; } ||
    fail "$python -m venv failed: install your system's python3-venv package, or uv"
}

choose_python() {
  local python
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs"
    command -v "$PYTHON"
    return
  fi
  for python in python3 python3.13 python3.12 python3.11; do
    if fits "$python"; then
      command -v "$python"
      return
    fi
  done
  fail "no Python 3.11, 3.12 or 3.13 on PATH: install one, or name it with PYTHON=..."
}

# A shim of a version manager may be on PATH and yet fail.
has_uv() {
  uv --version >/dev/null 2>&1
}

# uv does not read pip's configuration: where it finds no package, pip may.
install() {
  local installer=$1
  shift
  if [ "$installer" = any ] && has_uv; then
    uv pip install --python "$venv/bin/python" "$@" && return
    echo "uv could not install this; trying pip" >&2
  fi
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
    "$venv/bin/python" -m ensurepip >/dev/null
  "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
}
