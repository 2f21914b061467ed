"""The same samples and the same losses on any number of ranks, under every launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import helpers

GOLDEN = Path(__file__).parent.parent / "golden" / "tiny-20-steps.json"


@pytest.fixture(scope="module")
def one_rank(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_folder = tmp_path_factory.mktemp("runs") / "one"
    done = helpers.run(helpers.train_command(tiny_data, run_folder))
    assert done.returncode == 0, done.stdout
    return run_folder


def assert_same_run(run_folder: Path, reference: Path) -> None:
    assert helpers.samples(run_folder) == helpers.samples(reference)
    found, expected = helpers.losses(run_folder), helpers.losses(reference)
    assert found.keys() == expected.keys() == set(range(1, 21))
    assert all(found[s] == pytest.approx(expected[s], rel=1e-4) for s in expected)


def test_one_process_follows_the_golden_curve(one_rank: Path) -> None:
    golden = {int(step): loss for step, loss in json.loads(GOLDEN.read_text()).items()}
    assert helpers.losses(one_rank) == pytest.approx(golden, rel=1e-4)
    assert helpers.samples(one_rank) == [(s, 8 * (s - 1), 8 * s) for s in range(1, 21)]


@pytest.mark.parametrize(
    "launcher",
    [
        helpers.mpirun(2),
        helpers.mpirun(4),
        # 3 ranks share 4 slots unevenly, 5 leave one rank idle.
        helpers.mpirun(3),
        helpers.mpirun(5),
        ["horovodrun", "-np", "4"],
        ["horovodrun", "--gloo", "-np", "2"],
    ],
    ids=lambda words: "-".join(w.strip("-") for w in words[:4] if w != "-np"),
)
def test_every_launcher_gives_the_same_run(
    launcher: list[str], tiny_data: Path, tmp_path: Path, one_rank: Path
) -> None:
    done = helpers.run([*launcher, *helpers.train_command(tiny_data, tmp_path / "run")])
    assert done.returncode == 0, done.stdout
    assert_same_run(tmp_path / "run", one_rank)
    ranks = int(launcher[launcher.index("-np") + 1])
    assert {row["world_size"] for row in helpers.rows(tmp_path / "run", "ledger.jsonl", attempt=1)[1:]} == {
        ranks
    }


def test_a_repeated_run_on_three_ranks_is_bit_equal(tiny_data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = helpers.run([*helpers.mpirun(3), *helpers.train_command(tiny_data, tmp_path / name)])
        assert done.returncode == 0, done.stdout
    assert helpers.losses(tmp_path / "a") == helpers.losses(tmp_path / "b")
