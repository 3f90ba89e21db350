"""What policies remember in the index: bounded, and the same after a restart."""

import asyncio
from pathlib import Path

import pytest

from proxy.oci.digest import Digest
from proxy.oci.reference import Repository, Tag
from proxy.policy.facts import Badge, RepositoryFacts
from proxy.storage.index import Index
from proxy.storage.records.policies import MAX_DECISIONS, MAX_EXCEPTIONS, PolicyRecords
from proxy.storage.records.policy_rows import DecisionRecord, PolicyException
from proxy.storage.records.tag_history import MAX_TAG_HISTORY
from tests.fakes.clock import Clock

APP, OTHER = Repository("docker.io", "library/app"), Repository("docker.io", "me/other")
V1 = Tag("v1")


def digest(number: int) -> Digest:
    return Digest.from_content(str(number).encode())


@pytest.fixture
async def index(tmp_path: Path):
    index = await asyncio.to_thread(Index, tmp_path / "index.sqlite", Clock())
    yield index
    await asyncio.to_thread(index.close)


@pytest.fixture
def records(index: Index) -> PolicyRecords:
    return PolicyRecords(index)


async def test_newer_facts_replace_older_ones_and_older_ones_nothing(records):
    old = RepositoryFacts(Badge.COMMUNITY, asked_at=10.0)
    new = RepositoryFacts(Badge.VERIFIED_PUBLISHER, "Acme", "text", 3, 4, True, 20.0, "Docker Hub")
    await records.set_facts([(APP, old), (OTHER, old)])
    await records.set_facts([(APP, new)])
    await records.set_facts([(APP, old)])
    assert records.facts(APP) == new
    assert records.facts(OTHER) == old


async def test_the_history_of_a_tag_is_kept_with_its_times_up_to_a_bound(index, records):
    for number in range(MAX_TAG_HISTORY + 5):
        await records.record_meaning(APP, V1, digest(number), at=float(number))
    await records.record_meaning(APP, V1, digest(10), at=1000.0)
    meanings = records.meanings(APP, V1)
    assert len(meanings) == MAX_TAG_HISTORY
    newest = meanings[0]
    assert (newest.digest, newest.first_seen, newest.last_seen) == (digest(10), 10.0, 1000.0)
    assert records.meaning(APP, digest(0)) is None
    assert records.has_history(APP, V1, digest(0))
    assert not records.has_history(OTHER, None, digest(0))
    assert not records.has_history(APP, Tag("v2"), digest(0))


async def test_a_tag_that_is_set_gets_a_history_without_any_policy(index, records):
    await index.set_tag(APP, V1, digest(1))
    await index.set_tag(APP, V1, digest(1), stated=digest(2))
    assert {one.digest for one in records.meanings(APP, V1)} == {digest(1), digest(2)}
    row = index.tag(APP, V1)
    assert row
    assert row.digest == digest(1)


async def test_ripe_content_is_ripe_under_every_tag(records):
    await records.record_meaning(APP, V1, digest(1), at=1.0)
    await records.record_meaning(APP, None, digest(1), at=2.0)
    await records.mark_ripe(APP, digest(1))
    meaning = records.meaning(APP, digest(1))
    assert meaning
    assert (meaning.is_ripe, meaning.first_seen) == (True, 1.0)


async def test_exceptions_end_and_are_bounded(records):
    for number in range(MAX_EXCEPTIONS + 2):
        await records.add_exception(PolicyException(APP, digest(number), 0.0, 10.0 + number, "x"))
    assert len(records.exceptions()) == MAX_EXCEPTIONS
    last = digest(MAX_EXCEPTIONS + 1)
    assert records.exception(APP, last, now=11.0)
    assert records.exception(OTHER, last, now=11.0) is None
    assert records.exception(APP, last, now=5000.0) is None


async def test_decisions_are_kept_in_order_up_to_a_bound(records):
    made = [
        DecisionRecord(float(number), 1, "deny" if number % 2 else "previous", "a:1", "", "", "7")
        for number in range(MAX_DECISIONS + 10)
    ]
    await records.add_decisions(made)
    assert records.decisions(0.0, "", limit=20_000) == made[:9:-1]
    assert {one.decision for one in records.decisions(0.0, "deny", 5)} == {"deny"}
    assert records.decisions(float(MAX_DECISIONS + 9), "", limit=5) == made[-1:]
