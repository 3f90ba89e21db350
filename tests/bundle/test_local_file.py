"""Bundles in files that the daemon opens itself: what it may open, and that they are the same bundles."""

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from proxy.cli.api_client import AdminClient
from proxy.cli.files.bundle_input import describe_file
from proxy.errors import DigestMismatchError, FileUnreachableError, StorageError
from tests.fakes.content import digest_of
from tests.fakes.faults import flip
from tests.support.bundles import APP, LAYERS, export, layout, pull
from tests.support.program import Program

MIB = 1 << 20


async def ask(program: Program, path: str, document: dict[str, Any]) -> list[Any]:
    events = AdminClient(program.root).stream("POST", path, document)
    return await asyncio.to_thread(list, events)


async def test_what_is_written_to_a_file_is_what_would_be_sent(registry, program, tmp_path):
    image = registry.add_image(layers=(*LAYERS, os.urandom(20 * MIB)), index=True)
    await pull(program, image)
    target = tmp_path / "bundle.tar"
    target.touch()
    wanted = {"images": ["app"], "file": describe_file(target)}
    *_, last = await ask(program, "/api/v1/export/file", wanted)
    assert target.read_bytes() == await export(program, "app")
    assert last == {"done": target.stat().st_size}


async def test_a_bundle_is_read_from_its_parts(program, tmp_path):
    made, digest = layout(os.urandom(3 * MIB))
    bundle = made.tar()
    parts = [tmp_path / "b.000", tmp_path / "b.001"]
    parts[0].write_bytes(bundle[:700_001])
    parts[1].write_bytes(bundle[700_001:])
    wanted = {"files": [describe_file(part) for part in parts]}
    *_, report = await ask(program, "/api/v1/import/files", wanted)
    assert report["images"][0]["digest"] == digest
    assert (await program.manifest("library/app", "1")).digest == digest


def gone(file: Path) -> None:
    file.unlink()


def other(file: Path) -> None:
    file.rename(file.with_suffix(".kept"))
    file.write_bytes(b"another")


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("change", [gone, other, pipe])
@pytest.mark.parametrize("path", ["/api/v1/import/files", "/api/v1/export/file"])
async def test_what_is_another_file_to_the_daemon_is_left_alone(
    registry, program, tmp_path, path, change: Callable[[Path], None]
):
    await pull(program, registry.add_image())
    file = tmp_path / "file"
    file.write_bytes(layout(name=f"{APP}:1")[0].tar())
    described = describe_file(file)
    change(file)
    if change is pipe:
        described = describe_file(file)
    before = file.read_bytes() if change is other else b""
    wanted = {"files": [described]} if "import" in path else {"images": ["app"], "file": described}
    with pytest.raises(FileUnreachableError):
        await ask(program, path, wanted)
    assert change is not other or file.read_bytes() == before


async def test_files_are_named_on_the_socket_only(make_program, tmp_path):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    file = tmp_path / "file"
    file.write_bytes(layout()[0].tar())
    url = f"http://{program.admin_addresses[0]}/api/v1/import/files"
    async with program.session.post(url, json={"files": [describe_file(file)]}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "file_unreachable")
    assert program.stored() == set()


@pytest.fixture
def shared_socket() -> Iterator[socket.socket]:
    """A socket that every user can connect to; pytest's own directories are for one alone."""
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{directory}/admin")
        for path in (directory, f"{directory}/admin"):
            Path(path).chmod(0o777)
        yield bound


@pytest.mark.parametrize("user", [0, 65534])
async def test_files_are_named_by_the_daemon_s_user_and_root_alone(
    program, tmp_path, shared_socket: socket.socket, user: int
):
    """A unit may give the API to a group, which is not to read and write with the daemon's rights."""
    await program.stop()
    program.sockets["admin"] = [shared_socket]
    await program.start()
    file = tmp_path / "file"
    file.write_bytes(layout(name=f"{APP}:1")[0].tar())
    document = json.dumps({"files": [describe_file(file)]})
    url = "http://localhost/api/v1/import/files"
    curl = ["curl", "-sS", "--unix-socket", shared_socket.getsockname(), "--json", document, url]
    said = await asyncio.to_thread(subprocess.check_output, curl, user=user, cwd="/")
    if user == os.geteuid():
        assert program.stored()
    else:
        assert json.loads(said)["error"]["code"] == "file_unreachable"
        assert program.stored() == set()


async def test_a_blob_that_is_damaged_ends_the_export(registry, program, tmp_path):
    image = registry.add_image(layers=(os.urandom(3 * MIB),))
    await pull(program, image)
    damaged = program.root / "blobs" / "sha256" / image.layers[0][7:]
    damaged.write_bytes(flip(damaged.read_bytes(), 5))
    target = tmp_path / "bundle.tar"
    target.touch()
    with pytest.raises(StorageError, match="damaged"):
        await ask(
            program, "/api/v1/export/file", {"images": ["app"], "file": describe_file(target)}
        )
    assert not damaged.exists()


async def test_a_full_disk_ends_the_export(registry, program, tiny_disk):
    await pull(program, registry.add_image(layers=(os.urandom(3 * MIB),)))
    target = tiny_disk(1 * MIB) / "bundle.tar"
    target.touch()
    with pytest.raises(StorageError, match="No space"):
        await ask(
            program, "/api/v1/export/file", {"images": ["app"], "file": describe_file(target)}
        )


async def test_a_damaged_file_leaves_the_store_as_it_was(program, tmp_path):
    made, _ = layout(b"z" * 3 * MIB)
    file = tmp_path / "file"
    bundle = made.tar()
    file.write_bytes(flip(bundle, bundle.index(b"z" * 10) + 9))
    with pytest.raises(DigestMismatchError, match=digest_of(b"z" * 3 * MIB)):
        await ask(program, "/api/v1/import/files", {"files": [describe_file(file)]})
    assert program.stored() == set()
