"""Whether a request should wait for its pages or recompute them."""

from __future__ import annotations

from dataclasses import dataclass

CEILING = 5.0
"""Maximum number of seconds that a request is held, whatever was measured."""
TOLERATED = 0.07
"""Fraction of the recompute time that may be lost waiting for pages that then do not arrive."""
OVERDUE = 2.0
"""A fetch that takes this many times its estimate is no longer waited for."""
FORGETTING = 0.9
"""Factor that each new observation applies to the weight of all earlier ones."""
SHAPE = 0.5
"""Weight of each of the two points that represent the prior's shape; that of the latest observation is 1."""


class Pace:
    """The seconds that an amount takes, as a latency and a rate learnt from recent observations.

    A weighted least squares line through the observations, where each new one multiplies the weight of all
    earlier ones by `FORGETTING`. Before the first observation it is the prior. Afterwards only the prior's shape
    counts: scaled to the mean of the observations, it acts as two more of them, at zero and at twice their mean
    amount, so that even repeated observations of a single amount allow estimates for others.

    Args:
        latency: seconds, before the first observation.
        rate: amount per second, before the first observation.
    """

    def __init__(self, latency: float, rate: float) -> None:
        self._latency = latency
        self._rate = rate
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._start, self._slope = latency, 1 / rate
        """The line: seconds at amount zero, and seconds per unit of amount."""

    def observe(self, amount: float, seconds: float) -> None:
        keep = FORGETTING
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + amount
        self._y = keep * self._y + seconds
        self._xx = keep * self._xx + amount * amount
        self._xy = keep * self._xy + amount * seconds
        self._fit()

    def seconds(self, amount: float) -> float:
        """Estimate for `amount`; never negative, never decreasing with the amount."""
        return self._start + self._slope * amount

    def _fit(self) -> None:
        mean, height = self._x / self._weight, self._y / self._weight
        prior = self._latency + mean / self._rate
        twice = height * (prior + mean / self._rate) / prior
        # The two points lie on a line through (mean, height), so they do not move the mean.
        spread = self._xx - self._x * mean + 2 * SHAPE * mean**2
        rise = self._xy - self._x * height + 2 * SHAPE * mean * (twice - height)
        slope = max(0.0, rise / spread) if spread > 0 else 0.0
        if slope * mean > height:
            slope = height / mean  # Through the origin: the line must not promise less than was observed.
        self._start, self._slope = max(0.0, height - slope * mean), slope


@dataclass(frozen=True)
class Outstanding:
    """What a request still waits for."""

    waited: float
    """Seconds since its fetch began."""
    held: float
    """Seconds since it could have run."""
    total_bytes: int
    """Size of its fetch from disk, including what has landed."""
    ahead_bytes: int
    """Size of other fetches from disk that began earlier."""
    missing_tokens: int
    """Tokens to recompute if it does not wait."""
    remote_bytes: int = 0
    """Size of its fetch from the remote store and of those that began earlier; 0 if it has none."""


class WaitOrRecompute:
    """Learns how long fetching and computing take, and decides whether waiting is expected to pay off.

    A request waits while its fetch is expected to end before its tokens could be recomputed, and no longer than
    the fetch may reasonably take: `OVERDUE` times the estimate. If even that is short, it may lose `TOLERATED` of
    the recompute time, so that an unknown disk is tried at a bounded cost. If the disk turns out to be slow, this
    is measured, and the next request does not wait. Since fetches continue while requests are queued, a recovery
    of the disk is measured as well.

    The priors are those of an NVMe disk (100 us, 2 GB/s), a network (1 ms, 1 GB/s) and a GPU (20 ms, 10,000
    tokens per second).

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
        if fetch.remote_bytes:  # Both run in parallel.
            expected = max(expected, self.remote.seconds(fetch.remote_bytes))
        if expected - fetch.waited >= compute:
            return False
        patience = max(OVERDUE * expected, TOLERATED * compute)
        return fetch.waited < patience and fetch.held < CEILING
