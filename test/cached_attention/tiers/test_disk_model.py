"""The disk tier against a dictionary, over any sequence of calls."""

import shutil
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cached_attention.encryption import EncryptionKey
from cached_attention.tiers.page_io import ReadOutcome

CAPACITY = 700_000
NUMBERS = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)


def machine(store_in, parent, encryption):
    class DiskMachine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.store = store_in(Path(tempfile.mkdtemp(dir=parent)) / "kv", 5000, CAPACITY, encryption)
            self.tier = self.store.open()
            self.slots: dict[int, int] = {}
            self.uses: dict[int, int] = {}

        @rule(numbers=NUMBERS)
        def write(self, numbers):
            numbers = [number for number in numbers if number not in self.slots]
            self.tier.flush(10)
            room = self.tier.free_slots
            saved = self.store.write(self.tier, numbers)
            assert list(saved) == numbers[:room]
            assert not set(saved.values()) & set(self.slots.values())
            self.slots |= saved
            self.uses |= dict.fromkeys(saved, 1)

        @rule(numbers=NUMBERS)
        def read(self, numbers):
            wanted = {number: self.slots[number] for number in numbers if number in self.slots}
            assert set(self.store.read(self.tier, wanted).values()) <= {ReadOutcome.READ}

        @rule(number=st.integers(100, 200), slot=st.integers(0, 200))
        def read_what_is_not_there(self, number, slot):
            assert self.store.read(self.tier, {number: slot}) == {number: ReadOutcome.LOST}

        @rule(numbers=NUMBERS)
        def remove(self, numbers):
            gone = [number for number in numbers if number in self.slots]
            self.tier.remove([self.slots.pop(number) for number in gone])
            for number in gone:
                del self.uses[number]

        @rule(number=st.integers(0, 60), uses=st.integers(1, 1000))
        def touch(self, number, uses):
            if number in self.slots:
                self.tier.touch(self.slots[number], time.time() - 1, uses)
                self.uses[number] = uses

        @precondition(lambda self: self.slots)
        @rule()
        def reopen(self):
            assert self.tier.close()
            self.tier = self.store.open()
            held = self.store.held(self.tier)
            assert {r.base_position // 64: (r.slot, r.uses) for r in held.values()} == {
                number: (slot, self.uses[number]) for number, slot in self.slots.items()
            }

        @invariant()
        def limits_hold(self):
            tier = self.tier
            assert tier.free_slots + len(self.slots) <= tier.capacity_slots
            assert tier.stats.failed == 0
            assert self.store.usage() <= CAPACITY

        def teardown(self):
            self.tier.check_invariants()
            assert self.tier.free_slots + len(self.slots) == self.tier.capacity_slots
            assert self.tier.close()
            shutil.rmtree(self.store.directory.parent)

    return DiskMachine


@pytest.mark.parametrize("key", [None, EncryptionKey(bytes(range(32)))], ids=["plain", "encrypted"])
def test_disk_tier_against_a_model(store_in, fast_path, key):
    run_state_machine_as_test(
        machine(store_in, fast_path, key),
        settings=settings(
            max_examples=60 if key is None else 30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
