"""Builds the bundled model: a Wan 2.2 TI2V pipeline of 1.2 million random, reproducible weights.

It has every part of the real model (text encoder, transformer, causal video VAE) in its real arrangement, at sizes
that a CPU computes in a blink. Its pictures are abstract: nothing was trained.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

SEED = 0
TEXT_DIM = 32
LATENT_CHANNELS = 16


def build() -> WanPipeline:
    """The whole pipeline on the CPU in float32, the same weights every time. Leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer = byte_tokenizer()
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_DIM,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        transformer = WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=24,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=192,
            num_layers=4,
        )
        vae = AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, num_res_blocks=1)
        for module in (text_encoder, transformer, vae):
            randomize(module)
        sharpen_posterior(vae)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        # The scheduler of Wan 2.2 TI2V-5B.
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        expand_timesteps=True,
    )


def byte_tokenizer(special_tokens: tuple[str, ...] = (), **kwargs: Any) -> PreTrainedTokenizerFast:
    """One token a byte, so that every UTF-8 prompt has tokens of its own; then `</s>`.

    Its vocabulary is `<pad>`, `</s>`, `<unk>`, the 256 bytes, and `special_tokens`; `kwargs` go to the tokenizer.
    """
    basic = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*basic, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*basic, *special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **{"model_max_length": 512, **kwargs},
    )


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Draw every matrix and kernel from N(0, 1 / fan_in), which keeps the variance of what flows through about one.

    The libraries' own initialisations scale text embeddings by 0.02 or zero the output layers: the prompt would not
    show in the picture.
    """
    for parameter in module.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    module.eval()


@torch.no_grad()
def sharpen_posterior(vae: AutoencoderKLWan) -> None:
    """Make the encoder sure of its latents (standard deviation e^-10), as training does: one image, one encoding.

    Random weights alone would leave a deviation of about one, as large as the latents themselves.
    """
    last = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    _, log_variance = last.bias.chunk(2)
    log_variance.fill_(-20.0)
