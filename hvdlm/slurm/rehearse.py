"""Rehearse a stop and a resume in about a minute, and say whether the real run's fit into the site's grace.

Inside a job, by its launcher; with --site and outside of one it hands in a short job that does it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from hvdlm.cluster import batch_script, disk_speed, grace
from hvdlm.cluster.bounded import run_bounded
from hvdlm.cluster.queue import ASK_LIMIT_S, hand_in, queued
from hvdlm.config import EXIT_CRASH, EXIT_DONE, RunConfig, UserError
from hvdlm.config.parse import folder_of, load_config
from hvdlm.run.standing import read_standing
from hvdlm.slurm.rehearsal import Times, rehearse
from hvdlm.slurm.site import read_site

_POLL_S = 2.0


@final
@dataclass(frozen=True)
class Save:
    """What a checkpoint of the real run takes.

    Attributes:
        gib: its size.
        seconds: to write it.
        measured: by the run itself; else its size at the speed of one writer.
        step_s: seconds of a step, which has to end first; 0 where no step is known.
    """

    gib: float
    seconds: float
    measured: bool
    step_s: float


@final
@dataclass(frozen=True)
class Bound:
    """One way in which a job is ended, and whether the run saves in time.

    Attributes:
        name: of the way.
        given_s: seconds from the signal to the kill.
        needed_s: seconds until it has saved.
        cure: what to change.
        must: the run is lost back to its last checkpoint otherwise, with nobody there to see it.
    """

    name: str
    given_s: float
    needed_s: float
    cure: str
    must: bool = True

    @property
    def fits(self) -> bool:
        """The run has saved by then."""
        return self.needed_s <= self.given_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="after --: those of train")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--site", metavar="SITE", help="outside of a job: a file of slurm/sites, or a path")
    parser.add_argument("--nodes", type=int, metavar="N", default=2, help="nodes of that job (%(default)d)")
    parser.add_argument(
        "--tasks-per-node", type=int, metavar="N", default=1, help="tasks on each of them (%(default)d)"
    )
    parser.add_argument(
        "--mpi",
        metavar="TYPE",
        default=os.environ.get("HVDLM_MPI", "pmix"),
        help="how to start ranks: a type of srun --mpi, or mpirun (HVDLM_MPI, else pmix)",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        metavar="N",
        default=120.0,
        help="seconds for each start and end (%(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Returns: 0 where everything fits, 1 where it does not.

    Raises:
        UserError: the rehearsal failed, or there is neither a job nor a site.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return _hand_in(args)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("rehearse: found several tasks, needed one process; start it without srun")
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder = folder_of(config, recipe).absolute()
    scratch = folder / f"rehearsal-{os.environ['SLURM_JOB_ID']}"
    tasks = int(os.environ.get("SLURM_NTASKS", os.environ.get("SLURM_NNODES", "1")))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    times = rehearse(scratch, args.arguments, mpi=args.mpi, tasks=tasks, limit_s=args.limit_s)
    save = _save(config, folder)
    bounds = list(_bounds(config, times, save))
    # Kept where something failed: the error names it.
    shutil.rmtree(scratch)
    _print(args, times, save, bounds=bounds)
    return EXIT_DONE if all(bound.fits for bound in bounds if bound.must) else EXIT_CRASH


def _save(config: RunConfig, folder: Path) -> Save:
    """As the run measured it; before it has saved, by its size and the speed of its folder."""
    import torch

    from hvdlm.data.manifest import read_manifest
    from hvdlm.models import MODELS, pad_vocab
    from hvdlm.run.checkpoint import full_size_bytes

    vocab_size = read_manifest(Path(next(iter(config.data.weights)))).tokenizer.vocab_size
    with torch.device("meta"):
        model = MODELS[config.model.kind](config.model, pad_vocab(vocab_size))
    size_bytes = full_size_bytes(model)
    known = read_standing(folder)
    if known.save:
        return Save(size_bytes / 2**30, known.save.write_s, True, known.step_s)
    return Save(size_bytes / 2**30, size_bytes / disk_speed.write_speed(folder), False, known.step_s)


def _bounds(config: RunConfig, times: Times, save: Save) -> Iterator[Bound]:
    given = grace.site_grace(os.environ)
    needed_s = times.stop_s + save.seconds + save.step_s
    lead_s = max(_lead_s(), float(config.train.stop_margin_s))
    more = f"--train.stop_margin_s {2 * needed_s:.0f}, or sbatch --signal=USR2@{2 * needed_s:.0f}"
    yield Bound("time limit", lead_s, needed_s, more)
    if given.preempted_s is not None:
        ask = f"a smaller --checkpoint.every; ask for GraceTime={needed_s:.0f} of partition {given.partition}"
        yield Bound("preemption", given.preempted_s, needed_s, ask)
    yield Bound("scancel", given.kill_wait_s, needed_s, "python -m hvdlm.slurm stop instead", must=False)


def _lead_s() -> float:
    """Of the batch script's --signal; Slurm shows that of its command line to nobody."""
    script = run_bounded(
        ["scontrol", "write", "batch_script", os.environ["SLURM_JOB_ID"], "-"], limit_s=ASK_LIMIT_S
    )
    words = [
        word
        for line in script.output.splitlines()
        if line.startswith("#SBATCH")
        for word in shlex.split(line.removeprefix("#SBATCH"), comments=True)
    ]
    seconds = batch_script.of_words(words).get("signal", "").partition("@")[2]
    return float(seconds) if seconds.isdigit() else 0.0


def _print(args: argparse.Namespace, times: Times, save: Save, *, bounds: list[Bound]) -> None:
    fits = all(bound.fits for bound in bounds if bound.must)
    if args.json:
        rows = [{**dataclasses.asdict(bound), "fits": bound.fits} for bound in bounds]
        report = {"fits": fits, **dataclasses.asdict(times), "save": dataclasses.asdict(save), "bounds": rows}
        print(json.dumps(report), flush=True)
        return
    how = "measured by this run" if save.measured else "at the speed of one writer"
    print(f"start {times.start_s:.1f} s, signal to end {times.stop_s:.1f} s, resume {times.resume_s:.1f} s")
    print(f"a checkpoint of {save.gib:.3g} GiB: {save.seconds:.1f} s, {how}")
    print(f"a step: {save.step_s:.1f} s" if save.step_s else "a step: not known yet, and not counted")
    print(f"{'ended by':<12} {'given':>8} {'needed':>8}")
    for bound in bounds:
        cure = "fits" if bound.fits else f"does not fit: {bound.cure}"
        print(f"{bound.name:<12} {bound.given_s:>6.0f} s {bound.needed_s:>6.1f} s  {cure}")
    print("fits" if fits else "does not fit", flush=True)


def _hand_in(args: argparse.Namespace) -> int:
    """A job that rehearses; its result is this command's."""
    if not args.site:
        raise UserError("rehearse: found no Slurm job; start it in one, or give --site to hand one in")
    site = read_site(args.site)
    log = Path(f"rehearse-{time.time_ns()}.log").absolute()
    words = [sys.executable, "-m", "hvdlm.slurm", "rehearse", "--limit-s", f"{args.limit_s:g}"]
    words += ["--mpi", site.mpi, *(["--json"] if args.json else []), "--", *args.arguments]
    shape = [f"--nodes={args.nodes}", f"--ntasks-per-node={args.tasks_per_node}", "--time=10"]
    options = [*site.sbatch_options, *shape, "--job-name=hvdlm-rehearse", f"--output={log}"]
    number, trouble = hand_in([*options, f"--wrap={shlex.join(words)}"], env=site.variables)
    if trouble:
        raise UserError(f"rehearse: {trouble}", EXIT_CRASH)
    print(f"rehearse: job {number}, log {log}", file=sys.stderr, flush=True)
    while (jobs := queued(numbers=(number,))) is None or jobs:
        time.sleep(_POLL_S)
    print(log.read_text() if log.exists() else f"rehearse: {log} was not written", end="", flush=True)
    shown = run_bounded(["scontrol", "--oneliner", "show", "job", number], limit_s=ASK_LIMIT_S)
    return EXIT_DONE if " ExitCode=0:" in shown.output else EXIT_CRASH
