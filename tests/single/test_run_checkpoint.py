"""A checkpoint is whole and unchanged, or it is passed over."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdlm.comm.launch import Launch
from hvdlm.comm.world import AgreedError, World
from hvdlm.config import CheckpointConfig, UserError
from hvdlm.parallel.strategy import Piece
from hvdlm.run import checkpoint, restore
from hvdlm.run.folder import open_run
from hvdlm.run.saver import Saver
from hvdlm.run.stages import StageSource
from tests import helpers

ALONE = World(Launch("single"))
CONFIG: dict[str, Any] = {
    "optim.lr": 0.1,
    "train.steps": 10,
    "train.seed": 0,
    "log.every": 1,
    "data.path": "a",
    "data.new_stage": False,
}
WHAT: dict[str, Any] = {"tokenizer": "t" * 64, "sources": (StageSource("a", "d" * 64, 1),)}


def pieces() -> list[Piece]:
    """A matrix in two pieces, a vector and a scalar."""
    matrix = torch.arange(12.0).view(4, 3)
    return [
        Piece("model.matrix", (4, 3), (0, 0), matrix[:1]),
        Piece("model.matrix", (4, 3), (1, 0), matrix[1:]),
        Piece("optim.m.vector", (2,), (0,), torch.tensor([1.0, 2.0])),
        Piece("optim.count", (), (), torch.tensor(7.0)),
    ]


def save(run: Path, step: int, *, parent: str = "", best: checkpoint.Best | None = None) -> Path:
    state = {"step": step, "attempt": 1, "samples": 8 * step, "config": CONFIG, "parent": parent}
    state["best"] = best or []
    # As it was before there were blends.
    state["fingerprints"] = {"data": "d" * 64, "tokenizer": "t" * 64}
    saver = Saver(run / "checkpoints", ALONE, files={"config.toml": b"x = 1\n"})
    saver.begin(pieces(), state)
    assert saver.finish()
    return checkpoint.step_folder(run / "checkpoints", step)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    opened = restore.open_checkpoint(save(tmp_path, 5))
    assert opened.step == 5
    assert torch.equal(opened.read("model.matrix", (0, 0), (4, 3)), torch.arange(12.0).view(4, 3))
    assert torch.equal(opened.read("model.matrix", (0, 1), (3, 2)), torch.arange(12.0).view(4, 3)[:3, 1:])
    assert opened.read("optim.count", (), ()).item() == 7
    assert opened.config_path.read_bytes() == b"x = 1\n"
    with pytest.raises(KeyError):
        opened.read("model.other", (0,), (1,))
    assert restore.open_checkpoint(tmp_path).folder == opened.folder


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    opened = restore.open_checkpoint(save(tmp_path, 5))
    with pytest.raises(UserError, match=r"model.matrix has shape \[4, 3\], the model needs \[8, 3\]"):
        opened.read("model.matrix", (0, 0), (8, 3), (8, 3))
    with pytest.raises(UserError, match="another model"):
        opened.read("model.matrix", (0, 0), (2, 3), (2, 3))
    with pytest.raises(ValueError, match="no rectangle"):
        opened.read("model.matrix", (3, 0), (2, 3), (4, 3))


def test_a_rectangle_may_begin_where_its_tensor_does(tmp_path: Path) -> None:
    """As rank 0 of a sharded strategy reads its part."""
    opened = restore.open_checkpoint(save(tmp_path, 5))
    assert torch.equal(opened.read("model.matrix", (0, 0), (2, 3), (4, 3)), torch.arange(12.0).view(4, 3)[:2])


def test_pieces_that_leave_a_hole_are_refused(tmp_path: Path) -> None:
    opened = restore.open_checkpoint(save(tmp_path, 5))
    opened.manifest["tensors"]["model.matrix"]["pieces"].pop()
    with pytest.raises(UserError, match=r"model.matrix cover 3 of 12 elements"):
        opened.read("model.matrix", (0, 0), (4, 3))


def test_resume_takes_the_newest_valid_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "LATEST").write_text("step-00000099\n")
    (checkpoints / "step-00000004.tmp-1").mkdir()
    (checkpoints / "step-00000005").mkdir()
    data = checkpoints / "step-00000003" / "rank-00000.safetensors"
    data.write_bytes(data.read_bytes()[:-1])
    start = open_run(tmp_path, resume="auto", config=CONFIG, **WHAT)
    assert (start.step, Path(start.checkpoint).name) == (2, "step-00000002")
    assert len(start.notes) == 2
    assert (checkpoints / "step-00000003.corrupt").is_dir()
    assert (checkpoints / "step-00000005.corrupt").is_dir()


def test_what_cannot_be_read_is_no_damage(tmp_path: Path) -> None:
    """A link to itself stands for what may pass: no permission, a broken device, a stale handle."""
    older, folder = save(tmp_path, 1), save(tmp_path, 2)
    for name in ("rank-00000.safetensors", restore.MANIFEST):
        kept = (folder / name).rename(tmp_path / "kept")
        (folder / name).symlink_to(name)
        with pytest.raises(UserError, match=rf"{name}: cannot be read: .*check its owner") as caught:
            open_run(tmp_path, resume="auto", config=CONFIG, **WHAT)
        assert caught.value.exit_code == 1
        kept.rename(folder / name)
    assert restore.folders(tmp_path / "checkpoints") == [older, folder]


def test_a_newer_version_is_no_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / restore.MANIFEST).read_text()) | {"version": restore.VERSION + 1}
    manifest["digest"] = restore.manifest_digest(manifest)
    (folder / restore.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"is hvdlm-checkpoint 2, this hvdlm reads hvdlm-checkpoint 1"):
        open_run(tmp_path, resume="auto", config=CONFIG, **WHAT)
    assert folder.is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"all 2 checkpoint\(s\) are damaged.*step-00000002: state.json is"
        ):
            open_run(tmp_path, resume="auto", config=CONFIG, **WHAT)


def test_the_umask_decides_who_may_read(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        modes = {stat.S_IMODE(path.stat().st_mode) for path in save(tmp_path, 1).iterdir()}
    finally:
        os.umask(old)
    assert modes == {0o640}


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path) -> None:
    """A file system of 1 MiB that a checkpoint does not fit into."""
    older = save(tmp_path, 1)
    big = [Piece("model.big", (2**20,), (0,), torch.ones(2**20))]
    with helpers.small_disk(tmp_path / "checkpoints-full", size_kib=1024):
        shutil.copytree(older, tmp_path / "checkpoints-full" / older.name)
        state = {"step": 2, "attempt": 1}
        saver = Saver(tmp_path / "checkpoints-full", ALONE, files={})
        saver.begin(big, state)
        with pytest.raises(AgreedError, match=r"rank 0: .*cannot be written.*free space") as caught:
            saver.finish()
        assert caught.value.exit_code == 1
        found, notes = restore.newest_valid(tmp_path / "checkpoints-full")
        assert found is not None
        assert (found.name, notes) == (older.name, [])


def kept(run: Path) -> list[int]:
    return [int(folder.name.partition("-")[2]) for folder in restore.folders(run / "checkpoints")]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    doomed = checkpoint.prune(tmp_path / "checkpoints", CheckpointConfig(keep_last=2), best=[])
    assert [p.name for p in doomed] == ["step-00000001.tmp-deleted", "step-00000002.tmp-deleted"]
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p not in doomed)
    assert names == ["LATEST", "step-00000003", "step-00000004"]


def test_prune_keeps_multiples_the_best_and_what_is_marked(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000002" / checkpoint.KEEP).touch()
    keep = CheckpointConfig(keep_last=2, keep_every=3)
    checkpoint.prune(tmp_path / "checkpoints", keep, best=[{"step": 5, "val_loss": 1.0}])
    assert kept(tmp_path) == [2, 3, 5, 6, 8, 9]
    assert restore.find_problem(tmp_path / "checkpoints/step-00000002") is None
    checkpoint.prune(tmp_path / "checkpoints", CheckpointConfig(keep_last=2), best=[])
    assert kept(tmp_path) == [2, 8, 9]


def test_the_best_are_ranked(tmp_path: Path) -> None:
    best: checkpoint.Best = []
    for step, val_loss in ((1, float("nan")), (2, 2.0), (3, None), (4, 3.0), (5, 2.0), (6, 2.5)):
        best = checkpoint.rank_best(best, step, val_loss, count=2)
    assert [one["step"] for one in best] == [2, 5]
    assert [one["step"] for one in checkpoint.rank_best(best, 7, 1.0, count=1)] == [7]
    assert checkpoint.rank_best(best, 7, 1.0, count=0) == []


def test_a_best_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    best = [{"step": 1, "val_loss": 1.0}, {"step": 2, "val_loss": 2.0}]
    save(tmp_path, 2)
    save(tmp_path, 3, best=best)
    assert open_run(tmp_path, resume="auto", config=CONFIG, **WHAT).best == best[1:]


def test_too_little_room_is_said_before_the_first_step(tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    with helpers.small_disk(tmp_path / "disk", size_kib=300):
        with pytest.raises(UserError, match=r"disk: 0.000286 GiB free, needed 0.000339 GiB for 3 ") as caught:
            checkpoint.check_space(tmp_path / "disk", CheckpointConfig(), model)
        assert caught.value.exit_code == 1
        checkpoint.check_space(tmp_path / "disk", CheckpointConfig(every=0), model)
        for step in (1, 2):
            (tmp_path / f"disk/step-{step:08d}").mkdir()
        checkpoint.check_space(tmp_path / "disk", CheckpointConfig(), model)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert restore.find_problem(save(tmp_path, 1)) is None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    ("changes", "what", "expected"),
    [
        ({"optim.lr": 0.2}, {}, "optim.lr was 0.1, is 0.2"),
        ({"model.width": 8}, {}, "model.width was 768, is 8"),
        (
            {},
            {"sources": (StageSource("b", "e" * 64, 1),)},
            r"other data: b \(fingerprint e{12}\) is new, a \(fingerprint d{12}\) is gone; put",
        ),
        ({}, {"tokenizer": "e" * 64}, "another tokenizer"),
    ],
)
def test_what_must_stay_is_named(
    changes: dict[str, float], what: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match=expected):
        open_run(tmp_path, resume="auto", config=CONFIG | changes, **WHAT | what)


def test_what_may_change_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 5)
    config = CONFIG | {"train.steps": 20, "log.every": 3, "data.path": "b", "parallel.fusion_mb": 1}
    start = open_run(tmp_path, resume="auto", config=config, **WHAT)
    assert start.step == 5
    assert start.notes == ["train.steps was 10, is 20"]


def test_never_refuses_a_used_folder_and_a_path_an_older_branch(tmp_path: Path) -> None:
    first = save(tmp_path, 5)
    save(tmp_path, 6)
    with pytest.raises(UserError, match=r"checkpoint\.resume=never"):
        open_run(tmp_path, resume="never", config=CONFIG, **WHAT)
    with pytest.raises(UserError, match=r"holds step-00000006 of a run that began anew, not from"):
        open_run(tmp_path, resume=str(first), config=CONFIG, **WHAT)
    branch = open_run(tmp_path / "new", resume=str(first), config=CONFIG, **WHAT)
    assert branch.step == 5


def test_the_same_command_goes_on_with_a_branch(tmp_path: Path) -> None:
    first, other = save(tmp_path / "old", 5), save(tmp_path / "other", 9)
    new = tmp_path / "new"
    branch = open_run(new, resume=str(first), config=CONFIG, **WHAT)
    own = save(new, 7, parent=branch.parent)
    shutil.rmtree(first)
    for resume in (str(first), "auto"):
        start = open_run(new, resume=resume, config=CONFIG, **WHAT)
        assert (start.checkpoint, start.step, start.parent) == (str(own), 7, str(first))
    with pytest.raises(UserError, match=rf"began from {first}, not from checkpoint.resume={other}"):
        open_run(new, resume=str(other), config=CONFIG, **WHAT)


def test_opening_nothing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step-00000099: no such checkpoint; name one that is there"):
        restore.open_checkpoint(tmp_path / "step-00000099")
    with pytest.raises(UserError, match="no such run folder"):
        restore.open_checkpoint(tmp_path / "missing")
    with pytest.raises(UserError, match="no valid checkpoint"):
        restore.open_checkpoint(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(UserError, match=r"damaged checkpoint: MANIFEST.json is missing"):
        restore.open_checkpoint(tmp_path / "step-00000001")
