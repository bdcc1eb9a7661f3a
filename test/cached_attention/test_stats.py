from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached_attention.stats import Direction, Reason, StoreStats


class Recorder:
    def __init__(self):
        self.transfers, self.waits = [], []

    def transferred(self, direction, tier, seconds):
        self.transfers.append((direction, tier, seconds))

    def load_waited(self, seconds):
        self.waits.append(seconds)


def test_a_transfer_is_counted_when_it_ends():
    stats, future = StoreStats(), Future()
    stats.observer = recorder = Recorder()
    assert stats.watch(Direction.FETCH, "disk", future, len) is future
    assert not stats.flows
    future.set_result([1, 2, 3])
    flow = stats.flows[Direction.FETCH, "disk"]
    assert (flow.pages, flow.transfers) == (3, 1)
    assert recorder.transfers == [(Direction.FETCH, "disk", flow.seconds)]
    assert flow.seconds >= 0


@pytest.mark.parametrize(
    "end", [lambda f: f.cancel(), lambda f: f.set_exception(OSError()), lambda f: f.set_result([])]
)
def test_what_failed_or_moved_nothing_is_not_counted(end):
    stats, future = StoreStats(), Future()
    stats.watch(Direction.SAVE, "host", future, len)
    end(future)
    assert not stats.flows


def test_transfers_that_end_on_many_threads_are_all_counted():
    stats = StoreStats()
    futures = [stats.watch(Direction.DEMOTE, "disk", Future(), len) for _ in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda future: future.set_result("ab"), futures))
    flow = stats.flows[Direction.DEMOTE, "disk"]
    assert (flow.pages, flow.transfers) == (4000, 2000)


@given(st.lists(st.tuples(st.sampled_from(["host", "disk"]), st.sampled_from(Reason), st.integers(0, 9))))
def test_what_left_adds_up_by_tier_and_reason(left):
    stats = StoreStats()
    for tier, reason, pages in left:
        stats.left(tier, reason, pages)
    assert stats.gone.total() == sum(pages for _, _, pages in left)
    assert all(stats.gone.values()), "a reason that never was is not told"
    ttl = sum(pages for _, reason, pages in left if reason is Reason.TTL)
    assert stats.counters()["expired"] == ttl


def test_prompts_and_waits_add_up():
    stats = StoreStats()
    stats.observer = recorder = Recorder()
    stats.prompt_ran(100, {"device": 10, "host": 64})
    stats.prompt_ran(50, {"host": 0})
    stats.truncated(512)
    for wait in (0.5, 0.25):
        stats.load_waited(wait)
    assert (stats.prompts, stats.prompt_tokens) == (2, 150)
    assert stats.hit_tokens == {"device": 10, "host": 64}
    assert (stats.truncated_prompts, stats.truncated_tokens) == (1, 512)
    assert (stats.load_waits, stats.load_wait) == (2, 0.75)
    assert recorder.waits == [0.5, 0.25]
