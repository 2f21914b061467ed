"""metrics.jsonl for programs, TensorBoard for browsers, one line or a progress bar for people."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any, final

import torch
from tqdm import tqdm

from hvdlm.config import UserError
from hvdlm.parallel.strategy import StepStats
from hvdlm.run.ledger import end_last_line, parse_rows
from hvdlm.run.spikes import is_spike
from hvdlm.run.standing import METRICS_FILE

_TAIL_BYTES = 1 << 16

# Dense bf16 peak of one GPU in FLOP/s, from its maker's data sheet.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "B200": 2250e12,
}


@final
class Metrics:
    """Writes what a run reports; rank 0 alone holds one.

    Args:
        run_folder: where the files lie.
        attempt: number of this start of the run, part of every row.
        steps: optimizer steps in all.
        tokens_per_step: tokens of a global batch.
        flops_per_token: forward and backward, for the share of the peak (MFU).
        world_size: processes, each with one device.
        device: this rank's, the same kind on all.

    Attributes:
        last_step: the newest training step in the file when it was opened; 0 = none.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        attempt: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        end_last_line(run_folder / METRICS_FILE)
        self.last_step = _last_step(run_folder / METRICS_FILE)
        self._file = (run_folder / METRICS_FILE).open("a", encoding="utf-8")
        self._attempt = attempt
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._device = device
        self._peak_flops = _peak_flops(device) * world_size
        self._since = time.perf_counter()
        self._steps_since = 0
        self._board: Any = None
        self._bar: Any = None

    def open_board(self, folder: Path) -> None:
        """Also write TensorBoard events.

        Raises:
            UserError: the optional package is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard needs the package tensorboard; pip install 'hvdlm[tensorboard]'"
            ) from error
        self._board = SummaryWriter(str(folder))

    def open_bar(self, done_steps: int) -> None:
        """Show a progress bar when stderr is a terminal."""
        self._bar = tqdm(
            total=self._steps, initial=done_steps, unit="step", disable=not sys.stderr.isatty(), leave=False
        )

    def train(self, step: int, stats: StepStats, lr: float, *, show: bool, more: dict[str, Any]) -> None:
        """Write a step's row with `more` fields, and its line when `show` is set or nothing was updated."""
        self._steps_since += 1
        seconds = time.perf_counter() - self._since
        tokens_per_s = self._steps_since * self._tokens_per_step / seconds
        row = {
            "kind": "train",
            "step": step,
            "loss": _finite(stats.loss),
            "lr": lr,
            "grad_norm": _finite(stats.grad_norm),
            "tokens": step * self._tokens_per_step,
            "tokens_per_s": round(tokens_per_s, 1),
            "attempt": self._attempt,
        }
        if self._peak_flops:
            row["mfu"] = round(self._mfu(tokens_per_s), 4)
        if stats.skipped:
            row |= {"skipped": True} | ({"spike": True} if is_spike(stats) else {})
        self._write(row | more)
        self._bar.update(1)
        if show or stats.skipped:
            self.say(self._line(step, stats, lr, tokens_per_s))
        if show:
            self.restart_clock()

    def evaluation(self, step: int, val_loss: float) -> None:
        """Write a validation's row and line."""
        self._write({"kind": "eval", "step": step, "val_loss": _finite(val_loss), "attempt": self._attempt})
        self.say(f"step {step:>{self._width}}/{self._steps}  validation loss {val_loss:.4f}")

    def saved(self, step: int, seconds: dict[str, float], *, size_bytes: int) -> None:
        """Write a committed checkpoint's row."""
        times = {key: round(value, 4) for key, value in seconds.items()}
        self._write({"kind": "save", "step": step, **times, "bytes": size_bytes, "attempt": self._attempt})

    def say(self, line: str) -> None:
        """Print a line, above the progress bar where there is one."""
        try:
            if self._bar is None or self._bar.disable:
                # One write a line: a launcher puts its tag before each piece it reads.
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            else:
                tqdm.write(line, file=sys.stdout)
        except OSError:
            # The reader is gone, a dead launcher say: that is no reason not to save.
            return

    def restart_clock(self) -> None:
        """Begin a new interval of the tokens/s, after a pause that is no training."""
        self._since = time.perf_counter()
        self._steps_since = 0

    def close(self) -> None:
        """Close files and bar."""
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()

    @property
    def _width(self) -> int:
        return len(str(self._steps))

    def _line(self, step: int, stats: StepStats, lr: float, tokens_per_s: float) -> str:
        parts = [
            f"step {step:>{self._width}}/{self._steps}",
            f"loss {stats.loss:.4f}",
            f"lr {lr:.2e}",
            f"grad norm {stats.grad_norm:.2f}",
            f"{tokens_per_s:,.0f} tokens/s",
        ]
        if self._peak_flops:
            parts.append(f"MFU {self._mfu(tokens_per_s):.1%}")
        parts.append(f"{_memory_gib(self._device):.1f} GiB")
        parts.append(f"ETA {_duration((self._steps - step) * self._tokens_per_step / tokens_per_s)}")
        why = "loss spike" if is_spike(stats) else "gradient not finite"
        return "  ".join(parts) + (f"  SKIPPED: {why}" if stats.skipped else "")

    def _mfu(self, tokens_per_s: float) -> float:
        """Of the devices' peak, the share that the model's own operations take."""
        return tokens_per_s * self._flops_per_token / self._peak_flops

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is None:
            return
        for key, value in row.items():
            if key not in ("kind", "step", "attempt", "skipped", "spike") and value is not None:
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _peak_flops(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS.items() if key in name), 0.0)


def _memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: the GPU's where it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{left:02d}"


def _last_step(path: Path) -> int:
    """The step of the last training row near a file's end; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        tail = file.read().decode(errors="replace")
    steps = [row["step"] for row in parse_rows(tail) if row.get("kind") == "train"]
    return steps[-1] if steps else 0
