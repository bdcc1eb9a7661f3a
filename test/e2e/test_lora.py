"""An adapter that was trained again, under its name, does not get the KV of the one before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmark.simulated_gpu.environment import SERVER_FLAGS, with_gpu

RANK = 8
PROJECTIONS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}


def make_adapter(model: Path, adapter: Path, seed: int) -> Path:
    """Random weights, large enough to change the answers."""
    config = json.loads((model / "config.json").read_text())
    hidden, head = config["hidden_size"], config["head_dim"]
    chance = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for projection, heads in PROJECTIONS.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, hidden, generator=chance)
            weights[f"{name}.lora_B.weight"] = torch.randn(config[heads] * head, RANK, generator=chance)
    adapter.mkdir()
    save_file(weights, adapter / "adapter_model.safetensors")
    peft = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": list(PROJECTIONS),
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(peft))
    return adapter


def test_a_retrained_adapter_computes_its_own_kv(
    models: Any, start: Any, town: Any, disk_tier: Any, tmp_path: Path
) -> None:
    model, serving = models(), tmp_path / "serving"
    old, new = (make_adapter(model, tmp_path / name, seed) for seed, name in enumerate(("old", "new")))
    # SGLang's LoRA needs pinned memory.
    gpu = {"command": True, "env": with_gpu()}
    lora = (*SERVER_FLAGS, "--enable-lora", "--lora-backend", "torch_native", "--lora-paths")
    words = town(1).conversations[0].words(300)

    def ask(server: Any, **request: Any) -> tuple[list[int], int]:
        reply = server.generate(words, 8, **request)
        return reply["output_ids"], (reply["meta_info"]["cached_tokens_details"] or {}).get("storage", 0)

    def serve(adapter: Path) -> tuple[list[int], int]:
        """With its weights in the place of the others."""
        shutil.rmtree(serving, ignore_errors=True)
        shutil.copytree(adapter, serving)
        tiers = (f"a={serving}", "--max-total-tokens", "1600", *disk_tier(tmp_path / "kv", "200MB"))
        with start(model, *lora, *tiers, host_size="30MB", **gpu) as server:
            return ask(server, lora_path="a")

    with start(model, *lora, f"old={old}", f"new={new}", "--max-total-tokens", "8000", **gpu) as server:
        expected = {path: ask(server, lora_path=path.name)[0] for path in (old, new)}
        assert ask(server)[0] not in expected.values(), "the adapters change nothing"
    assert expected[old] != expected[new]
    assert serve(old) == (expected[old], 0)
    assert serve(old) == (expected[old], 256)
    assert serve(new) == (expected[new], 0), "it got the KV of the adapter before it"
