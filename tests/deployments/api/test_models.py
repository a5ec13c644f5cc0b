from __future__ import annotations

import pytest

from deployments.api.models import task_types
from pipelines.job import Task


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
