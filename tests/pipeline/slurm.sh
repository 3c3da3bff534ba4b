#!/usr/bin/env bash
# A Slurm of one machine for the tests, with nothing but a folder of its own: `slurm.sh start <folder>`, `stop <folder>`.
# Needs Debian's slurm-wlm and munge, neither systemd nor cgroups. Two slurmd play two nodes; all listen on localhost.
set -euo pipefail
folder=$2
export SLURM_CONF=$folder/slurm.conf

if [ "$1" = stop ]; then
    scancel --user "$(id -un)" || true
    for _ in $(seq 300); do [ -n "$(squeue --noheader)" ] || break; sleep 0.1; done # they have 10 s, see KillWait
    for pid in "$folder"/{slurmd-node1,slurmd-node2,slurmctld,munged}.pid; do
        [ ! -e "$pid" ] || kill "$(cat "$pid")" || true
    done
    for _ in $(seq 100); do compgen -G "$folder/*.pid" >/dev/null || exit 0; sleep 0.1; done
    echo "not all daemons ended; logs are in $folder" >&2
    exit 1
fi

mkdir -p "$folder"/{state,node1,node2}
host=$(hostname -s)
user=$(id -un)
read -r controller node1 node2 < <(python3 -c '
import socket
free = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in free))')
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=$user
SlurmdUser=$user
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=10
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node1 CPUs=4
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$node2 CPUs=4
PartitionName=all Nodes=ALL Default=YES PriorityTier=1 GraceTime=15
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
CONF
(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" 2>>"$folder/munged.err"
slurmctld -c
slurmd -N node1
slurmd -N node2
for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%T)" != idle ] || exit 0
    sleep 0.1
done
echo "the nodes did not come up; logs are in $folder" >&2
exit 1
