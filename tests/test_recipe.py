"""What DreamBooth's data, loss and optimisation options do: each against its formula, then all in runs that resume."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_diffusion import photo_folder, tiny_kind, tiny_pipeline

import vismodal as vm
from vismodal import cli, runs
from vismodal.callbacks import read_log
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.kinds import kind_of
from vismodal.diffusion.load import load_pipeline, prepare
from vismodal.diffusion.pictures import Masks, Pictures
from vismodal.diffusion.processes import process_of
from vismodal.diffusion.recipe import Subject
from vismodal.draw import generator, seed_of, shuffled
from vismodal.errors import InputError
from vismodal.quantised import is_quantised
from vismodal.resume import adapter_of
from vismodal.train import Micro

diffusers = pytest.importorskip("diffusers")
dreambooth = cli.load_pipeline("dreambooth")
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny_pipeline(root / "sd")
    tiny_pipeline(root / "v", "v_prediction")
    tiny_kind("sdxl", root / "sdxl")
    tiny_kind("sd3", root / "sd3")
    return {kind: root / kind for kind in ("sd", "v", "sdxl", "sd3")}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of differing shapes, the second with a caption and a mask."""
    folder = photo_folder(tmp_path_factory.mktemp("photos") / "dog", 2, p2="a sleeping dog")
    Image.effect_noise((64, 32), 60).convert("RGB").save(folder / "3.png")
    mask = Image.new("L", (28, 24))
    mask.paste(255, (0, 4, 14, 20))
    mask.save(folder / "2.mask.png")
    return folder


def noise(*size: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def shaken(pipe, *names: str) -> vm.Adapter:
    """LoRA whose factors are random, so that it acts."""
    adapter = vm.adapt({name: getattr(pipe, name) for name in names}, vm.LoRA(sites=("attn.*",), rank=2), seed=0)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draws))
    return adapter


def plain(folder: Path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, **({"safety_checker": None} if "xl" not in folder.name else {})
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noised(pipe, pictures: Pictures, micro: Micro, place: int):
    """A row noised by hand: noisy latent, level, noise."""
    latent = pictures.draw(micro, place).latent
    t = torch.randint(1000, (1,), generator=generator(micro.seed, f"{pictures.name} level", place))
    drawn = torch.randn(latent.shape[1:], generator=generator(micro.seed, f"{pictures.name} noise", place))[None]
    return pipe.scheduler.add_noise(latent, drawn, t), t, drawn


# -- the prior by the base's own prediction --------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_the_prior_by_the_base_by_hand(models, batch):
    """Value and gradient, the text encoder trained too: the target is that of a pipeline which was never adapted."""
    pipe, never = load_pipeline(models["sd"]), plain(models["sd"])
    adapter = shaken(pipe, "unet", "text_encoder")
    pipe.unet.train()
    sets = [
        Pictures(pipe, "instance", [noise(16, 16), noise(16, 16, seed=1)], ["sks a", "sks b"], size=16),
        Pictures(pipe, "class", [noise(16, 16), noise(16, 16, seed=1)], ["a", "a"], size=16),
    ]
    micro = Micro(seed=3, step=0, index=4)
    given = denoising(pipe, sets, Prompts(pipe, False), batch, Weights(prior=0.7), adapter.disabled)(micro)
    assert pipe.unet.training and adapter.enabled
    grads = torch.autograd.grad(given["loss"], list(adapter.parameters()))

    means = []
    for pictures in sets:
        each = []
        for place in range(4 * batch, 5 * batch):
            noisy, t, drawn = noised(pipe, pictures, micro, place)
            index = shuffled(3, pictures.name, 2, place)
            ids = pipe.tokenizer(pictures.prompts[index], padding="max_length", max_length=48, return_tensors="pt")
            said = pipe.unet(noisy, t, encoder_hidden_states=pipe.text_encoder(ids.input_ids)[0]).sample
            with torch.no_grad():
                base = never.unet(noisy, t, encoder_hidden_states=never.text_encoder(ids.input_ids)[0]).sample
            assert not torch.allclose(said, base, atol=1e-3)
            each.append((said - (drawn if pictures.name == "instance" else base)).square().mean())
        means.append(torch.stack(each).mean())
    by_hand = means[0] + 0.7 * means[1]
    torch.testing.assert_close(given["loss"], by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(given["class"], means[1], rtol=1e-4, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(by_hand, list(adapter.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# -- zero terminal SNR -----------------------------------------------------------------------------------------------


def test_zero_terminal_snr_by_hand(models):
    """Lin et al. 2023, algorithm 1, and its table: alpha_bar_T = 0, where before sqrt(alpha_bar_T) was 0.068."""
    pipe = load_pipeline(models["v"])
    betas = pipe.scheduler.betas.double()
    prepare(pipe, zero_snr=True, int8=False)
    root = (1 - betas).cumprod(0).sqrt()
    by_hand = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    process = process_of(pipe)
    torch.testing.assert_close(process.alpha_bar.double(), by_hand, rtol=1e-3, atol=1e-7)
    assert process.alpha_bar[-1] == 0 and process.min_snr(torch.tensor([0, 999]), 5.0).isfinite().all()
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, process.alpha_bar)
    pipe.scheduler.set_timesteps(4)
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and pipe.scheduler.timesteps.tolist() == [
        999,
        749,
        499,
        249,
    ]
    for kind, why in (
        ("sd", "this one predicts epsilon. Write --zero_snr false, or --offset_noise 0.05"),
        ("sd3", "flow matching, whose last level is noise alone anyway"),
    ):
        with pytest.raises(InputError, match=f"needs a model that predicts v.*{why}"):
            prepare(load_pipeline(models[kind]), zero_snr=True, int8=False)


# -- shapes ----------------------------------------------------------------------------------------------------------


def test_buckets_by_hand(models, monkeypatch):
    """SDXL's loss over photos of three shapes and square class images: one shape in each forward pass, each row its own
    latent, prompt and time ids, and in five epochs each photo five times."""
    pipe = load_pipeline(models["sdxl"])
    images = [noise(64, 32), noise(20, 40, seed=1), noise(32, 32, seed=2), noise(64, 30, seed=3)]
    names = ["wide", "tall", "square", "wider"]
    options = {"size": 16, "grid": kind_of(pipe).grid(pipe)}
    assert options["grid"] == 4  # two floors of a UNet over latents of half the size
    shapes = [(12, 24), (24, 12), (16, 16), (12, 24)]  # 11.3 x 22.6
    sets = [
        Pictures(pipe, "instance", images, names, **options),
        Pictures(pipe, "class", [noise(16, 16)], ["dog"], **options),
    ]
    # the last one, 30 x 60 of 30 x 64, begins at one whole pixel of 24, which are 2.5 of the picture
    boxes = [(0, 0, 64, 32), (0, 0, 20, 40), (0, 0, 32, 32), (2.5, 0, 62.5, 30)]
    calls, real = [], pipe.unet.forward

    def forward(sample, *args, **options):
        calls.append((sample.shape[-2:], options["added_cond_kwargs"]["time_ids"].tolist()))
        return real(sample, *args, **options)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    orders = {seed: [shuffled(seed, "instance", 4, place) for place in range(4)] for seed in range(40)}
    # the square first: the class images go with it, before the others
    seed, read = next((seed, order) for seed, order in orders.items() if order[0] == 2 and order[2] == 1)
    micro, batch = Micro(seed=seed, step=0, index=0), 4
    given = denoising(pipe, sets, Prompts(pipe, cache=True), batch, Weights(prior=0.5, min_snr=5.0))(micro)
    assert sorted(read) == [0, 1, 2, 3] and len(calls) == 3
    for shape, ids in calls:
        assert all((2 * shape[0], 2 * shape[1]) == (id[4], id[5]) for id in ids)
    originals = [[32, 64], [40, 20], [32, 32], [30, 64]]
    corners = [[0, 0], [0, 0], [0, 0], [0, 1]]
    want = [[*originals[i], *corners[i], *shapes[i]] for i in read] + [[16, 16, 0, 0, 16, 16]] * 4
    assert sorted(id for _, ids in calls for id in ids) == sorted(want)

    total, plain_sum = {"instance": 0.0, "class": 0.0}, {"instance": 0.0, "class": 0.0}
    for pictures in sets:
        for place in range(batch):
            i = shuffled(seed, pictures.name, len(pictures.images), place)
            said, shape = pictures.prompts[i], shapes[i] if pictures.name == "instance" else (16, 16)
            box = boxes[i] if pictures.name == "instance" else (0, 0, 16, 16)
            part = pictures.images[i].resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
            with torch.no_grad():
                pixels = torch.from_numpy(np.asarray(part, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
                posterior = pipe.vae.encode(pixels).latent_dist
                std = torch.randn(posterior.mean.shape, generator=generator(seed, f"{pictures.name} latent", place))
                x = (posterior.mean + posterior.std * std) * pipe.vae.config.scaling_factor
                t = torch.randint(1000, (1,), generator=generator(seed, f"{pictures.name} level", place))
                drawn = torch.randn(x.shape[1:], generator=generator(seed, f"{pictures.name} noise", place))[None]
                hidden, _, pooled, _ = pipe.encode_prompt(said, do_classifier_free_guidance=False)
                ids = want[place] if pictures.name == "instance" else want[-1]
                added = {"text_embeds": pooled, "time_ids": torch.tensor([ids])}
                noisy = pipe.scheduler.add_noise(x, drawn, t)
                out = real(noisy, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
            error, bar = (out - drawn).square().mean().item(), pipe.scheduler.alphas_cumprod[t].item()
            plain_sum[pictures.name] += error / batch
            total[pictures.name] += min(1, 5 * (1 - bar) / bar) * error / batch
    assert given["instance"].item() == pytest.approx(plain_sum["instance"], rel=1e-4)
    assert given["class"].item() == pytest.approx(plain_sum["class"], rel=1e-4)
    assert given["loss"].item() == pytest.approx(total["instance"] + 0.5 * total["class"], rel=1e-4)
    said = Counter(sets[0].draw(Micro(0, 0, 0), place).prompt for place in range(20))
    assert said == dict.fromkeys(names, 5)


# -- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_cut_and_mirrored_with_its_picture(models, monkeypatch):
    """The picture is its own mask, and the encoder averages: wherever it is cut, the latent is the mask."""

    def encode(pipe, images):
        mean = torch.nn.functional.avg_pool2d((images[:, :1] + 1) / 2, 2)
        return mean, torch.zeros_like(mean)

    monkeypatch.setattr("vismodal.diffusion.pictures.encode_images", encode)
    pipe = load_pipeline(models["sd"])
    greys = [noise(40, 16).convert("L"), noise(16, 24, seed=1).convert("L")]
    options = {"size": 16, "crop": "random", "flip": True, "masks": Masks([*greys, None], floor=0.25)}
    images = [*(grey.convert("RGB") for grey in greys), noise(16, 16)]
    pictures, cuts = Pictures(pipe, "p", images, ["", "", ""], **options), set()
    for place in range(60):
        row = pictures.draw(Micro(0, 0, 0), place)
        assert row.mask is not None
        if shuffled(0, "p", 3, place) == 2:
            assert torch.equal(row.mask, torch.ones(1, 1, 8, 8))
        else:
            torch.testing.assert_close(row.mask, 0.25 + 0.75 * row.latent / pipe.vae.config.scaling_factor)
            cuts.add(row.frame.corner)
    assert len(cuts) > 15


def test_the_loss_with_masks_by_hand(models):
    pipe = load_pipeline(models["sd"])
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 6, 16))
    images = [noise(16, 16), noise(16, 16, seed=1)]
    sets = [Pictures(pipe, "p", images, ["a", "b"], size=16, masks=Masks([half, None], 0.1))]
    given = denoising(pipe, sets, Prompts(pipe, True), 2, Weights())(Micro(5, 0, 0))["loss"]
    weight = torch.full((8, 8), 0.1)
    weight[:, :3] = 1
    each = []
    for place in range(2):
        noisy, t, drawn = noised(pipe, sets[0], Micro(5, 0, 0), place)
        i = shuffled(5, "p", 2, place)
        with torch.no_grad():
            out = pipe.unet(noisy, t, **kind_of(pipe).encode(pipe, [sets[0].prompts[i]])).sample
        error = (out - drawn).square()
        each.append((error * weight).sum() / (4 * weight.sum()) if i == 0 else error.mean())
    torch.testing.assert_close(given, torch.stack(each).mean(), rtol=1e-5, atol=0)
    edge = Image.new("L", (48, 16))
    edge.paste(255, (0, 0, 10, 16))  # beside the square in the middle
    with pytest.raises(InputError, match=r"mask of picture 2 is black in the square .* --mask_floor above 0"):
        Pictures(pipe, "p", [noise(16, 16), noise(48, 16)], ["a", "b"], size=16, masks=Masks([half, edge]))
    Pictures(pipe, "p", [noise(48, 16)], ["a"], size=16, masks=Masks([edge], 0.1))


# -- captions and epochs ---------------------------------------------------------------------------------------------


def test_dropped_captions_are_drawn_by_key_and_are_what_guidance_leads_away_from(models):
    pipe = load_pipeline(models["sdxl"])
    pictures = Pictures(pipe, "p", [noise(16, 16)], ["dog"], size=16, drop=0.3)
    said = [pictures.draw(Micro(7, 0, 0), place).prompt for place in range(300)]
    by_key = [torch.rand((), generator=generator(7, "p drop", place)).item() < 0.3 for place in range(300)]
    assert [prompt == "" for prompt in said] == by_key and 60 < sum(by_key) < 120
    texts = Prompts(pipe, cache=True)(["", "dog"])
    hidden, nothing, pooled, pooled_nothing = pipe.encode_prompt("dog", do_classifier_free_guidance=True)
    assert torch.equal(texts["encoder_hidden_states"], torch.cat([nothing, hidden]).detach())
    assert torch.equal(texts["text_embeds"], torch.cat([pooled_nothing, pooled]).detach()) and not nothing.any()
    pipe = load_pipeline(models["sd"])
    _, nothing = pipe.encode_prompt("dog", "cpu", 1, do_classifier_free_guidance=True)
    assert torch.equal(kind_of(pipe).encode(pipe, [""])["encoder_hidden_states"], nothing) and nothing.any()


def test_flips_and_crops_are_drawn_again_in_each_epoch(models):
    """One photo of three, over twenty epochs, cached or not; the keys say which."""
    pipe = load_pipeline(models["sdxl"])
    images = [noise(24, 16, seed=i) for i in range(3)]
    for crop in ("center", "random"):
        pictures = Pictures(pipe, "p", images, ["0", "1", "2"], size=16, crop=crop, flip=True)
        of_one = [place for place in range(60) if shuffled(0, "p", 3, place) == 1]
        assert [place // 3 for place in of_one] == list(range(20)) and bool(pictures.cached) == (crop == "center")
        flips = [bool(torch.randint(2, (), generator=generator(0, "p flip", place))) for place in of_one]
        found = [pictures.draw(Micro(0, 0, 0), place).frame.corner[1] for place in of_one]
        cuts = [
            4 if crop == "center" else int(torch.randint(9, (), generator=generator(0, "p crop", p))) for p in of_one
        ]
        assert found == [8 - left if flip else left for left, flip in zip(cuts, flips, strict=True)]
        assert any(flips) and not all(flips) and (crop == "center" or len(set(cuts)) > 4)
        if crop == "center":  # each epoch another latent of the one or the other
            latents = [pictures.draw(Micro(0, 0, 0), place).latent for place in of_one]
            assert len({latent.sum().item() for latent in latents}) == 20


# -- int8 ------------------------------------------------------------------------------------------------------------


def test_a_training_s_half_precision_is_not_that_of_encoders(models):
    """Autocast, in which losses are computed, leaves the autoencoder in fp32 (half blurs or overflows) and the text
    encoders as the pipeline runs them, frozen ones by the prompt: kept or not, latents and texts are equal."""
    pipe = load_pipeline(models["sd"], "bf16")
    pipe.text_encoder.requires_grad_(False)
    seen: list[tuple[bool, int]] = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda _, args: seen.append((torch.is_autocast_enabled("cpu"), len(args[0])))
    )
    images, said = [noise(24, 16)], ["a dog", "a cat"]
    kept, anew = (Pictures(pipe, "instance", images, said[:1], size=16, cache=cache) for cache in (True, False))
    with torch.autocast("cpu", torch.bfloat16):
        latents = [pictures.draw(Micro(0, 0, 0), 0).latent for pictures in (kept, anew)]
        texts = [Prompts(pipe, cache)(said)["encoder_hidden_states"] for cache in (True, False)]
        pipe.text_encoder.requires_grad_(True)
        learnt = Prompts(pipe, False)(said)["encoder_hidden_states"]
    assert latents[1].dtype == torch.float32 and torch.equal(*latents)
    assert seen == [*[(False, 1)] * 4, (False, 2)] and torch.equal(*texts)
    assert [t.requires_grad for t in (*texts, learnt)] == [False, False, True]


def test_a_base_in_int8(models, photos, tmp_path):
    """The denoiser's linear layers alone are int8 and stay as they are; what is learnt is near what float learns."""
    pipe = load_pipeline(models["sd"])
    prepare(pipe, zero_snr=False, int8=True)
    linear = [m for m in pipe.unet.modules() if isinstance(m, torch.nn.Linear)]
    assert linear and all(is_quantised(m.weight) for m in linear)
    rest = [p for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()]
    assert sum(map(is_quantised, rest)) == len(linear)
    config = settings(models["sd"], photos, tmp_path / "float")
    dreambooth.main(config)
    dreambooth.main(replace(config, output=tmp_path / "int8", base="int8"))
    for a, b in zip(read_log(tmp_path / "float/metrics.jsonl"), read_log(tmp_path / "int8/metrics.jsonl"), strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)


# -- whole runs ------------------------------------------------------------------------------------------------------


def settings(model: Path, photos: Path, output: Path):
    """A short run on the square, the samples at its end."""
    return dreambooth.Config(
        photos=photos, prompt=PROMPT, model=str(model), output=output, steps=4, batch=2, accumulate=2, rank=2,
        learning_rate=1e-2, sample_every=0, sample_count=2, sample_steps=2, save_every=3, masks=False,
    )  # fmt: skip


def everything(model: Path, photos: Path, output: Path):
    return replace(
        settings(model, photos, output), masks=True, mask_floor=0.1, buckets=True, flip=True, crop="random", prior=0.7,
        prior_by="photos", caption_dropout=0.3, ema=0.9, zero_snr=True, min_snr=5.0, train_text_encoder=True,
    )  # fmt: skip


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_with_everything_a_run_resumes_exactly_and_its_files_draw_its_samples(
    models, photos, tmp_path, monkeypatch, capsys
):
    config = everything(models["v"], photos, tmp_path / "whole")
    dreambooth.main(config)
    assert not (config.output / "class").exists()  # the photos are the class images
    cut = replace(config, output=tmp_path / "cut")
    real = Pictures.draw

    def draw(self, micro, place):
        if micro.index == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, micro, place)

    monkeypatch.setattr(Pictures, "draw", draw)
    assert dreambooth.main(cut).stopped
    monkeypatch.undo()
    dreambooth.main(replace(cut, resume=True))
    whole, again = (load_file(c.output / "adapter.safetensors") for c in (config, cut))
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    last = config.output / "checkpoints/step-0000004.safetensors"
    own = {name[8:]: t for name, t in load_file(last).items() if name.startswith("adapter.")}
    averages = adapter_of(last)
    assert averages is not None and all(torch.equal(tensor, averages[name]) for name, tensor in whole.items())
    assert any(not torch.equal(tensor, own[name]) for name, tensor in whole.items())

    pipe = plain(models["v"])  # and with diffusers alone, as the card says
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    assert "rescale_betas_zero_snr=True" in (config.output / "README.md").read_text()
    with safe_open(config.output / "adapter.safetensors", "pt") as file:
        assert file.metadata()["zero_snr"] == "true"
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 16, "width": 16}
    seeds = [seed_of(0, "sample", i) for i in range(2)]

    def samples() -> np.ndarray:
        images = pipe([PROMPT] * 2, generator=[torch.Generator().manual_seed(s) for s in seeds], **options).images
        return np.concatenate([np.asarray(image) for image in images], axis=1)

    assert np.array_equal(samples(), drawn(config.output / "samples/step-0000000.png"))
    vm.load({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, config.output / "adapter.safetensors")
    after = drawn(config.output / "samples/step-0000004.png")
    assert np.array_equal(samples(), after)
    capsys.readouterr()
    line = ["generate", PROMPT, "--model", models["v"], "--adapters", config.output, "--resolution", 16, "--steps", 2]
    line += ["--guidance", 7.5, "--seeds", seeds[0], "--output", tmp_path / "out"]
    assert cli.main(list(map(str, line))) == 0, capsys.readouterr().err
    off = np.abs(drawn(tmp_path / "out/0000.png").astype(int) - after[:, :16])  # alone, not in a batch of two
    assert off.max() <= 1


def test_a_resume_reads_the_photos_as_the_run_did(models, photos, tmp_path, monkeypatch):
    """What a photo is shrunk to hangs on the model's own resolution, which only the resumed run's settings hold."""
    sizes, real = [], runs.read_and_tell
    monkeypatch.setattr(
        runs, "read_and_tell", lambda folder, size, *more: sizes.append(size) or real(folder, size, *more)
    )
    dreambooth.main(replace(settings(models["sd"], photos, tmp_path / "a"), steps=1))
    here = cli.parse(dreambooth.Config, "x", ["--config", str(tmp_path / "a/config.yaml")])
    assert dreambooth.main(replace(here, resume=True)).step == 1 and sizes == [16, 16]


def test_class_images_serve_the_base_too(models, photos, tmp_path):
    config = replace(settings(models["sd"], photos, tmp_path / "a"), prior=1.0, prior_by="base", class_images=2)
    dreambooth.main(config)
    assert len(list((config.output / "class").glob("*.png"))) == 2
    dreambooth.main(replace(config, output=tmp_path / "b", prior_by="images", class_folder=config.output / "class"))
    base, images = (read_log(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert base[0]["class"] < 1e-8 < base[-1]["class"] < images[-1]["class"]  # no change yet, then some


def test_what_makes_no_sense_is_refused_before_anything_is_written(models, photos, tmp_path, capsys, monkeypatch):
    for package in ("prodigyopt", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)  # as if they were not installed
    good = ["dreambooth", "--photos", photos, "--prompt", PROMPT, "--model", models["sd"], "--output", tmp_path / "out"]

    def refused(*more: object) -> str:
        assert cli.main(list(map(str, [*good, *more]))) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "predicts epsilon" in refused("--zero_snr", "true")
    assert "ema must be at least 0 and less than 1, not 1.0" in refused("--ema", 1)
    assert "caption_dropout must be at least 0 and less than 1" in refused("--caption_dropout", 1)
    assert "mask_floor must be at least 0 and less than 1" in refused("--mask_floor", -0.1)
    assert 'pip install "vismodal[prodigy]"' in refused("--optimizer", "prodigy")
    assert 'pip install "vismodal[8bit]"' in refused("--optimizer", "adamw8bit")
    assert "prior_by" in refused("--prior_by", "nothing")
    assert "its weight is 0; write --prior 1" in refused("--prior_by", "photos")
    assert not (tmp_path / "out").exists()


def test_several_subjects_with_new_words_keep_their_classes_by_their_photos(models, photos, tmp_path):
    """Two subjects in buckets, whose classes are what the base says of their photos: no change yet, then some."""
    other = photo_folder(tmp_path / "cat", 3)
    subjects = (Subject(photos, PROMPT, "sks"), Subject(other, "a photo of zwx cat", "zwx"))
    several = replace(settings(models["sdxl"], photos, tmp_path / "out"), photos=None, prompt=None, subjects=subjects)
    options = {"tokens": ("sks", "zwx"), "buckets": True, "masks": True, "ema": 0.9, "caption_dropout": 0.2}
    dreambooth.main(replace(several, prior=1.0, prior_by="photos", **options))
    here = cli.parse(dreambooth.Config, "x", ["--config", str(tmp_path / "out/config.yaml")])
    other_class = tuple(replace(s, class_prompt="a photo of a pet") for s in here.subjects)
    with pytest.raises(InputError, match=r"class_prompts was \['a photo of dog'.* and is now \['a photo of a pet'"):
        dreambooth.main(replace(here, subjects=other_class, resume=True, steps=5))
    mixed = tuple(replace(s, class_folder=tmp_path) for s in here.subjects)
    with pytest.raises(InputError, match="is of two class prompts, 'a photo of dog' and 'a photo of cat'"):
        dreambooth.main(replace(here, subjects=mixed, prior_by="images", output=tmp_path / "not"))
    rows = read_log(tmp_path / "out" / "metrics.jsonl")
    assert rows[0]["class"] < 1e-8 < 1e-6 < rows[-1]["class"] < 0.1 and not (tmp_path / "out/class").exists()
