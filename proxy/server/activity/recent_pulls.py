"""The recent pulls with their results and errors, and the clients that made them, in memory."""

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Literal

import msgspec

from proxy.server.clients.user_agent import parse_user_agent
from proxy.server.request_context import RequestContext
from proxy.traffic import PullResult

# Pulls and clients that are remembered.
MAX_RECENT_PULLS = 1000
MAX_RECENT_CLIENTS = 1000
# Seconds in which the failures of one client for one image are one entry.
FAILURE_WINDOW = 60.0
MAX_PROBLEM_LENGTH = 300

# `stale` is a hit whose tag could not be checked, `refused` what a policy or the configuration forbids.
Outcome = PullResult | Literal["stale", "refused", "failed"]


class PullRecord(msgspec.Struct):
    """A pull, or attempts that failed; `at` is when it began, in Unix time.

    `number` counts the pulls, `revision` the changes of all of them. `repeated` are equal pulls by the same client
    right after it. `seconds` end with its last request so far. `problem` is why it failed, or what was
    wrong with one of its requests.
    """

    number: int
    revision: int
    at: int
    image: str
    digest: str
    client: str
    user: str
    agent: str
    result: Outcome
    requests: int = 0
    repeated: int = 0
    sent_bytes: int = 0
    seconds: float = 0.0
    problem: str = ""


class ClientRecord(msgspec.Struct):
    """A client address since the start of the daemon; `last_at` is its last pull, in Unix time."""

    client: str
    user: str
    agent: str
    last_at: int
    last_image: str
    pulls: int = 0
    failed: int = 0
    sent_bytes: int = 0


class RecentPulls:
    """Remembers the last pulls and clients. `clock` returns Unix time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: deque[PullRecord] = deque(maxlen=MAX_RECENT_PULLS)
        self._failures: OrderedDict[tuple[str, str], PullRecord] = OrderedDict()
        self._clients: OrderedDict[str, ClientRecord] = OrderedDict()
        self._number = 0
        self.revision = 0

    def begin(
        self, context: RequestContext, image: str, digest: str = "", result: Outcome = "miss"
    ) -> PullRecord:
        """Remember a pull that begins with a request."""
        request = context.request
        agent = parse_user_agent(request.headers.get("user-agent", "")).product
        self._number += 1
        record = PullRecord(
            self._number,
            0,
            int(self._clock()),
            image,
            digest,
            request.client or "",
            context.user,
            agent,
            result,
        )
        self._records.append(record)
        client = self._client(record)
        client.last_at, client.last_image = record.at, image
        client.pulls += 1
        self._touch(record)
        return record

    def update(self, record: PullRecord, result: Outcome, seconds: float) -> None:
        """Correct the result of a pull by a later request, unless it has failed."""
        if record.result not in ("failed", "refused"):
            record.result = result
        record.seconds = round(seconds, 3)
        self._touch(record)

    def add_requests(self, record: PullRecord, requests: int, repeated: int, sent: int) -> None:
        """Add requests that belong to a pull."""
        record.requests += requests
        record.repeated += repeated
        record.sent_bytes += sent
        client = self._client(record)
        client.pulls += repeated
        client.sent_bytes += sent
        if repeated:
            client.last_at = int(self._clock())
        self._touch(record)

    def fail(self, record: PullRecord, status: int, problem: str, seconds: float) -> None:
        """Record that a request of a pull failed."""
        if record.result not in ("failed", "refused"):
            self._client(record).failed += 1
        record.result = "refused" if status in (401, 403) else "failed"
        record.problem = problem[:MAX_PROBLEM_LENGTH]
        record.requests += 1
        record.seconds = round(seconds, 3)
        self._touch(record)

    def recover(self, record: PullRecord) -> None:
        """Record that all that had failed of a pull was requested again with success."""
        record.result = "partial"  # the caller corrects it
        client = self._client(record)
        client.failed = max(0, client.failed - 1)

    def add_failure(
        self, context: RequestContext, image: str, status: int, seconds: float, problem: str
    ) -> None:
        """Record a pull that failed with its first request; repeated attempts are one entry."""
        key = (context.request.client or "", image)
        record = self._failures.get(key)
        if record is None or not 0 <= self._clock() - record.at < FAILURE_WINDOW:
            record = self.begin(context, image, result="miss")
            self._failures[key] = record
            self._failures.move_to_end(key)
            if len(self._failures) > MAX_RECENT_PULLS:
                self._failures.popitem(last=False)
        self.fail(record, status, problem, seconds)

    def select(
        self,
        *,
        text: str = "",
        client: str = "",
        results: tuple[str, ...] = (),
        after: int = 0,
        before: int = 0,
        limit: int = MAX_RECENT_PULLS,
    ) -> list[PullRecord]:
        """Return the pulls that match, the latest first.

        `text` is a part of the image's name. They changed after the revision `after`, and have numbers
        below `before`, unless that is 0.
        """
        found = (
            record
            for record in reversed(self._records)
            if text.lower() in record.image.lower()
            and (not client or record.client == client)
            and (not results or record.result in results)
            and record.revision > after
            and (not before or record.number < before)
        )
        return list(islice(found, limit))

    def clients(self, limit: int = MAX_RECENT_CLIENTS) -> list[ClientRecord]:
        """Return the clients, the one that pulled last first."""
        return list(islice(reversed(self._clients.values()), limit))

    def _client(self, record: PullRecord) -> ClientRecord:
        client = self._clients.get(record.client)
        if client is None:
            client = ClientRecord(record.client, record.user, record.agent, record.at, record.image)
            self._clients[record.client] = client
            if len(self._clients) > MAX_RECENT_CLIENTS:
                self._clients.popitem(last=False)
        client.user, client.agent = record.user or client.user, record.agent or client.agent
        self._clients.move_to_end(record.client)
        return client

    def _touch(self, record: PullRecord) -> None:
        self.revision += 1
        record.revision = self.revision
