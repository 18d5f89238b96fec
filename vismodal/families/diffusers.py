"""diffusers: UNet2DConditionModel of Stable Diffusion 1.5, 2 and XL.

Self- and cross-attention are one class, so the parent block declares both.
"""

from collections.abc import Callable
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from vismodal.site import Order, Span, Table, Weight

NAME = "diffusers"
MODELS = "UNet2DConditionModel of Stable Diffusion 1.5, 2 and XL"


def attention(kind: str, path: str, when: Callable[[Any], bool] | None = None) -> tuple[Weight, ...]:
    qkv = tuple(Weight(f"{kind}.{x}", f"{path}.to_{x}.weight", when=when) for x in "qkv")
    return (*qkv, Weight(f"{kind}.out", f"{path}.to_out.0.weight", when=when))


def _reads_text(block: Any) -> bool:
    return bool(block.only_cross_attention)


def _reads_itself(block: Any) -> bool:
    return not block.only_cross_attention


def level(i: int) -> Span:
    """The residual blocks of one resolution: the decoder's, which read the encoder's ("skip") besides."""
    taps = {"skip": f"down_blocks.{i}.resnets.*", "block": f"up_blocks.-{i + 1}.resnets.*"}
    first, last = f"down_blocks.{i}.resnets.0", f"up_blocks.-{i + 1}.resnets.-1"
    return Span("features.stage", first, last, taps, f"{first}.conv2", channels=1, name=str(i))


LEVELS = tuple(level(i) for i in range(8))  # a UNet has as many of them as it has blocks downwards

TABLE: Table = {
    BasicTransformerBlock: (
        Span("block", width="norm1"),
        Span("attn", "norm1", "attn1", {"normed": "norm1"}, "norm1"),
        Span("xattn", "norm2", "attn2", {"normed": "norm2"}, "norm2"),
        Span("mlp", "norm3", "ff", {"normed": "norm3"}, "norm3"),
        # the number of keys and values is read off them, so there may be more of them than queries
        Span("keys", "attn1", "attn1", {"k": "attn1.to_k", "v": "attn1.to_v"}, "attn1.to_k", when=_reads_itself),
        Span("xattn.keys", "attn2", "attn2", {"k": "attn2.to_k", "v": "attn2.to_v"}, "attn2.to_k"),
        *attention("attn", "attn1", _reads_itself),
        *attention("xattn", "attn1", _reads_text),
        *attention("xattn", "attn2"),
    ),
    GEGLU: (
        Weight("mlp.up", "proj.weight", (0, 2)),
        Weight("mlp.gate", "proj.weight", (1, 2)),
        Weight("mlp.in", "proj.weight", whole=True),
    ),
    FeedForward: (Weight("mlp.down", "net.2.weight"),),
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
