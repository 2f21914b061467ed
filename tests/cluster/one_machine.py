"""A real Slurm of four nodes on one machine: munged, slurmctld and four slurmd, without a service manager.

All of it runs in PID, mount, host-name and network namespaces of its own, with a bridge in the latter,
of which the machine sees nothing. A node has namespaces of its own in there: a name, an address on the
bridge, process ids from 1. When the first process of a PID namespace ends, the kernel ends whatever was
started in it, job steps that lost their slurmd included: so a node dies as if somebody pulled its plug,
and the whole cluster dies with the test session, however that ends.

The tests' own process enters the cluster's network while a test runs (`Machine.joined`), so that srun
and sbatch reach the nodes and are reached. Where no network namespace may be made, the nodes are on
other ports of 127.0.0.1 instead.

Source: slurm.conf(5), slurmd(8) on several slurmd on one host, pid_namespaces(7), ip-netns(8).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import final

import psutil

from tests import helpers
from tests.cluster import configuration
from tests.cluster.configuration import CONTROLLER, NODES

_START_LIMIT_S = 30
_NOTICED_DEAD_S = 60
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv", "unshare", "nsenter")
_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
_NAMESPACES = ["unshare", "--pid", "--mount-proc", "--uts", "--fork", "--kill-child"]
_CLONE_NEWNET = 0x40000000
_START = """\
cd "$1"
mount --bind hosts /etc/hosts
if [[ -n $2 ]]; then
    ip link set lo up
    ip link add name bridge type bridge
    ip address add "$2/24" dev bridge
    ip link set bridge up
    mount -t tmpfs tmpfs /run  # Where ip keeps the names of namespaces.
    while read -r address place; do
        ip netns add "$place"
        ip link add name "$place" type veth peer name eth0 netns "$place"
        ip link set "$place" master bridge up
        ip -n "$place" address add "$address/24" dev eth0
        ip -n "$place" link set lo up
        ip -n "$place" link set eth0 up
    done <places
fi
munged --foreground --force --key-file="$1/munge.key" --socket="$1/munge.socket" \
    --pid-file="$1/munge.pid" --log-file="$1/munge.log" --seed-file="$1/munge.seed" &
slurmctld -D -f "$1/slurm.conf" &
touch is-up
wait
"""
# The shell is what init is on a machine: it reaps orphans.
_START_NODE = 'hostname "$1"; mount -t tmpfs tmpfs /dev/shm; slurmd -D -N "$1" -f "$2/slurm.conf"; exit'


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a Slurm can be started by root only"
    lacking = [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge"
    tried = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"no right to make namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@final
class Machine:
    """The running cluster.

    Attributes:
        conf: the configuration file.
        addresses: of each node, and of `OUTSIDE`, a place on the bridge that is no node.
        own_network: the nodes have addresses of their own; else all are 127.0.0.1.
    """

    def __init__(self, folder: Path, first: int, *, own_network: bool) -> None:
        self.conf = folder / "slurm.conf"
        self.own_network = own_network
        self.addresses = configuration.addresses(own_network)
        self._folder = folder
        self._first = first
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def inside(self, place: str) -> list[str]:
        """What to put before a command that shall run in the network of a node, or of `OUTSIDE`."""
        return ["nsenter", f"--net={self._network(place)}"] if self.own_network else []

    def first(self, node: str) -> psutil.Process:
        """A node's process 1; slurmd is its child."""
        (unshare,) = psutil.Process(self._nodes[node].pid).children()
        (first,) = unshare.children()
        return first

    @contextlib.contextmanager
    def mounted(self, node: str, source: Path, place: Path) -> Iterator[None]:
        """What only this node sees: another file or folder at a place."""
        there = ["nsenter", f"--target={self.first(node).pid}", "--mount", "--pid"]
        subprocess.run([*there, "mount", "--bind", str(source), str(place)], check=True)
        try:
            yield
        finally:
            subprocess.run([*there, "umount", "--lazy", str(place)], check=True)

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """This thread, and what it starts, is on the bridge, as a login node is."""
        if not self.own_network:
            yield
            return
        own, bridge = Path("/proc/thread-self/ns/net"), Path(f"/proc/{self._first}/ns/net")
        with own.open() as before:
            with bridge.open() as network:
                _enter_network(network.fileno())
            try:
                yield
            finally:
                _enter_network(before.fileno())

    def start(self, node: str) -> None:
        """Start a node, or one that died again."""
        command = ["nsenter", f"--target={self._first}", "--pid", "--mount", "--uts"]
        command += [f"--net={self._network(node)}"] if self.own_network else []
        command += [*_NAMESPACES, "sh", "-c", _START_NODE, "sh", node, str(self._folder)]
        self._nodes[node] = _launch(command, self._folder)

    def kill(self, node: str, *, unplug: bool = False) -> None:
        """The node is dead at once: its slurmd, and every process of every job on it.

        Args:
            node: its name.
            unplug: off the network first, so that nobody is told, not even by the closing of a connection.
        """
        if unplug:
            self._link(node, "down")
        process = self._nodes.pop(node)
        # It ends when the namespace's first process, and so every other, is gone.
        (unshare,) = psutil.Process(process.pid).children()
        for first in unshare.children():
            first.kill()
        process.wait()

    def repair(self) -> None:
        """Every node is plugged in and started again."""
        for node in NODES:
            self._link(node, "up")
            if node not in self._nodes or self._nodes[node].poll() is not None:
                self.start(node)

    def heal(self) -> None:
        """Every node is up again, in one piece, and idle."""
        self.repair()
        for node in self._with_state("drain"):
            subprocess.run(["scontrol", "update", f"nodename={node}", "state=undrain"], check=True)
        self.wait_for_idle()

    def end(self) -> None:
        """Kill everything."""
        psutil.Process(self._first).kill()
        for process in self._nodes.values():
            process.wait()

    def wait_for_idle(self) -> None:
        """Until Slurm has all nodes, and they have nothing to do."""
        helpers.wait_until(
            lambda: self._with_state("idle") == {*NODES}, within_s=_NOTICED_DEAD_S, what="idle nodes"
        )

    def wait_for_down(self, node: str) -> None:
        """Until Slurm has noticed that a node is dead."""
        helpers.wait_until(
            lambda: node in self._with_state("down"), within_s=_NOTICED_DEAD_S, what=f"{node} is down"
        )

    def _with_state(self, state: str) -> set[str]:
        command = ["sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N"]
        env = {**os.environ, "SLURM_CONF": str(self.conf)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)
        return {*done.stdout.split()}

    def _network(self, place: str) -> str:
        return str(Path("/proc", str(self._first), "root", "run", "netns", place))

    def _link(self, node: str, state: str) -> None:
        if self.own_network:
            subprocess.run([*self.inside(node), "ip", "link", "set", "eth0", state], check=True)


@contextlib.contextmanager
def running() -> Iterator[Machine]:
    """Start it. At the end no process of it is left."""
    own_network = _may_make_networks()
    with tempfile.TemporaryDirectory(prefix="hvdlm-slurm-") as name:
        folder = Path(name)
        configuration.write(folder, own_network=own_network)
        more = ["--net"] if own_network else []
        script = ["bash", "-euc", _START, "bash", name, CONTROLLER if own_network else ""]
        process = _launch(["setpriv", "--pdeathsig", "KILL", *_NAMESPACES, *more, *script], folder)
        try:
            helpers.wait_until(
                psutil.Process(process.pid).children, within_s=_START_LIMIT_S, what="a process"
            )
            (first,) = psutil.Process(process.pid).children()
            machine = Machine(folder, first.pid, own_network=own_network)
            try:
                _bring_up(machine, folder)
                yield machine
            finally:
                machine.end()
        finally:
            # unshare returns when the namespace's first process, and so every other, is gone.
            process.wait()


def _bring_up(machine: Machine, folder: Path) -> None:
    try:
        helpers.wait_until((folder / "is-up").exists, within_s=_START_LIMIT_S, what="the cluster's network")
        for node in NODES:
            machine.start(node)
        with machine.joined():
            machine.wait_for_idle()
    except (AssertionError, subprocess.TimeoutExpired) as error:
        logs = "".join(f"\n{path.name}:\n{path.read_text()}" for path in folder.glob("*.log"))
        raise RuntimeError(f"Slurm did not start: {error}{logs}") from None


def _launch(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "output.log").open("a") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "PATH": _PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _may_make_networks() -> bool:
    """Whether a network namespace with a bridge and its cables can be made here."""
    tried = "ip link add name b0 type bridge && ip link add name v0 type veth peer name eth0 netns $$"
    command = ["unshare", "--net", "sh", "-c", tried]
    return subprocess.run(command, env={**os.environ, "PATH": _PATH}, capture_output=True).returncode == 0


def _enter_network(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
