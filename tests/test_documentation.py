"""What the documents list is what there is: every route with its fields, every flag, every family of models."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, get_args

import pytest

from configs.model_family import ModelFamily, families
from configs.server_args import ServerArgs
from tests.documentation import LANGUAGES, REPOSITORY, sections

SHARED = "Fields of every generation"
"""The section whose fields apply to every route that generates."""

GENERATING = ("POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/videos")

OTHER_NAMES = {"image": {"images"}}
"""Fields with further names on the wire, which the text gives instead of the table."""


@cache
def openapi() -> dict[str, Any]:
    from deployments.api.app import create_app

    # The OpenAPI document needs neither an engine nor a state actor.
    return create_app(ServerArgs(), None, None).openapi()  # type: ignore[arg-type]


def operations() -> dict[str, dict[str, Any]]:
    """Every operation of the API, as `GET /v1/videos/{video_id}`."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi()["paths"].items()
        for method, operation in methods.items()
    }


def fields_of(operation: dict[str, Any]) -> set[str]:
    """The names in the body and the query of an operation."""
    names = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        schema = openapi()["components"]["schemas"][content["schema"]["$ref"].split("/")[-1]]
        names |= set(schema["properties"])
    return names


@pytest.mark.parametrize("operation", operations())
def test_every_route_is_described_with_all_its_fields_and_no_others(operation: str) -> None:
    documented = sections("docs/api.md")
    assert operation in documented
    fields = set(documented[operation].fields)
    if operation in GENERATING:
        fields |= documented[SHARED].fields
    real = fields_of(operations()[operation])
    if operation == "POST /v1/images/edits":
        fields |= {"response_format"}
    assert fields == real - set().union(*OTHER_NAMES.values())


@pytest.mark.parametrize("operation", operations())
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_route_has_an_example_in_every_language(operation: str, language: str) -> None:
    assert sections("docs/api.md")[operation].blocks(language)


def test_no_section_describes_a_route_that_is_not_there() -> None:
    routes = {title for title in sections("docs/api.md") if title.startswith(("GET ", "POST ", "DELETE "))}
    assert routes == set(operations())


def test_the_example_of_an_error_is_json_of_the_envelope() -> None:
    (example,) = sections("docs/api.md")["Errors"].blocks("json")
    envelope = json.loads(example)
    assert set(envelope) == {"error", "detail"}
    assert set(envelope["error"]) == {"message", "type", "param", "code"}


SUPPORTED_TASKS = ("text_to_image", "image_edit", "inpaint", "text_to_video", "image_to_video")
"""As the columns of the table of models have them."""


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_is_listed_with_what_it_can_do(family: ModelFamily) -> None:
    rows = re.findall(
        r"^\|[^|]+\| `([\w.-]+)` \|(.*)\|$", (REPOSITORY / "docs" / "models.md").read_text(), re.MULTILINE
    )
    assert len(rows) == len(families())
    *abilities, images, size = (cell.strip() for cell in dict(rows)[family.name].split("|"))
    assert [task for task, cell in zip(SUPPORTED_TASKS, abilities, strict=True) if cell] == [
        task for task in SUPPORTED_TASKS if task in family.tasks
    ]
    takes_images = set(family.tasks) - {"text_to_image", "text_to_video"}
    assert images == (str(family.max_images) if takes_images else "")
    defaults = family.defaults
    frames = f", {defaults.num_frames} frames" if defaults.num_frames > 1 else ""
    assert size == f"{defaults.width}×{defaults.height}{frames}"


def test_every_flag_is_described_as_the_command_line_does() -> None:
    text = (REPOSITORY / "docs" / "deploy.md").read_text()
    assert flags_table() in text, f"docs/deploy.md should have this table:\n\n{flags_table()}"


def flags_table() -> str:
    """The table of flags that `ServerArgs` implies."""
    rows = ["| flag | default | |", "|---|---|---|"]
    for name, info in ServerArgs.model_fields.items():
        default = "" if info.default in (None, ()) else f"`{str(info.default).lower()}`"
        choices = [value for value in get_args(info.annotation) if isinstance(value, str)]
        values = f" ({', '.join(choices)})" if choices else ""
        rows.append(f"| `--{name.replace('_', '-')}` | {default} | {info.description}{values} |")
    return "\n".join(rows) + "\n"
