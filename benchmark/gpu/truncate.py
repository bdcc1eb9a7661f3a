"""How long does a user wait whose conversation has just outgrown the context window?

The first turn after an overflow, compared with the same tokens truncated and recomputed (the paper's TT), on one
server: `benchmark.overflow`, with a model of the chosen shape.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict

from benchmark import overflow
from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting

TTFT = Bound("TTFT after an overflow to truncate-and-recompute's", overflow.BOUND_TTFT)
REUSE = Bound("kept whole pages that were reused", overflow.BOUND_REUSE, at_least=True, unit="")
SIZES = {
    "llama-3-8b": (8_192, "--conversations=3 --turns=30 --new=500 --answer=60 --host-size=24GB"),
    "llama-2-13b": (4_096, "--conversations=3 --turns=24 --new=300 --answer=60 --host-size=24GB"),
    "tiny": (512, "--conversations=1 --turns=6 --new=90 --answer=20 --host-size=256MB"),
}
"""Context window in tokens, and the arguments of `benchmark.overflow` that make prompts outgrow it."""


def run(setting: Setting, outcome: Outcome) -> None:
    window, sizes = SIZES[setting.shape_name]
    places = ["--model-path", str(setting.model(window)), "--output", str(setting.output / setting.name)]
    args = overflow.parse([*places, *shlex.split(sizes), "--server-args", shlex.join(setting.server_args)])
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
