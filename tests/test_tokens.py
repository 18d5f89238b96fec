"""New words: what learns, how prompts are read, what is saved; and what else than LoRA DreamBooth can train."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_diffusion import photo_folder, tiny_clip, tiny_kind, tiny_pipeline, tiny_tokenizer

import vismodal as vm
from vismodal import cli
from vismodal.diffusion.adapters import Shelf, Use, read_adapters
from vismodal.diffusion.exports import export
from vismodal.diffusion.generate import generate
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.pictures import Pictures
from vismodal.diffusion.recipe import Subject
from vismodal.diffusion.requests import Manner, Request, draw
from vismodal.diffusion.words import teach
from vismodal.draw import seed_of
from vismodal.formats.bases import base_of
from vismodal.formats.files import read_file

pytest.importorskip("diffusers")
dreambooth = cli.load_pipeline("dreambooth")
Config, main = dreambooth.Config, dreambooth.main
PROMPT = "a photo of sks dog"
DRAWN = {"size": 16, "steps": 2, "guidance": 7.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photo_folder(tmp_path_factory.mktemp("photos") / "dog", 3)


@pytest.fixture
def settings(model, photos, tmp_path):
    return Config(
        photos=photos, prompt=PROMPT, model=str(model), output=tmp_path / "run", steps=2, batch=2, learning_rate=1e-2,
        sample_every=0, sample_count=1, sample_steps=2, save_every=0,
    )  # fmt: skip


def plain_pipeline(folder: Path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt: str = PROMPT, seed: int = 5) -> np.ndarray:
    """By the pipeline itself."""
    made = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "height": 16, "width": 16}
    return np.asarray(pipe(prompt, generator=made, **options).images[0]).astype(int)


def sample_of(output: Path, step: int) -> np.ndarray:
    with Image.open(output / f"samples/step-{step:07d}.png") as image:
        return np.asarray(image).astype(int)


def shaken(adapter: vm.Adapter, seed: int = 3, size: float = 0.3) -> vm.Adapter:
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=made))
    return adapter


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["eos", "eos-2"])
def test_it_is_a_table_with_more_rows(tmp_path, legacy):
    """Values and gradients are those of an encoder whose table has v behind it; the base's own stays as it is."""
    tokenizer = tiny_tokenizer(tmp_path)
    torch.manual_seed(0)
    encoder = tiny_clip(tokenizer, 16, projected=12).eval()
    table = encoder.text_model.embeddings.token_embedding.weight
    size, before = len(table), table.detach().clone()
    ids = torch.tensor([[size - 2, 3, size + 2, size, size + 1, 9, size - 1, size - 1]])

    wide = torch.nn.Embedding(size + 3, 16)
    torch.manual_seed(0)
    other = tiny_clip(tokenizer, 16, projected=12).eval()
    other.text_model.embeddings.token_embedding = wide

    words = vm.TextualInversion(words=("sks", "<cat>"), vectors=(2, 1), starts=(7, 8, 9))
    adapter = vm.adapt(encoder, words)
    assert torch.equal(next(adapter.parameters()), before[[7, 8, 9]])
    shaken(adapter)
    (v,) = adapter.parameters()
    wide.weight.data = torch.cat([before, v.detach()])
    if legacy:  # transformers then takes the largest id for the end of the text, and v's are larger: so ours is right
        encoder.text_model.eos_token_id = 2
    given, wanted = encoder(ids).text_embeds, other(ids).text_embeds
    torch.testing.assert_close(given, wanted)
    given.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(v.grad, wide.weight.grad[size:])
    assert v.grad.abs().sum(1).min() > 0

    optimizer = torch.optim.AdamW(adapter.groups(0.1))
    optimizer.step()
    assert torch.equal(table, before) and table.grad is None
    assert [p.shape for p in adapter.parameters()] == [(3, 16)]
    assert not torch.equal(encoder(ids).text_embeds, given)


def test_words_that_make_no_sense_are_refused(tmp_path):
    encoder = tiny_clip(tiny_tokenizer(tmp_path), 16)
    for options, why in (
        ({"words": ("a b",)}, "without spaces"),
        ({"words": ("a", "a")}, "given twice"),
        ({"vectors": (0,)}, "above 0"),
        ({"vectors": (2,), "starts": (1, 2, 3)}, "starts has 3 numbers for 2 vectors"),
        ({"starts": (1000,)}, "not 1000"),
        ({"sites": ("mlp",)}, "does not end at a table"),
    ):
        with pytest.raises(vm.InputError, match=why):
            vm.adapt(encoder, vm.TextualInversion(**options))


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_have_the_word_while_its_adapter_acts(model, tmp_path):
    pipe = load_pipeline(model)
    plain, base = pipe.tokenizer, drawn(pipe)
    own = plain("a sks dog").input_ids
    adapter = shaken(vm.adapt({"text_encoder": pipe.text_encoder}, vm.TextualInversion(words=("sks",), vectors=(2,))))
    teach(pipe, adapter)
    drawn(pipe, "a cat")  # no warning, which would be an error here: it is taught, and this text has no word of it
    new = [len(plain), len(plain) + 1]
    assert pipe.tokenizer("a sks dog").input_ids[2:4] == new
    assert pipe.tokenizer(["SKS-dog"]).input_ids[0][1:3] == new
    assert pipe.tokenizer("tasks").input_ids == plain("tasks").input_ids
    assert not np.array_equal(drawn(pipe), base)
    with adapter.disabled():
        assert pipe.tokenizer("a sks dog").input_ids == own and np.array_equal(drawn(pipe), base)
    other = vm.adapt({"text_encoder": pipe.text_encoder}, vm.TextualInversion(words=("sks",)), "other")
    teach(pipe, other)
    with pytest.raises(vm.InputError, match="'sks' is one of several adapters that act: default, other"):
        pipe.tokenizer("a sks dog")
    other.detach()
    third = vm.adapt({"text_encoder": pipe.text_encoder}, vm.TextualInversion(words=("zwx",)), "other")
    teach(pipe, third)  # of the name of one that is gone, whose word it has not
    with adapter.disabled():
        assert pipe.tokenizer("a sks dog").input_ids == own
    third.detach()
    pipe.tokenizer.save_pretrained(tmp_path / "saved")
    assert len(type(plain).from_pretrained(tmp_path / "saved")) == len(plain)
    adapter.detach()
    assert pipe.tokenizer("a sks dog").input_ids == own and np.array_equal(drawn(pipe), base)
    vm.adapt({"text_encoder": pipe.text_encoder}, vm.TextualInversion(words=("dog",)))  # another one of the same name
    assert pipe.tokenizer("a sks dog").input_ids == own


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_diffusers_draws_the_same_from_the_exported_files(kind, tmp_path):
    """By `load_textual_inversion`; SD3's pipeline has none, and its T5 reads the word as ever."""
    folder = tmp_path / "model"
    tiny_pipeline(folder) if kind == "sd" else tiny_kind(kind, folder)
    pipe = load_pipeline(folder)
    encoders = {n: e for n in ("text_encoder", "text_encoder_2") if "CLIP" in type(e := getattr(pipe, n, 0)).__name__}
    adapter = shaken(vm.adapt(encoders, vm.TextualInversion(words=("<sks>", "sks"), vectors=(2, 1))))
    with pytest.warns(UserWarning, match=r"the new words <sks>, sks, so the base reads these as ever: write .*teach\("):
        base = drawn(pipe, "a <sks> dog")  # loaded and not taught, which nothing else would tell
    teach(pipe, adapter)
    after = drawn(pipe, "a <sks> dog")
    assert np.abs(after - base).max() > 1
    written = export(pipe, adapter, tmp_path)
    lines = written.loading
    assert [path.name for path in written.files] == ["sks.safetensors", "sks-2.safetensors"]
    assert bool(lines) == (kind != "sd3")
    if kind in ("sd", "sdxl"):
        pipe = plain_pipeline(folder)
        exec("\n".join(lines).replace("embeddings/", f"{tmp_path}/embeddings/"), {"pipe": pipe})
        assert np.abs(drawn(pipe, "a <sks> dog") - after).max() <= 1


# -- runs --------------------------------------------------------------------------------------------------------------


def test_textual_inversion_from_run_to_pictures(settings, model, tmp_path):
    """Nothing but the rows learns; diffusers and `generate` draw the samples again from the files."""
    main(replace(settings, method="none", tokens=("sks:2",), token_learning_rate=0.5))
    tensors = load_file(settings.output / "adapter.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "textualinversion/text_encoder:text.tokens.v": (2, 16)
    }
    after, before = sample_of(settings.output, 2), sample_of(settings.output, 0)
    assert not np.array_equal(after, before)
    assert not (settings.output / "pytorch_lora_weights.safetensors").exists()
    card = (settings.output / "README.md").read_text()
    assert "teach(pipe, adapter)" in card and "adapter.scale" not in card  # which would raise
    pipe = plain_pipeline(model)
    seed = seed_of(0, "sample", 0)
    assert np.array_equal(drawn(pipe, seed=seed), before)
    pipe.load_textual_inversion(str(settings.output / "embeddings/sks.safetensors"))
    assert np.array_equal(drawn(pipe, seed=seed), after)

    out = tmp_path / "drawn"
    line = ["generate", PROMPT, "--adapters", settings.output, "--model", model, "--seeds", seed, "--output", out]
    assert cli.main([*map(str, line), "--steps", "2", "--resolution", "16", "--guidance", "7.5"]) == 0
    with Image.open(out / "0000.png") as image:
        assert np.array_equal(np.asarray(image), after)
    card = (settings.output / "README.md").read_text()
    assert 'pipe.load_textual_inversion("embeddings/sks.safetensors")' in card and "teach(pipe, adapter)" in card


def test_pivotal_tuning_stops_its_words_and_resumes_exactly(settings, tmp_path, monkeypatch):
    whole = replace(
        settings,
        tokens=("sks:3",),
        token_learning_rate=0.5,
        token_init=("dog",),
        token_steps=2,
        steps=4,
        save_every=1,
        keep=9,
    )
    main(whole)
    rows = {}
    for step in range(1, 5):
        state = load_file(whole.output / f"checkpoints/step-000000{step}.safetensors")
        rows[step] = state["adapter.textualinversion/text_encoder:text.tokens.v"]
        lora = [t for name, t in state.items() if name.startswith("adapter.lora") and name.endswith(".B")]
        assert all(t.any() for t in lora)
    assert not torch.equal(rows[1], rows[2])
    assert torch.equal(rows[2], rows[3]) and torch.equal(rows[3], rows[4])
    pipe = plain_pipeline(whole.model)
    pipe.load_lora_weights(whole.output, weight_name="pytorch_lora_weights.safetensors")
    pipe.load_textual_inversion(str(whole.output / "embeddings/sks.safetensors"))
    assert np.abs(drawn(pipe, seed=seed_of(0, "sample", 0)) - sample_of(whole.output, 4)).max() <= 1

    cut, real = replace(whole, output=tmp_path / "cut"), Pictures.draw

    def killed(self, micro, place):
        if micro.step == 1:  # while the words learn
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, micro, place)

    monkeypatch.setattr(Pictures, "draw", killed)
    assert main(cut).stopped
    monkeypatch.undo()
    main(replace(cut, resume=True))
    ours, theirs = (load_file(run.output / "adapter.safetensors") for run in (cut, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_custom_diffusion_trains_keys_and_values_and_words(settings, model, capsys):
    main(replace(settings, method="crossattention", tokens=("sks:3",), prior=1.0, class_images=2))
    pipe = load_pipeline(model)
    wanted = {
        f"crossattention/unet.{n}" for n, m in pipe.unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))
    }
    tensors = load_file(settings.output / "adapter.safetensors")
    assert {n.removesuffix(".value") for n in tensors} == wanted | {"textualinversion/text_encoder:text.tokens.v"}
    base = dict(pipe.unet.named_parameters())
    assert all(not torch.equal(tensors[f"{n}.value"], base[f"{n.partition('unet.')[2]}.weight"]) for n in wanted)
    assert "web UIs" in capsys.readouterr().out
    held = read_file(settings.output / "webui.safetensors")
    assert held.tokens["sks"]["text_encoder"].equal(tensors["textualinversion/text_encoder:text.tokens.v"])
    assert len(held.layers) == len(wanted)


def test_drop_path_may_leave_sites_out_for_a_while(settings):
    """At 0.9 and one photo a step nearly all of them rest in the first."""
    result = main(replace(settings, method="adapterplus(drop_path=0.9)", batch=1))
    assert result.step == 2


@pytest.mark.parametrize(
    "method", ["loha", "lokr", "oft(block_size=4)", "dora", "adaptformer(rank=4)", "restuningbypass(rank=4)"]
)
def test_any_method_trains_and_loads_again(settings, model, method, capsys):
    main(replace(settings, method=method))
    pipe = load_pipeline(model)
    vm.load({"unet": pipe.unet}, settings.output / "adapter.safetensors")
    seed = seed_of(0, "sample", 0)
    after = generate(pipe, [PROMPT], [seed], **DRAWN)[0]
    assert np.array_equal(np.asarray(after), sample_of(settings.output, 2))
    assert not np.array_equal(np.asarray(after), sample_of(settings.output, 0))
    name = {"dora": "pytorch_lora_weights", "loha": "webui", "lokr": "webui"}.get(method)
    there = {p.stem for p in settings.output.glob("*.safetensors")} - {"adapter"}
    assert there == ({name} if name else set()) and (name or "have no file for it" in capsys.readouterr().out)


# -- several subjects --------------------------------------------------------------------------------------------------


def test_rows_of_several_subjects_keep_picture_and_prompt_together(settings, tmp_path, monkeypatch):
    """The denoiser is given, row by row, a picture of the subject whose prompt it reads, and then that one's class."""
    colours = {"sks": (255, 0, 0), "<cat>": (0, 0, 255)}
    for word, colour in colours.items():
        folder = tmp_path / word.strip("<>")
        (folder / "class").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
            Image.new("RGB", (16, 16), tuple(c // 2 for c in colour)).save(folder / f"class/{i}.png")
    both = tuple(
        Subject(tmp_path / w.strip("<>"), f"a photo of {w} {kind}", w, class_folder=tmp_path / w.strip("<>") / "class")
        for w, kind in (("sks", "dog"), ("<cat>", "cat"))
    )
    seen: list[tuple[list[str], list[float]]] = []
    real = dreambooth.loss_of.__globals__["denoising"]

    def spied(pipe, sets, prompts, batch, weights, base):
        means: list[torch.Tensor] = []
        encode = type(pipe.vae).encode
        said: list[list[str]] = []
        monkeypatch.setattr(type(pipe.vae), "encode", lambda vae, x: means.append(x.mean((0, 2, 3))) or encode(vae, x))
        kind = dreambooth.fitted.__globals__["kind_of"](pipe)
        predict = type(kind).predict

        def watched(kind, pipe, noisy, time, texts, frames):
            seen.append((said.pop(), [c.tolist() for c in means]))
            means.clear()
            assert len(noisy) == 8
            return predict(kind, pipe, noisy, time, texts, frames)

        monkeypatch.setattr(type(kind), "predict", watched)
        return real(pipe, sets, lambda given: said.append(list(given)) or prompts(given), batch, weights, base)

    monkeypatch.setitem(dreambooth.loss_of.__globals__, "denoising", spied)
    several = replace(settings, photos=None, prompt=None, subjects=both, tokens=("sks", "<cat>"), prior=1.0)
    main(replace(several, class_images=3, batch=4, cache=False, steps=3))
    assert len(seen) == 3
    for prompts, pictures in seen:
        for prompt, (red, _, blue) in zip(prompts, pictures, strict=True):
            assert (red > blue) == ("dog" in prompt)
        assert [max(red, blue) > 0.5 for red, _, blue in pictures] == [True] * 4 + [False] * 4
        assert ["dog" in p for p in prompts[:4]] == ["dog" in p for p in prompts[4:]]  # each with its class
        assert sum("dog" in p for p in prompts[:4]) == 2  # as often as the other
        assert all(("sks" in p or "<cat>" in p) == (i < 4) for i, p in enumerate(prompts))
    assert cli.parse(Config, "x", ["--config", str(settings.output / "config.yaml")]).subjects == tuple(
        replace(each, class_prompt=f"a photo of {kind}") for each, kind in zip(both, ("dog", "cat"), strict=True)
    )
    assert load_file(settings.output / "embeddings/cat.safetensors").keys() == {"<cat>"}


# -- files and generation ----------------------------------------------------------------------------------------------


def test_words_alone_have_no_half_and_count_by_their_vectors(model, tmp_path, capsys):
    """Beside a LoRA words act in full at its strength; a prompt that their vectors make too long is told as written."""
    pipe, file = plain_pipeline(model), tmp_path / "dog.safetensors"
    encoder, words = {"text_encoder": pipe.text_encoder}, vm.TextualInversion(words=("sks",), vectors=(80,))
    alone = vm.adapt(encoder, words, name="alone")
    with pytest.raises(vm.InputError, match=r"TextualInversion cannot be interpolated: scale must be 0 or 1, not 0\.5"):
        alone.scale = 0.5
    vm.save(alone, file)
    alone.detach()
    both = vm.adapt(encoder, [words, vm.LoRA(sites=("attn.q",))], name="both")  # of which the LoRA is zero
    teach(pipe, both)
    whole = drawn(pipe)
    both.scale = 0.5
    assert np.array_equal(drawn(pipe), whole)
    with both.disabled():
        assert not np.array_equal(drawn(pipe), whole)
    given = ["generate", PROMPT, "--model", str(model), "--adapters", str(file), "--steps", "1", "--resolution", "16"]
    over = len(pipe.tokenizer(PROMPT.replace("sks ", "")).input_ids) + 80 - pipe.tokenizer.model_max_length
    for strength in ("0", "1"):
        capsys.readouterr()
        assert cli.main([*given, "--strengths", strength, "--output", str(tmp_path / strength)]) == 0
        told = f"does not see the last {over} tokens of {PROMPT!r}" in capsys.readouterr().err
        assert told == (strength == "1")
    assert cli.main([*given, "--strengths", "0.5", "--output", str(tmp_path / "half")]) == 2
    assert not (tmp_path / "half").exists()


def test_rows_of_one_batch_have_words_of_their_own(model, tmp_path):
    """Two adapters with one word and other numbers of vectors, and the base, in one batch: as each one alone."""
    files = []
    for i, n in enumerate((1, 3)):
        pipe = load_pipeline(model)
        parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
        where = {"sites": ("attn.*",), "where": "unet.*", "rank": 2}
        made = vm.adapt(parts, [vm.LoRA(**where), vm.TextualInversion(words=("sks",), vectors=(n,))])
        files.append(f"{'ab'[i]}={vm.save(shaken(made, i), tmp_path / f'{i}.safetensors')}")
    manner = Manner(size=16, steps=2, guidance=5.0)
    uses = [(Use("a"),), (), (Use("b", 0.5),), (Use("a"),)]
    requests = [Request(PROMPT, 7, each) for each in uses]
    together = draw(pipe := load_pipeline(model), Shelf(pipe, read_adapters(files)), requests, manner)
    alone = [draw(p := load_pipeline(model), Shelf(p, read_adapters(files)), [r], manner)[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert len({np.asarray(image).tobytes() for image in together}) == 3
    plain = load_pipeline(model)
    by_hand = vm.load({"unet": plain.unet, "text_encoder": plain.text_encoder}, files[1][2:])
    teach(plain, by_hand)
    by_hand.scale = 0.5
    expected = generate(plain, [PROMPT], [7], size=16, steps=2, guidance=5.0)[0]
    assert np.array_equal(np.asarray(expected), np.asarray(alone[2]))
    with pytest.raises(vm.InputError, match="a and b both have the new word 'sks'"):
        Shelf(plain, read_adapters(files)).spell(PROMPT, [Use("a"), Use("b")])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_convert_writes_our_words_for_others(kind, tmp_path):
    folder = tmp_path / "model"
    pipe = tiny_pipeline(folder) if kind == "sd" else tiny_kind(kind, folder)
    encoders = {n: getattr(pipe, n) for n in ("text_encoder", "text_encoder_2") if getattr(pipe, n, None) is not None}
    methods = [vm.LoRA(where="unet.*", rank=2), vm.TextualInversion(words=("sks", "<cat>"), vectors=(2, 1))]
    adapter = shaken(vm.adapt({"unet": pipe.unet, **encoders}, methods))
    own = vm.save(adapter, tmp_path / "own.safetensors")
    rows = {}
    for key, v in adapter.state_dict().items():
        if key.endswith("tokens.v"):
            rows["text_encoder_2" if "text_encoder_2" in key else "text_encoder"] = v.split((2, 1))
    base = ["--base", str(folder)]
    assert cli.main(["convert", str(own), "--to", "kohya", "--out", str(tmp_path / "kohya.safetensors"), *base]) == 0
    bundled = load_file(tmp_path / "kohya.safetensors")
    keys = ["emb_params"] if kind == "sd" else ["clip_l", "clip_g"]
    for encoder, key in zip(encoders, keys, strict=True):
        for word, part in zip(("sks", "<cat>"), rows[encoder], strict=True):
            assert torch.equal(bundled[f"bundle_emb.{word}.{key}"], part)
    back = [
        "convert",
        str(tmp_path / "kohya.safetensors"),
        "--to",
        "vismodal",
        "--out",
        str(tmp_path / "back.safetensors"),
    ]
    assert cli.main([*back, *base]) == 0
    pipe = load_pipeline(folder)
    models = {name: getattr(pipe, name) for name in ("unet", *encoders)}
    again = vm.load(models, tmp_path / "back.safetensors")
    teach(pipe, again)
    theirs = read_file(tmp_path / "back.safetensors", base_of(folder)).tokens
    assert all(torch.equal(theirs["sks"][e], rows[e][0]) and torch.equal(theirs["<cat>"][e], rows[e][1]) for e in rows)
    teach(plain := load_pipeline(folder), vm.load({n: getattr(plain, n) for n in models}, own))
    assert np.abs(drawn(pipe, "a <cat> and sks") - drawn(plain, "a <cat> and sks")).max() <= 1

    one = vm.adapt(load_pipeline(folder).text_encoder, vm.TextualInversion(words=("sks",), vectors=(2,)))
    alone = vm.save(one, tmp_path / "alone.safetensors")
    assert cli.main(["convert", str(alone), "--to", "diffusers", "--out", str(tmp_path / "sks.safetensors")]) == 0
    assert load_file(tmp_path / "sks.safetensors")["sks"].equal(next(one.parameters()))
    assert cli.main(["inspect", str(own)]) == 0


def test_settings_that_contradict_each_other_are_refused(settings, model, photos, tmp_path, capsys):
    good = ["dreambooth", "--photos", photos, "--prompt", PROMPT, "--model", model, "--output", tmp_path / "out"]
    one = f'[{{"photos": "{photos}", "prompt": "{PROMPT}"}}]'
    for line, why in (
        (["--method", "none"], "method none leaves nothing to train"),
        (["--method", "none", "--tokens", "sks", "--train_text_encoder"], "leave out train_text_encoder"),
        (["--method", "dora", "--rank", 4], 'the method is dora; write --method "lora(rank=4)"'),
        (["--method", "lora(sites='attn.q')", "--sites", "attn.v"], "sites are said twice"),
        (["--method", "coop"], "CoOp has no place in a UNet2DConditionModel"),
        (["--method", "sparsemask"], "chooses by data"),
        (["--method", "adaptformer", "--sites", "attention"], "AdaptFormer fits no attention"),
        (["--tokens", "zwx"], "the new token 'zwx' is not in the prompt"),
        (["--tokens", "sks:0"], "with a number of vectors"),
        (["--tokens", "sks", "--token_init", "dog"], "'dog' is 3 tokens of the text_encoder, and sks has 1; write"),
        (["--token_steps", 3], "about new words"),
        (["--tokens", "sks", "--learning_rate", 0], "learning_rate must be above 0"),
        (["--subjects", one], "photos is each subject's own"),
        (["--method", "none", "--tokens", "sks", "--prior", 1], "nothing could change it; write --prior 0"),
        (["--method", "none", "--tokens", "sks", "--token_steps", 1, "--steps", 2], "write --steps 1"),
        (["--token_learning_rate", 0.1], "token_learning_rate is about new words; write --tokens"),
        (["--text_sites", "mlp.*"], "text_sites is about text encoders; write --train_text_encoder"),
        (["--class_prompt", "a dog"], "class_prompt is about the class, which is not kept; write --prior 1"),
        (["--class_folder", tmp_path], "class_folder is about the class, which is not kept; write --prior 1"),
        (["--prior", 1, "--prior_by", "photos", "--class_images", 3], "prior_by photos has none"),
        (["--tokens", '["sks", "dog"]', "--prior", 1], "'a photo of dog' has the new word 'dog'"),
        (["--masks", "false", "--mask_floor", 0.1], "mask_floor is about masks, which are not read"),
        (["--mask_floor", 0.1], "no photo has one; put NAME.mask.png"),
        (["--levels", "uniform"], "levels are of flow matching"),
        (["--weight_decay", -1], "weight_decay must be at least 0"),
        (["--threads", 0], "threads must be at least 1"),
    ):  # fmt: skip
        assert cli.main([*map(str, good), *map(str, line)]) == 2
        assert why in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
