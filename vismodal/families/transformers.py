"""transformers: ViT, DINOv2, CLIP and SigLIP, and the CLIP text towers with and without projection."""

from transformers.models.clip import modeling_clip as clip
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit

from vismodal.site import Span, Table, Tower, Weight

NAME = "transformers"
MODELS = "ViT, DINOv2, CLIP, SigLIP, CLIP text towers"


def attention(out: str) -> tuple[Weight, ...]:
    qkv = tuple(Weight(f"attn.{x}", f"{x}_proj.weight") for x in "qkv")
    return (*qkv, Weight("attn.out", f"{out}.weight"))


MLP = (Weight("mlp.up", "fc1.weight"), Weight("mlp.down", "fc2.weight"))
CLASSIFIER = (Weight("head", "classifier.weight"), Weight("head", "classifier.bias"))
TOWERS = (Tower("image", "vision_model"), Tower("text", "text_model"))
PROJECTIONS = (Weight("projection", "visual_projection.weight"), Weight("projection", "text_projection.weight"))
ENCODER_LAYER = (Span("block"), Span("attn", "layer_norm1", "self_attn"), Span("mlp", "layer_norm2", "mlp"))
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
    vit.ViTLayer: (Span("block"), Span("attn", "layernorm_before", "attention"), Span("mlp", "layernorm_after", "mlp")),
    dinov2.Dinov2Layer: (Span("block"), Span("attn", "norm1", "layer_scale1"), Span("mlp", "norm2", "layer_scale2")),
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
    siglip.SiglipTextModel: (Weight("projection", "head.weight"),),
}
