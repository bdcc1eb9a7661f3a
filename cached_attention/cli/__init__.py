"""The `cached-attention` command."""

from cached_attention.cli.app import app

__all__ = ["app"]
