"""Every knob readable, every mistake one line with a way out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hvdlm.config import RunConfig, UserError, check, total_steps
from hvdlm.config.parse import RECIPES, keys, load_config, load_resolved, to_toml


def load(*arguments: str) -> RunConfig:
    return load_config(arguments, prog="test")[0]


def refuse(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def test_no_argument_is_the_demo_recipe() -> None:
    config, recipe = load_config([], prog="test")
    assert recipe == "demo"
    assert config == load("--config", "demo") == load("--config=demo")
    assert config.data.path == "data/demo"


@pytest.mark.parametrize("recipe", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_every_recipe_is_good(recipe: str) -> None:
    assert load_config(["--config", recipe], prog="test")[1] == recipe


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optim]\nlr = 1e-3\nbetas = [0.8, 0.9]\n[train]\nsteps = 7\n")
    config, recipe = load_config(["--config", str(tmp_path / "mine.toml"), "--train.steps", "9"], prog="test")
    assert recipe == "mine"
    assert (config.optim.lr, config.optim.betas, config.train.steps) == (1e-3, (0.8, 0.9), 9)
    assert config.optim.clip == RunConfig().optim.clip


def test_the_resolved_file_is_the_same_configuration(tmp_path: Path) -> None:
    config = load("--optim.eps", "3e-9", "--model.init", 'a "quoted" name', "--optim.betas", "[0.5, 0.6]")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_resolved(path) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.layer", "3"], "unknown key model.layer (did you mean model.layers?)"),
        (["--train.lr", "3"], "did you mean optim.lr?"),
        (["--model.layers", "x"], 'Parser key "model.layers": Expected an int. Got value: x'),
        (["--train.precision", "fp8"], "Expected one of ['fp32', 'bf16', 'fp16']. Got value: fp8"),
        (["--optim.betas", "[0.9]"], "Expected a tuple with 2 elements"),
        (["stray"], "stray"),
        (["--config", "dmo"], "no such file or recipe (did you mean demo?)"),
        (["--config", "/"], "is a folder"),
        (["--train.global_batch", "7", "--train.micro_batch", "2"], "not a multiple of train.micro_batch 2"),
        (
            ["--model.width", "130", "--model.heads", "4"],
            "model.width 130 is not a multiple of model.heads 4",
        ),
        (["--model.width", "12", "--model.heads", "4"], "is odd"),
        (["--model.heads", "4", "--model.kv_heads", "3"], "not a multiple of model.kv_heads 3"),
        (["--model.dropout", "1.5"], "model.dropout 1.5"),
        (["--train.steps", "0"], "train.steps 0"),
        (["--optim.min_lr", "1"], "min_lr"),
        (["--checkpoint.keep_last", "1"], "checkpoint.keep_last 1"),
        (["--checkpoint.keep_best", "-1"], "checkpoint.keep_best -1 must be 0 or more"),
        (
            ["--checkpoint.keep_every", "701"],
            "checkpoint.keep_every 701 is not a multiple of checkpoint.every",
        ),
        (["--checkpoint.keep_best", "1", "--eval.every", "300"], "a multiple of eval.every 300"),
        (["--checkpoint.keep_best", "1", "--eval.batches", "0"], "needs each checkpoint validated"),
        (
            ["--parallel.strategy", "fixed", "--parallel.compression", "fp16"],
            "parallel.compression is fp16, parallel.strategy fixed needs none",
        ),
        (["--parallel.strategy", "fixed", "--train.precision", "bf16"], "fixed needs fp32"),
        (["--parallel.strategy", "fixed", "--model.compile", "true"], "fixed needs False"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str) -> None:
    assert expected in refuse(*arguments)


@pytest.mark.parametrize(
    "key", [key for key, value in keys(RunConfig()).items() if type(value) in (int, float)]
)
def test_no_number_may_be_negative(key: str) -> None:
    assert key.rpartition(".")[2] in refuse(f"--{key}", "-1")


@pytest.mark.parametrize(
    "key", ["data.seq_len", "data.shuffle_mb", "train.steps", "train.tokens", "train.global_batch"]
)
def test_numbers_of_samples_and_bytes_stay_below_what_is_counted_with(key: str) -> None:
    assert f"{key} {10**20} must be " in refuse(f"--{key}", str(10**20))


BLEND = {"data/code": 3, "data/prose": 1}


def test_a_blend_is_a_table_in_a_file_and_in_an_argument(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[data]\npath = {"data/code" = 3, "data/prose" = 1}\n')
    config = load("--config", str(path))
    assert config.data.path == BLEND == load("--data.path", json.dumps(BLEND)).data.path
    assert list(config.data.weights.items()) == list(BLEND.items())
    assert load("--config", str(path), "--data.path", "data/one").data.weights == {"data/one": 1}
    assert load("--config", str(path), "--data.path", '{"data/two": 2}').data.weights == {"data/two": 2}


@pytest.mark.parametrize("blend", [BLEND, dict(reversed(BLEND.items())), {'od"d/na me': 1, "data.x": 2}])
def test_a_blend_survives_its_resolved_file_in_its_order(blend: dict[str, int], tmp_path: Path) -> None:
    limits = json.dumps(dict.fromkeys(blend, 2))
    config = load("--data.path", json.dumps(blend), "--data.max_epochs", limits)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_resolved(path) == config
    assert list(load_resolved(path).data.weights) == list(blend)
    assert [config.data.epoch_limit(folder) for folder in blend] == [2, 2]


def test_a_limit_of_epochs_is_one_for_all_or_of_some() -> None:
    path = ("--data.path", json.dumps(BLEND))
    assert [load(*path, "--data.max_epochs", "4").data.epoch_limit(folder) for folder in BLEND] == [4, 4]
    some = load(*path, "--data.max_epochs", '{"data/prose": 3}').data
    assert [some.epoch_limit(folder) for folder in BLEND] == [0, 3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.path", "{}"], "data.path is an empty table"),
        (["--data.path", ""], "data.path must name a folder"),
        (["--data.path", '{"": 1}'], "data.path must name a folder"),
        (["--data.path", '{"a": 1, "b": 0}'], "data.path: weight 0 of b must be at least 1"),
        (["--data.path", '{"a": 1, "b": -2}'], "data.path: weight -2 of b must be at least 1"),
        (["--data.path", '{"a": 4096, "b": 1}'], "weight 1 of b in a total of 4097: .* one in 4096"),
        (["--data.path", '{"a": 2000000000, "b": 2000000000}'], "the total below 2\\^31"),
        (["--data.path", '{"a": 1.5}'], "is no table of folders with whole weights; write '{"),
        (["--data.path", '{"a": 1'], "is no table of folders with whole weights; write '{"),
        (
            ["--data.max_epochs", '{"a": 1}'],
            "data.max_epochs names a, which is not in data.path; it has data/",
        ),
        (["--data.path", '{"a": 1}', "--data.max_epochs", '{"a": -1}'], "data.max_epochs -1 of a must be 0"),
        (["--data.max_epochs", "x"], r'"data.max_epochs": Expected int or dict\[str, int\]. Got value: x'),
        (["--data.new_stage", "2"], "data.new_stage"),
    ],
)
def test_a_mistaken_blend_is_one_line(arguments: list[str], expected: str) -> None:
    assert re.search(expected, refuse(*arguments))


def test_a_run_folder_has_a_name() -> None:
    assert "train.out must name a folder" in refuse("--train.out", "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[model]\nlayer = 3\n", "did you mean model.layers?"),
        (b"[modl]\nlayers = 3\n", "unknown key modl.layers"),
        (b"[model\n", "Problems parsing config"),
        (b"\xff\xfe\x00", "is not a readable TOML file"),
        (b"[model]\nlayers = 'x'\n", "Expected an int"),
        (b"[data]\npath = {a = 1.5}\n", "Expected str or dict[str, int]. Got value: {'a': 1.5}"),
    ],
)
def test_a_bad_file_is_named(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    message = refuse("--config", str(path))
    assert message.startswith(str(path))
    assert expected in message


def test_tokens_stand_for_steps() -> None:
    config = check(RunConfig())
    tokens = 10 * config.train.global_batch * config.data.seq_len
    assert total_steps(replace(config, train=replace(config.train, tokens=tokens))) == 10
    assert total_steps(replace(config, train=replace(config.train, tokens=tokens + 1))) == 11
    assert total_steps(config) == config.train.steps


def test_at_most_eighty_knobs() -> None:
    assert len(keys(RunConfig())) <= 80


def test_the_check_command_needs_no_torch() -> None:
    code = "import sys; from hvdlm.config.__main__ import main; main(['--config', 'demo']); "
    code += "assert not {'torch', 'numpy', 'h5py', 'horovod', 'mpi4py'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("demo: good")


def test_the_check_command_exits_with_2() -> None:
    command = [sys.executable, "-m", "hvdlm.config", "--model.layer", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("hvdlm config: error: unknown key model.layer")
    assert len(done.stderr.splitlines()) == 1


def test_help_and_print_config_show_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--print_config"):
        with pytest.raises(SystemExit) as caught:
            load(flag)
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert all(key.split(".")[1] in shown for key in keys(RunConfig()))
