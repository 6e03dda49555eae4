#!/usr/bin/env bash
# One machine or any allocation, by mpirun (Open MPI or MPICH); started again when a rank is lost.
#
#   bash launch/mpirun.sh [RANKS] CONFIG [--section.key=value ...]
#
#   bash launch/mpirun.sh 2 digits                               # torch.distributed between the ranks
#   bash launch/mpirun.sh 2 digits --comm.transport=mpi          # MPI between the ranks; needs mpi4py
#
# RANKS           processes (default: the allocation's tasks, else one a GPU, else two)
# OVERSUBSCRIBE   1: more ranks than cores (Open MPI refuses that otherwise)
# MPIRUN_OPTIONS  further words for mpirun, such as "--hostfile hosts" or "--bind-to core"
# MAX_RESTARTS, PYTHON, signals and exit codes: as in launch/torchrun.sh
#
# Open MPI refuses to run as root. Inside a container, where you are root of nothing else, say so in MPIRUN_OPTIONS:
# --allow-run-as-root. Several emulated SLURM nodes on one host also need "--mca plm isolated --mca ras ^slurm".
set -euo pipefail
FEDFREEZE_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$FEDFREEZE_HOME/launch/restart.sh"
. "$FEDFREEZE_HOME/launch/local_start.sh"
DEFAULT_RANKS=${SLURM_NTASKS:-} read_arguments "$@"

MPIRUN=${MPIRUN:-mpirun}
version=$("$MPIRUN" --version 2>&1 || true)
options=()
case $version in
  *"Open MPI"* | *OpenRTE* | *PRTE*)
    [ "${OVERSUBSCRIBE:-0}" != 1 ] || options+=(--oversubscribe)
    # other machines start with a fresh environment
    for name in PATH OMP_NUM_THREADS MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_ PYTHONSAFEPATH; do
      [ -z "${!name:-}" ] || options+=(-x "$name")
    done
    ;;
  *HYDRA* | *MPICH* | *Intel*) ;; # both pass the environment on and take any number of ranks
  *)
    echo "fedfreeze: error: '$MPIRUN' is neither Open MPI nor MPICH: ${version%%$'\n'*}; load your site's MPI module," \
      "on Debian apt-get install openmpi-bin, or name another with MPIRUN=..." >&2
    exit 69
    ;;
esac

tell_run() { # mpirun passes on SIGUSR1 and SIGUSR2, but kills its ranks a second after SIGTERM or SIGINT
  case $1 in
    USR1 | USR2) kill "-$1" "$2" 2> /dev/null || true ;;
    *) tell_ranks "$1" "$2" ;;
  esac
}

# shellcheck disable=SC2086 # MPIRUN_OPTIONS are words
run_until_done "$RUN_DIR" "$MPIRUN" -n "$RANKS" "${options[@]}" ${MPIRUN_OPTIONS:-} \
  "$PYTHON" -m fedfreeze run "$CONFIG" --run-dir "$RUN_DIR" "${OVERRIDES[@]}"
