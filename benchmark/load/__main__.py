"""Does a server stay correct, and small, under many clients, while its tiers fail and recover?

    python -m benchmark.model out/tiny --size tiny
    python -m benchmark.load --model-path out/tiny --clients 500 --minutes 10 [--encrypt] [--remote 128MB]

Clients hold conversations, abort requests, close connections and send hints; an operator inspects the server,
uses its endpoints for operators, and once empties the whole cache; the disk fails in several ways, and of a
remote store the master and the process that lends it memory are killed alternately. Every tenth answer is
afterwards compared with that of a server that keeps everything on the device.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.load.clock import TICK, Clock
from benchmark.load.crowd import HINT, Crowd, Habits
from benchmark.load.figure import save_figure
from benchmark.load.ledger import Ledger
from benchmark.load.outcome import Outcome, growth
from benchmark.load.reference import Comparison, compare
from benchmark.load.trouble import DiskTrouble, RemoteTrouble
from benchmark.load.watch import Sample, Watch
from benchmark.load.wire import Wire
from benchmark.mooncake import Lender, Master
from benchmark.multiturn import check_context, vocabulary_of
from benchmark.server import Server, ServerError
from benchmark.workload import WorkloadShape

PAGE = ("--page-size", "64")
START_S = 900.0
"""Generous, for a busy machine."""
CLIENT_TTL = 3
"""Seconds after which a Mooncake master forgets clients that are gone, so that an outage ends soon."""
DRIFT = 0.75
"""Healthy time of the remote store relative to the disk's, so that their outages overlap in every way."""
FEWEST_LOOKS = 10
"""Samples of the server needed to fit a line through its memory."""
SHOWN = 5
"""Most wrong answers and failures that are printed."""


def run(args: argparse.Namespace) -> Outcome:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=args.disk_path))
        trouble = DiskTrouble(Path(directory) / "fault.json", args.calm, args.outage)
        command = [
            *PAGE,
            "--max-total-tokens",
            str(args.device_tokens),
            "--enable-cache-report",
            "--enable-metrics",
        ]
        command += ["--enable-cached-attention", "--cached-attention-host-size", args.host_size]
        command += [
            "--cached-attention-disk-path",
            f"{directory}/kv",
            "--cached-attention-disk-size",
            args.disk_size,
        ]
        command += shlex.split(args.server_args)
        if args.encrypt:
            command += ["--cached-attention-encryption-key-file", str(_make_key(Path(directory) / "key"))]
        remote_trouble = None
        if args.remote:
            remote_trouble, url = _remote_store(args, stack)
            command += ["--cached-attention-remote", url]
        env = trouble.env | {"CACHED_ATTENTION_CHECK_INVARIANTS": "1"}
        log = args.output.parent / "logs" / "load.log"
        with Server(args.model_path, command, env=env, log=log, timeout_s=START_S) as server:
            wire, watch, final, hits = asyncio.run(_load(server, trouble, remote_trouble, args))
    return Outcome(
        ledger=wire.ledger,
        samples=watch.samples,
        final=final,
        faults=trouble.faults,
        flushed=watch.flushed,
        stalled=wire.clock.lost,
        comparison=_compare(wire.ledger, args),
        hits=hits,
        remote_faults=None if remote_trouble is None else remote_trouble.faults,
    )


def _make_key(path: Path) -> Path:
    path.touch(0o600)
    path.write_bytes(os.urandom(32))
    return path


def _remote_store(args: argparse.Namespace, stack: ExitStack) -> tuple[RemoteTrouble, str]:
    """A Mooncake store on this machine, and its URL; the server and another process lend it memory."""
    log = args.output.parent / "logs" / "load-master.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    master = stack.enter_context(Master(log, CLIENT_TTL))
    lender = stack.enter_context(Lender(master, args.remote))
    return RemoteTrouble(master, lender, DRIFT * args.calm, args.outage), master.url(args.remote)


async def _load(
    server: Server, trouble: DiskTrouble, remote_trouble: RemoteTrouble | None, args: argparse.Namespace
) -> tuple[Wire, Watch, dict[str, Any], dict[str, int]]:
    seconds = args.minutes * 60
    habits = Habits(vocabulary=vocabulary_of(str(args.model_path)))
    with tqdm(total=round(seconds), desc="load", unit="s") as bar:

        def show(sample: Sample) -> None:
            bar.update(min(round(sample.at), bar.total) - bar.n)
            disk = sample.fault or ("well" if sample.disk_healthy else "out of service")
            memory = sum(sample.rss.values()) >> 20
            bar.set_postfix_str(f"{sample.answers} answers, {memory} MiB, disk {disk}")

        async with Wire(server.url, Ledger()) as wire:
            crowd = Crowd(wire, args.shape, habits, args.clients, args.seed)
            watch = Watch(server.process.pid, crowd, trouble, args.interval, remote_trouble)
            beside = (
                wire.clock.run(),
                trouble.run(),
                *([] if remote_trouble is None else [remote_trouble.run()]),
                watch.run(show),
                _later(wire.clock, seconds / 2, watch.flush()),
            )
            await _beside(crowd.live(seconds), *beside)
            await crowd.forget_hints()
            final = await watch.rest()
            await watch.look()
            hits = await watch.hits()
    return wire, watch, final, hits


async def _beside(work: Coroutine[Any, Any, None], *others: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and `others` until it ends; an exception in any of them is raised."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(other) for other in others]
        await work
        for task in tasks:
            task.cancel()


async def _later(clock: Clock, seconds: float, work: Coroutine[Any, Any, None]) -> None:
    while clock.now() < seconds:
        await asyncio.sleep(TICK)
    await work


def _compare(ledger: Ledger, args: argparse.Namespace) -> Comparison:
    command = [*PAGE, "--max-total-tokens", str(args.reference_tokens)]
    log = args.output.parent / "logs" / "load-reference.log"
    with Server(args.model_path, command, log=log, timeout_s=START_S) as reference:
        return asyncio.run(compare(reference.url, ledger.kept))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, default=Path("out/tiny"))
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--turns", type=int, default=6, help="of a conversation")
    parser.add_argument("--history", type=int, default=200, help="tokens a conversation begins with")
    parser.add_argument("--new", type=int, default=40, help="tokens of a turn")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--think", type=float, default=2.0, help="seconds between turns, on average")
    parser.add_argument("--device-tokens", type=int, default=16_384, help="of the device pool")
    parser.add_argument("--reference-tokens", type=int, default=65_536, help="of the reference's device pool")
    parser.add_argument("--host-size", default="64MB")
    parser.add_argument("--disk-size", default="768MB")
    parser.add_argument(
        "--disk-path", type=Path, help="where the disk tier is made; default: with temporary files"
    )
    parser.add_argument("--encrypt", action="store_true", help="what lies on disk and in the remote store")
    parser.add_argument(
        "--remote",
        metavar="SIZE",
        help="share pages through a Mooncake store, to which the server and another process lend so much each",
    )
    parser.add_argument("--calm", type=float, default=40.0, help="seconds that a tier is well")
    parser.add_argument("--outage", type=float, default=20.0, help="seconds that it fails then")
    parser.add_argument("--interval", type=float, default=3.0, help="seconds between looks at the server")
    parser.add_argument(
        "--server-args", default="--cached-attention-wait complete", help="more for the server under load"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/load"), help="of .json and .png")
    args = parser.parse_args(arguments)
    if args.minutes * 60 < FEWEST_LOOKS * args.interval:
        parser.error(f"--minutes {args.minutes:g} is too short to look at memory every {args.interval:g} s")
    try:
        args.shape = WorkloadShape(1, args.turns, args.history, args.new, args.answer, think_time_s=args.think)
        check_context(args.shape, args.model_path)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        outcome = run(args)
    except (ServerError, OSError) as failure:
        print(f"load: {failure}", file=sys.stderr)
        return 1
    console = Console()
    console.print(_table(outcome, args))
    for trouble in [*outcome.comparison.wrong[:SHOWN], *outcome.ledger.failures.most_common(SHOWN)]:
        console.print(str(trouble), markup=False)
    outcome.save(args.output.with_suffix(".json"), vars(args))
    save_figure(args.output.with_suffix(".png"), outcome)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")
    return 0 if all(check.holds for check in outcome.checks()) else 1


def _table(outcome: Outcome, args: argparse.Namespace) -> Table:
    table = Table(title=f"{args.clients} clients, {args.minutes:g} minutes", title_justify="left")
    for name in ("", "measured", "bound", ""):
        table.add_column(name, justify="right" if name else "left")
    for check in outcome.checks():
        table.add_row(check.what, check.measured, check.bound, "holds" if check.holds else "does not hold")
    table.add_section()
    for what, measured in _figures(outcome):
        table.add_row(what, measured)
    return table


def _figures(outcome: Outcome) -> Iterator[tuple[str, str]]:
    ledger = outcome.ledger
    prompts = sum(answer.prompt_tokens for answer in ledger.answers)
    yield "answers", f"{len(ledger.answers):,}"
    for name, seconds in outcome.ttft.items():
        yield f"TTFT {name}", f"{seconds:.1f} s"
    for tier, tokens in outcome.cached.items():
        yield f"prompt tokens from {tier}", f"{tokens / prompts:.1%}"
    for tier, tokens in outcome.hits.items():
        yield f"tokens from {tier}, aborted requests included", f"{tokens:,}"
    for what, count in ledger.aborts.items():
        yield f"given up: {what}", f"{count:,}"
    yield "hints", f"{sum(count for (path, _), count in ledger.statuses.items() if path == HINT):,}"
    yield "faults of the disk", str(outcome.faults)
    if outcome.remote_faults is not None:
        yield "faults of the remote store", str(outcome.remote_faults)
    yield "answers that differ in a tie", str(outcome.comparison.ties)
    for process in outcome.samples[-1].rss:
        yield f"growth of {process}", f"{growth(outcome.samples, process) / 2**20:+.1f} MiB"


if __name__ == "__main__":
    # The server runs in a process group of its own: exit in a way that stops it.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
