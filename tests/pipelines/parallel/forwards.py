"""One forward of each family's tiny transformer: the arguments its pipeline would pass, from a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import tiny_models
from tests.tiny_models import text


@dataclass(frozen=True)
class Sizes:
    """Lengths of the streams of tokens, and how much of the text is real."""

    grid: tuple[int, int, int]
    """Frames, height and width in tokens. Image families take the last two."""
    text: int
    masked: bool = False
    """Two items; the second one's text ends with padding."""

    @property
    def batch(self) -> int:
        return 2 if self.masked else 1

    @property
    def area(self) -> int:
        return self.grid[1] * self.grid[2]


EVEN = Sizes(grid=(2, 8, 8), text=48)
"""Every stream divides by 4."""
UNEVEN = Sizes(grid=(3, 9, 7), text=49)
"""No stream does."""
MASKED = Sizes(grid=(2, 8, 8), text=48, masked=True)
MASKED_UNEVEN = Sizes(grid=(3, 9, 7), text=49, masked=True)
SHORT_TEXT = Sizes(grid=(3, 9, 7), text=3)
"""Fewer text tokens than ranks: the last rank has none."""


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def timestep(sizes: Sizes) -> Tensor:
    return torch.full((sizes.batch,), 0.7)


def wan(sizes: Sizes, channels: int = 16) -> dict[str, Any]:
    frames, height, width = sizes.grid
    return {
        "hidden_states": noise(sizes.batch, channels, frames, 2 * height, 2 * width),
        "timestep": 1000 * timestep(sizes),
        "encoder_hidden_states": noise(sizes.batch, 512, text.DIM),
    }


def wan_i2v(sizes: Sizes) -> dict[str, Any]:
    return {**wan(sizes, channels=36), "encoder_hidden_states_image": noise(sizes.batch, 17, text.DIM)}


def wan_ti2v(sizes: Sizes) -> dict[str, Any]:
    """The tokens of the first frame are noiseless."""
    frames = sizes.grid[0]
    per_token = 1000 * timestep(sizes)[:, None].repeat(1, frames * sizes.area)
    per_token[:, : sizes.area] = 0
    return {**wan(sizes, channels=48), "timestep": per_token}


def positions(sizes: Sizes, image: int, axes: int) -> Tensor:
    """(S, axes) position ids of image number `image`."""
    _, height, width = sizes.grid
    ids = torch.zeros(height, width, axes)
    ids[..., 0] = image
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = torch.arange(width)
    return ids.flatten(0, 1)


def flux1(sizes: Sizes, images: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": noise(sizes.batch, images * sizes.area, 64),
        "timestep": timestep(sizes),
        "guidance": torch.full((sizes.batch,), 3.5),
        "pooled_projections": noise(sizes.batch, text.DIM),
        "encoder_hidden_states": noise(sizes.batch, sizes.text, text.DIM),
        "txt_ids": torch.zeros(sizes.text, 3),
        "img_ids": torch.cat([positions(sizes, image, axes=3) for image in range(images)]),
    }


def flux2(sizes: Sizes, images: int = 1) -> dict[str, Any]:
    text_ids = torch.zeros(1, sizes.text, 4)
    text_ids[..., 3] = torch.arange(sizes.text)
    return {
        "hidden_states": noise(sizes.batch, images * sizes.area, 128),
        "timestep": timestep(sizes),
        "guidance": torch.full((sizes.batch,), 3.5),
        "encoder_hidden_states": noise(sizes.batch, sizes.text, 3 * text.DIM),
        "txt_ids": text_ids,
        "img_ids": torch.cat([positions(sizes, image, axes=4) for image in range(images)])[None],
    }


def qwen_image(sizes: Sizes, images: int = 1) -> dict[str, Any]:
    _, height, width = sizes.grid
    mask = None
    if sizes.masked:
        mask = torch.ones(sizes.batch, sizes.text, dtype=torch.bool)
        mask[1, sizes.text // 2 :] = False
    return {
        "hidden_states": noise(sizes.batch, images * sizes.area, 64),
        "timestep": timestep(sizes),
        "encoder_hidden_states_mask": mask,
        "encoder_hidden_states": noise(sizes.batch, sizes.text, text.DIM),
        "img_shapes": [[(1, height, width)] * images] * sizes.batch,
    }


def z_image(sizes: Sizes) -> dict[str, Any]:
    """Z-Image pads streams to multiples of 32. If captions differ in length, it masks the shorter."""
    _, height, width = sizes.grid
    captions = [noise(sizes.text + 40 * item, text.DIM) for item in range(sizes.batch)]
    return {
        "x": [noise(16, 1, 2 * height, 2 * width) for _ in range(sizes.batch)],
        "t": timestep(sizes),
        "cap_feats": captions,
    }


def sd3(sizes: Sizes) -> dict[str, Any]:
    _, height, width = sizes.grid
    return {
        "hidden_states": noise(sizes.batch, 16, 2 * height, 2 * width),
        "timestep": 1000 * timestep(sizes),
        "encoder_hidden_states": noise(sizes.batch, sizes.text, text.DIM),
        "pooled_projections": noise(sizes.batch, text.DIM),
    }


@dataclass(frozen=True)
class Forward:
    family: str
    """Its name in `tests.tiny_models`."""
    arguments: Callable[[Sizes], dict[str, Any]]
    masks: bool = False
    """Whether the transformer masks padding."""


FORWARDS: Mapping[str, Forward] = {
    "Wan T2V": Forward("wan2.1-t2v", wan),
    "Wan I2V with image embeddings": Forward("wan2.1-i2v", wan_i2v),
    "Wan TI2V with a timestep per token": Forward("wan2.2-ti2v", wan_ti2v),
    "FLUX.1": Forward("flux1", flux1),
    "FLUX.1 Kontext": Forward("flux1-kontext", lambda sizes: flux1(sizes, images=2)),
    "FLUX.2": Forward("flux2", flux2),
    "FLUX.2 with two references": Forward("flux2", lambda sizes: flux2(sizes, images=3)),
    "Qwen-Image": Forward("qwen-image", qwen_image, masks=True),
    "Qwen-Image-Edit with two images": Forward(
        "qwen-image-edit-plus", lambda sizes: qwen_image(sizes, images=3), masks=True
    ),
    "Z-Image": Forward("z-image", z_image, masks=True),
    "SD3": Forward("sd3.5", sd3),
}


def transformer(name: str) -> torch.nn.Module:
    return tiny_models.build(FORWARDS[name].family).transformer.eval()


def arguments(name: str, sizes: Sizes) -> dict[str, Any]:
    torch.manual_seed(1)
    return {**FORWARDS[name].arguments(sizes), "return_dict": False}


def output(transformer: torch.nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The sample, as one tensor (Z-Image gives a list)."""
    sample = transformer(**arguments)[0]
    return sample if isinstance(sample, Tensor) else torch.stack(sample)
