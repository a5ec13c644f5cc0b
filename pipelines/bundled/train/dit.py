"""The third stage: the text encoder and the transformer, on latents of the autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.train.captioned import Captioned, CaptionedBatches, encode, load_latents
from pipelines.bundled.train.flow import TextToLatents, flow_loss
from pipelines.bundled.train.loop import autocast, device_of
from pipelines.bundled.train.networks import build_text_encoder, build_transformer
from pipelines.bundled.train.optimizer import MuonAdamW, split_parameters
from pipelines.bundled.train.padding import attend_to_folded_padding
from pipelines.bundled.train.recipe import Bucket, Recipe, StageRecipe
from pipelines.bundled.train.vae import step_seed
from pipelines.model.convolution import skip_padding

FIRST_AND_LAST = (
    "text_encoder.shared",
    "transformer.patch_embedding",
    "transformer.condition_embedder",
    "transformer.proj_out",
)
"""Layers that AdamW trains: those that read tokens, latents and time, and those that write latents."""


class DiTStage:
    name = "dit"

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        vae: AutoencoderKLWan,
        latents: Path,
        device: torch.device,
        *,
        initial: Path | None = None,
        first_step: int = 0,
        compile_blocks: bool = False,
    ) -> None:
        """
        Args:
            latents: directory of the cache, if the recipe has one.
            initial: model directory whose text encoder and transformer to start with, in place of random ones.
            first_step: the first step that will run; buckets that only earlier phases draw are not cached.
            compile_blocks: compile the transformer's blocks, once for each shape of batch.
        """
        torch.manual_seed(recipe.seed)
        self.recipe = recipe.dit
        self.seed = recipe.seed
        self.source = CaptionedBatches(self.name, recipe, recipe.dit, tokenizer, cached=recipe.cached_pixels > 0)
        self.module = TextToLatents(
            build_text_encoder(recipe.shape, len(tokenizer)), build_transformer(recipe.shape)
        ).to(device)
        if initial is not None:
            for network in (self.module.text_encoder, self.module.transformer):
                part = "transformer" if network is self.module.transformer else "text_encoder"
                network.load_state_dict(type(network).from_pretrained(initial / part).state_dict())
        self.average = copy.deepcopy(self.module)
        attend_to_folded_padding(self.module.transformer)
        buckets = _buckets(recipe.dit, first_step)
        if compile_blocks:
            torch.compiler.config.recompile_limit = 4 * len(buckets)  # short and long texts, first frames
            self.module.transformer.compile_repeated_blocks()
        self.vae = vae.to(device).requires_grad_(False)
        skip_padding(self.vae)
        self.cache: dict[Bucket, torch.Tensor] = {}
        if self.source.cached:
            for bucket in sorted(buckets, key=lambda bucket: (bucket.num_frames, bucket.width * bucket.height)):
                self.cache[bucket] = load_latents(self.vae, recipe, bucket, latents)
        matrices, rest = split_parameters(self.module, FIRST_AND_LAST)
        self.optimizer = MuonAdamW(
            matrices,
            rest,
            matrix_learning_rate=recipe.dit.matrix_learning_rate,
            learning_rate=recipe.dit.learning_rate,
        )

    def loss(self, batch: Captioned, step: int) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        device = device_of(self.module)
        if batch.pixels is None:
            latents = self.cache[batch.bucket][batch.indices].to(device).float()
        else:
            latents = encode(self.vae, batch.pixels)
        generator = torch.Generator(device).manual_seed(step_seed(self.seed, step))
        self.module.transformer.set_attention_backend(attention_backend(latents))
        with autocast(device):
            return flow_loss(self.module, batch, latents, generator)


def _buckets(stage: StageRecipe, first_step: int) -> set[Bucket]:
    """The buckets that are drawn from this step on."""
    phases = stage.phases[stage.phases.index(stage.phase_at(first_step)) :]
    return {bucket for phase in phases for bucket in phase.buckets}


def attention_backend(latents: torch.Tensor) -> str:
    """The backend for self-attention over `latents` (B, C, T, h, w). On CPUs in bfloat16, the backward of PyTorch's
    fused kernel takes 0.2 ms a head, however short the sequence: 5 times as long as plain products at 108 tokens."""
    frames, height, width = latents.shape[2:]
    few = frames * (height // 2) * (width // 2) <= 128
    return "_native_math" if few and latents.device.type == "cpu" else "native"
