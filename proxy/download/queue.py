"""Who may ask an upstream for a blob next, and whose download runs next.

Each upstream has a line of its own, so a slow one delays no other. A download first needs a place among
the requests that upstream has not answered, then, once upstream has answered 200, one of the slots for
downloads. A blob that upstream does not have therefore costs no slot. In both lines, blobs that clients
wait for go before those that are only prefetched, and client addresses take turns.
"""

import asyncio
from collections import Counter, OrderedDict, deque

# Requests for blobs that one upstream has not answered yet, or whose downloads wait for a slot.
MAX_REQUESTS = 32


class Place:
    """A place in a line, for downloads that `clients` have asked for; without clients it is not urgent."""

    def __init__(self) -> None:
        self.clients: dict[str, None] = {}
        self.is_urgent = False
        self.granted: asyncio.Future[None] | None = None
        self.charged_to: str | None = None


class FairLine:
    """`limit` places; client addresses take turns, and what is not urgent waits for what is.

    What is not urgent leaves a quarter of the places free, at least one (of a single place it leaves
    none). With `is_shared_out`, an address gets no more places than are left for the others.
    """

    def __init__(self, limit: int, *, is_shared_out: bool = False) -> None:
        self._limit = self._free = limit
        self._is_shared_out = is_shared_out
        self._lines: OrderedDict[str, deque[Place]] = OrderedDict()
        self._background: deque[Place] = deque()
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        """Return how many places are taken or waited for."""
        waiting = {id(place) for line in self._lines.values() for place in line}
        waiting.update(map(id, self._background))
        return self._limit - self._free + len(waiting)

    def resize(self, limit: int) -> None:
        """Change the limit. Places that are taken stay taken, also beyond it."""
        self._free += limit - self._limit
        self._limit = limit
        self.dispatch()

    async def acquire(self, place: Place) -> None:
        """Wait until the place is granted. The caller gives it back with `release`, in any case."""
        place.granted = asyncio.get_running_loop().create_future()
        for client in place.clients:
            self._lines.setdefault(client, deque()).append(place)
        if not place.is_urgent:
            self._background.append(place)
        self.dispatch()
        await place.granted

    def add_client(self, place: Place, client: str) -> None:
        """Let a place that is waited for be granted at this client's turn, too."""
        if client in place.clients:
            return
        place.clients[client] = None
        if place.granted and not place.granted.done():
            self._lines.setdefault(client, deque()).append(place)
            self.dispatch()

    def release(self, place: Place) -> None:
        """Give back a place, or leave the line."""
        granted, place.granted = place.granted, None
        if granted is None:
            return
        if place.charged_to is not None:
            self._held[place.charged_to] -= 1
            self._held += Counter()  # drops zeros
            place.charged_to = None
            self._free += 1
        else:
            granted.cancel()
            for client in place.clients:
                self._remove(client, place)
            if place in self._background:
                self._background.remove(place)
        self.dispatch()

    def _remove(self, client: str, place: Place) -> None:
        line = self._lines.get(client)
        if line and place in line:
            line.remove(place)
        if line is not None and not line:
            del self._lines[client]

    def dispatch(self) -> None:
        """Grant free places."""
        while self._free > 0 and (found := self._next_place()):
            client, place = found
            for other in place.clients:
                self._remove(other, place)
            if place in self._background:
                self._background.remove(place)
            self._free -= 1
            self._held[client] += 1
            place.charged_to = client
            assert place.granted is not None
            if not place.granted.done():
                place.granted.set_result(None)

    def _next_place(self) -> tuple[str, Place] | None:
        for client in self._lines:
            held = self._held[client]
            if self._is_shared_out and held and held >= self._free:
                continue
            self._lines.move_to_end(client)
            return client, self._lines[client][0]
        if self._lines:
            # What is not urgent does not overtake a client whose share is used up.
            return None
        reserve = max(1, self._limit // 4) if self._limit > 1 else 0
        if self._background and self._free > reserve:
            return "", self._background[0]
        return None


class UpstreamQueue:
    """The two lines before one upstream."""

    def __init__(self, max_downloads: int) -> None:
        self.requests = FairLine(MAX_REQUESTS, is_shared_out=True)
        self.slots = FairLine(max_downloads)


class Ticket:
    """One download's way through the lines of its upstream."""

    def __init__(self, queue: UpstreamQueue, client: str | None) -> None:
        self.is_running = False
        self._queue = queue
        self._request, self._slot = Place(), Place()
        if client is not None:
            self.add_client(client)

    @property
    def is_urgent(self) -> bool:
        """Whether a client has asked for the download."""
        return self._slot.is_urgent

    @property
    def client_count(self) -> int:
        """How many client addresses have asked for the download."""
        return len(self._slot.clients)

    def add_client(self, client: str) -> None:
        """Make the download urgent, for this client too."""
        for line, place in self._lines():
            place.is_urgent = True
            line.add_client(place, client)

    def _lines(self) -> tuple[tuple[FairLine, Place], ...]:
        return (self._queue.requests, self._request), (self._queue.slots, self._slot)

    async def admit_request(self) -> None:
        """Wait until upstream may be asked. Returns at once for a download that has a slot."""
        if not self.is_running:
            await self._queue.requests.acquire(self._request)

    async def admit_download(self) -> None:
        """Wait for a slot, after upstream's answer."""
        if not self.is_running:
            await self._queue.slots.acquire(self._slot)
            self.is_running = True
        self.end_request()

    def end_request(self) -> None:
        """Give back the place among the requests, if it is held."""
        self._queue.requests.release(self._request)

    def release(self) -> None:
        """Give back everything."""
        self.is_running = False
        self.end_request()
        self._queue.slots.release(self._slot)
