"""`vismodal generate`: adapters by prompt in one batch, strengths, sheets, pictures that say how they were made."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tiny_diffusion import tiny_kind, tiny_pipeline

import vismodal as vm
from vismodal import cli
from vismodal.diffusion import settings as stored
from vismodal.diffusion.adapters import Shelf, Use, read_adapters
from vismodal.diffusion.generate import generate
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.requests import Manner, Request, draw, parse_prompt, read_prompts
from vismodal.reports.xy import xy_sheet
from vismodal.resume import Checkpoints

pipeline = cli.load_pipeline("generate")
Config, main = pipeline.Config, pipeline.main
MANNER = Manner(size=16, steps=2, guidance=5.0)


def shaken(adapter: vm.Adapter, seed: int, size: float = 0.3) -> vm.Adapter:
    """With values that act."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=made))
    return adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dog (UNet and text encoder), style (UNet), words (Prefix, which has no strengths between 0 and 1)."""
    folder = tmp_path_factory.mktemp("adapters")
    pipe = load_pipeline(model)
    both = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    made = {
        "dog": vm.adapt(both, vm.LoRA(sites=("attn.*",), rank=2), "dog"),
        "style": vm.adapt({"unet": pipe.unet}, vm.LoRA(sites=("attn.*", "conv"), rank=2), "style"),
        "words": vm.adapt({"unet": pipe.unet}, vm.Prefix(tokens=2), "words"),
    }
    for seed, (name, adapter) in enumerate(made.items()):
        vm.save(shaken(adapter, seed), folder / f"{name}.safetensors", {"prompt": "a sks dog"})
    return folder


@pytest.fixture
def config(model: Path, files: Path, tmp_path: Path) -> Config:
    adapters = tuple(str(files / f"{name}.safetensors") for name in ("dog", "style"))
    return Config(
        ("a cat",), adapters=adapters, model=str(model), output=tmp_path / "out", seeds=(7,), steps=2, guidance=5.0
    )


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def tensors(monkeypatch: pytest.MonkeyPatch, pipe, run) -> torch.Tensor:
    """What `run` decodes, before it is rounded to 8 bits."""
    from vismodal.diffusion import generate as module

    seen: list[torch.Tensor] = []
    real = module.decode_latents
    monkeypatch.setattr(module, "decode_latents", lambda *given: seen.append(real(*given)) or seen[-1])
    run()
    monkeypatch.setattr(module, "decode_latents", real)
    return torch.cat(seen)


# -- a different adapter for each prompt of a batch --------------------------------------------------------------------


def test_one_batch_of_several_adapters_equals_separate_runs(
    model: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = read_adapters([str(files / f"{name}.safetensors") for name in ("dog", "style", "words")])
    uses = ([Use("dog")], [], [Use("style", 0.5)], [Use("dog", 0.7), Use("style")], [Use("words")], [Use("dog", 0.0)])
    requests = [Request(f"a cat {i}", 10 + i, tuple(each)) for i, each in enumerate(uses)]
    pipe = load_pipeline(model)
    shelf = Shelf(pipe, given)
    together = tensors(monkeypatch, pipe, lambda: draw(pipe, shelf, requests, MANNER, batch=len(requests)))
    for i, request in enumerate(requests):
        plain = load_pipeline(model)  # each by itself, by the plain calls of the library
        parts = {"unet": plain.unet, "text_encoder": plain.text_encoder}
        for use in request.uses:
            bases = json.loads(given[use.name].header["base"])
            adapter = vm.load({p: parts[p] for p in bases}, given[use.name].path)
            adapter.scale = use.strength
        options = {"size": 16, "steps": 2, "guidance": 5.0}
        alone = tensors(
            monkeypatch, plain, lambda r=request, p=plain, o=options: generate(p, [r.prompt], [r.seed], **o)
        )
        assert (together[i] - alone[0]).abs().max() <= 1e-5 * alone.abs().max(), request
    base = tensors(
        monkeypatch, pipe, lambda: draw(pipe, shelf, [replace(r, uses=()) for r in requests], MANNER, batch=6)
    )
    changed = [(a - b).abs().max() > 1e-3 for a, b in zip(together, base, strict=True)]
    assert changed == [bool([u for u in r.uses if u.strength]) for r in requests]


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux", "pixart"])
def test_the_other_kinds_too(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_kind(kind, tmp_path / "model")
    pipe = load_pipeline(tmp_path / "model")
    shelf = Shelf(pipe, {})
    denoiser = shelf.models[shelf.denoiser]
    adapter = shaken(vm.adapt({shelf.denoiser: denoiser}, vm.LoRA(sites=("attn.*",), rank=2), "one"), 0, 0.5)
    vm.save(adapter, tmp_path / "one.safetensors")
    adapter.detach()
    shelf = Shelf(pipe, read_adapters([str(tmp_path / "one.safetensors")]))
    manner = replace(MANNER, guidance=3.0)
    requests = [Request("a cat", 1, (Use("one"),)), Request("a dog", 2), Request("a cup", 3, (Use("one", 0.5),))]
    together = tensors(monkeypatch, pipe, lambda: draw(pipe, shelf, requests, manner, batch=3))
    alone = [tensors(monkeypatch, pipe, lambda r=r: draw(pipe, shelf, [r], manner)) for r in requests]
    assert (together - torch.cat(alone)).abs().max() <= 1e-5 * together.abs().max()
    base = tensors(monkeypatch, pipe, lambda: draw(pipe, shelf, [replace(requests[0], uses=())], manner))
    assert (base[0] - together[0]).abs().max() > 1e-3


def test_what_is_negative_leads_away(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline(model)
    options = {"size": 16, "steps": 2, "guidance": 5.0}
    plain = tensors(monkeypatch, pipe, lambda: generate(pipe, ["a cat"] * 2, [1, 2], **options))
    away = tensors(monkeypatch, pipe, lambda: generate(pipe, ["a cat"] * 2, [1, 2], negative=["blue"] * 2, **options))
    assert (plain - away).abs().max() > 1e-3


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_tags_name_the_adapters_of_a_prompt() -> None:
    usual = [Use("all", 0.3)]
    assert parse_prompt("a cat", usual) == ("a cat", (Use("all", 0.3),))
    assert parse_prompt("a <lora:b:-0.5> cat <lora:c>", usual) == ("a cat", (Use("b", -0.5), Use("c", 1.0)))
    assert parse_prompt("a cat <lora:none>", usual) == ("a cat", ())
    assert parse_prompt("a <cat> toy", usual)[0] == "a <cat> toy"  # the token of a textual inversion


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a <lora:b", "not whole"),
        ("a <lora::1>", "not whole"),
        ("a <lora:b:nan>", "not whole"),
        ("a <lora:b:much>", "no number"),
        ("<lora:b>", "says nothing"),
        ("a <lora:b> <lora:none>", "one of them"),
    ],
)
def test_tags_that_cannot_be_read(text: str, why: str) -> None:
    with pytest.raises(vm.InputError, match=why):
        parse_prompt(text, ())


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# mine\n\n  a cat <lora:b>\na çat\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a cat <lora:b>", "a çat"]
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(vm.InputError, match="holds no prompt"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(vm.InputError, match="cannot read"):
        read_prompts(tmp_path / "lacking.txt")


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_names_of_adapters(files: Path, tmp_path: Path) -> None:
    run = tmp_path / "dreambooth-3"
    run.mkdir()
    shutil.copy(files / "dog.safetensors", run / "adapter.safetensors")
    found = read_adapters([str(run), f"mine={files / 'dog.safetensors'}", str(files / "style.safetensors")])
    assert list(found) == ["dreambooth-3", "mine", "style"]
    assert found["mine"].digest == found["dreambooth-3"].digest != found["style"].digest
    with pytest.raises(vm.InputError, match="two adapters are called 'dog'"):
        read_adapters([str(files / "dog.safetensors")] * 2)
    with pytest.raises(vm.InputError, match=r"has no adapter\.safetensors"):
        read_adapters([str(tmp_path)])


def test_a_training_checkpoint_is_an_adapter_of_its_run(model: Path, files: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    adapter = vm.load({"unet": pipe.unet}, files / "style.safetensors", trainable=True)
    vm.save(adapter, tmp_path / "adapter.safetensors")
    shaken(adapter, 9)
    optimizer = torch.optim.SGD(adapter.parameters())
    path = Checkpoints(tmp_path / "checkpoints").save(5, adapter, optimizer)
    read = read_adapters([str(path)])["step-0000005"]
    assert read.tensors.keys() == adapter.state_dict().keys()
    assert all(torch.equal(read.tensors[name], value) for name, value in adapter.state_dict().items())
    Shelf(load_pipeline(model), {"step-0000005": read}).row([Use("step-0000005", 0.5)])
    (tmp_path / "adapter.safetensors").unlink()
    with pytest.raises(vm.InputError, match=r"which a run writes at its end; .*sample-now"):
        read_adapters([str(path)])


def test_a_file_of_one_model_is_the_denoisers(model: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(model)
    vm.save(shaken(vm.adapt(pipe.unet, vm.LoRA(rank=2), "a"), 0), tmp_path / "a.safetensors")
    shelf = Shelf(load_pipeline(model), read_adapters([str(tmp_path / "a.safetensors")]))
    assert shelf.row([Use("a")])
    assert list(vm.attached(shelf.models["unet"])) == ["shelf-0"]


def test_adapters_that_do_not_fit_are_told(model: Path, files: Path, tmp_path: Path) -> None:
    given = read_adapters([str(files / "dog.safetensors"), str(files / "words.safetensors")])
    shelf = Shelf(load_pipeline(model), given)
    with pytest.raises(vm.InputError, match=r"no adapter 'cat'; --adapters has dog, words"):
        shelf.row([Use("cat")])
    with pytest.raises(vm.InputError, match="named twice"):
        shelf.row([Use("dog"), Use("dog", 0.5)])
    with pytest.raises(vm.InputError, match=r"words\.safetensors: Prefix cannot be interpolated: scale must be 0 or 1"):
        shelf.row([Use("words", 0.5)])
    assert not vm.attached(shelf.models["unet"])  # nothing is left of what was refused
    tiny_pipeline(tmp_path / "wide", cross=24)
    with pytest.raises(vm.InputError, match="does not fit"):
        Shelf(load_pipeline(tmp_path / "wide"), given).row([Use("dog")])
    tiny_kind("pixart", tmp_path / "pixart")
    with pytest.raises(vm.InputError, match=r"adapts 'unet'; this pipeline has transformer, text_encoder"):
        Shelf(load_pipeline(tmp_path / "pixart"), given).row([Use("dog")])


def test_another_checkpoint_of_the_architecture_only_warns(
    model: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = load_pipeline(model)
    with torch.no_grad():
        for p in pipe.unet.parameters():
            p.add_(1.0)
    assert Shelf(pipe, read_adapters([str(files / "style.safetensors")])).row([Use("style")])
    assert "another checkpoint" in capsys.readouterr().err


# -- the command -------------------------------------------------------------------------------------------------------


def test_pictures_carry_their_settings_and_can_be_drawn_again(config: Config, files: Path, tmp_path: Path) -> None:
    prompts = ("a cat", "a döner <lora:style:0.5>", "a cup <lora:none>")
    result = main(replace(config, prompts=prompts, strengths=(0.8, 1.0), negative="blue"))
    assert [p.name for p in result.pictures] == ["0000.png", "0001.png", "0002.png"]
    read = [stored.read_settings(path) for path in result.pictures]
    assert [[(w.name, w.file, w.strength) for w in each.adapters] for each in read] == [
        [("dog", "dog.safetensors", 0.8), ("style", "style.safetensors", 1.0)],
        [("style", "style.safetensors", 0.5)],
        [],
    ]
    assert [each.prompt for each in read] == ["a cat", "a döner", "a cup"]
    assert {(e.seed, e.steps, e.guidance, e.size, e.negative, e.model) for e in read} == {
        (7, 2, 5.0, 16, "blue", "tiny")
    }
    text = b"".join(path.read_bytes() for path in result.pictures)
    assert str(files).encode() not in text  # places are nobody's business
    assert str(tmp_path).encode() not in text
    for number, path in enumerate(result.pictures):
        again = main(Config(like=path, output=tmp_path / f"again-{number}"))
        assert np.abs(pixels(again.pictures[0]) - pixels(path)).max() <= 1  # alone, so up to rounding
        assert stored.read_settings(again.pictures[0]) == read[number]
    weaker = main(Config(like=result.pictures[1], seeds=(8,), steps=3, output=tmp_path / "other"))
    told = stored.read_settings(weaker.pictures[0])
    assert (told.seed, told.steps, told.adapters) == (8, 3, read[1].adapters)


def test_web_uis_read_the_pictures(config: Config) -> None:
    """AUTOMATIC1111's `parameters`: prompt, negative, and pairs as its own regular expression finds them."""
    changed = replace(config, prompts=("a cat, sks", "a döner <lora:style:0.5>"), strengths=(0.8, 1.0), negative="blue")
    result = main(replace(changed, output=config.output.parent / "a, b: c"))
    texts = [Image.open(path).text["parameters"].split("\n") for path in result.pictures]
    assert [lines[0] for lines in texts] == ["a cat, sks <lora:dog:0.8> <lora:style:1>", "a döner <lora:style:0.5>"]
    assert {lines[1] for lines in texts} == {"Negative prompt: blue"}
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    assert dict(pair.findall(texts[0][2])) == {
        "Steps": "2", "Sampler": "DDIM", "CFG scale": "5", "Seed": "7", "Size": "16x16", "Model": "tiny",
        "Version": f"vismodal {vm.__version__}",
    }  # fmt: skip
    told = replace(stored.read_settings(result.pictures[0]), model='models, "old": v1', negative="", adapters=())
    lines = stored.parameters(told).split("\n")
    assert len(lines) == 2 and lines[0] == "a cat, sks"
    assert json.loads(dict(pair.findall(lines[1]))["Model"]) == 'models, "old": v1'


def test_a_picture_that_was_moved_needs_its_adapters_again(config: Config, files: Path, tmp_path: Path) -> None:
    result = main(replace(config, prompts=("a cat <lora:style:0.5>",)))
    moved = tmp_path / "elsewhere" / "mine.png"
    moved.parent.mkdir()
    shutil.copy(result.pictures[0], moved)
    with pytest.raises(vm.InputError, match="write --model FOLDER"):
        main(Config(like=moved, output=tmp_path / "a"))
    with pytest.raises(vm.InputError, match="write --adapters style=FILE"):
        main(Config(like=moved, model=config.model, output=tmp_path / "a"))
    given = (f"s={files / 'style.safetensors'}",)
    again = main(Config(like=moved, model=config.model, adapters=given, output=tmp_path / "a"))
    assert np.array_equal(pixels(again.pictures[0]), pixels(moved))  # at its strength of then
    assert stored.read_settings(again.pictures[0]).adapters[0].strength == 0.5
    (moved.parent / "style.safetensors").write_bytes((files / "dog.safetensors").read_bytes())
    with pytest.raises(vm.InputError, match="is not here"):  # another file of that name
        main(Config(like=moved, model=config.model, output=tmp_path / "b"))


def test_a_picture_in_half_precision_is_drawn_again_in_it(config: Config, tmp_path: Path) -> None:
    half = main(replace(config, adapters=config.adapters[:1], mixed_precision="bf16")).pictures[0]
    again, whole = (
        main(Config(like=half, model=config.model, mixed_precision=precision, output=tmp_path / str(precision)))
        for precision in (None, "no")
    )
    assert np.array_equal(pixels(again.pictures[0]), pixels(half))
    assert not np.array_equal(pixels(whole.pictures[0]), pixels(half))


def test_pictures_without_settings(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, why in (("plain", "carries no settings"), ("text", "cannot be read"), ("lacking", "cannot be read")):
        with pytest.raises(vm.InputError, match=why):
            stored.read_settings(tmp_path / f"{name}.png")
    from PIL.PngImagePlugin import PngInfo

    for text in ("{", "[]", '{"prompt": "a"}', '{"adapters": [{}]}'):
        chunk = PngInfo()
        chunk.add_text(stored.CHUNK, text)
        Image.new("RGB", (4, 4)).save(tmp_path / "bad.png", pnginfo=chunk)
        with pytest.raises(vm.InputError, match="another version, or damaged"):
            stored.read_settings(tmp_path / "bad.png")


def test_seeds_are_shown_and_count_on(config: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drawn = main(replace(config, seeds=(), adapters=(), count=2))
    seeds = [stored.read_settings(path).seed for path in drawn.pictures]
    assert seeds[1] == seeds[0] + 1
    said = capsys.readouterr().out
    assert all(f"seed {seed}," in said for seed in seeds)
    again = main(replace(config, seeds=tuple(seeds), adapters=(), output=tmp_path / "again"))
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(drawn.pictures, again.pictures, strict=True))
    assert yaml.safe_load((drawn.output / "config.yaml").read_text())["seeds"] == seeds
    other = main(replace(config, seeds=(), adapters=(), output=tmp_path / "other"))
    assert stored.read_settings(other.pictures[0]).seed not in seeds


def test_a_sweep_has_a_sheet_for_each_prompt_and_seed(config: Config) -> None:
    result = main(replace(config, prompts=("a cat", "a cup"), seeds=(7, 8), sweep=(0.0, 0.5, 1.0)))
    assert len(result.pictures) == 2 * 2 * 2 * 3
    assert [path.name for path in result.sheets] == [f"sheet-0{i}.png" for i in range(4)]
    told = [stored.read_settings(path) for path in result.pictures]
    of = {(t.prompt, t.seed, *((w.name, w.strength) for w in t.adapters)): i for i, t in enumerate(told)}
    zero, half = of["a cat", 7, ("dog", 0.0)], of["a cat", 7, ("dog", 0.5)]
    assert np.abs(pixels(result.pictures[zero]) - pixels(result.pictures[of["a cat", 7, ("style", 0.0)]])).max() <= 1
    assert np.abs(pixels(result.pictures[zero]) - pixels(result.pictures[half])).max() > 1
    sheet = pixels(result.sheets[0])  # the cell of dog at 0.5, eight times as large
    cell = pixels(result.pictures[half]).repeat(8, 0).repeat(8, 1)
    first, second = sheet[-268:-140], sheet[-136:-8]  # rows of 128 pixels, 4 between them
    places = [
        [x for x in range(row.shape[1] - 127) if np.array_equal(row[:, x : x + 128], cell)] for row in (first, second)
    ]
    assert [len(found) for found in places] == [1, 0]


def test_a_sweep_of_one_adapter_is_a_grid_of_seeds_by_strengths(config: Config) -> None:
    result = main(replace(config, adapters=config.adapters[:1], seeds=(7, 8), sweep=(0.0, 1.0)))
    assert [path.name for path in result.sheets] == ["sheet.png"]
    sheet = pixels(result.sheets[0])
    rows = sheet[-268:-140], sheet[-136:-8]  # of 128 pixels, 4 between them: pictures eight times as large
    for i, path in enumerate(result.pictures):
        cell = pixels(path).repeat(8, 0).repeat(8, 1)
        seed = stored.read_settings(path).seed
        found = [[x for x in range(row.shape[1] - 127) if np.array_equal(row[:, x : x + 128], cell)] for row in rows]
        assert len(found[seed - 7]) == 1, (i, found)


def test_a_sheet_puts_each_picture_in_its_place() -> None:
    colours = [["#100000", "#200000", "#300000"], ["#400000", "#500000", "#600000"]]
    cells = [[Image.new("RGB", (64, 32), c) for c in row] for row in colours]
    sheet = xy_sheet(
        cells, ["a very long name that goes over several lines of the sheet", "b"], ["x", "y", "z"], "title"
    )
    row = [[sheet.getpixel((sheet.width - (3 - k) * 260 + 60, sheet.height - (2 - i) * 132 + 60))[0] for k in range(3)]
           for i in range(2)]  # fmt: skip
    assert row == [[0x10, 0x20, 0x30], [0x40, 0x50, 0x60]]
    with pytest.raises(ValueError, match="do not fit"):
        xy_sheet(cells, ["a"], ["x", "y", "z"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"prompts": ()}, "there is no prompt"),
        ({"strengths": (1.0, 2.0, 3.0)}, "2 adapters have 3 strengths"),
        ({"sweep": (1.0,), "adapters": ()}, "write --adapters"),
        ({"sweep": (1.0,), "strengths": (1.0,)}, "leave out strengths"),
        ({"sweep": (1.0,), "prompts": ("a <lora:dog>",)}, "leave out strengths and tags"),
        ({"seeds": (1, 2), "count": 2}, "one seed"),
        ({"seeds": (1, 1)}, "given twice"),
        ({"seeds": (-1,)}, "from 0"),
        ({"count": 0}, "count must be at least 1"),
        ({"steps": -1}, "steps must be at least 1"),
        ({"resolution": 17}, "multiple of 2"),
        ({"prompts": ("a <lora:cat>",)}, "no adapter 'cat'"),
        ({"negative": "blue", "guidance": 1.0}, "leads away from nothing"),
        ({"adapters": ("lacking.safetensors",)}, "no file lacking"),
        ({"model": "lacking"}, "no model folder"),
    ],
)
def test_bad_input_leaves_nothing(config: Config, change: dict, why: str) -> None:
    with pytest.raises(vm.InputError, match=why):
        main(replace(config, **change))
    assert not config.output.exists()


def test_flux_leads_away_from_nothing(tmp_path: Path) -> None:
    tiny_kind("flux", tmp_path / "flux")
    with pytest.raises(vm.InputError, match="leave out negative"):
        main(Config(("a cat",), model=str(tmp_path / "flux"), negative="blue", steps=1, output=tmp_path / "out"))


def test_a_folder_with_something_in_it_stays(config: Config) -> None:
    config.output.mkdir()
    (config.output / "mine.txt").write_text("mine")
    with pytest.raises(vm.InputError, match="there already"):
        main(config)


def test_broken_adapters_are_told(config: Config, files: Path, tmp_path: Path) -> None:
    save_file({"a.x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "half.safetensors").write_bytes((files / "dog.safetensors").read_bytes()[:-8])
    for name, why in (("foreign", "this is no adapter file of diffusers, kohya"), ("half", "no whole safetensors")):
        with pytest.raises(vm.InputError, match=why):
            main(replace(config, adapters=(str(tmp_path / f"{name}.safetensors"),)))


def test_on_the_command_line(model: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cup <lora:dog:0.5>\n")
    line = ["generate", "a cat", "a dog <lora:none>", "--prompts-file", str(tmp_path / "p.txt"), "--adapters"]
    line += [str(files / "dog.safetensors"), "--strengths", "0.9", "--seeds", "3", "4", "--model", str(model)]
    assert cli.main([*line, "--steps", "1", "--output", str(tmp_path / "out")]) == 0
    told = [stored.read_settings(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    assert [(t.prompt, t.seed, [w.strength for w in t.adapters]) for t in told] == [
        ("a cat", 3, [0.9]), ("a cat", 4, [0.9]), ("a dog", 3, []), ("a dog", 4, []), ("a cup", 3, [0.5]),
        ("a cup", 4, [0.5]),
    ]  # fmt: skip
    assert "again: vismodal generate --like" in capsys.readouterr().out
