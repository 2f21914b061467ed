"""Command: continue a prompt with a trained model, printed as it is written.

python -m hvdlm.generate RUN --prompt "def main" --max-tokens 200 --temperature 0.8 --top-p 0.95
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol, final

from hvdlm.config import EXIT_DONE, UserError, run_command
from hvdlm.models.sampling import Sampling, continuation
from hvdlm.run.restore import open_checkpoint
from hvdlm.run.trained import Trained, open_trained

CONTROLS = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")
"""What an untrained model may write, and a terminal might obey."""


class Decoder(Protocol):
    """Turns ids into text (see `hvdlm.text.tokenizer.Tokenizer`)."""

    def decode(self, ids: Sequence[int]) -> str: ...


@final
class TextStream:
    """Text of ids that come one by one, each character given out once it is complete.

    An id may be half a character, and what it looks like may depend on the one before it (a word's
    leading space), so the newest ids are decoded together and only what is new is given out.
    """

    LONGEST_CHARACTER = 4
    """Bytes of a character in UTF-8."""
    LONGEST_WAIT = 16
    """Ids after which text is given out as it is."""

    def __init__(self, tokenizer: Decoder, before: Sequence[int] = ()) -> None:
        """Begin after some text.

        Args:
            tokenizer: decodes the ids.
            before: ids of the text that is already out, as the prompt's.
        """
        self._tokenizer = tokenizer
        self._given = ""
        self._begin(list(before)[-self.LONGEST_WAIT :])

    def push(self, token: int) -> str:
        """Take one id; return the text that is certain now, perhaps none."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # A decoder with byte fallback shows a half-read character and the bytes before it as U+FFFD.
        changed = not text.startswith(self._given)
        held = len(text) - len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        if len(self._ids) - self._context > self.LONGEST_WAIT:
            held, changed = 0, False
        # Bytes that never become a character stay U+FFFD: hold only as many as still may become one.
        certain = len(text) - min(held, self.LONGEST_CHARACTER - 1)
        if changed or certain < len(self._given):
            return ""
        new, self._given = text[len(self._given) : certain], text[:certain]
        if certain == len(text):
            self._begin(self._ids[self._context :])
        return new

    def end(self) -> str:
        """What was held back."""
        return self._tokenizer.decode(self._ids)[len(self._given) :]

    def _begin(self, context: list[int]) -> None:
        """Forget all but the ids that the next one may be read together with."""
        self._ids, self._context = context, len(context)
        self._given = self._tokenizer.decode(context)


def generate(trained: Trained, prompt: str, *, max_tokens: int, sampling: Sampling) -> Iterator[str]:
    """The prompt and its continuation, in pieces of whole characters.

    Args:
        trained: the model.
        prompt: may be empty: a new document is begun.
        max_tokens: the most tokens to draw; an end of document stops before.
        sampling: how to choose.

    Raises:
        UserError: the tokenizer makes nothing of the prompt, or the model's output is not finite.
    """
    tokenizer = trained.tokenizer
    prompt_ids = [int(id) for id in tokenizer.encode_batch([prompt])[0]] if prompt else []
    if prompt and not prompt_ids:
        raise UserError("--prompt: the tokenizer makes no token of this text; give one with words in it")
    seq_len = trained.data.seq_len
    if len(prompt_ids) > seq_len:
        note = f"the model reads the last {seq_len} of the prompt's {len(prompt_ids)} tokens, as in training"
        print(f"hvdlm generate: note: {note}", file=sys.stderr)
    yield prompt
    stream = TextStream(tokenizer, prompt_ids)
    drawn = continuation(
        trained.model,
        prompt_ids or [trained.eos_id],
        sampling=sampling,
        vocab_size=tokenizer.vocab_size,
        seq_len=seq_len,
    )
    for token in islice(drawn, max_tokens):
        if token == trained.eos_id:
            break
        yield stream.push(token)
    yield stream.end()


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code.

    Raises:
        UserError: bad arguments, or no valid run.
    """
    args = _parser().parse_args(argv)
    _check(args)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    trained = open_trained(open_checkpoint(Path(args.run)), args.device)
    try:
        _print_pieces(generate(trained, args.prompt, max_tokens=args.max_tokens, sampling=sampling))
    except KeyboardInterrupt:
        print(file=sys.stderr)  # The text ended anywhere in its line.
        raise
    return EXIT_DONE


def _check(args: argparse.Namespace) -> None:
    if args.max_tokens < 0:
        raise UserError(f"--max-tokens {args.max_tokens}: needed 0 or more")
    try:
        args.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: is not valid UTF-8; give text in UTF-8") from None


def _print_pieces(pieces: Iterator[str]) -> None:
    """Print each piece as it comes, as UTF-8 whatever the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    for piece in pieces:
        print(piece.translate(CONTROLS) if sys.stdout.isatty() else piece, end="", flush=True)
    print(flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hvdlm.generate",
        description="Continue a prompt with a trained model. A text longer than the model's training "
        "sequences goes on from the newest half of one whenever one is full.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", nargs="?", default="data/runs/demo", help="run or checkpoint folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty: a new document")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to draw at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token always")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest tokens that have it"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same text")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("generate", main))
