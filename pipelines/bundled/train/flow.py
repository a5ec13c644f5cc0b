"""Flow matching (Lipman et al. 2023, Liu et al. 2023) on latents, conditioned as in serving."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import UMT5EncoderModel

from pipelines.bundled.train.captioned import Captioned
from pipelines.bundled.train.padding import fold_padding
from pipelines.bundled.train.tokens import draw_tokens, on_tokens

TRAIN_TIMESTEPS = 1000
"""The scheduler's timestep for pure noise."""

UNIFORM_SHARE = 0.2
"""Share of timesteps that are drawn uniformly: logit-normal ones alone hardly ever reach either end."""


class TextToLatents(nn.Module):
    """The networks that are trained together: text encoder and transformer."""

    def __init__(self, text_encoder: UMT5EncoderModel, transformer: WanTransformer3DModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer


def sample_sigmas(count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """`(count,)` shares of noise, 0 to 1: logit-normal, shifted to more noise for larger images, and some uniform.

    The shift follows Esser et al. 2024 (Stable Diffusion 3, section 5.3.2), the square root of the ratio of token
    counts: 2 at 64 tokens (128x128), and at most 8, which leaves a quarter of those at 1024x1024 below 0.72 of noise.
    """
    device = generator.device
    shift = min(8.0, 2 * (tokens / 64) ** 0.5)
    sigmas = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    uniform = torch.rand(count, generator=generator, device=device)
    return torch.where(torch.rand(count, generator=generator, device=device) < UNIFORM_SHARE, uniform, sigmas)


def flow_loss(
    model: TextToLatents, batch: Captioned, latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The mean squared error of the predicted velocity, noise - latents, for normalised latents (B, C, T, h, w).

    A given first frame is presented as `WanImageToVideoPipeline` does with `expand_timesteps`: clean latents, whose
    tokens have timestep 0. The loss leaves it out, as well as the tokens that the bucket's `token_share` leaves out.
    """
    count, _, frames, height, width = latents.shape
    tokens = frames * (height // 2) * (width // 2)
    sigmas = sample_sigmas(count, tokens, generator)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    share = sigmas.view(-1, 1, 1, 1, 1)
    noisy = (1 - share) * latents + share * noise
    timesteps = sigmas * TRAIN_TIMESTEPS
    kept = draw_tokens(tokens, batch.bucket.token_share, generator)
    if batch.given_first_frame:
        noisy[:, :, 0] = latents[:, :, 0]
        timesteps = torch.where(kept < tokens // frames, 0.0, timesteps[:, None])
    input_ids, attention_mask = batch.input_ids.to(latents.device), batch.attention_mask.to(latents.device)
    encoded = model.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    with on_tokens(model.transformer, kept):
        velocity = model.transformer(noisy, timesteps, fold_padding(encoded, attention_mask), return_dict=False)[0]
    errors = (velocity.float() - (noise - latents)).square()
    asked = torch.zeros(tokens, dtype=torch.bool, device=latents.device)
    asked[kept] = True
    asked = asked.view(frames, height // 2, width // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    if batch.given_first_frame:
        asked[0] = False
    loss = errors[:, :, asked].mean()
    return loss, {("loss_still" if frames == 1 else "loss_clip"): loss.detach()}
