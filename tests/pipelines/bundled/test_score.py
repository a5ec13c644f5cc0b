"""The score asks for what training never showed, and measures true renders correctly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.bundled_score import (
    CROP,
    DIRECTIONS,
    Question,
    border_colour,
    boxes,
    build_classifier,
    crop,
    direction,
    held_out_questions,
    score,
)
from pipelines.bundled.scenes.nouns import first_nouns, is_held_out
from pipelines.bundled.scenes.render import render

NOUNS = first_nouns(48)

pytestmark = pytest.mark.usefixtures("painted")


def test_every_prompt_asks_for_a_pair_that_training_never_shows() -> None:
    questions = held_out_questions(NOUNS, 200)
    assert questions == held_out_questions(NOUNS, 200)
    for question in questions:
        names = [subject.noun.name for subject in question.scene.subjects]
        pair = names if len(names) == 2 else (*names, question.scene.background)
        assert is_held_out(*pair)
        assert all(any(name in question.prompt.lower() for name in s.noun.names) for s in question.scene.subjects)
    kinds = [(len(question.scene.subjects), question.scene.motion != "still") for question in questions]
    assert [kinds.count(kind) for kind in ((1, False), (2, False), (1, True))] == [80, 80, 40]


def test_true_renders_have_their_background_and_their_motion() -> None:
    for question in held_out_questions(NOUNS, 100):
        if question.scene.motion in DIRECTIONS:
            assert direction(render(question.scene, 96, 96, 9)) == question.scene.motion
        else:
            assert border_colour(render(question.scene, 96, 96)[0]) == question.scene.background


def test_a_clip_that_stands_still_moves_nowhere() -> None:
    question = held_out_questions(NOUNS, 1)[0]
    assert direction(render(question.scene, 64, 64).repeat(9, 0)) == "still"
    assert direction(np.full((9, 64, 64, 3), 200, np.uint8)) == "still"


def test_each_object_is_in_a_crop_of_its_own() -> None:
    for question in held_out_questions(NOUNS, 50):
        found = boxes(question.scene)
        assert len(found) == len(question.scene.subjects)
        for placement in question.scene.placements():
            inside = [abs(placement.x - x) < side / 2 and abs(placement.y - y) < side / 2 for x, y, side in found]
            assert inside.count(True) == 1
    assert crop(np.zeros((48, 80, 3), np.uint8), 0.5, 0.5, 1.0).shape == (CROP, CROP, 3)


class Knows(torch.nn.Module):
    """Classifies crops as these classes, whatever they show."""

    def __init__(self, *answers: int) -> None:
        super().__init__()
        self.answers = answers
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self.answers[: len(crops)]), len(NOUNS)).float()


def test_two_objects_count_only_if_both_are_found() -> None:
    question = next(each for each in held_out_questions(NOUNS, 5) if len(each.scene.subjects) == 2)
    first, second = (NOUNS.index(subject.noun) for subject in question.scene.subjects)

    def found(*answers: int) -> float:
        def answer(question: Question) -> np.ndarray:
            return render(question.scene, 64, 64)

        return score([question], answer, Knows(*answers), NOUNS, "test")["both objects found"]

    assert found(first, second) == found(second, first) == 1.0
    assert found(first, first) == 0.0


def test_the_classifier_names_crops_of_its_size() -> None:
    assert build_classifier(48)(torch.zeros(2, 3, CROP, CROP)).shape == (2, 48)
