"""Show how a run and its jobs are getting on."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from hvdlm.cluster.queue import QueuedJob, queued
from hvdlm.config import EXIT_DONE, UserError, total_steps
from hvdlm.config.parse import load_resolved
from hvdlm.run import exit_record, jobs
from hvdlm.run.standing import JobTimes, Standing, best_interval_s, job_times, read_standing

_ASSUMED_MTBF_H = 24.0
_FEW_FAILURES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Returns: 0.

    Raises:
        UserError: there is no such run.
    """
    report = look(args.run, now_unix=time.time())
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(_lines(report)))
    return EXIT_DONE


def jobs_of(run_folder: Path) -> list[QueuedJob]:
    """The jobs of a run that are queued or running; those that sbatch alone handed in once they have begun.

    Raises:
        UserError: the folder is missing, or Slurm does not answer.
    """
    if not run_folder.is_dir():
        raise UserError(f"{run_folder}: no such run folder; python -m hvdlm.slurm submit prints it")
    numbers = {row["job"] for row in jobs.rows(run_folder)}
    found = queued(jobs.job_name(run_folder), numbers=tuple(numbers))
    if found is None:
        raise UserError("squeue gives no answer; try again, or look whether Slurm is up: sinfo", 1)
    return found


def look(run_folder: Path, *, now_unix: float) -> dict[str, Any]:
    """Everything that `status` tells.

    Raises:
        UserError: there is no such run, or Slurm does not answer.
    """
    of_run = jobs_of(run_folder)
    standing = read_standing(run_folder)
    file = run_folder / "config.toml"
    steps = total_steps(load_resolved(file)) if file.exists() else 0
    running = [job for job in of_run if not job.waits]
    times = job_times(jobs.rows(run_folder), running={job.number for job in running}, now_unix=now_unix)
    left_s = max(0, steps - standing.step) * standing.step_s
    ends_unix = max((job.ends_unix for job in running), default=0.0)
    return {
        "run": str(run_folder),
        "jobs": [_job(job, now_unix) for job in of_run],
        "attempts": standing.attempts,
        "step": standing.step,
        "steps": steps,
        "loss": standing.loss,
        "tokens_per_s": round(standing.tokens_per_s, 1),
        "training_left_s": round(left_s, 1),
        "job_left_s": round(ends_unix - now_unix, 1) if ends_unix else None,
        "chain_left_s": _chain_left_s(of_run, now_unix),
        "kept_share": _share(standing.steps_kept, standing.steps_done),
        "training_share": _share(standing.training_s, times.wall_s),
        "save": _save(standing, times),
        "last_end": exit_record.read(run_folder),
    }


def _job(job: QueuedJob, now_unix: float) -> dict[str, Any]:
    return {
        "job": job.number,
        "state": job.state,
        "waits_for": job.waits_for if job.waits else "",
        "nodes": job.nodes,
        "left_s": round(job.ends_unix - now_unix, 1) if job.ends_unix and not job.waits else None,
    }


def _chain_left_s(of_run: list[QueuedJob], now_unix: float) -> float | None:
    """Time that the running job and those behind it have; None where one has no limit, or none is there."""
    left = [job.limit_s if job.waits else job.ends_unix - now_unix for job in of_run]
    unlimited = any(not (job.limit_s if job.waits else job.ends_unix) for job in of_run)
    return None if unlimited or not left else round(sum(left), 1)


def _share(part: float, whole: float) -> float | None:
    return round(min(1.0, part / whole), 4) if whole else None


def _save(standing: Standing, times: JobTimes) -> dict[str, Any] | None:
    """What checkpoints cost, and how often they should be: by the failures so far, or one a day."""
    if standing.save is None or not standing.step_s:
        return None
    measured = times.failures >= _FEW_FAILURES
    mtbf_s = times.wall_s / times.failures if measured else 3600 * _ASSUMED_MTBF_H
    every_s = best_interval_s(standing.save, mtbf_s)
    return {
        "stall_s": round(standing.save.stall_s, 3),
        "write_s": round(standing.save.write_s, 3),
        "mtbf_s": round(mtbf_s, 1),
        "mtbf_measured": measured,
        "best_every_s": round(every_s, 1),
        "best_every_steps": max(1, round(every_s / standing.step_s)),
    }


def _lines(report: dict[str, Any]) -> list[str]:
    loss = "" if report["loss"] is None else f", loss {report['loss']:.4f}"
    lines = [
        f"{report['run']}: step {report['step']} of {report['steps']}{loss}, "
        f"{report['tokens_per_s']:,.0f} tokens/s, attempt {report['attempts']}"
    ]
    for job in report["jobs"]:
        left = f", {_duration(job['left_s'])} left" if job["left_s"] is not None else ""
        why = f" ({job['waits_for']})" if job["waits_for"] else ""
        lines.append(f"job {job['job']}: {job['state'].lower()}{why}, {job['nodes']} node(s){left}")
    if not report["jobs"]:
        lines.append("no job is queued or running")
    lines += _about_end(report)
    if report["kept_share"] is not None:
        share = (
            f", {report['training_share']:.1%} of the jobs' time was training"
            if report["training_share"]
            else ""
        )
        lines.append(f"goodput: {report['kept_share']:.1%} of the steps count{share}")
    if save := report["save"]:
        how = "measured" if save["mtbf_measured"] else "assumed"
        lines.append(
            f"a checkpoint stalls the run {save['stall_s']:.2f} s and is written in {save['write_s']:.1f} s; "
            f"failures every {save['mtbf_s'] / 3600:.1f} h ({how}): best every {save['best_every_s']:.0f} s, "
            f"--checkpoint.every {save['best_every_steps']}, or by --checkpoint.mtbf_h"
        )
    if end := report["last_end"]:
        said = end.get("reason") or end.get("error") or ""
        where = f"attempt {end.get('attempt', 0)}, step {end.get('step', 0)}"
        lines.append(f"exit.json: {end.get('state')}, {where} {said}".rstrip())
    return lines


def _about_end(report: dict[str, Any]) -> list[str]:
    """Whether the time that is left to the jobs is enough."""
    left_s, chain_s, job_s = report["training_left_s"], report["chain_left_s"], report["job_left_s"]
    if not left_s:
        return []
    line = f"{_duration(left_s)} of training are left"
    if job_s is not None:
        line += f", this job has {_duration(job_s)}"
    if chain_s is not None:
        line += f", all jobs {_duration(chain_s)}: " + ("enough" if chain_s > left_s else "hand in more")
    return [line]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
