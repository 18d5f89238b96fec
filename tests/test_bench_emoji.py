"""The emoji bench: its tasks ask for nothing learnt, each score by hand, a run end to end on a tiny pipeline."""

from __future__ import annotations

import json
import os
import signal
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_diffusion import tiny_pipeline
from torch import nn

import vismodal as vm
from vismodal import cli
from vismodal.checkpoint import read
from vismodal.data.emoji import COLOURS, HELD_OUT_MODULUS
from vismodal.diffusion.generate import generate
from vismodal.diffusion.load import load_pipeline
from vismodal.diffusion.words import teach
from vismodal.entries import entry
from vismodal.errors import InputError
from vismodal.evaluation import contest, emoji_tasks
from vismodal.evaluation.emoji_scores import Truth, answers, asked_scores, plain_scores
from vismodal.evaluation.emoji_tasks import GROUNDS, POSES, Captioned, Question, Task
from vismodal.evaluation.judge import Judge, dino, ground_of, likeness, placed, true_views
from vismodal.methods import LoRA, TextualInversion, Tune
from vismodal.reports.run import grid

pytest.importorskip("diffusers")
DATA = Path(__file__).parents[2] / "shared" / "data"
bench = cli.load_pipeline("bench_emoji")
Config, main = bench.Config, bench.main


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six held-out emoji and six others in both styles: squares of two sizes, each of its own two colours."""
    root, r = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    stems = [f"{i:04x}" for i in range(400)]
    held = [s for s in stems if zlib.crc32(s.encode()) % HELD_OUT_MODULUS == 0][:6]
    chosen = [*held, *[s for s in stems if s not in held and zlib.crc32(s.encode()) % HELD_OUT_MODULUS][:6]]
    for style, side, edge in (("noto", 64, 4), ("fluent", 96, 24)):
        folder = root / "emoji" / style
        folder.mkdir(parents=True)
        rows = []
        for i, stem in enumerate(chosen):
            rgba = np.zeros((side, side, 4), np.uint8)
            rgba[edge:-edge, edge : side // 2] = (*r.integers(0, 255, 3), 255)
            rgba[edge:-edge, side // 2 : -edge] = (*r.integers(0, 255, 3), 255)
            Image.fromarray(rgba).save(folder / f"{stem}.png")
            rows.append({"file_name": f"{stem}.png", "text": f"thing {'abcdefghijkl'[i]}", "keywords": []})
            rows[-1]["category"] = "Objects"
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return root


@pytest.fixture(scope="module")
def emojis(data):
    return emoji_tasks.read(data, "thing l", 5, seed=0)


class Thumbnail(nn.Module):
    """The picture at 4 x 4 pixels as its features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


JUDGE = Judge(Thumbnail(), 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "thumbnails")


def plain_picture(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), COLOURS[colour])


# -- the judge -------------------------------------------------------------------------------------------------------


def test_features_are_unit_vectors_of_normalised_pictures():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    for c, (mean, std) in enumerate(zip(JUDGE.mean, JUDGE.std, strict=True)):
        x[c] = (x[c] - mean) / std
    by_hand = x.reshape(3, 4, 4, 4, 4).mean((2, 4)).flatten()
    torch.testing.assert_close(JUDGE.features([image])[0], by_hand / by_hand.norm())
    assert JUDGE.views([[image, image], [image, image], [image, image]]).shape == (3, 2, 48)


def test_likeness_is_the_cosine_with_the_nearest_view():
    views = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])  # 2 things, 2 views
    pictures = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(likeness(pictures, views), torch.tensor([[1.0, 0.6], [0.0, 0.0]]))


def test_the_ground_is_the_rims_colour():
    for name in COLOURS:
        picture = plain_picture(name)
        picture.paste((1, 2, 3), (2, 2, 62, 62))
        assert ground_of(picture) == name


@pytest.mark.skipif(not (DATA / "weights").is_dir(), reason="needs the data folder beside the checkout")
def test_the_judge_of_the_data_folder_tells_true_pictures_apart():
    emojis, judge = emoji_tasks.read(DATA, "penguin", 8, seed=0), dino(DATA)
    known = judge.views(true_views(emojis.fluent, "blue", seed=0, purpose="true view", views=2))
    fresh = judge.views(true_views(emojis.fluent, "blue", seed=0, purpose="other", views=1))[:, 0]
    assert known.shape == (9, 2, 384) and (likeness(fresh, known).argmax(1) == torch.arange(9)).float().mean() > 0.8


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="lacks vit_small_patch14_dinov2"):
        dino(tmp_path)


# -- the tasks -------------------------------------------------------------------------------------------------------


def test_nothing_that_is_asked_was_learnt(emojis):
    names = {e.names[0] for e in emojis.noto}
    assert len(names) == 6 and [e.names for e in emojis.noto] == [e.names for e in emojis.fluent]
    style = emoji_tasks.style(emojis, "sks", 4, 3, seed=0)
    assert len(style.learnt.images) == len(style.learnt.captions) == 12 and style.usual is None
    assert [q.emoji for q in style.questions] == [0, 1, 2, 3, 4]
    assert style.questions[1].prompt == f"a drawing of a {emojis.noto[1].names[0]} in sks style on a blue background"
    assert all("sks" in c for c in style.learnt.captions)

    subject = emoji_tasks.subject(emojis, "sks", 2, 4, 3, seed=0)
    assert [ground_of(image) for image in subject.learnt.images] == [ground for ground, _ in POSES]
    assert subject.learnt.captions[0] == "a drawing of sks thing l on a black background"
    assert [q.ground for q in subject.questions] == [g for g in GROUNDS for _ in range(2)]
    learnt = style.learnt.captions + subject.usual.captions
    assert len(subject.usual.images) == 12 and not any("sks" in c for c in subject.usual.captions)
    assert not any(name in caption for name in names for caption in learnt)
    assert not set(GROUNDS) & {ground for ground, _ in POSES} and {q.emoji for q in subject.questions} == {5}
    assert [q.prompt for q in emoji_tasks.plain(emojis, 1)] == [
        f"a drawing of a {emojis.noto[0].names[0]} on a white background"
    ]


def test_too_few_emoji_and_unknown_subjects_are_told(data, emojis):
    with pytest.raises(InputError, match="no emoji is called 'thing z'; write one such as 'thing"):
        emoji_tasks.read(data, "thing z", 5, seed=0)
    with pytest.raises(InputError, match=r"only 6 emoji of .* are held out; write --held_out 6 or less"):
        emoji_tasks.read(data, "thing l", 7, seed=0)
    with pytest.raises(InputError, match="only 5 emoji to learn from"):
        emoji_tasks.style(emojis, "sks", 6, 1, seed=0)


def test_turning_is_clockwise_and_keeps_the_size():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = 255  # the upper half
    turned = emoji_tasks.turned(rgba, 90)
    assert turned.shape == rgba.shape and turned[:, 5:].min() == 255 and turned[:, :3].max() == 0


# -- the scores, by hand ---------------------------------------------------------------------------------------------


def cosine(a: Image.Image, b: Image.Image) -> float:
    x, y = (np.asarray(JUDGE.features([p])[0], np.float64) for p in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def test_every_score_by_hand(emojis):
    truth = Truth(JUDGE, emojis, views=2, seed=3)
    questions = [Question("", i, GROUNDS[i % 3]) for i in (0, 1, 4, 5)]
    r = np.random.default_rng(1)
    drawn = [
        placed(emojis.fluent[0], GROUNDS[0], r),  # right
        placed(emojis.fluent[2], GROUNDS[1], r),  # another emoji
        placed(emojis.noto[4], GROUNDS[1], r),  # the other style
        plain_picture("green"),  # nothing, on the wrong ground
    ]
    nearest = {}
    for style, emoji in (("fluent", emojis.fluent), ("noto", emojis.noto)):
        for p, (picture, q) in enumerate(zip(drawn, questions, strict=True)):
            views = true_views(emoji, q.ground, seed=3, purpose="true view", views=2)
            nearest[style, p] = [max(cosine(picture, view) for view in row) for row in views]
    own = [q.emoji for q in questions]
    fluent, noto = ([nearest[style, p][e] for p, e in enumerate(own)] for style in ("fluent", "noto"))
    by_hand = {
        "likeness": np.mean(fluent),
        "lean": np.mean(fluent) - np.mean(noto),
        "named": np.mean([np.argmax(nearest["fluent", p]) == e for p, e in enumerate(own)]),
        "style": np.mean([f > n for f, n in zip(fluent, noto, strict=True)]),
        "ground": 3 / 4,
    }
    assert asked_scores(truth, questions, drawn) == pytest.approx(by_hand, abs=1e-5)
    assert nearest["fluent", 0][0] == max(nearest["fluent", 0]) and 0 < by_hand["named"] < 1 and by_hand["style"] < 1

    base = [placed(e, q.ground, r) for e, q in zip(emojis.noto, questions, strict=False)]
    plain = {
        "drift": 1 - np.mean([cosine(a, b) for a, b in zip(drawn, base, strict=True)]),
        "kept": np.mean([np.argmax(nearest["noto", p]) == e for p, e in enumerate(own)]),
    }
    assert plain_scores(truth, questions, drawn, base) == pytest.approx(plain, abs=1e-5)
    assert plain_scores(truth, questions, drawn, drawn)["drift"] == pytest.approx(0, abs=1e-6)


def test_true_pictures_score_as_what_they_are(emojis):
    truth, questions = Truth(JUDGE, emojis, views=4, seed=0), emoji_tasks.plain(emojis, 6)
    task = Task("t", Captioned([], []), questions, "")
    fluent, noto = (asked_scores(truth, questions, answers(task, e, 0)) for e in (emojis.fluent, emojis.noto))
    assert fluent["style"] > noto["style"] and fluent["likeness"] > noto["likeness"] and fluent["ground"] == 1


# -- the contestants -------------------------------------------------------------------------------------------------


def test_a_method_is_written_by_name_or_with_options():
    assert entry("lora").methods == [LoRA(sites=("attn.*", "xattn.*", "mlp.*", "conv"))]
    given = entry('LoRA(rank=4, sites=("attn.q",), lr=2e-3, parts="text_encoder")')
    assert given.methods == [LoRA(rank=4, sites=("attn.q",))]
    assert (given.rates, given.parts) == ({"lora": 2e-3}, ("text_encoder",))
    assert given.identity == {  # by it results of earlier runs are found
        "method": {"method": "LoRA", "rank": 4, "sites": ("attn.q",)}, "lr": 2e-3, "parts": ["text_encoder"],
    }  # fmt: skip
    assert entry("tune(sites=('norm',))").methods == [Tune(sites=("norm",))]
    assert entry("lora(rank=4)").identity != entry("lora").identity


def test_several_methods_of_an_entry_stand_around_a_plus():
    both = entry("lora(lr=1e-3,rank=2)+TextualInversion(vectors=(4,))")
    assert (both.label, both.slug) == (
        "lora(lr=1e-3,rank=2) + TextualInversion(vectors=(4,))", "lora-lr-1e-3-rank-2-textualinversion-vectors-4",
    )  # fmt: skip
    assert both.methods == [LoRA(rank=2, sites=entry("lora").methods[0].sites), TextualInversion(vectors=(4,))]
    assert both.rates == {"lora": 1e-3, "textualinversion": 5e-3} and both.parts == ("unet", "text_encoder")
    assert both.identity != entry("lora(lr=1e-3, rank=2) + textualinversion").identity
    assert entry("lora + lora").rates == {"lora": 3e-3, "lora_1": 3e-3}


def test_settings_fit_the_unet_and_rates_are_each_methods_own(tmp_path):
    """LoRA's kin takes every matrix and convolution that LoRA takes, the others their own places."""
    pipe = tiny_pipeline(tmp_path)
    places = {}
    for name in ("lora", "dora", "loha", "lokr", "oft", "adaptformer", "pfeiffer", "crossattention"):
        adapter = contest.adapt(pipe, contest.worded(pipe, entry(name), "sks", "a"), 0)
        places[name] = {key.partition("/")[2] for key in adapter.modules}
        adapter.detach()
    assert all(places[name] == places["lora"] for name in ("dora", "loha", "lokr", "oft"))
    assert len(places["crossattention"]) == 2 * len(places["pfeiffer"]) and places["adaptformer"] == places["pfeiffer"]

    each = contest.worded(pipe, entry("lora(rank=2) + textualinversion(vectors=(3,), lr=7e-3)"), "sks", "ab")
    adapter = contest.adapt(pipe, each, 0)
    assert len(adapter.modules) == len(places["lora"]) + 1  # and nothing of LoRA in the text encoder
    v = next(p for key, p in adapter.named_parameters() if key.startswith("textualinversion"))
    rates = {id(p): group["lr"] for group in adapter.groups(each.rates) for p in group["params"]}
    assert {rate for p, rate in rates.items() if p != id(v)} == {3e-3} and rates[id(v)] == 7e-3
    a, b = pipe.tokenizer("ab", add_special_tokens=False).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight
    assert torch.equal(v, table[[a, b, a]]) and not any(p.requires_grad for p in pipe.unet.conv_in.parameters())
    with pytest.raises(InputError, match="learning rates are for lora, textualinversion, each of them; not lora"):
        adapter.groups({"lora": 1.0})


@pytest.mark.parametrize(
    "text, told",
    [
        ("lor", "no method 'lor'; write one of lora"),
        ("lora(4)", "describes no method; write a name such as lora"),
        ("lora(**x)", "describes no method"),
        ("lora tune", "describes no method"),
        ("__import__('os').getcwd()", "describes no method"),
        ("lora(rnk=4)", "lora has no option 'rnk'; it has lr, parts, sites"),
        ("lora(rank=0)", "rank must be at least 1"),
        ("lora + lor", "no method 'lor'"),
        ("textualinversion(words=('dog',))", "words cannot be chosen here; the new word is the bench's own, --word"),
        ("lora(lr=0)", "lr must be a number above 0"),
        ("lora(parts='vae')", "parts are of unet and text_encoder, not 'vae'"),
    ],
)
def test_what_is_no_method_is_told(text, told):
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        entry(text)


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(data, tmp_path, monkeypatch):
    """Everything small: six emoji, a judge without weights, a pipeline of 16 pixels."""
    monkeypatch.setattr(bench, "dino", lambda folder: JUDGE)
    tiny_pipeline(tmp_path / "model", prediction="v_prediction")
    return Config(
        data=data, model=str(tmp_path / "model"), output=tmp_path / "run", quick=True, subject="thing l", batch=2
    )


def test_a_run_scores_what_the_file_holds_and_goes_on_where_it_stopped(config, capsys, monkeypatch):
    assert main(replace(config, methods=("lora(rank=2)",))) == config.output
    out = config.output
    assert sorted(p.name for p in out.iterdir()) == [
        "config.yaml", "metrics.json", "sheet.png", "style", "subject", "table.md",
    ]  # fmt: skip
    figures = json.loads((out / "metrics.json").read_text())
    rows = figures["tasks"]["style"]
    assert list(rows) == [
        "true Fluent, elsewhere", "through the autoencoder", "true Noto, elsewhere", "base, without the word", "base",
        "base, other seeds", "lora(rank=2)",
    ]  # fmt: skip
    assert rows["base"]["drift"] == pytest.approx(0, abs=1e-6) and rows["base, other seeds"]["drift"] > 0
    file = out / "style" / "lora-rank-2.safetensors"
    facts = rows["lora(rank=2)"]
    assert facts["parameters"] == sum(t.numel() for t in read(file)[1].values()) and facts["lr"] == 3e-3
    assert facts["bytes"] == file.stat().st_size
    assert "| lora(rank=2) |" in (out / "table.md").read_text() and "thumbnails" in (out / "table.md").read_text()
    assert "the figures mean nothing" in capsys.readouterr().out

    fits = []
    real = contest.fit
    monkeypatch.setattr(contest, "fit", lambda *a, **k: fits.append(1) or real(*a, **k))
    with pytest.raises(InputError, match="holds a run already"):
        main(config)
    main(replace(config, methods=("lora(rank=2)", "tune(sites=('norm',))"), resume=True))
    again = json.loads((out / "metrics.json").read_text())["tasks"]
    assert len(fits) == 2 and again["style"]["lora(rank=2)"] == facts  # tune alone was trained, on both tasks
    main(replace(config, methods=("lora(rank=2)",), resume=True, steps=3))
    assert len(fits) == 4  # other settings: all anew


def test_the_file_is_what_draws(config):
    """Pictures of the run = those of a fresh pipeline with the file loaded."""
    main(replace(config, methods=("lora(rank=2, lr=1e-2)",), tasks=("subject",), steps=3))
    figures = json.loads((config.output / "metrics.json").read_text())["tasks"]["subject"]
    assert figures["lora(rank=2, lr=1e-2)"]["drift"] > 0
    pipe = load_pipeline(config.model)
    emojis = emoji_tasks.read(config.data, "thing l", 4, seed=0)
    questions = emoji_tasks.subject(emojis, "sks", 1, 1, 1, seed=0).questions
    vm.load({"unet": pipe.unet}, config.output / "subject" / "lora-rank-2-lr-1e-2.safetensors", "x")
    seeds = [bench.seed_of(0, "subject", i) for i in range(3)]
    with bench.runs.cpu_threads(1):
        drawn = generate(pipe, [q.prompt for q in questions], seeds, size=16, steps=2, guidance=4.0, batch=16)
    with Image.open(config.output / "subject" / "lora-rank-2-lr-1e-2-asked.png") as sheet:
        for i, picture in enumerate(drawn):
            assert picture.tobytes() == sheet.crop((16 * i, 0, 16 * i + 16, 16)).tobytes()


def test_new_words_draw_from_the_file_and_are_the_bases_again(config, monkeypatch):
    """Textual inversion, Custom Diffusion and pivotal tuning: pictures with the word are those of a fresh pipeline with
    the file; the run's pipeline then draws as the base did."""
    methods = ("textualinversion(lr=2)", "crossattention + textualinversion(lr=2)", "lora(rank=2) + textualinversion")
    pipes: list = []
    monkeypatch.setattr(bench, "load_pipeline", lambda *a, **k: pipes.append(load_pipeline(*a, **k)) or pipes[0])
    main(replace(config, methods=methods, tasks=("subject",)))
    emojis = emoji_tasks.read(config.data, "thing l", 4, seed=0)
    task = emoji_tasks.subject(emojis, "sks", 1, 1, 1, seed=0)
    asked, seeds = [q.prompt for q in task.questions], [bench.seed_of(0, "subject", i) for i in range(3)]

    def sheet(name: str) -> bytes:
        with Image.open(config.output / "subject" / f"{name}-asked.png") as found:
            return found.tobytes()

    def drawn(pipe, prompts=asked) -> bytes:
        with bench.runs.cpu_threads(1):
            return grid(generate(pipe, prompts, seeds, size=16, steps=2, guidance=4.0, batch=16), 16).tobytes()

    assert drawn(pipes[0]) == sheet("base") and drawn(pipes[0]) != drawn(pipes[0], [p + "." for p in asked])
    for method in methods:
        each, pipe = entry(method), load_pipeline(config.model)
        file = config.output / "subject" / f"{each.slug}.safetensors"
        adapter = vm.load(each.models(pipe), file, "x")
        words = adapter.methods["textualinversion"]
        assert words.words == ("sks",) and task.begin == "thing l"
        assert words.starts == tuple(pipe.tokenizer("thing l", add_special_tokens=False).input_ids[:1])
        v = next(p for key, p in adapter.named_parameters() if key.startswith("textualinversion"))
        assert not torch.equal(v, pipe.text_encoder.get_input_embeddings().weight[list(words.starts)])  # it has learnt
        teach(pipe, adapter)
        assert drawn(pipe) == sheet(each.slug) != sheet("base")


def test_an_interrupt_keeps_what_is_done(config, capsys, monkeypatch):
    real = contest.denoising
    seen = []

    def denoising(*arguments):
        loss = real(*arguments)

        def stopping(micro):
            seen.append(micro)
            if len(seen) == 4:  # of 2 steps a method: in the second method
                os.kill(os.getpid(), signal.SIGINT)
            return loss(micro)

        return stopping

    monkeypatch.setattr(contest, "denoising", denoising)
    two = replace(config, methods=("lora(rank=2)", "lora(rank=3)"), tasks=("style",))
    with pytest.raises(KeyboardInterrupt):
        main(two)
    told = capsys.readouterr().err
    assert "go on with: vismodal bench emoji --config" in told and "--resume" in told
    assert (config.output / "style" / "lora-rank-2.json").exists()
    assert not (config.output / "style" / "lora-rank-3.json").exists()
    main(replace(two, resume=True))
    assert len(seen) == 6 and (config.output / "table.md").exists()


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_has_two_words_and_its_lists_need_no_brackets(config, capsys):
    assert cli.main(["bench"]) == 0 and "bench emoji" in capsys.readouterr().out
    assert cli.main(["bench", "nothing"]) == 2
    assert "there is no command 'bench nothing'; write one of bench emoji" in capsys.readouterr().err
    assert cli.main(["bench", "emoji"]) == 2 and "write --data FOLDER" in capsys.readouterr().err
    given = cli.parse(Config, "x", ["--methods", "lora", "lora(rank=4)", "--quick", "--tasks", "style"])
    assert given == Config(methods=("lora", "lora(rank=4)"), quick=True, tasks=("style",))
    assert cli.parse(Config, "x", ["--methods", '["lora", "tune"]']).methods == ("lora", "tune")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"plain": 5}, "plain must be at most held_out, 4, not 5"),
        ({"word": "two words"}, "word must be one word"),
        ({"methods": ("lora", "LoRA")}, "two of the methods are the same"),
        ({"methods": ("tune(sites=('head',))",)}, "no head is known in this model"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch": 3}, "batch must be even"),
    ],
)
def test_bad_settings_leave_no_trace(config, settings, told):
    with pytest.raises(InputError, match=told):
        main(replace(config, **settings))
    assert not config.output.exists()
