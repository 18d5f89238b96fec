"""Two processes, under DDP or FSDP2, get the gradients of one on the whole batch; the group is started once."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from zoo import CASES, METHODS, Case, adapt, claims, fixed, shake

import vismodal as vm
from vismodal.sharding import is_sharded, whole

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


def sharded(case: Case, method: str, shard: bool) -> dict[str, Tensor]:
    """Gradients of the adapter and the outputs, without dropout; with FSDP2 on the blocks and the model, gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = case.model().eval()
    adapter = vm.adapt(model, METHODS[method].make(model), name="a", seed=0)
    shake(adapter)
    if shard:
        mesh = init_device_mesh("cpu", (2,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        assert all(is_sharded(p) for p in adapter.parameters())
    y = model(fixed(2, 3, 32, 32))
    y.square().mean().backward()
    return {"": y.detach()} | {n: whole(p.grad) for n, p in adapter.named_parameters() if p.grad is not None}


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
        case = next(case for case in CASES if case.name == NAMES[0])
        if claims(method, case):
            alone, shared = sharded(case, method, False), sharded(case, method, True)
            assert alone.keys() == shared.keys() and len(alone) > 1
            assert all(torch.allclose(shared[n], g, rtol=1e-5, atol=1e-7) for n, g in alone.items()), method
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_ddp_and_fsdp2_equal_one_process() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=2)  # raises with the traceback of the rank that failed
