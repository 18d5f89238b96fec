"""T2I-Adapter: a map such as edges or depth steers a UNet (Mou et al. 2023, arXiv 2302.08453).

    F_1 = B_1(conv(unshuffle(x))),  F_{i+1} = B_{i+1}(pool(F_i))        x: b channels H W, F_i: b c_i h_i w_i
    B(z) = R_2(R_1(P z)),  R(z) = z + conv1x1(relu(conv3x3(z)))         P: 1 x 1, where the channels change
    x_i <- x_i + s F_i                                                  x_i: after the UNet's i-th block downwards,
                                                                        before it is halved

The map is the adapter's `condition`, its values in [0, 1]; pixel-unshuffling by `factor` brings it to the size of the
latents, an average over 2 x 2 to each further one. s is `adapter.scale`. What is added goes into the skip connections
too. As in the official code: two residual blocks a level, PyTorch's own initial values (so the output does not begin at
the base's), no time steps, and the same F in all rows of guidance, those that it leads away from included.

The paper draws high noise levels more often in training; that is the loop's to do. F does not depend on the noise
level, yet it is computed anew for each here. SDXL's variant, which halves the map at other places, and the light one
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Condition, Method, SpanModule
from vismodal.methods.blocks import taps
from vismodal.methods.initial import built
from vismodal.site import Site


class Residual(nn.Module):
    """R: z + conv1x1(relu(conv3x3(z)))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = z + self.conv2(F.relu(self.conv1(z)))
        return out


class Pyramid(nn.Module):
    """A map as features of each resolution: b channels H W -> b c_i h_i w_i."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int, factor: int):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels * factor**2, widths[0], 3, padding=1)
        before = (widths[0], *widths)
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(old, new, 1) if old != new else nn.Identity(), *(Residual(new) for _ in range(blocks))
            )
            for old, new in zip(before, widths, strict=False)
        )

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        z = self.conv(F.pixel_unshuffle(x.to(self.conv.weight.dtype), self.factor))
        for i, level in enumerate(self.levels):
            z = level(F.avg_pool2d(z, 2, ceil_mode=True) if i else z)
            yield z


class Steering(SpanModule):
    """F_i, computed where the UNet begins, is kept under the name of the tap where it is added."""

    def __init__(self, site: Site, channels: int, blocks: int, factor: int):
        super().__init__()
        self.names = taps(site, "block")
        widths = [site.widths[name] for name in self.names]
        self.pyramid = built(lambda: Pyramid(channels, widths, blocks, factor), site.device)

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        given, want = context["condition"].shape[2:], [side * self.pyramid.factor for side in x.shape[2:]]
        if list(given) != want:
            sizes = f"{given[0]} x {given[1]} pixels, the picture {want[0]} x {want[1]}"
            raise InputError(f"T2IAdapter: the map has {sizes}; resize the map")
        context |= zip(self.names, self.pyramid(context["condition"]), strict=True)
        return x

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        return y + context[name].to(y.dtype)


@dataclass(frozen=True, kw_only=True, repr=False)
class T2IAdapter(Method):
    """T2I-Adapter, arXiv 2302.08453: `adapter.condition` are maps, rows x channels x height x width in pixels.

    Args:
        channels: of the map: 1 for edges or depth, 3 for colours.
        blocks: residual blocks of each resolution.
        factor: pixels a side of what is one latent.
    """

    sites: tuple[str, ...] = ("encoder",)
    channels: int = 1
    blocks: int = 2
    factor: int = 8

    survey: ClassVar[str] = "additive: adapters"
    paper: ClassVar[str] = "arXiv 2302.08453"
    mergeable: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False
    conditioned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.blocks < 1 or self.factor < 1:
            raise InputError(f"{self!r}: channels, blocks and factor must be at least 1")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind == "encoder"

    def condition(self, rows: Tensor) -> Condition:
        if rows.dim() != 4 or rows.shape[1] != self.channels or not rows.is_floating_point():
            raise InputError(
                f"T2IAdapter(channels={self.channels}) takes maps, rows x {self.channels} x height x width, not "
                f"{'x'.join(map(str, rows.shape))} of {rows.dtype}"
            )
        return Condition(rows, rows)

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"T2IAdapter steers a UNet on its way down ('encoder'); {site.key} is {site.kind!r}")
        return Built(tuple(Steering(site, self.channels, self.blocks, self.factor) for site in sites))
