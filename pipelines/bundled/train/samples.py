"""A sheet of pictures that a model draws, each under its prompt.

python -m pipelines.bundled.train.samples MODEL_DIRECTORY --output samples.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import wrap

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

PROMPTS = (
    "A calico cat playing a piano on stage",
    "a dog on the beach",
    "a red apple on a white background",
    "a robot to the left of a pizza on the grass",
    "a crown above a penguin at night",
    "a house next to a tree in the snow",
    "a big fish on a blue background",
    "a sun above a red car in the desert",
    "a small soccer ball on a pink background",
    "a guitar in a room",
    "three balloons at sunset",
    "a frog on top of a mushroom on a green background",
)

COLUMNS = 4
TEXT_HEIGHT = 28
"""Pixels under each picture: two lines of Pillow's own font."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the diffusers layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="file of an adapter")
    arguments = parser.parse_args()
    pipeline = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    if arguments.lora is not None:
        pipeline.load_lora_weights(arguments.lora.parent, weight_name=arguments.lora.name)
    pictures = [
        pipeline(
            prompt,
            width=arguments.size,
            height=arguments.size,
            num_frames=1,
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            generator=torch.Generator().manual_seed(arguments.seed),
            output_type="pil",
        ).frames[0][0]
        for prompt in tqdm(PROMPTS)
    ]
    sheet(pictures, PROMPTS).save(arguments.output)


def sheet(pictures: list[Image.Image], prompts: tuple[str, ...]) -> Image.Image:
    """Pictures of one size in rows of four, each above its prompt."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * width, rows * (height + TEXT_HEIGHT)), "white")
    draw = ImageDraw.Draw(page)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = index % COLUMNS * width, index // COLUMNS * (height + TEXT_HEIGHT)
        page.paste(picture, (left, top))
        draw.text((left + 2, top + height + 1), "\n".join(wrap(prompt, width // 6)[:2]), fill="black")
    return page


if __name__ == "__main__":
    main()
