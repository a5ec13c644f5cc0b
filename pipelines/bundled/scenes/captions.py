"""The words for a scene, as a person might type them."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from pipelines.bundled.scenes.backgrounds import COLOURS
from pipelines.bundled.scenes.scene import Motion, Relation, Scene, Subject

ACTIONS = ("playing", "riding", "holding", "eating", "looking at", "chasing", "with", "and", "beside", "near")
"""Whatever one subject does with another, they are drawn side by side."""

ADJECTIVES = ("cute", "happy", "beautiful", "old", "calico", "colorful", "funny", "nice", "lovely")
"""They change nothing in the image, but prompts are full of them."""

_RELATIONS: dict[Relation, tuple[str, ...]] = {
    "next to": ("next to", *ACTIONS),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "on": ("on", "on top of", "sitting on", "standing on"),
}

_MOTIONS: dict[Motion, tuple[str, ...]] = {
    "still": ("",),
    "moves left": (" moving left", " moves to the left", " walking to the left", " going left"),
    "moves right": (" moving right", " moves to the right", " running to the right", " going right"),
    "moves up": (" moving up", " rises", " flying up", " going up"),
    "moves down": (" moving down", " sinks", " falling down", " going down"),
    "bounces": (" bouncing", " bounces", " jumping", " jumps up and down"),
    "spins": (" spinning", " spins", " turning around", " rotating"),
    "grows": (" growing", " grows", " getting bigger", " coming closer"),
}

_SINGULAR = tuple(phrase for phrases in _MOTIONS.values() for phrase in phrases if phrase and "ing" not in phrase)
"""Phrases for a single subject only."""

_PLACES: dict[str, tuple[str, ...]] = {
    "stage": ("on stage", "on a stage", "in a theater"),
    "beach": ("on the beach", "on a beach", "at the seaside", "by the sea"),
    "night sky": ("at night", "in the night sky", "under the stars", "in space"),
    "grass": ("on the grass", "in a field", "in a park", "in a meadow"),
    "snow": ("in the snow", "in winter", "on a snowy field"),
    "desert": ("in the desert", "in a desert"),
    "room": ("in a room", "indoors", "at home"),
    "underwater": ("underwater", "in the sea", "under water"),
    "sunset": ("at sunset", "in the sunset", "in the evening"),
}

_SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
_COUNTS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("a picture of ", "a photo of ", "an illustration of ", "a drawing of ", "an image of ")


@dataclass(frozen=True)
class Wording:
    """How a scene is put into words. Each number is a probability."""

    adjectives: float = 0.15
    """That a subject gets an adjective that changes nothing."""
    made_up_words: float = 0.05
    """That a subject gets a word of random letters, which teaches a model to ignore words that it does not know."""
    unsaid_backgrounds: float = 1 / 12

    def caption(self, scene: Scene, random: Random) -> str:
        """One of the many ways to describe `scene`: synonyms, adjectives and word order are drawn from `random`.

        It names every subject.
        """
        words = self._subject(scene.subjects[0], random)
        # "Two robots bouncing", and never "two robots bounces".
        several = scene.subjects[0].count > 1
        motion = random.choice([each for each in _MOTIONS[scene.motion] if not (several and each in _SINGULAR)])
        if scene.relation is None:
            words += motion
        else:
            other = self._subject(scene.subjects[1], random)
            words += f"{motion} {random.choice(_RELATIONS[scene.relation])} {other}"
        if random.random() >= self.unsaid_backgrounds:
            words += random.choice((" ", " ", " ", ", ")) + random.choice(background_phrases(scene.background))
        if random.random() < 0.3:
            words = random.choice(_OPENINGS) + words
        if random.random() < 0.4:
            words = words[0].upper() + words[1:]
        return words + ("." if random.random() < 0.15 else "")

    def _subject(self, subject: Subject, random: Random) -> str:
        adjectives = [random.choice(_SIZES[subject.size])] if subject.size != "normal" else []
        if random.random() < self.adjectives:
            adjectives.append(random.choice(ADJECTIVES))
        if random.random() < self.made_up_words:
            adjectives.append("".join(random.choices(ascii_lowercase, k=random.randint(3, 9))))
        if subject.count > 1:
            return " ".join((_COUNTS[subject.count], *adjectives, subject.noun.plural))
        # The usual name half the time: it is the one that most people type.
        name = subject.noun.name if random.random() < 0.5 else random.choice(subject.noun.names)
        words = " ".join((*adjectives, name))
        # "Books on the beach" and "happy socks", but "a fish" and "a sheep".
        if name == subject.noun.plural and name.endswith("s"):
            return words
        return f"{'an' if words[0] in 'aeiou' and not words.startswith(('uni', 'ufo')) else 'a'} {words}"


def background_phrases(background: str) -> tuple[str, ...]:
    if background in COLOURS:
        return (f"on a {background} background", f"in front of a {background} wall", f"{background} background")
    return _PLACES[background]
