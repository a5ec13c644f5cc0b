"""Who may call which route, and whose records they see."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from configs.server_args import ServerArgs
from deployments.api.keys import Keyring
from deployments.state.state import State
from pipelines.job import Job, Task
from tests.deployments.api.small_server import client, running_app

ALICE, BOB, ADMIN = "sk-alice", "sk-bob", "sk-admin"


@dataclass(frozen=True)
class Server:
    app: FastAPI
    state: State
    http: httpx2.AsyncClient
    """A client that sends no key of its own."""

    def operations(self, tag: str | None = None) -> list[tuple[str, str]]:
        """Every method and path of the API (with this tag), with ids filled in."""
        ids = {"video_id": "video_1", "image_id": "img_1", "model": "stand/in", "nickname": "ink"}
        return [
            (method.upper(), path.format(**ids))
            for path, methods in self.app.openapi()["paths"].items()
            for method, operation in methods.items()
            if tag is None or tag in operation["tags"]
        ]

    async def create_video(self, key: str, **headers: str) -> str:
        answer = await self.http.post("/v1/videos", json={"prompt": "p"}, headers={**by(key), **headers})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]


def by(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@asynccontextmanager
async def serving(folder: Path, **keys: object) -> AsyncIterator[Server]:
    async with running_app(folder, **keys) as (app, state), client(app) as http:
        yield Server(app, state, http)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path, api_key=[ALICE, BOB], admin_api_key=ADMIN) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [{}, by("wrong"), by(""), {"authorization": ALICE}, {"authorization": f"Basic {ALICE}"}, {"x-api-key": ALICE}],
    ids=["none", "wrong", "empty", "bare", "other scheme", "other header"],
)
async def test_every_route_below_v1_asks_for_a_key(server: Server, headers: dict[str, str]) -> None:
    guarded = [(method, path) for method, path in server.operations() if path.startswith("/v1")]
    assert len(guarded) >= 14
    further = [("POST", "/v1/videos/video_1/remix"), ("HEAD", "/v1/videos/video_1/content")]
    for method, path in guarded + further:
        answer = await server.http.request(method, path, headers=headers)
        assert answer.status_code == 401, f"{method} {path}"
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            error = answer.json()["error"]
            assert (error["type"], error["code"], error["param"]) == ("authentication_error", "invalid_api_key", None)


async def test_probes_and_the_document_ask_for_none(server: Server) -> None:
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert (await server.http.get(path)).status_code == 200, path


async def test_the_document_asks_for_a_key_where_the_server_does(server: Server, tmp_path: Path) -> None:
    async with serving(tmp_path / "open") as without_keys:
        for document, asks in ((server.app.openapi(), True), (without_keys.app.openapi(), False)):
            assert ("securitySchemes" in document["components"]) == asks
            for path, methods in document["paths"].items():
                for operation in methods.values():
                    assert ("security" in operation) == (asks and path.startswith("/v1")), path


async def test_a_body_is_not_read_for_who_may_not_send_it(server: Server) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    assert (await server.http.post("/v1/images/generations", content=body())).status_code == 401
    assert not read


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
@pytest.mark.parametrize("key", [ALICE, ADMIN])
async def test_a_key_lets_in(server: Server, scheme: str, key: str) -> None:
    assert (await server.http.get("/v1/models", headers={"authorization": f"{scheme} {key}"})).status_code == 200


async def test_the_lora_routes_are_the_admins(server: Server) -> None:
    routes = server.operations(tag="LoRA")
    assert len(routes) >= 5
    for method, path in routes:
        answer = await server.http.request(method, path, headers=by(ALICE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required"), f"{method} {path}"
        assert (await server.http.request(method, path, headers=by(ADMIN))).status_code not in (401, 403)


async def test_without_an_admin_key_the_lora_routes_take_an_ordinary_one(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=ALICE) as server:
        assert (await server.http.get("/v1/list_loras")).status_code == 401
        assert (await server.http.get("/v1/list_loras", headers=by(ALICE))).status_code == 200


async def test_an_admin_key_alone_leaves_the_other_routes_open(tmp_path: Path) -> None:
    async with serving(tmp_path, admin_api_key=ADMIN) as server:
        assert (await server.http.get("/v1/models")).status_code == 200
        assert (await server.http.get("/v1/models", headers=by("unused"))).status_code == 200
        assert (await server.http.get("/v1/list_loras", headers=by("unused"))).status_code == 401
        assert (await server.http.get("/v1/list_loras", headers=by(ADMIN))).status_code == 200


@pytest.mark.parametrize("lora", [{"path": "/etc/passwd"}, ["nickname", {"nickname": "n", "path": "owner/name"}]])
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/videos"])
async def test_an_adapter_by_its_path_is_the_admins(server: Server, path: str, lora: object) -> None:
    answer = await server.http.post(path, json={"prompt": "p", "lora": lora}, headers=by(ALICE))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_key_required")


async def test_in_the_folder_for_adapters_anybody_may_choose(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=ALICE, admin_api_key=ADMIN, lora_dir=str(tmp_path)) as server:
        body = {"prompt": "p", "lora": {"path": "ink.safetensors"}}
        answer = await server.http.post("/v1/videos", json=body, headers=by(ALICE))
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("lora_not_found", "lora")  # so it was looked for


async def test_a_key_lists_its_own_videos_and_an_admin_all(server: Server) -> None:
    made = {key: {await server.create_video(key) for _ in range(2)} for key in (ALICE, BOB, ADMIN)}
    made[ADMIN] = set().union(*made.values())
    for key, videos in made.items():
        listed = (await server.http.get("/v1/videos", headers=by(key))).json()["data"]
        assert {video["id"] for video in listed} == videos


async def test_anothers_records_do_not_exist_on_any_route(server: Server) -> None:
    video = await server.create_video(ALICE)
    picture = Job(id="img_1", task=Task.TEXT_TO_IMAGE, prompt="p", width=8, height=8, num_inference_steps=1, seeds=(1,))
    await server.state.store_image(picture, [b"picture"], Keyring.read(ServerArgs(api_key=ALICE)).caller(ALICE).tenant)
    routes = [
        (method, path.replace("video_1", video))
        for method, path in server.operations()
        if "video_1" in path or "img_1" in path
    ]
    assert len(routes) >= 4
    for method, path in routes:
        answer = await server.http.request(method, path, headers=by(BOB))
        assert answer.status_code == 404, f"{method} {path}"
        unknown = path.replace(video, "video_9").replace("img_1", "img_9")
        same = (await server.http.request(method, unknown, headers=by(BOB))).text
        assert same.replace("video_9", video).replace("img_9", "img_1") == answer.text
    assert (await server.http.get(f"/v1/videos?after={video}", headers=by(BOB))).status_code == 404
    assert (await server.http.get(f"/v1/videos/{video}", headers=by(ALICE))).status_code == 200
    assert (await server.http.get("/v1/images/img_1/content", headers=by(ALICE))).content == b"picture"


async def test_the_same_idempotency_key_of_two_keys_gives_two_videos(server: Server) -> None:
    again = {"idempotency-key": "k"}
    videos = [await server.create_video(key, **again) for key in (ALICE, BOB, ALICE, BOB)]
    assert videos[:2] == videos[2:]
    assert videos[0] != videos[1]


async def test_keys_reach_neither_disk_nor_log(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await server.create_video(ALICE, **{"idempotency-key": "k"})
    for key in (ALICE, "wrong-key", ADMIN):
        await server.http.get("/v1/list_loras", headers=by(key))
        await server.http.post("/v1/videos", content=b"{", headers=by(key))
    for key in (ALICE, "wrong-key", ADMIN):
        assert key not in caplog.text
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
