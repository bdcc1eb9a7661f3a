"""How long does a returning user wait when the conversation is on disk?

Each conversation is computed and the server restarted, so that its pages are on disk and nowhere else. Then its
next turn is compared with a prompt of the same length that has to be computed: `benchmark.disk hit`, with a model
of the chosen shape. The read bandwidth of the machine's disk decides; each row has the bytes read from it.

Nothing may be evicted meanwhile. With c conversations, the disk gets c + 1 histories from the first server, one
of them to warm up, and from the second c + 1 as well, c of them recomputed: 2c + 2. Host memory of the second
server gets c + 1, and the c that return: 2c + 1. A history with 100 new tokens and its last page filled is

    llama-3-8b     8,320 tokens of 131,072 B: 1.09 GB, c = 6: 15.3 GB on disk, 14.2 GB in host memory, of 24 each
    llama-2-13b    4,224 tokens of 819,200 B: 3.46 GB, c = 4: 34.6 GB on disk, 31.1 GB in host memory, of 40 each
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from benchmark import disk
from benchmark.gpu.bound import Bound
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.room import file_system, require_disk
from benchmark.gpu.setting import Setting
from cached_attention.policy.waiting import TOLERATED

TTFT = Bound("TTFT of a conversation on disk to computing it again", 1 + TOLERATED)
"""A request may wait `TOLERATED` of the time to compute for a disk that is unknown yet; no better is promised."""
PAGE_CACHE = "no O_DIRECT here"
"""In the log of a server whose file system cannot read past the page cache."""


class Sizes(NamedTuple):
    window: int
    """Tokens."""
    tier_mb: int
    """Size of host memory, and of the disk tier, in megabytes."""
    conversations: int
    history: int
    """Tokens, whole pages."""
    new: int


SIZES = {
    "llama-3-8b": Sizes(16_384, 24_000, conversations=6, history=8_192, new=100),
    "llama-2-13b": Sizes(8_192, 40_000, conversations=4, history=4_096, new=100),
    "tiny": Sizes(2_048, 256, conversations=2, history=512, new=32),
}


def pinned_bytes(setting: Setting) -> int:
    return SIZES[setting.shape_name].tier_mb * 10**6


def run(setting: Setting, outcome: Outcome) -> None:
    sizes = SIZES[setting.shape_name]
    directory = setting.scratch / "disk"
    directory.mkdir(parents=True, exist_ok=True)
    require_disk(directory, sizes.tier_mb * 10**6)
    args = disk.parse(
        [
            "hit",
            *("--model-path", str(setting.model(sizes.window)), "--output", str(setting.scratch / setting.name)),
            *("--disk-path", str(directory), "--server-args", shlex.join(setting.server_args)),
            *(f"--host-size={sizes.tier_mb}MB", f"--disk-size={sizes.tier_mb}MB"),
            *(f"--conversations={sizes.conversations}", f"--history={sizes.history}", f"--new={sizes.new}"),
        ]
    )
    turns = disk.measure_one_by_one(disk.Bench(args, args.conversations), seconds_per_read=0.0)
    outcome.notes.append(f"pages on {file_system(directory)}, {_reads(setting.scratch / 'logs')}")
    judge(turns, sizes.history, setting.kv_bytes, outcome)


def judge(turns: Sequence[disk.Turn], history: int, kv_bytes: int, outcome: Outcome) -> None:
    """Only turns count all of whose history came from disk; without any, nothing was measured."""
    outcome.rows += [asdict(turn) | {"disk_bytes": turn.reused["storage"] * kv_bytes} for turn in turns]
    returning = [turn for turn in turns if turn.kind == "from disk"]
    whole = [turn.ttft_s for turn in returning if turn.reused["storage"] >= history // disk.PAGE * disk.PAGE]
    computed = [turn.ttft_s for turn in turns if turn.kind == "recompute"]
    outcome.notes.append(
        f"{len(whole)} of {len(returning)} histories came from disk in full; the others do not count"
    )
    outcome.add(TTFT.judge(statistics.median(whole) / statistics.median(computed) if whole else None))


def _reads(logs: Path) -> str:
    texts = [log.read_text(errors="replace") for log in logs.glob("disk-*.log")]
    return "read through the page cache" if any(PAGE_CACHE in text for text in texts) else "read with O_DIRECT"
