"""`cached-attention plan`: storage that a workload needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import duration, size, words
from cached_attention.cli.capacity import DEFAULT_DTYPE, GPU_PRICE, Deployment, kv_bytes_per_token, state_bytes
from cached_attention.config import format_size

DEFAULT_CONTEXT = 4096


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="The model's config.json, or the directory it is in.", exists=True)
    ] = None,
    bytes_per_token: Annotated[
        int | None, typer.Option(min=1, help="KV of a token, instead of a config.")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or fp8.")] = DEFAULT_DTYPE,
    gpus: Annotated[int, typer.Option(min=1)] = 1,
    gpu_kv_size: Annotated[str, typer.Option(help="GPU memory left for KV, over all GPUs.")] = "20GB",
    host_size: Annotated[str, typer.Option(help="--cached-attention-host-size")] = "128GB",
    disk_size: Annotated[str, typer.Option(help="--cached-attention-disk-size")] = "1TB",
    sessions_per_hour: Annotated[float, typer.Option(min=0.001, help="Distinct conversations.")] = 3600.0,
    session_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a conversation.")] = 2000,
    longest_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation; default: the model's context window.")
    ] = None,
    ttl: Annotated[str, typer.Option(help="--cached-attention-ttl")] = "1h",
    gpu_price: Annotated[float, typer.Option(help="US dollars per GPU and hour.")] = GPU_PRICE,
    speedup: Annotated[
        float | None, typer.Option(min=0.01, help="Measured ratio of GPU time without and with CachedAttention.")
    ] = None,
) -> None:
    """Estimate conversations per tier, hit rate and cost per hour with the formulas of the paper."""
    values = _read(config) if config else {}
    try:
        per_token = bytes_per_token or kv_bytes_per_token(values, kv_dtype)
        per_session = 0 if bytes_per_token else state_bytes(values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    context = values.get("text_config", values).get("max_position_embeddings", DEFAULT_CONTEXT)
    deployment = Deployment(
        per_token,
        session_tokens,
        longest_tokens or max(context, session_tokens),
        sessions_per_hour,
        _lifetime(ttl),
        gpus,
        size(gpu_kv_size),
        size(host_size),
        size(disk_size),
        gpu_price,
        per_session,
    )
    console = Console()
    console.print(_tiers(deployment))
    console.print(_outlook(deployment, speedup))


def _lifetime(ttl: str) -> float:
    if not (seconds := duration(ttl)):
        raise typer.BadParameter("a --ttl of 0 is no plan: give the longest time between two turns, such as 24h.")
    return seconds


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} is not a model's config.json.")
    return values


def _tiers(deployment: Deployment) -> Table:
    table = Table("tier", "size", "tokens", "conversations", "time until full")
    tiers = {"GPU": deployment.gpu_kv_size, "host": deployment.host_size, "disk": deployment.disk_size}
    for name, held in tiers.items():
        sessions = deployment.sessions_in(held)
        table.add_row(
            name,
            format_size(held),
            f"{deployment.tokens_in(held):,}",
            f"{sessions:,.0f}",
            words(sessions / deployment.sessions_per_hour * 3600),
        )
    return table


def _outlook(deployment: Deployment, speedup: float | None) -> Table:
    table = Table(show_header=False)
    table.add_row("KV per token", f"{deployment.bytes_per_token:,} bytes")
    if deployment.session_bytes:
        table.add_row(
            "state of a conversation, of layers without attention", format_size(deployment.session_bytes)
        )
    table.add_row(
        "KV of a mean conversation", format_size(deployment.bytes_per_token * deployment.session_tokens)
    )
    table.add_row("CCpUT: storage that would hold everything", format_size(deployment.required))
    table.add_row("RCC/CCpUT: host and disk, of that", f"{deployment.ratio:.3f}")
    table.add_row("expected hit rate", f"{deployment.hit_rate:.0%}")
    table.add_row("GPUs per hour", f"${deployment.compute_cost:.2f}")
    table.add_row("host memory and disk per hour", f"${deployment.storage_cost:.2f}")
    if speedup is not None:
        table.add_row(f"saving at {speedup:g}x less GPU time", f"{deployment.saving(speedup):.0%}")
    return table
