"""Trains the bundled model, stage by stage. Stop it at any time; --resume goes on where it was.

    python -m pipelines.bundled.train --preset gpu --output runs/bundled --workers 12
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage vae --minutes 20
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage dit --minutes 60 --resume
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage lora --style sepia

Stages, all of them in this order without --stage:
  vae     the autoencoder, to OUTPUT/vae
  dit     the text encoder and the transformer on its latents
  export  the model in the diffusers layout, to OUTPUT/model
  lora    an adapter to that model, to OUTPUT/lora
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes.styles import STYLES
from pipelines.bundled.train.dit import DiTStage
from pipelines.bundled.train.export import export_model, export_vae
from pipelines.bundled.train.loop import Limits, train
from pipelines.bundled.train.lora import LoRAStage
from pipelines.bundled.train.recipe import PRESETS, Recipe
from pipelines.bundled.train.tokenizer import build_tokenizer
from pipelines.bundled.train.vae import VAEStage

STAGES = ("vae", "dit", "export", "lora")


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.bundled.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, required=True, help="the recipe: what a CPU or a GPU can carry")
    parser.add_argument("--output", type=Path, required=True, help="directory of checkpoints, logs and the model")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in OUTPUT")
    parser.add_argument("--minutes", type=float, help="pause after this long, before the next stage too")
    parser.add_argument("--steps", type=int, help="of the stage, in place of the recipe's; needs --stage")
    parser.add_argument("--nouns", type=int, help="in place of the recipe's")
    parser.add_argument("--style", choices=STYLES, default="sepia", help="of the adapter")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes; 0 draws between steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(command_line)
    if arguments.steps is not None and arguments.stage not in ("vae", "dit", "lora"):
        parser.error("--steps needs --stage vae, dit or lora")
    recipe = PRESETS[arguments.preset]
    if arguments.nouns is not None:
        recipe = replace(recipe, nouns=arguments.nouns)
    if arguments.steps is not None:
        recipe = replace(recipe, **{arguments.stage: replace(getattr(recipe, arguments.stage), steps=arguments.steps)})
    run(
        recipe,
        STAGES if arguments.stage is None else (arguments.stage,),
        arguments.output,
        Limits(arguments.minutes, workers=arguments.workers),
        resume=arguments.resume,
        style=arguments.style,
        device=torch.device(arguments.device),
    )


def run(
    recipe: Recipe,
    stages: tuple[str, ...],
    output: Path,
    limits: Limits,
    *,
    resume: bool,
    style: str,
    device: torch.device,
) -> None:
    """Run these stages in order. A stage that pauses before its last step ends the run, unless it was asked for alone:
    what follows would build on what is not done.

    Raises:
        FileExistsError: a stage has a checkpoint, and `resume` is not asked for.
        OSError: a stage needs what an earlier one has not made yet.
    """
    for name in stages:
        match name:
            case "vae":
                vae_stage = VAEStage(recipe, device)
                done = train(vae_stage, output, limits, resume=resume) == recipe.vae.steps
                export_vae(recipe, output / "vae.pt", output / "vae", device)
            case "dit":
                vae = AutoencoderKLWan.from_pretrained(output / "vae")
                dit_stage = DiTStage(recipe, tokenizer_in(output, recipe), vae, output / "vae" / "latents", device)
                done = train(dit_stage, output, limits, resume=resume) == recipe.dit.steps
            case "export":
                vae = AutoencoderKLWan.from_pretrained(output / "vae")
                export_model(recipe, tokenizer_in(output, recipe), vae, output / "dit.pt", output / "model")
                done = True
            case _:
                pipeline = WanPipeline.from_pretrained(output / "model", dtype=torch.float32)
                lora_stage = LoRAStage(recipe, pipeline, style, device)
                done = train(lora_stage, output, limits, resume=resume) == recipe.lora.steps
                lora_stage.save(output / "lora")
        if not done:
            return


def tokenizer_in(output: Path, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The run's tokenizer, built by whichever stage needs it first. A text means the same ids ever after."""
    directory = output / "tokenizer"
    if not directory.exists():
        build_tokenizer(recipe.seed).save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


if __name__ == "__main__":
    main()
