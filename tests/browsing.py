"""A Chromium for the tests of the studio in a browser, and a studio in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vismodal.cli import load_app

ROOT = Path(__file__).parent.parent
# all toasts that were shown, also those that are gone again
TOASTS = """
window.toasts = [];
new MutationObserver(() => {
    for (const each of document.querySelectorAll('.toast-body'))
        if (!window.toasts.includes(each.innerText)) window.toasts.push(each.innerText);
}).observe(document, {childList: true, subtree: true, characterData: true});
"""
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str:
    """Its program; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no Chromium; install it (Debian: apt-get install chromium) to run this test")


def free_port() -> int:
    """One of its own: several processes of tests would look for the first free one at the same time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def browser() -> Iterator[Any]:
    """Of Playwright, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason='no Playwright; pip install "vismodal[dev]"')
    program = chromium()
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def studio(home: Path, *arguments: str) -> Iterator[str]:
    """`vismodal studio`; gives its address."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vismodal", "studio", "--home", str(home), "--port", str(free_port()), *arguments]
    log = home.parent / f"{home.name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command, cwd=home.parent, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        )
    try:
        assert process.stdout is not None
        found = re.match(r"studio: (http://\S+?)/?$", process.stdout.readline())
        assert found, log.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()
        end_jobs(home)


def end_jobs(home: Path) -> None:
    """Kills those that a test left at work: they outlive their studio."""
    folders = load_app("studio.folders")
    for folder in (home / "jobs").glob("*"):
        pid = folders.number(folder / "pid")
        if pid is not None and folders.alive(folder):
            os.killpg(pid, signal.SIGKILL)


class Page:
    """A tab of a browser on the studio, which minds what it asks for and what its console says.

    Args:
        browser: of Playwright.
        address: the studio's.
        width, height: of the window, in pixels.
        dark: whether its visitor likes dark pages.
    """

    def __init__(self, browser: Any, address: str, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self.context.add_init_script(TOASTS)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.goto(address)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        """The button of that name which can be seen."""
        self.button(name).click()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True).locator("visible=true")

    def unfold(self, name: str) -> None:
        """Opens a part that is folded, whose fields come to life one after the other."""
        self.page.get_by_text(name).locator("visible=true").click()
        self.page.wait_for_timeout(500)

    def field(self, label: str) -> Any:
        return self.page.get_by_label(label, exact=True).locator("visible=true").first

    def fill(self, fields: Mapping[str, object]) -> None:
        """Fields by their labels."""
        for label, value in fields.items():
            self.field(label).fill(str(value))

    def choose(self, label: str, *options: str) -> None:
        """Of a list's choices, which the page asks for when it is opened."""
        self.page.get_by_role("combobox", name=label, exact=True).locator("visible=true").click()
        for option in options:
            self.page.get_by_role("option", name=option, exact=True).click()
        self.page.keyboard.press("Escape")

    def until(self, text: str, seconds: float = 120) -> str:
        """Waits until the status that can be seen holds this; gives all of it."""
        status = self.page.locator(".status").locator("visible=true").filter(has_text=re.compile(text))
        status.first.wait_for(timeout=1000 * seconds)
        return str(status.first.inner_text())

    def told(self, text: str, seconds: float = 60) -> None:
        """Waits for a toast that holds this."""
        end = time.monotonic() + seconds
        while text not in (toasts := "; ".join(self.page.evaluate("window.toasts"))):
            status = self.page.locator(".status").locator("visible=true").all_inner_texts()
            assert time.monotonic() < end, f"no toast of {text!r}, but {toasts!r}; the status is {status}"
            self.page.wait_for_timeout(100)

    def pictures(self, least: int = 1) -> Any:
        """Those that can be seen and are there, once there are so many."""
        self.page.wait_for_function(
            "n => [...document.images].filter(i => i.offsetParent && i.naturalWidth).length >= n", arg=least
        )
        return self.page.locator("img").locator("visible=true")

    def close(self) -> None:
        self.context.close()
