"""SGLang on any machine without an accelerator, with the unmodified wheel."""

import logging
import os

logger = logging.getLogger(__name__)

# Name of the platform (SGLANG_PLATFORM) and of its attention backend (--attention-backend).
NAME = "plain_cpu"
PLATFORM_CLASS = "sglang.srt.platforms.plain_cpu.platform.PlainCpuPlatform"


def activate() -> str | None:
    """Class path of the plain-CPU platform, or None if there is an accelerator or another platform was chosen."""
    chosen = os.environ.get("SGLANG_PLATFORM")
    if chosen and chosen != NAME:
        return None
    if not chosen and os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None

    from sglang.srt.platforms.plain_cpu.detection import accelerator_in_sight

    found = accelerator_in_sight()
    if found is None:
        logger.info("No accelerator found: SGLang runs on the CPU (platform %s)", NAME)
        return PLATFORM_CLASS
    if chosen:
        logger.error("SGLANG_PLATFORM=%s, but torch sees %s: hide it first (CUDA_VISIBLE_DEVICES=)", NAME, found)
    return None
