from __future__ import annotations

import subprocess
import sys

import jsonschema
import pytest

from pipelines.job import Task
from tests.deployments.api.stand_in import StandInEngine, app_over


def test_the_http_process_imports_no_torch() -> None:
    code = "import sys, deployments.api.app; assert not {'torch', 'diffusers', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def document() -> dict:
    return app_over(StandInEngine(Task.TEXT_TO_IMAGE)).openapi()


def test_the_document_has_every_route(document: dict) -> None:
    assert {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods} == {
        "POST /v1/images/generations",
        "POST /v1/images/edits",
        "GET /v1/images/{image_id}/content",
        "POST /v1/videos",
        "GET /v1/videos",
        "GET /v1/videos/{video_id}",
        "DELETE /v1/loras/{nickname}",
        "POST /v1/videos/{video_id}/cancel",
        "DELETE /v1/videos/{video_id}",
        "GET /v1/videos/{video_id}/content",
        "POST /v1/set_lora",
        "POST /v1/merge_lora_weights",
        "POST /v1/unmerge_lora_weights",
        "GET /v1/list_loras",
        "GET /v1/models",
        "GET /v1/models/{model}",
        "GET /health",
        "GET /ready",
    }


def test_every_reference_in_the_document_leads_somewhere(document: dict) -> None:
    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [ref for value in node.values() for ref in references(value)]
        return [ref for item in node for ref in references(item)] if isinstance(node, list) else []

    schemas = document["components"]["schemas"]
    assert {ref.removeprefix("#/components/schemas/") for ref in references(document)} <= set(schemas)
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_post_with_a_body_describes_it_and_every_failure_has_the_envelope(document: dict) -> None:
    envelope = {"$ref": "#/components/schemas/ErrorResponse"}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert method != "post" or path.endswith("/cancel") or operation["requestBody"]["content"]
            assert operation["summary"]
            for status, response in operation["responses"].items():
                assert status < "400" or response["content"]["application/json"]["schema"] == envelope


@pytest.mark.parametrize("field", ["prompt", "n", "size", "seed", "negative_prompt", "guidance_scale", "lora"])
def test_the_document_describes_each_field(document: dict, field: str) -> None:
    for name in ("ImageGenerationRequest", "ImageEditRequest", "VideoRequest"):
        assert document["components"]["schemas"][name]["properties"][field]["description"]
