"""What a node of a fleet answers to other nodes, and what a client that pretends to be one gets."""

import pytest

from proxy.config import ServerSettings
from proxy.server.clients.connection_limit import ConnectionLimiter
from tests.fakes.registry import FakeRegistry
from tests.support.htpasswd import write_htpasswd
from tests.support.program import Answer, Program

TOKEN = "a secret of the fleet"
# Nothing listens there: the node works as if it were alone.
FLEET = {"valkey": "valkey://127.0.0.1:9/0", "address": "http://127.0.0.1:1"}


@pytest.fixture
async def registry():
    async with FakeRegistry() as registry:
        yield registry


@pytest.fixture
async def node(tmp_path, registry):
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    node = Program(tmp_path / "store", registry, fleet={**FLEET, "token_file": str(token_file)})
    await node.start()
    yield node
    await node.stop()


async def ask_as_peer(node: Program, path: str, token: str = TOKEN, **headers: str) -> Answer:
    return await node.ask(f"/v2/{path}?ns=docker.io", Pullcache_Fleet=token, **headers)


async def test_a_peer_gets_what_is_stored_and_linked_and_counts_as_no_client(node, registry):
    image = registry.add_image()
    await node.pull(image)
    await node.wait_for_downloads()
    served = {
        kind: await node.metric("pullcache_requests_total", kind=kind)
        for kind in ("manifest", "blob")
    }
    before = len(registry.requests)
    manifest = await ask_as_peer(node, f"library/app/manifests/{image.digest}")
    layer = await ask_as_peer(node, f"library/app/blobs/{image.layers[0]}")
    part = await ask_as_peer(node, f"library/app/blobs/{image.layers[0]}", Range="bytes=2-")
    assert (manifest.status, manifest.digest) == (200, image.digest)
    assert (layer.status, layer.digest) == (200, image.layers[0])
    assert (part.status, part.body) == (206, layer.body[2:])
    assert len(registry.requests) == before
    sent = len(manifest.body) + len(layer.body) + len(part.body)
    assert await node.metric("pullcache_peer_bytes_total", direction="out") == sent
    for kind, count in served.items():
        assert await node.metric("pullcache_requests_total", kind=kind) == count


async def test_a_peer_is_never_a_reason_to_ask_upstream(node, registry):
    digest = registry.add_blob(b"a layer")
    answer = await ask_as_peer(node, f"library/app/blobs/{digest}")
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    assert (await ask_as_peer(node, "library/app/manifests/latest")).status == 404
    assert (await ask_as_peer(node, "library/app/tags/list")).status == 404
    assert registry.requests == []


async def test_a_peer_is_told_that_content_belongs_to_another_repository(node, registry):
    digest = registry.add_blob(b"a layer", "corp/secret")
    assert (await node.blob(digest, "corp/secret")).status == 200
    await node.wait_for_downloads()
    answer = await ask_as_peer(node, f"library/app/blobs/{digest}")
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


async def test_a_peer_that_has_the_registrys_proof_gets_the_bytes(node, registry):
    digest = registry.add_blob(b"a layer", "corp/base")
    assert (await node.blob(digest, "corp/base")).status == 200
    await node.wait_for_downloads()
    answer = await ask_as_peer(node, f"library/app/blobs/{digest}", Pullcache_Proven="1")
    assert (answer.status, answer.body) == (200, b"a layer")


async def test_a_peer_needs_no_login_and_no_place_among_the_clients(node, registry, tmp_path):
    digest = registry.add_blob(b"a layer")
    assert (await node.blob(digest)).status == 200
    await node.wait_for_downloads()
    users = write_htpasswd(tmp_path / "users", amy="secret")
    await node.restart(server={"htpasswd": users, "allow_clients": ["192.0.2.1"]})
    assert (await node.blob(digest)).status == 403
    assert (await ask_as_peer(node, f"library/app/blobs/{digest}")).body == b"a layer"


def test_a_connection_of_a_peer_leaves_the_count_of_its_address():
    settings = ServerSettings(max_connections_per_client=1)
    limiter = ConnectionLimiter(settings, lambda: None)
    peer = limiter.acquire("192.0.2.1")
    assert peer
    peer.leave_client()
    client = limiter.acquire("192.0.2.1")
    assert client
    assert not client.is_rejected
    peer.leave_client()
    peer.release()
    client.release()
    assert limiter.connected == 0


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + "x", "name \xe9"])
async def test_a_forged_header_is_ignored(node, registry, token):
    digest = registry.add_blob(b"a layer", "corp/base")
    registry.add_blob(b"a layer")
    assert (await node.blob(digest, "corp/base")).status == 200
    await node.wait_for_downloads()
    answer = await ask_as_peer(node, f"library/app/blobs/{digest}", token, Pullcache_Proven="1")
    assert answer.status == 200
    # It was handled as the request of a client: the registry was asked for a proof.
    assert registry.count(f"GET /v2/library/app/blobs/{digest}") == 1
    assert await node.metric("pullcache_peer_bytes_total", direction="out") == 0


async def test_without_a_fleet_the_header_means_nothing(tmp_path, registry):
    node = Program(tmp_path / "store", registry)
    await node.start()
    digest = registry.add_blob(b"a layer")
    answer = await ask_as_peer(node, f"library/app/blobs/{digest}", "pullcache")
    await node.stop()
    assert answer.status == 200
