"""`cached-attention plan`: storage that a workload needs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from cached_attention.cli.arguments import duration, size, size_or_none, words
from cached_attention.cli.capacity import (
    BYTES_PER_ELEMENT,
    GPU_PRICE,
    Deployment,
    kv_bytes_per_token,
    served_dtype,
    state_bytes,
    stored_dtype,
)
from cached_attention.units import format_size

DEFAULT_CONTEXT = 4096
NO_SHARE = "as a size such as 64GB, not a share."


class _Model(NamedTuple):
    """What the planner needs to know of a model."""

    bytes_per_token: int
    session_bytes: int = 0
    context: int = DEFAULT_CONTEXT
    """Tokens."""
    kv_dtype: str | None = None
    """In words; None if the bytes were given."""


def plan(
    config: Annotated[
        Path | None, typer.Argument(help="The model's config.json, or the directory it is in.", readable=False)
    ] = None,
    bytes_per_token: Annotated[
        int | None, typer.Option(min=1, help="KV of a token, instead of a config.")
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16, float32 or fp8; default: as SGLang serves the config by default."),
    ] = None,
    gpus: Annotated[int, typer.Option(min=1)] = 1,
    gpu_kv_size: Annotated[str, typer.Option(help="GPU memory left for KV, over all GPUs.")] = "20GB",
    host_size: Annotated[str, typer.Option(help=f"--cached-attention-host-size, {NO_SHARE}")] = "128GB",
    disk_size: Annotated[str, typer.Option(help=f"--cached-attention-disk-size, {NO_SHARE} 0: no disk.")] = "1TB",
    sessions_per_hour: Annotated[float, typer.Option(min=0.001, help="Distinct conversations.")] = 3600.0,
    session_tokens: Annotated[int, typer.Option(min=1, help="Mean length of a conversation.")] = 2000,
    longest_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest conversation; default: the model's context window.")
    ] = None,
    ttl: Annotated[str, typer.Option(help="--cached-attention-ttl, such as 8h; 0: nothing expires.")] = "1h",
    gpu_price: Annotated[float, typer.Option(min=0, help="US dollars per GPU and hour.")] = GPU_PRICE,
    speedup: Annotated[
        float | None, typer.Option(min=0.01, help="Measured ratio of GPU time without and with CachedAttention.")
    ] = None,
) -> None:
    """Estimate conversations per tier, hit rate and cost per hour with the formulas of the paper."""
    model = _model(config, bytes_per_token, kv_dtype)
    if longest_tokens is not None and longest_tokens < session_tokens:
        raise typer.BadParameter(
            f"--longest-tokens is {longest_tokens}, less than the mean length, --session-tokens, which is "
            f"{session_tokens}: raise the one or lower the other."
        )
    if speedup is not None and gpu_price == 0:
        raise typer.BadParameter("--gpu-price is 0, of which --speedup saves nothing: leave one of them out.")
    deployment = Deployment(
        model.bytes_per_token,
        session_tokens,
        longest_tokens or max(model.context, session_tokens),
        sessions_per_hour,
        duration("--ttl", ttl) or math.inf,
        gpus,
        size("--gpu-kv-size", gpu_kv_size),
        size("--host-size", host_size),
        size_or_none("--disk-size", disk_size),
        gpu_price,
        model.session_bytes,
    )
    console = Console()
    console.print(_tiers(deployment))
    console.print(_outlook(deployment, model.kv_dtype, speedup))


def _model(config: Path | None, bytes_per_token: int | None, kv_dtype: str | None) -> _Model:
    """From a config or from `bytes_per_token`.

    Raises:
        typer.BadParameter: both are given or none is, or the config or `kv_dtype` is not understood.
    """
    if kv_dtype is not None and kv_dtype not in BYTES_PER_ELEMENT:
        raise typer.BadParameter(f"--kv-dtype is {kv_dtype!r}: give one of {', '.join(BYTES_PER_ELEMENT)}.")
    if bytes_per_token is not None:
        if beside := "a config" if config else "--kv-dtype" if kv_dtype else None:
            raise typer.BadParameter(
                f"--bytes-per-token and {beside} are both given, and both say what KV takes: leave one out."
            )
        return _Model(bytes_per_token)
    if config is None:
        raise typer.BadParameter(
            "say what KV takes: give the model's config.json, the directory it is in, or --bytes-per-token."
        )
    values = _read(config)
    try:
        per_token = kv_bytes_per_token(values, kv_dtype or served_dtype(values))
        per_session = state_bytes(values)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    context = values.get("text_config", values).get("max_position_embeddings") or DEFAULT_CONTEXT
    return _Model(per_token, per_session, context, kv_dtype or _assumed(values))


def _assumed(values: Mapping[str, Any]) -> str:
    stored, served = stored_dtype(values), served_dtype(values)
    if stored == served:
        return f"{served}, as the config"
    return f"{served}, as SGLang by default; the config has {stored or 'none'}"


def _read(path: Path) -> dict[str, Any]:
    try:
        path = path / "config.json" if path.is_dir() else path
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise typer.BadParameter(
            f"{path} cannot be read ({error.strerror}): give a model's config.json, or the directory it is in."
        ) from error
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON ({error}): give a model's config.json.") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{path} is JSON, but not of a model: give a model's config.json.")
    return values


def _tiers(deployment: Deployment) -> Table:
    table = Table("tier", "size", "tokens", "conversations", "time until full")
    tiers = {"GPU": deployment.gpu_kv_size, "host": deployment.host_size}
    if deployment.disk_size:
        tiers["disk"] = deployment.disk_size
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


def _outlook(deployment: Deployment, kv_dtype: str | None, speedup: float | None) -> Table:
    table = Table(show_header=False)
    if kv_dtype is not None:
        table.add_row("KV dtype", kv_dtype)
    table.add_row("KV per token", f"{deployment.bytes_per_token:,} bytes")
    if deployment.session_bytes:
        table.add_row(
            "state of a conversation, of layers without attention", format_size(deployment.session_bytes)
        )
    table.add_row(
        "KV of a mean conversation", format_size(deployment.bytes_per_token * deployment.session_tokens)
    )
    if math.isinf(deployment.required):
        table.add_row("CCpUT: storage that would hold everything", "without limit, as nothing expires")
    else:
        table.add_row("CCpUT: storage that would hold everything", format_size(deployment.required))
        table.add_row("RCC/CCpUT: host and disk, of that", f"{deployment.ratio:.3f}")
        table.add_row("expected hit rate", f"{deployment.hit_rate:.0%}")
    table.add_row("GPUs per hour", f"${deployment.compute_cost:.2f}")
    table.add_row("host memory and disk per hour", f"${deployment.storage_cost:.2f}")
    if speedup is not None:
        table.add_row(f"saving at {speedup:g}x less GPU time", f"{deployment.saving(speedup):.0%}")
    return table
