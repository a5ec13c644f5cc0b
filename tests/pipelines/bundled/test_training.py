"""Each stage runs, pauses, resumes to the same weights, and leads to a model that is served like any other."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from transformers import PreTrainedTokenizerFast

from configs.server_args import ServerArgs
from pipelines.bundled.train import __main__ as command
from pipelines.bundled.train import captioned
from pipelines.bundled.train.captioned import latents_of, load_latents
from pipelines.bundled.train.dit import DiTStage
from pipelines.bundled.train.export import export_vae
from pipelines.bundled.train.loop import Limits, Stage, save_checkpoint, train
from pipelines.bundled.train.lora import LoRAStage
from pipelines.bundled.train.networks import build_vae
from pipelines.bundled.train.recipe import Bucket, Recipe
from pipelines.bundled.train.samples import sheet
from pipelines.bundled.train.vae import MotionStage, VAEStage
from pipelines.job import Task
from pipelines.model.load import load_model
from tests.pipelines.bundled.conftest import RECIPE, painted_sprite

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("painted")


def run(
    output: Path, *stages: str, recipe: Recipe = RECIPE, limits: Limits = Limits(None), resume: bool = False
) -> None:
    command.run(recipe, stages, output, limits, resume=resume, style="sepia", device=CPU)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The output of all stages."""
    output = tmp_path_factory.mktemp("trained")
    tokenizer.save_pretrained(output / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.bundled.scenes.render.sprite", painted_sprite)
        run(output, *command.STAGES)
    return output


def make_stage(name: str, trained: Path, latents: Path) -> Stage:
    match name:
        case "vae":
            return VAEStage(RECIPE, CPU)
        case "motion":
            return MotionStage(RECIPE, AutoencoderKLWan.from_pretrained(trained / "vae"), CPU)
        case "dit" | "dit-uncached":
            recipe = RECIPE if name == "dit" else replace(RECIPE, cached_pixels=0)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "tokenizer")
            return DiTStage(recipe, tokenizer, AutoencoderKLWan.from_pretrained(trained / "vae"), latents, CPU)
        case _:
            return LoRAStage(RECIPE, WanPipeline.from_pretrained(trained / "model", dtype=torch.float32), "sepia", CPU)


@pytest.mark.parametrize("name", ["vae", "motion", "dit", "dit-uncached", "lora"])
def test_a_stage_that_was_resumed_is_the_stage_that_was_not(name: str, trained: Path, tmp_path: Path) -> None:
    whole = make_stage(name, trained, tmp_path)
    begun = {key: value.clone() for key, value in whole.module.state_dict().items()}
    assert train(whole, tmp_path / "whole", Limits(None), resume=False) == 2

    paused = make_stage(name, trained, tmp_path)
    assert train(paused, tmp_path / "parts", Limits(minutes=0), resume=False) == 1
    resumed = make_stage(name, trained, tmp_path)
    assert train(resumed, tmp_path / "parts", Limits(None), resume=True) == 2

    assert any((value != begun[key]).any() for key, value in whole.module.state_dict().items()), "nothing was trained"
    for of_whole, of_resumed in ((whole.module, resumed.module), (whole.average, resumed.average)):
        torch.testing.assert_close(of_whole.state_dict(), of_resumed.state_dict(), atol=0, rtol=0)


def test_a_checkpoint_is_neither_overwritten_nor_resumed_unasked(trained: Path) -> None:
    with pytest.raises(FileExistsError, match="--resume"):
        run(trained, "vae")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = VAEStage(RECIPE, CPU)
    monkeypatch.setattr("pipelines.bundled.train.loop.FORMAT", 0)
    save_checkpoint(stage, 1, tmp_path / "vae.pt")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 0"):
        train(stage, tmp_path, Limits(None), resume=True)


def test_a_run_out_of_time_stops_before_the_stages_that_build_on_it(tmp_path: Path) -> None:
    run(tmp_path, *command.STAGES, limits=Limits(minutes=0))
    assert (tmp_path / "vae.pt").exists()
    assert not (tmp_path / "dit.pt").exists()


@pytest.mark.parametrize("name", ["vae", "motion", "dit", "lora"])
def test_batches_can_be_drawn_in_other_processes(name: str, trained: Path) -> None:
    source = make_stage(name, trained, latents_of(trained / "vae", trained)).source
    sent = pickle.loads(pickle.dumps(source))
    for step in range(2):
        here, there = source.batch(step), sent.batch(step)
        if name in ("vae", "motion"):
            assert torch.equal(here, there)
        else:
            assert here.bucket == there.bucket
            assert torch.equal(here.input_ids, there.input_ids)
            assert torch.equal(here.indices, there.indices)


def test_the_log_has_what_was_measured(trained: Path) -> None:
    for name, measured in (("vae", "kl"), ("motion", "psnr_clip"), ("dit", "loss"), ("lora-sepia", "loss")):
        (line,) = (trained / f"{name}.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert record["step"] == 2
        assert np.isfinite(record[measured])


def test_latents_are_normalised_by_what_was_measured(trained: Path, tmp_path: Path) -> None:
    config = AutoencoderKLWan.load_config(trained / "vae")
    assert config["latents_mean"] != [0.0] * 16
    assert all(std > 0 for std in config["latents_std"])
    export_vae(RECIPE, trained / "vae.pt", tmp_path / "vae", CPU)
    assert AutoencoderKLWan.load_config(tmp_path / "vae")["latents_std"] == config["latents_std"]


def test_the_latents_of_one_autoencoder_are_not_taken_for_those_of_another(trained: Path, tmp_path: Path) -> None:
    export_vae(RECIPE, trained / "vae.pt", tmp_path / "vae", CPU)
    before_motion, after = latents_of(tmp_path / "vae", tmp_path), latents_of(trained / "vae", tmp_path)
    assert before_motion != after
    assert list((trained / "latents").iterdir()) == [latents_of(trained / "vae", trained)]


def test_learning_motion_leaves_the_latents_of_stills_as_they_were(trained: Path, tmp_path: Path) -> None:
    export_vae(RECIPE, trained / "vae.pt", tmp_path / "vae", CPU)
    before, after = (AutoencoderKLWan.from_pretrained(path / "vae") for path in (tmp_path, trained))
    pixels = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        still, clip = pixels[:, :, :1], pixels
        assert torch.equal(before.encode(still).latent_dist.mode(), after.encode(still).latent_dist.mode())
        assert not torch.equal(before.encode(clip).latent_dist.mode(), after.encode(clip).latent_dist.mode())
        latents = before.encode(clip).latent_dist.mode()
        assert not torch.equal(before.decode(latents).sample, after.decode(latents).sample)


def test_a_model_is_trained_further_from_its_weights_and_the_step_that_is_asked_for(
    trained: Path, tmp_path: Path
) -> None:
    command.run(
        RECIPE,
        ("dit",),
        tmp_path,
        Limits(None, first_step=1),
        resume=False,
        style="sepia",
        device=CPU,
        initial=trained / "model",
    )
    assert (tmp_path / "tokenizer" / "tokenizer.json").read_text() == (
        trained / "model" / "tokenizer" / "tokenizer.json"
    ).read_text()
    assert len((tmp_path / "dit.jsonl").read_text().splitlines()) == 1
    further = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert further["step"] == 2
    begun = WanPipeline.from_pretrained(trained / "model", dtype=torch.float32).transformer.state_dict()
    for name, value in begun.items():
        distance = (further["module"][f"transformer.{name}"] - value).abs().max()
        assert distance < 0.02, f"{name} is not what it began with, after one step"


def test_a_compiled_transformer_computes_what_the_other_does(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are real, forwards and backwards; the compiler behind them, which takes half a minute, is left out."""
    traced = partialmethod(WanTransformer3DModel.compile_repeated_blocks, backend="aot_eager")
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", traced)
    plain = make_stage("dit", trained, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained / "tokenizer")
    vae = AutoencoderKLWan.from_pretrained(trained / "vae")
    compiled = DiTStage(RECIPE, tokenizer, vae, tmp_path, CPU, compile_blocks=True)
    compiled.module.load_state_dict(plain.module.state_dict())
    losses = [stage.loss(stage.source.batch(0), 0)[0] for stage in (plain, compiled)]
    torch.testing.assert_close(losses[0], losses[1], atol=2e-3, rtol=2e-3)
    for loss in losses:
        loss.backward()
    gradients = [[each.grad for each in stage.module.parameters()] for stage in (plain, compiled)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=2e-3, rtol=2e-3)


def test_the_exported_model_is_served_as_any_other(trained: Path) -> None:
    model = load_model(ServerArgs(model_path=str(trained / "model")))
    assert set(model.pipeline_classes) == {
        Task.TEXT_TO_IMAGE,
        Task.TEXT_TO_VIDEO,
        Task.IMAGE_TO_VIDEO,
        Task.IMAGE_EDIT,
    }
    defaults = model.card.family.defaults_for("text_to_image")
    assert (defaults.width, defaults.height, defaults.num_inference_steps) == (48, 48, 2)
    of_videos = model.card.family.defaults_for("text_to_video")
    assert (of_videos.width, of_videos.height, of_videos.num_frames) == (32, 32, 5)
    assert defaults.negative_prompt == ""
    size = sum(file.stat().st_size for file in (trained / "model").rglob("*.safetensors"))
    assert size < 2.1 * sum(
        parameter.numel()
        for part in model.pipeline.components.values()
        if isinstance(part, torch.nn.Module)
        for parameter in part.parameters()
    ), "weights are not in bfloat16"


def test_the_exported_model_draws_pictures_clips_and_from_a_first_frame(trained: Path) -> None:
    pipeline = WanPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    size = {"width": 32, "height": 48, "num_inference_steps": 1}
    assert pipeline("a cat", num_frames=1, **size).frames.shape == (1, 1, 48, 32, 3)
    assert pipeline("a cat", num_frames=5, **size).frames.shape == (1, 5, 48, 32, 3)
    from_image = WanImageToVideoPipeline(
        **pipeline.components, image_encoder=None, image_processor=None, expand_timesteps=True
    )
    from_image.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (32, 48), "red")
    assert from_image(image, "a cat", num_frames=5, **size).frames.shape == (1, 5, 48, 32, 3)


def test_the_adapter_changes_the_picture(trained: Path) -> None:
    pipeline = WanPipeline.from_pretrained(trained / "model", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def picture() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", width=32, height=32, num_frames=1, num_inference_steps=2, generator=generator).frames

    plain = picture()
    pipeline.load_lora_weights(trained / "lora", weight_name="sepia.safetensors")
    assert np.abs(picture() - plain).max() > 0


def test_a_vae_begins_as_a_network_for_stills() -> None:
    vae = build_vae(RECIPE.shape)
    assert (vae.encoder.conv_in.weight[:, :, :2] == 0).all()
    assert (vae.encoder.conv_in.weight[:, :, 2] != 0).any()


def test_a_sheet_shows_each_picture_above_its_prompt() -> None:
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue", "red", "yellow")]
    page = sheet(pictures, ("one", "two", "three", "four", "five"))
    assert page.size == (4 * 64, 2 * (64 + 28))
    assert page.getpixel((10, 64 + 28 + 10)) == (255, 255, 0)


def test_a_recipe_of_more_scenes_keeps_the_latents_of_those_that_are_encoded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    draw = captioned.draw
    monkeypatch.setattr(captioned, "draw", lambda scenes, bucket: drawn.append(len(scenes)) or draw(scenes, bucket))
    vae, bucket = AutoencoderKLWan.from_pretrained(trained / "vae"), Bucket(32, 32, 1, batch_size=1)
    two, three = (replace(RECIPE, cached_pixels=scenes * 32 * 32) for scenes in (2, 3))
    first = load_latents(vae, two, bucket, tmp_path)
    all_three = load_latents(vae, three, bucket, tmp_path)
    assert drawn == [2, 1]
    assert torch.equal(all_three[:2], first)
    assert torch.equal(load_latents(vae, three, bucket, tmp_path), all_three)
    assert torch.equal(load_latents(vae, two, bucket, tmp_path), first)
    assert drawn == [2, 1]
