"""Shall a request wait for its pages, or compute them again?"""

from __future__ import annotations

from dataclasses import dataclass

CEILING = 5.0
"""Seconds that a request is held at most, whatever was measured."""
TOLERATED = 0.07
"""Part of the recompute time that may be lost in waiting for pages that then do not come."""
OVERDUE = 2.0
"""A fetch that takes so many times what it was estimated at is no longer waited for."""
FORGETTING = 0.9
"""Weight of what was known when something new is seen."""
SHAPE = 0.5
"""Weight of each of the two points that stand for the prior's shape; that of the latest observation is 1."""


class Pace:
    """Seconds that an amount takes: a latency and a rate, learnt from what was seen lately.

    A weighted least squares line through the observations, each new one multiplying the weight of all
    before by `FORGETTING`. Before anything was seen, the prior; afterwards only its shape: brought to the height
    of the observations, it counts as two of them at zero and at twice their mean amount, so that a single
    amount seen again and again still says something of others.

    Args:
        latency: seconds, before anything was seen.
        rate: amount per second, before anything was seen.
    """

    def __init__(self, latency: float, rate: float) -> None:
        self._latency = latency
        self._rate = rate
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._start, self._slope = latency, 1 / rate
        """The line: seconds for nothing, and seconds per amount."""

    def observe(self, amount: float, seconds: float) -> None:
        keep = FORGETTING
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + amount
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + amount * amount
        self._xy = keep * self._xy + amount * seconds
        self._fit()

    def seconds(self, amount: float) -> float:
        """Estimate for `amount`; never negative, never falling with the amount."""
        return self._start + self._slope * amount

    def _fit(self) -> None:
        mean, height = self._x / self._weight, self._y / self._weight
        prior = self._latency + mean / self._rate
        twice = height * (prior + mean / self._rate) / prior
        # The two lie on a line through (mean, height), which they leave where it was.
        spread = self._xx - self._x * mean + 2 * SHAPE * mean**2
        rise = self._xy - self._x * height + 2 * SHAPE * mean * (twice - height)
        slope = max(0.0, rise / spread) if spread > 0 else 0.0
        if slope * mean > height:
            slope = height / mean  # Through the origin: the line must not promise less than was seen.
        self._start, self._slope = max(0.0, height - slope * mean), slope


@dataclass(frozen=True)
class Outstanding:
    """What a request still waits for."""

    waited: float
    """Seconds since its fetch began."""
    held: float
    """Seconds since it could have run."""
    total_bytes: int
    """Of its fetch from disk, what landed included."""
    ahead_bytes: int
    """Of other fetches from disk that were begun before."""
    missing_tokens: int
    """Tokens to compute if it does not wait."""
    remote_bytes: int = 0
    """Of its fetch from the remote store, and of those that were begun before."""


class WaitOrRecompute:
    """Learns how long fetching and computing take, and tells whether waiting is worth it.

    A request waits while its fetch is expected to end sooner than its tokens could be computed, and for no
    longer than the fetch may reasonably take: `OVERDUE` times the estimate. Where even that is little, it
    may lose `TOLERATED` of the recompute time, so that an unknown disk is tried at a bounded price; where
    the disk turns out slow, that is seen, and the next request passes at once. Since the fetch goes on
    while a request is queued, the disk is seen to recover as well.

    The prior is that of an NVMe disk (100 us, 2 GB/s), of a network (1 ms, 1 GB/s) and of a GPU (20 ms,
    10,000 tokens per second).

    Args:
        always: wait until `CEILING`, whatever was measured.
    """

    def __init__(self, always: bool = False) -> None:
        self._always = always
        self.fetching = Pace(latency=1e-4, rate=2e9)
        self.remote = Pace(latency=1e-3, rate=1e9)
        self.computing = Pace(latency=0.02, rate=1e4)

    def is_worth_waiting(self, fetch: Outstanding) -> bool:
        if self._always:
            return fetch.held < CEILING
        compute = self.computing.seconds(fetch.missing_tokens)
        expected = self.fetching.seconds(fetch.ahead_bytes + fetch.total_bytes)
        if fetch.remote_bytes:  # Both come at once.
            expected = max(expected, self.remote.seconds(fetch.remote_bytes))
        if expected - fetch.waited >= compute:
            return False
        patience = max(OVERDUE * expected, TOLERATED * compute)
        return fetch.waited < patience and fetch.held < CEILING
