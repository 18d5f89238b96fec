"""Takes the pictures of the studio beside this file: teaches the embedded subject, draws, and looks at every tab.

PYTHONPATH=tests python docs/studio/screenshots.py        # about five minutes on 2 cores
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from browsing import Page, browser, studio

HERE = Path(__file__).parent
DESKTOP, PHONE = (1280, 1400), (390, 844)


def take(page: Page, name: str, height: int | None = None) -> None:
    """All of the page, or so many pixels from its top."""
    page.page.wait_for_timeout(3000)  # pictures come in, bars go
    clip = {"x": 0, "y": 0, "width": DESKTOP[0], "height": height} if height else None
    page.page.screenshot(path=HERE / f"{name}.png", full_page=True, clip=clip)
    print(HERE / f"{name}.png", flush=True)


def opened(chromium: Any, address: str, size: tuple[int, int] = DESKTOP, dark: bool = False) -> Page:
    page = Page(chromium, address, *size, dark)
    page.button("Start").wait_for(timeout=60_000)
    return page


def main() -> None:
    with tempfile.TemporaryDirectory() as home, browser() as chromium, studio(Path(home) / "studio") as address:
        page = opened(chromium, address)
        page.press("Use the example: six drawings of a robot")
        page.page.get_by_text("The six drawings of a robot that come").wait_for()
        page.fill({"Name": "robot"})
        page.press("Start")
        page.until(r"training · step [3]\d\d of 600", 600)
        take(page, "teach")
        page.until("done · step", 600)

        page.tab("Create")
        page.choose("Adapters", "robot")
        page.page.get_by_label("Prompts, one a line").fill("a drawing of sks robot on a green background")
        page.fill({"Seed": 1})
        page.press("Draw")
        page.until("Done in", 300)
        take(page, "create")
        page.press("Grid of strengths by seeds")
        page.page.get_by_text("[robot 1.25]").first.wait_for(timeout=600_000)
        take(page, "grid")
        page.tab("Library")
        page.page.get_by_text("in prompts:").wait_for()
        take(page, "library")
        page.tab("Recognise")
        page.press("Use the example: 1,797 handwritten digits")
        page.page.get_by_text("Handwritten digits of scikit-learn").wait_for()
        page.press("Learn")
        page.until("done", 600)
        take(page, "recognise")
        page.tab("Jobs")
        take(page, "jobs", 520)  # below it stands where its files lie

        for tab in ("Teach", "Create"):
            phone = opened(chromium, address, PHONE)
            phone.tab(tab)
            take(phone, f"phone-{tab.lower()}")
        dark = opened(chromium, address, DESKTOP, dark=True)
        take(dark, "teach-dark")


if __name__ == "__main__":
    main()
