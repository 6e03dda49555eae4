#!/usr/bin/env bash
# Sets up what the tests need, then runs lint, types and tests. `--full` adds what takes minutes.
#
#   bash tests/run.sh [--full] [options of pytest]
#
# VENV, PYTHON: as in launch/environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

# test files side by side, the long ones first: many wait for programs that use one core, or none
select=(-m "not slow" -n 3)
if [ "${1:-}" = --full ]; then
  select=(-n 2) # some of the long ones look at the clock
  shift
fi
make_environment '.[test]'
export PATH="$PWD/$VENV/bin:$PATH"
case $VENV in /*) export PATH="$VENV/bin:$PATH" ;; esac

ruff check .
ruff format --check .
types=$(mktemp)
mypy >"$types" 2>&1 & # beside the tests: it uses one core
checker=$!
code=0
python -m pytest --rooms --durations=25 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@" || code=$?
wait "$checker" || code=$((code ? code : 1))
cat "$types"
rm "$types"
exit "$code"
