"""Small random models of every family, each with a way to run it. Real classes, real configs, only smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

import vismodal as vm
from vismodal.methods.base import Method
from vismodal.methods.repadapter import has_bias


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module], Tensor]
    checkpoint: Callable[[nn.Module], object] | None = None  # switches the model's own gradient checkpointing on

    def model(self) -> nn.Module:
        """The same random model each time, in eval mode, with no zeros that would hide a wrong gradient."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
        return model


def fixed(*shape: int) -> Tensor:
    """Input without a generator, which dynamo cannot trace."""
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) ** 2).float().view(shape)


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _image(size: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(fixed(2, 3, size, size).to(dtype_of(model)))


def _timm(name: str, size: int, **options: object) -> Case:
    def build() -> nn.Module:
        import timm

        if "resn" not in name and "convnext" not in name:
            options["img_size"] = size
        return timm.create_model(name, num_classes=4, **options)

    return Case(f"timm-{name}", build, _image(size), lambda m: m.set_grad_checkpointing(True))


SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3}
TIMM = (
    _timm("vit_tiny_patch16_224", 32, **SMALL),
    _timm("deit_tiny_distilled_patch16_224", 32, **SMALL),
    _timm("vit_small_patch14_reg4_dinov2", 28, **SMALL),
    _timm("vit_giant_patch14_dinov2", 28, **SMALL, mlp_ratio=2.0),
    _timm("beit_base_patch16_224", 32, **SMALL),
    _timm("eva02_tiny_patch14_224", 28, **SMALL),
    _timm("eva02_base_patch14_448", 28, **SMALL),
    _timm("swin_tiny_patch4_window7_224", 56, depths=(1, 1), embed_dim=12, num_heads=(2, 4)),
    _timm("swinv2_tiny_window8_256", 64, depths=(1, 1), embed_dim=12, num_heads=(2, 4)),
    _timm("convnext_tiny", 64, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
    _timm("resnext50_32x4d", 32, layers=(1, 1, 1, 1)),
    _timm("resnet18", 32, layers=(1, 1, 1, 1)),
    _timm("resnet10t", 32),
    _timm("convnextv2_atto", 64, depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
)


def words() -> Tensor:
    """Three texts of eight tokens; each ends with the end-of-text token, at which CLIP pools."""
    return torch.cat([torch.arange(21).view(3, 7) * 17 % 59 + 1, torch.full((3, 1), 62)], 1)


def _open_clip(name: str, vision: dict, text: dict, custom: bool) -> Case:
    def build() -> nn.Module:
        from open_clip.model import CLIP, CustomTextCLIP

        size = {"image_size": 32, "patch_size": 16, "layers": 2, "width": 24, "head_width": 12}
        sizes = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
        return (CustomTextCLIP if custom else CLIP)(16, {**size, **vision}, {**sizes, **text})

    def run(model: nn.Module) -> Tensor:
        size = 224 if "timm" in name else 32
        images = fixed(2, 3, size, size).to(dtype_of(model))
        return torch.cat([model.encode_image(images), model.encode_text(words())])

    return Case(f"open_clip-{name}", build, run, lambda m: m.set_grad_checkpointing(True))


OWN = {"block_type": "custom", "qk_norm": True}
OPEN_CLIP = (
    _open_clip("CLIP", {}, {}, custom=False),
    _open_clip("CustomTextCLIP", {}, {"proj_type": "linear"}, custom=True),
    _open_clip("own-attention", OWN, OWN, custom=True),
    _open_clip("timm-tower", {"timm_model_name": "test_vit", "image_size": 224}, {}, custom=True),
)

VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 64}
TEXT |= {"max_position_embeddings": 8, "projection_dim": 16, "projection_size": 24}
TEXT |= {"bos_token_id": 61, "eos_token_id": 62, "pad_token_id": 0}


def _hf(name: str, build: Callable[[], nn.Module], out: str, image: bool = True, text: bool = False) -> Case:
    def run(model: nn.Module) -> Tensor:
        images = {"pixel_values": fixed(2, 3, 32, 32).to(dtype_of(model))} if image else {}
        texts = {"input_ids": words()} if text else {}
        return getattr(model(**images, **texts), out)

    return Case(f"transformers-{name}", build, run, lambda m: m.activation_checkpointing_enable())


def _transformers() -> tuple[Case, ...]:
    import transformers as hf

    def clip() -> nn.Module:
        return hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))

    def siglip() -> nn.Module:
        return hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION))

    return (
        _hf("ViT", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), "logits"),
        _hf("Dinov2", lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION)), "logits"),
        _hf("Dinov2-swiglu", lambda: hf.Dinov2Model(hf.Dinov2Config(**VISION, use_swiglu_ffn=True)), "pooler_output"),
        _hf("CLIP", clip, "logits_per_image", text=True),
        _hf("SigLIP", siglip, "logits_per_image", text=True),
        _hf("CLIPText", lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT)), "last_hidden_state", False, True),
        _hf(
            "CLIPTextProj",
            lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)),
            "text_embeds",
            False,
            True,
        ),
    )


def _unet(name: str, **options: object) -> Case:
    def build() -> nn.Module:
        from diffusers import UNet2DConditionModel

        blocks = {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
        size = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
        return UNet2DConditionModel(**size, **blocks, cross_attention_dim=24, **options)  # type: ignore[arg-type]

    def run(model: nn.Module) -> Tensor:
        dtype = dtype_of(model)
        added = {"text_embeds": fixed(2, 16).to(dtype), "time_ids": torch.ones(2, 6).to(dtype)}
        more = {"added_cond_kwargs": added} if name == "SDXL" else {}
        return model(fixed(2, 4, 8, 8).to(dtype), torch.tensor([1, 500]), fixed(2, 3, 24).to(dtype), **more).sample

    return Case(f"diffusers-{name}", build, run, lambda m: m.enable_gradient_checkpointing())


SDXL = {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def _transformer(name: str, build: Callable[[], nn.Module], inputs: Callable[[], dict[str, Tensor]]) -> Case:
    def run(model: nn.Module) -> Tensor:
        dtype = dtype_of(model)
        given = {k: v.to(dtype) if k != "timestep" and v.is_floating_point() else v for k, v in inputs().items()}
        added = {"resolution": fixed(2, 2).to(dtype), "aspect_ratio": fixed(2, 1).to(dtype)}
        more = {"added_cond_kwargs": added} if name == "PixArt" else {}
        return model(**given, **more).sample

    return Case(f"diffusers-{name}", build, run, lambda m: m.enable_gradient_checkpointing())


def _sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    size = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "caption_projection_dim": 24}
    options = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}  # which 3.5 has and 3 has not
    return SD3Transformer2DModel(**size, **heads, **options, joint_attention_dim=16, pooled_projection_dim=16)  # type: ignore[arg-type]


def _flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "axes_dims_rope": (4, 2, 2)}
    size = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "guidance_embeds": True}
    return FluxTransformer2DModel(**size, **heads, joint_attention_dim=16, pooled_projection_dim=16)  # type: ignore[arg-type]


def _pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    size = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2}
    text = {"cross_attention_dim": 24, "caption_channels": 16, "use_additional_conditions": True}
    return PixArtTransformer2DModel(**size, **text)  # type: ignore[arg-type]


def _maps() -> dict[str, Tensor]:
    return {
        "hidden_states": fixed(2, 4, 8, 8),
        "encoder_hidden_states": fixed(2, 3, 16),
        "timestep": torch.tensor([1.0, 500.0]),
    }


def _packed() -> dict[str, Tensor]:
    return {
        "hidden_states": fixed(2, 16, 16),
        "encoder_hidden_states": fixed(2, 3, 16),
        "pooled_projections": fixed(2, 16),
        "timestep": torch.tensor([0.001, 0.5]),
        "guidance": torch.ones(2),
        "img_ids": torch.arange(48).view(16, 3) % 5,
        "txt_ids": torch.zeros(3, 3),
    }


def _pooled() -> dict[str, Tensor]:
    return _maps() | {"pooled_projections": fixed(2, 16)}


DIFFUSERS = (
    _unet("SD1.5", attention_head_dim=2),
    _unet("SD2", attention_head_dim=(2, 4), use_linear_projection=True),
    _unet("SDXL", **SDXL),
    _transformer("SD3.5", _sd3, _pooled),
    _transformer("Flux", _flux, _packed),
    _transformer("PixArt", _pixart, _maps),
)


def word_ids(texts: Sequence[str]) -> Tensor:
    """A tokenizer for the small CLIPs: one id for a word, 61 begins, 62 ends, 0 fills up to 8."""
    rows = []
    for text in texts:
        ids = [sum(map(ord, word)) % 59 + 1 for word in text.replace(".", " .").split()][:6]
        rows.append([61, *ids, 62] + [0] * (6 - len(ids)))
    return torch.tensor(rows)


def _classifier(name: str, inner: Case) -> Case:
    def build() -> nn.Module:
        return vm.CLIPClassifier(inner.build(), word_ids, ["cat", "dog", "ship"], ["a photo of a {}.", "{}."])

    return Case(f"classifier-{name}", build, _image(32), lambda m: inner.checkpoint(m.model))  # type: ignore[misc]


HF = _transformers()
CLASSIFIERS = (
    _classifier("flat", OPEN_CLIP[0]),
    *(_classifier(c.name[13:].lower(), c) for c in HF if c.name.endswith(("-CLIP", "-SigLIP"))),
)

CASES = (*TIMM, *OPEN_CLIP, *HF, *DIFFUSERS, *CLASSIFIERS)
BY_NAME = {case.name: case for case in CASES}


def offered(model: nn.Module, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the kinds that the model has."""
    there = {s.kind for s in vm.sites(model) if s.span is None}
    return tuple(k for k in kinds if k in there)


LORA_KINDS = ("attn.q", "attn.k", "attn.v", "attn.out", "xattn.q", "xattn.k", "xattn.v", "xattn.out")
LORA_KINDS += ("mlp.up", "mlp.gate", "mlp.down", "conv", "time", "embed", "embed.tokens", "projection")
LORA_KINDS += ("proj.in", "proj.out", "attn.add.q", "attn.add.k", "attn.add.v", "attn.add.out", "embed.text")
FACT_KINDS = tuple(kind for kind in LORA_KINDS if "embed" not in kind)


def lora(model: nn.Module, **options: object) -> vm.LoRA:
    """LoRA on every kind of matrix that the model offers."""
    return vm.LoRA(sites=offered(model, LORA_KINDS), rank=2, alpha=3.0, **options)  # type: ignore[arg-type]


def tune(model: nn.Module) -> vm.Tune:
    return vm.Tune(sites=offered(model, ("norm", "bias", "head")))


@dataclass(frozen=True)
class Trial:
    """A method in the matrix: how to make it for a model, and the names of the models that it claims, by glob.

    `idle` names tensors that get no gradient by the method's definition, by glob on their key. `condition` is the shape
    of what a method needs beside the model's input.
    """

    make: Callable[[nn.Module], Method]
    claims: tuple[str, ...] = ("*",)
    idle: tuple[str, ...] = ()
    condition: tuple[int, ...] = ()


# by glob on their names: of diffusers' models the UNets; those that a span goes over each block of; all but them
UNETS = "diffusers-SD[12X]*"
SPANNED = (UNETS, "diffusers-PixArt")
OTHERS = ("timm*", "open_clip*", "transformers*")

# those built of blocks with attention and MLP, and of these, those that know their grid
TRANSFORMERS = ("*vit*", "*deit*", "*beit*", "*eva*", "*swin*", "open_clip*", "transformers*", "diffusers*")
GRIDS = ("*vit*", "*deit*", "*beit*", "*eva*", "*swin_*", "open_clip-C*", "*-own-*")
GRIDS += ("*ViT", "*Dinov2*", "*-CLIP", "*SigLIP")


# those that take tokens of their own
TOKENS = ("timm-vit*", "timm-deit*", "timm-swin_*", "open_clip*", "*ViT", "*Dinov2*", "*-CLIP", "*SigLIP", *SPANNED)
KEYS = tuple("open_clip-[!o]*" if glob == "open_clip*" else glob for glob in TOKENS)  # not the library's own attention
SERIES = tuple(glob for glob in TOKENS if "swin" not in glob and "diffusers" not in glob)


GATED = ("timm-vit*", "timm-deit*", "timm-swin_*", "*-timm-tower", "*s-ViT", "*Dinov2*", "*s-CLIP", "*s-SigLIP")


def noah(model: nn.Module) -> vm.NOAH:
    kinds = {s.kind for s in vm.sites(model)}
    attention = ("attn.qkv",) if "attn.qkv" in kinds else ("attn.q", "attn.k", "attn.v")
    sizes = {"tokens": (1, 2), "ranks": (1, 2), "widths": (2, 4)}
    return vm.NOAH(sites=("block", *attention, "mlp"), where=image_tower(model), **sizes)  # type: ignore[arg-type]


def prefix(model: nn.Module) -> vm.Prefix:
    kinds = tuple(dict.fromkeys(s.kind for s in vm.sites(model) if vm.Prefix.fits(s)))
    return vm.Prefix(sites=kinds, tokens=2, std=0.5, where=image_tower(model))


def image_tower(model: nn.Module) -> str:
    """A glob on the modules of the image tower, where there are two."""
    return "*vis*" if any(s.tower == "text" for s in vm.sites(model)) else "*"


def repadapter(model: nn.Module) -> vm.RepAdapter:
    """On everything that reads a norm, without biases where a layer has none."""
    sites = [s for s in vm.sites(model) if vm.RepAdapter.fits(s) and not s.whole]
    kinds = tuple(dict.fromkeys(s.kind for s in sites))
    return vm.RepAdapter(sites=kinds, rank=4, bias=all(map(has_bias, sites)))


# those whose stream goes through blocks of one width, and those that side-tuning knows the encoding of
ONE_WIDTH = ("timm-vit*", "timm-deit*", "timm-beit*", "timm-eva*", "open_clip*", "transformers*")
ENCODERS = (
    "timm-vit*", "timm-beit*", "timm-eva*", "timm-swin*", "timm-conv*", "timm-res*", "open_clip*", UNETS,
    "*-ViT", "*-Dinov2*", "*-CLIP", "*-SigLIP",
)  # fmt: skip


def bypass(model: nn.Module) -> vm.ResTuningBypass:
    kinds = {s.kind for s in vm.sites(model)}
    return vm.ResTuningBypass(sites=("decoder",) if "decoder" in kinds else ("features",), rank=4)


def dtl_plus(model: nn.Module) -> vm.DTL:
    """From the first block on: after the last of two, what is convolved reaches no class token."""
    return vm.DTL(kernel=3, start=0, where=image_tower(model))


SMALLEST = {"criterion": "magnitude", "per": "site"}


def fitting(model: nn.Module, method: type[Method], bias: bool = False) -> tuple[str, ...]:
    """Kinds all of whose sites the method takes, with a bias each where that is asked for."""
    weights = [s for s in vm.sites(model) if s.slot == "weight" and not s.whole and s.kind != "head"]
    wrong = {s.kind for s in weights if not method.fits(s) or (bias and not has_bias(s))}
    return tuple(dict.fromkeys(s.kind for s in weights if s.kind not in wrong))


# one line a method
METHODS: dict[str, Trial] = {
    "LoRA": Trial(lora),
    "Tune": Trial(tune),
    "AdaptFormer": Trial(lambda m: vm.AdaptFormer(sites=("*attn", "mlp"), rank=4), TRANSFORMERS),
    "Houlsby": Trial(lambda m: vm.Houlsby(sites=("*attn", "mlp"), rank=4, std=0.1), TRANSFORMERS),
    "Pfeiffer": Trial(lambda m: vm.Pfeiffer(sites=("*attn", "mlp"), rank=4), TRANSFORMERS),
    "AdapterPlus": Trial(lambda m: vm.AdapterPlus(rank=4), (*OTHERS, *SPANNED)),
    "Convpass": Trial(lambda m: vm.Convpass(rank=4, where=image_tower(m)), GRIDS),
    "RepAdapter": Trial(repadapter, TRANSFORMERS),
    "VPT": Trial(lambda m: vm.VPT(tokens=2, where=image_tower(m)), TOKENS),
    "VPTshallow": Trial(lambda m: vm.VPT(sites=("tokens",), tokens=2), SERIES),
    "Prefix": Trial(prefix, KEYS),
    "UniPELT": Trial(lambda m: vm.UniPELT(tokens=2, rank=2, width=4, std=0.5, where=image_tower(m)), GATED),
    "NOAH": Trial(noah, TOKENS),
    "LoHa": Trial(lambda m: vm.LoHa(sites=offered(m, LORA_KINDS), rank=2, alpha=3.0)),
    "LoKr": Trial(lambda m: vm.LoKr(sites=offered(m, LORA_KINDS), rank=2, alpha=3.0)),
    "FacT": Trial(lambda m: vm.FacT(sites=fitting(m, vm.FacT), rank=2, tucker=True)),
    "OFT": Trial(lambda m: vm.OFT(sites=offered(m, LORA_KINDS), block_size=8)),
    "BOFT": Trial(lambda m: vm.BOFT(sites=offered(m, FACT_KINDS), block_size=4, side="out", rescale=True)),
    "SideTuning": Trial(lambda m: vm.SideTuning(), ENCODERS),
    "Ladder": Trial(lambda m: vm.Ladder(reduction=2, head=4), ONE_WIDTH),
    "ResTuningBypass": Trial(bypass, (*ONE_WIDTH, UNETS)),
    "DTL": Trial(lambda m: vm.DTL(), (*TRANSFORMERS[:-1], UNETS, "timm-conv*")),
    "DTL+": Trial(dtl_plus, (*GRIDS, "*swin*", "*-conv*", UNETS)),
    "DoRA": Trial(lambda m: vm.DoRA(sites=fitting(m, vm.DoRA), rank=2, alpha=3.0)),
    "PiSSA": Trial(lambda m: vm.PiSSA(sites=offered(m, LORA_KINDS), rank=2, alpha=3.0)),
    "VeRA": Trial(lambda m: vm.VeRA(sites=offered(m, LORA_KINDS), rank=4, d=1.0)),
    "AdaLoRA": Trial(lambda m: vm.AdaLoRA(sites=offered(m, LORA_KINDS), rank=3, target=2)),
    "DyLoRA": Trial(lambda m: vm.DyLoRA(sites=offered(m, LORA_KINDS), rank=3)),
    "IA3": Trial(lambda m: vm.IA3(sites=fitting(m, vm.IA3))),
    "SSF": Trial(
        lambda m: vm.SSF(sites=fitting(m, vm.SSF, bias=True)), (*OTHERS, UNETS), ("*:k.shift", "*k_proj.shift")
    ),
    "BitFit": Trial(lambda m: vm.BitFit(), idle=("*k_proj.bias.value",)),
    "NormTuning": Trial(lambda m: vm.NormTuning(), (*OTHERS, "diffusers-[!P]*")),
    "CrossAttention": Trial(lambda m: vm.CrossAttention(), SPANNED),
    "LinearProbe": Trial(lambda m: vm.LinearProbe(), ("timm*", "*-ViT", "*-Dinov2")),
    "SparseMask": Trial(lambda m: vm.SparseMask(sites=offered(m, LORA_KINDS), density=0.05, **SMALLEST)),
}

METHODS |= {  # by a condition
    "T2IAdapter": Trial(lambda m: vm.T2IAdapter(factor=2, blocks=1), (UNETS,), condition=(2, 1, 16, 16)),
    "IPAdapter": Trial(lambda m: vm.IPAdapter(width=10, tokens=2), SPANNED, condition=(2, 10)),
}

METHODS |= {  # on text encoders alone; these ids are in the texts that they are given
    "TextualInversion": Trial(
        lambda m: vm.TextualInversion(words=("sks",), vectors=(2,), ids=(18, 35)),
        ("transformers-CLIP*", "transformers-SigLIP"),
    ),
}

METHODS |= {  # on classifiers alone
    "CoOp": Trial(lambda m: vm.CoOp(tokens=2), ("classifier*",)),
    "CoOpPerClass": Trial(lambda m: vm.CoOp(words="a photo", per_class=True), ("classifier*",)),
    "CoCoOp": Trial(lambda m: vm.CoCoOp(reduction=2), ("classifier*",)),
    "MaPLe": Trial(lambda m: vm.MaPLe(depth=2), ("classifier*",)),
    "IVLP": Trial(lambda m: vm.IVLP(), ("classifier*",)),
    "PromptSRC": Trial(lambda m: vm.PromptSRC(depth=2), ("classifier*",)),
    "CLIPAdapter": Trial(lambda m: vm.CLIPAdapter(reduction=2), ("classifier*",)),
    "TipAdapterF": Trial(lambda m: vm.TipAdapter(train_keys=True, shots=2), ("classifier*",)),
}

# LoRA and Tune, one of each port, go over every model; the other methods over those that differ in kind
EVERYWHERE = ("LoRA", "Tune")
REPRESENTATIVES = (
    "timm-vit_tiny_patch16_224", "timm-vit_small_patch14_reg4_dinov2", "timm-swin_tiny_patch4_window7_224",
    "timm-eva02_tiny_patch14_224", "open_clip-CLIP", "transformers-ViT", "transformers-CLIP", "diffusers-SD1.5",
)  # fmt: skip


def claims(name: str, case: Case) -> bool:
    """Whether a method claims a model; of classifiers it has to say so, or to go over every model."""
    globs = METHODS[name].claims
    says_so = case not in CLASSIFIERS or name in EVERYWHERE or "*" not in globs
    return says_so and any(fnmatchcase(case.name, glob) for glob in globs)


def pairs(names: Sequence[str] = ()) -> list[tuple[Case, str]]:
    """Every model and method that the matrix is to try, or those of some methods."""
    return [
        (case, name)
        for name in names or METHODS
        for case in CASES
        if claims(name, case) and (name in EVERYWHERE or case.name in REPRESENTATIVES or case in CLASSIFIERS)
    ]


def left_out() -> list[tuple[Case, str]]:
    """What is claimed beside that: models that differ from those of the matrix in size and detail only."""
    tried = {(case.name, name) for case, name in pairs()}
    return [(c, name) for name in METHODS for c in CASES if claims(name, c) and (c.name, name) not in tried]


def adapt(model: nn.Module, trial: str, **options: Any) -> vm.Adapter:
    """A method of the matrix on a model."""
    return condition(vm.adapt(model, METHODS[trial].make(model), **options), trial)


def condition(adapter: vm.Adapter, trial: str) -> vm.Adapter:
    """The adapter, with what its method needs beside the model's input."""
    if METHODS[trial].condition:
        adapter.condition = fixed(*METHODS[trial].condition)
    return adapter


def shake(adapter: vm.Adapter, size: float = 0.05) -> None:
    """Move every tensor of the adapter away from its initial value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))


def close(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    """Within `bound` of each other, relative to the largest value."""
    return bool((a - b).abs().max() <= bound * b.abs().max())
