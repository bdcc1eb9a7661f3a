"""How long does a returning user wait when the conversation is on disk?

    python -m benchmark.disk hit      # compared with recomputing it, on the same server
    python -m benchmark.disk slow     # the same, on a disk that takes 200 ms per read
    python -m benchmark.disk queue    # 40 conversations return at once: look-ahead, and fetching on admission

Conversations are computed once; then the server is restarted, so that they are on disk and nowhere else.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

SLOW_READS = Path(__file__).parent / "slow_reads"
PAGE = 64
ON_ADMISSION = ("--cached-attention-look-ahead", "1")


@dataclass(frozen=True)
class Turn:
    """One answered request: its kind, and its time to first token in seconds."""

    kind: str
    conversation: int
    ttft_s: float
    prompt_tokens: int
    reused: dict[str, int]
    """Prompt tokens by the tier they came from."""

    @property
    def reused_tokens(self) -> int:
        return sum(self.reused.values())


class Bench:
    """Histories, a directory with their pages, and servers that use it."""

    def __init__(self, args: argparse.Namespace, conversations: int) -> None:
        self._args = args
        self._model: Path = args.model_path
        self._words = random.Random(args.seed)
        self._vocabulary = vocabulary_of(str(self._model))
        self.histories = [self.words(args.history) for _ in range(conversations)]
        self._disk: Path = args.disk_path / "kv"
        self._pace: Path = args.disk_path / "seconds-per-read"
        self._logs: Path = args.output.parent / "logs"

    def words(self, count: int) -> list[int]:
        return self._words.choices(range(self._vocabulary // 4, self._vocabulary), k=count)

    @contextmanager
    def server(self, *more: str, seconds_per_read: Any = 0) -> Iterator[Server]:
        """A server that opens the directory; reads are slowed down once it is ready."""
        args = self._args
        self._pace.parent.mkdir(parents=True, exist_ok=True)
        self._pace.unlink(missing_ok=True)
        # Room on the device for running requests, not for earlier ones.
        device = (args.history + 2 * args.new) * (args.concurrency + 1) // PAGE * PAGE
        command = ["--max-total-tokens", str(device), "--page-size", str(PAGE), "--enable-cache-report"]
        command += ["--max-running-requests", str(args.concurrency), "--enable-cached-attention"]
        command += ["--cached-attention-host-size", args.host_size, "--cached-attention-disk-path"]
        command += [str(self._disk), "--cached-attention-disk-size", args.disk_size, *more]
        command += shlex.split(args.server_args)
        env = self._slowed() if seconds_per_read else {}
        log = self._logs / f"disk-{time.monotonic_ns()}.log"
        with Server(self._model, command, env=env, log=log) as running:
            running.generate(self.words(args.history), 1)
            running.generate(self.words(PAGE), 1)
            self._pace.write_text(json.dumps(seconds_per_read))
            yield running

    def _slowed(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(SLOW_READS), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, "SLOW_READS": str(self._pace)}

    def fill(self) -> None:
        """Compute every history once and wait until all of it is on disk."""
        shutil.rmtree(self._disk, ignore_errors=True)
        with self.server() as server:
            for history in tqdm(self.histories, desc="conversations computed", unit="conversation"):
                server.generate(history, 1)
                self._settle(server)

    def _settle(self, server: Server) -> None:
        deadline = time.monotonic() + 120
        while self.state(server)["dirty"]:
            if time.monotonic() > deadline:
                raise ServerError("the disk did not take all pages in two minutes")
            time.sleep(0.05)

    @staticmethod
    def state(server: Server) -> dict[str, Any]:
        info = json.loads(server.get("/server_info"))
        state: dict[str, Any] = info["internal_states"][0]["cached_attention"]
        return state

    def page_bytes(self, server: Server) -> int:
        return int(self.state(server)["page_bytes"])

    def returning(self, server: Server, kind: str, conversation: int) -> Turn:
        """The next turn of a conversation that is on disk."""
        return _ask(server, kind, conversation, self.histories[conversation] + self.words(self._args.new))

    def fresh(self, server: Server, conversation: int) -> Turn:
        """A prompt as long as that of a returning turn, with nothing cached."""
        return _ask(server, "recompute", conversation, self.words(self._args.history + self._args.new))

    def all_at_once(self, server: Server, kind: str) -> list[Turn]:
        """The next turns of all conversations, sent in order, all at once."""
        with ThreadPoolExecutor(len(self.histories)) as pool:
            turns = []
            for conversation in range(len(self.histories)):
                turns.append(pool.submit(self.returning, server, kind, conversation))
                time.sleep(0.005)  # Keeps the order.
            bar = tqdm(turns, desc=kind, unit="turn")
            return [turn.result() for turn in bar]


def _ask(server: Server, kind: str, conversation: int, prompt: Sequence[int]) -> Turn:
    started = time.perf_counter()
    reply = server.generate(prompt, 1)
    elapsed = time.perf_counter() - started
    details = reply["meta_info"].get("cached_tokens_details") or {}
    reused = {tier: details.get(tier, 0) for tier in ("device", "host", "storage")}
    return Turn(kind, conversation, elapsed, len(prompt), reused)


def measure_one_by_one(bench: Bench, seconds_per_read: float) -> list[Turn]:
    """Alternates between new prompts and returning turns of the same length, one request at a time."""
    bench.fill()
    turns = []
    with bench.server(seconds_per_read=seconds_per_read) as server:
        for conversation in tqdm(range(len(bench.histories)), desc="returning turns", unit="turn"):
            turns.append(bench.fresh(server, conversation))
            turns.append(bench.returning(server, "from disk", conversation))
    return turns


def measure_queue(bench: Bench, args: argparse.Namespace) -> list[Turn]:
    """All conversations return at once; each round runs every kind of server."""
    bench.fill()
    turns: list[Turn] = []
    for _ in range(args.rounds):
        with bench.server(*ON_ADMISSION, seconds_per_read=args.queue_read_s) as server:
            turns += bench.all_at_once(server, "on admission")
        with bench.server(seconds_per_read=args.queue_read_s) as server:
            turns += bench.all_at_once(server, "look-ahead")
        with bench.server(seconds_per_read=args.quick_read_s) as server:
            turns += bench.all_at_once(server, "all reads equal")
        with bench.server() as server:
            first = args.history // PAGE * bench.page_bytes(server)
        slow = {"below": first, "seconds": 100 * args.quick_read_s, "otherwise": args.quick_read_s}
        with bench.server(seconds_per_read=slow) as server:
            turns += bench.all_at_once(server, "one 100x slower")
    return turns


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=("hit", "slow", "queue"))
    parser.add_argument("--model-path", type=Path, default=Path("out/model"))
    parser.add_argument("--conversations", type=int, help="default: 8, in the queue 40")
    parser.add_argument("--history", type=int, default=2_048, help="tokens")
    parser.add_argument("--new", type=int, default=100, help="tokens of a returning turn")
    parser.add_argument("--concurrency", type=int, default=2, help="requests that run at once")
    parser.add_argument("--host-size", default="4GB")
    parser.add_argument("--disk-size", default="8GB")
    parser.add_argument(
        "--disk-path", type=Path, default=Path("out/disk"), help="where the pages go; kv/ is emptied"
    )
    parser.add_argument("--slow-read-s", type=float, default=0.2, help="seconds for a read of the slow disk")
    parser.add_argument("--queue-read-s", type=float, default=0.04, help="seconds for a read, for the queue")
    parser.add_argument(
        "--quick-read-s", type=float, default=0.02, help="of which one conversation takes 100 times"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of the queue")
    parser.add_argument("--server-args", default="", help="more arguments for every server, in one string")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of .json and .png; default: out/disk-SCENARIO")
    args = parser.parse_args(arguments)
    args.output = args.output or Path(f"out/disk-{args.scenario}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    bench = Bench(args, args.conversations or (40 if args.scenario == "queue" else 8))
    try:
        if args.scenario == "queue":
            turns = measure_queue(bench, args)
        else:
            turns = measure_one_by_one(bench, args.slow_read_s if args.scenario == "slow" else 0.0)
    except (ServerError, OSError) as failure:
        print(f"disk: {failure}", file=sys.stderr)
        return 1
    _report(args, turns)
    return 0


def _report(args: argparse.Namespace, turns: Sequence[Turn]) -> None:
    kinds = {kind: [turn for turn in turns if turn.kind == kind] for kind in dict.fromkeys(t.kind for t in turns)}
    table = Table(title=f"Returning turns, {args.history} + {args.new} tokens", title_justify="left")
    for name in (
        "",
        "turns",
        "TTFT mean",
        "P50",
        "highest",
        "to the first",
        "reused of whole pages",
        "from disk",
    ):
        table.add_column(name, justify="right" if name else "left")
    reference = statistics.mean(turn.ttft_s for turn in next(iter(kinds.values())))
    whole = args.history // PAGE * PAGE
    for kind, group in kinds.items():
        times = [turn.ttft_s for turn in group]
        reused = statistics.mean(turn.reused_tokens for turn in group) / whole
        stored = statistics.mean(turn.reused["storage"] for turn in group) / whole
        seconds = [f"{value:.3f} s" for value in (statistics.mean(times), statistics.median(times), max(times))]
        ratio = f"{statistics.mean(times) / reference:.3f}x"
        table.add_row(kind, str(len(group)), *seconds, ratio, f"{reused:.0%}", f"{stored:.0%}")
    console = Console()
    console.print(table)
    _others(console, kinds)
    content = {"parameters": vars(args), "machine": machine(), "turns": [asdict(turn) for turn in turns]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    _save_figure(args.output.with_suffix(".png"), kinds)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")


def _others(console: Console, kinds: dict[str, list[Turn]]) -> None:
    """Effect of one conversation with slow reads on all others."""
    if "one 100x slower" not in kinds:
        return
    means = [
        statistics.mean(turn.ttft_s for turn in kinds[kind] if turn.conversation)
        for kind in ("one 100x slower", "all reads equal")
    ]
    console.print(f"the others, with one 100x slower: {means[0] / means[1]:.3f}x of all reads equal")


def _save_figure(path: Path, kinds: dict[str, list[Turn]]) -> None:
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = ("#8c8c8c", "#0072b2", "#009e73", "#e69f00")
    for colour, (kind, group) in zip(colours, kinds.items(), strict=False):
        times = sorted(turn.ttft_s for turn in group)
        shares = [(place + 1) / len(times) for place in range(len(times))]
        axes.step([0, *times], [0, *shares], where="post", color=colour, label=kind)
    axes.set(xlabel="time to first token, seconds", ylabel="share of turns", xlim=(0, None), ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    # The servers run in process groups of their own: exit in a way that stops them.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
