"""What the fingerprint reads of the weights, and which ranks share pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cached_attention import identity
from sglang.srt.mem_cache.cached_attention.identity import (
    SAMPLES,
    ModelIdentity,
    agree_on_weights,
    weights_digest,
)

from cached_attention.layout import DevicePool


def model(weight: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("weight", weight)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (SAMPLES, 7)])
def test_a_weight_that_lies_transposed_has_the_digest_of_its_copy(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    weight = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 10).to(dtype).t()
    assert not weight.is_contiguous()
    assert weights_digest(model(weight)) == weights_digest(model(weight.contiguous()))


def test_a_weight_that_changed_has_another() -> None:
    weight = torch.zeros(SAMPLES, 7)
    before = weights_digest(model(weight.t()))
    weight.fill_(1)
    assert weights_digest(model(weight.t())) != before


def test_numbers_without_a_shape_count() -> None:
    one, two = (weights_digest(model(torch.tensor(number))) for number in (1.0, 2.0))
    assert one != two


class Machine:
    """Ranks, each with weights of its own; a rank is described while it has the word."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replicas: int, ranks: int = 2) -> None:
        self.weights = [model(torch.full((4,), float(rank))) for rank in range(ranks)]
        self._replicas, self._ranks = replicas, ranks
        self._speaking = 0
        monkeypatch.setattr(identity, "get_parallel", self._parallel)
        monkeypatch.setattr(torch.distributed, "all_gather_object", self._gather)

    def _parallel(self) -> Any:
        rank, per_layer = self._speaking, 2 // self._replicas
        return SimpleNamespace(
            dp_rank=rank // per_layer,
            tp_rank=rank,
            tp_size=2,
            attn_tp_rank=rank % per_layer,
            attn_tp_size=per_layer,
            tp_group=SimpleNamespace(world_size=self._ranks, cpu_group=None),
        )

    def _gather(self, digests: list[str], digest: str, group: Any) -> None:
        digests[:] = map(weights_digest, self.weights)
        assert digests[self._speaking] == digest

    def rank(self, number: int, alike: bool, **config: Any) -> ModelIdentity:
        self._speaking = number
        args: Any = SimpleNamespace(
            model_path="m", kv_cache_dtype="auto", dtype="float32", json_model_override_args="{}"
        )
        params: Any = SimpleNamespace(
            pp_rank=0, pp_size=1, mtp_draft_device_pools=(), sidecar_draft_device_pools=()
        )
        pool = DevicePool([[torch.zeros(64, 8)]], 16)
        found = ModelIdentity(args, params, pool, alike=alike)
        weights = self.weights[number]
        found.describe(weights, SimpleNamespace(to_dict=lambda: config), agree_on_weights(weights))
        return found


@pytest.mark.parametrize(("replicas", "alike", "shared"), [(1, False, False), (1, True, True), (2, False, True)])
def test_ranks_that_compute_the_same_pages_share_them(
    monkeypatch: pytest.MonkeyPatch, replicas: int, alike: bool, shared: bool
) -> None:
    machine = Machine(monkeypatch, replicas)
    ranks = [machine.rank(number, alike) for number in range(2)]
    one, two = (rank.shared_fingerprint() for rank in ranks)
    assert (one == two) is shared
    one, two = (rank.fingerprint() for rank in ranks)
    assert one != two, "on disk each has its own"


def test_any_rank_with_other_weights_makes_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, replicas=2)
    before = machine.rank(0, alike=False).shared_fingerprint()
    assert machine.rank(0, alike=False).shared_fingerprint() == before
    machine.weights[1] = model(torch.full((4,), 7.0))
    assert machine.rank(0, alike=False).shared_fingerprint() != before


def test_a_rank_with_its_old_weights_has_other_pages_once_others_were_updated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rank = Machine(monkeypatch, replicas=2).rank(0, alike=False)
    names = [rank.shared_fingerprint(), rank.fingerprint()]
    for _ in range(2):
        rank.updated()
        names += [rank.shared_fingerprint(), rank.fingerprint()]
    assert len({name.digest() for name in names}) == 4
    assert names[2] == names[3]


def test_alone_a_rank_with_its_old_weights_has_its_old_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, replicas=2, ranks=1)
    rank = machine.rank(0, alike=False)
    before = rank.shared_fingerprint()
    rank.updated()
    assert rank.shared_fingerprint() == before
    machine.weights[0].weight += 1  # type: ignore[operator]
    assert rank.shared_fingerprint() == machine.rank(0, alike=False).shared_fingerprint() != before


def test_how_the_server_was_started_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, replicas=1)
    assert machine.rank(0, alike=False, context_len=1).fingerprint() == machine.rank(0, alike=False).fingerprint()
    assert machine.rank(0, alike=False, rope_theta=1).fingerprint() != machine.rank(0, alike=False).fingerprint()


def test_after_an_update_a_rank_shares_with_its_likes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, replicas=2)
    ranks = [machine.rank(number, alike=False) for number in range(2)]
    before = ranks[0].shared_fingerprint()
    assert not ranks[0].has_changed()
    for module in machine.weights:
        module.weight += 1  # type: ignore[operator]
    assert ranks[0].has_changed()
    one, two = (rank.shared_fingerprint() for rank in ranks)
    assert len({one.digest(), two.digest(), before.digest()}) == 3
    machine.weights[0].weight -= 1  # type: ignore[operator]
    assert ranks[0].shared_fingerprint() == before
