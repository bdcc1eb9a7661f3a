"""rope_on_load against the reference in torch, bit for bit, compiled and not."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.kernels.rope_on_load import BLOCKS_VARIABLE, PagedComponent, RopeOnLoad, blocks_from
from cached_attention.position.delta_table import delta_table
from cached_attention.position.rotation import Pairing, Rotation, rotate

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAR = 10**6
CODE = ["cpu", "90a", "torch"]
"""For this machine's CPU; for a GPU, its lanes one after the other on the host; and in torch."""
MLA = Rotation(tuple(1e4 ** (-i / 64) for i in range(0, 64, 2)), Pairing.INTERLEAVED, start=512)


def rotation(rotary_dim: int, pairing: Pairing = Pairing.HALVES, start: int = 0, base: float = 1e4) -> Rotation:
    return Rotation(tuple(base ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)), pairing, start)


@dataclass
class Tensors:
    """One component on both sides, with gaps of `gap` elements between heads, slots and records.

    The pool starts as NaN, so that what was never written cannot be mistaken for what was.
    """

    heads: int
    dim: int
    dtype: torch.dtype
    rotation: Rotation | None = None
    page_size: int = 4
    pages: int = 8
    gap: int = 0

    def __post_init__(self) -> None:
        slots, gap = self.pages * self.page_size, self.gap
        wide = torch.full((slots, self.heads * (self.dim + gap) + gap), torch.nan, dtype=self.dtype)
        self.pool = wide.as_strided((slots, self.heads, self.dim), (wide.stride(0), self.dim + gap, 1))
        keys = torch.randn(self.pages, self.page_size * self.heads * self.dim + gap).to(self.dtype)
        self.keys = keys[:, : keys.shape[1] - gap]
        """`[records, elements]`"""
        raw = keys.view(torch.uint8)
        self.records = raw[:, : raw.shape[1] - gap * self.dtype.itemsize]

    @property
    def component(self) -> PagedComponent:
        return PagedComponent(self.pool, self.records, self.rotation)

    def record(self, index: int) -> torch.Tensor:
        return self.keys[index].view(self.page_size, self.heads, self.dim)

    def page(self, index: int) -> torch.Tensor:
        return self.pool[index * self.page_size : (index + 1) * self.page_size]

    def expected(self, record: int, delta: int) -> torch.Tensor:
        """What a page must be: the reference in torch, page by page."""
        keys = self.record(record)
        if self.rotation is None or not delta:
            return keys
        return rotate(keys, delta_table(self.rotation, [delta]), self.rotation)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check(
    layers: list[list[Tensors]], loader: RopeOnLoad, pages: list[int], records: list[int], deltas: list[int]
):
    loader.load(range(len(layers)), loader.moves(pages, records, deltas))
    for tensors in (tensors for layer in layers for tensors in layer):
        for page, record, delta in zip(pages, records, deltas, strict=True):
            assert torch.equal(bits(tensors.page(page)), bits(tensors.expected(record, delta)))
        untouched = set(range(tensors.pages)) - set(pages)
        assert all(tensors.page(page).isnan().all() for page in untouched)


class CudaOnHost(RopeOnLoad):
    def _target(self) -> str:
        return "90a"


def loader_of_components(layers: list[list[PagedComponent]], page_size: int, code: str) -> RopeOnLoad:
    loader = (CudaOnHost if code == "90a" else RopeOnLoad)(layers, page_size, compiled=code != "torch")
    assert loader.is_compiled == (code != "torch")
    return loader


def loader_of(layers: list[list[Tensors]], code: str = "cpu") -> RopeOnLoad:
    components = [[tensors.component for tensors in layer] for layer in layers]
    return loader_of_components(components, layers[0][0].page_size, code)


def some_moves(pages: int) -> tuple[list[int], list[int], list[int]]:
    """Most pages, in no order, some at their base position, some as far as can be, either way."""
    chance = random.Random(pages)
    targets = chance.sample(range(pages), max(1, pages - 1))
    records = [chance.randrange(pages) for _ in targets]
    return targets, records, [chance.choice([0, -1, 512, -4096, FAR, -FAR, 37]) for _ in targets]


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairing", Pairing)
@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dim"),
    [
        (8, 64, 64),
        (2, 80, 80),
        (1, 96, 96),
        (4, 128, 128),
        (1, 128, 64),
        (3, 192, 192),
        (2, 256, 256),
        (2, 80, 32),
        (2, 80, 20),
        (5, 6, 2),
    ],
)
def test_keys_and_values(
    heads: int, dim: int, rotary_dim: int, gap: int, pairing: Pairing, dtype: torch.dtype, code: str
) -> None:
    """MHA, GQA and MQA, whole and partial rotation; gaps of 8 elements keep to 16 bytes, of 3 they do not."""
    turned = Tensors(heads, dim, dtype, rotation(rotary_dim, pairing), gap=gap)
    layers = [[turned, Tensors(heads, dim, dtype, gap=gap)]]
    check(layers, loader_of(layers, code), *some_moves(turned.pages))


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_latent_of_mla(dtype: torch.dtype, code: str) -> None:
    tensors = Tensors(1, 576, dtype, MLA)
    latent = tensors.component._replace(pool=tensors.pool.squeeze(1))
    loader = loader_of_components([[latent]], tensors.page_size, code)
    check([[tensors]], loader, *some_moves(tensors.pages))


@pytest.mark.parametrize("code", CODE)
def test_layers_differ_in_rotation_and_shape(code: str) -> None:
    """Another base, another slice, no position at all, and values narrower than keys."""
    rotations = [rotation(64), None, rotation(64, base=1e6), rotation(6, start=3)]
    layers = [[Tensors(2, 64, torch.bfloat16, r), Tensors(2, 48, torch.bfloat16)] for r in rotations]
    check(layers, loader_of(layers, code), *some_moves(8))


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("pages", [1, 2, 63, 65, 4096])
def test_any_number_of_pages(pages: int, code: str) -> None:
    layers = [[Tensors(2, 16, torch.bfloat16, rotation(16), page_size=1, pages=pages)]]
    check(layers, loader_of(layers, code), *some_moves(pages))


@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("code", CODE)
@given(data=st.data())
def test_any_shape(code: str, data: st.DataObject) -> None:
    pick = data.draw
    dim = pick(st.integers(1, 40)) * 2
    start = pick(st.integers(0, dim // 2 - 1)) * 2
    rotary_dim = pick(st.integers(1, (dim - start) // 2)) * 2
    turned = Tensors(
        heads=pick(st.integers(1, 5)),
        dim=dim,
        dtype=pick(st.sampled_from(DTYPES)),
        rotation=rotation(rotary_dim, pick(st.sampled_from(Pairing)), start),
        page_size=pick(st.sampled_from([1, 3, 16])),
        pages=4,
        gap=pick(st.integers(0, 9)),
    )
    pages = pick(st.permutations(range(4)))[: pick(st.integers(0, 4))]
    deltas = [pick(st.integers(-FAR, FAR)) for _ in pages]
    check([[turned]], loader_of([[turned]], code), pages, [3 - page for page in pages], deltas)


@pytest.mark.parametrize("code", CODE)
def test_only_the_layers_asked_for(code: str) -> None:
    layers = [[Tensors(1, 8, torch.float32, rotation(8)), Tensors(1, 8, torch.float32)] for _ in range(4)]
    loader = loader_of(layers, code)
    loader.load(range(1, 3), loader.moves([0], [1], [5]))
    written = [[bool(tensors.page(0).isfinite().all()) for tensors in layer] for layer in layers]
    assert written == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("code", CODE)
def test_a_page_at_its_base_position_keeps_every_bit(code: str) -> None:
    tensors = Tensors(2, 64, torch.float16, rotation(64))
    patterns = torch.randint(0, 256, tensors.records.shape, dtype=torch.uint8)
    tensors.records.copy_(patterns)
    loader = loader_of([[tensors]], code)
    loader.load(range(1), loader.moves([0], [5], [0]))
    assert torch.equal(bits(tensors.page(0)).flatten(), patterns[5])


@pytest.mark.parametrize("code", CODE)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_what_is_never_rotated_may_have_any_dtype(dtype: torch.dtype, code: str) -> None:
    pool = torch.zeros(16, 2, 12, dtype=torch.int8)
    records = torch.randint(0, 256, (4, 4 * 24), dtype=torch.uint8)
    loader = loader_of_components([[PagedComponent(pool.view(dtype), records)]], 4, code)
    loader.load(range(1), loader.moves([2], [1], [99]))
    assert torch.equal(pool[8:12].view(torch.uint8).flatten(), records[1])


def test_calls_from_many_threads() -> None:
    layers = [[Tensors(4, 64, torch.bfloat16, rotation(64), pages=64)] for _ in range(8)]
    loader = loader_of(layers)
    moves = loader.moves(list(range(64)), list(range(64)), [7] * 64)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda layer: loader.load(range(layer, layer + 1), moves), range(8)))
    for (tensors,) in layers:
        assert torch.equal(tensors.page(63), tensors.expected(63, 7))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (PagedComponent(torch.zeros(8, 2, 8)[..., ::2], torch.zeros(2, 128, dtype=torch.uint8)), "adjacent"),
        (PagedComponent(torch.zeros(8, 2, 4), torch.zeros(2, 64, dtype=torch.uint8)), "takes 128 bytes"),
        (PagedComponent(torch.zeros(8, 2, 4), torch.zeros(2, 32)), "uint8"),
        (PagedComponent(torch.zeros(8, 2, 4), torch.zeros(2, 128, dtype=torch.uint8), MLA), "up to 576"),
        (PagedComponent(torch.zeros(8, 2, 4).half().view(torch.int16), torch.zeros(2, 64), MLA), "uint8"),
    ],
)
def test_refuses_what_does_not_fit(component: PagedComponent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeOnLoad([[component]], 4)


def test_refuses_to_rotate_what_is_not_floating_point() -> None:
    component = PagedComponent(
        torch.zeros(8, 1, 64, dtype=torch.float8_e5m2), torch.zeros(2, 256, dtype=torch.uint8), rotation(64)
    )
    with pytest.raises(ValueError, match="float8_e5m2 cannot be rotated"):
        RopeOnLoad([[component]], 4)


def test_refuses_moves_that_do_not_exist() -> None:
    loader = loader_of([[Tensors(1, 8, torch.float32, rotation(8))]])
    with pytest.raises(ValueError, match="8 pages; got page 8"):
        loader.moves([8], [0], [0])
    with pytest.raises(ValueError, match="8 records; got record -1"):
        loader.moves([0], [-1], [0])
    with pytest.raises(ValueError, match="do not match"):
        loader.moves([0, 1], [0], [0])


def test_the_number_of_blocks_is_32_unless_the_environment_says_otherwise() -> None:
    assert blocks_from({}) == 32
    assert blocks_from({BLOCKS_VARIABLE: "8"}) == 8


@pytest.mark.parametrize("text", ["", "0", "-4", "1025", "many", "8.0", "\u00b2"])
def test_other_numbers_of_blocks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a whole number from 1 to 1024"):
        blocks_from({BLOCKS_VARIABLE: text})
