"""Small models with random weights and a tokenizer, generated on the spot, for benchmarks and tests.

    python -m benchmark.model out/model --size 100m

Greedy decoding gives readable nonsense that never settles on one token and depends on the whole context, so two
runs that agree token for token have really read the same KV cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.modeling_utils import PreTrainedModel

from benchmark.tokenizer import make_tokenizer, word_ids

Size = Literal["tiny", "100m"]
Dtype = Literal["float32", "bfloat16"]
Architecture = Literal["llama", "deepseek-mla", "gemma3", "mellum", "qwen3.5", "llama-eagle"]
"""`gemma3`, `mellum`: every other layer has a sliding window; with `mellum` SGLang frees the KV that has left it.
`qwen3.5`: every other layer is a gated delta net. `llama-eagle`: a draft model for a `llama` of this size."""

SPEC_FILE = "benchmark-model.json"
HEAD_DIM = 64
SLIDING_WINDOW = 96
"""Tokens."""
# Standard deviation of the attention logits: high enough that a single far token can change the output.
ATTENTION_SHARPNESS = 3.0
# For the heads of a gated delta net, before softplus: the first forgets in a thousand tokens, the last in twenty.
STATE_DECAYS = (-7.0, -3.0)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama: hidden, intermediate and vocabulary in elements; the others are counts."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(hidden=192, intermediate=384, layers=4, heads=4, kv_heads=2, vocabulary=1_024),
    # Wide and shallow, with few heads: attention takes the small share of the work that it has in large models.
    "100m": Shape(hidden=1_024, intermediate=3_584, layers=7, heads=8, kv_heads=4, vocabulary=8_192),
}


@dataclass(frozen=True)
class Spec:
    """Everything that determines the bytes of a model directory; `context` in tokens."""

    size: Size
    context: int
    dtype: Dtype
    architecture: Architecture
    seed: int

    def marker(self) -> dict[str, object]:
        """Written beside the weights, to recognise them later."""
        return {**asdict(self), "shape": asdict(SHAPES[self.size])}


def make_model(
    path: Path,
    size: Size = "tiny",
    context: int = 4_096,
    dtype: Dtype = "float32",
    architecture: Architecture = "llama",
    seed: int = 0,
) -> Path:
    """Create the directory `path` with config, weights and tokenizer; returns it.

    A complete directory made with the same arguments is reused; anything else in `path` raises FileExistsError.
    """
    spec = Spec(size, context, dtype, architecture, seed)
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        _check_same(path, spec)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        _write(draft, spec)
        draft.chmod(0o755)
        _publish(draft, path, spec)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


def _check_same(path: Path, spec: Spec) -> None:
    marker = path / SPEC_FILE
    present = json.loads(marker.read_text()) if marker.exists() else None
    if present != spec.marker():
        found = present or "something else"
        raise FileExistsError(f"{path} holds {found}, wanted {spec.marker()}; remove it or take another path")


def _publish(draft: Path, path: Path, spec: Spec) -> None:
    try:
        os.replace(draft, path)
    except OSError:  # another process was faster
        _check_same(path, spec)


def _write(directory: Path, spec: Spec) -> None:
    import torch

    shape = SHAPES[spec.size]
    tokenizer = make_tokenizer(shape.vocabulary, spec.context)
    model = _empty_model(_config(spec, shape))
    _initialise(model, word_ids(tokenizer), spec.seed)
    model.to(getattr(torch, spec.dtype))
    if spec.architecture == "llama-eagle":
        _save_draft(model, directory, spec.seed)
    else:
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / SPEC_FILE).write_text(json.dumps(spec.marker(), indent=2) + "\n")


def _config(spec: Spec, shape: Shape) -> PretrainedConfig:
    from transformers import AutoConfig

    begin, end, pad = range(3)
    shared = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": spec.context,
        "rope_theta": 10_000.0,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": pad,
        "tie_word_embeddings": False,
        "dtype": spec.dtype,
    }
    if spec.architecture == "llama-eagle":
        shared["num_hidden_layers"] = 1
    grouped = {"num_key_value_heads": shape.kv_heads, "head_dim": HEAD_DIM}
    if spec.architecture.startswith("llama"):
        return AutoConfig.for_model("llama", **grouped, **shared)
    if spec.architecture == "gemma3":
        # Queries and keys are normalised: the scale makes attention sharp, not the weights.
        sharp = {"query_pre_attn_scalar": round(HEAD_DIM / ATTENTION_SHARPNESS**2)}
        return AutoConfig.for_model("gemma3_text", **grouped, **_sliding_windows(shape), **sharp, **shared)
    if spec.architecture == "mellum":
        return AutoConfig.for_model(
            "mellum", **grouped, **_sliding_windows(shape), **_no_experts(shape), **shared
        )
    if spec.architecture == "qwen3.5":
        return AutoConfig.for_model("qwen3_5_text", **grouped, **_delta_nets(shape), **shared)
    return AutoConfig.for_model("deepseek_v2", **_latent_attention(shape), **shared)


def _sliding_windows(shape: Shape) -> dict[str, object]:
    kinds = ["sliding_attention", "full_attention"]
    types = [kinds[layer % 2] for layer in range(shape.layers)]
    return {"layer_types": types, "sliding_window": SLIDING_WINDOW}


def _no_experts(shape: Shape) -> dict[str, object]:
    return {"mlp_layer_types": ["dense"] * shape.layers, "num_local_experts": 2, "num_experts_per_tok": 1}


def _delta_nets(shape: Shape) -> dict[str, object]:
    kinds = ["linear_attention", "full_attention"]
    types = [kinds[layer % 2] for layer in range(shape.layers)]
    heads = {"linear_num_key_heads": shape.kv_heads, "linear_num_value_heads": shape.heads}
    dims = {"linear_key_head_dim": HEAD_DIM, "linear_value_head_dim": HEAD_DIM}
    return {"layer_types": types, "full_attention_interval": 2, **heads, **dims}


def _latent_attention(shape: Shape) -> dict[str, int | None]:
    dense_layers = shape.layers  # all of them: the experts below exist only in the config
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": dense_layers, "moe_layer_freq": 1}
    return {
        "num_key_value_heads": shape.heads,
        "q_lora_rank": None,
        "kv_lora_rank": 2 * HEAD_DIM,
        "qk_nope_head_dim": HEAD_DIM,
        "qk_rope_head_dim": HEAD_DIM,
        "v_head_dim": HEAD_DIM,
        "moe_intermediate_size": shape.intermediate // 2,
        **experts,
        **groups,
    }


def _empty_model(config: PretrainedConfig) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to_empty(device="cpu")


def _initialise(model: PreTrainedModel, emitted: list[int], seed: int) -> None:
    """Set weights for unit-variance activations, sharp attention, and logits that only `emitted` can win."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    # Gemma and Qwen3.5 add 1 to the scale of norms; Gemma multiplies embeddings by the root of their width.
    gemma, qwen = (model.config.model_type.startswith(name) for name in ("gemma", "qwen3_5"))
    norm, embedding = float(not (gemma or qwen)), model.config.hidden_size**-0.5 if gemma else 1.0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not gemma and name.rpartition(".")[0].endswith(("q_norm", "k_norm")):
                weight.fill_(ATTENTION_SHARPNESS**0.5 - 1 + norm)
            elif name.endswith("linear_attn.norm.weight"):
                weight.fill_(1.0)
            elif name.endswith("dt_bias"):
                weight.copy_(torch.linspace(*STATE_DECAYS, len(weight)))
            elif weight.dim() == 1:
                weight.fill_(norm)
            elif "embed_tokens" in name:
                weight.normal_(0.0, embedding, generator=generator)
            else:
                gain = ATTENTION_SHARPNESS**0.5 if "q_proj" in name or "k_proj" in name else 1.0
                weight.normal_(0.0, gain * weight.shape[-1] ** -0.5, generator=generator)
        silent = torch.ones(model.lm_head.weight.shape[0], dtype=torch.bool)
        silent[emitted] = False
        model.lm_head.weight[silent] = 0.0


def _save_draft(model: PreTrainedModel, directory: Path, seed: int) -> None:
    """Save the layer of `model` as an EAGLE draft, which joins the target's hidden state to the next token."""
    import torch
    from safetensors.torch import save_file

    left_out = ("lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")
    weights = {
        name.removeprefix("model."): weight for name, weight in model.state_dict().items() if name not in left_out
    }
    hidden, dtype = model.config.hidden_size, model.dtype
    joined = torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(seed)) * hidden**-0.5
    weights |= {"fc.weight": joined.to(dtype), "fc.bias": torch.zeros(hidden, dtype=dtype)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["LlamaForCausalLMEagle"]
    model.config.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small random model and its tokenizer.")
    parser.add_argument("path", type=Path, help="directory to make; reused when complete")
    parser.add_argument("--size", choices=get_args(Size), default="100m")
    parser.add_argument("--context", type=int, default=4_096, help="context window in tokens")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    parser.add_argument("--architecture", choices=get_args(Architecture), default="llama")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = make_model(args.path, args.size, args.context, args.dtype, args.architecture, args.seed)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    detail = f"{args.architecture} {args.size}, {args.context} tokens of context"
    print(f"{path}: {detail}, {weights / 2**20:.0f} MiB of weights")


if __name__ == "__main__":
    main()
