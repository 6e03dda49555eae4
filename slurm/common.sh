# Sourced by the sbatch files: what they have in common. FEDFREEZE_HOME must name the project's folder.
#
#   begin "$@"          read CONFIG and overrides, print the facts of the job
#   finish COMMAND...   run COMMAND until the run is done, requeue the job if it is to go on, exit
#
# RUN_DIR       run folder (default: as `fedfreeze run` has it, runs/NAME)
# MAX_REQUEUES  how often a job may be requeued, by whomever (default: 10)
# MAX_RESTARTS  how often a run that lost a rank is started again within a job (default: 3)
# TASK_LOGS     a folder: every task writes a log of its own there instead of into the job's
# CONTAINER     words before the command, such as "apptainer exec --nv fedfreeze.sif"
# PYTHON        the Python that has fedfreeze (default: that of the active environment, else that of .venv)

for needed in launch/restart.sh launch/settings.sh; do
  if [ ! -r "$FEDFREEZE_HOME/$needed" ]; then
    echo "fedfreeze: error: FEDFREEZE_HOME is '$FEDFREEZE_HOME', which has no $needed; submit from the project's" \
      "folder or set FEDFREEZE_HOME to it" >&2
    exit 69
  fi
done
. "$FEDFREEZE_HOME/launch/settings.sh"
. "$FEDFREEZE_HOME/launch/restart.sh"

CONTAINER=${CONTAINER:-}
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python
  if [ -z "$CONTAINER${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$FEDFREEZE_HOME/.venv/bin/python" ]; then
    PYTHON=$FEDFREEZE_HOME/.venv/bin/python # as launch/quickstart.sh has made it
  fi
fi
MAX_REQUEUES=${MAX_REQUEUES:-10}
STARTED=$(date +%s)
# an element of an array has an id of its own; its array must not be requeued with it
JOB=$SLURM_JOB_ID
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# The tasks of the step, from the allocation. --kill-on-bad-exit=0: ranks that lost another one end by themselves, with
# the right exit code; --wait: SLURM ends those that do not, after 60 s. --label: each line says which task wrote it.
STEP=(srun --kill-on-bad-exit=0 --wait=60)
if [ -n "${TASK_LOGS:-}" ]; then
  mkdir -p "$TASK_LOGS"
  STEP+=(--open-mode=append --output="$TASK_LOGS/%x-%j-%t.out")
else
  STEP+=(--label)
fi

# SLURM has told the tasks itself when it ends a job; srun passes on the others
tell_run() { [ "$1" = TERM ] || kill "-$1" "$2" 2> /dev/null || true; }

# begin CONFIG [OPTIONS]: sets RUN_DIR and RUN, the command of one rank after its Python
begin() {
  local config=${1:-} options=() end
  if [ -z "$config" ] || [[ $config == -* ]]; then
    refuse "CONFIG is missing; usage: sbatch [options of sbatch] FILE CONFIG [--section.key=value ...]"
  fi
  [[ $MAX_REQUEUES =~ ^[0-9]+$ ]] || refuse "MAX_REQUEUES is '$MAX_REQUEUES'; it must be a number, 0 or more"
  shift
  # the program alone knows: by the name in the file, the file's own, or an override
  # shellcheck disable=SC2086 # CONTAINER is words
  [ -n "${RUN_DIR:-}" ] || RUN_DIR=$($CONTAINER "$PYTHON" -m fedfreeze run "$config" --show-run-dir "$@") || exit
  while [ $# -gt 0 ]; do # RUN_DIR stands for --run-dir
    case $1 in
      --run-dir=*) ;;
      --run-dir) [ $# -lt 2 ] || shift ;;
      *) options+=("$1") ;;
    esac
    shift
  done
  RUN=(-m fedfreeze run "$config" --run-dir "$RUN_DIR" "${options[@]}")
  # containers have no squeue to ask when the job ends
  if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    end=$(squeue --noheader --job="$SLURM_JOB_ID" --format=%e 2> /dev/null || true)
    end=$(date --date="$end" +%s 2> /dev/null || true) # not "NONE" of a job without limit
    [ -z "$end" ] || export SLURM_JOB_END_TIME=$end
  fi
  say "job_id=$SLURM_JOB_ID array=${SLURM_ARRAY_JOB_ID:+$JOB} restart_count=${SLURM_RESTART_COUNT:-0}" \
    "nodes=$SLURM_JOB_NODELIST tasks=${SLURM_NTASKS:-1} cpus_per_task=${SLURM_CPUS_PER_TASK:-}" \
    "gpus_on_node=${SLURM_GPUS_ON_NODE:-0} end_time=${SLURM_JOB_END_TIME:-none}"
  say "gpus=$(gpu_names) git_revision=$(git_revision) home=$FEDFREEZE_HOME run_dir=$RUN_DIR"
  say "command=$CONTAINER $PYTHON ${RUN[*]}"
}

refuse() {
  echo "fedfreeze: error: $1" >&2
  exit 64
}

gpu_names() { nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | paste -s -d, || true; }

git_revision() {
  git -C "$FEDFREEZE_HOME" describe --always --dirty=+dirty --abbrev=12 --exclude='*' 2> /dev/null || echo none
}

finish() {
  local code=0
  run_until_done "$RUN_DIR" "$@" || code=$?
  say "end: job_id=$JOB status=$(summary_value "$RUN_DIR" status) exit_code=$code" \
    "seconds=$(($(date +%s) - STARTED)) restart_count=${SLURM_RESTART_COUNT:-0} run_dir=$RUN_DIR"
  # after a signal of SLURM a rank that was killed too early changes nothing: there is a checkpoint to go on from
  if [ "$code" = 75 ] || { [ "$code" = 76 ] && [ -n "$ASKED_TO_END" ]; }; then
    requeue
  fi
  exit "$code"
}

requeue() {
  local count=${SLURM_RESTART_COUNT:-0}
  if [ -e "$RUN_DIR/stop" ] && [ "$(cat "$RUN_DIR/stop")" != requeue ]; then
    say "not requeued: somebody left the file $RUN_DIR/stop; submit the job again to go on"
  elif [ "$ASKED_TO_END" = TERM ] && ! preempted; then
    say "not requeued: the job was cancelled; submit it again to go on"
  elif [ "$count" -ge "$MAX_REQUEUES" ]; then
    say "not requeued: it was $count times, the limit MAX_REQUEUES is $MAX_REQUEUES; submit it again to go on"
  elif scontrol requeue "$JOB"; then
    say "requeued: $((count + 1)) of at most $MAX_REQUEUES"
    exit 75
  else
    say "SLURM refuses to requeue; submit the job again to go on"
  fi
}

# Whether SLURM is taking the nodes for another job: PreemptTime says so before the job is ended. Where SLURM has begun
# to end a job for another reason, such as scancel, it is no longer RUNNING.
preempted() {
  local job
  job=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2> /dev/null) || return 1
  [[ $job == *" JobState=RUNNING "* && $job =~ \ PreemptTime=[0-9] ]]
}
