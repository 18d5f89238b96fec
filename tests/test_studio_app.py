"""The studio's page and endpoints, over the wire as programs use them; most jobs are stand-ins that take no time."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import io
import os
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from browsing import free_port
from PIL import Image

from vismodal import cli
from vismodal.cli import load_app
from vismodal.errors import InputError

pytest.importorskip("gradio")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

# What each command leaves, in a blink; it fails where the title of a setting says so.
STAND_IN = """
import json, os, sys, yaml
from pathlib import Path
from PIL import Image
from PIL.PngImagePlugin import PngInfo
Path("pid").write_text(str(os.getpid()))
kind, given, run = sys.argv[1], yaml.safe_load(Path("job.yaml").read_text()), Path("run")
run.mkdir(exist_ok=True)
if kind in ("dreambooth", "classify"):
    steps = given.get("steps", 3)
    drawn = "sample_prompts: [sks dog runs], sample_steps: 9, resolution: 32, guidance: 2.5"
    (run / "config.yaml").write_text(f"{{steps: {steps}, {drawn}, seed: 3, model: null}}")
    rows = [json.dumps({"step": i, "seconds": i, "loss": 1 / i}) for i in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\\n".join(rows) + "\\n")
    (run / "samples").mkdir(exist_ok=True)
    for step in (0, steps):
        Image.new("RGB", (32, 16), (step % 256, 0, 0)).save(run / "samples" / f"step-{step:07d}.png")
    (run / "pytorch_lora_weights.safetensors").write_bytes(b"diffusers")
    (run / "report.html").write_text("<h1>report")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / f"step-{steps:07d}.safetensors").write_bytes(b"checkpoint")
    (run / "README.md").write_text("---\\nbase_model: x\\n---\\n# The card <script>")
if kind == "generate":
    for i, prompt in enumerate(given["prompts"]):
        bare = "<lora:none>" in prompt
        chunk = PngInfo()
        worn = [] if bare else [{"name": a.partition("=")[0], "strength": 1} for a in given["adapters"]]
        plain = prompt.replace(" <lora:none>", "")
        chunk.add_text("vismodal", json.dumps({"prompt": plain, "seed": given["seeds"][0], "adapters": worn}))
        Image.new("RGB", (16, 16)).save(run / f"{i:04d}.png", pnginfo=chunk)
    Image.new("RGB", (16, 16)).save(run / "sheet.png")
elif kind == "predict":
    names = sorted(p for p in Path(given["images"][0]).iterdir() if p.suffix == ".png")
    print(json.dumps([{"file": str(p), "classes": [{"class": "a|b", "probability": 0.75}]} for p in names]))
else:
    (run / "adapter.safetensors").write_bytes(kind.encode())
Path("exit").write_text("0")
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A studio at work, with stand-ins for the commands, and a client of it."""
    from gradio_client import Client

    folder = tmp_path_factory.mktemp("studio")
    home, script = folder / "home", folder / "stand_in.py"
    script.write_text(STAND_IN)
    before = dict(os.environ)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(home / "cache")}
    build, work = load_app("studio.build"), load_app("studio.work")
    jobs = load_app("studio.jobs").Jobs(home, command=lambda kind, arguments: [sys.executable, str(script), kind])
    studio = work.Studio(home, jobs=jobs)
    page, address = build.launch(studio, home / "cache", "127.0.0.1", free_port(), None)
    client = Client(address, verbose=False, download_files=str(folder / "got"), analytics_enabled=False)
    made = SimpleNamespace(studio=studio, page=page, address=address, client=client, home=home, folder=folder)
    yield made
    page.close(verbose=False)
    client.close()
    for child in jobs.children.values():
        child.wait()
    os.environ.clear()
    os.environ.update(before)
    vars(made).clear()
    del page, client
    with warnings.catch_warnings():  # gradio leaves event loops open, of which Python would tell at any later moment
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def png(seed: int = 0, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def finished(up, job: dict) -> dict:
    """The job, when it has come to an end."""
    end = time.monotonic() + 20
    while (now := up.client.predict(job["id"], api_name="/job"))["state"] in ("queued", "running", "stopping"):
        assert time.monotonic() < end, now
        up.studio.jobs.tick()
        time.sleep(0.05)
    return now


def test_every_endpoint_and_nothing_else_is_offered(up, tmp_path):
    """The whole way, from photos to an answer, by names alone; the last line counts the endpoints that were used."""
    from gradio_client import handle_file

    used: list[str] = []

    def call(name: str, *arguments: object, **named: object):
        used.append(f"/{name}")
        return up.client.predict(*arguments, **named, api_name=f"/{name}")

    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / "bad.png").write_text("no picture")
    photos = call("upload", [handle_file(tmp_path / name) for name in ("0.png", "1.png", "bad.png")])
    assert list(photos["pictures"].values()) == ["0.png", "1.png"] and "bad.png: its content" in photos["rejected"][0]
    assert call("caption", photos["id"], "0001.png", "sks dog runs")[0][2] == "sks dog runs"
    assert [row[2] for row in call("captions", photos["id"])] == ["sks dog runs", ""]

    job = call("teach", photos["id"], "a photo of sks dog", title="my dog", settings={"steps": 4, "rank": 2})
    waiting = call("teach", "example", title="second")
    assert call("stop", waiting["id"])["state"] == "stopped"
    done = finished(up, job)
    assert (done["state"], done["step"], done["total"]) == ("done", 4, 4)
    given = up.studio.jobs.settings(up.studio.jobs.store.get(job["id"]))
    assert given["photos"] == str(up.studio.jobs.folder(up.studio.jobs.store.get(job["id"])) / "given")
    assert given["rank"] == 2
    assert call("loss", job["id"]) == [[1, 1.0], [2, 0.5], [3, 1 / 3], [4, 0.25]]
    shown = call("samples", job["id"])
    assert [step for step, _ in shown] == [0, 4] and Image.open(shown[1][1]).size == (32, 16)
    assert finished(up, call("extend", job["id"], 6))["step"] == 6
    assert finished(up, call("resume", waiting["id"]))["state"] == "done"
    with pytest.raises(Exception, match="does not run, so there is nothing to stop"):
        call("force_stop", waiting["id"])

    with pytest.raises(Exception, match="makes no steps now"):
        call("sample", job["id"])
    up.studio.jobs.store.move(up.studio.jobs.store.get(job["id"]), ("done",), "running")
    up.client.predict(job["id"], api_name="/sample")
    assert (up.studio.jobs.folder(up.studio.jobs.store.get(job["id"])) / "run" / "sample-now").is_file()
    up.studio.jobs.store.move(up.studio.jobs.store.get(job["id"]), ("running",), "done")
    grid = finished(up, call("grid", job["id"]))
    given = up.studio.jobs.settings(up.studio.jobs.store.get(grid["id"]))
    assert (given["prompts"], given["seeds"], given["sweep"][1]) == (["sks dog runs"], [3], 0.25)
    assert (given["steps"], given["resolution"], given["guidance"], given["model"]) == (9, 32, 2.5, None)
    assert [text.partition("=")[0] for text in given["adapters"]] == ["step-0000004", "step-0000006"]

    first, second = call("adapters")
    assert (first["name"], first["words"], first["card"]) == ("my-dog", "a photo of sks dog", "# The card <script>")
    drawn = finished(up, call("draw", ["sks dog", "x <lora:second:0.5>"], [["my-dog", 0.8]], 7, 1, True))
    found = call("pictures", drawn["id"])
    assert [(p["prompt"], len(p["adapters"])) for p in found] == [
        ("sks dog <lora:my-dog:0.8>", 2),  # the stand-in puts every adapter on; the tags are what counts
        ("x <lora:second:0.5>", 2),
        ("sks dog", 0),
    ]
    assert Image.open(found[0]["file"]).text["vismodal"] and len(call("sheets", drawn["id"])) == 1

    assert Path(call("download", "my-dog")).read_bytes() == b"dreambooth"
    exported = finished(up, call("export", "my-dog", "kohya"))
    assert Path(call("exported", exported["id"])).read_bytes() == b"convert"
    merged = finished(up, call("merge", [["my-dog", 0.5], [second["id"], 0.5]], "both"))
    from safetensors.numpy import save_file

    save_file({"x": np.ones(2)}, tmp_path / "theirs.safetensors")
    brought = finished(up, call("bring", handle_file(tmp_path / "theirs.safetensors"), base="tiny-sd"))
    assert [each["name"] for each in call("adapters")] == ["my-dog", "second", "both", "theirs"]
    assert (merged["state"], brought["state"]) == ("done", "done")

    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"{'cat' if i % 2 else 'dog'}/{i}.png", png(i))
    pets = call("upload", [handle_file(tmp_path / "pets.zip")], True)
    learnt = finished(up, call("learn", pets["id"], settings={"method": "linearprobe", "epochs": 2}))
    report, adapter = call("report", learnt["id"])
    assert Path(report).read_text() == "<h1>report" and Path(adapter).read_bytes() == b"classify"
    asked = finished(up, call("recognise", learnt["id"], photos["id"]))
    assert [one["file"] for one in call("answers", asked["id"])] == ["0.png", "1.png"]

    assert [job["id"] for job in call("delete", asked["id"])] == [job["id"] for job in call("jobs")]
    assert call("job", job["id"])["error"] == ""
    assert set(used) == set(up.client.view_api(return_format="dict")["named_endpoints"])


def test_settings_from_outside_name_no_files():
    """Whoever adds a setting that is text, and might be a place, decides here whether a page may give it."""
    allowed, free = load_app("studio.allowed"), {
        "dreambooth": {
            "class_prompt", "method", "prompt", "sample_prompts", "sites", "subject",
            "text_sites", "token_init", "tokens",
        },
        "generate": {"negative", "prompts"},
        "classify": {"compare", "image_column", "label_column", "method"},
    }  # fmt: skip
    for kind, names in free.items():
        fields = dataclasses.fields(cli.load_pipeline(kind).Config)
        texts = {f.name for f in fields if re.search(r"\bstr\b|Path|Subject", str(f.type))}
        assert texts & allowed.open_to_all(kind) == names & texts
        assert not {"output", "threads"} & allowed.open_to_all(kind)


def test_no_visitor_asks_for_more_than_the_machine_may_give(tmp_path: Path):
    studio = load_app("studio.work").Studio(tmp_path / "home")
    for settings in ({"resolution": 2049}, {"batch": 257}, {"class_images": 10_001}, {"rank": 1e9}, {"steps": 10**7}):
        name, value = next(iter(settings.items()))
        with pytest.raises(InputError, match=f"{name} is {value:,}, and the studio takes [0-9,]* at most"):
            studio.teach("example", settings=settings)
    with pytest.raises(InputError, match="image_size is 1,025"):
        studio.learn("example", settings={"image_size": 1025})
    job = studio.teach("example", settings={"steps": 1_000_000})
    with pytest.raises(InputError, match="steps is 1,000,001"):
        studio.extend(job.id, 1_000_001)


def test_what_no_page_of_ours_asks_for_is_refused_at_the_door(up):
    for path in ("file=http://example.com/x.png", "file/http://example.com/x", "file=HTTPS%3A//x", "proxy=http://x"):
        assert httpx.get(f"{up.address}gradio_api/{path}").status_code == 403, path
    strange, ours = "http://evil.example", up.address.rstrip("/")
    post = {"url": f"{up.address}gradio_api/upload", "files": [("files", ("a.png", png()))]}
    for origin in (strange, "http://127.0.0.1:1", "null"):
        assert httpx.post(**post, headers={"Origin": origin}).status_code == 403
        assert httpx.get(up.address, headers={"Origin": origin}).status_code == 403
    assert httpx.post(**post, headers={"Origin": ours}).status_code == 200
    assert httpx.post(post["url"], content=iter([b"x"])).status_code == 411
    doors = load_app("studio.guard").Doors
    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "headers": [(b"content-length", b"100")]}
    for most, full, status in ((100, False, None), (99, False, 413), (100, True, 413)):
        found = doors(None, most, lambda full=full: full)._refused(scope)
        assert (found and found[0]) == status


def test_names_of_adapters_are_their_own_and_numbers_come_first(tmp_path):
    work = load_app("studio.work")
    studio = work.Studio(tmp_path)
    for title in ("2", "dog", "dog-4", "dog", "none", "../"):
        job = studio.jobs.submit("dreambooth", title, {"prompt": "x"})
        (studio.jobs.folder(job) / "run").mkdir()
        (studio.jobs.folder(job) / "run" / "adapter.safetensors").write_bytes(b"x")
    names = [each.name for each in studio.shelf.adapters()]
    assert names == ["2-1", "dog", "dog-4", "dog-4-4", "none-5", "adapter-6"]
    assert studio.shelf.get("2").name == "dog" and studio.shelf.get("dog-4").id == 3


def test_sliders_keep_their_places_when_others_go(tmp_path):
    gradio = pytest.importorskip("gradio")
    studio = load_app("studio.work").Studio(tmp_path)
    for title in ("dog", "cat"):
        job = studio.jobs.submit("dreambooth", title, {"prompt": "x"})
        (studio.jobs.folder(job) / "run").mkdir()
        (studio.jobs.folder(job) / "run" / "adapter.safetensors").write_bytes(b"x")
    with gradio.Blocks():
        chosen = load_app("studio.chosen").Chosen(studio, "Weight", -1, 2, 0.5)
    _, first, second, *_ = chosen.label(["1", "2"], [], 0.5, 0.5, 0.5, 0.5)
    assert [(one["label"], one["value"]) for one in (first, second)] == [("Weight of dog", 0.5), ("Weight of cat", 0.5)]
    keys, first, second, *_ = chosen.label(["2"], ["1", "2"], 0.1, 0.9, 0.5, 0.5)
    assert (keys, first["label"], first["value"], second["visible"]) == (["2"], "Weight of cat", 0.9, False)


def test_settings_with_aliases_are_refused():
    read = load_app("studio.teach").read_rest
    assert read("sites: [+ff]\nrank: 4") == {"sites": ["+ff"], "rank": 4}
    with pytest.raises(InputError, match="alias"):
        read("a: &a [x, x]\nb: [*a, *a]")


def refused(up, name: str, *arguments: object, **named: object) -> str:
    with pytest.raises(Exception) as caught:
        up.client.predict(*arguments, **named, api_name=f"/{name}")
    return str(caught.value)


def test_what_is_refused_and_that_no_path_comes_in(up):
    secret = up.folder / "secret.png"
    secret.write_bytes(png())
    count = len(up.studio.jobs.store.all())
    assert "no file that was uploaded" in refused(up, "upload", [{"path": str(secret)}])
    assert "no file that was uploaded" in refused(up, "upload", [{"path": f"{up.home}/cache/../studio.db"}])
    assert "no file that was uploaded" in refused(up, "bring", {"path": str(up.home / "studio.db")}, "sd1")
    assert "not here any more" in refused(up, "teach", "../../etc", "a photo of sks dog")
    assert "there is no model '/etc'" in refused(up, "teach", "example", model="/etc")
    for name in ("photos", "output", "class_folder", "model", "subjects"):
        assert f"no setting '{name}'" in refused(up, "teach", "example", settings={name: "/etc"})
    for name in ("like", "prompts_file", "conditions", "adapters"):
        assert f"no setting '{name}'" in refused(up, "draw", ["sks"], settings={name: "/etc/passwd"})
    assert "there is no preset" in refused(up, "teach", "example", preset="x")
    assert "lacks the subject" in refused(up, "teach", "example", "a photo of a dog")
    assert "rank must be at least 1" in refused(up, "teach", "example", settings={"rank": 0})
    assert "steps" in refused(up, "teach", "example", settings={"steps": "<b>many</b>"})
    assert "there is no adapter 'x'" in refused(up, "draw", ["sks"], [["x", 1]])
    assert "no prompt" in refused(up, "draw", [" "])
    assert "there is no format" in refused(up, "export", "my-dog", "../x")
    assert "two adapters or more" in refused(up, "merge", [])
    assert "pairs of an id and a number" in refused(up, "merge", [["x"]])
    assert "more than 256 pictures" in refused(up, "draw", ["sks"], count=257)
    assert "one or more, and no tags" in refused(up, "draw", ["<lora:x>"], sweep=[0, 1])
    assert "one or more, and no tags" in refused(up, "draw", ["sks"], sweep=[0, 1])
    (up.studio.home / "cache" / "a.safetensors").write_bytes(b"x")
    assert "there is no model ''" in refused(up, "bring", {"path": f"{up.home}/cache/a.safetensors"}, "")
    assert "pickles are never read" in refused(up, "bring", {"path": f"{up.home}/cache/a.safetensors"}, "sd1")
    assert "there is no job 999" in refused(up, "job", 999)
    assert "&lt;b&gt;" in refused(up, "export", "<b>", "kohya")  # toasts are HTML
    assert len(up.studio.jobs.store.all()) == count
    for path in (secret, up.home / "studio.db", up.home / "jobs", Path("/etc/passwd")):
        assert httpx.get(f"{up.address}gradio_api/file={path}").status_code in (403, 404)
    assert httpx.get(up.address, headers={"Host": "evil.example"}).status_code == 400
    answer = httpx.get(up.address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert (up.home.stat().st_mode | (up.home / "cache").stat().st_mode) & 0o077 == 0


def test_the_page_answers_every_event_of_its_own(up):
    """The handlers behind buttons and timers, run as the server runs them: with its checks of values and counts."""
    load_app("studio.work")
    blocks = up.page
    names = {"load": 0, "tick": 0, "click": 0, "change": 0, "focus": 0, "upload": 0, "input": 0, "select": 0}
    for function in list(blocks.fns.values()):
        if function.api_visibility == "public":
            continue
        for _, event in function.targets:
            names[event] += 1
        if any(event in ("load", "tick", "select") for _, event in function.targets):
            values = [getattr(block, "value", None) for block in function.inputs]
            result = asyncio.run(blocks.process_api(function, values, state=None))
            assert len(result["data"]) == len(function.outputs)
    timers = [block.active for block in blocks.blocks.values() if block.get_block_name() == "timer"]
    assert timers == [True, False, False, False, False] and names["select"] >= names["tick"] + 5  # the tab in view asks
    assert names["load"] >= 4 and names["tick"] >= 5 and names["click"] >= 15
    assert not [
        f.api_name for f in blocks.fns.values() if f.api_visibility == "public" and not isinstance(f.api_name, str)
    ]


def test_which_base_model_draws(tmp_path):
    studio = load_app("studio.work").Studio(tmp_path, {"tiny-sd": None, "mine": "/models/mine"})
    assert studio._base("", []) is None and studio._base("mine", []) == "/models/mine"
    assert studio._base("", ["/models/mine", "sd1"]) == "/models/mine"  # an import goes with any model of its kind
    assert studio._base("mine", ["sd1"]) == "/models/mine" and studio._base("", [None, None]) is None
    for model, made_on, why in (
        ("", ["sd1"], "choose the base model"),
        ("tiny-sd", ["/models/mine"], "another model"),
        ("", [None, "/models/mine"], "different models"),
    ):
        with pytest.raises(InputError, match=why):
            studio._base(model, made_on)


def test_a_merge_knows_its_model_without_its_parts(tmp_path):
    studio = load_app("studio.work").Studio(tmp_path, {"mine": "/models/mine"})
    parts = [studio.teach("example", title=name, model="mine") for name in "ab"]
    for job in parts:
        (studio.jobs.folder(job) / "run").mkdir()
        (studio.jobs.folder(job) / "run/adapter.safetensors").write_bytes(b"x")
    merged = studio.merge([["a", 1], ["b", 0.5]])
    (studio.jobs.folder(merged) / "run").mkdir()
    (studio.jobs.folder(merged) / "run/adapter.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="needs what job 1 made"):
        studio.jobs.delete(parts[0])
    studio.jobs.store.move(merged, ("queued",), "done")
    for job in parts:
        studio.jobs.delete(job)
    (left,) = studio.shelf.adapters()
    assert (left.name, left.model) == ("a-b", "/models/mine")


class Visitor:
    """Somebody at the page: calls the handlers behind its buttons as the server does, with its checks of values."""

    def __init__(self, up) -> None:
        from gradio.state_holder import SessionState

        self.up, self.blocks = up, up.page
        self.state = SessionState(up.page)
        functions = reversed(list(up.page.fns.values()))  # of several of one name the first
        self.named = {getattr(function.fn, "__qualname__", ""): function for function in functions}
        self.values: dict[int, object] = {}

    def upload(self, name: str, data: bytes) -> dict:
        """A file as the page's own upload leaves it."""
        (path,) = httpx.post(f"{self.up.address}gradio_api/upload", files=[("files", (name, data))]).json()
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def press(self, handler: str, **given: object) -> list:
        """The outputs of a handler; inputs by their labels, and otherwise what the page shows."""
        function = self.named[handler]
        inputs = []
        for block in function.inputs:
            label = str(getattr(block, "label", ""))
            match = next((key for key in given if label.lower().startswith(key.replace("_", " "))), None)
            value = given.pop(match) if match else self.values.get(block._id, getattr(block, "value", None))
            inputs.append(value)
        assert not given, f"{handler} has no input {given}"
        done = asyncio.run(self.blocks.process_api(function, inputs, state=self.state))
        for block, value in zip(function.outputs, done["data"], strict=True):
            update = isinstance(value, dict) and value.get("__type__") == "update"
            if not update or "value" in value:
                self.values[block._id] = value["value"] if update else value
        return done["data"]


def settled(up) -> None:
    """When nothing runs and nothing waits."""
    end = time.monotonic() + 20
    while any(job.state in ("queued", "running", "stopping") for job in up.studio.jobs.store.all()):
        assert time.monotonic() < end
        up.studio.jobs.tick()
        time.sleep(0.05)


def test_a_visitor_goes_through_all_tabs(up):
    visitor = Visitor(up)
    photos = [visitor.upload("a.png", png(1, 40)), visitor.upload("*bad* <b>.png", b"no picture")]
    _, told, squares, table, _, emptied = visitor.press("Teach.take", photos=photos)
    assert "1 pictures taken" in told and "**1 left out:**" in told and emptied is None
    assert len(squares["value"]) == 1 and table["value"]["data"][0][1] == "a.png"
    captions = {"headers": ["", "", ""], "data": [["0001.png", "a.png", "sks runs"]]}
    job, *_ = visitor.press(
        "Teach.begin", what="a photo of sks dog", name="visit", steps=5, rank="3", seed=" 2", other="sites: [+ff]",
        captions=captions,
    )  # fmt: skip
    number = job["value"]
    settled(up)
    given = up.studio.jobs.settings(up.studio.jobs.store.get(number))
    assert [given[key] for key in ("steps", "rank", "seed", "sites")] == [5, 3, 2, ["+ff"]]
    assert (Path(given["photos"]) / "0001.txt").read_text() == "sks runs"
    shown = visitor.press("Watch.show", job=number)
    assert "done" in shown[1] and shown[8]["value"]["data"]
    assert [len(part["value"]) for part in shown[9:11]] == [2, 2]

    with pytest.raises(Exception, match="Rank of LoRA is 'many'; write a number"):
        visitor.press("Teach.begin", rank="many")
    visitor.press("Teach.begin", rank="")
    settled(up)
    with pytest.raises(Exception, match="one a line"):
        visitor.press("Teach.begin", other="no settings")
    key = str(number)
    _, *sliders = visitor.press("Chosen.label", adapters=[key])
    assert [slider["visible"] for slider in sliders] == [True, False, False, False]
    visitor.press("Create.begin", prompts="sks one\nsks two", adapters=[key], seed="5")
    settled(up)
    _, words, slider, pictures, sheets, _ = visitor.press("Create.show")
    assert "from seed 5" in words and slider["visible"] and len(pictures["value"]) == 4 and len(sheets["value"]) == 1
    with pytest.raises(Exception, match="the adapters that are chosen: one or more"):
        visitor.press("Create.begin_sweep", adapters=[])

    facts, preview, card = visitor.press("Library.show", adapter=key)
    assert "<lora:visit:0.8>" in facts and preview is None and "The card" in card
    with pytest.raises(Exception, match="tick the box"):
        visitor.press("Library.remove", adapter=key, yes=False)
    assert "is deleted" in visitor.press("Library.remove", adapter=key, yes=True)[1]
    rows, *_ = visitor.press("JobsTab.show")
    assert number not in [row[0] for row in rows["data"]]


def test_hostile_names_over_the_wire_leave_the_app_up_and_nothing_outside(up):
    before = {path for path in up.folder.rglob("*") if not path.is_relative_to(up.home)}
    names = (
        "../../up.png",
        "/etc/x.png",
        "..\\..\\w.png",
        "a\tb.png",
        "x" * 300 + ".png",
        ".png",
        "CON.png",
        "%2e%2e%2fz.png",
    )
    for i, name in enumerate(names):
        answer = httpx.post(f"{up.address}gradio_api/upload", files=[("files", (name, png(i)))])
        for path in answer.json() if answer.status_code == 200 else []:
            assert Path(path).resolve().is_relative_to(up.home / "cache")
            if Path(path).suffix:
                taken = up.client.predict([{"path": path}], api_name="/upload")
                assert list(taken["pictures"]) == ["0001.png"]
            else:
                assert "no usable picture" in refused(up, "upload", [{"path": path}])
    assert {path for path in up.folder.rglob("*") if not path.is_relative_to(up.home)} - before <= set(
        (up.folder / "got").rglob("*")
    )
    assert isinstance(up.client.predict(api_name="/jobs"), list)


def test_uploads_that_nobody_uses_go_after_a_day(tmp_path):
    work = load_app("studio.work")
    studio = work.Studio(tmp_path)
    (tmp_path / "one.png").write_bytes(png())
    used, old, new = (studio.intake.pictures([tmp_path / "one.png"]).id for _ in range(3))
    job = studio.teach(used, "a photo of sks dog")
    for name in (used, old):
        os.utime(studio.intake.sets / name, (0, 0))
    work.Studio(tmp_path)
    assert {path.name for path in studio.intake.sets.iterdir()} == {new}
    assert studio.jobs.store.get(job.id).state == "queued"
    assert (Path(studio.jobs.settings(job)["photos"]) / "0001.png").is_file()  # a job has its own


# -- log-in --------------------------------------------------------------------------------------------------------


def test_wrong_passwords_are_counted_and_then_nobody_comes_in_for_a_while():
    now = [0.0]
    gate = load_app("studio.guard").Gate("correct horse", clock=lambda: now[0])
    assert gate("any", "correct horse")
    assert not any(gate("any", f"wrong {i}") for i in range(5))
    assert not gate("any", "correct horse")
    now[0] = 61.0
    assert gate("any", "correct horse") and not gate("any", "wröng")


def test_nothing_is_shown_without_the_password(up):
    build = load_app("studio.build")
    page, address = build.launch(up.studio, up.home / "cache", "127.0.0.1", free_port(), "correct horse")
    try:
        with httpx.Client(base_url=address) as visitor:
            for path in ("config", "gradio_api/info", "gradio_api/file=x", "gradio_api/call/jobs"):
                assert visitor.get(path).status_code in (401, 405), path
            assert visitor.post("gradio_api/upload", files={"files": b"x"}).status_code == 401
            assert visitor.post("gradio_api/call/jobs", json={"data": []}).status_code == 401
            assert visitor.post("login", data={"username": "me", "password": "wrong"}).status_code == 400
            assert visitor.get("config").status_code == 401
            assert visitor.post("login", data={"username": "me", "password": "correct horse"}).status_code == 200
            assert visitor.get("config").status_code == 200
            refused = [visitor.post("login", data={"username": "me", "password": "wrong"}) for _ in range(5)]
            late = visitor.post("login", data={"username": "me", "password": "correct horse"})
            assert {answer.status_code for answer in (*refused, late)} == {400}
    finally:
        page.close(verbose=False)


def test_another_address_needs_a_password(tmp_path):
    app = load_app("studio.app")
    with pytest.raises(InputError, match="others can reach it; write --password_file"):
        app.checked(app.Config(address="0.0.0.0"))
    (tmp_path / "short").write_text("1234\n")
    with pytest.raises(InputError, match="less than 8 characters"):
        app.checked(app.Config(address="0.0.0.0", password_file=tmp_path / "short"))
    (tmp_path / "good").write_text("correct horse\n")
    assert app.checked(app.Config(address="0.0.0.0", password_file=tmp_path / "good")) == "correct horse"
    with pytest.raises(InputError, match="NAME=FOLDER"):
        app.named(("folder",), "")
    assert cli.main(["studio", "--address", "0.0.0.0"]) == 2
