"""Tiny pipelines of every family, built in code in milliseconds: the same random weights every time.

`build` gives one in memory; `save` writes one where `DiffusionPipeline.from_pretrained` finds it.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_inpaint,
    pipeline_qwenimage_edit_plus,
)

from tests.tiny_models import images, wan
from tests.tiny_models.weights import randomize, sharpen_posterior

BUILDERS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "wan2.1-t2v": wan.text_to_video_21,
    "wan2.1-i2v": wan.image_to_video_21,
    "wan2.2-t2v": wan.text_to_video_22,
    "wan2.2-i2v": wan.image_to_video_22,
    "wan2.2-ti2v": wan.text_image_to_video_22,
    "flux1": images.flux1,
    "flux1-kontext": images.flux1_kontext,
    "flux2": images.flux2,
    "flux2-klein": images.flux2_klein,
    "qwen-image": images.qwen_image,
    "qwen-image-edit": images.qwen_image_edit,
    "qwen-image-edit-plus": images.qwen_image_edit_plus,
    "z-image": images.z_image,
    "sd3": images.sd3,
    "sd3.5": images.sd35,
    "flux1-schnell": images.flux1_schnell,
    "flux2-klein-base": lambda: images.flux2_klein(is_distilled=False),
    "sd3.5-medium": lambda: images.sd35(num_layers=24),
    "z-image-turbo": lambda: images.z_image(shift=3.0),
    "stable-diffusion": images.stable_diffusion,
}
UNKNOWN_FAMILY = "stable-diffusion"
"""The one model above that belongs to no family of `configs/models/`."""
VARIANTS = ("flux1-schnell", "flux2-klein-base", "sd3.5-medium", "z-image-turbo")
"""Families that differ from another in size or in how they were distilled, not in what is computed."""
FAMILIES = tuple(name for name in BUILDERS if name not in (UNKNOWN_FAMILY, *VARIANTS))
"""One of each architecture."""


def build(family_name: str) -> DiffusionPipeline:
    """The family's tiny pipeline, on the CPU in float32. Leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[family_name]()
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                randomize(component)
        sharpen_posterior(pipeline.vae)
    return pipeline


def save(family_name: str, directory: Path | str) -> Path:
    """Write the family's tiny pipeline to `directory/family_name` unless it is there, and return that path.

    Any number of processes may call it at once.
    """
    return make_directory_once(
        Path(directory, family_name), lambda private: build(family_name).save_pretrained(private)
    )


def make_directory_once(directory: Path, fill: Callable[[Path], None]) -> Path:
    """Make `directory` whole or not at all: `fill` writes a private one, which a single rename puts in place.

    If several processes race, one wins, and all of them return its directory.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as private:
        filled = Path(private, directory.name)
        filled.mkdir()
        fill(filled)
        try:
            filled.rename(directory)
        except OSError:  # a directory cannot replace one that is not empty: another process was first
            if not directory.exists():
                raise
    return directory


@contextmanager
def small_megapixel(pipeline_class: type[DiffusionPipeline]) -> Iterator[None]:
    """Within it, `pipeline_class` takes 64x64 pixels for the megapixel to which it scales larger images.

    That is a constant in the code of its `__call__`.
    """
    call = pipeline_class.__call__
    plain = inspect.unwrap(call)
    code = plain.__code__
    constants = tuple(64 * 64 if value == 1024 * 1024 else value for value in code.co_consts)
    assert constants != code.co_consts
    plain.__code__ = code.replace(co_consts=constants)
    try:
        yield
    finally:
        plain.__code__ = code


@contextmanager
def small_reference_images() -> Iterator[None]:
    """Within it Qwen-Image-Edit and FLUX.1 Kontext scale their input images to 64x64 pixels, not to about 1024x1024.

    At full size, the VAE's middle attention alone, over 16384 positions, takes seconds on a CPU.
    """
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)]))
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_inpaint, pipeline_qwenimage_edit_plus):
            full_size = module.calculate_dimensions
            patches.enter_context(
                mock.patch.object(
                    module,
                    "calculate_dimensions",
                    lambda area, ratio, full_size=full_size: full_size(area // 256, ratio),
                )
            )
        yield
