import numpy as np
import pytest
import torch

from cached_attention.layout import DevicePool
from cached_attention.tiers.host import HostTier
from cached_attention.transfer.copier import page_copier
from cached_attention.transfer.streaming import LINE, copy_rows

PAGES = 7
SHAPES = {
    "one line": (1, (LINE, LINE)),
    "whole blocks": (16, (2048, 2048)),
    "blocks and lines": (9, (2048 + LINE, 2048)),
    "no whole line": (1, (6, 10)),
    "records that are not aligned": (5, (1001, 77)),
    "one component": (4, (1152,)),
}


def filled(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def tiers(request: pytest.FixtureRequest) -> tuple[DevicePool, HostTier]:
    page_size, components = request.param
    device = DevicePool([[filled((PAGES * page_size, size)) for size in components] for _ in range(3)], page_size)
    host = HostTier(device.layout, 5 * device.layout.stride)
    host.arena[:] = filled(tuple(host.arena.shape))
    return device, host


def page_of(device: DevicePool, page: int) -> torch.Tensor:
    return torch.cat([buffer[page] for layer in device.layers for buffer in layer])


def test_a_saved_page_is_one_record_and_nothing_else_changes(tiers: tuple[DevicePool, HostTier]) -> None:
    device, host = tiers
    before = host.arena.clone()
    page_copier(device, host).save([5, 0], [1, 4])
    size = device.layout.page_bytes
    for slot, page in ((1, 5), (4, 0)):
        assert torch.equal(host.arena[slot, :size], page_of(device, page))
        assert torch.equal(host.arena[slot, size:], before[slot, size:])
    for slot in (0, 2, 3):
        assert torch.equal(host.arena[slot], before[slot])


def test_a_layer_is_loaded_and_nothing_else_changes(tiers: tuple[DevicePool, HostTier]) -> None:
    device, host = tiers
    before = [[buffer.clone() for buffer in layer] for layer in device.layers]
    copier = page_copier(device, host)
    copier.load(1, copier.moves(torch.tensor([6, 2]), [0, 3]))
    for layer, buffers in enumerate(device.layers):
        for number, buffer in enumerate(buffers):
            expected = before[layer][number]
            if layer == 1:
                expected[[6, 2]] = host.component(1, number)[[0, 3]]
            assert torch.equal(buffer, expected)


@pytest.mark.parametrize(("pages", "slots"), [([PAGES], [0]), ([0], [5]), ([-1], [0]), ([0], [-1])])
def test_what_is_not_there_is_refused(pages: list[int], slots: list[int]) -> None:
    device = DevicePool([[filled((PAGES, LINE)) for _ in "KV"]], page_size=1)
    host = HostTier(device.layout, 5 * device.layout.stride)
    copier = page_copier(device, host)
    with pytest.raises(IndexError, match="page or slot"):
        copier.save(pages, slots)
    with pytest.raises(IndexError, match="page or slot"):
        copier.moves(torch.tensor(pages), slots)
    with pytest.raises(ValueError, match="as many"):
        copier.save([0, 1], [0])
    copier.save([], [])


@pytest.mark.parametrize("target_start", range(0, LINE, 13))
@pytest.mark.parametrize("source_start", [0, 7])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 200, 4096, 3 * 16384 + 130])
def test_any_alignment_and_size(target_start: int, source_start: int, size: int) -> None:
    source = filled((size + 2 * LINE,)).numpy()
    target = np.zeros_like(source)
    rows = np.zeros(1, np.intp)
    addresses = [
        np.array([[array.ctypes.data + start, size]], np.intp)
        for array, start in ((target, target_start), (source, source_start))
    ]
    copy_rows(addresses[0], rows, addresses[1], rows, np.array([size], np.intp))
    expected = np.zeros_like(source)
    expected[target_start : target_start + size] = source[source_start : source_start + size]
    assert np.array_equal(target, expected)
