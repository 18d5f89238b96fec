"""Adapters in the weights of their models, for programs that know nothing of adapters.

    bake({"": model}, [read_saved("pets.safetensors")])              in place: a plain model afterwards

Each W becomes W' = W + strength (W' - W), in the order given, as `adapter.merge()` makes it; `detach(keep=True)` leaves
the model's own classes and names. What acts in the forward pass and not in the weights cannot be baked.
"""

from __future__ import annotations

from collections.abc import Sequence

from vismodal.adapter import Adapter
from vismodal.checkpoint import restore
from vismodal.errors import InputError
from vismodal.site import Table
from vismodal.tools.live import Models
from vismodal.tools.saved import Saved


def bake(
    models: Models, adapters: Sequence[Saved], strengths: Sequence[float] | None = None, sites: Table | None = None
) -> None:
    """Writes adapters into models, which are as they were where it raises.

    Args:
        models: the base by prefix; parts that no adapter names stay as they are.
        adapters: of that base.
        strengths: of each adapter, 1 unless given; 0 is the base.
        sites: as for `vm.adapt`.

    Raises `InputError` where an adapter does not fit, or has a method that cannot merge.
    """
    strengths = [1.0] * len(adapters) if strengths is None else strengths
    if len(strengths) != len(adapters):
        raise InputError(f"{len(adapters)} adapters and {len(strengths)} strengths; give one for each of them")
    for saved in adapters:
        check_merges(saved)
    attached: list[Adapter] = []
    try:
        for i, saved in enumerate(adapters):
            parts = {prefix: models[prefix] for prefix in saved.bases if prefix in models}
            adapter = restore(parts, saved.header, saved.tensors, saved.name, f"baked-{i}", sites=sites)
            attached.append(adapter)
        for adapter, strength in zip(attached, strengths, strict=True):
            adapter.scale = strength
            adapter.merge()
    except BaseException:
        for adapter in reversed(attached):
            adapter.detach()
        raise
    for adapter, strength in zip(attached, strengths, strict=True):
        adapter.detach(keep=bool(strength))


def check_merges(saved: Saved) -> None:
    """Raises `InputError` for a method that is not in the weights."""
    fixed = [type(m).__name__ for m in saved.methods.values() if not m.mergeable]
    if fixed:
        raise InputError(
            f"{saved.name} has {', '.join(fixed)}, which acts in the forward pass: no weights can stand for it. Load "
            "it on its base instead (vm.load, vismodal predict), or train a method that merges, such as LoRA"
        )
