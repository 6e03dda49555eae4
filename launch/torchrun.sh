#!/usr/bin/env bash
# One machine, its GPUs or CPU cores, by torchrun; started again when a rank is lost.
#
#   bash launch/torchrun.sh [RANKS] CONFIG [--section.key=value ...]
#
#   bash launch/torchrun.sh 2 digits
#   bash launch/torchrun.sh 4 my.yaml --train.rounds=200 --run-dir /scratch/run1
#
# RANKS         processes (default: one a GPU, two where there is none)
# MAX_RESTARTS  how many times a run that lost a rank is started again (default: 3)
# PYTHON        the Python that has fedfreeze (default: that of .venv if there is one, else python)
# SIGUSR1, SIGUSR2 and SIGTERM to this script: save, and leave with 75. The other exit codes: fedfreeze --help.
set -euo pipefail
FEDFREEZE_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$FEDFREEZE_HOME/launch/restart.sh"
. "$FEDFREEZE_HOME/launch/local_start.sh"
read_arguments "$@"

tell_run() { # to the ranks: torchrun passes on SIGTERM and SIGINT only
  case $1 in
    USR1 | USR2) tell_ranks "$1" "$2" ;;
    *) kill "-$1" "$2" 2> /dev/null || true ;;
  esac
}

# --max-restarts=0: a restart of torchrun keeps the agents, their ports and their stale addresses; ours starts all anew
# -P: a user's random.py in this folder is not Python's own
run_until_done "$RUN_DIR" "$PYTHON" -P -m torch.distributed.run --standalone --nproc-per-node="$RANKS" \
  --max-restarts=0 -m fedfreeze run "$CONFIG" --run-dir "$RUN_DIR" "${OVERRIDES[@]}"
