"""Pairs as contrastive training reads them: the parts of a data set, and the loss of a batch of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vismodal.clip import Images, encode_texts
from vismodal.contrastive.loss import Loss, Temperature, encoded, gathered, loss_named, row_at
from vismodal.data.pairs import Long, Pairs, fitting, has_table, held_out, read_pairs
from vismodal.data.pictures import Pictures
from vismodal.pretrained import Pretrained
from vismodal.train import Micro


def read_parts(
    place: Path, val: Path | None, share: float, seed: int, long: Long, model: Pretrained
) -> tuple[Pairs, Pairs]:
    """Pairs to train on, and others for retrieval; what is left out, cut or doubtful is told on stderr.

    Args:
        place: a table of captions, its folder, or a folder with the folders train and val (or test).
        val: pairs for retrieval that lie elsewhere; without them and without a folder of theirs a `share` is held out.
        share: of the pictures.
        seed: of that drawing.
        long: what becomes of captions that are longer than the model's context.
        model: whose context that is.
    """
    place = place.expanduser()
    inner = (place / "train").is_dir() and not has_table(place)
    pairs = read_pairs(place / "train" if inner else place)
    if val is None and inner:
        val = next((place / n for n in ("val", "test") if (place / n).is_dir()), None)
    both = (pairs, read_pairs(val)) if val else held_out(pairs, share, seed)
    kept = []
    for name, each in zip(("train", "val"), both, strict=True):
        for line in (*(f"skipped {rejected}" for rejected in each.rejected), *(f"note: {n}" for n in each.notes)):
            print(line, file=sys.stderr)
        each, cut = fitting(each, model.too_long, long)
        if cut:
            done = "cut: their end is not seen" if long == "truncate" else "left out"
            more = f"{len(cut)} captions have more than {model.context} tokens"
            print(f"{name}: {more} and are {done}; the first: {cut[0]!r}", file=sys.stderr)
        kept.append(each)
    for line in doubts(*kept):
        print(f"note: {line}", file=sys.stderr)
    return kept[0], kept[1]


def doubts(train: Pairs, val: Pairs) -> list[str]:
    """What makes figures or the loss other than one thinks: captions of several pictures, pictures of both parts."""
    found = []
    for name, each, effect in (
        ("train", train, "in one batch the pictures are wrong answers to each other"),
        ("val", val, "retrieval takes one of the pictures for the right one"),
    ):
        if shared := each.shared:
            text, count = max(shared.items(), key=lambda item: item[1])
            found.append(f"{name}: {len(shared)} captions are at several pictures, {text!r} at {count}; {effect}")
    if both := train.contents & val.contents:
        found.append(f"{len(both)} pictures of val are in train too, byte for byte: retrieval looks better than it is")
    return found


def loss_of(
    model: Pretrained,
    train: Pairs,
    temperature: Temperature,
    name: Loss,
    *,
    batch: int,
    part: int = 0,
    augment: bool = False,
) -> Callable[[Micro], Mapping[str, Tensor]]:
    """The loss of a batch: each picture once, with one of its captions, among those of all processes.

    Args:
        model: its towers, in train mode.
        train: the pairs.
        temperature: of the loss.
        name: of the loss.
        batch: pairs of all processes together.
        part: pairs that go through the towers at a time; 0 is all at once.
        augment: a random part of each picture, mirrored or not.
    """
    pictures = Pictures([pair.path for pair in train.pairs], model.preprocess)
    ids = model.tokenize(train.texts)
    first = torch.tensor([0, *(len(pair.texts) for pair in train.pairs)]).cumsum(0).tolist()  # of each one's captions
    contrast, images = loss_named(name, temperature), Images(model.model)
    device = temperature.scale.device

    texts = partial(encode_texts, model.model)

    def loss(micro: Micro) -> Mapping[str, Tensor]:
        places = micro.positions(batch // micro.world)
        items = [row_at(micro.seed, len(pictures), batch, p) for p in places]
        said = [_caption(first[i], first[i + 1], micro, p) for i, p in zip(items, places, strict=True)]
        if augment:
            x = pictures.augmented(items, [(micro.seed, "augment", p) for p in places], model.size)
        else:
            x = pictures.batch(items)
        f = F.normalize(encoded(images, x.to(device), part), dim=-1)
        t = F.normalize(encoded(texts, ids[said].to(device), part), dim=-1)
        return {"loss": contrast(gathered(f), gathered(t)), "scale": temperature.scale.exp()}

    return loss


def _caption(first: int, end: int, micro: Micro, position: int) -> int:
    """One of the captions from `first` on, drawn by its place in the endless reading."""
    return first + int(torch.randint(end - first, (), generator=micro.generator("caption", position)))
