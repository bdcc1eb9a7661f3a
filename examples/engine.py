"""Offline: `sgl.Engine` with CachedAttention, a batch of conversations over several turns.

    python examples/engine.py --model-path out/model

The device pool is too small for all conversations, so that each one has been evicted from the device when its
next turn arrives, and is loaded from host memory.
"""

# mypy sees this repository's part of the sglang package only.
# mypy: disable-error-code="attr-defined,name-defined"

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import sglang as sgl

CONVERSATIONS = 6
TURNS = 3
HISTORY_TOKENS = 600
NEW_TOKENS = 32
# Two of the six conversations, with their answers.
DEVICE_TOKENS = 2 * 1_024


def play(engine: sgl.Engine, vocabulary: int, output_tokens: int) -> list[dict[str, int]]:
    """Run all turns; returns for each turn the cached prompt tokens by tier, summed over the conversations."""
    source = random.Random(0)
    words = range(vocabulary // 4, 3 * vocabulary // 4)
    prompts: list[list[int]] = [source.choices(words, k=HISTORY_TOKENS) for _ in range(CONVERSATIONS)]
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    by_turn = []
    for turn in range(TURNS):
        for prompt in prompts:
            prompt += source.choices(words, k=NEW_TOKENS)
        answers: list[dict[str, Any]] = engine.generate(input_ids=prompts, sampling_params=sampling)
        tiers = {"device": 0, "host": 0, "storage": 0}
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt += answer["output_ids"]
            details = answer["meta_info"].get("cached_tokens_details") or {}
            for tier in ("device", "host", "storage"):
                tiers[tier] += details.get(tier, 0)
        total = sum(answer["meta_info"]["prompt_tokens"] for answer in answers)
        print(f"turn {turn + 1}: prompt_tokens={total} cached_tokens={sum(tiers.values())} {tiers}")
        by_turn.append(tiers)
    return by_turn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, default=Path("out/model"))
    parser.add_argument("--host-size", default="1GB", help="host memory for KV cache")
    parser.add_argument("--disk-path", help="directory for KV cache; a second run finds the first one's")
    parser.add_argument("--disk-size", default="1GB", help="what the directory never exceeds")
    parser.add_argument("--max-tokens", type=int, default=16, help="length of an answer")
    args = parser.parse_args()
    config = json.loads((args.model_path / "config.json").read_text())
    engine = sgl.Engine(
        model_path=str(args.model_path),
        enable_cached_attention=True,
        cached_attention_host_size=args.host_size,
        cached_attention_disk_path=args.disk_path,
        cached_attention_disk_size=args.disk_path and args.disk_size,
        # Offline, saving computation matters more than an early first token.
        cached_attention_wait="complete",
        max_total_tokens=DEVICE_TOKENS,
        # SGLang's own default would serve a float32 model in float16.
        dtype=config["dtype"],
        log_level="error",
    )
    try:
        by_turn = play(engine, config["vocab_size"], args.max_tokens)
    finally:
        engine.shutdown()
    if not all(tiers["host"] + tiers["storage"] for tiers in by_turn[1:]):
        print("a returning turn took nothing from the hierarchy", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
