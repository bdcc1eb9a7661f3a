"""The plain-CPU attention against an fp32 reference and against upstream's torch_native."""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.platforms.plain_cpu import plan as plan_module
from sglang.srt.platforms.plain_cpu.attention import PlainCpuAttnBackend
from sglang.srt.platforms.plain_cpu.plan import LayerKind

POOL_SLOTS = 4096
CONTEXT = 1024
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
MHA, GQA, MQA = (6, 6), (6, 2), (6, 1)


class Pool:
    """A KV pool as upstream's looks to an attention backend; counts what layer-wise loading relies on."""

    def __init__(self, heads: int, qk_dim: int, v_dim: int, dtype: torch.dtype) -> None:
        self.k = torch.randn(POOL_SLOTS, heads, qk_dim).to(dtype)
        self.v = torch.randn(POOL_SLOTS, heads, v_dim).to(dtype)
        self.reads: list[tuple[str, int]] = []

    def set_kv_buffer(self, layer: SimpleNamespace, location: object, k: torch.Tensor, v: torch.Tensor) -> None:
        slots = location.loc  # type: ignore[attr-defined]
        self.k[slots] = k.view(len(slots), *self.k.shape[1:]).to(self.k.dtype)
        self.v[slots] = v.view(len(slots), *self.v.shape[1:]).to(self.v.dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        self.reads.append(("k", layer_id))
        return self.k

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        self.reads.append(("v", layer_id))
        return self.v


class Case(NamedTuple):
    runner: SimpleNamespace
    batch: SimpleNamespace
    layer: SimpleNamespace
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_case(
    lens: list[tuple[int, int]],
    heads: tuple[int, int] = GQA,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    dims: tuple[int, int] = (32, 32),
    seed: int = 0,
    decode: bool = False,
    slots_seed: int = 1,
) -> Case:
    """Batch of (prefix, new) token counts, each sequence's slots scattered over the pool."""
    torch.manual_seed(seed)
    q_heads, kv_heads = heads
    pool = Pool(kv_heads, *dims, dtype)
    prefix, new = (torch.tensor(part) for part in zip(*lens, strict=True))
    total = int(new.sum())
    q, k, v = (
        torch.randn(total, n, d).to(dtype)
        for n, d in ((q_heads, dims[0]), (kv_heads, dims[0]), (kv_heads, dims[1]))
    )
    history = [(torch.randn(p, kv_heads, dims[0]), torch.randn(p, kv_heads, dims[1])) for p in prefix.tolist()]
    table = torch.zeros(len(lens) + 2, CONTEXT, dtype=torch.int32)
    free = torch.randperm(POOL_SLOTS, generator=torch.Generator().manual_seed(slots_seed))
    written, taken = [], 0
    for row, (p, n) in enumerate(lens, start=1):
        slots = free[taken : taken + p + n]
        taken += p + n
        table[row, : p + n] = slots.int()
        pool.k[slots[:p]], pool.v[slots[:p]] = (x.to(dtype) for x in history[row - 1])
        written.append(slots[p:])
    layer = SimpleNamespace(
        layer_id=3,
        qk_head_dim=dims[0],
        v_head_dim=dims[1],
        tp_q_head_num=q_heads,
        tp_k_head_num=kv_heads,
        scaling=dims[0] ** -0.5,
        sliding_window_size=-1 if window is None else window,
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
    )
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        seq_lens=prefix + new,
        extend_prefix_lens=prefix,
        extend_seq_lens=new,
        req_pool_indices=torch.arange(1, len(lens) + 1),
        out_cache_loc=torch.cat(written),
        encoder_lens=None,
    )
    runner = SimpleNamespace(
        device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=pool
    )
    return Case(runner, batch, layer, q, k, v)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: OpenMP's barriers would be most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(backend_class: Callable[..., TorchNativeAttnBackend], case: Case) -> torch.Tensor:
    backend = backend_class(case.runner)
    backend.init_forward_metadata(case.batch)
    decode = case.batch.forward_mode.is_decode()
    forward = backend.forward_decode if decode else backend.forward_extend
    q, k, v = (x.flatten(1) for x in case[3:])
    return forward(q, k, v, case.layer, case.batch)


def naive(case: Case) -> torch.Tensor:
    """fp32 attention as the definition has it, all scores of a sequence at once."""
    pool, table, layer = case.runner.token_to_kv_pool, case.runner.req_to_token_pool.req_to_token, case.layer
    group = layer.tp_q_head_num // layer.tp_k_head_num
    window = layer.sliding_window_size if layer.sliding_window_size > -1 else CONTEXT
    pool.set_kv_buffer(layer, SimpleNamespace(loc=case.batch.out_cache_loc), case.k, case.v)
    new = case.batch.extend_seq_lens.tolist()
    out = []
    for row, (p, q) in enumerate(
        zip(case.batch.extend_prefix_lens.tolist(), case.q.float().split(new), strict=True), start=1
    ):
        slots = table[row, : p + len(q)].long()
        k, v = (x[slots].float().repeat_interleave(group, 1) for x in (pool.k, pool.v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * layer.scaling
        distance = torch.arange(p, p + len(q))[:, None] - torch.arange(p + len(q))
        scores[:, (distance < 0) | (distance > window)] = float("-inf")
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
    return torch.cat(out)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


EXTENDS = {
    "no prefix": [(0, 17)],
    "prefix": [(40, 9)],
    "long prefix, short turn": [(300, 5)],
    "several blocks": [(20, 300)],
    "batch": [(0, 12), (64, 33), (7, 7), (128, 2)],
    "with decodes": [(63, 1), (0, 20), (5, 1), (200, 1), (33, 8), (0, 1)],
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [MHA, GQA, MQA])
@pytest.mark.parametrize("lens", EXTENDS.values(), ids=EXTENDS)
def test_extend(lens: list[tuple[int, int]], heads: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_case(lens, heads, dtype)
    actual = run(PlainCpuAttnBackend, case)
    assert_close(actual, naive(case), dtype)
    assert_close(actual, run(TorchNativeAttnBackend, case), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [MHA, GQA, MQA])
@pytest.mark.parametrize("prefixes", [[70], [70, 70, 70], [3, 200, 190, 0, 9, 150, 8]])
def test_decode(prefixes: list[int], heads: tuple[int, int], dtype: torch.dtype) -> None:
    case = make_case([(p, 1) for p in prefixes], heads, dtype, decode=True)
    actual = run(PlainCpuAttnBackend, case)
    assert_close(actual, naive(case), dtype)
    assert_close(actual, run(TorchNativeAttnBackend, case), dtype)


def test_drafts_are_verified_like_the_new_tokens_of_a_prompt() -> None:
    case = make_case([(70, 4), (3, 4), (200, 4)])
    expected = run(PlainCpuAttnBackend, case)
    verified = make_case([(70, 4), (3, 4), (200, 4)])
    verified.batch.forward_mode = ForwardMode.TARGET_VERIFY
    verified.batch.seq_lens = verified.batch.extend_prefix_lens
    verified.batch.extend_seq_lens = None
    verified.batch.spec_info = SimpleNamespace(draft_token_num=4)
    assert torch.equal(run(PlainCpuAttnBackend, verified), expected)


def test_a_draft_step_sees_what_earlier_steps_wrote() -> None:
    case = make_case([(70, 1), (3, 1)], decode=True)
    expected = run(PlainCpuAttnBackend, case)
    drafting = make_case([(70, 1), (3, 1)], decode=True)
    drafting.batch.seq_lens = drafting.batch.seq_lens - 3
    assert torch.equal(run(partial(PlainCpuAttnBackend, drafted=3), drafting), expected)


@pytest.mark.parametrize("window", [0, 1, 16, 100, 1000])
@pytest.mark.parametrize("lens", EXTENDS.values(), ids=EXTENDS)
def test_sliding_window(lens: list[tuple[int, int]], window: int) -> None:
    case = make_case(lens, window=window)
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.float32)


@pytest.mark.parametrize("window", [0, 5, 90])
def test_sliding_window_decode(window: int) -> None:
    case = make_case([(3, 1), (200, 1), (85, 1)], window=window, decode=True)
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.float32)


@pytest.mark.parametrize("dims", [(24, 16), (16, 24)])
@pytest.mark.parametrize("lens", EXTENDS.values(), ids=EXTENDS)
def test_value_heads_of_another_width(lens: list[tuple[int, int]], dims: tuple[int, int]) -> None:
    case = make_case(lens, dims=dims)
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.float32)


def test_latent_values_are_columns_of_the_keys() -> None:
    case = make_case([(50, 20), (9, 1), (0, 6)], (8, 1), dims=(40, 32))
    pool = case.runner.token_to_kv_pool
    pool.v = pool.k[..., :32]
    case.v.copy_(case.k[..., :32])
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.float32)


def test_a_layer_that_does_not_read_its_pool_is_refused() -> None:
    case = make_case([(0, 6)])
    narrow = case._replace(q=case.q[..., :16])
    case.layer.qk_head_dim = 16
    with pytest.raises(ValueError, match="16 columns"):
        run(PlainCpuAttnBackend, narrow)


def test_a_small_mask_budget_only_makes_more_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(100, 60), (0, 30), (10, 45)])
    monkeypatch.setattr(plan_module, "MAX_MASK_ELEMENTS", 5000)
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decode", [False, True])
def test_bitwise_equal_whatever_the_slots(dtype: torch.dtype, decode: bool) -> None:
    lens = [(150, 1), (33, 1), (140, 1)] if decode else [(150, 40), (0, 300), (33, 1)]
    scattered, moved = (
        run(PlainCpuAttnBackend, make_case(lens, dtype=dtype, decode=decode, slots_seed=seed)) for seed in (1, 2)
    )
    assert torch.equal(scattered, moved)


def test_other_sequences_and_free_slots_cannot_poison() -> None:
    case = make_case([(40, 1), (50, 1), (30, 6)])
    pool, table = case.runner.token_to_kv_pool, case.runner.req_to_token_pool.req_to_token
    used = torch.cat([table[1, :41], table[2, :51], table[3, :36]]).long()
    free = torch.ones(POOL_SLOTS, dtype=torch.bool)
    free[used] = False
    pool.k[free] = pool.v[free] = float("nan")
    assert run(PlainCpuAttnBackend, case).isfinite().all()


def test_reads_the_pool_once_per_layer_through_its_getters() -> None:
    case = make_case([(40, 1), (50, 3)])
    run(PlainCpuAttnBackend, case)
    assert case.runner.token_to_kv_pool.reads == [("k", 3), ("v", 3)]


def test_keys_stored_in_another_dtype() -> None:
    case = make_case([(40, 7), (50, 1)], dtype=torch.bfloat16)
    pool = case.runner.token_to_kv_pool
    pool.k, pool.v = pool.k.to(torch.float8_e4m3fn).float(), pool.v.to(torch.float8_e4m3fn).float()
    assert_close(run(PlainCpuAttnBackend, case), naive(case), torch.bfloat16)


def test_padding_tokens_come_out_as_zero() -> None:
    case = make_case([(4, 3)])
    padded = case._replace(q=torch.cat([case.q, torch.ones_like(case.q[:2])]))
    out = run(PlainCpuAttnBackend, padded)
    assert_close(out[:3], naive(case), torch.float32)
    assert out[3:].eq(0).all()


def test_layers_share_one_plan_until_the_next_forward() -> None:
    case = make_case([(40, 7), (50, 1)])
    backend = PlainCpuAttnBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    assert backend.plan is not None
    kind = LayerKind(None, 3, False, torch.float32)
    first = backend.plan.work(kind)
    assert backend.plan.work(kind) is first
    assert backend.plan.work(kind._replace(window=8)) is not first
    plan = backend.plan
    backend.init_forward_metadata(case.batch)
    assert backend.plan is not plan


@pytest.mark.parametrize("change", [{"is_cross_attention": True}, {"attn_type": AttentionType.ENCODER_ONLY}])
def test_rare_layers_go_to_upstream(change: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([(0, 5)])
    vars(case.layer).update(change)
    seen = []
    monkeypatch.setattr(TorchNativeAttnBackend, "forward_extend", lambda self, *a: seen.append(a[3]))
    run(PlainCpuAttnBackend, case)
    assert seen == [case.layer]


def test_sliding_window_pool_is_read_at_its_own_slots() -> None:
    case = make_case([(60, 5), (30, 1)], window=16)
    expected = naive(case)
    pool = case.runner.token_to_kv_pool
    mapping = torch.randperm(POOL_SLOTS)
    pool.k, pool.v = pool.k[mapping.argsort()], pool.v[mapping.argsort()]
    pool.full_to_swa_index_mapping, pool.layers_mapping = mapping, {3: (0, True)}
    backend = PlainCpuAttnBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    backend.use_sliding_window_kv_pool = True
    q, k, v = (x.flatten(1) for x in case[3:])
    out = backend.forward_extend(q, k, v, case.layer, case.batch, save_kv_cache=False)
    assert_close(out, expected, torch.float32)
