"""A real Slurm of two nodes on one machine: munged, slurmctld and two slurmd, without a service manager.

They run in PID, mount and host-name namespaces of their own: the nodes have names of their own, and
when the first process of the PID namespace ends, the kernel ends whatever was started in it, job
steps that lost their slurmd included. That process dies with the test session, however it ends.

Source: slurm.conf(5), slurmd(8) on several slurmd on one host, pid_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests import helpers

NODES = ("n1", "n2")
_START_LIMIT_S = 30
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv", "unshare")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ["unshare", "--pid", "--mount-proc", "--uts", "--fork", "--kill-child"]
# Without %n in TmpFS the nodes collide on the PMIx plugin's folder and srun --mpi=pmix fails.
# A requeued job waits until the credentials of its last start have expired: two minutes by default.
# KillWait (30 by default) is how long the peers of a killed task outlive it: TERM asks them to save first.
_CONF = """\
ClusterName=hvdlm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
_START = """\
cd "$1"
mount --bind hosts /etc/hosts
munged --foreground --force --key-file="$1/munge.key" --socket="$1/munge.socket" \
    --pid-file="$1/munge.pid" --log-file="$1/munge.log" --seed-file="$1/munge.seed" &
slurmctld -D -f "$1/slurm.conf" &
for node in n1 n2; do
    unshare --uts sh -c 'hostname "$1"; exec slurmd -D -N "$1" -f "$2/slurm.conf"' sh "$node" "$1" &
done
wait
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a Slurm can be started by root only"
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"no right to make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def running() -> Iterator[Path]:
    """Start it; its configuration file. At the end no process of it is left."""
    with tempfile.TemporaryDirectory(prefix="hvdlm-slurm-") as name:
        folder = Path(name)
        _write_files(folder)
        command = ["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, "bash", "-c", _START, "bash", name]
        with (folder / "output.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "PATH": _PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            _wait_for_nodes(folder)
            yield folder / "slurm.conf"
        finally:
            # unshare returns when the namespace's first process, and so every other, is gone.
            for first in psutil.Process(process.pid).children():
                first.kill()
            process.wait()


def _write_files(folder: Path) -> None:
    for node in NODES:
        (folder / node).mkdir()
    host = socket.gethostname()
    conf = _CONF.format(folder=folder, host=host, ports=_free_ports(1 + len(NODES)))
    (folder / "slurm.conf").write_text(conf)
    hosts = Path("/etc/hosts").read_text()
    (folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(NODES)}\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [s.getsockname()[1] for s in sockets]


def _wait_for_nodes(folder: Path) -> None:
    command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def idle() -> bool:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip() == str(len(NODES))

    try:
        helpers.wait_until(idle, within_s=_START_LIMIT_S, what="idle nodes")
    except (AssertionError, subprocess.TimeoutExpired) as error:
        logs = "".join(f"\n{path.name}:\n{path.read_text()}" for path in folder.glob("*.log"))
        raise RuntimeError(f"Slurm did not start: {error}{logs}") from None
