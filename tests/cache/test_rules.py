"""Rules by repository in the running program: freshness, tags that never move, prefetch, reload."""

import asyncio

from proxy.cli.api_client import AdminClient
from proxy.storage import space
from tests.support.commands import run_on

LAYER = b"x" * 50_000
MINUTE, HOUR, YEAR = 60.0, 3600.0, 366 * 86_400.0


async def test_each_repository_has_its_ttl(registry, make_program):
    program = await make_program(
        rules=[{"images": ["docker.io/me/*"], "ttl": "6h"}], manifests={"ttl": "10m"}
    )
    for name in ("me/app", "you/app"):
        registry.add_image(name, layers=[LAYER])
        await program.manifest(name)
    program.clock.advance(HOUR)
    mine, yours = await program.manifest("me/app"), await program.manifest("you/app")
    assert mine.headers["Cache-Status"] == "pullcache; hit"
    assert mine.headers["Cache-Control"] == "public, max-age=21600"
    assert "revalidated" in yours.headers["Cache-Status"]


async def test_upstream_is_never_asked_again_about_a_tag_that_never_moves(registry, make_program):
    program = await make_program(
        rules=[{"images": ["docker.io/*"], "immutable": ["v*"]}], manifests={"ttl": "1m"}
    )
    first = registry.add_image("me/app", "v1", layers=[LAYER])
    answer = await program.manifest("me/app", "v1")
    registry.add_image("me/app", "v1", layers=[b"moved"])
    asked = registry.count("manifests/v1")
    for seconds in (YEAR, -2 * YEAR):
        program.clock.advance(seconds)
        answer = await program.manifest("me/app", "v1")
        assert answer.headers["Docker-Content-Digest"] == first.digest
        assert answer.headers["Cache-Status"] == "pullcache; hit"
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    preloaded = await run_on(program, "preload", "me/app:v1")
    assert preloaded.exit_code == 0, preloaded.output
    assert registry.count("manifests/v1") == asked


async def test_refresh_asks_about_a_tag_that_never_moves(registry, make_program):
    program = await make_program(rules=[{"images": ["docker.io/*"], "immutable": ["v*"]}])
    registry.add_image("me/app", "v1", layers=[LAYER])
    await program.manifest("me/app", "v1")
    moved = registry.add_image("me/app", "v1", layers=[b"moved"])
    done = await run_on(program, "refresh", "me/app:v1")
    assert done.exit_code == 0, done.output
    answer = await program.manifest("me/app", "v1")
    assert answer.headers["Docker-Content-Digest"] == moved.digest


async def test_a_rule_switches_prefetch_off_and_on(registry, make_program):
    program = await make_program(
        rules=[{"images": ["docker.io/me/*"], "prefetch": "layers"}], fetch={"prefetch": "off"}
    )
    for name, count in (("you/app", 0), ("me/app", 1)):
        image = registry.add_image(name, layers=[name.encode() * 1000])
        await program.manifest(name)
        await program.wait_for_downloads()
        assert registry.count(registry.body_of(image.layers[0])) == count


async def test_a_reload_applies_other_rules(registry, make_program):
    program = await make_program(manifests={"ttl": "10m"})
    registry.add_image("me/app", layers=[LAYER])
    await program.manifest("me/app")
    assert await program.reload(rules=[{"images": ["docker.io/me/*"], "ttl": "6h"}])
    program.clock.advance(HOUR)
    assert (await program.manifest("me/app")).headers["Cache-Status"] == "pullcache; hit"


async def test_images_over_their_share_go_first_when_room_is_needed(
    registry, make_program, monkeypatch
):
    monkeypatch.setattr(space, "QUOTA_COST", 60.0)  # however slow this machine is
    program = await make_program(
        store={"max_size": "10MB"}, rules=[{"images": ["docker.io/ci/*"], "max_share": "20%"}]
    )
    base = registry.add_image("me/base", layers=[bytes([1]) * 2_000_000])
    await program.pull(base)
    for number in range(5):
        await program.pull(
            registry.add_image("ci/build", f"n{number}", [bytes([9, number]) * 800_000])
        )
        await program.wait_for_downloads()
    assert base.layers[0] in program.stored()
    api = AdminClient(program.root)
    found = await asyncio.to_thread(lambda: api.get("/api/v1/events", action="evict"))
    assert {one["detail"] for one in found} == {"quota"}
    assert all(name.startswith("docker.io/ci/build") for one in found for name in one["images"])
