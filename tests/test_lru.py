"""Caches in memory are bounded, and drop what was used or set least recently."""

from hypothesis import given, strategies as st

from proxy.lru import CachedManifest, ManifestLRUCache, TTLCache
from proxy.oci.digest import Digest
from tests.fakes.clock import Clock


def manifest(content: bytes) -> CachedManifest:
    return CachedManifest(Digest.from_content(content), "a/b", content)


def test_the_least_recently_used_manifests_are_evicted():
    cache = ManifestLRUCache(20)
    first, second, third = manifest(b"1" * 8), manifest(b"2" * 8), manifest(b"3" * 8)
    cache.add(first)
    cache.add(second)
    assert cache.get(first.digest) == first
    cache.add(third)
    assert cache.get(second.digest) is None
    assert cache.get(first.digest) == first
    assert cache.get(third.digest) == third


def test_a_manifest_that_is_added_again_counts_once():
    cache = ManifestLRUCache(20)
    first = manifest(b"1" * 12)
    for _ in range(5):
        cache.add(first)
    cache.add(manifest(b"2" * 8))
    assert cache.get(first.digest) == first


@given(st.lists(st.binary(max_size=30)))
def test_the_capacity_is_never_exceeded(contents):
    cache = ManifestLRUCache(50)
    for content in contents:
        cache.add(manifest(content))
        inside = {one for one in contents if cache.get(Digest.from_content(one))}
        assert sum(map(len, inside)) <= 50


def test_values_have_an_age_and_the_oldest_are_dropped():
    clock = Clock()
    values: TTLCache[str, int] = TTLCache(2, clock)
    values.set("a", 1)
    clock.advance(5)
    values.set("b", 2)
    assert values.get_with_age("a") == (5, 1)
    values.set("a", 3)
    values.set("c", 4)
    assert values.get_with_age("b") is None
    assert values.get_with_age("a") == (0, 3)
    values.discard("a")
    values.discard("a")
    assert values.get_with_age("a") is None


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.binary(max_size=30)))))
def test_values_are_bounded_in_bytes_too_and_the_oldest_are_dropped(changes):
    values: TTLCache[int, bytes] = TTLCache(4, Clock(), max_size=40, size_of=len)
    kept: dict[int, bytes] = {}
    for key, value in changes:
        kept.pop(key, None)
        if value is None:
            values.discard(key)
            continue
        values.set(key, value)
        kept[key] = value
        while len(kept) > 4 or sum(map(len, kept.values())) > 40:
            del kept[next(iter(kept))]
        assert {key: values.get_with_age(key) for key in range(6)} == {
            key: (0, kept[key]) if key in kept else None for key in range(6)
        }


def test_a_value_that_is_too_large_is_not_kept_and_drops_no_other():
    values: TTLCache[str, bytes] = TTLCache(4, Clock(), max_size=40, size_of=len)
    values.set("small", bytes(30))
    values.set("large", bytes(30))
    values.set("large", bytes(41))
    assert values.get_with_age("large") is None
    values.set("small", bytes(40))
    assert values.get_with_age("small") == (0, bytes(40))
    values.clear()
    values.set("other", bytes(40))
    assert values.get_with_age("other") == (0, bytes(40))
