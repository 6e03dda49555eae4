#!/usr/bin/env bash
# Tries the GPU path on this machine within ten minutes: a table of what passed and failed, and its figures as JSON.
#
#   bash benchmarks/gpu.sh [--minutes 10] [--only NAME ...] [--json gpu.json] [--profile FILE]
#
# PYTHON: one that has torch with CUDA (python3). WHEELS: a folder of wheels of the other packages where there is no
# network; those that are missing are installed from it, into a folder that is removed in the end. DATA: Parquet files
# of CIFAR-10, for the study. Exit code 0: all passed; 1: something failed; 69: no GPU, or no torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}

refuse() { echo "benchmarks/gpu.sh: $1" >&2 && exit 69; }

"$PYTHON" -c 'import torch' 2> /dev/null || refuse "$PYTHON has no torch; set PYTHON to one that has torch with CUDA"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
  refuse "it needs a GPU, and torch finds none here; the checks that need none run with the tests"

if [ -n "${WHEELS:-}" ]; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  # shellcheck disable=SC2046 # names of packages
  missing=$("$PYTHON" benchmarks/gpu_table.py --missing)
  [ -z "$missing" ] ||
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$packages" $missing
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" benchmarks/gpu_table.py "$@"
