"""Command: the loss of a trained model over a whole split, alone or under mpirun.

python -m hvdlm.evaluate RUN --split val
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path

import torch

from hvdlm.comm import launch, world
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_DONE, ParallelConfig, UserError, run_command
from hvdlm.data.entries import SPLITS
from hvdlm.data.loader import BatchPlan, evaluation_batches
from hvdlm.data.manifest import Manifest
from hvdlm.data.sources import Source, read_sources
from hvdlm.data.verify import require_intact
from hvdlm.parallel.forward import evaluate
from hvdlm.run import crash
from hvdlm.run.evaluation import mean_loss
from hvdlm.run.restore import open_checkpoint, reopen
from hvdlm.run.trained import Trained, open_trained


def main(argv: list[str] | None = None) -> int:
    """Evaluate a run.

    Returns:
        The exit code.

    Raises:
        UserError: bad arguments, no valid run, or data of another tokenizer.

    Collective: yes.
    """
    args = _parser().parse_args(argv)
    here = launch.classify(os.environ)
    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    settings = launch.process_settings(here, ParallelConfig(), env=os.environ, cores=cores, gpus=gpus)
    ranks = world.init(here, settings)
    try:
        result = _evaluate(args, ranks)
        if ranks.is_root:
            print(json.dumps(result), flush=True)
        ranks.close()
        return EXIT_DONE
    except AgreedError as error:
        ranks.close()
        if ranks.is_root:
            raise
        return error.exit_code
    except BaseException as error:
        crash.end_job("evaluate", error, ranks)
        raise


def _evaluate(args: argparse.Namespace, ranks: World) -> dict[str, object]:
    """The report, equal on all ranks."""
    # Each for itself, the ranks of a run that still trains would open different ones.
    chosen = ranks.on_root(lambda: str(open_checkpoint(Path(args.run)).folder), name="evaluate.checkpoint")
    trained = open_trained(reopen(Path(chosen)), args.device, local_rank=ranks.local_rank)
    data, train = trained.data, trained.train
    folders = [args.data_path] if args.data_path else list(data.weights)
    texts = ranks.on_root(
        lambda: [source.manifest.to_json() for source in _read_fitting(folders, trained)],
        name="evaluate.manifests",
    )
    sources = [Source(Path(f), Manifest.from_json(text)) for f, text in zip(folders, texts, strict=True)]
    share = (ranks.rank, ranks.size)
    for source in sources:
        require_intact(source, share=share, splits=(args.split,))
    batches = evaluation_batches(
        sources,
        args.split,
        plan=BatchPlan(
            data.seq_len, train.global_batch, train.micro_batch, train.seed, document_mask=data.document_mask
        ),
        share=share,
        limit_batches=0,
    )
    precision = args.precision or train.precision
    loss, tokens = mean_loss(lambda b: evaluate(trained.model, b, precision=precision), batches, ranks)
    if ranks.is_root:
        print(
            f"{trained.checkpoint.folder}: {args.split} split of {', '.join(folders)}, "
            f"{sum(source.manifest.documents(args.split) for source in sources):,} documents",
            flush=True,
        )
    text_bytes = sum(source.manifest.text_bytes(args.split) for source in sources)
    return report(loss, tokens, text_bytes=text_bytes, step=trained.checkpoint.step)


def report(loss: float, tokens: int, *, text_bytes: int, step: int) -> dict[str, object]:
    """The last line of stdout.

    Args:
        loss: mean over the predicted tokens, in nats.
        tokens: predicted tokens: all of the split but the first of each shard.
        text_bytes: UTF-8 bytes of the split's text.
        step: optimizer steps the model was trained for.

    Returns:
        loss, perplexity, bits_per_byte (which compares models of different tokenizers), tokens, step.
    """
    return {
        "loss": loss,
        # Beyond 700 nats exp overflows; no model that is any use comes near.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss * tokens / (math.log(2) * text_bytes),
        "tokens": tokens,
        "step": step,
    }


def _read_fitting(folders: list[str], trained: Trained) -> list[Source]:
    sources = read_sources(folders)
    found = sources[0].manifest.tokenizer.sha256
    wanted = trained.checkpoint.state["fingerprints"]["tokenizer"]
    if found != wanted:
        raise UserError(
            f"{folders[0]}: was made with tokenizer {found[:12]}, the run was trained with {wanted[:12]}; "
            f"preprocess again with --tokenizer {shlex.quote(str(trained.checkpoint.tokenizer_path))}"
        )
    return sources


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.evaluate",
        description="Loss of a trained model over a whole split. The last line of stdout is JSON: loss (nats "
        "a token), perplexity, bits_per_byte, tokens, step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", nargs="?", default="data/runs/demo", metavar="RUN", help="run folder, or one checkpoint in it"
    )
    parser.add_argument(
        "--data.path", dest="data_path", default="", metavar="DIR", help="other shards ('': the run's)"
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="which part of the data")
    parser.add_argument(
        "--precision",
        choices=("", "fp32", "bf16", "fp16"),
        default="",
        help="compute precision ('': the run's)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("evaluate", main))
