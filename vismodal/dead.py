"""Dead sites: modules of an adapter that took no part in the last forward, or got nothing from the last backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from vismodal.bank import bank_of

if TYPE_CHECKING:
    from vismodal.adapter import Adapter


def unused(adapter: Adapter) -> list[str]:
    """See `Adapter.unused`."""
    modules, banks = adapter.modules, [bank_of(m) for m in adapter.models.values()]
    entries = [e for bank in banks for port in bank.ports.values() for e in port.entries if e.adapter == adapter.name]
    ran = {e.key for e in entries if e.ran}
    for e in entries:
        e.ran = False
    if adapter.merged:
        return []
    trained = any(p.grad is not None for p in adapter.parameters())
    dropped = {key for bank in banks for key in bank.attached[adapter.name].dropped}
    busy = {k: m for k, m in modules.items() if k not in dropped and not getattr(m, "idle", False)}
    return [k for k, m in busy.items() if k not in ran or (trained and not _has_gradient(m))]


def _has_gradient(module: nn.Module) -> bool:
    """Whether a tensor of its own got a gradient; one that has none is no worse for that.

    One of zeros counts where what the module shares got another (FacT's cores have none at step 1: V = 0)."""
    own = [p for p in module.parameters() if p.numel()]
    common = module.__dict__["shared"].parameters() if "shared" in module.__dict__ else ()
    grads = [p.grad for p in own if p.grad is not None]
    return not own or any(bool(g.any()) for g in grads) or (bool(grads) and any(_flows(p) for p in common))


def _flows(p: nn.Parameter) -> bool:
    return p.grad is not None and bool(p.grad.any())
