"""How pages move on a GPU: what can be said without one, and the copies themselves where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cached_attention.kernels.compilation import load_library
from cached_attention.kernels.copy_rows import NO_STREAM
from cached_attention.layout import DevicePool
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Rotation, rotate
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.cuda_copier import CudaCopier, engines_are_worth_it


class OnHost(CudaCopier):
    """Its code for sm_90a, run by the CPU, between tensors of the CPU."""

    def _load_library(self) -> Any:
        return load_library("90a")

    def _compare(self, pages: int) -> bool:
        return False

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    def _stream(self) -> int:
        return NO_STREAM


class WithoutCompiler(OnHost):
    def _load_library(self) -> None:
        return None


@pytest.mark.parametrize("kind", [OnHost, WithoutCompiler])
@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize("dim", [64, 6])
def test_its_code_moves_pages_on_a_cpu(kind: type[CudaCopier], engines: bool, dim: int) -> None:
    check_there_and_back(kind, torch.device("cpu"), engines, dim)


def test_copy_engines_save_unless_the_kernel_is_clearly_quicker() -> None:
    assert engines_are_worth_it(engines=1.0, cores=1.0)
    assert engines_are_worth_it(engines=1.0, cores=0.91)
    assert not engines_are_worth_it(engines=1.0, cores=0.89)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize("dim", [64, 6])
def test_pages_go_out_and_come_back_on_a_gpu(engines: bool, dim: int) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        check_there_and_back(CudaCopier, torch.device("cuda"), engines, dim)


def check_there_and_back(kind: type[CudaCopier], device_of_pool: torch.device, engines: bool, dim: int) -> None:
    page_size = 16
    turn = Rotation(tuple(1e4 ** (-i / dim) for i in range(0, dim, 2)))
    buffers = [
        [torch.randn(12 * page_size, 2, dim, dtype=torch.bfloat16, device=device_of_pool) for _ in "kv"]
        for _ in range(3)
    ]
    device = DevicePool(buffers, page_size)
    host = HostTier(device.layout, 8 * device.layout.stride, device_of_pool)
    copier = kind(device, host, [turn] * 3)
    copier._engines_save = engines
    before = [[pages.cpu().clone() for pages in layer] for layer in device.layers]
    copier.save([1, 5, 3], [7, 0, 2])
    plain = copier.moves(torch.tensor([8, 9], device=device_of_pool), [0, 2])
    turned = copier.moves(torch.tensor([10], device=device_of_pool), [7], [-37])
    for layer in range(3):
        copier.load(layer, plain)
        copier.load(layer, turned)
    for layer, pages in enumerate(device.layers):
        for component, there in enumerate(pages):
            was = before[layer][component]
            assert torch.equal(there[[8, 9]].cpu(), was[[5, 3]])
            assert torch.equal(there[:8].cpu(), was[:8])
            record = was[1].view(torch.bfloat16).view(page_size, 2, dim)
            want = rotate(record, delta_table(turn, [-37]), turn) if component == 0 else record
            assert torch.equal(there[10].cpu(), want.contiguous().view(torch.uint8).flatten())
