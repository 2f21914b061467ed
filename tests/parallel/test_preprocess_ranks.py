"""Many processes make one data set, whatever happens to them: the same bytes as one makes."""

import json
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from hvdlm.corpus import existing
from tests import helpers
from tests.corpora import contents, preprocess_command, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tasks of text."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes, undisturbed."""
    out = tmp_path_factory.mktemp("expected")
    done = helpers.run(preprocess_command(corpus, out, "--workers", "1"))
    assert done.returncode == 0, done.stdout
    assert len([*out.glob("train-*.h5")]) > 8
    assert json.loads((out / "stats.json").read_text())["left_out"]["duplicate"] == 800
    return contents(out)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_not_show(ranks: int, corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    done = helpers.run(
        [*helpers.mpirun(ranks), *preprocess_command(corpus, tmp_path / "out", "--workers", "1")]
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("documents  ") == 1
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.long)])
def test_killed_at_random_moments_and_started_again_with_others(
    kills: int, corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Each start has another number of ranks than the one before. What comes out whole is compared, and begun
    anew, so that every kill hits a start at work."""
    choose, killed, ranks, out = random.Random(kills), 0, 0, tmp_path / "out"
    while killed < kills:
        ranks = choose.choice([count for count in (1, 2, 3) if count != ranks])
        workers = str(choose.randrange(1, 3))
        full = [*helpers.mpirun(ranks), *preprocess_command(corpus, out, "--workers", workers)]
        begun, starts = time.time(), out / existing.WORK_NAME / "starts"
        with helpers.started(full, {}) as process:
            time.sleep(choose.uniform(0.4, 1.8))
            for victim in helpers.family(process):
                victim.kill()
            at_work = any(path.stat().st_mtime > begun for path in starts.glob("*/alive"))
            killed += process.wait() != 0 and at_work
            process.communicate()
        if (out / "manifest.json").exists() and not (out / existing.WORK_NAME).exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    done = helpers.run([*helpers.mpirun(2), *preprocess_command(corpus, out, "--workers", "1")])
    assert done.returncode == 0, done.stdout
    assert contents(out) == expected


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_all_with_75_and_the_next_goes_on(
    number: signal.Signals, corpus: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with helpers.started(
        [*helpers.mpirun(2), *preprocess_command(corpus, out, "--workers", "1")], {}
    ) as process:
        encoded = out / existing.WORK_NAME / "done" / "encode"
        helpers.wait_until(lambda: len([*encoded.glob("0*.json")]) >= 2, within_s=60, what="two tasks")
        ranks = [one for one in helpers.family(process) if "hvdlm.preprocess" in one.cmdline()]
        helpers.send(next(one for one in ranks if one.environ().get("OMPI_COMM_WORLD_RANK") == "1"), number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert "stopped; the same command goes on from there" in output
    assert not (out / "manifest.json").exists()
    done = helpers.run(preprocess_command(corpus, out, "--workers", "2"))
    assert done.returncode == 0, done.stdout
    assert "of them were done before" in done.stdout
    assert contents(out) == expected


def test_one_ranks_failure_stops_all_with_its_message(corpus: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for path in corpus.iterdir():
        (texts / path.name).write_bytes(path.read_bytes())
    (texts / "c.jsonl").write_text('{"text": "good"}\n{"text": 7}\n' * 3)
    one = [sys.executable, "-m", "hvdlm.preprocess", str(texts), "--out", str(tmp_path / "out")]
    done = helpers.run([*helpers.mpirun(3), *one, "--tokenizer", "byte", "--workers", "1"])
    assert done.returncode == 2, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("hvdlm preprocess: error")]
    assert len(lines) == 1
    assert lines[0].endswith(
        "c.jsonl: line 2: field 'text' is a number, needed a string; choose another --field"
    )
    assert "Traceback" not in done.stdout


def test_a_job_array_makes_one_data_set(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    """The environment of Slurm's elements; the last two start when the first is at work."""
    out, parts = tmp_path / "out", []
    for element in range(3):
        env = {
            "SLURM_ARRAY_JOB_ID": "71",
            "SLURM_ARRAY_TASK_ID": str(4 + element),
            "SLURM_ARRAY_TASK_MIN": "4",
            "SLURM_ARRAY_TASK_COUNT": "3",
        }
        parts.append(helpers.started(preprocess_command(corpus, out, "--workers", "1"), env))
    with parts[0] as first:
        work = out / existing.WORK_NAME / "starts" / "array-71"
        helpers.wait_until(work.exists, within_s=30, what="the first element's start")
        with parts[1] as second, parts[2] as third:
            outputs = [process.communicate(timeout=90)[0] for process in (first, second, third)]
    assert [process.returncode for process in (first, second, third)] == [0, 0, 0], outputs
    assert contents(out) == expected


def test_srun_without_a_pmi_needs_no_mpi(corpus: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out, outputs = tmp_path / "out", []
    slurm = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    with (
        helpers.started(
            preprocess_command(corpus, out, "--workers", "1"), {**slurm, "SLURM_PROCID": "0"}
        ) as one,
        helpers.started(
            preprocess_command(corpus, out, "--workers", "1"), {**slurm, "SLURM_PROCID": "1"}
        ) as two,
    ):
        outputs = [process.communicate(timeout=90)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), outputs
    assert "documents  " in outputs[0]
    assert "documents  " not in outputs[1]
    assert contents(out) == expected
