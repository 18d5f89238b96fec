"""The training loop on two processes, and under FSDP2, gets what one process gets on the same global batches."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import vismodal as vm
from vismodal.draw import shuffled
from vismodal.errors import InputError
from vismodal.resume import Checkpoints
from vismodal.train import Micro, Plan, fit

BATCH, STEPS = 8, 20
MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0),
}


def pictures(count: int) -> Tensor:
    """Noise, 3 x 16 x 16."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny() -> tuple[nn.Module, vm.Adapter]:
    """An fp32 ViT of two blocks without dropout, with LoRA and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    return model.train(), vm.adapt(model, [vm.LoRA(rank=2), vm.Tune(sites=("head",))], seed=0)


def learn(model: nn.Module, adapter: vm.Adapter, make: str, steps: int = STEPS, folder: Path | None = None) -> None:
    """`fit` on this process's share of a global batch, in two micro-batches."""
    accelerator = Accelerator(cpu=True)
    x, y, batch = pictures(24), torch.arange(24) % 3, BATCH // 2 // accelerator.num_processes

    def loss(micro: Micro) -> dict[str, Tensor]:
        rows = [shuffled(micro.seed, "pictures", len(y), place) for place in micro.positions(batch)]
        return {"loss": F.cross_entropy(model(x[rows]), y[rows])}

    optimizer = MAKE[make](adapter.parameters())
    checkpoints = Checkpoints(folder, every=4) if folder else None
    plan = Plan(steps, accumulate=2, warmup=3)
    fit(loss, adapter, optimizer, plan=plan, accelerator=accelerator, checkpoints=checkpoints)


def sharded() -> tuple[nn.Module, vm.Adapter]:
    """`tiny` under FSDP2 on two processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, adapter = tiny()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(hasattr(p, "placements") for p in model.parameters())  # the adapter's too
    return model, adapter


def loops(rank: int, port: int, folder: Path) -> None:
    """Leaves what the loop made of each adapter, and under FSDP2, stopped and gone on with."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    assert Accelerator(cpu=True).num_processes == dist.get_world_size() == 2
    for make in MAKE:
        model, adapter = tiny()
        learn(model, adapter, make)
        if rank == 0:
            save_file(adapter.state_dict(), folder / f"{make}.safetensors")

    model, adapter = sharded()
    learn(model, adapter, "sgd", 7, folder / "checkpoints")
    model, adapter = sharded()
    learn(model, adapter, "sgd", STEPS, folder / "checkpoints")
    vm.save(adapter, folder / "fsdp.safetensors")  # by all processes
    held = list(adapter.parameters())  # as an optimiser has them
    model.eval()
    with torch.no_grad():
        save_file({"y": model(pictures(4))}, folder / f"outputs-{rank}.safetensors")
    zeros = {name: torch.zeros_like(t) for name, t in adapter.state_dict().items()}
    with torch.no_grad():
        model(pictures(4))  # after it, the outermost module has whole copies of its parameters in their place
    adapter.load_state_dict(zeros)
    assert not any(p.to_local().any() for p in held)
    with torch.no_grad():
        assert not model(pictures(4)).any()  # the head is zero

    model, adapter = tiny()
    early = torch.optim.SGD(list(adapter.parameters()), lr=0.1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    loss = lambda _: {"loss": model(pictures(4)).square().mean()}  # noqa: E731
    with pytest.raises(InputError, match=r"of the optimiser's \d+ parameters are not the adapter's.*after pruning"):
        fit(loss, adapter, early, plan=Plan(2), accelerator=Accelerator(cpu=True))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort while an interpreter ends: github.com/pytorch/pytorch/pull/179291


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(loops, args=(port, folder), nprocs=2)  # raises with the traceback of the rank that failed
    return folder


@pytest.fixture
def alone() -> Iterator[None]:
    """One process, whatever ran before, with one thread."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a) / max(float(t.abs().max()) for t in a.values())


@pytest.mark.usefixtures("alone")
def test_the_loop_on_two_processes_gets_what_one_does(two: Path) -> None:
    for make in MAKE:
        model, adapter = tiny()
        begun = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
        learn(model, adapter, make)
        one, x = adapter.state_dict(), pictures(16)
        found = load_file(two / f"{make}.safetensors")
        assert apart(one, begun) > 0.05  # it learnt
        with torch.no_grad():
            mine = model.eval()(x)
            adapter.load_state_dict(found)
            theirs = model(x)
        if make == "sgd":
            assert apart(one, found) < 1e-5
        assert apart({"": mine}, {"": theirs}) < (1e-5 if make == "sgd" else 1e-4)


@pytest.mark.usefixtures("alone")
def test_the_loop_under_fsdp2_gets_what_one_process_does(two: Path) -> None:
    """Trained, stopped after 7 of 20 steps, loaded and gone on with, and saved, all on sharded parameters."""
    model, adapter = tiny()
    learn(model, adapter, "sgd")
    assert apart(adapter.state_dict(), load_file(two / "fsdp.safetensors")) < 1e-5
    again, _ = tiny()
    vm.use(again)
    vm.load(again, two / "fsdp.safetensors", "found")
    with torch.no_grad():
        y = again.eval()(pictures(4))
    for rank in range(2):
        assert apart({"y": y}, load_file(two / f"outputs-{rank}.safetensors")) < 1e-5
    assert [p.name for p in (two / "checkpoints").iterdir()] != []
    assert max(int(p.stem[5:]) for p in (two / "checkpoints").glob("step-*")) == STEPS
