"""Ports: how modules act on a model. The only package that touches hooks.

One port stands on each *target* and holds the modules of every adapter on it, in order: stacking, switching and the
ranges of a fused weight are decided in one place. There are two kinds.

- A `WeightPort` stands on one parameter (with its bias). Its modules give `forward(W, b) -> (W', b')`, the truth that
  merging and exporting follow too, and where they can an `update` of the layer's output that forms no W'. Where the
  parameter's own layer is called and all modules have an update, they act on its output. Otherwise the port *shadows*:
  while the reading module runs, W' stands in the owner's `__dict__`, where attribute look-up finds it before the
  parameter.
- A `SpanPort` stands on a stretch of the model, from one module's input to another's output. Its modules give `enter`
  and `exit`, and taps in between.

Base parameters, classes and state-dict keys never change. Hooks are bound methods of ports, so that `deepcopy` and
`pickle` of a model take its adapters along; with closures a copy would share the original's.

    port.py     what both kinds share: whose modules stand here, and which of them act
    weight.py   the weight port: on the output, as a shadow, or merged into the parameters
    span.py     the span port: enter, feeds, taps, exit
    hooks.py    the hooks of a model from outside: which ports stand on it, what it is called with, frozen batch norms
"""

from vismodal.ports.hooks import FrozenStatistics, acting, before, is_ported, ports_on
from vismodal.ports.port import Port
from vismodal.ports.span import SpanPort, Stream
from vismodal.ports.weight import WeightPort

__all__ = [
    "FrozenStatistics",
    "Port",
    "SpanPort",
    "Stream",
    "WeightPort",
    "acting",
    "before",
    "is_ported",
    "ports_on",
]
