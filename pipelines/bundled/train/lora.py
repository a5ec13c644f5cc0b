"""The last stage: a small adapter for the finished model that draws everything in another style."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from pipelines.bundled.train.captioned import Captioned, CaptionedBatches, encode
from pipelines.bundled.train.flow import TextToLatents, flow_loss
from pipelines.bundled.train.loop import autocast
from pipelines.bundled.train.optimizer import MuonAdamW
from pipelines.bundled.train.padding import attend_to_folded_padding
from pipelines.bundled.train.recipe import Recipe
from pipelines.bundled.train.vae import step_seed
from pipelines.model.convolution import skip_padding

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Every linear layer of a block."""


class LoRAStage:
    def __init__(self, recipe: Recipe, pipeline: WanPipeline, style: str, device: torch.device) -> None:
        """`pipeline` is the exported model, in float32. It gets the adapter.

        Raises:
            KeyError: there is no such style.
        """
        torch.manual_seed(recipe.seed)
        self.name = f"lora-{style}"
        self.recipe = recipe.lora
        self.seed = recipe.seed
        self.source = CaptionedBatches(self.name, recipe, recipe.lora, pipeline.tokenizer, cached=False, style=style)
        self.model = TextToLatents(pipeline.text_encoder, pipeline.transformer).to(device).requires_grad_(False)
        self.vae = pipeline.vae.to(device).requires_grad_(False)
        skip_padding(self.vae)
        self.model.transformer.add_adapter(
            LoraConfig(r=recipe.lora_rank, lora_alpha=recipe.lora_rank, target_modules=list(TARGETS))
        )
        attend_to_folded_padding(self.model.transformer)
        self.factors = [parameter for parameter in self.model.transformer.parameters() if parameter.requires_grad]
        self.module: nn.Module = nn.ParameterList(self.factors)
        self.average = copy.deepcopy(self.module)
        self.optimizer = MuonAdamW(
            [],
            self.factors,
            matrix_learning_rate=recipe.lora.matrix_learning_rate,
            learning_rate=recipe.lora.learning_rate,
        )

    def loss(self, batch: Captioned, step: int) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        assert batch.pixels is not None  # styles are never cached
        latents = encode(self.vae, batch.pixels)
        generator = torch.Generator(latents.device).manual_seed(step_seed(self.seed, step))
        with autocast(latents.device):
            return flow_loss(self.model, batch, latents, generator)

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Write the averaged adapter in bfloat16, in the format that diffusers and the server's set_lora load."""
        for factor, average in zip(self.factors, self.average.parameters(), strict=True):
            factor.copy_(average)
        state = get_peft_model_state_dict(self.model.transformer, adapter_name="default")
        WanPipeline.save_lora_weights(
            directory,
            transformer_lora_layers={name: factor.bfloat16().cpu() for name, factor in state.items()},
            weight_name=f"{self.source.style}.safetensors",
        )
