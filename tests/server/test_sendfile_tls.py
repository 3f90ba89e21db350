"""Stored blobs over TLS."""

import pytest

from proxy.server import sendfile
from proxy.server.registry.blobs import INLINE_BLOB_SIZE
from tests.fakes.content import digest_of
from tests.server.test_tls import BLOB, connect, request


@pytest.mark.parametrize("size", [0, 1000, INLINE_BLOB_SIZE + 1, len(BLOB)])
async def test_a_blob_of_any_size_is_sent_whole(registry, secure, authority, size):
    digest = registry.add_blob(BLOB[:size])
    reader, writer = await connect(secure, authority.trust(), limit=1 << 16)
    for _ in range(4):
        writer.write(request(digest))
        head = await reader.readuntil(b"\r\n\r\n")
        assert f"Content-Length: {size}\r\n".encode() in head
        assert digest_of(await reader.readexactly(size)) == digest
        await secure.wait_for_downloads()
    writer.close()


async def test_a_request_pipelined_after_a_blob_is_answered_after_it(registry, secure, authority):
    digest = registry.add_blob(BLOB)
    await secure.blob(digest)
    await secure.wait_for_downloads()
    reader, writer = await connect(secure, authority.trust(), limit=1 << 16)
    writer.write(request(digest))
    await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(len(BLOB))
    writer.write(request(digest))
    head = await reader.readuntil(b"\r\n\r\n")
    for _ in range(3):
        writer.write(request(digest))
    for _ in range(4):
        assert b"HTTP/1.1 200 OK" in head
        assert await reader.readexactly(len(BLOB)) == BLOB
        head = await reader.readuntil(b"\r\n\r\n") if _ < 3 else b""
    writer.close()


async def test_a_blob_that_is_not_in_memory_is_read_in_a_thread(
    registry, secure, authority, monkeypatch
):
    digest = registry.add_blob(BLOB)
    reader, writer = await connect(secure, authority.trust(), limit=1 << 16)
    for count in range(3):
        writer.write(request(digest))
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(BLOB)) == BLOB
        await secure.wait_for_downloads()
        if count == 1:
            monkeypatch.setattr(sendfile, "is_resident", lambda fd, offset: False)
    writer.close()
