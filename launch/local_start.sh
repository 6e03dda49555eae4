# Sourced by launch/torchrun.sh and launch/mpirun.sh: reads their arguments and finds Python.

. "$FEDFREEZE_HOME/launch/settings.sh"

# read_arguments [RANKS] CONFIG [OPTIONS]: sets RANKS, CONFIG, OVERRIDES (without --run-dir), RUN_DIR and PYTHON
read_arguments() {
  RANKS=${DEFAULT_RANKS:-}
  if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    RANKS=$1
    shift
  fi
  case ${1:-} in
    "") usage_error "CONFIG is missing" ;;
    -h | --help) usage && exit 0 ;;
    -*) usage_error "CONFIG must come before '$1'" ;;
  esac
  [ "${RANKS:-1}" -ge 1 ] || usage_error "RANKS is '$RANKS', the least is 1"
  CONFIG=$1
  shift
  local given=("$@")
  OVERRIDES=()
  while [ $# -gt 0 ]; do
    case $1 in
      --run-dir) shift ;;
      --run-dir=*) ;;
      *) OVERRIDES+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift
  done
  RANKS=${RANKS:-$(gpus_or_two)}
  if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x "$FEDFREEZE_HOME/.venv/bin/python" ] || PYTHON=$FEDFREEZE_HOME/.venv/bin/python
  fi
  # -P: a user's types.py in this folder is not Python's own
  if ! "$PYTHON" -P -c 'import sys, os, importlib.util as u; sys.path.append(os.getcwd())
sys.exit(not u.find_spec("fedfreeze"))' 2> /dev/null; then
    echo "fedfreeze: error: $PYTHON has no fedfreeze; run bash launch/quickstart.sh once, activate your environment" \
      "or set PYTHON=..." >&2
    exit 69
  fi
  # the program alone knows: by its name in the file, the file's own, or an override
  RUN_DIR=$("$PYTHON" -m fedfreeze run "$CONFIG" --show-run-dir "${given[@]}") || exit
}

gpus_or_two() {
  local gpus=${SLURM_GPUS_ON_NODE:-}
  if [ -z "$gpus" ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpus=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
  fi
  gpus=${gpus:-$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)}
  [ "${gpus:-0}" -gt 0 ] && echo "$gpus" || echo 2
}

# the comment at the top of the script
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }

usage_error() {
  echo "fedfreeze: error: $1; usage:" >&2
  usage >&2
  exit 64
}
