"""Totals of traffic in the index: what is kept, and for how long."""

from contextlib import closing

import pytest

from proxy.errors import StorageError
from proxy.storage.index import Index
from proxy.storage.records import traffic as traffic_records
from proxy.storage.records.traffic import TrafficRecords
from proxy.traffic import TrafficTally
from tests.fakes.clock import Clock

DAY = 86_400.0
BIG = 10**12


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def index(tmp_path, clock):
    with closing(Index(tmp_path / "index.sqlite", clock)) as index:
        yield index


@pytest.fixture
def tally(clock):
    return TrafficTally(clock)


@pytest.fixture
def records(index, tally):
    return TrafficRecords(index, tally)


def count(tally: TrafficTally, name: str, pulls: int = 1) -> None:
    counts = tally.counts(tally.today(), "repository", name)
    counts.requests += pulls
    counts.hits += pulls


def rows(index: Index) -> dict[tuple[str, str], int]:
    found = index.select("SELECT day, name, hits FROM traffic ORDER BY day, name")
    return {(day, name): hits for day, name, hits in found}


async def write(records: TrafficRecords, max_size: int = BIG) -> None:
    await records.write(max_size=max_size, keeps_clients=True)


async def test_a_day_keeps_the_names_that_are_pulled_most(index, tally, records, monkeypatch):
    monkeypatch.setattr(traffic_records, "MAX_NAMES_PER_DAY", 2)
    for pulls, name in enumerate(("rare", "seldom", "often", "most"), 1):
        count(tally, name, pulls)
    await write(records)
    assert {name: hits for (_, name), hits in rows(index).items()} == {"": 3, "often": 3, "most": 4}
    assert [one.name for one in await records.top("repository", 1, "pulls", 9)] == ["most", "often"]


async def test_of_repositories_the_last_days_with_traffic_are_kept(
    clock, index, tally, records, monkeypatch
):
    monkeypatch.setattr(
        traffic_records, "KEPT_DAYS", {"upstream": 3, "repository": 3, "image": 2, "client": 2}
    )
    for name in "abcd":
        count(tally, name)
        await write(records)
        clock.advance(100 * DAY)
    assert {name for _, name in rows(index)} == {"b", "c", "d"}


async def test_a_clock_that_was_wrong_for_a_moment_costs_no_totals(clock, index, tally, records):
    count(tally, "a")
    await write(records)
    for seconds in (4000 * DAY, -8000 * DAY, 4000 * DAY):
        clock.advance(seconds)
        count(tally, "b")
        await write(records)
    assert {name for _, name in rows(index)} == {"a", "b"}
    assert records.sum_days(1) is not None


async def test_clients_are_forgotten_after_a_month(clock, index, tally, records):
    tally.counts(tally.today(), "client", "10.0.0.1").requests += 1
    await write(records)
    clock.advance(30 * DAY)
    count(tally, "x")
    await write(records)
    assert {name for _, name in rows(index)} == {"10.0.0.1", "x"}
    clock.advance(DAY)
    await write(records)
    assert {name for _, name in rows(index)} == {"x"}


async def test_a_small_store_keeps_fewer_names_of_older_days(clock, index, tally, records):
    for name in "abc":
        count(tally, name)
    await write(records)
    clock.advance(DAY)
    for name in "abc":
        count(tally, name)
    await write(records, max_size=int(4 * traffic_records.ROW_SIZE / traffic_records.MAX_SHARE))
    names = [name for _, name in rows(index)]
    assert names == ["", "a", "b", "c"]
    assert sum(rows(index).values()) == 6


async def test_names_beyond_the_limit_of_memory_are_counted_without_a_name(tally, monkeypatch):
    monkeypatch.setattr("proxy.traffic.MAX_PENDING_TOTALS", 2)
    for name in "abcd":
        count(tally, name)
    assert [key.name for key in tally.take()] == ["a", "b", ""]


async def test_what_could_not_be_written_is_written_later(index, tally, records, monkeypatch):
    count(tally, "app")
    with monkeypatch.context() as patch:
        patch.setattr(traffic_records, "write_totals", _fail)
        with pytest.raises(StorageError):
            await write(records)
    assert rows(index) == {}
    count(tally, "app")
    await write(records)
    assert [*rows(index).values()] == [2]


def _fail(*_: object) -> None:
    import sqlite3  # noqa: PLC0415

    raise sqlite3.OperationalError("database or disk is full")


async def test_writing_totals_keeps_the_rows_that_hits_read_from_memory(index, tally, records):
    index.lookup("SELECT 1", bool)
    before = index._row_cache
    count(tally, "app")
    await write(records)
    assert index._row_cache is before
