#!/usr/bin/env bash
# A real SLURM of two virtual nodes, n1 and n2, on this one machine: to try launch/slurm/train.sbatch, and for the tests.
#
#   launch/slurm/virtual_cluster.sh start DIR     # prints the line that makes srun, sbatch and squeue use it
#   launch/slurm/virtual_cluster.sh stop DIR
#
# Everything lies in DIR: configuration, sockets, logs, state. Each node pretends to have two GPUs. Where this machine
# already belongs to a SLURM cluster nothing is touched. Needs slurm-wlm and munge (Debian: apt-get install slurm-wlm munge),
# and root, as slurmd does everywhere.
set -euo pipefail

fail() { echo "virtual_cluster.sh: $*" >&2; exit 1; }
[[ $# == 2 && ( $1 == start || $1 == stop ) ]] || fail "usage: virtual_cluster.sh start|stop DIR"
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
PATH=$PATH:/usr/sbin:/sbin

stop() {
    local name pid pids=()
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        pid=$(cat "$dir/$name.pid" 2>/dev/null) || continue
        # only a process that still is what wrote the file
        [[ $(ps -o comm= -p "$pid" 2>/dev/null) == "${name%-n?}" ]] && kill "$pid" && pids+=("$pid")
    done
    for pid in "${pids[@]}"; do
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

if [[ $action == stop ]]; then
    SLURM_CONF=$dir/slurm.conf timeout 10 scancel --full --user="$(id -un)" 2>/dev/null || true
    stop
    exit 0
fi

for program in munged slurmctld slurmd srun; do
    command -v "$program" >/dev/null || fail "$program is not installed: apt-get install slurm-wlm munge."
done
[[ $(id -u) == 0 ]] || fail "slurmd has to be started as root."
[[ -z ${SLURM_CONF:-} ]] || fail "SLURM_CONF is set to $SLURM_CONF: this machine uses a SLURM already."
for file in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf; do
    [[ ! -e $file ]] || fail "$file exists: this machine belongs to a SLURM already."
done
for program in slurmctld slurmd; do
    ! pgrep -x "$program" >/dev/null || fail "a $program is running: this machine belongs to a SLURM already."
done

host=$(hostname -s)
ports=() port=$((10000 + RANDOM % 20000)) # below the ports that the system hands out, which may be gone before they are used
while ((${#ports[@]} < 3)); do
    port=$((port + 1))
    (: > "/dev/tcp/127.0.0.1/$port") 2> /dev/null || ports+=("$port") # nobody listens there
done
chmod 755 "$dir"
mkdir -p "$dir/state" "$dir/munge"
chmod 700 "$dir/munge"
(umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
cat > "$dir/slurm.conf" <<CONF
ClusterName=virtual
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
AuthType=auth/munge
# a requeued job waits for the lifetime of a credential before it starts again
AuthInfo=socket=$dir/munge.socket,cred_expire=5
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
StateSaveLocation=$dir/state
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdSpoolDir=$dir/spool-%n
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=1000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
touch "$dir/gpu0" "$dir/gpu1"  # what a GPU's device file is elsewhere
echo "Name=gpu File=$dir/gpu[0-1]" > "$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf

trap 'stop; tail -n 5 "$dir"/*.log >&2; fail "the cluster did not start; its logs are in $dir."' ERR
munged --force --socket="$dir/munge.socket" --key-file="$dir/munge/key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" 2>> "$dir/munged.err"
slurmctld -c
slurmd -N n1
slurmd -N n2
for _ in $(seq 150); do
    [[ $(timeout 5 sinfo --noheader --Node --format=%T 2>/dev/null | sort -u) == idle ]] && ready=yes && break
    sleep 0.2
done
[[ ${ready:-} == yes ]]
echo "export SLURM_CONF=$SLURM_CONF"
