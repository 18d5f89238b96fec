"""`vismodal clip` end to end on the embedded CLIP and drawn pictures: what it leaves, what it must never look at."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import two_processes
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import vismodal as vm
from vismodal import cli
from vismodal.callbacks import read_log
from vismodal.checkpoint import read
from vismodal.draw import generator
from vismodal.errors import InputError
from vismodal.fewshot import trial as fewshot_trial
from vismodal.fewshot.data import Part
from vismodal.fewshot.recipes import RECIPES
from vismodal.paths import asset
from vismodal.runs import save_config

pipeline = cli.load_pipeline("clip")
Config, main = pipeline.Config, pipeline.main
CLASSES = ("red", "green", "light_blue", "été")
PEN = {"red": "red", "green": "green", "light_blue": "lightblue", "été": "orange"}
COUNTS = {"train": 4, "val": 3, "test": 3}


@pytest.fixture(scope="module", autouse=True)
def embedded() -> None:
    try:
        asset("tiny-clip")
    except InputError:
        pytest.skip("this checkout has no assets/tiny-clip")


def draw(path: Path, colour: str, seed: int) -> None:
    """A disc of a colour somewhere on grey, in a picture of its own size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    g = generator("picture", seed)
    width, height, x, y = (
        int(torch.randint(low, high, (), generator=g)) for low, high in [(60, 90)] * 2 + [(0, 30)] * 2
    )
    image = Image.new("RGB", (width, height), (90 + seed % 60,) * 3)
    ImageDraw.Draw(image).ellipse((x, y, x + 30, y + 30), fill=colour)
    image.save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    for p, (part, count) in enumerate(COUNTS.items()):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                draw(root / part / name / f"{i}.png", PEN[name], 100 * p + 10 * c + i)
    (root / "train" / "red" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    return root


@pytest.fixture
def settings(data: Path, tmp_path: Path) -> Any:
    return Config(data=data, output=tmp_path / "run", shots=3, steps=4, batch=6, warmup=1, save_every=0)


def scores(result: Any) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in result.scores}


def test_two_processes_get_what_one_does(settings: Any) -> None:
    settings = replace(settings, compare=("coop", "vpt", "clip-lora(dropout=0.0)"), augment=2, base_to_new=True)
    one = main(settings)
    out = settings.output.parent / "two"
    save_config(replace(settings, output=out, threads=1), out.parent)
    two_processes("clip", out.parent / "config.yaml")
    found = json.loads((out / "results.json").read_text())
    assert len(found) == len(one.scores) == 3
    for mine, theirs in zip(one.scores, found, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    files = list(settings.output.rglob("adapter.safetensors"))
    assert len(files) == 3
    for file in files:
        mine, theirs = load_file(file), load_file(out / file.relative_to(settings.output))
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[name], theirs[name], atol=2e-4) for name in mine)


# -- what a run leaves -------------------------------------------------------------------------------------------------


def test_every_method_under_one_budget(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = tuple(RECIPES)
    result = main(replace(settings, compare=names, steps=2, shots=5, alphas=(0.0, 1.0)))
    out, found = settings.output, scores(result)
    assert tuple(found) == names
    assert all(0 <= row["test"] <= 1 for row in found.values())
    told = capsys.readouterr()
    assert told.err.count("train/red/torn.jpg: truncated or corrupt") == 1
    assert told.err.count("has 4 training pictures, fewer than the 5 shots") == 4, "once for each class"
    for name, text, image in (
        ("coop", "at every step", "once"), ("cocoop", "at every step", "once"), ("vpt", "once", "at every step"),
        ("clip-lora", "at every step", "at every step"), ("clip-adapter", "once", "once"),
    ):  # fmt: skip
        row = found[name]
        assert (row["text features"], row["image features"]) == (text, image)
        say = {"once": "computed once"}
        line = f"text features {say.get(text, text)}, image features {say.get(image, image)}"
        assert any(f"{name}, seed 0" in x and line in x for x in told.out.splitlines())
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == [
        "README.md", "accuracy.png", "config.yaml", "results.json",
    ]  # fmt: skip
    trained = out / "coop" / "seed-0"
    assert sorted(p.name for p in trained.iterdir()) == [
        "adapter.safetensors", "checkpoints", "loss.png", "metrics.jsonl", "results.json",
    ]  # fmt: skip
    assert [row["step"] for row in read_log(trained / "metrics.jsonl")] == [1, 2]
    assert found["zero-shot"]["parameters"] == 0 and found["wise-ft"]["scale"] in (0.0, 1.0)
    card = (out / "README.md").read_text()
    assert all(f"| {name} |" in card for name in names) and str(settings.data) not in card
    assert [r["method"] for r in json.loads((out / "results.json").read_text())] == list(names)
    assert (out / "linear-probe/seed-0/probe.safetensors").exists()


def test_one_method_learns_and_its_file_is_measured_alike(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = main(replace(settings, method="coop(lr=1e-2)", steps=25, shots=0, augment=2))
    out, (row,) = settings.output, result.scores
    (place,) = out.glob("*/seed-0")
    loss = [r["loss"] for r in read_log(place / "metrics.jsonl")]
    assert sum(loss[-5:]) < 0.8 * sum(loss[:5])
    again = main(replace(settings, output=None, adapter=place / "adapter.safetensors"))
    assert again.scores[0]["test"] == row["test"] and again.output is None

    header, _ = read(place / "adapter.safetensors")  # as the card says
    prompts = json.loads(header["prompts"])
    assert prompts["light blue"] == ["a photo of a light blue."] and json.loads(header["classes"]) == sorted(CLASSES)
    model, preprocess, tokenizer = vm.models.load("tiny-clip")
    clf = vm.CLIPClassifier(model, tokenizer, list(prompts), prompts)
    vm.load(clf, place / "adapter.safetensors")
    right = 0
    for label, name in enumerate(json.loads(header["classes"])):
        for path in sorted((settings.data / "test" / name).iterdir()):
            with Image.open(path) as image, torch.no_grad():
                right += int(clf.eval()(preprocess(image.convert("RGB"))[None]).argmax()) == label
    assert right / 12 == row["test"]


def test_seeds_draw_other_pictures_and_are_averaged(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = main(replace(settings, compare=("tip-adapter", "linear-probe"), seeds=2, shots=1))
    assert [(r["method"], r["seed"]) for r in result.scores] == [
        ("tip-adapter", 0), ("tip-adapter", 1), ("linear-probe", 0), ("linear-probe", 1)
    ]  # fmt: skip
    files = [load_file(settings.output / f"tip-adapter/seed-{seed}/adapter.safetensors") for seed in (0, 1)]
    keys = [next(tensor for name, tensor in file.items() if name.endswith(".K")) for file in files]
    assert keys[0].shape == (4, 160) and not torch.equal(*keys)
    assert "±" in capsys.readouterr().out


def test_functions_and_mappings_are_templates(settings: Any) -> None:
    zero = replace(settings, method="zero-shot")
    one = main(zero, lambda name: f"a drawing of a {name} disc")
    own = {name: [f"a drawing of a {name.replace('_', ' ')} disc"] for name in CLASSES}
    two = main(replace(zero, output=settings.output.parent / "two", templates=own))
    assert one.scores[0]["test"] == two.scores[0]["test"]


def test_the_same_model_of_transformers_has_the_same_scores(settings: Any, tmp_path: Path) -> None:
    both = replace(settings, compare=("zero-shot", "tip-adapter", "vpt"), steps=1)
    ours = scores(main(both))
    theirs = scores(main(replace(both, library="transformers", output=tmp_path / "theirs")))
    for name in ("zero-shot", "tip-adapter"):
        assert ours[name]["test"] == theirs[name]["test"]
    assert ours["vpt"]["parameters"] == theirs["vpt"]["parameters"]


# -- validation and test data ------------------------------------------------------------------------------------------


def test_searches_never_see_test_data(settings: Any, data: Path, tmp_path: Path) -> None:
    """With any other test data, the adapters and all that was searched are the same to the bit."""
    other = shutil.copytree(data, tmp_path / "other")
    for c, name in enumerate(CLASSES):
        for path in (other / "test" / name).iterdir():
            draw(path, PEN[CLASSES[(c + 1) % 4]], hash_of(path))
    names = ("tip-adapter", "tip-adapter-f", "wise-ft", "linear-probe")
    alphas = (0.0, 0.5, 1.0)
    a = scores(main(replace(settings, compare=names, alphas=alphas)))
    b = scores(main(replace(settings, compare=names, alphas=alphas, data=other, output=tmp_path / "b")))
    for name in names:
        for key in ("alpha", "beta", "scale", "strength", "validation", "validation by scale"):
            assert a[name].get(key) == b[name].get(key), (name, key)
    for name in names[:3]:
        files = [load_file(root / name / "seed-0/adapter.safetensors") for root in (settings.output, tmp_path / "b")]
        assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    assert any(a[name]["test"] != b[name]["test"] for name in names), "the other test data must show"


def hash_of(path: Path) -> int:
    return 500 + len(path.parent.name) + int(path.stem)


def test_test_data_is_measured_after_everything_is_decided(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    inputs, search = Part.inputs, vm.TipAdapter.search

    def watched(part: Any, clf: Any, *copies: Any) -> Any:
        order.append(part.pictures.paths[0].parents[1].name)
        return inputs(part, clf, *copies)

    def noted(adapter: Any, batches: Any) -> Any:
        found = search(adapter, batches)
        order.append("decided")
        return found

    monkeypatch.setattr(Part, "inputs", watched)
    monkeypatch.setattr(vm.TipAdapter, "search", staticmethod(noted))
    main(replace(settings, method="tip-adapter-f"))
    assert "test" not in order[: order.index("decided") + 1] and "test" in order


# -- base to new ---------------------------------------------------------------------------------------------------


def test_base_to_new(settings: Any) -> None:
    result = main(replace(settings, compare=("zero-shot", "maple", "clip-adapter"), base_to_new=True))
    for row in result.scores:
        both = row["base"] + row["new"]
        assert row["H"] == pytest.approx(2 * row["base"] * row["new"] / both if row["base"] and row["new"] else 0)
        assert "test" not in row
    header, _ = read(settings.output / "maple/seed-0/adapter.safetensors")
    assert json.loads(header["classes"]) == sorted(CLASSES)[:2]
    # new classes by hand, from the file
    model, preprocess, tokenizer = vm.models.load("tiny-clip")
    new = sorted(CLASSES)[2:]
    clf = vm.CLIPClassifier(model, tokenizer, [n.replace("_", " ") for n in new])
    vm.load(clf, settings.output / "maple/seed-0/adapter.safetensors")
    right = 0
    for label, name in enumerate(new):
        for path in (settings.data / "test" / name).iterdir():
            with Image.open(path) as image, torch.no_grad():
                right += int(clf.eval()(preprocess(image.convert("RGB"))[None]).argmax()) == label
    assert right / 6 == scores(result)["maple"]["new"]


# -- resume ------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_bit(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = "lora(where='model.visual.transformer.resblocks.3*',dropout=0.2)"  # trained from what was kept before it
    both = replace(settings, compare=("tip-adapter-f", last), augment=2, steps=8)
    whole = main(both)
    plain, asked = fewshot_trial.shuffled, []

    def interrupt(seed: int, purpose: str, size: int, position: int) -> int:
        asked.append(position)
        if len(asked) > 8 * 6 and position == 2 * 6 + 1:  # in the third step of the second method
            raise KeyboardInterrupt
        return plain(seed, purpose, size, position)

    monkeypatch.setattr(fewshot_trial, "shuffled", interrupt)
    stopped = main(replace(both, output=tmp_path / "stopped"))
    assert stopped.stopped and [r["method"] for r in stopped.scores] == ["tip-adapter-f"]
    monkeypatch.setattr(fewshot_trial, "shuffled", plain)
    config = str(tmp_path / "stopped/config.yaml")
    assert cli.main(["clip", "--config", config, "--resume"]) == 0
    for file in settings.output.glob("*/seed-0/adapter.safetensors"):
        a, b = load_file(file), load_file(tmp_path / "stopped" / file.relative_to(settings.output))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = json.loads((tmp_path / "stopped/results.json").read_text())
    assert [r["test"] for r in rows] == [r["test"] for r in whole.scores]
    assert whole.scores[1]["image features"].endswith("% once")


def test_a_resume_adds_seeds_and_methods_and_keeps_those_that_are_done(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = main(replace(settings, method="clip-adapter")).scores
    told = capsys.readouterr().out
    more = main(replace(settings, compare=("zero-shot", "clip-adapter"), seeds=2, resume=True)).scores
    assert [(r["method"], r["seed"]) for r in more] == [(m, s) for m in ("zero-shot", "clip-adapter") for s in (0, 1)]
    assert more[2] == first[0], "with the seconds that it took then"
    assert "computed once" in told and "clip-adapter, seed 0: 1" not in capsys.readouterr().out.replace(told, "")


def test_results_of_another_model_are_not_taken_for_its_own(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(asset("tiny-clip"), tmp_path / "model")
    main(replace(settings, method="zero-shot", model=str(model)))
    tensors = load_file(model / "open_clip_model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, model / "open_clip_model.safetensors")
    assert "the model was " in refused(capsys, "--config", settings.output / "config.yaml", "--resume")


# -- what is refused ---------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["clip", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def test_bad_settings_are_refused_before_anything_is_written(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--output", tmp_path / "out")
    good = ("--data", data, *out)
    assert "there is no folder" in refused(capsys, "--data", tmp_path / "nowhere", *out)
    assert "no method 'cop'; write one of zero-shot, coop" in refused(capsys, *good, "--method", "cop")
    assert "method and compare are given" in refused(capsys, *good, "--method", "coop", "--compare", "maple")
    assert "names a method twice" in refused(capsys, *good, "--compare", "coop", "coop")
    assert "twice: clip-lora and CLIP_LoRA" in refused(capsys, *good, "--compare", "clip-lora", "CLIP_LoRA")
    assert "adapter is only measured" in refused(capsys, *good, "--adapter", tmp_path / "a", "--method", "coop")
    assert "is a model of open_clip" in refused(capsys, *good, "--model", "hf-hub:A/B", "--library", "transformers")
    assert "tip-adapter knows no classes but" in refused(capsys, *good, "--method", "tip-adapter", "--base_to_new")
    assert "goes over 3 blocks" in refused(capsys, *good, "--method", "maple(depth=9)")
    assert "has no {} for the name" in refused(capsys, *good, "--templates", "a photo")
    assert "steps must be at least 1" in refused(capsys, *good, "--steps", 0)
    assert "alphas must be one or more numbers from 0 to 1" in refused(capsys, *good, "--alphas", "[2.0]")
    assert "no adapter file" in refused(capsys, *good, "--adapter", tmp_path / "none.safetensors")
    assert "has more than the 32 tokens that the model reads" in refused(
        capsys, *good, "--templates", "a {} " + "very " * 40
    )
    assert "there is no folder 'nothing'" in refused(capsys, *good, "--model", "nothing")
    assert not (tmp_path / "out").exists()


def test_classes_that_cannot_be_told_apart_or_measured(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twins = shutil.copytree(data, tmp_path / "twins")
    for part in COUNTS:
        shutil.copytree(twins / part / "light_blue", twins / part / "light blue")
    assert "two folders are the class 'light blue'" in refused(capsys, "--data", twins)
    half = shutil.copytree(data, tmp_path / "half")
    for name in sorted(CLASSES)[2:]:
        shutil.rmtree(half / "test" / name)
    line = refused(capsys, "--data", half, "--base_to_new")
    assert "the test part of" in line and "has no picture of the classes 'red', 'été'" in line
    one = shutil.copytree(data, tmp_path / "one")
    for part in COUNTS:
        for name in sorted(CLASSES)[1:]:
            shutil.rmtree(one / part / name)
    assert "one class, 'green'" in refused(capsys, "--data", one)


def test_an_adapter_is_measured_with_its_own_prompts_and_on_new_classes(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    made = replace(settings, method="clip-adapter", templates=("a {} thing, drawn.",))
    (row,) = main(made).scores
    file = settings.output / "clip-adapter/seed-0/adapter.safetensors"
    only = replace(settings, output=None, adapter=file)
    assert main(only).scores[0]["test"] == row["test"]
    (halves,) = main(replace(only, base_to_new=True)).scores
    assert {"base", "new", "H"} <= halves.keys()
    # that of a model alone, as `vismodal clip pairs` saves it
    model, _, _ = vm.models.load("tiny-clip")
    adapter = vm.adapt(model, vm.LoRA(rank=2), name="clip", seed=0)
    alone = vm.save(adapter, settings.output / "model.safetensors")
    (zero,) = main(replace(settings, method="zero-shot", output=settings.output / "zero")).scores
    assert main(replace(only, adapter=alone)).scores[0]["test"] == zero["test"], "B = 0"


def test_an_adapter_of_other_classes(
    settings: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(replace(settings, compare=("tip-adapter", "clip-adapter"), steps=1))
    fewer = shutil.copytree(data, tmp_path / "fewer")
    for part in COUNTS:
        shutil.rmtree(fewer / part / "red")
    files = [settings.output / name / "seed-0/adapter.safetensors" for name in ("tip-adapter", "clip-adapter")]
    line = refused(capsys, "--data", fewer, "--adapter", files[0])
    assert "was made for 4 classes and knows no others; the 3 given do not match: it has besides 'red'" in line
    assert cli.main(["clip", "--data", str(fewer), "--adapter", str(files[1])]) == 0
    assert "note: adapter.safetensors was trained on other classes (it has besides 'red')" in capsys.readouterr().err
    again = ("--config", settings.output / "config.yaml", "--resume")
    assert "holds results of other settings or data: data was" in refused(capsys, *again, "--data", fewer)
    assert "shots was 3 and is now 2" in refused(capsys, *again, "--shots", 2)
    assert "holds a run already" in refused(capsys, *again[:2])


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command, word in ((["clip"], "base_to_new"), (["clip", "pairs"], "held_out")):
        with pytest.raises(SystemExit):
            cli.main([*command, "--help"])
        assert word in capsys.readouterr().out
