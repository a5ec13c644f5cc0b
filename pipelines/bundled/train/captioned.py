"""Batches of captioned scenes, for the stages that learn what words look like."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes.captions import Wording
from pipelines.bundled.scenes.nouns import first_nouns
from pipelines.bundled.scenes.render import render
from pipelines.bundled.scenes.scene import Scene, sample_scene
from pipelines.bundled.scenes.styles import STYLES
from pipelines.bundled.train.loop import autocast, device_of
from pipelines.bundled.train.recipe import Bucket, Recipe, StageRecipe
from pipelines.bundled.train.vae import pixels_of, stack

ENCODED_AT_ONCE = 2**21
"""Pixels that go through the encoder together, on any device: their activations take some 2 GB."""


TEXT_LENGTH = 32
"""Texts are padded to a multiple of this many tokens, so that code compiled for one length serves many batches."""


@dataclass(frozen=True)
class Captioned:
    bucket: Bucket
    input_ids: torch.Tensor
    """`(B, L)`, padded to the longest text, rounded up to a multiple of 32."""
    attention_mask: torch.Tensor
    """`(B, L)`, 1 for text and 0 for padding."""
    given_first_frame: bool
    indices: torch.Tensor
    """`(B,)`: the numbers of these scenes in the bucket."""
    pixels: torch.Tensor | None
    """`(B, 3, T, H, W)`, uint8; None if their latents are cached."""


@dataclass(frozen=True)
class CaptionedBatches:
    """The data of each step, as a function of the step alone."""

    name: str
    recipe: Recipe
    stage: StageRecipe
    tokenizer: PreTrainedTokenizerFast
    cached: bool
    style: str | None = None

    def batch(self, step: int) -> Captioned:
        random = Random(f"{self.name} {self.recipe.seed} {step}")
        bucket = self.stage.draw_bucket(step, random)
        limit = cached_scenes(self.recipe, bucket) if self.cached else 2**48
        indices = [random.randrange(limit) for _ in range(bucket.batch_size)]
        scenes = [scene_of(self.recipe, bucket, index) for index in indices]
        wording = Wording()
        captions = [
            "" if random.random() < self.recipe.caption_dropout else wording.caption(scene, random) for scene in scenes
        ]
        tokens = self.tokenizer(captions, padding=True, pad_to_multiple_of=TEXT_LENGTH, return_tensors="pt")
        return Captioned(
            bucket=bucket,
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            given_first_frame=bucket.num_frames > 1 and random.random() < self.recipe.first_frame_share,
            indices=torch.tensor(indices),
            pixels=None if self.cached else draw(scenes, bucket, self.style),
        )


def cached_scenes(recipe: Recipe, bucket: Bucket) -> int:
    """The number of this bucket's scenes that are cached: the larger and longer they are, the fewer."""
    pixels = recipe.cached_pixels if bucket.num_frames == 1 else recipe.cached_clip_pixels
    return max(bucket.batch_size, pixels // (bucket.width * bucket.height * bucket.num_frames))


def scene_of(recipe: Recipe, bucket: Bucket, index: int) -> Scene:
    random = Random(f"{recipe.seed} {bucket.width}x{bucket.height}x{bucket.num_frames} {index}")
    return sample_scene(random, first_nouns(recipe.nouns), clip=bucket.num_frames > 1, moving_share=recipe.moving_share)


def draw(scenes: list[Scene], bucket: Bucket, style: str | None = None) -> torch.Tensor:
    """`(B, 3, T, H, W)`, uint8."""
    clips = [render(scene, bucket.width, bucket.height, bucket.num_frames) for scene in scenes]
    if style is not None:
        clips = [STYLES[style](clip) for clip in clips]
    return stack(clips)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, frames: torch.Tensor) -> torch.Tensor:
    """The normalised latents (B, C, T', h, w), in float32, of `frames` (B, 3, T, H, W) in uint8: the posterior's mode,
    which image to video uses for its input too."""
    device = device_of(vae)
    at_once = max(1, ENCODED_AT_ONCE // frames[0, 0].numel())
    encoded = []
    for part in frames.split(at_once):
        with autocast(device):
            encoded.append(vae._encode(pixels_of(part.to(device)))[:, : vae.config.z_dim].float())
    return normalize(vae, torch.cat(encoded))


def normalize(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Normalise each channel to mean 0 and deviation 1, with the numbers in the autoencoder's configuration."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def latents_of(vae_directory: Path, output: Path) -> Path:
    """The directory where a run caches this autoencoder's latents, never mistaken for those of another."""
    digest = sha256()
    for file in sorted(vae_directory.iterdir()):
        digest.update(file.read_bytes())
    return output / "latents" / digest.hexdigest()[:12]


def load_latents(vae: AutoencoderKLWan, recipe: Recipe, bucket: Bucket, directory: Path) -> torch.Tensor:
    """The latents (N, C, T', h, w), in float16, of the bucket's cached scenes. Those missing from `directory`, perhaps
    because an earlier run had fewer scenes, are encoded now and saved there."""
    count = cached_scenes(recipe, bucket)
    shape = f"{bucket.width}x{bucket.height}x{bucket.num_frames}"
    scenes = f"{recipe.nouns}-nouns-{recipe.moving_share}-moving-{recipe.seed}"
    path = directory / f"{shape}-of-{scenes}.safetensors"
    parts = [load_file(path)["latents"][:count]] if path.exists() else []
    missing = range(sum(map(len, parts)), count)
    if not missing:
        return parts[0]
    for start in tqdm(missing[::64], desc=f"encode {shape}", unit="batch"):
        batch = [scene_of(recipe, bucket, index) for index in range(start, min(start + 64, count))]
        parts.append(encode(vae, draw(batch, bucket)).half().cpu())
    latents = torch.cat(parts).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path)
    return latents
