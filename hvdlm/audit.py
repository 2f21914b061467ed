"""Command: whether a run consumed every sample exactly once, and what one of its steps was.

python -m hvdlm.audit RUN
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvdlm.config import EXIT_CRASH, EXIT_DONE, run_command
from hvdlm.run.audit import Recorded, enumerate_draws, open_recorded, problem_of_run, readings
from hvdlm.run.replay import ReplayedSlot, replay
from hvdlm.text.tokenizer import Tokenizer, load

ENUMERATED_SAMPLES = 1 << 24
"""A run of up to so many samples is also enumerated, which takes seconds."""
_SHOWN_CHARS = 60


def main(argv: list[str] | None = None) -> int:
    """Audit a run, or print a step of it.

    Returns:
        0 if every sample was consumed exactly once, 1 if not.

    Raises:
        UserError: there is no such run, its data is gone, or it has no such step.
    """
    args = _parser().parse_args(argv)
    run = open_recorded(Path(args.run), [Path(folder) for folder in args.data_path])
    if args.replay is not None:
        slots, text = replay(run, args.replay), load(run.checkpoint.tokenizer_path)
        if args.json:
            print(json.dumps({"step": args.replay, "slots": [_decoded(slot, text) for slot in slots]}))
        else:
            print("\n".join(_replay_lines(run, args.replay, slots, text=text, full=args.full)))
        return EXIT_DONE
    found = report(run, enumerated=args.enumerate or run.samples <= ENUMERATED_SAMPLES)
    print(json.dumps(found) if args.json else "\n".join(_table(found)))
    return EXIT_DONE if found["proven"] else EXIT_CRASH


def report(run: Recorded, *, enumerated: bool) -> dict[str, Any]:
    """What is printed with --json.

    Args:
        run: what it left.
        enumerated: also look at every sample, where counting found nothing wrong.
    """
    steps, problem = run.checkpoint.step, problem_of_run(run)
    if problem is None and enumerated:
        problem = enumerate_draws(run)
    attempts = run.history.attempts
    return {
        "checkpoint": str(run.checkpoint.folder),
        "attempts": [
            {
                "attempt": attempt.number,
                "resumed_at": attempt.resumed_at,
                "ranks": sorted({row.world_size for row in attempt.rows}),
                "steps": len(attempt.rows),
                "void": len(attempt.rows) - len(attempt.kept),
            }
            for attempt in attempts
        ],
        "steps": steps,
        "void_steps": sum(len(attempt.rows) - len(attempt.kept) for attempt in attempts),
        "steps_after": max((row.step - steps for row in run.history.rows if row.step > steps), default=0),
        "samples": run.samples,
        "tokens": run.samples * run.plan.seq_len,
        "stages": len(run.stages),
        "sources": [asdict(reading) | {"epochs": reading.epochs} for reading in readings(run)],
        "enumerated": enumerated and problem is None,
        "proven": problem is None,
        "problem": problem,
    }


def _table(found: dict[str, Any]) -> Iterator[str]:
    yield f"{'attempt':>8} {'ranks':>8} {'from step':>10} {'steps':>8} {'void':>8}"
    for row in found["attempts"]:
        ranks = ", ".join(map(str, row["ranks"])) or "-"
        yield f"{row['attempt']:>8} {ranks:>8} {row['resumed_at']:>10} {row['steps']:>8} {row['void']:>8}"
    yield ""
    after = f"; {found['steps_after']} more are in no valid checkpoint yet" if found["steps_after"] else ""
    yield f"{found['checkpoint']}: {found['steps']:,} steps in {found['stages']} stage(s){after}"
    yield f"{found['samples']:,} samples, {found['tokens']:,} tokens; {found['void_steps']:,} void steps"
    for row in found["sources"]:
        yield (
            f"{row['path']}: {row['drawn']:,} draws of {row['windows']:,} windows, {row['epochs']:.2f} epochs"
        )
    yield ""
    how = "every sample looked at" if found["enumerated"] else "counted; --enumerate looks at every sample"
    if found["proven"]:
        yield f"proven: every sample was consumed exactly once, no window twice in an epoch ({how})"
    else:
        yield f"not proven: {found['problem']}"


def _replay_lines(
    run: Recorded, step: int, slots: list[ReplayedSlot], *, text: Tokenizer, full: bool
) -> Iterator[str]:
    samples = [sample.sample for slot in slots for sample in slot.samples]
    yield f"{run.checkpoint.folder}: step {step}, samples {samples[0]:,} to {samples[-1]:,}"
    for slot in slots:
        yield f"slot {slot.slot}, random seed {slot.rng_seed}"
        for sample in slot.samples:
            where = f"{sample.source}/{sample.shard} token {sample.first_token}"
            yield f"  sample {sample.sample}  {where}"
            decoded = text.decode(sample.ids)
            yield decoded if full else f"    {_shortened(decoded)}"


def _decoded(slot: ReplayedSlot, text: Tokenizer) -> dict[str, Any]:
    samples = [asdict(sample) | {"text": text.decode(sample.ids)} for sample in slot.samples]
    return asdict(slot) | {"samples": samples}


def _shortened(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.audit",
        description="Prove from the ledger, the newest valid checkpoint and the manifests that every sample "
        "was consumed exactly once over all attempts, numbers of ranks and stages, or name the first gap or "
        "overlap. Exit code 0: proven, 1: not, 2: no such run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", nargs="?", default="data/runs/demo", metavar="RUN", help="run folder (default: data/runs/demo)"
    )
    parser.add_argument(
        "--data.path",
        dest="data_path",
        action="append",
        default=[],
        metavar="DIR",
        help="where a data set of the run lies now; may be given again",
    )
    parser.add_argument("--enumerate", action="store_true", help="look at every sample, however many")
    parser.add_argument("--replay", type=int, metavar="STEP", help="print the batch of this step instead")
    parser.add_argument("--full", action="store_true", help="with --replay: the whole text of each sample")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("audit", main))
