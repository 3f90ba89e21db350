"""The whole program in this process, on ports of its own, and a client that looks closely."""

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
from tests.fakes.content import Image, digest_of
from tests.fakes.registry import FakeRegistry

SETTINGS: dict[str, dict[str, Any]] = {
    "server": {"listen": ["127.0.0.1:0"]},
    "store": {"max_size": "1GB", "min_free": "0B"},
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
    """What came back. `is_whole` is False if the body ended before its announced length."""

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
        """The code of an OCI error body, whose form is checked."""
        assert self.headers["Content-Type"] == "application/json"
        (error,) = self.json["errors"]
        assert set(error) >= {"code", "message"}
        assert 0 < len(error["message"]) <= 200
        return str(error["code"])


class Program:
    """A daemon on `root` that stands before `registry`, with settings by section."""

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
        self.bugs = 0
        """How many bugs of its own the daemon is to meet."""
        self._running: AsyncExitStack | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started and not stopped."""
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
        """Return the configuration it is started with."""
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
            bugs = await self.metric("pullcache_internal_errors_total")
            await self._running.aclose()
        self._running = None
        assert bugs == self.bugs, "the daemon met a bug of its own; its log is above"

    async def reload(self, **sections: dict[str, Any]) -> bool:
        """Change the settings given and read them as SIGHUP does; return whether they were taken."""
        self.sections = {**self.sections, **sections}
        self.upstreams = self.sections.pop("upstreams", self.upstreams)
        return await self.running.reload(self.config)

    async def restart(self, **sections: dict[str, Any]) -> None:
        """Stop, change the settings given, and start again on the same store."""
        await self.stop()
        self.sections = {**self.sections, **sections}
        await self.start()

    # Looking at the disk.

    def stored(self) -> set[str]:
        """Return the digests of the blobs in the store, after checking their bytes."""
        digests = set()
        for path in (self.root / "blobs" / "sha256").iterdir():
            digest = digest_of(path.read_bytes())
            assert digest == f"sha256:{path.name}"
            digests.add(digest)
        return digests

    def on_disk(self) -> int:
        """Return what `du` says of everything under the store."""
        sizes: dict[int, int] = {}
        for path in self.root.rglob("*"):
            with suppress(FileNotFoundError):  # evicted while we look
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    # By inode: what is renamed while we look is found twice.
                    sizes[status.st_ino] = status.st_blocks * 512
        return sum(sizes.values())

    # Asking.

    @asynccontextmanager
    async def opened(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask, and yield the response with its body still to be read."""
        async with self.session.request(
            method, URL(self.url + target, encoded=True), headers=headers, allow_redirects=False
        ) as response:
            yield response

    async def ask(self, target: str, method: str = "GET", **headers: str) -> Answer:
        """Ask and read to the end, be it an early one. `If_Range` is the header If-Range."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.opened(target, method, named) as response:
            body, is_whole = await read(response)
            return Answer(response.status, response.headers, body, is_whole)

    async def manifest(self, image: Image | str, reference: str = "latest", **kw: str) -> Answer:
        """Ask for a manifest of the repository of `image`."""
        repository = image if isinstance(image, str) else image.repository
        return await self.ask(f"/v2/{repository}/manifests/{reference}", **kw)

    async def blob(self, digest: str, repository: str = "library/app", **kw: str) -> Answer:
        """Ask for a blob."""
        return await self.ask(f"/v2/{repository}/blobs/{digest}", **kw)

    async def pull(self, image: Image) -> None:
        """Pull as dockerd does: HEAD, index, manifest, config and layers at once; check it all."""
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

    async def settled(self) -> None:
        """Wait until no download runs: what was sent is then committed. On a busy disk that takes its time."""
        async with asyncio.timeout(30):
            while await self.metric("pullcache_downloads_in_progress"):
                pass

    async def recovered(self) -> None:
        """Wait until the program asks upstream again, which it leaves alone after failures."""
        async with asyncio.timeout(10):
            while (await self.manifest("me/probe")).status != 404:
                pass

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over the series that have these labels."""
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
    """Return the body as far as it came, and whether that was all of it."""
    body = bytearray()
    try:
        async for chunk in response.content.iter_any():
            body += chunk
    except aiohttp.ClientPayloadError:
        return bytes(body), False
    return bytes(body), True
