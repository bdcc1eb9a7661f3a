"""What stays of a prompt is a function of its length, fits, and names the pages it had before."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached_attention.position.truncation import TruncationPlan, TruncationRule

RESERVED = 6
"""Tokens by which SGLang's limit for prompts is below the window."""


@st.composite
def rules(draw: st.DrawFn) -> TruncationRule:
    page_size = draw(st.sampled_from([1, 16, 64, 256]))
    window = draw(st.integers(2 * page_size + RESERVED, 40 * page_size + 100))
    return TruncationRule(
        window,
        window - RESERVED,
        page_size,
        draw(st.floats(0.1, 0.9)),
        draw(st.integers(0, 4)),
    )


@st.composite
def prompts(draw: st.DrawFn) -> tuple[TruncationRule, int]:
    """A rule and a prompt's length, of up to 20 windows."""
    rule = draw(rules())
    return rule, draw(st.integers(1, 20 * rule.window))


def prompt(length: int) -> array[int]:
    return array("q", range(length))


@given(prompts())
def test_what_fits_is_left_alone_and_what_does_not_fits_afterwards(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    assert (plan.dropped == 0) == (length < rule.limit)
    kept = plan.keep(prompt(length))
    assert len(kept) == length - plan.dropped < rule.limit


@given(prompts())
def test_the_sink_and_the_newest_tokens_stay_and_only_the_middle_goes(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    kept = list(plan.keep(prompt(length)))
    assert kept[-rule.page_size :] == list(range(length))[-rule.page_size :]
    assert kept[: plan.sink] == list(range(length))[: plan.sink]
    if plan.dropped:
        assert kept[plan.sink :] == list(range(plan.sink + plan.dropped, length))
        assert len(kept) >= plan.sink + rule.page_size


@given(prompts())
def test_everything_lies_on_the_page_grid(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    assert not any(tokens % rule.page_size for tokens in (plan.sink, plan.dropped, plan.step))


START, ROLE, NEWLINE, WORD = range(4)
"""Tokens of a chat template's header, and of what is said."""


@given(prompts(), st.integers(4, 300))
def test_after_the_seam_only_one_message_is_torn_wherever_the_grid_cuts(
    case: tuple[TruncationRule, int], message: int
) -> None:
    """The seam stays on the page grid, be it in a header; from the next header on, all messages are whole."""
    rule, length = case
    chat = ([START, ROLE, NEWLINE] + [WORD] * (message - 3)) * (length // message + 1)
    chat = chat[:length]
    plan = rule.plan(length)
    if not plan.dropped:
        return
    seam = plan.sink + plan.dropped
    kept = list(plan.keep(array("q", chat)))[plan.sink :]
    torn = -seam % message
    assert seam % rule.page_size == 0
    assert START not in kept[:torn]
    assert kept[torn:] == chat[: max(0, length - seam - torn)]


@given(prompts(), st.data())
def test_more_tokens_never_drop_less_and_none_within_a_step_drop_more(
    case: tuple[TruncationRule, int], data: st.DataObject
) -> None:
    rule, length = case
    longer = length + data.draw(st.integers(0, 2 * rule.step))
    before, after = rule.plan(length), rule.plan(longer)
    assert rule.plan(length) == before
    assert after.dropped >= before.dropped
    if longer - before.dropped < rule.limit:
        assert after == before
    else:
        assert after.dropped > before.dropped


@given(prompts())
def test_no_step_is_taken_before_its_time(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    assert plan.dropped == 0 or length - (plan.dropped - plan.step) >= rule.limit


@given(prompts(), st.data())
def test_the_answer_has_room_whatever_is_asked_for(case: tuple[TruncationRule, int], data: st.DataObject) -> None:
    """SGLang bounds the answer so that prompt and answer end two tokens before the window does."""
    rule, length = case
    asked = data.draw(st.integers(0, rule.window))
    kept = length - rule.plan(length).dropped
    answer = max(0, min(asked, rule.window - 2 - kept))
    assert kept + answer < rule.window
    assert answer == asked or answer >= RESERVED - 1


@given(prompts())
def test_earlier_plans_are_those_of_shorter_prompts_nearest_first(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    seen = {rule.plan(shorter).dropped for shorter in range(1, length + 1, max(1, rule.step // 3))}
    earlier = list(plan.earlier())
    assert [other.dropped for other in earlier] == list(range(0, plan.dropped, rule.step))[::-1]
    assert seen - {plan.dropped} <= {other.dropped for other in earlier}
    assert all((other.sink, other.step) == (plan.sink, plan.step) for other in earlier)


def pages_under(rule: TruncationRule, length: int) -> Callable[[TruncationPlan], Callable[[int], bytes]]:
    """Names a page by its tokens and by how much was dropped."""

    def keys_under(plan: TruncationPlan) -> Callable[[int], bytes]:
        kept = plan.keep(prompt(length))

        def key(page: int) -> bytes:
            first = page * rule.page_size
            return f"{plan.dropped}:{kept[first]}".encode()

        return key

    return keys_under


@given(prompts())
def test_sources_hold_the_same_tokens(case: tuple[TruncationRule, int]) -> None:
    rule, length = case
    plan = rule.plan(length)
    kept = plan.keep(prompt(length))
    pages = len(kept) // rule.page_size
    for source in rule.sources(plan, pages, pages_under(rule, length)):
        assert len(source) == pages
        for page, key in enumerate(source):
            if key is not None:
                assert int(key.split(b":")[1]) == kept[page * rule.page_size]


@given(prompts(), st.data())
def test_every_page_of_an_earlier_turn_is_found(case: tuple[TruncationRule, int], data: st.DataObject) -> None:
    """What an earlier turn computed, its answer included, and this one keeps after the sink, is in a source."""
    rule, length = case
    plan = rule.plan(length)
    if not plan.dropped:
        return
    shorter = rule.plan(data.draw(st.integers(1, length)))
    if shorter.dropped == plan.dropped:
        return
    size = rule.page_size
    names = pages_under(rule, length)(shorter)
    reached = min(rule.window, length - shorter.dropped) // size
    had = {names(page) for page in range(reached)}
    kept = plan.keep(prompt(length))
    pages = len(kept) // size
    found = {key for source in rule.sources(plan, pages, pages_under(rule, length)) for key in source}
    wanted = {f"{shorter.dropped}:{kept[page * size]}".encode() for page in range(plan.sink // size, pages)}
    assert wanted & had <= found


def test_keys_are_made_when_they_are_asked_for_and_no_further_back_than_the_window() -> None:
    rule = TruncationRule(1024, 1018, 64, 0.5, 1)
    plan = rule.plan(5000)
    asked: list[tuple[int, int]] = []

    def keys_under(earlier: TruncationPlan) -> Callable[[int], bytes]:
        def key(page: int) -> bytes:
            asked.append((earlier.dropped, page))
            return b"key"

        return key

    sources = list(rule.sources(plan, 14, keys_under))
    assert asked == []
    assert [source[0] for source in sources] == [b"key", b"key"]
    assert asked == [(3584, 0), (0, 0)]
    assert list(sources[0]) == [b"key"] * 8 + [None] * 6
    assert list(sources[1]) == [b"key"] + [None] * 13
    assert sources[0][:2] == [b"key"] * 2
    with pytest.raises(IndexError):
        sources[0][14]


def test_the_sink_yields_to_the_newest_page() -> None:
    rule = TruncationRule(window=1024, limit=1018, page_size=64, ratio=0.9, sink_pages=4)
    assert (rule.step, rule.sink) == (896, 0)
    rule = TruncationRule(window=1024, limit=1018, page_size=64, ratio=0.75, sink_pages=4)
    assert (rule.step, rule.sink) == (768, 128)


@pytest.mark.parametrize(("ratio", "step"), [(0.5, 512), (0.3, 256), (0.01, 64), (0.7, 704), (0.99, 896)])
def test_steps_are_whole_pages(ratio: float, step: int) -> None:
    assert TruncationRule(1024, 1018, 64, ratio, 1).step == step


def test_a_window_too_small_to_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 126 tokens has no room for two pages of 64: give a smaller"):
        TruncationRule(window=133, limit=127, page_size=64, ratio=0.5, sink_pages=1)
