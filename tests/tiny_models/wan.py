"""Tiny Wan pipelines: 4 layers of 4 heads, so that Ulysses degrees up to 4 divide them."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from tests.tiny_models import text


def scheduler(flow_shift: float = 3.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


def transformer(in_channels: int = 16, out_channels: int = 16, image_dim: int | None = None) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=text.DIM,
        freq_dim=32,
        ffn_dim=192,
        num_layers=4,
        image_dim=image_dim,
        added_kv_proj_dim=4 * 24 if image_dim else None,
    )


def vae() -> AutoencoderKLWan:
    """Wan 2.1's: 8x spatial and 4x temporal compression into 16 channels."""
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def high_compression_vae() -> AutoencoderKLWan:
    """Wan 2.2 TI2V's: 16x spatial and 4x temporal compression into 48 channels, on 2x2 patches of pixels."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
    )


def text_to_video_21() -> WanPipeline:
    return WanPipeline(
        tokenizer=text.byte_tokenizer(),
        text_encoder=text.umt5_encoder(),
        transformer=transformer(),
        vae=vae(),
        scheduler=scheduler(),
    )


def image_to_video_21() -> WanImageToVideoPipeline:
    """36 input channels: 16 of noise, 4 of mask, 16 of the encoded first frame. CLIP's view of it goes to attention."""
    image_encoder, image_processor = text.clip_vision()
    return WanImageToVideoPipeline(
        tokenizer=text.byte_tokenizer(),
        text_encoder=text.umt5_encoder(),
        image_encoder=image_encoder,
        image_processor=image_processor,
        transformer=transformer(in_channels=36, image_dim=text.DIM),
        vae=vae(),
        scheduler=scheduler(),
    )


def text_to_video_22() -> WanPipeline:
    """Two experts: one for high noise, one for low."""
    return WanPipeline(
        tokenizer=text.byte_tokenizer(),
        text_encoder=text.umt5_encoder(),
        transformer=transformer(),
        transformer_2=transformer(),
        vae=vae(),
        scheduler=scheduler(),
        boundary_ratio=0.875,
    )


def image_to_video_22() -> WanImageToVideoPipeline:
    """Two experts, and no image encoder: the first frame comes through the channels alone."""
    return WanImageToVideoPipeline(
        tokenizer=text.byte_tokenizer(),
        text_encoder=text.umt5_encoder(),
        transformer=transformer(in_channels=36),
        transformer_2=transformer(in_channels=36),
        vae=vae(),
        scheduler=scheduler(),
        boundary_ratio=0.9,
    )


def text_image_to_video_22() -> WanPipeline:
    """One transformer whose tokens have timesteps of their own, so that a given first frame can be noiseless."""
    return WanPipeline(
        tokenizer=text.byte_tokenizer(),
        text_encoder=text.umt5_encoder(),
        transformer=transformer(in_channels=48, out_channels=48),
        vae=high_compression_vae(),
        scheduler=scheduler(flow_shift=5.0),
        expand_timesteps=True,
    )
