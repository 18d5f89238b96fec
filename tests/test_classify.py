"""vismodal classify and predict end to end on a tiny ViT: what they learn, write, resume, choose and refuse."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import two_processes
from pictures import folder, picture, tiny_vit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import vismodal as vm
from vismodal import cli
from vismodal.callbacks import read_log
from vismodal.classification.classifier import read_classifier, save_classifier
from vismodal.classification.contestants import FACTORS, attach, contestant, contestants, trials
from vismodal.classification.learning import (
    BEST,
    Objective,
    Scores,
    Validation,
    answers,
    best_epoch,
    score,
)
from vismodal.classification.vision import Source, Vision, _check, fresh_head, from_processor, load_vision
from vismodal.data.folder import read_folder
from vismodal.data.photos import read_picture
from vismodal.data.views import PLAIN, Augment, View, Views
from vismodal.draw import shuffled
from vismodal.entries import split, written
from vismodal.errors import InputError
from vismodal.methods import RepAdapter
from vismodal.prefix.frozen import FrozenPrefix
from vismodal.reports.classification import percent
from vismodal.runs import save_config
from vismodal.train import Micro

ROOT = Path(__file__).resolve().parent.parent
classify, prediction = cli.load_pipeline("classify"), cli.load_pipeline("predict")
Config, main = classify.Config, classify.main
WILD = Augment(crop=0.5, flip=True, randaugment=9)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_vit(tmp_path_factory.mktemp("models") / "tiny", dropout=0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def settings(model, data, tmp_path):
    """A short run that uses everything that draws random numbers."""
    return Config(
        data=data, model=str(model), output=tmp_path / "run", method="lora(rank=2, dropout=0.2, lr=1e-2)", epochs=3,
        batch=4, crop=0.6, flip=True, randaugment=5, mixup=0.4, label_smoothing=0.1, shots=3, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def vision(model):
    return load_vision(Source(str(model)), 3)


def best_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob(f"runs/*/{BEST}")))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(path)]


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(model, data, tmp_path_factory):
    """The settings of a comparison that was run."""
    plain = Config(
        data=data, model=str(model), output=tmp_path_factory.mktemp("compared") / "run", threads=1,
        compare=("lora(rank=2); vpt(tokens=2)",), epochs=8, batch=6, learning_rate=2e-2, repeats=2,
    )  # fmt: skip
    main(plain)
    return plain


def test_what_a_comparison_leaves(compared, model):
    out = compared.output
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter.safetensors", "config.yaml", "confusion.png", "curves.png", "metrics.jsonl",
        "report.html", "results.json", "runs", "table.md",
    ]  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["processes"] == 1 and results["classes"] == ["blue", "green", "red"]
    assert [m["method"] for m in results["methods"]] == ["lora(rank=2)", "vpt(tokens=2)"]
    for method in results["methods"]:
        tested = [run["test"]["accuracy"] for run in method["runs"]]
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        assert method["test"]["accuracy"] == pytest.approx(sum(tested) / 2)
        for run in method["runs"]:  # selected and measured are the same epoch's
            chosen = best_epoch(out / run["folder"])
            assert run["epoch"] == chosen["epoch"] and run["val"]["loss"] == pytest.approx(chosen["loss"], abs=1e-5)
        assert method["test"]["deviation"] == pytest.approx(abs(tested[0] - tested[1]) / 2**0.5)
    assert max(method["test"]["accuracy"] for method in results["methods"]) > 0.8  # colours are easy
    assert len(read_log(out / "metrics.jsonl")) == 4 * 16 and (out / "table.md").read_text().count("| vpt") == 1
    best = out / results["best"]
    assert same(load_file(out / "adapter.safetensors"), load_file(best / BEST))

    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    told = "tiny on colours: 3 classes; 12 pictures for training, 6 for validation, 9 for the test; 8 epochs"
    assert told in page and told in card and "<td>method</td>" not in page and "<td>compare</td>" in page
    assert "http" not in re.sub(r"data:image/\w+;base64,[\w+/=]+", "", page) and page.count("data:image/png") == 2
    assert str(model.parent) not in page + card and "lora(rank=2)" in card and "vismodal predict" in card


def test_the_file_alone_gives_what_the_results_say(compared, data, capsys):
    out = compared.output
    results = json.loads((out / "results.json").read_text())
    best = next(r for m in results["methods"] for r in m["runs"] if r["folder"] == results["best"])
    file = str(out / "adapter.safetensors")
    assert cli.main(["predict", "--adapter", file, "--data", str(data / "test"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(best["test"]["accuracy"]) and found["pictures"] == 9
    assert found["confusion"] == best["test"]["confusion"]


def test_predictions_by_hand(compared, model, data, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("no picture")
    file = compared.output / "adapter.safetensors"
    base, classes = load_vision(Source(str(model)), 3), read_classifier(file).classes
    vm.load(base.model, file)
    files = [str(data / "test/red/0.png"), str(tmp_path / "bad.jpg"), str(data / "test/blue/2.png")]
    arguments = ["predict", "--top", "2", "--adapter", str(file), *files]
    assert cli.main(arguments) == 0 and cli.main([*arguments, "--json"]) == 0
    told = capsys.readouterr()
    assert told.err.count("bad.jpg: its content is no jpg") == 2 and told.out.count("%") == 4
    found = json.loads(told.out[told.out.index("[\n") :])
    assert [answer["file"] for answer in found] == [files[0], files[2]]
    for answer in found:
        shares = base.model(base.preprocess(read_picture(Path(answer["file"])))[None]).softmax(1)[0]
        assert [c["class"] for c in answer["classes"]] == [classes[i] for i in shares.topk(2).indices]
        assert answer["classes"][0]["probability"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_what_is_finished_is_not_run_again(compared, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(classify, "fit", never)
    before = load_file(compared.output / "adapter.safetensors")
    main(replace(compared, resume=True))
    assert same(load_file(compared.output / "adapter.safetensors"), before)
    with pytest.raises(AssertionError, match="trained again"):  # another method may join
        main(replace(compared, resume=True, compare=("lora(rank=2)", "bitfit")))
    with pytest.raises(AssertionError, match="trained again"):  # another seed too
        main(replace(compared, resume=True, repeats=3))


def test_resume_is_exact(settings, tmp_path, monkeypatch):
    whole = main(settings)
    calls = 0
    objective = Objective.loss

    def stopping(self, *args):
        inner = objective(self, *args)

        def loss(micro):
            nonlocal calls
            calls += 1
            if calls == 5:  # inside the second epoch
                raise KeyboardInterrupt
            return inner(micro)

        return loss

    cut = replace(settings, output=tmp_path / "cut")
    monkeypatch.setattr(Objective, "loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        main(cut)
    assert not list(cut.output.glob("runs/*/result.json"))
    resumed = main(replace(cut, resume=True))
    assert same(load_file(whole / "adapter.safetensors"), load_file(resumed / "adapter.safetensors"))
    assert same(best_of(whole), best_of(resumed))
    first, second = next(whole.glob("runs/*")), next(resumed.glob("runs/*"))
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert rows(first / name) == rows(second / name) and rows(first / name)
    with pytest.raises(InputError, match=r"cannot be resumed with other settings: mixup was 0\.4"):
        main(replace(cut, resume=True, mixup=0.0))


def test_two_processes_get_what_one_does(data, tmp_path):
    pytest.importorskip("tensorboard")  # whose end must not be that of the process group
    one = Config(
        data=data, model=str(tiny_vit(tmp_path / "plain")), output=tmp_path / "one", epochs=2, batch=4, mixup=0.3,
        learning_rate=1e-3, method="lora(rank=2)", crop=0.7, threads=1,
    )  # fmt: skip
    main(one)
    out = tmp_path / "two"
    save_config(replace(one, output=out, batch=2, track="tensorboard"), tmp_path)
    two_processes("classify", tmp_path / "config.yaml")
    assert json.loads((out / "results.json").read_text())["processes"] == 2
    assert len(list(out.glob("classify-lora-rank-2-*-seed0/events*"))) == 1
    a, b = (load_file(folder / "adapter.safetensors") for folder in (one.output, out))
    assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=2e-4) for name in a)
    losses = [[row["loss"] for row in rows(next(f.glob("runs/*")) / "metrics.jsonl")] for f in (one.output, out)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 6


def test_figures_are_of_the_epoch_that_was_kept(settings, monkeypatch):
    # the first is the best
    monkeypatch.setattr("vismodal.classification.learning._rank", lambda row: (-row["epoch"], 0.0))
    out = main(settings)
    run = json.loads((out / "results.json").read_text())["methods"][0]["runs"][0]
    scored = read_log(out / run["folder"] / "validation.jsonl")
    assert [row["epoch"] for row in scored] == [1, 2, 3] and run["epoch"] == 1
    assert run["val"]["loss"] == pytest.approx(scored[0]["loss"], abs=1e-5)
    assert run["last"]["val"]["loss"] == pytest.approx(scored[2]["loss"], abs=1e-5) and run["last"] != run["val"]


def test_means_and_deviations():
    assert percent([0.5, 0.7]) == "60.0 ± 14.1" and percent([0.25]) == "25.0" and percent([]) == ""


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_methods_with_a_schedule_run_in_the_loop(settings):
    text = "adalora(rank=3, target=1, every=1, warmup=0.1, final=0.3); dylora(rank=4); sparsemask(density=0.1)"
    out = main(replace(settings, compare=(text,), mixup=0.0, epochs=4))
    adalora, dylora, sparse = (next(out.glob(f"runs/{name}-*")) for name in ("adalora", "dylora", "sparsemask"))
    assert all(row["penalty"] > 0 for row in read_log(adalora / "metrics.jsonl"))
    last = load_file(next((adalora / "checkpoints").glob("*.safetensors")))
    kept = torch.cat([t for name, t in last.items() if re.fullmatch(r"adapter\.adalora/.*\.l", name)])
    assert (kept != 0).sum() == len(kept) // 3  # pruned from 3 to 1 for each site
    assert "penalty" not in read_log(dylora / "metrics.jsonl")[0]
    state = load_file(next((dylora / "checkpoints").glob("*.safetensors")))
    assert state["adapter.dylora/shared.drawn"] == vm.DyLoRA(rank=4).drawn(12)
    assert any(name.endswith(".index") for name in load_file(sparse / BEST))


def test_promptsrc_runs_in_the_loop():
    pytest.importorskip("open_clip")
    from clips import classifier

    from vismodal.train import Plan, fit

    clf = classifier().train()
    adapter = vm.adapt(clf, vm.PromptSRC(depth=2, epochs=2, mean=1.0), seed=0)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    before = {name: t.clone() for name, t in adapter.state_dict().items()}

    def loss(micro):
        return {"loss": F.cross_entropy(clf(images), torch.arange(3))}

    outcome = fit(loss, adapter, torch.optim.SGD(adapter.parameters(), lr=0.01), plan=Plan(4))
    assert outcome.metrics["penalty"] > 0
    after = adapter.state_dict()
    prompts = [name for name in after if name.endswith((".P", ".Q"))]
    assert prompts
    for name in prompts:  # at the end the prompts are their own average
        assert torch.equal(after[name], after[f"{name[:-1]}average"]) and not torch.equal(after[name], before[name])


def test_the_head_is_trained_beside_a_method_and_once(vision):
    for text, slots in (
        ("lora", {"lora", "tune"}), ("linearprobe", {"linearprobe"}), ("tune(sites=('*',))", {"tune"}),
        ("vpt + bitfit", {"vpt", "bitfit", "tune"}), ("tune(sites=('norm',))", {"tune", "tune_1"}),
    ):  # fmt: skip
        fresh_head(vision.model, 3, seed=1)
        adapter = attach(contestant(text), vision.model, seed=0)
        try:
            assert {name.partition("/")[0] for name in adapter.modules} == slots
            assert sum(p.numel() for n, p in adapter.named_parameters() if "/head:" in n or "/head." in n) in (99, 0)
            assert any("head" in name for name in adapter.modules)
        finally:
            adapter.detach()
    a = vision.model.head.weight.clone()
    fresh_head(vision.model, 3, seed=1)
    assert torch.equal(a, vision.model.head.weight)
    fresh_head(vision.model, 5, seed=2)
    assert vision.model.head.weight.shape == (5, 32)
    fresh_head(vision.model, 3, seed=0)


def test_groups_do_not_decay_vectors(vision):
    adapter = attach(contestant("bitfit + lora"), vision.model, seed=0)
    groups = adapter.groups(1e-3, 0.1)
    adapter.detach()
    assert all((group["weight_decay"] == 0.1) == (p.dim() > 1) for group in groups for p in group["params"])
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


def test_tune_chooses_by_validation_data_alone(settings, monkeypatch):
    tried = []

    def learn(config, bench, each, seed):
        tried.append((each.lr, each.scale, seed))
        value = 0.9 if len(tried) == 3 else 0.5
        figures = {"val": {"accuracy": value, "loss": 1.0}}
        return classify.Outcome(Path(), each.label, seed, each.lr, each.scale, figures)

    monkeypatch.setattr(classify, "learn", learn)
    bench = SimpleNamespace(accelerator=SimpleNamespace(print=print))
    outcomes = classify.compete(replace(settings, tune=4, repeats=2), bench, contestant("lora"))
    assert len(set(tried)) == 5 and [o.seed for o in outcomes] == [0, 1]
    assert {(o.lr, o.scale) for o in outcomes} == {tried[2][:2]} and tried[0] == (3e-3, 1.0, 0)


def test_trials_scale_what_has_a_scale():
    lora, vpt = trials(contestant("lora(rank=4)"), 9, 0), trials(contestant("vpt"), 99, 0)
    assert lora[0] == contestant("lora(rank=4)") and len({(e.lr, e.scale) for e in lora}) == 9
    assert all(each.scaled[0].alpha == pytest.approx(4 * each.scale) for each in lora[1:] if each.scale != 1)
    assert len(vpt) == len(FACTORS) and all(each.scaled == vpt[0].methods for each in vpt)
    assert contestant("adaptformer").scalable and not contestant("sidetuning").scalable


# -- the loss ----------------------------------------------------------------------------------------------------------


class Means(nn.Module):
    """Logits: the means of the three colours."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.one * x.mean((2, 3))


def test_the_loss_by_hand(vision, data):
    views = Views(read_folder(data).train, vision.config)
    micro = Micro(seed=3, step=2, index=5, rank=1, world=2)
    places = list(micro.positions(4))
    assert places == [44, 45, 46, 47]
    numbers = [shuffled(3, "pictures", 12, p) for p in places]
    x, labels = views.pixels([View(i) for i in numbers]), views.labels[numbers]
    found = Objective(3, 4, smoothing=0.2).loss(Means(), views)(micro)
    logits = x.mean((2, 3)).log_softmax(1)
    by_hand = -(0.8 * logits[range(4), labels] + 0.2 * logits.mean(1)).mean()
    torch.testing.assert_close(found["loss"], by_hand)
    assert found["accuracy"] == (logits.argmax(1) == labels).float().mean()

    mixed = Objective(3, 4, mixup=0.5)
    found, mix = mixed.loss(Means(), views)(micro), mixed._mix(3, micro.positions(4))
    pairs = [1, 0, 3, 2]
    by_hand = torch.zeros(())
    for i, (share, j) in enumerate(zip(mix.share, pairs, strict=True)):
        row = (share * x[i] + (1 - share) * x[j]).mean((1, 2)).log_softmax(0)
        by_hand -= (share * row[labels[i]] + (1 - share) * row[labels[j]]) / 4
    torch.testing.assert_close(found["loss"], by_hand)
    assert "accuracy" not in found and len(set(mix.share.tolist())) == 4
    # rows draw for themselves: two halves are the whole
    halves = [Objective(3, 2, mixup=0.5).loss(Means(), views)(Micro(3, 2, 10, rank=r, world=2)) for r in (0, 1)]
    whole = Objective(3, 4, mixup=0.5).loss(Means(), views)(Micro(3, 2, 10))
    torch.testing.assert_close((halves[0]["loss"] + halves[1]["loss"]) / 2, whole["loss"])


def test_scores_by_hand():
    logits = torch.tensor([[3.0, 0, 0], [0, 3.0, 0], [0, 3.0, 0], [0, 0, 3.0]])
    found = score(logits, torch.tensor([0, 1, 0, 2]))
    assert found.confusion == [[1, 1, 0], [0, 1, 0], [0, 0, 1]] and found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, torch.tensor([0, 1, 0, 2]))))


def test_the_best_epoch_is_kept(vision, tmp_path):
    adapter = attach(contestant("linearprobe"), vision.model, seed=0)
    values = iter([(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1)])
    watch = Validation(lambda: Scores(*(lambda v: (v[0], 0.0, v[1]))(next(values)), []), adapter, tmp_path, 2, 2)
    watch.begin(0, 9)
    for step in range(1, 10):
        with torch.no_grad():
            next(adapter.parameters()).fill_(step)
        watch.after(step, {})
    adapter.detach()
    assert [row["step"] for row in read_log(tmp_path / "validation.jsonl")] == [2, 4, 6, 8, 9]  # the last one too
    assert best_epoch(tmp_path)["step"] == 6
    assert any((tensor == 6).all() for tensor in load_file(tmp_path / BEST).values())


# -- views -------------------------------------------------------------------------------------------------------------


def test_plain_views_are_what_the_model_was_made_for(vision, data):
    items = read_folder(data).train
    views = Views(items, vision.config)
    truth = torch.stack([vision.preprocess(read_picture(item.path)) for item in items])
    assert vision.config["crop_pct"] == 0.9 and vision.config["interpolation"] == "bilinear"
    assert torch.equal(views.pixels([View(i) for i in range(12)]), truth) and truth.shape == (12, 3, 16, 16)
    assert torch.equal(Views(items, vision.config, keep=0).pixels([View(3)]), truth[3:4])
    assert {views.at(0, p).version for p in range(40)} == {0}


def test_augmented_views_follow_from_their_keys(vision, data):
    items = read_folder(data).train
    views, again = (Views(items, vision.config, WILD, seed=5) for _ in range(2))
    state = torch.get_rng_state()
    one, two = views.pixels([View(2, 0), View(2, 1)])
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(again.pixels([View(7, 3), View(2, 1)])[1], two) and not torch.equal(one, two)
    assert not torch.equal(Views(items, vision.config, WILD, seed=6).pixels([View(2, 0)])[0], one)
    assert [views.at(0, p).version for p in (0, 11, 12, 36)] == [0, 0, 1, 3]
    three = Views(items, vision.config, replace(WILD, copies=3))
    assert {three.at(0, p).version for p in range(100)} == {0, 1, 2}
    assert views.key(View(2, 0)) != views.key(View(2, 1))
    assert Views(items, vision.config).key(View(2)) == (items[2].content,)
    flipped = Views(items, vision.config, Augment(flip=True)).pixels([View(0, v) for v in range(8)])
    plain = Views(items, vision.config, PLAIN).pixels([View(0)])[0]
    assert all(torch.equal(x, plain) or torch.equal(x, plain.flip(-1)) for x in flipped)
    assert len({float(x[0, 0, 0]) for x in flipped}) == 2


def test_a_cached_prefix_gives_the_same(vision, data):
    adapter = attach(contestant("lora(layers=slice(-1, None)) + linearprobe"), vision.model, seed=0)
    vision.model.eval()
    try:
        views = Views(read_folder(data).train, vision.config)
        cached = FrozenPrefix(vision.model)
        plain = answers(vision.model, views, 5)
        for _ in range(2):
            torch.testing.assert_close(answers(cached, views, 5), plain, atol=1e-6, rtol=1e-5)
        losses = [Objective(3, 4).loss(run, views)(Micro(0, 0, 1))["loss"] for run in (vision.model, cached)]
        torch.testing.assert_close(*losses)
    finally:
        adapter.detach()


# -- transformers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "crop"), [(224, 224 / 256), (96, 0.9), (384, 0.875)])
def test_convnext_cuts_below_384_pixels_and_squashes_above(size, crop):
    transformers = pytest.importorskip("transformers")
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": size}, crop_pct=crop)
    vision = Vision(nn.Identity(), from_processor(processor))
    _check(processor, vision)
    image = picture((200, 30, 90), 0, (640, 480)).resize((200, 160))
    truth = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert truth.shape == (3, size, size) and (vision.preprocess(image) - truth).abs().mean() < 0.02
    processor.crop_pct = 0.7  # something that the settings did not tell
    if size < 384:
        with pytest.raises(InputError, match="ConvNextImageProcessor does to a picture is not supported"):
            _check(processor, vision)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_transformers_models_and_their_preprocessing(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    small |= {"image_size": 24, "patch_size": 8}
    if kind == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, num_labels=7))
        processor = transformers.ViTImageProcessor(size={"height": 24, "width": 24})
    else:
        model = transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=small))
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 26}, crop_size={"height": 24, "width": 24})
    model.save_pretrained(tmp_path / "m"), processor.save_pretrained(tmp_path / "m")
    vision = load_vision(Source(str(tmp_path / "m")), 3)
    image = picture((200, 30, 90), 0, (56, 40))  # an even rest to cut off: of an odd one, another side keeps a pixel
    truth = processor(images=image, return_tensors="pt")["pixel_values"][0]
    mine = vision.preprocess(image)
    assert mine.shape == truth.shape and (mine - truth).abs().max() < 0.03  # a level of 255: PIL's rounding
    fresh_head(vision.model, 3, seed=0)
    adapter = attach(contestant("lora"), vision.model, seed=0)
    items = read_folder(folder(tmp_path / "d")).train
    loss = Objective(3, 4).loss(vision.model, Views(items, vision.config))
    loss(Micro(0, 0, 0))["loss"].backward()
    assert adapter.unused() == []


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    assert cli.main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_bad_input_is_one_line_and_leaves_no_trace(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    good = ("classify", "--data", data, "--model", model, "--output", out)
    assert "no method 'lorra'" in refused(capsys, *good, "--method", "lorra")
    assert "has no option 'rnk'" in refused(capsys, *good, "--compare", "lora(rnk=2); ssf")
    assert "the same: lora" in refused(capsys, *good, "--compare", "lora; lora")
    assert "xattn.q" in refused(capsys, *good, "--method", "tune(sites=('xattn.q',))")
    assert "clip must be at least 0, not -1" in refused(capsys, *good, "--clip", "-1")
    assert "threads must be at least 1, not 0" in refused(capsys, *good, "--threads", "0")
    assert "image_size must be at least 1, not 0" in refused(capsys, *good, "--image_size", "0")
    assert "nothing to keep; leave out mixup" in refused(capsys, *good, "--cache", "--mixup", "0.2")
    assert "nothing to keep; write copies=4" in refused(capsys, *good, "--cache", "--flip")
    assert "would all be alike; write crop" in refused(capsys, *good, "--copies", "3")
    place = tmp_path / "no/model"
    assert f"there is no folder {place}; write where" in refused(capsys, *good[:3], "--model", place)
    assert "mixup mixes pairs" in refused(capsys, *good, "--mixup", "0.2", "--batch", "3")
    assert "crop must be" in refused(capsys, *good, "--crop", "0")
    assert "must be above 0, and leave" in refused(capsys, *good, "--val", "0.6", "--test", "0.5")
    assert "did you mean" in refused(capsys, "classify", "--data", data, "--model", "vit_base_patch16_22")
    assert "there is no checkpoint" in refused(capsys, *good, "--weights", tmp_path / "none")
    assert "holds no config.json" in refused(capsys, "classify", "--data", data, "--model", data)
    assert f"there is no folder {out}" in refused(capsys, "classify", "--data", out, "--model", model)
    assert not out.exists()


def test_predict_refuses_what_does_not_fit(model, data, tmp_path, capsys):
    vision = load_vision(Source(str(model)), 3)
    adapter = attach(contestant("linearprobe"), vision.model, seed=0)
    file = save_classifier(adapter, tmp_path / "a.safetensors", Source(str(model)), vision, ("blue", "green", "red"))
    wrong = save_classifier(adapter, tmp_path / "w.safetensors", Source(str(model)), vision, ("blue", "green"))
    other = vm.save(adapter, tmp_path / "o.safetensors")
    adapter.detach()
    image = data / "test/red/0.png"
    assert "the adapter is missing" in refused(capsys, "predict", image)
    assert "no pictures" in refused(capsys, "predict", "--adapter", file)
    assert "is no classifier" in refused(capsys, "predict", "--adapter", other, image)
    assert "w.safetensors does not fit" in refused(capsys, "predict", "--adapter", wrong, image)
    assert "none of the files" in refused(capsys, "predict", "--adapter", file, tmp_path / "none.jpg")
    strange = folder(tmp_path / "d", {"": 2}, {"red": (255, 0, 0), "teal": (0, 128, 128)})
    line = refused(capsys, "predict", "--adapter", file, "--data", strange)
    assert "has 'teal', which the adapter does not know and lacks 'blue'" in line
    line = refused(capsys, "predict", "--adapter", file, "--data", data)
    assert "has 'test', which the adapter does not know and lacks 'blue'" in line
    assert line.endswith(f"perhaps you mean {data / 'test'}")
    assert "give one" in refused(capsys, "predict", "--adapter", file, "--data", strange, image)
    gone = folder(tmp_path / "d", {"": 2}, {"red": (255, 0, 0), "blue": (0, 128, 128)})
    (tmp_path / "moved").mkdir()
    assert "holds no config.json" in refused(capsys, "predict", "--adapter", file, "--model", tmp_path / "moved", image)
    assert cli.main(["predict", "--adapter", str(file), str(gone / "red"), str(image)]) == 0
    assert capsys.readouterr().out.count(".png") == 3  # a folder's pictures, and one by name


def test_another_base_is_warned_of(compared, data, tmp_path, capsys):
    other = tiny_vit(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in state.items()}, other / "model.safetensors")
    file, image = str(compared.output / "adapter.safetensors"), str(data / "test/red/0.png")
    assert cli.main(["predict", "--adapter", file, "--model", str(other), image]) == 0
    told = capsys.readouterr().err
    assert "warning: " in told and "same shapes, other values; the answers may be wrong" in told
    assert cli.main(["predict", "--adapter", file, image]) == 0
    assert "warning" not in capsys.readouterr().err


def test_odd_pictures_go_all_the_way_with_cache_and_bf16(model, tmp_path):
    classes = {"café": (220, 40, 40), "日本": (40, 60, 200)}
    root = folder(tmp_path / "d", classes=classes)
    picture((210, 50, 50), 9, (40, 22)).convert("CMYK").save(root / "train/café/cmyk.jpg")
    Image.new("I;16", (30, 20), 40000).save(root / "train/日本/sixteen.png")
    (root / "train/日本/broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    config = Config(
        data=root, model=str(model), output=tmp_path / "run", epochs=2, batch=4, threads=1, cache=True,
        method="lora(layers=slice(-1, None))", mixed_precision="bf16",
    )  # fmt: skip
    out = main(config)
    results = json.loads((out / "results.json").read_text())
    assert results["classes"] == sorted(classes) and len(results["notes"]) == 1
    assert "train/日本/broken.jpg: truncated or corrupt" in results["notes"][0]
    page = (out / "report.html").read_text()
    assert "café" in page and "broken.jpg" in page
    assert read_classifier(out / "adapter.safetensors").classes == tuple(sorted(classes))


# -- texts -------------------------------------------------------------------------------------------------------------


def test_methods_as_they_are_written():
    assert split("lora; vpt(dropout=0, tokens=4),ssf ;") == ["lora", "vpt(dropout=0, tokens=4)", "ssf"]
    assert split("tune(sites=('a;b',)) + lora(rank=1e+1)", "+") == ["tune(sites=('a;b',))", "lora(rank=1e+1)"]
    read = written("LoRA(rank=4, layers=slice(-4, None), rank_stabilised=True, lr=1)")
    assert read.make() == vm.LoRA(rank=4, layers=slice(-4, None), rank_stabilised=True) and read.own == {"lr": 1.0}
    assert written("repadapter(bias=FALSE)").make() == RepAdapter(bias=False)
    assert [each.label for each in contestants(("lora, ssf", "bitfit"))] == ["lora", "ssf", "bitfit"]
    assert contestant("lora + bitfit").lr == 3e-3 and contestant("lora(lr=2e-3) + bitfit").lr == 2e-3
    assert [each.lr for each in contestants(("lora(lr=2e-3); vpt",), 7e-4)] == [2e-3, 7e-4]  # what is written wins
    assert contestant("lora(rank=2, lr=1e-3)").slug == "lora-rank-2-lr-1e-3"
    told_apart = ("lora(layers=slice(-1, None))", "lora(layers=slice(1, None))", "lora(where='a*')", "lora(where='a?')")
    assert len({contestant(text).slug for text in told_apart}) == 4
    assert len(contestant(f"lora(where='{'a' * 300}')").slug) < 100
    with pytest.raises(InputError, match="write one lr"):
        contestant("lora(lr=1e-3) + bitfit(lr=1e-2)")
    with pytest.raises(InputError, match="lr must be a number above 0, not True"):
        written("lora(lr=true)")
    with pytest.raises(InputError, match="describes no method"):
        written("lora(rank=__import__('os'))")


def test_help_shows_examples_and_positions_are_taken(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    told = capsys.readouterr().out
    assert (
        "vismodal predict --adapter runs/classify-1/adapter.safetensors a.jpg b.png" in told and "[images ...]" in told
    )
    config = cli.parse(prediction.Config, "x", ["a.jpg", "--top", "2", "b c.jpg", "--json", "--adapter", "f", "d.png"])
    assert config == prediction.Config(Path("f"), (Path("a.jpg"), Path("b c.jpg"), Path("d.png")), top=2, json=True)
