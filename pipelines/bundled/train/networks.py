"""The three networks of the bundled model, initialised so that a little training goes a long way."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from pipelines.bundled.train.recipe import ModelShape


def build_vae(shape: ModelShape) -> AutoencoderKLWan:
    """8x spatial and 4x temporal compression on 2x2 patches of pixels.

    It starts as a network for images (each causal kernel has weight in its last tap alone), and nearly certain of its
    latents (log variance -5, where 0 would drown them in noise).
    """
    channels = shape.latent_channels
    vae = AutoencoderKLWan(
        base_dim=shape.vae_encoder_dim,
        decoder_base_dim=shape.vae_decoder_dim,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    )
    with torch.no_grad():
        for convolution in vae.modules():
            if isinstance(convolution, nn.Conv3d) and convolution.kernel_size == (3, 3, 3):
                convolution.weight[:, :, :2] = 0
                convolution.weight[:, :, 2] *= 3**0.5
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = -5
    return vae


def build_text_encoder(shape: ModelShape, vocabulary: int) -> UMT5EncoderModel:
    """Uses the ids of `tokenizer.build_tokenizer`: 0 pads, 1 ends a text."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=shape.text_dim,
            d_kv=32,
            d_ff=shape.text_dim * 8 // 3,
            num_layers=shape.text_layers,
            num_heads=shape.text_dim // 32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer(shape: ModelShape) -> WanTransformer3DModel:
    """It starts out predicting zero, with open gates (0.3) at every timestep.

    With diffusers' own initialisation gates are N(0, 1 / dim), and hardly anything flows through them at first.
    """
    transformer = WanTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.head_dim,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        text_dim=shape.text_dim,
        freq_dim=256,
        ffn_dim=4 * shape.dim,
        num_layers=shape.layers,
        rope_max_seq_len=256,
    )
    embedder = transformer.condition_embedder
    with torch.no_grad():
        for layer in (transformer.proj_out, embedder.time_proj):
            layer.weight.zero_()
            layer.bias.zero_()
        transformer.scale_shift_table.zero_()
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.3  # the gates of attention and of the feed-forward network
    return transformer
