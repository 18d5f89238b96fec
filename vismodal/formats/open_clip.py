"""A CLIP of open_clip as transformers' `CLIPModel`: a folder that plain `from_pretrained` reads, or both in memory.

Image features, text features and logits are the same (`clip_keys.py` says how). For texts and pictures themselves:

- Ids are equal wherever open_clip's cleaning leaves the text alone: it turns HTML entities into characters and repairs
  mojibake and typographic quotes (ftfy), which transformers' tokenizer does not. Both join spaces, lower-case, cut
  after the context, end every text with the end of text, and pad with ids that a causal tower never reads.
- Pixels are equal with `CLIPProcessor.from_pretrained(out, backend="pil")`. The default backend resizes with
  torchvision, which rounds some pixels one or two of 255 levels away. Pictures with 3, 7, 11, ... rows or columns too
  many for the crop are cut one pixel off by transformers: it rounds half of them down, torchvision to even.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from vismodal.attach import attached
from vismodal.bank import bank_of
from vismodal.errors import InputError
from vismodal.files import write_file, write_tensors
from vismodal.fingerprint import BANK
from vismodal.formats.clip_keys import HAS, Ids, model_cfg_of, square, to_transformers
from vismodal.ports import is_ported

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

    Tokenizer: TypeAlias = HFTokenizer | SimpleTokenizer | CLIPTokenizer | str | Path

BICUBIC, BILINEAR = 3, 2  # PIL's numbers, which `resample` takes


class Twin(NamedTuple):
    """The same CLIP in transformers: the model in eval mode and fp32, and the processor of its texts and pictures."""

    model: CLIPModel
    processor: CLIPProcessor


def export(model: nn.Module, tokenizer: Tokenizer, out: str | Path) -> Path:
    """Writes the folder that `CLIPModel`, `CLIPProcessor` and `CLIPTokenizer` load with plain `from_pretrained(out)`.

    Args:
        model: a `CLIP` or `CustomTextCLIP` as `open_clip.create_model` gives it; adapters on it must be merged.
        tokenizer: open_clip's tokenizer of this model, a `CLIPTokenizer`, or a folder with either.
        out: the folder to write; files of the same names in it are replaced.

    Raises `InputError` for adapters that are not merged, and for what transformers' CLIP cannot be, by its name.
    """
    tensors, config, pictures, texts = _converted(model, tokenizer)
    out = Path(out).expanduser()
    save_tokenizer(texts, out)
    write_file(
        out / "preprocessor_config.json",
        json.dumps({"image_processor_type": "CLIPImageProcessor", **pictures}, indent=2),
    )
    write_file(out / "config.json", json.dumps(config, indent=2))
    write_tensors(out / "model.safetensors", tensors, {"format": "pt"})  # last: without it the folder is not loaded
    return out


def twin(model: nn.Module, tokenizer: Tokenizer) -> Twin:
    """What `export` writes, in memory; the pictures with PIL, so that they are equal to open_clip's. Raises alike."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tensors, config, pictures, texts = _converted(model, tokenizer)
    theirs = CLIPModel(CLIPConfig(**config))
    theirs.load_state_dict(tensors)
    return Twin(theirs.eval(), CLIPProcessor(CLIPImageProcessorPil(**pictures), texts))


def _converted(
    model: nn.Module, tokenizer: Tokenizer
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], CLIPTokenizer]:
    """Tensors, config, the image processor's settings, and the tokenizer."""
    check_adapters(model)
    cfg, texts = model_cfg_of(model), _clip_tokenizer(tokenizer)
    texts.model_max_length = cfg["text_cfg"]["context_length"]
    largest = max(texts.get_vocab().values())
    ids = Ids(texts.bos_token_id, texts.eos_token_id, texts.pad_token_id, largest)
    tensors, config = to_transformers(model.state_dict(), cfg, ids)
    return tensors, config, preprocessor(preprocess_cfg_of(model)), texts


def check_adapters(model: nn.Module) -> None:
    """What is written must be what the model computes now, and what the user thinks that it computes."""
    banks = {path: m for path, m in model.named_modules() if BANK in m._modules}
    for path, module in banks.items():
        owner = f"model.{path}" if path else "model"
        for name, a in attached(module).items():
            if not (a.merged and a.enabled and a.scale and name in bank_of(module).active):
                raise InputError(
                    f"adapter {name!r} is not in the weights: write vm.attached({owner})[{name!r}].merge() to export "
                    "with it (in use and switched on), or .detach() to export without it"
                )
    if not banks and any(is_ported(m) for m in model.modules()):
        raise InputError("a larger model that this CLIP is part of is adapted; bake it in with detach(keep=True) first")


# -- pictures --------------------------------------------------------------------------------------------------------


def preprocessor(preprocess_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a `CLIPImageProcessor` that does what open_clip's evaluation transform does.

    Raises `InputError` for the resize mode "longest", which pads, and for pictures that are not square.
    """
    side = square("the picture's size", preprocess_cfg["size"])
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise InputError(f"{HAS} crops to the shortest side or squashes; this preprocess_cfg has resize_mode {mode!r}")
    both = {"height": side, "width": side}
    return {
        "do_resize": True,
        "size": {"shortest_edge": side} if mode == "shortest" else both,
        "resample": BILINEAR if preprocess_cfg.get("interpolation") == "bilinear" else BICUBIC,
        "do_center_crop": mode == "shortest",
        "crop_size": both,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg["mean"]),
        "image_std": list(preprocess_cfg["std"]),
        "do_convert_rgb": True,
    }


def preprocess_cfg_of(model: nn.Module) -> dict[str, Any]:
    visual: Any = model.visual
    if not hasattr(visual, "preprocess_cfg"):
        raise InputError(
            "this CLIP does not say how its pictures are made; build it with open_clip.create_model, or write "
            "open_clip.model.set_model_preprocess_cfg(model, {'size': ..., 'mean': ..., 'std': ...})"
        )
    return dict(visual.preprocess_cfg)


# -- texts -----------------------------------------------------------------------------------------------------------


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json` for transformers 5; `vocab.json`, `merges.txt` for other readers."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for file in sorted(Path(temporary).iterdir()):
            write_file(folder / file.name, file.read_bytes())
    write_file(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_file(folder / "merges.txt", "\n".join(lines) + "\n")


def _clip_tokenizer(tokenizer: Tokenizer) -> CLIPTokenizer:
    """A `CLIPTokenizer` that gives the same ids, and that may be changed."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
    from transformers import CLIPTokenizer

    given = _read_tokenizer(Path(tokenizer).expanduser()) if isinstance(tokenizer, str | Path) else tokenizer
    if getattr(given, "clean_fn", None) is get_clean_fn("canonicalize"):
        raise InputError(f"{HAS} keeps punctuation; this tokenizer was made with clean='canonicalize', which drops it")
    for setting in ("reduction_fn", "tokenizer_mode", "strip_sep_token"):
        if getattr(given, setting, None):
            raise InputError(f"{HAS} has no tokenizer with {setting}, which this one has ({getattr(given, setting)!r})")
    if isinstance(given, SimpleTokenizer):
        return _from_simple(given)
    theirs = given.tokenizer if isinstance(given, HFTokenizer) else given
    if not isinstance(theirs, CLIPTokenizer):
        raise InputError(f"{HAS} has a CLIPTokenizer; this model's is a {type(theirs).__name__}")
    return copy.deepcopy(theirs)


def _read_tokenizer(folder: Path) -> Any:
    from open_clip import get_tokenizer
    from transformers import CLIPTokenizer

    if (folder / "open_clip_config.json").is_file():
        return get_tokenizer(f"local-dir:{folder}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"no tokenizer in {folder}; write a folder with a tokenizer.json or an open_clip_config.json")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _from_simple(simple: SimpleTokenizer) -> CLIPTokenizer:
    """open_clip's own byte pairs, which are OpenAI's, with the names that transformers has for the special ones."""
    from transformers import CLIPTokenizer

    names = {simple.sot_token_id: "<|startoftext|>", simple.eot_token_id: "<|endoftext|>"}
    more = [simple.decoder[i] for i in simple.all_special_ids if i not in names]
    if more:
        raise InputError(f"{HAS} has a start and an end of text; this tokenizer has {', '.join(more)} too")
    vocabulary = {names.get(i, entry): i for entry, i in simple.encoder.items()}
    return CLIPTokenizer(vocab=vocabulary, merges=list(simple.bpe_ranks))
