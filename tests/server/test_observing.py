"""Monitoring: metrics, health checks, one log line per request."""

import asyncio
import json
import re

import pytest
from structlog.testing import capture_logs

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault

BLOB = bytes(range(256)) * 4096

NAMES = [
    "pullcache_requests_total",
    "pullcache_request_duration_seconds_count",
    "pullcache_response_bytes_total",
    "pullcache_upstream_requests_total",
    "pullcache_upstream_bytes_total",
    "pullcache_upstream_first_byte_seconds_count",
    "pullcache_downloads_in_progress",
    "pullcache_downloads_total",
    "pullcache_digest_mismatches_total",
    "pullcache_store_bytes",
    "pullcache_store_limit_bytes",
    "pullcache_store_blobs",
    "pullcache_store_reserved_bytes",
    "pullcache_store_pinned_bytes",
    "pullcache_store_oldest_use_timestamp_seconds",
    "pullcache_evictions_total",
    "pullcache_evicted_bytes_total",
    "pullcache_uncached_total",
    "pullcache_build_info",
]


async def test_every_series_exists_from_the_start(program):
    answer = await program.ask("/metrics")
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain")
    text = answer.body.decode()
    for name in NAMES:
        assert re.search(rf"^{name}(\{{.*\}})? \d", text, re.MULTILINE), name
    assert "_created" not in text


async def test_requests_and_bytes_are_counted_by_source(registry, program):
    digest = registry.add_blob(BLOB)
    for _ in range(3):
        await program.blob(digest)
        await program.wait_for_downloads()
    count = "pullcache_requests_total"
    assert await program.metric(count, kind="blob", cache="miss", status="200") == 1
    assert await program.metric(count, kind="blob", cache="hit", status="200") == 2
    sent = "pullcache_response_bytes_total"
    assert await program.metric(sent, kind="blob", cache="hit") == 2 * len(BLOB)
    assert await program.metric(sent, kind="blob", cache="miss") == len(BLOB)
    assert await program.metric("pullcache_upstream_bytes_total") == len(BLOB)
    assert await program.metric("pullcache_store_bytes") >= len(BLOB)
    assert await program.metric("pullcache_store_blobs") == 1
    assert await program.metric("pullcache_downloads_total", result="stored") == 1
    assert await program.metric("pullcache_request_duration_seconds_count", kind="blob") == 3


async def test_a_reload_enables_distributions_metrics_with_the_counts_so_far(registry, program):
    image = registry.add_image(layers=[BLOB])
    for _ in range(2):
        await program.pull(image)
        await program.wait_for_downloads()
    assert b"registry_proxy" not in (await program.ask("/metrics")).body
    assert await program.reload(server={"registry_proxy_metrics": True})
    blobs = len(image.layers) + 1
    for name, count in {"requests": 2 * blobs, "hits": blobs, "misses": blobs}.items():
        assert await program.metric(f"registry_proxy_{name}_total", type="blob") == count
    pulled = "registry_proxy_pulled_bytes_total"
    by_kind = {kind: await program.metric(pulled, type=kind) for kind in ("blob", "manifest")}
    assert by_kind["blob"] >= len(BLOB)
    assert by_kind["manifest"] > 0
    ours = "pullcache_upstream_bytes_total"
    assert by_kind == {kind: await program.metric(ours, kind=kind) for kind in by_kind}
    for kind, size in by_kind.items():
        assert await program.metric("registry_proxy_pushed_bytes_total", type=kind) == 2 * size


async def test_upstream_requests_are_counted_by_kind_and_status(registry, program):
    await program.pull(registry.add_image())
    count = "pullcache_upstream_requests_total"
    assert await program.metric(count, kind="manifest", status="200") == registry.pulls
    assert await program.metric(count, kind="token", status="200") == registry.count("/token")
    total = await program.metric(count)
    assert total == len(registry.requests)
    async with registry.down():
        await program.manifest("library/other")
    assert await program.metric(count, status="error") >= 1


async def test_the_pull_limit_is_exported(registry, program):
    registry.pull_limit = 50
    await program.manifest(registry.add_image())
    assert await program.metric("pullcache_upstream_ratelimit_limit") == 50
    assert await program.metric("pullcache_upstream_ratelimit_remaining") == 49


async def test_p16_many_missing_names_create_no_series(registry, program):
    async def series() -> set[bytes]:
        lines = (await program.ask("/metrics")).body.splitlines()
        return {line.rpartition(b" ")[0] for line in lines if not line.startswith(b"#")}

    await program.manifest("library/none")
    await program.blob(digest_of(b"none"), "library/none")
    await series()
    before = await series()
    for n in range(50):
        await program.manifest(f"library/none{n}")
        await program.blob(digest_of(b"none"), f"library/none{n}")
    assert await series() == before


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
async def test_health_checks_need_no_upstream(registry, program, path):
    async with registry.down():
        answer = await program.ask(path)
    assert answer.status == 200
    assert (await program.ask(path, "HEAD")).status == 200


async def test_an_unknown_path_is_404(program):
    for path in ("/", "/admin", "/v1/images", "/metrics/x", "/favicon.ico"):
        assert (await program.ask(path)).status == 404


async def test_a_request_is_logged_once_with_its_fields(registry, program, logged):
    digest = registry.add_blob(BLOB)
    await program.blob(digest)
    await program.wait_for_downloads()
    logged.clear()
    await program.blob(digest)
    await program.blob(digest_of(b"none"))
    hit, unknown = logged
    assert (hit["method"], hit["status"], hit["cache"]) == ("GET", 200, "hit")
    assert (hit["upstream"], hit["bytes"]) == ("docker.io", len(BLOB))
    assert digest in str(hit["path"])
    assert hit["client"] == "127.0.0.1"
    assert isinstance(hit["seconds"], float)
    assert unknown["status"] == 404
    assert "does not have it" in str(unknown["problem"])
    json.dumps(logged)


async def test_secrets_are_in_no_log_and_no_response(registry, make_program):
    registry.tokens.users["bob"] = "CANARY-password"
    registry.add_image("me/secret")
    registry.repository("me/secret").private = True
    with capture_logs() as logged:
        program = await make_program(
            upstreams={
                "docker.io": {
                    "url": registry.url,
                    "username": "bob",
                    "password": "CANARY-password",
                }
            }
        )
        image = registry.add_image("me/secret")
        await program.pull(image)
        registry.fail("", Fault(status=500, body=b""), times=20)
        answers = [
            await program.manifest("me/other"),
            await program.ask("/metrics"),
            await program.blob(digest_of(b"none"), "me/secret"),
            await program.ask("/v2/_catalog"),
        ]
    text = repr(logged) + repr([(answer.headers, answer.body) for answer in answers])
    assert "CANARY" not in text
    tokens = {seen.headers.get("Authorization", "Bearer ?")[7:] for seen in registry.requests}
    assert not [token for token in tokens if len(token) > 8 and token in text]


async def test_a_scrape_shows_a_running_download(registry, program):
    digest = registry.add_blob(BLOB)
    release = asyncio.Event()
    registry.fail(registry.body_of(digest), Fault(stall_at=1000, until=release))
    async with program.opened(f"/v2/library/app/blobs/{digest}") as response:
        assert await program.metric("pullcache_downloads_in_progress") == 1
        assert await program.metric("pullcache_store_reserved_bytes") >= len(BLOB)
        release.set()
        await response.read()
    await program.wait_for_downloads()
    assert await program.metric("pullcache_store_reserved_bytes") == 0


async def test_request_lines_name_repository_reference_client_and_platform(
    registry, program, logged
):
    image = registry.add_image("me/app")
    agent = "docker/27.5.1 go/go1.22 kernel/6.1.0 os/linux arch/arm64 UpstreamClient(x)"
    await program.manifest(image, image.tag, User_Agent=agent)
    await program.blob(image.layers[0], "me/app", User_Agent="containerd/v2.0.5")
    await program.ask("/v2/")
    manifest, blob, ping = [line for line in logged if line["event"] == "request"][-3:]
    assert (manifest["repository"], manifest["reference"]) == ("me/app", image.tag)
    assert (manifest["agent"], manifest["platform"]) == ("docker/27.5.1", "linux/arm64")
    assert (blob["reference"], blob["agent"]) == (image.layers[0], "containerd/v2.0.5")
    assert "platform" not in blob
    assert not {"repository", "reference", "agent"} & ping.keys()
