"""The public formats: how each writes an adapter as PEFT has it after training."""

from __future__ import annotations

from collections.abc import Callable

from tests.lora import adapters
from tests.lora.adapters import State, Trained, with_alphas, with_prefix

WAN_LAYERS = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"
FLUX_DOUBLE = r"transformer_blocks\.\d+\.(attn\.(to_out\.0|to_add_out)|ff\.net\.2|norm1\.linear)"
FLUX2_LAYERS = (
    r"transformer_blocks\.\d+\.(attn\.(to_out\.0|to_add_out)|ff\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
QWEN_LAYERS = r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_q_proj|to_out\.0|to_add_out)|img_mlp\.net\.2|img_mod\.1)"
Z_IMAGE_LAYERS = r"(layers|noise_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
SD3_LAYERS = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_k_proj)"


def flux_original(module: str) -> str:
    """A double block's module as FLUX.1's and FLUX.2's own checkpoints name it."""
    for ours, theirs in {
        "single_transformer_blocks": "single_blocks",
        "transformer_blocks": "double_blocks",
        "attn.to_qkv_mlp_proj": "linear1",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "attn.to_out": "linear2",
        "ff.net.2": "img_mlp.2",
        "ff.linear_in": "img_mlp.0",
        "ff.linear_out": "img_mlp.2",
        "norm1.linear": "img_mod.lin",
    }.items():
        module = module.replace(ours, theirs)
    return module


def xlabs(trained: Trained) -> State:
    def name(key: str) -> str:
        key = key.replace("transformer_blocks", "double_blocks").replace("attn.to_out.0.", "processor.proj_lora1.")
        key = key.replace("attn.to_add_out.", "processor.proj_lora2.")
        return key.replace("lora_A.", "down.").replace("lora_B.", "up.")

    return {name(key): tensor for key, tensor in trained.state.items()}


def before_peft(trained: Trained) -> State:
    """Halves as diffusers named them before it used PEFT, beside alphas."""
    state = with_prefix("transformer.", with_alphas(trained, trained.state, lambda module: module))
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor for k, tensor in state.items()}


def kohya(name: Callable[[str], str]) -> Callable[[Trained], State]:
    """`lora_down`, `lora_up` and `alpha` under names made by `name`."""
    return lambda trained: with_alphas(trained, adapters.kohya_halves(adapters.renamed(trained.state, name)), name)


def baked(prefix: str, name: Callable[[str], str] = lambda module: module) -> Callable[[Trained], State]:
    """`lora_A` and `lora_B` with no alpha, so the scale must be in the factors."""

    def convert(trained: Trained) -> State:
        scaled = {
            key: tensor * (trained.alpha(key.partition(".lora_")[0]) / trained.config.r) if "lora_B" in key else tensor
            for key, tensor in trained.state.items()
        }
        return with_prefix(prefix, adapters.renamed(scaled, name))

    return convert


FORMATS: dict[str, tuple[str, str, Callable[[Trained], State]]] = {
    "diffusers, Wan": ("wan2.1-t2v", WAN_LAYERS, baked("transformer.")),
    "bare module names, Wan": ("wan2.1-t2v", WAN_LAYERS, baked("")),
    "PEFT names without its config, Wan": ("wan2.1-t2v", WAN_LAYERS, baked("base_model.model.")),
    "diffusers with alphas, Wan": (
        "wan2.1-t2v",
        WAN_LAYERS,
        lambda t: with_prefix("transformer.", with_alphas(t, t.state, lambda module: module)),
    ),
    "diffusers before PEFT, Wan": ("wan2.1-t2v", WAN_LAYERS, before_peft),
    "ComfyUI, Wan": ("wan2.1-t2v", WAN_LAYERS, baked("diffusion_model.", adapters.wan_original)),
    "ComfyUI with all small layers, Wan": (
        "wan2.1-t2v",
        WAN_LAYERS + r"|proj_out|condition_embedder\.(time_proj|(time|text)_embedder\.linear_[12])",
        baked("diffusion_model.", adapters.wan_original),
    ),
    "lightx2v, Wan": ("wan2.1-t2v", WAN_LAYERS, kohya(lambda m: f"diffusion_model.{adapters.wan_original(m)}")),
    "musubi, Wan": ("wan2.1-t2v", WAN_LAYERS, kohya(adapters.musubi(name=adapters.wan_original))),
    "musubi, Wan with image keys": (
        "wan2.1-i2v",
        WAN_LAYERS + r"|blocks\.\d+\.attn2\.add_[kv]_proj",
        kohya(adapters.musubi(name=adapters.wan_original)),
    ),
    "diffusers, FLUX.1": ("flux1", FLUX_DOUBLE, baked("transformer.")),
    "diffusers with alphas, FLUX.1": (
        "flux1",
        FLUX_DOUBLE,
        lambda t: with_prefix("transformer.", with_alphas(t, t.state, lambda module: module)),
    ),
    "diffusers before PEFT, FLUX.1": ("flux1", FLUX_DOUBLE, before_peft),
    "ComfyUI on diffusers' names, FLUX.1": ("flux1", FLUX_DOUBLE, baked("diffusion_model.")),
    "ComfyUI on diffusers' names with alphas, FLUX.1": (
        "flux1",
        FLUX_DOUBLE,
        lambda t: with_prefix("diffusion_model.", with_alphas(t, t.state, lambda module: module)),
    ),
    "kohya, FLUX.1": ("flux1", FLUX_DOUBLE, kohya(adapters.musubi(name=flux_original))),
    "xlabs, FLUX.1": (
        "flux1",
        r"transformer_blocks\.\d+\.attn\.(to_out\.0|to_add_out)",
        lambda t: xlabs(Trained(baked("")(t), t.config, t.fused, t.peft_model)),
    ),
    "ai-toolkit, FLUX.2": ("flux2-klein", FLUX2_LAYERS, baked("diffusion_model.", flux_original)),
    "PEFT on the original names, FLUX.2": ("flux2-klein", FLUX2_LAYERS, baked("base_model.model.", flux_original)),
    "diffusers, Qwen-Image": ("qwen-image", QWEN_LAYERS, baked("transformer.")),
    "ComfyUI, Qwen-Image": ("qwen-image", QWEN_LAYERS, baked("diffusion_model.")),
    "lightning, Qwen-Image": ("qwen-image", QWEN_LAYERS, kohya(lambda module: module)),
    "musubi, Qwen-Image": (
        "qwen-image",
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_q_proj|to_out\.0)",
        kohya(adapters.musubi()),
    ),
    "default adapter name, Qwen-Image": (
        "qwen-image",
        QWEN_LAYERS,
        lambda t: {k.replace(".weight", ".default.weight"): v for k, v in baked("transformer.")(t).items()},
    ),
    "ComfyUI, Z-Image": ("z-image", Z_IMAGE_LAYERS, baked("diffusion_model.")),
    "musubi, Z-Image": ("z-image", Z_IMAGE_LAYERS, kohya(adapters.musubi())),
    "diffusers, SD3": ("sd3.5", SD3_LAYERS, baked("transformer.")),
}
"""By name: the family of the model, the layers that the format can name, and the state of its file."""
