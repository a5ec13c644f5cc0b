"""Adapters for U-Nets (SD 1.5, SDXL), most of which come from kohya's trainers or from diffusers before PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from lora.load import InvalidAdapter, load, resolve
from tests import tiny_models
from tests.lora import adapters
from tests.lora.adapters import State, Trained, train, with_alphas, with_prefix
from tests.lora.formats import baked, kohya
from tests.lora.merged import assert_merges_like_peft

ATTENTION = r".*\.attn[12]\.(to_[qkv]|to_out\.0)"
ALL_BLOCKS = (
    r".*\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out"
    r"|conv[12]?|time_emb_proj|conv_shortcut)"
)

LAYERS_PER_BLOCK = 2


def sd15() -> UNet2DConditionModel:
    return tiny_models.build("stable-diffusion").unet


def sdxl() -> UNet2DConditionModel:
    """Blocks in SDXL's own order, on which the numbers in its checkpoints' names depend."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=LAYERS_PER_BLOCK,
        transformer_layers_per_block=(1, 2, 2),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        sample_size=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )


def sdxl_original(module: str) -> str:
    """A module's name in SDXL's own checkpoints, where each block is a list of resnet, attention and sampler."""

    def numbered(match: re.Match[str]) -> str:
        side, block, kind, layer = match["side"], int(match["block"]), match["kind"], int(match["layer"])
        per_block = LAYERS_PER_BLOCK + 1
        if kind == "downsamplers":
            return f"input_blocks.{per_block * (block + 1)}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{per_block * block + LAYERS_PER_BLOCK}.2.conv"
        number = per_block * block + layer + (side == "down")
        return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"

    module = re.sub(r"mid_block\.(resnets|attentions)\.(\d)", _in_the_middle, module)
    module = re.sub(
        r"(?P<side>down|up)_blocks\.(?P<block>\d)\.(?P<kind>\w+)\.(?P<layer>\d)(?P<sampler>(?<=samplers\.0)\.conv)?",
        numbered,
        module,
    )
    for ours, theirs in {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }.items():
        module = module.replace(ours, theirs)
    return module


def _in_the_middle(match: re.Match[str]) -> str:
    return "middle_block.1" if match[1] == "attentions" else f"middle_block.{2 * int(match[2])}"


def of_attention_processors(trained: Trained) -> State:
    """As diffusers saved the adapters that its attention processors held."""
    return {
        re.sub(
            r"\.(to_q|to_k|to_v|to_out)(\.0)?\.lora_(A|B)",
            lambda match: f".processor.{match[1]}_lora.{'down' if match[3] == 'A' else 'up'}",
            key,
        ): tensor
        for key, tensor in baked("unet.")(trained).items()
    }


FORMATS: dict[str, tuple[Callable[[], UNet2DConditionModel], type, str, Callable[[Trained], State]]] = {
    "diffusers, SD 1.5": (sd15, StableDiffusionPipeline, ALL_BLOCKS, baked("unet.")),
    "diffusers with alphas, SD 1.5": (
        sd15,
        StableDiffusionPipeline,
        ALL_BLOCKS,
        lambda t: with_prefix("unet.", with_alphas(t, t.state, lambda module: module)),
    ),
    "attention processors, SD 1.5": (sd15, StableDiffusionPipeline, ATTENTION, of_attention_processors),
    "attention processors without the unet's name, SD 1.5": (
        sd15,
        StableDiffusionPipeline,
        ATTENTION,
        lambda t: {key.removeprefix("unet."): tensor for key, tensor in of_attention_processors(t).items()},
    ),
    "diffusers before PEFT, SD 1.5": (
        sd15,
        StableDiffusionPipeline,
        ALL_BLOCKS,
        lambda t: {
            k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in baked("unet.")(t).items()
        },
    ),
    "kohya, SD 1.5": (sd15, StableDiffusionPipeline, ALL_BLOCKS, kohya(adapters.musubi())),
    "kohya on diffusers' names, SDXL": (sdxl, StableDiffusionXLPipeline, ALL_BLOCKS, kohya(adapters.musubi())),
    "kohya on the original names, SDXL": (
        sdxl,
        StableDiffusionXLPipeline,
        ALL_BLOCKS,
        kohya(adapters.musubi(name=sdxl_original)),
    ),
}
"""By name: the U-Net, its pipeline, the layers that the format can name, and the state of its file."""


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_adapter_for_a_unet_gives_the_weights_peft_gives(format_name: str, tmp_path: Path) -> None:
    build, pipeline_class, layers, convert = FORMATS[format_name]
    unet = build()
    trained = train(unet, layers, r=4, lora_alpha=6, alpha_pattern={"attn1.to_q": 2})
    file = adapters.save(convert(trained), tmp_path / "adapter.safetensors")

    assert_merges_like_peft(file, {"unet": trained}, pipeline_class, {"unet": unet})


def test_half_a_pair_is_refused_by_the_name_in_the_file(tmp_path: Path) -> None:
    """SDXL's converter empties its input before it fails."""
    unet = sdxl()
    state = kohya(adapters.musubi(name=sdxl_original))(train(unet, r"mid_block\..*attn1\.to_q"))
    key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight"
    file = adapters.save({name: tensor for name, tensor in state.items() if name != key}, tmp_path / "half.safetensors")

    with pytest.raises(InvalidAdapter, match=r"keys such as lora_unet_middle_block_1"):
        load(resolve(str(file)), StableDiffusionXLPipeline, {"unet": unet})
