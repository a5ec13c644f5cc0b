"""The autoencoder: first images and videos of scenes, then more videos, while images keep their latents."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

from pipelines.bundled.scenes.nouns import first_nouns
from pipelines.bundled.scenes.render import render
from pipelines.bundled.scenes.scene import sample_scene
from pipelines.bundled.train.loop import autocast, device_of
from pipelines.bundled.train.networks import build_vae
from pipelines.bundled.train.optimizer import MuonAdamW, split_parameters
from pipelines.bundled.train.recipe import Recipe, StageRecipe
from pipelines.model.convolution import skip_padding

KL_WEIGHT = 1e-4
"""Per latent value: enough to keep the latents near N(0, 1), too little to blur."""

EDGE_WEIGHT = 0.5
"""Weight of the error of differences between neighbouring pixels, which makes edges sharp."""


@dataclass(frozen=True)
class PixelBatches:
    """Crops of scenes drawn at 1 to 2 times the crop's size, so that training sees detail of every scale."""

    name: str
    recipe: Recipe
    stage: StageRecipe

    def batch(self, step: int) -> torch.Tensor:
        """`(B, 3, T, H, W)`, uint8."""
        random = Random(f"{self.name} {self.recipe.seed} {step}")
        bucket = self.stage.draw_bucket(step, random)
        nouns = first_nouns(self.recipe.nouns)
        clips = []
        for _ in range(bucket.batch_size):
            scale = random.choice((1.0, 1.0, 1.5, 2.0))
            width, height = round(bucket.width * scale), round(bucket.height * scale)
            scene = sample_scene(random, nouns, clip=bucket.num_frames > 1, moving_share=self.recipe.moving_share)
            clip = render(scene, width, height, bucket.num_frames)
            left, top = random.randint(0, width - bucket.width), random.randint(0, height - bucket.height)
            clips.append(clip[:, top : top + bucket.height, left : left + bucket.width])
        return stack(clips)


class AutoencoderStage:
    """What both stages of the autoencoder share: everything but the initial weights and the choice of frozen ones."""

    name: str

    def __init__(self, recipe: Recipe, stage: StageRecipe, vae: AutoencoderKLWan, device: torch.device) -> None:
        self.recipe = stage
        self.seed = recipe.seed
        self.source = PixelBatches(self.name, recipe, stage)
        self.module = vae.to(device)
        self.average = copy.deepcopy(self.module)
        skip_padding(self.module)
        matrices, rest = split_parameters(self.module, ())
        self.optimizer = MuonAdamW(
            matrices, rest, matrix_learning_rate=stage.matrix_learning_rate, learning_rate=stage.learning_rate
        )

    def loss(self, batch: torch.Tensor, step: int) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Mean absolute error of pixels and of their differences, and the Kullback-Leibler divergence of the latents
        from N(0, 1)."""
        device = device_of(self.module)
        pixels = pixels_of(batch.to(device))
        with autocast(device):
            moments = self.module._encode(pixels).float()
            mean, log_variance = moments.chunk(2, 1)
            log_variance = log_variance.clamp(-12, 4)
            generator = torch.Generator(device).manual_seed(step_seed(self.seed, step))
            noise = torch.randn(mean.shape, generator=generator, device=device)
            decoded = decode(self.module, mean + noise * torch.exp(log_variance / 2)).float()
        error = decoded - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean() / 2
        loss = error.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * divergence
        name = "psnr_still" if pixels.shape[2] == 1 else "psnr_clip"
        return loss, {name: psnr(decoded.detach().clamp(-1, 1), pixels), "kl": divergence.detach()}


class VAEStage(AutoencoderStage):
    """The first stage: the whole autoencoder, from scratch."""

    name = "vae"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        super().__init__(recipe, recipe.vae, build_vae(recipe.shape), device)


class MotionStage(AutoencoderStage):
    """The second stage: an autoencoder that knows images learns how they move.

    It trains the decoder, and in the encoder only the taps that look back in time, which an image never uses. So the
    latents of images stay the same, to the bit.
    """

    name = "motion"

    def __init__(self, recipe: Recipe, vae: AutoencoderKLWan, device: torch.device) -> None:
        super().__init__(recipe, recipe.motion, vae, device)
        for module in (self.module.encoder, self.module.quant_conv):
            module.requires_grad_(False)
        for convolution in self.module.encoder.modules():
            if isinstance(convolution, WanCausalConv3d) and convolution.kernel_size[0] > 1:
                convolution.weight.requires_grad_(True)
                # A strided one, which downsamples in time, is not used before the second latent frame.
                if convolution.stride[0] == 1:
                    convolution.weight.register_hook(_without_last_tap)


def _without_last_tap(gradient: torch.Tensor) -> torch.Tensor:
    """A kernel's gradient (out, in, T, H, W) without the last tap. Orthogonalised, columns of zeros stay zeros, so that
    tap does not move."""
    past = gradient.clone()
    past[:, :, -1] = 0
    return past


def step_seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step


def stack(clips: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Videos (T, H, W, 3) as one (B, 3, T, H, W), uint8."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def pixels_of(frames: torch.Tensor) -> torch.Tensor:
    """uint8 to -1..1."""
    return frames.float() / 127.5 - 1


def psnr(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of values in -1..1, whose peak is 2."""
    return 10 * torch.log10(4 / (decoded - pixels).square().mean())


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """What `vae.decode` returns for (B, C, T, h, w), before it clamps: clamped values would pass no gradient."""
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    chunks = []
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        latent = latents[:, :, index : index + 1]
        chunks.append(vae.decoder(latent, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), vae.config.patch_size)
