"""open_clip: CLIP and CustomTextCLIP with their own towers; timm towers are found through the timm table.

Version 3.3 builds blocks on `nn.MultiheadAttention` (see `site.COMMON`), CustomTransformer on its own `Attention`.
`text_projection` of the flat `CLIP` class is read by `encode_text`, a method that no hook sees, so it is no site there.
"""

from typing import Any

from open_clip import model, transformer
from torch import nn

from vismodal.families.timm import TABLE as TIMM
from vismodal.site import Layout, Span, Table, Tokens, Tower, Weight

NAME = "open_clip"
MODELS = "CLIP, CustomTextCLIP, timm towers; nn.MultiheadAttention and the library's own Attention"


def _image(tower: Any) -> Layout:
    return Layout(1, tuple(tower.grid_size))


def _text(model: Any) -> Layout:
    return Layout(1, causal=model.attn_mask is not None)


POOLED = "its mask and the place of the token that it is pooled at are made for a fixed number of tokens"
BLOCK = (
    Span("block", width="ln_1"),
    Span("attn", "ln_1", "ls_1", {"normed": "ln_1"}, "ln_1"),
    Span("mlp", "ln_2", "ls_2", {"normed": "ln_2"}, "ln_2"),
    Weight("mlp.up", "mlp.c_fc.weight"),
    Weight("mlp.down", "mlp.c_proj.weight"),
)

BLOCKS = {"block": "transformer.resblocks.*"}
TEXT = (
    Span("text.tokens", "token_embedding", "token_embedding", width="token_embedding", tower="text"),
    Span("features", "transformer.resblocks.0", "transformer.resblocks.-1", BLOCKS, "ln_final", tower="text"),
    Weight("embed.tokens", "token_embedding.weight"),
)

TABLE: Table = {
    **TIMM,
    model.CLIP: (
        Tower("image", "visual"),
        Tower("text", "transformer"),
        Tokens(_text, POOLED),
        *TEXT,
    ),
    model.CustomTextCLIP: (Tower("image", "visual"), Tower("text", "text")),
    transformer.VisionTransformer: (
        Tokens(_image),
        # before the norm that comes first, as the official prompt learners do
        Span("tokens", "ln_pre", "transformer.resblocks.-1", BLOCKS, "ln_post"),
        Span("features", "transformer.resblocks.0", "transformer.resblocks.-1", BLOCKS, "ln_post"),
        Span("model", "conv1", "ln_post", width="ln_post"),
        Weight("embed", "conv1.weight"),
        Weight("projection", "proj"),
    ),
    transformer.TextTransformer: (
        Tokens(_text, POOLED),
        *TEXT,
        Weight("projection", "text_projection"),
        Weight("projection", "text_projection.weight"),
    ),
    # computes its keys and values within: what is to join them goes through its bias_k and bias_v
    transformer.ResidualAttentionBlock: (*BLOCK, Span("keys", "attn", "attn", width="ln_1")),
    transformer.CustomResidualAttentionBlock: BLOCK,
    transformer.Attention: (
        Weight("attn.q", "in_proj_weight", (0, 3)),
        Weight("attn.k", "in_proj_weight", (1, 3)),
        Weight("attn.v", "in_proj_weight", (2, 3)),
        Weight("attn.qkv", "in_proj_weight", whole=True),
        Weight("attn.out", "out_proj.weight"),
        Span("keys", width="out_proj"),  # computed within, with nothing for others to go through
    ),
}


def example() -> nn.Module:
    """A small model, by whose sites `vm.methods` tells what works."""
    vision = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 24, "head_width": 12}
    return model.CLIP(16, vision, {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2})
