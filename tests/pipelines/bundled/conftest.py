"""A recipe that trains in a blink, and sprites for machines without the font."""

from __future__ import annotations

from functools import cache
from hashlib import sha256

import pytest
from PIL import Image, ImageDraw
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes import render
from pipelines.bundled.train.recipe import Bucket, ModelShape, Phase, Recipe, StageRecipe
from pipelines.bundled.train.tokenizer import build_tokenizer

STILL = Bucket(32, 32, 1, 2)
CLIP = Bucket(32, 32, 5, 2)


def stage(*buckets: Bucket) -> StageRecipe:
    return StageRecipe(
        steps=2, phases=(Phase(1.0, buckets),), matrix_learning_rate=1e-3, learning_rate=1e-3, warmup_steps=1
    )


RECIPE = Recipe(
    nouns=8,
    shape=ModelShape(vae_encoder_dim=8, vae_decoder_dim=8, text_dim=32, text_layers=1, heads=4, head_dim=12, layers=1),
    vae=stage(STILL, CLIP),
    motion=stage(CLIP),
    dit=stage(STILL, CLIP),
    lora=stage(STILL),
    cached_pixels=4 * 32 * 32,
    cached_clip_pixels=4 * 5 * 32 * 32,
    lora_rank=2,
    picture_size=48,
    defaults={"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 3.0},
)


@cache
def painted_sprite(emoji: str) -> Image.Image:
    """A disc in a colour of the emoji's own, on a transparent square."""
    image = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(image).ellipse((2, 2, 38, 38), fill=(*sha256(emoji.encode()).digest()[:3], 255))
    return image


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes are drawn without the font."""
    monkeypatch.setattr(render, "sprite", painted_sprite)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()
