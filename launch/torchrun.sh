#!/usr/bin/env bash
# Trains on all GPUs of one machine, or, started on each of several, on all of theirs. Arguments are those of `m4train train`:
#
#   launch/torchrun.sh experiment=NAME engine=fsdp2
#   NODES=2 HEAD=node1 launch/torchrun.sh experiment=NAME engine=fsdp2       # on both nodes; HEAD is any one of them
#
# On one machine `m4train train ... launch.processes=8` does the same; under SLURM see launch/slurm/train.sbatch.
# PROCESSES is the number per machine: its GPUs, or 2 without any.
set -euo pipefail

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
meet=(--standalone)
if [[ ${NODES:-1} != 1 ]]; then
    meet=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?set HEAD to the name of one of the nodes}:${PORT:-29400}" --rdzv-id=m4train)
fi
command=(train)
if [[ ${1:-} == launch ]]; then # launch/torchrun.sh launch check ...: look at the machines first
    command=()
fi
M4TRAIN_OUTCOME=$(mktemp -d) # where the processes leave word of how they ended
export M4TRAIN_OUTCOME
trap 'rm -rf "$M4TRAIN_OUTCOME"' EXIT
exec 3> >(tee "$M4TRAIN_OUTCOME/torchrun" >&2)
keeper=$!
torchrun "${meet[@]}" --nproc-per-node="$processes" -m m4train "${command[@]}" "$@" 2>&3 3>&- &
ranks=$!
trap 'kill -TERM $ranks' TERM INT
trap 'kill -USR1 $ranks' USR1
code=0
while :; do
    wait "$ranks" && code=0 || code=$?
    kill -0 "$ranks" 2>/dev/null || break # a signal ends `wait` before torchrun has ended
done
exec 3>&-
wait "$keeper" || true
# The first rank that failed, as torchrun says at its end: if one died with these samples before, they are named.
first=$(sed -n '/Root Cause/,$ s/.*rank  *: \([0-9]*\) (local_rank.*/\1/p' "$M4TRAIN_OUTCOME/torchrun" | head -n 1)
where=
[[ ! $first || ${command[*]} != train ]] || where=$(m4train launch died "$M4TRAIN_OUTCOME" "$first" 2> /dev/null || true)
[[ ! $where || $where == "it had not begun" ]] || echo "rank $first died: $where" >&2
if [[ -e $M4TRAIN_OUTCOME/stopped-early ]]; then
    code=3 # a checkpoint, and more to do
fi
exit "$code"
