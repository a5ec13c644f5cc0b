"""What is trained, on what, and for how long: everything that decides the weights except the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the three networks. Compression is always 8x in space and 4x in time, into 16 channels."""

    vae_encoder_dim: int
    vae_decoder_dim: int
    """Channels at half the resolution; twice as many at a quarter of it, four times at an eighth."""
    text_dim: int
    text_layers: int
    heads: int
    """A multiple of 4, so that a gang of up to 4 ranks can share them."""
    head_dim: int
    layers: int
    latent_channels: int = 16

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Bucket:
    """A shape of batches. `width` and `height` are multiples of 16, `num_frames` is 4k + 1."""

    width: int
    height: int
    num_frames: int
    batch_size: int
    weight: float = 1.0
    """How often it is drawn, relative to the others of its phase."""
    token_share: float = 1.0
    """Share of a sample's tokens, drawn anew for each batch, that the transformer is trained on."""


@dataclass(frozen=True)
class Phase:
    until: float
    """The share of the stage's steps after which the next phase begins; 1.0 in the last one."""
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True)
class StageRecipe:
    steps: int
    phases: tuple[Phase, ...]
    matrix_learning_rate: float
    """Muon's, for everything with two or more dimensions inside the network."""
    learning_rate: float
    """AdamW's, for embeddings, norms, biases, and first and last layers."""
    warmup_steps: int = 20
    decay_share: float = 0.3
    """Share of the steps, at the end, over which the rates fall linearly to zero. Until then they are constant, so that
    a run can be extended after the fact."""
    ema_decay: float = 0.999

    def phase_at(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps or phase is self.phases[-1])

    def draw_bucket(self, step: int, random: Random) -> Bucket:
        """One of the buckets of the step's phase, drawn by weight."""
        buckets = self.phase_at(step).buckets
        return random.choices(buckets, [each.weight for each in buckets])[0]

    def rate_at(self, step: int) -> float:
        """The factor on the learning rates at this step, counted from 0."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = min(1.0, (self.steps - step) / max(1.0, self.decay_share * self.steps))
        return warmup * max(0.0, decay)


@dataclass(frozen=True)
class Recipe:
    nouns: int
    shape: ModelShape
    vae: StageRecipe
    motion: StageRecipe
    dit: StageRecipe
    lora: StageRecipe
    cached_pixels: int
    """Pixels, in each bucket of images, of scenes that are encoded once and seen again in each epoch; 0 encodes new
    ones for every step, which on a GPU takes a twentieth of a step's time."""
    cached_clip_pixels: int = 0
    """The same for each bucket of videos, counting all frames."""
    moving_share: float = 0.5
    """Share of videos in which one subject moves left, right, up or down, besides those that do so by chance (1 in 5).
    Without them, 5,000 videos had taught no motion at all."""
    caption_dropout: float = 0.1
    """Share of samples trained without their caption, for classifier-free guidance (Ho & Salimans 2022: 0.1-0.2)."""
    first_frame_share: float = 0.4
    """Share of video batches that are given their first frame, as in image to video."""
    lora_rank: int = 8
    seed: int = 0
    defaults: dict[str, int | float] = field(default_factory=dict)
    """Request defaults when the model is served, from the `defaults` of its `ditserve.yaml`; the size is for videos."""
    picture_size: int = 256
    """Width and height of images, if a request names none."""


_CPU_STILL = Bucket(128, 128, 1, 64)

# Sized so that two cores show something within hours: few nouns, small images first (at 96x96 a sample costs half of
# what it does at 128x128), then short videos, in thumbnails, then all sizes.
CPU = Recipe(
    nouns=48,
    shape=ModelShape(
        vae_encoder_dim=16,
        vae_decoder_dim=24,
        text_dim=128,
        text_layers=2,
        heads=4,
        head_dim=48,
        layers=6,
    ),
    vae=StageRecipe(
        steps=1600,
        phases=(
            Phase(0.6, (Bucket(128, 128, 1, 8),)),
            # At least a third are videos, of up to 17 frames: with fewer and shorter ones colours drift after frame 5.
            Phase(1.0, (Bucket(128, 128, 1, 8), Bucket(64, 64, 9, 4, 0.6), Bucket(64, 64, 17, 2, 0.4))),
        ),
        matrix_learning_rate=1e-3,
        learning_rate=1e-3,
        ema_decay=0.99,
    ),
    motion=StageRecipe(
        steps=700,
        phases=(Phase(1.0, (Bucket(128, 128, 1, 8, 0.5), Bucket(96, 96, 9, 4), Bucket(96, 96, 17, 2))),),
        matrix_learning_rate=1e-3,
        learning_rate=1e-3,
        ema_decay=0.99,
    ),
    dit=StageRecipe(
        steps=12_500,
        phases=(
            Phase(0.16, (Bucket(96, 96, 1, 96),)),
            Phase(0.2414, (_CPU_STILL,)),
            Phase(
                0.4384,
                (
                    Bucket(64, 64, 9, 144, 2.0),  # the cheapest way to learn a direction: 48 tokens a video
                    Bucket(96, 96, 9, 72),
                    _CPU_STILL,
                    Bucket(256, 256, 1, 32, 0.5),
                    Bucket(512, 512, 1, 8, 0.3),
                ),
            ),
            Phase(
                0.6803,
                (
                    _CPU_STILL,
                    Bucket(256, 256, 1, 32, 0.8),
                    Bucket(384, 256, 1, 21, 0.2),
                    Bucket(256, 384, 1, 21, 0.2),
                    Bucket(512, 512, 1, 8, 0.5),
                    Bucket(1024, 1024, 1, 2, 0.15),
                    Bucket(64, 64, 9, 144, 0.3),
                    Bucket(96, 96, 9, 72, 0.7),
                    Bucket(128, 128, 17, 24, 2.0),
                    Bucket(512, 288, 17, 3, 0.3),
                ),
            ),
            # Large images and videos, on some 800 tokens of each, at 2 to 3 s a step.
            Phase(
                0.8642,
                (
                    Bucket(256, 256, 1, 32, 0.6),
                    Bucket(512, 512, 1, 16, 1.0, token_share=0.5),
                    Bucket(1024, 1024, 1, 8, 1.2, token_share=0.25),
                    Bucket(128, 128, 17, 24, 0.6),
                    Bucket(256, 256, 17, 10, 1.8, token_share=0.5),
                    Bucket(512, 288, 17, 10, 0.3, token_share=0.25),
                ),
            ),
            Phase(
                0.9039,
                (
                    Bucket(256, 256, 1, 32),
                    Bucket(512, 512, 1, 8, 0.8),
                    Bucket(1024, 1024, 1, 2, 0.8),
                    Bucket(128, 128, 17, 24, 0.6),
                    Bucket(256, 256, 17, 6, 1.6),
                    Bucket(512, 288, 17, 2, 0.3),
                ),
            ),
            Phase(
                0.957,
                (
                    Bucket(256, 256, 1, 32, 0.6),
                    Bucket(512, 512, 1, 16, 0.8, token_share=0.5),
                    Bucket(1024, 1024, 1, 8, 0.8, token_share=0.25),
                    Bucket(256, 256, 17, 10, 2.0, token_share=0.5),
                    Bucket(512, 288, 17, 10, 0.5, token_share=0.25),
                ),
            ),
            Phase(
                1.0,
                (
                    Bucket(256, 256, 1, 32, 0.8),
                    Bucket(512, 512, 1, 8, 0.8),
                    Bucket(1024, 1024, 1, 2, 1.0),
                    Bucket(256, 256, 17, 6, 2.0),
                    Bucket(512, 288, 17, 2, 0.4),
                ),
            ),
        ),
        matrix_learning_rate=2e-3,
        learning_rate=1e-3,
        decay_share=0.15,
        ema_decay=0.998,
    ),
    lora=StageRecipe(
        steps=700, phases=(Phase(1.0, (Bucket(128, 128, 1, 24),)),), matrix_learning_rate=1e-3, learning_rate=1e-3
    ),
    cached_pixels=3 * 2**26,
    # 240 videos of 256x256 (2**28) were too few: a loss of 0.13 on them, 0.19 on others. This makes 1204.
    cached_clip_pixels=5 * 2**28,
    moving_share=0.3,
    defaults={"width": 256, "height": 256, "num_frames": 17, "num_inference_steps": 8, "guidance_scale": 3.0},
)

_GPU_STILLS = (
    Bucket(256, 256, 1, 256, 2.0),
    Bucket(320, 192, 1, 256),
    Bucket(192, 320, 1, 256),
    Bucket(384, 384, 1, 96),
    Bucket(512, 288, 1, 96),
    Bucket(512, 512, 1, 48),
    Bucket(128, 128, 1, 512, 0.5),
)
_GPU_CLIPS = (
    Bucket(256, 256, 17, 48, 2.0),
    Bucket(256, 144, 33, 48),
    Bucket(512, 288, 17, 16),
    Bucket(512, 288, 33, 8),
)

GPU = Recipe(
    nouns=160,
    shape=ModelShape(
        vae_encoder_dim=24,
        vae_decoder_dim=32,
        text_dim=192,
        text_layers=3,
        heads=4,
        head_dim=64,
        layers=10,
    ),
    vae=StageRecipe(
        steps=30_000,
        phases=(
            Phase(0.3, (Bucket(128, 128, 1, 64), Bucket(256, 256, 1, 24))),
            Phase(1.0, (Bucket(256, 256, 1, 24), Bucket(96, 96, 17, 12), Bucket(128, 128, 9, 12))),
        ),
        matrix_learning_rate=1e-3,
        learning_rate=1e-3,
    ),
    motion=StageRecipe(
        steps=10_000,
        phases=(Phase(1.0, (Bucket(256, 256, 1, 24, 0.5), Bucket(96, 96, 17, 12), Bucket(128, 128, 9, 12))),),
        matrix_learning_rate=1e-3,
        learning_rate=1e-3,
    ),
    dit=StageRecipe(
        steps=120_000,
        phases=(
            Phase(0.4, (Bucket(128, 128, 1, 512), Bucket(256, 256, 1, 256))),
            Phase(0.6, _GPU_STILLS),
            Phase(1.0, (*_GPU_STILLS, *_GPU_CLIPS)),
        ),
        matrix_learning_rate=2e-3,
        learning_rate=1e-3,
        warmup_steps=200,
        ema_decay=0.9995,
    ),
    lora=StageRecipe(
        steps=1500, phases=(Phase(1.0, (Bucket(256, 256, 1, 64),)),), matrix_learning_rate=2e-3, learning_rate=2e-3
    ),
    cached_pixels=0,
    defaults={"width": 256, "height": 256, "num_frames": 33, "num_inference_steps": 20, "guidance_scale": 4.0},
)

PRESETS = {"cpu": CPU, "gpu": GPU}
