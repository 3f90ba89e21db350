"""What the pages need of the admin API: lists, compressed bundles, exceptions, what ripens, usage."""

import asyncio
from typing import Any

import aiohttp
import pytest
from backports.zstd import decompress

from proxy.errors import NotFoundError
from tests.fakes.images import push_manifest
from tests.support.admin_api import APP, NATIVE, call
from tests.support.openapi import validate

DAY = 86_400.0


async def test_a_list_of_any_format_is_read(program):
    compose = "services:\n  web:\n    image: nginx:1.27\n  bad:\n    image: UPPER CASE\n"
    parsed = await call(program, "post", "/api/v1/preload/list", {"text": compose})
    validate(parsed, "ParsedList")
    assert parsed["format"] == "docker compose"
    assert [one["image"] for one in parsed["images"]] == ["nginx:1.27"]
    assert [(one["line"], one["kind"]) for one in parsed["problems"]] == [(5, "error")]


async def test_a_bundle_is_compressed_on_demand(registry, program):
    image = registry.add_image(layers=[b"x" * 300_000])
    await program.pull(image)
    await program.wait_for_downloads()
    bodies = []
    connector = aiohttp.UnixConnector(str(program.root / "admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        for compression in ("", "zstd"):
            body = {"images": ["app"], "compression": compression}
            async with session.post("http://localhost/api/v1/export", json=body) as response:
                assert response.status == 200
                bodies.append(await response.read())
    plain, compressed = bodies
    assert len(compressed) < len(plain) / 10
    assert await asyncio.to_thread(decompress, compressed) == plain


async def test_an_exception_is_removed_once(registry, make_program):
    program = await make_program(policy=[{"images": ["*"], "mode": "enforce", "deny_tags": ["*"]}])
    digest = push_manifest(registry, APP, [b"layer"], tag="v1", platform=NATIVE)
    image = f"docker.io/{APP}@{digest}"
    body = {"image": image, "seconds": DAY, "reason": "test"}
    await call(program, "post", "/api/v1/policy/exceptions", body)
    assert (await program.manifest(APP, digest)).status == 200
    await call(program, "post", "/api/v1/policy/exceptions/remove", {"image": image})
    assert (await call(program, "get", "/api/v1/policy"))["exceptions"] == []
    with pytest.raises(NotFoundError):
        await call(program, "post", "/api/v1/policy/exceptions/remove", {"image": image})


async def test_what_is_too_young_is_listed_until_it_is_ripe(registry, make_program):
    program = await make_program(
        policy=[{"images": ["*"], "mode": "enforce", "min_age": "3d"}],
        manifests={"ttl": "1s"},
    )
    old = push_manifest(registry, APP, [b"old"], tag="v1", platform=NATIVE)
    assert (await program.manifest(APP, "v1")).status == 200
    program.clock.advance(10 * DAY)
    new = push_manifest(registry, APP, [b"new"], tag="v1", platform=NATIVE)
    assert (await program.manifest(APP, "v1")).digest == old
    (one,) = await call(program, "get", "/api/v1/policy/ripening")
    validate(one, "RipeningTag")
    assert (one["image"], one["digest"]) == (f"docker.io/{APP}:v1", new)
    assert (one["served"], one["policy"], one["mode"]) == (old, 1, "enforce")
    assert one["ripe_at"] == one["since"] + 3 * DAY
    program.clock.advance(4 * DAY)
    assert await call(program, "get", "/api/v1/policy/ripening") == []


async def test_a_report_of_the_usage_may_be_an_older_one(registry, program):
    async def usage() -> dict[str, Any]:
        found: dict[str, Any] = await call(program, "get", "/api/v1/usage", max_age="60")
        validate(found, "StoreUsage")
        return found

    first = await usage()
    assert (first["upstreams"], first["partials"]) == ([], 0)
    await program.pull(registry.add_image(layers=[b"x" * 10_000]))
    await program.wait_for_downloads()
    assert await usage() == first
    program.clock.advance(61)
    await usage()
    async with asyncio.timeout(10):
        while not (latest := await usage())["upstreams"]:
            pass
    assert latest["at"] == first["at"] + 61
    assert latest["repositories"][0]["name"] == "app"
