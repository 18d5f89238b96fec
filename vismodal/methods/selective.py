"""Presets of `Tune`: what has a name of its own among the choices of parameters to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from vismodal.errors import InputError
from vismodal.methods.base import Built
from vismodal.methods.tune import Tune
from vismodal.site import Site


@dataclass(frozen=True, kw_only=True, repr=False)
class Preset(Tune):
    """`Tune` on the kinds that the preset is about."""

    kinds: ClassVar[tuple[str, ...]]  # what it can be narrowed to
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @classmethod
    def fits(cls, site: Site) -> bool:
        return super().fits(site) and any(fnmatchcase(site.kind, kind) for kind in cls.kinds)

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                name, kinds = type(self).__name__, ", ".join(self.kinds)
                raise InputError(f"{name} tunes {kinds}, and {site.key} is {site.kind}; use Tune for any choice")
        return super().build(sites)


@dataclass(frozen=True, kw_only=True, repr=False)
class BitFit(Preset):
    """All biases, those of norms too; not that of the head, for which add `LinearProbe`. arXiv 2106.10199."""

    sites: tuple[str, ...] = ("bias",)

    paper: ClassVar[str] = "arXiv 2106.10199"
    quantised: ClassVar[bool] = True  # which leaves these as they are
    kinds: ClassVar[tuple[str, ...]] = ("bias",)


@dataclass(frozen=True, kw_only=True, repr=False)
class NormTuning(Preset):
    """Scales and shifts of all norms. Running statistics stay the base's. arXiv 2003.00152, 2312.11420."""

    sites: tuple[str, ...] = ("norm",)

    paper: ClassVar[str] = "arXiv 2312.11420"
    quantised: ClassVar[bool] = True  # which leaves these as they are
    kinds: ClassVar[tuple[str, ...]] = ("norm",)


@dataclass(frozen=True, kw_only=True, repr=False)
class CrossAttention(Preset):
    """Keys and values of the cross-attention, as Custom Diffusion trains them. arXiv 2212.04488."""

    sites: tuple[str, ...] = ("xattn.k", "xattn.v")

    paper: ClassVar[str] = "arXiv 2212.04488"
    kinds: ClassVar[tuple[str, ...]] = ("xattn.*",)


@dataclass(frozen=True, kw_only=True, repr=False)
class LinearProbe(Preset):
    """The classification head alone."""

    sites: tuple[str, ...] = ("head",)

    paper: ClassVar[str] = "arXiv 1610.01644"
    kinds: ClassVar[tuple[str, ...]] = ("head",)
