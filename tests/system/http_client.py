"""A plain HTTP/1.1 client that does not retry, decode or follow redirects."""

import hashlib
import http.client
import ssl
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

CHUNK_SIZE = 64 << 10


@dataclass(frozen=True)
class HttpResponse:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def sha256(self) -> str:
        return "sha256:" + hashlib.sha256(self.body).hexdigest()


def connect(url: str, timeout: float) -> http.client.HTTPConnection:
    """Return a connection to a server. Over TLS, its certificate is not verified."""
    parts = urlsplit(url)
    assert parts.hostname
    if parts.scheme == "https":
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=timeout, context=context
        )
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)


def send_request(
    url: str,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    timeout: float = 30,
) -> HttpResponse:
    """Send one request on a new connection and read the whole response."""
    connection = connect(url, timeout)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return HttpResponse(response.status, response.msg, _read_body(response))
    finally:
        connection.close()


def _read_body(response: http.client.HTTPResponse) -> bytes:
    """Return the body, or the received part of one that ends before its Content-Length."""
    try:
        return response.read()
    except http.client.IncompleteRead as error:
        return error.partial


def has_status(url: str, path: str, status: int = 200) -> bool:
    """Return whether a GET of `path` returns this status now."""
    try:
        return send_request(url, path, timeout=5).status == status
    except OSError:
        return False


@dataclass(eq=False)
class DownloadThread(threading.Thread):
    """Downloads one path in a thread, so that a test can watch its progress."""

    url: str
    path: str
    timeout: float = 60
    status: int = 0
    received: int = 0
    digest: str = ""
    is_complete: bool = False
    error: Exception | None = None
    first_byte: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self.start()

    def run(self) -> None:
        connection = connect(self.url, self.timeout)
        try:
            self._download(connection)
        except (OSError, http.client.HTTPException) as error:
            self.error = error
        finally:
            connection.close()

    def _download(self, connection: http.client.HTTPConnection) -> None:
        connection.request("GET", self.path)
        response = connection.getresponse()
        self.status = response.status
        hasher = hashlib.sha256()
        while chunk := response.read1(CHUNK_SIZE):
            hasher.update(chunk)
            self.received += len(chunk)
            self.first_byte.set()
        self.digest = "sha256:" + hasher.hexdigest()
        length = response.getheader("Content-Length")
        self.is_complete = length is None or self.received == int(length)

    def finish(self, timeout: float = 60) -> "DownloadThread":
        """Wait for the end of the download and return the thread."""
        self.join(timeout)
        assert not self.is_alive(), f"{self.path}: stalled after {self.received} bytes"
        return self
