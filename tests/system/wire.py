"""A plain HTTP/1.1 client: nothing is retried, decoded or followed."""

import hashlib
import http.client
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PIECE = 64 << 10


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def sha256(self) -> str:
        return "sha256:" + hashlib.sha256(self.body).hexdigest()


def connect(url: str, timeout: float) -> http.client.HTTPConnection:
    """Return a connection to a server; over TLS it is believed whatever it shows."""
    parts = urlsplit(url)
    assert parts.hostname
    if parts.scheme == "https":
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout, context=context
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def ask(
    url: str,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> Answer:
    """Send one request on a connection of its own and read the whole answer."""
    connection = connect(url, timeout)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, response.msg, _read(response))
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse) -> bytes:
    """Return the body, or what there is of one that ends before its Content-Length."""
    try:
        return response.read()
    except http.client.IncompleteRead as short:
        return short.partial


def answers(url: str, path: str, status: int = 200) -> bool:
    """Tell whether a GET is answered with this status just now."""
    try:
        return ask(url, path, timeout=5).status == status
    except OSError:
        return False


@dataclass(eq=False)
class Reader(threading.Thread):
    """Downloads one path in a thread, so that a test can watch how far it has come."""

    url: str
    path: str
    timeout: float = 60
    go_on: Callable[[int], None] = lambda received: None  # called between pieces
    status: int = 0
    received: int = 0
    digest: str = ""
    complete: bool = False
    error: Exception | None = None
    first_byte: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.start()

    def run(self) -> None:
        connection = connect(self.url, self.timeout)
        try:
            self._read(connection)
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            connection.close()

    def _read(self, connection: http.client.HTTPConnection) -> None:
        connection.request("GET", self.path)
        response = connection.getresponse()
        self.status = response.status
        seen = hashlib.sha256()
        while piece := response.read1(PIECE):
            seen.update(piece)
            self.received += len(piece)
            self.first_byte.set()
            self.go_on(self.received)
        self.digest = "sha256:" + seen.hexdigest()
        length = response.getheader("Content-Length")
        self.complete = length is None or self.received == int(length)

    def finish(self, deadline: float = 60) -> "Reader":
        self.join(deadline)
        assert not self.is_alive(), f"{self.path}: {self.received} bytes, then nothing"
        return self
