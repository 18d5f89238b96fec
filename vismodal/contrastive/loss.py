"""Contrastive losses on pairs of pictures and texts, and large batches of them in small parts.

    infonce    ½ (CE(s f tᵀ) + CE(s t fᵀ)), pairs on the diagonal      CLIP, Radford et al. 2021, arXiv 2103.00020
    sigmoid    -1/n Σ_ij log σ(z_ij (s f_i·t_j + b)), z = ±1            SigLIP, Zhai et al. 2023, arXiv 2303.15343

f, t: n D, normalised; s = exp(logit_scale). A loss of this kind is no mean over pairs: a batch of 512 cannot be made of
gradients of 16 batches of 32. `encoded` computes the features of a large batch part by part, keeps no activations, and
computes each part once more during backward: the gradient of the whole batch in the memory of one part, as GradCache
(Gao et al. 2021, arXiv 2101.06983) does, here by checkpointing each part, which also restores the random state, so that
dropout draws the same again. Over several processes `gathered` brings all features together, with their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vismodal.adapter import Adapter
from vismodal.draw import shuffled
from vismodal.errors import InputError

Loss = Literal["auto", "infonce", "sigmoid"]
LARGEST = math.log(100)  # of logit_scale, as CLIP's was clamped: logits never go beyond 100


def infonce(f: Tensor, t: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of n pairs; f, t: n D, scale: s. ln n where all features are equal."""
    logits = scale * f.float() @ t.float().T  # n n
    target = torch.arange(len(f), device=f.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid(f: Tensor, t: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Every picture with every text is one yes-or-no question; f, t: n D. Summed over texts, mean over pictures."""
    logits = scale * f.float() @ t.float().T + bias  # n n
    signs = 2 * torch.eye(len(f), device=f.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(f)


def encoded(encode: Callable[[Tensor], Tensor], x: Tensor, part: int = 0) -> Tensor:
    """Features n D of x, n ..., in parts of so many rows whose activations are not kept; 0 is all at once."""
    if not part or part >= len(x):
        return encode(x)
    return torch.cat([cast(Tensor, checkpoint(encode, rows, use_reentrant=False)) for rows in x.split(part)])


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes, in their order; x itself on one. Gradients go back to where the rows came from.

    Each process then holds the whole loss, and the backward of the gathering sums over processes: the mean of their
    parameters' gradients, as `fit` takes it, is the gradient of the one loss.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn import functional as collective

    return torch.cat(cast(Any, collective).all_gather(x))


def row_at(seed: int, size: int, batch: int, position: int) -> int:
    """The item at a position of an endless shuffled reading whose batches (of all processes together) hold no item
    twice: an epoch ends with its last whole batch. A picture would otherwise be a wrong answer to its own text."""
    epoch, offset = divmod(position, size - size % batch)
    return shuffled(seed, "pairs", size, epoch * size + offset)


# -- temperature -----------------------------------------------------------------------------------------------------


class Temperature(nn.Module):
    """A copy of the model's logit_scale, and logit_bias where it has one; the frozen base keeps its own. `largest` is
    the bound of exp(logit_scale): 100, or what the model comes with where that is more, as in SigLIP (about 117)."""

    def __init__(self, model: Any, learn: bool):
        super().__init__()
        self.scale = nn.Parameter(model.logit_scale.detach().float().reshape(()).clone(), requires_grad=learn)
        bias = getattr(model, "logit_bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().reshape(()).clone(), learn)
        self.largest = max(LARGEST, self.scale.item())

    def clamp(self) -> None:
        """exp(scale) at most what it may be."""
        with torch.no_grad():
            self.scale.clamp_(max=self.largest)

    def write(self, model: Any) -> None:
        """Into a model, in its own shapes."""
        with torch.no_grad():
            model.logit_scale.fill_(self.scale.item())
            if self.bias is not None:
                model.logit_bias.fill_(self.bias.item())


class Trained:
    """What contrastive training trains, for `fit`: an adapter and, where it is learnt, the temperature."""

    def __init__(self, adapter: Adapter, temperature: Temperature):
        self.adapter, self.temperature = adapter, temperature

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.adapter.named_parameters()
        for name, p in self.temperature.named_parameters():
            if p.requires_grad:
                yield f"temperature.{name}", p

    def groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """As `Adapter.groups`; no decay for the temperature."""
        own = [p for p in self.temperature.parameters() if p.requires_grad]
        more = [{"params": own, "lr": lr, "weight_decay": 0.0}] if own else []
        return self.adapter.groups(lr, weight_decay) + more

    def state_dict(self) -> dict[str, Tensor]:
        mine = {f"temperature.{name}": tensor for name, tensor in self.temperature.state_dict().items()}
        return self.adapter.state_dict() | mine

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        own = {k.removeprefix("temperature."): v for k, v in state.items() if k.startswith("temperature.")}
        self.temperature.load_state_dict(own)
        self.adapter.load_state_dict({k: v for k, v in state.items() if not k.startswith("temperature.")})

    def unused(self) -> list[str]:
        return self.adapter.unused()

    def penalty(self) -> Tensor | None:
        return self.adapter.penalty()

    def advance(self, step: int, steps: int, /) -> None:
        self.adapter.advance(step, steps)
        self.temperature.clamp()


def loss_named(name: Loss, temperature: Temperature) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of normalised features of pairs; "auto" is what the model was made for, by whether it has a bias."""
    if name == "auto":
        name = "infonce" if temperature.bias is None else "sigmoid"
    bias = temperature.bias
    if name == "sigmoid":
        if bias is None:
            raise InputError("the sigmoid loss needs a model with a logit_bias, such as SigLIP; write loss infonce")
        return lambda f, t: sigmoid(f, t, temperature.scale.exp(), bias)
    return lambda f, t: infonce(f, t, temperature.scale.exp())
