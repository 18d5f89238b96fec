"""The `vismodal` command. A subcommand is a pipeline: one line in `COMMANDS`, its settings the `Config` of its file.

Its name has one word, or two: `vismodal bench` alone lists what begins with that word.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from vismodal.errors import InputError, one_line


class Command(NamedTuple):
    """A subcommand: the file in `pipelines/`, a line for the overview, and whether the file is in `apps/` instead."""

    pipeline: str
    help: str
    app: bool = False


COMMANDS = {
    "dreambooth": Command("dreambooth", "teach Stable Diffusion a subject from a few photos"),
    "control": Command("control", "train an adapter by which edges or a picture steer Stable Diffusion"),
    "generate": Command("generate", "draw pictures with adapters, another one for each prompt if you like"),
    "classify": Command("classify", "adapt a vision model to a folder of pictures by class; compare methods on it"),
    "predict": Command("predict", "say what is in pictures, by an adapter that classify made"),
    "clip": Command("clip", "adapt CLIP to a folder of pictures by class: prompts, adapters, caches, few-shot"),
    "clip pairs": Command("clip_pairs", "fine-tune CLIP on pictures with texts, and see what it forgets"),
    "evaluate personalisation": Command(
        "evaluate_personalisation", "how like the subject, how obedient, and what it cost the rest"
    ),
    "merge": Command("merge", "several adapters as one: sum, TIES, DARE, at the rank that you want"),
    "resize": Command("resize", "fewer ranks in an adapter, with the error of it"),
    "extract": Command("extract", "a LoRA out of a model that was tuned in full"),
    "bake": Command("bake", "adapters in the weights of their model, as a folder that its own library loads"),
    "convert": Command("convert", "write a LoRA, LyCORIS or embedding file in another tool's format"),
    "inspect": Command("inspect_files", "say what is in the file of an adapter or of tokens"),
    "studio": Command("studio.app", "all of this in the browser: teach, draw, keep adapters, recognise", app=True),
    "bench emoji": Command("bench_emoji", "measure methods on the embedded model: a style and a subject, by emoji"),
}

OVERVIEW = """\
vismodal: parameter-efficient fine-tuning of vision, vision-language and diffusion models

  vismodal COMMAND                        run it as it is, where it has an example built in
  vismodal COMMAND --help                 every setting, with what it does
  vismodal COMMAND --config FILE.yaml     settings from a file; those after it on the line win
  vismodal COMMAND --print_config         that file, to begin with

commands:
{commands}

start here:
  vismodal classify
  vismodal classify --data my_pictures --compare "lora; vpt(tokens=8); adaptformer"
  vismodal dreambooth
  vismodal dreambooth --photos my_dog --prompt "a photo of sks dog" --model OWNER/STABLE-DIFFUSION
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and gives its exit code: 0, 2 for bad input (one line says what), 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except InputError as error:
        problem = str(error)
    except OSError as error:  # the system refuses: no space, no permission
        problem = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"error: {one_line(problem)}", file=sys.stderr)
    return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(commands=_listing(COMMANDS)), end="")
        return 0
    if arguments[0] == "--version":
        from vismodal import __version__

        print(f"vismodal {__version__}")
        return 0
    longest = sorted(COMMANDS, key=lambda n: -len(n.split()))
    name = next((n for n in longest if n.split() == arguments[: len(n.split())]), None)
    if name is None:
        return _unknown(arguments)
    rest = arguments[len(name.split()) :]
    command = COMMANDS[name]
    pipeline = (load_app if command.app else load_pipeline)(command.pipeline)
    config = parse(pipeline.Config, f"vismodal {name}", rest)
    pipeline.main(config)
    return 0


def _unknown(arguments: list[str]) -> int:
    """What begins with the first word, where only that was given. Raises `InputError` otherwise."""
    group = [name for name in COMMANDS if name.split()[0] == arguments[0]]
    if group and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(f"commands:\n{_listing(group)}")
        return 0
    given = " ".join(arguments[: 1 + bool(group)])
    raise InputError(f"there is no command {given!r}; write one of {', '.join(group or COMMANDS)}, or --help")


def _listing(names: Iterable[str]) -> str:
    width = max(map(len, COMMANDS)) + 2
    return "\n".join(f"  {name:<{width}}{COMMANDS[name].help}" for name in names)


def load_pipeline(name: str) -> ModuleType:
    """The module `vismodal.pipelines.NAME`."""
    return _beside("pipelines", name)


def load_app(name: str) -> ModuleType:
    """The module `vismodal.apps.NAME`."""
    return _beside("apps", name)


def _beside(place: str, name: str) -> ModuleType:
    """A module of `vismodal.PLACE`, which in a checkout lies in a folder beside the package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / place
    if not (package / place).is_dir() and checkout.is_dir():
        beside = sys.modules.setdefault(f"vismodal.{place}", ModuleType(f"vismodal.{place}"))
        beside.__path__ = [str(checkout)]
    try:
        return importlib.import_module(f"vismodal.{place}.{name}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith(f"vismodal.{place}"):
            raise InputError(f"this installation lacks {place}/{name}; install vismodal anew") from error
        extra = 'pip install "vismodal[all]"'
        raise InputError(f"{name} needs the package {error.name}, which is not installed; write {extra}") from error


def parse(config: type, program: str, arguments: Sequence[str]) -> object:
    """A command line as an instance of the dataclass `config`. Raises `InputError` for what it does not allow."""
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

    what = "\n\n".join([(config.__doc__ or "").split("\n\n")[0], *_examples(config)])
    files = f" [{config.POSITIONAL} ...]" if hasattr(config, "POSITIONAL") else ""
    parser = ArgumentParser(
        prog=program,
        usage=f"{program} [settings]{files}",
        description=what,
        exit_on_error=False,
        formatter_class=type("Help", (DefaultHelpFormatter, RawDescriptionHelpFormatter), {}),
    )
    parser.add_argument("--config", action="config", help="YAML file with settings, as a run leaves it in its folder")
    parser.add_class_arguments(config, as_group=False)
    try:
        given = parser.parse_args(_normal(config, arguments))
    except ArgumentError as error:
        raise InputError(f"{error} (see {program} --help)") from error
    values = parser.instantiate(given)
    return config(**{f.name: values[f.name] for f in fields(config)})


def _examples(config: type) -> list[str]:
    """The command lines in the docstring of the pipeline, which stand indented in a paragraph of their own."""
    paragraphs = (sys.modules[config.__module__].__doc__ or "").split("\n\n")
    return [f"examples:\n{p}" for p in paragraphs if p.startswith("    vismodal ")]


def _normal(config: type, arguments: Sequence[str]) -> list[str]:
    """--batch-size as --batch_size, a bare --flag as --flag=true, and --names a b as --names=["a", "b"].

    A pipeline whose `Config.POSITIONAL` names a list takes for it what follows no setting: predict --top 2 a.jpg b.jpg.
    """
    types = {"--config": "Path"} | {f"--{f.name}": str(f.type) for f in fields(config)}
    listed = getattr(config, "POSITIONAL", None)
    result: list[str] = []
    loose: list[str] = []
    left = list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            following = list(itertools.takewhile(lambda a: not a.startswith("--"), left))
            kind = "" if equals else types.get(name, "")
            if kind in ("bool", str(bool)) and "".join(following[:1]).lower() not in ("true", "false"):
                equals, value = "=", "true"
            elif kind.startswith("tuple[") and following and not following[0].startswith("["):
                equals, value = "=", json.dumps(following)
                del left[: len(following)]
            elif kind and listed and following:
                equals, value = "=", left.pop(0)
        elif listed:
            loose.append(f"{name}{equals}{value}")
            continue
        result.append(f"{name}{equals}{value}")
    return [*result, f"--{listed}={json.dumps(loose)}"] if loose else result


if __name__ == "__main__":
    sys.exit(main())
