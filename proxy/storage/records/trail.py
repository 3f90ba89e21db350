"""The audit trail: each act that changed what is served or kept, by whom and with which outcome, and evictions.

Acts and evictions are kept apart, so that a store that evicts all day does not push out who removed an
image. Both are in the index, and in the log as `audit`.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import msgspec

from proxy.concurrency import run_uncancelled
from proxy.errors import ProxyError, StorageError, error_code
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.storage.index import Index
from proxy.timestamps import to_seconds

Action = Literal[
    "remove",
    "pin",
    "unpin",
    "offline",
    "online",
    "preload",
    "import",
    "export",
    "reload",
    "refresh",
    "scan",
    "exception",
    "evict",
]
Outcome = Literal["done", "failed", "cancelled"]

# Acts, and evictions, that are kept; a small store keeps fewer.
MAX_ACTS = 10_000
MAX_EVICTIONS = 10_000
MAX_TRAIL_SHARE = 0.005
# Names of one row; evictions of more images make further rows, of an act they are left out.
MAX_NAMES = 100
MAX_DETAIL_LENGTH = 300
# Images whose evictions are added up between two sweeps.
MAX_EVICTED_IMAGES = 10_000
# Bytes of a row in the index, about.
_ROW_SIZE = 500
# Names in the log line about evictions.
_LOGGED_NAMES = 20

UNKNOWN_IMAGE = ""
"""The name of evicted blobs that no known repository is linked to."""

log = get_logger(__name__)

_INSERT = "INSERT INTO trail (at, action, actor, images, outcome, detail) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = """
    SELECT at, action, actor, images, outcome, detail FROM trail t WHERE at >= :since
    AND (:action = '' OR action = :action)
    AND (:exact = '' OR EXISTS (SELECT 1 FROM json_each(t.images) n WHERE n.key = :exact
        OR n.key = :repository OR (:prefixes AND (substr(n.key, 1, length(:exact) + 1)
            IN (:exact || ':', :exact || '@')))))
    ORDER BY id DESC LIMIT :limit
"""
# Up from a blob to an image that is tagged, by way of its manifest and its index. A few of either are looked
# at, as a base layer may be in thousands.
_TAGGED = """
    WITH parents AS (SELECT parent FROM edges WHERE child = :digest LIMIT 64),
    indexes AS (SELECT e.parent FROM parents p CROSS JOIN edges e ON e.child = p.parent LIMIT 64)
    SELECT r.upstream || '/' || r.name || ':' || t.tag FROM
        (SELECT :digest AS digest UNION ALL SELECT parent FROM parents
            UNION ALL SELECT parent FROM indexes) a
    CROSS JOIN tags t ON t.digest = a.digest CROSS JOIN repositories r ON r.id = t.repository LIMIT 1
"""
_LINKED = """
    SELECT r.upstream || '/' || r.name FROM links l
    CROSS JOIN repositories r ON r.id = l.repository WHERE l.digest = :digest LIMIT 1
"""


class TrailEntry(msgspec.Struct, frozen=True):
    """An act or an eviction. `images` are bytes by name, 0 where they are not known."""

    at: int
    action: str
    actor: str
    images: dict[str, int]
    outcome: str
    detail: str


@dataclass(slots=True)
class Act:
    """An act that is under way; the code that does it adds the images and the detail."""

    action: Action
    actor: str
    images: dict[str, int] = field(default_factory=dict)
    outcome: Outcome = "done"
    detail: str = ""


class EvictionTally:
    """The evicted blobs and bytes by reason and image since the last `take`."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], tuple[int, int]] = {}

    def add(self, reason: str, image: str, size: int) -> None:
        """Add a blob that was evicted."""
        if (reason, image) not in self._sums and len(self._sums) >= MAX_EVICTED_IMAGES:
            image = UNKNOWN_IMAGE
        blobs, byte_count = self._sums.get((reason, image), (0, 0))
        self._sums[reason, image] = blobs + 1, byte_count + size

    def take(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return blobs and bytes by reason and image, and reset them."""
        sums, self._sums = self._sums, {}
        return sums


class AuditTrail:
    """Records acts, and reads them. `clock` returns Unix time, `max_size` the size of the store.

    `on_record` is called with each entry.
    """

    def __init__(
        self,
        index: Index,
        evictions: EvictionTally,
        clock: Callable[[], float],
        max_size: Callable[[], int],
    ) -> None:
        self._index = index
        self._evictions = evictions
        self._clock = clock
        self._max_size = max_size
        self.on_record: Callable[[TrailEntry], None] = lambda _: None

    @asynccontextmanager
    async def recording(
        self, action: Action, actor: object, images: Iterable[str] = ()
    ) -> AsyncIterator[Act]:
        """Record the act that the block does, with its outcome, also if it fails or is cancelled."""
        act = Act(action, str(actor), dict.fromkeys(images, 0))
        try:
            yield act
        except ProxyError as error:
            act.outcome, act.detail = "failed", f"{error_code(error)}: {error}"
            raise
        except (asyncio.CancelledError, GeneratorExit):
            act.outcome = "cancelled"
            raise
        except BaseException:
            act.outcome = "failed"
            raise
        finally:
            await run_uncancelled(self.add(act))

    async def add(self, act: Act) -> None:
        """Record an act that is over. A trail that cannot be written is a warning in the log."""
        detail = act.detail[:MAX_DETAIL_LENGTH]
        names = [*act.images][:MAX_NAMES]
        log.info(
            "audit",
            action=act.action,
            actor=act.actor,
            images=names[:_LOGGED_NAMES],
            outcome=act.outcome,
            detail=detail,
        )
        images = {name: act.images[name] for name in names}
        await self._write([(act.action, act.actor, images, act.outcome, detail)])

    async def write_evictions(self) -> None:
        """Record the evictions since the last call: one line in the log, summed by image."""
        sums = self._evictions.take()
        if not sums:
            return
        largest = sorted(sums.items(), key=lambda one: -one[1][1])
        log.info(
            "images_evicted",
            blobs=sum(blobs for blobs, _ in sums.values()),
            bytes=sum(size for _, size in sums.values()),
            images=[
                f"{image or 'unknown'}: {size} bytes, {reason}"
                for (reason, image), (_, size) in largest[:_LOGGED_NAMES]
            ],
        )
        by_reason: dict[str, dict[str, int]] = {}
        for (reason, image), (_, size) in largest:
            by_reason.setdefault(reason, {})[image] = size
        await self._write(
            [
                ("evict", "daemon", names, "done", reason)
                for reason, images in by_reason.items()
                for names in _batches(images)
            ]
        )

    async def entries(
        self,
        *,
        image: str = "",
        repository: str = "",
        action: str = "",
        since: float = 0.0,
        limit: int = 100,
    ) -> list[TrailEntry]:
        """Return up to `limit` entries from `since` on, the latest first. Raises `StorageError`.

        `image` is a full name, `repository` its repository: entries about either are returned. A
        repository as `image` selects all of its images. Entries then name only these.
        """
        await self.write_evictions()
        parameters = {
            "since": since,
            "action": action,
            "exact": image,
            "repository": repository or image,
            "prefixes": image == repository,
            "limit": limit,
        }
        rows = await self._index.read(
            lambda connection: connection.execute(_SELECT, parameters).fetchall()
        )
        return [
            TrailEntry(to_seconds(at), done, actor, _matching(images, parameters), outcome, detail)
            for at, done, actor, images, outcome, detail in rows
        ]

    async def _write(self, rows: list[tuple[str, str, dict[str, int], str, str]]) -> None:
        share = int(self._max_size() * MAX_TRAIL_SHARE / _ROW_SIZE)
        now = self._clock()
        for action, actor, images, outcome, detail in rows:
            self.on_record(TrailEntry(to_seconds(now), action, actor, images, outcome, detail))
        encoded = [
            (now, action, actor, msgspec.json.encode(images).decode(), outcome, detail)
            for action, actor, images, outcome, detail in rows
        ]
        try:
            await self._index.transact(
                add_rows, encoded, max(1, share), is_durable=True, keeps_rows=True
            )
        except StorageError as error:
            log.warning("audit_write_failed", reason=str(error))


def _matching(images: str, parameters: Mapping[str, Any]) -> dict[str, int]:
    """Return the images of a row that the parameters select, as `_SELECT` does."""
    decoded: dict[str, int] = msgspec.json.decode(images)
    exact = parameters["exact"]
    if not exact:
        return decoded
    wanted = (exact, parameters["repository"])
    prefixes = (f"{exact}:", f"{exact}@") if parameters["prefixes"] else ()
    return {
        name: size
        for name, size in decoded.items()
        if name in wanted or (prefixes and name.startswith(prefixes))
    }


def add_rows(connection: sqlite3.Connection, rows: list[tuple[object, ...]], max_rows: int) -> None:
    """Add entries; beyond the limits the oldest are forgotten."""
    connection.executemany(_INSERT, rows)
    for condition, limit in (("action != 'evict'", MAX_ACTS), ("action = 'evict'", MAX_EVICTIONS)):
        connection.execute(
            f"DELETE FROM trail WHERE {condition} AND id <= (SELECT id FROM trail WHERE {condition}"
            " ORDER BY id DESC LIMIT 1 OFFSET ?)",
            (min(limit, max_rows),),
        )


def find_images(connection: sqlite3.Connection, digests: Iterable[Digest]) -> Mapping[Digest, str]:
    """Return for each blob an image that it belongs to, or else a repository that is linked to it."""
    found = {}
    for digest in digests:
        for query in (_TAGGED, _LINKED):
            if row := connection.execute(query, {"digest": str(digest)}).fetchone():
                found[digest] = str(row[0])
                break
    return found


def _batches(images: Mapping[str, int]) -> Iterator[dict[str, int]]:
    items = iter(images.items())
    while batch := dict(islice(items, MAX_NAMES)):
        yield batch
