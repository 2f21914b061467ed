"""What the Slurm of the tests is told: its nodes, its partitions, its limits."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
OUTSIDE = "outside"
"""A place on the bridge that is no node."""
_ADDRESSES = {**{node: f"10.0.0.{k}" for k, node in enumerate(NODES, 1)}, OUTSIDE: "10.0.0.200"}
CONTROLLER = "10.0.0.254"
_LOCAL = "127.0.0.1"
# Without %n in TmpFS the nodes collide on the PMIx plugin's folder and srun --mpi=pmix fails.
# A requeued job waits until the credentials of its last start have expired: two minutes by default.
# KillWait is Slurm's default: how long a job goes on after TERM.
_CONF = """\
ClusterName=hvdlm
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
TmpFS={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
KillWait=30
OverTimeLimit=0
MinJobAge=86400
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=5
PartitionName=low Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def write(folder: Path, *, own_network: bool) -> None:
    """Write slurm.conf, places, hosts, munge's key and a folder for each node.

    Args:
        folder: where to; empty.
        own_network: see `addresses`.
    """
    of_places, ports = addresses(own_network), _free_ports(1 + len(NODES))
    for node in NODES:
        (folder / node).mkdir()
    lines = [
        f"NodeName={node} NodeAddr={of_places[node]} Port={port} CPUs=8"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    controller = CONTROLLER if own_network else _LOCAL
    conf = _CONF.format(
        folder=folder, host=socket.gethostname(), controller=controller, port=ports[0], nodes="\n".join(lines)
    )
    (folder / "slurm.conf").write_text(conf)
    places = "".join(f"{address} {place}\n" for place, address in of_places.items())
    (folder / "places").write_text(places)
    (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n{places}")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def addresses(own_network: bool) -> dict[str, str]:
    """Of each node and of `OUTSIDE`: their own on a bridge, or 127.0.0.1 for all."""
    return _ADDRESSES if own_network else dict.fromkeys(_ADDRESSES, _LOCAL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((_LOCAL, 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]
