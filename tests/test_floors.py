"""Imports only go down, hooks live in one package, and `import vismodal` stays cheap."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vismodal"

# the module (or package) and the floor it stands on; a file imports its own floor and those below
FLOORS = {
    **dict.fromkeys(("errors", "table", "paths", "files", "fingerprint", "quantised", "limit", "site"), 0),
    "sharding": 0,
    **dict.fromkeys(("discover", "selection", "recompute"), 0),
    **dict.fromkeys(("methods", "families", "weights", "ports", "clip"), 1),
    **dict.fromkeys(("bank", "pruning", "dead", "adapter", "attach", "route"), 2),
    **dict.fromkeys(("catalogue", "checkpoint", "evolve", "formats", "prefix"), 3),
    **dict.fromkeys(("data", "train", "callbacks", "resume", "interrupt", "runs", "draw", "reports"), 4),
    **dict.fromkeys(("ema", "optimizers"), 4),
    **dict.fromkeys(("classification", "fewshot", "contrastive", "diffusion", "evaluation"), 4),
    **dict.fromkeys(("models", "pretrained", "clip_export", "entries", "tools"), 4),
    **dict.fromkeys(("cli", "__main__", "pipelines", "apps"), 5),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of vismodal that a file imports anywhere, by their first name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "vismodal":
                names |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("vismodal.")}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name in ("__init__", "__main__"):
        return
    assert name in FLOORS, f"say in tests/test_floors.py on which floor {name} stands"
    above = {other for other in imported(path) if FLOORS.get(other, 0) > FLOORS[name]}
    assert not above, f"{path.name} stands on floor {FLOORS[name]} and imports {above} from above"


def test_a_method_knows_no_family_and_no_port() -> None:
    for path in (PACKAGE / "methods").glob("*.py"):
        assert not imported(path) & {"families", "ports", "adapter", "attach", "route"}, path.name


def test_a_method_knows_no_library_of_models() -> None:
    known = {"timm", "open_clip", "transformers", "diffusers"}
    for path in (PACKAGE / "methods").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        roots = {n.module.partition(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        roots |= {a.name.partition(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        # a side may be any model of timm, built by its name
        assert roots & known == ({"timm"} if path.name == "sidetuning.py" else set()), path.name


def test_a_typical_method_is_short() -> None:
    texts = [path.read_text() for path in (PACKAGE / "methods").glob("*.py")]
    lengths = [len(text.splitlines()) for text in texts if "    paper: ClassVar[str] = " in text]
    assert len(lengths) > 30
    assert statistics.median(lengths) < 120
    assert max(lengths) < 300


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_ports_touch_hooks(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "ports":
        assert "register_forward" not in path.read_text()


def test_import_is_cheap_and_lazy() -> None:
    code = (
        "import time, torch; start = time.process_time(); import vismodal, sys;"
        "print(time.process_time() - start, *[m for m in ('transformers', 'diffusers', 'timm') if m in sys.modules])"
    )
    seconds, *loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert loaded == []
    assert float(seconds) < 0.5  # of processor time, measured at 0.16 s: it can only fail by an import too many


def test_scripts_that_are_imported_by_name_have_names_of_their_own() -> None:
    folders = (ROOT / "benchmarks", ROOT / "pipelines", ROOT / "pipelines" / "pretrain", ROOT / "tests")
    names = [path.stem for folder in folders for path in folder.glob("*.py") if path.stem != "__init__"]
    assert sorted(set(names)) == sorted(names)
