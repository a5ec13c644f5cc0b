"""Tiny pipelines of the image families, and one of a family that the server does not know."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.tiny_models import text

BLOCKS = 4
"""Resolutions of an image VAE: 8x spatial compression."""


def vae(latent_channels: int = 16) -> AutoencoderKL:
    """The 16-channel VAE that FLUX.1, Z-Image and SD3 share, apart from its scales."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * BLOCKS,
        up_block_types=("UpDecoderBlock2D",) * BLOCKS,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=latent_channels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )


def dynamic_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Shifts its sigmas by the number of tokens, as FLUX and Qwen-Image do."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def static_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def flux1_components(guidance_embeds: bool = True) -> dict[str, object]:
    return {
        "scheduler": dynamic_scheduler(),
        "vae": vae(),
        "text_encoder": text.clip_text_encoder(),
        "tokenizer": text.clip_tokenizer(),
        "text_encoder_2": text.t5_encoder(),
        "tokenizer_2": text.byte_tokenizer(),
        "transformer": FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=text.DIM,
            pooled_projection_dim=text.DIM,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
    }


def flux1() -> FluxPipeline:
    return FluxPipeline(**flux1_components())


def flux1_schnell() -> FluxPipeline:
    return FluxPipeline(**flux1_components(guidance_embeds=False))


def flux1_kontext() -> FluxKontextPipeline:
    return FluxKontextPipeline(**flux1_components())


def flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=3 * text.DIM,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)


def flux2() -> Flux2Pipeline:
    return Flux2Pipeline(
        scheduler=dynamic_scheduler(),
        vae=flux2_vae(),
        text_encoder=text.mistral3(),
        tokenizer=text.mistral_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=True),
    )


def flux2_klein(is_distilled: bool = True) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(
        scheduler=dynamic_scheduler(),
        vae=flux2_vae(),
        text_encoder=text.qwen3_language_model(),
        tokenizer=text.chat_tokenizer(),
        transformer=flux2_transformer(guidance_embeds=False),
        is_distilled=is_distilled,
    )


def qwen_image_components(zero_cond_t: bool = False) -> dict[str, object]:
    return {
        "scheduler": dynamic_scheduler(),
        "vae": AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1),
        "text_encoder": text.qwen25_vl(),
        "tokenizer": text.chat_tokenizer(),
        "transformer": QwenImageTransformer2DModel(
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=text.DIM,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=zero_cond_t,
        ),
    }


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(**qwen_image_components())


def qwen_image_edit() -> QwenImageEditPipeline:
    return QwenImageEditPipeline(**qwen_image_components(), processor=text.qwen_processor())


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """As Qwen-Image-Edit-2511, whose reference images are modulated as noiseless."""
    return QwenImageEditPlusPipeline(**qwen_image_components(zero_cond_t=True), processor=text.qwen_processor())


def z_image(shift: float = 6.0) -> ZImagePipeline:
    """6 heads, which, like the 30 of the real model, do not divide among 4 ranks."""
    return ZImagePipeline(
        scheduler=static_scheduler(shift),
        vae=vae(),
        text_encoder=text.qwen3_model(),
        tokenizer=text.chat_tokenizer(),
        transformer=ZImageTransformer2DModel(
            dim=96,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=6,
            n_kv_heads=6,
            cap_feat_dim=text.DIM,
            axes_dims=[4, 6, 6],
        ),
    )


def sd3(num_layers: int = 3, **layers: Any) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        scheduler=static_scheduler(shift=3.0),
        vae=vae(),
        text_encoder=text.clip_text_encoder_with_projection(16),
        tokenizer=text.clip_tokenizer(),
        text_encoder_2=text.clip_text_encoder_with_projection(16),
        tokenizer_2=text.clip_tokenizer(),
        text_encoder_3=text.t5_encoder(),
        tokenizer_3=text.byte_tokenizer(),
        transformer=SD3Transformer2DModel(
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=text.DIM,
            caption_projection_dim=64,
            pooled_projection_dim=text.DIM,
            **layers,
        ),
    )


def sd35(**layers: Any) -> StableDiffusion3Pipeline:
    """Queries and keys are normalised and, as in SD3.5 medium, some layers attend once more over the image alone."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm", **layers)


def stable_diffusion() -> StableDiffusionPipeline:
    """A U-Net, of no family that the server knows."""
    return StableDiffusionPipeline(
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        vae=vae(latent_channels=4),
        text_encoder=text.clip_text_encoder(),
        tokenizer=text.clip_tokenizer(),
        unet=UNet2DConditionModel(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=text.DIM,
            attention_head_dim=8,
            norm_num_groups=8,
            sample_size=8,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
