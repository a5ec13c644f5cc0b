"""Switching adapters: cached factors against loading from disk and against diffusers' `unfuse_lora` + `fuse_lora`.

    python -m benchmarks.lora_switch [--dtype bf16 fp32] [--repeats 5] [--rank 32]

A Wan transformer of 400M parameters with random weights; two adapters on all 80 linear layers of its blocks, saved by
diffusers. Baselines run in the same process on the same model and files. A switch unmerges one adapter and merges the
other. Prints each method's median, how many times faster than diffusers it is, and the share of weights that differ
from the base weights after everything is unmerged.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging

from lora.factors import Factors
from lora.load import load, resolve
from lora.merge import Merger

ALL = ("all",)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rank", type=int, default=32)
    arguments = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    for dtype in arguments.dtype:
        with tempfile.TemporaryDirectory() as folder:
            compare(dtype, arguments.repeats, arguments.rank, Path(folder))


@torch.no_grad()
def compare(dtype: str, repeats: int, rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    pipeline = model(DTYPES[dtype])
    transformer = pipeline.transformer
    files = [adapter(transformer, rank, folder / f"adapter-{index}") for index in range(2)]
    base = {name: parameter.clone() for name, parameter in transformer.named_parameters()}
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    print(
        f"\n{dtype}: {parameters / 1e6:.0f}M parameters, rank {rank}, file of {files[0].stat().st_size / 1e6:.0f} MB, ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, median of {repeats}")

    merger = Merger({"transformer": transformer})
    blocks = [load(resolve(str(file)), WanPipeline, {"transformer": transformer}).to_bytes() for file in files]

    def cached(index: int) -> None:
        merger.restore()
        merger.merge([(Factors.from_bytes(blocks[index]), 1.0, ALL)])

    def direct(index: int) -> None:
        merger.merge([(Factors.from_bytes(blocks[index]), 1.0, ALL)])

    def from_disk(index: int) -> None:
        factors = load(resolve(str(files[index])), WanPipeline, {"transformer": transformer})
        merger.restore()
        merger.merge([(factors, 1.0, ALL)])

    ours = {
        "cached: restore + merge": alternate(cached, repeats),
        "cached: merge over the other": alternate(direct, repeats),
        "from disk": alternate(from_disk, repeats),
        "restore alone": alternate(lambda index: merger.restore(), repeats, before=direct),
    }
    merger.restore()
    ours_differing = differing(transformer, base)

    for index, file in enumerate(files):
        pipeline.load_lora_weights(file, adapter_name=f"adapter-{index}")

    def by_diffusers(index: int) -> None:
        pipeline.unfuse_lora()
        pipeline.set_adapters([f"adapter-{index}"])
        pipeline.fuse_lora()

    pipeline.set_adapters(["adapter-0"])
    pipeline.fuse_lora()
    theirs = alternate(by_diffusers, repeats)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()

    for name, seconds in ours.items():
        print(f"  {name:32} {seconds * 1e3:8.0f} ms {theirs / seconds:8.1f}x faster")
    print(f"  {'diffusers: unfuse + fuse':32} {theirs * 1e3:8.0f} ms")
    print(
        f"  weights that differ afterwards: {ours_differing:.1%} by us, {differing(transformer, base):.1%} by diffusers"
    )


def model(dtype: torch.dtype) -> WanPipeline:
    """Wan 2.1 1.3B with 8 of its 30 layers, with random weights of a trained model's size."""
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=8)
    transformer = transformer.to_empty(device="cpu").to(dtype).requires_grad_(False)
    for parameter in transformer.parameters():
        parameter.normal_(std=0.02)
    return WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=UniPCMultistepScheduler()
    )


def adapter(transformer: WanTransformer3DModel, rank: int, folder: Path) -> Path:
    layers = {}
    for name, module in transformer.named_modules():
        if name.startswith("blocks.") and isinstance(module, torch.nn.Linear):
            layers[f"{name}.lora_A.weight"] = (torch.randn(rank, module.in_features) * 0.01).to(module.weight.dtype)
            layers[f"{name}.lora_B.weight"] = (torch.randn(module.out_features, rank) * 0.01).to(module.weight.dtype)
    WanPipeline.save_lora_weights(folder, layers)
    return folder / "pytorch_lora_weights.safetensors"


def alternate(switch: Callable[[int], None], repeats: int, before: Callable[[int], None] | None = None) -> float:
    """Median seconds of switching back and forth, after one switch each way to warm up."""
    seconds = []
    for count in range(-2, repeats):
        if before:
            before(count % 2)
        start = time.perf_counter()
        switch(count % 2)
        if count >= 0:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def differing(transformer: WanTransformer3DModel, base: dict[str, torch.Tensor]) -> float:
    """The fraction of weights that differ from `base`."""
    changed = sum((parameter != base[name]).sum().item() for name, parameter in transformer.named_parameters())
    return changed / sum(tensor.numel() for tensor in base.values())


if __name__ == "__main__":
    main()
