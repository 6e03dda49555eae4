#!/usr/bin/env bash
# From a fresh machine to a network trained block by block: makes an environment, installs, runs the main job.
#
#   bash launch/quickstart.sh [options of `fedfreeze run`]
#
# VENV     where the environment goes (default: .venv)
# PYTHON   the Python that makes it, 3.11 or newer (default: python3)
# Nothing is written outside the project's folder but the decoded data (~/.cache/fedfreeze, 120 KB).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/environment.sh

make_environment .
echo "quickstart: 20 emulated devices learn handwritten digits, each held to its own memory cap"
started=$SECONDS
"$VENV/bin/fedfreeze" run digits --nproc "$(local_ranks)" "$@"
echo "quickstart: trained in $((SECONDS - started)) s; summary.json has every figure, metrics.jsonl every round"
echo "quickstart: next, $VENV/bin/fedfreeze plan digits shows what each stage needs, README.md the rest"
