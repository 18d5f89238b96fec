"""The hooks of a model: which ports stand on it and act, a look at what it is called with, and frozen batch norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vismodal.ports.port import Port
from vismodal.ports.span import Named


def is_ported(module: nn.Module) -> bool:
    """Whether ports of some model that holds this module hook it."""
    return any(isinstance(hook, Port | FrozenStatistics | Named) for hook in _hooked(module))


def ports_on(modules: Iterable[nn.Module]) -> list[Port]:
    """The ports, of whatever model, that hook one of these modules."""
    hooks = (getattr(hook, "port", hook) for module in modules for hook in _hooked(module))
    return list(dict.fromkeys(hook for hook in hooks if isinstance(hook, Port)))


def acting(modules: Iterable[nn.Module]) -> list[Port]:
    """Those of the ports on these modules that act just now."""
    return [port for port in ports_on(modules) if port.live]


def _hooked(module: nn.Module) -> list[Any]:
    """The objects whose methods a module's hooks are."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [getattr(hook, "__self__", hook) for hook in hooks]


Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def before(modules: Iterable[nn.Module], act: Before) -> Iterator[None]:
    """For a while `act` sees what each of these modules is called with, before any port does, and may replace it."""
    handles = [m.register_forward_pre_hook(act, prepend=True, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FrozenStatistics:
    """Keeps a batch norm of the frozen base in eval mode: its running statistics are base values like any other."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.switched = False
        self.handle = module.register_forward_pre_hook(self._eval)

    def _eval(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            module.training = False
            self.switched = True

    def remove(self, training: bool) -> None:
        """Give the module back to a model that is in training mode or not."""
        self.handle.remove()
        if self.switched and training:
            self.module.training = True
