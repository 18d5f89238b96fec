"""The accuracy benchmark on a built ViT and pictures of its own: driver, resuming, page, and the scores by hand."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import tiny_vit
from PIL import Image

import vismodal as vm
from vismodal.classification.vision import Source

ROOT = Path(__file__).parents[1]
LABELS = ("full fine-tuning", "linear probe", "peft LoRA", "LoRA", "OFT everywhere", "Convpass", "Pfeiffer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets of two classes, told apart by their colour, with noise; and a ViT as a timm folder."""
    root, r = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("one", "two"):
        for part, count in (("train", 6), ("val", 4), ("test", 5)):
            for label, colour in (("blue", (40, 40, 200)), ("red", (200, 40, 40))):
                folder = root / "transfer" / name / part / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = np.clip(r.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
    tiny_vit(root / "model")
    return root


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, data: Path) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy
    import entrants

    built = entrants.source
    monkeypatch.setattr(
        entrants, "source", lambda model, data: Source(str(data / "model")) if model == "vit-s" else built(model, data)
    )
    return accuracy


def config(bench: Any, data: Path, out: Path, **more: Any) -> Any:
    chosen = {"labels": LABELS, "sets": ("one", "two"), "jobs": 1, "rounds": 1, "quick": True, **more}
    return bench.Config(data=data, models=("vit-s",), out=out / "accuracy", **chosen)


def test_all_is_trained_once_and_the_page_tells(bench: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "SEEDS", {"vit-s": (0, 1)})
    c = config(bench, data, tmp_path, sets=("one",))
    trainings: list[Any] = []
    measured = bench.measured
    monkeypatch.setattr(bench, "measured", lambda job: trainings.append(job) or measured(job))
    rows = bench.main(c)
    assert not any("failed" in row for row in rows.rows.values())
    whole = [job for job in trainings if not job.pilot]
    best = bench.finalists(c, "vit-s", rows)
    assert len(best) == 2 and set(best) < {"Convpass", "OFT everywhere", "Pfeiffer"}
    assert [(j.seed, j.label, j.set) for j in whole] == [
        (seed, label, "one")
        for labels in (bench.CORE, [x for x in LABELS if x in best])
        for seed in (0, 1)
        for label in labels
    ]
    for job in whole:
        pilots = {j.lr: rows.get(j.key()) for j in trainings if j.pilot and (j.label, j.set) == (job.label, job.set)}
        assert len(pilots) >= 3 and all("test" not in row for row in pilots.values())
        assert job.lr == max(pilots, key=lambda lr: (pilots[lr]["val"], -pilots[lr]["val_loss"]))
    row = rows.get(next(j for j in whole if j.label == "LoRA").key())
    assert row["parameters"] == 2 * 8 * (32 + 96) and row["kept"] > 0 and 0 <= row["test"] <= 1
    assert row["parameters"] == rows.get(next(j for j in whole if j.label == "peft LoRA").key())["parameters"]
    page = (tmp_path / "accuracy.md").read_text()
    assert all(f"| {label} |" in page for label in (*bench.CORE, *best)) and "Missing" not in page
    assert "LoRA over peft LoRA" in page and f"{' and '.join(best)} go on" in page
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.width > 1000
    lines = (tmp_path / "accuracy.jsonl").read_text().splitlines()
    assert len(lines) == len(trainings) + len(bench.CORE) + len(best)  # times
    monkeypatch.setattr(bench, "measured", lambda job: pytest.fail(f"{job} was measured again"))
    bench.main(c)
    assert (tmp_path / "accuracy.jsonl").read_text().splitlines() == lines


def test_a_run_that_was_cut_goes_on_and_its_page_says_what_is_missing(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    c = config(bench, data, tmp_path, labels=("linear probe", "LoRA"), rounds=0)
    with monkeypatch.context() as patch:
        clock = iter(range(0, 10**6, 60))
        patch.setattr(bench.time, "monotonic", lambda: next(clock))
        bench.main(config(bench, data, tmp_path, labels=("linear probe", "LoRA"), rounds=0, minutes=8))
    first = (tmp_path / "accuracy.jsonl").read_text().splitlines()
    assert len(first) == 8
    page = (tmp_path / "accuracy.md").read_text()
    assert "**Missing**: " in page and "LoRA, seed 0: one, two" in page and "linear probe, seed 1: one, two" in page
    bench.main(c)
    lines = (tmp_path / "accuracy.jsonl").read_text().splitlines()
    assert lines[:8] == first and "Missing" not in (tmp_path / "accuracy.md").read_text()
    keys = [(r["label"], r["set"], r["seed"], r["pilot"], r["lr"]) for r in map(json.loads, lines)]
    assert len(keys) == len(set(keys))


def test_what_fails_is_shown_and_tried_again(bench: Any, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    c = config(bench, data, tmp_path, labels=("LoRA", "OFT everywhere"), rounds=0, sets=("one",))
    with monkeypatch.context() as patch:
        patch.setattr(vm.OFT, "build", lambda self, sites: 1 / 0)
        bench.main(c)
    assert "LoRA, seed" not in (tmp_path / "accuracy.md").read_text()
    assert "OFT everywhere –; not decided yet" in (tmp_path / "accuracy.md").read_text()
    rows = bench.main(c)
    assert not any("failed" in row for row in rows.rows.values())


def test_processes_give_the_same_rows(bench: Any, data: Path, tmp_path: Path) -> None:
    """Spawned ones know nothing of this test's model, so on tiny-vit."""
    if not (ROOT / "assets" / "tiny-vit").is_dir():
        pytest.skip("needs the embedded models")
    settings = {"labels": ("linear probe",), "sets": ("one",), "rounds": 0, "data": data}
    found = []
    for jobs in (1, 2):
        c = bench.Config(models=("tiny-vit",), quick=True, jobs=jobs, out=tmp_path / str(jobs), **settings)
        found.append({k: row["val_loss"] for k, row in bench.main(c).rows.items()})
    assert found[0] == found[1] and len(found[0]) >= 4
    assert "TQDM_DISABLE" not in os.environ  # which is for the processes alone


def test_a_linear_probe_learns_the_same_from_kept_features(bench: Any, data: Path, monkeypatch: Any) -> None:
    import entrants

    recipe = entrants.Recipe(epochs=2, pilot=1, batch=4, bf16=False)
    job = entrants.Job("vit-s", "linear probe", "one", 1e-2, 0, False, data, recipe)
    kept = entrants.measured(job)
    monkeypatch.setattr(entrants, "prefix", lambda model, data: entrants.copy.deepcopy(entrants.base(model, data)[0]))
    plain = entrants.measured(job)
    assert kept["test"] == plain["test"] and kept["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)


def test_the_head_has_a_rate_of_its_own_and_the_base_stays(bench: Any, data: Path) -> None:
    import entrants

    before = {k: v.clone() for k, v in entrants.base("vit-s", data)[0].state_dict().items()}
    for label in LABELS:
        job = entrants.Job("vit-s", label, "one", 1e-4, 0, True, data, entrants.Recipe(epochs=1, pilot=1, batch=4))
        trained = entrants.Trained(job)
        *rest, head = trained.optimizer().param_groups
        assert sum(p.numel() for p in head["params"]) == 2 * 32 + 2
        assert head["lr"] == (1e-4 if label == "linear probe" else 3e-3) and all(g["lr"] == 1e-4 for g in rest)
        assert sum(p.numel() for g in rest for p in g["params"]) == trained.parameters()
        assert all(g["weight_decay"] == 0 for g in (*rest, head))
        trained.learn()
        trained.adapter.detach()
    after = entrants.base("vit-s", data)[0].state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_everybody_sees_the_same_pictures_in_the_same_order(bench: Any, data: Path, monkeypatch: Any) -> None:
    import entrants

    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    recipe = entrants.Recipe(epochs=2, pilot=1, batch=4)
    for label, seed in (("full fine-tuning", 0), ("peft LoRA", 0), ("OFT everywhere", 0), ("OFT everywhere", 1)):
        trained = entrants.Trained(entrants.Job("vit-s", label, "one", 1e-4, seed, False, data, recipe))
        shown: list[torch.Tensor] = []
        pixels = trained.views["train"].pixels
        with monkeypatch.context() as patch:
            patch.setattr(trained.views["train"], "pixels", lambda v, s=shown, p=pixels: s.append(p(v)) or s[-1])
            trained.learn()
        seen[label, seed] = shown
    one, *others, other = (torch.cat(x) for x in seen.values())
    assert len(one) == 24 and all(torch.equal(one, x) for x in others)
    assert not torch.equal(one, other)
    assert sorted(x.sum().item() for x in one) == pytest.approx(sorted(x.sum().item() for x in other))
    assert not torch.equal(one[:12].sum(0), one[12:].sum(0))  # another crop in the second epoch


def test_the_command_line_is_read(bench: Any) -> None:
    given = [
        "--models",
        "[vit-s]",
        "--labels",
        "[LoRA, linear probe]",
        "--minutes",
        "5",
        "--recipes.vit-s.bf16",
        "false",
    ]
    c = bench.auto_cli(bench.Config, as_positional=False, args=given)
    assert (c.models, c.minutes, bench.chosen(c, "vit-s")) == (("vit-s",), 5, ["linear probe", "LoRA"])
    assert not bench.recipe(c, "vit-s").bf16 and bench.recipe(c, "vit-s").epochs == 10


def test_scores_by_hand(bench: Any) -> None:
    from accuracy_page import Table, ppt, spread

    assert ppt(0.8, 0) == 0.8
    assert ppt(0.746, 290_000) == pytest.approx(0.746 * math.exp(-math.log(1.029) / math.log(10)))
    assert spread([]) == "–" and spread([0.5]) == "50.0" and spread([0.5, 0.7]) == "60.0 ± 14.1"
    rows = {("LoRA", s, seed): {"test": t} for s, seed, t in (("a", 0, 0.5), ("b", 0, 0.7), ("a", 1, 0.6))}
    rows |= {("peft LoRA", s, 0): {"test": t} for s, t in (("a", 0.4), ("b", 0.5))}
    table = Table({"sets": ("a", "b"), "labels": ("LoRA", "peft LoRA"), "seeds": (0, 1), "rows": rows, "times": {}})
    assert table.means("LoRA") == [pytest.approx(0.6)]  # of the second seed one set is missing
    assert table.paired("LoRA", "peft LoRA") == "LoRA over peft LoRA: +15.0 ± 5.0 points (2 pairs)."


def test_the_best_candidates_are_those_of_the_validation_parts(bench: Any, data: Path, tmp_path: Path) -> None:
    from contest import RATES

    c = config(bench, data, tmp_path)
    rows = bench.Rows(tmp_path / "rows.jsonl")
    scores = {"Convpass": (0.7, 0.9, 0.1), "OFT everywhere": (0.8, 0.7, 0.9), "Pfeiffer": (0.7, 0.8, 0.2)}
    for label, (val, loss, test) in scores.items():
        assert bench.finalists(c, "vit-s", rows) is None
        for name in c.sets:
            pilot = bench.first(c, "vit-s", label, name)
            at = RATES.index(pilot.lr)
            for lr, worse in ((RATES[at], 0), (RATES[at + 1], 0.1), (RATES[at - 1], 0.1)):
                rows.add({**bench.replace(pilot, lr=lr).key(), "val": val, "val_loss": loss + worse, "test": 1 - test})
    assert bench.finalists(c, "vit-s", rows) == ["OFT everywhere", "Pfeiffer"]  # of equal accuracy, the lower loss


def test_unknown_names_and_missing_data_are_told(bench: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(vm.InputError, match="no contestant 'lorax'"):
        bench.main(config(bench, data, tmp_path, labels=("lorax",)))
    with pytest.raises(vm.InputError, match="write --data FOLDER"):
        bench.main(config(bench, data, tmp_path, sets=("three",)))
