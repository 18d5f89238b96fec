"""Tiny random pipelines of every kind with the real classes, 16 pixels wide, for the diffusion tests."""

import json
from pathlib import Path

import torch
from PIL import Image

KINDS = ("sdxl", "sd3", "flux", "pixart", "sigma")
TEXT = 24  # width of T5


FLOW_VAE = {"shift_factor": 0.1, "scaling_factor": 1.5, "use_quant_conv": False, "use_post_quant_conv": False}


def tiny_pipeline(folder: Path, prediction: str = "epsilon", cross: int = 16, **scheduler):
    """Saves a Stable Diffusion pipeline to `folder` and returns it; `scheduler` are further settings of its noise."""
    from diffusers import StableDiffusionPipeline

    tokenizer = tiny_tokenizer(folder / "files")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae, text = tiny_unet(cross_attention_dim=cross), tiny_vae(), tiny_clip(tokenizer, cross)
    noise = tiny_ddim(prediction_type=prediction, **scheduler)
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, noise, None, None, requires_safety_checker=False)
    return _saved(pipe, folder)


def tiny_kind(kind: str, folder: Path):
    """Saves a pipeline of one of `KINDS` to `folder` and returns it."""
    clip, t5 = tiny_tokenizer(folder / "files"), tiny_t5_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        match kind:
            case "sdxl":
                pipe = _sdxl(clip)
            case "sd3":
                pipe = _sd3(clip, t5)
            case "flux":
                pipe = _flux(clip, t5)
            case "pixart" | "sigma":
                pipe = _pixart(t5, kind == "sigma")
    return _saved(pipe, folder)


def _sdxl(clip):
    from diffusers import StableDiffusionXLPipeline

    sizes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20}
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(clip, 16),
        text_encoder_2=tiny_clip(clip, 24, projected=20),
        tokenizer=clip,
        tokenizer_2=clip,
        unet=tiny_unet(cross_attention_dim=16 + 24, addition_embed_type="text_time", **sizes),
        scheduler=tiny_ddim(),
    )


def _sd3(clip, t5):
    """With the norms and the second attention that 3.5 has and 3 has not."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
    text = {"caption_projection_dim": 24, "joint_attention_dim": TEXT, "pooled_projection_dim": 8 + 12}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**sizes, **heads, **text),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(**FLOW_VAE),
        text_encoder=tiny_clip(clip, 8, projected=8),
        tokenizer=clip,
        text_encoder_2=tiny_clip(clip, 12, projected=12),
        tokenizer_2=clip,
        text_encoder_3=tiny_t5(t5),
        tokenizer_3=t5,
    )


def _flux(clip, t5):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "axes_dims_rope": (4, 2, 2)}
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    text = {"joint_attention_dim": TEXT, "pooled_projection_dim": 16}
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**sizes, **heads, **text),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(**FLOW_VAE),
        text_encoder=tiny_clip(clip, 16),
        tokenizer=clip,
        text_encoder_2=tiny_t5(t5),
        tokenizer_2=t5,
    )


def _pixart(t5, sigma: bool):
    """Alpha's is of 128 latents a side, the size by which its pipeline tells that sizes are asked for."""
    from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

    sizes = {"sample_size": 8 if sigma else 128, "num_layers": 2, "attention_head_dim": 12, "num_attention_heads": 2}
    return (PixArtSigmaPipeline if sigma else PixArtAlphaPipeline)(
        tokenizer=t5,
        text_encoder=tiny_t5(t5),
        vae=tiny_vae(),
        transformer=PixArtTransformer2DModel(**sizes, cross_attention_dim=24, caption_channels=TEXT),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),  # the real one's warns of numpy
    )


def _saved(pipe, folder: Path):
    from diffusers.utils import logging

    logging.disable_progress_bar()
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **options,
    )


def tiny_vae(**options):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def tiny_ddim(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False, **options
    )


def tiny_clip(tokenizer, width: int, projected: int = 0):
    """CLIP's text tower, with its projection where one is asked for."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    size = len(tokenizer)
    special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    shape = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=size, max_position_embeddings=48, **shape, **special)
    if not projected:
        return CLIPTextModel(config)
    config.projection_dim = projected
    return CLIPTextModelWithProjection(config)


def tiny_t5(tokenizer):
    """T5's encoder, as version 1.1 has it."""
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": TEXT, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), **shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    return T5EncoderModel(config).eval()


def tiny_t5_tokenizer():
    """T5's tokenizer over single characters."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((chr(code), -3.0) for code in range(33, 127))], extra_ids=0)


def tiny_tokenizer(folder: Path):
    """CLIP's tokenizer over single characters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=48)


def photo_folder(folder: Path, count: int = 3, **captions: str) -> Path:
    """Pictures 1.png, 2.png, ... of differing colours and shapes; `captions` by number: p1="..."."""
    folder.mkdir(parents=True)
    for i in range(1, count + 1):
        image = Image.effect_noise((20 + 4 * i, 24), 60).convert("RGB")
        image.paste((60 * i % 256, 200 - 40 * i, 90), (2, 2, 10 + i, 12))
        image.save(folder / f"{i}.png")
    for name, text in captions.items():
        (folder / f"{name[1:]}.txt").write_text(text)
    return folder
