"""How long does a user wait whose conversation has just outgrown the context window?

The first turn after an overflow, compared with the same tokens truncated and recomputed (the paper's TT), on one
server: `benchmark.overflow`, with a model of the chosen shape.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict
from typing import NamedTuple

from benchmark import overflow
from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting


class Sizes(NamedTuple):
    window: int
    """Tokens."""
    host_mb: int
    """Host memory, in megabytes."""
    arguments: str
    """Of `benchmark.overflow`: they make prompts outgrow the window."""


TTFT = Bound("TTFT after an overflow to truncate-and-recompute's", overflow.BOUND_TTFT)
REUSE = Bound("kept whole pages that were reused", overflow.BOUND_REUSE, at_least=True, unit="")
SIZES = {
    "llama-3-8b": Sizes(8_192, 24_000, "--conversations=3 --turns=30 --new=500 --answer=60"),
    "llama-2-13b": Sizes(4_096, 24_000, "--conversations=3 --turns=24 --new=300 --answer=60"),
    "tiny": Sizes(512, 256, "--conversations=1 --turns=6 --new=90 --answer=20"),
}


def pinned_bytes(setting: Setting) -> int:
    return SIZES[setting.shape_name].host_mb * 10**6


def run(setting: Setting, outcome: Outcome) -> None:
    window, host_mb, more = SIZES[setting.shape_name]
    places = ["--model-path", str(setting.model(window)), "--output", str(setting.scratch / setting.name)]
    sizes = [f"--host-size={host_mb}MB", *shlex.split(more)]
    args = overflow.parse([*places, *sizes, "--server-args", shlex.join(setting.server_args)])
    overflows = overflow.measure(args)
    outcome.rows += [asdict(one) for one in overflows]
    if not overflows:
        outcome.add(TTFT.judge(None), REUSE.judge(None))
        return
    ours, again = ([one.ttft_s for one in overflows], [one.recompute_ttft_s for one in overflows])
    outcome.add(TTFT.judge(statistics.mean(ours) / statistics.mean(again)))
    reused, reusable = (
        sum(one.cached_tokens for one in overflows),
        sum(one.reusable_tokens for one in overflows),
    )
    outcome.add(REUSE.judge(reused / reusable if reusable else None))
