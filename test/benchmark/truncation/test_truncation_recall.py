from __future__ import annotations

import numpy as np
import pytest

from benchmark.truncation.fact import Facts
from benchmark.truncation.plan import Plan
from benchmark.truncation.recall import PLACES, Quiz, make_quiz

PLAN = Plan(window=256, step=128, sink=16)
FACTS = Facts(opening=(1, 2, 3), names=tuple(range(100, 132)), codes=tuple(range(200, 300)), closing=(4,))


@pytest.fixture(scope="module")
def quiz() -> Quiz:
    text = np.full((12, 1_024), 9)
    text[:, 0] = 0
    return make_quiz(text, PLAN, FACTS, np.random.default_rng(0))


def test_a_question_asks_for_a_fact_where_it_says_it_was_told(quiz: Quiz) -> None:
    for question in quiz.questions:
        tokens = quiz.conversations[question.conversation]
        name, code = tokens[question.position], tokens[question.position + 1]
        assert name in FACTS.names
        assert code in FACTS.codes
        told, *repeated = np.flatnonzero(tokens == name)
        assert repeated == [question.position]
        assert tokens[told + 1] == code
        dropped = PLAN.step * question.truncations
        place = {
            "sink": told < PLAN.sink,
            "kept": told >= PLAN.sink + dropped,
            "dropped": PLAN.sink <= told < PLAN.sink + dropped,
        }
        assert place[question.place]


def test_kept_facts_were_read_before_the_truncation_and_are_asked_for_after_it(quiz: Quiz) -> None:
    periods = list(PLAN.periods(1_024))
    for question in quiz.questions:
        period = periods[question.truncations]
        tokens = quiz.conversations[question.conversation]
        assert period.start <= question.position < period.end
        if question.place == "kept" and question.truncations:
            assert np.flatnonzero(tokens == tokens[question.position])[0] < period.start


def test_every_place_is_asked_for_after_every_truncation(quiz: Quiz) -> None:
    for count in range(1, 7):
        for place in PLACES:
            expected = 2 if place == "sink" else 12
            assert quiz.chosen(place, count).sum() == expected
    assert quiz.chosen("kept", 0).sum() == 12
    assert quiz.chosen("sink").sum() == 12


@pytest.mark.parametrize("plan", [Plan(256, 64, 16), Plan(256, 128, 5), Plan(64, 32, 8)])
def test_plans_without_room_for_a_quiz(plan: Plan) -> None:
    with pytest.raises(ValueError, match="the quiz needs a step"):
        make_quiz(np.zeros((1, 1_024), dtype=np.int64), plan, FACTS, np.random.default_rng(0))


def test_conversations_too_short_for_a_quiz() -> None:
    with pytest.raises(ValueError, match="384 tokens, got 300"):
        make_quiz(np.zeros((1, 300), dtype=np.int64), PLAN, FACTS, np.random.default_rng(0))
