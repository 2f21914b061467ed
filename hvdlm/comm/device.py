"""Which device a local rank computes on."""

from __future__ import annotations

import torch

from hvdlm.config import UserError


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
