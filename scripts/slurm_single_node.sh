#!/usr/bin/env bash
# Start a SLURM of one node, this machine, from Debian's packages; for trying and testing sweeps on it.
#
#     bash scripts/slurm_single_node.sh         # installs what is missing, starts it, waits until it takes jobs
#     bash scripts/slurm_single_node.sh stop    # stops its daemons; what was installed stays
#
# Needs root (it is meant for containers and throw-away machines), neither systemd nor cgroups.
set -euo pipefail
conf=/etc/slurm/slurm.conf
mark="# written by qpipe's scripts/slurm_single_node.sh"
state=/var/spool/qpipe-slurm

fail() { echo "slurm_single_node: $1" >&2; exit 1; }

install_packages() {
    command -v slurmctld slurmd munged sbatch > /dev/null && return
    command -v apt-get > /dev/null || fail "SLURM is not installed and there is no apt-get; install slurmctld, slurmd and munge"
    apt-get update -qq || fail "apt-get update failed; is there a package mirror?"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
        > "$state/install.log" 2>&1 || fail "the packages could not be installed: $state/install.log"
}

write_configuration() {
    [ ! -e "$conf" ] || grep -qF "$mark" "$conf" || fail "$conf belongs to another SLURM; this script leaves it alone"
    local host memory
    host=$(hostname -s)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat > "$conf" << END
$mark
ClusterName=qpipe
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5  # a job put back into the queue waits that long, not two minutes
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/node
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc --all) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
END
}

running() { pid=$(cat "$state/$1.pid" 2> /dev/null) && kill -0 "$pid" 2> /dev/null; }

start() {
    [ "$(id -u)" = 0 ] || fail "it needs root"
    mkdir -p "$state/controller" "$state/node"
    install_packages
    write_configuration
    if ! munge -n > /dev/null 2>&1; then
        mkdir -p /run/munge
        chown munge: /run/munge
        runuser -u munge -- munged || fail "munged did not start; see /var/log/munge/munged.log"
    fi
    running slurmctld || slurmctld || fail "slurmctld did not start; see $state/slurmctld.log"
    running slurmd || slurmd || fail "slurmd did not start; see $state/slurmd.log"
    for _ in $(seq 60); do
        if sinfo -h -o %T 2> /dev/null | grep -qxE "idle|mixed|allocated"; then
            echo "SLURM $(sinfo -V | cut -d' ' -f2) takes jobs: $(sinfo -h -o 'partition %P, %c processors, %m MB'); stop it with: bash $0 stop"
            return
        fi
        sleep 0.5
    done
    fail "the node takes no jobs ($(sinfo -h -o '%T: %E' 2>&1)); see $state/slurmctld.log and $state/slurmd.log"
}

stop() {
    for daemon in slurmd slurmctld; do
        running "$daemon" || continue
        kill "$pid"
        while running "$daemon"; do sleep 0.1; done
    done
    [ ! -f "$conf" ] || ! grep -qF "$mark" "$conf" || rm "$conf"
    echo "SLURM is stopped"
}

case "${1:-start}" in
    start) start ;;
    stop) stop ;;
    *) fail "'$1' is neither start nor stop" ;;
esac
