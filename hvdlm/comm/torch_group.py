"""torch.distributed beside Horovod, for what is compared with it."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
from torch import distributed as dist

from hvdlm.comm.world import World

_TIMEOUT = timedelta(minutes=10)


def open_group(world: World, device: torch.device) -> None:
    """Make all ranks torch.distributed's default group: NCCL on GPUs, else Gloo; one of before is ended.

    torch's store listens on every interface of rank 0's host and asks for no key.

    Args:
        world: the ranks.
        device: where the tensors will be.

    Collective: yes.
    """
    close_group()
    here = "127.0.0.1" if world.local_size == world.size else socket.getfqdn()
    if here == "127.0.0.1" and device.type == "cpu":
        # Else Gloo takes the address of the host's name, which a laptop's network may not have.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    address = world.broadcast_json(here, name="torch_group.host")
    store = None
    if world.is_root:
        store = dist.TCPStore(
            address, 0, world.size, is_master=True, timeout=_TIMEOUT, wait_for_workers=False
        )
    port = world.broadcast_json(store.port if store else 0, name="torch_group.port")
    if store is None:
        store = dist.TCPStore(address, port, is_master=False, timeout=_TIMEOUT)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)


def close_group() -> None:
    """End the default group where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
