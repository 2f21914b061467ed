"""Under Horovod's own elastic driver, on one machine: a rank is lost, others come, and no bit changes."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import helpers

# Losses do not depend on the steps to come, and with this strategy no bit on the ranks.
ENDLESS = "--train.steps 100000 --checkpoint.every 400 --eval.every 0 --log.every 50".split()
SAME_BITS = "--optim.schedule constant --parallel.strategy fixed".split()
TWO = ("-np", "2", "--min-np", "1", "--max-np", "2")


@contextlib.contextmanager
def started(data: Path, run: Path, *options: str, hosts: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    """Train on the hosts that a file beside the run names; the output goes to another there."""
    tell(run, *hosts)
    script, log = run.with_name("hosts.sh"), run.with_name("log")
    script.write_text(f"#!/bin/sh\nexec cat {run.with_name('hosts')}\n")
    script.chmod(0o755)
    log.touch()
    train = helpers.train_command(data, run, *ENDLESS, *SAME_BITS)
    launch = ["horovodrun", *options, "--host-discovery-script", str(script), *train]
    with helpers.started(["sh", "-c", 'exec "$@" > "$0" 2>&1', str(log), *launch], {}) as process:
        try:
            yield process
        except (AssertionError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{error}\n{log.read_text()}") from None


def tell(run: Path, *hosts: str) -> None:
    """What the discovery script prints from now on."""
    new = run.with_name("hosts.new")
    new.write_text("".join(f"{host}\n" for host in hosts))
    new.rename(run.with_name("hosts"))


def steps_done(run: Path) -> int:
    return max([row["step"] for row in helpers.rows(run, "metrics.jsonl", kind="train")], default=0)


def trains_on(ranks: int, run: Path, *, within_s: float) -> None:
    """Several new steps in a world of so many ranks."""
    begun = steps_done(run)

    def holds() -> bool:
        worlds = re.findall(r"(\d+) rank\(s\)", run.with_name("log").read_text())
        return bool(worlds) and int(worlds[-1]) == ranks and steps_done(run) > begun + 5

    helpers.wait_until(holds, within_s=within_s, what=f"training on {ranks}")


def check_stopped(data: Path, run: Path) -> None:
    """Nothing was done again or left out, and the losses are those of one process left alone."""
    record = helpers.exit_record(run)
    assert (record["state"], record["exit_code"]) == ("stopped", 75)
    audit = helpers.run([sys.executable, "-m", "hvdlm.audit", str(run), "--json"])
    assert audit.returncode == 0, audit.stdout
    found = json.loads(audit.stdout)
    assert (found["steps"], found["void_steps"]) == (record["step"], 0)
    alone = run.with_name("alone")
    steps = ("--train.steps", str(record["step"]))
    done = helpers.run(helpers.train_command(data, alone, *ENDLESS, *SAME_BITS, *steps))
    assert done.returncode == 0, done.stdout
    assert helpers.losses(run) == helpers.losses(alone)


def test_a_rank_is_lost_and_another_comes(tiny_data: Path, tmp_path: Path) -> None:
    """Three names of one machine are three hosts to Horovod, which takes the one of a lost rank off."""
    run = tmp_path / "run"
    with started(tiny_data, run, *TWO, hosts=("localhost:1", "127.0.0.1:1")) as process:
        trains_on(2, run, within_s=60)
        helpers.send(helpers.ranks_of(process)[0], signal.SIGKILL)
        trains_on(1, run, within_s=30)
        tell(run, "localhost:1", "127.0.0.1:1", "127.1:1")
        trains_on(2, run, within_s=60)
        (run / "STOP").touch()
        process.wait(30)
    check_stopped(tiny_data, run)


@pytest.mark.long
def test_slots_of_one_host_and_an_interrupt(tiny_data: Path, tmp_path: Path) -> None:
    """Ctrl-C to horovodrun, which then sends TERM to all ranks."""
    run = tmp_path / "run"
    options = (*TWO, "--network-interface", "lo")
    with started(tiny_data, run, *options, hosts=("localhost:2",)) as process:
        trains_on(2, run, within_s=60)
        said = run.with_name("log").read_text
        assert "all ranks are on the one host localhost" in said()
        tell(run, "localhost:1")
        trains_on(1, run, within_s=30)
        # Horovod would take it for the end of the process that comes.
        helpers.wait_until(lambda: "exit with status code 75" in said(), within_s=30, what="the other's end")
        tell(run, "localhost:2")
        trains_on(2, run, within_s=60)
        helpers.send(process, signal.SIGINT)
        process.wait(30)
    check_stopped(tiny_data, run)
