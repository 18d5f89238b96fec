"""A classifier made of a CLIP or SigLIP model and the names of its classes, and the places in it where methods attach.

    f = image(x)               b D, as the model gives it                        site image.features
    t = text(ids)              C D, per class: normalise, mean over its prompts  site text.features
    logits(f/|f|, t/|t|)       b C, s f tᵀ (+ b in SigLIP), s = exp(logit_scale)  site logits

    clf = vm.CLIPClassifier(model, tokenizer, ["cat", "dog"], "a photo of a {}.")
    adapter = vm.adapt(clf, vm.CoOp())

The sites of the model within are there as well: CLIP-LoRA (Zanella and Ben Ayed 2024, arXiv 2405.18541) is

    vm.adapt(clf, vm.LoRA(sites=("attn.q", "attn.k", "attn.v"), rank=2, alpha=1, rank_stabilised=True, dropout=0.25))

with one prompt, "a photo of a {}."; and WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903), (1 - a) W + a W', is
`adapter.scale = a`, of methods on weights live and merged.

The features of the classes are computed once and kept as long as nothing on the text side wants gradients or changes:
neither the frozen base, nor what is attached there. A compiled forward computes them every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.fingerprint import BANK
from vismodal.ports import acting

Template = str | Callable[[str], str]
Templates = Template | Sequence[Template] | Mapping[str, Sequence[Template]]
IMAGE_SIDE = ("visual", "vision_model", "visual_projection")  # children of open_clip's models and of transformers'
AT_ONCE = 1024  # prompts that go through the text tower together


class Step(nn.Module):
    """A step of the classifier. It runs a part of the model, which is not its child: the classifier holds that once."""

    model: nn.Module
    width: int = 0  # D

    def __init__(self, model: nn.Module):
        super().__init__()
        self.__dict__["model"] = model


class Images(Step):
    """Pictures b 3 h w -> features b D, not normalised. Features that were computed before, b D, stay what they are,
    but for what is attached to this step; they are the same only while nothing acts within the image tower."""

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        if images.dim() == 2:
            return images
        if hasattr(model, "encode_image"):
            return cast(Tensor, model.encode_image(images))
        return _pooled(model.get_image_features(pixel_values=images))


class Texts(Step):
    """Token ids -> features of the classes: per prompt normalised, then their mean.

    Its own `ids` are all prompts of all classes, N L, and give C D. Others hold one prompt for each class, C L, or for
    each picture and class, b C L, and give C D or b C D.
    """

    ids: Tensor
    where: Tensor
    counts: Tensor

    def __init__(self, model: nn.Module, tokenizer: Any, classes: Sequence[str], templates: Templates):
        super().__init__(model)
        # a processor of transformers holds the tokenizer beside that of pictures
        self.tokenizer = tokenizer.tokenizer if hasattr(tokenizer, "image_processor") else tokenizer
        self.classes = tuple(classes)
        if not self.classes:
            raise InputError("CLIPClassifier needs the names of its classes")
        self.prompts = prompts = [list(_prompts(name, templates)) for name in self.classes]
        where = torch.tensor([i for i, each in enumerate(prompts) for _ in each])  # the class of each prompt
        device = next(model.parameters()).device
        ids = self.tokenize([p for each in prompts for p in each])
        counts = torch.bincount(where, minlength=len(self.classes))[:, None]
        for name, tensor in (("ids", ids), ("where", where), ("counts", counts)):
            self.register_buffer(name, tensor.to(device), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if ids is not self.ids:
            return F.normalize(self.encode(ids.flatten(0, -2)), dim=-1).unflatten(0, ids.shape[:-1])
        y = torch.cat([F.normalize(self.encode(part), dim=-1) for part in ids.split(AT_ONCE)])
        where, counts = self.where.to(y.device), self.counts.to(y.device)  # the model may have been moved alone
        return y.new_zeros(len(self.classes), y.shape[1]).index_add(0, where, y) / counts

    def encode(self, ids: Tensor) -> Tensor:
        """n L -> n D, not normalised."""
        return encode_texts(self.model, ids)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """n L. Raises `InputError` for a text that the model would not see in full, where the tokenizer tells."""
        theirs = hasattr(self.tokenizer, "model_max_length")
        if theirs:
            longest = cast(Any, self.model).config.text_config.max_position_embeddings
        else:
            ids = cast(Tensor, self.tokenizer(list(texts)))
            longest = ids.shape[1]
        if long := too_long(self.tokenizer, texts, longest):
            raise InputError(
                f"{texts[long[0]]!r} has more than the {longest} tokens that the model reads; shorten the names of the "
                "classes or the templates"
            )
        if not theirs:
            return ids
        return torch.tensor(self.tokenizer(list(texts), padding="max_length", max_length=longest)["input_ids"])


def too_long(tokenizer: Any, texts: Sequence[str], longest: int) -> list[int]:
    """The places of the texts that have more tokens than `longest`; none where the tokenizer is a plain function."""
    if hasattr(tokenizer, "model_max_length"):  # of transformers, which would warn of an error to come
        rows = tokenizer(list(texts), verbose=False)["input_ids"]
        return [i for i, row in enumerate(rows) if len(row) > longest]
    if not hasattr(tokenizer, "context_length"):
        return []
    roomy, cut = (tokenizer(list(texts), context_length=length)[:, :longest] for length in (2 * longest, longest))
    return cast("list[int]", (roomy != cut).any(1).nonzero().flatten().tolist())


def encode_texts(model: Any, ids: Tensor) -> Tensor:
    """Token ids n L -> features n D of a CLIP or SigLIP of either library, not normalised."""
    ids = ids.to(next(model.parameters()).device)
    if hasattr(model, "encode_text"):
        return cast(Tensor, model.encode_text(ids))
    return _pooled(model.get_text_features(input_ids=ids))


class Similarity(Step):
    """Normalised features f, b D, and t, C D or b C D -> logits b C."""

    def __init__(self, model: nn.Module, classes: int):
        super().__init__(model)
        self.classes = classes

    def forward(self, f: Tensor, t: Tensor) -> Tensor:
        return similarity(self.model, f, t)


def similarity(model: nn.Module, f: Tensor, t: Tensor) -> Tensor:
    """Logits b C of normalised features, at the scale that the model has learnt."""
    scale, bias = cast(Tensor, model.logit_scale), cast("Tensor | None", getattr(model, "logit_bias", None))
    cosine = f @ t.T if t.dim() == 2 else torch.einsum("bd,bcd->bc", f, t)
    logits = scale.exp() * cosine
    return logits if bias is None else logits + bias


class CLIPClassifier(nn.Module):
    """Pictures b 3 h w -> logits b C, zero-shot until something is attached.

    Args:
        model: CLIP or CustomTextCLIP of open_clip, CLIPModel or SiglipModel of transformers; plain, or adapted.
        tokenizer: the model's own, or any function of a list of n texts that gives their ids, n L.
        classes: names of the C classes.
        templates: what the names are put into: "a photo of a {}.", a function of the name, or several of them, whose
            features are averaged; a mapping has prompts of their own for every class, with or without {}.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        classes: Sequence[str],
        templates: Templates = "a photo of a {}.",
    ):
        super().__init__()
        if not (hasattr(model, "encode_text") or hasattr(model, "get_text_features")):
            raise InputError(
                f"a {type(model).__name__} encodes no texts; give a CLIP of open_clip, or a CLIPModel or SiglipModel"
            )
        self.model = model
        self.image = Images(model)
        self.text = Texts(model, tokenizer, classes, templates)
        self.logits = Similarity(model, len(classes))
        with torch.no_grad():
            width = self.text.encode(self.text.ids[:1]).shape[-1]
        self.image.width = self.logits.width = width
        self._kept: tuple[object, Tensor] | None = None
        self.train(model.training)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.text.classes

    def forward(self, images: Tensor) -> Tensor:
        f = F.normalize(self.image(images), dim=-1)
        return cast(Tensor, self.logits(f, self.text_features()))

    def text_features(self) -> Tensor:
        """Normalised features of the classes, C D."""
        state = self._text_state()
        if state is None:
            self._kept = None
            return self._encode_classes()
        if self._kept is None or self._kept[0] != state:
            # no inference tensor, which a later training could not use
            with torch.inference_mode(False), torch.no_grad():
                self._kept = state, self._encode_classes()
        return self._kept[1]

    @property
    def keeps_text(self) -> bool:
        """Whether, as things stand, the features of the classes are computed once and kept."""
        return self._text_state() is not None

    @property
    def keeps_images(self) -> bool:
        """Whether nothing acts within the image tower: the features of a picture are then the base's, and may be given
        in its place."""
        sides = (self.model._modules[name] for name in IMAGE_SIDE if name in self.model._modules)
        within = [m for side in sides if side is not None for m in side.modules()]
        return not acting([self.model, *within]) and not any(p.requires_grad for m in within for p in m.parameters())

    def _encode_classes(self) -> Tensor:
        return F.normalize(self.text(self.text.ids), dim=-1)

    def encode(self, batches: Iterable[tuple[Tensor, Tensor]], normalise: bool = True) -> tuple[Tensor, Tensor]:
        """Features n D and labels n of batches of pictures and labels, as the model stands, in fp32."""
        features, labels = [], []
        with torch.no_grad():
            for images, given in batches:
                f = self.image(images)
                features.append((F.normalize(f, dim=-1) if normalise else f).float())
                labels.append(given.to(f.device))
        if not features:
            raise InputError("no pictures were given")
        return torch.cat(features), torch.cat(labels)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    # -- whether the features of the classes may be kept --

    def _text_state(self) -> object | None:
        """What the features of the classes follow from, to be compared; None where they are to be computed anew."""
        if torch.compiler.is_compiling():
            return None
        modules = list(self._text_side())
        ports = acting([self.text, *modules])
        if acting([self]) or (ports and self.training):
            return None  # what is attached to the whole may depend on the pictures; dropout
        tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        tensors += [t for port in ports for t in port.tensors()]
        free = [t for t in tensors if t.requires_grad]
        if free and torch.is_grad_enabled():
            return None
        device = next(self.model.parameters()).device.type
        # fused optimisers leave no trace in a tensor's version
        norms = torch.stack(torch._foreach_norm(free, dtype=torch.float64)).tolist() if free else []
        return (
            [(t.data_ptr(), t.dtype, object() if t.is_inference() else t._version) for t in tensors],
            [port.state for port in ports],
            norms,
            self.training,
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )

    def _text_side(self) -> Iterator[nn.Module]:
        """The model's modules, but for those that only pictures go through and for adapters."""
        stack = [self.model]
        while stack:
            module = stack.pop()
            yield module
            away = (*IMAGE_SIDE, BANK) if module is self.model else (BANK,)
            stack += [m for name, m in module._modules.items() if m is not None and name not in away]


def _pooled(out: Any) -> Tensor:
    """Features of transformers, which since version 5 come in an output object."""
    return cast(Tensor, out if isinstance(out, Tensor) else out.pooler_output)


def _prompts(name: str, templates: Templates) -> Iterator[str]:
    """The prompts of one class."""
    own = isinstance(templates, Mapping)
    if isinstance(templates, Mapping):
        if name not in templates:
            raise InputError(f"templates has no prompts for the class {name!r}; it has {', '.join(templates)}")
        templates = templates[name]
    each = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    if not each:
        raise InputError(f"no prompts for the class {name!r}; write templates=('a photo of a {{}}.',)")
    for template in each:
        if isinstance(template, str) and "{}" not in template and not own:
            raise InputError(f"the template {template!r} has no {{}} for the name of the class")
        yield template.replace("{}", name) if isinstance(template, str) else template(name)
