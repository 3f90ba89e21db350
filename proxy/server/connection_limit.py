"""How many connections there may be, in all and from one client, and who is one too many."""

import resource
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

from proxy.config import ServerSettings

# Descriptors that are not clients': the store, the index, the log, upstream connections and growing blobs.
RESERVED_FILES = 512
# What a client needs while it is sent a blob: its connection, a duplicate of that, and the file.
FILES_PER_CLIENT = 3
# So many of those who are one too many are told so at a time; the rest is hung up on.
MAX_REFUSED = 64


class Crowd:
    """Counts who is connected. Numbers may be changed at any time; who is in stays."""

    def __init__(self, settings: ServerSettings, on_refusal: Callable[[], None]) -> None:
        self._on_refusal = on_refusal
        self._clients: Counter[str] = Counter()
        self._connected = 0
        self._refused = 0
        self.resize(settings)

    @property
    def connected(self) -> int:
        """Connections of those who were let in."""
        return self._connected

    def resize(self, settings: ServerSettings) -> None:
        """Take over the limits of `settings`, as far as this process may open files."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.total = settings.max_connections
        if files != resource.RLIM_INFINITY:
            affordable = max(1, (files - RESERVED_FILES) // FILES_PER_CLIENT)
            self.total = min(self.total, affordable)
        self._per_client = settings.max_connections_per_client

    def enter(self, address: str) -> "Place | None":
        """Let a client in, or to where it is told to come back; None if there is no room even there."""
        client = client_of(address)
        # Behind a Unix socket there are many.
        is_greedy = client and self._clients[client] >= self._per_client
        is_refused = bool(is_greedy) or self._connected >= self.total
        if is_refused:
            self._on_refusal()
            if self._refused >= MAX_REFUSED:
                return None
            self._refused += 1
        else:
            self._connected += 1
            self._clients[client] += 1
        return Place(self, client, is_refused=is_refused)

    def leave(self, client: str, *, is_refused: bool) -> None:
        """Forget a connection."""
        if is_refused:
            self._refused -= 1
            return
        self._connected -= 1
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]


class Place:
    """One connection's. It is left once, however often that is said."""

    __slots__ = ("_client", "_crowd", "_is_left", "is_refused")

    def __init__(self, crowd: Crowd, client: str, *, is_refused: bool) -> None:
        self._crowd = crowd
        self._client = client
        self._is_left = False
        self.is_refused = is_refused

    def leave(self) -> None:
        """Make room."""
        if not self._is_left:
            self._is_left = True
            self._crowd.leave(self._client, is_refused=self.is_refused)


def client_of(address: str) -> str:
    """Return who is behind an address: of IPv6 the network of 64 bits, which one host has to itself."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> 64 << 64))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
