"""The whole program in this process, listening on a free port, and a client that checks it."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.app import open_cache
from proxy.config import Config, load
from tests.fakes.clock import Clock
from tests.fakes.content import FakeImage, digest_of
from tests.fakes.registry import FakeRegistry

SETTINGS: dict[str, dict[str, Any]] = {
    "server": {"listen": ["127.0.0.1:0"]},
    "store": {"max_size": "1GB", "min_free": "0B", "scrub": "off"},
    "manifests": {"tag_ttl": {}},
    "fetch": {
        "prefetch": "off",
        "parallel_max_rate": "1TB",
        "connect_timeout": "2s",
        "stall_timeout": "2s",
        "attempts": 3,
    },
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response. `is_whole` is False if the body ended before its announced length."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes
    is_whole: bool

    @property
    def digest(self) -> str:
        """The digest of the body's bytes."""
        return digest_of(self.body)

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code in an OCI error body, after checking the form of the body."""
        assert self.headers["Content-Type"] == "application/json"
        (error,) = self.json["errors"]
        assert set(error) >= {"code", "message"}
        assert 0 < len(error["message"]) <= 200
        return str(error["code"])


class Program:
    """A daemon with its store in `root`, `registry` as Docker Hub and settings by section."""

    def __init__(self, root: Path, registry: FakeRegistry, **sections: dict[str, Any]) -> None:
        self.root = root
        self.registry = registry
        self.clock = Clock()
        self.access_log: Any = None
        self.trust: Any = sections.pop("trust", True)
        self.sockets: dict[str, list[socket]] = {}
        self.sections = sections
        self.upstreams = {"docker.io": {"url": registry.url}, **self.sections.pop("upstreams", {})}
        self.url = ""
        self.expected_internal_errors = 0
        """The value of `pullcache_internal_errors_total` at the stop."""
        self._running: AsyncExitStack | None = None

    @property
    def is_running(self) -> bool:
        """Whether the daemon is running."""
        return self._running is not None

    async def start(self) -> None:
        """Start the daemon on a free port, and connect the client."""
        async with AsyncExitStack() as stack:
            running = await stack.enter_async_context(
                open_cache(
                    self.config(),
                    clock=self.clock,
                    access_log=self.access_log,
                    sockets=self.sockets,
                )
            )
            self.running = running
            self.addresses = running.info.addresses
            self.admin_addresses = running.info.admin_addresses
            self.routes = running.routes
            scheme = "https" if running.info.is_tls else "http"
            self.url = f"{scheme}://{self.addresses[0]}"
            self.session = await stack.enter_async_context(
                aiohttp.ClientSession(
                    auto_decompress=False,
                    connector=aiohttp.TCPConnector(limit=0, ssl=self.trust),
                    skip_auto_headers=["Accept", "Accept-Encoding", "User-Agent"],
                )
            )
            self._running = stack.pop_all()

    def config(self) -> Config:
        """Return the configuration: the defaults, overridden by `sections`."""
        values: dict[str, Any] = {name: dict(table) for name, table in SETTINGS.items()}
        values["store"]["path"] = str(self.root)
        for name, value in {"upstreams": self.upstreams, **self.sections}.items():
            is_table = isinstance(value, dict)
            values[name] = {**values.get(name, {}), **value} if is_table else value
        return load(None, {}, values, is_root=False)

    async def stop(self) -> None:
        """Stop the daemon as SIGTERM does."""
        assert self._running is not None
        async with asyncio.timeout(30):
            internal_errors = await self.metric("pullcache_internal_errors_total")
            await self._running.aclose()
        self._running = None
        assert internal_errors == self.expected_internal_errors, "see the daemon's log above"

    async def reload(self, **sections: dict[str, Any]) -> bool:
        """Change these settings and reload as SIGHUP does; return whether they were applied."""
        self.sections = {**self.sections, **sections}
        self.upstreams = self.sections.pop("upstreams", self.upstreams)
        return await self.running.reload(self.config)

    async def restart(self, **sections: dict[str, Any]) -> None:
        """Stop, change these settings, and start again on the same store."""
        await self.stop()
        self.sections = {**self.sections, **sections}
        await self.start()

    # The disk.

    def stored(self) -> set[str]:
        """Return the digests of the stored blobs, after checking their content."""
        digests = set()
        for path in (self.root / "blobs" / "sha256").iterdir():
            try:
                digest = digest_of(path.read_bytes())
            except FileNotFoundError:  # removed in the meantime
                continue
            assert digest == f"sha256:{path.name}"
            digests.add(digest)
        return digests

    def disk_usage(self) -> int:
        """Return the bytes that the store takes on disk, as `du` counts them."""
        sizes: dict[int, int] = {}
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # evicted in the meantime
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    # By inode, because a file renamed in the meantime is found twice.
                    sizes[status.st_ino] = status.st_blocks * 512
        return sum(sizes.values())

    # Requests.

    @asynccontextmanager
    async def opened(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a request, and yield the response with its body still unread."""
        async with self.session.request(
            method, URL(self.url + target, encoded=True), headers=headers, allow_redirects=False
        ) as response:
            yield response

    async def ask(self, target: str, method: str = "GET", **headers: str) -> Answer:
        """Send a request and read the response, which may end early. `If_Range` sets If-Range."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.opened(target, method, named) as response:
            body, is_whole = await read(response)
            return Answer(response.status, response.headers, body, is_whole)

    async def manifest(
        self, image: FakeImage | str, reference: str = "latest", **kw: str
    ) -> Answer:
        """Request a manifest of the repository of `image`."""
        repository = image if isinstance(image, str) else image.repository
        return await self.ask(f"/v2/{repository}/manifests/{reference}", **kw)

    async def blob(self, digest: str, repository: str = "library/app", **kw: str) -> Answer:
        """Request a blob."""
        return await self.ask(f"/v2/{repository}/blobs/{digest}", **kw)

    async def pull(self, image: FakeImage) -> None:
        """Pull and check an image as dockerd does: HEAD, index, manifest, config and layers."""
        tag = await self.manifest(image, image.tag or image.digest, method="HEAD")
        assert tag.status == 200
        assert tag.headers["Docker-Content-Digest"] == image.digest
        for digest in dict.fromkeys([image.digest, image.manifest]):
            answer = await self.manifest(image, digest)
            assert (answer.status, answer.digest) == (200, digest)
        blobs = dict.fromkeys(image.blobs)
        answers = await asyncio.gather(*(self.blob(one, image.repository) for one in blobs))
        for digest, answer in zip(blobs, answers, strict=True):
            assert (answer.status, answer.is_whole, answer.digest) == (200, True, digest)

    async def wait_for_downloads(self) -> None:
        """Wait until no download is running: all that was sent is then committed."""
        async with asyncio.timeout(30):
            while await self.metric("pullcache_downloads_in_progress"):  # noqa: ASYNC110 (no event)
                await asyncio.sleep(0.005)

    async def wait_for_upstream(self) -> None:
        """Wait until the program sends requests upstream again, which it stops after failures."""
        async with asyncio.timeout(10):
            while (await self.manifest("me/probe")).status != 404:
                pass

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the series with these labels."""
        answer = await self.ask("/metrics")
        total = 0.0
        for line in answer.body.decode().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(
                f'{key}="{wanted}"' in series for key, wanted in labels.items()
            ):
                total += float(value)
        return total


async def read(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Return the body as far as it was received, and whether it is complete."""
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
    except aiohttp.ClientPayloadError:
        return bytes(body), False
    return bytes(body), True
