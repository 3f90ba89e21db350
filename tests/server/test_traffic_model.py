"""Totals of traffic against the counters of requests and bytes, in random sequences of pulls."""

import asyncio
from contextlib import suppress
from typing import Any

from hypothesis import given, settings, strategies as st

from proxy.cli.api_client import AdminClient
from proxy.errors import UnknownManifestError
from proxy.traffic import PullResult
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

NAMES = ("me/one", "me/two")
LAYERS = (b"a" * 3000, b"b" * 5000, b"c" * 7000)

# A repository, a way to pull, and seconds until the next one.
Step = tuple[int, str, float]
steps = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["containerd", "tag", "digest", "blob", "preload", "evict", "missing"]),
        st.sampled_from([0.0, 30.0, 700.0, 90_000.0]),
    ),
    min_size=1,
    max_size=12,
)


async def run(program: Program, registry: FakeRegistry, sequence: list[Step]) -> None:
    images = [
        registry.add_image(name, layers=LAYERS[number:], index=True)
        for number, name in enumerate(NAMES)
    ]
    api = AdminClient(program.root)
    for number, how, seconds in sequence:
        image = images[number]
        if how == "containerd":
            await program.pull(image)
        elif how in ("tag", "digest"):
            await program.manifest(image, "latest" if how == "tag" else image.digest)
        elif how == "blob":
            await program.blob(image.layers[0], image.repository)
        elif how == "missing":
            await program.manifest(image, "missing")
        elif how == "preload":
            await asyncio.to_thread(preload, api, image.repository)
        else:
            await asyncio.to_thread(remove, api, image.repository)
        await program.wait_for_downloads()
        program.clock.advance(seconds)


def preload(api: AdminClient, name: str) -> None:
    list(api.stream("POST", "/api/v1/preload", {"images": [{"image": name}]}))


def remove(api: AdminClient, name: str) -> None:
    with suppress(UnknownManifestError):
        api.post("/api/v1/images/remove", {"images": [name], "force": True})


async def check(program: Program) -> None:
    """Compare the totals of all scopes with each other and with the counters."""
    api = AdminClient(program.root)

    def top(of: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = api.get("/api/v1/traffic/top", of=of, days=366, limit=1000)
        return found

    upstreams, repositories, clients, images = [
        await asyncio.to_thread(top, of) for of in ("upstream", "repository", "client", "image")
    ]

    def total(rows: list[dict[str, Any]], key: str) -> int:
        return sum(row[key] for row in rows)

    for key in ("hits", "partials", "misses"):
        totals = {total(rows, key) for rows in (upstreams, repositories, clients, images)}
        assert len(totals) == 1
        assert all(row[key] >= 0 for row in (*upstreams, *repositories, *images))
    for key in ("requests", "sent_bytes"):
        assert total(upstreams, key) == total(repositories, key) == total(clients, key)
    received = await program.metric("pullcache_upstream_bytes_total", kind="blob")
    received += await program.metric("pullcache_upstream_bytes_total", kind="manifest")
    fetched = [
        sum(total(rows, key) for key in ("received_bytes", "preloaded_bytes"))
        for rows in (upstreams,)
    ]
    assert fetched == [received] or not upstreams
    sent = 0.0
    for cache in ("hit", "miss", "collapsed", "revalidated", "stale", "bypass"):
        for kind in ("manifest", "blob"):
            sent += await program.metric("pullcache_response_bytes_total", kind=kind, cache=cache)
    assert total(upstreams, "sent_bytes") == sent
    program.clock.advance(700)
    await asyncio.to_thread(top, "upstream")
    results: tuple[PullResult, ...] = ("hit", "partial", "miss")
    for result, key in zip(results, ("hits", "partials", "misses"), strict=True):
        count = await program.metric("pullcache_pulls_total", result=result)
        assert count == total(upstreams, key)


async def test_totals_agree_with_each_other_and_with_the_counters(registry, tmp_path_factory):
    loop = asyncio.get_running_loop()

    async def attempt(sequence: list[Step]) -> None:
        async with FakeRegistry() as own:
            program = Program(tmp_path_factory.mktemp("store"), own)
            await program.start()
            try:
                await run(program, own, sequence)
                await check(program)
            finally:
                await program.stop()

    @settings(max_examples=10, deadline=None)
    @given(steps)
    def explore(sequence: list[Step]) -> None:
        asyncio.run_coroutine_threadsafe(attempt(sequence), loop).result()

    await asyncio.to_thread(explore)
