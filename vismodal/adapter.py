"""An adapter: one named adaptation, which is switched, scaled, merged, trained, saved and detached as one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vismodal.bank import Attached, bank_of, detach
from vismodal.dead import unused
from vismodal.errors import InputError
from vismodal.fingerprint import BANK, Fingerprint, head_of
from vismodal.limit import Limit
from vismodal.methods import METHODS, Method
from vismodal.pruning import Pruned, prune
from vismodal.sharding import spread_like, whole


class Adapter:
    """One named adaptation of one model, or of several under one name."""

    __slots__ = ("models", "name")  # `adapter.enable = False` is an error, not an attribute that nobody reads

    def __init__(self, models: dict[str, nn.Module], name: str):
        self.name = name
        self.models = models

    @property
    def _parts(self) -> list[Attached]:
        try:
            return [bank_of(m).attached[self.name] for m in self.models.values()]
        except (AttributeError, KeyError):
            raise RuntimeError(f"adapter {self.name!r} is detached from its model") from None

    @property
    def methods(self) -> dict[str, Method]:
        """The methods by slot: {"lora": LoRA(rank=8)}."""
        return self._parts[0].methods

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Every module by "slot/site"."""
        return {key: module for part in self._parts for key, module in part.modules.items()}

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each module's site, by "slot/site"."""
        return {key: kind for part in self._parts for key, kind in part.sites.items()}

    def _all_modules(self) -> dict[str, nn.Module]:
        return self.modules | {key: module for part in self._parts for key, module in part.shared.items()}

    @property
    def bases(self) -> dict[str, Fingerprint]:
        """Fingerprints of the base models, by prefix: as they were before, with the heads that they have now."""
        banks = {prefix: (m, bank_of(m)) for prefix, m in self.models.items()}
        return {prefix: bank.base._replace(head=head_of(m, bank.heads)) for prefix, (m, bank) in banks.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for key, module in self._all_modules().items():
            for name, p in module.named_parameters():
                yield f"{key}.{name}", p

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for _, p in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def _tensors(self) -> dict[str, Tensor]:
        # a module's own state_dict puts sharded parameters back in their place, where a forward has left whole copies
        return {f"{k}.{n}": t for k, m in self._all_modules().items() for n, t in m.state_dict().items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The adapter's tensors by "slot/site.name"; the base is not among them. Those that FSDP2 has sharded are
        gathered, so that all processes must ask."""
        return {key: whole(tensor) for key, tensor in self._tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in. Raises `InputError` naming keys that are missing, left over, or of another shape."""
        mine = self.state_dict()
        wrong = [f"lacks {k}" for k in mine.keys() - state.keys()] + [f"has {k}" for k in state.keys() - mine.keys()]
        if not wrong:
            fits = all(state[k].shape == t.shape for k, t in mine.items())
            mine = mine if fits else {k: t.clone() for k, t in mine.items()}
            self._resize(state)
            shapes = [(k, tuple(state[k].shape), tuple(t.shape)) for k, t in self.state_dict().items()]
            wrong = [f"{k} is {a}, the adapter has {tuple(mine[k].shape)}" for k, a, b in shapes if a != b]
            if wrong:  # as it was
                self._resize(mine)
                self._copy(mine)
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise InputError(f"tensors do not fit adapter {self.name!r}: {'; '.join(sorted(wrong)[:4])}{more}")
        self._copy(state)

    def _resize(self, state: Mapping[str, Tensor]) -> None:
        for key, module in self.modules.items():
            given = {n: state[f"{key}.{n}"] for n in module.state_dict()}
            self.methods[key.partition("/")[0]].resize(module, given)

    def _copy(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self._tensors().items():
                tensor.copy_(spread_like(state[key], tensor))
        self._refresh(rebake=True)

    # -- state --

    def _set(self, **state: Any) -> None:
        before = [(part, {k: getattr(part, k) for k in state}) for part in self._parts]
        try:
            for part, _ in before:
                for k, value in state.items():
                    setattr(part, k, value)
            self._refresh()
        except BaseException:
            for part, old in before:
                for k, value in old.items():
                    setattr(part, k, value)
            self._refresh()
            raise

    def _refresh(self, rebake: bool = False) -> None:
        for model in self.models.values():
            if rebake:
                for port in bank_of(model).ports.values():
                    port.set((), ())
            bank_of(model).refresh()

    @property
    def enabled(self) -> bool:
        return self._parts[0].enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._set(enabled=bool(on))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Without this adapter for a while: `with a.disabled(): y0 = model(x)`."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @property
    def scale(self) -> float:
        """Interpolates each weight between the base (0, exactly) and W' (1)."""
        return self._parts[0].scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if not math.isfinite(scale):
            raise InputError(f"scale must be finite, not {scale}")
        if self.fixed and scale not in (0, 1):
            raise InputError(f"{', '.join(self.fixed)} cannot be interpolated: scale must be 0 or 1, not {scale:g}")
        self._set(scale=float(scale))

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the methods because of which its scale is 0 or 1; none where it may be any."""
        methods = self.methods.values()
        alone = all(m.whole for m in methods)  # beside others such a method acts in full; by itself it has no half
        return tuple(type(m).__name__ for m in methods if not m.interpolates and (alone or not m.whole))

    @property
    def condition(self) -> Tensor | None:
        """What a method that is steered beside the prompt (`IPAdapter`, `T2IAdapter`) has been given.

            a.condition = edges              # a row for each row of the batch; None, and the model is the base exactly
            with a.given(edges): ...         # for a while

        It holds for every forward until it changes: a batch of other rows needs another one. Guidance's doubled batch
        takes it too (the rows that it leads away from get what the method's paper says), and so does `vm.route`, with
        a row for each of the routed ones. It is kept as a copy without a graph, and is in no file. Change it after
        `backward()` where gradients are checkpointed; otherwise that raises.

        Raises `InputError` where no method of the adapter takes a condition, or not this one.
        """
        given = self._parts[0].condition
        return None if given is None else given.rows

    @condition.setter
    def condition(self, rows: Tensor | None) -> None:
        taking = [method for method in self.methods.values() if method.conditioned]
        if len(taking) != 1:
            names = " and ".join(type(m).__name__ for m in taking or self.methods.values())
            those = " and ".join(m.__name__ for m in METHODS if m.conditioned)
            todo = "adapt them under names of their own" if taking else f"only {those} do"
            raise InputError(f"{names} in {self.name!r} take {len(taking)} conditions, not one: {todo}")
        number = self._parts[0].given + 1
        new = None if rows is None else taking[0].condition(rows.detach().clone())._replace(number=number)
        self._set(condition=new, given=number)

    @contextmanager
    def given(self, rows: Tensor | None) -> Iterator[None]:
        """Under another `condition` for a while: `with a.given(edges): picture = pipe(prompt).images[0]`."""
        before = self._parts[0].condition
        self.condition = rows
        try:
            yield
        finally:
            self._set(condition=before)

    def limit(self, *, layers: slice | None = None, where: str | tuple[str, ...] = "*") -> None:
        """Act nowhere else until the next call: AdapterDrop, arXiv 2010.11918. `limit()` lifts it.

            a.limit(layers=slice(5, None))              # none in the first five blocks
            a.limit(layers=slice(randrange(12), None))  # before each update: robust AdapterDrop

        Like `enabled` and `scale` it is in no file, and merging takes only what acts.

        Args:
            layers: a slice of the blocks of each tower; what is in no block (a head) goes on.
            where: glob, or several, on the paths of modules, which all that acts has to match.

        Raises `InputError` where that leaves nothing, and for `layers` of what goes over all blocks (a ladder).
        """
        limit = Limit(layers, (where,) if isinstance(where, str) else tuple(where))
        limit.check({key: spot for part in self._parts for key, spot in part.spots.items()})
        self._set(limit=limit)

    @property
    def trainable(self) -> bool:
        return self._parts[0].trainable

    @trainable.setter
    def trainable(self, on: bool) -> None:
        for part, model in zip(self._parts, self.models.values(), strict=True):
            part.trainable = bool(on)
            bank_of(model).use(bank_of(model).active)

    @property
    def merged(self) -> bool:
        return self._parts[0].merged

    def merge(self) -> None:
        """Write W' into the base parameters, before any adapter that stays live. `unmerge` restores them bit by bit."""
        for slot, method in self.methods.items():
            if not method.mergeable:
                raise InputError(f"{type(method).__name__} ({slot}) cannot merge into the base weights; keep it live")
        self._set(merged=True)

    def unmerge(self) -> None:
        self._set(merged=False)

    def detach(self, keep: bool = False) -> None:
        """Remove the adapter and leave the model as it was found; `keep=True` bakes it into the base weights first."""
        if keep:
            acts = all(self.name in bank_of(m).active for m in self.models.values())
            if not (acts and self.enabled and self.scale):
                raise InputError(f"{self.name!r} is off, so keep=True would bake nothing in; enable or use it first")
            self.merge()
        for model in self.models.values():
            detach(model, self.name, keep)

    def prune(self, *, rank: int | None = None, energy: float | None = None) -> Pruned:
        """Leave of each update, a product of low rank, the best approximation of a lower one (truncated SVD).

            print(a.prune(rank=4))  # or energy=0.95: as many ranks as hold 95% of each site's squared singular values

        Sites without more ranks than that stay as they are, and so do methods without any (a tuned head). `methods`
        keeps the rank that they began with. Training needs a new optimiser: an old one's averages have the old sizes.

        Raises `InputError` where no method's update is such a product, and where the adapter is merged.
        """
        return prune(self, rank, energy)

    # -- training --

    def groups(self, lr: float | Mapping[str, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: by the methods' own learning rates, no decay for vectors and scalars.

        `lr` is for all methods, or one for each slot of `methods`: {"lora": 1e-3, "tune": 1e-4}; other slots raise
        `InputError`.
        A group that learns for a while only says so: `vismodal.train.fit` leaves it as it is after update "last".
        """
        if isinstance(lr, Mapping) and lr.keys() != self.methods.keys():
            raise InputError(f"learning rates are for {', '.join(self.methods)}, each of them; not {', '.join(lr)}")
        groups: dict[tuple[float, float, int | None, bool], list[nn.Parameter]] = {}
        for key, module in self._all_modules().items():
            slot = key.partition("/")[0]
            method, own = self.methods[slot], lr[slot] if isinstance(lr, Mapping) else lr
            for name, p in module.named_parameters():
                if p.requires_grad:
                    groups.setdefault((own, method.rate(name), method.last(name), p.dim() > 1), []).append(p)
        return [
            {"params": params, "lr": own * rate, "weight_decay": weight_decay if decays else 0.0}
            | ({} if last is None else {"last": last})
            for (own, rate, last, decays), params in groups.items()
        ]

    def _by_method(self) -> Iterator[tuple[Method, list[nn.Module]]]:
        for slot, method in self.methods.items():
            yield method, [m for k, m in self.modules.items() if k.partition("/")[0] == slot]

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Lets methods that choose by data see it: `with a.calibrating(): loss(model(x), y).backward()`, for as many
        batches as they are to see. Make the optimiser afterwards: parameters may be others then."""
        with ExitStack() as stack:
            for method, modules in self._by_method():
                stack.enter_context(method.calibrating(modules))
            yield

    def penalty(self) -> Tensor | None:
        """The sum of the terms that its methods add to a loss; None where no method has one."""
        terms = [method.loss(modules) for method, modules in self._by_method()]
        given = [term for term in terms if term is not None]
        return torch.stack(given).sum() if given else None

    def advance(self, step: int, steps: int) -> None:
        """Tell the methods that update `step` of `steps` is done: `vismodal.train.fit` does so."""
        for method, modules in self._by_method():
            method.step(modules, step, steps)

    def unused(self) -> list[str]:
        """Dead sites: those that did not run since the last call of `unused()` (or since attaching), and, after a
        backward, those none of whose tensors got a non-zero gradient. Empty when all take part, or are merged.
        Sites that `limit` leaves out are not dead."""
        return unused(self)

    def __repr__(self) -> str:
        there = all(BANK in m._modules and self.name in bank_of(m).attached for m in self.models.values())
        if not there:
            return f"Adapter({self.name!r}, detached)"
        return f"Adapter({self.name!r}, {', '.join(map(repr, self.methods.values()))})"

    def __str__(self) -> str:
        from vismodal.table import table

        kinds = self.kinds
        rows = [
            [key.partition("/")[2], kinds[key], type(self.methods[key.partition("/")[0]]).__name__, f"{_count(m):,}"]
            for key, m in self.modules.items()
        ]
        base = sum(p.numel() for m in self.models.values() for n, p in m.named_parameters() if BANK not in n)
        total = f"{self.num_parameters:,} parameters, {100 * self.num_parameters / base:.2f}% of {base:,}"
        state = "merged" if self.merged else "live" if self.enabled else "off"
        names = ", ".join(b.name for b in self.bases.values())
        head = f"adapter {self.name!r} on {names}: {total}; {state} at scale {self.scale:g}"
        if any(m.conditioned for m in self.methods.values()):
            head += ", without its condition" if self.condition is None else f", given {len(self.condition)} rows"
        if dropped := sum(len(part.dropped) for part in self._parts):
            head += f", limited to {self._parts[0].limit}: {len(rows) - dropped} of {len(rows)} sites act"
        return f"{head}\n{table(['site', 'kind', 'method', 'parameters'], rows)}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
