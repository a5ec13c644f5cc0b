"""The families' data, checked against the tiny models and the installed diffusers."""

from __future__ import annotations

import inspect
import re
from importlib import resources
from pathlib import Path

import diffusers
import pytest
import yaml
from pydantic import ValidationError

from configs.model_family import ModelFamily, families, family_for, family_in
from pipelines.job import Job, Task
from tests import tiny_models
from tests.tasks import call_parameters

FILES = sorted(
    (Path(str(file)) for file in resources.files("configs").joinpath("models").iterdir() if file.name.endswith("yaml")),
    key=lambda file: file.name,
)
FAMILIES = sorted(families(), key=lambda family: family.name)
NEVER_PASSED = {"flow_shift"}
"""Parameters that go to the pipeline's scheduler, not to its call."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_models")


def by_name(family: ModelFamily) -> str:
    return family.name


def test_there_is_a_tiny_model_for_every_family() -> None:
    assert {family.name for family in FAMILIES} == set(tiny_models.BUILDERS) - {tiny_models.UNKNOWN_FAMILY}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_named_after_its_family(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["name"] == file.stem


@pytest.mark.parametrize("name", tiny_models.BUILDERS)
def test_a_model_on_disk_is_of_its_own_family(name: str, directory: Path) -> None:
    family = family_in(tiny_models.save(name, directory))
    assert (family and family.name) == (None if name == tiny_models.UNKNOWN_FAMILY else name)


@pytest.mark.parametrize("name", sorted({*tiny_models.FAMILIES, tiny_models.UNKNOWN_FAMILY} - {"sd3.5"}))
def test_model_index_alone_tells_the_pipeline(name: str, directory: Path) -> None:
    model_index = yaml.safe_load((tiny_models.save(name, directory) / "model_index.json").read_text())
    family = family_for(model_index)
    assert (family and family.name) == (None if name == tiny_models.UNKNOWN_FAMILY else name)


@pytest.mark.parametrize(
    ("name", "num_inference_steps", "guidance_scale"), [("sd3", 28, 7.0), ("sd3.5", 28, 3.5), ("sd3.5-medium", 40, 4.5)]
)
def test_sd3_and_its_successors_are_sampled_differently(
    name: str, num_inference_steps: int, guidance_scale: float, directory: Path
) -> None:
    """They share a pipeline class and its components; only the transformer's configuration tells them apart."""
    family = family_in(tiny_models.save(name, directory))
    assert family is not None
    defaults = family.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (num_inference_steps, guidance_scale)
    assert family.tasks == next(each for each in FAMILIES if each.name == "sd3").tasks


def test_a_picture_of_wan_22_has_its_own_shift() -> None:
    """Upstream's is for a video, which has 21 times as many tokens."""
    wan = next(family for family in FAMILIES if family.name == "wan2.2-t2v")
    assert [wan.defaults_for(task).flow_shift for task in ("text_to_video", "text_to_image")] == [12.0, 3.0]


def test_families_that_match_the_same_model_differ_in_what_they_demand() -> None:
    """Otherwise their names would decide their order, and with it the family of a model."""
    demands = [
        (pipeline, str(family.match.config), family.match.components, str(family.match.component_config))
        for family in FAMILIES
        for pipeline in family.match.pipelines
    ]
    assert len(demands) == len(set(demands))


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_its_pipelines_take_the_components_of_its_models(family: ModelFamily) -> None:
    pipeline = tiny_models.build(family.name)
    for task, class_name in family.tasks.items():
        assert Task(task)
        parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty} - {"self"}
        assert needed <= set(pipeline.components), f"{class_name} needs more than the model has"
        trained = {name for name, component in pipeline.components.items() if component is not None}
        assert trained <= set(parameters), f"{class_name} would leave out a part of the model"


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_its_parameters_are_those_that_its_pipelines_read(family: ModelFamily) -> None:
    accepted = set().union(*(call_parameters(class_name) for class_name in family.tasks.values()))
    assert family.parameters - NEVER_PASSED <= accepted
    assert family.parameters <= set(Job.model_fields)


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_flow_shift_is_listed_where_the_scheduler_has_a_static_one(family: ModelFamily) -> None:
    config = tiny_models.build(family.name).scheduler.config
    static = "flow_shift" in config or ("shift" in config and not config.use_dynamic_shifting)
    assert ("flow_shift" in family.parameters) == static


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_its_defaults_are_of_parameters_it_reads_and_of_sizes_it_computes(family: ModelFamily) -> None:
    for task in family.tasks:
        defaults = family.defaults_for(task)
        universal = {"width", "height", "num_inference_steps", "num_frames", "fps"}
        assert set(defaults.model_dump(exclude_none=True)) - universal <= family.parameters
        assert (defaults.width % family.size_multiple, defaults.height % family.size_multiple) == (0, 0)
        assert (defaults.num_frames - 1) % family.frame_multiple == 0
        assert Task(task).is_video or defaults.num_frames == 1


@pytest.mark.parametrize(
    ("width", "height", "num_frames", "num_tokens"), [(832, 480, 81, 32760), (16, 16, 1, 1), (17, 1, 2, 4)]
)
def test_tokens_are_squares_in_groups_of_frames(width: int, height: int, num_frames: int, num_tokens: int) -> None:
    wan = next(family for family in FAMILIES if family.name == "wan2.1-t2v")
    assert wan.num_tokens(width, height, num_frames) == num_tokens


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_by_default_an_edit_by_strength_sees_its_image(family: ModelFamily) -> None:
    """diffusers skips the first `int(steps * (1 - strength))` steps; if it skips none, it starts from noise."""
    if "strength" not in call_parameters(family.tasks.get("image_edit", "FluxPipeline")):
        return
    defaults = family.defaults_for("image_edit")
    assert defaults.strength is not None
    assert int(defaults.num_inference_steps * (1 - defaults.strength)) >= 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_number_has_its_source_beside_it(file: Path) -> None:
    numbers = [line for line in file.read_text().splitlines() if re.search(r":\s*-?\d+(\.\d+)?\s*[}\]]?\s*(#|$)", line)]
    assert len(numbers) >= 4
    source = re.compile(
        r"# (diffusers|SGLang|upstream's|Stability's|docs\.bfl\.ai|ours:?|its scheduler_config|what |8x|16x|4x)"
    )
    assert [line for line in numbers if not source.search(line)] == []


@pytest.mark.parametrize("family", FAMILIES, ids=by_name)
def test_numbers_called_a_diffusers_default_are_one(family: ModelFamily) -> None:
    """A default of any of the family's pipelines counts, not only of the one that generates from text."""
    text = (Path(str(resources.files("configs"))) / "models" / f"{family.name}.yaml").read_text()
    called = re.findall(r"^\s+(\w+): (-?[\d.]+) # diffusers default", text, re.MULTILINE)
    defaults = {
        (name, float(parameter.default))
        for class_name in family.tasks.values()
        for name, parameter in inspect.signature(getattr(diffusers, class_name).__call__).parameters.items()
        if isinstance(parameter.default, int | float)
    }
    # Image pipelines set the size in the body of the call: as 128 latents of 8 pixels, or simply as 1024.
    size = {(name, 1024.0) for name in ("width", "height") if (name, 832.0) not in defaults}
    assert {(name, float(value)) for name, value in called} <= defaults | size


def test_overrides_replace_fields_key_by_key() -> None:
    family = family_for(
        {"_class_name": "FluxPipeline"},
        {"defaults": {"num_inference_steps": 8}, "tasks": {"inpaint": "FluxFillPipeline"}, "max_images": 2},
    )
    plain = family_for({"_class_name": "FluxPipeline"})
    assert family is not None
    assert plain is not None
    assert family.defaults == plain.defaults.model_copy(update={"num_inference_steps": 8})
    assert family.tasks == {**plain.tasks, "inpaint": "FluxFillPipeline"}
    assert family.max_images == 2
    assert family.parameters == plain.parameters


def test_an_override_of_no_known_field_is_an_error_that_names_it() -> None:
    with pytest.raises(ValidationError, match="num_steps"):
        family_for({"_class_name": "FluxPipeline"}, {"defaults": {"num_steps": 8}})


def test_overrides_can_make_a_family_of_a_model_that_we_do_not_know() -> None:
    family = family_for(
        {"_class_name": "StableDiffusionPipeline"},
        {
            "tasks": {"text_to_image": "StableDiffusionPipeline"},
            "parameters": ["guidance_scale"],
            "defaults": {"width": 512, "height": 512, "num_inference_steps": 50},
            "sharded": False,
        },
    )
    assert family is not None
    assert family.name == "StableDiffusionPipeline"
    with pytest.raises(ValidationError, match="defaults"):
        family_for({"_class_name": "StableDiffusionPipeline"}, {"max_images": 2})


def test_a_models_own_file_is_found_beside_its_model_index(tmp_path: Path) -> None:
    model = tiny_models.save("sd3", tmp_path)
    (model / "ditserve.yaml").write_text("defaults: {num_inference_steps: 3}")
    family = family_in(model)
    assert family is not None
    assert (family.name, family.defaults.num_inference_steps, family.defaults.width) == ("sd3", 3, 1024)
