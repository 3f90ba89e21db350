"""Bundles in files that the daemon opens itself: the same bytes, and only permitted files."""

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
from tests.support.bundles import (
    APP_FULL_NAME,
    LAYERS,
    blob_path,
    build_layout,
    export_bundle,
    pull_all_platforms,
)
from tests.support.program import Program

MIB = 1 << 20


async def post(program: Program, path: str, document: dict[str, Any]) -> list[Any]:
    """Return the events of a request to the admin API."""
    events = AdminClient(program.root).stream("POST", path, document)
    return await asyncio.to_thread(list, events)


async def test_an_export_to_a_file_writes_the_bytes_that_would_be_sent(registry, program, tmp_path):
    image = registry.add_image(layers=(*LAYERS, os.urandom(20 * MIB)), index=True)
    await pull_all_platforms(program, image)
    target = tmp_path / "bundle.tar"
    target.touch()
    document = {"images": ["app"], "file": describe_file(target)}
    *_, last = await post(program, "/api/v1/export/file", document)
    assert target.read_bytes() == await export_bundle(program, "app")
    assert last == {"done": target.stat().st_size}


async def test_an_import_reads_the_parts_of_a_bundle(program, tmp_path):
    layout, digest = build_layout(os.urandom(3 * MIB))
    bundle = layout.to_tar()
    parts = [tmp_path / "b.000", tmp_path / "b.001"]
    parts[0].write_bytes(bundle[:700_001])
    parts[1].write_bytes(bundle[700_001:])
    document = {"files": [describe_file(part) for part in parts]}
    *_, report = await post(program, "/api/v1/import/files", document)
    assert report["images"][0]["digest"] == digest
    assert (await program.manifest("library/app", "1")).digest == digest


def delete(file: Path) -> None:
    file.unlink()


def replace_file(file: Path) -> None:
    file.rename(file.with_suffix(".kept"))
    file.write_bytes(b"another")


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("change", [delete, replace_file, make_pipe])
@pytest.mark.parametrize("path", ["/api/v1/import/files", "/api/v1/export/file"])
async def test_a_file_that_differs_from_the_one_the_daemon_sees_is_not_touched(
    registry, program, tmp_path, path, change: Callable[[Path], None]
):
    await pull_all_platforms(program, registry.add_image())
    file = tmp_path / "file"
    file.write_bytes(build_layout(name=f"{APP_FULL_NAME}:1")[0].to_tar())
    described = describe_file(file)
    change(file)
    if change is make_pipe:
        # A client that names the pipe itself is rejected as well.
        described = describe_file(file)
    before = file.read_bytes() if change is replace_file else b""
    document = (
        {"files": [described]} if "import" in path else {"images": ["app"], "file": described}
    )
    with pytest.raises(FileUnreachableError):
        await post(program, path, document)
    assert change is not replace_file or file.read_bytes() == before


async def test_files_can_be_named_on_the_socket_only(make_program, tmp_path):
    program = await make_program(server={"admin_listen": ["127.0.0.1:0"]})
    file = tmp_path / "file"
    file.write_bytes(build_layout()[0].to_tar())
    url = f"http://{program.admin_addresses[0]}/api/v1/import/files"
    async with program.session.post(url, json={"files": [describe_file(file)]}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "file_unreachable")
    assert program.stored() == set()


@pytest.fixture
def shared_socket() -> Iterator[socket.socket]:
    """A socket that every user can connect to; pytest's own directories belong to one user."""
    with TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{directory}/admin")
        for path in (directory, f"{directory}/admin"):
            Path(path).chmod(0o777)
        yield bound


@pytest.mark.system  # it changes its user
@pytest.mark.parametrize("user", [0, 65534])
async def test_files_can_be_named_by_root_and_the_user_of_the_daemon_only(
    program, tmp_path, shared_socket: socket.socket, user: int
):
    """A group that may use the socket must not read and write files with the daemon's rights."""
    await program.stop()
    program.sockets["admin"] = [shared_socket]
    await program.start()
    file = tmp_path / "file"
    file.write_bytes(build_layout(name=f"{APP_FULL_NAME}:1")[0].to_tar())
    document = json.dumps({"files": [describe_file(file)]})
    url = "http://localhost/api/v1/import/files"
    curl = ["curl", "-sS", "--unix-socket", shared_socket.getsockname(), "--json", document, url]
    output = await asyncio.to_thread(subprocess.check_output, curl, user=user, cwd="/")
    if user == os.geteuid():
        assert program.stored()
    else:
        assert json.loads(output)["error"]["code"] == "file_unreachable"
        assert program.stored() == set()


async def test_a_damaged_blob_fails_the_export(registry, program, tmp_path):
    image = registry.add_image(layers=(os.urandom(3 * MIB),))
    await pull_all_platforms(program, image)
    damaged = program.root / blob_path(image.layers[0])
    damaged.write_bytes(flip(damaged.read_bytes(), 5))
    target = tmp_path / "bundle.tar"
    target.touch()
    with pytest.raises(StorageError, match="damaged"):
        await post(
            program, "/api/v1/export/file", {"images": ["app"], "file": describe_file(target)}
        )
    assert not damaged.exists()


async def test_a_full_disk_fails_the_export(registry, program, tiny_disk):
    await pull_all_platforms(program, registry.add_image(layers=(os.urandom(3 * MIB),)))
    target = tiny_disk(1 * MIB) / "bundle.tar"
    target.touch()
    with pytest.raises(StorageError, match="No space"):
        await post(
            program, "/api/v1/export/file", {"images": ["app"], "file": describe_file(target)}
        )


async def test_a_damaged_file_leaves_the_store_as_it_was(program, tmp_path):
    layout, _ = build_layout(b"z" * 3 * MIB)
    file = tmp_path / "file"
    bundle = layout.to_tar()
    file.write_bytes(flip(bundle, bundle.index(b"z" * 10) + 9))
    with pytest.raises(DigestMismatchError, match=digest_of(b"z" * 3 * MIB)):
        await post(program, "/api/v1/import/files", {"files": [describe_file(file)]})
    assert program.stored() == set()
