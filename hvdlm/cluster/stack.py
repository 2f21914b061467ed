"""Probes of what moves the gradients: torch, GPUs, Horovod, MPI and what launches them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator

from hvdlm.cluster.allreduce import find_program, launch_allreduce
from hvdlm.cluster.bounded import run_bounded
from hvdlm.cluster.finding import ACTIVATE, INSTALL, Finding, State, ask, judge

_MPI_CODE = """
import json, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
library = MPI.Get_library_version().splitlines()[0].rstrip("\\0 ")
print(json.dumps({"library": library}), flush=True)
names = {MPI.THREAD_SINGLE: "SINGLE", MPI.THREAD_FUNNELED: "FUNNELED",
         MPI.THREAD_SERIALIZED: "SERIALIZED", MPI.THREAD_MULTIPLE: "MULTIPLE"}
level = names[MPI.Init_thread(MPI.THREAD_MULTIPLE)]
MPI.Finalize()
print(json.dumps({"library": library, "threads": level}))
"""
_TORCH_CODE = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus else ""
print(json.dumps({"cuda": torch.version.cuda or "", "gpus": gpus, "nccl": nccl}))
"""


def probe_horovod() -> Iterator[Finding]:
    """Horovod's build matrix, as `horovodrun --check-build` prints it, and the GPUs it could use."""
    program = find_program("horovodrun")
    if program is None:
        yield Finding("horovod build", "fail", "no horovodrun", "horovodrun on PATH", ACTIVATE)
        return
    outcome = run_bounded([program, "--check-build"], limit_s=90)
    if outcome.code != 0:
        yield Finding("horovod build", "fail", outcome.reason, "horovodrun --check-build to end", INSTALL)
        return
    built = list(dict.fromkeys(re.findall(r"\[X\] (\w+)", outcome.output)))
    yield judge(
        "horovod build",
        {"PyTorch", "MPI", "Gloo"} <= set(built),
        found=", ".join(built) or "nothing built",
        needed="PyTorch, MPI, Gloo",
        fix=f"{INSTALL}: Horovod must be built again after a change of torch or MPI",
        otherwise="warn" if {"PyTorch", "Gloo"} <= set(built) else "fail",
    )
    yield _gpu("NCCL" in built)


def _gpu(horovod_has_nccl: bool) -> Finding:
    facts, outcome = ask(_TORCH_CODE, limit_s=90)
    if facts is None:
        return Finding("gpu", "fail", f"torch: {outcome.reason}", "a torch that imports", INSTALL)
    if not facts["gpus"]:
        if shutil.which("nvidia-smi") is None:
            untried = "; Horovod has NCCL, which was not tried" if horovod_has_nccl else ""
            return Finding("gpu", "skip", f"no GPU here{untried}")
        fix = (
            "ask for a GPU in the job" if facts["cuda"] else f"{INSTALL} --nccl with a --torch that has CUDA"
        )
        found = f"nvidia-smi, but torch sees no GPU (its CUDA: {facts['cuda'] or 'none'})"
        return Finding("gpu", "warn", found, "a GPU that torch sees", fix)
    return judge(
        "gpu",
        horovod_has_nccl,
        found=f"{len(facts['gpus'])} x {facts['gpus'][0]}, CUDA {facts['cuda']}, NCCL {facts['nccl']}",
        needed="Horovod built with NCCL",
        fix=f"{INSTALL} --nccl",
        otherwise="warn",
    )


def probe_mpi() -> Iterator[Finding]:
    """The MPI that mpi4py is linked to, the mpirun on PATH, and the thread level."""
    facts, outcome = ask(_MPI_CODE, limit_s=30)
    if facts is None:
        yield Finding("mpi library", "fail", outcome.reason, "an MPI that mpi4py can load", ACTIVATE)
        yield _mpirun("")
        return
    yield Finding("mpi library", "ok", facts["library"])
    yield _mpirun(facts["library"])
    level = facts.get("threads", "")
    if not level:
        fix = "start it by srun --mpi=pmix or use --gloo" if os.environ.get("SLURM_JOB_ID") else ACTIVATE
        yield Finding("mpi threads", "fail", f"MPI_Init: {outcome.reason}", "MULTIPLE", fix)
        return
    fix = "take an MPI built with MPI_THREAD_MULTIPLE: Horovod calls MPI from its own thread"
    yield judge("mpi threads", level == "MULTIPLE", found=level, needed="MULTIPLE", fix=fix, otherwise="warn")


def _mpirun(library: str) -> Finding:
    """mpirun; one of another MPI than the library's starts N worlds of one rank."""
    path = shutil.which("mpirun")
    if path is None:
        state: State = "warn" if shutil.which("srun") else "fail"
        return Finding("mpirun", state, "no mpirun on PATH", "the mpirun of the MPI library", ACTIVATE)
    outcome = run_bounded([path, "--version"], limit_s=30)
    if outcome.code != 0:
        return Finding("mpirun", "fail", outcome.reason, "mpirun --version to succeed", ACTIVATE)
    found = next((line.strip() for line in outcome.output.splitlines() if line.strip()), "")
    here, there = (re.search(r"\d+\.\d+(\.\d+)?", text) for text in (found, library))
    same = not (here and there and "Open MPI" in library) or here[0] == there[0]
    return judge("mpirun", same, found=f"{found} at {path}", needed=f"the mpirun of {library}", fix=ACTIVATE)


def probe_refusals() -> Iterator[Finding]:
    """What makes Open MPI's mpirun refuse to start: root, and a host without ssh."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if os.geteuid() == 0:
        allowed = all(os.environ.get(name) for name in names)
        yield judge(
            "root",
            allowed,
            found="root, allowed by Open MPI" if allowed else "root, refused by Open MPI's mpirun",
            needed=" and ".join(names),
            fix=f"activate the environment, or export {names[0]}=1 {names[1]}=1",
            otherwise="warn",
        )
    agent = shutil.which("ssh") or shutil.which("rsh")
    told = "OMPI_MCA_plm_rsh_agent" in os.environ
    yield judge(
        "ssh",
        bool(agent) or told,
        found=agent or ("none, and Open MPI knows: one host only" if told else "neither ssh nor rsh"),
        needed="ssh, or an empty OMPI_MCA_plm_rsh_agent",
        fix="activate the environment, or export OMPI_MCA_plm_rsh_agent=",
        otherwise="warn",
    )


def probe_slurm() -> Iterator[Finding]:
    if shutil.which("srun") is None:
        yield Finding("slurm", "skip", "no srun on PATH")
        return
    version = run_bounded(["srun", "--version"], limit_s=30)
    job = os.environ.get("SLURM_JOB_ID")
    yield judge(
        "slurm",
        version.code == 0,
        found=f"{version.output.strip()}, {f'inside job {job}' if job else 'outside a job'}"
        if version.code == 0
        else version.reason,
        needed="srun --version to succeed",
        fix="ask your site: its Slurm client does not work here",
        otherwise="warn",
    )
    plugins = run_bounded(["srun", "--mpi=list"], limit_s=30)
    names = sorted(set(re.findall(r"^\W*([a-z][a-z0-9_]*)\s*$", plugins.output, flags=re.MULTILINE)))
    yield judge(
        "srun --mpi",
        any(name.startswith("pmix") for name in names),
        found=" ".join(names) or plugins.reason,
        needed="pmix, for Open MPI",
        fix="start ranks by mpirun inside the job, or ask your site for Slurm's PMIx plugin",
        otherwise="warn",
    )


def probe_allreduce() -> Iterator[Finding]:
    """Two ranks, through each launcher found."""
    needed = "the right sum on two ranks"
    if shutil.which("mpirun") is None:
        state: State = "warn" if shutil.which("srun") else "fail"
        yield Finding("all-reduce", state, "no mpirun to start ranks with", needed, ACTIVATE)
        return
    open_mpi = "Open MPI" in run_bounded(["mpirun", "--version"], limit_s=30).output
    launchers = {
        "mpirun": ["mpirun", "-np", "2", *(["--oversubscribe", "--bind-to", "none"] if open_mpi else [])]
    }
    if program := find_program("horovodrun"):
        # horovodrun 0.28.1 does not know every MPI by the name it gives itself.
        launchers["horovodrun"] = [program, *([] if open_mpi else ["--gloo"]), "-np", "2"]
    for name, launcher in launchers.items():
        outcome = launch_allreduce(launcher)
        yield judge(
            f"all-reduce {name}",
            outcome.code == 0,
            found="2 ranks" if outcome.code == 0 else outcome.reason,
            needed=needed,
            fix=f"first what fails above; then {INSTALL}, which builds Horovod for the MPI on PATH",
        )
