"""What training computes is what will be served, only faster."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pipelines.bundled.scenes.captions import Wording
from pipelines.bundled.scenes.nouns import NOUNS
from pipelines.bundled.scenes.scene import sample_scene
from pipelines.bundled.train.captioned import Captioned
from pipelines.bundled.train.flow import TextToLatents, flow_loss, sample_sigmas
from pipelines.bundled.train.networks import build_text_encoder, build_transformer, build_vae
from pipelines.bundled.train.optimizer import MuonAdamW, orthogonalized, split_parameters
from pipelines.bundled.train.padding import SERVED_LENGTH, attend_to_folded_padding, fold_padding
from pipelines.bundled.train.recipe import PRESETS, Recipe
from pipelines.bundled.train.tokens import on_tokens
from pipelines.bundled.train.vae import decode
from pipelines.model.convolution import skip_padding
from tests.pipelines.bundled.conftest import CLIP, RECIPE, STILL


@torch.no_grad()
def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """With random weights everywhere: weights that start at zero would hide differences."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def test_text_is_tokenized_and_back(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("a calico cat playing a piano on stage", "a qwzx robot", "an umbrella, in front of a red wall."):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("A CAT").input_ids == tokenizer("a cat").input_ids
    assert tokenizer("", padding="max_length", max_length=3).input_ids == [1, 0, 0]


def test_words_of_captions_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    random, wording = Random(7), Wording(made_up_words=0)
    for _ in range(300):
        text = wording.caption(sample_scene(random, NOUNS, clip=True), random)
        words = text.replace("-", " - ").replace(",", " ,").replace(".", " .").split()
        assert len(tokenizer(text).input_ids) == len(words) + 1, text


def test_folded_padding_is_padding_as_served() -> None:
    transformer = shaken(build_transformer(RECIPE.shape))
    latents, timesteps = torch.randn(2, 16, 2, 4, 6), torch.tensor([100.0, 700.0])
    encoded, mask = torch.randn(2, 7, 32), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    served = torch.zeros(2, SERVED_LENGTH, 32)
    served[:, :7] = encoded * mask[..., None]
    with torch.no_grad():
        expected = transformer(latents, timesteps, served).sample
        attend_to_folded_padding(transformer)
        folded = transformer(latents, timesteps, fold_padding(encoded, mask)).sample
        unpadded = transformer(latents, timesteps, encoded).sample
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=1e-4)
    assert (unpadded - expected).abs().max() > 1e-3, "padding would make no difference"


@pytest.mark.parametrize("num_frames", [1, 9])
def test_convolutions_that_skip_padding_are_the_same(num_frames: int) -> None:
    vae = shaken(build_vae(RECIPE.shape))
    pixels = torch.rand(1, 3, num_frames, 32, 48) * 2 - 1
    with torch.no_grad():
        expected = vae._encode(pixels)
        mean = expected[:, :16]
        pictures = vae.decode(mean).sample
        skip_padding(vae)
        torch.testing.assert_close(vae._encode(pixels), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(decode(vae, mean).clamp(-1, 1), pictures, atol=1e-4, rtol=1e-4)
    assert pictures.shape == pixels.shape
    assert mean.shape == (1, 16, (num_frames - 1) // 4 + 1, 4, 6)


def test_a_given_first_frame_is_clean_at_timestep_0_and_no_part_of_the_loss(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = TextToLatents(build_text_encoder(RECIPE.shape, len(tokenizer)), build_transformer(RECIPE.shape))
    attend_to_folded_padding(model.transformer)
    seen: list[torch.Tensor] = []
    model.transformer.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[:2]))
    tokens = tokenizer(["a cat", "a dog on a piano"], padding="longest", return_tensors="pt")
    batch = Captioned(CLIP, tokens.input_ids, tokens.attention_mask, True, torch.tensor([0, 1]), None)
    latents = torch.randn(2, 16, 2, 4, 4)
    latents[:, :, 0] = 100
    loss, _ = flow_loss(model, batch, latents, torch.Generator().manual_seed(0))
    assert loss < 5, "the first frame's error alone would be 10000"
    noisy, timesteps = seen
    assert (noisy[:, :, 0] == 100).all()
    assert timesteps.shape == (2, 8)
    assert (timesteps[:, :4] == 0).all()
    assert (timesteps[:, 4:] > 0).all()


def test_the_transformer_on_the_tokens_of_a_frame_is_that_on_the_frame_alone() -> None:
    transformer = shaken(build_transformer(RECIPE.shape))
    latents, timesteps, text = torch.randn(2, 16, 2, 8, 6), torch.tensor([900.0, 300.0]), torch.randn(2, 5, 32)
    second_frame = torch.arange(12, 24)
    with torch.no_grad():
        alone = transformer(latents[:, :, 1:], timesteps, text, return_dict=False)[0]
        with on_tokens(transformer, second_frame):
            among_others = transformer(latents, timesteps, text, return_dict=False)[0]
        everything = transformer(latents, timesteps, text, return_dict=False)[0]
    # Only relative positions count, and both frames are at the same height and width.
    torch.testing.assert_close(among_others[:, :, 1:], alone, atol=1e-5, rtol=1e-4)
    assert (among_others[:, :, 0] == 0).all()
    assert (everything[:, :, 1:] - alone).abs().max() > 1e-3, "the first frame would make no difference"


@pytest.mark.parametrize("given_first_frame", [False, True])
def test_only_a_share_of_the_tokens_is_asked_for(tokenizer: PreTrainedTokenizerFast, given_first_frame: bool) -> None:
    model = TextToLatents(build_text_encoder(RECIPE.shape, len(tokenizer)), build_transformer(RECIPE.shape))
    attend_to_folded_padding(model.transformer)
    tokens = tokenizer(["a cat", "a dog on a piano"], padding="longest", return_tensors="pt")
    bucket = replace(CLIP, token_share=0.75)
    batch = Captioned(bucket, tokens.input_ids, tokens.attention_mask, given_first_frame, torch.tensor([0, 1]), None)
    latents = torch.randn(2, 16, 2, 4, 4, requires_grad=True)
    loss, _ = flow_loss(model, batch, latents, torch.Generator().manual_seed(0))
    loss.backward()
    assert latents.grad is not None
    # The last layer starts at zero, so the loss depends on the latents only through the velocity that it asks for.
    asked = (latents.grad != 0).all(dim=(0, 1)).unflatten(1, (2, 2)).unflatten(3, (2, 2)).all(dim=(2, 4))
    assert asked.shape == (2, 2, 2)
    if given_first_frame:
        assert not asked[0].any()
        assert 2 <= asked.sum() <= 4
    else:
        assert asked.sum() == 6


def test_larger_pictures_are_trained_at_more_noise() -> None:
    means = [sample_sigmas(4000, tokens, torch.Generator().manual_seed(0)).mean() for tokens in (64, 256, 4096)]
    assert means == sorted(means)
    assert 0.6 < means[0] < means[2] < 0.9


def test_muon_makes_updates_orthogonal() -> None:
    matrices = torch.randn(3, 12, 40)
    for shape in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalized(shape))
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_every_parameter_has_one_optimizer() -> None:
    vae = build_vae(RECIPE.shape)
    matrices, rest = split_parameters(vae, ("decoder.conv_out",))
    assert {id(each) for each in (*matrices, *rest)} == {id(each) for each in vae.parameters()}
    assert len(matrices) + len(rest) == len(list(vae.parameters()))
    assert all(each.dim() >= 2 for each in matrices)
    assert id(vae.decoder.conv_out.weight) in {id(each) for each in rest}


def test_the_optimizer_descends() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16)
    target = torch.nn.Linear(16, 16)
    optimizer = MuonAdamW([layer.weight], [layer.bias], matrix_learning_rate=0.05, learning_rate=0.02)
    inputs = torch.randn(64, 16)
    losses = []
    for _ in range(60):
        loss = (layer(inputs) - target(inputs)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(1.0)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_rates_warm_up_stay_and_fall() -> None:
    stage = PRESETS["gpu"].dit
    assert stage.rate_at(0) == 1 / stage.warmup_steps
    assert stage.rate_at(stage.steps // 2) == 1.0
    assert 0 < stage.rate_at(stage.steps - 1) < 0.001


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_at_most_40_megabytes_and_fits_the_networks(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> None:
    networks = (
        build_vae(recipe.shape),
        build_text_encoder(recipe.shape, len(tokenizer)),
        build_transformer(recipe.shape),
    )
    assert sum(parameter.numel() for network in networks for parameter in network.parameters()) * 2 <= 39.5e6
    assert recipe.shape.heads % 4 == 0
    for stage in (recipe.vae, recipe.dit, recipe.lora):
        assert stage.phases[-1].until == 1.0
        for bucket in (bucket for phase in stage.phases for bucket in phase.buckets):
            assert bucket.width % 16 == bucket.height % 16 == 0
            assert bucket.num_frames % 4 == 1
    clips = [bucket for bucket in recipe.vae.phases[-1].buckets if bucket.num_frames > 1]
    share = sum(bucket.weight for bucket in clips) / sum(bucket.weight for bucket in recipe.vae.phases[-1].buckets)
    assert share >= 1 / 3, "with fewer clips an autoencoder's colours drift"
    assert max(bucket.num_frames for bucket in clips) >= 17
    assert STILL not in clips
