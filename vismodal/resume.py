"""Training checkpoints: one safetensors file with adapter, optimiser and step, from which a run goes on exactly.

No random state is saved: every draw of `vismodal.train` comes from a generator keyed by seed, purpose, step and index.
The base model is never saved; what it was, and which settings must be the same, is in `Checkpoints.identity`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from vismodal.errors import InputError
from vismodal.files import remove_leftovers, write_tensors
from vismodal.sharding import spread_like, whole

if TYPE_CHECKING:
    from vismodal.ema import Ema

FORMAT = "vismodal-training-1"
_NAME = re.compile(r"step-(\d+)\.safetensors")


class Trainable(Protocol):
    """What training needs of an adapter; `vismodal.Adapter` is one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor], /) -> object: ...
    def unused(self) -> list[str]: ...
    def penalty(self) -> Tensor | None: ...
    def advance(self, step: int, steps: int, /) -> None: ...


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where the files `step-*.safetensors` lie.
        identity: settings (JSON values) that decide the outcome; a checkpoint with others is refused by `restore`.
        every: save after every so many steps; 0 saves only when training ends or stops.
        keep: how many of the newest files stay.
    """

    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    every: int = 0
    keep: int = 2

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step."""
        return self.every > 0 and step % self.every == 0

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:07d}.safetensors"

    def newest(self) -> Path | None:
        """The newest whole file, or None. Names are given to whole files only, yet a disk may lose the end of one."""
        return next((path for _, path in reversed(self._numbered()) if _is_whole(path)), None)

    def save(
        self,
        step: int,
        adapter: Trainable,
        optimizer: Optimizer,
        extra: Mapping[str, Any] | None = None,
        *,
        ema: Ema | None = None,
        write: bool = True,
    ) -> Path:
        """Writes the state after `step` steps; older files go only when the new one stands. `extra`: JSON values.
        The adapter's own values and, with `ema`, the averages beside them.

        All processes must call it, since what FSDP2 has sharded is gathered; those with `write` off only take part.
        """
        tensors = {f"adapter.{name}": tensor for name, tensor in adapter.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in (ema.state_dict() if ema else {}).items()}
        state, rest = _pack(optimizer, adapter)
        if not write:
            return self.path(step)
        header = {"format": FORMAT, "step": step, "identity": dict(self.identity), "optimizer": rest}
        header |= {"extra": dict(extra or {}), "threads": torch.get_num_threads()}
        # one entry: safetensors writes several in random order, and equal checkpoints would be unequal files
        path = write_tensors(self.path(step), tensors | state, {"vismodal_training": json.dumps(header)})
        for _, old in self._numbered()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path

    def check(self, steps: int) -> None:
        """Raises `InputError` if the newest checkpoint has another identity or more than `steps` steps."""
        path = self.newest()
        if path is not None:
            header, _ = _read(path)
            self._compare(path, header["identity"])
            if header["step"] > steps:
                done = header["step"]
                raise InputError(
                    f"the run has made {done} steps already, more than steps={steps}; write {done} or more"
                )

    def restore(self, adapter: Trainable, optimizer: Optimizer, ema: Ema | None = None) -> tuple[int, dict[str, Any]]:
        """Loads the newest whole checkpoint; gives its step and `extra`, or (0, {}) where there is none.

        Raises `InputError` if it was made with another identity, for another adapter, or without `ema`'s averages.
        """
        path = self.newest()
        if path is None:
            return 0, {}
        remove_leftovers(self.folder)
        header, tensors = _read(path)
        self._compare(path, header["identity"])
        ours, theirs = torch.get_num_threads(), header["threads"]
        if ours != theirs:
            equal = "equals an uninterrupted run only up to rounding"
            print(f"note: {path.name} was made with {theirs} threads, this run has {ours} and {equal}", file=sys.stderr)
        _load_adapter(path, adapter, _under("adapter.", tensors))
        if ema:
            averages = _under("ema.", tensors)
            if not averages:
                raise InputError(f"{path} holds no averages: it was made without ema; go on without it")
            ema.load_state_dict(averages)
        _unpack(optimizer, adapter, tensors, header["optimizer"])
        return int(header["step"]), header["extra"]

    def _numbered(self) -> list[tuple[int, Path]]:
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.glob("step-*.safetensors"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _compare(self, path: Path, theirs: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(dict(self.identity)))  # as it looks after saving: tuples are lists
        differ = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
        if differ:
            told = "; ".join(f"{n} was {theirs.get(n)!r} and is now {ours.get(n)!r}" for n in sorted(differ)[:3])
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise InputError(
                f"{path} cannot be resumed with other settings: {told}{more}. Give the old ones, or another folder"
            )


def adapter_of(path: Path) -> dict[str, Tensor] | None:
    """The adapter's tensors in a training checkpoint, averages (`vismodal.ema`) where it has them, as its run's samples
    were drawn; None of any other file, also of one that is not whole."""
    try:
        with safe_open(path, "pt") as file:
            if "vismodal_training" not in (file.metadata() or {}):
                return None
            names = [name for name in file.keys() if name.startswith(("adapter.", "ema."))]  # noqa: SIM118 - no mapping
            tensors = {name: file.get_tensor(name) for name in names}
            return _under("adapter.", tensors) | _under("ema.", tensors)
    except SafetensorError:
        return None


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares the file's length with the header's
            return True
    except (SafetensorError, OSError):
        return False


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        header = json.loads((file.metadata() or {}).get("vismodal_training", "{}"))
        if header.get("format") != FORMAT:
            raise InputError(f"{path} is no checkpoint of this version: {header.get('format')!r}, not {FORMAT!r}")
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _load_adapter(path: Path, adapter: Trainable, state: dict[str, Tensor]) -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if ours != theirs:
        name = sorted(dict(ours.items() ^ theirs.items()))[0]
        raise InputError(
            f"{path} holds another adapter: {name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')}"
            " here. It was trained on another model or with other sites; give those, or another output folder"
        )
    adapter.load_state_dict(state)


# -- optimiser state: tensors go to safetensors by the parameter's name, the rest to JSON ------------------------------


def _names(optimizer: Optimizer, adapter: Trainable) -> list[str]:
    """The parameters' names in the optimiser's own order, by which its state_dict numbers them."""
    names = {id(parameter): name for name, parameter in adapter.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _pack(optimizer: Optimizer, adapter: Trainable) -> tuple[dict[str, Tensor], dict[str, Any]]:
    names, state = _names(optimizer, adapter), optimizer.state_dict()
    tensors, seen = dict[str, Tensor](), set[int]()
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for key, value in _flat(values).items():
            if isinstance(value, Tensor):
                mine = whole(value)
                shared = mine.data_ptr() in seen  # bitsandbytes' tables; safetensors writes nothing twice
                seen.add(mine.data_ptr())
                tensors[f"optimizer.{names[index]}.{key}"] = mine.clone() if shared else mine
            else:
                scalars.setdefault(names[index], {})[key] = value
    groups = [{key: value for key, value in g.items() if key != "params"} for g in state["param_groups"]]
    return tensors, {"class": type(optimizer).__name__, "scalars": scalars, "groups": groups}


def _unpack(optimizer: Optimizer, adapter: Trainable, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    if rest["class"] != type(optimizer).__name__:
        raise InputError(f"the checkpoint is of the optimiser {rest['class']}, this run has {type(optimizer).__name__}")
    state: dict[int, dict[str, Any]] = {}
    parameters = dict(adapter.named_parameters())
    for index, name in enumerate(_names(optimizer, adapter)):
        prefix, mine = f"optimizer.{name}.", parameters[name]
        found = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        found = {k: v for k, v in found.items() if "." not in k}  # a longer name may begin like this one
        found = {k: spread_like(v, mine) if v.shape == mine.shape else v for k, v in found.items()}
        found |= rest["scalars"].get(name, {})
        if found:
            state[index] = _nested(found)
    groups = []
    for ours, theirs in zip(optimizer.state_dict()["param_groups"], rest["groups"], strict=True):
        as_ours = {k: tuple(v) if isinstance(ours.get(k), tuple) else v for k, v in theirs.items()}
        groups.append(ours | as_ours)
    with torch.no_grad():
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state without dicts in it, {"a": {"b": x}} as {"a/b": x}: bitsandbytes keeps its 8 bits so."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}/{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`_flat` backwards."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        outer, slash, inner = key.partition("/")
        if slash:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[key] = value
    return nested
