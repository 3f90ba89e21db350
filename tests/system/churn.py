"""A load that replaces a small store again and again, and looks whether the account is the disk.

    python -m tests.system.churn --seconds 30
    python -m tests.system.churn --seconds 600 --faults --kill

Sixteen clients pull 60 images of 687 MB together, by a Pareto law, through a store of 120 MB. The
blocks on the disk may never exceed the cap, and at the end /metrics must tell what is there. Exits
1 otherwise.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import math
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from proxy.cli.api_client import AdminClient
from proxy.errors import ProxyError
from tests.fakes.content import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST
from tests.support.disk_usage import allocated, allocated_at_once
from tests.system.processes import Process
from tests.system.servers import sum_samples

CAP = 120_000_000
CLIENTS = 16
IMAGES = 60
TOTAL_SIZE = 687_000_000
SMALLEST_LAYER, LARGEST_LAYER = 50_000, 9_000_000
SAMPLE_INTERVAL = 0.05
# How long the daemon has to evict after a reload that lowers the cap.
RESIZE_TIME = 3.0

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Options:
    """Options of the load, apart from whole pulls."""

    seconds: float = 30
    seed: int = 0
    faults: bool = False  # upstream breaks off, fails and lies; clients leave
    mixed: bool = False  # ranges, removals, exports, reloads that change the cap
    kill: bool = False  # the daemon is killed every few seconds


@dataclass(frozen=True)
class ChurnImage:
    """An image in the upstream: its name, and digests of all that it consists of."""

    name: str
    manifest: str
    blobs: list[str]


class ChurnUpstream:
    """A registry whose layers are slices of one random buffer, each with a head of its own."""

    def __init__(self, rng: random.Random) -> None:
        self.blobs: dict[str, tuple[bytes, memoryview]] = {}
        self.manifests: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.fault_rate = 0.0
        self._rng = rng
        self._pool = memoryview(rng.randbytes(LARGEST_LAYER))
        counts = [rng.randint(1, 4) for _ in range(IMAGES)]
        sizes = [rng.uniform(SMALLEST_LAYER, LARGEST_LAYER) for _ in range(sum(counts))]
        scale = TOTAL_SIZE / sum(sizes)
        fitted = iter(max(SMALLEST_LAYER, min(LARGEST_LAYER, int(size * scale))) for size in sizes)
        self.images = [
            self._add_image(f"team/app{number}", [*itertools.islice(fitted, count)])
            for number, count in enumerate(counts)
        ]

    def _add_image(self, name: str, sizes: list[int]) -> ChurnImage:
        config = json.dumps({"architecture": "amd64", "os": "linux", "name": name}).encode()
        layers = [(f"{name}/{number}".encode(), size) for number, size in enumerate(sizes)]
        named = [self._add_blob(config, 0), *(self._add_blob(*layer) for layer in layers)]
        kinds = [OCI_CONFIG, *(OCI_LAYER for _ in layers)]
        described = [
            {"mediaType": kind, "digest": digest, "size": self.size(digest)}
            for kind, digest in zip(kinds, named, strict=True)
        ]
        manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": described[0],
                "layers": described[1:],
            }
        ).encode()
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        self.manifests[digest] = manifest
        self.tags[name] = digest
        return ChurnImage(name, digest, named)

    def _add_blob(self, head: bytes, size: int) -> str:
        rest = self._pool[: max(0, size - len(head))]
        digest = hashlib.sha256(head)
        digest.update(rest)
        self.blobs[f"sha256:{digest.hexdigest()}"] = (head, rest)
        return f"sha256:{digest.hexdigest()}"

    def size(self, digest: str) -> int:
        head, rest = self.blobs[digest]
        return len(head) + len(rest)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer as a registry does; a client may leave meanwhile."""
        with contextlib.suppress(ConnectionError):
            return await self._answer(request)
        return web.Response()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        parts = request.path.split("/")
        kind, reference = parts[-2:]
        if self._rng.random() < self.fault_rate / 2:
            return web.Response(status=self._rng.choice([500, 503, 429]))
        if kind == "manifests":
            digest = self.tags.get("/".join(parts[2:-2]), "") if ":" not in reference else reference
            headers = {"Content-Type": OCI_MANIFEST, "Docker-Content-Digest": digest}
            return web.Response(body=self.manifests[digest], headers=headers)
        if kind == "blobs":
            return await self._answer_blob(request, reference)
        return web.Response()

    async def _answer_blob(self, request: web.BaseRequest, digest: str) -> web.StreamResponse:
        head, rest = self.blobs[digest]
        size, start, stop = len(head) + len(rest), 0, len(head) + len(rest)
        if asked := _RANGE.fullmatch(request.headers.get("Range", "")):
            start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
        response = web.StreamResponse(status=206 if asked else 200)
        response.headers["Docker-Content-Digest"] = digest
        if asked:
            response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        response.content_length = stop - start
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        fault = self._rng.choice(("cut", "flip", "stall")) if self._is_spoiled() else ""
        spoiled_at = self._rng.randrange(start, stop) if fault else -1
        for offset in range(start, stop, 1 << 18):
            end = min(stop, offset + (1 << 18))
            piece = head[offset:end] + rest[max(0, offset - len(head)) : end - len(head)]
            if offset <= spoiled_at < end:
                if fault == "cut":
                    assert request.transport
                    request.transport.abort()
                    return response
                if fault == "stall":
                    await asyncio.sleep(2)
                piece = bytes([piece[0] ^ 1]) + piece[1:] if fault == "flip" else piece
            await response.write(piece)
        return response

    def _is_spoiled(self) -> bool:
        return self._rng.random() < self.fault_rate


@dataclass
class Findings:
    """Counts of operations, and the problems found."""

    done: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    most: int = 0  # bytes on the disk


class Churn:
    """One run in `place`."""

    def __init__(self, place: Path, options: Options) -> None:
        self.found = Findings()
        self.store = place / "store"
        self._place = place
        self._options = options
        self._rng = random.Random(options.seed)
        self._upstream = ChurnUpstream(random.Random(7))
        self._upstream.fault_rate = 0.03 if options.faults else 0.0
        self._upstream_port = 0
        self._cap = CAP
        self._strict_from = 0.0  # until then an earlier, larger cap may be seen
        self._process: Process | None = None
        self._url = ""
        self._is_up = asyncio.Event()

    async def run(self) -> Findings:
        """Run the load to its end and compare."""
        async with contextlib.AsyncExitStack() as stack:
            self._upstream_port = await self._serve_upstream(stack)
            await asyncio.to_thread(self._start)
            stack.push_async_callback(asyncio.to_thread, self._stop)
            connector = aiohttp.TCPConnector(limit=0)
            timeout = aiohttp.ClientTimeout(total=60)
            session = await stack.enter_async_context(
                aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
            )
            ends = time.monotonic() + self._options.seconds
            sampling = await stack.enter_async_context(self._sampling())
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(self._pull_until(ends, session, number))
                if self._options.mixed:
                    group.create_task(self._operate_until(ends))
                if self._options.kill:
                    group.create_task(self._kill_until(ends))
            await self._compare(session)
            sampling.cancel()
        self._read_log()
        return self.found

    # The daemon.

    async def _serve_upstream(self, stack: contextlib.AsyncExitStack) -> int:
        runner = web.ServerRunner(web.Server(self._upstream.answer, access_log=None))
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    def _configure(self) -> None:
        (self._place / "config.toml").write_text(
            f'[server]\nlisten = ["127.0.0.1:0"]\nshutdown_timeout = "5s"\n'
            f'[store]\npath = "{self.store}"\nmax_size = "{self._cap}B"\nmin_free = "0B"\n'
            '[fetch]\nstall_timeout = "1s"\nattempts = 3\n'
            f'[upstreams."docker.io"]\nurl = "http://127.0.0.1:{self._upstream_port}"\n'
        )

    def _start(self) -> None:
        self._configure()
        config = str(self._place / "config.toml")
        command = [sys.executable, "-m", "proxy", "serve", "-c", config]
        said = self._place / "daemon.out.log"
        before = len(said.read_text()) if said.exists() else 0
        self._process = Process(self._place, "daemon", command)

        def announced() -> str:
            found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", said.read_text()[before:])
            return found[0] if found else ""

        self._url = self._process.wait_until(announced, "its announcement", timeout=60)
        self._is_up.set()

    def _stop(self) -> None:
        if self._process and self._process.is_running() and self._process.stop(60) != 0:
            self.found.errors.append("the daemon did not end well")

    # Requests.

    async def _pull_until(self, ends: float, session: aiohttp.ClientSession, number: int) -> None:
        rng = random.Random(self._options.seed * 1000 + number)
        while time.monotonic() < ends:
            await self._is_up.wait()
            image = self._upstream.images[int(rng.paretovariate(0.5)) % IMAGES]
            try:
                await self._pull(session, image, rng)
            except (aiohttp.ClientError, TimeoutError, OSError):
                self.found.done["broken"] += 1
                await asyncio.sleep(0.05)

    async def _pull(
        self, session: aiohttp.ClientSession, image: ChurnImage, rng: random.Random
    ) -> None:
        path = f"{self._url}/v2/{image.name}/manifests/latest"
        async with session.get(path, headers={"Accept": OCI_MANIFEST}) as response:
            await response.read()
        fetches = (self._fetch(session, image, digest, rng) for digest in image.blobs)
        await asyncio.gather(*fetches)
        self.found.done["pulls"] += 1

    async def _fetch(
        self, session: aiohttp.ClientSession, image: ChurnImage, digest: str, rng: random.Random
    ) -> None:
        headers, size = {}, self._upstream.size(digest)
        if self._options.mixed and rng.random() < 0.1:
            start = rng.randrange(size)
            headers["Range"] = f"bytes={start}-{min(size, start + 100_000) - 1}"
        leaves_at = rng.randrange(size) if self._options.faults and rng.random() < 0.03 else size
        seen, received = hashlib.sha256(), 0
        path = f"{self._url}/v2/{image.name}/blobs/{digest}"
        async with session.get(path, headers=headers) as response:
            async for piece in response.content.iter_any():
                seen.update(piece)
                received += len(piece)
                if received > leaves_at:
                    return
        if response.status == 200 and f"sha256:{seen.hexdigest()}" != digest:
            self.found.errors.append(f"{digest}: wrong bytes")
        if response.status not in (200, 206) and not self._options.faults:
            self.found.errors.append(f"{digest}: {response.status}")
        self.found.done[f"blobs {response.status}"] += 1

    async def _operate_until(self, ends: float) -> None:
        """Remove images, export them, and reload with another cap."""
        while time.monotonic() < ends:
            await asyncio.sleep(self._rng.uniform(0.2, 1))
            await self._is_up.wait()
            name = f"{self._rng.choice(self._upstream.images[:10]).name}:latest"
            what = self._rng.choice((self._remove, self._export, self._reload))
            try:
                await asyncio.to_thread(what, name)
                self.found.done[what.__name__.strip("_")] += 1
            except (ProxyError, OSError):
                self.found.done[f"{what.__name__.strip('_')} refused"] += 1

    def _remove(self, name: str) -> None:
        AdminClient(self.store, 20).post("/api/v1/images/remove", {"images": [name]})

    def _export(self, name: str) -> None:
        with (self._place / "bundle.tar").open("wb") as file:
            AdminClient(self.store, 20).post_to_file("/api/v1/export", {"images": [name]}, file)

    def _reload(self, _: str) -> None:
        cap = self._rng.choice([CAP, CAP * 3 // 4, CAP // 2])
        if cap < self._cap:
            self._strict_from = time.monotonic() + RESIZE_TIME
        self._cap = cap
        self._configure()
        assert self._process
        self._process.signal(signal.SIGHUP)

    async def _kill_until(self, ends: float) -> None:
        while time.monotonic() < ends - 5:
            await asyncio.sleep(self._rng.uniform(2, 8))
            self._is_up.clear()
            assert self._process
            await asyncio.to_thread(self._process.kill)
            self._strict_from = math.inf
            await asyncio.to_thread(self._start)
            self._strict_from = time.monotonic() + RESIZE_TIME
            self.found.done["kills"] += 1

    # Measurements.

    @contextlib.asynccontextmanager
    async def _sampling(self) -> AsyncIterator["asyncio.Task[None]"]:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._sample())
            yield task
            task.cancel()

    async def _sample(self) -> None:
        while True:
            cap = self._cap if time.monotonic() > self._strict_from else CAP
            taken = await asyncio.to_thread(allocated_at_once, self.store, "blobs", "ingest")
            self.found.most = max(self.found.most, taken)
            if taken > cap:
                self.found.errors.append(f"{taken} bytes on the disk, {cap} allowed")
            await asyncio.sleep(SAMPLE_INTERVAL)

    async def _compare(self, session: aiohttp.ClientSession) -> None:
        metrics = ""
        for _ in range(100):
            async with session.get(f"{self._url}/metrics") as response:
                metrics = await response.text()
            if not sum_samples(metrics, "pullcache_downloads_in_progress", {}):
                break
            await asyncio.sleep(0.2)
        await asyncio.sleep(1)
        async with session.get(f"{self._url}/metrics") as response:
            metrics = await response.text()
        blobs = await asyncio.to_thread(allocated, self.store, "blobs")
        ingests = await asyncio.to_thread(allocated, self.store, "ingest")
        told: Any = {
            name: int(sum_samples(metrics, f"pullcache_{name}", {}))
            for name in ("store_blobs", "store_bytes", "store_reserved_bytes", "store_drift_total")
        }
        found = {
            "store_blobs": len(blobs),
            "store_bytes": sum(blobs.values()),
            "store_reserved_bytes": sum(ingests.values()),
            "store_drift_total": 0,
        }
        if told != found:
            self.found.errors.append(f"told {told}, found {found}")
        if sum_samples(metrics, "pullcache_evictions_total", {"reason": "corrupt"}):
            self.found.errors.append("blobs are said to be corrupt")
        self.found.done["evictions"] = int(sum_samples(metrics, "pullcache_evictions_total", {}))

    def _read_log(self) -> None:
        wrong = "Traceback|Fatal error|account_drift_found"
        if not self._options.kill:  # it may come between the removals of file and row
            wrong += "|blob_file_missing"
        for log in (self._place / "daemon.err.log", self._place / "daemon.out.log"):
            for line in log.read_text(errors="replace").splitlines():
                if re.search(wrong, line):
                    self.found.errors.append(line[:300])


def churn(place: Path, options: Options) -> Findings:
    """Run the load in `place`, an empty directory."""
    return asyncio.run(Churn(place, options).run())


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("faults", "mixed", "kill"):
        parser.add_argument(f"--{name}", action="store_true")
    options = Options(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="churn-") as place:
        found = churn(Path(place), options)
    sys.stdout.write(f"{dict(found.done)}, at most {found.most} bytes\n")
    for text, count in Counter(found.errors).most_common(20):
        sys.stdout.write(f"{count} x {text}\n")
    return 1 if found.errors else 0


if __name__ == "__main__":
    sys.exit(main())
