"""LoHa, LoKr, OFT, BOFT and FacT against their formulas written out by hand, and against peft and LyCORIS where those
are right; where they are not, a test says how."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import timm
import torch
from test_parity import CONVS, TABLE, Net
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import BY_NAME, close, fixed, shake

import vismodal as vm
from vismodal.methods.base import Method, WeightModule
from vismodal.methods.loha import Hadamard
from vismodal.methods.lokr import factorise

NO_LYCORIS = "there is no lycoris_lora to compare with: pip install -e '.[dev]'"

# -- the formulas, by hand and in fp64 ------------------------------------------------------------------------------


def by_hand(module: nn.Module, W: Tensor, options: dict[str, Any]) -> Tensor:
    """W' of one site from the module's tensors and the options that it was built with."""
    t = {n: p.detach().double() for n, p in module.named_parameters()}
    W = W.detach().double()
    if hasattr(module, "shared"):
        t |= {n: p.detach().double() for n, p in module.shared.named_parameters()}
        return fact(t, W, options)
    if "Q" in t:
        return rotated(t, W, options)
    s = options.get("alpha", options["rank"]) / options["rank"]
    if isinstance(module, Hadamard):
        return W + s * ((t["w1a"] @ t["w1b"]) * (t["w2a"] @ t["w2b"])).view(W.shape)
    return W + kronecker(t, W, s)


def kronecker(t: dict[str, Tensor], W: Tensor, s: float) -> Tensor:
    w1 = t["w1"] if "w1" in t else t["w1a"] @ t["w1b"]
    w2 = t["w2"] if "w2" in t else (t["w2a"] @ t["w2b"].flatten(1)).view(-1, *t["w2b"].shape[1:])
    if "w1" in t and "w2" in t:
        s = 1.0
    w2 = w2.flatten(2) if W.dim() > 2 else w2[..., None]
    return s * torch.stack([torch.kron(w1, w2[..., i]) for i in range(w2.shape[-1])], -1).reshape(W.shape)


def cayley(entries: Tensor, b: int, terms: int = 0) -> Tensor:
    """(I + Q) (I - Q)^-1, or with the first powers of Q in place of the inverse."""
    I, Q = torch.eye(b).double(), torch.zeros(b, b).double()
    Q[tuple(torch.triu_indices(b, b, 1))] = entries
    Q = Q - Q.T
    inverse = sum(torch.linalg.matrix_power(Q, n) for n in range(terms - 1)) if terms else torch.linalg.inv(I - Q)
    return (I + Q) @ inverse


def dense_rotation(Q: Tensor, b: int, size: int, terms: int = 0) -> Tensor:
    """The product of stages, block by block: those of stage i pair halves of a block that lie 2^(i-1) halves apart."""
    R = torch.eye(size).double()
    for i, stage in enumerate(Q):
        now = torch.zeros(size, size).double()
        for number, entries in enumerate(stage):
            if len(Q) == 1:
                index = torch.arange(number * b, (number + 1) * b)
            else:
                apart, r = 2**i, b // 2
                half = number // apart * 2 * apart + number % apart
                index = torch.cat([torch.arange(h * r, (h + 1) * r) for h in (half, half + apart)])
            now[index[:, None], index] = cayley(entries, b, terms)
        R = now @ R
    return R


def rotated(t: dict[str, Tensor], W: Tensor, options: dict[str, Any]) -> Tensor:
    M, Q = W.flatten(1), t["Q"]
    b = next(b for b in range(2, 10**4) if b * (b - 1) // 2 == Q.shape[-1])
    out = options.get("side", "in") == "out"
    R = dense_rotation(Q, b, len(M) if out else M.shape[1], options.get("neumann", 0))
    M = R @ M if out else M @ R.T
    return (t["g"][:, None] * M if "g" in t else M).view(W.shape)


def fact(t: dict[str, Tensor], W: Tensor, options: dict[str, Any]) -> Tensor:
    """Piece by piece; a convolution is a matrix for each place of its kernel, and its pieces go places first."""
    U, V, r = t["U"], t["V"], options["rank"]
    d, (rows, columns) = U.shape[1], W.shape[:2]
    places = W[0, 0].numel()
    m, n = -(-rows // d), -(-columns // d)
    change = torch.zeros(m * d, n * d, places).double()
    for i in range(m):
        for j in range(places * n):
            at, k = j // n, j % n
            piece = V @ core(t, i, j, m, places * n, r) @ U
            change[i * d : (i + 1) * d, k * d : (k + 1) * d, at] = piece
    return W + options.get("scaling", 1.0) * change[:rows, :columns].reshape(W.shape)


def core(t: dict[str, Tensor], i: int, j: int, m: int, n: int, r: int) -> Tensor:
    """S of one piece: as weights of a Linear in TT; in TK as the official code reads slices of C x P."""
    if "S" in t:
        return t["S"][i * r : (i + 1) * r, j * r : (j + 1) * r]
    slices = torch.einsum("abc,cp->abp", t["C"], t["P"])
    if n == 1:  # x (r x mr), cut into m
        return slices.reshape(r, m * r)[:, i * r : (i + 1) * r].T
    return slices[:, :, i * n : (i + 1) * n].reshape(r, n * r)[:, j * r : (j + 1) * r]  # (r x nr)^T below x


METHODS: dict[str, tuple[Callable[..., Method], dict[str, Any]]] = {
    "LoHa": (vm.LoHa, {"rank": 2, "alpha": 3.0}),
    "LoHa-large": (vm.LoHa, {"rank": 5}),
    "LoKr": (vm.LoKr, {"rank": 1, "alpha": 0.5}),
    "LoKr-full": (vm.LoKr, {"rank": 1, "alpha": 0.5, "full": True}),
    "LoKr-both": (vm.LoKr, {"rank": 1, "alpha": 0.5, "decompose_both": True, "factor": 6}),
    "OFT": (vm.OFT, {"block_size": 4}),
    "OFT-out": (vm.OFT, {"block_size": 3, "side": "out", "rescale": True}),
    "OFT-neumann": (vm.OFT, {"block_size": 4, "neumann": 5}),
    "BOFT": (vm.BOFT, {"block_size": 4, "factors": 2, "rescale": True}),
    "BOFT-out": (vm.BOFT, {"block_size": 4, "factors": 3, "side": "out"}),
    "FacT-TT": (vm.FacT, {"rank": 2, "scaling": 0.5}),
    "FacT-TK": (vm.FacT, {"rank": 2, "tucker": True}),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 24),
    "linear-down": lambda: nn.Linear(32, 16, bias=False),
    "linear-cut": lambda: nn.Linear(24, 40),
    "conv-1x1": lambda: nn.Conv2d(12, 24, 1),
    "conv-3x3": lambda: nn.Conv2d(20, 8, 3, padding=1, stride=2),
    "conv-wide": lambda: nn.Conv2d(8, 24, 3, padding=1, padding_mode="reflect"),
    "conv-groups": lambda: nn.Conv2d(24, 24, 3, padding=1, groups=3, dilation=2),
    "conv1d": lambda: nn.Conv1d(12, 16, 3),
    "embedding": lambda: nn.Embedding(16, 24),
}
method = pytest.mark.parametrize("name", METHODS)


def inputs(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 2, 3], [11, 0, 2]])
    columns = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    return fixed(2, columns, *[9] * (layer.weight.dim() - 2)) if layer.weight.dim() > 2 else fixed(2, 5, columns)


def output(layer: nn.Module, W: Tensor, x: Tensor) -> Tensor:
    """The layer with another weight, in fp64."""
    twin = copy.deepcopy(layer).double()
    for hooks in (twin._forward_hooks, twin._forward_pre_hooks):
        hooks.clear()
    with torch.no_grad():
        twin.weight.copy_(W)
    return twin(x if x.dtype == torch.long else x.double())


@method
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_equal_the_closed_formula(name: str, kind: str) -> None:
    make, options = METHODS[name]
    torch.manual_seed(0)
    net = Net(LAYERS[kind]())
    x, W = inputs(net.layer), net.layer.weight.detach().clone()
    if "FacT" in name and kind == "embedding":
        with pytest.raises(vm.InputError, match="token embeddings have none"):
            vm.adapt(net, make(sites=("w",), **options), sites=TABLE)
        return
    y0 = net(x)
    adapter = vm.adapt(net, make(sites=("w",), **options), sites=TABLE)
    (module,) = adapter.modules.values()
    assert torch.equal(module(W, None)[0], W)  # at the start the weight is the base's bit by bit
    assert close(net(x), y0, 1e-6)
    shake(adapter, 0.3)
    want = output(net.layer, by_hand(module, W, options), x)
    assert not close(net(x), y0, 1e-3)
    assert close(net(x), want, 2e-6)
    if not isinstance(net.layer, nn.Embedding) and W.dim() > 2:
        assert close(net(x[0]), want[0], 2e-6)  # a single picture
    adapter.merge()
    assert close(net(x), want, 2e-6)


@method
@pytest.mark.parametrize("conv", CONVS)
def test_convolutions_begin_at_the_base(name: str, conv: str) -> None:
    """With every stride, padding and dilation; where no piece or block exists, the error says so."""
    make, options = METHODS[name]
    torch.manual_seed(0)
    net = Net(CONVS[conv]())
    x = fixed(2, 6, *[9] * (net.layer.weight.dim() - 2))
    y0 = net(x)
    try:
        adapter = vm.adapt(net, make(sites=("w",), **options), sites=TABLE)
    except vm.InputError as error:
        assert any(what in str(error) for what in ("do not divide into", "at least as wide as the rank"))
        assert name.startswith(("OFT", "BOFT")) or ("FacT" in name and "depthwise" in conv)
        return
    assert close(net(x), y0, 1e-6)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    assert close(net(x), output(net.layer, by_hand(module, net.layer.weight, options), x), 5e-6)


@method
def test_slices_of_a_fused_weight(name: str) -> None:
    make, options = METHODS[name]
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=3).eval()
    qkv = model.blocks[0].attn.qkv
    x, W = fixed(2, 5, 24), qkv.weight.detach().clone()
    y0 = qkv(x)
    adapter = vm.adapt(model, make(sites=("attn.q", "attn.v"), **options))
    shake(adapter, 0.3)
    q, v = adapter.modules.values()
    new = torch.cat([by_hand(q, W[:24], options), W[24:48].double(), by_hand(v, W[48:], options)])
    assert close(qkv(x), output(qkv, new, x), 2e-6)
    assert torch.equal(qkv(x)[..., 24:48], y0[..., 24:48])
    assert close(qkv(x[0, 0]), output(qkv, new, x[0, 0]), 2e-6)  # a single vector
    adapter.merge()
    assert torch.equal(qkv.weight[24:48], W[24:48])
    assert close(qkv(x), output(qkv, new, x), 2e-6)


@method
def test_low_precision_keeps_its_dtype(name: str) -> None:
    make, options = METHODS[name]
    for layer in (LAYERS["linear"](), LAYERS["conv-3x3"]()):
        torch.manual_seed(0)
        net = Net(layer.bfloat16())
        shake(adapter := vm.adapt(net, make(sites=("w",), **options), sites=TABLE), 0.3)
        (module,) = adapter.modules.values()
        x = inputs(layer).bfloat16()
        y = net(x)
        assert y.dtype == torch.bfloat16
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        assert close(y, output(layer, by_hand(module, layer.weight, options), x), 0.02)


@method
def test_columns_are_a_range_too(name: str) -> None:
    make, options = METHODS[name]
    torch.manual_seed(0)
    net = Net(nn.Linear(24, 24))
    halves = (vm.Weight("left", "layer.weight", (0, 2), axis=1), vm.Weight("right", "layer.weight", (1, 2), axis=1))
    adapter = vm.adapt(net, make(sites=("left", "right"), **options), sites={Net: halves})
    shake(adapter, 0.3)
    W = net.layer.weight
    parts = [by_hand(m, w, options) for m, w in zip(adapter.modules.values(), W.chunk(2, 1), strict=True)]
    x = fixed(3, 24)
    assert close(net(x), output(net.layer, torch.cat(parts, 1), x), 2e-6)


@method
def test_stacked_on_another_adapter(name: str) -> None:
    """The second sees what the first has made of the weight, and the bias stays as the first left it."""
    make, options = METHODS[name]
    torch.manual_seed(0)
    net = Net(nn.Linear(12, 24))
    x, W = fixed(3, 12), net.layer.weight.detach().clone()
    shake(lora := vm.adapt(net, vm.LoRA(sites=("w",), rank=2), sites=TABLE, name="lora"), 0.3)
    table = {Net: (vm.Weight("w", "layer.weight"), vm.Weight("b", "layer.bias"))}
    shake(vm.adapt(net, vm.Tune(sites=("b",)), sites=table, name="bias"), 0.3)
    shake(mine := vm.adapt(net, make(sites=("w",), **options), sites=TABLE, name="mine"), 0.3)
    (first,), (module,) = lora.modules.values(), mine.modules.values()
    between = (W + first.B @ first.A).detach()
    want = output(net.layer, by_hand(module, between, options), x)
    want = want - net.layer.bias + vm.attached(net)["bias"].modules["tune/layer.bias"].value
    assert close(net(x), want, 2e-6)


# -- sizes ----------------------------------------------------------------------------------------------------------


def vit_base() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224")


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (vm.FacT(rank=4), 8_448),
        (vm.FacT(rank=8), 21_504),
        (vm.FacT(rank=16), 61_440),
        (vm.FacT(rank=8, tucker=True), 13_952),
        (vm.FacT(rank=16, tucker=True), 30_976),
        (vm.FacT(rank=32, tucker=True), 86_528),
        (vm.LoHa(rank=8), 2 * 294_912),
        (vm.LoKr(rank=8), 24 * (24 * 24 + 2 * 8 * 32)),  # 768 = 24 x 32
        (vm.LoKr(rank=8, full=True), 24 * (24 * 24 + 32 * 32)),
        (vm.LoKr(rank=8, decompose_both=True), 24 * (2 * 8 * 24 + 2 * 8 * 32)),
        (vm.OFT(block_size=32), 24 * 24 * 32 * 31 // 2),
        (vm.OFT(block_size=32, rescale=True), 24 * (24 * 32 * 31 // 2 + 768)),
        (vm.BOFT(block_size=8, factors=4), 24 * 4 * 96 * 8 * 7 // 2),
    ],
    ids=str,
)
def test_counts_on_vit_base(method: Method, count: int) -> None:
    assert vm.adapt(vit_base(), method).num_parameters == count


@pytest.mark.parametrize("factor", [None, 1, 4, 6, 16])
def test_factors_are_those_of_lycoris(factor: int | None) -> None:
    pytest.importorskip("lycoris", reason=NO_LYCORIS)
    from lycoris.functional import factorization

    for size in range(1, 400):
        assert factorise(size, factor) == factorization(size, -1 if factor is None else factor)


def test_whatever_does_not_fit_is_named() -> None:
    with pytest.raises(vm.InputError, match=r"7 columns of layer .* do not divide into blocks of 2 to 4"):
        vm.adapt(Net(nn.Linear(7, 8)), vm.OFT(sites=("w",), block_size=4), sites=TABLE)
    with pytest.raises(vm.InputError, match=r"6 rows of layer .* do not divide into 3 stages of blocks of 2 to 8"):
        vm.adapt(Net(nn.Linear(8, 6)), vm.BOFT(sites=("w",), factors=3, side="out"), sites=TABLE)
    with pytest.raises(vm.InputError, match="4x8; its pieces must be at least as wide as the rank 5"):
        vm.adapt(Net(nn.Linear(8, 4)), vm.FacT(sites=("w",), rank=5), sites=TABLE)
    for make in (vm.LoHa, vm.LoKr, vm.OFT, vm.BOFT, vm.FacT):
        with pytest.raises(vm.InputError, match=f"{make.__name__} needs a floating-point matrix"):
            vm.adapt(timm.create_model("vit_tiny_patch16_224", depth=1), make(sites=("norm",)))
    for make, options, what in (
        (vm.LoHa, {"rank": 0}, "rank"),
        (vm.LoKr, {"rank": 0}, "rank"),
        (vm.LoKr, {"factor": 0}, "factor"),
        (vm.OFT, {"side": "left"}, "side"),
        (vm.OFT, {"block_size": 1}, "block_size"),
        (vm.OFT, {"neumann": 1}, "neumann"),
        (vm.BOFT, {"side": "left"}, "side"),
        (vm.BOFT, {"factors": 0}, "factors"),
        (vm.FacT, {"rank": 0}, "rank"),
        (vm.FacT, {"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(vm.InputError, match=f"{make.__name__}: .*{what}"):
            make(**options)  # type: ignore[arg-type]


# -- rotations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [vm.OFT, vm.BOFT])
def test_angles_between_rows_or_columns_are_kept(make: Callable[..., Method]) -> None:
    torch.manual_seed(0)
    for side, gram in (("in", lambda W: W @ W.T), ("out", lambda W: W.T @ W)):
        net = Net(nn.Linear(24, 16).double())
        adapter = vm.adapt(net, make(sites=("w",), side=side, block_size=8), sites=TABLE)
        shake(adapter, 0.5)
        (module,) = adapter.modules.values()
        W = net.layer.weight
        new = module(W, None)[0]
        assert not close(new, W, 0.1)
        assert close(gram(new), gram(W), 1e-12)


def test_a_butterfly_of_all_stages_mixes_everything() -> None:
    net = Net(nn.Linear(32, 4))
    for factors, reach in ((1, 4), (2, 8), (3, 16), (4, 32)):
        adapter = vm.adapt(net, vm.BOFT(sites=("w",), block_size=4, factors=factors), sites=TABLE, name="a")
        shake(adapter, 0.5)
        (module,) = adapter.modules.values()
        R = module(torch.eye(32), None)[0]
        assert (R != 0).sum(1).tolist() == [reach] * 32
        adapter.detach()


def test_one_stage_is_oft() -> None:
    net = Net(nn.Linear(24, 4))
    outputs = []
    for make, options in ((vm.OFT, {}), (vm.BOFT, {"factors": 1})):
        adapter = vm.adapt(net, make(sites=("w",), block_size=6, **options), sites=TABLE, name="a")
        shake(adapter, 0.5)
        outputs.append(net(fixed(3, 24)))
        adapter.detach()
    assert torch.equal(*outputs)


def test_rows_are_rotated_without_forming_a_weight() -> None:
    """On the output where that is exact: the layer's own bias must be known, and groups must not be mixed."""
    for layer, fast in ((nn.Linear(12, 24), True), (nn.Conv2d(12, 24, 3, groups=3), False)):
        net = Net(layer)
        vm.adapt(net, vm.OFT(sites=("w",), block_size=8, side="out"), sites=TABLE)
        assert (len(layer._forward_pre_hooks) == 0) == fast
        vm.adapt(net, vm.LoRA(sites=("w",)), sites=TABLE, name="b")
        assert len(layer._forward_pre_hooks) > 0


# -- FacT -----------------------------------------------------------------------------------------------------------


def tiny_vit(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=24, num_heads=3).eval()


@pytest.mark.parametrize("tucker", [False, True])
def test_fact_in_a_network_is_the_official_forward(tucker: bool) -> None:
    """The reference adds V(S(U x)) to each layer as the official code does, reading fc2's input as four chunks."""
    model, r, s = tiny_vit(), 3, 0.7
    adapter = vm.adapt(model, vm.FacT(rank=r, scaling=s, tucker=tucker))
    shake(adapter, 0.2)
    twin = tiny_vit()
    tensors = dict(adapter.named_parameters())
    u = lambda x: F.linear(x, tensors["fact/shared.24.U"])  # noqa: E731
    v = lambda h: F.linear(h, tensors["fact/shared.24.V"])  # noqa: E731

    def weights(key: str, place: str) -> Tensor:
        """What multiplies row vectors: r x r, or r x 4r for fc1 and 4r x r for fc2."""
        if not tucker:
            return tensors[f"fact/{key}.S"].T
        slices = tensors["fact/shared.24.C"] @ tensors[f"fact/{key}.P"]
        return {"attn": lambda: slices[:, :, 0], "fc1": lambda: slices.reshape(r, 4 * r)}.get(
            place, lambda: slices.reshape(r, 4 * r).T
        )()

    for i, block in enumerate(twin.blocks):
        block.attn.qkv.register_forward_hook(
            lambda m, a, y, i=i: (
                y + s * torch.cat([v(u(a[0]) @ weights(f"blocks.{i}.attn.qkv:{k}", "attn")) for k in "qkv"], -1)
            )
        )
        block.attn.proj.register_forward_hook(
            lambda m, a, y, i=i: y + s * v(u(a[0]) @ weights(f"blocks.{i}.attn.proj", "attn"))
        )
        block.mlp.fc1.register_forward_hook(
            lambda m, a, y, i=i: (
                y + s * v((u(a[0]) @ weights(f"blocks.{i}.mlp.fc1", "fc1")).unflatten(-1, (4, r))).flatten(-2)
            )
        )
        block.mlp.fc2.register_forward_hook(
            lambda m, a, y, i=i: (
                y + s * v(u(a[0].unflatten(-1, (4, 24))).flatten(-2) @ weights(f"blocks.{i}.mlp.fc2", "fc2"))
            )
        )
    x = fixed(2, 3, 32, 32)
    assert close(model(x), twin(x), 2e-6)


def test_fact_pieces_are_those_of_the_paper() -> None:
    model, r, s = tiny_vit(1), 3, 0.5
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = vm.adapt(model, vm.FacT(rank=r, scaling=s))
    shake(adapter, 0.2)
    adapter.merge()
    t = {n.removeprefix("fact/"): p for n, p in adapter.named_parameters()}
    U, V, S1, S2 = t["shared.24.U"], t["shared.24.V"], t["blocks.0.mlp.fc1.S"], t["blocks.0.mlp.fc2.S"]
    fc1 = model.blocks[0].mlp.fc1.weight - before["blocks.0.mlp.fc1.weight"]
    fc2 = model.blocks[0].mlp.fc2.weight - before["blocks.0.mlp.fc2.weight"]
    for j in range(4):
        assert close(fc1[24 * j : 24 * (j + 1)], s * V @ S1[j * r : (j + 1) * r] @ U, 1e-5)
        assert close(fc2[:, 24 * j : 24 * (j + 1)], s * V @ S2[:, j * r : (j + 1) * r] @ U, 1e-5)


def test_fact_shares_by_width_and_tower() -> None:
    def widths(model: nn.Module, method: vm.FacT) -> dict[str, tuple[int, ...]]:
        adapter = vm.adapt(model, method)
        shake(adapter)
        names = [n for n, _ in adapter.named_parameters() if n.endswith(".U")]
        return {n.split(".")[1]: tuple(adapter.state_dict()[n].shape) for n in names}

    assert widths(tiny_vit(), vm.FacT(rank=2)) == {"24": (2, 24)}
    swin = BY_NAME["timm-swin_tiny_patch4_window7_224"].model()
    assert widths(swin, vm.FacT(rank=2)) == {"12": (2, 12), "24": (2, 24)}
    clip = BY_NAME["transformers-CLIP"].model()
    assert widths(clip, vm.FacT(rank=2)) == {"image_24": (2, 24), "text_24": (2, 24)}
    unet = BY_NAME["diffusers-SD1.5"].model()
    kinds = ("attn.*", "xattn.*", "mlp.up", "mlp.gate", "mlp.down")
    assert widths(unet, vm.FacT(rank=2, sites=kinds)) == {"16": (2, 16), "32": (2, 32), "24": (2, 24)}


def test_fact_on_several_models_shares_over_all_of_them() -> None:
    models = {"a": tiny_vit(1), "b": tiny_vit(1)}
    adapter = vm.adapt(models, vm.FacT(rank=2))
    assert sum(n.endswith(".U") for n, _ in adapter.named_parameters()) == 1
    shake(adapter, 0.2)
    x = fixed(2, 3, 32, 32)
    y = [m(x) for m in models.values()]
    assert not close(y[0], y[1], 1e-3)  # their cores differ
    twins = copy.deepcopy(models)
    assert all(torch.equal(twins[k](x), y[i]) for i, k in enumerate(models))


def test_fact_begins_like_the_official_code() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=768, num_heads=12)
    adapter = vm.adapt(model, vm.FacT(rank=16))
    tk = vm.adapt(model, vm.FacT(rank=16, tucker=True), name="tk")
    model.init_weights()  # timm's, which wipes whatever it finds
    t = {n.removeprefix("fact/"): p for n, p in adapter.named_parameters()}
    k = {n.removeprefix("fact/"): p for n, p in tk.named_parameters()}

    def bounded(p: Tensor, bound: float) -> bool:
        return bool(0.97 * bound < p.abs().max() <= bound)

    assert not t["shared.768.V"].any()
    assert not k["shared.768.V"].any()
    assert bounded(t["shared.768.U"], 768**-0.5)
    assert bounded(t["blocks.0.attn.proj.S"], 16**-0.5)
    assert bounded(t["blocks.0.mlp.fc1.S"], 16**-0.5)
    assert bounded(t["blocks.0.mlp.fc2.S"], 64**-0.5)
    assert bounded(k["shared.768.C"], (6 / (16 * 16 + 16 * 16)) ** 0.5)
    P = torch.cat([p for n, p in k.items() if n.endswith(".P")], 1)
    assert P.shape == (16, 12)
    assert bounded(P, (6 / (16 + 12)) ** 0.5)


def test_dropout_of_fact_masks_features_of_the_core() -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(12, 48), nn.MultiheadAttention(12, 2, batch_first=True)):  # on the output, and in W'
        net = Net(layer)
        table = TABLE if isinstance(layer, nn.Linear) else None
        sites = ("w",) if table else ("attn.q",)
        if table is None:
            net = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0)
            table = {nn.TransformerEncoderLayer: ()}
        shake(adapter := vm.adapt(net, vm.FacT(sites=sites, rank=4, dropout=0.5), sites=table), 0.3)
        x = fixed(2, 5, 12)
        net.train()
        assert not torch.equal(net(x), net(x))
        mean = torch.stack([net(x).detach() for _ in range(2000)]).mean(0)
        net.eval()
        assert torch.equal(net(x), net(x))
        if isinstance(layer, nn.Linear):  # what is dropped is linear in the output
            assert close(mean, net(x), 0.1)
        net.train()
        adapter.merge()
        assert torch.equal(net(x), net(x))


def test_cores_without_a_gradient_are_alive_at_step_one_and_dead_without_a_path() -> None:
    model = tiny_vit()
    adapter = vm.adapt(model, vm.FacT(rank=2))
    model(fixed(2, 3, 32, 32)).square().mean().backward()
    assert not any(m.S.grad.any() for m in adapter.modules.values())  # V = 0
    assert adapter.unused() == []
    for p in adapter.parameters():
        p.grad = None
    h = model.blocks[0](model.patch_embed(fixed(2, 3, 32, 32)))
    model.blocks[1](h.detach())  # runs, but nothing comes of it
    h.square().mean().backward()
    assert sorted(adapter.unused()) == sorted(k for k in adapter.modules if "blocks.1" in k)


# -- initial values of LoHa and LoKr ----------------------------------------------------------------------------------


def test_initial_values_are_those_of_lycoris() -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(768, 768))
    (m,) = vm.adapt(net, vm.LoHa(sites=("w",), rank=16), sites=TABLE).modules.values()
    assert not m.w2a.any()
    for tensor, std in ((m.w1a, 0.1), (m.w1b, 1), (m.w2b, 1)):
        assert abs(tensor.std() / std - 1) < 0.05
    (m,) = vm.adapt(net, vm.LoKr(sites=("w",), rank=4), sites=TABLE, name="b").modules.values()
    assert not m.w2b.any()
    assert 0.95 * 24**-0.5 < m.w1.abs().max() <= 24**-0.5
    assert 0.9 * 4**-0.5 < m.w2a.abs().max() <= 4**-0.5


# -- peft -------------------------------------------------------------------------------------------------------------

PEFT_LAYERS = {
    "linear": lambda: nn.Linear(12, 24),
    "conv-1x1": lambda: nn.Conv2d(12, 24, 1),
    "conv-3x3": lambda: nn.Conv2d(12, 24, 3, stride=2, padding=1),
    "conv-groups": lambda: nn.Conv2d(12, 24, 3, padding=1, groups=2),
}
peft_layer = pytest.mark.parametrize("kind", PEFT_LAYERS)


def peers(layer: nn.Module, config: Any, mine: Method) -> tuple[nn.Module, nn.Module, Net, WeightModule]:
    """peft's model and layer, our model and module; on the same weights."""
    net = Net(layer)
    theirs = peft.get_peft_model(copy.deepcopy(net), config)
    adapter = vm.adapt(net, mine, sites=TABLE)
    shake(adapter, 0.3)
    (module,) = adapter.modules.values()
    return theirs, theirs.base_model.model.layer, net, module  # type: ignore[return-value]


def hand_over(module: nn.Module, layer: nn.Module, names: dict[str, str]) -> None:
    with torch.no_grad():
        for mine, theirs in names.items():
            tensor = getattr(layer, theirs)["default"]
            tensor.copy_(getattr(module, mine).reshape(tensor.shape))


def same_gradients(module: nn.Module, layer: nn.Module, names: dict[str, str]) -> bool:
    pairs = [(getattr(module, m).grad, getattr(layer, t)["default"].grad) for m, t in names.items()]
    return all(close(a.flatten(), b.flatten(), 1e-5) for a, b in pairs)


@peft_layer
@pytest.mark.parametrize("rank", [2, 4])  # without and with W'
def test_loha_against_peft(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = PEFT_LAYERS[kind]()
    config = peft.LoHaConfig(r=rank, alpha=3, target_modules=["layer"])
    theirs, peer, net, mine = peers(layer, config, vm.LoHa(sites=("w",), rank=rank, alpha=3))
    names = {n: f"hada_{n[:2]}_{n[2]}" for n in ("w1a", "w1b", "w2a", "w2b")}
    hand_over(mine, peer, names)
    x = inputs(layer)
    ours, other = net(x), theirs(x)
    assert close(ours, other, 2e-6)
    ours.square().sum().backward()
    other.square().sum().backward()
    assert same_gradients(mine, peer, names)


@peft_layer
@pytest.mark.parametrize("full", [False, True])
def test_lokr_against_peft(kind: str, full: bool) -> None:
    """Whole factors with alpha = r: peft scales these by alpha / r too, LyCORIS and we do not."""
    torch.manual_seed(0)
    layer = PEFT_LAYERS[kind]()
    rank = 9 if full else 1
    config = peft.LoKrConfig(r=rank, alpha=rank if full else 0.5, target_modules=["layer"])
    method = vm.LoKr(sites=("w",), rank=rank, alpha=rank if full else 0.5)
    theirs, peer, net, mine = peers(layer, config, method)
    names = {"w1": "lokr_w1", "w2": "lokr_w2"} if full else {"w1": "lokr_w1", "w2a": "lokr_w2_a", "w2b": "lokr_w2_b"}
    hand_over(mine, peer, names)
    x = inputs(layer)
    ours, other = net(x), theirs(x)
    assert close(ours, other, 2e-6)
    ours.square().sum().backward()
    other.square().sum().backward()
    assert same_gradients(mine, peer, names)


def test_peft_orders_lokr_of_conv1d_wrongly() -> None:
    """Its Kronecker product of a matrix and a 3-axis tensor lines up the last axes: columns with places."""
    torch.manual_seed(0)
    config = peft.LoKrConfig(r=8, alpha=8, target_modules=["layer"])
    _, peer, net, mine = peers(nn.Conv1d(8, 6, 3), config, vm.LoKr(sites=("w",), rank=8))
    hand_over(mine, peer, {"w1": "lokr_w1", "w2": "lokr_w2"})
    W = net.layer.weight
    want = mine(W, None)[0] - W
    change = peer.get_delta_weight("default")
    assert not close(change, want, 0.5)
    w1, w2 = mine.w1, mine.w2
    assert close(change, torch.kron(w1[None], w2).reshape(W.shape), 1e-6)
    assert close(want, torch.stack([torch.kron(w1, w2[..., i]) for i in range(3)], -1), 1e-6)


@pytest.mark.parametrize("neumann", [0, 5])
@pytest.mark.parametrize("kind", ["linear", "conv-1x1"])
def test_oft_against_peft(kind: str, neumann: int) -> None:
    """peft's exact R is (I - Q) (I + Q)^-1, but its approximate one is near (I + Q) (I - Q)^-1: the signs differ."""
    torch.manual_seed(0)
    layer = PEFT_LAYERS[kind]()
    config = peft.OFTConfig(oft_block_size=4, target_modules=["layer"], use_cayley_neumann=bool(neumann))
    method = vm.OFT(sites=("w",), block_size=4, neumann=neumann)
    theirs, peer, net, mine = peers(layer, config, method)
    sign = 1 if neumann else -1
    with torch.no_grad():
        peer.oft_R["default"].weight.copy_(sign * mine.Q[0])
    x = inputs(layer)
    ours, other = net(x), theirs(x)
    assert close(ours, other, 2e-6)
    ours.square().sum().backward()
    other.square().sum().backward()
    assert close(mine.Q.grad[0], sign * peer.oft_R["default"].weight.grad, 1e-5)


def test_peft_does_not_begin_at_the_base_with_oft_on_3x3() -> None:
    """It cuts the input into overlapping patches, rotates them and folds them back: that adds up to nine patches for a
    pixel, and hands them over with places before kernel positions where `fold` wants them behind. Even R = 1 makes
    another input of that. What it merges is right, so its live and merged outputs differ; ours do not."""
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 24, 3, padding=1)
    config = peft.OFTConfig(oft_block_size=4, target_modules=["layer"], use_cayley_neumann=False)
    x, y0 = inputs(layer), layer(inputs(layer))
    theirs, peer, net, mine = peers(layer, config, vm.OFT(sites=("w",), block_size=4))
    assert not close(theirs(x), y0, 1.0)
    patches = x.unfold(2, 3, 1).unfold(3, 3, 1)  # n c h w kh kw
    assert close(theirs(x), output(layer, layer.weight, F.fold(patches.reshape(2, 12 * 9, -1), (9, 9), 3)), 1e-5)
    assert not close(F.fold(F.unfold(x, 3), (9, 9), 3), x, 1.0)  # in the right order it would not be x either
    with torch.no_grad():
        peer.oft_R["default"].weight.copy_(-mine.Q[0])
    live = theirs(x)
    peer.merge()
    assert not close(theirs(x), live, 0.5)
    assert close(theirs(x), net(x), 2e-6)


# -- LyCORIS (lycoris_lora) ----------------------------------------------------------------------


@pytest.fixture
def lycoris() -> Any:
    pytest.importorskip("lycoris", reason=NO_LYCORIS)
    import lycoris.modules as modules

    return modules


@peft_layer
def test_loha_against_lycoris(lycoris: Any, kind: str) -> None:
    torch.manual_seed(0)
    net = Net(PEFT_LAYERS[kind]())
    theirs = lycoris.LohaModule("x", copy.deepcopy(net.layer), 1.0, 2, alpha=3)
    shake(adapter := vm.adapt(net, vm.LoHa(sites=("w",), rank=2, alpha=3), sites=TABLE), 0.3)
    (mine,) = adapter.modules.values()
    with torch.no_grad():
        for name in ("w1a", "w1b", "w2a", "w2b"):
            getattr(theirs, f"hada_{name[:2]}_{name[2]}").copy_(getattr(mine, name))
    x = inputs(net.layer)
    assert close(net(x), theirs(x), 2e-6)
    # its merged weight multiplies by alpha / r twice
    change = theirs.get_merged_weight(shape=net.layer.weight.shape)[0].detach() - net.layer.weight
    assert close(change, 1.5 * (mine(net.layer.weight, None)[0] - net.layer.weight), 1e-5)


@peft_layer
@pytest.mark.parametrize("options", [{}, {"factor": 2}, {"decompose_both": True, "factor": 6}, {"full": True}])
def test_lokr_against_lycoris(lycoris: Any, kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net(PEFT_LAYERS[kind]())
    named = {"full_matrix" if k == "full" else k: v for k, v in options.items()}
    theirs = lycoris.LokrModule("x", copy.deepcopy(net.layer), 1.0, 1, alpha=0.5, **named)
    shake(adapter := vm.adapt(net, vm.LoKr(sites=("w",), rank=1, alpha=0.5, **options), sites=TABLE), 0.3)
    (mine,) = adapter.modules.values()
    names = dict(mine.named_parameters())
    assert {f"lokr_{n[:2]}" + (f"_{n[2]}" if n[2:] else "") for n in names} == {n for n, _ in theirs.named_parameters()}
    with torch.no_grad():
        for name, p in names.items():
            peer = getattr(theirs, f"lokr_{name[:2]}" + (f"_{name[2]}" if name[2:] else ""))
            peer.copy_(p.reshape(peer.shape))
    x = inputs(net.layer)
    assert close(net(x), theirs(x), 2e-6)


@peft_layer
def test_oft_against_lycoris(lycoris: Any, kind: str) -> None:
    """W' = R^T W with Q = X - X^T there, which is R W at -Q; 24 rows in 6 blocks of 4."""
    torch.manual_seed(0)
    net = Net(PEFT_LAYERS[kind]())
    theirs = lycoris.DiagOFTModule("x", copy.deepcopy(net.layer), 1.0, 4, rescaled=True)
    assert theirs.oft_blocks.shape == (6, 4, 4)
    method = vm.OFT(sites=("w",), block_size=4, side="out", rescale=True)
    shake(adapter := vm.adapt(net, method, sites=TABLE), 0.3)
    (mine,) = adapter.modules.values()
    with torch.no_grad():
        theirs.oft_blocks[:, *torch.triu_indices(4, 4, 1)] = -mine.Q[0]
        theirs.rescale.copy_(mine.g.view(theirs.rescale.shape))
    x = inputs(net.layer)
    assert close(net(x), theirs(x), 2e-6)


def test_lycoris_rotates_the_bias_in_its_bypass_mode(lycoris: Any) -> None:
    """Which is another function than its own weight gives: W' = R W leaves b, the bypass turns the whole output."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 24)
    rebuilt, bypass = (lycoris.DiagOFTModule("x", layer, 1.0, 4, bypass_mode=b) for b in (False, True))
    with torch.no_grad():
        rebuilt.oft_blocks.normal_()
        bypass.oft_blocks.copy_(rebuilt.oft_blocks)
    x = fixed(3, 12)
    turned = rebuilt.make_weight() @ torch.linalg.lstsq(layer.weight, layer.bias).solution
    assert not close(bypass(x), rebuilt(x), 0.05)
    R = torch.block_diag(*rebuilt.get_r()).T
    assert turned.shape == layer.bias.shape
    assert close(bypass(x) - rebuilt(x), (R @ layer.bias - layer.bias).expand(3, -1), 1e-4)


def test_boft_against_lycoris(lycoris: Any) -> None:
    """It has the two halves of a block alternate, entry by entry; that permutes Q within blocks."""
    from lycoris.functional.boft import diff_weight

    torch.manual_seed(0)
    net, b, m = Net(nn.Linear(12, 48)), 6, 4
    method = vm.BOFT(sites=("w",), block_size=b, factors=m, side="out", rescale=True)
    shake(adapter := vm.adapt(net, method, sites=TABLE), 0.3)
    (mine,) = adapter.modules.values()
    Q = torch.zeros(m, 48 // b, b, b)
    Q[..., *torch.triu_indices(b, b, 1)] = mine.Q.detach()
    Q = Q - Q.mT
    order = torch.arange(b).view(2, b // 2).T.flatten()  # 0 3 1 4 2 5
    W = net.layer.weight
    theirs = W + diff_weight(W, Q[..., order[:, None], order].triu(1), mine.g[:, None].detach())
    assert close(mine(W, None)[0], theirs, 2e-6)
