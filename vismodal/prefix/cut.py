"""Where a forward ceases to be a constant function of each picture: found by trying, not by declaration.

In one forward on two rows every tensor that may change is NaN (those of the adapters that act, and base parameters that
want gradients), and so is the first row. What is no NaN in the second row, and wants no gradients, follows from nothing
that may change; what is NaN in the first row alone, from one picture alone. That holds for any family and any method: a
side network's taps leave the stream as it is, a prompt that joins it does not. A block whose output may change is taken
whole.

Of all such places those are kept without which the output is another: each is tried with NaN in its stead. This leaves
the latest ones, that which adapters read on the way, and no more. The outcome is compared with a plain forward and
backward before it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.attach import attached
from vismodal.errors import InputError
from vismodal.fingerprint import BANK
from vismodal.ports import acting, ports_on
from vismodal.prefix.calls import Call, modules_of, tensors_in, watched
from vismodal.prefix.points import Cut, Form, Point, record

LEAST = 0.05  # of the forward: less is not worth its room
Run = Callable[[Tensor], Any]


# -- finding ----------------------------------------------------------------------------------------------------------


def find(model: nn.Module, run: Run, x: Tensor, blocks: Collection[nn.Module]) -> Cut:
    """The cut of `run`, a forward of the model as it stands, for pictures such as x. Nothing is changed.

    Raises `InputError` where a part before the cut draws at random, or cannot be stood in for.
    """
    pair = (x if len(x) > 1 else x.repeat_interleave(2, 0))[:2].detach()
    paths = modules_of(model)
    with _trial(model, x.device), torch.no_grad():
        if any(bool(torch.isnan(t).any()) for t in _outcome(model, partial(run, pair))):
            raise InputError("the model's own output is NaN for the pictures given, so nothing can be tried on it")
    busy = {m for m in paths if acting([m])}
    for port in acting(busy):
        if moving := [e.key for group in port.live for e in group.entries if hasattr(e.module, "idle")]:
            return Cut(why=f"{moving[0]} acts in some steps and in others not")
    with _trial(model, x.device, poison=True):
        bad = pair.clone()
        bad[0] = float("nan")
        tree = watched(model, partial(run, bad), _constant)
    points = _ordered(_points(tree, busy, blocks, paths))
    if not points:
        return Cut(why="nothing before it is left: what changes acts on the pictures' very first layer")
    flops = {p: c.flops for p, c in points.items()}
    with _trial(model, x.device), torch.no_grad():
        cut = _search(model, partial(run, pair), flops, tree.flops)
    if cut.share < LEAST:
        found = f"only {100 * cut.share:.1f}% of the forward lie before {', '.join(map(str, cut.kept))}"
        return Cut(why=found, share=cut.share)
    with _trial(model, x.device):
        cut.reads = not _works(model, cut, partial(run, torch.full_like(pair, float("nan"))), partial(run, pair))
        _check_gradients(model, cut, partial(run, pair))
    cut.constants = _constants(paths, points)
    return cut


def _constant(leaves: list[Any]) -> int:
    """Values of a row, where all tensors follow from one row each: the NaN of the first is in that, and in no other."""
    tensors = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, bool | int | float | str)]
    return sum(t[0].numel() for t in tensors) if tensors and all(map(_follows, tensors)) else 0


def _follows(t: Any) -> bool:
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() == 0 or len(t) != 2 or t.requires_grad:
        return False
    return bool(torch.isnan(t[0]).any()) and not bool(torch.isnan(t[1]).any())


def _points(
    call: Call, busy: Collection[nn.Module], blocks: Collection[nn.Module], paths: dict[nn.Module, str]
) -> Iterator[tuple[Point, Call]]:
    """The outermost calls that make constants, and constants that the others get, or that ports read."""
    module = call.module
    if module is not None:
        whole = call.makes and not _has_inside(call, busy)
        if call.gets and (not whole or module in busy):  # whose ports may read it
            yield Point(module, "in", call.given, paths[module]), call
        if whole:
            yield Point(module, "out", call.made, paths[module]), call
            return
        if module in blocks and not call.makes:
            return
    for child in call.children:
        yield from _points(child, busy, blocks, paths)


def _has_inside(call: Call, busy: Collection[nn.Module]) -> bool:
    return any(c.module in busy or _has_inside(c, busy) for c in call.children)


def _ordered(points: Iterator[tuple[Point, Call]]) -> dict[Point, Call]:
    """In the order of the forward; what a module gets only where that is smaller than what was made last."""
    last, found = 0, {}
    for point, call in sorted(points, key=lambda p: p[1].order[p[0].side == "out"]):
        if point.side == "out":
            last = call.makes
        elif not call.gets < last:
            continue
        found[point] = call
    return found


def _search(model: nn.Module, run: Callable[[], Any], flops: dict[Point, int], total: int) -> Cut:
    """Leaves out point after point, in halves, as long as the output stays."""
    values = record_twice(list(flops), run, model)
    forms = {p: Form(v) for p, v in values.items()}
    truth = _outcome(model, run)
    plan = Cut(list(flops), [], forms)

    def holds(kept: list[Point], skipped: list[Point]) -> bool:
        trial = Cut(kept, skipped, forms)
        given = [t for p in kept for t in tensors_in(values[p])]
        clones = [t.clone() for t in given] or [next(iter(tensors_in(values[next(iter(values))])))]
        return _same(_outcome(model, lambda: trial.replay(run, clones)), truth)

    def skip(some: list[Point]) -> None:
        kept = [p for p in plan.kept if p not in some]
        if kept and holds(kept, plan.skipped + some):
            plan.kept, plan.skipped = kept, plan.skipped + some
        elif len(some) > 1:
            skip(some[: len(some) // 2])
            skip(some[len(some) // 2 :])

    if not holds(plan.kept, []):
        raise InputError(
            f"{', '.join(map(str, plan.kept[:4]))} do not give the same output when they are stood in for; "
            "is the model compiled, or does its forward read what these modules keep?"
        )
    skip(plan.kept)
    for point in list(plan.kept):  # what costs nothing can as well be computed of what is kept before it
        kept = [p for p in plan.kept if p is not point]
        if point.side == "out" and not flops[point] and kept and holds(kept, plan.skipped):
            plan.kept = kept
    given = [t.clone() for p in plan.kept for t in tensors_in(values[p])]
    plan.share = 1 - watched(model, lambda: plan.replay(run, given), len).flops / max(total, 1)
    return plan


def record_twice(points: list[Point], run: Callable[[], Any], model: nn.Module) -> dict[Point, Any]:
    """The values of points, which must be the same whatever is drawn."""
    values = record(points, run)
    torch.manual_seed(1)
    again = record(points, run)
    torch.manual_seed(0)
    for point in points:
        if not _same(tensors_in(values[point]), tensors_in(again[point])):
            raise InputError(
                f"{point} comes out different each time (dropout or drop path in training mode), so it is no constant "
                "of the picture: set the base's dropout and drop path to 0, e.g. with drop_path_rate=0"
            )
    return values


def _works(model: nn.Module, cut: Cut, blind: Callable[[], Any], run: Callable[[], Any]) -> bool:
    """Whether the rest does without the picture."""
    with torch.no_grad():
        given = cut.record(run)
        truth = _outcome(model, lambda: cut.replay(run, [t.clone() for t in given]))
        return _same(_outcome(model, lambda: cut.replay(blind, given)), truth)


def _check_gradients(model: nn.Module, cut: Cut, run: Callable[[], Any]) -> None:
    """Checkpointing over a block before the cut and one behind it computes both again, without what is kept."""
    params = [p for p in _changing(model) if p.requires_grad]
    if not (params and torch.is_grad_enabled()):
        return
    given = cut.record(run)
    gradients = []
    for each in (run, lambda: cut.replay(run, given)):
        torch.manual_seed(0)
        out = sum(t.float().square().mean() for t in _outcome(model, each) if t.requires_grad)
        found = torch.autograd.grad(out, params, allow_unused=True) if isinstance(out, Tensor) else ()
        gradients.append([g for g in found if g is not None])
    if len(gradients[0]) != len(gradients[1]) or not _same(gradients[1], gradients[0]):
        raise InputError(
            "gradients are others with the frozen part kept: gradient checkpointing goes over several blocks at once; "
            "checkpoint each block for itself, or switch it off, which costs little memory behind the cut"
        )


def _outcome(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """All tensors that a forward gives, and the terms that methods add to the loss."""
    torch.manual_seed(0)
    found = tensors_in(run())
    for module in modules_of(model):
        if BANK in module._modules:
            found += [t for a in attached(module).values() if (t := a.penalty()) is not None]
    return [t for t in found if t.is_floating_point()]


def _same(some: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Equal up to what an accelerator's order of sums may change; NaN equals nothing."""
    return len(some) == len(truth) and all(map(_near, some, truth))


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    bound = 1e-4 if a.dtype in (torch.float32, torch.float64) else 2e-2
    return a.numel() == 0 or bool((a - b).abs().max() <= bound * b.abs().max())


# -- what may change -----------------------------------------------------------------------------------------------


def _changing(model: nn.Module) -> list[Tensor]:
    """Tensors of the adapters that act, and parameters of the base that are trained."""
    modules = modules_of(model)
    found = [t for port in acting(modules) for t in port.tensors()]
    found += [p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad]
    return list({id(t): t for t in found}.values())


def _constants(paths: dict[nn.Module, str], points: Collection[Point]) -> list[Tensor]:
    """Tensors of the points' modules, and those that modules around them hold themselves."""
    inside = {m for p in points if p.side == "out" for m in modules_of(p.module)}
    around = {
        m
        for m, path in paths.items()
        if any(p.path == path or not path or p.path.startswith(f"{path}.") for p in points)
    }
    held = [t for m in (*inside, *around) for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    changing = {id(t) for m in paths for t in m._parameters.values() if t is not None and t.requires_grad}
    return list({id(t): t for t in held if id(t) not in changing}.values())


@contextmanager
def _trial(model: nn.Module, device: torch.device, poison: bool = False) -> Iterator[None]:
    """A forward in here leaves no trace: not in running statistics, not in random numbers, not in what ran."""
    modules = modules_of(model)
    entries = [e for port in ports_on(modules) for e in port.entries]
    ran = [e.ran for e in entries]
    changing = _changing(model)
    buffers = [b for m in modules for b in m._buffers.values() if b is not None]
    kept = list({id(t): t for t in (*changing, *buffers)}.values())
    held = [t.data for t in kept]
    nan = {id(t) for t in changing if poison and t.is_floating_point()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        grad = torch.is_grad_enabled()
        stack.enter_context(torch.inference_mode(False))  # which switches gradients on
        stack.enter_context(torch.set_grad_enabled(grad))
        if torch.is_autocast_enabled(device.type):  # which would keep what it makes of NaN for the real forward
            dtype = torch.get_autocast_dtype(device.type)
            stack.enter_context(torch.autocast(device.type, dtype, cache_enabled=False))
        torch.manual_seed(0)
        try:
            for t in kept:
                t.data = torch.full_like(t.data, float("nan")) if id(t) in nan else t.data.clone()
            yield
        finally:
            for t, data in zip(kept, held, strict=True):
                t.data = data
            for e, was in zip(entries, ran, strict=True):
                e.ran = was
