"""kohya's files for SD3 and Flux: names and fused matrices as diffusers' own conversion of checkpoints has them."""

from __future__ import annotations

import pytest
import torch
from their_files import changed
from torch import Tensor

import vismodal as vm
from vismodal.errors import InputError
from vismodal.formats import kohya, mmdit, names
from vismodal.formats.bases import detect

pytest.importorskip("diffusers")
D = 4  # columns of most matrices

DOUBLE = {"attn.qkv": 3 * D, "attn.proj": D, "mlp.0": 8, "mlp.2": D, "mod.lin": 6 * D}
FLUX = {
    **{f"double_blocks.{i}.{s}_{name}": rows for i in (0, 1) for s in ("img", "txt") for name, rows in DOUBLE.items()},
    "single_blocks.0.linear1": 3 * 3072 + 12288,  # diffusers' conversion knows this size alone
    "single_blocks.0.linear2": D,
    "single_blocks.0.modulation.lin": 3 * D,
    "img_in": D,
    "txt_in": D,
    **{f"{part}.{layer}": D for part in ("time_in", "vector_in", "guidance_in") for layer in ("in_layer", "out_layer")},
    "final_layer.linear": 8,
    "final_layer.adaLN_modulation.1": 2 * D,
}
JOINT = {"attn.qkv": 3 * D, "attn.proj": D, "mlp.fc1": 8, "mlp.fc2": D, "adaLN_modulation.1": 6 * D}
LAST = ("attn.qkv", "adaLN_modulation.1")  # all that the last block does with the text
SD3 = {
    **{f"joint_blocks.{i}.x_block.{name}": rows for i in (0, 1) for name, rows in JOINT.items()},
    **{f"joint_blocks.0.context_block.{name}": rows for name, rows in JOINT.items()},
    **{f"joint_blocks.1.context_block.{name}": 3 * D if name == "attn.qkv" else 2 * D for name in LAST},
    "joint_blocks.0.x_block.attn2.qkv": 3 * D,
    "joint_blocks.0.x_block.attn2.proj": D,
    "context_embedder": D,
    **{f"{part}.mlp.{i}": D for part in ("t_embedder", "y_embedder") for i in (0, 2)},
    "final_layer.linear": 8,
    "final_layer.adaLN_modulation.1": 2 * D,
}
ORIGINALS = {"flux": FLUX, "sd3": SD3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(rows: int, columns: int = D, r: int = 3, alpha: float = 2.0, seed: int = 0) -> dict[str, Tensor]:
    down, up = draw(r, columns, seed=seed), draw(rows, r, seed=seed + 1)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}


def delta(layer: dict[str, Tensor]) -> Tensor:
    up, down = layer["lora_up.weight"].double(), layer["lora_down.weight"].double()
    return float(layer["alpha"]) / len(down) * up @ down


def file_of(layers: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"lora_unet_{m.replace('.', '_')}.{n}": t for m, layer in layers.items() for n, t in layer.items()}


def by_diffusers(kind: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint of the original model, zero but for these weights, as diffusers converts it."""
    from diffusers.loaders import single_file_utils as utils

    whole = {f"{m}.bias": torch.zeros(rows) for m, rows in ORIGINALS[kind].items()} | dict(weights)
    if kind == "flux":
        places = [f"double_blocks.{i}.{s}_attn.norm" for i in (0, 1) for s in ("img", "txt")] + ["single_blocks.0.norm"]
        whole |= {f"{place}.{x}_norm.scale": torch.zeros(1) for place in places for x in ("query", "key")}
        return utils.convert_flux_transformer_checkpoint_to_diffusers(whole)
    whole |= {
        "pos_embed": torch.zeros(1),
        "x_embedder.proj.weight": torch.zeros(1),
        "x_embedder.proj.bias": torch.zeros(1),
    }
    return utils.convert_sd3_transformer_checkpoint_to_diffusers(whole)


@pytest.mark.parametrize("kind", ORIGINALS)
def test_names_and_rows_are_those_of_diffusers_conversion(kind: str) -> None:
    original = {m: lora(rows, seed=i) for i, (m, rows) in enumerate(ORIGINALS[kind].items())}
    tensors = file_of(original)
    assert kohya.base_kind(tensors) == kind
    layers, _ = kohya.read(tensors)
    converted = by_diffusers(kind, {f"{m}.weight": delta(layer) for m, layer in original.items()})
    changed_ones = {name: t for name, t in converted.items() if t.dim() == 2 and t.any()}
    assert {f"{m.removeprefix('transformer.')}.weight" for m in layers} == changed_ones.keys()
    for module, layer in layers.items():
        torch.testing.assert_close(delta(layer), converted[f"{module.removeprefix('transformer.')}.weight"])
    back, header = kohya.write(layers, {}, kind)  # q, k and v as one matrix again
    assert back.keys() == tensors.keys()
    assert detect({}, header) == kind
    for module, layer in original.items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        again = {n: back[f"{stem}.{n}"] for n in layer}
        torch.testing.assert_close(delta(again), delta(layer))


def test_parts_of_a_matrix_keep_their_ranks_and_alphas() -> None:
    """Of some parts only, with ranks and alphas of their own: the same after being one matrix."""
    head = "transformer.single_transformer_blocks.3"
    layers = {
        f"{head}.attn.to_q": lora(6, r=2, alpha=1.0, seed=1),
        f"{head}.attn.to_v": lora(6, r=3, alpha=7.0, seed=2),
        f"{head}.proj_mlp": lora(24, r=1, alpha=1.0, seed=3),
        "transformer.transformer_blocks.0.attn.add_k_proj": lora(6, seed=4),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": lora(5, seed=5),
    }
    tensors, _ = kohya.write(layers, {}, "flux")
    stems = {key.partition(".")[0] for key in tensors}
    assert stems == {
        "lora_unet_single_blocks_3_linear1",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    }
    assert len(tensors["lora_unet_single_blocks_3_linear1.lora_down.weight"]) == 2 + 3 + 1
    back, _ = kohya.read(tensors)
    there = {m: layer for m, layer in back.items() if layer["lora_up.weight"].any()}
    assert there.keys() == layers.keys()
    for module, layer in layers.items():
        torch.testing.assert_close(delta(there[module]), delta(layer), atol=1e-5, rtol=1e-5)
        assert len(there[module]["lora_down.weight"]) == len(layer["lora_down.weight"])


QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def whole(method: str) -> dict[str, Tensor]:
    """A layer on a matrix of 3 x 4 rows and 4 columns."""
    match method:
        case "DoRA":
            return {**lora(12), "dora_scale": 1 + draw(12, 1, seed=9).abs()}
        case "LoHa":
            shapes = {"hada_w1_a": (12, 2), "hada_w1_b": (2, 4), "hada_w2_a": (12, 2), "hada_w2_b": (2, 4)}
            return {n: draw(*s, seed=i) for i, (n, s) in enumerate(shapes.items())} | {"alpha": torch.tensor(3.0)}
        case "OFT":
            return {"oft_blocks": draw(6, 2, 2), "rescale": 1 + draw(12, 1).abs()}
        case _:
            return {"diff": draw(12, 4), "diff_b": draw(12)}


@pytest.mark.parametrize("method", ["DoRA", "LoHa", "OFT", "full"])
def test_other_methods_are_taken_apart_by_rows(method: str) -> None:
    layer, W = whole(method), draw(12, 4, seed=20)
    layers, _ = kohya.read({f"{QKV}.{n}": t for n, t in layer.items()})
    paths = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    assert list(layers) == paths
    apart = torch.cat([changed(V, layers[path]) for V, path in zip(W.split(4), paths, strict=True)])
    torch.testing.assert_close(apart, changed(W, layer))
    back, _ = kohya.write(layers, {}, "flux")
    again = {n: back[f"{QKV}.{n}"] for n in layer} | ({"alpha": back[f"{QKV}.alpha"]} if "alpha" in layer else {})
    torch.testing.assert_close(changed(W, again), changed(W, layer))


def test_what_no_part_can_say_is_an_error() -> None:
    kron = {f"{QKV}.lokr_w1": draw(3, 2), f"{QKV}.lokr_w2": draw(4, 2)}
    with pytest.raises(InputError, match=r"LoKr on .*to_q, .*to_v as one matrix cannot be said of each by itself"):
        kohya.read(kron)
    across = {f"{QKV}.oft_blocks": draw(2, 6, 6)}
    bounded = {f"{QKV}.oft_blocks": draw(6, 2, 2), f"{QKV}.alpha": torch.tensor(0.1)}
    for wrong in (across, bounded):
        with pytest.raises(InputError, match=r"OFT on .* cannot be said of each by itself"):
            kohya.read(wrong)
    head = "transformer.transformer_blocks.0"
    for kind in ORIGINALS:
        with pytest.raises(InputError, match=f"kohya's files of {kind} have no name for transformer.pos_emb"):
            kohya.write({"transformer.pos_emb": lora(4)}, {}, kind)
    dora = {**lora(4), "dora_scale": torch.ones(4, 1)}
    with pytest.raises(InputError, match=r"no file can say DoRA on .*to_q of one matrix"):
        kohya.write({f"{head}.attn.to_q": dora}, {}, "sd3")
    with pytest.raises(InputError, match="no file can say LoHa and LoRA on"):
        kohya.write({f"{head}.attn.to_q": lora(4), f"{head}.attn.to_k": whole("LoHa")}, {}, "sd3")
    with pytest.raises(InputError, match="is of transformer, and kohya's files for sdxl hold"):
        kohya.write({f"{head}.attn.to_q": lora(4)}, {}, "sdxl")
    turned = {
        "lora_unet_final_layer_adaLN_modulation_1.lokr_w1": draw(4, 2),
        "lora_unet_final_layer_adaLN_modulation_1.lokr_w2": draw(2, 2),
        **file_of({"double_blocks.0.img_mlp.0": lora(4)}),
    }
    with pytest.raises(InputError, match="shift and scale stand the other way round"):
        kohya.read(turned)


def test_every_site_of_the_real_classes_has_a_name() -> None:
    """By kohya's names, and by OneTrainer's, which are diffusers' with underscores."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    small = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
    with torch.device("meta"):
        models = {
            "flux": FluxTransformer2DModel(
                **small, num_layers=2, num_single_layers=2, guidance_embeds=True, axes_dims_rope=(4, 2, 2)
            ),
            "sd3": SD3Transformer2DModel(**small, num_layers=2, caption_projection_dim=16, dual_attention_layers=(0,)),
        }
    for kind, model in models.items():
        sites = {s.path: s for s in vm.sites(model) if s.slot == "weight" and s.kind != "norm"}
        assert len(sites) > 20
        for path, site in sites.items():
            assert names.kind_of(path) == site.kind
            assert names.dotted(names.flat(path)) == path
            rows, columns = model.get_submodule(path).weight.flatten(1).shape
            (original,) = mmdit.to_original({path: lora(rows, columns)}, kind)
            assert path in mmdit.paths_of(original.replace(".", "_"), kind)
    layers = {f"transformer.{path}": lora(4) for path in ("x_embedder", "single_transformer_blocks.1.proj_out")}
    assert kohya.read(kohya.write_lycoris(layers)[0])[0].keys() == layers.keys()
    flat = {f"lora_transformer_transformer_blocks_0_attn_to_q.{n}": t for n, t in lora(4).items()}
    assert list(kohya.read(flat)[0]) == ["transformer.transformer_blocks.0.attn.to_q"]
