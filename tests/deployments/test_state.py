"""`State`: videos live through crashes, end once, and leave no more files than their records name."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorDiedError

from configs.server_args import ServerArgs
from deployments import video_runner
from deployments.errors import APIError
from deployments.interfaces import Video, VideoError, VideoStatus
from deployments.state import ACTOR_NAME, NAMESPACE, State, forget_state_actor, state_actor
from deployments.storage import Storage
from pipelines.job import InvalidJob, Job, Task, content_key
from tests.deployments import step_engine
from tests.deployments.step_engine import StepEngine, pixels

MAX_ATTEMPTS = 3
PHOTO = b"a photo of a lighthouse"
INPUTS = {content_key(PHOTO): PHOTO}


def a_job(video_id: str = "video_1", **fields) -> Job:
    return Job(
        **{
            "id": video_id,
            "task": Task.IMAGE_TO_VIDEO,
            "prompt": "waves",
            "width": 64,
            "height": 64,
            "num_inference_steps": 4,
            "seeds": (7,),
            "images": tuple(INPUTS),
            "output_format": "mp4",
        }
        | fields
    )


@pytest.fixture
def args(tmp_path: Path) -> ServerArgs:
    return ServerArgs(
        output_path=str(tmp_path / "outputs"),
        state_path=str(tmp_path / "jobs.sqlite3"),
        max_retries=MAX_ATTEMPTS - 1,
    )


@pytest.fixture
def engine(tmp_path: Path) -> StepEngine:
    return StepEngine(tmp_path)


@pytest.fixture
async def state(args: ServerArgs, engine: StepEngine) -> AsyncIterator[State]:
    state = State(args, lambda: engine)
    yield state
    await state.close()


@pytest.fixture(autouse=True)
def retry_soon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video_runner, "_RETRY_DELAY_S", 0.02)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def finished(state: State, video_id: str = "video_1") -> Video:
    async with asyncio.timeout(20):
        while (video := await state.get_video(video_id)).status in (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS):
            await asyncio.sleep(0.005)
    return video


async def reaches(state: State, progress: int, video_id: str = "video_1") -> None:
    async with asyncio.timeout(20):
        while (await state.get_video(video_id)).progress < progress:
            await asyncio.sleep(0.005)


def files(args: ServerArgs) -> set[str]:
    root = Path(args.output_path)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


VIDEO_1_FILES = {"videos/video_1-0.mp4", "videos/video_1-0.webp", "videos/video_1-0.jpg"}


class TestAVideo:
    async def test_is_persisted_with_its_inputs_before_the_answer(self, state, engine, args):
        engine.allow("video_1", 0)
        video = await state.create_video(a_job(), INPUTS, "wan")
        assert (video.job, video.model, video.status, video.progress) == (a_job(), "wan", VideoStatus.QUEUED, 0)
        assert files(args) == {f"inputs/video_1-{content_key(PHOTO)}"}
        await state.close()
        reopened = State(args, lambda: engine)
        assert await reopened.get_video("video_1") == video
        await reopened.close()

    async def test_shows_each_step_and_is_completed_once_its_files_are_there(self, state, engine, args):
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan")
        for step, percent in [(1, 25), (2, 50), (3, 75), (4, 99)]:
            engine.allow("video_1", step)
            await reaches(state, percent)
            if step < 4:
                video = await state.get_video("video_1")
                assert (video.status, video.progress) == (VideoStatus.IN_PROGRESS, percent)
        video = await finished(state)
        assert (video.status, video.progress, video.error) == (VideoStatus.COMPLETED, 100, None)
        assert video.timings == {"denoise": 0.25, "decode": 0.5}
        await until(lambda: files(args) == VIDEO_1_FILES)  # the inputs are needed no more

    async def test_is_downloaded_in_ranges_in_every_variant(self, state):
        job = a_job(seeds=(7, 8))
        await state.create_video(job, INPUTS, "wan")
        await finished(state)
        for index, output in enumerate(pixels(job, INPUTS)):
            for variant, data, media_type, filename in [
                ("video", output.data, "video/mp4", f"video_1-{index}.mp4"),
                ("thumbnail", output.thumbnail, "image/webp", f"video_1-{index}.webp"),
                ("spritesheet", output.spritesheet, "image/jpeg", f"video_1-{index}.jpg"),
            ]:
                content = await state.video_content("video_1", variant, index)
                assert (content.size, content.media_type, content.filename) == (len(data), media_type, filename)
                assert await state.read(content.key, 100, 50) == data[100:150]
                assert await state.read(content.key, 0, content.size) == data
        with pytest.raises(APIError, match="has no video 2") as error:
            await state.video_content("video_1", "video", 2)
        assert error.value.status == 404

    async def test_of_one_output_is_named_by_its_id_alone(self, state):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        assert (await state.video_content("video_1", "video")).filename == "video_1.mp4"

    async def test_cannot_be_downloaded_before_it_is_completed(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        with pytest.raises(APIError, match="Generation is still in progress") as error:
            await state.video_content("video_1", "video")
        assert error.value.status == 404

    async def test_whose_file_was_removed_by_hand_is_a_404(self, state, args):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        content = await state.video_content("video_1", "video")
        Path(args.output_path, content.key).unlink()
        for call in (state.video_content("video_1", "video"), state.read(content.key, 0, 1)):
            with pytest.raises(APIError, match="no longer stored") as error:
                await call
            assert error.value.status == 404

    async def test_is_unknown_until_it_was_created(self, state):
        for call in (state.get_video, state.delete_video, partial(state.video_content, variant="video")):
            with pytest.raises(APIError, match="No video with id 'video_9'"):
                await call("video_9")

    async def test_is_made_once_for_one_idempotency_key(self, state, engine, args):
        calls = (state.create_video(a_job(f"video_{n}"), INPUTS, "wan", "key") for n in range(5))
        videos = await asyncio.gather(*calls)
        assert len({video.job.id for video in videos}) == 1
        (only,) = (await state.list_videos(None, 10, "desc")).videos
        await finished(state, only.job.id)
        assert await state.create_video(a_job("video_later"), INPUTS, "wan", "key") == await state.get_video(
            only.job.id
        )
        assert sum(len(engine.journal(f"video_{n}")) for n in range(5)) == 2  # began, ended
        await until(lambda: len(files(args)) == 3)

    async def test_may_be_created_again_by_a_repeated_call(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        again = await state.create_video(a_job(), INPUTS, "wan")
        assert again.progress == 25
        engine.allow("video_1", 4)
        await finished(state)
        assert engine.journal("video_1") == ["began", "ended"]


class TestDeletion:
    async def test_of_a_running_video_closes_the_engines_iterator(self, state, engine, args):
        engine.allow("video_1", 2)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 50)
        await state.delete_video("video_1")
        assert engine.journal("video_1") == ["began", "stopped"]
        assert files(args) == set()
        with pytest.raises(APIError, match="No video"):
            await state.get_video("video_1")

    async def test_of_a_completed_video_takes_its_files_along_and_no_others(self, state, args):
        for video_id in ("video_1", "video_2"):
            await state.create_video(a_job(video_id), INPUTS, "wan")
            await finished(state, video_id)
        await state.delete_video("video_2")
        await until(lambda: files(args) == VIDEO_1_FILES)
        assert [video.job.id for video in (await state.list_videos(None, 10, "desc")).videos] == ["video_1"]

    async def test_while_the_result_is_being_written_leaves_nothing(self, state, args, monkeypatch):
        writing, go_on = threading.Event(), threading.Event()
        put = Storage.put

        def slow_put(storage: Storage, key: str, data: bytes) -> None:
            if key.startswith("videos/"):
                writing.set()
                go_on.wait(5)
            put(storage, key, data)

        monkeypatch.setattr(Storage, "put", slow_put)
        await state.create_video(a_job(), INPUTS, "wan")
        await until(writing.is_set)
        deletion = asyncio.create_task(state.delete_video("video_1"))
        await asyncio.sleep(0.05)
        assert not deletion.done()
        go_on.set()
        await deletion
        assert files(args) == set()

    async def test_twice_at_once_succeeds_once(self, state, engine):
        engine.allow("video_1", 1)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 25)
        deletions = (state.delete_video("video_1") for _ in range(2))
        outcomes = await asyncio.gather(*deletions, return_exceptions=True)
        assert sorted(str(outcome) for outcome in outcomes) == ["No video with id 'video_1'", "None"]


class RaisingEngine(StepEngine):
    """Raises `errors` one after the other, each after so many steps; then it computes."""

    def __init__(self, folder: Path, *errors: Exception, after: int):
        super().__init__(folder)
        self.errors = list(errors)
        self.after = after

    async def generate(self, job: Job, media, *, progress: bool) -> AsyncGenerator:
        error = self.errors.pop(0) if self.errors else None
        step = 0
        async for event in super().generate(job, media, progress=progress):
            if error is not None and step == self.after:
                raise error
            step += 1
            yield event


class TestFailure:
    @pytest.mark.parametrize("after", [0, 2])
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (InvalidJob("The image is not an image"), VideoError("invalid_request_error", "The image is not an image")),
            (APIError(500, "Out of memory"), VideoError("server_error", "Out of memory")),
            (APIError(400, "No", code="no"), VideoError("no", "No")),
            (
                OSError(28, "No space left on device", "/secret/path"),
                VideoError("server_error", "The server failed on this video; its log says why under the video's id"),
            ),
        ],
    )
    async def test_is_told_in_words_for_the_client(self, args, tmp_path, error, told, after):
        engine = RaisingEngine(tmp_path, error, after=after)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert (video.status, video.error, video.completed_at) == (VideoStatus.FAILED, told, None)
        with pytest.raises(APIError, match=f"Generation failed: {told.message}") as raised:
            await state.video_content("video_1", "video")
        assert (raised.value.status, raised.value.code) == (404, told.code)
        await until(lambda: files(args) == set())
        await state.create_video(a_job("video_2"), INPUTS, "wan")
        assert (await finished(state, "video_2")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_to_store_the_result_leaves_no_files(self, state, args, monkeypatch):
        put = Storage.put

        def full(storage: Storage, key: str, data: bytes) -> None:
            if key.endswith(".jpg"):
                raise OSError(28, "No space left on device", key)
            put(storage, key, data)

        monkeypatch.setattr(Storage, "put", full)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert video.status is VideoStatus.FAILED
        assert "videos/" not in video.error.message
        await until(lambda: files(args) == set())

    @pytest.mark.parametrize("status", [429, 503])
    async def test_of_an_engine_that_is_not_there_yet_is_waited_out(self, args, tmp_path, status):
        refusals = [APIError(status, "Not now")] * (3 * MAX_ATTEMPTS)
        engine = RaisingEngine(tmp_path, *refusals, after=0)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is VideoStatus.COMPLETED
        assert engine.errors == []
        await state.close()

    async def test_to_make_the_engine_is_waited_out_too(self, args, engine):
        makers = iter([APIError(503, "The engine is not deployed"), engine])

        def make() -> StepEngine:
            if isinstance(made := next(makers), APIError):
                raise made
            return made

        state = State(args, make)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await finished(state)).status is VideoStatus.COMPLETED
        await state.close()

    @pytest.mark.parametrize("error", [ActorDiedError(), APIError(503, "The ranks are gone")])
    async def test_of_the_engine_in_the_middle_is_survived_and_progress_never_falls(self, args, tmp_path, error):
        engine = RaisingEngine(tmp_path, *[error] * (MAX_ATTEMPTS - 1), after=2)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        seen = []
        while not seen or seen[-1].status in (VideoStatus.QUEUED, VideoStatus.IN_PROGRESS):
            seen.append(await state.get_video("video_1"))
            await asyncio.sleep(0.001)
        assert seen[-1].status is VideoStatus.COMPLETED
        assert_never_goes_back(seen)
        await state.close()

    async def test_of_the_engine_at_every_attempt_fails_the_job_in_the_end(self, args, tmp_path):
        engine = RaisingEngine(tmp_path, *[ActorDiedError()] * 10, after=2)
        state = State(args, lambda: engine)
        await state.create_video(a_job(), INPUTS, "wan")
        video = await finished(state)
        assert video.error == VideoError("server_error", "The engine stopped during each attempt")
        assert len(engine.errors) == 10 - MAX_ATTEMPTS
        await state.close()


class TestCancelling:
    async def test_a_running_video_stops_it_and_keeps_its_record(self, state, engine, args):
        engine.allow("video_1", 2)
        await state.create_video(a_job(), INPUTS, "wan")
        await reaches(state, 50)
        video = await state.cancel_video("video_1")
        assert video.status is VideoStatus.FAILED
        assert video.error == VideoError("cancelled", "The video was cancelled")
        assert engine.journal("video_1") == ["began", "stopped"]
        assert files(args) == set()

    async def test_a_queued_video_keeps_it_from_beginning(self, state, engine):
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan")
        assert (await state.cancel_video("video_1")).error.code == "cancelled"
        assert (await state.cancel_video("video_1")).error.code == "cancelled"

    async def test_a_finished_video_leaves_it_as_it_is(self, state, args):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        assert (await state.cancel_video("video_1")).status is VideoStatus.COMPLETED
        assert files(args) == VIDEO_1_FILES

    async def test_an_unknown_video_is_not_found(self, state):
        with pytest.raises(APIError) as refused:
            await state.cancel_video("video_nobody_made")
        assert refused.value.status == 404


class TestAFullQueue:
    async def test_refuses_before_there_is_a_job_and_takes_the_next_when_one_is_done(self, args, engine):
        state = State(args.model_copy(update={"max_queue": 2}), lambda: engine)
        engine.allow("video_1", 1)
        engine.allow("video_2", 0)
        for name in ("video_1", "video_2"):
            await state.create_video(a_job(name), INPUTS, "wan")
        kept = files(args)
        with pytest.raises(APIError) as refused:
            await state.create_video(a_job("video_3"), INPUTS, "wan")
        assert (refused.value.status, refused.value.code) == (429, "queue_full")
        assert int(refused.value.headers["Retry-After"]) > 0
        assert files(args) == kept
        with pytest.raises(APIError):
            await state.get_video("video_3")
        engine.allow("video_1", 4)
        await finished(state)
        await state.create_video(a_job("video_3"), INPUTS, "wan")
        assert (await finished(state, "video_3")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_still_answers_a_repeated_request_with_its_video(self, args, engine):
        state = State(args.model_copy(update={"max_queue": 1}), lambda: engine)
        engine.allow("video_1", 0)
        await state.create_video(a_job(), INPUTS, "wan", "key")
        assert (await state.create_video(a_job("video_2"), INPUTS, "wan", "key")).job.id == "video_1"
        await state.close()


def assert_never_goes_back(seen: list[Video]) -> None:
    order = [VideoStatus.QUEUED, VideoStatus.IN_PROGRESS, VideoStatus.COMPLETED]
    positions = [(order.index(video.status), video.progress) for video in seen]
    assert positions == sorted(positions)


LAST_WORDS = """
import asyncio, os, signal, sys
from pathlib import Path
from configs.server_args import ServerArgs
from deployments.state import State
from deployments.storage import Storage
from pipelines.job import Job
from tests.deployments.step_engine import StepEngine
from tests.deployments.test_state import INPUTS

args, job, prefix, folder = sys.argv[1:]
put = Storage.put

def put_and_die(storage, key, data):
    put(storage, key, data)
    if key.startswith(prefix):
        os.kill(os.getpid(), signal.SIGKILL)

async def main():
    Storage.put = put_and_die
    state = State(ServerArgs.model_validate_json(args), lambda: StepEngine(Path(folder)))
    await state.create_video(Job.model_validate_json(job), INPUTS, "wan")
    await asyncio.sleep(60)

asyncio.run(main())
"""
"""A server that is killed as soon as it has written a file under a prefix."""


class TestANewLife:
    async def test_goes_on_with_queued_and_running_videos_to_the_same_pixels(self, args, engine):
        state = State(args, lambda: engine)
        engine.allow("video_1", 2)
        engine.allow("video_2", 0)
        for video_id in ("video_1", "video_2"):
            await state.create_video(a_job(video_id), INPUTS, "wan")
        await reaches(state, 50)
        await state.close()
        assert engine.journal("video_1") == ["began", "stopped"]

        state = State(args, lambda: engine)
        video = await state.get_video("video_1")
        assert (video.status, video.progress) == (VideoStatus.IN_PROGRESS, 50)
        for video_id in ("video_1", "video_2"):
            engine.allow(video_id, 4)
            assert (await finished(state, video_id)).status is VideoStatus.COMPLETED
            content = await state.video_content(video_id, "video")
            assert await state.read(content.key, 0, content.size) == pixels(a_job(video_id), INPUTS)[0].data
        assert engine.journal("video_1") == ["began", "stopped", "began", "ended"]
        await state.close()

        state = State(args, lambda: engine)  # what is finished is not begun again
        await asyncio.sleep(0.05)
        assert engine.journal("video_1") == ["began", "stopped", "began", "ended"]
        await state.close()

    async def test_is_lost_on_a_job_that_ends_each_of_them_but_not_on_those_that_wait(self, args, engine):
        engine.allow("video_1", 1)
        engine.allow("video_2", 0)
        for life in range(MAX_ATTEMPTS):
            state = State(args, lambda: engine)
            for video_id in ("video_1", "video_2"):
                await state.create_video(a_job(video_id), INPUTS, "wan")
            await until(lambda life=life: engine.journal("video_1").count("began") == life + 1)
            await reaches(state, 25)
            await asyncio.sleep(0.02)
            await state.close()
        state = State(args, lambda: engine)
        video = await finished(state)
        assert video.status is VideoStatus.FAILED
        assert video.error.message == f"Given up after {MAX_ATTEMPTS} attempts: the server stopped during each"
        engine.allow("video_2", 4)
        assert (await finished(state, "video_2")).status is VideoStatus.COMPLETED
        await state.close()

    async def test_sweeps_what_was_being_written_but_nothing_of_others(self, state, args, engine):
        await state.create_video(a_job(), INPUTS, "wan")
        await finished(state)
        await until(lambda: files(args) == VIDEO_1_FILES)
        state._jobs.reserve({"videos/video_2-0.mp4": 1, "inputs/video_3-0": 1})
        await state.close()
        root = Path(args.output_path)
        (root / "videos" / "video_2-0.mp4").write_bytes(b"whole, but without a record")
        (root / "inputs" / ".video_3-0.partial").write_bytes(b"ha")
        (root / "videos" / "holiday.mp4").write_bytes(b"somebody else's")

        state = State(args, lambda: engine)
        assert files(args) == VIDEO_1_FILES | {"videos/holiday.mp4"}
        assert state._jobs.unowned() == []
        await state.close()

    @pytest.mark.parametrize(("at", "left"), [("inputs/", 0), ("videos/", 1)])
    async def test_after_a_kill_between_file_and_record_finds_no_file_too_many(self, args, engine, at, left):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LAST_WORDS, args.model_dump_json(), a_job().model_dump_json(), at, str(engine.folder)
        )
        assert await process.wait() == -signal.SIGKILL
        assert any(file.startswith(at) for file in files(args))

        engine.allow("video_1", 0)
        state = State(args, lambda: engine)
        assert files(args) == {f"inputs/video_1-{name}" for name in INPUTS if left}
        videos = (await state.list_videos(None, 10, "desc")).videos
        assert [video.status for video in videos] == [VideoStatus.IN_PROGRESS] * left
        engine.allow("video_1", 4)
        await state.create_video(a_job(), INPUTS, "wan")  # the client had no answer, and asks again
        assert (await finished(state)).status is VideoStatus.COMPLETED
        await until(lambda: files(args) == VIDEO_1_FILES)
        await state.close()

    async def test_starts_though_the_sweep_cannot_delete(self, args, engine, monkeypatch):
        state = State(args, lambda: engine)
        state._jobs.reserve({"videos/video_2-0.mp4": 1})
        await state.close()

        def refused(storage: Storage, key: str) -> None:
            raise PermissionError(key)

        monkeypatch.setattr(Storage, "delete", refused)
        state = State(args, lambda: engine)
        assert state._jobs.unowned() == ["videos/video_2-0.mp4"]
        await state.close()


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


async def test_files_are_read_and_written_beside_the_event_loop(state, monkeypatch):
    threads = set()
    for name in ("put", "read", "size", "delete"):
        method = getattr(Storage, name)

        def recorded(*args, method=method):
            threads.add(threading.current_thread())
            return method(*args)

        monkeypatch.setattr(Storage, name, recorded)
    await state.create_video(a_job(), INPUTS, "wan")
    await finished(state)
    content = await state.video_content("video_1", "video")
    await state.read(content.key, 0, 10)
    await state.delete_video("video_1")
    assert threads
    assert threading.current_thread() not in threads


def test_the_state_needs_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import sys, deployments.state; assert 'torch' not in sys.modules"], check=True
    )


@pytest.fixture
def engine_by_value() -> Iterator[None]:
    """Ray's workers need not find the tests."""
    ray.cloudpickle.register_pickle_by_value(step_engine)
    yield
    ray.cloudpickle.unregister_pickle_by_value(step_engine)


class TestTheActor:
    @pytest.fixture
    async def actor(self, ray_cluster, engine_by_value, args, engine) -> AsyncIterator[ray.actor.ActorHandle]:
        actor = state_actor(args, partial(StepEngine, engine.folder))
        yield actor
        forget_state_actor()
        await until(lambda: not any(named["name"] == ACTOR_NAME for named in ray.util.list_named_actors(True)))

    async def test_is_one_for_all_who_ask(self, actor, args, engine):
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        again = state_actor(args, partial(StepEngine, engine.folder))
        by_name = ray.get_actor(ACTOR_NAME, namespace=NAMESPACE)
        for handle in (again, by_name):
            assert (await handle.get_video.remote("video_1")).job.id == "video_1"

    async def test_is_made_anew_after_it_was_forgotten_and_knows_what_it_knew(self, actor, args, engine):
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        forget_state_actor()
        with pytest.raises(ActorDiedError):
            await actor.get_video.remote("video_1")
        again = state_actor(args, partial(StepEngine, engine.folder))
        assert (await again.get_video.remote("video_1")).job == a_job()

    async def test_answers_errors_as_they_are(self, actor):
        with pytest.raises(APIError) as error:
            await actor.get_video.remote("video_1")
        assert (error.value.status, error.value.code) == (404, "video_not_found")

    async def test_killed_in_the_middle_of_a_video_finishes_it_once(self, actor, engine):
        engine.allow("video_1", 2)
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        seen: list[Video] = []

        async def watch(stop: Callable[[Video], bool]) -> None:
            async with asyncio.timeout(60):
                while not (seen and stop(seen[-1])):
                    seen.append(await actor.get_video.remote("video_1"))

        await watch(lambda video: video.progress == 50)
        victim = engine.pid()
        os.kill(victim, signal.SIGKILL)
        await watch(lambda _: engine.journal("video_1") == ["began", "began"])
        engine.allow("video_1", 4)
        await watch(lambda video: video.status is VideoStatus.COMPLETED)

        assert_never_goes_back(seen)
        assert engine.pid() != victim
        assert engine.journal("video_1") == ["began", "began", "ended"]
        content = await actor.video_content.remote("video_1", "video")
        assert await actor.read.remote(content.key, 0, content.size) == pixels(a_job(), INPUTS)[0].data

    async def test_killed_again_and_again_loses_no_video_and_no_file(self, actor, args, engine):
        ids = [f"video_{n}" for n in range(12)]
        for kill in range(2):
            half = ids[kill * 6 : kill * 6 + 6]
            calls = [actor.create_video.remote(a_job(video_id), INPUTS, "wan", video_id) for video_id in half]
            await until(lambda half=half: any("began" in engine.journal(video_id) for video_id in half))
            os.kill(engine.pid(), signal.SIGKILL)
            await asyncio.gather(*calls)  # made again by Ray
        for video_id in ids:
            async with asyncio.timeout(60):
                while (video := await actor.get_video.remote(video_id)).status is not VideoStatus.COMPLETED:
                    assert video.error is None
                    await asyncio.sleep(0.01)
            assert engine.journal(video_id).count("ended") >= 1
        expected = {f"videos/{video_id}-0.{extension}" for video_id in ids for extension in ("mp4", "webp", "jpg")}
        await until(lambda: files(args) == expected)
        assert len((await actor.list_videos.remote(None, 100, "desc")).videos) == len(ids)

    async def test_stops_the_engine_when_a_running_video_is_deleted(self, actor, engine):
        engine.allow("video_1", 1)
        await actor.create_video.remote(a_job(), INPUTS, "wan")
        await until(lambda: engine.journal("video_1"))
        await actor.delete_video.remote("video_1")
        assert engine.journal("video_1") == ["began", "stopped"]


async def test_an_error_that_crossed_ray_is_told_without_its_traceback(ray_cluster, args):
    @ray.remote(num_cpus=0)
    def rank(error: Exception) -> None:
        raise error

    class RemoteEngine:
        async def generate(self, job, media, *, progress):
            yield await rank.remote(errors[job.id])

    errors = {
        "video_invalid": InvalidJob("Too many frames"),
        "video_refused": APIError(500, "Out of memory"),
        "video_broken": RuntimeError("/secret/path"),
    }
    state = State(args, RemoteEngine)
    told = {}
    for video_id in errors:
        await state.create_video(a_job(video_id, images=()), {}, "wan")
        told[video_id] = (await finished(state, video_id)).error
    assert told == {
        "video_invalid": VideoError("invalid_request_error", "Too many frames"),
        "video_refused": VideoError("server_error", "Out of memory"),
        "video_broken": VideoError(
            "server_error", "The server failed on this video; its log says why under the video's id"
        ),
    }
    await state.close()
