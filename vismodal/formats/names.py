"""Names of modules: `mid_block.resnets.0` and kohya's `mid_block_resnets_0`, diffusers' and the original's.

kohya's names have underscores where a module's path has dots. They are taken apart again by the attributes that Stable
Diffusion's UNets, the transformers of SD3 and Flux and CLIP's text encoders have. For SDXL kohya's scripts hold the
UNet in its original form, whose blocks are counted through: with n residual blocks a level, `down_blocks.i.resnets.j`
is `input_blocks.{(n + 1) i + j + 1}.0`.
"""

from __future__ import annotations

import re

from vismodal.errors import InputError

_UNET = """
    down_blocks mid_block up_blocks resnets attentions downsamplers upsamplers transformer_blocks attn1 attn2 to_q to_k
    to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut conv_norm_out time_emb_proj
    time_embedding add_embedding linear_1 linear_2 norm norm1 norm2 norm3
"""
_TRANSFORMER = """
    single_transformer_blocks attn add_q_proj add_k_proj add_v_proj to_add_out ff_context norm1_context proj_mlp linear
    norm_q norm_k norm_added_q norm_added_k norm_out pos_embed x_embedder context_embedder time_text_embed
    timestep_embedder text_embedder guidance_embedder
"""
_ORIGINAL = """
    input_blocks middle_block output_blocks in_layers emb_layers out_layers skip_connection time_embed label_emb op out
"""
_TEXT = """
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2 layer_norm1 layer_norm2
    final_layer_norm text_projection embeddings token_embedding position_embedding
"""
_WORDS = sorted(f"{_UNET} {_TRANSFORMER} {_ORIGINAL} {_TEXT}".split(), key=len, reverse=True)
_PART = re.compile(rf"({'|'.join(_WORDS)}|\d+)(?:_|$)")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LEVELS = 8  # more than any UNet has


def flat(path: str) -> str:
    """`a.0.b` as `a_0_b`."""
    return path.replace(".", "_")


def dotted(name: str) -> str:
    """The path that `flat` made into this name. Raises `InputError` where a part of it is no module known here."""
    parts, at = [], 0
    while at < len(name):
        found = _PART.match(name, at)
        if found is None:
            raise InputError(f"no module of Stable Diffusion's UNet or of CLIP's text encoder is named {name[at:]!r}")
        parts.append(found[1])
        at = found.end()
    return ".".join(parts)


def is_original(path: str) -> bool:
    """Whether a module's path is one of the original UNet."""
    return path.partition(".")[0] in ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")


def to_original(path: str, n: int) -> str:
    """A UNet's path in diffusers as that in the original; n is the number of residual blocks a level, 2 in SDXL."""
    return _translate(path, _places(n))


def from_original(path: str, n: int) -> str:
    """The inverse of `to_original`. Raises `InputError` for a path that no UNet of that n has."""
    return _translate(path, {theirs: ours for ours, theirs in _places(n).items()})


def _translate(path: str, places: dict[str, str]) -> str:
    parts = path.split(".")
    for end in range(len(parts), 0, -1):  # the longest beginning that is named
        head, rest = ".".join(parts[:end]), ".".join(parts[end:])
        if head in places:
            return f"{places[head]}.{rest}".removesuffix(".")
    raise InputError(f"Stable Diffusion XL's UNet has no module {path}")


def _places(n: int) -> dict[str, str]:
    """Beginnings of paths in diffusers, by those of the original: of blocks, and of the modules in residual blocks."""
    blocks = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    places = {**_TOP, "mid_block.attentions.0": "middle_block.1"}
    for i in range(_LEVELS):
        first = (n + 1) * i
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{first + n + 1}.0.op"
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{first + n}.2.conv"
        for j in range(n + 1):
            if j < n:  # the way down has a residual block less
                blocks[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{first + j + 1}.0"
                places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{first + j + 1}.1"
            blocks[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{first + j}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{first + j}.1"
    return places | {f"{b}.{r}": f"{o}.{q}" for b, o in blocks.items() for r, q in _RESNET.items()}


# -- kinds -----------------------------------------------------------------------------------------------------------


def kind_of(module: str) -> str:
    """The kind of a module's site, by its path, as `vm.sites` of the model has it; "other" where it has none."""
    parts = module.split(".")
    unet, last = "attentions" in parts, parts[-1]
    cross = "x" if unet and "attn2" in parts else ""
    if parts[-2:] == ["to_out", "0"] or last == "out_proj":
        return f"{cross}attn.out"
    if last in ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj"):
        return f"{cross}attn.{last.removeprefix('to_')[0]}"
    if last in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
        return f"attn.add.{'out' if last == 'to_add_out' else last[4]}"
    if module.endswith("net.0.proj") and not unet:  # a transformer's has no gate
        return "mlp.up"
    return next((kind for kind, ends in _KINDS.items() if module.endswith(ends)), "other")


_KINDS = {
    "mlp.in": ("ff.net.0.proj",),
    "mlp.down": ("ff.net.2", "ff_context.net.2", "mlp.fc2"),
    "mlp.up": ("mlp.fc1", "proj_mlp"),
    "proj.in": ("proj_in",),
    "proj.out": ("proj_out",),
    "conv": ("conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"),
    "embed.text": ("context_embedder", "text_embedder.linear_1", "text_embedder.linear_2"),
    "time": ("time_emb_proj", "linear_1", "linear_2", ".linear"),
    "embed": ("x_embedder", "pos_embed.proj"),
    "norm": ("norm", "norm1", "norm2", "norm3", "norm_out", "layer_norm1", "layer_norm2", "final_layer_norm"),
    "projection": ("text_projection",),
}
