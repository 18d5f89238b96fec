"""diffusers: the UNet of Stable Diffusion 1.5, 2 and XL, and the transformers of Stable Diffusion 3, Flux and PixArt.

Self- and cross-attention are one class, so the parent block declares both. Where text and picture are two streams that
attend to each other (MMDiT, arXiv 2403.03206), `attn.*` and the spans `attn` and `mlp` are those of the picture,
`attn.add.*` the text's; feed-forward layers are `mlp.*` in both. Adaptive norms gate a branch after its span ends, so
what is added there is gated with it; what they make of time and text is `time`, as in a UNet.
"""

from collections.abc import Callable
from typing import Any

from diffusers.models import normalization as norms
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import PatchEmbed, PixArtAlphaTextProjection, TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers import transformer_flux as flux
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from vismodal.site import Entry, Order, Span, Table, Weight

NAME = "diffusers"
MODELS = "UNet2DConditionModel of Stable Diffusion 1.5, 2 and XL; the transformers of SD 3, Flux and PixArt"


def attention(kind: str, path: str, when: Callable[[Any], bool] | None = None) -> tuple[Weight, ...]:
    qkv = tuple(Weight(f"{kind}.{x}", f"{path}.to_{x}.weight", when=when) for x in "qkv")
    return (*qkv, Weight(f"{kind}.out", f"{path}.to_out.0.weight", when=when))


def _reads_text(block: Any) -> bool:
    return bool(block.only_cross_attention)


def _reads_itself(block: Any) -> bool:
    return not block.only_cross_attention


def _single(block: Any) -> bool:
    """PixArt's: one adaptive norm for all blocks; its cross-attention has none, the norm after it is the MLP's."""
    return bool(block.norm_type == "ada_norm_single")


def _not_single(block: Any) -> bool:
    return not _single(block)


def _keeps_text(block: Any) -> bool:
    """Not the last of an MMDiT, where the text is read and let go: its queries reach nothing."""
    return not getattr(block, "context_pre_only", False)


# Text and picture go through a block together, so there is no span over it; it counts as one all the same.
COUNTED = Span("block", when=lambda block: False)
JOINT: tuple[Entry, ...] = (
    COUNTED,
    Span("attn", "norm1", "attn", {"normed": "norm1"}, "norm2"),
    Span("mlp", "norm2", "ff", {"normed": "norm2"}, "norm2"),
    *attention("attn", "attn"),
    Weight("attn.add.q", "attn.add_q_proj.weight", when=_keeps_text),
    Weight("attn.add.k", "attn.add_k_proj.weight"),
    Weight("attn.add.v", "attn.add_v_proj.weight"),
    Weight("attn.add.out", "attn.to_add_out.weight"),
)
MODULATION = (Weight("time", "linear.weight"),)


def qk_norms(path: str) -> tuple[Weight, ...]:
    return tuple(Weight("norm", f"{path}.norm_{x}.weight") for x in ("q", "k", "added_k"))


def level(i: int) -> Span:
    """The residual blocks of one resolution: the decoder's, which read the encoder's ("skip") besides."""
    taps = {"skip": f"down_blocks.{i}.resnets.*", "block": f"up_blocks.-{i + 1}.resnets.*"}
    first, last = f"down_blocks.{i}.resnets.0", f"up_blocks.-{i + 1}.resnets.-1"
    return Span("features.stage", first, last, taps, f"{first}.conv2", channels=1, name=str(i))


# from the queries of cross-attention to what its output projection reads
BESIDE = Span(
    "xattn.beside",
    "attn2",
    "attn2",
    {"q": "attn2.to_q", "k": "attn2.to_k", "v": "attn2.to_v", "out": "attn2.to_out.0"},
    "attn2.to_q",
    heads=lambda block: int(block.attn2.heads),
)
LEVELS = tuple(level(i) for i in range(8))  # a UNet has as many of them as it has blocks downwards

TABLE: Table = {
    BasicTransformerBlock: (
        Span("block", width="norm1"),
        Span("attn", "norm1", "attn1", {"normed": "norm1"}, "norm1"),
        Span("xattn", "norm2", "attn2", {"normed": "norm2"}, "norm2", when=_not_single),
        Span("xattn", "attn2", "attn2", width="norm2", when=_single),
        Span("mlp", "norm3", "ff", {"normed": "norm3"}, "norm3"),
        Span("mlp", "norm2", "ff", {"normed": "norm2"}, "norm2", when=_single),
        # the number of keys and values is read off them, so there may be more of them than queries
        Span("keys", "attn1", "attn1", {"k": "attn1.to_k", "v": "attn1.to_v"}, "attn1.to_k", when=_reads_itself),
        # PixArt masks the keys of its text, which are as many as it has words
        Span("xattn.keys", "attn2", "attn2", {"k": "attn2.to_k", "v": "attn2.to_v"}, "attn2.to_k", when=_not_single),
        BESIDE,
        *attention("attn", "attn1", _reads_itself),
        *attention("xattn", "attn1", _reads_text),
        *attention("xattn", "attn2"),
    ),
    GEGLU: (
        Weight("mlp.up", "proj.weight", (0, 2)),
        Weight("mlp.gate", "proj.weight", (1, 2)),
        Weight("mlp.in", "proj.weight", whole=True),
    ),
    GELU: (Weight("mlp.up", "proj.weight"),),
    FeedForward: (Weight("mlp.down", "net.2.weight"),),
    JointTransformerBlock: (
        *JOINT,
        *attention("attn", "attn2"),  # of Stable Diffusion 3.5: the picture by itself
        *qk_norms("attn"),
        *qk_norms("attn2"),
        Weight("norm", "attn.norm_added_q.weight", when=_keeps_text),
    ),
    flux.FluxTransformerBlock: JOINT,
    # text and picture one after the other, attention beside the MLP; one matrix is `attn.out` and `mlp.down` at once
    flux.FluxSingleTransformerBlock: (
        COUNTED,
        *attention("attn", "attn"),
        Weight("mlp.up", "proj_mlp.weight"),
        Weight("proj.out", "proj_out.weight"),
    ),
    norms.AdaLayerNormZero: MODULATION,
    norms.AdaLayerNormZeroSingle: MODULATION,
    norms.SD35AdaLayerNormZeroX: MODULATION,
    norms.AdaLayerNormContinuous: MODULATION,
    norms.AdaLayerNormSingle: MODULATION,
    PatchEmbed: (Weight("embed", "proj.weight"),),
    PixArtAlphaTextProjection: (Weight("embed.text", "linear_1.weight"), Weight("embed.text", "linear_2.weight")),
    SD3Transformer2DModel: (Weight("embed.text", "context_embedder.weight"), Weight("proj.out", "proj_out.weight")),
    flux.FluxTransformer2DModel: (
        Weight("embed.text", "context_embedder.weight"),
        Weight("embed", "x_embedder.weight"),
        Weight("proj.out", "proj_out.weight"),
    ),
    PixArtTransformer2DModel: (
        Order(("pos_embed", "adaln_single", "caption_projection", "transformer_blocks", "norm_out", "proj_out")),
        Weight("proj.out", "proj_out.weight"),
    ),
    Transformer2DModel: (Weight("proj.in", "proj_in.weight"), Weight("proj.out", "proj_out.weight")),
    ResnetBlock2D: (
        Weight("conv", "conv1.weight"),
        Weight("conv", "conv2.weight"),
        Weight("conv", "conv_shortcut.weight"),
        Weight("time", "time_emb_proj.weight"),
    ),
    Downsample2D: (Weight("conv", "conv.weight"),),
    Upsample2D: (Weight("conv", "conv.weight"),),
    TimestepEmbedding: (Weight("time", "linear_1.weight"), Weight("time", "linear_2.weight")),
    UNet2DConditionModel: (
        Order(("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")),
        *LEVELS,
        Span(
            "decoder",
            "mid_block",
            "up_blocks.-1",
            {"mid": "mid_block", "block": "up_blocks.*"},
            channels=1,
            widths={"mid": "mid_block.resnets.0.conv2", "block": "up_blocks.*.resnets.0.conv2"},
        ),
        # the stream at the end of each resolution, before it is halved
        Span(
            "encoder",
            "conv_in",
            "down_blocks.-1",
            {"block": "down_blocks.*.attentions.-1|resnets.-1"},
            channels=1,
            widths={"block": "down_blocks.*.resnets.-1.conv2"},
        ),
        Span("model", "conv_in", "conv_out", width="conv_out", channels=1),
        Weight("conv", "conv_in.weight"),
        Weight("conv", "conv_out.weight"),
    ),
}


def example() -> nn.Module:
    """A small model, by whose sites `vm.methods` tells what works."""
    return UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=24,
    )
