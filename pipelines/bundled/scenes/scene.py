"""Scenes as values: which things are where, on what background, and how they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from pipelines.bundled.scenes.backgrounds import COLOURS, PLACES
from pipelines.bundled.scenes.nouns import Noun, is_held_out

Relation = Literal["next to", "left of", "right of", "above", "below", "on"]
Motion = Literal["still", "moves left", "moves right", "moves up", "moves down", "bounces", "spins", "grows"]
Size = Literal["small", "normal", "big"]

RELATIONS: tuple[Relation, ...] = get_args(Relation)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
DIRECTIONS: tuple[Motion, ...] = ("moves left", "moves right", "moves up", "moves down")

_SCALES: dict[Size, float] = {"small": 0.7, "normal": 1.0, "big": 1.3}


@dataclass(frozen=True)
class Subject:
    noun: Noun
    size: Size = "normal"
    count: int = 1
    """1 to 4 of them in a row. More than one only if it is the scene's only subject."""


@dataclass(frozen=True)
class Placement:
    """One sprite. Coordinates are shares of the image's width and height, from the top left."""

    noun: Noun
    x: float
    y: float
    size: float
    """Length of its longer side, as a share of the image's shorter side."""
    moves: bool
    """Whether the scene's motion applies to it."""


@dataclass(frozen=True)
class Scene:
    subjects: tuple[Subject, ...]
    """One, or two related by `relation`, the first to the second."""
    background: str
    relation: Relation | None = None
    motion: Motion = "still"
    """Motion of the first subject."""
    seed: int = 0
    """Decides everything that the fields above leave open: exact places, shades, stars."""

    def placements(self) -> tuple[Placement, ...]:
        """Where each sprite is drawn before it moves, from back to front."""
        random = Random(self.seed)
        if self.relation is None:
            return self._row(random)
        return self._pair(random, self.relation)

    def _row(self, random: Random) -> tuple[Placement, ...]:
        (subject,) = self.subjects
        x, y = 0.5 + random.uniform(-0.08, 0.08), 0.52 + random.uniform(-0.06, 0.08)
        size = random.uniform(0.55, 0.68) * _SCALES[subject.size]
        if subject.count > 1:
            x, size = 0.5, min(size, 0.9 / subject.count)
        return tuple(
            Placement(subject.noun, x + (index - (subject.count - 1) / 2) * 0.96 / subject.count, y, size, moves=True)
            for index in range(subject.count)
        )

    def _pair(self, random: Random, relation: Relation) -> tuple[Placement, ...]:
        first, second = self.subjects
        aside, down = random.uniform(-0.04, 0.04), random.uniform(-0.03, 0.06)
        left, right = (0.26 + aside, 0.55 + down), (0.74 + aside, 0.57 + down)
        top, bottom = (0.5 + aside, 0.27), (0.5 - aside, 0.74)
        places = {
            "next to": (left, right),
            "left of": (left, right),
            "right of": (right, left),
            "above": (top, bottom),
            "on": (top, bottom),
            "below": (bottom, top),
        }[relation]
        # Two subjects share the image: their sizes stay close to normal, so that they hardly overlap.
        sizes = [random.uniform(0.40, 0.47) * min(1.12, max(0.75, _SCALES[each.size])) for each in (first, second)]
        return (
            Placement(second.noun, *places[1], sizes[1], moves=False),
            Placement(first.noun, *places[0], sizes[0], moves=True),
        )


def sample_scene(random: Random, nouns: Sequence[Noun], *, clip: bool = False, moving_share: float = 0.0) -> Scene:
    """A scene as training sees it, without held-out pairs of nouns or of a noun and a background. Only videos move; in
    `moving_share` of them a single subject moves left, right, up or down."""
    seed = random.getrandbits(32)
    moving = clip and random.random() < moving_share
    if moving or random.random() < 0.45:
        count = random.choice((2, 2, 3, 3, 4)) if random.random() < 0.15 else 1
        subjects: tuple[Subject, ...] = (Subject(random.choice(nouns), _size(random), count),)
        relation, motions = None, DIRECTIONS if moving else MOTIONS
    else:
        first, second = random.sample(nouns, 2)
        while is_held_out(first.name, second.name):
            first, second = random.sample(nouns, 2)
        subjects = (Subject(first, _size(random)), Subject(second, _size(random)))
        relation, motions = random.choice(RELATIONS), ("still", "bounces", "spins")
    # Places are fewer than colours, and harder, so each comes twice as often as a colour.
    backgrounds = (*COLOURS, *PLACES, *PLACES)
    background = random.choice(backgrounds)
    while any(is_held_out(subject.noun.name, background) for subject in subjects):
        background = random.choice(backgrounds)
    return Scene(subjects, background, relation, random.choice(motions) if clip else "still", seed)


def _size(random: Random) -> Size:
    return random.choices(("small", "normal", "big"), (12, 76, 12))[0]
