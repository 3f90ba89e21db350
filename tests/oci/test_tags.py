"""Lists of tags in their encoded form answer as a sorted list of texts would."""

import json
import random

import pytest
from hypothesis import given, strategies as st

from proxy.oci import tags as tag_lists
from proxy.oci.tags import EncodedTags, encode_tags

# Short, so that duplicates and neighbours are frequent.
tags = st.lists(st.text("aB_.-19", min_size=1, max_size=4), max_size=40)


def is_tag(text: str) -> bool:
    return text[0] not in ".-"


def encode(*lists: list[str], indent: int | None = None) -> EncodedTags:
    return encode_tags([json.dumps(one, indent=indent).encode() for one in lists])


@given(tags, tags, st.sampled_from([None, 0, 2]))
def test_tags_of_all_pages_are_sorted_and_listed_once(first, second, indent):
    encoded = encode(first, second, indent=indent)
    expected = sorted({*filter(is_tag, first), *filter(is_tag, second)})
    assert list(encoded) == expected
    assert bool(encoded) == bool(expected)
    assert json.loads(encoded.document('a"b')) == {"name": 'a"b', "tags": expected}


@given(tags, st.text(max_size=4), st.integers(0, 50))
def test_a_page_has_the_tags_after_the_last_one(listed, last, limit):
    following = [tag for tag in sorted(set(filter(is_tag, listed))) if tag > last]
    document, end = encode(listed).page("app", last, limit)
    assert json.loads(document) == {"name": "app", "tags": following[:limit]}
    assert end == (following[limit - 1] if 0 < limit < len(following) else "")


@pytest.mark.parametrize("order", ["sorted", "reversed", "random"])
def test_lists_longer_than_a_batch_are_sorted(order):
    names = sorted(f"v{number:05}" for number in range(40_000))
    listed = {
        "sorted": names,
        "reversed": names[::-1],
        "random": random.Random(1).sample(names, len(names)),
    }[order]
    assert list(encode(listed, listed[:100])) == names


@pytest.mark.parametrize(
    "array",
    [
        b"[]",
        b"[null, 1, true]",
        b'["", "x y", "-x", ".x", "\xc3\xa4", "a/b", "%s"]' % (b"a" * 129),
        b'["\\u0061", "a\\"", {"b": 1}]',
    ],
)
def test_what_cannot_be_a_tag_is_left_out(array):
    assert list(encode_tags([array])) == []


def test_clients_share_the_document_and_its_size_counts():
    encoded = encode(["a", "b"])
    assert encoded.document("app") is encoded.document("app")
    assert encoded.document("other") != encoded.document("app")
    assert encoded.size >= 2 * len('"a","b"')


def test_a_tag_that_is_repeated_in_many_batches_is_listed_once(monkeypatch):
    monkeypatch.setattr(tag_lists, "_BATCH", 4)
    monkeypatch.setattr(tag_lists, "_SAMPLES", 2)
    assert list(encode(["b"] * 40 + ["c"] + ["a"] * 40)) == ["a", "b", "c"]
