"""The readers of the loader's benchmark read what they claim to; how fast is no matter here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import psutil
import torch

from hvdlm.bench import readers
from hvdlm.bench.__main__ import main
from hvdlm.bench.loader import Racer, write_data
from tests import helpers

IN_PROCESS = ("hvdlm", "hvdlm read ahead", "bare preadv", "nanoGPT", "h5py")


def test_every_reader_gives_windows_of_the_same_tokens(tmp_path: Path) -> None:
    write_data(tmp_path, 100_000, 2)
    ids = torch.from_numpy(np.fromfile(tmp_path / readers.FLAT_FILE, np.uint16).astype(np.int64))
    for name in IN_PROCESS:
        source = readers.READERS[name](tmp_path)
        batch = next(source)
        source.close()
        inputs = (
            batch["tokens"] if isinstance(batch, dict) else batch[0] if len(batch) == 2 else batch[:, :-1]
        )
        assert (inputs.dtype, inputs.shape) == (torch.int64, (readers.BATCH, readers.SEQ_LEN)), name
        for window in inputs:
            places = (ids.unfold(0, 8, 1) == window[:8]).all(1).nonzero().flatten().tolist()
            assert any(torch.equal(ids[p : p + readers.SEQ_LEN], window) for p in places), name


def test_a_reader_that_is_not_asked_is_stopped(tmp_path: Path) -> None:
    write_data(tmp_path, 100_000, 2)
    racer = Racer("torch workers", tmp_path)
    try:
        assert racer.ask("time", 0.01) > 0
        (reader,) = [process for process in psutil.Process().children() if process.children()]
        family = [reader, *reader.children()]
        helpers.wait_until(
            lambda: {process.status() for process in family} == {psutil.STATUS_STOPPED},
            within_s=5,
            what="all stopped",
        )
        assert racer.ask("time", 0.01) > 0
    finally:
        racer.close()
    helpers.wait_until(
        lambda: not any(process.is_running() for process in family), within_s=5, what="all gone"
    )


def test_it_reports_what_it_timed(capsys) -> None:
    flags = [
        "--tokens",
        "200000",
        "--rounds",
        "2",
        "--slice-s",
        "0.01",
        "--windows",
        "160",
        "--open-shards",
        "50",
        "--only",
        "nanoGPT",
    ]
    assert main(["loader", "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["us"]) == ["hvdlm", "nanoGPT", "hvdlm verifying"]
    assert result["ratios"]["hvdlm"] == 1.0
    assert result["open_shards"] == 50
    assert result["open_s"] > 0
    assert min(result["us"].values()) > 0
