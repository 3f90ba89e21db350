"""The policies that pullcache's is compared with, over days that can be reckoned by hand."""

import pytest

from tests.bench import policies
from tests.bench.fleet import TRIED
from tests.bench.trace import Blob, Fleet, Image, Pull

MANIFEST = Blob(0, 1)


def day(*asked: str, also: str = "") -> list[Pull]:
    """Return pulls of blobs of one byte, a letter each; `also` is in every image, and with its node."""
    letters = {letter: Blob(ord(letter), 1) for pull in (*asked, also) for letter in pull}
    base = tuple(letters[letter] for letter in also)
    return [
        Pull(Image(0, 0, MANIFEST, base + wanted), wanted)
        for wanted in (tuple(letters[letter] for letter in pull) for pull in asked)
    ]


def test_the_least_recently_used_goes_first():
    # With the manifest there is room for two: b and c are gone when they come again, a is not.
    assert policies.lru(day("a", "b", "a", "c", "a", "b"), 3) == 1 + 3 + 1


def test_who_knows_the_future_keeps_what_comes_again_first():
    assert policies.belady(day("a", "b", "c", "b", "a"), 3) == 1 + 3
    assert policies.lru(day("a", "b", "c", "b", "a"), 3) == 1 + 3 + 1


def test_a_manifest_is_a_use_of_what_the_node_has_already():
    base = day("x", also="")[0]
    later = day("a", "b", "c", also="x")
    again = day("x")
    pulls = [base, *later, *again]
    assert policies.lru(pulls, 4) == 1 + 5
    assert policies.lru_of_images(pulls, 4) == 1 + 4


def test_what_was_asked_for_once_leaves_the_probation_of_s3_fifo():
    scan = day("a", "a", "a", *"bcdefghijklmn", "a")
    assert policies.s3_fifo(scan, 6) == 1 + 14
    assert policies.lru(scan, 6) == 1 + 15


@pytest.mark.parametrize("name", TRIED)
def test_nobody_does_better_than_who_knows_the_future_or_worse_than_no_store(name: str):
    fleet = Fleet(300)
    asked = sum(blob.size for pull in fleet.day for blob in pull.requests())
    capacity = fleet.total // 10
    missed = TRIED[name](fleet.day, capacity)
    assert policies.belady(fleet.day, capacity) <= missed < asked
    assert TRIED[name](fleet.day, 2 * fleet.total) == fleet.total


def test_a_day_is_the_same_each_time_and_nodes_ask_for_what_they_lack():
    fleet = Fleet(300)
    assert fleet.day == Fleet(300).day
    assert all(set(pull.wanted) <= set(pull.image.blobs) for pull in fleet.day)
    assert any(len(pull.wanted) < len(pull.image.blobs) for pull in fleet.day)
