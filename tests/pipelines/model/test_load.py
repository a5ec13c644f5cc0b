"""From a model path to a model, and what the user is told when that fails."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    LTXPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

from configs.server_args import ServerArgs
from pipelines.generation.generation import generate
from pipelines.job import InvalidJob, Result, Task
from pipelines.model.derived_family import derive_family, tasks_of
from pipelines.model.load import Model, load_model, load_pipeline, prompt_components, read_model_index
from pipelines.model.precision import resolve_device, resolve_dtype, resolve_vae_dtype
from tests import tiny_models
from tests.pipelines.conftest import make_job

SavedModel = Callable[[str], Path]


def load(path: Path | str, **options: Any) -> Model:
    return load_model(ServerArgs(model_path=str(path), device="cpu", **options))


@pytest.fixture
def copied_model(tiny_model_path: SavedModel, tmp_path: Path) -> Path:
    """A tiny Wan to damage."""
    return Path(shutil.copytree(tiny_model_path("wan2.1-t2v"), tmp_path / "model"))


def test_a_model_knows_its_family_precision_and_name(tiny_model_path: SavedModel) -> None:
    path = tiny_model_path("wan2.2-t2v")
    model = load(path, dtype="bf16", served_model_name="wan")
    assert model.card.id == "wan"
    assert (model.card.pipeline_class, model.card.family.name) == ("WanPipeline", "wan2.2-t2v")
    assert (model.card.dtype, model.card.device, model.card.num_gpus) == ("bf16", "cpu", 1)
    assert list(model.transformers) == ["transformer", "transformer_2"]
    assert model.pipeline.vae.dtype == model.pipeline.text_encoder.dtype == torch.bfloat16
    assert load(path).card.id == str(path)


def test_the_weights_are_those_on_disk(tiny_model_path: SavedModel) -> None:
    built = tiny_models.build("sd3").transformer.state_dict()
    for name, tensor in load(tiny_model_path("sd3"), dtype="fp32").transformers["transformer"].state_dict().items():
        assert torch.equal(tensor, built[name]), name


def test_without_a_path_the_bundled_model_is_loaded() -> None:
    model = load_model(ServerArgs(device="cpu"))
    assert Task.TEXT_TO_IMAGE in model.pipeline_classes
    assert model.card.family.defaults.num_inference_steps == 8, "its own ditserve.yaml says so"


def test_a_model_of_no_known_family_is_described_by_its_pipelines(tiny_model_path: SavedModel) -> None:
    family = load(tiny_model_path(tiny_models.UNKNOWN_FAMILY)).card.family
    assert family.name == "StableDiffusionPipeline"
    assert family.tasks == {
        "text_to_image": "StableDiffusionPipeline",
        "image_edit": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    }
    assert family.parameters == {"negative_prompt", "guidance_scale", "strength"}
    assert (family.defaults.width, family.defaults.num_inference_steps) == (64, 50)
    assert family.defaults.guidance_scale == 7.5
    assert not family.sharded


def test_a_model_of_no_known_family_has_the_units_of_its_pipeline() -> None:
    modules = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))
    family = derive_family(LTXPipeline(**modules))
    assert (family.size_multiple % 32, family.frame_multiple) == (0, 8)


def test_a_pipeline_that_needs_an_image_makes_no_videos_from_text() -> None:
    assert set(tasks_of(CogVideoXImageToVideoPipeline)) == {Task.IMAGE_TO_VIDEO}
    assert set(tasks_of(CogVideoXPipeline)) == {Task.TEXT_TO_VIDEO}


class TestViews:
    """What each job computes with."""

    def test_they_share_modules_but_no_scheduler(self, tiny_model: Callable[[str], Model]) -> None:
        model = tiny_model("wan2.1-t2v")
        one, other = model.pipeline_for(Task.TEXT_TO_VIDEO), model.pipeline_for(Task.IMAGE_EDIT)
        assert type(other).__name__ == "WanVideoToVideoPipeline"
        assert one.transformer is other.transformer is model.transformers["transformer"]
        assert one.vae is other.vae
        assert len({id(pipeline.scheduler) for pipeline in (one, other, model.pipeline)}) == 3
        assert one.scheduler.config == model.pipeline.scheduler.config

    @pytest.mark.parametrize("name", ["wan2.2-t2v", "wan2.2-ti2v", "flux2-klein"])
    def test_they_keep_the_settings_of_the_model(self, tiny_model: Callable[[str], Model], name: str) -> None:
        model = tiny_model(name)
        for task in model.pipeline_classes:
            view = model.pipeline_for(task)
            for setting in ("boundary_ratio", "expand_timesteps", "is_distilled"):
                if setting in view.config:
                    assert view.config[setting] == model.pipeline.config[setting]

    def test_a_task_the_model_cannot_do_is_refused_with_those_it_can(self, tiny_model: Callable[[str], Model]) -> None:
        with pytest.raises(InvalidJob, match=r"cannot do inpaint; it can do text_to_video, text_to_image, image_edit"):
            tiny_model("wan2.1-t2v").pipeline_for(Task.INPAINT)


class TestRefusals:
    """One line that says what is wrong."""

    def refused(self, path: Path | str, **options: Any) -> str:
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            load(path, **options)
        message = str(refusal.value)
        assert "\n" not in message
        return message

    def test_no_such_folder(self, tmp_path: Path) -> None:
        assert self.refused(tmp_path / "nowhere") == f"There is no folder '{tmp_path / 'nowhere'}'"

    def test_a_repository_that_cannot_be_had(self) -> None:
        """Tests run with HF_HUB_OFFLINE=1."""
        assert "could be downloaded" in self.refused("nobody/nothing")

    def test_a_folder_that_is_no_model(self, tmp_path: Path) -> None:
        assert "no model_index.json" in self.refused(tmp_path)

    @pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("[]", "no pipeline class")])
    def test_a_broken_index(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "model_index.json").write_text(text)
        assert reason in self.refused(tmp_path)

    def test_an_unknown_pipeline(self, copied_model: Path) -> None:
        index = json.loads((copied_model / "model_index.json").read_text())
        (copied_model / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))
        assert "NoSuchPipeline" in self.refused(copied_model)

    def test_overrides_that_describe_no_family(self, copied_model: Path) -> None:
        (copied_model / "ditserve.yaml").write_text("defaults: {width: wide}")
        assert "defaults.width" in self.refused(copied_model)

    def test_truncated_weights(self, copied_model: Path) -> None:
        weights = copied_model / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "cannot be loaded" in self.refused(copied_model)

    def test_pickled_weights_are_never_opened(self, copied_model: Path) -> None:
        weights = copied_model / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        weights.with_suffix(".bin").write_bytes(b"a pickle")
        with mock.patch("torch.load", side_effect=AssertionError("unpickled")):
            assert "cannot be loaded" in self.refused(copied_model)

    def test_a_missing_component(self, copied_model: Path) -> None:
        shutil.rmtree(copied_model / "vae")
        assert "cannot be loaded" in self.refused(copied_model)

    def test_an_unknown_attention_backend(self, copied_model: Path) -> None:
        assert "there are" in self.refused(copied_model, attention_backend="quick")

    def test_an_attention_backend_this_machine_has_not(self, copied_model: Path) -> None:
        for name in ("sage", "sage_attn"):
            assert "cannot be used here" in self.refused(copied_model, attention_backend=name)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
    def test_cuda_where_there_is_none(self, copied_model: Path) -> None:
        with pytest.raises(ValueError, match="no CUDA device"):
            load_model(ServerArgs(model_path=str(copied_model), device="cuda"))


def test_an_attention_backend_is_set_on_the_transformer(tiny_model_path: SavedModel) -> None:
    transformer = load(tiny_model_path("wan2.1-t2v"), attention_backend="_native_math").transformers["transformer"]
    backends = {block.attn1.processor._attention_backend for block in transformer.blocks}
    assert {str(backend.value) for backend in backends} == {"_native_math"}


def test_an_attention_backend_reaches_attention_that_asks_for_none_by_itself(tiny_model_path: SavedModel) -> None:
    transformer = load(tiny_model_path("sd3"), attention_backend="_native_math").transformers["transformer"]
    backends = {block.attn.processor._attention_backend for block in transformer.transformer_blocks}
    assert {str(backend.value) for backend in backends} == {"_native_math"}


def test_an_attention_backend_is_refused_where_nothing_would_use_it(tiny_model_path: SavedModel) -> None:
    with pytest.raises(ValueError, match="UNet2DConditionModel has no choice of kernels"):
        load(tiny_model_path("stable-diffusion"), attention_backend="_native_math")


def test_transformers_that_are_loaded_straight_to_their_device_are_the_same(tiny_model_path: SavedModel) -> None:
    path = tiny_model_path("wan2.2-t2v")
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    plain = load_pipeline(path, read_model_index(path), dtypes)
    straight = load_pipeline(path, read_model_index(path), dtypes, transformers_to=torch.device("cpu"))
    for name in ("transformer", "transformer_2"):
        expected, loaded = getattr(plain, name).state_dict(), getattr(straight, name).state_dict()
        assert expected.keys() == loaded.keys()
        assert all(torch.equal(expected[key], loaded[key]) for key in expected)
        assert {key: value.dtype for key, value in expected.items()} == {
            key: value.dtype for key, value in loaded.items()
        }
        assert getattr(straight, name).hf_device_map == {"": torch.device("cpu")}
    assert straight.vae.dtype == torch.float32


def test_a_device_without_memory_is_no_fault_of_the_model(tiny_model_path: SavedModel) -> None:
    """Another process may still be leaving it; what is raised as `ValueError` is not tried again."""
    path = tiny_model_path("wan2.1-t2v")
    full = mock.patch.object(WanTransformer3DModel, "from_pretrained", side_effect=torch.OutOfMemoryError("80 GB"))
    with full, pytest.raises(torch.OutOfMemoryError):
        load_pipeline(path, read_model_index(path), {"default": torch.float32}, transformers_to=torch.device("cpu"))


def test_the_repeated_blocks_are_compiled(tiny_model_path: SavedModel) -> None:
    with mock.patch.object(nn.Module, "compile", autospec=True) as compiled:
        transformer = load(tiny_model_path("wan2.1-t2v"), enable_torch_compile=True).transformers["transformer"]
    assert [call.args[0] for call in compiled.call_args_list] == list(transformer.blocks)
    assert {call.kwargs["fullgraph"] for call in compiled.call_args_list} == {True}


class TestOtherRanks:
    """Ranks that do not lead hold nothing that encodes prompts."""

    def test_prompt_components_are_all_that_transformers_loads(self, tiny_model_path: SavedModel) -> None:
        def named(name: str) -> set[str]:
            return set(prompt_components(read_model_index(tiny_model_path(name))))

        assert named("wan2.1-i2v") == {"text_encoder", "tokenizer", "image_encoder", "image_processor"}
        assert named("qwen-image-edit") == {"text_encoder", "tokenizer", "processor"}
        assert named("sd3") == {f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}

    @pytest.mark.parametrize("name", tiny_models.FAMILIES)
    def test_every_family_loads_without_them(self, tiny_model_path: SavedModel, name: str) -> None:
        path = tiny_model_path(name)
        model_index = read_model_index(path)
        without = prompt_components(model_index)
        pipeline = load_pipeline(path, model_index, {"default": torch.float32}, without)
        assert all(getattr(pipeline, component) is None for component in without)
        assert pipeline.transformer is not None
        assert pipeline.vae is not None

    def test_an_unsharded_family_is_refused_a_gang(self, tiny_model_path: SavedModel) -> None:
        mesh = mock.Mock(device=torch.device("cpu"), rank=0, size=4)
        path = tiny_model_path(tiny_models.UNKNOWN_FAMILY)
        with pytest.raises(ValueError, match=r"StableDiffusionPipeline cannot be sharded over 4 ranks.*--num-gpus 1"):
            load_model(ServerArgs(model_path=str(path), device="cpu", num_gpus=4), mesh)


class TestPrecision:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")

    @pytest.mark.parametrize(
        ("capabilities", "expected"),
        [
            ({"avx2": True, "avx512_f": True}, torch.float32),
            ({"amx_bf16": True}, torch.bfloat16),
            ({"avx512_bf16": True}, torch.bfloat16),
        ],
    )
    def test_auto_on_a_cpu_is_bf16_where_it_is_native(
        self, capabilities: dict[str, bool], expected: torch.dtype
    ) -> None:
        with mock.patch("torch.cpu.get_capabilities", return_value=capabilities):
            assert resolve_dtype("auto", self.cpu) == expected

    @pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
    def test_auto_on_cuda_is_bf16_where_it_is_native(self, native: bool, expected: torch.dtype) -> None:
        with mock.patch("torch.cuda.is_bf16_supported", return_value=native):
            assert resolve_dtype("auto", self.cuda) == expected

    def test_an_explicit_dtype_is_taken(self) -> None:
        assert resolve_dtype("fp16", self.cuda) == torch.float16
        assert resolve_dtype("bf16", self.cpu) == torch.bfloat16

    def test_auto_on_cuda_leaves_the_vae_of_wan_in_fp32(self) -> None:
        with mock.patch("torch.cuda.is_bf16_supported", return_value=True):
            assert resolve_vae_dtype("auto", self.cuda, "AutoencoderKLWan") == torch.float32
            assert resolve_vae_dtype("auto", self.cuda, "AutoencoderKL") == torch.bfloat16
            assert resolve_vae_dtype("auto", self.cuda, None) == torch.bfloat16
        assert resolve_vae_dtype("bf16", self.cuda, "AutoencoderKLWan") == torch.bfloat16
        with mock.patch("torch.cpu.get_capabilities", return_value={"amx_bf16": True}):
            assert resolve_vae_dtype("auto", self.cpu, "AutoencoderKLWan") == torch.bfloat16

    def test_auto_takes_cuda_where_there_is_one(self) -> None:
        with mock.patch("torch.cuda.is_available", return_value=True):
            assert resolve_device("auto") == self.cuda
            assert resolve_device("cpu") == self.cpu
        with mock.patch("torch.cuda.is_available", return_value=False):
            assert resolve_device("auto") == self.cpu


@pytest.mark.parametrize("name", ["wan2.1-t2v", "wan2.1-i2v", "wan2.2-ti2v"])
def test_a_vae_of_its_own_precision_encodes_and_decodes(tiny_model_path: SavedModel, name: str) -> None:
    """Like Wan's on CUDA: for each task, and for previews of an image."""
    with mock.patch("pipelines.model.load.resolve_vae_dtype", return_value=torch.float32) as resolve:
        model = load(tiny_model_path(name), dtype="bf16")
    resolve.assert_called_once_with("bf16", torch.device("cpu"), "AutoencoderKLWan")
    assert (model.card.dtype, model.card.vae_dtype) == ("bf16", "fp32")
    assert (model.pipeline.transformer.dtype, model.pipeline.vae.dtype) == (torch.bfloat16, torch.float32)
    for task in model.pipeline_classes:
        *_, result = generate(model, *make_job(model, task, partial_images=int(not task.is_video)))
        assert isinstance(result, Result)
        assert result.outputs[0].data


def test_offload_on_a_cpu_says_that_there_is_nothing_to_do(
    tiny_model_path: SavedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pipelines.model.offload"):
        model = load(tiny_model_path("wan2.1-t2v"), text_encoder_cpu_offload=True, dit_layerwise_offload=True)
    assert caplog.messages == [
        "text_encoder_cpu_offload, dit_layerwise_offload: nothing to do on a CPU, where everything is in host memory"
    ]
    assert isinstance(model.pipeline, WanPipeline)
    assert not hasattr(model.pipeline.text_encoder, "_hf_hook")
