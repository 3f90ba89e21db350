"""Content from the other nodes of a fleet, by the registry API (docs/fleet.md).

A request to a peer carries the token of the fleet. The peer answers it from its store or from a download that
already runs there, and asks no one else. What it sends is verified like the bytes of any registry, and proves
nothing about who may be served it: `Evidence` of the registry does, which the caller asks for first.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum, auto
from typing import Protocol

from aiohttp import (
    ClientConnectorError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    ConnectionTimeoutError,
    DummyCookieJar,
    TCPConnector,
    hdrs,
)
from yarl import URL

from proxy import __version__
from proxy.config import FleetSettings
from proxy.errors import (
    ConfigError,
    NoDescriptorsError,
    ProxyError,
    RateLimitedError,
    UpstreamError,
    UpstreamTimeoutError,
    UpstreamUnavailableError,
)
from proxy.fleet.directory import Directory, Member, PeerFailure
from proxy.hops import via_header
from proxy.metrics import FailoverReason, Metrics
from proxy.oci.digest import Digest
from proxy.oci.reference import Repository
from proxy.upstream import errors, responses
from proxy.upstream.body import BlobBody
from proxy.upstream.errors import map_errors
from proxy.upstream.network import retry

# The token of the fleet, by which a node knows the request of a peer.
TOKEN_HEADER = "Pullcache-Fleet"  # noqa: S105 (a name)
# In a request: the registry has proven to the requesting node that the repository has the digest.
PROVEN_HEADER = "Pullcache-Proven"
# In a request: the peer is to send the blob although it sends it to `fleet.children` others.
INSIST_HEADER = "Pullcache-Insist"
# In a response with a growing blob: the nodes that its bytes come through, the answering one first.
PATH_HEADER = "Pullcache-Path"
# The path of operations that a node does for another one.
CALL_PATH = "/fleet/v1/call"
# The code of a 404 by which a peer says that it has the content, but not for this repository.
UNLINKED_CODE = "NAME_UNKNOWN"

# Seconds for a connection to a peer, and for the head of its answer.
CONNECT_TIMEOUT = 1.0
ANSWER_TIMEOUT = 10.0
# The stall timeout of a blob is that of its reader.
_TIMEOUT = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=ANSWER_TIMEOUT)
_CALL_TIMEOUT = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT)
# How often a transfer looks whether its peer still lives, in seconds.
WATCH_INTERVAL = 0.5
# Nodes that bytes come through; a longer path is not followed.
MAX_PATH = 64
# Seconds for the registry's proof. Without an answer it counts as one that cannot be asked.
PROOF_TIMEOUT = 5.0
# Peers that are asked for one blob or manifest, whatever the directory says.
MAX_ATTEMPTS = 16
# The pause, in seconds, before a peer is asked again that waits for the content itself.
WAIT_INTERVAL = 0.25

# The statuses by which a peer says that it has not begun to receive what it is asked for.
_WAITING_STATUSES = frozenset({429, 503, 504})

_NO_MEMBER = Member("", "")
# Of a peer that answers this node as it answers clients.
_REFUSED = (
    "refuses the token of this node; the files of fleet.token_file must be the same on all nodes"
)
_REASONS: dict[PeerFailure, FailoverReason] = {
    "connect": "refused",
    "stall": "stalled",
    "broken": "broken",
    "wrong_bytes": "wrong",
}


class PeerError(UpstreamUnavailableError):
    """A peer did not send what it was asked for. `failure` is what the directory is told of it."""

    def __init__(
        self,
        message: str,
        member: Member = _NO_MEMBER,
        failure: PeerFailure = "broken",
    ) -> None:
        super().__init__(message)
        self.member = member
        self.failure = failure


class PeerBusyError(UpstreamUnavailableError):
    """A peer waits for the content itself; it may be asked again."""


class PeerFullError(PeerBusyError):
    """A peer sends the blob to as many others as it may; another one may be asked meanwhile."""


class PeerPermission(Enum):
    """What the registry has said about a repository and a digest that peers are to be asked for."""

    PROVEN = auto()
    # It cannot be asked: a peer answers only if it may serve the digest under this repository.
    LINK = auto()
    # It gave no proof: upstream has to send the content.
    REFUSED = auto()


async def ask_permission(prove: Callable[[], Awaitable[bool]]) -> PeerPermission:
    """Return what `prove` tells, which asks the registry for a proof."""
    try:
        async with asyncio.timeout(PROOF_TIMEOUT):
            is_proven = await prove()
    except (UpstreamUnavailableError, RateLimitedError, TimeoutError):
        return PeerPermission.LINK
    except ProxyError:
        return PeerPermission.REFUSED
    return PeerPermission.PROVEN if is_proven else PeerPermission.REFUSED


class PeerBody(BlobBody):
    """The bytes of a blob as a peer sends them, from `offset` to the end of the blob.

    `path` names the nodes that they come through. `is_whole` says that the peer has all of them.
    """

    path: tuple[str, ...] = ()
    is_whole = False
    last_arrival = 0.0
    _position = 0

    async def read_into(self, buffer: memoryview) -> int:
        """Read as `BlobBody` does; a body that ends before the blob does is broken."""
        count = await super().read_into(buffer)
        self.last_arrival = asyncio.get_running_loop().time()
        self._position += count
        if not count and self.size is not None and self.offset + self._position < self.size:
            raise UpstreamUnavailableError(f"{self._label} ended a response before its last byte")
        return count


class _MemberList(Protocol):
    @property
    def members(self) -> Sequence[Member]: ...
    @property
    def is_blind(self) -> bool: ...


class PeerClient:
    """Requests to the other nodes of the fleet. `node_id` names this node in paths and `Via`."""

    def __init__(
        self,
        session: ClientSession,
        directory: Directory,
        metrics: Metrics,
        *,
        token: str,
        node_id: str,
        stall_timeout: float,
        min_rate: int,
        min_rate_window: float,
    ) -> None:
        self.directory = directory
        self.node_id = node_id
        self.token = token
        self._session = session
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._min_rate = min_rate
        self._min_rate_window = min_rate_window

    @asynccontextmanager
    async def open_blob(
        self,
        member: Member,
        repository: Repository,
        digest: Digest,
        offset: int,
        *,
        is_proven: bool,
        insists: bool = False,
    ) -> AsyncIterator[PeerBody]:
        """Open a blob of a peer at `offset`; with `insists` also if it sends it to many others.

        Raises `PeerError` and `PeerBusyError`. Also an error in the block that comes from reading the body
        becomes a `PeerError`.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        if insists:
            headers[INSIST_HEADER] = "1"
        async with self._request(
            member, repository, f"blobs/{digest}", headers, is_proven=is_proven
        ) as (response, watch):
            if response.status == 206:
                start, size = responses.parse_content_range(response)
                if start != offset:
                    raise UpstreamError(f"{watch.label} sent a different range than requested")
            else:
                start, size = 0, response.content_length
            body = PeerBody(
                response,
                watch.label,
                start,
                size,
                stall_timeout=self._stall_timeout,
                # As of upstream: what a growing blob grows by is limited there, too.
                rate_monitor=retry.MinRateMonitor(self._min_rate, self._min_rate_window),
            )
            # A peer sends all from the offset on over one connection.
            body.is_partial = False
            body.path = _read_path(response)
            if self.node_id in body.path or len(body.path) > MAX_PATH:
                self._metrics.count_peer_request("unknown")
                raise PeerError(f"{watch.label} gets the blob from this node", member, "unlinked")
            body.is_whole = _is_hit(response)
            if not body.is_whole and not body.path:
                raise self._failed(f"{watch.label} {_REFUSED}", "broken", watch)
            self._metrics.count_peer_request("whole" if body.is_whole else "growing")
            watch.body = body
            yield body

    async def fetch_manifest(
        self, member: Member, repository: Repository, digest: Digest, *, is_proven: bool
    ) -> tuple[bytes, str]:
        """Return a manifest of a peer, and its media type. Raises `PeerError` and `PeerBusyError`."""
        async with self._request(
            member, repository, f"manifests/{digest}", {}, is_proven=is_proven
        ) as (response, watch):
            with map_errors(watch.label):
                async with asyncio.timeout(ANSWER_TIMEOUT):
                    content, media_type = await responses.read_manifest(response)
            self._metrics.count_peer_request("whole" if _is_hit(response) else "growing")
        self._metrics.count_peer_bytes("in", len(content))
        if Digest.from_content(content, digest.algorithm) != digest:
            self.record_failure("wrong_bytes")
            raise PeerError(
                f"{watch.label} sent content that does not match {digest}", member, "wrong_bytes"
            )
        return content, media_type

    async def call(self, member: Member, call: str) -> bytes:
        """Have a peer do an operation of the admin API; return its answer. Raises `UpstreamError`."""
        base = URL(member.address)
        label = f"peer {base.authority}"
        url = base.joinpath(*CALL_PATH.strip("/").split("/")).with_query({"call": call})
        sent = {TOKEN_HEADER: self.token, hdrs.VIA: via_header(self.node_id)}
        watch = _Watch(self.directory, member, label)
        try:
            with map_errors(label):
                async with (
                    watch.running(),
                    # An operation may take long; it ends when the peer is dead.
                    self._session.get(
                        url, headers=sent, allow_redirects=False, timeout=_CALL_TIMEOUT
                    ) as response,
                ):
                    if response.status == 404:  # what a client gets
                        raise UpstreamError(f"{label} {_REFUSED}")
                    if response.status != 200:
                        error = await errors.read_error(response)
                        raise UpstreamError(
                            f"{label} responded with status {response.status}{error.reason}"
                        )
                    return await response.read()
        except TimeoutError as error:
            raise UpstreamUnavailableError(f"{label} is dead") from error

    def record_failure(self, failure: PeerFailure) -> None:
        """Count that another way is taken because a peer failed."""
        if reason := _REASONS.get(failure):
            self._metrics.count_peer_failover(reason)

    @asynccontextmanager
    async def _request(
        self,
        member: Member,
        repository: Repository,
        path: str,
        headers: dict[str, str],
        *,
        is_proven: bool,
    ) -> AsyncIterator[tuple[ClientResponse, "_Watch"]]:
        """Yield the successful response of a peer; it ends when the peer is dead or silent."""
        base = URL(member.address)
        label = f"peer {base.authority}"
        url = base.joinpath("v2", *repository.name.split("/"), *path.split("/"), encoded=True)
        url = url.with_query({"ns": repository.upstream})
        sent = {TOKEN_HEADER: self.token, hdrs.VIA: via_header(self.node_id), **headers}
        if is_proven:
            sent[PROVEN_HEADER] = "1"
        watch = _Watch(self.directory, member, label)
        try:
            async with AsyncExitStack() as stack:
                with map_errors(label):
                    await stack.enter_async_context(watch.running())
                    async with asyncio.timeout(ANSWER_TIMEOUT):
                        response = await self._session.get(
                            url, headers=sent, allow_redirects=False, timeout=_TIMEOUT
                        )
                    stack.callback(_close_response, response)
                await self._raise_for_status(response, watch)
                yield response, watch
        except (PeerError, PeerBusyError, NoDescriptorsError):
            raise
        except TimeoutError as error:
            raise self._failed(f"{label} is silent", "stall", watch) from error
        except UpstreamError as error:
            raise self._failed(str(error), _classify(error), watch) from error

    async def _raise_for_status(self, response: ClientResponse, watch: "_Watch") -> None:
        status, label = response.status, watch.label
        if status in (200, 206):
            return
        error = await errors.read_error(response)
        message = f"{label} responded with status {status}{error.reason}"
        if status == 404:
            self._metrics.count_peer_request("unknown")
            failure: PeerFailure = "unlinked" if error.code == UNLINKED_CODE else "absent"
            raise PeerError(message, watch.member, failure)
        # A load balancer in front of a node that is gone has no code of a registry.
        if status in _WAITING_STATUSES and error.code:
            raise PeerFullError(message) if status == 429 else PeerBusyError(message)
        raise self._failed(message, "broken", watch)

    def _failed(self, message: str, failure: PeerFailure, watch: "_Watch") -> PeerError:
        if watch.body is None:
            self._metrics.count_peer_request("failed")
        self.record_failure(failure)
        return PeerError(message, watch.member, failure)


class _Watch:
    """Ends a transfer from a peer whose heartbeat has stopped and from which nothing arrives."""

    def __init__(self, directory: _MemberList, member: Member, label: str) -> None:
        self.label = label
        self.body: PeerBody | None = None
        self._directory = directory
        self.member = member
        self._loop = asyncio.get_running_loop()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raise `TimeoutError` in the block once the peer is dead."""
        async with asyncio.timeout(None) as limit:
            timer = self._loop.call_later(WATCH_INTERVAL, self._check, limit)
            self._timer = timer
            try:
                yield
            finally:
                self._timer.cancel()

    def _check(self, limit: asyncio.Timeout) -> None:
        now = self._loop.time()
        is_quiet = self.body is None or now - self.body.last_arrival > WATCH_INTERVAL
        if is_quiet and not self._is_alive():
            limit.reschedule(now)
            return
        self._timer = self._loop.call_later(WATCH_INTERVAL, self._check, limit)

    def _is_alive(self) -> bool:
        """Tell whether the peer is a member; a blind directory does not know."""
        if self._directory.is_blind:
            return True
        return any(one.address == self.member.address for one in self._directory.members)


def create_peer_tls_context(settings: FleetSettings) -> ssl.SSLContext:
    """Return the TLS context for requests to peers. Blocks; raises `ConfigError`."""
    context = ssl.create_default_context()
    if settings.ca_file:
        try:
            context.load_verify_locations(settings.ca_file)
        except OSError as error:
            raise ConfigError(
                f"fleet.ca_file: {settings.ca_file} cannot be used ({error})"
            ) from error
    return context


def open_peer_session(tls: ssl.SSLContext) -> ClientSession:
    """Return a session for requests to peers, to be closed by the caller. It uses no proxy."""
    return ClientSession(
        connector=TCPConnector(limit=0, ssl=tls),
        cookie_jar=DummyCookieJar(),
        auto_decompress=False,
        headers={"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"},
    )


def fleet_token(settings: FleetSettings, token: str) -> str:
    """Return what requests to peers carry: the token, or the name of a fleet on loopback that has none."""
    return token or settings.name


def _classify(error: UpstreamError) -> PeerFailure:
    if isinstance(error.__cause__, ClientConnectorError | ConnectionTimeoutError):
        return "connect"
    is_stalled = isinstance(error, UpstreamTimeoutError) or isinstance(
        error.__cause__, TimeoutError
    )
    return "stall" if is_stalled else "broken"


def _is_hit(response: ClientResponse) -> bool:
    return "; hit" in response.headers.get("Cache-Status", "")


def _read_path(response: ClientResponse) -> tuple[str, ...]:
    value = response.headers.get(PATH_HEADER, "")
    return tuple(name.strip() for name in value.split(",") if name.strip())


def _close_response(response: ClientResponse) -> None:
    response.close() if not response.content.at_eof() else response.release()
