"""How pages move on a GPU: what can be said without one, and the copies themselves where there is one."""

from __future__ import annotations

from contextlib import closing
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from cached_attention.kernels.copy_rows import RowCopies
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.tiers.host import HostTier
from cached_attention.transfer import cuda_copier
from cached_attention.transfer.cuda_copier import (
    ByEngines,
    Comparison,
    CudaCopier,
    Time,
    Way,
    choose,
    engines_are_worth_it,
)

PAGE = 16
WAYS = [ByEngines(*ways) for ways in product((False, True), repeat=2)]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("engines", WAYS)
@pytest.mark.parametrize("dim", [64, 6])
def test_its_code_moves_pages_on_a_cpu(
    cuda_on_host: type[CudaCopier], compiled: bool, engines: ByEngines, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(cuda_on_host, "_load_library", lambda copier: None)
    check_there_and_back(cuda_on_host, torch.device("cpu"), engines, dim)


def test_with_a_kernel_that_does_not_run_torch_moves_pages(
    cuda_on_host: type[CudaCopier], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_on_host, "_compare", lambda copier, rows: None)
    monkeypatch.setattr(RowCopies, "by_cores", lambda *_: pytest.fail("the kernel does not run"))
    monkeypatch.setattr(RowCopies, "by_engines", lambda *_: pytest.fail("not all pages can go that way"))
    check_there_and_back(cuda_on_host, torch.device("cpu"), ByEngines(False, False), 64)
    assert "no kernel can be used" in caplog.text


def test_copy_engines_are_taken_unless_the_kernel_is_clearly_quicker() -> None:
    assert engines_are_worth_it(engines=1.0, cores=1.0)
    assert engines_are_worth_it(engines=1.0, cores=0.91)
    assert not engines_are_worth_it(engines=1.0, cores=0.89)


def test_copy_engines_that_fail_are_not_used() -> None:
    quick, slow = (Way(Time(ms, 0.1), Time(ms, 0.1)) for ms in (1.0, 9.0))
    failed = RuntimeError("no")
    assert choose(engines=slow, cores=quick) == choose(engines=failed, cores=slow) == ByEngines(False, False)
    assert choose(engines=quick, cores=slow) == ByEngines(True, True)


def test_what_was_measured_is_said_of_saves_and_of_loads() -> None:
    quick, slow = Time(1.0, 0.1), Time(9.0, 0.2)
    cores = Way(saves=quick, loads=quick)
    found = Comparison(16, Way(saves=quick, loads=slow), cores, ByEngines(saves=True, loads=False))
    saves, loads = found.lines()
    assert saves.startswith("saves are made by copy engines (16 pages: copy engines 1.00 ms and 0.10 ms to")
    assert loads.startswith("loads are made by a kernel (16 pages: copy engines 9.00 ms and 0.20 ms to")
    assert loads.endswith("a kernel 1.00 ms and 0.10 ms to hand over).")
    without = Comparison(16, RuntimeError("no engines"), cores, ByEngines(saves=False, loads=False))
    assert all("copy engines no engines, a kernel 1.00 ms" in line for line in without.lines())


def test_both_ways_are_tried_with_pages_of_the_pool(
    cuda_on_host: type[CudaCopier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def compare(copier: CudaCopier, rows: list[int]) -> ByEngines:
        tried.extend(copier._try_ways(rows))
        return ByEngines(True, True)

    monkeypatch.setattr(cuda_on_host, "_compare", compare)
    monkeypatch.setattr(cuda_copier, "_time", lambda copy: Time(1.0, 1.0) if copy() is None else None)
    pool = [[torch.randn(4 * PAGE, 1, 2, dtype=torch.bfloat16) for _ in "kv"] for _ in range(2)]
    before = [[pages.clone() for pages in layer] for layer in pool]
    device = DevicePool(pool, PAGE)
    cuda_on_host(device, HostTier(device.layout, 4 * device.layout.stride), None)
    assert tried == [Way(Time(1.0, 1.0), Time(1.0, 1.0))] * 2
    for layer, was in zip(pool, before, strict=True):
        assert all(map(torch.equal, layer, was))


def test_only_pages_that_stay_as_they_are_go_by_copy_engines(cuda_on_host: type[CudaCopier]) -> None:
    """And only where the host knows their numbers: else nothing is handed to the engines."""
    turn = Rotation((1.0,))
    device = DevicePool([[torch.zeros(4 * PAGE, 1, 2, dtype=torch.bfloat16) for _ in "kv"]], PAGE)
    copier = cuda_on_host(device, HostTier(device.layout, 4 * device.layout.stride), [turn])
    handed_over: list[list[int]] = []
    copier._load_by_engines = lambda pages, slots, layer: handed_over.append(pages.tolist())  # type: ignore[method-assign]
    for pages, deltas, expected in [
        (np.array([3, 1, 2]), [0, 5, 0], [[3, 2]]),
        (np.array([3, 1, 2]), [], [[3, 1, 2]]),
        (np.array([3, 1, 2]), [5, 5, 7], []),
        (torch.tensor([3, 1, 2]), [0, 5, 0], []),
        (torch.tensor([3, 1, 2]), [], []),
    ]:
        handed_over.clear()
        copier.load(0, copier.moves(pages, [0, 1, 2], deltas))
        assert handed_over == expected


@pytest.mark.gpu
@pytest.mark.parametrize("engines", WAYS)
@pytest.mark.parametrize("dim", [64, 6])
def test_pages_go_out_and_come_back_on_a_gpu(engines: ByEngines, dim: int) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check_there_and_back(CudaCopier, torch.device("cuda"), engines, dim)


@pytest.mark.gpu
def test_what_is_measured_at_start_leaves_the_pool_as_it_was() -> None:
    buffers = [[torch.randn(40 * PAGE, 2, 64, device="cuda") for _ in "kv"] for _ in range(2)]
    device = DevicePool(buffers, PAGE)
    before = [[buffer.clone() for buffer in layer] for layer in buffers]
    with closing(HostTier(device.layout, 40 * device.layout.stride, device.device)) as host:
        comparison = CudaCopier(device, host, None).comparison
        torch.cuda.synchronize()
    assert comparison is not None
    assert comparison.cores.loads.on_device > 0
    for now, then in zip(buffers, before, strict=True):
        assert all(map(torch.equal, now, then))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("engines", [ByEngines(False, False), ByEngines(True, True)])
def test_layers_may_keep_different_things(
    cuda_on_host: type[CudaCopier], compiled: bool, engines: ByEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents; what an indexer knows, in bytes; and the keys and values of a draft model, in another dtype."""
    if not compiled:
        monkeypatch.setattr(cuda_on_host, "_load_library", lambda copier: None)
    latents = [torch.randn(12 * PAGE, 1, 80, dtype=torch.bfloat16) for _ in range(3)]
    index = torch.randint(0, 256, (12 * PAGE, 132), dtype=torch.uint8)
    draft = [torch.randn(12 * PAGE, 2, 32) for _ in "kv"]
    device = DevicePool([[latents[0], index], [latents[1]], [latents[2], *draft]], PAGE)
    host = HostTier(device.layout, 8 * device.layout.stride)
    copier: Any = cuda_on_host(device, host, None)
    copier._engines = engines
    before = [[pages.clone() for pages in layer] for layer in device.layers]
    copier.save([1, 5], [7, 0])
    moves = copier.moves(np.array([8, 10]) if engines.loads else torch.tensor([8, 10]), [0, 7])
    for layer in range(3):
        copier.load(layer, moves)
        for there, was in zip(device.layers[layer], before[layer], strict=True):
            assert torch.equal(there[[8, 10]], was[[5, 1]])
            assert torch.equal(there[:8], was[:8])


def check_there_and_back(
    kind: type[CudaCopier], device_of_pool: torch.device, engines: ByEngines, dim: int
) -> None:
    turn = Rotation(tuple(1e4 ** (-i / dim) for i in range(0, dim, 2)))
    buffers = [
        [torch.randn(12 * PAGE, 2, dim, dtype=torch.bfloat16, device=device_of_pool) for _ in "kv"]
        for _ in range(3)
    ]
    device = DevicePool(buffers, PAGE)
    before = [[pages.cpu().clone() for pages in layer] for layer in device.layers]
    with closing(HostTier(device.layout, 8 * device.layout.stride, device_of_pool)) as host:
        copier: Any = kind(device, host, [turn] * 3)
        copier._engines = engines
        copier.save([1, 5, 3], [7, 0, 2])
        pages = np.array([8, 10, 9]) if engines.loads else torch.tensor([8, 10, 9], device=device_of_pool)
        moves = copier.moves(pages, [0, 7, 2], [0, -37, 0])
        for layer in range(3):
            copier.load(layer, moves)
        if device_of_pool.type == "cuda":
            torch.cuda.synchronize()
    for layer, pages_of_layer in enumerate(device.layers):
        for component, there in enumerate(pages_of_layer):
            was = before[layer][component]
            assert torch.equal(there[[8, 9]].cpu(), was[[5, 3]])
            assert torch.equal(there[:8].cpu(), was[:8])
            record = was[1].view(torch.bfloat16).view(PAGE, 2, dim)
            want = rotate(record, delta_table(turn, [-37]), turn) if component == 0 else record
            assert torch.equal(there[10].cpu(), want.contiguous().view(torch.uint8).flatten())
