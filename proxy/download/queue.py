"""The order of requests for blobs to one upstream, and of the downloads that follow them.

Each upstream has its own queues, so a slow one does not delay the others. A download first holds a request
slot, until upstream answers; after a 200 it takes a download slot instead. So a blob that upstream does
not have never takes a download slot. In both queues, blobs that clients wait for precede those that are
only prefetched, and client addresses take turns.
"""

import asyncio
from collections import Counter, OrderedDict, deque

# Requests for blobs that one upstream has not answered yet, or whose downloads wait for a slot.
MAX_REQUESTS = 32


class QueueSlot:
    """A slot that one download waits for or holds, for `clients`; without clients it is not urgent."""

    def __init__(self) -> None:
        self.clients: dict[str, None] = {}
        self.is_urgent = False
        self.granted: asyncio.Future[None] | None = None
        self.charged_to: str | None = None


class FairQueue:
    """Grants `limit` slots: urgent ones first, and client addresses in turn.

    Slots that are not urgent leave a quarter of the limit free: at least one, unless the limit is one.
    With `is_shared_out`, an address gets no more slots than are left for the others.
    """

    def __init__(self, limit: int, *, is_shared_out: bool = False) -> None:
        self._limit = self._free = limit
        self._is_shared_out = is_shared_out
        self._waiting: OrderedDict[str, deque[QueueSlot]] = OrderedDict()
        self._background: deque[QueueSlot] = deque()
        self._granted_counts: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many slots are granted or waited for."""
        waiting = {id(slot) for slots in self._waiting.values() for slot in slots}
        waiting.update(map(id, self._background))
        return self._limit - self._free + len(waiting)

    def resize(self, limit: int) -> None:
        """Change the limit. Granted slots stay granted, even beyond it."""
        self._free += limit - self._limit
        self._limit = limit
        self.dispatch()

    async def acquire(self, slot: QueueSlot) -> None:
        """Wait until the slot is granted. The caller must `release` it, even if it is cancelled."""
        slot.granted = asyncio.get_running_loop().create_future()
        for client in slot.clients:
            self._waiting.setdefault(client, deque()).append(slot)
        if not slot.is_urgent:
            self._background.append(slot)
        self.dispatch()
        await slot.granted

    def add_client(self, slot: QueueSlot, client: str) -> None:
        """Let a waiting slot be granted at this client's turn too."""
        if client in slot.clients:
            return
        slot.clients[client] = None
        if slot.granted and not slot.granted.done():
            self._waiting.setdefault(client, deque()).append(slot)
            self.dispatch()

    def release(self, slot: QueueSlot) -> None:
        """Give back a slot that was granted, or stop waiting for it."""
        granted, slot.granted = slot.granted, None
        if granted is None:
            return
        if slot.charged_to is not None:
            self._granted_counts[slot.charged_to] -= 1
            self._granted_counts += Counter()  # drops zeros
            slot.charged_to = None
            self._free += 1
        else:
            granted.cancel()
            for client in slot.clients:
                self._remove(client, slot)
            if slot in self._background:
                self._background.remove(slot)
        self.dispatch()

    def _remove(self, client: str, slot: QueueSlot) -> None:
        waiting = self._waiting.get(client)
        if waiting and slot in waiting:
            waiting.remove(slot)
        if waiting is not None and not waiting:
            del self._waiting[client]

    def dispatch(self) -> None:
        """Grant free slots."""
        while self._free > 0 and (found := self._next_slot()):
            client, slot = found
            for other in slot.clients:
                self._remove(other, slot)
            if slot in self._background:
                self._background.remove(slot)
            self._free -= 1
            self._granted_counts[client] += 1
            slot.charged_to = client
            assert slot.granted is not None
            if not slot.granted.done():
                slot.granted.set_result(None)

    def _next_slot(self) -> tuple[str, QueueSlot] | None:
        """Return the slot to grant next and the client that it is charged to."""
        for client in self._waiting:
            granted = self._granted_counts[client]
            if self._is_shared_out and granted and granted >= self._free:
                continue
            self._waiting.move_to_end(client)
            return client, self._waiting[client][0]
        if self._waiting:
            # Background slots do not overtake a client whose share is used up.
            return None
        reserve = max(1, self._limit // 4) if self._limit > 1 else 0
        if self._background and self._free > reserve:
            return "", self._background[0]
        return None


class UpstreamQueue:
    """The two queues of one upstream: `requests` without an answer, and running `downloads`."""

    def __init__(self, max_downloads: int) -> None:
        self.requests = FairQueue(MAX_REQUESTS, is_shared_out=True)
        self.downloads = FairQueue(max_downloads)


class Ticket:
    """The slots of one download in the queues of its upstream."""

    def __init__(self, queue: UpstreamQueue, client: str | None) -> None:
        self.is_running = False
        self._queue = queue
        self._request_slot, self._download_slot = QueueSlot(), QueueSlot()
        if client is not None:
            self.add_client(client)

    @property
    def is_urgent(self) -> bool:
        """Whether a client has requested the download."""
        return self._download_slot.is_urgent

    @property
    def client_count(self) -> int:
        """How many client addresses have requested the download."""
        return len(self._download_slot.clients)

    @property
    def clients(self) -> list[str]:
        """The client addresses that have requested the download."""
        return list(self._download_slot.clients)

    def add_client(self, client: str) -> None:
        """Make the download urgent, and let it use this client's turns too."""
        for queue, slot in (
            (self._queue.requests, self._request_slot),
            (self._queue.downloads, self._download_slot),
        ):
            slot.is_urgent = True
            queue.add_client(slot, client)

    async def admit_request(self) -> None:
        """Wait until a request may be sent. Returns at once for a download that has a slot."""
        if not self.is_running:
            await self._queue.requests.acquire(self._request_slot)

    async def admit_download(self) -> None:
        """Wait for a download slot, after upstream has answered; give back the request slot."""
        if not self.is_running:
            await self._queue.downloads.acquire(self._download_slot)
            self.is_running = True
        self.end_request()

    def end_request(self) -> None:
        """Give back the request slot, if the download has one."""
        self._queue.requests.release(self._request_slot)

    def release(self) -> None:
        """Give back both slots."""
        self.is_running = False
        self.end_request()
        self._queue.downloads.release(self._download_slot)
