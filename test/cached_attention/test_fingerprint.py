from dataclasses import replace

import pytest

from cached_attention.fingerprint import Fingerprint

BASE = Fingerprint(
    model="meta/llama",
    weights="r1",
    kv_dtype="bfloat16",
    page_size=64,
    component_bytes=((1024, 1024), (1024, 1024)),
    ranks={"tp_rank": 0, "tp_size": 2},
    rope={"theta": 500000.0, "scaling": {"type": "llama3", "factor": 8.0}},
)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"weights": "r2"},
        {"kv_dtype": "fp8"},
        {"page_size": 32},
        {"component_bytes": ((1024, 1024),)},
        {"component_bytes": ((2048,), (2048,))},
        {"ranks": {"tp_rank": 1, "tp_size": 2}},
        {"rope": {"theta": 10000.0}},
        {"other": {"k_scale": 0.5}},
        {"format_version": 2},
    ],
)
def test_every_property_counts(change):
    assert replace(BASE, **change).digest() != BASE.digest()


def test_order_of_names_does_not_count():
    assert replace(BASE, ranks={"tp_size": 2, "tp_rank": 0}).digest() == BASE.digest()


def test_json_round_trip():
    assert Fingerprint.from_json(BASE.to_json()) == BASE
    assert Fingerprint.from_json(BASE.to_json()).digest() == BASE.digest()


def test_the_digest_never_changes_within_a_format_version():
    assert BASE.name == "a94e55c8a70475d0"
    assert BASE.page_bytes == 4096


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "3", '{"component_bytes": 5}', '{"component_bytes": [], "x": 1}']
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match=r".*"):
        Fingerprint.from_json(text)


def test_in_words():
    words = BASE.describe()
    assert words["page"] == "64 tokens, 4,096 bytes, 2 layers"
    assert words["ranks"] == "tp_rank 0, tp_size 2"
    assert words["other"] == "none"
