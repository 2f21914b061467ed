"""Continuing a prompt: choice of tokens, characters on the way out, and the command as a user runs it."""

import os
import random
import signal
import subprocess
import sys
from itertools import islice

import pytest
import torch
from trained_run import build_tokenizer, fallback_tokenizer, in_memory, trained_once

from hvdlm import generate
from hvdlm.config import UserError
from hvdlm.generate import TextStream
from hvdlm.models.sampling import Sampling, choose, continuation
from tests import helpers

GREEDY = Sampling(temperature=0)
NASTY = "naïve — 自由 👩‍👩‍👧‍👦 e\u0301\x00\r\n\ufffd end"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data):
    return trained_once(tmp_path_factory, tiny_data)


def command(*arguments):
    return [sys.executable, "-m", "hvdlm.generate", *map(str, arguments)]


def drawn(trained, prompt_ids, count, sampling=GREEDY, seq_len=32):
    size = trained.tokenizer.vocab_size
    ids = continuation(trained.model, prompt_ids, sampling=sampling, vocab_size=size, seq_len=seq_len)
    return list(islice(ids, count))


def test_greedy_continuation_is_the_argmax_of_the_full_forward():
    trained = in_memory("byte")
    seen = [5, 6, 7]
    for _ in range(29):
        logits = trained.model(torch.tensor([seen]))[0, -1, : trained.tokenizer.vocab_size]
        seen.append(int(logits.argmax()))
    assert drawn(trained, [5, 6, 7], 29) == seen[3:]
    assert len(set(seen)) > 5


def test_a_full_window_goes_on_from_its_newest_half():
    trained = in_memory("byte", seq_len=8)
    first = drawn(trained, [1, 2, 3], 6, seq_len=8)
    # Three of the prompt and five drawn fill the window; the sixth was drawn from a full one.
    seen = [1, 2, 3, *first]
    assert drawn(trained, [1, 2, 3], 9, seq_len=8) == first + drawn(trained, seen[-4:], 3, seq_len=8)


def test_a_long_prompt_is_read_from_its_end():
    trained = in_memory("byte", seq_len=8)
    assert drawn(trained, list(range(40)), 12, seq_len=8) == drawn(
        trained, list(range(32, 40)), 12, seq_len=8
    )


def test_the_seed_decides():
    trained = in_memory("byte")
    one, same, other = (drawn(trained, [1], 20, Sampling(1.0, 0.9, seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_padding_is_never_drawn():
    trained = in_memory("byte")
    with torch.no_grad():
        trained.model.embedding.weight[trained.tokenizer.vocab_size :] = 1e3
    assert max(drawn(trained, [1], 30, Sampling(5.0))) < trained.tokenizer.vocab_size


def frequencies(sampling, logits):
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose(logits, sampling, generator) for _ in range(4000)]), minlength=4
    )
    return counts / 4000


def test_temperature_and_top_p_shape_the_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    torch.testing.assert_close(frequencies(Sampling(), logits), logits.exp(), atol=0.03, rtol=0)
    sharper = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    torch.testing.assert_close(frequencies(Sampling(0.5), logits), sharper, atol=0.03, rtol=0)
    # 0.4 is not enough, with 0.3 it is.
    nucleus = torch.tensor([0, 0, 3 / 7, 4 / 7])
    torch.testing.assert_close(frequencies(Sampling(1, 0.65), logits), nucleus, atol=0.03, rtol=0)
    assert frequencies(Sampling(1, 1e-9), logits)[3] == 1
    assert frequencies(Sampling(1e-30, 1), logits)[3] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_model_is_an_error(bad):
    with pytest.raises(UserError, match="not finite") as caught:
        choose(torch.tensor([0.0, bad]), Sampling(), torch.Generator())
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("kind", ["byte", "bpe", "word", "fallback"])
def test_stream_gives_the_same_text_as_decoding_at_once(kind):
    tokenizer = fallback_tokenizer() if kind == "fallback" else build_tokenizer(kind)
    text = "def main wörld ab" if kind == "word" else NASTY
    ids = tokenizer.encode_batch([text])[0].tolist()
    stream = TextStream(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_stream_of_broken_bytes_neither_waits_for_ever_nor_loses_any(kind):
    tokenizer = build_tokenizer(kind)
    choose_id = random.Random(0)
    for _ in range(30):
        ids = [choose_id.randrange(256) for _ in range(80)]
        stream = TextStream(tokenizer)
        pieces = [stream.push(id) for id in ids]
        assert "".join(pieces) + stream.end() == tokenizer.decode(ids)
        assert all(any(pieces[i : i + 20]) for i in range(60))


def test_stream_of_broken_bytes_with_byte_fallback():
    tokenizer = fallback_tokenizer()
    b, euro = 2 + 256 + 2, [2 + byte for byte in "€".encode()]
    stream = TextStream(tokenizer)
    ids = [*euro, *[2 + byte for byte in "😀".encode()]]
    assert [stream.push(id) for id in ids] == ["", "", "€", "", "", "", "😀"]
    pieces = [stream.push(2 + 0xFF) for _ in range(60)]
    assert sum(len(piece) for piece in pieces) > 30
    assert stream.push(b).endswith("b")


def test_stream_keeps_the_space_after_the_prompt():
    for tokenizer, before, token, text in (
        (fallback_tokenizer(), "a", "▁wör", " wör"),
        (build_tokenizer("word"), "def main", "return", " return"),
    ):
        ids = tokenizer.encode_batch([before])[0].tolist()
        assert TextStream(tokenizer, ids).push(tokenizer._library.token_to_id(token)) == text


def test_text_stops_at_the_end_of_a_document(monkeypatch):
    trained = in_memory("byte")
    ids = [*b"abc", trained.eos_id, *b"def"]
    monkeypatch.setattr(generate, "continuation", lambda *_, **__: iter(ids))
    pieces = generate.generate(trained, "x", max_tokens=10, sampling=GREEDY)
    assert "".join(pieces) == "xabc"


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="no token"):
        next(generate.generate(in_memory("word"), "  \n", max_tokens=1, sampling=GREEDY))


def test_an_empty_prompt_begins_a_document():
    trained = in_memory("byte")
    expected = trained.tokenizer.decode(drawn(trained, [trained.eos_id], 12))
    assert "".join(generate.generate(trained, "", max_tokens=12, sampling=GREEDY)) == expected


def test_a_cut_prompt_is_said(capsys):
    trained = in_memory("byte", seq_len=8)
    text = "".join(generate.generate(trained, "0123456789", max_tokens=3, sampling=GREEDY))
    assert text.startswith("0123456789") and len(text) > 10
    assert "reads the last 8 of the prompt's 10 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "inf"], "--temperature inf"),
        (["--top-p", "0"], "--top-p 0.0"),
        (["--top-p", "1.1"], "--top-p 1.1"),
        (["--seed", "-1"], "--seed -1"),
        (["--max-tokens", "-1"], "--max-tokens -1"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["nowhere"], "no such run folder"),
    ],
)
def test_bad_arguments_are_usage_errors(arguments, message):
    with pytest.raises(UserError) as caught:
        generate.main(arguments)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_gpu_is_a_usage_error(run):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="no GPU"):
        generate.main([str(run), "--device", "cuda"])


def test_the_command(run, capfdbinary):
    arguments = [str(run), "--prompt", "def é", "--max-tokens", "40", "--seed", "3"]
    assert generate.main(arguments) == 0
    first = capfdbinary.readouterr()
    assert first.out.decode().startswith("def é") and first.out.endswith(b"\n")
    assert len(first.out) > 30 and first.err == b""
    assert generate.main(arguments) == 0
    assert capfdbinary.readouterr().out == first.out
    assert generate.main([*arguments[:-1], "4"]) == 0
    assert capfdbinary.readouterr().out != first.out


def test_a_checkpoint_folder_is_a_run(run, capfd):
    assert generate.main([str(run / "checkpoints" / "step-00000002"), "--max-tokens", "3"]) == 0


def test_ctrl_c_and_a_closed_pipe_end_quietly(run):
    # Greedy: at another temperature this little model would draw eos before long.
    endless = command(run, "--max-tokens", 10**9, "--temperature", 0, "--prompt", "d")
    environment = {**os.environ, "PYTHONPATH": str(helpers.__file__).rpartition("/tests/")[0], "LC_ALL": "C"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    with subprocess.Popen(endless, **pipes) as first, subprocess.Popen(endless, **pipes) as second:
        assert first.stdout.read(20) and second.stdout.read(20)
        first.send_signal(signal.SIGINT)
        second.stdout.close()
        first.stdout.read()
        assert (first.wait(30), first.stderr.read()) == (130, b"\nhvdlm generate: interrupted\n")
        assert (second.wait(30), second.stderr.read()) == (141, b"")
