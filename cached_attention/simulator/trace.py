"""Requests recorded from a service, in Mooncake's format."""

from __future__ import annotations

import json
from pathlib import Path

from cached_attention.simulator.request import Request

BLOCK = 512
"""Tokens per hash id."""


class TraceError(ValueError):
    """A trace cannot be read; the message says where and why."""


def read_trace(path: Path) -> list[Request]:
    """Requests of a JSONL file in the order of its lines, which must be the order of arrival.

    A line has `timestamp` (milliseconds), `input_length` and `output_length` (tokens), and `hash_ids`: one per
    `BLOCK` tokens of the prompt, including a last block that is not full; equal ids mean equal blocks after equal
    prefixes.

    Raises:
        OSError: the file cannot be read.
        TraceError: a line is not in that format, or arrives before the previous one.
    """
    requests: list[Request] = []
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            try:
                requests.append(_request(number, json.loads(line)))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise TraceError(
                    f"{path}, line {number}: {error!r}; give one JSON object per line with timestamp, "
                    "input_length, output_length and hash_ids."
                ) from error
            if len(requests) > 1 and requests[-1].arrival < requests[-2].arrival:
                raise TraceError(f"{path}, line {number} arrives before the line above: sort by timestamp.")
    return requests


def _request(number: int, fields: dict[str, object]) -> Request:
    ids = fields["hash_ids"]
    if not isinstance(ids, list):
        raise TypeError(f"hash_ids is {ids!r}, not a list")
    return Request(
        name=str(number),
        arrival=float(fields["timestamp"]) / 1000,  # type: ignore[arg-type]
        keys=tuple(int(one).to_bytes(8, "big") for one in ids),
        prompt_pages=len(ids),
        prompt=int(fields["input_length"]),  # type: ignore[call-overload]
        output=int(fields["output_length"]),  # type: ignore[call-overload]
    )
