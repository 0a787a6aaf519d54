#!/usr/bin/env bash
# A one-node Slurm for the tests, in its own folder: sourced by run.sh, as root.
#
#   start_cluster FOLDER    munged, slurmctld and slurmd on free ports of 127.0.0.1; sets SLURM_CONF
#   stop_cluster            stops what start_cluster started, by its own process ids
#
# It does not touch a Slurm or munge of the machine: key, socket, ports, state and logs are in FOLDER.

cluster_pids=()

free_ports() {  # two of them
    python3 - <<'PYTHON'
import socket

sockets = [socket.socket() for _ in range(2)]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

start_cluster() {
    local cluster=$1 controller node host
    host=$(hostname -s)
    read -r controller node <<<"$(free_ports)"
    mkdir -p "$cluster"/{state,spool,munge}
    chmod 711 "$cluster/munge"  # munged insists: nobody else may write there
    head -c 1024 /dev/urandom >"$cluster/munge/key"
    chmod 400 "$cluster/munge/key"

    cat >"$cluster/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for a credential's lifetime: 120 s by default.
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
KillWait=5
OverTimeLimit=0
MinJobAge=3600
# Missing CPUs are overcommitted.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=$host Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=$host PriorityTier=2 State=UP
CONF
    export SLURM_CONF=$cluster/slurm.conf

    munged --foreground --key-file "$cluster/munge/key" --socket "$cluster/munge/socket" \
        --pid-file "$cluster/munge/pid" --log-file "$cluster/munge/log" --seed-file "$cluster/munge/seed" \
        >"$cluster/munge/out" 2>&1 &
    cluster_pids+=($!)
    wait_for 20 test -S "$cluster/munge/socket"
    slurmctld -D -f "$SLURM_CONF" >"$cluster/slurmctld.out" 2>&1 &
    cluster_pids+=($!)
    slurmd -D -f "$SLURM_CONF" >"$cluster/slurmd.out" 2>&1 &
    cluster_pids+=($!)
    wait_for 60 node_is_idle
}

node_is_idle() { [ "$(sinfo --noheader --partition=test --format=%T 2>/dev/null)" = idle ]; }

stop_cluster() {
    local i
    scancel --quiet --user="$(id -un)" 2>/dev/null || true
    wait_for 20 node_is_idle || true
    for ((i = ${#cluster_pids[@]} - 1; i >= 0; i--)); do  # munged last
        kill "${cluster_pids[$i]}" 2>/dev/null || true
        wait "${cluster_pids[$i]}" 2>/dev/null || true
    done
    cluster_pids=()
}

wait_for() {  # seconds, command ...: until the command succeeds; 1 when the time is over
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        if [ "$SECONDS" -ge "$end" ]; then return 1; fi
        sleep 0.5
    done
}
