"""Tiny random Stable Diffusion pipelines with the real classes, 16 pixels wide, for the diffusion tests."""

import json
from pathlib import Path

import torch
from PIL import Image


def tiny_pipeline(folder: Path, prediction: str = "epsilon", cross: int = 16):
    """Saves a pipeline to `folder` and returns it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging
    from transformers import CLIPTextConfig, CLIPTextModel

    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer(folder / "files")
    size = len(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=cross,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        )
        special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        shape = {"hidden_size": cross, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = CLIPTextModel(CLIPTextConfig(vocab_size=size, max_position_embeddings=48, **shape, **special))
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type=prediction,
    )
    pipe = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
