"""Reads the metrics and conversations of a running server's store."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from cached_attention.metrics import PREFIX

TIMEOUT = 10.0
"""Seconds."""
UNREACHABLE = (OSError, HTTPException)
"""The second: the server ended in the middle of an answer, or the URL is none."""


class ScrapeError(Exception):
    """The message says what is wrong with the server, and what to do."""


class Sample(NamedTuple):
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True)
class Scrape:
    """Samples taken at one moment, over all ranks that publish metrics."""

    samples: tuple[Sample, ...]
    at: float
    """Seconds on a monotonic clock."""

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of the store's metric `name`, or SGLang's `sglang:...`, that have all `labels`."""
        full = name if ":" in name else PREFIX + name
        return sum(
            sample.value
            for sample in self.samples
            if sample.name == full and labels.items() <= sample.labels.items()
        )

    def values(self, name: str, label: str) -> list[str]:
        """Values of `label` in the store's metric `name`, in order of appearance."""
        return list(dict.fromkeys(s.labels[label] for s in self.samples if s.name == PREFIX + name))


class Server:
    """A server, accessed over HTTP.

    Args:
        url: such as http://127.0.0.1:30000.
        api_key: the server's key, if it has one; needed for the conversations only.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._api_key = api_key

    def scrape(self) -> Scrape:
        """Read /metrics.

        Raises:
            ScrapeError: the server is unreachable, or has no metrics or no CachedAttention.
        """
        try:
            text = self._get("/metrics")
        except urllib.error.HTTPError as error:
            raise ScrapeError(
                f"{self.url} answers, but /metrics says {error.code}: start the server with --enable-metrics."
            ) from error
        except (*UNREACHABLE, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ScrapeError(
                f"{self.url} cannot be reached: {reason}. Is the server up, and the URL right?"
            ) from error
        samples = tuple(_samples(text))
        if not any(sample.name.startswith(PREFIX) for sample in samples):
            raise ScrapeError(
                f"{self.url} has metrics but none of CachedAttention: start the server with "
                "--enable-cached-attention and --enable-metrics."
            )
        return Scrape(samples, time.monotonic())

    def conversations(self) -> list[dict[str, Any]]:
        """Conversations with the most turns, of all ranks that answer /server_info.

        Raises:
            ScrapeError: the request was refused, or the response not understood.
        """
        try:
            states = json.loads(self._get("/server_info"))["internal_states"]
            return [known for state in states for known in state["cached_attention"]["hottest"]]
        except urllib.error.HTTPError as error:
            raise ScrapeError(f"/server_info says {error.code}: give the server's --api-key.") from error
        except (*UNREACHABLE, ValueError, KeyError, TypeError) as error:
            raise ScrapeError(f"/server_info: {type(error).__name__}: {error}.") from error

    def _get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return str(response.read().decode())


def _samples(text: str) -> Iterable[Sample]:
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                yield Sample(sample.name, sample.labels, sample.value)
    except ValueError as error:
        raise ScrapeError(f"/metrics is not in Prometheus' format: {error}.") from error
