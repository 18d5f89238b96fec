"""What training must know of each architecture, one class each; everything else is alike for all of them.

A `Kind` turns prompts into arguments of the denoiser, adds to them what the picture's frame and the latents' shape ask
for, and names the parts of diffusers' pipeline. Latents are maps, B x c x h x w, everywhere outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from vismodal.errors import InputError

Texts = dict[str, Tensor]  # what prompts become, by the names of the denoiser's arguments; one row a prompt


class Pipe(Protocol):
    """What is used of diffusers' pipelines, which their own types do not tell."""

    unet: Any
    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    image_processor: Any
    vae_scale_factor: int
    default_sample_size: int

    @property
    def config(self) -> Any: ...

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any: ...
    def set_progress_bar_config(self, **kwargs: Any) -> None: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Frame:
    """Where a training square comes from; all are (height, width) in pixels.

    Args:
        original: size of the picture as it was found.
        corner: top left corner of the square, in the picture as it is after resizing (and mirroring).
        target: size of the square.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


class Kind:
    """Stable Diffusion 1 and 2 (arXiv 2112.10752): a UNet that reads one text encoder. The others differ from it."""

    denoiser: ClassVar[str] = "unet"
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    optional: ClassVar[tuple[str, ...]] = ()  # encoders that a model may come without
    trainable: ClassVar[tuple[str, ...]] = ("text_encoder",)  # encoders that LoRA may go on
    layers: ClassVar[Mapping[str, slice]] = {}  # the blocks of an encoder that are read, where those are not all
    tokens: Mapping[str, int] = {}  # how many tokens an encoder is given, where not as many as its tokenizer says
    guidance: ClassVar[float] = 7.5  # the pipeline's own
    loading: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}
    calling: ClassVar[Mapping[str, Any]] = {}  # what the pipeline is told beside prompt, seed, size, steps and guidance
    lora_files: ClassVar[bool] = True  # whether the pipeline has `load_lora_weights`

    # -- parts ---------------------------------------------------------------------------------------------------

    def model(self, pipe: Pipe) -> Any:
        """The denoiser."""
        return getattr(pipe, self.denoiser)

    def readers(self, pipe: Pipe) -> dict[str, Any]:
        """The text encoders that are there, by name."""
        found = {name: getattr(pipe, name) for name in self.encoders}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def modules(self, pipe: Pipe) -> list[nn.Module]:
        return [self.model(pipe), pipe.vae, *self.readers(pipe).values()]

    def channels(self, pipe: Pipe) -> int:
        """Channels of the latents that the denoiser is made for."""
        return int(self.model(pipe).config.in_channels)

    def patch(self, pipe: Pipe) -> int:
        """Side of the squares of latents that are one token of the denoiser; 1 for a UNet."""
        return int(self.model(pipe).config.get("patch_size") or 1)

    def grid(self, pipe: Pipe) -> int:
        """Pixels of which the sides of pictures of any shape are multiples, for all of a UNet's floors to be whole."""
        floors = len(self.model(pipe).config.get("block_out_channels") or (0,)) - 1
        return pipe.vae_scale_factor * self.patch(pipe) * int(2**floors)

    def native(self, pipe: Pipe) -> int:
        """Side in pixels of the square images that the model was made for."""
        return int(self.model(pipe).config.sample_size) * pipe.vae_scale_factor

    # -- what the denoiser is given ------------------------------------------------------------------------------

    def encode(self, pipe: Pipe, prompts: Sequence[str]) -> Texts:
        """One row a prompt, as the pipeline itself encodes them. Carries gradients to the text encoders."""
        return {"encoder_hidden_states": self._encoded(pipe, prompts, do_classifier_free_guidance=False)[0]}

    def _encoded(self, pipe: Pipe, prompts: Sequence[str], **options: Any) -> Any:
        device = self.model(pipe).device
        return pipe.encode_prompt(prompt=list(prompts), device=device, num_images_per_prompt=1, **options)

    def predict(self, pipe: Pipe, noisy: Tensor, time: Tensor, texts: Texts, frames: Sequence[Frame]) -> Tensor:
        """What the denoiser says of noisy latents, both B x c x h x w; `time` (B,) runs from 0 to 1000."""
        model = self.model(pipe)
        given = {**texts, **self.framed(pipe, texts, frames)}
        predicted: Tensor = model(noisy.to(model.dtype), timestep=time, **given).sample
        return predicted

    def framed(self, pipe: Pipe, texts: Texts, frames: Sequence[Frame]) -> dict[str, Any]:
        """The denoiser's arguments that hang on the pictures' frames; they go over `texts`."""
        return {}

    def unpack(self, pipe: Pipe, latents: Tensor, size: int) -> Tensor:
        """The latents of square images of `size` pixels, as the pipeline gives them, as maps."""
        return latents


class XL(Kind):
    """Stable Diffusion XL (arXiv 2307.01952, section 2.2): two text encoders, and the picture's size and crop."""

    encoders = ("text_encoder", "text_encoder_2")
    trainable = encoders
    layers: ClassVar[Mapping[str, slice]] = {"text_encoder": slice(None, -1)}  # read before its last block
    guidance = 5.0
    loading: ClassVar[Mapping[str, Any]] = {}

    def encode(self, pipe: Pipe, prompts: Sequence[str]) -> Texts:
        hidden, _, pooled, _ = self._encoded(pipe, prompts, do_classifier_free_guidance=False)
        if "" in prompts and pipe.config.force_zeros_for_empty_prompt:  # what guidance leads away from
            said = torch.tensor([bool(prompt) for prompt in prompts]).to(hidden)
            hidden, pooled = hidden * said[:, None, None], pooled * said[:, None]
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def predict(self, pipe: Pipe, noisy: Tensor, time: Tensor, texts: Texts, frames: Sequence[Frame]) -> Tensor:
        hidden = {"encoder_hidden_states": texts["encoder_hidden_states"]}
        model = self.model(pipe)
        added = {"text_embeds": texts["text_embeds"], "time_ids": time_ids(frames).to(noisy.device)}
        predicted: Tensor = model(noisy.to(model.dtype), timestep=time, **hidden, added_cond_kwargs=added).sample
        return predicted


def time_ids(frames: Sequence[Frame]) -> Tensor:
    """B x 6: original height and width, top and left of the crop, target height and width of each sample.

    In fp32: half precision would round sizes.
    """
    return torch.tensor([[*f.original, *f.corner, *f.target] for f in frames], dtype=torch.float32)


class SD3(Kind):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206): two CLIPs and, where it is there, T5."""

    denoiser = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    trainable = ("text_encoder", "text_encoder_2")
    tokens: Mapping[str, int] = {"text_encoder_3": 256}
    guidance = 7.0
    loading: ClassVar[Mapping[str, Any]] = {}

    def encode(self, pipe: Pipe, prompts: Sequence[str]) -> Texts:
        same = {"prompt_2": None, "prompt_3": None}
        hidden, _, pooled, _ = self._encoded(pipe, prompts, do_classifier_free_guidance=False, **same)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


class Flux(Kind):
    """Flux.1: tokens of 2 x 2 latents with places of their own; T5 for the words, CLIP for the whole."""

    denoiser = "transformer"
    encoders = ("text_encoder", "text_encoder_2")
    tokens: Mapping[str, int] = {"text_encoder_2": 512}
    guidance = 3.5
    loading: ClassVar[Mapping[str, Any]] = {}
    # a model that is told its guidance was distilled with it; at 1 it is the undistilled one, which is what data fit
    told: ClassVar[float] = 1.0

    def channels(self, pipe: Pipe) -> int:
        return super().channels(pipe) // 4

    def patch(self, pipe: Pipe) -> int:
        return 2

    def native(self, pipe: Pipe) -> int:
        return int(pipe.default_sample_size) * pipe.vae_scale_factor

    def encode(self, pipe: Pipe, prompts: Sequence[str]) -> Texts:
        hidden, pooled, _ = self._encoded(pipe, prompts, prompt_2=None)
        return {"encoder_hidden_states": hidden, "pooled_projections": pooled}

    def predict(self, pipe: Pipe, noisy: Tensor, time: Tensor, texts: Texts, frames: Sequence[Frame]) -> Tensor:
        model = self.model(pipe)
        height, width = noisy.shape[-2:]
        told = torch.full((len(noisy),), self.told, device=noisy.device) if model.config.guidance_embeds else None
        words = texts["encoder_hidden_states"].shape[1]
        predicted = model(
            pack(noisy.to(model.dtype)),
            timestep=time / 1000,
            guidance=told,
            img_ids=places(height // 2, width // 2).to(noisy.device),
            txt_ids=torch.zeros(words, 3, device=noisy.device),
            **texts,
        ).sample
        return unpack(predicted, height, width)

    def unpack(self, pipe: Pipe, latents: Tensor, size: int) -> Tensor:
        side = size // pipe.vae_scale_factor
        return unpack(latents, side, side)


def pack(latents: Tensor) -> Tensor:
    """B x c x h x w -> B x (h/2 w/2) x 4c: a token is a square of 2 x 2, its channels in the order c, row, column."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """`pack` backwards, to latents of height x width."""
    b, _, c = tokens.shape
    squares = tokens.view(b, height // 2, width // 2, c // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def places(rows: int, columns: int) -> Tensor:
    """(rows columns) x 3: zero, row and column of each token, for its rotary embedding."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).reshape(-1, 3).float()


class PixArt(Kind):
    """PixArt-alpha and -sigma (arXiv 2310.00426, 2403.04692): T5 alone, and the size where the model asks for it.

    Its pipelines have no `load_lora_weights`, and T5 has no sites: the transformer alone is trained.
    """

    denoiser = "transformer"
    trainable = ()
    guidance = 4.5
    loading: ClassVar[Mapping[str, Any]] = {}
    # sizes and captions are as they were given, in training and sampling alike
    calling: ClassVar[Mapping[str, Any]] = {"use_resolution_binning": False, "clean_caption": False}
    lora_files = False

    def __init__(self, tokens: int) -> None:
        self.tokens = {"text_encoder": tokens}

    def encode(self, pipe: Pipe, prompts: Sequence[str]) -> Texts:
        hidden, mask, _, _ = self._encoded(pipe, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}

    def framed(self, pipe: Pipe, texts: Texts, frames: Sequence[Frame]) -> dict[str, Any]:
        """Resolution and aspect ratio of the training square, as the pipeline gives those of the image it makes."""
        if not pipe.transformer.use_additional_conditions:
            return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        like = texts["encoder_hidden_states"]
        size = torch.tensor([frame.target for frame in frames]).to(like)  # B 2
        return {"added_cond_kwargs": {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}}

    def predict(self, pipe: Pipe, noisy: Tensor, time: Tensor, texts: Texts, frames: Sequence[Frame]) -> Tensor:
        predicted = super().predict(pipe, noisy, time, texts, frames)
        return predicted[:, : noisy.shape[1]]  # the channels behind are a variance that the loss leaves alone


KINDS: Mapping[str, Kind] = {
    "StableDiffusionPipeline": Kind(),
    "StableDiffusionXLPipeline": XL(),
    "StableDiffusion3Pipeline": SD3(),
    "FluxPipeline": Flux(),
    "PixArtAlphaPipeline": PixArt(tokens=120),
    "PixArtSigmaPipeline": PixArt(tokens=300),
}


def kind_of(pipe: Pipe) -> Kind:
    """The kind of a pipeline, by its class. Raises `InputError` naming the classes that there are."""
    return kind_named(type(pipe).__name__, type(pipe).__name__)


def kind_named(pipeline: str, model: str) -> Kind:
    """The kind of the pipeline class of that name; `model` is what the error calls it."""
    if pipeline not in KINDS:
        raise InputError(f"{model} is a {pipeline}; what can be trained here: {', '.join(KINDS)}")
    return KINDS[pipeline]
