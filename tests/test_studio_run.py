"""A real training in the studio: stopped and resumed, it leaves the very file that the same settings leave anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browsing import end_jobs
from safetensors import safe_open

from vismodal import cli
from vismodal.cli import load_app
from vismodal.diffusion.settings import read_settings

pytest.importorskip("diffusers")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    end_jobs(tmp_path / "home")


def test_a_job_that_was_killed_stopped_and_resumed_equals_the_function_called_in_python(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, progress = load_app("studio.work"), load_app("studio.progress")
    studio = work.Studio(home)
    monkeypatch.setenv("TQDM_DISABLE", "1")  # of the server: its jobs have bars, by which it follows them
    few = {"steps": 100_000, "batch": 1, "rank": 2, "sample_steps": 1, "sample_count": 1, "sample_every": 0, "seed": 3}
    few |= {"save_every": 3, "keep": 2, "schedule": "constant"}
    job = studio.teach("example", title="robot", settings=few)
    folder = studio.jobs.folder(job)

    def until(*states: str, steps: int = 0) -> None:
        """A state, or at work with so many steps made: what was logged before a kill may be there while it loads."""
        end = time.monotonic() + 240
        while True:
            studio.jobs.tick()
            now = studio.jobs.store.get(job.id)
            at_work = "training" in str(progress.progress("running", folder)) and len(progress.metrics(folder)) >= steps
            if now.state in states and (at_work or not steps):
                return
            assert now.state != "failed" and time.monotonic() < end, (now, progress.tail(folder))
            time.sleep(0.05)

    until("running", steps=4)
    studio.jobs.force_stop(job)  # kill -9: it goes back to the checkpoint of step 3
    until("stopped")
    studio.jobs.resume(job)
    until("running", steps=7)
    studio.jobs.stop(job)
    until("stopped")
    reached = len(progress.metrics(folder))
    assert reached >= 7 and not studio.shelf.adapters()
    few["steps"] = 3 * (reached // 3 + 3)
    studio.jobs.extend(job, few["steps"])  # it had many more before it, so that no machine could be too quick
    until("done")

    pipeline = cli.load_pipeline("dreambooth")
    given = {**few, "prompt": work.PROMPT, "subject": "sks"}
    pipeline.main(pipeline.Config(**given, output=tmp_path / "by_hand"))
    ours, theirs = folder / "run", tmp_path / "by_hand"
    for name in ("adapter.safetensors", "pytorch_lora_weights.safetensors"):
        assert content(ours / name) == content(theirs / name), name
    sample = f"samples/step-{few['steps']:07}.png"
    assert (ours / sample).read_bytes() == (theirs / sample).read_bytes()
    assert [each.name for each in studio.shelf.adapters()] == ["robot"]

    monkeypatch.setattr(work, "STRENGTHS", (0.0, 1.0))
    job = studio.grid(job.id)  # of its checkpoints, which `until` follows now
    until("done")
    made = studio.jobs.folder(job) / "run"
    told = [read_settings(path) for path in sorted(made.glob("0*.png"))]
    worn = {(each.name, each.strength) for one in told for each in one.adapters}
    kept = [f"step-{step:07}" for step in (few["steps"] - 3, few["steps"])]
    assert worn == {(name, strength) for name in kept for strength in (0.0, 1.0)}
    prompts = progress.settings(folder)["sample_prompts"]
    assert len(told) == 4 * len(prompts) and len(list(made.glob("sheet-*.png"))) == len(prompts)
    for child in studio.jobs.children.values():
        child.wait()


def content(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Tensors to the bit and entries of the header, which safetensors writes in any order."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_settings_from_a_file_reach_commands_that_take_files_too(tmp_path: Path):
    """`--config FILE` is no picture and no prompt of generate, predict, merge and convert."""
    (tmp_path / "job.yaml").write_text("prompts: [a photo, a drawing]\nseeds: [7]\n")
    config = cli.load_pipeline("generate").Config
    read = cli.parse(config, "vismodal generate", ["--config", str(tmp_path / "job.yaml")])
    assert (read.prompts, read.seeds) == (("a photo", "a drawing"), (7,))
    over = cli.parse(config, "vismodal generate", ["--config", str(tmp_path / "job.yaml"), "--count", "2", "other"])
    assert (over.prompts, over.count) == (("other",), 2)
