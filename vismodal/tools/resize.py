"""Fewer ranks in an adapter's file, without its base: each update becomes its best approximation of a lower rank.

    made = resize(read_saved("dog.safetensors"), Keep(energy=0.95, ranks={"unet.mid_block.*": 16}))
    print(made.report)
    write_saved(made.saved, "small.safetensors")

`Adapter.prune` on the file: the methods stay what they are, and the scale is in no way changed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from vismodal.errors import InputError
from vismodal.pruning import Cut, Keep, Pruned, relative, shorten
from vismodal.table import Listing
from vismodal.tools.merge import Made
from vismodal.tools.saved import Saved, products


def resize(saved: Saved, keep: Keep) -> Made:
    """The same adapter with the ranks that `keep` leaves; what has no ranks (a tuned head) stays as it is.

    Raises `InputError` where nothing in the file is such a product, and where `keep` says nothing.
    """
    if keep.everything:
        raise InputError("say how many ranks to keep: rank=8, energy=0.95, error=0.1, or ranks of single sites")
    modules = products(saved)
    if not modules:
        names = ", ".join(type(m).__name__ for m in saved.methods.values())
        raise InputError(
            f"{saved.name} has {names}, whose updates are no products of two factors in the file; LoRA, PiSSA, AdaLoRA "
            "and DyLoRA can be resized, and others be merged into a LoRA (vismodal merge with --model and --rank)"
        )
    report = shorten(saved.methods, modules, keep)
    new = {f"{key}.{name}": t.detach() for key, module in modules.items() for name, t in module.state_dict().items()}
    return Made(Saved(saved.name, saved.header, {**saved.tensors, **new}), report, _notes(saved, modules))


def _notes(saved: Saved, keys: Collection[str]) -> tuple[str, ...]:
    resized = {key.partition("/")[0] for key in keys}
    kept = [f"{type(m).__name__} ({slot})" for slot, m in saved.methods.items() if slot not in resized]
    return (f"unchanged, as it has no ranks: {', '.join(kept)}",) if kept else ()


def by_place(report: Pruned) -> Listing:
    """The report with the sites of all blocks together, their numbers as stars."""
    groups: dict[str, list[Cut]] = {}
    for cut in report.cuts:
        groups.setdefault(re.sub(r"\d+", "*", cut.key.rpartition("/")[2]), []).append(cut)
    rows = [[place, str(len(cuts)), *_figures(cuts)] for place, cuts in groups.items()]
    rows.append(["all", str(len(report.cuts)), *_figures(report.cuts)])
    return Listing(["site", "sites", "ranks", "kept", "relative error"], rows)


def _figures(cuts: Sequence[Cut]) -> list[str]:
    error = relative(sum(c.lost for c in cuts), sum(c.whole for c in cuts))
    return [_span([c.before for c in cuts]), _span([c.after for c in cuts]), f"{error:.2g}"]


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers, default=0), max(numbers, default=0)
    return str(low) if low == high else f"{low} to {high}"
