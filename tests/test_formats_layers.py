"""The layers that all formats are read into: what each does to a weight, by hand; nothing is lost or guessed."""

import json

import pytest
import torch
from their_files import changed
from torch import Tensor, nn

import vismodal as vm
from vismodal.discover import discover
from vismodal.errors import InputError
from vismodal.families import table
from vismodal.files import write_tensors
from vismodal.formats import kohya, names, peft, tokens
from vismodal.formats.bases import base_of, detect
from vismodal.formats.files import Contents, layers_of, read_file, read_tensors, write_file
from vismodal.formats.layers import algorithm, alpha, plain, rank, scaling, with_alpha
from vismodal.formats.methods import methods_for
from vismodal.formats.summary import inspect

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
UP = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "mid_block.attentions.0.norm"


class Tiny(nn.Module):
    """A matrix, a GEGLU's matrix, a convolution and a norm, in places that a UNet has."""

    def __init__(self) -> None:
        super().__init__()
        made = {Q: nn.Linear(6, 8), UP: nn.Linear(6, 16), CONV: nn.Conv2d(6, 8, 3), NORM: nn.GroupNorm(2, 8)}
        for path, module in made.items():
            at: nn.Module = self
            *heads, last = path.split(".")
            for head in heads:
                if head not in at._modules:
                    at.add_module(head, nn.Module())
                at = at._modules[head]  # type: ignore[assignment]
            at.add_module(last, module)


TABLE = {
    Tiny: (
        vm.Weight("attn.q", f"{Q}.weight"),
        vm.Weight("mlp.up", f"{UP}.weight", (0, 2)),
        vm.Weight("mlp.gate", f"{UP}.weight", (1, 2)),
        vm.Weight("mlp.in", f"{UP}.weight", whole=True),
        vm.Weight("conv", f"{CONV}.weight"),
    )
}


def make(*methods: vm.methods) -> tuple[nn.Module, vm.Adapter]:
    torch.manual_seed(0)
    model = Tiny()
    adapter = vm.adapt({"unet": model}, methods, sites=TABLE, seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.3 * torch.randn(p.shape))
    return model, adapter


ALL = ("attn.q", "mlp.in", "conv")
HALVES = ("attn.q", "mlp.up", "mlp.gate", "conv")
METHODS = {
    "LoRA": vm.LoRA(sites=ALL, rank=2, alpha=3),
    "LoRA of ranks": vm.LoRA(sites=ALL, rank=2, alpha=3, ranks={"conv": 3}),
    "LoRA of halves": vm.LoRA(sites=HALVES, rank=2, alpha=3, ranks={"mlp.up": 3}),
    "LoRA of one half": vm.LoRA(sites=("mlp.gate",), rank=2, alpha=3),
    "AdaLoRA": vm.AdaLoRA(sites=ALL, rank=3, target=2),
    "VeRA": vm.VeRA(sites=("attn.q",), rank=3, d=1.0),
    "PiSSA": vm.PiSSA(sites=ALL, rank=2, alpha=3),
    "DoRA": vm.DoRA(sites=ALL, rank=2, alpha=3),
    "DoRA of halves": vm.DoRA(sites=HALVES, rank=2, alpha=3),
    "LoHa": vm.LoHa(sites=ALL, rank=2, alpha=3),
    "LoHa of halves": vm.LoHa(sites=HALVES, rank=2, alpha=3),
    "LoKr": vm.LoKr(sites=ALL, rank=1, alpha=3),
    "LoKr, both": vm.LoKr(sites=("attn.q",), rank=1, alpha=3, factor=4, decompose_both=True),
    "LoKr, full": vm.LoKr(sites=ALL, full=True, alpha=3),
    "OFT": vm.OFT(sites=ALL, block_size=4, side="out"),
    "OFT of halves": vm.OFT(sites=HALVES, block_size=2, side="out", rescale=True),
    "OFT of one half": vm.OFT(sites=("mlp.up",), block_size=4, side="out", rescale=True),
    "full": vm.Tune(sites=ALL),
    "full, half": vm.Tune(sites=("mlp.gate",)),
    "full with biases": vm.Tune(sites=("attn.q", "bias"), where=f"unet.{Q}"),
    "norm": vm.Tune(sites=("norm",)),
}


def layer_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {f"unet.{path}": model.get_submodule(path) for path in (Q, UP, CONV, NORM)}


def merged(model: nn.Module, adapter: vm.Adapter) -> dict[str, Tensor]:
    """The tensors of the base as the adapter leaves them."""
    adapter.merge()
    kept = {f"unet.{name}": p.detach().clone() for name, p in model.named_parameters() if "_vismodal" not in name}
    adapter.unmerge()
    return kept


@pytest.mark.parametrize("name", METHODS)
def test_layers_say_what_the_method_does(name):
    model, adapter = make(METHODS[name])
    layers = layers_of(adapter)
    after = merged(model, adapter)
    modules = layer_modules(model)
    assert layers and layers.keys() <= modules.keys()
    for module, layer in layers.items():
        torch.testing.assert_close(
            changed(modules[module].weight, layer), after[f"{module}.weight"].double(), atol=1e-5, rtol=1e-5
        )
        bias = layer.get("diff_b", layer.get("b_norm"))
        if bias is not None:
            torch.testing.assert_close(modules[module].bias.detach() + bias, after[f"{module}.bias"])
    if name in ("norm", "full with biases"):
        assert all("b_norm" in layer or "diff_b" in layer for layer in layers.values())


@pytest.mark.parametrize("name", METHODS)
def test_layers_become_methods_that_do_the_same(name):
    """Layers -> methods of ours on a fresh model -> layers: the same weights."""
    model, adapter = make(METHODS[name])
    layers, after = layers_of(adapter), merged(model, adapter)
    fresh = make(vm.LoRA(sites=("attn.q",)))[0]
    vm.attached({"unet": fresh})["default"].detach()
    sites = discover(fresh, table(fresh, TABLE), "unet")
    made = methods_for(layers, sites)
    back = vm.adapt({"unet": fresh}, [method for method, _ in made], sites=TABLE)
    back.load_state_dict(
        {
            f"{s}/{k}.{n}": t
            for s, (_, by) in zip(back.methods, made, strict=True)
            for k, d in by.items()
            for n, t in d.items()
        }
    )
    for key, value in merged(fresh, back).items():
        torch.testing.assert_close(value, after[key], atol=1e-5, rtol=1e-5)


def test_per_module_alphas_go_into_one_method():
    def lora(out: int, r: int, kernel: tuple[int, ...], alpha: float) -> dict[str, Tensor]:
        down, up = torch.randn(r, 6, *kernel), torch.randn(out, r, *[1] * len(kernel))
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}

    sizes = {Q: (8, 2, (), 7.0), UP: (16, 2, (), 1.0), CONV: (8, 3, (3, 3), 1.0)}
    layers = {f"unet.{path}": lora(*size) for path, size in sizes.items()}
    model = Tiny()
    ((method, tensors),) = methods_for(layers, discover(model, table(model, TABLE), "unet"))
    assert (method.rank, method.alpha, method.ranks) == (2, 1.0, {f"unet.{CONV}": 3})
    torch.testing.assert_close(tensors[f"unet.{Q}"]["B"], 7 * layers[f"unet.{Q}"]["lora_up.weight"])
    even = kohya.even(layers)
    assert {float(layer["alpha"]) for layer in even.values()} == {1.0}
    for module, W in (
        (f"unet.{m}", t.weight) for m, t in ((Q, model.get_submodule(Q)), (CONV, model.get_submodule(CONV)))
    ):
        torch.testing.assert_close(changed(W, even[module]), changed(W, layers[module]))


def tucker(suffix: str) -> tuple[dict[str, Tensor], Tensor]:
    """A layer with a core on a 3x3 convolution of 5 to 4 channels, and its change, by LyCORIS's definitions."""
    r, out, inn = 2, 4, 5
    a, b, core = torch.randn(r, out), torch.randn(r, inn), torch.randn(r, r, 3, 3)
    whole = torch.einsum("pqhw,po,qi->oihw", core, a, b)
    if suffix == "lora":
        layer = {
            "lora_down.weight": b[:, :, None, None],
            "lora_mid.weight": core,
            "lora_up.weight": a.T[:, :, None, None],
        }
        return {**layer, "alpha": torch.tensor(6.0)}, 3 * whole
    if suffix == "loha":
        a2, b2, core2 = torch.randn(r, out), torch.randn(r, inn), torch.randn(r, r, 3, 3)
        layer = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": core, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t2": core2}
        return {**layer, "alpha": torch.tensor(6.0)}, 3 * whole * torch.einsum("pqhw,po,qi->oihw", core2, a2, b2)
    w1 = torch.randn(3, 2)
    layer = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core, "alpha": torch.tensor(6.0)}
    return layer, 3 * torch.kron(w1[..., None, None], whole.contiguous())


@pytest.mark.parametrize("suffix", ["lora", "loha", "lokr"])
def test_the_core_of_a_tucker_decomposition_goes_into_a_factor(suffix):
    torch.manual_seed(0)
    layer, change = tucker(suffix)
    assert algorithm("m", layer) == suffix
    assert rank(layer) == 2 and scaling(layer) == 3
    simple = plain(layer)
    assert not {"lora_mid.weight", "hada_t1", "hada_t2", "lokr_t2"} & simple.keys()
    W = torch.randn_like(change)
    torch.testing.assert_close(changed(W, simple), (W + change).double(), atol=1e-5, rtol=1e-5)


def test_a_bounded_oft_is_bounded_here_too():
    """COFT's alpha is a bound on |Q|, of rows times that; it is taken up into the blocks."""
    X = torch.randn(2, 4, 4)
    model = Tiny()
    layers = {f"unet.{Q}": {"oft_blocks": X, "alpha": torch.tensor(0.05)}}
    ((_, tensors),) = methods_for(layers, discover(model, table(model, TABLE), "unet"))
    assert X.sub(X.mT).norm() > 0.4
    entries = tensors[f"unet.{Q}"]["Q"]
    torch.testing.assert_close((2 * entries.square().sum()).sqrt(), torch.tensor(0.4))


def test_what_others_cannot_say_is_an_error():
    def fails(match: str, *methods) -> None:
        with pytest.raises(InputError, match=match):
            layers_of(make(*methods)[1])

    fails(r'rotations of rows, OFT\(side="out"\); this one has columns', vm.OFT(sites=("attn.q",), block_size=2))
    fails("a series", vm.OFT(sites=("attn.q",), block_size=2, side="out", neumann=5))
    fails("stages of a butterfly", vm.BOFT(sites=("attn.q",), block_size=2, side="out"))
    fails("no word for IA3", vm.IA3(sites=("attn.q",)))
    fails("no bias without its weight", vm.Tune(sites=("bias",)))
    fails("one method on a layer", vm.LoRA(sites=("attn.q",)), vm.LoHa(sites=("attn.q",)))
    fails(r"LoKr on up of one matrix; adapt sites=\(.mlp.in", vm.LoKr(sites=("mlp.up",), rank=1))
    fails("DoRA on up of one", vm.DoRA(sites=("mlp.up",)))
    _, adapter = make(vm.LoRA(sites=("attn.q",)))
    adapter.merge()
    with pytest.raises(InputError, match=r"adapter.unmerge\(\) first"):
        layers_of(adapter)


def test_layers_that_the_base_or_a_method_cannot_take_are_errors():
    model = Tiny()
    sites = discover(model, table(model, TABLE), "unet")
    lora = {"lora_down.weight": torch.randn(2, 6), "lora_up.weight": torch.randn(8, 2)}
    with pytest.raises(InputError, match=r"the base model has no unet.up_blocks.0.x"):
        methods_for({"unet.up_blocks.0.x": lora}, sites)
    with pytest.raises(InputError, match="is 8x6 in the base model and 8x5 in the file"):
        methods_for({f"unet.{Q}": {**lora, "lora_down.weight": torch.randn(2, 5)}}, sites)
    loha = {f"hada_w{i}_{x}": torch.randn(*shape) for i in (1, 2) for x, shape in (("a", (8, 2)), ("b", (2, 6)))}
    with pytest.raises(InputError, match="LoHa with DoRA's magnitudes, which is no method of vismodal"):
        methods_for({f"unet.{Q}": {**loha, "dora_scale": torch.ones(8, 1)}}, sites)
    with pytest.raises(InputError, match="magnitudes for columns"):
        methods_for({f"unet.{Q}": {**lora, "dora_scale": torch.ones(1, 6)}}, sites)
    with pytest.raises(InputError, match=r"lora_down.weight, hada_w1_a, which is no whole layer"):
        algorithm("m", {"lora_down.weight": torch.ones(1, 1), "hada_w1_a": torch.ones(1, 1)})
    with pytest.raises(InputError, match="BOFT"):
        algorithm("m", {"oft_blocks": torch.ones(1, 1, 2, 2)})


# -- keys --------------------------------------------------------------------------------------------------------------


def files_layer(r=2) -> dict[str, Tensor]:
    return {"lora_down.weight": torch.randn(r, 6), "lora_up.weight": torch.randn(8, r), "alpha": torch.tensor(1.0)}


def test_kohya_names_by_base():
    """The names that kohya's scripts write, by hand: SD1's are diffusers', SDXL's those of the original UNet."""
    block, text = "transformer_blocks.0.attn1.to_out.0", "text_model.encoder.layers.3.mlp.fc1"
    out, te = names.flat(block), names.flat(text)
    up = "unet_up_blocks_0_resnets_2"
    modules = {
        f"unet.down_blocks.1.attentions.0.{block}": (
            f"unet_down_blocks_1_attentions_0_{out}",
            f"unet_input_blocks_4_1_{out}",
        ),
        "unet.mid_block.attentions.0.proj_in": ("unet_mid_block_attentions_0_proj_in", "unet_middle_block_1_proj_in"),
        "unet.mid_block.resnets.1.conv1": ("unet_mid_block_resnets_1_conv1", "unet_middle_block_2_in_layers_2"),
        "unet.down_blocks.0.downsamplers.0.conv": (
            "unet_down_blocks_0_downsamplers_0_conv",
            "unet_input_blocks_3_0_op",
        ),
        "unet.up_blocks.1.upsamplers.0.conv": ("unet_up_blocks_1_upsamplers_0_conv", "unet_output_blocks_5_2_conv"),
        "unet.up_blocks.0.resnets.2.conv_shortcut": (
            f"{up}_conv_shortcut",
            "unet_output_blocks_2_0_skip_connection",
        ),
        "unet.up_blocks.0.resnets.2.time_emb_proj": (f"{up}_time_emb_proj", "unet_output_blocks_2_0_emb_layers_1"),
        "unet.up_blocks.2.resnets.1.conv2": ("unet_up_blocks_2_resnets_1_conv2", "unet_output_blocks_7_0_out_layers_3"),
        "unet.conv_in": ("unet_conv_in", "unet_input_blocks_0_0"),
        "unet.conv_out": ("unet_conv_out", "unet_out_2"),
        "unet.time_embedding.linear_2": ("unet_time_embedding_linear_2", "unet_time_embed_2"),
        f"text_encoder.{text}": (f"te_{te}", f"te1_{te}"),
    }
    layers = {module: files_layer() for module in modules}
    for i, kind in enumerate(("sd1", "sdxl")):
        tensors, header = kohya.write(layers, {}, kind)
        stems = [key.partition(".")[0] for key in tensors if key.endswith(".alpha")]
        assert stems == [f"lora_{both[i]}" for both in modules.values()]
        back, _ = kohya.read(tensors)
        assert back.keys() == layers.keys()
        assert detect({}, header) == kind
    with pytest.raises(InputError, match="is of text_encoder_2, and kohya's files for sd1 hold text_encoder, unet"):
        kohya.write({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": files_layer()}, {}, "sd1")
    both = kohya.write({"text_encoder_2.text_projection": files_layer()}, {}, "sdxl")[0]
    assert {key.partition(".")[0] for key in both} == {"lora_te2_text_projection"}


def test_text_encoders_have_text_model_once():
    """LyCORIS over transformers 5 leaves it out of kohya's names."""
    keys = {f"lora_te_encoder_layers_0_mlp_fc1.{n}": t for n, t in files_layer().items()}
    layers, _ = kohya.read(keys)
    assert list(layers) == ["text_encoder.text_model.encoder.layers.0.mlp.fc1"]


def test_unknown_keys_are_named():
    good = {f"lora_unet_conv_in.{n}": t for n, t in files_layer().items()}
    for bad in ("lora_unet_conv_in.b1.weight", "lora_unet_conv_inn.alpha", "lora_te3_x.alpha", "foo.bar"):
        with pytest.raises(InputError, match=f"keys that are not known here: {bad}"):
            kohya.read({**good, bad: torch.ones(1)})
    fine = {"unet.conv_in.lora_A.weight": torch.ones(1, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(InputError, match=r"not known here: unet.conv_in.lora_B.bias"):
        peft.read({**fine, "unet.conv_in.lora_B.bias": torch.ones(2)}, {})
    with pytest.raises(InputError, match=r"no module .* is named 'foo_bar'"):
        names.dotted("conv_in_foo_bar")


def test_old_diffusers_keys_are_read(tmp_path):
    """Attention processors, `lora.down` and a text encoder's `to_q_lora`, as older versions wrote them."""
    stem = "down_blocks.0.attentions.0.transformer_blocks.0"
    text = "text_model.encoder.layers.0"
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    written = {
        f"unet.{stem}.attn1.processor.to_out_lora": f"unet.{stem}.attn1.to_out.0",
        f"unet.{stem}.attn2.processor.to_k_lora": f"unet.{stem}.attn2.to_k",
        f"unet.{stem}.ff.net.2.lora": f"unet.{stem}.ff.net.2",
        f"text_encoder.{text}.self_attn.to_q_lora": f"text_encoder.{text}.self_attn.q_proj",
        f"text_encoder.{text}.mlp.fc1.lora_linear_layer": f"text_encoder.{text}.mlp.fc1",
    }
    tensors = {f"{key}.{part}.weight": t for key in written for part, t in (("down", down), ("up", up))}
    assert all(map(peft.knows, tensors))
    layers = peft.read(tensors, {})
    assert list(layers) == list(written.values())
    assert all(scaling(layer) == 1 for layer in layers.values())
    alone = {"encoder.layers.0.mlp.fc1.lora_A.weight": down, "encoder.layers.0.mlp.fc1.lora_B.weight": up}
    assert list(peft.read(alone, {})) == [f"text_encoder.{text}.mlp.fc1"]
    prefixed = {f"base_model.model.{stem}.attn1.to_q.lora_{x}.weight": t for x, t in (("A", down), ("B", up))}
    config = {peft.METADATA: json.dumps({"r": 2, "lora_alpha": 6})}
    assert {m: scaling(layer) for m, layer in peft.read(prefixed, config).items()} == {f"unet.{stem}.attn1.to_q": 3}
    file = write_tensors(tmp_path / "adapter_model.safetensors", prefixed)
    with pytest.raises(InputError, match=r"adapter_config.json, which must lie beside"):
        read_file(file)
    (tmp_path / "adapter_config.json").write_text(config[peft.METADATA])
    assert [scaling(layer) for layer in read_file(file).layers.values()] == [3]


def test_alphas_come_from_pefts_config():
    tensors = {
        f"unet.{m}.lora_{x}.weight": t
        for m in (Q, UP, CONV)
        for x, t in (("A", torch.ones(4, 6)), ("B", torch.ones(8, 4)))
    }

    def alphas(**config) -> list[float]:
        header = {peft.METADATA: json.dumps({f"unet.{k}": v for k, v in config.items()})}
        return [alpha(layer) for layer in peft.read(tensors, header).values()]

    assert alphas(r=4, lora_alpha=2) == [2, 2, 2]
    assert alphas(r=4, lora_alpha=2, alpha_pattern={"attn1.to_q": 8, "resnets.0.conv1": 3}) == [8, 2, 3]
    assert alphas(r=4, lora_alpha=2, alpha_pattern={r".*\.conv\d": 3}) == [2, 2, 3]
    assert alphas(r=4, lora_alpha=2, use_rslora=True) == [4, 4, 4]  # 2 / sqrt(4) = 4 / 4
    with pytest.raises(InputError, match="changes the base model too"):
        alphas(r=4, lora_alpha=2, init_lora_weights="pissa")
    with pytest.raises(InputError, match="says nothing of unet"):
        peft.read(tensors, {peft.METADATA: json.dumps({"text_encoder.r": 4})})


def test_diffusers_takes_no_mix_and_no_other_method():
    lora, dora = files_layer(), {**files_layer(), "dora_scale": torch.ones(8, 1)}
    with pytest.raises(InputError, match=f"on all layers of a model or on none; unet.{Q} are LoRA; write --to kohya"):
        peft.write({f"unet.{Q}": lora, f"unet.{UP}": dora})
    mixed = peft.write({f"unet.{Q}": dora, "text_encoder.text_model.encoder.layers.0.mlp.fc1": lora})[1]
    settings = json.loads(mixed[peft.METADATA])
    assert settings["unet.use_dora"] and "text_encoder.use_dora" not in settings
    with pytest.raises(InputError, match=r"plain LoRA only; unet.* is full; write --to kohya"):
        peft.write({f"unet.{Q}": {"diff": torch.ones(8, 6)}})


def test_scaling_keeps_precision():
    """A strength that fp16 cannot take up without rounding leaves the tensor in fp32."""
    layer = {
        "lora_down.weight": torch.randn(4, 6).half(),
        "lora_up.weight": torch.randn(8, 4).half(),
        "alpha": torch.tensor(3.0),
    }
    exact = with_alpha(layer, 6.0)["lora_up.weight"]
    assert exact.dtype == torch.float16
    third = with_alpha(layer, 7.0)["lora_up.weight"]
    assert third.dtype == torch.float32
    torch.testing.assert_close(third, layer["lora_up.weight"].float() * 3 / 7)


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_the_four_layouts_of_textual_inversion(tmp_path):
    rows, wide = torch.randn(3, 16), torch.randn(3, 20)
    layouts = {
        "diffusers": {"<dog>": rows},
        "one vector": {"<dog>": rows[0]},
        "emb_params": {"emb_params": rows},
        "xl": {"clip_l": rows, "clip_g": wide},
    }
    for name, tensors in layouts.items():
        file = write_tensors(tmp_path / name.replace(" ", "") / "dog.safetensors", tensors)
        contents = read_file(file)
        token = "<dog>" if "<dog>" in tensors else "dog"
        encoders = contents.tokens[token]
        torch.testing.assert_close(encoders["text_encoder"], rows[:1] if name == "one vector" else rows)
        if name == "xl":
            torch.testing.assert_close(encoders["text_encoder_2"], wide)
        # diffusers' own, and a web UI's, hold the same
        for to in ("diffusers", "kohya"):
            back = read_file(write_file(contents, to, tmp_path / f"{to}{len(name)}" / "dog.safetensors"))
            assert [{e: t.tolist() for e, t in r.items()} for r in back.tokens.values()] == [
                {e: t.tolist() for e, t in r.items()} for r in contents.tokens.values()
            ]
    assert read_file(file, token="sks").tokens.keys() == {"sks"}
    pickle = tmp_path / "charturner.pt"
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": nn.Parameter(rows)}, "name": "dog", "step": 400},
        pickle,
    )
    contents = read_file(pickle)
    torch.testing.assert_close(contents.tokens["dog"]["text_encoder"], rows)
    assert contents.header == {"step": "400"}
    with pytest.raises(InputError, match="only safetensors are written"):
        write_file(contents, "kohya", tmp_path / "x.pt")


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_no_code_in_a_pickle_runs(tmp_path, capsys):
    file = tmp_path / "evil.pt"
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}, "name": Evil()}, file)
    with pytest.raises(InputError, match="no pickle of tensors and plain values alone"):
        read_file(file)
    assert "this ran" not in capsys.readouterr().out
    (tmp_path / "broken.pt").write_bytes(b"no pickle")
    with pytest.raises(InputError, match="no pickle of tensors"):
        read_file(tmp_path / "broken.pt")
    torch.save({"a": 1}, file)
    with pytest.raises(InputError, match=r"no string_to_param\['\*'\]"):
        read_file(file)


def test_bundles_hold_an_adapter_and_tokens(tmp_path):
    layers = {"unet.conv_in": files_layer()}
    found = {
        "dog": {"text_encoder": torch.randn(2, 4)},
        "a.b": {"text_encoder": torch.randn(1, 4), "text_encoder_2": torch.randn(1, 6)},
    }
    file = write_file(Contents("kohya", layers, found), "kohya", tmp_path / "x.safetensors", base_of("sdxl"))
    keys = read_tensors(file)[0].keys()
    assert {"bundle_emb.dog.emb_params", "bundle_emb.a.b.clip_l", "bundle_emb.a.b.clip_g"} <= keys
    back = read_file(file)
    assert back.layers.keys() == layers.keys()
    assert {t: {e: r.tolist() for e, r in rows.items()} for t, rows in back.tokens.items()} == {
        t: {e: r.tolist() for e, r in rows.items()} for t, rows in found.items()
    }
    for to in ("diffusers", "lycoris"):
        with pytest.raises(InputError, match=r"keeps no tokens.*--only adapter, and again --only tokens"):
            write_file(back, to, tmp_path / "y.safetensors", base_of("sdxl"))
    with pytest.raises(InputError, match=r"not known here: bundle_emb.dog.other"):
        tokens.unbundle({"bundle_emb.dog.other": torch.ones(1, 2)})


# -- bases, headers, inspection ---------------------------------------------------------------------------------------


def test_the_base_is_told_by_the_file(tmp_path):
    def width(n: int) -> dict:
        return {
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": {"lora_down.weight": torch.ones(1, n)}
        }

    assert [detect(width(n), {}) for n in (768, 1024, 2048, 24)] == ["sd1", "sd2", "sdxl", None]
    block = "transformer.transformer_blocks.1.attn.to_q"
    wide = [{block: {"lora_down.weight": torch.ones(1, n)}} for n in (3072, 1536, 2432, 24)]
    assert [detect(layers, {}) for layers in wide] == ["flux", "sd3", "sd3", None]
    assert detect({"transformer.single_transformer_blocks.0.proj_out": {}}, {}) == "flux"
    assert detect({}, {"ss_base_model_version": "flux1"}, "sdxl") == "flux"  # keys of a text encoder alone tell less
    assert detect({}, {}, "sdxl") == "sdxl"
    assert detect({"text_encoder_2.text_projection": {}}, {}) == "sdxl"
    assert detect({}, {"ss_base_model_version": "sdxl_base_v1-0"}) == "sdxl"
    assert detect({}, {"modelspec.architecture": "stable-diffusion-v1/lora"}) == "sd1"
    one_text = {f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{n}": t for n, t in files_layer().items()}
    assert read_file(write_tensors(tmp_path / "te1.safetensors", one_text)).kind == "sdxl"
    assert base_of("tiny-sd").kind == "sd1" and (base_of("tiny-sd").folder / "unet").is_dir()
    with pytest.raises(InputError, match="does not tell what it is for; write --base sd1, sd2, sdxl, sd3, flux"):
        write_file(Contents("kohya", {"unet.conv_in": files_layer()}), "kohya", "x.safetensors")
    with pytest.raises(InputError, match=r"no base model nowhere; write sd1, .*, sd3, flux, tiny-sd, or a folder"):
        base_of("nowhere")


def test_the_header_goes_along(tmp_path):
    header = {"modelspec.trigger_phrase": "sks dog", "ss_steps": "400", "ss_network_dim": "99", "sshs_model_hash": "00"}
    source = Contents("kohya", {"unet.conv_in": files_layer()}, header=header)
    kept = read_tensors(write_file(source, "kohya", tmp_path / "a.safetensors", base_of("sd1")))[1]
    assert kept["modelspec.trigger_phrase"] == "sks dog" and kept["ss_steps"] == "400"
    assert "sshs_model_hash" not in kept
    assert (kept["ss_network_dim"], kept["ss_network_alpha"], kept["ss_network_module"]) == (
        "2",
        "1.0",
        "networks.lora",
    )
    assert read_tensors(write_file(source, "diffusers", tmp_path / "b.safetensors"))[1]["ss_steps"] == "400"


def test_inspect_tells_and_doubts(tmp_path):
    layers = {"unet.conv_in": files_layer(), "unet.conv_out": files_layer(4)}
    layers["unet.conv_out"]["lora_up.weight"].zero_()
    layers["unet.mid_block.attentions.0.proj_in"] = {
        "lora_down.weight": torch.full((2, 6), torch.nan),
        "lora_up.weight": torch.ones(8, 2),
    }
    tags = json.dumps({"10_dog": {"sks": 8, "grass": 3}})
    header = {"modelspec.trigger_phrase": "sks dog", "ss_tag_frequency": tags, "ss_steps": "400"}
    named = {
        f"lora_unet_{names.flat(m.removeprefix('unet.'))}.{n}": t
        for m, layer in layers.items()
        for n, t in layer.items()
    }
    file = write_tensors(tmp_path / "x.safetensors", named, header)
    found = inspect(file)
    facts = dict(found.facts)
    assert facts["format"] == "kohya" and facts["method"] == "LoRA (3)"
    assert facts["rank"] == "2 (2), 4 (1)" and facts["alpha"] == "1 (2), 2 (1)"
    assert facts["unet"] == "conv (2), proj.in (1)"
    assert facts["base"] == "the file does not tell"
    assert facts["trigger words"] == "sks dog" and facts["most frequent tags"] == "sks (8), grass (3)"
    assert facts["ss_steps"] == "400" and facts["size"] == f"{file.stat().st_size:,} bytes"
    zero, broken = found.warnings
    assert zero == "1 of 3 layers change nothing, being all zero: unet.conv_out"
    assert broken == "1 tensors hold NaN or infinity: unet.mid_block.attentions.0.proj_in.lora_down.weight"
    assert "warning: 1 of 3" in str(found)
    bare = {"unet.conv_in.lora_A.weight": torch.ones(2, 6), "unet.conv_in.lora_B.weight": torch.ones(8, 2)}
    assert "no alpha" in inspect(write_tensors(tmp_path / "y.safetensors", bare)).warnings[0]
    _, adapter = make(vm.LoRA(sites=("attn.q", "mlp.up"), rank=2))
    ours = dict(inspect(vm.save(adapter, tmp_path / "z.safetensors", {"prompt": "a photo of sks dog"})).facts)
    assert ours["format"] == "vismodal" and ours["method"] == "LoRA(sites=['attn.q', 'mlp.up'], rank=2)"
    assert ours["sites"] == "attn.q (1), mlp.up (1)" and ours["trigger words"] == "a photo of sks dog"
    with pytest.raises(InputError, match=r"this is no adapter file .* its keys are conv.weight"):
        inspect(write_tensors(tmp_path / "w.safetensors", {"conv.weight": torch.ones(2)}))
