"""Trains the bundled model, stage by stage. Stop it at any time; `--resume` goes on where it was.

    python -m pipelines.bundled.train --preset gpu --output runs/bundled                  everything, to the end
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage vae --minutes 20
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage dit --minutes 60 --resume
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage lora --style sepia

Stages: `vae`, the autoencoder; `dit`, the text encoder and the transformer on its latents; `export`, the model in the
diffusers layout, in `<output>/model`; `lora`, an adapter to that, in `<output>/lora`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from pipelines.bundled.train.loop import Limits, train
from pipelines.bundled.train.recipe import PRESETS
from pipelines.bundled.train.vae import VAEStage


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.bundled.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--stage", choices=("vae", "dit", "export", "lora"))
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    recipe = PRESETS[arguments.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.steps is not None:
        recipe = replace(recipe, vae=replace(recipe.vae, steps=arguments.steps))
    train(VAEStage(recipe, device), arguments.output, Limits(arguments.minutes), resume=arguments.resume)


if __name__ == "__main__":
    main()
