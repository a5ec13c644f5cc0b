"""`State` and images that are kept for download."""

from __future__ import annotations

import pytest

from deployments.errors import APIError
from deployments.state.state import State
from pipelines.job import Task
from tests.deployments.state.videos import (
    a_job,
)


class TestImages:
    async def test_are_stored_by_their_format_and_read_back(self, state, args, engine):
        job = a_job("image_1", task=Task.IMAGE_EDIT, output_format="webp", seeds=(1, 2))
        await state.store_image(job, [b"first", b"second"])
        await state.store_image(job, [b"first", b"second"])  # a repeated call
        for index, data in enumerate([b"first", b"second"]):
            content = await state.image_content("image_1", index)
            assert (content.size, content.media_type) == (len(data), "image/webp")
            assert content.filename == f"image_1-{index}.webp"
            assert await state.read(content.key, 0, content.size) == data
        for image_id, index in [("image_1", 2), ("image_2", 0)]:
            with pytest.raises(APIError) as error:
                await state.image_content(image_id, index)
            assert error.value.status == 404
        await state.close()
        state = State(args, lambda: engine)
        assert (await state.image_content("image_1", 1)).size == 6
        await state.close()
