"""Writes docs/flags.md from the definitions of the flags: `python -m docs.flags`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import sglang_cached_attention  # noqa: F401
from sglang.srt.mem_cache.cached_attention.conflicts import (
    DECODE_CACHE,
    DISAGGREGATION,
    ELASTIC,
    EXCLUSIVE,
    HOST_RECEIVE,
    RETRACTION,
    SPECULATION,
    UNDIVIDED,
    WITH_DRAFT,
    WITHOUT_DRAFT,
)
from sglang.srt.mem_cache.cached_attention.flags import (
    DISK_PATH,
    DISK_SIZE,
    ENABLE,
    FLAGS,
    MLA_DEDUP,
    REMOTE,
    Flag,
    option_of,
)
from sglang.srt.mem_cache.cached_attention.settings import AUTO_TRUNCATE, fold

from cached_attention.config import ConfigError

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = f"""# Flags

<!-- Written by `python -m docs.flags` from the definitions of the flags. -->

Each flag is also a keyword argument of `sgl.Engine` and a key of the YAML file that SGLang reads with `--config`.
Without `{ENABLE.option}` SGLang behaves as if the package were not installed, except that the package also lets
it run on machines without an accelerator.

Sizes are `64GB` (10^9 bytes), `64GiB` (2^30) or a share of what is free, such as `0.5`. Durations are `90s`,
`30m`, `1h` or `2d`. A wrong value stops the server before it loads the model, with one sentence that says what
to do; for each flag this page quotes its answer to the value `?`.
"""

ENGINE = f"""## From Python, and from a file

```python
sgl.Engine(model_path="MODEL", {ENABLE.name}=True, cached_attention_host_size="64GB")
```

```yaml
# python -m sglang.launch_server --config serve.yaml
model-path: MODEL
{ENABLE.option[2:]}: true
cached-attention-host-size: 64GB
```
"""


def render() -> str:
    return "\n".join([INTRODUCTION, *map(_section, FLAGS), _contradictions(), ENGINE])


def _section(flag: Flag) -> str:
    default = {None: "none", False: "off"}.get(flag.default, flag.default)
    lines = [
        f"## {_title(flag)}\n",
        re.sub(r" \(default: [^)]*\)", "", _code(flag.help)) + "\n",
        f"- Default: {default}",
        f"- In Python: `{flag.name}`",
    ]
    if refusal := _refusal(flag):
        occasion = "A wrong value" if "'?'" in refusal else "On its own"
        lines.append(f"- {occasion}: {_code(refusal)}")
    return "\n".join(lines) + "\n"


def _title(flag: Flag) -> str:
    """Without dashes: sites differ in the anchors that they make of them."""
    return flag.option.lstrip("-")


def _code(text: str) -> str:
    """Options set as code."""
    return re.sub(r"(?<![\w`-])--[a-z][a-z-]*[a-z]", r"`\g<0>`", text)


def _refusal(flag: Flag) -> str | None:
    """What a server says that is given `?` for `flag`; None where that is a value."""
    if flag.default is False:
        return None
    values: dict[str, Any] = {ENABLE.name: True, AUTO_TRUNCATE: True, flag.name: "?"}
    if flag is DISK_SIZE:
        values[DISK_PATH.name] = "."
    try:
        fold(values)
    except ConfigError as error:
        return str(error)
    return None


def _contradictions() -> str:
    rows = [f"| `{option_of(name)}` | {reason} |" for name, reason in EXCLUSIVE.items()]
    rows += [f"| `{option_of(name)}` above 1 | {reason} |" for name, reason in UNDIVIDED.items()]
    decode = f"`{option_of(DISAGGREGATION)} decode`"
    needed = f"`{REMOTE.option}` and `{option_of(DECODE_CACHE)}`"
    apart = "it loads nothing, and [saves answers](deployment.md#answers-of-decode-servers) for others"
    rows += [f"| {decode} without {needed} | {apart} |"]
    rows += [f"| {decode} with `{DISK_PATH.option}` or `{MLA_DEDUP.option}` | it loads nothing |"]
    taken = f"`{option_of(RETRACTION)} host_pool`, `{option_of(HOST_RECEIVE)}` below 1"
    rows += [f"| {taken} | SGLang's own cache would take the place of this one |"]
    joins = "a rank that joins later cannot agree on what is shared"
    rows += [f"| `{REMOTE.option}` with `{option_of(ELASTIC)}` | {joins} |"]
    speculation = f"`{option_of(SPECULATION)}`"
    rows.append(f"| {speculation} other than {', '.join(WITH_DRAFT)}, {WITHOUT_DRAFT} | it is not supported |")
    rows.append(f"| {speculation} with a draft model, and `{MLA_DEDUP.option}` | its KV is not broadcast |")
    table = "\n".join(["| not together with | because |", "|---|---|", *rows])
    return f"## What {_title(ENABLE)} excludes\n\n{table}\n"


def main() -> None:
    PAGE.write_text(render())
    print(f"{PAGE}: {len(FLAGS)} flags")


if __name__ == "__main__":
    main()
