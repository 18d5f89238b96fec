"""transformers: ViT, DINOv2, CLIP and SigLIP, and the CLIP text towers with and without projection."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from vismodal.site import Entry, Layout, Span, Table, Tokens, Tower, Weight

NAME = "transformers"
MODELS = "ViT, DINOv2, CLIP, SigLIP, CLIP text towers"


def attention(out: str) -> tuple[Entry, ...]:
    qkv = tuple(Weight(f"attn.{x}", f"{x}_proj.weight") for x in "qkv")
    keys = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    return (*qkv, Weight("attn.out", f"{out}.weight"), Span("keys", taps=keys, width=out))


def _layout(prefix: int) -> Callable[[Any], Layout]:
    """The layout of a model with a config, whose pictures are square."""

    def layout(model: Any) -> Layout:
        side = model.config.image_size // model.config.patch_size
        return Layout(prefix, (side, side))

    return layout


def blocks(layers: str, norm: str, first: str = "", last: str = "") -> tuple[Span, ...]:
    """The spans over all blocks; `first` is where tokens are joined, `last` where the features end."""
    return (
        Span("tokens", first or f"{layers}.0", f"{layers}.-1", {"block": f"{layers}.*"}, norm),
        Span("features", f"{layers}.0", last or f"{layers}.-1", {"block": f"{layers}.*"}, norm),
    )


POOLED = "its mask and the place of the token that it is pooled at are made for a fixed number of tokens"
TEXT = (
    # from where ids come in: the model pools where the end of the text is among them
    Span("text.tokens", "", "embeddings.token_embedding", width="embeddings.token_embedding"),
    Span("features", "encoder.layers.0", "encoder.layers.-1", {"block": "encoder.layers.*"}, "final_layer_norm"),
)


MLP = (Weight("mlp.up", "fc1.weight"), Weight("mlp.down", "fc2.weight"))
CLASSIFIER = (Weight("head", "classifier.weight"), Weight("head", "classifier.bias"))
TOWERS = (Tower("image", "vision_model"), Tower("text", "text_model"))
PROJECTIONS = (Weight("projection", "visual_projection.weight"), Weight("projection", "text_projection.weight"))
ENCODER_LAYER = (
    Span("block", width="layer_norm1"),
    Span("attn", "layer_norm1", "self_attn", {"normed": "layer_norm1"}, "layer_norm1"),
    Span("mlp", "layer_norm2", "mlp", {"normed": "layer_norm2"}, "layer_norm2"),
)
MODEL = Span("model", "embeddings", "layernorm", width="layernorm")
PATCHES = (Weight("embed", "patch_embedding.weight"),)
TOKENS = (Weight("embed.tokens", "token_embedding.weight"),)

TABLE: Table = {
    vit.ViTAttention: attention("o_proj"),
    dinov2.Dinov2Attention: attention("o_proj"),
    clip.CLIPAttention: attention("out_proj"),
    siglip.SiglipAttention: attention("out_proj"),
    vit.ViTMLP: MLP,
    dinov2.Dinov2MLP: MLP,
    clip.CLIPMLP: MLP,
    siglip.SiglipMLP: MLP,
    dinov2.Dinov2SwiGLUFFN: (
        Weight("mlp.gate", "gate_proj.weight"),
        Weight("mlp.up", "up_proj.weight"),
        Weight("mlp.down", "down_proj.weight"),
    ),
    vit.ViTLayer: (
        Span("block", width="layernorm_before"),
        Span("attn", "layernorm_before", "attention", {"normed": "layernorm_before"}, "layernorm_before"),
        Span("mlp", "layernorm_after", "mlp", {"normed": "layernorm_after"}, "layernorm_after"),
    ),
    dinov2.Dinov2Layer: (
        Span("block", width="norm1"),
        Span("attn", "norm1", "layer_scale1", {"normed": "norm1"}, "norm1"),
        Span("mlp", "norm2", "layer_scale2", {"normed": "norm2"}, "norm2"),
    ),
    vit.ViTModel: (Tokens(_layout(1)), *blocks("layers", "layernorm", last="layernorm"), MODEL),
    dinov2.Dinov2Model: (Tokens(_layout(1)), *blocks("encoder.layer", "layernorm", last="layernorm"), MODEL),
    # before the norm that comes first, as the official prompt learners do
    clip.CLIPVisionModel: (
        Tokens(_layout(1)),
        *blocks("encoder.layers", "post_layernorm", "pre_layrnorm"),
        Span("model", "embeddings", "post_layernorm", width="post_layernorm"),
    ),
    siglip.SiglipVisionModel: (
        Tokens(_layout(0)),
        *blocks("encoder.layers", "post_layernorm"),
        Span("model", "embeddings", "head", width="post_layernorm"),
    ),
    clip.CLIPTextModel: (Tokens(lambda m: Layout(1, causal=True), POOLED), *TEXT),
    siglip.SiglipTextModel: (Tokens(lambda m: Layout(1), POOLED), *TEXT, Weight("projection", "head.weight")),
    clip.CLIPEncoderLayer: ENCODER_LAYER,
    siglip.SiglipEncoderLayer: ENCODER_LAYER,
    vit.ViTPatchEmbeddings: (Weight("embed", "projection.weight"),),
    dinov2.Dinov2PatchEmbeddings: (Weight("embed", "projection.weight"),),
    clip.CLIPVisionEmbeddings: PATCHES,
    siglip.SiglipVisionEmbeddings: PATCHES,
    clip.CLIPTextEmbeddings: TOKENS,
    siglip.SiglipTextEmbeddings: TOKENS,
    vit.ViTForImageClassification: CLASSIFIER,
    dinov2.Dinov2ForImageClassification: CLASSIFIER,
    clip.CLIPForImageClassification: CLASSIFIER,
    siglip.SiglipForImageClassification: CLASSIFIER,
    clip.CLIPModel: TOWERS + PROJECTIONS,
    clip.CLIPTextModelWithProjection: PROJECTIONS,
    clip.CLIPVisionModelWithProjection: PROJECTIONS,
    siglip.SiglipModel: TOWERS,
}

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SMALL_PICTURES: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 16}


SMALL_TEXTS: dict[str, Any] = {**SMALL, "vocab_size": 64, "max_position_embeddings": 8}
SMALL_TEXTS |= {"bos_token_id": 62, "eos_token_id": 63}


def example() -> nn.Module:
    """A small model, by whose sites `vm.methods` tells what works."""
    return vit.ViTForImageClassification(vit.ViTConfig(**SMALL_PICTURES))


def text_example() -> nn.Module:
    """A small one for texts."""
    return clip.CLIPTextModel(clip.CLIPTextConfig(**SMALL_TEXTS))


def clip_example() -> nn.Module:
    """One with two towers."""
    config = clip.CLIPConfig(text_config=SMALL_TEXTS, vision_config=SMALL_PICTURES, projection_dim=16)
    return clip.CLIPModel(config)


MORE = (text_example,)  # examples that have sites of their own
