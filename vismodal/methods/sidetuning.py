"""Side-tuning: a whole small network beside the base (Zhang et al. 2019, arXiv 1912.13503).

    y <- sigma(a) y + (1 - sigma(a)) side(x)        x: the model's own input, y: b c, or b n c, or b c h w

x is a picture and y what the base's head or projection reads: the encoding, before a task's own head, which `Tune`
trains beside it. Where y is tokens (transformers' ViT and DINOv2), side(x) is blended into each. The base has no graph
at all. With a = 0, as in the official code, base and side count half and half.

The side is a convolutional network (`fcn4`, the official one for small pictures, with a linear layer to the base's
width), a timm model, or a copy of a timm base (`copy`), pruned of all but its first blocks if asked. The paper also
begins with a side that was distilled from the base: train one and load its weights into the module's `side`.

On a UNet x are the noisy latents and y the prediction; `fcn4` keeps their size there. It sees neither time step nor
text, which reach a UNet beside its input, so it can correct what is common to all of them; a large `alpha` begins near
the base. Texts are left out: a side for them is none of timm's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.fingerprint import BANK
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.quantised import values
from vismodal.site import Site

FCN4 = ((16, 1), (16, 2), (32, 2), (64, 1))  # channels and stride; the last one has no norm


class Blend(SpanModule):
    """Keeps the model's input, and blends the side's output into the model's."""

    def __init__(self, side: nn.Module, alpha: float, device: torch.device | None):
        super().__init__()
        self.side = side.to(device=device, dtype=torch.float32).requires_grad_(True)
        # one row, since FSDP2 takes no scalars
        self.alpha = nn.Parameter(torch.tensor([alpha], device="cpu", dtype=torch.float32).to(device))

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        context["x"] = x
        return x

    def exit(self, y: Tensor, context: dict[str, Any]) -> Tensor:
        x = context["x"]
        z = self.side(x.to(next(self.side.parameters()).dtype)).to(y.dtype)
        if z.dim() == 2 and y.dim() == 3:
            z = z[:, None]
        weight = torch.sigmoid(self.alpha).to(y.dtype)
        return weight * y + (1 - weight) * z


def fcn4(channels: int, width: int, dense: bool) -> nn.Sequential:
    """b channels h w -> b width; or, dense, -> b width h w."""
    layers: list[nn.Module] = []
    for i, (out, stride) in enumerate(FCN4):
        padding = 1 if dense or i == 0 else 0
        layers.append(nn.Conv2d(channels, out, 3, 1 if dense else stride, padding, bias=False))
        layers += [nn.GroupNorm(2, out), nn.ReLU()] if i < len(FCN4) - 1 else [nn.ReLU()]
        channels = out
    end = (
        [nn.Conv2d(channels, width, 1)]
        if dense
        else [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, width)]
    )
    return nn.Sequential(*layers, *end)


@dataclass(frozen=True, kw_only=True, repr=False)
class SideTuning(Method):
    """Side-tuning, arXiv 1912.13503.

    Args:
        side: "fcn4", the name of a timm model, or "copy" of a base that is a timm model.
        blocks: how many of its first blocks a copy keeps; all of them by default.
        pretrained: begin with timm's weights for the model named.
        config: arguments of `timm.create_model`, such as {"img_size": 32}.
        alpha: a at the start; sigma(a) is the base's share.
    """

    sites: tuple[str, ...] = ("model",)
    side: str = "fcn4"
    blocks: int | None = None
    pretrained: bool = False
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    alpha: float = 0.0

    survey: ClassVar[str] = "efficiency: memory"
    paper: ClassVar[str] = "arXiv 1912.13503"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and (self.side != "copy" or self.blocks < 1):
            raise InputError(f"SideTuning: blocks={self.blocks} says how many of its blocks side='copy' keeps")
        if (self.pretrained or self.config) and self.side in ("fcn4", "copy"):
            raise InputError(f"SideTuning: pretrained and config are for timm models, not for side={self.side!r}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "model" and site.width > 0

    def build(self, sites: Sequence[Site]) -> Built:
        return Built(tuple(self._module(site) for site in sites))

    def _module(self, site: Site) -> Blend:
        if not self.fits(site):
            raise InputError(f"SideTuning goes around a whole model ('model'); {site.key} is of {site.kind!r}")
        with torch.device("meta" if site.device is not None and site.device.type == "meta" else "cpu"):
            return Blend(self._side(site), self.alpha, site.device)

    def _side(self, site: Site) -> nn.Module:
        channels = next(m.in_channels for m in site.modules["enter"].modules() if isinstance(m, nn.Conv2d))
        dense = site.span is not None and site.span.channels == 1
        if self.side == "fcn4":
            return fcn4(channels, site.width, dense)
        if dense:
            raise InputError(f"SideTuning: {site.key} puts out a map, and {self.side!r} a vector; write side='fcn4'")
        if self.side == "copy":
            return _copy(site, self.blocks)
        import timm

        if not timm.is_model(self.side):
            raise InputError(f"SideTuning: side={self.side!r} is neither 'fcn4' nor 'copy' nor a timm model")
        return timm.create_model(
            self.side, self.pretrained, num_classes=site.width, in_chans=channels, **self.config
        )  # fmt: skip


def _copy(site: Site, blocks: int | None) -> nn.Module:
    """A timm base without its head, and without its blocks from the given one on."""
    base = site.modules.get("model")
    if base is None:
        raise InputError(f"SideTuning: only a timm model can be copied, which {site.key} is not; name one, or 'fcn4'")
    if any(BANK in m._modules for m in base.modules()):
        raise InputError("SideTuning: side='copy' needs the plain base; attach it before other adapters")
    side: Any = copy.deepcopy(base)
    side.reset_classifier(0)
    for module in side.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(values(p).detach())
    if blocks is not None:
        if not isinstance(getattr(side, "blocks", None), nn.Sequential):
            raise InputError(f"SideTuning: blocks={blocks} needs a base of one width; {type(base).__name__} has stages")
        side.blocks = side.blocks[:blocks]
    return side
