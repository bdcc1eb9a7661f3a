"""The hooks of SGLang that the plugin registers."""

from __future__ import annotations

import subprocess
import sys

HOOKED = """
import sglang.srt.entrypoints.engine, sglang.srt.managers.io_struct, sglang.srt.managers.scheduler
from sglang.srt.mem_cache.cached_attention import plugin
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
plugin._leave_prompts_whole()
plugin._prepare_arguments()
plugin.HookRegistry.register(plugin.TOKENIZER_MANAGER + ".__init__", plugin._serve_hints)
HookRegistry.apply_hooks()
ours = [
    target
    for target, hooks in HookRegistry._hooks.items()
    if any(hook.__module__.startswith("sglang.srt.mem_cache.cached_attention") for _, hook, _ in hooks)
]
print(len(ours), [target for target in ours if target not in HookRegistry._patched])
"""


def test_whatever_is_hooked_is_there() -> None:
    """SGLang only logs what it cannot hook, and goes on."""
    done = subprocess.run([sys.executable, "-c", HOOKED], capture_output=True, text=True, timeout=120)
    number, missing = done.stdout.splitlines()[-1].split(" ", 1)
    assert int(number) > 30
    assert missing == "[]", done.stderr
