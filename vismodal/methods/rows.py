"""What scales rows of a weight, which are the output features of its layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from vismodal.methods.base import Part
from vismodal.methods.layers import channel_axis
from vismodal.site import Site

CHANNELS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
# layers whose output is, by channel, linear in the weight and the bias; subclasses may do more (norm and activation)
SCALABLE = {
    nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward,
    nn.LayerNorm.forward, nn.GroupNorm.forward, nn.modules.batchnorm._BatchNorm.forward,
}  # fmt: skip


def has_output_rows(site: Site) -> bool:
    """Whether the rows of a site are output features: so they lie in every torch layer's `weight` but an embedding's or
    a transposed convolution's, and not in bare matrices that are multiplied from the right, such as CLIP's `proj`."""
    if site.slot != "weight" or site.axis != 0 or not site.tensor.is_floating_point():
        return False
    across = isinstance(site.layer, nn.Embedding | nn.modules.conv._ConvTransposeNd)
    images = isinstance(site.layer, nn.LayerNorm) and site.tensor.dim() > 1
    return site.places[0].weight.endswith("weight") and not across and not images


def is_scalable(layer: nn.Module) -> bool:
    return type(layer).forward in SCALABLE


def over_rows(W: Tensor, v: Tensor) -> Tensor:
    """v: out, as it multiplies W: out x ..."""
    return v.to(W.dtype).view(-1, *[1] * (W.dim() - 1))


def over_output(layer: nn.Module, parts: Sequence[Part], vectors: Sequence[Tensor], y: Tensor) -> Tensor:
    """One vector for each part, zero over the other rows of the layer, as it multiplies the layer's output y."""
    axis = 1 if isinstance(layer, CHANNELS_SECOND) else channel_axis(layer, y)
    whole = [
        v if r is None else F.pad(v, (r[0], y.shape[axis] - r[1])) for v, (_, r, _) in zip(vectors, parts, strict=True)
    ]
    return sum(whole[1:], whole[0]).to(y.dtype).view(-1, *[1] * (y.dim() - 1 - axis))
