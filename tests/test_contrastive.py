"""Contrastive losses by hand, and large batches in small parts: the same gradient to the last digits."""

from __future__ import annotations

import math
import os
import socket
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from clips import clip, images, tiny_clip
from torch import Tensor
from torch.nn import functional as F
from zoo import close, shake, word_ids

import vismodal as vm
from vismodal.clip import Images, encode_texts
from vismodal.contrastive.loss import Temperature, Trained, encoded, gathered, infonce, loss_named, row_at, sigmoid
from vismodal.resume import Checkpoints
from vismodal.train import Plan, fit

TEXTS = ["a red cat", "two dogs", "the ship", "a sea horse", "my dog", "nothing"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def features(n: int = 5) -> tuple[Tensor, Tensor]:
    f, t = (F.normalize(torch.randn(n, 7), dim=-1) for _ in range(2))
    return f, t


# -- losses ----------------------------------------------------------------------------------------------------------


def test_infonce_is_the_mean_of_both_cross_entropies() -> None:
    f, t = features()
    s = torch.tensor(12.0)
    terms = []
    for i in range(5):
        along = torch.stack([torch.exp(s * f[i] @ t[j]) for j in range(5)])
        across = torch.stack([torch.exp(s * f[j] @ t[i]) for j in range(5)])
        terms += [-torch.log(along[i] / along.sum()), -torch.log(across[i] / across.sum())]
    assert close(infonce(f, t, s), torch.stack(terms).mean(), 1e-6)
    from open_clip.loss import ClipLoss

    assert close(infonce(f, t, s), ClipLoss()(f, t, s), 1e-6)


def test_equal_features_have_a_loss_of_ln_n() -> None:
    same = F.normalize(torch.ones(6, 4), dim=-1)
    assert abs(infonce(same, same, torch.tensor(100.0)).item() - math.log(6)) < 1e-5


def test_sigmoid_asks_of_every_pair() -> None:
    f, t = features()
    s, b = torch.tensor(10.0), torch.tensor(-3.0)
    terms = [torch.log1p(torch.exp(-(1 if i == j else -1) * (s * f[i] @ t[j] + b))) for i in range(5) for j in range(5)]
    assert close(sigmoid(f, t, s, b), torch.stack(terms).sum() / 5, 1e-6)
    from open_clip.loss import SigLipLoss

    assert close(sigmoid(f, t, s, b), SigLipLoss()(f, t, s, b), 1e-6)


def test_the_loss_is_what_the_model_was_made_for() -> None:
    f, t = features()
    theirs = clip("transformers-SigLIP")
    siglip, plain = Temperature(theirs, False), Temperature(clip(), False)
    assert close(loss_named("auto", siglip)(f, t), sigmoid(f, t, siglip.scale.exp(), siglip.bias), 0)
    assert close(loss_named("auto", plain)(f, t), infonce(f, t, plain.scale.exp()), 0)
    assert close(loss_named("infonce", siglip)(f, t), infonce(f, t, siglip.scale.exp()), 0)
    with pytest.raises(vm.InputError, match="needs a model with a logit_bias"):
        loss_named("sigmoid", plain)


# -- large batches in parts ------------------------------------------------------------------------------------------


def gradients(name: str, part: int, dropout: float = 0.0, keep: bool = False) -> dict[str, Tensor]:
    """Of LoRA on both towers in fp64; `keep` computes the parts without dropping their activations."""
    model = clip(name)
    adapter = vm.adapt(model, vm.LoRA(sites=("attn.*", "mlp.*"), rank=2, dropout=dropout), seed=0)
    shake(adapter, 0.3)
    adapter_loss(model, part, keep).backward()
    return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}


def adapter_loss(model: Any, part: int, keep: bool = False) -> Tensor:
    model.train()
    x, ids = images(len(TEXTS)), word_ids(TEXTS)
    torch.manual_seed(5)
    pair = []
    for encode, rows in ((Images(model), x), (lambda r: encode_texts(model, r), ids)):
        y = torch.cat([encode(r) for r in rows.split(part)]) if keep else encoded(encode, rows, part)
        pair.append(F.normalize(y, dim=-1))
    logits = 10 * pair[0] @ pair[1].T
    target = torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("name", ["open_clip-CLIP", "open_clip-CustomTextCLIP", "transformers-CLIP"])
def test_parts_have_the_gradient_of_the_whole_batch(name: str) -> None:
    whole = gradients(name, 0)
    for part in (1, 4):  # 4 leaves an uneven rest
        cut = gradients(name, part)
        assert cut.keys() == whole.keys() and len(whole) > 8
        assert all(close(cut[n], whole[n], 1e-6) for n in whole)  # the adapter's own parameters are fp32
    assert any(g.abs().max() > 1e-4 for g in whole.values())


@pytest.mark.parametrize("name", ["open_clip-CLIP", "transformers-CLIP"])
def test_parts_draw_the_same_dropout_again(name: str) -> None:
    kept = gradients(name, 2, dropout=0.5, keep=True)
    again = gradients(name, 2, dropout=0.5)
    assert all(torch.equal(kept[n], again[n]) for n in kept)
    other = gradients(name, 3, dropout=0.5)
    assert not all(close(kept[n], other[n], 1e-3) for n in kept), "dropout must matter"


def test_parts_keep_no_activations() -> None:
    def saved(part: int) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        model = clip()
        vm.adapt(model, vm.LoRA(sites=("attn.*", "mlp.*"), rank=2), seed=0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            adapter_loss(model, part)
        return sum(sizes.values())

    pixels = images(len(TEXTS)).numel()  # which the recomputation needs
    assert saved(1) - pixels < 0.02 * (saved(0) - pixels)


def test_a_batch_holds_no_picture_twice() -> None:
    seen = [row_at(0, 10, 4, p) for p in range(24)]
    batches = [seen[i : i + 4] for i in range(0, 24, 4)]
    assert all(len(set(b)) == 4 for b in batches)
    assert [len({*batches[i], *batches[i + 1]}) for i in (0, 2, 4)] == [8, 8, 8]  # an epoch is two whole batches
    assert seen[:8] != seen[8:16]


# -- temperature -----------------------------------------------------------------------------------------------------


def test_the_temperature_is_learnt_clamped_saved_and_written(tmp_path: Any) -> None:
    def make() -> tuple[Any, Trained, torch.optim.Optimizer]:
        model: Any = clip().float()
        adapter = vm.adapt(model, vm.LoRA(rank=2), seed=0)
        trained = Trained(adapter, Temperature(model, learn=True))
        return model, trained, torch.optim.AdamW(trained.groups(0.5, 0.1))

    model, trained, optimizer = make()
    assert [n for n, _ in trained.named_parameters()][-1] == "temperature.scale"
    base = model.logit_scale.item()

    def loss(micro: Any) -> dict[str, Tensor]:
        out = model.encode_image(images(3).float()) @ model.encode_text(word_ids(TEXTS[:3])).T
        return {"loss": out.square().mean() * 1e-6 - trained.temperature.scale}  # wants it ever larger

    checkpoints = Checkpoints(tmp_path, every=0)
    fit(loss, trained, optimizer, plan=Plan(8), checkpoints=checkpoints)
    assert trained.temperature.scale.exp().item() == pytest.approx(100, rel=1e-5)
    assert model.logit_scale.item() == base, "the base is frozen"
    trained.temperature.write(model)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)

    _, again, optimizer = make()
    Checkpoints(tmp_path).restore(again, optimizer)
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    fixed = Trained(again.adapter, Temperature(model, learn=False))
    assert all("temperature" not in n for n, _ in fixed.named_parameters())


@pytest.mark.parametrize(("own", "most"), [(2.0, 100.0), (4.767, math.exp(4.767))])
def test_a_model_that_comes_with_more_than_100_keeps_it(own: float, most: float) -> None:
    """SigLIP's is about 117: it must neither change before training, nor by being written."""
    model: Any = clip("transformers-SigLIP").float()
    with torch.no_grad():
        model.logit_scale.fill_(own)
    temperature = Temperature(model, learn=True)
    temperature.clamp()
    temperature.write(model)
    assert model.logit_scale.item() == pytest.approx(own, rel=1e-7)
    with torch.no_grad():
        temperature.scale.add_(9)
    temperature.clamp()
    assert temperature.scale.exp().item() == pytest.approx(most, rel=1e-5)


# -- several processes -----------------------------------------------------------------------------------------------


def work(rank: int, port: int) -> None:
    """Half of the batch on each process; the mean of their gradients is that of the whole batch on one."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.get_world_size() == 2

    def grads(mine: slice) -> dict[str, Tensor]:
        model = clip()
        adapter = vm.adapt(model, vm.LoRA(sites=("attn.*",), rank=2), seed=0)
        shake(adapter, 0.3)
        temperature = Temperature(model, learn=True)
        f = F.normalize(encoded(Images(model), images(len(TEXTS))[mine], 2), dim=-1)
        t = F.normalize(encoded(lambda r: encode_texts(model, r), word_ids(TEXTS)[mine], 2), dim=-1)
        if mine != slice(None):
            f, t = gathered(f), gathered(t)
        assert len(f) == len(TEXTS)
        infonce(f, t, temperature.scale.exp()).backward()
        named = dict(Trained(adapter, temperature).named_parameters())
        return {n: p.grad for n, p in named.items() if p.grad is not None}

    whole, half = grads(slice(None)), grads(slice(3 * rank, 3 * rank + 3))
    for name, gradient in half.items():
        dist.all_reduce(gradient)
        assert close(gradient / 2, whole[name], 1e-5), name
    assert "temperature.scale" in half
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_two_processes_have_the_gradient_of_one() -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(work, args=(port,), nprocs=2)


def test_one_process_gathers_nothing() -> None:
    x = torch.randn(2, 3)
    assert gathered(x) is x


def test_training_lowers_the_loss_of_the_embedded_clip() -> None:
    model, tokenizer = tiny_clip()
    adapter = vm.adapt(model, vm.LoRA(rank=2), seed=0)
    x, ids = torch.randn(6, 3, 64, 64), tokenizer(TEXTS)
    optimizer = torch.optim.AdamW(adapter.groups(1e-2))
    losses = []
    for _ in range(6):
        f = F.normalize(encoded(model.encode_image, x, 3), dim=-1)
        t = F.normalize(encoded(model.encode_text, ids, 3), dim=-1)
        loss = infonce(f, t, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
