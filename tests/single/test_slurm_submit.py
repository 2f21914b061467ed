"""What is found wrong with a job before it is handed in, where no Slurm needs to be asked; and site files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvdlm.cluster import batch_script
from hvdlm.cluster.queue import own_job, seconds_of
from hvdlm.config import CheckpointConfig, DataConfig, RunConfig, UserError
from hvdlm.slurm import lints
from hvdlm.slurm.lints import Planned
from hvdlm.slurm.site import SCRIPTS, Site, read_site
from hvdlm.slurm.submit import separate

SCRIPT = SCRIPTS / "train_64gpu.sh"


def findings(tmp_path: Path, words: str = "", **fields: Any) -> dict[str, str]:
    """State of each finding about the shipped script with more options."""
    script = fields.pop("script", SCRIPT)
    options = batch_script.of_script(script) | batch_script.of_words(words.split())
    site = Site(tmp_path / "x.env", {"HVDLM_MPI": fields.pop("mpi", "mpirun")})
    job = replace(Planned(options, script, [], site, RunConfig(), tmp_path / "run", 3), **fields)
    checks = [*lints._run(job), *lints._data(job.config.data), *lints._tasks(options)]
    checks += [*lints._launcher(job), *lints._signal(options), *lints._time(job)]
    return {finding.name: finding.state for finding in checks}


def test_the_shipped_script_is_right(tmp_path: Path) -> None:
    assert findings(tmp_path) == {}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--signal=B:USR2@600", {"signal": "fail"}),
        ("--signal=BR:USR2@600", {"signal": "fail"}),
        ("--ntasks-per-node=16", {"tasks": "fail"}),
        ("--ntasks-per-node=4", {"tasks": "warn"}),
        ("--gpus-per-node=a100:4 --ntasks-per-node=4", {}),
        ("--gpus-per-node=0 --gres=gpu:a100:4 --ntasks-per-node=4", {}),
        ("--gpus-per-task=1", {"gpus": "fail"}),
        ("--gpu-bind=single:1", {"gpus": "fail"}),
        ("--cpus-per-task=1", {"cpus": "warn"}),
        ("--gpus-per-node=0 --cpus-per-task=2", {}),
        ("--time=10", {"time": "fail"}),
        ("--time=11", {}),
        ("--nodes=1", {"launcher": "warn"}),
    ],
)
def test_what_is_wrong_with_options(words: str, expected: dict[str, str], tmp_path: Path) -> None:
    assert findings(tmp_path, words) == expected


def test_a_script_that_starts_ranks_by_itself_is_told_nothing_of_launchers(tmp_path: Path) -> None:
    words = "--nodes=1 --ntasks-per-node=8"
    assert "launcher" in findings(tmp_path, words)
    assert "launcher" not in findings(tmp_path, words, script=SCRIPTS / "train_elastic.sh")


def test_without_a_signal_the_run_s_own_margin_counts(tmp_path: Path) -> None:
    options = batch_script.of_words(["--time=2"])
    job = Planned(options, SCRIPT, [], Site(tmp_path, {}), RunConfig(), tmp_path, 1)
    assert [f.state for f in lints._signal(options)] == ["warn"]
    assert "train.stop_margin_s 120 s" in next(lints._time(job)).found


def test_the_time_to_save_is_what_it_took_so_far(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    times = {"snapshot_s": 1.0, "stall_s": 0.0, "commit_s": 1.0, "write_s": 400.0}
    row = {"kind": "save", "step": 1, **times, "bytes": 1}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert findings(tmp_path, "--time=8:00:00") == {"time": "warn"}
    assert findings(tmp_path, "--time=12") == {"time": "fail"}
    assert findings(tmp_path, "--time=8:00:00 --signal=USR2@900") == {}


def test_what_is_wrong_with_the_run(tmp_path: Path) -> None:
    never = replace(RunConfig(), checkpoint=CheckpointConfig(resume="never"))
    assert findings(tmp_path, config=never) == {"checkpoint.resume": "fail"}
    assert findings(tmp_path, config=never, chain=1) == {}
    elsewhere = replace(RunConfig(), data=DataConfig(path=str(tmp_path)))
    assert findings(tmp_path, config=elsewhere) == {"data.path": "fail"}
    (tmp_path / "run").mkdir()
    record = {"state": "done", "step": 10000, "reason": "all steps", "time_unix": 1.0}
    (tmp_path / "run" / "exit.json").write_text(json.dumps(record))
    assert findings(tmp_path) == {"run": "fail"}


def test_options_end_where_the_script_begins(tmp_path: Path) -> None:
    script = tmp_path / "x.sh"
    script.write_text(
        "#!/bin/bash\n# text\n#SBATCH -N 4 --time=5  # why\n\n#SBATCH --exclusive\ntrue\n#SBATCH -N 8\n"
    )
    assert batch_script.of_script(script) == {"nodes": "4", "time": "5", "exclusive": ""}
    assert batch_script.of_words(["-N2", "-t", "9", "--mem", "0"]) == {"nodes": "2", "time": "9", "mem": "0"}
    with pytest.raises(UserError, match="cannot be read"):
        batch_script.of_script(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("1-0", 86400),
        ("1-02:03", 93780),
        ("1-00:00:01", 86401),
    ],
)
def test_times_as_slurm_writes_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_no_limit_is_no_time() -> None:
    assert [seconds_of(text) for text in ("UNLIMITED", "", "N/A")] == [0.0, 0.0, 0.0]


def test_what_the_script_asked_slurm_is_not_asked_again() -> None:
    shown = "JobId=7 JobName=x SubmitTime=100 EndTime=200 StdErr=/a StdOut=/a b/x.log Power="
    job = own_job({"SLURM_JOB_ID": "7", "HVDLM_JOB": shown, "PATH": ""})
    assert (job.submitted_unix, job.ends_unix, job.log) == (100.0, 200.0, "/a b/x.log")


def test_everything_else_is_train_s() -> None:
    assert separate(["--chain", "4", "--data.path", "x", "--nodes", "2"]) == (
        ["--chain", "4", "--", "--data.path", "x", "--nodes", "2"]
    )
    assert separate(["--dry-run", "--site=x"]) == ["--dry-run", "--site=x"]
    assert separate(["--site", "x", "--", "--config", "y"]) == ["--site", "x", "--", "--config", "y"]


def test_a_site_is_read_by_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.env"
    path.write_text(
        "# text\nSBATCH_PARTITION=gpu\nHVDLM_SBATCH=\"--nodes=2 --comment='a b'\"\nX=$HOME/$SLURM_JOB_ID\n"
    )
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    site = read_site(str(path))
    assert site.variables["SBATCH_PARTITION"] == "gpu"
    assert site.sbatch_options == ["--nodes=2", "--comment=a b"]
    assert site.mpi == "pmix"
    path.write_text("HVDLM_MPI=(")
    with pytest.raises(UserError, match=r"mine\.env: bash cannot read it"):
        read_site(str(path))
    with pytest.raises(UserError, match="cpu, generic, gres, slingshot"):
        read_site("nowhere")
