"""The second stage: the text encoder and the transformer, on latents of the autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.train.captioned import Captioned, CaptionedBatches, encode, load_latents
from pipelines.bundled.train.convolution import skip_padding
from pipelines.bundled.train.flow import TextToLatents, flow_loss
from pipelines.bundled.train.loop import autocast, device_of
from pipelines.bundled.train.networks import build_text_encoder, build_transformer
from pipelines.bundled.train.optimizer import MuonAdamW, split_parameters
from pipelines.bundled.train.padding import attend_to_folded_padding
from pipelines.bundled.train.recipe import Bucket, Recipe
from pipelines.bundled.train.vae import step_seed

FIRST_AND_LAST = (
    "text_encoder.shared",
    "transformer.patch_embedding",
    "transformer.condition_embedder",
    "transformer.proj_out",
)
"""What AdamW trains: what reads from tokens, pixels and time, and what writes latents."""


class DiTStage:
    name = "dit"

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerFast,
        vae: AutoencoderKLWan,
        latents: Path,
        device: torch.device,
    ) -> None:
        """`latents` is the directory of the cache, if the recipe has one."""
        torch.manual_seed(recipe.seed)
        self.recipe = recipe.dit
        self.seed = recipe.seed
        self.source = CaptionedBatches(self.name, recipe, recipe.dit, tokenizer, cached=recipe.cached_pixels > 0)
        self.module = TextToLatents(
            build_text_encoder(recipe.shape, len(tokenizer)), build_transformer(recipe.shape)
        ).to(device)
        self.average = copy.deepcopy(self.module)
        attend_to_folded_padding(self.module.transformer)
        self.vae = vae.to(device).requires_grad_(False)
        skip_padding(self.vae)
        self.cache: dict[Bucket, torch.Tensor] = {}
        if self.source.cached:
            buckets = {bucket for phase in recipe.dit.phases for bucket in phase.buckets}
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
        with autocast(device):
            return flow_loss(self.module, batch, latents, generator)
