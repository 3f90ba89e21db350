"""What is kept in memory has a bound, and what was used last stays."""

from hypothesis import given, strategies as st

from proxy.lru import Expiring, Held, ManifestMemory
from proxy.oci.digest import Digest
from tests.fakes.clock import Clock


def held(content: bytes) -> Held:
    return Held(Digest.of(content), "a/b", content)


def test_the_manifests_used_last_stay():
    memory = ManifestMemory(20)
    first, second, third = held(b"1" * 8), held(b"2" * 8), held(b"3" * 8)
    memory.put(first)
    memory.put(second)
    assert memory.get(first.digest) == first
    memory.put(third)
    assert memory.get(second.digest) is None
    assert memory.get(first.digest) == first
    assert memory.get(third.digest) == third


def test_a_manifest_that_is_put_twice_counts_once():
    memory = ManifestMemory(20)
    first = held(b"1" * 12)
    for _ in range(5):
        memory.put(first)
    memory.put(held(b"2" * 8))
    assert memory.get(first.digest) == first


@given(st.lists(st.binary(max_size=30)))
def test_no_more_is_held_than_allowed(contents):
    memory = ManifestMemory(50)
    for content in contents:
        memory.put(held(content))
        inside = {one for one in contents if memory.get(Digest.of(one))}
        assert sum(map(len, inside)) <= 50


def test_answers_tell_their_age_and_the_oldest_go():
    clock = Clock()
    answers: Expiring[str, int] = Expiring(2, clock)
    answers.put("a", 1)
    clock.turn(5)
    answers.put("b", 2)
    assert answers.get("a") == (5, 1)
    answers.put("a", 3)
    answers.put("c", 4)
    assert answers.get("b") is None
    assert answers.get("a") == (0, 3)
    answers.drop("a")
    answers.drop("a")
    assert answers.get("a") is None
