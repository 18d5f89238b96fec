"""The studio in a browser, as people use it; the jobs are real, on the embedded models."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from browsing import Page, browser, studio
from PIL import Image

import vismodal as vm
from vismodal.cli import load_app
from vismodal.diffusion.load import load_pipeline
from vismodal.paths import asset

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

QUICK = "sample_steps: 2\nsample_count: 1\nbatch: 1\nsave_every: 10"  # under Advanced
TABS = ("Teach", "Create", "Library", "Recognise", "Jobs")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A browser, and a studio in which two adapters were made before."""
    folder = tmp_path_factory.mktemp("studio")
    with browser() as opened:
        adapters(folder / "home")
        with studio(folder / "home", "--warm", "false") as address:
            yield SimpleNamespace(browser=opened, address=address, folder=folder)


def adapters(home: Path) -> None:
    """Two trainings that are done, as the studio keeps them: strong random LoRAs."""
    jobs = load_app("studio.jobs").Jobs(home)
    pipe = load_pipeline(asset("tiny-sd"))
    for i, name in enumerate(("dog", "style")):
        job = jobs.submit("dreambooth", name, {"model": None, "prompt": f"a drawing of {name}"})
        adapter = vm.adapt(pipe.unet, vm.LoRA(rank=2), name)
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        run = jobs.folder(job) / "run"
        run.mkdir()
        vm.save(adapter, run / "adapter.safetensors")
        adapter.detach()
        jobs.store.move(job, ("queued",), "done")


@pytest.fixture
def visit(up: SimpleNamespace) -> Iterator[Callable[..., Page]]:
    """Opens a tab; whatever is done in any of them asks no other machine, and no console tells an error."""
    pages: list[Page] = []

    def opened(*size: int, dark: bool = False) -> Page:
        pages.append(Page(up.browser, up.address, *size, dark=dark))
        pages[-1].button("Start").wait_for(timeout=60_000)
        return pages[-1]

    yield opened
    for page in pages:
        assert all(url.startswith((up.address, "data:", "blob:")) for url in page.asked), page.asked
        assert not page.errors
        page.close()


def png(side: int = 64) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(stream, "png")
    return stream.getvalue()


def test_teach_leave_come_back_stop_and_go_on_to_the_end(visit: Callable[..., Page]) -> None:
    page = visit()
    page.press("Use the example: six drawings of a robot")
    page.page.get_by_text("The six drawings of a robot that come").wait_for()
    page.fill({"Name": "robot", "Steps": 100000})
    page.unfold("Advanced")
    page.fill({"Samples every … steps": 10, "Rank of LoRA": 2})
    page.page.get_by_placeholder("sites: [+ff]").fill(QUICK)
    page.press("Start")
    page.until(r"training · step \d\d+ of 100,000")
    page.close()

    again = visit()
    assert "robot" in again.field("Job").input_value() or again.until("training")
    again.press("Sample now")
    again.told("drawn after this step")
    again.press("Stop and save")
    reached = again.until(r"stopped · step \d+ of 100,000")
    again.pictures(3)  # the slider's two and a sample
    again.page.locator(".vega-embed canvas, .vega-embed svg").first.wait_for()
    again.field("Steps in all").fill(str(int(reached.split()[-3]) + 10))
    again.press("Extend to these")
    again.until("done · step")
    again.tab("Library")
    again.choose("Adapter", "robot")
    again.page.locator("code").get_by_text("<lora:robot:0.8>", exact=True).wait_for()
    again.pictures(1)
    with again.page.expect_download() as got:
        again.press("For diffusers")
        again.page.get_by_role("link").filter(has_text="KB").locator("visible=true").first.click()
    assert got.value.suggested_filename == "robot-diffusers.safetensors"


def test_two_adapters_at_once_and_the_grid(visit: Callable[..., Page]) -> None:
    page = visit()
    page.tab("Create")
    page.choose("Adapters", "dog", "style")
    page.field("number input for Strength of style").fill("0.5")
    page.field("number input for Pictures of each prompt").fill("1")
    page.unfold("Advanced")
    page.fill({"Steps": 2, "Seed": 7})
    page.press("Draw")
    page.until("Done in .*, from seed 7")
    page.pictures(4)  # the slider's two, with and without
    page.page.get_by_text("[dog 1] [style 0.5] seed 7").first.wait_for()
    page.press("Grid of strengths by seeds")
    page.page.get_by_role("button", name="Grid of strengths by seeds").wait_for()
    page.page.get_by_text("[dog 1.25] seed 7").first.wait_for(timeout=120_000)
    page.pictures(12)


def test_what_is_no_picture_is_left_out_with_its_reason(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "good.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as file:
        file.writestr("../up.png", png())
        file.writestr("in.png", png(80))
    page.page.locator("input[type=file]").first.set_input_files(sorted(tmp_path.iterdir()))
    page.page.get_by_text("2 pictures taken").wait_for()
    told = page.page.get_by_text("2 left out").locator("xpath=ancestor::*[contains(@class, 'prose')][1]").inner_text()
    assert "notes.png" in told and "up.png" in told
    page.pictures(2)
    page.fill({"What the photos show, with a rare word for the subject": "a photo of sks dog", "Steps": 5})
    page.unfold("Advanced")
    page.fill({"Rank of LoRA": "many"})
    page.press("Start")
    page.told("Rank of LoRA is 'many'; write a number")


def test_no_password_no_page(up: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "word").write_text("correct horse\n")
    with studio(tmp_path / "home", "--password_file", str(tmp_path / "word"), "--warm", "false") as address:
        page = Page(up.browser, address)
        for word in ("wrong", "correct horse"):  # the page empties its fields
            page.page.get_by_label("username").fill("me")
            page.page.get_by_label("password").fill(word)
            page.press("Login")
            if word == "wrong":
                page.page.get_by_text("Incorrect Credentials").wait_for()
                assert page.page.get_by_role("tab").count() == 0
        page.button("Start").wait_for(timeout=60_000)
        page.close()


@pytest.mark.parametrize("dark", [False, True])
def test_all_tabs_fit_a_phone_and_can_be_reached_by_keys(visit: Callable[..., Page], dark: bool) -> None:
    page = visit(390, 844, dark=dark)
    for name in TABS:
        page.tab(name)
        page.page.wait_for_timeout(300)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= 390, name
    page.tab("Teach")
    page.field("Name").focus()
    seen: list[Any] = []
    while "Start" not in seen and len(seen) < 20:
        page.page.keyboard.press("Tab")
        seen.append(page.page.evaluate("document.activeElement.textContent.trim()"))
    assert "Start" in seen
    back = page.page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgba()").split(",")
    assert (sum(map(float, back[:3])) < 200) == dark
