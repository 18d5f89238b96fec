"""Two processes under DDP take the same step as one on the whole batch; the group is started once."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import BY_NAME, METHODS, close, fixed, shake

import vismodal as vm

NAMES = ("timm-vit_tiny_patch16_224", "timm-swinv2_tiny_window8_256", "timm-resnet18")


def gradients(name: str, method: str, rank: int | None) -> dict[str, Tensor]:
    """Of the adapter, on the whole batch (rank None) or on this rank's half under DDP."""
    model = BY_NAME[name].model()
    idle = vm.adapt(model, METHODS["LoRA"].make(model), name="idle")
    vm.use(model)
    adapter = vm.adapt(model, METHODS[method].make(model), name="a", seed=0)
    shake(adapter)
    size = 64 if "swin" in name else 32
    x = fixed(4, 3, size, size)
    run: nn.Module = model if rank is None else DistributedDataParallel(model)
    run(x if rank is None else x[2 * rank : 2 * rank + 2]).square().mean().backward()
    assert all(p.grad is None for p in idle.parameters())
    return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}


def work(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    for name in NAMES:
        for method in METHODS:
            alone, shared = gradients(name, method, None), gradients(name, method, rank)
            assert alone.keys() == shared.keys()
            wrong = [n for n in alone if not close(shared[n], alone[n], 1e-4)]
            assert not wrong, (name, method, wrong)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ddp_equals_one_process() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=2)  # raises with the traceback of the rank that failed
