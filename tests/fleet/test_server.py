"""What a node says of a server that it cannot use."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError as RedisConnectionError,
    ResponseError,
)
from structlog.testing import capture_logs

from proxy.config import FleetSettings
from proxy.config.values import OptionalUrl, ValkeyUrl
from proxy.errors import ConfigError
from proxy.fleet.server import explain, read_ca, read_password
from proxy.fleet.valkey import ValkeyDirectory
from tests.fleet.conftest import wait_until
from tests.support.redis_server import RedisServer


def settings_of(**values: Any) -> FleetSettings:
    return FleetSettings(
        valkey=ValkeyUrl("unix:///nowhere.sock"),
        address=OptionalUrl("http://127.0.0.1:1"),
        **values,
    )


async def wait_for_reason(node: ValkeyDirectory, logs: list[Any], part: str) -> None:
    """Ask until the log says that the node is blind, with this in the reason."""
    await wait_until(lambda: any(part in line.get("reason", "") for line in logs), node)
    assert node.is_blind


async def test_a_replica_is_not_taken_for_a_server(nodes):
    nodes.server.command("REPLICAOF", "127.0.0.1", "9")
    with capture_logs() as logs:
        node = await nodes.start(1)
        await wait_for_reason(node, logs, "read-only replica")
    nodes.server.command("REPLICAOF", "NO", "ONE")
    await wait_until(lambda: not node.is_blind, node)


async def test_a_server_without_memory_is_named(nodes):
    nodes.server.command("CONFIG", "SET", "maxmemory", "1")
    with capture_logs() as logs:
        await wait_for_reason(await nodes.start(1), logs, "maxmemory")


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (TimeoutError(), "did not answer"),
        (AuthenticationError("x"), "valkey_password_file"),
        (BusyLoadingError("x"), "still loading"),
        (RedisConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED]"), "fleet.valkey_ca_file"),
        (RedisConnectionError("Error 104: Connection reset by peer"), "valkeys://"),
        (ResponseError("NOAUTH Authentication required."), "valkey_password_file"),
        (ResponseError("Write commands not allowed after non deterministic commands"), "too old"),
        (ResponseError("Protocol error: unauthenticated multibulk length"), "valkey_password_file"),
        (RedisConnectionError("invalid username-password pair"), "valkey_password_file"),
        (ResponseError("MOVED 1 10.0.0.1:6379"), "cluster"),
        (ResponseError("ERR strange"), "ERR strange"),
        (RedisConnectionError("refused"), "cannot be reached: refused"),
        (ConfigError("fleet.valkey_password_file: x: gone"), "gone"),
    ],
)
def test_an_error_of_the_server_says_what_to_do(error, part):
    assert part in explain(error, 0.5)


def test_files_that_cannot_be_read_are_errors_of_the_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match="valkey_password_file"):
        read_password(settings_of(valkey_password_file=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="valkey_ca_file"):
        read_ca(settings_of(valkey_ca_file=str(tmp_path / "gone")))
    assert read_ca(settings_of()) == ""


def test_the_server_of_the_tests_is_real(server: RedisServer):
    assert server.command("PING") == b"+PONG\r\n"


async def test_a_node_stops_at_whatever_moment_of_a_question_it_is_cancelled(nodes):
    node = await nodes.start(1)

    async def ask() -> None:
        while True:
            await node.join()

    for turns in range(200):
        task = asyncio.get_running_loop().create_task(ask())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        _, running = await asyncio.wait([task], timeout=20)
        assert not running, f"cancelled after {turns} turns of the loop, it asks on"
