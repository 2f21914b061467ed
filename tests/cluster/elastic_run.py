"""An elastic run by the shipped scripts, changed by nothing but a site file and options of sbatch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import final

from tests import helpers
from tests.cluster import batch_site, jobs

WITHIN_START_S = 90
WITHIN_LOSS_S = 15
WITHIN_JOIN_S = 20
# Losses do not depend on the steps to come, and with this strategy no bit on the ranks.
_STEPS = "--train.steps 100000 --checkpoint.every 400 --eval.every 0 --log.every 50".split()
_SAME_BITS = "--optim.schedule constant --parallel.strategy fixed".split()
_SITE = """\
HVDLM_SBATCH="--ntasks-per-node=1 --cpus-per-task=2 --gpus-per-node=0 --signal=USR2@60 --time=10"
HVDLM_PREFLIGHT=0
OMP_NUM_THREADS=1
"""


@final
class ElasticRun:
    """A run that slurm/train_elastic.sh trains.

    Args:
        data: of the run.
        folder: for it, the site file and the logs.
    """

    def __init__(self, data: Path, folder: Path) -> None:
        self.out = folder / "run"
        self.job = ""
        self._data = data
        self._site = folder / "test.env"
        self._site.write_text(_SITE)

    def begin(self, nodes: int) -> None:
        """Hand the driver's job in, for the first nodes."""
        paths = ["--data.path", str(self._data), "--train.out", str(self.out)]
        train = [*helpers.TINY, *_STEPS, *_SAME_BITS, *paths]
        script, options = (
            jobs.ROOT / "slurm" / "train_elastic.sh",
            [f"--nodes={nodes}", f"--nodelist=n[1-{nodes}]"],
        )
        self.job = batch_site.hand_in(script, self._site, train, *options)

    def lend(self, node: str, *options: str) -> str:
        """Hand a donor's job in; its number."""
        options = ("--partition=low", f"--nodelist={node}", *options)
        return batch_site.hand_in(jobs.ROOT / "slurm" / "donor.sh", self._site, [str(self.out)], *options)

    @property
    def log(self) -> str:
        """What the driver's job printed."""
        return batch_site.log(self._site, self.job)

    @property
    def step(self) -> int:
        """The last one that was done."""
        return max([row["step"] for row in helpers.rows(self.out, "metrics.jsonl", kind="train")], default=0)

    def trains_on(self, ranks: int, *, within_s: float) -> None:
        """Several new steps on so many ranks."""
        begun: list[int] = []

        def holds() -> bool:
            sizes = re.findall(r"world \d+: (\d+) worker", self.log)
            if sizes[-1:] != [str(ranks)]:
                return False
            rows = helpers.rows(self.out, "ledger.jsonl")
            # Each world is an attempt; and those of the driver's jobs before have to be counted too.
            if sum("resumed_at" in row for row in rows) == len(sizes):
                begun[:] = begun or [self.step]
            return bool(begun) and self.step > begun[0] + 5

        try:
            helpers.wait_until(holds, within_s=within_s, what=f"training on {ranks}")
        except AssertionError as error:
            logs = "\n".join(path.read_text() for path in sorted(self._site.parent.glob("*.log")))
            raise AssertionError(f"{error}\n{logs}") from None

    def stop_and_check(self) -> None:
        """Every sample once, no step twice, the losses of a run of one process that nothing happened to."""
        (self.out / "STOP").touch()
        jobs.wait_for_end(self.job)
        assert jobs.exit_codes(self.job) == {"75"}, self.log
        record = helpers.exit_record(self.out)
        assert (record["state"], record["exit_code"]) == ("stopped", 75)
        audit = helpers.run([sys.executable, "-m", "hvdlm.audit", str(self.out), "--json"])
        assert audit.returncode == 0, audit.stdout
        found = json.loads(audit.stdout)
        assert (found["steps"], found["void_steps"]) == (record["step"], 0)
        alone = self.out.with_name("alone")
        more = ["--train.steps", str(record["step"])]
        command = helpers.train_command(self._data, alone, *_STEPS, *_SAME_BITS, *more)
        done = helpers.run(command)
        assert done.returncode == 0, done.stdout
        assert helpers.losses(self.out) == helpers.losses(alone)
