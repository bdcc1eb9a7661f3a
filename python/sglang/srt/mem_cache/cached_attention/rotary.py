"""How each layer of an SGLang model rotates its keys, which must be known to move them to other positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import LinearScalingRotaryEmbedding, RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import (
    DeepseekScalingRotaryEmbedding,
    DualChunkRotaryEmbedding,
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    Gemma4RotaryEmbedding,
    Llama3RotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
)
from sglang.srt.layers.rotary_embedding.yarn import YaRNScalingRotaryEmbedding
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, KVCache, MLATokenToKVPool

from cached_attention.position.rotation import Pairing, Rotation


class UnsupportedRotationError(ValueError):
    """Keys of this model cannot be moved to other positions: truncation must stay off."""


def key_rotations(model: torch.nn.Module, pool: KVCache, drafts: Sequence[KVCache] = ()) -> list[Rotation | None]:
    """Per layer of `pool`: how its keys are rotated; None for layers without positions (NoPE).

    Accepts exactly the classes whose tables are a function of position alone. A subclass, or a class that is not
    known here, may rotate by something else, and a wrong token is the worst outcome.

    Args:
        drafts: the pools of the draft models, whose keys would have to be moved as well.

    Raises:
        UnsupportedRotationError: the keys cannot be moved; the message says why in one line.
    """
    if drafts:
        _refuse("it is served with a draft model that has keys of its own")
    if not pool.dtype.is_floating_point or pool.dtype.itemsize < 2:
        _refuse(f"its KV cache has the dtype {pool.dtype}")
    if isinstance(pool, DSATokenToKVPool):
        _refuse("its sparse attention keeps keys of its own, rotated and quantised")
    layers: dict[int, Rotation | None] = {}
    windows = set()
    for attention, core in _attentions(model):
        windows.add(core.sliding_window_size > 0)
        layers[core.layer_id] = _rotation(attention, core, pool)
    if len(windows) > 1:
        _refuse("some of its layers have a sliding window and others have none, which may have no positions")
    wanted = range(pool.start_layer, pool.start_layer + pool.layer_num)
    if missing := [layer for layer in wanted if layer not in layers]:
        _refuse(f"layer {missing[0]} has no attention of a known kind")
    return [layers[layer] for layer in wanted]


def _attentions(model: torch.nn.Module) -> Iterable[tuple[torch.nn.Module, RadixAttention]]:
    for module in model.modules():
        for child in module.children():
            if isinstance(child, RadixAttention):
                yield module, child


def _rotation(attention: torch.nn.Module, core: RadixAttention, pool: KVCache) -> Rotation | None:
    if not hasattr(attention, "rotary_emb") or core.is_cross_attention:
        _refuse(f"{type(attention).__name__} does not rotate its keys: learned positions, ALiBi or none")
    if core.use_irope:
        _refuse("it attends in chunks that begin at fixed positions")
    if type(attention).__name__ == "HunYuanAttention" and attention.use_qk_norm:
        _refuse("it normalises its keys after it has rotated them")
    if attention.rotary_emb is None:
        return None
    if isinstance(pool, MLATokenToKVPool):
        return rotation_of(attention.rotary_emb, start=pool.kv_lora_rank)
    if hasattr(attention, "qk_rope_head_dim"):
        _refuse("its latent attention keeps whole keys instead of latents")
    return rotation_of(attention.rotary_emb)


def rotation_of(module: Any, start: int = 0) -> Rotation:
    """The rotation of one of SGLang's rotary modules, with the frequencies that the module computes itself.

    The attention factor of yarn is left out: keys from the module already include it.

    Args:
        start: first rotated element of a head's vector.

    Raises:
        UnsupportedRotationError: the module is not supported; the message says why in one line.
    """
    frequencies = FREQUENCIES.get(type(module))
    if frequencies is None:
        reasons = (reason for kind, reason in REFUSED.items() if isinstance(module, kind))
        _refuse(f"its positions are those of {type(module).__name__}" + next(reasons, ""))
    with module.cos_sin_cache.device:  # Powers differ by a bit between devices; the module used this one.
        inv_freq = frequencies(module).double().cpu()
    pairing = Pairing.HALVES if module.is_neox_style else Pairing.INTERLEAVED
    return Rotation(tuple(inv_freq.tolist()), pairing, start)


def _of_base(module: Any) -> torch.Tensor:
    return module._compute_inv_freq(module.base)


def _of_yarn(module: Any) -> torch.Tensor:
    return module._compute_inv_freq(module.scaling_factor)


def _of_linear_scaling(module: Any) -> torch.Tensor:
    if len(module.scaling_factors) != 1:
        _refuse(f"it scales positions by one of {module.scaling_factors}, chosen per request")
    return _of_base(module).double() / module.scaling_factors[0]


FREQUENCIES: dict[type, Callable[[Any], torch.Tensor]] = {
    RotaryEmbedding: _of_base,
    Llama3RotaryEmbedding: _of_base,
    Gemma4RotaryEmbedding: _of_base,
    LinearScalingRotaryEmbedding: _of_linear_scaling,
    YaRNScalingRotaryEmbedding: _of_yarn,
    DeepseekScalingRotaryEmbedding: _of_yarn,
}

REFUSED: dict[type, str] = {
    DynamicNTKScalingRotaryEmbedding: " (dynamic NTK)",
    DynamicNTKAlphaRotaryEmbedding: " (dynamic NTK)",
    Phi3LongRoPEScaledRotaryEmbedding: " (longrope: frequencies switch at a length)",
    MRotaryEmbedding: " (mrope: a token has three positions)",
    DualChunkRotaryEmbedding: " (dual chunk attention: positions start anew in each chunk)",
}


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedRotationError(
        f"CachedAttention does not truncate conversations of this model because {reason}. "
        "Over-long prompts are treated as SGLang does without it."
    )
