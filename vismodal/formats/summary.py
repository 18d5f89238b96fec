"""What is in an adapter's file, for people: method, ranks and alphas, sites by kind, base, tokens, training, doubts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vismodal.errors import InputError, one_line
from vismodal.formats.bases import NAMES, detect
from vismodal.formats.files import PICKLES, Contents, read_file, read_tensors
from vismodal.formats.layers import Layer, alpha, method_of, rank, some
from vismodal.formats.names import kind_of
from vismodal.table import table

LONGEST = 120  # characters of a header's entry that are shown

# tensors of which one that is all zero makes the whole change nothing
_FACTORS: tuple[str, ...] = ("lora_up.weight", "lora_down.weight", "lora_mid.weight", "oft_blocks", "diff", "w_norm")
_FACTORS += ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_FACTORS += ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_BESIDE = ("dora_scale", "rescale", "diff_b", "b_norm")  # which act without them


@dataclass(frozen=True)
class Summary:
    """Facts as pairs of a name and a text, which print as a table, and what is doubtful."""

    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = table(["", ""], [[name, one_line(text)] for name, text in self.facts])
        rows = [line for line in shown.splitlines() if set(line) != {"─"}]  # the heading is empty
        return "\n".join([*rows, *(f"warning: {one_line(w)}" for w in self.warnings)])

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {**dict(self.facts), "warnings": list(self.warnings)}


def inspect(path: str | Path) -> Summary:
    """What is in a file of an adapter or of tokens; nothing but the file is read. Raises `InputError` for another."""
    path = Path(path)
    size = f"{path.stat().st_size:,} bytes" if path.is_file() else ""
    if path.suffix not in PICKLES:
        tensors, header = read_tensors(path)
        if "vismodal" in header:
            return _own(tensors, header, size)
    contents = read_file(path)
    return Summary((*_facts(contents), ("size", size), *_notable(contents.header)), _warnings(contents))


def _facts(contents: Contents) -> Iterable[tuple[str, str]]:
    layers = contents.layers
    yield "format", contents.format
    if layers:
        yield "method", counted(method_of(m, layer) for m, layer in layers.items())
        ranked = [layer for layer in layers.values() if rank(layer)]
        if ranked:
            yield "rank", counted(map(rank, ranked))
            yield "alpha", counted(f"{alpha(layer):g}" for layer in ranked)
        for component in dict.fromkeys(m.partition(".")[0] for m in layers):
            yield component, counted(kind_of(m) for m in layers if m.startswith(f"{component}."))
        kind = detect(layers, contents.header, contents.kind)
        yield "base", NAMES[kind] if kind else "the file does not tell"
        held = [t for layer in layers.values() for name, t in layer.items() if name != "alpha"]
        yield "parameters", f"{sum(t.numel() for t in held):,}"
        yield "stored as", counted(str(t.dtype).removeprefix("torch.") for t in held)
    for token, rows in contents.tokens.items():
        sizes = ", ".join(f"{encoder} {len(t)} x {t.shape[1]}" for encoder, t in rows.items())
        yield f"token {token}", sizes


def counted(values: Iterable[object]) -> str:
    """ "attn.q 16, attn.k 16": each value with how often it occurs, the most frequent first."""
    return ", ".join(f"{value} ({n})" for value, n in Counter(values).most_common())


def _notable(header: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Trigger words, and the header's other short entries."""
    words = [
        header[key] for key in ("modelspec.trigger_phrase", "trigger_words", "prompt", "subject") if header.get(key)
    ]
    if words:
        yield "trigger words", ", ".join(words)
    if tags := _tags(header.get("ss_tag_frequency", "")):
        yield "most frequent tags", tags
    for key, value in sorted(header.items()):
        if len(value) <= LONGEST and key not in ("format", "vismodal", "methods", "base"):
            yield key, value


def _tags(text: str, most: int = 8) -> str:
    """Of kohya's `ss_tag_frequency`: {folder: {tag: count}}."""
    try:
        folders = json.loads(text) if text else {}
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag.strip(): int(n) for tag, n in tags.items()})
    except (ValueError, AttributeError, TypeError):
        return ""
    return ", ".join(f"{tag} ({n})" for tag, n in counts.most_common(most))


def _warnings(contents: Contents) -> tuple[str, ...]:
    found = list(contents.notes)
    zero = [m for m, layer in contents.layers.items() if _changes_nothing(layer)]
    if zero:
        found.append(f"{len(zero)} of {len(contents.layers)} layers change nothing, being all zero: {some(zero)}")
    named = {f"{m}.{n}": t for m, layer in contents.layers.items() for n, t in layer.items()}
    named |= {f"{token}.{e}": t for token, rows in contents.tokens.items() for e, t in rows.items()}
    return (*found, *_broken(named))


def _broken(named: Mapping[str, Tensor]) -> Iterable[str]:
    broken = [name for name, t in named.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        yield f"{len(broken)} tensors hold NaN or infinity: {some(broken)}"


def _changes_nothing(layer: Layer) -> bool:
    return not any(name in layer for name in _BESIDE) and any(
        not layer[name].any() for name in _FACTORS if name in layer
    )


# -- files of our own ------------------------------------------------------------------------------------------------


def _own(tensors: Mapping[str, Tensor], header: Mapping[str, str], size: str) -> Summary:
    """By the header alone, without the base model."""
    try:
        methods = [_call(config) for config in json.loads(header["methods"]).values()]
        bases = [(prefix, str(base["name"])) for prefix, base in json.loads(header["base"]).items()]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the header of a file of vismodal is broken: {error!r}") from None
    sites = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    of = [site.partition("/")[2].partition(":") for site in sites]
    facts = [
        ("format", "vismodal"),
        *(("method", call) for call in methods),
        ("sites", counted(_kind(path, part) for path, _, part in of)),
        *((f"base {prefix}".strip(), name) for prefix, name in bases),
        ("parameters", f"{sum(t.numel() for t in tensors.values()):,}"),
        ("size", size),
        *_notable(header),
    ]
    return Summary(tuple(facts), tuple(_broken(tensors)))


def _call(config: Mapping[str, object]) -> str:
    options = ", ".join(f"{k}={v!r}" for k, v in config.items() if k != "method")
    return f"{config['method']}({options})"


def _kind(path: str, part: str) -> str:
    kind: Callable[[str], str] = kind_of
    if path.endswith(".bias"):
        return "bias"
    return {"up": "mlp.up", "gate": "mlp.gate"}.get(part, kind(path))
