#!/usr/bin/env bash
# Stands for `python -m fedfreeze run CONFIG --run-dir DIR` where scripts are tested: its rounds are sleeps.
#
# STARTS   what each start does, the last word for all that follow: go, lose (be killed in round 2), CODE (leave before
#          the folder is opened), CODE-in-the-folder (leave later; the launcher says 1, as torchrun does)
# ROUNDS   how many rounds a whole run has (default 3), of 0.2 s
if [ "$2" = -c ]; then exit 0; fi # "is fedfreeze installed?"
dir=runs/${4:-} show=""
while [ $# -gt 0 ]; do
  [ "$1" != --run-dir ] || dir=$2
  [ "$1" != --show-run-dir ] || show=1
  shift
done
[ -z "$show" ] || { echo "$dir" && exit; }
count=$(($(cat "$dir.starts" 2> /dev/null || echo 0) + 1))
mkdir -p "$(dirname "$dir")"
echo "$count" > "$dir.starts"
read -r -a words <<< "${STARTS:-go}"
word=${words[$((count <= ${#words[@]} ? count - 1 : ${#words[@]} - 1))]}
echo "fake: start $count: $word"
[[ ! $word =~ ^[0-9]+$ ]] || exit "$word"

note() {
  printf '{\n  "status": "%s",\n  "exit_code": %s,\n  "at": %s\n}\n' "$1" "$2" "$(date +%s.%N)" > "$dir/.summary.$$"
  mv "$dir/.summary.$$" "$dir/summary.json"
}
leave() {
  echo "fake: leaves for $1"
  note preempted 75
  exit 75
}
trap 'leave USR1' USR1
trap 'leave USR2' USR2
trap 'leave TERM' TERM
trap 'note preempted 130; exit 130' INT
mkdir -p "$dir/checkpoints"
rm -f "$dir/stop"
note running null
round=$(cat "$dir/round" 2> /dev/null || echo 0)
[ "$round" -lt "${ROUNDS:-3}" ] || echo "fake: done already"
while [ "$round" -lt "${ROUNDS:-3}" ]; do
  sleep 0.2
  round=$((round + 1))
  echo "$round" > "$dir/round"
  mkdir -p "$dir/checkpoints/round-$round"
  [ ! -e "$dir/stop" ] || leave "the file stop"
  if [ "$round" = 2 ] && [ "$word" = lose ]; then
    echo 0 > "$dir/round" # it would be lost once only otherwise
    kill -KILL $$
  elif [[ $word == *-in-the-folder ]]; then
    note failed "${word%%-*}"
    exit 1
  fi
done
note finished 0
