"""From a model path to a model on this rank."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from pydantic import ValidationError
from torch import nn

from configs.model_family import ModelCard, ModelFamily, family_in
from configs.server_args import ServerArgs
from pipelines.job import InvalidJob, Task
from pipelines.model import bundled
from pipelines.model.convolution import skip_padding
from pipelines.model.encodings import EncodingMemory
from pipelines.model.offload import place
from pipelines.model.precision import dtype_name, resolve_device, resolve_dtype, resolve_vae_dtype
from pipelines.reasons import first_line

if TYPE_CHECKING:
    from pipelines.parallel.guidance import Guidance
    from pipelines.parallel.mesh import Mesh

TRANSFORMERS = ("transformer", "transformer_2", "unet")
"""Pipelines' names for the components that denoise."""


@dataclass(frozen=True)
class Model:
    """What one rank holds. Jobs share its modules, and nothing else."""

    card: ModelCard
    directory: Path
    """Where its files are, in the diffusers layout."""
    pipeline: DiffusionPipeline
    """As loaded. Jobs run on views of it."""
    pipeline_classes: Mapping[Task, type[DiffusionPipeline]]
    transformers: Mapping[str, nn.Module]
    """The modules that denoise and that adapters are merged into: `transformer`, and `transformer_2` of two experts."""
    mesh: Mesh | None
    guidance: Guidance | None
    """Set in a gang whose halves compute one branch of guidance each."""
    device: torch.device
    dtype: torch.dtype
    encodings: EncodingMemory
    """Cached encodings of the texts that this rank encoded."""
    rest_transformers: Callable[[], None]
    """Sends offloaded transformers back to host memory: after a job's last step, to make room for the decoder, and
    before an adapter is merged, because the merge must edit the host tensors and not a copy."""

    def pipeline_for(self, task: Task) -> DiffusionPipeline:
        """A view for one job, made in milliseconds: the task's pipeline class over the shared modules, with its own
        scheduler, so that jobs can take turns.

        Raises:
            InvalidJob: the model cannot do this task.
        """
        view = self.unshared_pipeline_for(task)
        if self.mesh is not None:
            from pipelines.parallel.encode import share_encodings

            share_encodings(view, self.mesh)
        return view

    def unshared_pipeline_for(self, task: Task) -> DiffusionPipeline:
        """The same for one rank alone, which encodes for itself and so must have the encoders."""
        if task not in self.pipeline_classes:
            raise InvalidJob(f"This model cannot do {task}; it can do {', '.join(self.pipeline_classes)}")
        view = view_of(self.pipeline, self.pipeline_classes[task])
        self.encodings.attach(view)
        return view


def load_model(args: ServerArgs, mesh: Mesh | None = None) -> Model:
    """Load the model that `args` names onto this rank's device, in its precision, sharded over `mesh`.

    Ranks other than 0 load no text encoders: they receive what rank 0 encodes.

    Raises:
        ValueError: the path, the model's files or the combination of options is unusable. The message is one line.
    """
    device = resolve_device(args.device) if mesh is None else mesh.device
    dtype = resolve_dtype(args.dtype, device)
    directory = model_directory(args.model_path)
    model_index = read_model_index(directory)
    family = read_family(directory)
    if mesh is not None and (family is None or not family.sharded):
        raise ValueError(
            f"{model_index['_class_name']} cannot be sharded over {mesh.size} ranks: serve it on one (--num-gpus 1)"
        )
    _, vae_class = model_index.get("vae", (None, None))
    vae_dtype = resolve_vae_dtype(args.dtype, device, vae_class)
    leads = mesh is None or mesh.rank == 0
    offloaded = args.dit_cpu_offload or args.dit_layerwise_offload
    pipeline = load_pipeline(
        directory,
        model_index,
        {"default": dtype, "vae": vae_dtype},
        without=() if leads else prompt_components(model_index),
        transformers_to=None if offloaded or device.type == "cpu" else device,
    )
    if family is None:
        from pipelines.model.derived_family import derive_family

        family = derive_family(pipeline)
    modules = {name: module for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    transformers = {name: modules[name] for name in TRANSFORMERS if name in modules}
    if device.type == "cpu" and "vae" in modules:
        skip_padding(modules["vae"])
    # The order matters: sharding wraps attention with the kernel chosen for it, blocks are compiled with sharding's
    # hooks, and moving weights to the device wraps all of these.
    if args.attention_backend is not None:
        for transformer in transformers.values():
            set_attention_backend(transformer, args.attention_backend)
    guidance = None if mesh is None else shard(transformers, mesh)
    if args.enable_torch_compile:
        for transformer in transformers.values():
            # Sharding and streaming put hooks on blocks, which break the graph.
            compile_blocks(transformer, fullgraph=mesh is None and not args.dit_layerwise_offload)
    rest_transformers = place(modules, transformers, args, device)
    return Model(
        card=ModelCard(
            id=args.served_model_name or args.model_path or "ditserve",
            pipeline_class=type(pipeline).__name__,
            family=family,
            dtype=dtype_name(dtype),
            vae_dtype=dtype_name(vae_dtype),
            device=device.type,
            num_gpus=args.num_gpus,
            created=int(time.time()),
        ),
        directory=directory,
        pipeline=pipeline,
        pipeline_classes={Task(task): getattr(diffusers, name) for task, name in family.tasks.items()},
        transformers=transformers,
        mesh=mesh,
        guidance=guidance,
        device=device,
        dtype=dtype,
        encodings=EncodingMemory(),
        rest_transformers=rest_transformers,
    )


def model_directory(model_path: str | None) -> Path:
    """The local folder of a model: the path itself, a downloaded Hugging Face repository, or for None the bundled one.

    Raises:
        ValueError: there is no such folder, and no such repository can be downloaded.
    """
    if model_path is None:
        return bundled.model_directory()
    directory = Path(model_path).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or model_path.count("/") != 1 or model_path.startswith((".", "/", "~")):
        raise ValueError(f"There is no folder '{model_path}'")
    try:
        # Downloads only what the pipeline needs in the diffusers layout, and never a pickle.
        return Path(DiffusionPipeline.download(model_path, use_safetensors=True))
    except Exception as error:
        raise ValueError(
            f"'{model_path}' is neither a folder here nor a repository that could be downloaded: {first_line(error)}"
        ) from error


def read_model_index(directory: Path) -> Mapping[str, Any]:
    """`model_index.json`: the pipeline's class, and the library and class of each component.

    Raises:
        ValueError: the file is missing or invalid.
    """
    path = directory / "model_index.json"
    if not path.is_file():
        raise ValueError(f"'{directory}' is not a diffusers model: it has no model_index.json")
    try:
        model_index = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(model_index, dict) or "_class_name" not in model_index:
        raise ValueError(f"'{path}' names no pipeline class")
    return model_index


def read_family(directory: Path) -> ModelFamily | None:
    """The model's family, with the changes in its `ditserve.yaml`; None if no known family matches.

    Raises:
        ValueError: its `ditserve.yaml` describes no valid family.
    """
    try:
        return family_in(directory)
    except ValidationError as error:
        findings = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
        raise ValueError(f"'{directory / 'ditserve.yaml'}' does not describe a model family: {findings}") from error


def prompt_components(model_index: Mapping[str, Any]) -> tuple[str, ...]:
    """Text and image encoders, their tokenizers and processors: every component from the transformers library."""
    return tuple(name for name, value in model_index.items() if isinstance(value, list) and value[0] == "transformers")


def load_pipeline(
    directory: Path,
    model_index: Mapping[str, Any],
    dtypes: dict[str, torch.dtype],
    without: tuple[str, ...] = (),
    transformers_to: torch.device | None = None,
) -> DiffusionPipeline:
    """Load every component except those in `without`, onto the CPU.

    Args:
        dtypes: precision by component; `default` applies to all others.
        transformers_to: load the components that denoise straight to this device, tensor by tensor. Otherwise, if the
            files have another precision, each rank of a node holds them in host memory for a while: 4 ranks of Wan 14B
            take 114 GB.

    Raises:
        ValueError: diffusers has no such pipeline, or the files do not fit together; the message then has the first
            line of the library's reason.
    """
    # The class itself and not DiffusionPipeline, which does not know its optional components and would load them.
    pipeline_class = getattr(diffusers, model_index["_class_name"], None)
    if pipeline_class is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no pipeline '{model_index['_class_name']}'")
    # Progress bars would fill a server's log.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    components: dict[str, Any] = dict.fromkeys(without)
    try:
        if transformers_to is not None:
            components |= load_transformers(directory, model_index, dtypes, transformers_to)
        return pipeline_class.from_pretrained(directory, dtype=dtypes, use_safetensors=True, **components)
    except torch.OutOfMemoryError:  # of a device that another process is still leaving: it may fit the next time
        raise
    # The libraries report broken files as OSError, ValueError, RuntimeError, KeyError, SafetensorError and more.
    except Exception as error:
        raise ValueError(f"The model in '{directory}' cannot be loaded: {first_line(error)}") from error


def load_transformers(
    directory: Path, model_index: Mapping[str, Any], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> dict[str, ModelMixin]:
    """What denoises, by name, loaded straight to `device`. Raises whatever the libraries raise."""
    classes = {name: model_index[name][1] for name in TRANSFORMERS if model_index.get(name, [None])[0] is not None}
    return {
        name: getattr(diffusers, class_name).from_pretrained(
            directory / name,
            torch_dtype=dtypes.get(name, dtypes["default"]),
            device_map={"": device},
            use_safetensors=True,
        )
        for name, class_name in classes.items()
    }


def shard(transformers: Mapping[str, nn.Module], mesh: Mesh) -> Guidance | None:
    """Spread the transformers over the mesh, and the branches of guidance over its halves if it has two.

    Raises:
        ValueError: one of them cannot be sharded.
    """
    from pipelines.parallel.guidance import share_guidance
    from pipelines.parallel.sequence import shard_sequence

    for transformer in transformers.values():
        shard_sequence(transformer, mesh)
    return share_guidance(transformers.values(), mesh) if mesh.dims.cfg_degree > 1 else None


SGLANG_ATTENTION_BACKENDS = {"torch_sdpa": "native", "fa": "flash", "sage_attn": "sage"}
"""SGLang Diffusion's names for kernels that diffusers has too, each with diffusers' name."""


def set_attention_backend(transformer: ModelMixin, name: str) -> None:
    """Make the transformer use the attention kernel of this name, which is diffusers' or SGLang Diffusion's.

    Raises:
        ValueError: there is no such kernel, it does not run here, or the transformer would not use it.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    from pipelines.parallel.dispatch import have_dispatched

    name = SGLANG_ATTENTION_BACKENDS.get(name, name)
    names = [backend.value for backend in AttentionBackendName]
    if name not in names:
        raise ValueError(f"There is no attention_backend '{name}'; there are {', '.join(names)}")
    processors = [have_dispatched(module) for module in transformer.modules() if hasattr(module, "processor")]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(f"attention_backend: {type(transformer).__name__} has no choice of kernels; leave it out")
    try:
        transformer.set_attention_backend(name)
    # Kernels that are not installed, or not for this machine, raise ImportError, RuntimeError or ValueError.
    except Exception as error:
        raise ValueError(f"attention_backend {name} cannot be used here: {first_line(error)}") from error


def compile_blocks(transformer: ModelMixin, *, fullgraph: bool) -> None:
    """Compile the model's repeated blocks, which share one graph; the whole model if it names none."""
    if getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(fullgraph=fullgraph)
    else:
        transformer.compile()


def view_of(pipeline: DiffusionPipeline, view_class: type[DiffusionPipeline]) -> DiffusionPipeline:
    """Another pipeline over the same modules, of any class that can use them, with a fresh scheduler.

    It keeps the spatial scale factor: `WanVideoToVideoPipeline` counts the VAE's stages and misses Wan 2.2's patches.
    """
    module_names, option_names = view_class._get_signature_keys(view_class)
    arguments = {name: getattr(pipeline, name, None) for name in module_names}
    arguments |= {name: pipeline.config[name] for name in option_names if name in pipeline.config}
    arguments["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    view = view_class(**arguments)
    if hasattr(view, "vae_scale_factor_spatial"):
        view.vae_scale_factor_spatial = pipeline.vae_scale_factor_spatial
    return view
