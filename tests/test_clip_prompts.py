"""Learned prompts on CLIP against their official rules written out by hand, and the facts of the papers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import (
    CLASSES,
    EXACT,
    NAMES,
    WORDS,
    classifier,
    clip,
    encode_images,
    encode_texts,
    images,
    images_of,
    tiny_clip,
    vit_base,
)
from torch import Tensor
from torch.nn import functional as F
from zoo import close, fixed, shake, word_ids

import vismodal as vm


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def adapted(clf: Any, method: vm.CoOp | vm.IVLP | Any, size: float = 0.3) -> tuple[vm.Adapter, list[Any]]:
    adapter = vm.adapt(clf, method)
    shake(adapter, size)
    return adapter, list(adapter.modules.values())


def ids_of(prompts: list[str]) -> Tensor:
    return word_ids(prompts)


# -- CoOp -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per_class", [False, True], ids=["unified", "per_class"])
def test_coop_with_the_words_of_the_template_is_zero_shot(name: str, per_class: bool) -> None:
    clf, x = classifier(name), images_of(name)
    y0 = clf(x)
    adapter = vm.adapt(clf, vm.CoOp(words=WORDS, per_class=per_class))
    (m,) = adapter.modules.values()
    assert m.v.shape == ((3, 4, 24) if per_class else (4, 24))
    assert close(clf(x), y0, 1e-6)  # the words' embeddings are held in fp32
    single = vm.CLIPClassifier(clip(name).float(), word_ids, CLASSES)
    y0 = single(x.float())
    # exactly; gradients take nn.MultiheadAttention off its fused path
    vm.adapt(single, vm.CoOp(words=WORDS, per_class=per_class)).trainable = False
    assert torch.equal(single(x.float()), y0)


@pytest.mark.parametrize("per_class", [False, True], ids=["unified", "per_class"])
def test_coop_overwrites_placeholders_after_the_token_embedding(per_class: bool) -> None:
    classes = ("cat", "big dog", "ship")
    clf, x = classifier(classes=classes), images()
    adapter, (m,) = adapted(clf, vm.CoOp(tokens=3, per_class=per_class))
    y = clf(x)
    names = [f"x x x {c}." for c in classes]  # whatever word stands there
    with adapter.disabled():
        t = encode_texts(clf.model, ids_of(names), [m.v])
        want = clf.model.logit_scale.exp() * encode_images(clf.model, x) @ t.T
    assert close(y, want, 1e-7)
    assert (m.ids.argmax(1) == torch.tensor([6, 7, 6])).all()  # where the end token stands, and the model pools


def test_coop_on_models_without_a_start_token_and_of_trained_weights() -> None:
    model, tokenizer = tiny_clip()
    clf = vm.CLIPClassifier(model, tokenizer, ["apple", "sea horse"])
    x = fixed(2, 3, 64, 64)
    y0 = clf(x)
    adapter = vm.adapt(clf, vm.CoOp(words=WORDS), name="words")
    adapter.trainable = False
    assert torch.equal(clf(x), y0)
    adapter.detach()
    (m,) = vm.adapt(clf, vm.CoOp()).modules.values()
    names = tokenizer(["apple.", "sea horse."])
    assert (m.start, m.v.shape) == (1, (16, 160))
    assert torch.equal(m.ids[:, 17:], names[:, 1:16])
    assert torch.equal(m.ids[:, 0], names[:, 0])

    def endless(texts: list[str]) -> Tensor:
        return word_ids(texts).roll(-1, 1).masked_fill(torch.arange(8) == 7, 0)

    (m,) = vm.adapt(vm.CLIPClassifier(clip(), endless, CLASSES), vm.CoOp(tokens=2)).modules.values()
    assert m.start == 0
    assert m.ids.argmax(1).tolist() == [4, 4, 4]  # two of context, the name, the dot, the end


def test_coop_starts_as_in_the_official_code() -> None:
    clf = vit_base()
    with pytest.raises(vm.InputError, match="fewer than the 5"):
        vm.adapt(clf, vm.CoOp(words=WORDS, tokens=5))
    small = vm.CLIPClassifier(clip(), word_ids, CLASSES)
    values = torch.cat(
        [vm.adapt(small, vm.CoOp(tokens=4), name=f"n{i}").modules["coop/:text.features"].v for i in range(40)]
    )
    assert abs(values.std().item() - 0.02) < 1e-3
    assert abs(values.mean().item()) < 1e-3


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (vm.CoOp(), r"'cat' and 16 tokens of context are more than the model's 8"),
        (vm.CoOp(tokens=5), "'cat' and 5 tokens"),
        (vm.CoOp(words="one two", tokens=3), "'one two' has 2 tokens, fewer than the 3"),
        (vm.CoOp(sites=("tokens",)), "cannot attach to model.visual:tokens"),
        (vm.IVLP(sites=("text.features", "tokens", "logits")), "cannot attach to :logits"),
        (vm.IVLP(depth=3), "IVLP: depth=3, but :text.features goes over 2 blocks"),
        (vm.MaPLe(), "MaPLe: depth=9, but"),
        (vm.MaPLe(sites=("tokens",), depth=1), "couples the two towers"),
        (vm.MaPLe(sites=("text.features",), depth=1), "couples the two towers"),
        (vm.PromptSRC(sites=("text.features", "tokens"), depth=1), "sites lacks image.features"),
        (vm.CoCoOp(sites=("text.features",)), r"goes to \('classifier',\)"),
    ],
)
def test_what_does_not_fit_is_said(method: Any, message: str) -> None:
    with pytest.raises(vm.InputError, match=message):
        vm.adapt(classifier(), method)


def test_settings_that_make_no_sense() -> None:
    for make in (
        lambda: vm.CoOp(tokens=0),
        lambda: vm.CoCoOp(reduction=0),
        lambda: vm.MaPLe(tokens=0),
        lambda: vm.IVLP(image_tokens=0),
        lambda: vm.PromptSRC(epochs=0),
        lambda: vm.PromptSRC(std=0.0),
        lambda: vm.CLIPAdapter(ratio=0.0),
    ):
        with pytest.raises(vm.InputError):
            make()


def test_words_that_run_into_the_names_are_refused() -> None:
    def together(texts: list[str]) -> Tensor:
        return word_ids([t.replace("a c", "ac") for t in texts])

    with pytest.raises(vm.InputError, match="runs 'a photo of a' and the names of the classes together"):
        vm.adapt(vm.CLIPClassifier(clip(), together, CLASSES), vm.CoOp(words=WORDS))


def test_one_context_goes_to_other_classes(tmp_path: Path) -> None:
    base, new, x = classifier(), classifier(classes=("tree", "big fish")), images()
    adapter, (m,) = adapted(base, vm.CoOp(tokens=3))
    vm.save(adapter, tmp_path / "coop.safetensors")
    (other,) = vm.load(new, tmp_path / "coop.safetensors").modules.values()
    assert torch.equal(other.v, m.v)
    with torch.no_grad():
        y = new(x)
        vm.use(new)
        t = encode_texts(new.model, ids_of(["x x x tree.", "x x x big fish."]), [m.v])
        assert close(y, new.model.logit_scale.exp() * encode_images(new.model, x) @ t.T, 1e-7)
    vm.use(base)
    own = vm.adapt(base, vm.CoOp(tokens=3, per_class=True), name="own")
    vm.save(own, tmp_path / "own.safetensors")
    with pytest.raises(vm.InputError, match=r"v is \(3, 3, 24\), the adapter has \(2, 3, 24\)"):
        vm.load(new, tmp_path / "own.safetensors")


# -- CoCoOp -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cocoop_with_a_zero_second_layer_is_coop(name: str) -> None:
    clf, x = classifier(name), images_of(name)
    coop, (a,) = adapted(clf, vm.CoOp(words=WORDS))
    want = clf(x)
    coop.detach()
    _, (b,) = adapted(clf, vm.CoCoOp(reduction=2))
    with torch.no_grad():
        b.v.copy_(a.v)
        assert not close(clf(x), want, 1e-5)
        b.up.zero_()
        b.up_bias.zero_()
    assert close(clf(x), want, 1e-6)


def test_cocoop_equals_the_formula() -> None:
    clf, x = classifier(), images(3)
    adapter, (m,) = adapted(clf, vm.CoCoOp(reduction=2))
    y = clf(x)
    ids = ids_of([f"{WORDS} {c}." for c in CLASSES])
    with adapter.disabled():
        f = encode_images(clf.model, x)
        rows = []
        for one in f:  # as the official code, a picture at a time
            h = F.relu(m.down.double() @ one + m.down_bias)
            t = encode_texts(clf.model, ids, [m.v + (m.up.double() @ h + m.up_bias)])
            rows.append(clf.model.logit_scale.exp() * one @ t.T)
    assert close(y, torch.stack(rows), 1e-9)
    assert not close(torch.stack(rows)[0], torch.stack(rows)[1], 1e-3)


def test_cocoops_class_features_are_never_kept() -> None:
    clf, x = classifier(), images(3)
    adapter, _ = adapted(clf, vm.CoCoOp(reduction=2))
    adapter.trainable = False
    with torch.no_grad():
        whole = clf(x)
        assert close(torch.cat([clf(x[i : i + 1]) for i in range(3)]), whole, 1e-9)


# -- IVLP, MaPLe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, None])
def test_ivlp_equals_the_official_rule(depth: int | None) -> None:
    clf, x = classifier(), images()
    adapter, (texts, pictures) = adapted(clf, vm.IVLP(image_tokens=3, depth=depth))
    y = clf(x)
    ids = ids_of([f"{WORDS} {c}." for c in CLASSES])
    with adapter.disabled():
        assert len(texts.P) == len(pictures.Q) == (depth or 2)
        f, t = encode_images(clf.model, x, list(pictures.Q)), encode_texts(clf.model, ids, list(texts.P))
        want = clf.model.logit_scale.exp() * f @ t.T
    assert close(y, want, 1e-7)


def test_ivlp_equals_the_rule_on_transformers_too() -> None:
    clf, x = classifier("transformers-CLIP"), images()
    adapter, modules = adapted(clf, vm.IVLP(image_tokens=3))
    texts, pictures = sorted(modules, key=lambda m: hasattr(m, "Q"))
    y = clf(x)
    model, ids = clf.model, ids_of([f"{WORDS} {c}." for c in CLASSES])
    v, w = model.vision_model, model.text_model
    causal = torch.full((8, 8), -torch.inf, dtype=torch.float64).triu(1)
    with adapter.disabled():
        e = torch.cat([v.embeddings(x), pictures.Q[0].double().expand(2, -1, -1)], 1)
        e = v.encoder.layers[0](v.pre_layrnorm(e), None)
        e = v.encoder.layers[1](torch.cat([e[:, :-3], pictures.Q[1].double().expand(2, -1, -1)], 1), None)
        f = F.normalize(model.visual_projection(v.post_layernorm(e[:, 0])), dim=-1)
        u = w.embeddings.token_embedding(ids)
        for j, layer in enumerate(w.encoder.layers):
            u = torch.cat([u[:, :1], texts.P[j].double().expand(3, -1, -1), u[:, 3:]], 1)
            u = layer(u + w.embeddings.position_embedding.weight if j == 0 else u, causal[None, None])
        t = F.normalize(model.text_projection(w.final_layer_norm(u)[torch.arange(3), ids.argmax(1)]), dim=-1)
        want = model.logit_scale.exp() * f @ t.T
    assert close(y, want, 1e-7)


def test_later_blocks_pass_the_last_prompts_on() -> None:
    """With depth 1 of 2 blocks, what became of the prompts is read by the second block."""
    clf, x = classifier(), images()
    adapter, (_, pictures) = adapted(clf, vm.IVLP(depth=1))
    lengths = []
    blocks = clf.model.visual.transformer.resblocks
    blocks[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0]))
    clf(x)
    assert lengths[0].shape[1] == 4 + 1 + 2
    with torch.no_grad():
        assert not close(lengths[0][:, 1:3], pictures.Q[0].double().expand(2, -1, -1), 0.1)
    with adapter.disabled():
        clf(x)
    assert lengths[1].shape[1] == 4 + 1


@pytest.mark.parametrize("depth", [1, 2])
def test_maple_equals_the_official_rule(depth: int) -> None:
    clf, x = classifier(), images()
    adapter, (texts, pictures) = adapted(clf, vm.MaPLe(depth=depth))
    y = clf(x)
    ids = ids_of([f"{WORDS} {c}." for c in CLASSES])
    with adapter.disabled():
        Q = [F.linear(p, W, w) for p, W, w in zip(texts.P, pictures.W, pictures.w, strict=True)]
        f, t = encode_images(clf.model, x, Q), encode_texts(clf.model, ids, list(texts.P))
        want = clf.model.logit_scale.exp() * f @ t.T
    assert close(y, want, 1e-6)  # Q is computed in fp32


@pytest.mark.parametrize("name", NAMES)
def test_maple_of_depth_1_has_the_zero_shot_texts_at_init(name: str) -> None:
    clf, x = classifier(name), images_of(name)
    t0, y0 = clf.text_features(), clf(x)
    vm.adapt(clf, vm.MaPLe(depth=1))
    assert close(clf.text_features(), t0, 1e-6)
    assert not close(clf(x), y0, 1e-4)  # the pictures' prompts are no words


def test_maple_couples_the_towers() -> None:
    clf, x = classifier(), images()
    adapter = vm.adapt(clf, vm.MaPLe(depth=2))
    texts, _ = adapter.modules.values()
    clf.image(x).square().sum().backward()  # the pictures alone
    assert texts.P.grad is not None
    assert texts.P.grad.abs().sum((1, 2)).all()
    assert {k.rpartition(".")[2] for k in adapter.state_dict()} == {"P", "W", "w"}
    twin = copy.deepcopy(clf)
    before = clf.image(x)
    with torch.no_grad():
        texts.P.zero_()
    assert not close(clf.image(x), before, 1e-4)
    assert close(twin.image(x), before, EXACT)


def test_prompts_stand_beside_those_of_vpt() -> None:
    """Whatever order they join in, each overwrites and takes out its own."""
    clf, x = classifier(), images()
    outputs = []
    for order in ((0, 1), (1, 0)):
        methods = (vm.IVLP(sites=("tokens",)), vm.VPT(sites=("tokens",), tokens=3))
        adapters = [vm.adapt(clf, methods[i], name="ab"[i], seed=i) for i in order]
        for a in adapters:
            shake(a, 0.3)
        vm.use(clf, *("ab"[i] for i in order))
        outputs.append(clf(x))
        with torch.no_grad():
            P = vm.attached(clf)["b"].modules["vpt/model.visual:tokens"].P
            (Q,) = vm.attached(clf)["a"].parameters()
        for a in adapters:
            a.detach()
    assert close(outputs[0], outputs[1], EXACT)
    v = clf.model.visual
    e = v.conv1(x).flatten(2).transpose(1, 2)
    e = torch.cat([v.class_embedding.expand(2, 1, -1), e], 1) + v.positional_embedding
    e = v.transformer.resblocks[0](
        v.ln_pre(torch.cat([e, P.double().expand(2, -1, -1), Q[0].double().expand(2, -1, -1)], 1))
    )
    e = v.transformer.resblocks[1](torch.cat([e[:, :-2], Q[1].double().expand(2, -1, -1)], 1))
    f = F.normalize(v.ln_post(e[:, 0]) @ v.proj, dim=-1)
    assert close(outputs[0], clf.model.logit_scale.exp() * f @ clf.text_features().T, EXACT)


# -- PromptSRC --------------------------------------------------------------------------------------------------------


def test_promptsrc_adds_the_papers_terms() -> None:
    clf, x = classifier(templates=["a {}.", "{}"]), images()
    t0 = clf.text_features()
    f0 = F.normalize(clf.image(x), dim=-1)
    p0 = clf(x).softmax(-1)
    adapter = vm.adapt(clf, vm.PromptSRC(depth=2, text_weight=3.0, image_weight=2.0, logit_weight=0.5))
    shake(adapter, 0.3)
    clf(x)
    assert adapter.penalty() is None  # in eval mode there is nothing to learn
    clf.train()
    p = clf(x).softmax(-1)
    penalty = adapter.penalty()
    assert adapter.penalty() is None  # once for each forward
    clf.eval()
    t, f = clf.text_features(), F.normalize(clf.image(x), dim=-1)
    kl = (p0 * (p0 / p).log()).sum() / p.numel()
    want = 3 * (t - t0).abs().mean() + 2 * (f - f0).abs().mean() + 0.5 * kl
    assert close(penalty, want, 1e-9)
    penalty.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    defaults = vm.PromptSRC()
    assert (defaults.text_weight, defaults.image_weight, defaults.logit_weight) == (25, 10, 1)


def test_promptsrc_at_the_base_costs_nothing() -> None:
    """One prompt of words in the texts alone: t = t0, and what the pictures' prompts do is all that counts."""
    clf, x = classifier(), images()
    clf.train()
    adapter = vm.adapt(clf, vm.PromptSRC(depth=1, image_weight=0.0, logit_weight=0.0))
    clf(x)
    assert adapter.penalty().item() < 1e-5


def test_promptsrc_regulates_what_was_copied_by_itself() -> None:
    clf, x = classifier(), images()
    adapter = vm.adapt(clf, vm.PromptSRC(depth=2)), clf.train()
    clf(x)
    twin = copy.deepcopy(clf)
    assert vm.attached(twin)["default"].penalty() is None
    twin(x)
    assert close(vm.attached(twin)["default"].penalty(), adapter[0].penalty(), 1e-9)


@pytest.mark.parametrize(("steps", "epochs"), [(12, 6), (7, 3), (2, 5)])
def test_promptsrc_ends_with_the_gaussian_average(steps: int, epochs: int) -> None:
    clf = classifier()
    adapter = vm.adapt(clf, vm.PromptSRC(depth=2, epochs=epochs, mean=4.0, std=1.5))
    texts, pictures = (adapter.modules[f"promptsrc/{key}"] for key in (":text.features", "model.visual:tokens"))
    density = [math.exp(-0.5 * ((e - 4.0) / 1.5) ** 2) for e in range(1, epochs + 1)]
    P, Q = torch.zeros_like(texts.P), torch.zeros_like(pictures.Q)
    for step in range(1, steps + 1):
        shake(adapter, 0.3)
        for e in range(1, epochs + 1):
            if round(e * steps / epochs) == step:
                P += density[e - 1] / sum(density) * texts.P.detach()
                Q += density[e - 1] / sum(density) * pictures.Q.detach()
        last = texts.P.detach().clone()
        adapter.advance(step, steps)
        assert torch.equal(texts.P, last) == (step < steps)
    assert close(texts.P, P, 1e-6)
    assert close(pictures.Q, Q, 1e-6)
    again = vm.adapt(classifier(), vm.PromptSRC(depth=2))
    again.load_state_dict(adapter.state_dict())  # with its averages, for a resume
    assert torch.equal(next(m.average for m in again.modules.values() if hasattr(m, "average")), texts.average)


def test_fit_adds_promptsrcs_terms_and_averages_at_the_end() -> None:
    from vismodal.train import Plan, fit

    clf, x = vm.CLIPClassifier(clip().float(), word_ids, CLASSES), images().float()
    clf.train()
    adapter = vm.adapt(clf, vm.PromptSRC(depth=2, epochs=2, mean=1.5), seed=0)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    outcome = fit(lambda _: {"loss": F.cross_entropy(clf(x), torch.tensor([0, 1]))}, adapter, optimizer, plan=Plan(4))
    assert outcome.metrics["penalty"] > 0
    texts, pictures = (adapter.modules[f"promptsrc/{key}"] for key in (":text.features", "model.visual:tokens"))
    assert torch.equal(texts.P, texts.average)
    assert torch.equal(pictures.Q, pictures.average)


# -- counts on ViT-B/16, as published -----------------------------------------------------------------------------


def test_published_counts() -> None:
    clf = vit_base()

    def count(method: Any) -> int:
        adapter = vm.adapt(clf, method)
        n = adapter.num_parameters
        adapter.detach()
        return n

    assert count(vm.CoOp()) == 8_192
    assert count(vm.CoOp(words=WORDS)) == 4 * 512
    assert count(vm.CoOp(per_class=True)) == 3 * 8_192
    assert count(vm.CoCoOp()) == 35_360
    assert count(vm.MaPLe()) == 3_555_072
    assert count(vm.MaPLe(depth=1)) == 395_008
    assert count(vm.IVLP()) == 30_720
    assert count(vm.IVLP(sites=("tokens",), image_tokens=8)) == 73_728
    assert count(vm.PromptSRC()) == 46_080


def test_training_coop_helps_on_trained_weights() -> None:
    model, tokenizer = tiny_clip()
    clf = vm.CLIPClassifier(model, tokenizer, ["zz", "qq", "xx"], "{}")
    labels = torch.arange(3).repeat_interleave(3)
    colours = torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2]])
    x = colours[labels][..., None, None] + 0.3 * torch.randn(9, 3, 64, 64)
    adapter = vm.adapt(clf, vm.CoOp(tokens=4, per_class=True), seed=0)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(clf(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert adapter.unused() == []
    assert losses[-1] < 0.5 * losses[0]
