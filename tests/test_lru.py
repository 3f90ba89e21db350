"""What is kept in memory has a bound, and what was used last stays."""

from hypothesis import given, strategies as st

from proxy.lru import CachedManifest, ManifestLRUCache, TTLCache
from proxy.oci.digest import Digest
from tests.fakes.clock import Clock


def held(content: bytes) -> CachedManifest:
    return CachedManifest(Digest.from_content(content), "a/b", content)


def test_the_manifests_used_last_stay():
    memory = ManifestLRUCache(20)
    first, second, third = held(b"1" * 8), held(b"2" * 8), held(b"3" * 8)
    memory.add(first)
    memory.add(second)
    assert memory.get(first.digest) == first
    memory.add(third)
    assert memory.get(second.digest) is None
    assert memory.get(first.digest) == first
    assert memory.get(third.digest) == third


def test_a_manifest_that_is_put_twice_counts_once():
    memory = ManifestLRUCache(20)
    first = held(b"1" * 12)
    for _ in range(5):
        memory.add(first)
    memory.add(held(b"2" * 8))
    assert memory.get(first.digest) == first


@given(st.lists(st.binary(max_size=30)))
def test_no_more_is_held_than_allowed(contents):
    memory = ManifestLRUCache(50)
    for content in contents:
        memory.add(held(content))
        inside = {one for one in contents if memory.get(Digest.from_content(one))}
        assert sum(map(len, inside)) <= 50


def test_answers_tell_their_age_and_the_oldest_go():
    clock = Clock()
    answers: TTLCache[str, int] = TTLCache(2, clock)
    answers.set("a", 1)
    clock.turn(5)
    answers.set("b", 2)
    assert answers.get_with_age("a") == (5, 1)
    answers.set("a", 3)
    answers.set("c", 4)
    assert answers.get_with_age("b") is None
    assert answers.get_with_age("a") == (0, 3)
    answers.discard("a")
    answers.discard("a")
    assert answers.get_with_age("a") is None
