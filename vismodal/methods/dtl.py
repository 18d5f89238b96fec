"""DTL: disentangled transfer learning (Fu, Zhu and Wu 2023, arXiv 2312.07856).

    s_i = s_{i-1} + B_i A_i x_i                 x_i: the input of block i, ... x c; A_i: r x c, B_i: c x r
    x_{i+1} = block_i(x_i)                      for i < start
    x_{i+1} = block_i(x_i) + s_i sigma(beta s_i)      from block `start` on; DTL+: K * (s_i sigma(beta s_i))

The side state s gathers from every block and is written back in the later ones only, so that nothing before the first
write-back has a graph: neither its activations are kept, nor does a gradient run through it. A is Kaiming uniform with
a = sqrt(5), B zero. DTL+ (`kernel` 3) convolves what is written back with one depthwise K for all blocks, without bias;
it leaves the tokens before the patches as they are. The official code keeps the first of those only, which on a model
with two (DeiT's distillation token) loses one: here all are kept. Its beta is 100; the paper has no value for it.

In stages of unequal width (Swin, ConvNeXt) s begins at zero in each, as in the official code, and a stage that ends
before `start` gets no parameters. The official `start` is 6 of 12 blocks (ViT-B) and 14 of 24 (Swin-B, with a kernel of
5); the default is the second half of the blocks.

On a UNet, which the paper does not treat, the blocks are the residual blocks of one resolution, from the encoder over
to the decoder: s gathers from those of the encoder, and is written back in the decoder. A and B are 1 x 1 convolutions.
Encoder and middle then have no graph. Plain ResNets are left out: their stages begin with a block that changes the
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, SpanModule
from vismodal.methods.blocks import along, taps
from vismodal.methods.initial import drawn, kaiming, zeros
from vismodal.site import Layout, Site


class SideState(SpanModule):
    """The maps of one run of blocks; s after the j-th map is kept as "s.j"."""

    def __init__(self, site: Site, rank: int, beta: float, kernel: int, start: int):
        super().__init__()
        assert site.span is not None
        self.key, self.axis, self.layout, self.beta = site.key, site.span.channels, site.layout, beta
        blocks, skips = taps(site, "block"), taps(site, "skip")
        before = (skips or ["enter"]) if start < len(blocks) else []  # what is read before the first block ends
        read = before + blocks[:-1] if before else []
        self.reads = {name: j for j, name in enumerate(read)}
        self.writes = {name: len(before) + i - 1 for i, name in enumerate(blocks) if i >= start}
        c, device = site.width, site.device
        self.A = nn.ParameterList([drawn(kaiming, rank, c, device=device) for _ in read])
        self.B = nn.ParameterList([drawn(zeros, c, rank, device=device) for _ in read])
        self.K = drawn(kaiming, c, 1, kernel, kernel, device=device) if kernel and self.writes else None

    def enter(self, x: Tensor, context: dict[str, Any]) -> Tensor:
        self._read("enter", x, context)
        return x

    def tap(self, name: str, y: Tensor, context: dict[str, Any]) -> Tensor:
        if name in self.writes:
            s = context[f"s.{self.writes[name]}"]
            h = F.silu(self.beta * s) / self.beta  # s sigma(beta s), of which autograd then keeps one tensor, not two
            y = y + self._convolved(h, context["extra"]).to(y.dtype)
        self._read(name, y, context)
        return y

    def _read(self, name: str, x: Tensor, context: dict[str, Any]) -> None:
        if name in self.reads:
            j = self.reads[name]
            new = along(along(x, self.A[j], axis=self.axis), self.B[j], axis=self.axis)
            context[f"s.{j}"] = context[f"s.{j - 1}"] + new if j else new

    def _convolved(self, h: Tensor, extra: int) -> Tensor:
        if self.K is None:
            return h
        if h.dim() == 4:  # a map: b c h w, or b h w c
            return self._depthwise(h.movedim(self.axis, 1)).movedim(1, self.axis)
        layout = self.layout or Layout()
        first, patches = h.tensor_split([layout.prefix + extra], 1)
        rows, columns = layout.grid or (0, 0)
        if patches.shape[1] != rows * columns:
            raise RuntimeError(
                f"{self.key}: DTL was made to convolve {rows} x {columns} patches and got {patches.shape[1]}; give "
                "pictures of the model's own size, or set kernel=0"
            )
        patches = self._depthwise(patches.transpose(1, 2).unflatten(2, (rows, columns)))
        return torch.cat([first, patches.flatten(2).transpose(1, 2)], 1)

    def _depthwise(self, h: Tensor) -> Tensor:
        assert self.K is not None
        return F.conv2d(h, self.K.to(h.dtype), padding=self.K.shape[-1] // 2, groups=h.shape[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class DTL(Method):
    """Disentangled transfer learning, arXiv 2312.07856; DTL+ with `kernel=3`.

    Args:
        rank: r, of each block's map.
        beta: how sharply negative values of the side state are cut before they are written back.
        kernel: side of the depthwise convolution of DTL+; 0 is DTL.
        start: the block from which on the side state is written back, counted over the whole tower; by default the
            second half of the blocks. Of a UNet it counts the decoder's blocks of each resolution, by default all.
    """

    sites: tuple[str, ...] = ("features*",)
    rank: int = 2
    beta: float = 100.0
    kernel: int = 0
    start: int | None = None

    survey: ClassVar[str] = "efficiency: memory"
    paper: ClassVar[str] = "arXiv 2312.07856"
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.beta <= 0:
            raise InputError(f"DTL: rank must be at least 1 and beta above 0, not {self.rank} and {self.beta:g}")
        if self.kernel < 0 or (self.kernel and self.kernel % 2 == 0):
            raise InputError(f"DTL: kernel must be odd, or 0 for none, not {self.kernel}")
        if self.start is not None and self.start < 0:
            raise InputError(f"DTL: start must be a block's index, not {self.start}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is not None and site.kind in ("features", "features.stage") and site.width > 0

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"DTL follows the stream over blocks ('features'); {site.key} is of {site.kind!r}")
            if self.kernel and site.layout is not None and site.layout.prefix and site.layout.grid is None:
                raise InputError(
                    f"DTL: {site.key} has no grid of patches to convolve (a text, or pictures of any size); leave it "
                    "out with where=..., or set kernel=0"
                )
        modules = [SideState(s, self.rank, self.beta, self.kernel, self._start(s)) for s in sites]
        if not any(m.writes for m in modules):
            raise InputError(f"DTL: start={self.start} lies behind the last block, so nothing would be written back")
        return Built(tuple(modules))

    def _start(self, site: Site) -> int:
        """Among the blocks of the site."""
        if taps(site, "skip"):
            return self.start or 0
        first = min(s.index for s in site.within if s.index is not None)
        return max((site.depth // 2 if self.start is None else self.start) - first, 0)
