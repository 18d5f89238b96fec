"""The README's code runs, on models without weights from the network, and its tables are those of the registry."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny_diffusion import tiny_pipeline

import vismodal as vm
from vismodal import cli

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
# what stands for a download: the same classes with random weights, and smaller where that is possible
OFFLINE = {
    'timm.create_model("vit_base_patch16_224", pretrained=True': 'timm.create_model("vit_tiny_patch16_224", depth=2',
    'pretrained="laion2b_s34b_b79k"': "pretrained=None",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "tiny-sd",
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("\n")[0])
@pytest.mark.filterwarnings("ignore:No pretrained weights:UserWarning")
def test_code_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "StableDiffusionPipeline" in block:
        tiny_pipeline(tmp_path / "tiny-sd")
    for online, offline in OFFLINE.items():
        block = block.replace(online, offline)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("vismodal ")])
def test_commands_are_understood(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    name = next(" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in cli.COMMANDS)
    command, rest = cli.COMMANDS[name], words[len(name.split()) :]
    pipeline = (cli.load_app if command.app else cli.load_pipeline)(command.pipeline)
    if rest != ["--help"]:
        assert isinstance(cli.parse(pipeline.Config, name, rest), pipeline.Config)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)", README)
    assert links and all((Path(__file__).parents[1] / link).exists() for link in links)


def test_every_substitution_is_still_there() -> None:
    assert all(any(online in block for block in BLOCKS) for online in OFFLINE)


@pytest.mark.parametrize("name", ["methods", "families"])
def test_tables_come_from_the_registry(name: str) -> None:
    """Write them anew with: python tests/test_readme.py"""
    assert tables(README) == README, f"vm.{name}() has changed: run python tests/test_readme.py"


def tables(text: str) -> str:
    for name in ("methods", "families"):
        table = getattr(vm, name)().markdown()
        text = re.sub(
            rf"(<!-- vm\.{name}\(\) -->\n).*?(<!-- end -->)",
            lambda m, t=table: m[1] + t + "\n" + m[2],
            text,
            flags=re.S,
        )
    return text


if __name__ == "__main__":
    (Path(__file__).parents[1] / "README.md").write_text(tables(README))
