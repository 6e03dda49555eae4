#!/usr/bin/env bash
# Sets up what the tests need, then runs lint, types and tests. `--full` adds what takes minutes.
#
#   bash tests/run.sh [--full] [options of pytest]
#
# VENV, PYTHON: as in launch/environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

# three test files at once, the long ones first: many wait for programs that use one core, or none
select=(-m "not slow" -n 3 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --full ]; then
  select=() # one at a time, so that -s shows what the long ones print
  shift
fi
make_environment '.[test]'
export PATH="$PWD/$VENV/bin:$PATH"
case $VENV in /*) export PATH="$VENV/bin:$PATH" ;; esac

ruff check .
ruff format --check .
mypy
python -m pytest --rooms --durations=25 "${select[@]}" "$@"
