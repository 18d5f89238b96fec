"""A tiny random Stable Diffusion XL pipeline of real classes, whose UNet has every sort of block that SDXL has."""

from pathlib import Path

import torch
from tiny_diffusion import tiny_tokenizer


def tiny_sdxl(folder: Path):
    """Saves a pipeline to `folder` and returns it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer(folder / "files")
    size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 16,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
        special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPTextConfig(vocab_size=size, max_position_embeddings=48, projection_dim=16, **shape, **special)
        texts = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, set_alpha_to_one=False)
    pipe = StableDiffusionXLPipeline(vae, *texts, tokenizer, tokenizer, unet, scheduler)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe
