"""DreamBooth end to end on tiny random pipelines: what it trains and writes, how it resumes, what it refuses."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import photo_folder, tiny_pipeline

import vismodal as vm
from vismodal import cli
from vismodal.callbacks import read_log
from vismodal.diffusion import losses
from vismodal.diffusion.denoise import Prompts, Weights, denoising
from vismodal.diffusion.encode import warn_of_long
from vismodal.diffusion.generate import fill_folder
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.processes import noise_schedule
from vismodal.diffusion.prompts import has_word, prompts_for, without_word
from vismodal.draw import generator, seed_of, shuffled
from vismodal.errors import InputError
from vismodal.train import Micro

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parent.parent
dreambooth = cli.load_pipeline("dreambooth")
Config, main = dreambooth.Config, dreambooth.main
PROMPT = "a photo of sks dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "dog", 3, p2="a sleeping dog", p3="sks dog runs")


@pytest.fixture
def settings(model, photos, tmp_path):
    """A short run that uses everything that draws random numbers."""
    return Config(
        photos=photos, prompt=PROMPT, model=str(model), output=tmp_path / "run", steps=4, batch=2, accumulate=2,
        prior=0.7, class_images=3, flip=True, train_text_encoder=True, dropout=0.3, learning_rate=1e-2, rank=2,
        alpha=3.0, warmup=2, offset_noise=0.1, min_snr=5.0, sample_every=0, sample_count=2, sample_steps=2,
        save_every=3,
    )  # fmt: skip


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(folder / "metrics.jsonl")]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def plain_pipeline(folder: Path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_samples(pipe, count=2) -> np.ndarray:
    """What samples/step-N.png shows, drawn with diffusers alone."""
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 16, "width": 16}
    seeds = [torch.Generator().manual_seed(seed_of(0, "sample", i)) for i in range(count)]
    images = pipe([PROMPT] * count, generator=seeds, **options).images
    return np.concatenate([np.asarray(image) for image in images], axis=1)


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_results_are_what_plain_diffusers_draws(settings, model, capsys):
    result = main(replace(settings, sample_every=2))
    out = settings.output
    assert (result.output, result.step, result.stopped) == (out, 4, False)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "adapter.safetensors", "checkpoints", "class", "config.yaml", "loss.png", "metrics.jsonl",
        "pytorch_lora_weights.safetensors", "samples", "sheet.png",
    ]  # fmt: skip
    assert sorted(p.name for p in (out / "samples").iterdir()) == [f"step-000000{i}.png" for i in (0, 2, 4)]
    assert [row["step"] for row in read_log(out / "metrics.jsonl")] == [1, 2, 3, 4]
    last = read_log(out / "metrics.jsonl")[-1]
    assert {"loss", "instance", "class", "gradient", "lr", "seconds"} <= last.keys()

    pipe = plain_pipeline(model)
    assert np.array_equal(plain_samples(pipe), pixels_of(out / "samples/step-0000000.png"))
    after = pixels_of(out / "samples/step-0000004.png")
    pipe.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    # peft multiplies by alpha / rank (1.5) after B, we before: a value on the edge between two colours may round apart
    off = np.abs(plain_samples(pipe).astype(int) - after)
    assert off.max() <= 1 and (off > 0).mean() < 0.005
    pipe = plain_pipeline(model)
    base = plain_samples(pipe)
    assert not np.array_equal(base, after)
    adapter = vm.load({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, out / "adapter.safetensors")
    assert np.array_equal(plain_samples(pipe), after)
    with adapter.disabled():  # off = base, bit by bit
        assert np.array_equal(plain_samples(pipe), base)

    told = capsys.readouterr().out
    assert str(out / "sheet.png") in told and "next: vismodal dreambooth --config" in told
    card = (out / "README.md").read_text()
    assert card.startswith("---\n") and "instance_prompt: a photo of sks dog" in card
    assert "load_lora_weights" in card and str(model.parent) not in card
    assert pixels_of(out / "sheet.png").shape[1] > 100 and pixels_of(out / "loss.png").shape[1] > 400


def test_training_lowers_the_loss(settings):
    main(replace(settings, steps=40, accumulate=1, save_every=0, prior=0.0, dropout=0.0, min_snr=0.0, offset_noise=0.0))
    loss = [row["loss"] for row in rows(settings.output)]
    assert np.mean(loss[-10:]) < 0.9 * np.mean(loss[:10])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_loss_by_hand_row_by_row(model, photos, prediction, batch):
    """Each row alone, with its own prompt: batches in which pictures, prompts or weights are out of step differ."""
    pipe = load_pipeline(model)
    pipe.scheduler.register_to_config(prediction_type=prediction)
    images = [p.image for p in vm_photos(photos)]
    sets = [
        Pictures(pipe, "instance", images, ["sks one", "sks two", "sks three"], size=16),
        Pictures(pipe, "class", images[:2], ["dog", "cat"], size=16),
    ]
    micro = Micro(seed=3, step=5, index=11)
    weights = Weights(prior=0.5, min_snr=5.0)
    given = denoising(pipe, sets, Prompts(pipe, cache=True), batch, weights)(micro)

    alpha_bar = noise_schedule(pipe)[1]
    sums = {"instance": 0.0, "class": 0.0}
    plain = {"instance": 0.0, "class": 0.0}
    for pictures in sets:
        for place in range(11 * batch, 12 * batch):
            name, key = pictures.name, (lambda purpose, n=pictures.name, p=place: generator(3, f"{n} {purpose}", p))
            index = shuffled(3, name, len(pictures.images), place)
            with torch.no_grad():
                square = torch.from_numpy(np.asarray(diffusion_square(pictures.images[index]), np.float32)) / 127.5 - 1
                posterior = pipe.vae.encode(square.permute(2, 0, 1)[None]).latent_dist
                x = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=key("latent"))
                x = x * pipe.vae.config.scaling_factor
                t = torch.randint(1000, (1,), generator=key("level"))
                noise = torch.randn(x.shape[1:], generator=key("noise"))[None]
                a = alpha_bar[t].view(1, 1, 1, 1)
                ids = pipe.tokenizer(
                    pictures.prompts[index], padding="max_length", max_length=48, return_tensors="pt"
                ).input_ids
                text = pipe.text_encoder(ids)[0]
                out = pipe.unet(a.sqrt() * x + (1 - a).sqrt() * noise, t, encoder_hidden_states=text).sample
                v = a.sqrt() * noise - (1 - a).sqrt() * x
                error = (out - (noise if prediction == "epsilon" else v)).square().mean().item()
                snr = (a / (1 - a)).item()
            weight = min(1, 5 / snr) if prediction == "epsilon" else min(snr, 5) / (snr + 1)
            sums[name] += weight * error / batch
            plain[name] += error / batch
    assert given["loss"].item() == pytest.approx(sums["instance"] + 0.5 * sums["class"], rel=1e-4)
    assert given["instance"].item() == pytest.approx(plain["instance"], rel=1e-4)
    assert given["class"].item() == pytest.approx(plain["class"], rel=1e-4)


def vm_photos(folder: Path):
    from vismodal.data.photos import read_photos

    return read_photos(folder).photos


def diffusion_square(image: Image.Image) -> Image.Image:
    from vismodal.reports.run import square

    return square(image, 16)


def test_a_method_s_own_learning_rates_are_kept(settings, monkeypatch):
    monkeypatch.setattr(vm.LoRA, "rate", lambda self, tensor: 0.0 if tensor == "B" else 1.0)
    main(replace(settings, prior=0.0, steps=2, warmup=0))
    tensors = adapter_of(settings.output)
    assert not any(t.any() for name, t in tensors.items() if name.endswith(".B"))
    assert any(name.endswith(".B") for name in tensors)


def test_caching_and_checkpointing_change_nothing(settings, tmp_path):
    whole = replace(settings, train_text_encoder=False, steps=2, prior=0.0)
    main(whole)
    main(replace(whole, output=tmp_path / "uncached", cache=False))
    main(replace(whole, output=tmp_path / "less", gradient_checkpointing=True))
    assert rows(tmp_path / "uncached") == rows(whole.output)
    for name, tensor in adapter_of(whole.output).items():
        torch.testing.assert_close(adapter_of(tmp_path / "uncached")[name], tensor)
        torch.testing.assert_close(adapter_of(tmp_path / "less")[name], tensor)


def test_random_crops_and_bf16_run(settings):
    main(replace(settings, crop="random", mixed_precision="bf16", steps=2, resolution=24, gradient_checkpointing=True))
    assert len(rows(settings.output)) == 2
    assert pixels_of(settings.output / "samples/step-0000002.png").shape == (24, 48, 3)


# -- class images ----------------------------------------------------------------------------------------------------


def test_class_images_made_found_or_partly_found_give_one_adapter(settings, tmp_path):
    short = replace(settings, steps=2, class_images=6)
    main(short)
    made = settings.output / "class"
    main(replace(short, output=tmp_path / "found", class_folder=made))
    partly = shutil.copytree(made, tmp_path / "partly")
    for name in ("generated-00001.png", "generated-00005.png"):
        (partly / name).unlink()
    main(replace(short, output=tmp_path / "half", class_folder=partly))
    first = adapter_of(settings.output)
    assert same(first, adapter_of(tmp_path / "found")) and same(first, adapter_of(tmp_path / "half"))
    assert len({path.read_bytes() for path in made.iterdir()}) == 6


def test_own_class_images_are_used_and_only_the_rest_is_made(tmp_path):
    folder = photo_folder(tmp_path / "class", 2)
    asked = []

    def make(seeds):
        asked.extend(seeds)
        return [Image.new("RGB", (8, 8))] * len(seeds)

    assert fill_folder(folder, 5, make, seed=1, batch=2) == 3
    assert asked == [seed_of(1, "class image", i) for i in range(3)]
    assert fill_folder(folder, 5, make, seed=1, batch=2) == 0 and len(asked) == 3


# -- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resume_is_exact_inside_epoch_and_accumulation(settings, tmp_path, monkeypatch, stop):
    """Stopped before micro-batch 1, 4 or 7 of 8; an epoch is 3 photos, a step 2 micro-batches of 2."""
    main(settings)
    cut = replace(settings, output=tmp_path / "cut", class_folder=settings.output / "class")
    real = Pictures.draw

    def draw(self, micro, place):
        if micro.index == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, micro, place)

    monkeypatch.setattr(Pictures, "draw", draw)
    assert main(cut).stopped
    assert not (cut.output / "adapter.safetensors").exists()
    monkeypatch.undo()
    result = main(replace(cut, resume=True))
    assert (result.step, result.stopped) == (4, False)
    assert same(adapter_of(settings.output), adapter_of(cut.output))
    assert rows(settings.output) == rows(cut.output)
    names = [f"samples/step-000000{i}.png" for i in (0, 4)]
    assert all((settings.output / n).read_bytes() == (cut.output / n).read_bytes() for n in names)


KILL = """
import os, signal, sys
sys.path.insert(0, {root!r})
from vismodal import files
from vismodal.cli import main
real = files.os.replace
def replace(source, target):
    if "step-0000003.safetensors" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)   # the third checkpoint is on disk, not yet under its name
    return real(source, target)
files.os.replace = replace
main(sys.argv[1:])
"""


def test_resume_from_the_command_line_is_exact_after_kill_9_while_saving(settings, tmp_path, capsys):
    main(settings)
    out = tmp_path / "killed"
    config = replace(settings, output=out, save_every=1, threads=torch.get_num_threads())  # others round otherwise
    dreambooth.runs.save_config(config, tmp_path)
    code = KILL.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code, "dreambooth", "--config", tmp_path / "config.yaml"])
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in sorted((out / "checkpoints").glob("step*"))] == [
        f"step-000000{i}.safetensors" for i in (1, 2)
    ]
    assert list((out / "checkpoints").glob(".*"))  # the torn file
    assert cli.main(["dreambooth", "--config", str(out / "config.yaml"), "--resume"]) == 0
    assert "2/4" in capsys.readouterr().err  # it went on from step 2
    assert same(adapter_of(settings.output), adapter_of(out))
    assert rows(settings.output) == rows(out)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_finished_run_is_extended_exactly(settings, tmp_path):
    main(replace(settings, steps=5))
    short = replace(settings, output=tmp_path / "short", class_folder=settings.output / "class", steps=2)
    main(short)
    main(replace(short, steps=5, resume=True))
    assert same(adapter_of(settings.output), adapter_of(short.output))


def test_one_config_for_api_command_line_and_yaml(settings, tmp_path):
    dreambooth.runs.save_config(settings, tmp_path)
    file = str(tmp_path / "config.yaml")
    assert cli.parse(Config, "x", ["--config", file]) == settings
    line = [f"--{k.replace('_', '-')}={json.dumps(v)}" for k, v in yaml.safe_load(Path(file).read_text()).items()]
    assert cli.parse(Config, "x", [part.replace('="', "=").rstrip('"') for part in line]) == settings
    assert cli.parse(Config, "x", ["--config", file, "--resume", "--steps", "9"]) == replace(
        settings, resume=True, steps=9
    )
    assert cli.parse(Config, "x", []) == Config()


# -- bad input: one line, exit code 2, nothing half-written ----------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    """The error line of a command that must fail."""
    assert cli.main(["dreambooth", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def test_bad_settings_are_refused_before_anything_is_written(model, photos, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    good = ("--photos", photos, "--prompt", PROMPT, "--model", model, *out)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.jpg").write_text("no picture")
    assert "is empty" in refused(capsys, "--photos", tmp_path / "empty", "--prompt", PROMPT, *out)
    assert "no usable photo" in refused(capsys, "--photos", tmp_path / "texts", "--prompt", PROMPT, *out)
    assert "there is no folder" in refused(capsys, "--photos", tmp_path / "nowhere", "--prompt", PROMPT, *out)
    assert "the prompt is missing" in refused(capsys, "--photos", photos, *out)
    assert "lacks the subject's word 'sks'" in refused(capsys, *good, "--prompt", "a photo of tasks")
    assert "lacks the subject's word 'zwx'" in refused(capsys, *good, "--subject", "zwx")
    assert "class prompt 'sks dogs' must" in refused(capsys, *good, "--prior", 1, "--class-prompt", "sks dogs")
    assert "batch must be at least 1, not 0" in refused(capsys, *good, "--batch", 0)
    assert "learning_rate must be at least 0, not -1" in refused(capsys, *good, "--learning_rate", -1)
    assert "resolution must be a multiple of 8, not 50" in refused(capsys, *good, "--resolution", 50)
    assert "unrecognized arguments: --stepps 3" in refused(capsys, *good, "--stepps", 3)
    assert "nothing to resume" in refused(capsys, *good, "--resume")
    assert "no site of kind 'attn.x'" in refused(capsys, *good, "--sites", '["attn.x"]')
    assert "rank must be at least 1, not 0" in refused(capsys, *good, "--rank", 0)
    assert "steps must be at least 1, not 0" in refused(capsys, *good, "--steps", 0)
    assert "Unsupported logging capability: nobody" in refused(capsys, *good, "--track", "nobody")
    missing = next(n for n in ("aim", "clearml", "swanlab") if importlib.util.find_spec(n) is None)
    assert f"the tracker {missing} is not installed" in refused(capsys, *good, "--track", missing)
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in refused(capsys, *good, "--mixed_precision", "fp16")
    assert "there is no command 'dreambooht'" in (cli.main(["dreambooht"]), capsys.readouterr().err)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_model_with_a_part_missing_is_named(model, photos, tmp_path, capsys, part):
    broken = shutil.copytree(model, tmp_path / "broken")
    good = ("--photos", photos, "--prompt", PROMPT, "--model", broken, "--output", tmp_path / "out")
    if part in ("unet", "vae", "text_encoder"):
        weights = next((broken / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-100])
        assert "cannot be loaded" in refused(capsys, *good)
        weights.rename(weights.with_suffix(".bin"))
        assert f"part '{part}': no weights" in (line := refused(capsys, *good)) and "pickle" in line
        (broken / part / "config.json").unlink()
        assert f"part '{part}'" in refused(capsys, *good)
    shutil.rmtree(broken / part)
    assert f"missing its part '{part}'" in refused(capsys, *good)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused_by_name(model, photos, tmp_path, capsys):
    other = shutil.copytree(model, tmp_path / "other")
    good = ("--photos", photos, "--prompt", PROMPT, "--model", other, "--output", tmp_path / "out")
    index = other / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusionPipeline", "StableDiffusionUpscalePipeline"))
    assert "is a StableDiffusionUpscalePipeline; what can be trained" in refused(capsys, *good)
    index.write_text(text[:-9])
    assert "is no JSON" in refused(capsys, *good)
    index.unlink()
    assert "lacks model_index.json" in refused(capsys, *good)
    assert "there is no model folder" in refused(capsys, *good, "--model", tmp_path / "nowhere")
    (tmp_path / "web-ui.safetensors").touch()
    assert 'from_single_file("web-ui.safetensors")' in refused(
        capsys, *good, "--model", tmp_path / "web-ui.safetensors"
    )
    assert not (tmp_path / "out").exists()


def test_a_file_says_of_no_place_on_this_machine(model, tmp_path):
    pipe = load_pipeline(model)
    pipe.text_encoder.config._name_or_path = (
        "/home/me/.cache/huggingface/hub/models--OWNER--NAME/snapshots/0a1b/text_encoder"
    )
    adapter = vm.adapt({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, vm.LoRA(sites=("attn.q",), rank=1))
    file = vm.save(adapter, tmp_path / "a.safetensors")
    assert [base.name for base in adapter.bases.values()] == [f"{model.name}/unet", "OWNER/NAME/text_encoder"]
    assert str(model.parent).encode() not in file.read_bytes() and b"home" not in file.read_bytes()


def test_off_the_cpu_pictures_are_decoded_one_at_a_time(model):
    assert [load_pipeline(model, device=device).vae.use_slicing for device in ("cpu", "meta")] == [False, True]


def test_a_checkpoint_of_another_run_or_model_is_refused(settings, model, tmp_path, capsys):
    main(replace(settings, steps=1, prior=0.0))
    file = settings.output / "config.yaml"
    again = ("--config", file, "--resume", "--steps", 2)
    before = {p: p.read_bytes() for p in settings.output.rglob("*") if p.is_file()}
    assert "holds a run already" in refused(capsys, "--config", file)
    assert "learning_rate was 0.01 and is now 0.02" in refused(capsys, *again, "--learning_rate", 0.02)
    tiny_pipeline(tmp_path / "wide", cross=24)
    assert "the model's unet was" in refused(capsys, *again, "--model", tmp_path / "wide")
    more = photo_folder(tmp_path / "more", 4)
    assert "photos was '3 pictures" in refused(capsys, *again, "--photos", more)
    assert {p: p.read_bytes() for p in settings.output.rglob("*") if p.is_file()} == before
    main(replace(settings, steps=2, prior=0.0, resume=True))
    assert "has made 2 steps already, more than steps=1; write 2 or more" in refused(
        capsys, "--config", file, "--resume", "--steps", 1
    )


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(settings, capsys):
    main(replace(settings, steps=1))
    before = sorted(settings.output.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))  # any file larger than this: EFBIG, as ENOSPC elsewhere
    try:
        line = refused(capsys, "--config", settings.output / "config.yaml", "--resume", "--steps", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in line and "step-0000003.safetensors: File too large" in line
    assert sorted(settings.output.rglob("*")) == before
    assert cli.main(["dreambooth", "--config", str(settings.output / "config.yaml"), "--resume", "--steps", "3"]) == 0


def test_a_loss_that_is_not_finite_stops_with_its_step(settings, capsys, monkeypatch):
    monkeypatch.setattr(losses, "per_sample_mse", lambda p, t: (p - t).flatten(1).mean(1) * float("inf"))
    with pytest.raises(InputError, match=r"loss is .* at step 1"):
        main(replace(settings, min_snr=0.0))


def test_unusable_photos_are_named_and_skipped(settings, photos, tmp_path, capsys):
    mixed = shutil.copytree(photos, tmp_path / "mixed")
    (mixed / "notes.md").write_text("x")
    (mixed / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    main(replace(settings, photos=mixed, steps=1, prior=0.0))
    told = capsys.readouterr().err
    assert "skipped notes.md: " in told and "skipped torn.jpg: " in told


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_the_subject_word():
    assert has_word("a SKS-dog", "sks") and has_word("sks", "sks") and has_word("my c++ dog", "c++")
    assert not has_word("tasks", "sks") and not has_word("sksdog", "sks") and not has_word("", "sks")
    assert without_word("a photo of sks dog", "sks") == "a photo of dog"


def test_captions_keep_the_subject_word(photos):
    prompts = prompts_for(vm_photos(photos), PROMPT, "sks")
    assert prompts == [PROMPT, f"{PROMPT}, a sleeping dog", "sks dog runs"]


def test_long_prompts_are_told(model, capsys):
    pipe = load_pipeline(model)
    warn_of_long(pipe, ["short", "x" * 60])
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "does not see the last 14 tokens" in told


def test_the_embedded_example_runs(tmp_path, monkeypatch, capsys):
    """`vismodal dreambooth` without an argument; two steps of it."""
    from vismodal.paths import asset

    try:
        asset("tiny-sd")
    except InputError:
        pytest.skip("the embedded tiny Stable Diffusion is not there yet")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["dreambooth", "--steps", "2", "--sample-steps", "2"]) == 0
    told = capsys.readouterr().out
    assert "runs/dreambooth-1/sheet.png" in told and "next: vismodal dreambooth --photos" in told
    assert Path("runs/dreambooth-1/sheet.png").exists()
