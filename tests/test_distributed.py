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
from zoo import CASES, METHODS, Case, adapt, claims, fixed, shake

import vismodal as vm

NAMES = ("timm-vit_tiny_patch16_224", "timm-swinv2_tiny_window8_256", "timm-resnet18")


def cases(method: str) -> list[Case]:
    """Those of the models that a method claims, or the first that it does."""
    mine = [case for case in CASES if claims(method, case)]
    return [case for case in mine if case.name in NAMES] or mine[:1]


def gradients(case: Case, method: str, rank: int | None) -> dict[str, Tensor]:
    """Of the adapter, on the whole batch (rank None) or on this rank's half under DDP; on the same batch of two where
    a model takes more than pictures."""
    name, model = case.name, case.model()
    idle = adapt(model, "LoRA", name="idle")
    vm.use(model)
    adapter = adapt(model, method, name="a", seed=0)
    shake(adapter)
    size = 64 if "swin" in name else 32
    x = fixed(4, 3, size, size)
    run: nn.Module = model if rank is None else DistributedDataParallel(model)
    if name.startswith(("timm", "classifier")):
        y = run(x if rank is None else x[2 * rank : 2 * rank + 2])
    else:
        y = case.run(run)
    y.square().mean().backward()
    assert all(p.grad is None for p in idle.parameters())
    return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}


def work(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    for method in METHODS:
        for case in cases(method):
            alone, shared = gradients(case, method, None), gradients(case, method, rank)
            assert alone.keys() == shared.keys()
            most = max(float(g.abs().max()) for g in alone.values())  # some are zero up to rounding: biases of keys
            apart = {n: float((shared[n] - g).abs().max()) for n, g in alone.items()}
            wrong = [n for n, g in alone.items() if apart[n] > 1e-4 * max(float(g.abs().max()), 0.01 * most)]
            assert not wrong, (case.name, method, wrong)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ddp_equals_one_process() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=2)  # raises with the traceback of the rank that failed
