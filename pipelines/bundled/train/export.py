"""Trained networks as a directory in the diffusers layout, which any Wan server can serve."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.train.captioned import draw, encode, scene_of
from pipelines.bundled.train.flow import TextToLatents
from pipelines.bundled.train.loop import load_average
from pipelines.bundled.train.networks import build_text_encoder, build_transformer, build_vae
from pipelines.bundled.train.recipe import Recipe
from pipelines.model.convolution import skip_padding

MEASURED_SCENES = 256
"""Number of scenes from which the mean and deviation of the latents are measured."""

FLOW_SHIFT = 3.0
"""The sampler's: between the training's 2 at 128x128 and its 8 at 512x512."""


def export_vae(recipe: Recipe, checkpoint: Path, directory: Path, device: torch.device) -> None:
    """The averaged autoencoder in float32, with the mean and deviation of its latents in its configuration."""
    vae = build_vae(recipe.shape)
    load_average(vae, checkpoint)
    vae.to(device)
    skip_padding(vae)
    bucket = recipe.dit.phases[0].buckets[0]
    frames = draw([scene_of(recipe, bucket, index) for index in range(MEASURED_SCENES)], bucket)
    latents = encode(vae, frames)  # not normalised: the built VAE has mean 0 and deviation 1
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in latents.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(value, 4) for value in latents.std((0, 2, 3, 4)).tolist()],
    )
    vae.save_pretrained(directory)


def export_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, vae: AutoencoderKLWan, checkpoint: Path, directory: Path
) -> None:
    """The whole pipeline in bfloat16, with the averaged weights of the transformer's checkpoint."""
    model = TextToLatents(build_text_encoder(recipe.shape, len(tokenizer)), build_transformer(recipe.shape))
    load_average(model, checkpoint)
    vae.register_to_config(_name_or_path="")  # not the folder it was trained in
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder.bfloat16(),
        transformer=model.transformer.bfloat16(),
        vae=vae.to("cpu", torch.bfloat16),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
        ),
        expand_timesteps=True,
    )
    if directory.exists():
        shutil.rmtree(directory)
    pipeline.save_pretrained(directory)
    (directory / "ditserve.yaml").write_text(yaml.safe_dump(family_overrides(recipe), sort_keys=False))


def family_overrides(recipe: Recipe) -> dict[str, object]:
    """What this model overrides in its family: the contents of `train/ditserve.yaml`, with the recipe's defaults."""
    overrides = yaml.safe_load(resources.files("pipelines.bundled.train").joinpath("ditserve.yaml").read_text())
    # Guidance leads away from the empty caption, for which training drops captions.
    overrides["defaults"] |= {"negative_prompt": "", **recipe.defaults}
    for of_task in overrides["task_defaults"].values():
        of_task |= {"width": recipe.picture_size, "height": recipe.picture_size}
    return overrides
