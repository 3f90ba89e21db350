"""Limits on connections, in total and per client, and slots for rejected connections."""

import resource
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address

from proxy.config import ServerSettings

# Descriptors for everything but clients: the store, the index, the log, upstream connections and growing blobs.
RESERVED_DESCRIPTORS = 512
# Descriptors of a client that receives a blob: its connection, a duplicate of that, and the file.
DESCRIPTORS_PER_CLIENT = 3
# At most this many rejected clients get a 429 at a time; further ones are closed.
MAX_REJECTED = 64
# Connections to the admin API, for its own socket and for its TCP addresses each.
MAX_ADMIN_CONNECTIONS = 64


class ConnectionLimiter:
    """Counts connections and rejects the ones over a limit. A lower limit closes no connection.

    Calls `on_reject` for each rejected connection.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_reject: Callable[[], None],
        *,
        max_rejected: int | None = None,
    ) -> None:
        """`max_rejected` replaces `MAX_REJECTED`."""
        self._on_reject = on_reject
        self._max_rejected = max_rejected
        self._connections_by_client: Counter[str] = Counter()
        self._connected = 0
        self._rejected = 0
        self.update_limits(settings)

    @property
    def connected(self) -> int:
        """The number of accepted connections."""
        return self._connected

    def update_limits(self, settings: ServerSettings) -> None:
        """Apply the limits of `settings`, bounded by the number of files that this process may open."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = settings.max_connections
        if files != resource.RLIM_INFINITY:
            affordable = max(1, (files - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_CLIENT)
            self.max_connections = min(self.max_connections, affordable)
        self._max_per_client = settings.max_connections_per_client

    def acquire(self, address: str, *, is_proxy: bool = False) -> "ConnectionSlot | None":
        """Return a slot, one with `is_rejected` over a limit; None if those are taken too.

        The connections of a trusted proxy are those of many clients, so they are not limited by client.
        """
        # A Unix socket has no client address.
        client = "" if is_proxy else client_key(address)
        is_rejected = self._is_over_client_limit(client) or self._connected >= self.max_connections
        if is_rejected:
            self.count_rejected()
            limit = MAX_REJECTED if self._max_rejected is None else self._max_rejected
            if self._rejected >= limit:
                return None
            self._rejected += 1
        else:
            self._connected += 1
            self._connections_by_client[client] += 1
        return ConnectionSlot(self, address, client, is_rejected=is_rejected)

    def _is_over_client_limit(self, client: str) -> bool:
        return bool(client) and self._connections_by_client[client] >= self._max_per_client

    def identify(self, before: str, client: str) -> bool:
        """Count a connection of `before` as one of `client`; return False if that is over its limit."""
        if self._is_over_client_limit(client):
            self.release(before, is_rejected=False)
            self._rejected += 1
            self.count_rejected()
            return False
        self._connections_by_client[before] -= 1
        self._connections_by_client[client] += 1
        return True

    def count_rejected(self) -> None:
        """Count a connection that was rejected, or that there was no descriptor for."""
        self._on_reject()

    def release(self, client: str, *, is_rejected: bool) -> None:
        """Remove a connection that has ended from the counts."""
        if is_rejected:
            self._rejected -= 1
            return
        self._connected -= 1
        self._connections_by_client[client] -= 1
        if not self._connections_by_client[client]:
            del self._connections_by_client[client]


class ConnectionSlot:
    """The slot of one connection from `address`, "" for a Unix socket. A second release does nothing.

    `received` are bytes of the connection that were read already.
    """

    __slots__ = ("_client", "_is_released", "_limiter", "address", "is_rejected", "received")

    def __init__(
        self, limiter: ConnectionLimiter, address: str, client: str, *, is_rejected: bool
    ) -> None:
        self.address = address
        self._limiter = limiter
        self._client = client
        self._is_released = False
        self.is_rejected = is_rejected
        self.received = b""

    def identify(self, address: str) -> None:
        """Make it the slot of the client at `address`, which a trusted proxy has named.

        It is rejected over the limit of that client.
        """
        self.address = address
        if not self.is_rejected:
            client = client_key(address)
            self.is_rejected = not self._limiter.identify(self._client, client)
            self._client = client

    def leave_client(self) -> None:
        """Make it the slot of a node of the fleet, which is not limited as a client is."""
        if self._client and not self.is_rejected:
            self._limiter.identify(self._client, "")
            self._client = ""

    def release(self) -> None:
        """Free the slot."""
        if not self._is_released:
            self._is_released = True
            self._limiter.release(self._client, is_rejected=self.is_rejected)


# Parsing an address takes a tenth of what a connection costs.
@lru_cache(maxsize=1024)
def client_key(address: str) -> str:
    """Return the key of a client: its IPv4 address, or the /64 network of its IPv6 address."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> 64 << 64))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


def raise_file_limit() -> None:
    """Raise the soft limit on open files to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def create_admin_limiter() -> ConnectionLimiter:
    """Return a limiter of connections to the admin API: they must leave descriptors for clients."""
    limit = MAX_ADMIN_CONNECTIONS
    settings = ServerSettings(max_connections=limit, max_connections_per_client=limit)
    return ConnectionLimiter(settings, lambda: None, max_rejected=0)
