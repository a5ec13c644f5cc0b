from __future__ import annotations

import re

import pytest
from openai import NotFoundError

from tests.e2e.server import Server


def test_the_one_model_is_listed_and_described(server: Server) -> None:
    client = server.openai()
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model  # its slash arrives percent-encoded
    assert {"num_gpus", "task_type", "dit_precision", "vae_precision", "pipeline_class"} <= set(model.model_extra)


def test_another_model_is_not_found(server: Server) -> None:
    with pytest.raises(NotFoundError) as raised:
        server.openai().models.retrieve("some/other")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_health_and_readiness(server: Server) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").json() == {"status": "ready"}
    for path in ("/health", "/ready"):
        answer = server.http.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize(("page", "library"), [("/docs", "swagger"), ("/redoc", "redoc")])
def test_the_api_page_needs_no_other_host(page: str, library: str, server: Server) -> None:
    html = server.http.get(page).text
    assert library in html
    files = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert len(files) >= 2
    assert [server.http.get(file).status_code for file in files] == [200] * len(files)
    assert "://" not in html
    assert server.http.get("/openapi.json").json()["openapi"].startswith("3.1")
