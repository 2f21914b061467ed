"""Which device a local rank computes on."""

from __future__ import annotations

import socket

import horovod.torch as hvd
import torch

from hvdlm.comm.world import AgreedError, World
from hvdlm.config import EXIT_USAGE, UserError


def pick(wanted: str, local_rank: int) -> torch.device:
    """The GPU of a local rank, or the CPU.

    Ranks share GPUs where there are more ranks than GPUs; under `srun --gpus-per-task` each rank
    sees one, which is GPU 0 to it.

    Args:
        wanted: 'auto', 'cpu' or 'cuda'.
        local_rank: this process among those of its host.

    Raises:
        UserError: a GPU was asked for and none is visible.
    """
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if not gpus:
        if wanted == "cuda":
            raise UserError(
                "device cuda: torch sees no GPU here; check nvidia-smi and CUDA_VISIBLE_DEVICES, or take "
                "device cpu"
            )
        return torch.device("cpu")
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)


def require_reductions(ranks: World, device: torch.device) -> None:
    """See that Horovod can sum what lies on the ranks' devices, before it fails in the middle of it.

    Args:
        ranks: all of them.
        device: this rank's.

    Raises:
        AgreedError: Horovod knows no GPUs, or ranks share one and NCCL takes it from one rank only.

    Collective: yes.
    """
    if ranks.size == 1:
        return
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    places = ranks.gather_json([socket.gethostname(), gpu], name="device.places")
    if not any(of_rank for _, of_rank in places):
        return
    if not hvd.cuda_built() and not hvd.rocm_built():
        raise AgreedError(
            "Horovod was built without GPUs and cannot sum what lies on them; build it with "
            "./install.sh --nccl, or take --train.device cpu",
            EXIT_USAGE,
        )
    first: dict[tuple[str, str], int] = {}
    for rank, (host, of_rank) in enumerate(places):
        if of_rank and hvd.nccl_built() and (host, of_rank) in first:
            raise AgreedError(
                f"ranks {first[host, of_rank]} and {rank} share a GPU of {host}, which NCCL refuses; start "
                "one rank a GPU, or take --train.device cpu",
                EXIT_USAGE,
            )
        first[host, of_rank] = rank
