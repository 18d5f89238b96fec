"""open_clip: CLIP and CustomTextCLIP with their own towers; timm towers are found through the timm table.

Version 3.3 builds blocks on `nn.MultiheadAttention` (see `site.COMMON`), CustomTransformer on its own `Attention`.
`text_projection` of the flat `CLIP` class is read by `encode_text`, a method that no hook sees, so it is no site there.
"""

from open_clip import model, transformer

from vismodal.families.timm import TABLE as TIMM
from vismodal.site import Span, Table, Tower, Weight

NAME = "open_clip"
MODELS = "CLIP, CustomTextCLIP, timm towers; nn.MultiheadAttention and the library's own Attention"

BLOCK = (
    Span("block"),
    Span("attn", "ln_1", "ls_1"),
    Span("mlp", "ln_2", "ls_2"),
    Weight("mlp.up", "mlp.c_fc.weight"),
    Weight("mlp.down", "mlp.c_proj.weight"),
)

TABLE: Table = {
    **TIMM,
    model.CLIP: (
        Tower("image", "visual"),
        Tower("text", "transformer"),
        Weight("embed.tokens", "token_embedding.weight"),
    ),
    model.CustomTextCLIP: (Tower("image", "visual"), Tower("text", "text")),
    transformer.VisionTransformer: (Weight("embed", "conv1.weight"), Weight("projection", "proj")),
    transformer.TextTransformer: (
        Weight("embed.tokens", "token_embedding.weight"),
        Weight("projection", "text_projection"),
        Weight("projection", "text_projection.weight"),
    ),
    transformer.ResidualAttentionBlock: BLOCK,
    transformer.CustomResidualAttentionBlock: BLOCK,
    transformer.Attention: (
        Weight("attn.q", "in_proj_weight", (0, 3)),
        Weight("attn.k", "in_proj_weight", (1, 3)),
        Weight("attn.v", "in_proj_weight", (2, 3)),
        Weight("attn.qkv", "in_proj_weight", whole=True),
        Weight("attn.out", "out_proj.weight"),
    ),
}
