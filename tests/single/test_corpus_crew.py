"""Who makes a data set together, as launchers tell; and who does not."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from hvdlm.config import UserError
from hvdlm.corpus import crew, hold
from hvdlm.corpus.crew import Crew
from hvdlm.corpus.work import PeerError, StoppedError, Work

ELEMENT = {
    "SLURM_ARRAY_JOB_ID": "71",
    "SLURM_ARRAY_TASK_ID": "6",
    "SLURM_ARRAY_TASK_MIN": "4",
    "SLURM_ARRAY_TASK_COUNT": "3",
}
STEP = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "1", "SLURM_STEP_TASKS_PER_NODE": "3"}
# As mpirun starts its ranks in an element: what Slurm says is of the batch script.
MPIRUN = {
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_PROCID": "0",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}


@pytest.mark.parametrize("more", [STEP, MPIRUN])
def test_every_rank_of_an_element_has_a_number_of_its_own(more: dict[str, str]) -> None:
    assert crew.find({**ELEMENT, **more}) == Crew("array-71", 7, 9, 3, apart=True)


def test_a_requeued_element_is_not_stopped_by_what_stopped_it_before(tmp_path: Path) -> None:
    first, other = (Crew("array-1", rank, 2, apart=True) for rank in (0, 1))
    with pytest.raises(StoppedError):
        Work(tmp_path, first, lambda: True).check()
    Work(tmp_path, other, lambda: False).check()
    again = Work(tmp_path, first, lambda: False)
    again.check()
    again.fail(UserError("no space"))
    with pytest.raises(PeerError, match="no space"):
        Work(tmp_path, other, lambda: False).check()
    Work(tmp_path, first, lambda: False).check()


def test_the_other_ranks_wait_until_rank_0_has_the_folder(tmp_path: Path) -> None:
    entered = threading.Event()

    def follow() -> None:
        with hold.claimed(tmp_path, "work", wait=False, crew=Crew("job", 1, 2)):
            entered.set()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        assert not entered.wait(0.5)
        crew_0 = Crew("job", 0, 2)
        with hold.claimed(tmp_path, "work", wait=False, crew=crew_0) as surely:
            assert surely
            assert not entered.wait(0.3)
            Work(tmp_path / "work", crew_0, lambda: False)
            assert entered.wait(5)
    finally:
        thread.join()


def test_no_rank_of_another_start_gets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold, "_SEEN_S", 0.3)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        for rank, error in ((0, "another program writes there"), (1, "rank 0 was refused")):
            with (
                pytest.raises(UserError, match=error) as caught,
                hold.claimed(tmp_path, "work", wait=False, crew=Crew("job", rank, 2)),
            ):
                pass
            assert caught.value.exit_code == 2
    finally:
        os.close(fd)


def test_where_a_lock_says_nothing_signs_of_life_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two job arrays, or a file system that locks no folders."""
    monkeypatch.setattr(hold, "_LISTEN_S", 1.0)
    first, mine = (Work(tmp_path, Crew(f"array-{n}", 0, 2, apart=True), lambda: False) for n in (1, 2))
    hold.refuse_others(tmp_path, mine)
    with hold.claimed(tmp_path, "work", wait=False, crew=mine.crew) as surely:
        assert not surely
    timer = threading.Timer(0.4, first.signs.give)
    timer.start()
    with pytest.raises(UserError, match="another program writes there"):
        hold.refuse_others(tmp_path, mine)
    timer.join()
