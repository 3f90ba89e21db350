"""Reload: what changes at once, what finishes with the old configuration, and failures."""

import asyncio
import gc
import ssl
import threading
from pathlib import Path
from typing import Any

import pytest
import trustme
from structlog.testing import capture_logs

from proxy.config import Config, keep_restart_only_keys, load
from proxy.errors import ConfigError
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

LAYER = bytes(range(256)) * 4096
SUCCESSFUL = "pullcache_config_last_reload_successful"


def docker_hub(registry: FakeRegistry, **settings: Any) -> dict[str, Any]:
    """Return a section `upstreams` with this registry as docker.io."""
    return {"docker.io": {"url": registry.url, **settings}}


async def test_requests_after_a_reload_go_to_the_new_upstream(registry, program):
    old = registry.add_image("library/app", layers=[b"old"])
    async with FakeRegistry() as other:
        new = other.add_image("library/new", layers=[b"new"])
        assert (await program.manifest(new)).status == 404
        before = len(registry.requests)
        assert await program.reload(upstreams=docker_hub(other))
        await program.pull(new)
        assert len(registry.requests) == before
        assert (await program.manifest(old)).status == 404


async def test_a_running_download_keeps_its_upstream(registry, program):
    image = registry.add_image(layers=[LAYER])
    release = asyncio.Event()
    registry.fail(registry.body_of(image.layers[0]), Fault(stall_at=len(LAYER) // 2, until=release))
    await program.manifest(image)
    async with (
        FakeRegistry() as other,
        program.opened(f"/v2/{image.repository}/blobs/{image.layers[0]}") as response,
    ):
        beginning = await response.content.readexactly(1000)
        assert await program.reload(upstreams=docker_hub(other))
        gc.collect()
        release.set()
        assert beginning + await response.content.read() == LAYER
        await program.wait_for_downloads()
        assert image.layers[0] in program.stored()
        assert other.count("blobs") == 0


async def test_the_sessions_of_a_replaced_upstream_are_closed_after_its_last_use(registry, program):
    image = registry.add_image(layers=[LAYER])
    release = asyncio.Event()
    registry.fail(registry.body_of(image.layers[0]), Fault(stall_at=5000, until=release))
    await program.manifest(image)
    sessions = program.running._core.upstream_factory._open_sessions
    (before,) = sessions
    async with FakeRegistry() as other:
        async with program.opened(f"/v2/{image.repository}/blobs/{image.layers[0]}") as response:
            await response.content.readexactly(1000)
            assert await program.reload(upstreams=docker_hub(other))
            gc.collect()
            assert before in sessions, "its download is still running"
            release.set()
            await response.content.read()
        await program.wait_for_downloads()
        async with asyncio.timeout(10):
            while before in sessions:
                gc.collect()
                await program.ask("/healthz")
        assert len(sessions) == 1


async def test_an_unchanged_upstream_keeps_its_tokens(registry, program):
    image = registry.add_image(layers=[b"one"])
    await program.pull(image)
    tokens = registry.count("/token")
    assert tokens
    program.clock.advance(3600)
    assert await program.reload(manifests={"ttl": "1m"})
    assert (await program.manifest(image)).status == 200
    assert registry.count("/token") == tokens
    assert await program.reload(upstreams=docker_hub(registry, deny=["none"]))
    program.clock.advance(3600)
    assert (await program.manifest(image)).status == 200
    assert registry.count("/token") == tokens + 1


async def test_p15_a_ca_file_is_read_again(make_program, tmp_path):
    old, new, file = trustme.CA(), trustme.CA(), tmp_path / "ca.pem"
    old.cert_pem.write_to_path(str(file))
    context = server_tls(new)
    async with FakeRegistry(tls=context) as secure:
        image = secure.add_image()
        program = await make_program(upstreams=docker_hub(secure, ca_file=str(file)))
        assert (await program.manifest(image)).status == 503
        new.cert_pem.write_to_path(str(file))
        assert await program.reload()
        assert (await program.manifest(image)).status == 200


def server_tls(authority: trustme.CA) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


async def test_ttls_change(registry, program):
    image = registry.add_image()
    await program.manifest(image)
    program.clock.advance(60)
    assert (await program.manifest(image)).headers["Cache-Status"] == "pullcache; hit"
    assert await program.reload(manifests={"ttl": "30s"})
    answer = await program.manifest(image)
    assert "revalidated" in answer.headers["Cache-Status"]
    assert answer.headers["Cache-Control"] == "public, max-age=30"


async def test_the_allowed_repositories_change(registry, program):
    image = registry.add_image("secret/app")
    assert (await program.manifest(image)).status == 200
    assert await program.reload(upstreams=docker_hub(registry, deny=["secret/*"]))
    assert (await program.manifest(image)).code == "DENIED"


async def test_an_upstream_is_added_and_removed(registry, program):
    async with FakeRegistry() as other:
        image = other.add_image("me/app")
        path = f"/v2/extra.example/me/app/manifests/{image.tag}"
        assert (await program.ask(path)).status == 403
        assert await program.reload(
            upstreams={**docker_hub(registry), "extra.example": {"url": other.url}}
        )
        assert (await program.ask(path)).status == 200
        assert await program.metric("pullcache_upstream_up", upstream="extra.example") == 1
        assert await program.reload(upstreams=docker_hub(registry))
        assert (await program.ask(path)).status == 403
        metrics = (await program.ask("/metrics")).body.decode()
        assert 'pullcache_upstream_up{upstream="extra.example"}' not in metrics
        assert 'pullcache_upstream_up{upstream="docker.io"} 1.0' in metrics


async def test_a_running_request_finishes_with_the_old_upstream(registry, program):
    release = asyncio.Event()
    async with FakeRegistry() as other:
        image = other.add_image("me/app")
        other.fail("GET /v2/me/app/manifests", Fault(until_headers=release))
        assert await program.reload(
            upstreams={**docker_hub(registry), "extra.example": {"url": other.url}}
        )
        async with asyncio.TaskGroup() as group:
            path = f"/v2/extra.example/me/app/manifests/{image.tag}"
            request = group.create_task(program.ask(path))
            await other.until(lambda: other.count("GET /v2/me/app/manifests") == 1)
            assert await program.reload(upstreams=docker_hub(registry))
            gc.collect()
            release.set()
        assert request.result().digest == image.digest


async def test_a_smaller_limit_evicts_at_once(registry, program):
    for number in range(4):
        await program.blob(registry.add_blob(bytes([number]) * 1_000_000))
    await program.wait_for_downloads()
    assert await program.reload(store={"max_size": "3MB"})
    assert program.disk_usage() <= 3_000_000
    assert await program.metric("pullcache_store_limit_bytes") == 3_000_000


async def test_offline_is_switched_only_if_its_key_changed(registry, program):
    image = registry.add_image()
    program.running._core.offline.set_offline(is_offline=True)
    assert await program.reload(manifests={"ttl": "1m"})
    assert (await program.manifest(image)).status == 503
    assert await program.reload(offline=True)
    assert await program.reload(offline=False)
    assert (await program.manifest(image)).status == 200


async def test_the_info_shows_the_new_configuration(registry, program):
    async with FakeRegistry() as other:
        assert await program.reload(
            upstreams={**docker_hub(registry), "extra.example": {"url": other.url}}
        )
        assert sorted(program.running.info.upstreams) == ["docker.io", "extra.example"]
        assert program.running.config.upstreams["extra.example"].url == other.url


async def test_more_downloads_may_run_after_a_reload(registry, make_program):
    program = await make_program(fetch={"max_downloads": 1})
    held, small = registry.add_blob(LAYER), registry.add_blob(b"small")
    release = asyncio.Event()
    registry.fail(registry.body_of(held), Fault(stall_at=len(LAYER) // 2, until=release))
    async with (
        program.opened(f"/v2/library/app/blobs/{held}") as response,
        asyncio.TaskGroup() as group,
    ):
        await response.content.readexactly(1000)
        waiting = group.create_task(program.blob(small))
        await registry.until(lambda: registry.bytes_sent(registry.body_of(small)) > 0)
        done, _ = await asyncio.wait((waiting,), timeout=0.2)
        assert not done
        assert await program.reload(fetch={"max_downloads": 2})
        assert (await waiting).is_whole
        release.set()
        await response.read()


BROKEN: list[dict[str, dict[str, Any]]] = [
    {"manifests": {"ttl": "soon"}},
    {"manifests": {"tll": "1m"}},
    {"upstreams": {"docker.io": {"url": "http://127.0.0.1:9", "ca_file": "/none.pem"}}},
    {"upstreams": {"docker.io": {"url": "http://127.0.0.1:9", "username": "me"}}},
    {
        "manifests": {"ttl": "1s"},
        "upstreams": {
            "docker.io": {"url": "http://127.0.0.1:9"},
            "late.example": {"url": "http://127.0.0.1:9", "ca_file": "/none.pem"},
        },
    },
]


@pytest.mark.parametrize("sections", BROKEN)
async def test_p03_a_broken_configuration_changes_nothing(registry, program, sections):
    image = registry.add_image()
    before = program.running.config
    time = "pullcache_config_last_reload_success_timestamp_seconds"
    loaded_at = await program.metric(time)
    with capture_logs() as lines:
        assert not await program.reload(**sections)
    (line,) = [line for line in lines if line["event"] == "config_reload_failed"]
    assert line["log_level"] == "error"
    assert line["reason"]
    assert program.running.config is before
    assert "last reload failed" in program.running.status_line
    assert await program.metric(SUCCESSFUL) == 0
    assert await program.metric("pullcache_config_reloads_total", result="failure") == 1
    assert await program.metric(time) == loaded_at
    await program.pull(image)


async def test_p03_a_corrected_configuration_applies(registry, program):
    assert not await program.reload(manifests={"ttl": "soon"})
    assert await program.reload(manifests={"ttl": "20s"})
    assert await program.metric(SUCCESSFUL) == 1
    assert await program.metric("pullcache_config_reloads_total", result="success") == 1
    assert "failed" not in program.running.status_line
    image = registry.add_image()
    assert (await program.manifest(image)).headers["Cache-Control"] == "public, max-age=20"


async def test_a_reload_that_crashes_changes_nothing_and_counts_as_an_internal_error(
    registry, make_program
):
    program = await make_program()

    def crash() -> Config:
        raise ZeroDivisionError

    with capture_logs() as lines:
        assert not await program.running.reload(crash)
    assert "config_reload_crashed" in [line["event"] for line in lines]
    await program.pull(registry.add_image())
    assert await program.metric("pullcache_internal_errors_total") == 1
    program.expected_internal_errors = 1


async def test_a_configuration_is_read_in_a_thread(program: Program):
    read_by = []

    def read() -> Config:
        read_by.append(threading.current_thread())
        return program.config()

    assert await program.running.reload(read)
    assert read_by != [threading.main_thread()]


async def test_keys_that_need_a_restart_are_named_and_keep_their_values(
    program: Program, tmp_path: Path
):
    before = program.running.config
    with capture_logs() as lines:
        assert await program.reload(
            server={"listen": ["127.0.0.1:1"], "admin_listen": ["127.0.0.1:2"]},
            log={"format": "json", "level": "debug"},
            store={"path": str(tmp_path / "elsewhere"), "min_free": "0B"},
        )
    keys = [line["key"] for line in lines if line["event"] == "restart_required"]
    assert keys == ["server.listen", "server.admin_listen", "log.format", "store.path"]
    after = program.running.config
    assert after.server == before.server
    assert after.log.format == before.log.format
    assert after.log.level == "debug"


def test_only_restart_only_keys_keep_their_values():
    old = load(None, {}, {}, is_root=True)
    new = load(
        None,
        {},
        {"store": {"path": "/elsewhere", "max_size": "1GB"}, "server": {"shutdown_timeout": "1s"}},
        is_root=True,
    )
    config, changed = keep_restart_only_keys(old, new)
    assert changed == ["store.path"]
    assert config.store.path == old.store.path
    assert config.store.max_size == new.store.max_size
    assert config.server.shutdown_timeout == new.server.shutdown_timeout
    assert keep_restart_only_keys(old, old) == (old, [])


def test_a_password_file_may_be_a_systemd_credential(tmp_path, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "hub").write_text("secret\n")
    login = {"username": "me", "password_file": "$CREDENTIALS_DIRECTORY/hub"}
    settings = load(None, {}, {"upstreams": {"docker.io": login}}).upstreams["docker.io"]
    assert settings.read_password() == "secret"
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(ConfigError, match=r"\$CREDENTIALS_DIRECTORY/hub: password_file: No such"):
        settings.read_password()
