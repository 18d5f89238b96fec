"""What the `update` of several methods needs of a called layer: its sizes, the axis of its channels, B A without W'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.errors import InputError
from vismodal.methods.base import Part
from vismodal.quantised import is_quantised
from vismodal.site import Site

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
# a subclass with a forward of its own may read W otherwise (timm's weight-standardised convolutions): it is shadowed
PLAIN = {nn.Linear.forward, nn.Embedding.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward}


def is_matrix(site: Site) -> bool:
    """Whether the site is a weight of two axes or more that can be computed with."""
    return site.slot == "weight" and site.tensor.dim() >= 2 and site.tensor.is_floating_point()


def matrix(method: str, site: Site) -> Tensor:
    """The weight of a site. Raises `InputError` where it is none that `is_matrix` takes."""
    if not is_matrix(site):
        raise InputError(f"{method} needs a floating-point matrix, which {site.key} ({site.kind}) is not")
    return site.tensor


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's output is a product with its weight, or rows of it, and nothing else."""
    return type(layer).forward in PLAIN and getattr(layer, "max_norm", None) is None


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of the layer's weight, from its attributes: a quantised weight may be packed."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    assert isinstance(layer, Conv)
    return layer.out_channels, layer.in_channels // layer.groups


def channel_axis(layer: nn.Module, y: Tensor) -> int:
    """The axis of channels in the input or output of a layer."""
    return y.dim() - 1 - (len(layer.kernel_size) if isinstance(layer, Conv) else 0)


def columns_of(layer: nn.Module, part: Part, x: Tensor) -> Tensor:
    """The input channels that a part acts on."""
    if part.range is None or part.axis == 0:
        return x
    return x.narrow(channel_axis(layer, x), part.range[0], part.range[1] - part.range[0])


def add_rows(layer: nn.Module, part: Part, y: Tensor, change: Tensor) -> Tensor:
    """y + change, which holds the output channels of a part."""
    if part.range is not None and part.axis == 0:
        rows, axis = sizes(layer)[0], channel_axis(layer, y)
        change = F.pad(change, (0, 0) * (y.dim() - 1 - axis) + (part.range[0], rows - part.range[1]))
    return y + change.to(y.dtype)


def is_quantised_linear(layer: nn.Module) -> bool:
    """Whether the layer is a linear one that multiplies by quantised values: no other weight can be formed of them."""
    return type(layer).forward is nn.Linear.forward and is_quantised(cast(Tensor, layer.weight))


def multiply(layer: nn.Module, part: Part, z: Tensor) -> Tensor:
    """W z: ... rows, over the rows of a part of a linear layer, as its weight's own class computes it."""
    W = cast(Tensor, layer.weight)
    return F.linear(z, W if part.range is None else W[slice(*part.range)])


def stack(
    layer: nn.Module, parts: Sequence[Part], factors: Sequence[tuple[Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor, float]:
    """Of each part A: r x columns, B: rows x r and a scaling -> A: sum(r) x columns, B: rows x sum(r) and one scaling
    of the whole weight: each part's factors in its range, zero elsewhere."""
    rows, columns = sizes(layer)
    scalings = {scaling for _, _, scaling in factors}
    common = scalings.pop() if len(scalings) == 1 else 1.0  # unequal ones go into B
    As: list[Tensor] = []
    Bs: list[Tensor] = []
    for (A, B, scaling), (_, range_, axis) in zip(factors, parts, strict=True):
        B = B if scaling == common else scaling * B
        if range_ is not None and axis == 0:
            B = F.pad(B, (0, 0, range_[0], rows - range_[1]))
        elif range_ is not None:
            A = F.pad(A, (0, 0) * (A.dim() - 2) + (range_[0], columns - range_[1]))
        As.append(A)
        Bs.append(B)
    return (As[0], Bs[0], common) if len(parts) == 1 else (torch.cat(As), torch.cat(Bs, 1), common)


def down(layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
    """A x, for no embedding; a convolution keeps its stride, padding and dilation, and has one A for all groups."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, A.to(x.dtype))  # ... r
    assert isinstance(layer, Conv)
    return layer._conv_forward(x, A.to(x.dtype).repeat(layer.groups, *[1] * (A.dim() - 1)), None)


def up(layer: nn.Module, y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y + scaling B h."""
    if isinstance(layer, nn.Linear):  # added to y in the same pass that multiplies by B
        y2, h2 = y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1])
        return torch.addmm(y2, h2, B.to(h.dtype).t(), alpha=scaling).view(y.shape)
    assert isinstance(layer, Conv)
    n = len(layer.kernel_size)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]
    return y + conv(h, (scaling * B).to(h.dtype).view(*B.shape, *[1] * n), groups=layer.groups)


def add_product(layer: nn.Module, x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y of the layer for input x -> that with W + scaling B A."""
    if isinstance(layer, nn.Embedding):
        return y + scaling * (F.embedding(x, B) @ A).to(y.dtype)
    return up(layer, y, down(layer, x, A), B, scaling)
