"""How long does a returning user wait when the conversation is on disk?

Each conversation is computed and the server restarted, so that its pages are on disk and nowhere else. Then its
next turn is compared with a prompt of the same length that has to be computed: `benchmark.disk hit`, with a model
of the chosen shape. The read bandwidth of the machine's disk decides; each row has the bytes read from it.
"""

from __future__ import annotations

import shlex
import statistics
from dataclasses import asdict

from benchmark import disk
from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.setting import Setting

TTFT = Bound("TTFT of a conversation on disk to computing it again", 1.0)
"""No better is promised for an unknown disk: CachedAttention computes what it expects to compute faster."""
SIZES = {
    "llama-3-8b": (16_384, "--conversations=6 --history=8192 --host-size=12GB --disk-size=12GB"),
    "llama-2-13b": (8_192, "--conversations=4 --history=4096 --host-size=20GB --disk-size=20GB"),
    "tiny": (2_048, "--conversations=2 --history=512 --new=32 --host-size=256MB --disk-size=256MB"),
}
"""Context window in tokens, and the arguments of `benchmark.disk`."""


def run(setting: Setting, outcome: Outcome) -> None:
    window, sizes = SIZES[setting.shape_name]
    args = disk.parse(
        [
            "hit",
            *("--model-path", str(setting.model(window)), "--output", str(setting.output / setting.name)),
            *("--disk-path", str(setting.output / "disk"), "--server-args", shlex.join(setting.server_args)),
            *shlex.split(sizes),
        ]
    )
    turns = disk.measure_one_by_one(disk.Bench(args, args.conversations), seconds_per_read=0.0)
    outcome.rows += [asdict(turn) | {"disk_bytes": turn.reused["storage"] * setting.kv_bytes} for turn in turns]
    stored = sum(turn.reused["storage"] for turn in turns)
    times = [[turn.ttft_s for turn in turns if turn.kind == kind] for kind in ("from disk", "recompute")]
    outcome.notes.append(f"{stored} prompt tokens came from disk")
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    outcome.add(TTFT.judge(ratio if stored else None))
