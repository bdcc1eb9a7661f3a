"""A check that the scheduler's thread does not wait for the GPU in the linker's calls."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

CHECK_WAITS = "CACHED_ATTENTION_CHECK_WAITS"
"""Environment variable: if not empty, a call that waits raises instead. For tests and experiments on a GPU."""


def never_waits(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: if checks are on and there is a GPU, runs the method under torch's own guard."""
    if not os.environ.get(CHECK_WAITS) or not torch.cuda.is_available():
        return method

    @wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return method(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return checked
