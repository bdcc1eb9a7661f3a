"""How long does a user wait whose conversation has just outgrown the context window?

    python -m benchmark.model out/small-window --size 100m --context 1024
    python -m benchmark.overflow --model-path out/small-window

Conversations continue over several overflows, on one server. At each overflow the same server also gets the
tokens it keeps as a separate prompt, in a namespace of its own: truncated and recomputed (the paper's TT). It
also gets as many other new tokens after what was reused, which is now on the device: the lower limit, since the
new tokens must be computed in any case.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.multiturn import vocabulary_of
from benchmark.report import machine
from benchmark.server import Server, ServerError

PAGE = 64
BOUND_TTFT, BOUND_REUSE = 0.35, 0.9


@dataclass(frozen=True)
class Overflow:
    """The first turn after tokens were dropped."""

    conversation: int
    turn: int
    prompt_tokens: int
    """Kept tokens, including the new ones."""
    dropped_tokens: int
    reusable_tokens: int
    """Tokens in kept whole pages that were computed in an earlier turn; the last token of an answer never is."""
    cached_tokens: int
    ttft_s: float
    recompute_ttft_s: float
    """TTFT of the same tokens, none of them cached."""
    floor_ttft_s: float
    """TTFT of as many new tokens, with all others on the device."""


@dataclass(frozen=True)
class Reply:
    ttft_s: float
    meta_info: dict[str, Any]


class Conversations:
    """Users of one server, each of whom sends its whole history in every turn."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self._server = server
        self._args = args
        self._words = random.Random(args.seed)
        self._vocabulary = vocabulary_of(str(args.model_path))

    def words(self, count: int) -> list[int]:
        return self._words.choices(range(self._vocabulary // 4, self._vocabulary), k=count)

    def warm_up(self) -> None:
        """Whatever is compiled or loaded at first use must not count."""
        for _ in range(2):
            self._ask(self.words(self._args.new), salt="warm-up")

    def hold(self, conversation: int) -> list[Overflow]:
        """Run all turns of one conversation; returns those that overflowed."""
        history: list[int] = []
        dropped, overflows = 0, []
        for turn in range(self._args.turns):
            before = len(history)
            history += self.words(self._args.new)
            reply = self._ask(history)
            meta_info = reply.meta_info
            now_dropped = meta_info.get("truncated_tokens", 0)
            if now_dropped > dropped:
                kept = history[:PAGE] + history[PAGE + now_dropped :]
                cached = meta_info["cached_tokens"]
                reused = history[: now_dropped + cached]
                floor = self._ask([*reused, *self.words(len(kept) - cached)])
                recomputed = self._ask(kept, salt=f"{conversation} {turn}")
                overflows.append(
                    Overflow(
                        conversation,
                        turn,
                        meta_info["prompt_tokens"],
                        now_dropped,
                        (before - 1 - now_dropped) // PAGE * PAGE,
                        cached,
                        reply.ttft_s,
                        recomputed.ttft_s,
                        floor.ttft_s,
                    )
                )
            dropped = now_dropped
            history += self._answer(history)
        return overflows

    def _ask(self, tokens: Sequence[int], salt: str | None = None) -> Reply:
        started = time.perf_counter()
        reply = self._server.generate(tokens, 1, cache_salt=salt)
        return Reply(time.perf_counter() - started, reply["meta_info"])

    def _answer(self, tokens: Sequence[int]) -> list[int]:
        return list(self._server.generate(tokens, self._args.answer)["output_ids"])


def measure(args: argparse.Namespace) -> list[Overflow]:
    command = ["--page-size", str(PAGE), "--max-total-tokens", str(16 * args.window), "--enable-cached-attention"]
    command += ["--allow-auto-truncate", "--cached-attention-host-size", args.host_size]
    command += shlex.split(args.server_args)
    with Server(args.model_path, command, log=args.output.parent / "logs" / "overflow.log") as server:
        users = Conversations(server, args)
        users.warm_up()
        bar = tqdm(range(args.conversations), desc="conversations", unit="conversation")
        return [overflow for number in bar for overflow in users.hold(number)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("out/small-window"))
    parser.add_argument("--conversations", type=int, default=3)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--new", type=int, default=60, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=150, help="tokens of an answer")
    parser.add_argument("--host-size", default="2GB")
    parser.add_argument("--server-args", default="", help="more arguments for the server, in one string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/overflow"), help="of .json and .png")
    args = parser.parse_args(arguments)
    try:
        config = json.loads((args.model_path / "config.json").read_text())
    except OSError as error:
        parser.error(f"no model in {args.model_path}: make one as shown above ({error})")
    args.window = config["max_position_embeddings"]
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        overflows = measure(args)
    except (ServerError, OSError) as failure:
        print(f"overflow: {failure}", file=sys.stderr)
        return 1
    if not overflows:
        print(f"overflow: {args.turns} turns never outgrew {args.window} tokens: give more.", file=sys.stderr)
        return 1
    return _report(args, overflows)


def _report(args: argparse.Namespace, overflows: Sequence[Overflow]) -> int:
    ratios = [overflow.ttft_s / overflow.recompute_ttft_s for overflow in overflows]
    reuse = sum(o.cached_tokens for o in overflows) / sum(o.reusable_tokens for o in overflows)
    recompute = statistics.mean(o.recompute_ttft_s for o in overflows)
    ratio = statistics.mean(o.ttft_s for o in overflows) / recompute
    floor = statistics.mean(o.floor_ttft_s for o in overflows) / recompute
    table = Table(
        title=f"{len(overflows)} first turns after an overflow, window {args.window}", title_justify="left"
    )
    for name in ("", "measured", "bound"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("TTFT, to that of computing again", f"{ratio:.3f}x", f"<= {BOUND_TTFT}x")
    table.add_row("of a pair: lowest, median, highest", _spread(ratios), "")
    table.add_row("were all but the new tokens on the device", f"{floor:.3f}x", "")
    table.add_row("kept whole pages that were reused", f"{reuse:.1%}", f">= {BOUND_REUSE:.0%}")
    console = Console()
    console.print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"parameters": vars(args), "machine": machine(), "overflows": [asdict(o) for o in overflows]}
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    _save_figure(args.output.with_suffix(".png"), overflows)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")
    return 0 if ratio <= BOUND_TTFT and reuse >= BOUND_REUSE else 1


def _spread(ratios: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}x" for value in (min(ratios), statistics.median(ratios), max(ratios)))


def _save_figure(path: Path, overflows: Sequence[Overflow]) -> None:
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    numbers = range(1, len(overflows) + 1)
    axes.plot(numbers, [o.recompute_ttft_s for o in overflows], "o-", color="#8c8c8c", label="computed again")
    axes.plot(numbers, [o.ttft_s for o in overflows], "o-", color="#0072b2", label="CachedAttention")
    axes.plot(numbers, [o.floor_ttft_s for o in overflows], ":", color="#0072b2", label="new tokens alone")
    axes.set(xlabel="overflow", ylabel="time to first token, seconds", ylim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    # The server runs in a process group of its own: exit in a way that stops it.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
