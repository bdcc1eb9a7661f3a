"""SGLang on any machine without an accelerator, from the unmodified wheel."""

import logging
import os

logger = logging.getLogger(__name__)

PLATFORM_CLASS = "sglang.srt.platforms.plain_cpu.platform.PlainCpuPlatform"


def activate() -> str | None:
    """Class path of the plain-CPU platform, or None where an accelerator or another choice is there."""
    from sglang.srt.platforms.plain_cpu.detection import accelerator_in_sight

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None
    found = accelerator_in_sight()
    if found is not None:
        logger.debug("plain_cpu stays out: found %s", found)
        return None
    return PLATFORM_CLASS
