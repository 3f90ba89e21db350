"""The directory in servers as operators run them: with a password, with TLS, behind Sentinels, replaced, not yet up."""

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.config.values import ValkeyUrl
from proxy.oci.digest import Digest
from tests.fleet.conftest import PATIENCE, locate_until
from tests.support.certificates import Authority
from tests.support.ports import reserve_port
from tests.support.redis_server import MISSING, PROGRAM, RedisServer

BLOB = Digest.from_content(b"blob")
HUB = "docker.io"

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=MISSING)


@contextmanager
def running(directory: Path, *options: str | Path) -> Iterator[RedisServer]:
    """Run a server with these options."""
    directory.mkdir()
    server = RedisServer(directory, *map(str, options))
    try:
        server.start()
        yield server
    finally:
        server.close()


def reasons(logs: Any) -> list[str]:
    return [line["reason"] for line in logs if line["event"] == "fleet_blind"]


async def test_a_wrong_password_is_named_and_the_right_one_is_taken_without_a_restart(
    nodes, tmp_path
):
    password = tmp_path / "password"
    password.write_text("wrong\n")
    with running(tmp_path / "server", "--requirepass", "right") as server:
        with capture_logs() as logs:
            node = await nodes.start(
                1, valkey=ValkeyUrl(server.url), valkey_password_file=str(password)
            )
        assert node.is_blind
        assert "fleet.valkey_password_file" in reasons(logs)[0]
        password.write_text("right\n")
        await nodes.until(lambda: not node.is_blind)


async def test_a_server_that_is_not_up_at_the_start_is_joined_when_it_is(nodes, server):
    server.kill()
    one, two = await nodes.start(1), await nodes.start(2)
    assert one.is_blind
    async with two.downloading(HUB, BLOB) as download:
        assert await download.locate() is None
    server.start()
    await nodes.until(lambda: len(one.members) == len(two.members) == 1)
    # What a node has got while it was alone is announced then.
    async with one.downloading(HUB, BLOB) as download:
        assert (await locate_until(download)).is_whole


async def test_a_server_with_tls_is_trusted_by_its_ca_and_by_no_other(nodes, tmp_path):
    authority, port = Authority(tmp_path / "authority"), reserve_port(nodes)
    certificate, key = authority.issue("redis", "IP:127.0.0.1")
    tls = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key)
    with running(tmp_path / "server", *tls, "--tls-auth-clients", "no"):
        url = ValkeyUrl(f"valkeys://127.0.0.1:{port}/0")
        ca = authority.ca.read_text()
        one, two = await nodes.start(1, valkey=url, ca=ca), await nodes.start(2, valkey=url, ca=ca)
        await nodes.until(lambda: len(one.members) == len(two.members) == 1)
        other = Authority(tmp_path / "other")
        with capture_logs() as logs:
            stranger = await nodes.start(3, valkey=url, ca=other.ca.read_text())
        assert stranger.is_blind
        assert "certificate" in reasons(logs)[0].lower()


@contextmanager
def sentinel(directory: Path, port: int, master: int) -> Iterator[None]:
    """Run a Sentinel that watches a server; two of them decide on a failover."""
    assert PROGRAM is not None
    directory.mkdir()
    config = directory / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {master} 2\n"
        "sentinel down-after-milliseconds mymaster 1000\nsentinel failover-timeout mymaster 5000\n"
    )
    with subprocess.Popen([PROGRAM, config, "--sentinel"], stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def test_sentinels_name_the_replica_after_the_primary_has_died(nodes, tmp_path):
    ports = [reserve_port(nodes) for _ in range(2)]
    watchers = [reserve_port(nodes) for _ in range(2)]
    url = ValkeyUrl("valkey://" + ",".join(f"127.0.0.1:{port}" for port in watchers) + "/0")
    with ExitStack() as stack:
        primary = stack.enter_context(running(tmp_path / "primary", "--port", str(ports[0])))
        of = ("--port", str(ports[1]), "--replicaof", "127.0.0.1", str(ports[0]))
        replica = stack.enter_context(
            running(tmp_path / "replica", *of, "--repl-diskless-sync-delay", "0")
        )
        for port in watchers:
            stack.enter_context(sentinel(tmp_path / f"sentinel{port}", port, ports[0]))
        one, two = await nodes.start(1, valkey=url), await nodes.start(2, valkey=url)
        await nodes.until(lambda: len(one.members) == len(two.members) == 1)
        async with one.downloading(HUB, BLOB) as first:
            assert await first.locate() is None
            await nodes.until(lambda: b"state=online" in primary.command("INFO", "replication"))
            await nodes.until(lambda: other_watcher_known(watchers))
            primary.kill()
            await nodes.until(lambda: b"role:master" in replica.command("INFO", "replication"))
            await nodes.until(lambda: not one.is_blind and not two.is_blind)
            # The download has gone on, and keeps its place.
            await one._renew()
            async with two.downloading(HUB, BLOB) as second:
                found = await locate_until(second)
                assert found.member.address.endswith(":1")


def other_watcher_known(ports: list[int]) -> bool:
    """Tell whether each Sentinel knows the other one and the replica."""
    answers = [
        subprocess.run(
            ["redis-cli", "-p", str(port), "sentinel", "master", "mymaster"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        ).stdout.split()
        for port in ports
    ]
    return all(
        "num-other-sentinels" in words
        and words[words.index("num-other-sentinels") + 1] == "1"
        and words[words.index("num-slaves") + 1] == "1"
        for words in answers
    )
