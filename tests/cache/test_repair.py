"""What the scrub finds damaged is removed and fetched anew, pinned or not, while clients are served."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.cache import repair
from proxy.storage import scrub
from tests.fakes.content import FakeImage
from tests.support.commands import run_on
from tests.support.program import Program

Start = Callable[[], Awaitable[Program]]


@pytest.fixture
def start(
    make_program: Callable[..., Awaitable[Program]], monkeypatch: pytest.MonkeyPatch
) -> Start:
    """Return a function that starts the program with a scrub that reads everything at the start."""
    monkeypatch.setattr(scrub, "START_DELAY", 0.0)
    monkeypatch.setattr(scrub, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(repair, "RETRY_INTERVAL", 0.05)

    async def make() -> Program:
        return await make_program(store={"scrub": "30d"})

    return make


def path_of(program: Program, digest: str) -> Path:
    return program.root / "blobs" / "sha256" / digest[7:]


def damage(program: Program, *digests: str) -> None:
    for digest in digests:
        path = path_of(program, digest)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def is_whole(program: Program, digest: str) -> bool:
    try:
        return digest in program.stored()
    except AssertionError:
        return False


async def wait_until_whole(program: Program, *digests: str) -> None:
    for digest in digests:
        while not is_whole(program, digest):  # noqa: ASYNC110 (a test looks from outside)
            await asyncio.sleep(0.01)


async def wait_until_removed(program: Program, digest: str) -> None:
    while path_of(program, digest).exists():  # noqa: ASYNC110 (a test looks from outside)
        await asyncio.sleep(0.01)


async def pull(program: Program, **image: Any) -> FakeImage:
    pushed = program.registry.add_image(**image)
    await program.pull(pushed)
    await program.wait_for_downloads()
    return pushed


async def test_damaged_layers_configs_manifests_and_indexes_are_fetched_anew(start):
    program = await start()
    image = await pull(program, layers=[b"first" * 1000, b"second" * 1000], index=True)
    await program.stop()
    damaged = {*image.blobs, image.manifest, image.digest}
    damage(program, *damaged)
    program.registry.requests.clear()
    await program.start()
    await wait_until_whole(program, *damaged)
    await program.wait_for_downloads()
    # Nobody asked for it, and each was fetched once.
    for digest in damaged:
        assert len([one for one in program.registry.requests if one.line.endswith(digest)]) >= 1
    program.registry.requests.clear()
    await program.pull(image)
    assert not [one for one in program.registry.requests if "/blobs/" in one.line]


async def test_a_pin_stays_when_damaged_content_is_fetched_anew(start):
    program = await start()
    image = await pull(program, repository="library/app", layers=[b"layer" * 1000])
    await run_on(program, "pin", "app")
    pinned = await program.metric("pullcache_store_pinned_bytes")
    await program.stop()
    damaged = {*image.blobs, image.digest}
    damage(program, *damaged)
    await program.start()
    await wait_until_whole(program, *damaged)
    await program.wait_for_downloads()
    while await program.metric("pullcache_store_pinned_bytes") != pinned:
        pass
    (listed,) = [
        line for line in (await run_on(program, "images")).stdout.splitlines() if "app" in line
    ]
    assert "pinned" in listed


async def test_damage_that_cannot_be_repaired_yet_is_repaired_when_upstream_is_back(start):
    program = await start()
    image = await pull(program, layers=[b"layer" * 1000])
    await program.stop()
    damage(program, image.layers[0])
    program.sections["offline"] = True
    await program.start()
    await wait_until_removed(program, image.layers[0])
    # The rest is served meanwhile.
    assert (await program.manifest(image)).digest == image.digest
    assert (await program.blob(image.layers[0])).status == 404
    await program.reload(offline=False)
    await wait_until_whole(program, image.layers[0])


async def test_what_the_configuration_forbids_now_is_not_fetched_anew(start):
    program = await start()
    image = await pull(program, layers=[b"layer" * 1000])
    await program.stop()
    damage(program, image.layers[0])
    program.upstreams["docker.io"]["deny"] = ["*"]
    program.registry.requests.clear()
    await program.start()
    await wait_until_removed(program, image.layers[0])
    await asyncio.sleep(0.1)
    assert not [one for one in program.registry.requests if "/blobs/" in one.line]


async def test_clients_are_served_while_the_scrub_reads_and_repairs(start):
    program = await start()
    images = [
        await pull(program, repository=f"library/app{n}", layers=[b"%d" % n * 100_000])
        for n in range(10)
    ]
    await program.stop()
    damage(program, *(image.layers[0] for image in images[:5]))
    await program.start()
    while not all(is_whole(program, image.layers[0]) for image in images):
        for image in images[5:]:
            await program.pull(image)
    for image in images:
        await program.pull(image)


async def test_the_state_of_the_scrub_is_in_the_status(start):
    program = await start()
    image = await pull(program, layers=[b"layer" * 1000])
    await program.restart()
    while not await program.metric("pullcache_scrubbed_blobs_total", result="intact"):
        pass
    text = (await run_on(program, "status")).stdout
    assert re.search(r"^scrub      \d+% of the blobs read in this round$", text, re.MULTILINE)
    damage(program, image.layers[0])
    for _ in range(31):
        program.clock.advance(86400)
        await asyncio.sleep(0.02)
    while "the last one ended" not in (text := (await run_on(program, "status")).stdout):
        pass
    await program.reload(store={"scrub": "off"})
    while "scrub      off\n" not in (await run_on(program, "status")).stdout:
        pass
