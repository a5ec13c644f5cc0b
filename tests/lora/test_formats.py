"""Every public format of one adapter must give the weights that PEFT itself gives when it merges that adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lora.factors import Delta
from lora.load import InvalidAdapter, load, resolve
from lora.merge import Merger
from tests.lora import adapters
from tests.lora.adapters import State, train, with_prefix
from tests.lora.formats import FORMATS, WAN_LAYERS, baked, flux_original, kohya
from tests.lora.merged import assert_merges_like_peft

Pipelines = Callable[[str], DiffusionPipeline]
Transformers = Callable[[str], dict[str, nn.Module]]


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_adapter_in_a_foreign_format_gives_the_weights_peft_gives(
    format_name: str, pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    family, layers, convert = FORMATS[format_name]
    trained = train(pipeline(family).transformer, layers, r=4, lora_alpha=6)
    file = adapters.save(convert(trained), tmp_path / "adapter.safetensors")

    assert_merges_like_peft(file, {"transformer": trained}, type(pipeline(family)), transformers(family))


def test_a_convolution_is_adapted_like_any_other_layer(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, ["patch_embedding"])
    file = adapters.save(with_prefix("transformer.", trained.state), tmp_path / "conv.safetensors")

    assert_merges_like_peft(file, {"transformer": trained}, type(wan), transformers("wan2.1-t2v"))


def test_factors_keep_half_precision_where_it_loses_nothing(pipeline: Pipelines, tmp_path: Path) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, WAN_LAYERS, r=4, lora_alpha=2, dtype=torch.bfloat16)
    convert = kohya(adapters.musubi(name=adapters.wan_original))
    file = adapters.save(convert(trained), tmp_path / "half.safetensors")

    factors = load(resolve(str(file)), type(wan), {"transformer": wan.transformer})
    assert factors.num_bytes == sum(tensor.nbytes for tensor in trained.state.values())


def test_whole_updates_of_norms_biases_and_modulations_in_wan_files_are_applied(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, r"blocks\.\d+\.attn1\.to_q")
    shapes = {name: parameter.shape for name, parameter in wan.transformer.named_parameters()}
    whole = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.2.self_attn.norm_q.diff": "blocks.2.attn1.norm_q.weight",
        "blocks.1.cross_attn.norm_k.diff": "blocks.1.attn2.norm_k.weight",
        "blocks.1.cross_attn.k.diff_b": "blocks.1.attn2.to_k.bias",
        "blocks.3.modulation.diff": "blocks.3.scale_shift_table",
        "blocks.1.diff_m": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
        "head.head.diff": "proj_out.weight",
        "time_projection.1.diff_b": "condition_embedder.time_proj.bias",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    deltas = {key: torch.full(shapes[name], 0.25) for key, name in whole.items()}
    named = baked("", adapters.wan_original)(trained)
    file = adapters.save(with_prefix("diffusion_model.", {**named, **deltas}), tmp_path / "whole.safetensors")

    model = transformers("wan2.1-t2v")
    base = {name: tensor.clone() for name, tensor in model["transformer"].state_dict().items()}
    Merger(model).merge([(load(resolve(str(file)), type(wan), model), 0.5, ("all",))])
    merged = model["transformer"].state_dict()
    for name in whole.values():
        torch.testing.assert_close(merged[name], base[name] + 0.125, rtol=0, atol=1e-6)


def test_updates_by_zero_are_left_out(pipeline: Pipelines, tmp_path: Path) -> None:
    wan = pipeline("wan2.1-t2v")
    named = baked("", adapters.wan_original)(train(wan.transformer, r"blocks\.\d+\.attn1\.to_q"))
    zeros = {"blocks.0.norm3.diff": torch.zeros(96), "blocks.0.no_such_layer.diff": torch.zeros(1)}
    file = adapters.save(with_prefix("diffusion_model.", {**named, **zeros}), tmp_path / "zeros.safetensors")

    updates = load(resolve(str(file)), type(wan), {"transformer": wan.transformer}).updates["transformer"]
    assert not any(isinstance(update, Delta) for update in updates.values())


def test_one_file_goes_to_both_experts(pipeline: Pipelines, transformers: Transformers, tmp_path: Path) -> None:
    wan = pipeline("wan2.2-t2v")
    trained = train(wan.transformer, WAN_LAYERS)
    file = adapters.save(with_prefix("transformer.", trained.state), tmp_path / "both.safetensors")

    factors = load(resolve(str(file)), type(wan), transformers("wan2.2-t2v"))
    assert factors.transformers == ("transformer", "transformer_2")
    assert factors.num_bytes == sum(tensor.nbytes for tensor in trained.state.values())


def test_a_file_that_names_each_expert_gives_each_its_own(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.2-t2v")
    high, low = (train(wan.components[n], WAN_LAYERS, seed=i) for i, n in enumerate(("transformer", "transformer_2")))
    both = {**with_prefix("transformer.", high.state), **with_prefix("transformer_2.", low.state)}
    file = adapters.save(both, tmp_path / "each.safetensors")

    experts = {"transformer": high, "transformer_2": low}
    assert_merges_like_peft(file, experts, type(wan), transformers("wan2.2-t2v"))


def test_a_low_noise_file_goes_to_the_low_noise_expert_alone(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.2-t2v")
    trained = train(wan.transformer_2, WAN_LAYERS)
    file = adapters.save(with_prefix("transformer_2.", trained.state), tmp_path / "low.safetensors")

    assert load(resolve(str(file)), type(wan), transformers("wan2.2-t2v")).transformers == ("transformer_2",)


# What is refused. Each maker turns a good Wan adapter, as saved by diffusers, into a bad file.


def good(pipeline: Pipelines) -> State:
    return with_prefix("transformer.", train(pipeline("wan2.1-t2v").transformer, WAN_LAYERS).state)


def deeper(state: State) -> State:
    return {**state, **{k.replace("blocks.0.", "blocks.7."): v for k, v in state.items() if ".blocks.0." in k}}


def wider(state: State) -> State:
    return {k: torch.cat([v, v], dim=1 if "lora_A" in k else 0) for k, v in state.items()}


def of_flux(state: State) -> State:
    return {k.replace(".blocks.", ".single_transformer_blocks.").replace("attn1", "attn"): v for k, v in state.items()}


def nan(state: State) -> State:
    state["transformer.blocks.1.attn1.to_q.lora_A.weight"][0, 0] = float("nan")
    return state


def infinite(state: State) -> State:
    state["transformer.blocks.1.attn1.to_q.lora_B.weight"][0, 0] = float("inf")
    return state


KEY = "transformer.blocks.0.attn1.to_q.lora_A.weight"

REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "deeper": (deeper, r"is for a deeper model: 20 of 100 keys name blocks .* \(blocks\.7\."),
    "wider": (wider, r"another width: blocks\.0\.\S+ is 96x96 here, 192x192 in the LoRA"),
    "another architecture": (of_flux, r"is for another model: no layer matches this one \(single_transformer_blocks"),
    "NaN": (nan, r"has NaN or infinite values in transformer\.blocks\.1\.attn1\.to_q\.lora_A\.weight"),
    "infinite": (infinite, r"has NaN or infinite values in \S+lora_B"),
    "partly matching": (
        lambda s: {**s, "transformer.unheard.of.lora_A.weight": torch.ones(4, 4)},
        r"matches only in part: 1 of 81 keys match no layer \(unheard\.of\.lora_A\.weight\)",
    ),
    "half a pair": (
        lambda s: {k: v for k, v in s.items() if k != KEY},
        r"is incomplete: blocks\.0\.attn1\.to_q has only lora_B",
    ),
    "a bias of the first half": (
        lambda s: {**s, KEY.replace("weight", "bias"): torch.ones(4)},
        r"matches only in part: 1 of 81 keys match no layer \(blocks\.0\.attn1\.to_q\.lora_A\.bias\)",
    ),
    "alphas under other names": (
        lambda s: {**s, "lora_unet_blocks_0_attn1_to_q.alpha": torch.tensor(1.0)},
        r"has alphas without layers: lora_unet_blocks_0_attn1_to_q",
    ),
    "unequal ranks": (lambda s: {**s, KEY: torch.ones(3, 96)}, r"halves of blocks\.0\.\S+ have rank 3 and 4"),
    "no LoRA": (lambda s: {"blocks.0.attn1.to_q.weight": torch.ones(4, 4)}, r"is not a LoRA: no key names"),
    "empty": (lambda s: {}, r"is not a LoRA"),
    "text encoder": (
        lambda s: {**s, "text_encoder.layers.0.q_proj.lora_A.weight": torch.ones(4, 4)},
        r"also changes the text encoder \(1 of 81 keys",
    ),
    "DoRA": (lambda s: {**s, "transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(4)}, "is a DoRA adapter"),
    "LoKr": (lambda s: {"transformer.blocks.0.attn1.to_q.lokr_w1": torch.ones(4, 4)}, "is a LoKr adapter"),
    "bias where the model has none": (
        lambda s: {k.replace("attn1.to_q.lora_A.weight", "norm9.lora_B.bias"): v for k, v in s.items()},
        "matches only in part",
    ),
    "another program's names": (
        lambda s: {f"lora_unet_down_blocks_0_{i}.lora_down.weight": v for i, v in enumerate(s.values())},
        r"is of no LoRA format that WanPipeline knows \(keys such as lora_unet_down_blocks",
    ),
    "a whole update with no parameter": (
        lambda s: {"diffusion_model.blocks.0.nowhere.diff": torch.ones(4)},
        r"changes blocks\.0\.nowhere\.weight, which this model does not have",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_misfit_is_refused_with_its_reason(what: str, pipeline: Pipelines, tmp_path: Path) -> None:
    make, reason = REFUSED[what]
    file = tmp_path / "bad.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in make(good(pipeline)).items()}, file)

    with pytest.raises(InvalidAdapter, match=reason) as refused:
        load(resolve(str(file)), type(pipeline("wan2.1-t2v")), {"transformer": pipeline("wan2.1-t2v").transformer})
    assert str(refused.value).startswith(f"LoRA '{file}'")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-100], "is truncated"),
        (lambda content: content[:20], "can't be read as safetensors"),
        (lambda content: b"", "can't be read as safetensors"),
        (lambda content: b"PK\x03\x04" + content, "can't be read as safetensors"),
    ],
    ids=["truncated", "cut in its header", "empty", "pickled under a false name"],
)
def test_a_damaged_file_is_refused(
    damage: Callable[[bytes], bytes], reason: str, pipeline: Pipelines, tmp_path: Path
) -> None:
    file = adapters.save(good(pipeline), tmp_path / "adapter.safetensors")
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(InvalidAdapter, match=reason):
        load(resolve(str(file)), type(pipeline("wan2.1-t2v")), {"transformer": pipeline("wan2.1-t2v").transformer})


def test_keys_that_diffusers_drops_without_a_word_are_refused(pipeline: Pipelines, tmp_path: Path) -> None:
    """FLUX.1's converter removes the alpha of the final layer and never applies it."""
    flux = pipeline("flux1")
    trained = train(flux.transformer, r"proj_out|transformer_blocks\.0\.attn\.to_out\.0", r=4, lora_alpha=6)

    def name(module: str) -> str:
        return "lora_unet_final_layer_linear" if module == "proj_out" else adapters.musubi(name=flux_original)(module)

    file = adapters.save(kohya(name)(trained), tmp_path / "final.safetensors")
    with pytest.raises(InvalidAdapter, match=r"1 keys that \w+ has no use for: lora_unet_final_layer_linear\.alpha"):
        load(resolve(str(file)), type(flux), {"transformer": flux.transformer})

    state = load_file(file)
    state["lora_unet_final_layer_linear.alpha"] = torch.tensor(4.0)  # equals the rank: dropping it changes nothing
    save_file(state, file)
    updates = load(resolve(str(file)), type(flux), {"transformer": flux.transformer}).updates["transformer"]
    assert "proj_out.weight" in updates


def test_a_folder_whose_config_says_it_is_no_lora_is_refused(pipeline: Pipelines, tmp_path: Path) -> None:
    adapters.save(good(pipeline), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))

    with pytest.raises(InvalidAdapter, match="is a LOHA adapter"):
        load(resolve(str(tmp_path)), type(pipeline("wan2.1-t2v")), {"transformer": pipeline("wan2.1-t2v").transformer})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_that_was_trained_on_changed_weights_is_refused(
    init: str, pipeline: Pipelines, tmp_path: Path
) -> None:
    """PEFT subtracts the adapter's initial values from the weights, here and whenever it loads the adapter again."""
    wan = pipeline("wan2.1-t2v")
    train(wan.transformer, ["attn1.to_q"], init_lora_weights=init).peft_model.save_pretrained(tmp_path)

    with pytest.raises(InvalidAdapter, match=f"was trained on weights that {init} had changed, not on the model's"):
        load(resolve(str(tmp_path)), type(wan), {"transformer": wan.transformer})
