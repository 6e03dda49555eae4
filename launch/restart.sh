# Sourced by the launch and SLURM scripts: the command of a run, started again when a rank was lost, told of signals.
#
#   run_until_done RUN_DIR COMMAND...     start COMMAND; return the exit code of the run (`fedfreeze --help` lists them)
#
# MAX_RESTARTS  how many times a run that lost a rank is started again (default: 3)
# FEDFREEZE_HOME must name the project's folder. The caller may define `tell_run SIGNAL PID` (here: kill).

RUN_PID=""      # the launcher, while it runs
RUN_DIR_NOW=""  # the run folder, while it runs
ASKED_TO_END="" # the signal by which somebody asked for the end
SIGNALLED=""

say() { printf 'fedfreeze: %s\n' "$*"; }

run_until_done() {
  local run_dir=$1 limit=${MAX_RESTARTS:-3} restarts=0 before code=0
  shift
  if ! [[ $limit =~ ^[0-9]+$ ]]; then
    echo "fedfreeze: error: MAX_RESTARTS is '$limit'; it must be a number of restarts, 0 or more" >&2
    return 64
  fi
  RUN_DIR_NOW=$run_dir
  trap 'pass_on USR1' USR1
  trap 'pass_on USR2' USR2
  trap 'pass_on TERM' TERM
  trap 'pass_on TERM' HUP # the terminal is gone
  trap 'pass_on INT' INT
  while :; do
    before=$(summary_identity "$run_dir")
    start_in_own_group "$@"
    wait_for_launcher || code=$?
    code=$(code_of_run "$run_dir" "$before" "$code")
    if [ "$code" != 76 ] || [ -n "$ASKED_TO_END" ]; then
      break
    elif [ "$restarts" -ge "$limit" ]; then
      say "a rank was lost; not started again: it was $restarts times, the limit MAX_RESTARTS; $(time_lost "$run_dir")"
      break
    fi
    restarts=$((restarts + 1))
    say "restart $restarts of $limit: a rank was lost; $(time_lost "$run_dir")"
    code=0
  done
  return "$code"
}

# A process group of its own: a Ctrl-C of the terminal reaches this script alone, which passes it on once. Without
# standard input, as a launcher that reads the terminal from there would be stopped.
start_in_own_group() {
  set -m
  "$@" < /dev/null &
  RUN_PID=$!
  set +m
  [ -z "$ASKED_TO_END" ] || tell_run "$ASKED_TO_END" "$RUN_PID" # it came between two starts
}

# `wait` returns as soon as a trap has run: wait again, until it returns for the launcher's own end.
wait_for_launcher() {
  local code=127 now
  while :; do
    SIGNALLED=""
    now=0
    wait "$RUN_PID" || now=$?
    [ "$now" = 127 ] || code=$now # 127: its code was told the time before
    [ -n "$SIGNALLED" ] || break
  done
  kill -KILL -- "-$RUN_PID" 2> /dev/null || true # what the launcher may have left behind
  RUN_PID=""
  return "$code"
}

pass_on() {
  SIGNALLED=$1 ASKED_TO_END=$1
  say "SIG$1 at $(date +%FT%T)"
  [ -z "$RUN_PID" ] || tell_run "$1" "$RUN_PID"
}

tell_run() { kill "-$1" "$2" 2> /dev/null || true; }

# tell_ranks SIGNAL PID: signal the ranks that launcher PID has on this machine; torchrun keeps signals to itself, and
# mpirun takes SIGTERM for an order to kill. One rank that knows is enough.
tell_ranks() {
  local child
  for child in $(cat "/proc/$2"/task/*/children 2> /dev/null); do
    case $(cat "/proc/$child/comm" 2> /dev/null) in
      hydra_pmi_proxy | orted | prted) tell_ranks "$1" "$child" ;;
      *) ! grep -q fedfreeze "/proc/$child/cmdline" 2> /dev/null || kill "-$1" "$child" 2> /dev/null || true ;;
    esac
  done
}

# keep_stop_file PID: ask by the file `stop` instead of a signal, where ranks are on other machines. Anew while the run
# goes on, because a run that is just starting takes the file for an old one.
keep_stop_file() {
  local file=$RUN_DIR_NOW/stop
  while kill -0 "$1" 2> /dev/null; do
    [ -e "$file" ] || [ ! -d "$RUN_DIR_NOW" ] || echo requeue > "$file"
    sleep 1
  done &
}

# Tells two summaries apart without a clock: the program writes a new file each time.
summary_identity() { { stat -c '%i %y' "$1/summary.json" && cksum < "$1/summary.json"; } 2> /dev/null || echo none; }

# summary_value RUN_DIR KEY: a value at the top of summary.json, without quotes; nothing if there is none
summary_value() { sed -nE "s/^  \"$2\": \"?([^\",]*)\"?,?\$/\1/p" "$1/summary.json" 2> /dev/null | head -n 1; }

# code_of_run RUN_DIR IDENTITY_BEFORE LAUNCHER_CODE: torchrun calls every failure 1 and a killed rank cannot report
# itself, so summary.json is asked, unless it is that of a former start.
code_of_run() {
  local code=$3 status
  if [ "$(summary_identity "$1")" != "$2" ]; then
    status=$(summary_value "$1" status)
    case $status in
      finished) code=0 ;;
      running) code=76 ;; # and nobody is there
      *) code=$(summary_value "$1" exit_code) ;;
    esac
    [[ $code =~ ^[0-9]+$ ]] || code=$3
  elif [ "$code" != 0 ] && [ "$ASKED_TO_END" = INT ]; then
    code=130
  elif [ "$code" -gt 130 ] || { [ "$code" != 0 ] && [ -n "$ASKED_TO_END" ]; }; then
    code=76 # killed before it could open the run folder
  fi
  echo "$code"
}

# time_lost RUN_DIR: how much of the work is done once more
time_lost() {
  local newest
  newest=$(ls -d -t "$1"/checkpoints/round-* 2> /dev/null | head -n 1)
  if [ -z "$newest" ]; then
    echo "there is no checkpoint, it begins anew"
  else
    echo "$(($(date +%s) - $(stat -c %Y "$newest"))) s lost since checkpoint ${newest##*/}"
  fi
}
