"""Base weights from the model's own files: bit for bit those that were loaded, or refused before any merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, WanTransformer3DModel
from safetensors.torch import load_file, save_file

from lora.originals import Checkpoint, HostCopies

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def directory(pipeline: Callable[[str], DiffusionPipeline], tmp_path: Path) -> Path:
    pipeline("wan2.1-t2v").transformer.save_pretrained(tmp_path / "transformer")
    return tmp_path


def loaded(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, ModelMixin]:
    return {"transformer": WanTransformer3DModel.from_pretrained(directory / "transformer", dtype=dtype)}


def assert_reads_what_was_loaded(checkpoint: Checkpoint, model: dict[str, ModelMixin]) -> None:
    for name, parameter in model["transformer"].named_parameters():
        read = checkpoint.read(("transformer", name))
        assert read.dtype == parameter.dtype
        assert torch.equal(read.flatten().view(torch.uint8), parameter.detach().flatten().view(torch.uint8)), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("served", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_converted_as_the_loader_converts_them(
    directory: Path, stored: torch.dtype, served: torch.dtype
) -> None:
    """Wan keeps its norms and embedders in fp32, whatever precision it is served in."""
    file = directory / "transformer" / FILE
    save_file({name: tensor.to(stored) for name, tensor in load_file(file).items()}, file)
    model = loaded(directory, served)
    assert_reads_what_was_loaded(Checkpoint(model, directory), model)


def test_they_may_lie_in_several_files(directory: Path, pipeline: Callable[[str], DiffusionPipeline]) -> None:
    shutil.rmtree(directory / "transformer")
    pipeline("wan2.1-t2v").transformer.save_pretrained(directory / "transformer", max_shard_size="200KB")
    assert len(list((directory / "transformer").glob("*.safetensors"))) > 1
    model = loaded(directory)
    assert_reads_what_was_loaded(Checkpoint(model, directory), model)


def test_a_checkpoint_that_is_replaced_meanwhile_is_still_the_one_that_was_loaded(directory: Path) -> None:
    model = loaded(directory)
    checkpoint = Checkpoint(model, directory)
    other = directory / "other.safetensors"
    file = directory / "transformer" / FILE
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, other)
    other.rename(file)
    assert_reads_what_was_loaded(checkpoint, model)


def test_they_take_no_memory_where_copies_do(directory: Path) -> None:
    model = loaded(directory)
    key = ("transformer", "blocks.0.attn1.to_q.weight")
    parameter = model["transformer"].get_parameter(key[1]).data
    copies, checkpoint = HostCopies(), Checkpoint(model, directory)
    for originals in (copies, checkpoint):
        originals.keep(key, parameter)
        assert torch.equal(originals.read(key), parameter)
    assert (copies.num_bytes, checkpoint.num_bytes) == (parameter.nbytes, 0)


class TestRefusals:
    NAME = "blocks.0.attn1.to_q.weight"

    def refused(self, directory: Path, model: dict[str, ModelMixin]) -> str:
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            Checkpoint(model, directory)
        message = str(refusal.value)
        assert "\n" not in message
        return message

    def rewrite(self, directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        file = directory / "transformer" / FILE
        tensors = load_file(file)
        change(tensors)
        aside = file.with_suffix(".aside")
        save_file(tensors, aside)
        aside.rename(file)

    def test_a_parameter_that_the_loader_has_renamed(self, directory: Path) -> None:
        model = loaded(directory)
        self.rewrite(directory, lambda tensors: tensors.update(old_name=tensors.pop(self.NAME)))
        assert f"transformer.{self.NAME} can't be restored from the checkpoint: " in self.refused(directory, model)

    @pytest.mark.parametrize(
        "change",
        [lambda tensor: tensor + 1, lambda tensor: tensor * -0.0, lambda tensor: tensor[:1].clone()],
        ids=["value", "sign of zero", "shape"],
    )
    def test_a_parameter_with_another(self, directory: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.rewrite(directory, lambda tensors: tensors[self.NAME].zero_())
        model = loaded(directory)
        self.rewrite(directory, lambda tensors: tensors.update({self.NAME: change(tensors[self.NAME])}))
        assert f"transformer.{self.NAME} can't be restored" in self.refused(directory, model)

    def test_a_folder_without_the_file(self, directory: Path) -> None:
        model = loaded(directory)
        (directory / "transformer" / FILE).rename(directory / "transformer" / "model.fp16.safetensors")
        assert f"has no {FILE}" in self.refused(directory, model)
