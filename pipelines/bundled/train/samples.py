"""A sheet of pictures or of clips that a model draws, each above its prompt.

python -m pipelines.bundled.train.samples MODEL_DIRECTORY --output samples.png
python -m pipelines.bundled.train.samples MODEL_DIRECTORY --num-frames 17 --output clips.webp
"""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import wrap

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from tqdm import tqdm

from configs.model_family import family_in
from pipelines.model.convolution import skip_padding

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

CLIP_PROMPTS = (
    "A calico cat playing a piano on stage",
    "a red car moving to the left on a white background",
    "a dog running to the right on the beach",
    "a rocket flying up at night",
    "a red apple falling down on a green background",
    "a robot spinning in a room",
    "a frog jumping on the grass",
    "a sun growing at sunset",
)

COLUMNS = 4
TEXT_HEIGHT = 28
"""Pixels under each image: two lines of Pillow's own font."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the diffusers layout")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="of each, in pixels")
    parser.add_argument("--num-frames", type=int, default=1, help="of clips, whose sheet is an animation")
    parser.add_argument("--steps", type=int, help="in place of the model's default")
    parser.add_argument("--guidance-scale", type=float, help="in place of the model's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=Path, help="file of an adapter")
    arguments = parser.parse_args()
    family = family_in(arguments.model)
    assert family is not None
    defaults = family.defaults
    pipeline = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu").set_progress_bar_config(disable=True)
    skip_padding(pipeline.vae)
    if arguments.lora is not None:
        pipeline.load_lora_weights(arguments.lora.parent, weight_name=arguments.lora.name)
    prompts = PROMPTS if arguments.num_frames == 1 else CLIP_PROMPTS
    clips = [
        pipeline(
            prompt,
            width=arguments.size,
            height=arguments.size,
            num_frames=arguments.num_frames,
            num_inference_steps=arguments.steps or defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale,
            generator=torch.Generator().manual_seed(arguments.seed),
            output_type="pil",
        ).frames[0]
        for prompt in tqdm(prompts)
    ]
    first, *others = [sheet(list(pictures), prompts) for pictures in zip(*clips, strict=True)]
    if others:
        first.save(arguments.output, save_all=True, append_images=others, duration=1000 // defaults.fps, loop=0)
    else:
        first.save(arguments.output)


def sheet(pictures: list[Image.Image], prompts: tuple[str, ...]) -> Image.Image:
    """Images of one size in rows of four, each above its prompt."""
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
