"""The copier of GPUs, run by a CPU: its code for sm_90a, between tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cached_attention.kernels.compilation import load_library
from cached_attention.kernels.copy_rows import NO_STREAM
from cached_attention.transfer.cuda_copier import ByEngines, CudaCopier


class CudaOnHost(CudaCopier):
    """The copy engines move what they can."""

    def _load_library(self) -> Any:
        return load_library("90a")

    def _compare(self, rows: list[int]) -> ByEngines:
        return ByEngines(saves=True, loads=True)

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    def _stream(self) -> int:
        return NO_STREAM


@pytest.fixture
def cuda_on_host() -> type[CudaCopier]:
    return CudaOnHost
