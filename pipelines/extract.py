"""Take a LoRA out of a model that was tuned in full.

    vismodal extract --base OWNER/STABLE-DIFFUSION --tuned my_finetune --parts unet --rank 32 --out tuned.safetensors
    vismodal extract --base vit_base_patch16_224 --tuned tuned.safetensors --energy 0.9 --out tuned_lora.safetensors

From Python: `vismodal.tools.extract.extract`.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vismodal.errors import InputError
from vismodal.pruning import Keep
from vismodal.tools.extract import extract
from vismodal.tools.files import deliver
from vismodal.tools.merge import Made
from vismodal.tools.sources import load_weights, open_model


@dataclass(frozen=True)
class Config:
    """Take what a full fine-tuning changed as an adapter on its base: low-rank matrices, and exact norms and biases.

    Args:
        base: model before: a folder of diffusers, transformers, timm or open_clip, or a name.
        tuned: model afterwards, likewise; or a .safetensors checkpoint of the same architecture as the base.
        out: file to write.
        parts: of a diffusers pipeline: unet, text_encoder, text_encoder_2; unet unless given.
        rank: ranks to keep at each site.
        energy: instead, as many as hold this share of the squared singular values of a site.
        error: instead, as many as leave this relative error of a site at most.
        sites: kinds of matrices to take, by glob: "attn.*" "mlp.*". What else changed is left out, and named.
        copies: take norms, biases and heads along as exact copies.
    """

    base: str | None = None
    tuned: str | None = None
    out: Path | None = None
    parts: tuple[str, ...] = ()
    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    sites: tuple[str, ...] = ("*",)
    copies: bool = True


def main(config: Config) -> Made:
    """Writes the adapter, and prints its ranks, its errors and what is left out."""
    if config.base is None or config.tuned is None:
        raise InputError("two models are needed; write --base MODEL --tuned MODEL")
    keep = Keep(config.rank, config.energy, config.error)
    base, tuned = _models(config.base, config.parts), _tuned(config)
    if base.keys() != tuned.keys():
        raise InputError(f"{config.base} has {', '.join(base) or 'one model'}, {config.tuned} {', '.join(tuned)}")
    return deliver(extract(base, tuned, keep, config.sites, config.copies), config.out)


def _models(source: str, parts: tuple[str, ...]) -> dict[str, nn.Module]:
    models = open_model(source, parts).models
    wanted = parts or (("",) if "" in models else tuple({"unet", "transformer"} & models.keys()))
    return {part: models[part] for part in wanted}


def _tuned(config: Config) -> dict[str, nn.Module]:
    assert config.base is not None
    assert config.tuned is not None
    file = Path(config.tuned).expanduser()
    if not file.is_file():
        return _models(config.tuned, config.parts)
    models = copy.deepcopy(_models(config.base, config.parts))
    if len(models) > 1:
        raise InputError(f"{file} is one checkpoint for {', '.join(models)}; write --parts with one of them")
    load_weights(next(iter(models.values())), file)
    return models


if __name__ == "__main__":
    from vismodal.cli import main as command

    sys.exit(command(["extract", *sys.argv[1:]]))
