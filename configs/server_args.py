"""`ServerArgs`: the one model behind the command line's flags, the YAML's `args` and Python."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, StringConstraints, model_validator

from configs.parallel import ParallelDims

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "bf16", "fp16", "fp32"]

ApiKey = Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]+$")]
"""What an Authorization header can carry: printable ASCII without spaces."""

Origin = Annotated[str, StringConstraints(pattern=r"^(\*|https?://[^/\s]+)$")]
"""What a browser says of where a page comes from: scheme, host and port, without a path; `*` is any."""

_ONE_OR_SEVERAL = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""A single one need not be written as a list."""

ApiKeys = Annotated[tuple[ApiKey, ...], _ONE_OR_SEVERAL]
Origins = Annotated[tuple[Origin, ...], _ONE_OR_SEVERAL]


class ServerArgs(BaseModel):
    """Everything a server is started with. Unknown keys are errors. Names and meanings are SGLang Diffusion's."""

    # An error that quotes its input could quote an API key.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), hide_input_in_errors=True)

    model_path: str | None = Field(
        None,
        description="Diffusers model: a local folder or a Hugging Face repo id. Default: the small bundled model.",
    )
    served_model_name: str | None = Field(None, description="Model id in the API. Default: the model path.")
    host: str = Field("127.0.0.1", description="Address the HTTP server listens on.")
    port: int = Field(30000, ge=1, le=65535, description="Port the HTTP server listens on.")
    public_url: str | None = Field(
        None, description="Base URL that clients reach the server at; makes the URLs in responses absolute."
    )

    api_key: ApiKeys = Field(
        (),
        repr=False,
        description="API key that /v1 requires; repeatable. Command lines are not secret: prefer a file.",
    )
    api_key_file: str | None = Field(None, description="File of such keys, one per line.")
    admin_api_key: ApiKeys = Field(
        (), repr=False, description="API key that the LoRA routes require and all other routes accept; repeatable."
    )
    admin_api_key_file: str | None = Field(None, description="File of such keys, one per line.")

    allowed_origin: Origins = Field(
        (),
        description="Origin (https://app.example.org, or * for any) whose pages may call from a browser; repeatable.",
    )

    # OpenAI's largest picture, and its longest clip (20 s) at 60 frames per second.
    max_pixels: int = Field(3840 * 2160, ge=1, description="Most pixels per frame that a request may ask for.")
    max_frames: int = Field(1200, ge=1, description="Most frames per video that a request may ask for.")
    # OpenAI's limit for one input image.
    max_upload_bytes: int = Field(50 * 10**6, ge=1, description="Largest image that a request may upload, in bytes.")
    allow_remote_media: bool = Field(
        False, description="Fetch input images given as http(s) URLs, from public addresses only."
    )

    num_gpus: int = Field(
        1, ge=1, description="Total number of ranks. Without CUDA they are CPU processes that talk over gloo."
    )
    dp_size: int = Field(1, ge=1, description="Engine replicas, each with num_gpus / dp_size ranks.")
    sp_degree: int | None = Field(None, ge=1, description="Sequence-parallel ranks: ulysses_degree * ring_degree.")
    ulysses_degree: int | None = Field(None, ge=1, description="Ulysses (all-to-all over heads) degree.")
    ring_degree: int | None = Field(None, ge=1, description="Ring attention degree.")
    enable_cfg_parallel: bool = Field(
        False, description="Run the two branches of classifier-free guidance on different ranks."
    )

    device: Device = Field("auto", description="Where the ranks compute; auto is CUDA if available.")
    dtype: Dtype = Field(
        "auto",
        description="Precision of every component; auto is bf16 on hardware with native bf16 arithmetic, else fp32, "
        "and fp32 for Wan's VAE on CUDA.",
    )
    attention_backend: str | None = Field(
        None,
        description="Attention kernel, by its name in diffusers (native, flash, sage, …) or SGLang (torch_sdpa, fa, "
        "sage_attn). Not with ring attention, which has its own kernel.",
    )
    enable_torch_compile: bool = Field(False, description="Compile the transformer's blocks with torch.compile.")
    text_encoder_cpu_offload: bool = Field(False, description="Keep text encoders in host memory between uses.")
    vae_cpu_offload: bool = Field(False, description="Keep the VAE in host memory between uses.")
    dit_cpu_offload: bool = Field(False, description="Keep the diffusion transformer in host memory between jobs.")
    dit_layerwise_offload: bool = Field(
        False, description="Stream the diffusion transformer's layers from host memory, one block ahead."
    )
    pin_cpu_memory: bool = Field(True, description="Pin the host memory of offloaded components.")

    lora_path: str | None = Field(
        None, description="Adapter merged at start: a .safetensors file, a folder or a Hugging Face repo id."
    )
    lora_nickname: str = Field("default", min_length=1, description="Nickname of the adapter merged at start.")
    lora_scale: FiniteFloat = Field(1.0, description="Strength of the adapter merged at start.")
    lora_switch: Literal["refuse", "auto"] = Field(
        "refuse",
        description="What set_lora does while another adapter is merged: refuse with 409, or switch to the new one.",
    )
    lora_dir: str | None = Field(
        None,
        description="The only folder adapters may be loaded from; paths are relative to it, and repo ids are refused. "
        "Default: any file the ranks can read, and any Hugging Face repo.",
    )
    lora_restore: Literal["copy", "reload"] = Field(
        "copy",
        description="Where the original weights come from when an adapter is unmerged: copies in host memory, or the "
        "model's files (slower, but takes no memory).",
    )
    lora_cache_bytes: int = Field(
        4 * 2**30,
        ge=0,
        description="Host memory for loaded adapters, in bytes; the least recently used are dropped first.",
    )

    max_queue: int = Field(
        256,
        ge=1,
        description="Most images waiting per engine replica, and most unfinished videos in total; beyond that, 429.",
    )
    max_retries: int = Field(3, ge=0, description="How often a video is restarted after its workers died.")
    job_timeout: float | None = Field(
        None, gt=0, description="Seconds a job may compute before it fails; time in the queue does not count."
    )
    no_preemption: bool = Field(
        False, description="Let a running video finish instead of pausing it between two steps for images."
    )

    output_path: str = Field(
        "outputs", min_length=1, description="Where images and videos are stored: a folder or an fsspec URL."
    )
    state_path: str = Field("outputs/jobs.sqlite3", min_length=1, description="SQLite file that holds the video jobs.")
    video_ttl: float | None = Field(
        None,
        gt=0,
        description="Seconds that finished videos and stored images are kept. Default: until a client deletes them.",
    )
    storage_bytes: int | None = Field(
        None, ge=0, description="Most bytes of finished videos and stored images; beyond that, the oldest are deleted."
    )
    num_cpus_per_rank: float = Field(
        0.1,
        gt=0,
        description="CPUs each rank reserves in Ray (for scheduling only; its threads follow the machine).",
    )
    metrics_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port of the Prometheus metrics. Default: a random free one. Not used when joining a cluster.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Level of the server's log.")
    log_format: Literal["text", "json"] = Field("text", description="Lines of the server's log.")

    @model_validator(mode="before")
    @classmethod
    def _empty_means_absent(cls, values: Any) -> Any:
        """YAML writes an unset key as `key:`, which reads as null: the default then."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _degrees_agree(self) -> ServerArgs:
        _ = self.parallel
        return self

    @model_validator(mode="after")
    def _ring_has_its_kernel(self) -> ServerArgs:
        if self.attention_backend is not None and self.parallel.ring_degree > 1:
            raise ValueError("attention_backend: ring attention has a kernel of its own; leave it out")
        return self

    @model_validator(mode="after")
    def _offloads_agree(self) -> ServerArgs:
        if self.dit_cpu_offload and self.dit_layerwise_offload:
            raise ValueError("dit_cpu_offload and dit_layerwise_offload exclude each other: choose one")
        return self

    @property
    def parallel(self) -> ParallelDims:
        """The parallel axes. Raises `ValueError` with the equation when they do not multiply to `num_gpus`."""
        return ParallelDims.resolve(
            self.num_gpus,
            dp_size=self.dp_size,
            enable_cfg_parallel=self.enable_cfg_parallel,
            sp_degree=self.sp_degree,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
        )
