"""What few-shot adaptation is made of: the methods by name, the halves of the classes, searches, cached features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import classifier
from PIL import Image
from torch.nn import functional as F
from zoo import shake

import vismodal as vm
from vismodal.data.folder import Item
from vismodal.data.pictures import Pictures, cropped
from vismodal.fewshot.data import Copies, Inputs, Part
from vismodal.fewshot.recipes import (
    RECIPES,
    check_classes,
    contestant,
    halves,
    harmonic,
    linear_probe,
    search_scale,
    shallow,
)

# -- the methods by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_method_attaches_to_both_libraries(name: str, library: str) -> None:
    clf = classifier(f"{library}-CLIP", "a photo of a {}.")
    entry = contestant(name, library, shallow(clf.model))
    assert entry.label == entry.slug == name
    if entry.method is None:
        assert name in ("zero-shot", "linear-probe") and entry.lr == 0
        return
    adapter = vm.adapt(clf, entry.method)
    if name in ("vpt", "wise-ft"):
        assert all("visual" in key or "vision_model" in key for key in adapter.modules)
    assert (entry.lr == 0) == (name == "tip-adapter")
    adapter.detach()


def test_names_options_and_what_is_not_there() -> None:
    assert contestant("CLIP_LoRA", "open_clip", 2).method == contestant("clip-lora", "open_clip", 2).method
    entry = contestant("clip-lora(rank=4, lr=2e-3, search='scale')", "open_clip", 2)
    assert (entry.method.rank, entry.method.alpha, entry.lr, entry.search) == (4, 1, 2e-3, "scale")  # type: ignore[union-attr]
    assert contestant("maple", "open_clip", 3).method.depth == 3  # type: ignore[union-attr]
    assert contestant("maple(depth=2)", "open_clip", 3).method.depth == 2  # type: ignore[union-attr]
    assert contestant("houlsby", "open_clip", 3).method == vm.Houlsby()
    for text, message in {
        "loar": "no method 'loar'; write one of zero-shot, coop",
        "coop(width=3)": "coop has no option 'width'",
        "zero-shot(lr=1)": "zero-shot has no options",
        "coop(search='scale')": 'search can be "" here',
        "clip-lora(search='cache')": 'search can be "scale" here',
        "coop(lr=-1)": "lr must be a number above 0",
        "coop(": "describes no method",
        "coop; maple": "is not one method; write several with --compare",
        "clip-lora(weight_decay=-1)": "weight_decay must be a number of at least 0, not -1",
        "clip-lora(weight_decay='a')": "weight_decay must be a number",
        "tip-adapter(lr=1e-3)": "nothing is trained in tip-adapter; write tip-adapter-f",
        "tip-adapter(train_keys=True)": "nothing is trained in tip-adapter; write tip-adapter-f",
    }.items():
        with pytest.raises(vm.InputError, match=message.replace("(", r"\(")):
            contestant(text, "open_clip", 2)


def test_a_rate_for_all_gives_way_to_one_of_its_own() -> None:
    rates = {text: contestant(text, "open_clip", 2, lr=0.5).lr for text in ("coop", "coop(lr=0.1)", "tip-adapter")}
    assert rates == {"coop": 0.5, "coop(lr=0.1)": 0.1, "tip-adapter": 0.0}


def test_who_knows_only_its_own_classes() -> None:
    tied = [name for name in RECIPES if contestant(name, "open_clip", 2).tied]
    assert tied == ["tip-adapter", "tip-adapter-f", "linear-probe"]
    assert contestant("coop(per_class=True)", "open_clip", 2).tied
    assert contestant("tip-adapter-f(search='')", "open_clip", 2).tied


# -- classes ---------------------------------------------------------------------------------------------------------


def test_halves_and_their_mean() -> None:
    assert halves("abcde") == ([0, 1, 2], [3, 4])
    assert halves("abcd") == ([0, 1], [2, 3])
    with pytest.raises(vm.InputError, match="two classes in each half; there are 3"):
        halves("abc")
    assert harmonic(0.8, 0.4) == pytest.approx(2 * 0.8 * 0.4 / 1.2)
    assert harmonic(0.0, 0.0) == 0.0


def test_other_classes_are_told_or_refused() -> None:
    file = Path("a.safetensors")
    assert check_classes(["a", "b"], ["a", "b"], file, tied=True) == ""
    note = check_classes(["a", "b"], ["b", "c"], file, tied=False)
    assert "it lacks 'c'" in note and "it has besides 'a'" in note
    with pytest.raises(vm.InputError, match=r"made for 2 classes and knows no others; the 3 given .* it lacks 'c'"):
        check_classes(["a", "b"], ["a", "b", "c"], file, tied=True)
    with pytest.raises(vm.InputError, match="the order differs"):
        check_classes(["a", "b"], ["b", "a"], file, tied=True)


# -- features that are computed once -------------------------------------------------------------------------------


def noise(folder: Path, n: int = 5, size: int = 40) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def plain(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 127.5 - 1


def double(image: Image.Image) -> torch.Tensor:
    return plain(image).double()


@pytest.mark.parametrize("name", ["open_clip-CLIP", "transformers-CLIP"])
@pytest.mark.parametrize(
    "method",
    [vm.CoOp(tokens=2), vm.CoCoOp(words="a photo"), vm.CLIPAdapter(), vm.TipAdapter(shots=2)],
    ids=lambda m: type(m).__name__,
)
def test_features_are_as_good_as_pictures(method: Any, name: str, tmp_path: Path) -> None:
    """The same loss and the same gradients."""
    found = []
    for once in (True, False):
        clf = classifier(name)
        adapter = vm.adapt(clf, method, seed=0)
        shake(adapter, 0.3)
        clf.train()
        inputs = Inputs(Pictures(noise(tmp_path), double), clf, Copies(3, 32, seed=1))
        assert inputs.features is not None and inputs.features.shape[:2] == (5, 3)
        if not once:
            inputs.features = None
        x = inputs.batch([4, 0, 4], [2, 1, 0])
        assert x.dim() == (2 if once else 4)
        loss = F.cross_entropy(clf(x), torch.tensor([0, 2, 1]))
        if any(True for _ in adapter.parameters()):
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in adapter.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "method", [vm.LoRA(), vm.IVLP(sites=("tokens",)), vm.Tune(sites=("norm",), where="model.visual*")]
)
def test_what_acts_on_pictures_gets_pictures(method: Any, tmp_path: Path) -> None:
    clf = classifier()
    adapter = vm.adapt(clf, method)
    assert not clf.keeps_images
    inputs = Inputs(Pictures(noise(tmp_path, 2), double), clf)
    assert inputs.features is None and inputs.batch([1, 0]).shape == (2, 3, 32, 32)
    adapter.detach()
    assert clf.keeps_images


LAST = {
    "open_clip-CLIP": "model.visual.transformer.resblocks.1*",
    "transformers-CLIP": "model.vision_model.encoder.layers.1*",
    "transformers-SigLIP": "model.vision_model.encoder.layers.1*",
}


@pytest.mark.parametrize("name", LAST)
@pytest.mark.parametrize("count", [0, 2])
def test_the_last_block_is_trained_from_what_comes_before_it(name: str, count: int, tmp_path: Path) -> None:
    """The same losses and gradients as from pictures, dropout and text side included; each picture is read once."""
    found = []
    for fill in (True, False):
        clf = classifier(name)
        method = vm.LoRA(sites=("attn.q", "mlp.up"), where=LAST[name], rank=2, dropout=0.3)
        adapter = vm.adapt(clf, [method, vm.CoOp(tokens=2)], seed=0)
        shake(adapter, 0.3)
        clf.train()
        inputs = Inputs(Pictures(noise(tmp_path), double), clf, Copies(count, 32, seed=1))
        if fill:
            inputs.fill(clf, 99)
            assert inputs.prefix is not None and inputs.prefix.share > 0.3
            assert len(inputs.prefix) == 5 * max(1, count)
            inputs.pictures.batch = inputs.pictures.augmented = None  # type: ignore[assignment, method-assign]
        grads = []
        for items, copies in (([4, 0, 4], [1, 1, 0]), ([2, 1], [0, 1])):
            torch.manual_seed(7)
            loss = F.cross_entropy(
                clf(inputs.batch(items, copies if count else None)), torch.tensor([0, 2, 1])[: len(items)]
            )
            grads += [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]
        found.append(grads)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*found, strict=True))


def test_what_reads_pictures_or_is_soon_over_keeps_nothing(tmp_path: Path) -> None:
    """PromptSRC compares with the base on the same pictures, which features that have passed its prompts are not."""
    for method, reads in ((vm.PromptSRC(depth=2), 99), (vm.LoRA(where=LAST["open_clip-CLIP"]), 9)):
        clf = classifier()
        vm.adapt(clf, method, seed=0)
        clf.train()
        inputs = Inputs(Pictures(noise(tmp_path), double), clf)
        inputs.fill(clf, reads)
        assert inputs.prefix is None and inputs.batch([1]).dim() == 4


def test_text_side_methods_leave_the_image_side_alone() -> None:
    clf = classifier()
    vm.adapt(clf, vm.LoRA(where="model.transformer*"))
    assert clf.keeps_images and not clf.keeps_text
    clf = classifier()
    vm.adapt(clf, vm.LoRA(where="model.visual*"))
    assert clf.keeps_text and not clf.keeps_images


def test_pictures_are_kept_up_to_a_cap_and_augmented_by_key(tmp_path: Path) -> None:
    paths = noise(tmp_path, 3)
    one = plain(Image.open(paths[0])).numel() * 4
    pictures = Pictures(paths, plain, keep=2 * one)
    first = pictures.batch([2, 0, 1, 2])
    assert len(pictures.kept) == 2 and torch.equal(first[0], first[3])
    assert torch.equal(pictures.batch([2, 0, 1, 2]), first)
    with Image.open(paths[0]) as image:
        rgb = image.convert("RGB")
    a, b, c = (np.array(cropped(rgb, 32, 0, "x", i)) for i in (1, 1, 2))
    assert a.shape == (32, 32, 3) and (a == b).all() and (a != c).any()


def test_accuracy_of_a_part_counts_its_own_labels(tmp_path: Path) -> None:
    clf = classifier()

    class Model:
        preprocess = staticmethod(double)

    paths = noise(tmp_path)
    items = [Item(path, label, "") for path, label in zip(paths, (0, 3, 5, 5, 4), strict=True)]
    part = Part(items, [3, 5, 0], Model())  # type: ignore[arg-type]
    assert part.labels.tolist() == [2, 0, 1, 1] and len(part.pictures) == 4
    with torch.no_grad():
        answers = clf(part.pictures.batch(range(4))).argmax(-1)
    assert part.accuracy(clf) == (answers == part.labels).float().mean().item()


# -- searches --------------------------------------------------------------------------------------------------------


class Scaled:
    scale = 1.0


def test_the_scale_is_the_first_of_the_best() -> None:
    adapter: Any = Scaled()
    scores = {0.0: 0.2, 0.3: 0.9, 0.6: 0.9, 1.0: 0.5}
    found = search_scale(adapter, lambda: scores[adapter.scale], tuple(scores))
    assert found == (0.3, scores) and adapter.scale == 0.3


def probe_data(classes: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    labels = (torch.arange(n) % (classes + 1)).clamp(max=classes - 1)  # the last has twice as many
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.8 * torch.randn(n, 6), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_linear_probe_is_sklearns_best_on_validation_data(classes: int) -> None:
    from sklearn.linear_model import LogisticRegression

    train, val, strengths = probe_data(classes, 60, 0), probe_data(classes, 90, 1), (1e-4, 1e-2, 1.0)
    found = linear_probe(train, val, classes, strengths)
    right = {}
    for c in strengths:
        theirs = LogisticRegression(C=c, max_iter=1000).fit(*(t.double().numpy() for t in train))
        right[c] = theirs.score(*(t.double().numpy() for t in val))
    assert found.accuracy == max(right.values()) and found.strength == max(right, key=lambda c: right[c])
    assert found.weight.shape == (classes, 6) and found.right(*val) == found.accuracy
    assert len(set(right.values())) > 1, "the data must tell them apart"


def test_wise_ft_of_a_merged_lora_interpolates_the_weights() -> None:
    """WiSE(a) = W0 + a dW, live and merged."""
    clf = classifier()
    W0 = clf.model.visual.transformer.resblocks[0].mlp.c_fc.weight.detach().clone()
    adapter = vm.adapt(clf, vm.LoRA(sites=("mlp.up",), where="model.visual*", rank=2), seed=0)
    shake(adapter, 0.3)
    m = next(m for key, m in adapter.modules.items() if "resblocks.0." in key)
    adapter.scale = 0.4
    adapter.merge()
    W = clf.model.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert torch.allclose(W, W0 + 0.4 * (m.B @ m.A).double(), atol=1e-7)
    assert not torch.allclose(W, W0, atol=1e-4)
