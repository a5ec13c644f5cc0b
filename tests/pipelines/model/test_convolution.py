"""What an autoencoder computes on a CPU is what diffusers computes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan

from configs.server_args import ServerArgs
from pipelines.model.convolution import skip_padding
from pipelines.model.load import load_model
from tests import tiny_models

VAEs = {
    "Wan 2.1": lambda: tiny_models.build("wan2.1-t2v").vae,
    "Wan 2.2 TI2V": lambda: tiny_models.build("wan2.2-ti2v").vae,
    "Qwen-Image": lambda: tiny_models.build("qwen-image").vae,
}


@pytest.mark.parametrize("num_frames", [1, 5, 13])
@pytest.mark.parametrize("name", VAEs)
@torch.no_grad()
def test_without_its_padding_an_autoencoder_gives_the_same(name: str, num_frames: int) -> None:
    torch.manual_seed(0)
    vae: AutoencoderKLWan | AutoencoderKLQwenImage = VAEs[name]()
    pixels = torch.rand(2, 3, num_frames, 32, 48) * 2 - 1
    latents = vae.encode(pixels).latent_dist.mode()
    decoded = vae.decode(latents).sample
    skip_padding(vae)
    torch.testing.assert_close(vae.encode(pixels).latent_dist.mode(), latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(latents).sample, decoded, atol=1e-4, rtol=1e-4)
    assert decoded.shape == pixels.shape


@torch.no_grad()
def test_a_model_on_a_cpu_is_loaded_without_the_padding() -> None:
    vae = load_model(ServerArgs(device="cpu")).pipeline.vae
    with mock.patch("torch.nn.functional.conv3d", side_effect=AssertionError("a convolution over padding")):
        assert vae.decode(torch.zeros(1, 16, 1, 4, 4, dtype=vae.dtype)).sample.shape == (1, 3, 1, 32, 32)
