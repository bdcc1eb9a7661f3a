"""Keys moved to another position are the keys that SGLang's own modules rotate there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.factory import get_rope
from sglang.srt.layers.rotary_embedding.rope_variant import DualChunkRotaryEmbedding
from sglang.srt.mem_cache.cached_attention.rotary import UnsupportedRotationError, key_rotations, rotation_of
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MHATokenToKVPool, MLATokenToKVPool

from cached_attention.kernels.rope_on_load import PagedComponent, RopeOnLoad
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Pairing, Rotation, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK = {**YARN, "rope_type": "deepseek_yarn", "mscale": 1.0, "mscale_all_dim": 0.5}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 4096,
}
TOKENS, HEADS = 256, 4


def module(scaling: dict[str, Any] | None = None, dim: int = 64, **how: Any) -> Any:
    """A rotary module as models make it, with tables in fp32, as on a GPU."""
    # Yarn's table is of this length times its factor.
    how = {"rotary_dim": dim, "max_position": 131072, "base": 10000, "is_neox_style": True} | how
    return get_rope(dim, rope_scaling=scaling, dtype=torch.float32, **how)


def fresh(rotary: Any, positions: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, dim]` rotated by SGLang."""
    query = torch.zeros_like(keys)
    if type(rotary).__name__ == "DeepseekScalingRotaryEmbedding":
        return rotary.forward_native(positions, query, keys)[1].view_as(keys)
    return rotary.forward_native(positions, query.flatten(1), keys.flatten(1))[1].view_as(keys)


SUPPORTED = [
    pytest.param(lambda: module(), id="plain"),
    pytest.param(lambda: module(is_neox_style=False), id="interleaved"),
    pytest.param(lambda: module(dim=80, rotary_dim=32), id="partial"),
    pytest.param(lambda: module(dim=80, rotary_dim=32, is_neox_style=False), id="partial-interleaved"),
    pytest.param(lambda: module({"rope_type": "default"}, base=500000), id="default"),
    pytest.param(lambda: module(LLAMA3, base=500000), id="llama3"),
    pytest.param(lambda: module(YARN), id="yarn"),
    pytest.param(lambda: module({**YARN, "truncate": False, "attn_factor": 1.3}), id="yarn-attention-factor"),
    pytest.param(lambda: module(DEEPSEEK, is_neox_style=False), id="deepseek"),
    pytest.param(lambda: module(LINEAR), id="linear"),
    pytest.param(lambda: module({"rope_type": "proportional"}, rotary_dim=32), id="gemma4"),
]


@pytest.mark.parametrize("make", SUPPORTED)
@pytest.mark.parametrize("delta", [-1000, -1, 1, 317])
def test_moved_keys_are_those_of_the_module(make: Any, delta: int) -> None:
    rotary = make()
    rotation = rotation_of(rotary)
    keys = torch.randn(TOKENS, HEADS, rotary.head_size)
    positions = torch.arange(1000, 1000 + TOKENS)
    moved = rotate(fresh(rotary, positions, keys), delta_table(rotation, [delta]), rotation)
    torch.testing.assert_close(moved, fresh(rotary, positions + delta, keys), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: module(dim=128), id="theta-1e4"),
        pytest.param(lambda: module(dim=128, base=500000), id="theta-5e5"),
        pytest.param(lambda: module(LLAMA3, dim=128, base=500000), id="llama3"),
        pytest.param(lambda: module(YARN, dim=128), id="yarn"),
    ],
)
def test_at_128k_positions_moved_keys_agree_with_fresh_ones(make: Any) -> None:
    """In bf16, through the compiled code: relative L2 of every head's vector, old and new position anywhere."""
    rotary, page_size, pages = make(), 16, 128
    chance = torch.Generator().manual_seed(1)
    old, new = torch.randint(0, 131072 - page_size, (2, pages), generator=chance)
    keys = torch.randn(pages * page_size, HEADS, 128, generator=chance).bfloat16().float()

    def rotated_at(first: torch.Tensor) -> torch.Tensor:
        positions = (first.unsqueeze(1) + torch.arange(page_size)).flatten()
        return fresh(rotary, positions, keys).bfloat16()

    pool = torch.zeros_like(keys, dtype=torch.bfloat16)
    records = rotated_at(old).view(torch.uint8).view(pages, -1)
    loader = RopeOnLoad([[PagedComponent(pool, records, rotation_of(rotary))]], page_size)
    assert loader.is_compiled
    loader.load(range(1), loader.moves(list(range(pages)), list(range(pages)), (new - old).tolist()))

    expected = rotated_at(new).float()
    error = (pool.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < 1e-2


REFUSED = [
    pytest.param(lambda: module({"rope_type": "dynamic", "factor": 2.0}), "dynamic NTK", id="dynamic"),
    pytest.param(lambda: module({"rope_type": "dynamic", "alpha": 1000.0}), "dynamic NTK", id="dynamic-alpha"),
    pytest.param(lambda: module(LONGROPE, dim=32), "longrope", id="longrope"),
    pytest.param(lambda: module({"rope_type": "default", "mrope_section": [8, 12, 12]}), "mrope", id="mrope"),
    pytest.param(lambda: module({**YARN, "mrope_section": [8, 12, 12]}), "mrope", id="mrope-yarn"),
    # Its constructor wants a GPU.
    pytest.param(lambda: object.__new__(DualChunkRotaryEmbedding), "dual chunk", id="dual-chunk"),
    pytest.param(lambda: torch.nn.Identity(), "positions are those of Identity", id="unknown"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_other_positions_are_refused_in_one_line(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedRotationError, match=reason) as refusal:
        rotation_of(make())
    assert "\n" not in str(refusal.value)
    assert "does not truncate" in str(refusal.value)


class Attention(torch.nn.Module):
    """An attention layer as SGLang's models build theirs: a rotary module beside the attention itself."""

    def __init__(self, layer: int, window: int = -1, irope: bool = False, **rotary: Any) -> None:
        super().__init__()
        self.attn = RadixAttention(4, 64, 1.0, 2, layer, sliding_window_size=window, use_irope=irope)
        for name, value in rotary.items():
            setattr(self, name, value)


class HunYuanAttention(Attention):
    use_qk_norm = True


def model(*layers: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleList([torch.nn.Sequential(layer) for layer in layers])


def pool(layers: int, **how: Any) -> MHATokenToKVPool:
    how = {"dtype": torch.bfloat16, "start_layer": 0, "end_layer": layers - 1} | how
    return MHATokenToKVPool(
        size=64,
        page_size=16,
        head_num=2,
        head_dim=64,
        layer_num=layers,
        device="cpu",
        enable_memory_saver=False,
        **how,
    )


def test_each_layer_has_its_own_rotation() -> None:
    near, far = module(), module(base=1000000)
    found = key_rotations(
        model(Attention(0, rotary_emb=near), Attention(1, rotary_emb=None), Attention(2, rotary_emb=far)), pool(3)
    )
    assert found == [rotation_of(near), None, rotation_of(far)]
    assert found[0] != found[2]


def test_a_pipeline_stage_has_the_layers_of_its_pool() -> None:
    stage = model(*(Attention(layer, rotary_emb=module()) for layer in (4, 5)))
    assert key_rotations(stage, pool(2, start_layer=4, end_layer=5)) == [rotation_of(module())] * 2


def test_mla_rotates_the_last_part_of_its_latent() -> None:
    latent = MLATokenToKVPool(
        size=64,
        page_size=16,
        dtype=torch.bfloat16,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    rotary = module(DEEPSEEK, is_neox_style=False)
    (rotation,) = key_rotations(model(Attention(0, rotary_emb=rotary, qk_rope_head_dim=64)), latent)
    assert rotation is not None
    assert (rotation.start, rotation.stop, rotation.pairing) == (512, 576, Pairing.INTERLEAVED)
    assert rotation.inv_freq == rotation_of(rotary).inv_freq


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([lambda: Attention(0)], "does not rotate its keys"),
        ([lambda: Attention(0, irope=True, rotary_emb=module())], "in chunks"),
        ([lambda: Attention(0, rotary_emb=module(), qk_rope_head_dim=64)], "whole keys"),
        ([lambda: HunYuanAttention(0, rotary_emb=module())], "normalises"),
        ([lambda: Attention(1, rotary_emb=module())], "layer 0 has no attention"),
        (
            [lambda: Attention(0, rotary_emb=module()), lambda: Attention(1, 128, rotary_emb=module())],
            "sliding window",
        ),
    ],
)
def test_models_whose_keys_cannot_be_moved_are_refused(layers: list[Any], reason: str) -> None:
    with pytest.raises(UnsupportedRotationError, match=reason):
        key_rotations(model(*(make() for make in layers)), pool(len(layers)))


def test_a_quantised_cache_is_refused() -> None:
    with pytest.raises(UnsupportedRotationError, match="float8_e4m3fn"):
        key_rotations(model(Attention(0, rotary_emb=module())), pool(1, dtype=torch.float8_e4m3fn))


def test_a_draft_model_is_refused() -> None:
    with pytest.raises(UnsupportedRotationError, match="draft model that has keys of its own"):
        key_rotations(model(Attention(0, rotary_emb=module())), pool(1), [pool(1)])


def test_sparse_attention_is_refused() -> None:
    sparse = DSATokenToKVPool.__new__(DSATokenToKVPool)
    sparse.dtype = torch.bfloat16
    with pytest.raises(UnsupportedRotationError, match="sparse attention keeps keys of its own"):
        key_rotations(model(), sparse)


def test_a_rotation_is_a_value() -> None:
    """Layers that share frequencies share a table."""
    assert len({rotation_of(module()), rotation_of(module()), Rotation((1.0,))}) == 2
