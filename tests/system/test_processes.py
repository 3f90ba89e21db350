"""The helpers that run servers for the other tests."""

import errno
import socket
from pathlib import Path

import pytest

from tests.support.ports import reserve_port
from tests.system.servers import resumable_bytes


class Owner: ...


def test_only_a_server_can_bind_a_reserved_port():
    owner = Owner()
    address = ("127.0.0.1", reserve_port(owner))
    with socket.socket() as client, pytest.raises(OSError, match="in use") as caught:
        client.bind(address)
    assert caught.value.errno == errno.EADDRINUSE
    for _ in range(2):
        with socket.create_server(address), socket.create_connection(address):
            pass
    del owner
    with socket.create_server(address, reuse_port=True):
        pass


def test_blobs_that_are_committed_meanwhile_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = tmp_path / "ingest" / "sha256-0.state"
    monkeypatch.setattr(Path, "glob", lambda *_: [state])
    assert resumable_bytes(tmp_path) == 0
