"""The simulated eviction policies, over days whose misses can be counted by hand."""

import pytest

from tests.bench import policies
from tests.bench.fleet import POLICIES
from tests.bench.trace import Fleet, Pull, SimulatedBlob, SimulatedImage

MANIFEST = SimulatedBlob(0, 1)


def day(*pulls: str, base: str = "") -> list[Pull]:
    """Return pulls in which each letter is a blob of one byte that the node requests.

    The images also contain the blobs of `base`, which the nodes have already.
    """
    letters = {letter: SimulatedBlob(ord(letter), 1) for pull in (*pulls, base) for letter in pull}
    base_blobs = tuple(letters[letter] for letter in base)
    return [
        Pull(SimulatedImage(0, 0, MANIFEST, base_blobs + requested), requested)
        for requested in (tuple(letters[letter] for letter in pull) for pull in pulls)
    ]


def test_lru_evicts_the_least_recently_used_blob():
    # There is room for the manifest and two blobs: the second request for b is a miss, for a a hit.
    assert policies.lru(day("a", "b", "a", "c", "a", "b"), 3) == 1 + 3 + 1


def test_belady_keeps_the_blob_that_is_requested_again_first():
    assert policies.belady(day("a", "b", "c", "b", "a"), 3) == 1 + 3
    assert policies.lru(day("a", "b", "c", "b", "a"), 3) == 1 + 3 + 1


def test_lru_of_images_counts_a_pull_as_a_use_of_blobs_that_the_node_has():
    pulls = [*day("x"), *day("a", "b", "c", base="x"), *day("x")]
    assert policies.lru(pulls, 4) == 1 + 5
    assert policies.lru_of_images(pulls, 4) == 1 + 4


def test_s3_fifo_evicts_blobs_that_were_requested_once():
    scan = day("a", "a", "a", *"bcdefghijklmn", "a")
    assert policies.s3_fifo(scan, 6) == 1 + 14
    assert policies.lru(scan, 6) == 1 + 15


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_is_better_than_belady_or_worse_than_no_store(name: str):
    fleet = Fleet(300)
    requested = sum(blob.size for pull in fleet.day for blob in pull.requests())
    capacity = fleet.total // 10
    missed = POLICIES[name](fleet.day, capacity)
    assert policies.belady(fleet.day, capacity) <= missed < requested
    assert POLICIES[name](fleet.day, 2 * fleet.total) == fleet.total


def test_a_day_is_reproducible_and_nodes_request_only_blobs_that_they_lack():
    fleet = Fleet(300)
    assert fleet.day == Fleet(300).day
    assert all(set(pull.requested) <= set(pull.image.blobs) for pull in fleet.day)
    assert any(len(pull.requested) < len(pull.image.blobs) for pull in fleet.day)
