"""Every call that LiteLLM has for images and videos, against the server at the given base URL.

Runs in its own environment (LiteLLM needs another openai), so it prints what it got as JSON for a test to check.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import time
from typing import Any

import litellm

base_url, picture_path, model = sys.argv[1:]
server: dict[str, Any] = {"api_base": f"{base_url}/v1", "api_key": "any"}
videos: dict[str, Any] = {**server, "custom_llm_provider": "openai"}
small = {"num_inference_steps": 2, "seed": 7}


def picture_file() -> io.BytesIO:
    with open(picture_path, "rb") as file:
        data = io.BytesIO(file.read())
    data.name = "picture.png"
    return data


def finished(video_id: str) -> Any:
    deadline = time.monotonic() + 240
    while (video := litellm.video_status(video_id=video_id, **videos)).status not in ("completed", "failed"):
        if time.monotonic() > deadline:
            raise TimeoutError(video)
        time.sleep(0.2)
    return video


def refusal() -> dict[str, Any]:
    try:
        litellm.image_generation(prompt="p", model=f"openai/{model}", size="enormous", **server)
    except litellm.BadRequestError as error:
        return {"status": error.status_code, "message": str(error)}
    raise AssertionError("this size was to be refused")


generated = litellm.image_generation(
    prompt="a calico cat", model=f"openai/{model}", n=2, size="64x64", extra_body=small, **server
)
edited = litellm.image_edit(
    image=picture_file(), prompt="a calico cat", model=f"openai/{model}", size="64x64", extra_body=small, **server
)
created = litellm.video_generation(
    prompt="a calico cat",
    model=f"openai/{model}",
    seconds="1",
    size="64x64",
    extra_body={**small, "num_frames": 5},
    **server,
)
from_picture = litellm.video_generation(
    prompt="a calico cat",
    model=f"openai/{model}",
    size="64x64",
    input_reference=picture_file(),
    extra_body={**small, "num_frames": 5},
    **server,
)
done = finished(created.id)
done_from_picture = finished(from_picture.id)
listed = litellm.video_list(limit=2, order="desc", **videos)
clip = litellm.video_content(video_id=created.id, **videos)
thumbnail = litellm.video_content(video_id=created.id, variant="thumbnail", **videos)

json.dump(
    {
        "generated": [image.b64_json for image in generated.data],
        "edited": [image.b64_json for image in edited.data],
        "created": created.status,
        "done": [done.status, done.progress, done.size, done.seconds],
        "done from a picture": done_from_picture.status,
        "listed": listed if isinstance(listed, dict) else listed.model_dump(),
        "clip": base64.b64encode(clip).decode(),
        "thumbnail": base64.b64encode(thumbnail).decode(),
        "refusal": refusal(),
    },
    sys.stdout,
)
