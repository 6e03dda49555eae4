# Sourced by launch/quickstart.sh and tests/run.sh: makes the virtual environment and says how many ranks fit.

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

# make_environment WHAT: install WHAT (`.` or `.[test]`) into $VENV, once; again when the requirements change
make_environment() {
  local stamp
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "fedfreeze needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1 || true). Set PYTHON=..." >&2
    return 69
  }
  stamp="$1 $(cat setup.cfg pyproject.toml constraints-cpu.txt | cksum)"
  [ "$(cat "$VENV/fedfreeze-installed" 2>/dev/null)" = "$stamp" ] && return 0
  [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
    echo "cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
    return 69
  }
  echo "installing $1 into $VENV (about 1 GB, mostly torch)"
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e "$1"
  echo "$stamp" > "$VENV/fedfreeze-installed"
}

# local_ranks: two on a machine with two cores or more
local_ranks() {
  [ "$(getconf _NPROCESSORS_ONLN)" -ge 2 ] && echo 2 || echo 1
}
