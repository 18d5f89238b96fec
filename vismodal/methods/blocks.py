"""What methods that follow the stream over many blocks have in common."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vismodal.site import Site


def taps(site: Site, name: str) -> list[str]:
    """The taps of one name in the order of the forward: "block.0", "block.1", ..."""
    return [tap for tap in site.modules if tap.rpartition(".")[0] == name]


def over_all_blocks(site: Site) -> bool:
    """Whether the site goes over every block of its tower, all of one known width and of tokens."""
    blocks = taps(site, "block") if site.span is not None and site.kind == "features" else []
    return bool(blocks) and len(blocks) == site.depth and site.width > 0 and site.layout is not None


def along(x: Tensor, W: Tensor, b: Tensor | None = None, axis: int = -1) -> Tensor:
    """W x + b on the channels, which lie last or on axis 1 of a map; in the dtype of x."""
    W, b = W.to(x.dtype), None if b is None else b.to(x.dtype)
    return F.linear(x, W, b) if axis == -1 else F.conv2d(x, W[:, :, None, None], b)
