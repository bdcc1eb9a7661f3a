"""Many pages at once give the index that they give one by one."""

import random

from hypothesis import given
from hypothesis import strategies as st

from cached_attention.index import NOWHERE, PageIndex

KEYS = [bytes([number]) * 32 for number in range(12)]


def snapshot(index: PageIndex) -> dict[bytes, tuple[object, ...]]:
    """All that is known of each page, without the numbers of rows."""
    (tier,) = index.tiers
    return {
        index.key(row): (
            None if index.parent[row] == NOWHERE else index.key(index.parent[row]),
            index.position[row],
            index.last_use[row],
            index.checksum[row],
            index.uses[row],
            index.pins[row],
            index._references[row],
            tier.slot[row],
            tier.ready[row],
            tier.children[row],
        )
        for row in index.rows()
    }


def place_one_by_one(index: PageIndex, columns: tuple[list, ...]) -> list[int]:
    (tier,), left_out = index.tiers, []
    for key, slot, parent, position, checksum, last_use, uses in zip(*columns, strict=True):
        row = index.add(key, parent, position)
        if row in tier:
            left_out.append(slot)
            continue
        index.checksum[row], index.last_use[row], index.uses[row] = checksum, last_use, uses
        index.place(row, tier, slot)
    return left_out


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[list, ...]]:
    """Records of a forest in any order, in batches; some keys come twice, some parents never."""
    parents = [
        None if not number or draw(st.booleans()) else KEYS[draw(st.integers(0, number - 1))]
        for number in range(12)
    ]
    numbers = draw(st.lists(st.integers(0, 11), min_size=1, max_size=16))
    source = random.Random(draw(st.integers(0, 99)))
    positions = [number * 64 for number in range(12)]
    records = [
        (KEYS[n], slot, parents[n], positions[n], source.getrandbits(64), source.random(), source.getrandbits(32))
        for slot, n in enumerate(numbers)
    ]
    size = draw(st.integers(1, 16))
    return [
        tuple(map(list, zip(*records[first : first + size], strict=True)))
        for first in range(0, len(records), size)
    ]


@given(batches(), st.integers(0, 20))
def test_many_pages_are_placed_as_one_by_one(some: list[tuple[list, ...]], room: int) -> None:
    one, many = PageIndex("disk"), PageIndex("disk")
    many.reserve(room)
    for columns in some:
        assert many.place_many(many.tiers[0], *columns) == place_one_by_one(one, columns)
        many.check_invariants()
        assert snapshot(many) == snapshot(one)
    leaves = list(many.leaves(many.tiers[0]))
    disk = many.tiers[0]
    assert set(leaves) == {row for row in many.rows() if row in disk and not disk.children[row]}
    assert [many.last_use[row] for row in leaves] == sorted(many.last_use[row] for row in leaves)


@given(batches())
def test_an_index_goes_on_after_many_pages(some: list[tuple[list, ...]]) -> None:
    index = PageIndex("disk")
    (disk,) = index.tiers
    for columns in some:
        index.place_many(disk, *columns)
    while leaves := list(index.leaves(disk)):
        for row in leaves:
            index.displace(row, disk)
        index.check_invariants()
    assert not len(index)
    row = index.add(KEYS[0], None, 0)
    index.place(row, disk, 3)
    index.check_invariants()


def test_counts_that_no_column_holds_are_cut() -> None:
    index = PageIndex("disk")
    index.place_many(index.tiers[0], KEYS[:2], [0, 1], [None, None], [0, 0], [0, 0], [0.0, 0.0], [-5, 1 << 40])
    assert [index.uses[index.find(key)] for key in KEYS[:2]] == [0, (1 << 32) - 1]
