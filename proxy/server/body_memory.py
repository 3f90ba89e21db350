"""A limit on the memory of large bodies, manifests and lists, while slow clients receive them."""

from collections import Counter
from collections.abc import Callable

# Smaller bodies are not counted, in bytes.
MIN_COUNTED_BODY = 64 << 10
# Bytes of the bodies that are being sent to all clients, and to one client address. What several responses
# share, such as a manifest that many nodes pull, counts once.
MAX_BODIES_SIZE = 256 << 20
MAX_BODIES_SIZE_PER_CLIENT = 64 << 20


class BodyMemory:
    """Counts the large bodies that are in memory until clients have received them."""

    def __init__(self) -> None:
        # Responses by the address of the client and the identity of the body.
        self._responses: Counter[tuple[str, int]] = Counter()
        self._clients: Counter[int] = Counter()
        self._size = 0
        self._client_sizes: Counter[str] = Counter()

    def hold(self, client: str, body: bytes) -> Callable[[], None] | None:
        """Count a body, and return what must be called once it is sent; None if the client has too many.

        Beyond `MAX_BODIES_SIZE`, each client has at most one.
        """
        key = (client, id(body))
        is_new, size = not self._responses[key], len(body)
        if is_new and (held := self._client_sizes[client]):
            total = self._size + (0 if self._clients[id(body)] else size)
            if held + size > MAX_BODIES_SIZE_PER_CLIENT or total > MAX_BODIES_SIZE:
                self._forget_zeros(key)
                return None
        self._responses[key] += 1
        if is_new:
            self._client_sizes[client] += size
            self._clients[id(body)] += 1
            if self._clients[id(body)] == 1:
                self._size += size

        def release() -> None:
            self._responses[key] -= 1
            if not self._responses[key]:
                self._client_sizes[client] -= size
                self._clients[id(body)] -= 1
                if not self._clients[id(body)]:
                    self._size -= size
            self._forget_zeros(key)

        return release

    def _forget_zeros(self, key: tuple[str, int]) -> None:
        client, body = key
        if not self._responses[key]:
            del self._responses[key]
        if not self._clients[body]:
            del self._clients[body]
        if not self._client_sizes[client]:
            del self._client_sizes[client]
