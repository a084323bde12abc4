#!/usr/bin/env bash
# A real SLURM of virtual nodes, n1 to n4, on this one machine: to try launch/slurm/train.sbatch, and for the tests.
#
#   launch/slurm/virtual_cluster.sh start DIR [NODES]     # prints the line that makes srun, sbatch and squeue use it
#   launch/slurm/virtual_cluster.sh on DIR NODE COMMAND...    # runs a command as one of the nodes
#   launch/slurm/virtual_cluster.sh stop DIR
#
# Every node has a network namespace, an address and a hostname of its own, so that what works only over localhost fails here
# as it would on machines. Where the kernel does not allow that, the nodes share the address of this machine, and it says why.
#
# Everything lies in DIR: configuration, sockets, logs, state. Each node pretends to have two GPUs. Several such clusters may
# run at once; where this machine belongs to a real SLURM nothing is touched. With OWNER=PID the cluster is stopped when that
# process has ended, however it did. Needs slurm-wlm and munge (Debian: apt-get install slurm-wlm munge), and root, as slurmd
# does everywhere.
set -euo pipefail

fail() { echo "virtual_cluster.sh: $*" >&2; exit 1; }
case "$#${1:-}" in
2stop) ;;
2start | 3start) [[ ${3:-4} =~ ^[1-9]$ ]] ;;
*on) [[ $# -ge 4 ]] ;;
*) false ;;
esac || fail "usage: virtual_cluster.sh start DIR [NODES, up to 9] | on DIR NODE COMMAND... | stop DIR"
action=$1
mkdir -p "$2"
dir=$(cd "$2" && pwd)
PATH=$PATH:/usr/sbin:/sbin
mark='# a virtual cluster of m4train'

stop() {
    local file name pid pids=() id space
    id=$(cat "$dir/network" 2>/dev/null) || true
    # the nodes with all that runs on them, also what jobs left behind
    for space in $([[ ! $id ]] || ip netns list | sed -n "s/^\($id-n.\).*/\1/p"); do
        ip netns pids "$space" | xargs --no-run-if-empty kill -KILL 2>/dev/null || true
        ip netns delete "$space" || true
        ip link delete "$space" 2>/dev/null || true
    done
    [[ ! $id ]] || ip link delete "$id" 2>/dev/null || true
    rm -f "$dir/network"
    for file in "$dir"/{watcher,slurmd-n?,slurmctld,munged}.pid; do
        name=$(basename "$file" .pid)
        pid=$(cat "$file" 2>/dev/null) && [[ $pid != "$$" ]] || continue
        # only a process that still is what wrote the file
        name=${name%-n?} name=${name/watcher/bash}
        [[ $(ps -o comm= -p "$pid" 2>/dev/null) == "$name" ]] && kill "$pid" && pids+=("$pid")
    done
    for pid in "${pids[@]}"; do
        for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.1; done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

# Runs a command as a node: in its namespace, with its name, with the names of all in /etc/hosts, and with no other names.
on() {
    [[ -e $dir/network ]] || { "${@:2}"; return; }
    nsenter --net="/run/netns/$(cat "$dir/network")-$1" unshare --uts --mount bash -c \
        'hostname "$1" && mount --bind "$2/hosts" /etc/hosts &&
            { [[ ! -e /etc/resolv.conf ]] || mount --bind "$2/resolv.conf" /etc/resolv.conf; } && exec "${@:3}"' \
        bash "$1" "$dir" "${@:2}"
}

if [[ $action == on ]]; then
    export SLURM_CONF=$dir/slurm.conf
    on "${@:3}"
    exit
fi
if [[ $action == stop ]]; then
    SLURM_CONF=$dir/slurm.conf timeout 10 scancel --full --user="$(id -un)" 2>/dev/null || true
    stop
    exit 0
fi

for program in munged slurmctld slurmd srun; do
    command -v "$program" >/dev/null || fail "$program is not installed: apt-get install slurm-wlm munge."
done
[[ $(id -u) == 0 ]] || fail "slurmd has to be started as root."
[[ -z ${SLURM_CONF:-} ]] || grep -qsx "$mark" "$SLURM_CONF" ||
    fail "SLURM_CONF is set to $SLURM_CONF: this machine uses a SLURM already."
for file in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf; do
    [[ ! -e $file ]] || fail "$file exists: this machine belongs to a SLURM already."
done
for pid in $(pgrep -x slurmctld; pgrep -x slurmd); do
    variables=$(tr '\0' '\n' < "/proc/$pid/environ") 2>/dev/null || true
    [[ $variables ]] || continue # it is ending
    conf=$(sed -n 's/^SLURM_CONF=//p' <<< "$variables")
    grep -qsx "$mark" "$conf" || fail "a $(ps -o comm= -p "$pid") is running: this machine belongs to a SLURM already."
done

host=$(hostname -s)
nodes=() ports=() port=$((10000 + RANDOM % 20000)) # below the ports that the system hands out, which may be gone before they are used
for ((n = 1; n <= ${3:-4}; n++)); do nodes+=("n$n"); done
while ((${#ports[@]} <= ${#nodes[@]})); do
    port=$((port + 1))
    (: > "/dev/tcp/127.0.0.1/$port") 2> /dev/null || ports+=("$port") # nobody listens there
done
chmod 755 "$dir"
mkdir -p "$dir/state" "$dir/munge"
chmod 700 "$dir/munge"
(umask 077; head -c 1024 /dev/urandom > "$dir/munge/key")
touch "$dir/gpu0" "$dir/gpu1"  # what a GPU's device file is elsewhere
echo "Name=gpu File=$dir/gpu[0-1]" > "$dir/gres.conf"
export SLURM_CONF=$dir/slurm.conf

# A bridge with addresses that are free here (of the range that is set aside for tests of networks), and behind it a namespace
# for each node. DIR/network names the bridge; namespaces and their ends of the bridge are called as it is, and the node.
network() {
    local id node number=10
    command -v ip nsenter >/dev/null || { echo "ip or nsenter is not installed"; return 1; }
    for _ in $(seq 20); do
        net=198.18.$((RANDOM % 256)) id=m4-$(printf '%04x' $((RANDOM)))
        [[ -z $(ip -4 route show root "$net.0/24") && ! -e /sys/class/net/$id ]] && break
    done
    echo "$id" > "$dir/network"
    ip link add "$id" type bridge && ip address add "$net.1/24" dev "$id" && ip link set "$id" up || return 1
    printf '%s\n' "127.0.0.1 localhost" "$net.1 $host" > "$dir/hosts"
    : > "$dir/resolv.conf"
    for node in "${nodes[@]}"; do
        number=$((number + 1))
        echo "$net.$number $node" >> "$dir/hosts"
        ip netns add "$id-$node" && ip link add "$id-$node" type veth peer name eth0 netns "$id-$node" &&
            ip link set "$id-$node" master "$id" up && ip -n "$id-$node" link set lo up &&
            ip -n "$id-$node" address add "$net.$number/24" dev eth0 && ip -n "$id-$node" link set eth0 up &&
            ip -n "$id-$node" route add default via "$net.1" && on "$node" true || return 1
    done
}

configure() { # ADDRESS of the controller
    cat > "$dir/slurm.conf" <<CONF
$mark
ClusterName=virtual
SlurmctldHost=$host($1)
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
# a node that does not answer for so long is down, and its job requeued
SlurmdTimeout=30
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
CONF
    for ((n = 1; n <= ${#nodes[@]}; n++)); do
        where="NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[n]}"
        [[ $1 == 127.0.0.1 ]] || where="NodeAddr=$net.$((10 + n)) Port=${ports[n]}"
        echo "NodeName=n$n $where CPUs=4 RealMemory=1000 Gres=gpu:2" >> "$dir/slurm.conf"
    done
    echo "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >> "$dir/slurm.conf"
}

daemons() { # COMMAND...: what runs the daemon of a node, whose name follows
    munged --force --socket="$dir/munge.socket" --key-file="$dir/munge/key" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge/seed" 2>> "$dir/munged.err" || return 1
    slurmctld -c || return 1
    for node in "${nodes[@]}"; do
        if [[ $1 == on ]]; then on "$node" slurmd -N "$node"; else slurmd -N "$node"; fi ||
            { tail -n 1 "$dir/slurmd-$node.log"; return 1; }
    done
    for _ in $(seq 150); do
        [[ $(timeout 5 sinfo --noheader --Node --format=%T 2>/dev/null | sort -u) == idle ]] && break
        sleep 0.1
    done
    [[ $(timeout 5 sinfo --noheader --Node --format=%T | sort -u) == idle ]] || return 1
    # the first node reaches the last one, as their ranks must
    [[ $1 != on ]] || on n1 timeout 5 bash -c ": > /dev/tcp/$net.$((10 + ${#nodes[@]}))/${ports[-1]}"
}

started=
if why=$(network 2>&1) && network=$(cat "$dir/network"); then
    net=$(ip -4 -o address show dev "$network" | sed 's|.* inet \([0-9.]*\)\.1/.*|\1|')
    configure "$net.1"
    why=$(daemons on 2>&1) && started=yes
fi
if [[ ! $started ]]; then
    stop
    echo "virtual_cluster.sh: the nodes share the address of this machine: ${why##*$'\n'}" >&2
    rm -rf "$dir"/state/* "$dir"/*.pid
    configure 127.0.0.1
    daemons alone || { stop; tail -n 5 "$dir"/*.log >&2; fail "the cluster did not start; its logs are in $dir."; }
fi
if [[ ${OWNER:-} ]]; then
    setsid bash -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; unset SLURM_CONF; exec bash "$2" stop "$3"' \
        bash "$OWNER" "$(realpath "$0")" "$dir" < /dev/null > /dev/null 2>&1 &
    echo $! > "$dir/watcher.pid"
fi
echo "export SLURM_CONF=$SLURM_CONF"
