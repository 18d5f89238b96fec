"""timm: plain and hierarchical vision transformers, ConvNeXt and ResNet."""

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.layers.classifier import ClassifierHead, NormMlpClassifierHead
from timm.layers.mlp import GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, convnext, deit, eva, resnet, swin_transformer, swin_transformer_v2, vision_transformer
from torch import nn

from vismodal.site import NORMS, Layout, Range, Span, Table, Tokens, Weight

NAME = "timm"
MODELS = "ViT (class, register, distillation tokens), DINOv2, BEiT, EVA, EVA02, Swin, SwinV2, ConvNeXt, ResNet"


def fused(reader: str | None = None) -> tuple[Weight, ...]:
    """One `qkv` Linear with rows q|k|v, or three. BEiT, EVA and SwinV2 hand `qkv.weight` to F.linear themselves."""
    return (
        Weight("attn.q", "qkv.weight", (0, 3), reader=reader),
        Weight("attn.k", "qkv.weight", (1, 3), reader=reader),
        Weight("attn.v", "qkv.weight", (2, 3), reader=reader),
        Weight("attn.qkv", "qkv.weight", reader=reader, whole=True),
        Weight("bias", "q_bias", reader=""),
        Weight("bias", "v_bias", reader=""),
        Weight("attn.q", "q_proj.weight"),
        Weight("attn.k", "k_proj.weight"),
        Weight("attn.v", "v_proj.weight"),
        Weight("attn.out", "proj.weight"),
    )


def _halves(glu: Any) -> tuple[Range, Range]:
    """Rows of `fc1` that pass and rows that gate."""
    half = glu.fc1.weight.shape[0] // 2
    first, second = (0, half), (half, 2 * half)
    return (first, second) if glu.gate_last else (second, first)


def _up(glu: nn.Module) -> Range:
    return _halves(glu)[0]


def _gate(glu: nn.Module) -> Range:
    return _halves(glu)[1]


BLOCK = (
    Span("block", width="norm1"),
    Span("attn", "norm1", "drop_path1", {"normed": "norm1"}, "norm1"),
    Span("mlp", "norm2", "drop_path2", {"normed": "norm2"}, "norm2"),
)
ALL_BLOCKS = (
    Span("tokens", "blocks.0", "blocks.-1", width="blocks.0.norm1"),
    Span("features", "blocks.0", "norm", {"block": "blocks.*"}, "blocks.0.norm1"),
)
KEYS = (Span("keys", taps={"qkv": "qkv"}, width="proj"),)


def _layout(model: Any) -> Layout:
    """Class, distillation and register tokens, then the grid; none where pictures of any size are taken."""
    grid = None if model.dynamic_img_size else tuple(model.patch_embed.grid_size)
    return Layout(model.num_prefix_tokens, grid)


def _beit_layout(model: Any) -> Layout:
    return Layout(model.num_prefix_tokens, tuple(model.patch_embed.grid_size))


RELATIVE = "its relative position bias is made for a fixed number of tokens"
WINDOWS = "its tokens are rows and columns that are cut into windows"
ROTARY = "its rotary positions are given to every token after the class and register tokens"
MLP = (Weight("mlp.up", "fc1.weight"), Weight("mlp.down", "fc2.weight"))
HEAD = (Weight("head", "head.weight"), Weight("head", "head.bias"))
DISTILLED = (Weight("head", "head_dist.weight"), Weight("head", "head_dist.bias"))


def _pools_first(block: Any) -> bool:
    """ResNet-D: the shortcut is a pooling and then the convolution, elsewhere `downsample.1` is its norm."""
    return isinstance(block.downsample, nn.Sequential) and isinstance(block.downsample[1], nn.Conv2d)


CONVS = (
    *(Weight("conv", f"conv{i}.weight") for i in (1, 2, 3)),
    Weight("conv", "downsample.0.weight"),
    Weight("conv", "downsample.1.weight", when=_pools_first),
)
STEM = tuple(Weight("embed", f"conv1.{i}.weight") for i in (0, 3, 6))  # three convolutions in ResNet-D
FC = (Weight("head", "fc.weight"), Weight("head", "fc.bias"))

TABLE: Table = {
    Attention: fused() + KEYS,
    AttentionRope: fused(),
    beit.Attention: fused(reader=""),
    eva.EvaAttention: fused(reader=""),
    swin_transformer.WindowAttention: fused(),
    swin_transformer_v2.WindowAttention: fused(reader=""),
    Mlp: MLP,
    GlobalResponseNormMlp: MLP,
    GluMlp: (
        Weight("mlp.up", "fc1.weight", _up),
        Weight("mlp.gate", "fc1.weight", _gate),
        Weight("mlp.in", "fc1.weight", whole=True),
        Weight("mlp.down", "fc2.weight"),
    ),
    SwiGLU: (
        Weight("mlp.gate", "fc1_g.weight"),
        Weight("mlp.up", "fc1_x.weight"),
        Weight("mlp.down", "fc2.weight"),
    ),
    RmsNorm: NORMS,
    PatchEmbed: (Weight("embed", "proj.weight"),),
    vision_transformer.Block: BLOCK,
    beit.Block: BLOCK,
    eva.EvaBlock: BLOCK,
    eva.EvaBlockPostNorm: BLOCK,
    swin_transformer.SwinTransformerBlock: BLOCK,
    swin_transformer_v2.SwinTransformerV2Block: BLOCK,
    vision_transformer.VisionTransformer: (Tokens(_layout), *ALL_BLOCKS, *HEAD),
    deit.VisionTransformerDistilled: (Tokens(_layout), *ALL_BLOCKS, *HEAD, *DISTILLED),
    beit.Beit: (Tokens(_beit_layout, RELATIVE), *ALL_BLOCKS, *HEAD),
    eva.Eva: (Tokens(_beit_layout, ROTARY), *ALL_BLOCKS, *HEAD),
    swin_transformer.SwinTransformer: (Tokens(lambda m: Layout(), WINDOWS),),
    swin_transformer_v2.SwinTransformerV2: (Tokens(lambda m: Layout(), WINDOWS),),
    ClassifierHead: FC,
    NormMlpClassifierHead: FC,
    convnext.ConvNeXtBlock: (Span("block", width="norm", channels=1), Weight("conv", "conv_dw.weight")),
    convnext.ConvNeXtStage: (Weight("conv", "downsample.1.weight"),),
    convnext.ConvNeXt: (Weight("embed", "stem.0.weight"),),
    resnet.BasicBlock: (Span("block", width="bn2", channels=1), *CONVS),
    resnet.Bottleneck: (Span("block", width="bn3", channels=1), *CONVS),
    resnet.ResNet: (Weight("embed", "conv1.weight"), *STEM, *FC),
}
