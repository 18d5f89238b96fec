"""`vismodal clip pairs` end to end on the embedded CLIP and drawn pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from launching import two_processes
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from zoo import close

import vismodal as vm
from vismodal import cli
from vismodal.callbacks import read_log
from vismodal.checkpoint import read
from vismodal.contrastive import batches
from vismodal.contrastive.loss import sigmoid
from vismodal.errors import InputError
from vismodal.paths import asset
from vismodal.pretrained import hub_name, load_clip
from vismodal.runs import save_config

pipeline = cli.load_pipeline("clip_pairs")
Config, main = pipeline.Config, pipeline.main
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("circle", "square")


@pytest.fixture(scope="module", autouse=True)
def embedded() -> None:
    try:
        asset("tiny-clip")
    except InputError:
        pytest.skip("this checkout has no assets/tiny-clip")


def draw(path: Path, colour: str, shape: str, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "white")
    box = (size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
    image.save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of unequal sizes with two captions each, and one with a torn file."""
    root = tmp_path_factory.mktemp("pairs")
    rows = []
    for i, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        draw(root / f"{colour} {shape}.png", colour, shape, (64 + 5 * i, 90 - 3 * i))
        rows.append({"file_name": f"{colour} {shape}.png", "text": [f"a {colour} {shape}", f"a {shape} in {colour}"]})
    (root / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    rows.append({"file_name": "torn.jpg", "text": "nothing"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("other")
    for part in ("train", "val", "test"):
        for colour in ("red", "blue"):
            for i in range(2):
                draw(root / part / colour / f"{i}.png", colour, SHAPES[i], (64 + i + len(part), 70))
    return root


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Any:
    return Config(
        pairs=data, output=tmp_path / "run", held_out=0.25, batch=4, steps=4, learning_rate=3e-3, warmup=1,
        augment=True, method="lora(rank=2, dropout=0.2)", learn_scale=True, save_every=0,
    )  # fmt: skip


def test_two_processes_get_what_one_does(settings: Any) -> None:
    """Two pictures of each batch on each; the contrast is with the batch's pictures on both."""
    settings = replace(settings, method="lora(rank=2)", augment=False, steps=3)
    main(settings)
    out = settings.output.parent / "two"
    save_config(replace(settings, output=out, threads=1), out.parent)
    two_processes("clip pairs", out.parent / "config.yaml")
    losses = [[row["loss"] for row in read_log(f / "metrics.jsonl")] for f in (settings.output, out)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 3
    mine, theirs = (load_file(f / "adapter.safetensors") for f in (settings.output, out))
    assert mine.keys() == theirs.keys() and all(torch.allclose(mine[n], theirs[n], atol=2e-4) for n in mine)


def rows(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder / "metrics.jsonl")]


def features(model: Any, x: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            return [model.encode_image(x), model.encode_text(ids), model.logit_scale.exp()]
        found = [model.get_image_features(x), model.get_text_features(ids)]
        return [f if isinstance(f, torch.Tensor) else f.pooler_output for f in found] + [model.logit_scale.exp()]


def test_what_a_run_leaves_and_that_both_exports_compute_the_same(
    settings: Any, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = main(replace(settings, retain=other, alphas=(0.0, 0.5, 1.0)))
    out = settings.output
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter.safetensors", "checkpoints", "config.yaml", "loss.png", "metrics.jsonl", "open_clip",
        "results.json", "retention.png", "transformers",
    ]  # fmt: skip
    told = capsys.readouterr()
    assert "skipped torn.jpg: truncated or corrupt" in told.err
    assert "on 9 pictures with 18 captions; 3 pictures with 6 captions for retrieval" in told.out
    assert [row["alpha"] for row in result.sweep] == [0.0, 0.5, 1.0]
    keys = {"alpha", "zero-shot", *(f"{a} R@{k}" for a in ("text to image", "image to text") for k in (1, 5, 10))}
    assert all(row.keys() == keys for row in result.sweep)
    assert all(row["text to image R@5"] == 1.0 for row in result.sweep)  # of three pictures
    assert json.loads((out / "results.json").read_text())["sweep"] == result.sweep
    card = (out / "README.md").read_text()
    assert "on 9 pictures with 18 captions. In percent, on\n3 pictures with 6 captions" in card
    assert "retention.png" in card and str(settings.pairs) not in card and "| alpha |" in card

    # the model that trained, and the two that were exported, on other pictures and texts
    model, _, tokenizer = vm.models.load("tiny-clip")
    x, ids = torch.randn(3, 3, 64, 64), tokenizer(["a red circle", "two dogs", "夏"])
    base = features(model, x, ids)
    adapter = vm.load(model, out / "adapter.safetensors")
    live = features(model, x, ids)
    assert not close(live[0], base[0], 1e-3) and not close(live[1], base[1], 1e-3)
    mine, _ = open_clip.create_model_from_pretrained(f"local-dir:{out / 'open_clip'}")
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{out / 'open_clip'}")(["a dog"]), tokenizer(["a dog"]))
    from transformers import CLIPModel, CLIPProcessor

    theirs = CLIPModel.from_pretrained(out / "transformers")
    for exported in (mine.eval(), theirs):
        found = features(exported, x, ids)
        assert all(close(a, b, 1e-5) for a, b in zip(found[:2], live[:2], strict=True))
        assert not close(found[2], base[2], 1e-6), "the temperature was learnt"
    assert CLIPProcessor.from_pretrained(out / "transformers") is not None
    adapter.detach()
    assert all(torch.equal(a, b) for a, b in zip(features(model, x, ids), base, strict=True))


def test_a_model_of_transformers_is_exported_for_transformers(settings: Any) -> None:
    main(replace(settings, library="transformers", steps=1, augment=False, alphas=(1.0,)))
    from transformers import CLIPModel

    twin, _ = vm.models.load("tiny-clip", library="transformers")
    vm.load(twin, settings.output / "adapter.safetensors")
    theirs = CLIPModel.from_pretrained(settings.output / "transformers")
    x, ids = torch.randn(2, 3, 64, 64), torch.randint(1, 3000, (2, 32))
    both = zip(features(theirs, x, ids)[:2], features(twin, x, ids)[:2], strict=True)
    assert all(close(a, b, 1e-5) for a, b in both)
    assert not (settings.output / "open_clip").exists()


WORDS = ("[PAD]", "[UNK]", "</s>", "a", "in", "many", "words", "photo", "of", *COLOURS, *SHAPES)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a SigLIP of the Hub has it, small and untrained, with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel, SiglipProcessor
    from transformers import SiglipImageProcessorPil as Pixels

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="</s>", model_max_length=8
    )
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    text = {**tower, **ids, "max_position_embeddings": 8, "projection_size": 32}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16}))
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-3.0)
    out = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(out)
    SiglipProcessor(Pixels(size={"height": 32, "width": 32}), fast).save_pretrained(out)
    return out


def test_siglip_learns_by_its_own_loss_and_is_exported(
    settings: Any, siglip: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "lora(rank=2, sites=('attn.*', 'mlp.*'))"
    given = replace(settings, model=str(siglip), method=method, steps=12, batch=8, learning_rate=3e-2, augment=False)
    main(replace(given, retain=other, alphas=(1.0,), part=3))
    capsys.readouterr()
    out = settings.output
    loss = [row["loss"] for row in rows(out)]
    assert sum(loss[-3:]) < 0.95 * sum(loss[:3])
    header = json.loads(read(out / "adapter.safetensors")[0]["temperature"])
    assert float(header["scale"]) != 2.0 and float(header["bias"]) != -3.0, "both were learnt"

    from transformers import AutoProcessor, SiglipModel

    theirs, processor = SiglipModel.from_pretrained(out / "transformers"), AutoProcessor.from_pretrained(siglip)
    base = SiglipModel.from_pretrained(siglip)
    assert theirs.logit_bias.item() == pytest.approx(float(header["bias"]), rel=1e-6)
    assert AutoProcessor.from_pretrained(out / "transformers") is not None
    images = [Image.open(p).convert("RGB") for p in sorted(settings.pairs.glob("*.png"))[:8]]
    given = processor(text=[p.stem for p in sorted(settings.pairs.glob("*.png"))[:8]], images=images,
                      padding="max_length", return_tensors="pt")  # fmt: skip
    x, ids = given["pixel_values"], given["input_ids"]
    live = vm.load(base, out / "adapter.safetensors")
    assert all(close(a, b, 1e-5) for a, b in zip(features(theirs, x, ids)[:2], features(base, x, ids)[:2], strict=True))
    losses = []
    for model in (theirs, base):  # SigLIP's own, at the temperature that was learnt
        with torch.no_grad():
            out_ = model(input_ids=ids, pixel_values=x)
            losses.append(sigmoid(out_.image_embeds, out_.text_embeds, theirs.logit_scale.exp(), theirs.logit_bias))
    assert close(losses[0], losses[1], 1e-5)
    with torch.no_grad():
        assert close(theirs(input_ids=ids, pixel_values=x, return_loss=True).loss, losses[0], 1e-5)
    live.detach()


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_weights_get_the_activation_that_they_were_trained_with(
    tag: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's under ViT-B-32, whose architecture has another one: the model, and what is written of it."""
    asked: dict[str, Any] = {}
    model, preprocess, _ = vm.models.load("tiny-clip")

    def create(arch: str, **options: Any) -> tuple[Any, Any]:
        asked.update(options)
        return model, preprocess

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    found = load_clip(f"ViT-B-32/{tag}")
    assert asked["force_quick_gelu"] == quick
    assert found.config is not None and found.config["model_cfg"].get("quick_gelu", False) == quick


def test_a_card_names_a_repository_only_where_there_is_one(tmp_path: Path) -> None:
    assert hub_name("google/siglip-base-patch16-224") == "google/siglip-base-patch16-224"
    assert hub_name("hf-hub:laion/CLIP-ViT-B-32") == "laion/CLIP-ViT-B-32"
    assert [hub_name(s) for s in (None, "ViT-B-32/laion2b_s34b_b79k", str(tmp_path))] == [None, None, None]


def test_models_that_cannot_be_taken(siglip: Path, tmp_path: Path) -> None:
    for source, library, message in (
        ("hf-hub:A/B", "transformers", "is a model of open_clip, and library is transformers"),
        ("ViT-B-32/openai", "transformers", "is a model of open_clip"),
        ("A/B", "open_clip", "write hf-hub:A/B for open_clip's"),
        ("ViT-B-32/none", None, "open_clip has no weights 'none' of ViT-B-32; write ViT-B-32/TAG"),
        (str(tmp_path), None, "holds no open_clip_config.json and no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            load_clip(source, library)  # type: ignore[arg-type]
    alone = shutil.copytree(siglip, tmp_path / "alone")
    (alone / "processor_config.json").unlink()
    with pytest.raises(InputError, match="alone"):
        load_clip(str(alone))


def test_doubtful_pairs_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "doubtful"
    for name in ("a.png", "b.png", "c.png"):
        draw(root / name, "red", "circle", (64 + ord(name[0]), 64))
    table = [{"file_name": n, "text": ["a red circle", ""]} for n in ("a.png", "b.png", "c.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    (root / "train").mkdir()  # the table is beside it, and counts
    short = ("--pairs", root, "--val", root, "--batch", 2, "--output", tmp_path / "out", "--steps", 1)
    assert cli.main(["clip", "pairs", *map(str, short), "--alphas", "1.0"]) == 0
    told = capsys.readouterr()
    assert "note: metadata.jsonl: 3 empty captions are left out, the first in line 1" in told.err
    assert "train: 1 captions are at several pictures, 'a red circle' at 3; in one batch" in told.err
    assert "3 pictures of val are in train too, byte for byte" in told.err
    assert str(tmp_path / "out" / "open_clip") in told.out and "PATH" not in told.out


def test_a_stopped_run_goes_on_to_the_bit(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(settings)
    whole = load_file(settings.output / "adapter.safetensors")
    stopped = replace(settings, output=tmp_path / "stopped")
    plain = batches.row_at

    def interrupt(seed: int, size: int, batch: int, position: int) -> int:
        if position == 2 * batch + 1:
            raise KeyboardInterrupt
        return plain(seed, size, batch, position)

    monkeypatch.setattr(batches, "row_at", interrupt)
    result = main(stopped)
    assert result.stopped and not (stopped.output / "adapter.safetensors").exists()
    monkeypatch.setattr(batches, "row_at", plain)
    assert cli.main(["clip", "pairs", "--config", str(stopped.output / "config.yaml"), "--resume"]) == 0
    again = load_file(stopped.output / "adapter.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    assert rows(settings.output) == rows(stopped.output)


def test_parts_of_a_batch_make_the_same_adapter(settings: Any, tmp_path: Path) -> None:
    plain = replace(settings, method="lora(rank=2)", steps=2)
    main(plain)
    main(replace(plain, output=tmp_path / "parts", part=1))
    whole, cut = rows(settings.output), rows(tmp_path / "parts")
    for a, b in zip(whole, cut, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["gradient"] == pytest.approx(b["gradient"], rel=1e-4)


def test_training_learns_and_what_does_not_merge_is_said(settings: Any) -> None:
    long = replace(settings, method="adaptformer(dropout=0.0)", steps=12, augment=False, batch=6, learning_rate=2e-2)
    result = main(long)
    loss = [row["loss"] for row in rows(settings.output)]
    assert sum(loss[-3:]) < 0.8 * sum(loss[:3])
    told = json.loads((settings.output / "results.json").read_text())["exports"]
    assert told == ["not exported: AdaptFormer does not merge into the weights; use adapter.safetensors"]
    assert result.sweep[0]["alpha"] == 0.0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["clip", "pairs", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def test_bad_settings_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", tmp_path / "out")
    good = ("--pairs", data, *out)
    assert "pairs is missing" in refused(capsys, *out)
    assert "there is no" in refused(capsys, "--pairs", tmp_path / "nowhere", *out)
    assert "there are 11 pictures to train on" in refused(capsys, *good, "--batch", 64)
    assert "batch must be at least 2" in refused(capsys, *good, "--batch", 1)
    assert "needs a model with a logit_bias" in refused(capsys, *good, "--batch", 4, "--loss", "sigmoid")
    assert "no method 'loar'" in refused(capsys, *good, "--batch", 4, "--method", "loar")
    assert "held_out must be a share" in refused(capsys, *good, "--held_out", 1)
    assert "there is no folder" in refused(capsys, *good, "--batch", 4, "--retain", tmp_path / "nowhere")
    assert "no embedded model" not in refused(capsys, *good, "--model", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_long_captions_are_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "long"
    for name in ("a.png", "b.png", "c.png"):
        draw(root / name, "red", "circle", (64, 64))
    table = [{"file_name": n, "text": [f"{n} circle", "many words " * 20]} for n in ("a.png", "b.png", "c.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    short = ("--pairs", root, "--val", root, "--batch", 2, "--output", tmp_path / "out", "--steps", 1)
    assert "1 captions are longer than the model's context" in refused(capsys, *short, "--long", "error")
    assert cli.main(["clip", "pairs", *map(str, short), "--long", "skip", "--alphas", "1.0"]) == 0
    told = capsys.readouterr()
    assert "train: 1 captions have more than 32 tokens and are left out" in told.err
    assert "on 3 pictures with 3 captions" in told.out
