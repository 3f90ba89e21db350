"""Traffic totals in the index, by day: of upstreams and repositories for a year, of images and clients for a month.

A day keeps the names with the most pulls; the rest is added up under an empty name. If all rows take
more than their share of a small store, older days keep fewer names.
"""

import sqlite3
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from typing import Literal

import msgspec

from proxy.errors import StorageError
from proxy.storage.index import Index
from proxy.traffic import OTHERS, Scope, TotalKey, TrafficCounts, TrafficTally

# Days that totals are kept: of upstreams and repositories the last ones with traffic.
KEPT_DAYS: Mapping[Scope, int] = {"upstream": 366, "repository": 366, "image": 31, "client": 31}
# Names of one scope that a day keeps.
MAX_NAMES_PER_DAY = 1000
# Images whose last pull is known.
MAX_PULLED_IMAGES = 10_000
# The most that totals may take of the store, and the bytes of a row in the index.
MAX_SHARE = 0.01
ROW_SIZE = 160
# Rows that are written before old days and rare names are looked for again.
_ROWS_PER_PRUNING = 1000

TopOrder = Literal["pulls", "bytes"]

_COLUMNS = TrafficCounts.__struct_fields__
_SUMS = ", ".join(f"coalesce(sum({column}), 0)" for column in _COLUMNS)
_PULLS = "hits + partials + misses"
_UPSERT = (
    f"INSERT INTO traffic (day, scope, name, {', '.join(_COLUMNS)})"
    f" VALUES ({', '.join('?' * (3 + len(_COLUMNS)))}) ON CONFLICT (scope, day, name) DO UPDATE SET "
    + ", ".join(f"{column} = {column} + excluded.{column}" for column in _COLUMNS)
)


class NamedTraffic(msgspec.Struct, frozen=True):
    """The traffic of one name, or of an upstream on one day."""

    name: str
    counts: TrafficCounts
    day: str = ""


class TrafficRecords:
    """Writes the totals of `tally`, and reads them. Methods raise `StorageError`."""

    def __init__(self, index: Index, tally: TrafficTally) -> None:
        self._index = index
        self._tally = tally
        # The day, and whether clients were kept, when old rows were last looked for.
        self._pruned_for: tuple[str, bool] | None = None
        self._rows_since_pruning = 0

    async def write(self, *, max_size: int, keeps_clients: bool) -> None:
        """Write what was counted since the last call; if that fails, it is written with the next call.

        `max_size` is the size of the store. Without `keeps_clients` no totals of clients stay.
        """
        totals, pulled, today = self._tally.take(), self._tally.take_pulled(), self._tally.today()
        has_changed = self._pruned_for not in (None, (today, keeps_clients))
        if not totals and not has_changed:
            return
        is_due = (
            self._pruned_for != (today, keeps_clients)
            or self._rows_since_pruning > _ROWS_PER_PRUNING
        )
        max_rows = max(1, int(max_size * MAX_SHARE / ROW_SIZE)) if is_due else None
        try:
            await self._index.transact(
                write_totals, totals, pulled, today, max_rows, keeps_clients, keeps_rows=True
            )
        except StorageError:
            self._tally.put_back(totals, pulled)
            raise
        if is_due:
            self._pruned_for, self._rows_since_pruning = (today, keeps_clients), 0
        self._rows_since_pruning += len(totals)

    def sum_days(self, days: int) -> TrafficCounts:
        """Return the traffic of the last `days` days, today included."""
        query = f"SELECT {_SUMS} FROM traffic WHERE scope = 'upstream' AND day >= ?"
        (row,) = self._index.select(query, (self._first_day(days),))
        return TrafficCounts(*row)

    def by_day(self, days: int) -> list[NamedTraffic]:
        """Return the traffic of each upstream on each of the last days, the latest first."""
        query = (
            f"SELECT name, day, {', '.join(_COLUMNS)} FROM traffic"
            " WHERE scope = 'upstream' AND day >= ? ORDER BY day DESC, name"
        )
        rows = self._index.select(query, (self._first_day(days),))
        return [NamedTraffic(name, TrafficCounts(*counts), day) for name, day, *counts in rows]

    async def top(self, scope: Scope, days: int, order: TopOrder, limit: int) -> list[NamedTraffic]:
        """Return the names with the most pulls, or bytes to clients, in the last days."""
        orders = {"pulls": (_PULLS, "sent"), "bytes": ("sent", _PULLS)}[order]
        query = (
            f"SELECT name, {_SUMS} FROM traffic WHERE scope = ? AND day >= ? AND name != ?"
            f" GROUP BY name HAVING sum(requests) > 0"
            f" ORDER BY sum({orders[0]}) DESC, sum({orders[1]}) DESC, name LIMIT ?"
        )
        parameters = (scope, self._first_day(days), OTHERS, limit)
        rows = await self._index.read(
            lambda connection: connection.execute(query, parameters).fetchall()
        )
        return [NamedTraffic(name, TrafficCounts(*counts)) for name, *counts in rows]

    def _first_day(self, days: int) -> str:
        return _days_before(self._tally.today(), days - 1)


def write_totals(
    connection: sqlite3.Connection,
    totals: Mapping[TotalKey, TrafficCounts],
    pulled: Mapping[str, float],
    today: str,
    max_rows: int | None,
    keeps_clients: bool,
) -> None:
    """Add totals to the rows of their days, and note pulls; with `max_rows`, remove what is not kept."""
    connection.executemany(
        _UPSERT,
        [
            (*key, *msgspec.structs.astuple(counts))
            for key, counts in totals.items()
            if keeps_clients or key.scope != "client"
        ],
    )
    connection.executemany(
        "INSERT INTO pulls (name, at) VALUES (?, ?)"
        " ON CONFLICT (name) DO UPDATE SET at = max(at, excluded.at)",
        pulled.items(),
    )
    if max_rows is not None:
        connection.execute(
            "DELETE FROM pulls WHERE name NOT IN (SELECT name FROM pulls ORDER BY at DESC LIMIT ?)",
            (min(MAX_PULLED_IMAGES, max_rows),),
        )
        _prune(connection, today, max_rows, keeps_clients)


def _prune(connection: sqlite3.Connection, today: str, max_rows: int, keeps_clients: bool) -> None:
    scope: Scope
    for scope in ("upstream", "repository"):
        # By the number of days and not by the date: a clock that was wrong once must not cost a year.
        connection.execute(
            "DELETE FROM traffic WHERE scope = ? AND day NOT IN (SELECT DISTINCT day FROM traffic"
            " WHERE scope = ? ORDER BY day DESC LIMIT ?)",
            (scope, scope, KEPT_DAYS[scope]),
        )
    for scope in ("image", "client"):
        days = KEPT_DAYS[scope] if keeps_clients or scope != "client" else 0
        connection.execute(
            "DELETE FROM traffic WHERE scope = ? AND day < ?",
            (scope, _days_before(today, days - 1)),
        )
    crowded = connection.execute(
        "SELECT scope, day FROM traffic WHERE scope != 'upstream' GROUP BY scope, day HAVING count(*) > ?",
        (MAX_NAMES_PER_DAY + 1,),
    ).fetchall()
    for scope, day in crowded:
        _fold_names(connection, scope, day, MAX_NAMES_PER_DAY)
    (rows,) = connection.execute("SELECT count(*) FROM traffic").fetchone()
    if rows > max_rows:
        _fold_old_days(connection, rows - max_rows)


def _fold_old_days(connection: sqlite3.Connection, excess: int) -> None:
    """Add up the names of the oldest days until there are `excess` rows less."""
    days = connection.execute(
        "SELECT scope, day, count(*) FROM traffic WHERE scope != 'upstream'"
        " GROUP BY scope, day HAVING count(*) > 1 ORDER BY day"
    ).fetchall()
    for scope, day, count in days:
        if excess <= 0:
            return
        kept = max(0, count - 1 - excess)
        _fold_names(connection, scope, day, kept)
        excess -= count - 1 - kept


def _fold_names(connection: sqlite3.Connection, scope: str, day: str, kept: int) -> None:
    """Add up all but the `kept` most pulled names of a day under an empty name."""
    rare: Iterable[tuple[str, ...]] = connection.execute(
        f"DELETE FROM traffic WHERE scope = :scope AND day = :day AND name != '{OTHERS}' AND name NOT IN ("
        f"SELECT name FROM traffic WHERE scope = :scope AND day = :day AND name != '{OTHERS}'"
        f" ORDER BY {_PULLS} DESC, sent DESC LIMIT :kept) RETURNING {', '.join(_COLUMNS)}",
        {"scope": scope, "day": day, "kept": kept},
    ).fetchall()
    connection.executemany(_UPSERT, [(day, scope, OTHERS, *row) for row in rare])


def _days_before(day: str, days: int) -> str:
    return (date.fromisoformat(day) - timedelta(days)).isoformat()
