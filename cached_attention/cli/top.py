"""`cached-attention top`: live view of a running server."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cached_attention.cli.arguments import fail, words
from cached_attention.cli.scrape import Scrape, ScrapeError, Server
from cached_attention.units import format_size

HOTTEST = 10
"""Conversations shown."""
BAR = 24
"""Width in characters."""
WINDOW = 10.0
"""Shortest time in seconds over which rates are averaged."""
REDRAWN = 2
"""Redraws per second, so that a resized terminal is quickly up to date."""
WIDE = 110
"""Characters from which two tables fit side by side."""


def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the server, such as http://127.0.0.1:30000.")],
    once: Annotated[bool, typer.Option("--once", help="Print one frame, with totals only, and end.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="SGLANG_API_KEY", help="The server's, where it has one.")
    ] = None,
) -> None:
    """Show a running server: its tiers, hit rate, transfers, queue, evictions and hottest conversations.

    The server needs --enable-metrics. Press Ctrl-C to quit.
    """
    server, console = Server(url, api_key), Console()
    try:
        first = server.scrape()
        if once:
            console.print(_frame(server, first, None))
        else:
            _watch(server, first, interval, console)
    except ScrapeError as error:
        fail(str(error), error)


def _watch(server: Server, first: Scrape, interval: float, console: Console) -> None:
    past = deque([first])
    frame = _frame(server, first, None)
    with Live(frame, console=console, screen=True, refresh_per_second=REDRAWN) as live:
        try:
            while True:
                time.sleep(interval)
                try:
                    now = server.scrape()
                except ScrapeError as error:
                    past.clear()
                    live.update(Group(Text(f"{error} Trying again.", style="red"), frame), refresh=True)
                    continue
                while len(past) > 1 and now.at - past[1].at >= WINDOW:
                    past.popleft()
                frame = _frame(server, now, past[0] if past else None)
                live.update(frame, refresh=True)
                past.append(now)
        except KeyboardInterrupt:
            return


class _Change:
    """Counters now, and their increase since `before`."""

    def __init__(self, now: Scrape, before: Scrape | None) -> None:
        self.now, self._before = now, before

    def of(self, name: str, **labels: str) -> float | None:
        """Increase of a counter; None if there is no earlier sample or the server was restarted."""
        if self._before is None:
            return None
        grown = self.now.total(name, **labels) - self._before.total(name, **labels)
        return grown if grown >= 0 else None

    def rate(self, name: str, **labels: str) -> float | None:
        grown = self.of(name, **labels)
        return None if grown is None or self._before is None else grown / (self.now.at - self._before.at)


def _frame(server: Server, now: Scrape, before: Scrape | None) -> RenderableType:
    change = _Change(now, before)
    model = next((s.labels["model_name"] for s in now.samples if "model_name" in s.labels), "?")
    title = Text.assemble(("CachedAttention", "bold"), f"  {server.url}  {model}  {time.strftime('%H:%M:%S')}")
    return Group(
        title,
        _tiers(now),
        _Beside(_hits(change), _transfers(change)),
        _Beside(_queue(change), _evictions(change)),
        _conversations(server),
    )


@dataclass(frozen=True)
class _Beside:
    """Two tables side by side on a wide terminal, one below the other on a narrow one."""

    left: Table
    right: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < WIDE:
            yield from (self.left, self.right)
            return
        row = Table.grid(padding=(0, 4), pad_edge=False)
        row.add_row(self.left, self.right)
        yield row


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(first, min_width=10)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _tiers(now: Scrape) -> Table:
    table = _table("Tiers", "tier")
    table.add_column("fill")
    for column in ("", "pages", "errors", "damaged", "health"):
        table.add_column(column, justify="right", no_wrap=True)
    own = now.values("resident_bytes", "tier")
    for tier in dict.fromkeys([*own, *now.values("tier_healthy", "tier")]):
        errors = [
            f"{now.total(name, tier=tier):,.0f}" for name in ("tier_errors_total", "checksum_failures_total")
        ]
        # How full a remote store is, which others fill as well, a server does not know.
        fill = _fill(now, tier) if tier in own else ("-", "-", "-")
        table.add_row(tier, *fill, *errors, _health(now, tier))
    return table


def _fill(now: Scrape, tier: str) -> tuple[RenderableType, str, str]:
    used, capacity = (now.total(f"{what}_bytes", tier=tier) for what in ("resident", "capacity"))
    bar = ProgressBar(total=capacity or 1, completed=used, width=BAR)
    size = f"{format_size(used)} of {format_size(capacity)}"
    return bar, size, f"{now.total('resident_pages', tier=tier):,.0f}"


def _health(now: Scrape, tier: str) -> Text:
    ranks = [s.value for s in now.samples if s.name.endswith("_tier_healthy") and s.labels["tier"] == tier]
    out = sum(not value for value in ranks)
    return Text("out of service", style="red") if out else Text("good", style="green")


def _hits(change: _Change) -> Table:
    table = _table("Prompt tokens from", "", "now", "total", "tokens")
    tiers = change.now.values("hit_tokens_total", "tier")
    whole, lately = change.now.total("prompt_tokens_total"), change.of("prompt_tokens_total")
    hits = {tier: change.now.total("hit_tokens_total", tier=tier) for tier in tiers}
    recent = {tier: change.of("hit_tokens_total", tier=tier) for tier in tiers}
    for tier in tiers:
        table.add_row(tier, _share(recent[tier], lately), _share(hits[tier], whole), f"{hits[tier]:,.0f}")
    computed = None if lately is None else lately - sum(part or 0.0 for part in recent.values())
    rest = whole - sum(hits.values())
    table.add_row("computed", _share(computed, lately), _share(rest, whole), f"{rest:,.0f}")
    return table


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.1%}" if part is not None and whole else "-"


def _transfers(change: _Change) -> Table:
    table = _table("Transfers", "", "now", "total", "pages", "mean")
    for direction in change.now.values("transfer_bytes_total", "direction"):
        for tier in change.now.values("transfer_bytes_total", "tier"):
            labels = {"direction": direction, "tier": tier}
            if not (pages := change.now.total("transfer_pages_total", **labels)):
                continue
            rate = change.rate("transfer_bytes_total", **labels)
            moved = format_size(change.now.total("transfer_bytes_total", **labels))
            seconds = change.now.total("transfer_seconds_sum", **labels)
            mean = seconds / max(1.0, change.now.total("transfer_seconds_count", **labels))
            speed = "-" if rate is None else f"{format_size(rate)}/s"
            table.add_row(f"{direction} {tier}", speed, moved, f"{pages:,.0f}", f"{mean * 1e3:.1f} ms")
    waits = change.now.total("load_wait_seconds_count")
    mean = change.now.total("load_wait_seconds_sum") / max(1.0, waits)
    lately = change.rate("load_wait_seconds_sum")
    now = "-" if lately is None else f"{lately:.1%} of time"
    table.add_row("load wait", now, f"{waits:,.0f} batches", "", f"{mean * 1e3:.1f} ms")
    return table


def _queue(change: _Change) -> Table:
    table = _table("Queue", "running", "waiting", "looked ahead", "recomputed", "truncated", "not saved")
    now = change.now
    table.add_row(
        f"{now.total('sglang:num_running_reqs'):,.0f}",
        f"{now.total('sglang:num_queue_reqs'):,.0f}",
        f"{now.total('look_ahead_requests'):,.0f}",
        f"{now.total('recompute_decisions_total'):,.0f}",
        f"{now.total('truncated_prompts_total'):,.0f}",
        f"{now.total('declined_pages_total'):,.0f} pages",
    )
    return table


def _evictions(change: _Change) -> Table:
    now = change.now
    reasons = now.values("evicted_pages_total", "reason")
    table = _table("Pages that left", "tier", "now", *reasons)
    for tier in now.values("evicted_pages_total", "tier"):
        rate = change.rate("evicted_pages_total", tier=tier)
        counts = [f"{now.total('evicted_pages_total', tier=tier, reason=reason):,.0f}" for reason in reasons]
        table.add_row(tier, "-" if rate is None else f"{rate:,.1f}/s", *counts)
    if not table.rows:
        table.add_row("none yet")
    return table


def _conversations(server: Server) -> RenderableType:
    try:
        known = server.conversations()
    except ScrapeError as error:
        return Text(f"Hottest conversations: {error}", style="yellow")
    table = _table("Hottest conversations", "", "turns", "tokens", "reused", "idle", "in")
    for conversation in sorted(known, key=_heat, reverse=True)[:HOTTEST]:
        table.add_row(
            conversation["conversation"],
            f"{conversation['turns']:,}",
            f"{conversation['tokens']:,}",
            f"{conversation['reused_tokens']:,}",
            words(conversation["idle_s"]),
            ", ".join(conversation["tiers"]) or "no tier",
        )
    return table


def _heat(conversation: dict[str, Any]) -> tuple[int, float]:
    return conversation["turns"], -conversation["idle_s"]
