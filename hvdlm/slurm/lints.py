"""What is wrong with a job before it is handed in: each finding one line, with its cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdlm.cluster.batch_script import Options, gpus_per_node
from hvdlm.cluster.finding import Finding
from hvdlm.cluster.queue import mpi_types, seconds_of, try_out
from hvdlm.config import DataConfig, RunConfig, total_steps
from hvdlm.run import ledger
from hvdlm.run.retry import last_end
from hvdlm.run.standing import METRICS_FILE, SaveCost, save_cost
from hvdlm.slurm.site import Site

_FEW_CPUS = 4
_SAVE_TIMES = 2.0
"""A checkpoint at the end may take so much longer than the last ones: the file system is busier then."""


@final
@dataclass(frozen=True)
class Planned:
    """A job that is to be handed in.

    Attributes:
        options: as Slurm will see them.
        script: the batch script.
        arguments: of sbatch, the script and its own among them.
        site: whose file.
        config: of the run.
        run_folder: of the run.
        chain: so many jobs.
    """

    options: Options
    script: Path
    arguments: Sequence[str]
    site: Site
    config: RunConfig
    run_folder: Path
    chain: int


def lint(job: Planned) -> list[Finding]:
    """All that is wrong, errors first."""
    found = [
        *_run(job),
        *_data(job.config.data),
        *_tasks(job.options),
        *_launcher(job),
        *_signal(job.options),
        *_time(job),
    ]
    # Slurm tells one thing at a time; what is known to be wrong comes before its answer.
    if not any(finding.state == "fail" for finding in found):
        found += _slurm(job)
    return sorted(found, key=lambda finding: finding.state != "fail")


def _run(job: Planned) -> Iterator[Finding]:
    end = last_end(job.run_folder, steps=total_steps(job.config))
    if end.kind == "done":
        yield _error("run", f"{job.run_folder}: {end.why}", "something to do", "raise --train.steps")
    if end.kind == "no progress":
        yield _error(
            "run",
            f"{job.run_folder}: {end.why}",
            "a cause that is mended",
            f"see its log, then rm {job.run_folder / 'exit.json'}",
        )
    if job.config.checkpoint.resume == "never" and job.chain > 1:
        yield _error(
            "checkpoint.resume",
            f"never, with a chain of {job.chain}",
            "jobs that go on from each other",
            "leave it out",
        )


def _data(data: DataConfig) -> Iterator[Finding]:
    for folder in data.weights:
        if folder not in DataConfig().weights and not (Path(folder) / "manifest.json").is_file():
            yield _error(
                "data.path",
                f"no manifest.json in {folder}",
                "a data set",
                f"sbatch slurm/preprocess.sh INPUT --out {folder}",
            )


def _tasks(options: Options) -> Iterator[Finding]:
    gpus, tasks = gpus_per_node(options), _number(options.get("ntasks-per-node", ""))
    if "gpus-per-task" in options or options.get("gpu-bind", "none") != "none":
        yield _error(
            "gpus",
            "--gpus-per-task or --gpu-bind, so that ranks do not see each other's GPUs and NCCL is slow",
            "all of a node's GPUs visible",
            "use --gpus-per-node alone",
        )
    if gpus and not tasks:
        yield _error("tasks", "no --ntasks-per-node", "a task a GPU", f"--ntasks-per-node={gpus}")
    elif gpus and tasks != gpus:
        yield _finding(
            "fail" if tasks > gpus else "warn",
            "tasks",
            f"--ntasks-per-node={tasks} for {gpus} GPUs a node",
            "a task a GPU",
            f"--ntasks-per-node={gpus}",
        )
    cpus = _number(options.get("cpus-per-task", "")) or 1
    if cpus < (_FEW_CPUS if gpus else 2):
        yield _finding(
            "warn",
            "cpus",
            f"--cpus-per-task={cpus}",
            "cores for a rank's own thread, Horovod's, two that read and one that saves",
            f"--cpus-per-task={_FEW_CPUS if gpus else 2} or more, so that tasks x cpus is what a node has",
        )


def _launcher(job: Planned) -> Iterator[Finding]:
    mpi = job.site.mpi
    # train_elastic.sh starts its workers by itself.
    if "${HVDLM_MPI" not in job.script.read_text():
        return
    if mpi == "mpirun":
        if job.options.get("nodes") == "1":
            yield _finding(
                "warn",
                "launcher",
                "mpirun on one node: no signal of Slurm's reaches its ranks, and a preemption loses work",
                "ranks in a step",
                "HVDLM_MPI=none for one node; at its time limit the run saves by itself",
            )
        return
    types = mpi_types()
    if types and mpi not in types:
        yield _error(
            "launcher",
            f"HVDLM_MPI={mpi}, but srun knows {', '.join(types)}",
            "one of these, mpirun, or none (Gloo)",
            f"change it in {job.site.path}",
        )


def _signal(options: Options) -> Iterator[Finding]:
    signal = options.get("signal", "")
    if not signal:
        yield _finding(
            "warn",
            "signal",
            "no --signal",
            "one before the time limit",
            "--signal=USR2@600; the ranks have timers, too",
        )
    elif "B:" in signal.upper() or signal.upper().startswith("B"):
        yield _error(
            "signal",
            f"--signal={signal}: with B: the batch shell is told, and no rank",
            "the ranks told",
            f"--signal={signal.partition(':')[2] or 'USR2@600'}",
        )


def _time(job: Planned) -> Iterator[Finding]:
    limit_s, lead_s = seconds_of(job.options.get("time", "")), _lead_s(job.options.get("signal", ""))
    margin_s = float(job.config.train.stop_margin_s)
    warned_s = max(lead_s, margin_s)
    if limit_s and limit_s <= warned_s:
        which = f"--signal {lead_s:g} s" if lead_s >= margin_s else f"train.stop_margin_s {margin_s:g} s"
        yield _error(
            "time",
            f"a time limit of {limit_s:g} s, but {which} before it the run is told to stop",
            "time to train before that",
            "raise --time, or lower that",
        )
    cost = _measured(job.run_folder)
    needed_s = _SAVE_TIMES * cost.write_s if cost else 0.0
    if cost and limit_s and needed_s >= limit_s:
        yield _error(
            "time",
            f"a time limit of {limit_s:g} s, but a checkpoint took {cost.write_s:.0f} s",
            f"more than {needed_s:.0f} s",
            "raise --time",
        )
    elif cost and needed_s > warned_s:
        yield _finding(
            "warn",
            "time",
            f"a checkpoint took {cost.write_s:.0f} s, and the run hears of its limit {warned_s:g} s before",
            f"{needed_s:.0f} s",
            f"--train.stop_margin_s {needed_s:.0f}, or an earlier --signal",
        )


def _slurm(job: Planned) -> Iterator[Finding]:
    takes, said = try_out(job.arguments, env=job.site.variables)
    if not takes:
        yield _error(
            "sbatch", f"Slurm would refuse it: {said}", "a job that can run here", f"see {job.site.path}"
        )


def _measured(run_folder: Path) -> SaveCost | None:
    path = run_folder / METRICS_FILE
    return save_cost(ledger.read_rows(path)) if path.exists() else None


def _lead_s(signal: str) -> float:
    """Seconds before the limit, of [R][B]:SIGNAL[@SECONDS]; 60 where it does not say."""
    if not signal:
        return 0.0
    seconds = signal.partition("@")[2]
    return float(seconds) if seconds.isdigit() else 60.0


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _error(name: str, found: str, needed: str, fix: str) -> Finding:
    return Finding(name, "fail", found, needed, fix)


def _finding(state: str, name: str, found: str, needed: str, fix: str) -> Finding:
    return Finding(name, "fail" if state == "fail" else "warn", found, needed, fix)
