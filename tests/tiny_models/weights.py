"""Random weights that let every input show in the image."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Draw every matrix and kernel from N(0, 1 / fan_in), which keeps the variance of activations near one.

    The libraries' own initialisations scale text embeddings by 0.02 or zero the output layers: the prompt would not
    show in the image.
    """
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    module.eval()


@torch.no_grad()
def sharpen_posterior(vae: AutoencoderKLWan) -> None:
    """Make the encoder sure of its latents (standard deviation e^-10), as training does: one image, one encoding.

    Random weights alone would leave a deviation of about one, as large as the latents themselves.
    """
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    _, log_variance = last.bias.chunk(2)
    log_variance.fill_(-20.0)
