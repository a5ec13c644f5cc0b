"""Scenes are values: the same seed gives the same scene, the same words and the same pixels."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from pipelines.bundled.scenes.backgrounds import BACKGROUNDS, COLOURS
from pipelines.bundled.scenes.captions import Wording, background_phrases
from pipelines.bundled.scenes.nouns import HELD_OUT_SHARE, NOUNS, first_nouns, is_held_out
from pipelines.bundled.scenes.render import render
from pipelines.bundled.scenes.scene import DIRECTIONS, MOTIONS, Scene, Subject, sample_scene
from pipelines.bundled.scenes.sprites import FontMissing, find_font, sprite
from pipelines.bundled.scenes.styles import pixel_art, sepia

EVERYDAY = first_nouns(48)
CAT, PIANO = EVERYDAY[:2]


def scenes(count: int, *, clip: bool = False) -> list[Scene]:
    random = Random(0)
    return [sample_scene(random, EVERYDAY, clip=clip) for _ in range(count)]


def test_the_everyday_nouns_come_first() -> None:
    assert {"cat", "piano", "dog", "car", "tree", "house"} <= {noun.name for noun in EVERYDAY}
    assert len(NOUNS) >= 150
    with pytest.raises(ValueError, match="172 nouns"):
        first_nouns(1000)


def test_a_word_means_one_noun() -> None:
    names = [name for noun in NOUNS for name in noun.names]
    assert sorted(names) == sorted(set(names))
    assert len({noun.emoji for noun in NOUNS}) == len(NOUNS)


def test_held_out_pairs_never_occur_in_training() -> None:
    for scene in scenes(5000, clip=True):
        names = [subject.noun.name for subject in scene.subjects]
        assert not any(is_held_out(name, scene.background) for name in names)
        assert len(names) == 1 or not is_held_out(*names)


def test_about_the_share_of_pairs_that_is_meant_to_be_is_held_out() -> None:
    pairs = [(one.name, other.name) for one in NOUNS for other in NOUNS if one.name < other.name]
    share = sum(is_held_out(*pair) for pair in pairs) / len(pairs)
    assert share == pytest.approx(HELD_OUT_SHARE, abs=0.01)
    assert all(is_held_out(one, other) == is_held_out(other, one) for one, other in pairs[:500])


def test_everything_that_can_be_said_is_drawn() -> None:
    seen = scenes(3000, clip=True)
    assert {scene.background for scene in seen} == set(BACKGROUNDS)
    assert {scene.motion for scene in seen} == set(MOTIONS)
    assert {subject.noun for scene in seen for subject in scene.subjects} == set(EVERYDAY)
    assert {scene.subjects[0].count for scene in seen} == {1, 2, 3, 4}
    assert {scene.motion for scene in scenes(300)} == {"still"}


def test_the_share_of_clips_that_move_in_a_direction_can_be_raised() -> None:
    random = Random(0)
    for share, least, most in ((0.0, 0.15, 0.3), (0.5, 0.5, 0.7), (1.0, 1.0, 1.0)):
        scenes = [sample_scene(random, EVERYDAY, clip=True, moving_share=share) for _ in range(500)]
        assert least <= sum(scene.motion in DIRECTIONS for scene in scenes) / 500 <= most
    assert all(sample_scene(random, EVERYDAY, moving_share=1.0).motion == "still" for _ in range(100))


def test_a_caption_names_what_is_in_the_scene() -> None:
    random = Random(1)
    for scene in scenes(1000, clip=True):
        words = Wording(unsaid_backgrounds=0).caption(scene, random).lower()
        for subject in scene.subjects:
            names = (*subject.noun.names, subject.noun.plural)
            assert any(name in words for name in names), (words, names)
        assert any(phrase in words for phrase in background_phrases(scene.background)), words


def test_a_scene_has_many_captions() -> None:
    scene, random = Scene((Subject(CAT), Subject(PIANO)), "stage", "next to"), Random(0)
    captions = {Wording().caption(scene, random).lower() for _ in range(3000)}
    assert len(captions) > 500
    assert any("cat playing a piano on stage" in words for words in captions)


@pytest.mark.usefixtures("painted")
def test_a_scene_is_drawn_the_same_every_time() -> None:
    for scene in scenes(20, clip=True):
        assert (render(scene, 48, 32, 5) == render(scene, 48, 32, 5)).all()


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize(
    ("relation", "axis", "first_is_less"),
    [("left of", "x", True), ("right of", "x", False), ("above", "y", True), ("on", "y", True), ("below", "y", False)],
)
def test_relations_are_what_they_say(relation: str, axis: str, first_is_less: bool) -> None:
    for seed in range(20):
        scene = Scene((Subject(CAT), Subject(PIANO)), "white", relation, seed=seed)  # type: ignore[arg-type]
        place = {placement.noun: getattr(placement, axis) for placement in scene.placements()}
        assert (place[CAT] < place[PIANO]) is first_is_less


@pytest.mark.usefixtures("painted")
def test_counts_and_sizes_are_what_they_say() -> None:
    def covered(subject: Subject) -> float:
        frame = render(Scene((subject,), "white"), 96, 96)[0]
        return float((np.abs(frame.astype(int) - frame[0, 0]).sum(-1) > 60).mean())

    small, normal, big = (covered(Subject(CAT, size)) for size in ("small", "normal", "big"))
    assert small < 0.7 * normal < normal < big / 1.2
    assert len(Scene((Subject(CAT, count=3),), "white").placements()) == 3


@pytest.mark.usefixtures("painted")
@pytest.mark.parametrize("name", BACKGROUNDS)
def test_a_background_fills_any_shape(name: str) -> None:
    frame = render(Scene((Subject(CAT),), name), 80, 48)[0]
    assert frame.shape == (48, 80, 3)
    if name in COLOURS:
        assert np.abs(frame[0, 0].astype(int) - COLOURS[name]).max() <= 6


def test_styles_are_functions_of_the_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), np.uint8)
    red, _, blue = np.moveaxis(sepia(frames).astype(int), -1, 0)
    assert (red >= blue).all()
    blocks = pixel_art(frames).reshape(2, 2, 8, 3, 8, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
    assert set(np.unique(blocks)) <= set(range(0, 256, 51))


def test_the_font_draws_every_noun() -> None:
    try:
        find_font()
    except FontMissing as missing:
        pytest.skip(str(missing))
    drawn = {sprite(noun.emoji).tobytes() for noun in NOUNS}
    assert len(drawn) == len(NOUNS), "two nouns look the same"


def test_a_missing_font_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.bundled.scenes.sprites.FONTS", ())
    with pytest.raises(FontMissing, match="apt-get install fonts-noto-color-emoji"):
        find_font()
