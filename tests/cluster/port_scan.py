"""What the processes of a job listen at, and what somebody gets who speaks to it from some place."""

from __future__ import annotations

import ast
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import psutil

from tests.cluster import jobs
from tests.cluster.one_machine import Machine

Place: TypeAlias = tuple[str, int]

_LISTENS = "0A"
# Each on a connection of its own: nothing at all, garbage, requests without the key, a pickle.
_SCAN = """\
import pickle, socket, sys
class Evil:
    def __reduce__(self):
        return open, (sys.argv[1], "w")
pickled = pickle.dumps(Evil())
said = [b"", b"\\0" * 64, bytes(range(256)) * 16, b"\\x16\\x03\\x01\\x02\\x00\\x01", pickled]
for method in (b"GET", b"PUT", b"POST", b"DELETE"):
    for path in (b"/", b"/rank_and_size/n1:0", b"/" + b"0" * 32 + b"/tell", b"/runfunc/func", b"*"):
        head = b"%s %s HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n" % (method, path, len(pickled))
        said.append(head + pickled)
found = {}
for place in sys.argv[2:]:
    address, port = place.split(":")
    for one in said:
        try:
            with socket.create_connection((address, int(port)), timeout=2) as connection:
                connection.settimeout(1)
                connection.sendall(one)
                if one:
                    connection.shutdown(socket.SHUT_WR)
                got = connection.recv(1000)
        except OSError:
            continue
        if got:
            found[address, int(port)] = got
print(found)
"""


def listening(job: str) -> set[Place]:
    """Addresses and TCP ports of all our processes of a job; of `*` it is the node's own address."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if environment.get("SLURM_JOB_ID") != job or "hvdlm" not in " ".join(process.cmdline()):
                continue
            for address, port in _of_process(process.pid):
                node = environment.get("SLURMD_NODENAME", "n1")
                found.add((node if address == "0.0.0.0" else address, port))
    return found


def answers(machine: Machine, place: str, ports: set[Place]) -> dict[Place, bytes]:
    """What came back, of those that said anything.

    Args:
        machine: the cluster.
        place: in whose network the asking is done.
        ports: to ask.
    """
    proof = Path(f"/tmp/hvdlm-was-run-{place}")
    places = [f"{machine.addresses.get(address, address)}:{port}" for address, port in sorted(ports)]
    command = [*machine.inside(place), sys.executable, "-c", _SCAN, str(proof), *places]
    done = subprocess.run(command, cwd=jobs.ROOT, check=True, capture_output=True, text=True, timeout=300)
    assert not proof.exists()
    found: dict[Place, bytes] = ast.literal_eval(done.stdout)
    return found


def _of_process(pid: int) -> list[Place]:
    """What it listens at, in IPv4."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(descriptor.readlink()))
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == _LISTENS and f"socket:[{words[9]}]" in inodes:
            address, port = words[1].split(":")
            number = bytes.fromhex(address)[::-1]
            found.append((".".join(map(str, number)), int(port, 16)))
    return found
