"""SparseMask: a few single entries of the weights, chosen once and then trained.

    W' = W + scatter(value, index)        index, value: k, of the flattened weight; value = 0 at the start

The k entries of the highest score, where g_n is the gradient of calibration batch n with respect to W, in eval or train
mode as the model is:

    "fisher"     sum over n of g_n^2, the empirical Fisher information: FISH (Sung et al. 2021, arXiv 2111.09839),
                 over all weights together. A batch is one sample there.
    "gradient"   |sum over n of g_n|: GPS (Zhang et al. 2023, arXiv 2312.10136), per="row": for each output feature
                 those of its own inputs. The paper takes a contrastive loss for it; any loss can be given here.
    "magnitude"  -|W|, which needs no data: PaFi (Liao et al. 2023, arXiv 2305.16742).

    adapter = vm.adapt(model, vm.SparseMask(criterion="fisher"))
    with adapter.calibrating():
        for x, y in batches:
            loss(model(x), y).backward()

Several processes must see the same batches. The official FISH counts a trained head among the k, and GPS trains all
norms beside: here these are methods of their own, [SparseMask(...), NormTuning(), LinearProbe()].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from vismodal.errors import InputError
from vismodal.methods.base import Built, Method, WeightModule
from vismodal.quantised import values
from vismodal.site import Site

Criterion = Literal["fisher", "gradient", "magnitude"]
Per = Literal["model", "site", "row"]


class Entries(WeightModule):
    """The chosen entries of one weight or bias, and, while it is calibrated, a probe for its gradient."""

    def __init__(self, site: Site, count: int):
        super().__init__()
        self.slot, self.key, self.shape = site.slot, site.key, site.tensor.shape
        self.value = nn.Parameter(torch.zeros(count, device=site.tensor.device, dtype=torch.float32))
        self.register_buffer("index", torch.zeros(count, device=site.tensor.device, dtype=torch.int32))
        self.bias_only = site.slot == "bias"
        self.chosen = False
        self.probe: Tensor | None = None
        self.score: Tensor | None = None

    def forward(self, W: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        t = W if self.slot == "weight" else b
        assert t is not None
        if self.probe is not None:
            t = t + self.probe.to(t.dtype)
        elif self.chosen:
            t = t.flatten().index_add(0, cast(Tensor, self.index), self.value.to(t.dtype)).view(t.shape)
        else:
            raise RuntimeError(f"{self.key}: no entries are chosen yet; run batches in `with adapter.calibrating():`")
        return (t, b) if self.slot == "weight" else (W, t)

    def choose(self, index: Tensor) -> None:
        """These entries from now on, in their order in memory, at zero."""
        if len(index) != len(self.value):
            self.value = nn.Parameter(self.value.new_zeros(len(index)), requires_grad=self.value.requires_grad)
        self.index = index.sort().values.to(self.value.device, torch.int32)
        self.chosen = True

    def watch(self, squared: bool) -> None:
        """Adds up the gradients of all backward passes from now on, or their squares."""
        score = torch.zeros(self.shape, device=self.value.device, dtype=torch.float32)
        self.probe = torch.zeros_like(score, requires_grad=True)
        self.score = None

        def add(probe: Tensor) -> None:
            g = cast(Tensor, probe.grad)
            self.score = score.add_(g * g if squared else g)
            probe.grad = None

        self.probe.register_post_accumulate_grad_hook(add)


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseMask(Method):
    """Single entries chosen by Fisher information (arXiv 2111.09839), gradient (2312.10136) or magnitude (2305.16742).

    Args:
        density: share of the entries that are trained.
        criterion: "fisher" and "gradient" need batches in `adapter.calibrating()`; "magnitude" takes the smallest ones.
        per: among which entries the share is taken: those of the whole model, of each site, or of each row.
    """

    sites: tuple[str, ...] = ("attn.*", "mlp.*")
    density: float = 0.005
    criterion: Criterion = "fisher"
    per: Per = "model"

    survey: ClassVar[str] = "selective: unstructured"
    paper: ClassVar[str] = "arXiv 2111.09839"
    mergeable: ClassVar[bool] = True
    elsewhere: ClassVar[tuple[tuple[str, ...], ...]] = (("conv",),)
    quantised: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise InputError(f"SparseMask: density must be above 0 and at most 1, not {self.density}")
        for name, value, choices in (("criterion", self.criterion, Criterion), ("per", self.per, Per)):
            if value not in get_args(choices):
                raise InputError(f"SparseMask: {name} is one of {', '.join(get_args(choices))}, not {value!r}")

    @classmethod
    def fits(cls, site: Site) -> bool:
        return site.span is None and site.tensor.is_floating_point()

    def build(self, sites: Sequence[Site]) -> Built:
        for site in sites:
            if not self.fits(site):
                raise InputError(f"SparseMask needs floating-point parameters; {site.key} ({site.kind}) is none")
        modules = tuple(Entries(site, self._count(site.tensor)) for site in sites)
        if self.criterion == "magnitude" and not sites[0].tensor.is_meta:
            self._choose(modules, [-values(site.tensor).detach().abs().float() for site in sites])
        return Built(modules)

    def _count(self, scores: Tensor) -> int:
        """Entries of one site; with per="model" what it gets on average, until they are chosen."""
        rows = len(scores) if self.per == "row" else 1
        return rows * max(1, round(self.density * scores.numel() / rows))

    def _choose(self, modules: Sequence[Entries], scores: Sequence[Tensor]) -> None:
        if self.per == "model":
            flat = torch.cat([s.flatten().to(scores[0].device) for s in scores])
            k = max(1, round(self.density * len(flat)))
            chosen = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, flat.topk(k).indices, True)
            indices = [part.nonzero().flatten() for part in chosen.split([s.numel() for s in scores])]
        else:
            indices = [self._of_one(s) for s in scores]
        for module, index in zip(modules, indices, strict=True):
            module.choose(index)

    def _of_one(self, scores: Tensor) -> Tensor:
        rows = scores.reshape(len(scores) if self.per == "row" else 1, -1)
        top = rows.topk(self._count(scores) // len(rows), dim=1).indices
        return (top + rows.shape[1] * torch.arange(len(rows), device=rows.device)[:, None]).flatten()

    @contextmanager
    def calibrating(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        entries = [cast(Entries, module) for module in modules]
        if self.criterion == "magnitude":
            yield
            return
        try:
            for each in entries:
                each.watch(squared=self.criterion == "fisher")
            yield
            blind = [each.key for each in entries if each.score is None]
            if blind:
                raise InputError(
                    f"SparseMask: no gradient reached {', '.join(blind[:4])} while calibrating; run a backward"
                )
            self._choose(entries, [cast(Tensor, each.score).abs() for each in entries])
        finally:
            for each in entries:
                each.probe = each.score = None

    def resize(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        if "index" in tensors:
            cast(Entries, module).choose(tensors["index"])
