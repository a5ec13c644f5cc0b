"""Whether the bundled model draws what its prompts ask for, judged without a download and without a human.

    python -m benchmarks.bundled_score MODEL_DIRECTORY [--classifier classifier.pt] [--prompts 200]

A small classifier learns to name crops of rendered scenes. Then it judges what the model draws for prompts whose words
(two nouns, or a noun and a background) training never combined.

Baselines, in the same run: the true renders of the same scenes, which are the ceiling, and the model's autoencoder's
reconstructions of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image
from torch import nn
from tqdm import tqdm

from configs.model_family import family_in
from pipelines.bundled.scenes.backgrounds import COLOURS
from pipelines.bundled.scenes.captions import Wording
from pipelines.bundled.scenes.nouns import Noun, first_nouns, is_held_out
from pipelines.bundled.scenes.render import render
from pipelines.bundled.scenes.scene import DIRECTIONS, Motion, Relation, Scene, Subject, sample_scene
from pipelines.bundled.train.vae import pixels_of, stack
from pipelines.model.convolution import skip_padding

Frames = npt.NDArray[np.uint8]
"""`(T, H, W, 3)` in sRGB."""

CROP = 64
"""Side of the classifier's input, in pixels."""

WORDING = Wording(adjectives=0, made_up_words=0, unsaid_backgrounds=0)
PLACED: tuple[Relation, ...] = ("left of", "right of", "above", "below")
TARGETS = {"one object named": 0.70, "both objects found": 0.50, "background colour": 0.90, "direction of motion": 0.80}


@dataclass(frozen=True)
class Question:
    scene: Scene
    prompt: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory in the diffusers layout")
    parser.add_argument("--nouns", type=int, default=48, help="that the model was trained on")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--classifier", type=Path, help="file that keeps the classifier from one run to the next")
    parser.add_argument("--classifier-steps", type=int, default=2000)
    parser.add_argument("--size", type=int, help="of pictures and clips, in pixels; the model's default without")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    family = family_in(arguments.model)
    if family is None:
        raise SystemExit(f"'{arguments.model}' is of no family that is known")
    picture_size = arguments.size or family.defaults_for("text_to_image").width
    clip_size = arguments.size or family.defaults.width
    frames = arguments.frames or family.defaults.num_frames
    steps = arguments.steps or family.defaults.num_inference_steps
    guidance_scale = arguments.guidance_scale or family.defaults.guidance_scale
    nouns = first_nouns(arguments.nouns)
    classifier = trained_classifier(nouns, arguments.classifier_steps, arguments.classifier, arguments.device)
    pipeline = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32).to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    skip_padding(pipeline.vae)

    def shape(question: Question) -> tuple[int, int]:
        """Width and height, and the number of frames."""
        return (picture_size, 1) if question.scene.motion == "still" else (clip_size, frames)

    def rendered(question: Question) -> Frames:
        size, num_frames = shape(question)
        return render(question.scene, size, size, num_frames)

    def reconstructed(question: Question) -> Frames:
        return reconstruct(pipeline, rendered(question))

    def generated(question: Question) -> Frames:
        size, num_frames = shape(question)
        video = pipeline(
            question.prompt,
            width=size,
            height=size,
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(question.scene.seed),
        ).frames[0]
        return (video * 255).round().astype(np.uint8)

    questions = held_out_questions(nouns, arguments.prompts)
    columns = {
        name: score(questions, answer, classifier, nouns, name)
        for name, answer in (("true renders", rendered), ("autoencoded", reconstructed), ("generated", generated))
    }
    print(
        f"{len(questions)} prompts, {len(nouns)} nouns, pictures of {picture_size}x{picture_size}, clips of "
        f"{clip_size}x{clip_size} and {frames} frames, {steps} steps, guidance {guidance_scale}"
    )
    print(f"{'':22}" + "".join(f"{name:>14}" for name in columns) + f"{'asked for':>14}")
    for measure, target in TARGETS.items():
        print(f"{measure:22}" + "".join(f"{column[measure]:14.1%}" for column in columns.values()) + f"{target:14.0%}")


def held_out_questions(nouns: Sequence[Noun], count: int, seed: int = 0) -> list[Question]:
    """Two fifths of one object, two fifths of two objects, one fifth of one object that moves in a video.

    Each shows a pair that training never showed: the two nouns, or the noun and its background. All backgrounds are
    plain colours, because motion and background colour can only be judged there.
    """
    random = Random(seed)
    questions = []
    for index in range(count):
        kind = index % 5
        while True:
            background = random.choice(tuple(COLOURS))
            first, second = random.sample(list(nouns), 2)
            held_out = is_held_out(first.name, second.name) if kind in (1, 3) else is_held_out(first.name, background)
            if held_out:
                break
        seed_of_scene = random.getrandbits(32)
        if kind in (1, 3):
            relation = random.choice(PLACED)
            scene = Scene((Subject(first), Subject(second)), background, relation, "still", seed_of_scene)
        else:
            motion = random.choice(DIRECTIONS) if kind == 4 else "still"
            scene = Scene((Subject(first),), background, None, motion, seed_of_scene)
        questions.append(Question(scene, WORDING.caption(scene, random)))
    return questions


def score(
    questions: Sequence[Question],
    answer: Callable[[Question], Frames],
    classifier: nn.Module,
    nouns: Sequence[Noun],
    name: str,
) -> dict[str, float]:
    """The share of correct answers, by measure."""
    right: dict[str, list[bool]] = {measure: [] for measure in TARGETS}
    for question in tqdm(questions, desc=name):
        frames, scene = answer(question), question.scene
        if scene.motion != "still":
            right["direction of motion"].append(direction(frames) == scene.motion)
            continue
        right["background colour"].append(border_colour(frames[0]) == scene.background)
        found = {nouns[index] for index in named(classifier, [crop(frames[0], *box) for box in boxes(scene)])}
        measure = "one object named" if scene.relation is None else "both objects found"
        right[measure].append(found == {subject.noun for subject in scene.subjects})
    return {measure: float(np.mean(answers)) for measure, answers in right.items() if answers}


def boxes(scene: Scene) -> tuple[tuple[float, float, float], ...]:
    """Where to look for the scene's objects: the centre (x, y) of a square and its side, as shares of the image."""
    if scene.relation is None:
        return ((0.5, 0.53, 0.9),)
    if scene.relation in ("above", "below", "on"):
        return ((0.5, 0.27, 0.54), (0.5, 0.73, 0.54))
    return ((0.27, 0.56, 0.54), (0.73, 0.56, 0.54))


def crop(frame: npt.NDArray[np.uint8], x: float, y: float, side: float) -> npt.NDArray[np.uint8]:
    """That square of an image (H, W, 3), as (64, 64, 3)."""
    height, width = frame.shape[:2]
    half = side * min(width, height) / 2
    box = (x * width - half, y * height - half, x * width + half, y * height + half)
    image = Image.fromarray(frame).transform(
        (2 * CROP, 2 * CROP), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC
    )
    return np.asarray(image.reduce(2))


def border_colour(frame: npt.NDArray[np.uint8]) -> str:
    """The plain colour that is nearest to the median of the image's outermost twentieth."""
    return nearest_colour(border(frame))


def nearest_colour(colours: npt.NDArray[np.integer]) -> str:
    """The plain colour that is nearest to the median of `(N, 3)`."""
    median = np.median(colours, axis=0)
    return min(COLOURS, key=lambda name: float(np.square(median - COLOURS[name]).sum()))


def border(frame: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """`(N, 3)`: the pixels of the left, right and top edges, which objects hardly reach."""
    band = max(1, min(frame.shape[:2]) // 20)
    return np.concatenate([part.reshape(-1, 3) for part in (frame[:, :band], frame[:, -band:], frame[:band])])


def direction(frames: Frames) -> Motion:
    """The direction in which what is not background moves, from the video's first fifth to its last."""
    centres = np.array([_centre(frame) for frame in frames])
    fifth = max(1, len(frames) // 5)
    x, y = centres[-fifth:].mean(0) - centres[:fifth].mean(0)
    if max(abs(x), abs(y)) < 0.03:  # of the image's side: a trained motion covers 0.36 of it or more
        return "still"
    if abs(x) > abs(y):
        return "moves right" if x > 0 else "moves left"
    return "moves down" if y > 0 else "moves up"


def _centre(frame: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """Centre of the pixels that are not background, as shares of width and height; the middle if there are none."""
    distance = np.abs(frame.astype(np.int16) - np.median(border(frame), axis=0)).sum(-1)
    rows, columns = np.nonzero(distance > 60)
    if not len(rows):
        return 0.5, 0.5
    return float(columns.mean()) / frame.shape[1], float(rows.mean()) / frame.shape[0]


def build_classifier(classes: int) -> nn.Module:
    """From (B, 3, 64, 64) in -1..1 to logits (B, classes)."""
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in ((32, 2), (64, 2), (128, 2), (128, 1), (192, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes))


def trained_classifier(nouns: tuple[Noun, ...], steps: int, cache: Path | None, device: str) -> nn.Module:
    """A classifier trained on crops of training scenes, moved, blurred and noisy; read from `cache` if that exists,
    else saved there."""
    torch.manual_seed(0)
    classifier = build_classifier(len(nouns)).to(device)
    if cache is not None and cache.exists():
        classifier.load_state_dict(torch.load(cache, map_location=device, weights_only=True))
        return classifier.eval()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    random = Random(0)
    bar = tqdm(range(steps), desc="classifier")
    for _ in bar:
        crops, labels = labelled_crops(random, nouns, 64)
        logits = classifier(augmented(as_input(crops)).to(device))
        loss = F.cross_entropy(logits, torch.tensor(labels, device=device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    if cache is not None:
        torch.save(classifier.state_dict(), cache)
    return classifier.eval()


def labelled_crops(
    random: Random, nouns: tuple[Noun, ...], count: int
) -> tuple[list[npt.NDArray[np.uint8]], list[int]]:
    """Squares around single objects of rendered scenes, and which noun each is."""
    crops: list[npt.NDArray[np.uint8]] = []
    labels = []
    while len(crops) < count:
        scene = sample_scene(random, nouns)
        if scene.subjects[0].count > 1:
            continue
        frame = render(scene, 128, 128)[0]
        for x, y, side in boxes(scene):
            inside = min(scene.placements(), key=lambda placement: abs(placement.x - x) + abs(placement.y - y))
            moved = (x + random.uniform(-0.05, 0.05), y + random.uniform(-0.05, 0.05), side * random.uniform(0.9, 1.1))
            crops.append(crop(frame, *moved))
            labels.append(nouns.index(inside.noun))
    return crops[:count], labels[:count]


def as_input(crops: Sequence[npt.NDArray[np.uint8]]) -> torch.Tensor:
    return pixels_of(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2))


def augmented(images: torch.Tensor) -> torch.Tensor:
    """The batch, half of it blurred as by a small autoencoder, and all of it a little noisy."""
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2.0, mode="bilinear")
    half = (torch.arange(len(images)) % 2 == 0).view(-1, 1, 1, 1)
    return torch.where(half, blurred, images) + 0.05 * torch.randn_like(images)


@torch.no_grad()
def named(classifier: nn.Module, crops: Sequence[npt.NDArray[np.uint8]]) -> list[int]:
    """The index of the noun that each crop looks most like."""
    device = next(classifier.parameters()).device
    return classifier(as_input(crops).to(device)).argmax(1).tolist()


@torch.no_grad()
def reconstruct(pipeline: WanPipeline, frames: Frames) -> Frames:
    pixels = pixels_of(stack([frames]))
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels.to(pipeline.device)).latent_dist.mode()).sample[0]
    return ((decoded.permute(1, 2, 3, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)


if __name__ == "__main__":
    main()
