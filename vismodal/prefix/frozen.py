"""Computing the frozen part of a model once for each picture, and training from what it gave.

    cached = vm.FrozenPrefix(model, limit="4GiB")
    for rows, x in loader:                      # rows: a key for each picture, such as its number
        loss = criterion(cached(x, rows), labels[rows])

Everything before the first place that an adapter touches is a constant function of the picture, where no augmentation
is drawn anew each time; K augmented copies of a picture are K keys: (row, k). `vismodal.prefix.cut` finds that place,
and what adapters read before it, for the adapters that act just now. `cached(load, rows)` with a function of the keys
that are missing spares reading pictures too.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.attach import WRAPPERS
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table as family_table
from vismodal.ports import acting
from vismodal.prefix.calls import modules_of
from vismodal.prefix.cut import find
from vismodal.prefix.keys import LOOKS, Key, check, looks, names
from vismodal.prefix.points import Cut
from vismodal.prefix.store import Budget, Rows, Spec, size_of
from vismodal.site import Table
from vismodal.table import table

COMPILED = "a compiled or wrapped model cannot be cut: give FrozenPrefix the plain one, and compile nothing around it"
Pictures = Tensor | Callable[[list[Key]], Tensor]


@dataclass(frozen=True)
class Seen:
    """What pictures are like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Kept:
    """The rows of one cut in one state of the model."""

    rows: Rows
    state: tuple[tuple[int, int], ...]  # of the constants


class FrozenPrefix:
    """A model that computes its frozen part once for each key, then goes on from what was kept, with the same outputs
    and gradients.

    Rows are equal to the bit to those that a batch of the same size gives; the order of sums in a matrix product may
    differ with the size of a batch. The cut is found in the first call, and again whenever other adapters act or the
    model goes into another mode; rows of a frozen part that has changed (by merging, by loading weights) are forgotten.

    Args:
        model: adapted or about to be; a picture, or a batch of them, is its only argument.
        limit: memory for rows, on the model's device: bytes, or "4GiB".
        disk: the same for what outgrows it. Rows that fit in neither are computed each time.
        folder: keeps rows in files here, for other runs too; `limit` is not used then. Without one, files go into the
            system's folder for temporary ones, and are gone with the process.
        call: what runs the model, where that is no plain call: `model.encode_image`.
        sites: table rows for module classes that no family knows, as in `vm.adapt`.
        fine: also keeps what is constant within the first adapted block, which spares up to a third of it more and
            takes several times the room.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        limit: str | int = "4GiB",
        disk: str | int = "16GiB",
        folder: str | Path | None = None,
        call: Callable[[Tensor], Any] | None = None,
        sites: Table | None = None,
        fine: bool = False,
    ):
        _check(model)
        self.model, self.call, self.sites, self.fine = model, call or model, sites, fine
        self.memory, self.disk = Budget(size_of(limit)), Budget(size_of(disk))
        self.folder = Path(folder) if folder is not None else None
        self.cuts: dict[object, Cut] = {}
        self.kept: dict[str, Kept] = {}
        self.seen: Seen | None = None
        self.last: tuple[Cut, Kept | None] | None = None
        self.lock = threading.Lock()
        self.close = weakref.finalize(self, _close, self.kept)

    def __call__(self, x: Pictures, keys: Sequence[Key] | Tensor) -> Any:
        """The model's output for pictures b c h w with these keys, or for those that x gives for the keys that it is
        called with: those of which nothing is kept."""
        rows = names(keys)
        if torch.compiler.is_compiling():
            raise InputError(COMPILED)
        if not self.lock.acquire(blocking=False):
            raise RuntimeError("two threads run this FrozenPrefix at once; run one forward at a time")
        try:
            return self._forward(x, rows)
        finally:
            self.lock.release()

    def _forward(self, x: Pictures, keys: list[Key]) -> Any:
        if self.seen is None:
            x = self._pictures(x, keys)
        if isinstance(x, Tensor):
            self._look(x, keys)
        cut, kept = self.last = self._cut(x, keys)
        if kept is None:
            return self.call(self._pictures(x, keys))
        if not isinstance(x, Tensor) and (cut.reads or kept.rows.found):
            x = self._pictures(x, keys)
        tensors = self._tensors(cut, kept.rows, x, keys)
        if not isinstance(x, Tensor):
            assert self.seen is not None
            x = torch.full((len(keys), *self.seen.shape), float("nan"), dtype=self.seen.dtype, device=self.seen.device)
        return cut.replay(lambda: self.call(x), tensors)

    # -- the rows of a batch --

    def _tensors(self, cut: Cut, rows: Rows, x: Pictures, keys: list[Key]) -> list[Tensor]:
        """What is kept of each picture, computed where it is not; rows x gave are compared with those kept."""
        missing = list(dict.fromkeys(key for key in keys if key not in rows.where))
        known = [key for key in keys if key in rows.where]
        shown = looks(x) if isinstance(x, Tensor) else None
        old = rows.get(known) if known else []
        if known and shown is not None:
            check(shown[[i for i, key in enumerate(keys) if key in rows.where]], old[0], known)
            rows.found = 0
        if not missing:
            return old[1:]
        first = [keys.index(key) for key in missing]
        if not isinstance(x, Tensor):
            x = self._pictures(x, missing)
        elif len(missing) < len(keys):
            x = x[first]
        new = [looks(x), *self._compute(cut, x)]
        rows.add(missing, new)
        if len(missing) == len(keys):
            return new[1:]
        place = {key: i for i, key in enumerate(missing)}
        before: Sequence[Tensor | None] = old or [None] * len(new)
        pairs = zip(rows.specs, new, before, strict=True)
        return [_joined(keys, place, *each) for each in pairs][1:]

    def _compute(self, cut: Cut, x: Tensor) -> list[Tensor]:
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            return cut.record(lambda: self.call(x))

    def _pictures(self, x: Pictures, keys: list[Key]) -> Tensor:
        if not isinstance(x, Tensor):
            x = x(keys)
            self._look(x, keys)
        return x

    def _look(self, x: Tensor, keys: list[Key]) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            raise InputError("FrozenPrefix takes batches of pictures, floating-point tensors b c h w")
        if len(x) != len(keys):
            raise InputError(f"{len(x)} pictures came with {len(keys)} keys; give one for each")
        if x.requires_grad:
            raise InputError("the pictures want gradients, which what is kept of them cannot give; x.detach() them")
        self.seen = Seen(tuple(x.shape[1:]), x.dtype, x.device)

    # -- the cut --

    def _cut(self, x: Pictures, keys: list[Key]) -> tuple[Cut, Kept | None]:
        """For the model as it stands; found where it has not stood so before."""
        assert self.seen is not None
        mode = self._mode()
        state = mode, self._acting(), torch.is_grad_enabled()
        if state not in self.cuts:
            _check(self.model)
            self.cuts[state] = find(self.model, self.call, self._pictures(x, keys), self._blocks())
        cut = self.cuts[state]
        if not cut.kept:
            return cut, None
        about = repr((mode, [(str(p), p.side, p.call) for p in cut.kept], cut.specs))
        now = tuple((t.data_ptr(), t._version) for t in cut.constants)
        kept = self.kept.get(about)
        if kept is not None and kept.state != now:
            kept.rows.clear()
            kept.rows.close()
            kept = None
        if kept is None:
            kept = self.kept[about] = Kept(self._rows(cut, about), now)
        return cut, kept

    def _mode(self) -> tuple[object, ...]:
        assert self.seen is not None
        device = self.seen.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self.seen.shape, self.seen.dtype, str(self.seen.device), self.model.training, autocast

    def _acting(self) -> tuple[object, ...]:
        """The adapters that act on each module, and the parameters of the base that are trained."""
        modules = modules_of(self.model)
        ports = tuple((port, tuple(name for name, _ in port.state)) for port in acting(modules))
        return ports, tuple(id(p) for m in modules for p in m._parameters.values() if p is not None and p.requires_grad)

    def _blocks(self) -> set[nn.Module]:
        """Modules that are taken whole; none in a model of no known family, which is cut wherever a module ends."""
        try:
            found = [] if self.fine else discover(self.model, family_table(self.model, self.sites))
        except InputError:
            return set()
        return {s.modules["enter"] for s in found if s.kind == "block"}

    def _rows(self, cut: Cut, about: str) -> Rows:
        assert self.seen is not None
        specs = [Spec((LOOKS,), torch.float32, (0,)), *cut.specs]
        folder = None
        if self.folder is not None:
            about = f"{about} {torch.__version__} {_hash(cut.constants)}"
            folder = self.folder / hashlib.sha256(about.encode()).hexdigest()[:16]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                folder /= f"process {torch.distributed.get_rank()}"  # each keeps what it has seen itself
        return Rows(specs, self.seen.device, self.memory, self.disk, folder, about)

    # -- what there is --

    @property
    def share(self) -> float:
        """Of the FLOPs of a forward, those that are spared; 0 before the first call."""
        return self.last[0].share if self.last and self.last[1] else 0.0

    @property
    def at(self) -> tuple[str, ...]:
        """What is kept of a picture: paths of modules."""
        return tuple(map(str, self.last[0].kept)) if self.last else ()

    @property
    def row_bytes(self) -> int:
        """That are kept of each picture."""
        return self.last[1].rows.row if self.last and self.last[1] else 0

    def __len__(self) -> int:
        """Pictures of which the frozen part is kept, for the adapters that acted last."""
        return len(self.last[1].rows) if self.last and self.last[1] else 0

    def __str__(self) -> str:
        if self.last is None:
            return "FrozenPrefix: the cut is found in the first call"
        cut, kept = self.last
        if kept is None:
            return f"FrozenPrefix: nothing is kept; {cut.why}"
        kept_at = [(str(p), cut.forms[p].specs) for p in cut.kept]
        shapes = [" + ".join("x".join(map(str, s.shape)) for s in specs) for _, specs in kept_at]
        sizes = [f"{sum(s.bytes for s in specs):,}" for _, specs in kept_at]
        rows = [[name, *each] for (name, _), *each in zip(kept_at, shapes, sizes, strict=True)]
        memory, disk = (kept.rows.kept(on_disk) / 2**20 for on_disk in (False, True))
        return (
            f"FrozenPrefix: {100 * cut.share:.0f}% of a forward are computed once for each picture\n"
            f"{len(kept.rows):,} are kept: {memory:,.1f} MiB in memory, {disk:,.1f} MiB on disk\n"
            f"{table(['kept', 'shape', 'bytes a picture'], rows)}"
        )


def _close(kept: dict[str, Kept]) -> None:
    for each in kept.values():
        each.rows.close()


def _check(model: nn.Module) -> None:
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None or type(m).__name__ in WRAPPERS]
    if compiled:
        raise InputError(COMPILED)
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise InputError("the parameters are sharded (DTensor): FrozenPrefix cuts models that are whole on a process")


def _joined(keys: list[Key], place: dict[Key, int], spec: Spec, new: Tensor, old: Tensor | None) -> Tensor:
    """Rows that were just made and rows that were kept, in the order of the keys."""
    out = spec.empty(len(keys), new.device)
    fresh = [i for i, key in enumerate(keys) if key in place]
    out[fresh] = new[[place[keys[i]] for i in fresh]]
    if old is not None:
        out[[i for i, key in enumerate(keys) if key not in place]] = old
    return out


def _hash(tensors: Iterable[Tensor]) -> str:
    """Of all their values."""
    found = hashlib.sha256()
    for t in tensors:
        plain = t.detach().contiguous().cpu()
        found.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
