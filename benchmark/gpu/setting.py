"""Setting of an experiment: the device, the shape of the model, and sizes that suit both."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.model import Shape
from benchmark.simulated_gpu.environment import LIBRARIES, SERVER_FLAGS

SHAPES = {
    "llama-3-8b": Shape(hidden=4_096, intermediate=14_336, layers=32, heads=32, kv_heads=8, vocabulary=128_256),
    "llama-2-13b": Shape(hidden=5_120, intermediate=13_824, layers=40, heads=40, kv_heads=40, vocabulary=32_000),
    "tiny": Shape(hidden=128, intermediate=256, layers=3, heads=4, kv_heads=2, vocabulary=512),
}
"""Model shapes by name; `tiny` is for machines without a GPU."""
FOR_GPU = (
    "--dtype=bfloat16",
    "--sampling-backend=pytorch",
    # Batch sizes to capture; the default captures 58 for prefill, which takes a minute.
    "--cuda-graph-max-bs-decode=32",
    "--cuda-graph-backend-prefill=disabled",
    "--mem-fraction-static=0.85",
)


@dataclass(frozen=True)
class Setting:
    """One run of an experiment.

    Args:
        experiment: its name.
        device: `cuda` or `cpu`.
        shape_name: a key of `SHAPES`.
        output: directory of the results.
        scratch: directory of logs, models and what else need not be kept.
        parts: parts of the experiment, in order; empty: all of them.
    """

    experiment: str
    device: str
    shape_name: str
    output: Path
    scratch: Path
    parts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the results, different for each shape and each choice of parts."""
        return "-".join((self.experiment, self.shape_name, *self.parts))

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def head_dim(self) -> int:
        return self.shape.hidden // self.shape.heads

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def kv_bytes(self) -> int:
        """KV bytes of one token in all layers."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight matrices."""
        shape = self.shape
        attention = shape.hidden * self.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
        layer = attention + 3 * shape.hidden * shape.intermediate
        return (layer * shape.layers + 2 * shape.hidden * shape.vocabulary) * self.dtype.itemsize

    @property
    def is_simulated(self) -> bool:
        """Whether the GPU is that of `benchmark.simulated_gpu`: experiments run, their times mean nothing."""
        return LIBRARIES in os.environ

    @property
    def is_real_gpu(self) -> bool:
        return self.on_gpu and not self.is_simulated

    @property
    def server_args(self) -> tuple[str, ...]:
        """Arguments for a server of `model`: random weights, no tokenizer."""
        return ("--load-format=dummy", "--skip-tokenizer-init", *self.device_args("flashinfer"))

    def device_args(self, attention: str) -> tuple[str, ...]:
        """Arguments that suit the device, with the `attention` backend where it is a GPU."""
        if not self.on_gpu:
            return ()
        if self.is_simulated:
            return ("--dtype=bfloat16", *SERVER_FLAGS)
        return (f"--attention-backend={attention}", *FOR_GPU)

    def runs(self, part: str) -> bool:
        return not self.parts or part in self.parts

    def model(self, context: int) -> Path:
        """Directory with the config of a Llama of this shape and a window of `context` tokens; no weights."""
        directory = self.scratch / "models" / f"{self.shape_name}-{context}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self._config(context), indent=1) + "\n")
        return directory

    def _config(self, context: int) -> dict[str, Any]:
        shape = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": context,
            "rope_theta": 10_000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
