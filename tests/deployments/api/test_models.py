from __future__ import annotations

import pytest

from deployments.api.models import task_types
from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine, client_of


@pytest.mark.parametrize(
    ("tasks", "names"),
    [
        ({Task.TEXT_TO_VIDEO}, ["T2V"]),
        ({Task.IMAGE_TO_VIDEO}, ["I2V"]),
        ({Task.TEXT_TO_VIDEO, Task.IMAGE_TO_VIDEO, Task.TEXT_TO_IMAGE}, ["TI2V", "T2I"]),
        ({Task.TEXT_TO_IMAGE, Task.IMAGE_EDIT, Task.INPAINT}, ["TI2I"]),
        ({Task.IMAGE_EDIT}, ["I2I"]),
    ],
)
def test_tasks_have_sglangs_names(tasks: set[Task], names: list[str]) -> None:
    assert task_types(tasks) == names


async def test_the_vae_has_a_precision_of_its_own() -> None:
    """Like Wan's on CUDA, where the transformer is bf16."""
    engine = StandInEngine(Task.TEXT_TO_VIDEO, dtype="bf16", vae_dtype="fp32")
    async with client_of(engine) as http:
        [model] = (await http.get("/v1/models")).json()["data"]
    assert (model["dit_precision"], model["vae_precision"]) == ("bf16", "fp32")
