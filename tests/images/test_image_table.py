"""Orders and filters of images, by the table of all of them."""

import asyncio

import pytest

from proxy.cli.api_client import AdminClient
from proxy.errors import BusyError, InvalidRequestError
from proxy.images import table as table_module
from tests.support.program import Program

KIB = 1024


async def names(program: Program, **query: object) -> list[str]:
    client = AdminClient(program.root)
    found = await asyncio.to_thread(
        lambda: [*client.stream("GET", "/api/v1/images", **query)]  # type: ignore[arg-type]
    )
    return [image["name"] for image in found]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take any table for a quick one, however busy the machine is."""
    monkeypatch.setattr(table_module, "QUICK_BUILD_TIME", 30.0)


@pytest.fixture
async def filled(registry, program: Program) -> Program:
    """Three images: `big` shares a layer with `small`, `mid` is alone and incomplete."""
    shared = b"s" * 40 * KIB
    big = registry.add_image("library/big", layers=[shared, b"b" * 30 * KIB])
    small = registry.add_image("library/small", layers=[shared])
    mid = registry.add_image("me/mid", layers=[b"m" * 50 * KIB])
    await program.pull(big)
    await program.manifest(mid)  # without its layers
    for _ in range(2):
        program.clock.advance(700)
        await program.pull(small)
    await program.wait_for_downloads()
    return program


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("size", ["big:latest", "small:latest", "me/mid:latest"]),
        ("unique", ["big:latest", "small:latest", "me/mid:latest"]),
        ("pulls", ["small:latest", "big:latest", "me/mid:latest"]),
    ],
)
async def test_images_are_listed_in_an_order(filled, order, expected):
    assert await names(filled, order=order, limit=2) == expected[:2]
    # The next page follows the last image of the one before.
    assert await names(filled, order=order, limit=2, after=expected[1]) == expected[2:]


async def test_images_are_listed_by_their_last_pull(filled):
    assert (await names(filled, order="pulled"))[0] == "small:latest"
    assert (await names(filled, order="idle"))[-1] == "small:latest"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({"upstream": "docker.io"}, ["big:latest", "me/mid:latest", "small:latest"]),
        ({"upstream": "ghcr.io"}, []),
        ({"badge": "official"}, ["big:latest", "small:latest"]),
        ({"state": "partial"}, ["me/mid:latest"]),
        ({"state": "complete"}, ["big:latest", "small:latest"]),
        ({"platform": "linux/amd64", "filter": "sma"}, ["small:latest"]),
        ({"platform": "linux/s390x"}, []),
        ({"pinned": True}, ["gone:1", "small:latest"]),
        ({"state": "absent"}, ["gone:1"]),
        ({"pulled": True, "pinned": False}, ["big:latest"]),
    ],
)
async def test_images_are_selected(filled, query, expected):
    client = AdminClient(filled.root)
    pinned = {"images": ["small", "gone:1"]}
    await asyncio.to_thread(client.post, "/api/v1/images/pin", pinned)
    found = await names(filled, **query)
    if query == {"pulled": True, "pinned": False}:
        assert set(expected) <= set(found)
    else:
        assert [name for name in found if name != "gone:1" or "gone:1" in expected] == expected


async def test_a_page_after_an_image_that_is_gone_is_an_error(filled):
    with pytest.raises(InvalidRequestError, match="start again"):
        await names(filled, order="size", after="gone:latest")


async def test_a_change_is_seen_by_the_next_list_of_a_small_store(registry, filled):
    assert "new:latest" not in await names(filled, order="size")
    await filled.pull(registry.add_image("library/new", layers=[b"n" * 90 * KIB]))
    await filled.wait_for_downloads()
    assert (await names(filled, order="size"))[0] == "new:latest"


async def test_a_large_store_is_listed_by_its_last_table(registry, filled, monkeypatch):
    monkeypatch.setattr(table_module, "QUICK_BUILD_TIME", 0.0)
    with pytest.raises(BusyError, match="try again"):
        await names(filled, order="size")
    async with asyncio.timeout(10):
        while True:
            try:
                assert (await names(filled, order="size"))[0] == "big:latest"
                break
            except BusyError:
                await asyncio.sleep(0.01)
    await filled.pull(registry.add_image("library/new", layers=[b"n" * 90 * KIB]))
    assert (await names(filled, order="size"))[0] in ("big:latest", "new:latest")


async def test_the_platforms_of_all_images_are_known_after_the_first_list(filled):
    client = AdminClient(filled.root)
    assert await asyncio.to_thread(client.get, "/api/v1/images/platforms") == []
    await names(filled, order="size")
    assert "linux/amd64" in await asyncio.to_thread(client.get, "/api/v1/images/platforms")
