"""install.sh: its options, its refusals, the mpirun shim, the wheel key, repair after a kill.

The install itself is what every run of `make test` begins with.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "install.sh"


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | env
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def install(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return run([str(SCRIPT), *args], **env)


def function(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs bash code with install.sh's functions at hand."""
    return run(["bash", "-c", f'. "{SCRIPT}"; set +e; {code}'], **env)


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_help_names_every_option() -> None:
    result = install("--help")
    assert result.returncode == 0
    names = ["--prefix", "--python", "--mpi", "--nccl", "--arch-list", "--torch", "--torch-index", "--extras"]
    for name in [*names, "--wheelhouse", "--cache", "--no-check", "--save-wheelhouse"]:
        assert f"\n  {name}" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prefx", "x"], "unknown option '--prefx'; see ./install.sh --help"),
        (["--mpi", "lam"], "--mpi: found 'lam', needed auto, path, apt or wheel"),
        (["--mpi"], "--mpi needs a value"),
        (["--arch-list=sm_80"], "--arch-list: found 'sm_80', needed numbers such as 80,90"),
        (["--extras", "dev,docs"], "--extras: no extra 'docs'; there are "),
        (["--wheelhouse", "/nonexistent"], "--wheelhouse: no wheels in '/nonexistent'"),
        (["--prefix", "/usr"], "--prefix: '/usr' exists and is no virtual environment"),
        (["--python", "/nonexistent"], "--python: '/nonexistent' is missing or older than 3.11"),
        (["--cache", "/dev/null/x"], "--cache: cannot write '/dev/null/x'"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(args: list[str], message: str, tmp_path: Path) -> None:
    result = install(*args, XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr.startswith(f"install.sh: error: {message}")
    assert result.stderr.count("\n") == 1


def test_nccl_without_a_toolkit_says_what_to_load(tmp_path: Path) -> None:
    code = "nccl=yes; PATH=/nonexistent; unset CUDA_HOME; find_cuda"
    result = function(code)
    assert result.returncode == 1
    assert "no nvcc on PATH and CUDA_HOME is not set; load your site's CUDA module" in result.stderr
    result = function("nccl=yes; find_cuda", CUDA_HOME=str(tmp_path))
    assert "no nvcc in CUDA_HOME" in result.stderr
    program(tmp_path / "bin/nvcc", "exit 0")
    result = function("nccl=yes; find_cuda", CUDA_HOME=str(tmp_path), NCCL_HOME=str(tmp_path))
    assert "no include/nccl.h in NCCL_HOME" in result.stderr


def test_a_failing_step_names_itself_and_the_cure(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    step = "start 'building it' 'load a compiler'; logged sh -c 'echo boom; exit 7'"
    result = function(f"set -e; trap finish EXIT; log={log}; {step}")
    assert result.returncode == 7
    assert result.stderr.splitlines() == [
        "    | ",
        "    | ==== building it",
        "    | boom",
        f"install.sh: error: building it failed (exit 7): load a compiler; details: {log}",
    ]


FROM_HOROVODRUN = (
    "--allow-run-as-root --tag-output -np 2 -H localhost:2 -bind-to none -map-by slot "
    "-mca pml ob1 -mca btl ^openib -x PATH python prog.py -mca a b -bind-to"
)
FOR_OPEN_MPI_5 = (
    "--allow-run-as-root --tag-output -np 2 -H localhost:2 --bind-to none --map-by slot "
    "--mca pml ob1 --mca btl ^openib -x PATH python prog.py -mca a b -bind-to"
)


def test_the_shim_rewrites_what_open_mpi_5_does_not_know(tmp_path: Path) -> None:
    record = program(tmp_path / "bin/mpiexec", 'echo "$*"; exit 9')
    shim = record.with_name("mpirun")
    function(f"write_shim {shim}")
    result = run([str(shim), *FROM_HOROVODRUN.split()])
    assert (result.returncode, result.stdout) == (9, FOR_OPEN_MPI_5 + "\n")


def test_the_shim_keeps_spaces_and_empty_arguments(tmp_path: Path) -> None:
    record = program(tmp_path / "bin/mpiexec", 'printf "<%s>" "$@"')
    shim = record.with_name("mpirun")
    function(f"write_shim {shim}")
    assert run([str(shim), "-np", "1", "sh", "-c", "a  b", ""]).stdout == "<-np><1><sh><-c><a  b><>"
    assert run([str(shim), "--version"]).stdout == "<--version>"


def test_the_shim_passes_on_only_variables_that_exist(tmp_path: Path) -> None:
    record = program(tmp_path / "bin/mpiexec", 'echo "$*"')
    shim = record.with_name("mpirun")
    function(f"write_shim {shim}")
    command = [str(shim), "-x", "SET", "-x", "NOT_SET", "-x", "A=b", "-x", "_", "prog", "-x", "NOT_SET"]
    assert run(command, SET="1").stdout == "-x SET -x A=b prog -x NOT_SET\n"


def test_the_shim_finds_the_next_mpirun_on_path(tmp_path: Path) -> None:
    shim = tmp_path / "env/bin/mpirun"
    shim.parent.mkdir(parents=True)
    function(f"write_shim {shim}")
    program(tmp_path / "module/bin/mpirun", 'echo module "$@"')
    path = f"{shim.parent}:{tmp_path}/module/bin:/usr/bin:/bin"
    assert run([str(shim), "-bind-to", "none", "x"], PATH=path).stdout == "module --bind-to none x\n"


def key(*, mpirun: str, torch: str, tmp_path: Path, package: str = "horovod", more: str = "") -> str:
    """The cache key for a made-up prefix, MPI and torch."""
    prefix = tmp_path / "prefix"
    program(prefix / "bin/mpirun", f"echo '{mpirun}'")
    program(prefix / "bin/mpicc", "echo gcc -I/mpi/include")
    program(prefix / "bin/python", f'exec {sys.executable} "$@"')
    site = prefix / "lib/python3.11/site-packages"
    for old in site.glob("torch-*"):
        old.rmdir()
    (site / f"torch-{torch}.dist-info").mkdir(parents=True)
    code = f"PATH={prefix}/bin:$PATH; prefix={prefix}; {more} key_of {package} 0.28.1"
    return function(code).stdout.strip()


def test_the_key_is_stable_and_knows_what_matters(tmp_path: Path) -> None:
    first = key(mpirun="Open MPI 4.1.4", torch="2.13.0", tmp_path=tmp_path)
    assert len(first) == 16
    assert key(mpirun="Open MPI 4.1.4", torch="2.13.0", tmp_path=tmp_path) == first
    others = [
        key(mpirun="Open MPI 5.0.1", torch="2.13.0", tmp_path=tmp_path),
        key(mpirun="Open MPI 4.1.4", torch="2.14.0", tmp_path=tmp_path),
        key(mpirun="Open MPI 4.1.4", torch="2.13.0", tmp_path=tmp_path, package="mpi4py"),
        key(
            mpirun="Open MPI 4.1.4",
            torch="2.13.0",
            tmp_path=tmp_path,
            more="export HOROVOD_BUILD_ARCH_FLAGS=-mavx2;",
        ),
    ]
    assert len({first, *others}) == 5


def test_mpi4py_is_not_built_again_for_another_torch(tmp_path: Path) -> None:
    one = key(mpirun="Open MPI 4.1.4", torch="2.13.0", tmp_path=tmp_path, package="mpi4py")
    assert key(mpirun="Open MPI 4.1.4", torch="2.14.0", tmp_path=tmp_path, package="mpi4py") == one


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small real virtual environment with pip, as install.sh leaves one."""
    folder = tmp_path_factory.mktemp("install") / "env"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


def in_environment(environment: Path, code: str) -> subprocess.CompletedProcess[str]:
    base = getattr(sys, "_base_executable", sys.executable)
    given = f"prefix={environment}; python={base}; log={environment.parent}/log"
    return function(f"{given}; {code}")


def is_sound(environment: Path) -> bool:
    return in_environment(environment, "sound").returncode == 0


def test_a_package_that_pip_was_killed_in_makes_the_environment_unsound(environment: Path) -> None:
    assert is_sound(environment)
    (info,) = environment.glob("lib/python3*/site-packages/pip-*.dist-info")
    half = info.with_name("torch-2.13.0.dist-info")
    half.mkdir()
    (half / "METADATA").write_text("Name: torch\n")
    assert not is_sound(environment)
    (half / "RECORD").write_text("")
    assert is_sound(environment)


def test_only_an_unchanged_finished_environment_is_up_to_date(environment: Path) -> None:
    def up_to_date() -> bool:
        return in_environment(environment, "up_to_date").returncode == 0

    assert not up_to_date()
    in_environment(environment, 'fingerprint >"$prefix/$STAMP"')
    assert up_to_date()
    (info,) = environment.glob("lib/python3*/site-packages/pip-*.dist-info")
    upgraded = info.rename(info.with_name("pip-0.0.0.dist-info"))
    assert not up_to_date()
    upgraded.rename(info)
    assert up_to_date()
    assert in_environment(environment, "extras=hf; up_to_date").returncode != 0


def test_activation_is_added_once_and_allows_root(environment: Path) -> None:
    in_environment(environment, "install_activation; install_activation")
    activate = environment / "bin/activate"
    assert activate.read_text().count("# >>> hvdlm >>>") == 1
    code = f'unset OMPI_ALLOW_RUN_AS_ROOT; set -eu; . {activate}; echo "${{OMPI_ALLOW_RUN_AS_ROOT-no}}"'
    assert run(["bash", "-c", code]).stdout.strip() == ("1" if os.geteuid() == 0 else "no")


def test_an_interrupted_install_is_made_anew(environment: Path) -> None:
    assert is_sound(environment)
    (environment / ".hvdlm-partial").touch()
    (environment / "left-over").touch()
    assert not is_sound(environment)
    result = in_environment(environment, "set -e; make_environment")
    assert result.returncode == 0, result.stderr
    assert is_sound(environment)
    assert not (environment / "left-over").exists()
    assert [entry.name for entry in environment.parent.iterdir() if "broken" in entry.name] == []
