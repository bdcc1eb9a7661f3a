"""Commands and their order in the help text."""

from __future__ import annotations

import typer

from cached_attention.cli.inspect import inspect
from cached_attention.cli.plan import plan
from cached_attention.cli.prune import prune
from cached_attention.cli.top import top
from cached_attention.cli.verify import verify

app = typer.Typer(
    name="cached-attention",
    help="Look into, check, shrink and plan the stores of CachedAttention, and watch a server.",
    no_args_is_help=True,
    add_completion=False,
)
for command in (inspect, verify, prune, plan, top):
    app.command()(command)
