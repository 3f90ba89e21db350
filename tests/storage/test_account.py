"""The account under random concurrent work: equal to index and files, within the limit."""

import asyncio
import io
import random
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager, closing, suppress
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from proxy.cli.api_client import AdminClient
from proxy.errors import ProxyError
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.disk_usage import allocated, allocated_at_once
from tests.support.examples import scaled
from tests.support.program import Program

CAP = 4_000_000
IMAGE_COUNT = 8
REPOSITORIES = [f"team/app{number}" for number in range(IMAGE_COUNT)]

# Images with layers of twice the store's size; every second one shares a layer with the previous
# one.
_rng = random.Random(5)
_LAYERS = [_rng.randbytes(_rng.randint(50_000, 600_000)) for _ in range(3 * IMAGE_COUNT)]
LAYERS = [[*_LAYERS[3 * n : 3 * n + 3], _LAYERS[3 * (n // 2)]] for n in range(IMAGE_COUNT)]

KINDS = ["pull"] * 8 + ["leave", "leave", "break_off", "preload", "remove", "export", "sweep"]
works = st.tuples(st.sampled_from(KINDS), st.integers(0, IMAGE_COUNT - 1))
batches = st.lists(st.lists(works, min_size=8, max_size=24), min_size=2, max_size=5)


class Load:
    """Simultaneous operations of clients and operators."""

    def __init__(self, program: Program, registry: FakeRegistry) -> None:
        self.program = program
        self.registry = registry
        self.images = [
            registry.add_image(name, layers=layers)
            for name, layers in zip(REPOSITORIES, LAYERS, strict=True)
        ]
        self.most_on_disk = 0
        self._works: dict[str, Callable[[int], Coroutine[Any, Any, None]]] = {
            "pull": self._pull,
            "leave": self._disconnect,
            "break_off": self._break_off,
            "preload": self._preload,
            "remove": self._remove,
            "export": self._export,
            "sweep": self._sweep,
        }

    async def run(self, what: str, number: int) -> None:
        with suppress(ProxyError, aiohttp.ClientError):
            await self._works[what](number)

    async def _pull(self, number: int) -> None:
        """Pull an image; a transfer that upstream breaks off may be incomplete, but never wrong."""
        image = self.images[number]
        await self.program.manifest(image)
        await self.program.manifest(image, image.digest)
        fetches = (self.program.blob(one, image.repository) for one in dict.fromkeys(image.blobs))
        for answer in await asyncio.gather(*fetches, return_exceptions=True):
            if not isinstance(answer, BaseException) and answer.status == 200 and answer.is_whole:
                assert answer.digest == answer.headers["Docker-Content-Digest"]

    async def _disconnect(self, number: int) -> None:
        """Pull, and disconnect in the middle."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0.01 * (number + 1)):
                await self._pull(number)

    async def _break_off(self, number: int) -> None:
        """Let upstream break off the transfer of a layer once."""
        digest = self.images[number].layers[0]
        self.registry.fail(self.registry.body_of(digest), Fault(cut_at=40_000))

    async def _preload(self, number: int) -> None:
        wanted = {"images": [f"docker.io/{REPOSITORIES[number]}:latest"]}
        await self._ask(lambda api: [*api.stream("POST", "/api/v1/preload", wanted)])

    async def _remove(self, number: int) -> None:
        wanted = {"images": [f"docker.io/{REPOSITORIES[number]}:latest"]}
        await self._ask(lambda api: api.post("/api/v1/images/remove", wanted))

    async def _export(self, number: int) -> None:
        wanted = {"images": [f"docker.io/{REPOSITORIES[number]}:latest"]}
        await self._ask(lambda api: api.post_to_file("/api/v1/export", wanted, io.BytesIO()))

    async def _ask(self, work: Callable[[AdminClient], object]) -> None:
        await asyncio.to_thread(lambda: work(AdminClient(self.program.root, 20)))

    async def _sweep(self, number: int) -> None:
        space = self.program.running._core.space
        await space.sweep(max_idle=0, ingest_ttl=1000)

    # Measurements.

    @asynccontextmanager
    async def watched(self):
        """Measure the disk repeatedly while the block runs."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._measure())
            yield
            watching.cancel()

    async def _measure(self) -> None:
        while True:
            on_disk = await asyncio.to_thread(
                allocated_at_once, self.program.root, "blobs", "ingest"
            )
            self.most_on_disk = max(self.most_on_disk, on_disk)
            await asyncio.sleep(0.005)

    def _allocated(self, directory: str) -> tuple[int, int]:
        sizes = allocated(self.program.root, directory).values()
        return len(sizes), sum(sizes)

    async def check_at_rest(self) -> None:
        await self.program.wait_for_downloads()
        core = self.program.running._core
        account = (core.space.blob_count, core.space.stored_bytes)
        assert account == await asyncio.to_thread(self._allocated, "blobs")
        assert account == await asyncio.to_thread(self._in_index)
        _, ingests = await asyncio.to_thread(self._allocated, "ingest")
        assert core.space.reserved_bytes == ingests
        assert core.space.used_bytes <= CAP
        assert self.most_on_disk <= CAP
        assert await self.program.metric("pullcache_store_drift_total") == 0
        assert await self.program.metric("pullcache_evictions_total", reason="corrupt") == 0

    def _in_index(self) -> tuple[int, int]:
        with closing(sqlite3.connect(self.program.root / "index.sqlite")) as connection:
            query = "SELECT count(*), coalesce(sum((size + 4095) / 4096 * 4096), 0) FROM blobs"
            blobs, size = connection.execute(query).fetchone()
            return blobs, size


@pytest.mark.timeout(180)  # several programs, each started twice or more
@settings(max_examples=scaled(6), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=batches)
async def test_without_running_work_the_account_equals_index_and_files(tmp_path_factory, batches):
    async with FakeRegistry(auth=False) as registry:
        program = Program(
            tmp_path_factory.mktemp("account") / "store",
            registry,
            store={"max_size": f"{CAP}B"},
            fetch={"prefetch": "layers", "attempts": 1},
        )
        load = Load(program, registry)
        await program.start()
        try:
            for batch in batches:
                async with load.watched():
                    await asyncio.gather(*(load.run(*work) for work in batch))
                    await program.wait_for_downloads()
                await load.check_at_rest()
                await program.restart()
                await load.check_at_rest()
        finally:
            await program.stop()
