from __future__ import annotations

import pytest
from openai import NotFoundError

from deployments.api.models import task_types
from pipelines.job import Task
from tests.deployments.api.conftest import Server


def test_the_one_model_is_listed_and_described(images: Server) -> None:
    client = images.openai()
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model  # its slash arrives percent-encoded
    assert {"num_gpus", "task_type", "dit_precision", "vae_precision", "pipeline_class"} <= set(model.model_extra)


def test_another_model_is_not_found(images: Server) -> None:
    with pytest.raises(NotFoundError) as raised:
        images.openai().models.retrieve("some/other")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


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


def test_health_and_readiness(images: Server) -> None:
    assert images.http.get("/health").json() == {"status": "ok"}
    assert images.http.get("/ready").json() == {"status": "ready"}
