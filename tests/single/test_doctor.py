"""doctor in real processes: a sound environment, a broken one, and children that hang."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdlm import doctor
from hvdlm.cluster import probes
from hvdlm.cluster.bounded import run_bounded
from hvdlm.cluster.finding import Finding, ask, judge
from hvdlm.cluster.stack import probe_allreduce, probe_mpi

BIN = Path(sys.executable).parent


def run_doctor(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hvdlm.doctor", *args]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=150, check=False)


def checks(result: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(result.stdout)["checks"]}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One real run, as an activated environment would make it."""
    env = dict(os.environ) | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return run_doctor("--json", cwd=tmp_path_factory.mktemp("doctor"), **env)


def test_a_sound_environment_has_no_failure(report: subprocess.CompletedProcess[str]) -> None:
    failed = [check for check in checks(report).values() if check["state"] == "fail"]
    assert failed == []
    assert (report.returncode, report.stderr) == (0, "")


def test_two_ranks_sum_through_both_launchers(report: subprocess.CompletedProcess[str]) -> None:
    found = checks(report)
    assert found["all-reduce mpirun"]["state"] == "ok"
    assert found["all-reduce horovodrun"]["state"] == "ok"


def test_the_report_covers_what_a_run_needs(report: subprocess.CompletedProcess[str]) -> None:
    found = checks(report)
    assert {"python", "torch", "horovod", "mpi4py", "h5py", "horovod build", "mpi threads"} <= set(found)
    assert {"gpu", "slurm", "hdf5", "free space", "memlock", "mpirun"} <= set(found)
    assert "MPI" in found["horovod build"]["found"]
    assert found["torch"]["needed"].startswith(">=")


def test_without_mpirun_it_fails_with_a_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probes, "PROBES", (probe_mpi, probe_allreduce))
    monkeypatch.setenv("PATH", "/nonexistent")
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    (mpirun,) = [line for line in lines if line.startswith("fail  mpirun ")]
    assert "no mpirun on PATH; needed: " in mpirun
    assert "./install.sh" in mpirun
    (allreduce,) = [line for line in lines if line.startswith("fail  all-reduce ")]
    assert "./install.sh" in allreduce


def test_lines_for_people_carry_need_and_cure() -> None:
    bad = judge("memlock", False, found="64 KiB", needed="unlimited", fix="ask", otherwise="warn")
    good = judge("memlock", True, found="unlimited", needed="unlimited", fix="ask")
    assert doctor.line(bad) == "warn  memlock                64 KiB; needed: unlimited; fix: ask"
    assert doctor.line(good) == "ok    memlock                unlimited"


def test_an_unknown_option_is_exit_2(tmp_path: Path) -> None:
    result = run_doctor("--jsn", cwd=tmp_path, PATH=os.environ["PATH"])
    assert result.returncode == 2
    assert "--jsn" in result.stderr


def test_a_hanging_child_and_what_it_started_are_ended(tmp_path: Path) -> None:
    # A launcher puts its ranks into sessions of their own: a kill of the group would miss this one.
    pids = tmp_path / "pids"
    script = f"setsid sh -c 'echo $$ > {pids}; sleep 60' & echo begun; sleep 60"
    began = time.monotonic()
    outcome = run_bounded(["bash", "-c", script], limit_s=1)
    assert time.monotonic() - began < 20
    assert outcome.code is None
    assert outcome.reason == "no end within 1 s"
    assert outcome.output == "begun\n"
    status = Path(f"/proc/{pids.read_text().strip()}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_missing_program_is_an_outcome() -> None:
    assert run_bounded(["/nonexistent/program"], limit_s=1).reason.startswith(
        "cannot run /nonexistent/program"
    )


def test_a_child_that_aborts_says_why() -> None:
    facts, outcome = ask("raise SystemExit('the error: no MPI')", limit_s=10)
    assert facts is None
    assert outcome.reason == "exit 1: the error: no MPI"


def test_a_rank_of_an_outer_job_starts_an_inner_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("PMIX_RANK", "1")
    code = "import os, json; print(json.dumps({'rank': [k for k in os.environ if 'RANK' in k]}))"
    facts, _ = ask(code, limit_s=10)
    assert facts == {"rank": []}


def test_a_broken_probe_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def probe_space() -> list[Finding]:
        raise FileNotFoundError("the folder is gone")

    monkeypatch.setattr(probes, "PROBES", (probe_space,))
    (finding,) = probes.findings()
    assert (finding.name, finding.state) == ("space", "fail")
    assert "the folder is gone" in finding.found
