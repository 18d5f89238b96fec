"""What a layer of an adapter file makes of a weight, by the formulas that kohya's and LyCORIS's files follow."""

import torch
from torch import Tensor


def changed(W: Tensor, layer: dict[str, Tensor]) -> Tensor:
    """What a layer makes of a weight, by the formulas that LyCORIS's and kohya's files follow."""
    t = {name: tensor.double() for name, tensor in layer.items()}
    W = W.detach().double()
    if "diff" in t:
        return W + t["diff"]
    if "w_norm" in t:
        return W + t["w_norm"]
    if "oft_blocks" in t:
        X = t["oft_blocks"]
        blocks = []
        for block in X:
            A = block - block.T
            I = torch.eye(len(block), dtype=A.dtype)
            blocks.append(((I + A) @ torch.linalg.inv(I - A)).T)
        turned = torch.block_diag(*blocks) @ W.flatten(1)
        return (t["rescale"].flatten()[:, None] * turned if "rescale" in t else turned).view(W.shape)
    if "lora_up.weight" in t:
        r = len(t["lora_down.weight"])
        delta = t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)
    elif "hada_w1_a" in t:
        r = len(t["hada_w1_b"])
        delta = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        r = len(t["lokr_w2_b"]) if "lokr_w2_b" in t else 0
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        w2 = t["lokr_w2"] if "lokr_w2" in t else (t["lokr_w2_a"] @ t["lokr_w2_b"])
        w2 = w2.view(W.shape[0] // len(w1), W.shape[1] // w1.shape[1], *W.shape[2:])
        delta = torch.kron(w1.view(*w1.shape, *[1] * (W.dim() - 2)), w2)
    V = W + (t["alpha"] / r if r else 1.0) * delta.view(W.shape)
    if "dora_scale" not in t:
        return V
    return t["dora_scale"].view(-1, *[1] * (W.dim() - 1)) * V / V.flatten(1).norm(dim=1).view(-1, *[1] * (W.dim() - 1))
