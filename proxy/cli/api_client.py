"""The client of the admin API: what every command but `serve`, `config` and `fsck` works through.

    with admin_api(load_config(path, store)) as api:
        print(api.get("/api/v1/status")["state"])
        for event in api.stream("POST", "/api/v1/preload", {"images": ["alpine"]}):
            ...

It asks the daemon on the store. If there is none, the command is the daemon for as long as the block lasts: the same
program on the same store, without any TCP port (`proxy/cli/private.py`). How an operation is added is told in
`proxy/server/api.py`. Plain blocking HTTP of the standard library, so that a command need not wait for aiohttp's import.
"""

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlencode

from proxy.config import Config
from proxy.errors import DaemonError, ProxyError, error_of

SOCKET = "admin.sock"
PIECE = 1 << 18

Body = Iterable[bytes] | BinaryIO


@contextmanager
def admin_api(
    config: Config, *, private: bool = True, timeout: float | None = None
) -> Iterator["AdminApi"]:
    """Yield the API of the daemon on `config.store.path`, or of a private one if none answers.

    With `private=False` a missing daemon is a `DaemonError`. `timeout` is how long, in seconds, the daemon may say
    nothing. Raises `StorageError` if the store is in use by a process that has no socket.
    """
    with ExitStack() as stack:
        if not _is_answered(config.store.path):
            if not private:
                raise DaemonError(f"no daemon answers on {config.store.path}/{SOCKET}")
            from proxy.cli.embedded_daemon import private_daemon  # noqa: PLC0415 - brings aiohttp

            stack.enter_context(private_daemon(config))
        yield AdminApi(config.store.path, timeout)


class AdminApi:
    """Asks the daemon on the store at `root`. Errors of the API are raised as what they were there."""

    def __init__(self, root: Path, timeout: float | None = None) -> None:
        self._root = root
        self._timeout = timeout

    def get(self, path: str, **query: object) -> Any:
        """Return the document at `path`. A value that is None is not sent; True is `true`."""
        return self._document("GET", path, None, query)

    def post(self, path: str, document: object = None, **query: object) -> Any:
        """Send a document; return the answer's, or None."""
        return self._document("POST", path, document, query)

    def put(self, path: str, document: object, **query: object) -> Any:
        """Send a document to replace what is at `path`; return the answer's, or None."""
        return self._document("PUT", path, document, query)

    def delete(self, path: str, **query: object) -> Any:
        """Delete what is at `path`; return the answer's document, or None."""
        return self._document("DELETE", path, None, query)

    def stream(
        self,
        method: str,
        path: str,
        document: object = None,
        *,
        upload: Body | None = None,
        **query: object,
    ) -> Iterator[Any]:
        """Yield the events of a long operation as they happen; an error among them is raised.

        `upload`, a file or pieces of bytes, is sent as the body meanwhile. Not going on ends the operation.
        """
        with self._asked(method, path, document, query, upload) as response:
            for line in _lines(response):
                event = json.loads(line)
                if isinstance(event, dict) and event.keys() == {"error"}:
                    raise error_of(**event["error"])
                yield event

    def download(self, path: str, document: object, target: BinaryIO, **query: object) -> int:
        """POST, write the bytes of the answer to `target`, and return how many they were."""
        with self._asked("POST", path, document, query) as response:
            return sum(map(target.write, _pieces(response)))

    def is_ready(self) -> bool:
        """Tell whether the daemon can serve."""
        with suppress(ProxyError), self._asked("GET", "/readyz", None, {}):
            return True
        return False

    def _document(
        self, method: str, path: str, document: object, query: Mapping[str, object]
    ) -> Any:
        with self._asked(method, path, document, query) as response:
            content = b"".join(_pieces(response))
            return json.loads(content) if content else None

    @contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        document: object,
        query: Mapping[str, object],
        upload: Body | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        """Yield a good answer, its body still to be read."""
        with ExitStack() as stack:
            with _translated():
                connection = stack.enter_context(_connected(self._root, self._timeout))
                connection.sendall(_head(method, path, document, query, upload))
            sending = _Sending(connection, upload) if upload is not None else None
            try:
                with _translated():
                    # A reference to the connection, which stays open as long as this does.
                    response = http.client.HTTPResponse(connection, method=method)
                    stack.callback(response.close)
                    response.begin()
                if response.status >= 400:
                    raise _error(response)
                yield response
            except DaemonError as error:
                if sending and sending.error:
                    raise sending.error from error
                raise


class _Sending:
    """Sends a body in chunks, in a thread: the daemon tells of what it has while more is on its way.

    `error` is what went wrong with the source; its body is then cut, lest the daemon take it for whole.
    """

    def __init__(self, connection: socket.socket, upload: Body) -> None:
        self.error: Exception | None = None
        self._connection = connection
        self._pieces = _read(upload)
        threading.Thread(target=self._run, name="upload", daemon=True).start()

    def _run(self) -> None:
        # A daemon that reads no further has answered, and the answer says why.
        with suppress(OSError):
            for piece in self._source():
                self._connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
            if self.error:
                self._connection.shutdown(socket.SHUT_RDWR)
            else:
                self._connection.sendall(b"0\r\n\r\n")

    def _source(self) -> Iterator[bytes]:
        try:
            yield from self._pieces
        except Exception as error:  # noqa: BLE001 (raised again by who reads the answer)
            self.error = error


def _read(upload: Body) -> Iterator[bytes]:
    read = getattr(upload, "read", None)  # a file, whose lines would be pieces of any length
    return iter(partial(read, PIECE), b"") if read else filter(None, upload)


def _head(
    method: str,
    path: str,
    document: object,
    query: Mapping[str, object],
    upload: Body | None,
) -> bytes:
    """Return the request line, the headers, and the body if it is a document."""
    given = {name: _text(value) for name, value in query.items() if value is not None}
    target = f"{path}?{urlencode(given)}" if given else path
    headers = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json"}
    body = b"" if document is None else json.dumps(document).encode()
    if upload is None:
        headers["Content-Length"] = str(len(body))
    else:
        headers |= {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {text}" for name, text in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the body as it comes. `read1` is the one way to read that tells a short body from a whole one."""
    while True:
        with _translated():
            piece = response.read1(PIECE)
            if not piece and response.length:
                raise http.client.IncompleteRead(b"", response.length)
        if not piece:
            return
        yield piece


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    left = b""
    for piece in _pieces(response):
        *lines, left = (left + piece).split(b"\n")
        yield from lines


def _error(response: http.client.HTTPResponse) -> ProxyError:
    content = b"".join(_pieces(response))
    try:
        error = json.loads(content)["error"]
        return error_of(error["code"], error["message"])
    except (ValueError, KeyError, TypeError):
        return ProxyError(
            f"the daemon answered {response.status}: {content[:100].decode(errors='replace')}"
        )


@contextmanager
def _translated() -> Iterator[None]:
    """Turn what becomes of a daemon that ends, or says nothing, into a `DaemonError`."""
    try:
        yield
    except TimeoutError as error:
        raise DaemonError("the daemon does not answer in time") from error
    except (http.client.HTTPException, ConnectionError, FileNotFoundError) as error:
        raise DaemonError("the daemon ended before it was done; run the command again") from error


@contextmanager
def _connected(root: Path, timeout: float | None = None) -> Iterator[socket.socket]:
    """Yield a connection to the daemon's socket. Raises `OSError`."""
    # By way of the directory's descriptor: a socket's address holds 107 bytes, a path more.
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, directory)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.settimeout(timeout)
        connection.connect(f"/proc/self/fd/{directory}/{SOCKET}")
        yield connection


def _is_answered(root: Path) -> bool:
    """Tell whether a daemon listens. Raises `DaemonError` if there is one that we may not ask."""
    try:
        with _connected(root):
            return True
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return False
    except PermissionError as error:
        raise DaemonError(
            f"{root}/{SOCKET} may not be used; run this as the daemon's user, or as root"
        ) from error
