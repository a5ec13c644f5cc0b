"""How strong an adapter is: alphas from wherever a format keeps them, as PEFT reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import nn

from lora.factors import LowRank
from lora.load import InvalidAdapter, load, resolve
from tests.lora import adapters
from tests.lora.adapters import Trained, train, with_alphas, with_prefix
from tests.lora.formats import FLUX2_LAYERS, WAN_LAYERS, flux_original, kohya
from tests.lora.merged import assert_merges_like_peft

Pipelines = Callable[[str], DiffusionPipeline]
Transformers = Callable[[str], dict[str, nn.Module]]

EXPERTS = ("transformer", "transformer_2")


def fields(trained: Trained) -> dict:
    """PEFT's config, as diffusers writes it into a file's header."""
    return {key: sorted(v) if isinstance(v, set) else v for key, v in trained.config.to_dict().items()}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 16, r"blocks.1.attn1.to_k": 1}},
        {"lora_bias": True},
    ],
    ids=["plain", "rank-stabilised", "patterns", "bias"],
)
@pytest.mark.parametrize("saved_by", ["PEFT", "diffusers"])
def test_alphas_in_a_config_are_read_as_peft_reads_them(
    saved_by: str, config: dict, pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, ["attn1.to_q", "attn1.to_k", "ffn.net.2"], r=4, lora_alpha=6, **config)
    if saved_by == "PEFT":
        trained.peft_model.save_pretrained(tmp_path)
    else:
        type(wan).save_lora_weights(tmp_path, trained.state, transformer_lora_adapter_metadata=fields(trained))

    assert_merges_like_peft(tmp_path, {"transformer": trained}, type(wan), transformers("wan2.1-t2v"))


def trained_experts(wan: DiffusionPipeline) -> dict[str, Trained]:
    """Alphas of 8 and 1 for the two experts: scales of 2 and 1/4 at rank 4."""
    return {
        name: train(wan.components[name], r"blocks\.\d+\.attn1\.to_q", lora_alpha=alpha, seed=alpha)
        for name, alpha in zip(EXPERTS, (8, 1), strict=True)
    }


def test_each_expert_has_the_alphas_that_are_named_after_it(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.2-t2v")
    experts = trained_experts(wan)
    state = {
        key: tensor
        for name, trained in experts.items()
        for key, tensor in with_prefix(f"{name}.", with_alphas(trained, trained.state, lambda module: module)).items()
    }
    file = adapters.save(state, tmp_path / "experts.safetensors")

    assert_merges_like_peft(file, experts, type(wan), transformers("wan2.2-t2v"))


def test_the_alphas_of_a_low_noise_file_are_applied(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.2-t2v")
    low = trained_experts(wan)["transformer_2"]
    state = with_prefix("transformer_2.", with_alphas(low, low.state, lambda module: module))
    file = adapters.save(state, tmp_path / "low.safetensors")

    assert_merges_like_peft(file, {"transformer_2": low}, type(wan), transformers("wan2.2-t2v"))


def test_alphas_of_one_expert_beside_the_layers_of_the_other_are_refused(pipeline: Pipelines, tmp_path: Path) -> None:
    wan = pipeline("wan2.2-t2v")
    low = trained_experts(wan)["transformer_2"]
    state = with_alphas(low, with_prefix("transformer_2.", low.state), lambda module: module)
    file = adapters.save(state, tmp_path / "low.safetensors")

    with pytest.raises(InvalidAdapter, match=r"has alphas without layers: blocks\.0\.attn1\.to_q"):
        load(resolve(str(file)), type(wan), {name: wan.components[name] for name in EXPERTS})


def test_each_expert_has_its_own_config_in_a_header(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    """As diffusers writes it for the transformer, with the expert's name before each field."""
    wan = pipeline("wan2.2-t2v")
    experts = trained_experts(wan)
    state = {k: t for name, trained in experts.items() for k, t in with_prefix(f"{name}.", trained.state).items()}
    header = {f"{name}.{field}": v for name, trained in experts.items() for field, v in fields(trained).items()}
    file = adapters.save(state, tmp_path / "experts.safetensors", {LORA_ADAPTER_METADATA_KEY: json.dumps(header)})

    assert_merges_like_peft(file, experts, type(wan), transformers("wan2.2-t2v"))


def test_a_header_that_names_no_transformer_is_the_only_ones(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    """As saved by a diffusers model, which does not know its own name."""
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, WAN_LAYERS, r=4, lora_alpha=6)
    model = transformers("wan2.1-t2v")["transformer"]
    model.add_adapter(trained.config)
    model.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in trained.state.items()}, strict=False)
    model.save_lora_adapter(tmp_path)

    assert_merges_like_peft(tmp_path, {"transformer": trained}, type(wan), transformers("wan2.1-t2v"))


def test_alphas_in_the_file_are_not_joined_by_a_config_beside_it(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, WAN_LAYERS, r=4, lora_alpha=6)
    adapters.save(kohya(adapters.musubi(name=adapters.wan_original))(trained), tmp_path / "musubi.safetensors")
    trained.config.save_pretrained(tmp_path)

    assert_merges_like_peft(tmp_path, {"transformer": trained}, type(wan), transformers("wan2.1-t2v"))


def test_the_config_in_a_header_comes_before_one_beside_the_file(
    pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    """Two programs have saved to this folder."""
    wan = pipeline("wan2.1-t2v")
    train(wan.transformer, WAN_LAYERS, r=4, lora_alpha=1, seed=1).peft_model.save_pretrained(tmp_path)
    trained = train(wan.transformer, WAN_LAYERS, r=4, lora_alpha=6)
    type(wan).save_lora_weights(tmp_path, trained.state, transformer_lora_adapter_metadata=fields(trained))

    assert_merges_like_peft(tmp_path, {"transformer": trained}, type(wan), transformers("wan2.1-t2v"))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_config_for_a_model_with_its_original_names_gives_one_alpha_for_all(
    use_rslora: bool, pipeline: Pipelines, transformers: Transformers, tmp_path: Path
) -> None:
    flux = pipeline("flux2-klein")
    trained = train(flux.transformer, FLUX2_LAYERS, r=4, lora_alpha=6, use_rslora=use_rslora)
    state = with_prefix("base_model.model.", adapters.renamed(trained.state, flux_original))
    adapters.save(state, tmp_path / "adapter_model.safetensors")
    trained.config.save_pretrained(tmp_path)

    assert_merges_like_peft(tmp_path, {"transformer": trained}, type(flux), transformers("flux2-klein"))


def test_alphas_for_modules_by_their_original_names_are_refused(pipeline: Pipelines, tmp_path: Path) -> None:
    flux = pipeline("flux2-klein")
    trained = train(flux.transformer, FLUX2_LAYERS, r=4, lora_alpha=6)
    state = with_prefix("base_model.model.", adapters.renamed(trained.state, flux_original))
    adapters.save(state, tmp_path / "adapter_model.safetensors")
    trained.config.alpha_pattern = {"img_attn.proj": 2}
    trained.config.save_pretrained(tmp_path)

    with pytest.raises(InvalidAdapter, match="config with alphas by module, under names that this model does not have"):
        load(resolve(str(tmp_path)), type(flux), {"transformer": flux.transformer})


def test_an_alpha_that_half_precision_cannot_hold_is_folded_in_exactly(pipeline: Pipelines, tmp_path: Path) -> None:
    wan = pipeline("wan2.1-t2v")
    trained = train(wan.transformer, WAN_LAYERS, r=3, lora_alpha=1, dtype=torch.bfloat16)
    convert = kohya(adapters.musubi(name=adapters.wan_original))
    file = adapters.save(convert(trained), tmp_path / "thirds.safetensors")

    updates = load(resolve(str(file)), type(wan), {"transformer": wan.transformer}).updates["transformer"]
    update = updates["blocks.0.attn1.to_q.weight"]
    assert isinstance(update, LowRank)
    up, down = (trained.state[f"blocks.0.attn1.to_q.lora_{half}.weight"].double() for half in "BA")
    exact = up @ down / 3
    torch.testing.assert_close(update.scale * update.up.double() @ update.down.double(), exact, rtol=1e-6, atol=1e-9)
