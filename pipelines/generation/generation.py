"""A job as an iterator: each `next()` advances an untouched diffusers pipeline by one denoising step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipelines.generation.arguments import call_arguments
from pipelines.generation.previews import DenoisedEstimate, can_decode_latents, decode_latents, preview_steps
from pipelines.generation.stepping import Pace, StepBar, iterate
from pipelines.generation.stopwatch import Stopwatch
from pipelines.job import Event, FailedAlone, InvalidJob, Job, Media, OutputDone, Preview, Progress, Result
from pipelines.media.canvas import Canvas
from pipelines.media.encode import encode_image
from pipelines.media.outputs import asked_frames, encode_output, to_frame
from pipelines.media.uploads import MAX_INPUT_PIXELS, decode_image, decode_mask
from pipelines.model.load import Model


def generate(model: Model, job: Job, media: Media) -> Generator[Event, None, None]:
    """Compute `job`: a `Progress` after every denoising step, `Preview`s on the way, a `Result` at the end.

    Nothing runs between two `next()` calls. Several generations may be advanced in turn, in any order, from the thread
    that started them, and each yields the same pixels as when it runs alone. `close()` ends a generation in the step
    where it is suspended and leaves the model unchanged.

    In a gang every rank advances the same generation in lock step, and all yield the same `Progress` and `OutputDone`.
    Only rank 0 decodes: it yields the previews, each before the `Progress` of its step, and the outputs. The `Result`
    of the other ranks has no outputs.

    Raises:
        InvalidJob: an input is not an image, or the pipeline itself rejects an argument.
        FailedAlone: rank 0 could not decode or encode; the others reach their next `Progress` or `OutputDone`.
    """
    return iterate(lambda emit: Generation(model, job, emit).run(*decoded_inputs(job, media)))


def decoded_inputs(job: Job, media: Media) -> tuple[list[Image.Image], Image.Image | None]:
    """The job's images, and its mask as diffusers expects it: white is edited."""
    images = [decode_image(media[key], max_pixels=MAX_INPUT_PIXELS) for key in job.images]
    if job.mask is None:
        return images, None
    return images, decode_mask(media[job.mask], size=images[0].size, max_pixels=MAX_INPUT_PIXELS)


class Generation:
    """One job running through the pipeline, on the stack that `iterate` suspends."""

    def __init__(self, model: Model, job: Job, emit: Callable[[Event], object]):
        self.model = model
        self.job = job
        self.stopwatch = Stopwatch("encode", "denoise", "decode", "media")
        self._emit = emit
        self._canvas = Canvas.for_job(job, model.card.family)
        self._leads = model.mesh is None or model.mesh.rank == 0
        self._pace = Pace(model.device)
        self._outputs_done = 0
        self._encodings: list[Any] = []
        self._arguments: dict[str, Any] = {}
        self._estimate: DenoisedEstimate | None = None

    def run(self, images: list[Image.Image], mask: Image.Image | None) -> None:
        """One pipeline call per seed. Only the noise differs between calls, so prompts are encoded once."""
        job = self.job
        pipeline = self.model.pipeline_for(job.task)
        if job.flow_shift is not None:
            pipeline.scheduler = with_flow_shift(pipeline.scheduler, job.flow_shift)
        self._arguments = call_arguments(type(pipeline), self.model.card.family, job, images, mask)
        if job.partial_images and self._leads and can_decode_latents(pipeline):
            self._estimate = DenoisedEstimate(pipeline.scheduler)
        if self.model.guidance is not None:
            self.model.guidance.attend(pipeline.scheduler)
        refuse_as_invalid_job(pipeline)
        pipeline.progress_bar = self._progress_bar
        # This also moves a suspended job's offloaded transformers off the GPU, to make room for an offloaded encoder.
        self.model.rest_transformers()

        outputs = []
        try:
            for seed in job.seeds:
                self.stopwatch.enter("encode")
                with encoded_once(pipeline, self._encodings):
                    pixels = pipeline(
                        **self._arguments,
                        # A CPU generator gives the same noise for a seed on every device.
                        generator=torch.Generator("cpu").manual_seed(seed),
                        output_type="pt" if self._leads else "latent",
                        return_dict=False,
                    )[0]
                self._pace.finish()
                self.stopwatch.enter("media")
                if self._leads:
                    outputs.append(encode_output(pixels, job, self._canvas))
                if self._others_wait_for_the_next:
                    self._give(OutputDone())
                self._outputs_done += 1
        except Exception as error:
            if self._leads and self.stopwatch.stage in ("decode", "media") and self._others_wait_for_the_next:
                raise FailedAlone from error
            raise
        finally:
            self.model.rest_transformers()
            dismantle(pipeline)
        self.stopwatch.stop()
        self._emit(Result(tuple(outputs), self.stopwatch.seconds))

    @property
    def _others_wait_for_the_next(self) -> bool:
        """Whether there are other ranks and another output after this one."""
        return self.model.mesh is not None and self._outputs_done + 1 < len(self.job.seeds)

    def _progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> StepBar:
        """Replaces the pipeline's own progress bar."""
        self.stopwatch.enter("denoise")
        return StepBar(range(total) if total is not None else list(iterable or ()), self._step_done)

    def _step_done(self, step: int, steps: int) -> None:
        if step < steps:
            self._pace.step()
        else:
            self._pace.finish()
        if self._estimate is not None and self._outputs_done == 0:
            self._give_preview(self._estimate, step, preview_steps(steps, self.job.partial_images))
        self._give(Progress(self._outputs_done * steps + step, len(self.job.seeds) * steps))
        if step == steps:
            self.model.rest_transformers()
            self.stopwatch.enter("decode")

    def _give_preview(self, estimate: DenoisedEstimate, step: int, due: list[int]) -> None:
        if step not in due:
            return
        # Unshared: the other ranks make no previews and would not join a collective.
        pipeline = self.model.unshared_pipeline_for(self.job.task)
        try:
            with encoded_once(pipeline, self._encodings):
                pixels = decode_latents(pipeline, estimate.latents(), self._arguments)
            frame = to_frame(asked_frames(pixels, self.job, self._canvas)[0])
            data = encode_image(frame, self.job.output_format, self.job.output_compression)
        except Exception as error:
            if self.model.mesh is not None:
                raise FailedAlone from error
            raise
        finally:
            dismantle(pipeline)
        self._give(Preview(due.index(step), data))

    def _give(self, event: Event) -> None:
        with self.stopwatch.paused():
            self._emit(event)


def with_flow_shift(scheduler: Any, flow_shift: float) -> Any:
    """The same scheduler with its sigmas shifted by `flow_shift`, whatever the number of tokens."""
    name = "flow_shift" if "flow_shift" in scheduler.config else "shift"
    return type(scheduler).from_config(scheduler.config, **{name: flow_shift, "use_dynamic_shifting": False})


@contextmanager
def encoded_once(pipeline: DiffusionPipeline, recording: list[Any]) -> Iterator[None]:
    """Make the n-th call of `pipeline.encode_prompt`, if it exists, return the n-th entry of `recording`, computed if
    missing.

    Calls are matched by order, not by arguments: each call of a pipeline for one job makes the same `encode_prompt`
    calls, and in a gang such a call is a collective, which all ranks must make or none.
    """
    if not hasattr(pipeline, "encode_prompt"):
        yield
        return
    encode_prompt = pipeline.encode_prompt
    numbers = itertools.count()

    def recorded_encode_prompt(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        if number == len(recording):
            recording.append(encode_prompt(*args, **kwargs))
        return recording[number]

    pipeline.encode_prompt = recorded_encode_prompt
    try:
        yield
    finally:
        pipeline.encode_prompt = encode_prompt


def refuse_as_invalid_job(pipeline: DiffusionPipeline) -> None:
    """Report what the pipeline's `check_inputs` rejects as the client's error. Any later ValueError is the server's."""
    if not hasattr(type(pipeline), "check_inputs"):
        return
    check_inputs = pipeline.check_inputs

    def checked(*args: Any, **kwargs: Any) -> None:
        try:
            check_inputs(*args, **kwargs)
        except ValueError as error:
            raise InvalidJob(str(error)) from error

    pipeline.check_inputs = checked


def dismantle(pipeline: DiffusionPipeline) -> None:
    """Free a view's latents and embeddings now.

    The overrides on a view refer back to it, and the interpreter collects such cycles too rarely for GPU memory.
    """
    vars(pipeline.scheduler).clear()
    vars(pipeline).clear()
