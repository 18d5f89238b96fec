"""Every kind of diffusion pipeline: what its denoiser is given, its loss by hand, its training, files and refusals."""

import inspect
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import KINDS, photo_folder, tiny_kind, tiny_pipeline

import vismodal as vm
from vismodal import cli
from vismodal.diffusion import losses
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.kinds import Frame, kind_of, pack, places, unpack
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.presets import adapted, sites_of
from vismodal.diffusion.processes import Diffusion, Flow, process_of
from vismodal.draw import generator, seed_of, shuffled
from vismodal.errors import InputError
from vismodal.formats import peft
from vismodal.site import Weight
from vismodal.train import Micro

diffusers = pytest.importorskip("diffusers")
dreambooth = cli.load_pipeline("dreambooth")
PROMPT = "a photo of sks dog"
FLOWS = ("sd3", "flux")
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        tiny_kind(kind, root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "dog", 3, p2="a sleeping dog", p3="sks dog runs")


def plain(folder: Path):
    """The pipeline as diffusers alone loads it."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Spy:
    """What a denoiser is called with, by the names of its arguments; those that say nothing are left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls: list[dict] = []
        self.signature = inspect.signature(type(model).forward)
        self.hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs) -> None:
        given = dict(self.signature.bind(module, *args, **kwargs).arguments)
        flat = {**given, **(given.pop("added_cond_kwargs", None) or {})}
        nothing = ("self", "return_dict", "added_cond_kwargs")
        self.calls.append({k: v for k, v in flat.items() if k not in nothing and v is not None and v != {}})


# -- what the denoiser is given --------------------------------------------------------------------------------------


@every
def test_the_denoiser_is_given_what_the_pipeline_gives(models, kind):
    """Texts, sizes, packing, places and guidance: as in the first step of plain sampling, argument by argument."""
    pipe = load_pipeline(models[kind])
    of = kind_of(pipe)
    spy = Spy(of.model(pipe))
    prompts = [PROMPT, "a very different cat"]
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "guidance_scale": 1.0, **of.calling}
    with torch.no_grad():
        pipe(prompts, generator=torch.Generator().manual_seed(0), output_type="latent", **options)
        theirs = spy.calls[0]
        latents = theirs.get("hidden_states", theirs.get("sample"))
        latents = pipe._unpack_latents(latents, 16, 16, pipe.vae_scale_factor) if kind == "flux" else latents
        time = theirs["timestep"].expand(2) * (1000 if kind == "flux" else 1)
        frame = Frame((16, 16), (0, 0), (16, 16))
        said = of.predict(pipe, latents, time, of.encode(pipe, prompts), [frame, frame])
    ours = spy.calls[-1]
    assert said.shape == latents.shape == (2, 4, 8, 8)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.expand_as(ours[name]), check_dtype=False, msg=name)


def test_packing_and_places_are_those_of_flux(models):
    pipe = load_pipeline(models["flux"])
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), pipe._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)
    assert torch.equal(unpack(pack(x), 6, 8), pipe._unpack_latents(pack(x), 12, 16, pipe.vae_scale_factor))
    theirs = pipe._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(places(3, 4), theirs)


@pytest.mark.parametrize("flip", [False, True])
def test_the_frame_says_where_the_square_lies(models, monkeypatch, flip):
    """Each column of the picture has a colour of its own, so the square tells where it was cut."""
    seen = []

    def encode(pipe, images):
        seen.append(images)
        return torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)

    monkeypatch.setattr("vismodal.diffusion.pictures.encode_images", encode)
    pipe = load_pipeline(models["sdxl"])
    columns = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (16, 1, 3))
    pictures = [Image.fromarray(columns), Image.fromarray(columns.transpose(1, 0, 2).copy())]
    rows = Pictures(pipe, "p", pictures, ["a", "b"], size=16, crop="random", flip=flip, sizes=[(80, 32), (16, 40)])
    corners, mirrored = set(), 0
    for place in range(24):
        frame = rows.draw(Micro(1, 0, 0), place).frame
        numbers = ((seen[-1][0, 0] + 1) * 127.5).round().int()  # of the picture's columns or rows
        tall = shuffled(1, "p", 2, place)
        assert frame.target == (16, 16) and frame.original == ((40, 16) if tall else (32, 80))
        if tall:
            assert frame.corner == (int(numbers[0, 0]), 0)
        else:
            turned = bool(numbers[0, 0] > numbers[0, -1])
            mirrored += turned
            # of the mirrored picture, column 0 is the picture's last one
            assert frame.corner == (0, 39 - int(numbers[0, 0]) if turned else int(numbers[0, 0]))
        corners.add(frame.corner)
    assert len(corners) > 8 and bool(mirrored) == flip


def test_time_ids_are_each_samples_own_with_a_prior(models):
    pipe = load_pipeline(models["sdxl"])
    spy = Spy(pipe.unet)
    wide = [Image.effect_noise(size, 60).convert("RGB") for size in ((48, 16), (16, 64), (32, 32))]
    square = [Image.effect_noise((16, 16), 60).convert("RGB")]
    sets = [
        Pictures(pipe, "instance", wide, ["x", "y", "z"], size=16),
        Pictures(pipe, "class", square, ["w"], size=16),
    ]
    denoising(pipe, sets, Prompts(pipe, cache=True), 3, Weights(prior=1.0))(Micro(seed=0, step=0, index=0))
    ids = {(48, 16): [16, 48, 0, 16], (16, 64): [64, 16, 24, 0], (32, 32): [32, 32, 0, 0]}
    order = [shuffled(0, "instance", 3, place) for place in range(3)]
    want = [[*ids[wide[i].size], 16, 16] for i in order] + [[16, 16, 0, 0, 16, 16]] * 3
    assert spy.calls[0]["time_ids"].tolist() == want and sorted(order) == [0, 1, 2]
    texts = kind_of(pipe).encode(pipe, ["xyz"[i] for i in order] + ["w"] * 3)
    torch.testing.assert_close(spy.calls[0]["text_embeds"], texts["text_embeds"])


def test_flux_is_told_a_guidance_of_one_and_sizes_in_full_precision(models):
    """fp16 would round a side of 2049 pixels, and bf16 one of 257."""
    from vismodal.diffusion.kinds import time_ids

    ids = time_ids([Frame((2049, 257), (1, 3), (1024, 1024))])
    assert ids.tolist() == [[2049, 257, 1, 3, 1024, 1024]]
    pipe = load_pipeline(models["flux"])
    spy = Spy(pipe.transformer)
    denoising(pipe, [_set(pipe, "p")], Prompts(pipe, True), 2, Weights())(Micro(0, 0, 0))
    assert spy.calls[0]["guidance"].tolist() == [1.0, 1.0]


# -- the loss --------------------------------------------------------------------------------------------------------


def _set(pipe, name: str, count: int = 3) -> Pictures:
    pictures = [Image.effect_noise((16 + 8 * i, 16), 60).convert("RGB") for i in range(count)]
    return Pictures(pipe, name, pictures, [f"{name} {i}" for i in range(count)], size=16)


def by_hand(kind: str, pipe, x, noise, draw, prompt: str, corner: int, width: int) -> torch.Tensor:
    """The squared error of one row, with the pipeline's own pieces. `draw` is the generator of its level."""
    scheduler = pipe.scheduler
    same = {"device": "cpu", "num_images_per_prompt": 1}
    if kind in FLOWS:
        s = torch.randn((), generator=draw).sigmoid()
        if kind == "sd3":
            s = 3 * s / (1 + 2 * s)
        else:
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift

            s = scheduler.time_shift(calculate_shift(16), 1.0, s)
        noisy, target = (1 - s) * x + s * noise, noise - x
    else:
        t = torch.randint(1000, (1,), generator=draw)
        noisy, target = scheduler.add_noise(x, noise, t), noise
    if kind == "sdxl":
        hidden, _, pooled, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, **same)
        ids = pipe._get_add_time_ids((16, width), (0, corner), (16, 16), torch.float32, pooled.shape[-1])
        out = pipe.unet(noisy, t, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample
    elif kind == "sd3":
        hidden, _, pooled, _ = pipe.encode_prompt([prompt], None, None, do_classifier_free_guidance=False, **same)
        out = pipe.transformer(noisy, hidden, pooled, 1000 * s[None]).sample
    elif kind == "flux":
        hidden, pooled, text_ids = pipe.encode_prompt([prompt], None, **same)
        ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
        packed = pipe._pack_latents(noisy, 1, 4, 8, 8)
        out = pipe.transformer(packed, hidden, pooled, s[None], ids, text_ids, torch.ones(1)).sample
        out = pipe._unpack_latents(out, 16, 16, pipe.vae_scale_factor)
    else:
        hidden, mask, _, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, **same)
        alpha = {"resolution": torch.tensor([[16.0, 16.0]]), "aspect_ratio": torch.tensor([[1.0]])}
        added = alpha if kind == "pixart" else {"resolution": None, "aspect_ratio": None}
        out = pipe.transformer(noisy, hidden, t, added, encoder_attention_mask=mask).sample.chunk(2, dim=1)[0]
    return (out - target).square().mean()


@every
def test_the_loss_by_hand_row_by_row(models, kind):
    pipe = load_pipeline(models[kind])
    sets = [_set(pipe, "instance"), _set(pipe, "class", 2)]
    with torch.no_grad():
        given = denoising(pipe, sets, Prompts(pipe, cache=True), 2, Weights(prior=0.5))(Micro(3, 5, 11))
    sums = {"instance": 0.0, "class": 0.0}
    for pictures in sets:
        name = pictures.name
        for place in (22, 23):
            index = shuffled(3, name, len(pictures.images), place)
            width = 16 + 8 * index
            square = np.asarray(pictures.images[index], np.float32)[:, 4 * index : 4 * index + 16] / 127.5 - 1
            with torch.no_grad():
                posterior = pipe.vae.encode(torch.from_numpy(square.copy()).permute(2, 0, 1)[None]).latent_dist
                shape = posterior.mean.shape
                z = posterior.mean + posterior.std * torch.randn(shape, generator=generator(3, f"{name} latent", place))
                x = (z - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
                noise = torch.randn(shape[1:], generator=generator(3, f"{name} noise", place))[None]
                draw = generator(3, f"{name} level", place)
                error = by_hand(kind, pipe, x, noise, draw, pictures.prompts[index], 4 * index, width)
            sums[name] += error.item() / 2
    assert given["instance"].item() == pytest.approx(sums["instance"], rel=1e-4)
    assert given["class"].item() == pytest.approx(sums["class"], rel=1e-4)
    assert given["loss"].item() == pytest.approx(sums["instance"] + 0.5 * sums["class"], rel=1e-4)


def test_the_process_is_read_from_the_scheduler(models):
    levels = {kind: process_of(load_pipeline(models[kind])) for kind in KINDS}
    assert {kind for kind, process in levels.items() if isinstance(process, Flow)} == set(FLOWS)
    sd3, flux, pixart = levels["sd3"], levels["flux"], levels["pixart"]
    assert sd3.patch == flux.patch == 2 and sd3.shift(16) == sd3.shift(4096) == 3.0
    # as SD3's sampler shifts, and as Flux's does for 256 and 4096 tokens
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps = torch.arange(1000, 0, -1) / 1000
    torch.testing.assert_close(losses.shift_level(steps, sd3.shift(16)), scheduler.sigmas)
    assert flux.shift(256) == pytest.approx(math.exp(0.5)) and flux.shift(4096) == pytest.approx(math.exp(1.15))
    pipe = load_pipeline(models["pixart"])
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")  # as the real model's
    for process in (pixart, process_of(pipe)):
        assert isinstance(process, Diffusion) and torch.equal(process.alpha_bar, pipe.scheduler.alphas_cumprod)
    draws = [Flow("uniform", {}, 2).draw(generator(0, "x", i), (4, 8, 8)).item() for i in range(400)]
    normal = [Flow("logit_normal", {}, 2).draw(generator(0, "x", i), (4, 8, 8)).item() for i in range(400)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.05) and np.std(draws) == pytest.approx(12**-0.5, abs=0.02)
    assert np.mean(normal) == pytest.approx(0.5, abs=0.05) and np.std(normal) == pytest.approx(0.208, abs=0.02)


def test_zero_terminal_snr(tmp_path):
    """The last level is noise alone, and what v says there is -x."""
    tiny_pipeline(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe = load_pipeline(tmp_path / "v")
    process = process_of(pipe)
    x, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    steps = torch.tensor([0, 500, 999])
    assert process.alpha_bar[-1] == 0
    assert torch.equal(process.add_noise(x, noise, steps)[-1], noise[-1])
    assert torch.equal(process.target(x, noise, steps)[-1], -x[-1])
    torch.testing.assert_close(process.add_noise(x, noise, steps), pipe.scheduler.add_noise(x, noise, steps))
    torch.testing.assert_close(process.target(x, noise, steps), pipe.scheduler.get_velocity(x, noise, steps))
    weights = process.min_snr(steps, 5.0)
    assert weights.isfinite().all() and weights[-1] == 0
    loss = denoising(pipe, [_set(pipe, "p")], Prompts(pipe, True), 3, Weights(min_snr=5.0))(Micro(0, 0, 0))["loss"]
    assert loss.isfinite()


# -- whole runs ------------------------------------------------------------------------------------------------------


def settings(kind: str, models, photos, output: Path):
    """A short run that uses everything that draws random numbers, on every part that can be trained."""
    return dreambooth.Config(
        photos=photos, prompt=PROMPT, model=str(models[kind]), output=output, steps=3, batch=2, prior=0.7,
        class_images=2, flip=True, crop="random", resolution=16, sites=("+ff",), dropout=0.3, learning_rate=1e-2,
        rank=2, alpha=3.0, offset_noise=0.1, sample_every=0, sample_count=2, sample_steps=2, save_every=2,
        train_text_encoder=kind not in ("pixart", "sigma"), min_snr=0.0 if kind in FLOWS else 5.0,
    )  # fmt: skip


def samples(pipe) -> np.ndarray:
    """What the last of samples/ shows, drawn with diffusers alone."""
    kind = kind_of(pipe)
    seeds = [torch.Generator().manual_seed(seed_of(0, "sample", i)) for i in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": kind.guidance, "height": 16, "width": 16, **kind.calling}
    return np.concatenate([np.asarray(i) for i in pipe([PROMPT] * 2, generator=seeds, **options).images], axis=1)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@every
def test_a_run_resumes_exactly_and_its_files_draw_its_samples(models, photos, tmp_path, kind, capsys):
    whole = settings(kind, models, photos, tmp_path / "whole")
    dreambooth.main(whole)
    short = replace(whole, output=tmp_path / "short", class_folder=tmp_path / "whole/class", steps=1)
    dreambooth.main(short)
    dreambooth.main(replace(short, steps=3, resume=True))
    tensors = load_file(tmp_path / "whole/adapter.safetensors")
    again = load_file(tmp_path / "short/adapter.safetensors")
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in tensors)

    pipe = plain(models[kind])
    before, after = (pixels(tmp_path / f"whole/samples/step-000000{i}.png") for i in (0, 3))
    assert np.array_equal(samples(pipe), before) and not np.array_equal(before, after)
    parts = adapted(pipe, whole.train_text_encoder)
    adapter = vm.load(parts, tmp_path / "whole/adapter.safetensors")
    assert np.array_equal(samples(pipe), after)
    adapter.detach()
    file = tmp_path / "whole" / peft.FILE
    if kind in ("pixart", "sigma"):
        assert not file.exists() and "has no load_lora_weights" in capsys.readouterr().out
        return
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    # peft multiplies by alpha / rank after B, we before: a value on the edge between two colours may round apart
    off = np.abs(samples(pipe).astype(int) - after)
    assert off.max() <= 1 and (off > 0).mean() < 0.02


@every
def test_training_lowers_the_loss(models, photos, tmp_path, kind):
    """On rows, noise and levels that are the same before and after, and of another seed than the training's."""
    run = settings(kind, models, photos, tmp_path / "run")
    still = {"prior": 0.0, "dropout": 0.0, "offset_noise": 0.0, "min_snr": 0.0, "train_text_encoder": False}
    more = {"sites": ("all",), "crop": "center", "flip": False, "rank": 8, "alpha": None}
    dreambooth.main(replace(run, steps=25, batch=4, save_every=0, sample_count=1, **still, **more))
    pipe = load_pipeline(models[kind])
    adapter = vm.load(adapted(pipe, text=False), tmp_path / "run/adapter.safetensors")
    found = dreambooth.runs.read_and_tell(photos, 16)
    pictures = Pictures(
        pipe, "p", [p.image for p in found], [PROMPT, f"{PROMPT}, a sleeping dog", "sks dog runs"], size=16
    )
    loss = denoising(pipe, [pictures], Prompts(pipe, cache=True), 16, Weights())
    with torch.no_grad():
        after = loss(Micro(99, 0, 0))["loss"].item()
        with adapter.disabled():
            before = loss(Micro(99, 0, 0))["loss"].item()
    assert after < 0.97 * before


@every
def test_half_precision_and_checkpointing_run(models, photos, tmp_path, kind):
    run = settings(kind, models, photos, tmp_path / "run")
    half = {"mixed_precision": "bf16", "gradient_checkpointing": True, "prior": 0.0, "sites": ("all",)}
    dreambooth.main(replace(run, steps=1, batch=1, sample_count=1, save_every=0, **half))
    assert pixels(tmp_path / "run/samples/step-0000001.png").shape == (16, 16, 3)
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "run/adapter.safetensors").values())


# -- what is adapted, and what is refused ----------------------------------------------------------------------------


def test_presets(models):
    pipes = {kind: load_pipeline(models[kind]) for kind in ("sdxl", "sd3", "flux", "pixart")}
    parts = {kind: kind_of(pipe).model(pipe) for kind, pipe in pipes.items()}
    add = {"attn.add.k", "attn.add.out", "attn.add.q", "attn.add.v"}
    own, cross = {f"attn.{x}" for x in ("q", "k", "v", "out")}, {f"xattn.{x}" for x in ("q", "k", "v", "out")}
    attention = {"sdxl": own | cross, "sd3": own | add, "flux": own | add, "pixart": own | cross}
    for kind, model in parts.items():
        assert set(sites_of(model, ("attention",))) == attention[kind]
        more = {"mlp.up", "mlp.down"} | ({"mlp.gate"} if kind == "sdxl" else set())
        assert set(sites_of(model, ("+ff",))) == attention[kind] | more
        everything = set(sites_of(model, ("all",)))
        assert everything > attention[kind] | more | {"time"} and not everything & {"norm", "bias", "head"}
        assert sites_of(model, ("attn.q", "mlp.*")) == ("attn.q", "mlp.*")
        vm.adapt(model, vm.LoRA(sites=sites_of(model, ("all",)), rank=1)).detach()
    assert "conv" in sites_of(parts["sdxl"], ("+conv",))
    with pytest.raises(InputError, match=r"FluxTransformer2DModel has no convolutions .*write \+ff or all"):
        sites_of(parts["flux"], ("+conv",))


def test_the_last_block_of_sdxls_first_encoder_is_dead_and_left_out(models, photos, tmp_path):
    pipe = load_pipeline(models["sdxl"])
    config = replace(settings("sdxl", models, photos, tmp_path), prior=0.0)
    adapter = dreambooth.adapt(config, pipe)
    texts = [key.partition("/")[2] for key in adapter.modules if "text_encoder" in key]
    assert sorted({t.partition(".self_attn")[0] for t in texts if t.startswith("text_encoder.")}) == [
        "text_encoder.encoder.layers.0"
    ]
    assert len({t.partition(".self_attn")[0] for t in texts if t.startswith("text_encoder_2.")}) == 2
    adapter.detach()
    whole = vm.adapt({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, vm.LoRA(sites=("attn.q", "attn.out")))
    denoising(pipe, [_set(pipe, "p")], Prompts(pipe, False), 2, Weights())(Micro(0, 0, 0))["loss"].backward()
    assert {key.partition("/")[2].partition(".self_attn")[0] for key in whole.unused()} == {
        "text_encoder.encoder.layers.1"
    }


def test_what_is_not_adapted_gets_no_gradients(models, photos, tmp_path):
    """Beside CLIPs that are trained T5 is not: gradients of its own would be as large as it is, and nobody's."""
    pipe = load_pipeline(models["sd3"])
    adapter = dreambooth.adapt(replace(settings("sd3", models, photos, tmp_path), prior=0.0), pipe)
    denoising(pipe, [_set(pipe, "p")], Prompts(pipe, False), 1, Weights())(Micro(0, 0, 0))["loss"].backward()
    bases = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3]
    mine = {id(p) for p in adapter.parameters()}
    assert not any(p.grad is not None for base in bases for p in base.parameters() if id(p) not in mine)
    assert not any(p.requires_grad for p in pipe.text_encoder_3.parameters()) and not adapter.unused()


def test_the_texts_queries_in_the_last_block_of_sd3_are_dead_and_no_site(models):
    from diffusers.models.attention import JointTransformerBlock

    pipe = load_pipeline(models["sd3"])
    found = [site.key for site in vm.sites(pipe.transformer) if site.kind == "attn.add.q"]
    assert found == ["transformer_blocks.0.attn.add_q_proj"]
    table = {JointTransformerBlock: (Weight("queries", "attn.add_q_proj.weight"),)}
    adapter = vm.adapt(pipe.transformer, vm.LoRA(sites=("queries",), rank=2), sites=table)
    denoising(pipe, [_set(pipe, "p")], Prompts(pipe, True), 2, Weights())(Micro(0, 0, 0))["loss"].backward()
    assert [key.partition("/")[2] for key in adapter.unused()] == ["transformer_blocks.1.attn.add_q_proj"]


def refused(capsys, *arguments: object) -> str:
    assert cli.main(["dreambooth", *map(str, arguments)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_a_kind_cannot_do_is_refused_before_anything_is_written(models, photos, tmp_path, capsys):
    def given(kind: str, *more: object) -> str:
        good = ("--photos", photos, "--prompt", PROMPT, "--output", tmp_path / "out", "--resolution", 16)
        return refused(capsys, *good, "--model", models[kind], *more)

    for kind in FLOWS:
        assert "trained by flow matching" in (line := given(kind, "--min_snr", 5)) and "--min_snr 0" in line
    assert "is a T5EncoderModel, which cannot be trained" in given("pixart", "--train_text_encoder")
    assert "has no convolutions for the preset +conv" in given("sd3", "--sites", "+conv")
    assert "levels" in given("sd3", "--levels", "cosine")
    assert not (tmp_path / "out").exists()
    pipe = load_pipeline(models["flux"])
    pipe.vae_scale_factor = 8  # as the real one's
    with pytest.raises(InputError, match="resolution must be a multiple of 16 for a FluxPipeline, not 24"):
        dreambooth.fitted(dreambooth.Config(resolution=24), pipe)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(InputError, match="EDMEulerScheduler has no beta_schedule"):
        process_of(pipe)


def test_sd3_comes_without_t5_too(models, tmp_path):
    pipe = plain(models["sd3"])
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path / "small")
    small = load_pipeline(tmp_path / "small")
    assert list(kind_of(small).readers(small)) == ["text_encoder", "text_encoder_2"]
    loss = denoising(small, [_set(small, "p")], Prompts(small, True), 1, Weights())(Micro(0, 0, 0))["loss"]
    assert loss.isfinite()


def test_prompts_are_long_only_where_no_encoder_reads_them(models, capsys):
    from vismodal.diffusion.encode import warn_of_long

    long = "x" * 60  # CLIP's tokenizer sees 48 tokens here, T5 hundreds
    warn_of_long(load_pipeline(models["flux"]), [long])
    assert capsys.readouterr().err == ""
    warn_of_long(load_pipeline(models["sdxl"]), [long])
    assert "does not see the last 14 tokens" in capsys.readouterr().err
