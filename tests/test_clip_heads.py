"""The classifier over CLIP, and what attaches to its features and logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from clips import CLASSES, EXACT, NAMES, WORDS, classifier, clip, images, images_of, tiny_clip, vit_base
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import close, shake, word_ids

import vismodal as vm

CLIP_LORA = vm.LoRA(sites=("attn.q", "attn.k", "attn.v"), rank=2, alpha=1, rank_stabilised=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def normal(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def encode_text(model: Any, text: str) -> Tensor:
    ids = word_ids([text])
    return model.encode_text(ids) if hasattr(model, "encode_text") else model.get_text_features(ids).pooler_output


# -- the zero-shot head -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_library(name: str) -> None:
    clf, x = classifier(name), images_of(name)
    model: Any = clf.model
    ids = word_ids([f"{WORDS} {c}." for c in CLASSES])
    if name.startswith("open_clip"):
        want = model.get_logits(x, ids)[0]
    else:
        want = model(pixel_values=x, input_ids=ids).logits_per_image
    assert close(clf(x), want, EXACT)
    assert list(clf.state_dict()) == [f"model.{key}" for key in model.state_dict()]


@pytest.mark.parametrize("name", NAMES)
def test_head_normalises_each_prompt_then_their_mean(name: str) -> None:
    def loud(name: str) -> str:
        return f"a loud {name}"

    prompts = {
        "cat": ["a photo of a cat.", "cat.", "my cat"],
        "dog": ["a {}.", loud],
        "ship": ["ship"],
    }
    written = [["a photo of a cat.", "cat.", "my cat"], ["a dog.", "a loud dog"], ["ship"]]
    clf = classifier(name, prompts)
    want = [normal(torch.cat([normal(encode_text(clf.model, p)) for p in each]).mean(0)) for each in written]
    assert close(clf.text_features(), torch.stack(want), EXACT)
    both = classifier(name, [f"{WORDS} {{}}.", loud]).text_features()
    one = classifier(name, loud).text_features()
    pair = [normal(encode_text(clf.model, t)) for t in (f"{WORDS} dog.", "a loud dog")]
    assert close(both[1], normal(sum(pair))[0], EXACT)
    assert close(one[1], pair[1][0], EXACT)


def test_head_equals_open_clips_own() -> None:
    model, tokenizer = tiny_clip()
    classes = ["apple", "sea", "orchid"]
    templates = ["a photo of a {}.", "a blurry photo of the {}.", "{}"]
    functions = [lambda c, t=t: t.format(c) for t in templates]
    want = open_clip.build_zero_shot_classifier(model, tokenizer, classes, functions)  # D C
    assert close(vm.CLIPClassifier(model, tokenizer, classes, templates).text_features(), want.T, 1e-6)


def test_many_prompts_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    templates = ["a {}.", "{}", "my {}", "a photo of {}"]
    whole = classifier(templates=templates).text_features()
    monkeypatch.setattr("vismodal.clip.AT_ONCE", 5)
    assert close(classifier(templates=templates).text_features(), whole, EXACT)


def test_a_transformers_tokenizer_or_processor_may_be_given() -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from zoo import TEXT, VISION

    _, ours = tiny_clip()
    tokenizer = AutoTokenizer.from_pretrained(ours.tokenizer.name_or_path)
    text = {**TEXT, "vocab_size": 3839, "max_position_embeddings": 12, "eos_token_id": 3838}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)).eval()
    clf = vm.CLIPClassifier(model, tokenizer, ["apple", "orchid"])
    assert torch.equal(clf.text.ids, ours(["a photo of a apple.", "a photo of a orchid."], context_length=12))

    class Processor:
        image_processor = None

    processor = Processor()
    processor.tokenizer = tokenizer  # type: ignore[attr-defined]
    assert torch.equal(vm.CLIPClassifier(model, processor, ["apple", "orchid"]).text.ids, clf.text.ids)
    with pytest.raises(vm.InputError, match="has more than the 12 tokens that the model reads; shorten"):
        vm.CLIPClassifier(model, tokenizer, ["apple " * 12])


def test_prompts_that_open_clip_would_cut_are_refused() -> None:
    model, tokenizer = tiny_clip()
    fits = "apple " * 25
    assert vm.CLIPClassifier(model, tokenizer, [fits]).text.ids.shape == (1, 32)
    with pytest.raises(vm.InputError, match="has more than the 32 tokens that the model reads; shorten"):
        vm.CLIPClassifier(model, tokenizer, ["apple", fits + "apple apple apple"])


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ((), "{}", "names of its classes"),
        (CLASSES, "a photo", "has no {} for the name"),
        (CLASSES, (), "no prompts for the class 'cat'"),
        (CLASSES, {"cat": ["a cat"]}, "no prompts for the class 'dog'; it has cat"),
    ],
)
def test_what_cannot_be_a_head(classes: Any, templates: Any, message: str) -> None:
    with pytest.raises(vm.InputError, match=message):
        classifier(templates=templates, classes=classes)


def test_what_cannot_be_its_model() -> None:
    with pytest.raises(vm.InputError, match="a Linear encodes no texts"):
        vm.CLIPClassifier(nn.Linear(1, 1), word_ids, CLASSES)


def test_equal_features_have_a_loss_of_ln_n() -> None:
    clf = classifier(templates={c: ["a photo"] for c in CLASSES})
    loss = F.cross_entropy(clf(images(3)), torch.arange(3))
    assert abs(loss.item() - math.log(3)) < 1e-12


# -- when the features of the classes are computed ------------------------------------------------------------------


class Counter:
    """How often the text tower runs."""

    def __init__(self, clf: Any) -> None:
        self.n = 0
        clf.text.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.n += 1

    def during(self, run: Any, times: int = 3) -> int:
        before = self.n
        for _ in range(times):
            run()
        return self.n - before


def test_features_are_kept_where_nothing_touches_the_texts() -> None:
    clf, x = classifier(), images()
    counter = Counter(clf)
    assert counter.during(lambda: clf(x)) == 1
    adapter = vm.adapt(clf, [vm.CLIPAdapter(), vm.LoRA(where="model.visual*"), vm.TipAdapter(train_keys=True, shots=2)])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    clf.train()
    for _ in range(3):
        clf(x).square().sum().backward()
        optimizer.step()
    assert counter.n == 2  # once in each mode
    y = clf(x)
    clf.model.token_embedding.weight.mul_(-1)
    assert not close(clf(x), y, 1e-3)
    assert counter.n == 3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "method", [vm.LoRA(), vm.CoOp(tokens=2), vm.Tune(sites=("norm",))], ids=lambda m: type(m).__name__
)
def test_features_follow_what_touches_the_texts(method: Any, fused: bool) -> None:
    clf, x = classifier(), images()
    clf(x)
    counter = Counter(clf)
    adapter = vm.adapt(clf, method)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, fused=fused)
    assert counter.during(lambda: clf(x).square().sum().backward()) == 3
    optimizer.step()
    with torch.no_grad():
        first = clf(x)
        assert counter.during(lambda: clf(x)) == 0
        optimizer.step()  # a fused one does not raise the versions of its tensors
        second = clf(x)
    assert not close(first, second, 1e-6)
    adapter.trainable = False
    assert counter.during(lambda: clf(x)) == 1
    assert close(clf(x), second, 1e-6)
    if not isinstance(method, vm.CoOp):
        adapter.scale = 0.5
        half = clf(x)
        assert not close(half, second, 1e-6)
        adapter.merge()
        assert counter.during(lambda: clf(x)) == 1
        assert close(clf(x), half, 1e-5)
    with adapter.disabled():
        assert close(clf(x), classifier()(x), EXACT)


def test_features_follow_adapters_of_others_and_the_base_itself() -> None:
    model, x = clip(), images()
    first, second = (vm.CLIPClassifier(model, word_ids, c) for c in (CLASSES, ("cat", "dog")))
    before = second(x)
    adapter = vm.adapt(first, vm.LoRA())
    shake(adapter, 0.3)
    assert not close(second(x), before, 1e-4)
    adapter.detach()
    assert close(second(x), before, EXACT)
    model.requires_grad_(True)
    second(x).square().sum().backward()
    with torch.no_grad():
        counter = Counter(second)
        assert counter.during(lambda: second(x)) == 1
        torch.optim.AdamW(model.parameters(), lr=0.01, fused=True).step()
        assert not close(second(x), before, 1e-4)
    assert counter.n == 2


def test_features_kept_in_inference_mode_can_be_trained_with() -> None:
    clf, x = classifier(), images()
    with torch.inference_mode():
        clf(x)
    adapter = vm.adapt(clf, vm.CLIPAdapter())
    clf(x).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_features_of_an_adapter_with_dropout_are_drawn_each_time() -> None:
    clf, x = classifier("transformers-CLIP"), images()
    adapter = vm.adapt(clf, vm.LoRA(dropout=0.5))
    shake(adapter, 0.5)
    adapter.trainable = False
    assert torch.equal(clf(x), clf(x))
    clf.train()
    assert not torch.equal(clf.text_features(), clf.text_features())


# -- CLIP-Adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_clip_adapter_equals_the_formula(name: str) -> None:
    clf, x = classifier(name), images_of(name)
    adapter = vm.adapt(clf, vm.CLIPAdapter(reduction=2, ratio=0.3))
    shake(adapter, 0.3)
    (m,) = adapter.modules.values()
    y = clf(x)
    with adapter.disabled():
        f = clf.image(x)
        adapted = 0.3 * F.relu(F.relu(f @ m.down.double().T) @ m.up.double().T) + 0.7 * f
        want = _logits(clf, normal(adapted))
    assert close(y, want, EXACT)
    with torch.no_grad():
        m.up.zero_()
    with adapter.disabled():
        want = clf(x)
    assert close(clf(x), want, EXACT)  # 0.7 f has the direction of f


def _logits(clf: Any, f: Tensor) -> Tensor:
    bias = getattr(clf.model, "logit_bias", None)
    return clf.model.logit_scale.exp() * f @ clf.text_features().T + (0 if bias is None else bias)


# -- Tip-Adapter ------------------------------------------------------------------------------------------------------


def passes(labels: Tensor, n: int = 3) -> list[list[tuple[Tensor, Tensor]]]:
    """n passes over one picture for each label, in batches of two, with other noise in each."""
    x = images(len(labels))
    noisy = [x + 0.1 * torch.randn_like(x) for _ in range(n)]
    return [list(zip(each.split(2), labels.split(2), strict=True)) for each in noisy]


@pytest.mark.parametrize("train_keys", [False, True], ids=["Tip", "Tip-F"])
def test_tip_adapter_equals_the_formula(train_keys: bool) -> None:
    clf, x = classifier(), images()
    labels = torch.tensor([2, 0, 1, 1, 0])  # unequal numbers are as good
    given = passes(labels)
    adapter = vm.adapt(clf, vm.TipAdapter(train_keys=train_keys, alpha=1.5, beta=4.0))
    with pytest.raises(RuntimeError, match="remembers no pictures yet"):
        clf(x)
    vm.TipAdapter.remember(adapter, given)
    with adapter.disabled(), torch.no_grad():
        views = torch.stack([torch.cat([clf.image(b) for b, _ in each]) for each in given])
        K = normal(views.mean(0))
        f = normal(clf.image(x))
        V = F.one_hot(labels).double()
        want = clf(x) + 1.5 * torch.exp(-4.0 * (1 - f @ K.T)) @ V
        y0 = clf(x)
    assert close(clf(x), want, 1e-6)  # K is held in fp32
    (m,) = adapter.modules.values()
    assert adapter.num_parameters == (m.K.numel() if train_keys else 0)
    m.alpha.zero_()
    assert torch.equal(clf(x), y0)  # zero-shot
    m.alpha.fill_(0.7)
    m.beta.zero_()
    counts = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    assert close(clf(x) - y0, (m.alpha * counts).expand(2, 3), 1e-6)  # alpha K to every class


def test_tip_f_begins_as_tip_and_trains_its_keys() -> None:
    clf, x = classifier(), images()
    given = passes(torch.tensor([0, 1, 2]))
    tip = vm.adapt(clf, vm.TipAdapter(), name="tip")
    vm.TipAdapter.remember(tip, given)
    y = clf(x)
    vm.use(clf)
    keys = vm.adapt(clf, vm.TipAdapter(train_keys=True), name="keys")
    optimizer = torch.optim.AdamW(keys.parameters(), lr=1e-3, eps=1e-4)
    vm.TipAdapter.remember(keys, given)  # also where an optimiser has the keys
    assert torch.equal(clf(x), y)
    F.cross_entropy(clf(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    assert not close(clf(x), y, 1e-5)
    vm.use(clf, "tip")
    assert torch.equal(clf(x), y)


def test_tip_adapter_is_saved_with_what_it_remembers(tmp_path: Path) -> None:
    clf, x = classifier(), images()
    adapter = vm.adapt(clf, vm.TipAdapter(train_keys=True))
    vm.TipAdapter.remember(adapter, passes(torch.tensor([2, 0, 1, 1, 0])))
    vm.TipAdapter.search(adapter, passes(torch.tensor([0, 1, 2]), 1)[0])
    y = clf(x)
    vm.save(adapter, tmp_path / "tip.safetensors")
    other = classifier()
    vm.load(other, tmp_path / "tip.safetensors")
    assert torch.equal(other(x), y)
    fewer = classifier("transformers-SigLIP")
    with pytest.raises(vm.InputError, match="does not fit"):
        vm.load(fewer, tmp_path / "tip.safetensors")


def test_search_takes_the_best_on_validation_data_alone() -> None:
    clf = classifier()
    adapter = vm.adapt(clf, vm.TipAdapter())
    x, labels = torch.randn(9, 3, 32, 32, dtype=torch.float64), torch.arange(9) % 3
    vm.TipAdapter.remember(adapter, [[(x + 0.2 * torch.randn_like(x), labels)]])
    (m,) = adapter.modules.values()
    alphas, betas = (0.1, 1e3, 2e3), (0.1, 1.0, 1e3)
    found = vm.TipAdapter.search(adapter, [(x, labels)], alphas, betas)
    rights = {}
    for beta in betas:
        for alpha in alphas:
            m.alpha.fill_(alpha)
            m.beta.fill_(beta)
            rights[alpha, beta] = (clf(x).argmax(1) == labels).float().mean().item()
    assert found.accuracy == max(rights.values())
    assert (found.alpha, found.beta) == max(rights, key=rights.__getitem__)  # the first of the best
    assert len(set(rights.values())) > 1, "the data must tell them apart"
    assert list(rights.values()).count(found.accuracy) > 1, "the first of several"
    grid = vm.TipAdapter.search.__defaults__
    assert [len(g) for g in grid] == [20, 200]
    assert [g[0] for g in grid] == [0.1, 0.1]
    vm.TipAdapter.search(adapter, [(x, labels)], (2.0,), (1.0,))
    assert (m.alpha.item(), m.beta.item()) == (2.0, 1.0)


def test_what_tip_adapter_cannot_remember() -> None:
    clf = classifier()
    adapter = vm.adapt(clf, vm.TipAdapter())
    given = passes(torch.tensor([0, 1, 2, 0]), 2)
    with pytest.raises(vm.InputError, match="differ in their labels"):
        vm.TipAdapter.remember(adapter, [given[0], given[1][::-1]])
    with pytest.raises(vm.InputError, match="labels go from 0 to 3, and there are 3 classes"):
        vm.TipAdapter.remember(adapter, passes(torch.tensor([0, 3])))
    with pytest.raises(vm.InputError, match="no pass"):
        vm.TipAdapter.remember(adapter, [])
    with pytest.raises(vm.InputError, match="no pictures"):
        vm.TipAdapter.remember(adapter, [[]])
    with pytest.raises(vm.InputError, match="one TipAdapter on one CLIPClassifier"):
        vm.TipAdapter.search(vm.adapt(clf, vm.CLIPAdapter(), name="other"), given[0])


def test_tip_adapter_recognises_what_it_remembers() -> None:
    """On trained weights: classes with meaningless names, told by their pictures alone."""
    model, tokenizer = tiny_clip()
    clf = vm.CLIPClassifier(model, tokenizer, ["zz", "qq", "xx"], "{}")
    colours = torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2]])
    labels = torch.arange(3).repeat_interleave(4)

    def pictures(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return colours[labels][..., None, None] + 0.3 * torch.randn(12, 3, 64, 64, generator=generator)

    adapter = vm.adapt(clf, vm.TipAdapter())
    vm.TipAdapter.remember(adapter, [[(pictures(i), labels)] for i in range(2)])
    before = vm.TipAdapter.search(adapter, [(pictures(3), labels)], alphas=(0.0,))
    found = vm.TipAdapter.search(adapter, [(pictures(3), labels)])
    assert before.accuracy < 0.7
    assert found.accuracy == 1.0
    assert (clf(pictures(4)).argmax(1) == labels).all()


# -- CLIP-LoRA and WiSE-FT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_clip_lora_is_the_identity_then_merges_to_the_formula(name: str) -> None:
    clf, x = classifier(name), images_of(name)
    y0 = clf(x)
    adapter = vm.adapt(clf, CLIP_LORA)
    assert close(clf(x), y0, EXACT)
    shake(adapter, 0.3)
    live = clf(x)
    assert not close(live, y0, 1e-3)
    if name != "open_clip-CLIP":
        return
    block = clf.model.transformer.resblocks[0].attn
    W0 = block.in_proj_weight.clone()
    path = "lora/model.transformer.resblocks.0.attn.in_proj_weight"
    delta = torch.cat([(lambda m: m.B.double() @ m.A.double())(adapter.modules[f"{path}:{p}"]) for p in "qkv"])
    adapter.merge()
    assert close(clf(x), live, EXACT)
    assert close(block.in_proj_weight, W0 + delta / math.sqrt(2), EXACT)
    for alpha in (0.3, 0.75):  # WiSE-FT
        adapter.scale = alpha
        assert close(block.in_proj_weight, (1 - alpha) * W0 + alpha * (W0 + delta / math.sqrt(2)), EXACT)
        merged = clf(x)
        adapter.unmerge()
        assert close(clf(x), merged, EXACT)
        adapter.merge()
    adapter.unmerge()
    assert torch.equal(block.in_proj_weight, W0)


# -- counts on ViT-B/16, as published -----------------------------------------------------------------------------


def test_published_counts() -> None:
    clf = vit_base()
    assert clf.image.width == 512
    assert vm.adapt(clf, vm.CLIPAdapter(), name="a").num_parameters == 131_072
    assert vm.adapt(clf, CLIP_LORA, name="b").num_parameters == 184_320
    images = vm.adapt(clf, vm.LoRA(sites=CLIP_LORA.sites, rank=2, where="model.visual*"), name="c")
    assert images.num_parameters == 110_592
    assert vm.adapt(clf, vm.TipAdapter(shots=16), name="d").num_parameters == 0
    assert vm.adapt(clf, vm.TipAdapter(train_keys=True, shots=16), name="e").num_parameters == 3 * 16 * 512


def test_the_catalogue_knows_them() -> None:
    table = vm.methods()
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    sizes = {name: row["parameters on ViT-B/16"] for name, row in rows.items()}
    assert (sizes["MaPLe"], sizes["CLIPAdapter"], sizes["TipAdapter"]) == ("3,555,072", "131,072", "0")
    assert (rows["MaPLe"]["families"], rows["CLIPAdapter"]["families"]) == ("vismodal", "vismodal")
    assert rows["LoRA"]["families"] == "timm, open_clip, transformers, diffusers"
    assert rows["Convpass"]["families"] == "timm, open_clip, transformers"
    assert sizes["CrossAttention"] == "-"


def test_methods_name_the_sites_that_they_take() -> None:
    clf = classifier()
    for method in (vm.CLIPAdapter(sites=("logits",)), vm.TipAdapter(sites=("image.features",))):
        with pytest.raises(vm.InputError, match=r"goes to \('.*',\) of a CLIPClassifier, not to"):
            vm.adapt(clf, method)
    with pytest.raises(vm.InputError, match=r"no site of kind 'image\.features'"):
        vm.adapt(clip(), vm.CLIPAdapter())
