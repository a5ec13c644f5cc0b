"""Trains the bundled model, stage by stage. Stop it at any time; --resume goes on where it was.

    python -m pipelines.bundled.train --preset gpu --output runs/bundled --workers 12
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage vae --minutes 20
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage dit --minutes 60 --resume
    python -m pipelines.bundled.train --preset cpu --output runs/bundled --stage lora --style sepia

Stages, all of them in this order without --stage:
  vae     the autoencoder, to OUTPUT/vae
  motion  the same, on more clips; the latents of stills stay what they are
  dit     the text encoder and the transformer on its latents
  export  the model in the diffusers layout, to OUTPUT/model
  lora    an adapter to that model, to OUTPUT/lora
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import logging
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes.styles import STYLES
from pipelines.bundled.train.captioned import latents_of
from pipelines.bundled.train.dit import DiTStage
from pipelines.bundled.train.export import export_model, export_vae
from pipelines.bundled.train.loop import Limits, train
from pipelines.bundled.train.lora import LoRAStage
from pipelines.bundled.train.recipe import PRESETS, Recipe
from pipelines.bundled.train.tokenizer import build_tokenizer
from pipelines.bundled.train.vae import MotionStage, VAEStage

STAGES = ("vae", "motion", "dit", "export", "lora")
TRAINED = ("vae", "motion", "dit", "lora")


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
    parser.add_argument("--initial", type=Path, help="directory of a model to train further")
    parser.add_argument("--first-step", type=int, default=0, help="of the recipe, where --initial goes on")
    parser.add_argument("--compile", action="store_true", help="compile the transformer: half a minute for each shape")
    parser.add_argument("--nouns", type=int, help="in place of the recipe's")
    parser.add_argument("--style", choices=STYLES, default="sepia", help="of the adapter")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes; 0 draws between steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(command_line)
    if arguments.steps is not None and arguments.stage not in TRAINED:
        parser.error(f"--steps needs --stage {', '.join(TRAINED[:-1])} or {TRAINED[-1]}")
    if arguments.first_step and (arguments.initial is None or arguments.stage != "dit"):
        parser.error("--first-step needs --initial and --stage dit")
    logging.set_verbosity_error()  # diffusers' warns at each step that its attention backends are experimental
    recipe = PRESETS[arguments.preset]
    if arguments.nouns is not None:
        recipe = replace(recipe, nouns=arguments.nouns)
    if arguments.steps is not None:
        recipe = replace(recipe, **{arguments.stage: replace(getattr(recipe, arguments.stage), steps=arguments.steps)})
    run(
        recipe,
        STAGES if arguments.stage is None else (arguments.stage,),
        arguments.output,
        Limits(arguments.minutes, workers=arguments.workers, first_step=arguments.first_step),
        resume=arguments.resume,
        style=arguments.style,
        device=torch.device(arguments.device),
        initial=arguments.initial,
        compile_blocks=arguments.compile,
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
    initial: Path | None = None,
    compile_blocks: bool = False,
) -> None:
    """Run these stages in order. A stage that pauses before its last step ends the run, because the next stages would
    build on unfinished work. A run that trains the model `initial` further starts with that model's autoencoder and
    tokenizer.

    Raises:
        FileExistsError: a stage has a checkpoint and `resume` is false.
        OSError: a stage needs something that an earlier one has not made yet.
    """
    if initial is not None and not (output / "vae").exists():
        for part in ("vae", "tokenizer"):
            shutil.copytree(initial / part, output / part)
    for name in stages:
        match name:
            case "vae":
                vae_stage = VAEStage(recipe, device)
                done = train(vae_stage, output, limits, resume=resume) == recipe.vae.steps
                export_vae(recipe, output / "vae.pt", output / "vae", device)
            case "motion":
                motion_stage = MotionStage(recipe, AutoencoderKLWan.from_pretrained(output / "vae"), device)
                done = train(motion_stage, output, limits, resume=resume) == recipe.motion.steps
                motion_stage.average.save_pretrained(output / "vae")
            case "dit":
                dit_stage = DiTStage(
                    recipe,
                    tokenizer_in(output, recipe),
                    AutoencoderKLWan.from_pretrained(output / "vae"),
                    latents_of(output / "vae", output),
                    device,
                    initial=initial,
                    first_step=limits.first_step,
                    compile_blocks=compile_blocks,
                )
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
    """The run's tokenizer, built by whichever stage needs it first. From then on a text always has the same ids."""
    directory = output / "tokenizer"
    if not directory.exists():
        build_tokenizer(recipe.seed).save_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


if __name__ == "__main__":
    main()
