"""``python -m hvdlm.train``: train a language model, alone or under mpirun, horovodrun or srun.

With no argument it trains the demo recipe, and shards the demo corpus first if it is not there.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from hvdlm.cluster import job
from hvdlm.comm import launch, world
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import (
    EXIT_DONE,
    EXIT_USAGE,
    RunConfig,
    UserError,
    check,
    run_command,
    total_steps,
)
from hvdlm.config.parse import DEFAULT_RECIPE, folder_of, load_config
from hvdlm.corpus import demo
from hvdlm.parallel.choice import FILE, choose
from hvdlm.run import crash, exit_record
from hvdlm.run.folder import Start
from hvdlm.train import worker
from hvdlm.train.agree import Agreed, agree_on_start
from hvdlm.train.headline import timeline_path
from hvdlm.train.loop import train
from hvdlm.train.session import open_session


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return _work(argv) if worker.is_wanted() else _start(argv)


def _work(argv: list[str]) -> int:
    """As a worker of an elastic run."""
    member, token = worker.join()
    # Named by Horovod's driver alone; ours says and prepares by itself what rank 0 does here.
    here = launch.Launch("gloo", rank=int(os.environ.get("HOROVOD_RANK", "1")))
    config, recipe = load_config(argv, prog="python -m hvdlm.train")
    config = _choose_strategy(config, here)
    worker.check_elastic(config)
    if here.rank == 0:
        demo.prepare_if_asked(config.data.path, is_demo=recipe == DEFAULT_RECIPE)
    run_folder = folder_of(config, recipe)

    def finished(agreed: Agreed, ranks: World) -> int:
        return _say_finished(run_folder, agreed.start, ranks)

    return worker.Worker(config, run_folder, member, token=token, finished=finished).run()


def _start(argv: list[str]) -> int:
    """Alone, or as a rank of what a launcher started."""
    here = launch.Launch("single")
    try:
        here = launch.classify(os.environ)
        config, recipe = load_config(argv, prog="python -m hvdlm.train")
        config = _choose_strategy(config, here)
        if here.rank == 0:
            # Before MPI starts, as it takes processes.
            demo.prepare_if_asked(config.data.path, is_demo=recipe == DEFAULT_RECIPE)
    except UserError:
        if here.rank == 0:
            raise
        return EXIT_USAGE
    settings = launch.process_settings(
        here,
        config.parallel,
        env=os.environ,
        cores=len(os.sched_getaffinity(0)),
        gpus=torch.cuda.device_count(),
        timeline=config.log.timeline,
    )
    run_folder = folder_of(config, recipe)
    # Before MPI starts, as it takes a process.
    job_end_unix = _job_end_unix() if here.rank == 0 else 0.0
    return _run(config, run_folder, world.init(here, settings, meeting=run_folder), job_end_unix=job_end_unix)


def _choose_strategy(config: RunConfig, here: launch.Launch) -> RunConfig:
    """Put a strategy in the place of auto: before Horovod starts, as its fusion depends on it."""
    if config.parallel.strategy != "auto":
        return config
    strategy, why = choose(Path(FILE))
    if here.rank == 0:
        print(why, flush=True)
    parallel = replace(config.parallel, strategy=strategy)  # type: ignore[arg-type]
    return check(replace(config, parallel=parallel))


def _job_end_unix() -> float:
    end = job.job_end(os.environ)
    if end.trouble:
        print(
            f"hvdlm train: warning: no end of the Slurm job known ({end.trouble}); so that this run saves "
            "before it, let Slurm send a signal: sbatch --signal=USR2@120",
            file=sys.stderr,
            flush=True,
        )
    return end.unix


def _run(config: RunConfig, run_folder: Path, ranks: World, *, job_end_unix: float) -> int:
    """Train; whatever happens, all ranks end together."""
    attempt = 0
    try:
        agreed = agree_on_start(config, run_folder, ranks, job_end_unix=job_end_unix)
        if agreed.start.step >= total_steps(config) or agreed.start.course.plateau.finished:
            exit_code = _say_finished(run_folder, agreed.start, ranks)
            agreed.close()
        else:
            attempt = agreed.start.attempt
            crash.end_job_on_thread_errors(ranks, run_folder, attempt)
            if config.log.timeline:
                ranks.start_timeline(timeline_path(run_folder, attempt))
            exit_code = train(open_session(config, run_folder, ranks, agreed)) or EXIT_DONE
        ranks.close()
        return exit_code
    except AgreedError as error:
        crash.leave_together("train", error, ranks, run_folder=run_folder, attempt=attempt)
        ranks.close()
        return error.exit_code
    except BaseException as error:
        crash.end_job("train", error, ranks, run_folder=run_folder if attempt else None, attempt=attempt)
        raise


def _say_finished(run_folder: Path, start: Start, ranks: World) -> int:
    if ranks.is_root:
        steps, early = start.step, start.course.plateau.finished
        how = f"all {steps} steps are done; raise train.steps to go on"
        if early:
            how = f"after step {steps} the validation loss stood still at optim.min_lr (schedule plateau)"
        print(f"{run_folder}: finished, {how}", flush=True)
        # The last start may have died between its last checkpoint and its last word.
        reason = exit_record.PLATEAU if early else exit_record.ALL_STEPS
        last = start.attempt - 1
        exit_record.write(run_folder, "done", attempt=last, step=steps, exit_code=EXIT_DONE, reason=reason)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_command("train", main))
