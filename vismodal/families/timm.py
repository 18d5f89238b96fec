"""timm: plain and hierarchical vision transformers, ConvNeXt and ResNet."""

from collections.abc import Callable
from typing import Any

from timm.layers.attention import Attention, AttentionRope
from timm.layers.classifier import ClassifierHead, NormMlpClassifierHead
from timm.layers.mlp import GlobalResponseNormMlp, GluMlp, Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, convnext, deit, eva, resnet, swin_transformer, swin_transformer_v2, vision_transformer
from torch import nn
from torch.nn import functional as F

from vismodal.site import NORMS, Layout, Range, Room, Span, Table, Tokens, Weight

NAME = "timm"
MODELS = "ViT (class, register, distillation tokens), DINOv2, BEiT, EVA, EVA02, Swin, SwinV2, ConvNeXt, ResNet"


def fused(reader: str | None = None) -> tuple[Weight, ...]:
    """One `qkv` Linear with rows q|k|v, or three. BEiT, EVA and SwinV2 hand `qkv.weight` to F.linear themselves, with a
    bias in three pieces, of which k's is a buffer."""
    bias = () if reader is None else ("q_bias", "k_bias", "v_bias")
    return (
        Weight("attn.q", "qkv.weight", (0, 3), reader=reader, bias=bias),
        Weight("attn.k", "qkv.weight", (1, 3), reader=reader, bias=bias),
        Weight("attn.v", "qkv.weight", (2, 3), reader=reader, bias=bias),
        Weight("attn.qkv", "qkv.weight", reader=reader, whole=True, bias=bias),
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
# the norm comes after the branch, which reads the stream itself
POST_NORM = (
    Span("block", width="norm1"),
    Span("attn", "attn", "drop_path1", width="norm1"),
    Span("mlp", "mlp", "drop_path2", width="norm2"),
)
POST_NORM_WINDOWS = (  # its attn is called on windows, so the stream is read where the block begins
    Span("block", width="norm1"),
    Span("attn", "", "drop_path1", width="norm1"),
    Span("mlp", "mlp", "drop_path2", width="norm2"),
)
ALL_BLOCKS = (
    Span("tokens", "blocks.0", "blocks.-1", {"block": "blocks.*"}, "blocks.0.norm1"),
    Span("features", "blocks.0", "norm", {"block": "blocks.*"}, "blocks.0.norm1"),
)


def stage(norm: str, channels: int = -1) -> Span:
    """The blocks of one stage, which have one width."""
    return Span("features.stage", "blocks.0", "blocks.-1", {"block": "blocks.*"}, f"blocks.0.{norm}", channels)


def model(first: str, last: str, width: str, when: Callable[[Any], bool] | None = None) -> Span:
    """From the picture to what the head reads."""
    return Span("model", first, last, {"model": ""}, width, when=when)


ENCODER = model("patch_embed", "head_drop", "blocks.0.norm1")
KEYS = (Span("keys", taps={"qkv": "qkv"}, width="proj"),)


def _without_bias(attn: Any, more: int) -> dict[str, Any]:
    """Swin's relative position bias, zero for tokens that have no position."""
    bias = attn._get_rel_pos_bias  # of the method, or of what stands in for it already
    return {"_get_rel_pos_bias": lambda: F.pad(bias(), (0, more, 0, more))}


HIDDEN_KEYS = (Span("keys", width="proj"),)  # of an attention that reads its weight itself: nothing can join them
WINDOW = Room(_without_bias, masks=("mask",))
WINDOW_KEYS = (Span("keys", taps={"qkv": "qkv"}, width="proj", room={"enter": WINDOW}),)
WINDOWS_BLOCK = (
    Span("block", width="norm1", taps={"norm": "norm1", "windows": "attn"}, room={"windows": WINDOW}),
    *BLOCK[1:],
)


def _layout(model: Any) -> Layout:
    """Class, distillation and register tokens, then the grid; none where pictures of any size are taken."""
    grid = None if model.dynamic_img_size else tuple(model.patch_embed.grid_size)
    return Layout(model.num_prefix_tokens, grid)


def _beit_layout(model: Any) -> Layout:
    return Layout(model.num_prefix_tokens, tuple(model.patch_embed.grid_size))


def _windows_layout(block: Any) -> Layout:
    """Rows and columns at this stage of Swin; none where pictures of any size are taken."""
    return Layout(0, None if block.dynamic_mask else tuple(block.input_resolution))


RELATIVE = "its relative position bias is made for a fixed number of tokens"
WINDOWS = "its tokens are rows and columns that are cut into windows"
ROTARY = "its rotary positions are given to every token after the class and register tokens"
MLP = (Weight("mlp.up", "fc1.weight"), Weight("mlp.down", "fc2.weight"))
HEAD = (Weight("head", "head.weight"), Weight("head", "head.bias"))
DISTILLED = (Weight("head", "head_dist.weight"), Weight("head", "head_dist.bias"))


def _pools_first(block: Any) -> bool:
    """ResNet-D: the shortcut is a pooling and then the convolution, elsewhere `downsample.1` is its norm."""
    return isinstance(block.downsample, nn.Sequential) and isinstance(block.downsample[1], nn.Conv2d)


def _has_bottlenecks(model: Any) -> bool:
    return isinstance(model.layer4[-1], resnet.Bottleneck)


CONVS = (
    *(Weight("conv", f"conv{i}.weight") for i in (1, 2, 3)),
    Weight("conv", "downsample.0.weight"),
    Weight("conv", "downsample.1.weight", when=_pools_first),
)
STEM = tuple(Weight("embed", f"conv1.{i}.weight") for i in (0, 3, 6))  # three convolutions in ResNet-D
FC = (Weight("head", "fc.weight"), Weight("head", "fc.bias"))

TABLE: Table = {
    Attention: fused() + KEYS,
    AttentionRope: fused() + HIDDEN_KEYS,
    beit.Attention: fused(reader="") + HIDDEN_KEYS,
    eva.EvaAttention: fused(reader="") + HIDDEN_KEYS,
    swin_transformer.WindowAttention: fused() + WINDOW_KEYS,
    swin_transformer_v2.WindowAttention: fused(reader="") + HIDDEN_KEYS,
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
    eva.EvaBlockPostNorm: POST_NORM,
    swin_transformer.SwinTransformerBlock: (Tokens(_windows_layout, WINDOWS), *WINDOWS_BLOCK),
    swin_transformer_v2.SwinTransformerV2Block: (Tokens(_windows_layout, WINDOWS), *POST_NORM_WINDOWS),
    vision_transformer.VisionTransformer: (Tokens(_layout), *ALL_BLOCKS, ENCODER, *HEAD),
    deit.VisionTransformerDistilled: (Tokens(_layout), *ALL_BLOCKS, *HEAD, *DISTILLED),
    beit.Beit: (Tokens(_beit_layout, RELATIVE), *ALL_BLOCKS, ENCODER, *HEAD),
    eva.Eva: (Tokens(_beit_layout, ROTARY), *ALL_BLOCKS, ENCODER, *HEAD),
    swin_transformer.SwinTransformerStage: (stage("norm1"),),
    swin_transformer_v2.SwinTransformerV2Stage: (stage("norm1"),),
    swin_transformer.SwinTransformer: (Tokens(lambda m: Layout(), WINDOWS), model("patch_embed", "head.drop", "norm")),
    swin_transformer_v2.SwinTransformerV2: (
        Tokens(lambda m: Layout(), WINDOWS),
        model("patch_embed", "head.drop", "norm"),
    ),
    ClassifierHead: FC,
    NormMlpClassifierHead: FC,
    convnext.ConvNeXtBlock: (Span("block", width="norm", channels=1), Weight("conv", "conv_dw.weight")),
    convnext.ConvNeXtStage: (stage("norm", channels=1), Weight("conv", "downsample.1.weight")),
    convnext.ConvNeXt: (model("stem", "head.drop", "stages.-1.blocks.-1.norm"), Weight("embed", "stem.0.weight")),
    resnet.BasicBlock: (Span("block", width="bn2", channels=1), *CONVS),
    resnet.Bottleneck: (Span("block", width="bn3", channels=1), *CONVS),
    resnet.ResNet: (
        model("conv1", "global_pool", "layer4.-1.bn3", when=_has_bottlenecks),
        model("conv1", "global_pool", "layer4.-1.bn2", when=lambda m: not _has_bottlenecks(m)),
        Weight("embed", "conv1.weight"),
        *STEM,
        *FC,
    ),
}


def example() -> nn.Module:
    """A small model, by whose sites `vm.methods` tells what works."""
    return vision_transformer.VisionTransformer(img_size=32, embed_dim=24, depth=2, num_heads=3)
