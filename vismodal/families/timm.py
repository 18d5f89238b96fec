"""timm: plain and hierarchical vision transformers, ConvNeXt and ResNet."""

from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.layers.classifier import ClassifierHead, NormMlpClassifierHead
from timm.layers.mlp import GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, convnext, deit, eva, resnet, swin_transformer, swin_transformer_v2, vision_transformer
from torch import nn

from vismodal.site import NORMS, Range, Span, Table, Weight

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
    Span("block"),
    Span("attn", "norm1", "drop_path1"),
    Span("mlp", "norm2", "drop_path2"),
)
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
    Attention: fused(),
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
    vision_transformer.VisionTransformer: HEAD,
    deit.VisionTransformerDistilled: HEAD + DISTILLED,
    beit.Beit: HEAD,
    eva.Eva: HEAD,
    ClassifierHead: FC,
    NormMlpClassifierHead: FC,
    convnext.ConvNeXtBlock: (Span("block"), Weight("conv", "conv_dw.weight")),
    convnext.ConvNeXtStage: (Weight("conv", "downsample.1.weight"),),
    convnext.ConvNeXt: (Weight("embed", "stem.0.weight"),),
    resnet.BasicBlock: (Span("block"), *CONVS),
    resnet.Bottleneck: (Span("block"), *CONVS),
    resnet.ResNet: (Weight("embed", "conv1.weight"), *STEM, *FC),
}
