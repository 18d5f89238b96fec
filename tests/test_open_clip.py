"""Fused attention of open_clip: every projection equals W + BA, in every mode, and the base never drifts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm

ATTENTION = ("attn.q", "attn.k", "attn.v", "attn.out")
CASE = BY_NAME["open_clip-CLIP"]


def adapted(**options: object) -> tuple[nn.Module, vm.Adapter]:
    model = CASE.model()
    adapter = vm.adapt(model, vm.LoRA(sites=ATTENTION, rank=3, alpha=6, **options))  # type: ignore[arg-type]
    shake(adapter, 0.2)
    return model, adapter


def by_hand(model: nn.Module, adapter: vm.Adapter, x: Tensor, mask: Callable[[str], Tensor] | None = None) -> Tensor:
    """Attention of the image tower's first block with W + 2BA written out; `mask` scales the columns of A."""
    attn = model.visual.transformer.resblocks[0].attn
    path = "lora/visual.transformer.resblocks.0.attn"
    delta = {}
    for name in ("in_proj_weight:q", "in_proj_weight:k", "in_proj_weight:v", "out_proj"):
        m = adapter.modules[f"{path}.{name}"]
        delta[name] = 2 * m.B @ (m.A if mask is None else m.A * mask(name))
    weight = attn.in_proj_weight + torch.cat([delta[f"in_proj_weight:{x}"] for x in "qkv"])
    q, k, v = (
        t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for t in F.linear(x, weight, attn.in_proj_bias).chunk(3, -1)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(y, attn.out_proj.weight + delta["out_proj"], attn.out_proj.bias)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_every_projection_equals_the_formula(train: bool, grad: bool) -> None:
    model, adapter = adapted()
    model.train(train)
    attn = model.visual.transformer.resblocks[0].attn
    x = fixed(2, 5, 24)
    with torch.set_grad_enabled(grad):
        assert close(attn(x, x, x, need_weights=False)[0], by_hand(model, adapter, x))
    assert "in_proj_weight" not in attn.__dict__  # nothing is left behind


def test_dropout_masks_columns_of_A_once_a_forward() -> None:
    model, adapter = adapted(dropout=0.5)
    model.train()
    attn = model.visual.transformer.resblocks[0].attn
    x = fixed(2, 5, 24)
    torch.manual_seed(7)
    y = attn(x, x, x, need_weights=False)[0]
    torch.manual_seed(7)  # W' is formed before the attention: q, k, v, then out draw one mask over the columns each
    masks = {
        n: F.dropout(torch.ones(24), 0.5)
        for n in ("in_proj_weight:q", "in_proj_weight:k", "in_proj_weight:v", "out_proj")
    }
    assert close(y, by_hand(model, adapter, x, masks.__getitem__))
    assert not close(attn(x, x, x, need_weights=False)[0], y, 1e-3)
    model.eval()
    assert close(attn(x, x, x, need_weights=False)[0], by_hand(model, adapter, x))


def test_merging_in_train_mode_draws_no_dropout() -> None:
    model, adapter = adapted(dropout=0.5)
    live = CASE.run(model)
    model.train()
    adapter.merge()
    model.eval()
    assert close(CASE.run(model), live)


def test_300_steps_and_20_merges_in_bf16_leave_every_base_bit() -> None:
    torch.manual_seed(0)
    model = CASE.model().bfloat16().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    adapter = vm.adapt(model, vm.LoRA(sites=ATTENTION, rank=2, dropout=0.1))
    start = adapter.state_dict()["lora/visual.transformer.resblocks.0.attn.out_proj.A"].clone()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for step in range(300):
        CASE.run(model).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 15 == 0:
            adapter.merge()
            adapter.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(adapter.state_dict()["lora/visual.transformer.resblocks.0.attn.out_proj.A"], start)


def test_a_merged_model_saves_as_a_plain_one(tmp_path: Path) -> None:
    model, adapter = adapted()
    y = CASE.run(model)
    adapter.merge()
    torch.save(model.state_dict(), tmp_path / "plain.pt")  # what open_clip's own checkpoints are
    plain = CASE.model()
    plain.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True))
    assert close(CASE.run(plain), y)
