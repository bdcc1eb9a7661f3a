from cached_attention import conversations
from cached_attention.conversations import Conversations


def keys(name, count):
    return [f"{name}-{page}".encode() for page in range(count)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_turn_is_known_by_where_the_last_one_ended():
    clock = Clock()
    known = Conversations(clock)
    known.turn_ended(keys("a", 3), 0)
    known.turn_ended(keys("b", 5), 64)
    clock.now = 7.0
    known.turn_ended(keys("a", 6), 192)
    first, second = known.hottest(10)
    assert (first.turns, first.pages, first.reused_tokens, first.idle) == (2, 6, 192, 0.0)
    assert (second.turns, second.pages, second.reused_tokens, second.idle) == (1, 5, 64, 7.0)
    assert first.last == keys("a", 6)[-1]
    assert known.hottest(1) == [first]


def test_a_branch_is_a_conversation_of_its_own():
    known = Conversations(Clock())
    known.turn_ended(keys("a", 3), 0)
    known.turn_ended(keys("a", 4), 0)
    known.turn_ended([*keys("a", 3), b"another answer"], 0)
    assert sorted(c.turns for c in known.hottest(10)) == [1, 2]


def test_names_tell_nothing_of_the_pages():
    here, there = Conversations(Clock()), Conversations(Clock())
    for known in (here, there):
        known.turn_ended(keys("a", 2), 0)
    ((a,), (b,)) = here.hottest(1), there.hottest(1)
    assert a.name != b.name, "whoever guesses the prompt could check it"
    assert a.name == here.hottest(1)[0].name


def test_only_so_many_are_remembered(monkeypatch):
    monkeypatch.setattr(conversations, "REMEMBERED", 3)
    known = Conversations(Clock())
    for name in "abcde":
        known.turn_ended(keys(name, 1), 0)
    known.turn_ended([], 0)
    assert len(known) == 3
    assert {c.last for c in known.hottest(10)} == {b"c-0", b"d-0", b"e-0"}
