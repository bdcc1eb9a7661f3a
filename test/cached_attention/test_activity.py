from concurrent.futures import Future

from cached_attention.activity import PERIOD, Activity
from cached_attention.stats import Direction, Reason, StoreStats

PAGE = 1_000_000


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def make():
    stats, clock = StoreStats(), Clock()
    return stats, clock, Activity(stats, PAGE, clock)


def move(stats, direction, tier, pages):
    stats.watch(direction, tier, Future(), lambda _: pages).set_result(None)


def test_a_line_tells_of_the_last_period_only():
    stats, clock, activity = make()
    stats.prompt_ran(1000, {"device": 100, "host": 500, "disk": 200})
    move(stats, Direction.LOAD, "host", 120)
    move(stats, Direction.FETCH, "disk", 30)
    stats.left("host", Reason.ROOM, 7)
    stats.left("host", Reason.TTL, 2)
    stats.given_up += 3
    stats.lost += 1
    assert activity.poll() is None, "it is not time yet"
    clock.now += PERIOD
    assert activity.poll() == (
        "last 60 s: prompts 1, 1,000 tokens, 80% reused (device 10%, host 50%, disk 20%); "
        "load 120 MB (2 MB/s); fetch disk 30 MB (500 KB/s); pages that left host: room 7, ttl 2; "
        "requests that computed rather than wait 3; damaged pages 1."
    )
    stats.prompt_ran(10, {})
    clock.now += PERIOD
    assert activity.poll() == "last 60 s: prompts 1, 10 tokens, 0% reused."


def test_nothing_is_said_of_nothing():
    stats, clock, activity = make()
    clock.now += PERIOD
    assert activity.poll() is None
    clock.now += PERIOD - 1
    stats.declined += 4
    assert activity.poll() is None
    clock.now += 1
    assert activity.poll() == "last 60 s: pages not saved 4."
