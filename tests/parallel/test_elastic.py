"""An elastic run without Slurm: hosts join by hand, leave, and are killed; on Slurm: tests/cluster."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import final

import psutil
import pytest

from tests import helpers

ENDLESS = "--train.steps 100000 --checkpoint.every 400 --eval.every 300 --log.every 100".split()
SAME_LR = ("--optim.schedule", "constant")


@final
class Run:
    """A driver with one worker beside it, and hosts that are started by hand."""

    def __init__(self, data: Path, folder: Path, *more: str) -> None:
        self.folder = folder
        self.options = [*helpers.TINY, *ENDLESS, *SAME_LR, "--data.path", str(data), *more]
        self.log = folder.with_name("log")
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}

    @contextlib.contextmanager
    def driven(self, *more: str) -> Iterator[subprocess.Popen[str]]:
        """The driver; at the end nothing of it is left."""
        command = [sys.executable, "-m", "hvdlm.elastic", "--slots", "1", *self.options]
        command += ["--train.out", str(self.folder), *more]
        redirect = ["sh", "-c", 'log=$1; shift; exec "$@" >>"$log" 2>&1', "sh", str(self.log)]
        with helpers.started([*redirect, *command], {}) as process:
            self._process = process
            yield process

    def join(self, host: str) -> None:
        command = [sys.executable, "-m", "hvdlm.elastic", "--join", str(self.folder), "--host", host]
        env = {**psutil.Process(self._process.pid).environ()}
        self.hosts[host] = subprocess.Popen([*command, "--slots", "1"], env=env, start_new_session=True)

    def worker(self, host: str) -> psutil.Process:
        """The one of a host; "" is the driver's own."""
        for process in helpers.family(self._process):
            with contextlib.suppress(psutil.Error):
                name = process.environ().get("HVDLM_WORKER", "")
                known = any(name.startswith(f"{other}-") for other in self.hosts)
                if name and (name.startswith(f"{host}-") if host else not known):
                    return process
        raise AssertionError(f"no worker on {host}: {self.log.read_text()}")

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def step(self) -> int:
        return max([r["step"] for r in helpers.rows(self.folder, "metrics.jsonl", kind="train")], default=0)

    def attempts(self) -> int:
        rows = helpers.rows(self.folder, "ledger.jsonl")
        return sum("resumed_at" in row for row in rows)

    def trains_on(self, ranks: int, *, within_s: float = 40) -> None:
        """New steps on so many ranks."""

        def is_world() -> bool:
            return re.findall(r"world \d+: (\d+) worker", self.said())[-1:] == [str(ranks)]

        try:
            helpers.wait_until(is_world, within_s=within_s, what=f"a world of {ranks}")
            worlds = self.said().count("hvdlm elastic: world")
            helpers.wait_until(lambda: self.attempts() >= worlds, within_s=within_s, what="its begin")
            begun = self.step()
            helpers.wait_until(lambda: self.step() > begun + 5, within_s=within_s, what="five steps")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def check(self, *, exact: bool) -> dict[str, int]:
        """Every sample once, and the losses of one process that nothing happened to."""
        record = helpers.exit_record(self.folder)
        assert record["state"] == "stopped"
        audit = helpers.run([sys.executable, "-m", "hvdlm.audit", str(self.folder), "--json"])
        assert audit.returncode == 0, audit.stdout
        alone = self.folder.with_name("alone")
        more = ["--train.out", str(alone), "--train.steps", str(record["step"])]
        done = helpers.run([sys.executable, "-m", "hvdlm.train", *self.options, *more])
        assert done.returncode == 0, done.stdout
        expected, found = helpers.losses(alone), helpers.losses(self.folder)
        assert found == (expected if exact else pytest.approx(expected, abs=1e-4))
        validations = {r["step"]: r["val_loss"] for r in helpers.rows(alone, "metrics.jsonl", kind="eval")}
        for row in helpers.rows(self.folder, "metrics.jsonl", kind="eval"):
            assert row["val_loss"] == pytest.approx(validations[row["step"]], abs=1e-4)
        return dict(json.loads(audit.stdout))


def test_hosts_come_go_and_die(tiny_data: Path, tmp_path: Path) -> None:
    """No step is lost but with the whole memory, and no bit of a loss depends on any of it."""
    run = Run(tiny_data, tmp_path / "run", "--parallel.strategy", "fixed")
    with run.driven() as driver:
        run.trains_on(1)
        run.join("b")
        run.trains_on(2)
        # Rank 0, and with it the ledger's last rows.
        run.worker("").kill()
        run.trains_on(1)
        run.trains_on(2)
        run.hosts["b"].terminate()
        run.trains_on(1)
        assert run.hosts["b"].wait(30) == 0
        (run.folder / "STOP").touch()
        assert driver.wait(60) == 75
    assert "host b leaves: signal SIGTERM" in run.said()
    assert "Traceback" not in run.said()
    assert run.check(exact=True)["void_steps"] == 0


@pytest.mark.long
def test_a_state_that_no_rank_holds_whole_goes_by_the_disk(tiny_data: Path, tmp_path: Path) -> None:
    """With zero1 a join costs a save, and a loss the steps since the last one."""
    more = ("--parallel.strategy", "zero1", "--optim.lr", "1e-4", "--optim.min_lr", "1e-5")
    run = Run(tiny_data, tmp_path / "run", *more)
    with run.driven() as driver:
        run.trains_on(1)
        run.join("b")
        run.trains_on(2)
        assert len(re.findall("from the newest checkpoint", run.said())) == 2
        run.worker("b").kill()
        run.trains_on(1)
        helpers.send(driver, signal.SIGTERM)
        assert driver.wait(60) == 75
        # There may be another driver, after a signal.
        assert run.hosts["b"].poll() is None
        run.hosts["b"].terminate()
        assert run.hosts["b"].wait(30) == 0
    run.check(exact=False)


@pytest.mark.long
def test_all_are_lost_and_the_newest_checkpoint_is_taken(tiny_data: Path, tmp_path: Path) -> None:
    run = Run(tiny_data, tmp_path / "run", "--parallel.strategy", "fixed", "--checkpoint.every", "50")
    with run.driven() as driver:
        run.trains_on(1)
        helpers.wait_until(
            lambda: bool([*run.folder.glob("checkpoints/step-*/MANIFEST.json")]), within_s=60, what="a save"
        )
        run.worker("").kill()
        helpers.wait_until(lambda: "world 2: 1 worker" in run.said(), within_s=40, what="a new world")
        run.trains_on(1)
        # As a terminal does it: the driver alone gets it, the others are in sessions of their own.
        helpers.send(driver, signal.SIGINT)
        assert driver.wait(60) == 75
    found = run.check(exact=True)
    assert 0 < found["void_steps"] + 1 <= 51


@pytest.mark.long
def test_a_second_start_is_refused_in_one_line(tiny_data: Path, tmp_path: Path) -> None:
    run = Run(tiny_data, tmp_path / "run")
    with run.driven():
        run.trains_on(1)
        begun = time.monotonic()
        command = [sys.executable, "-m", "hvdlm.elastic", *run.options, "--train.out", str(run.folder)]
        second = helpers.run(command)
        assert second.returncode == 1
        assert "is being trained by another start" in second.stdout.splitlines()[-1]
        assert time.monotonic() - begun < 60


def test_bad_arguments_are_one_line(tmp_path: Path) -> None:
    for options, said in (
        (["--parallel.strategy", "ddp"], "an elastic run needs one of allreduce, buckets, zero1, fixed"),
        (["--train.setps", "3"], "train.setps"),
        (["--slots", "-1"], "--slots -1"),
        (["--join", str(tmp_path / "nowhere"), "--wait-s", "1"], "no run folder"),
    ):
        done = helpers.run([sys.executable, "-m", "hvdlm.elastic", *options], cwd=tmp_path)
        assert done.returncode == 2, done.stdout
        assert said in done.stdout
        assert "Traceback" not in done.stdout
