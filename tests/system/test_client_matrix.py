"""Every container client: digests, large images, a killed cache, failing caches."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.system.clients import Buildah, Client, Containerd, Podman, Skopeo
from tests.system.images import BuiltImage, make_image
from tests.system.processes import eventually
from tests.system.relay import Relay
from tests.system.servers import Daemon, Registry

MakeClient = Callable[..., Client]
MIB = 1 << 20


@pytest.fixture(scope="session")
def large_image(tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    """An image with a layer of 64 MiB and one of 32 MiB."""
    sizes = (64 * MIB, 32 * MIB)
    layout = tmp_path_factory.mktemp("large") / "image"
    return make_image(layout, repository="me/large", layer_sizes=sizes)


@pytest.fixture
def failing_server() -> Iterator[Callable[[int], str]]:
    """Start a server that answers every request with one status; return its `host:port`."""

    def start(status: int) -> str:
        class FailingHandler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                """Print nothing."""

        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), FailingHandler))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        stack.callback(thread.join)
        stack.callback(server.shutdown)
        return f"127.0.0.1:{server.server_port}"

    with ExitStack() as stack:
        yield start


@pytest.fixture
def large_upstream(registry: Registry, large_image: BuiltImage) -> Registry:
    large_image.push(registry.address)
    return registry


@pytest.mark.each_client
def test_an_image_is_pulled_by_digest_and_again_without_the_upstream(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: BuiltImage,
    make_client: MakeClient,
):
    client = make_client(kind, daemon.address)
    pinned = replace(image, tag="")
    client.pull(pinned)
    assert client.run(pinned).strip() == image.prints
    client.remove(pinned)
    upstream.stop()
    client.pull(pinned)
    assert client.run(pinned).strip() == image.prints


@pytest.mark.each_client
def test_a_large_image_is_pulled_with_one_transfer_from_upstream(
    kind: type[Client],
    large_upstream: Registry,
    make_daemon: Callable[..., Daemon],
    large_image: BuiltImage,
    make_client: MakeClient,
):
    daemon = make_daemon(large_upstream.url)
    client = make_client(kind, daemon.address)
    client.pull(large_image)
    assert client.run(large_image).strip() == large_image.prints
    size = sum(len(large_image.bytes_of(layer)) for layer in large_image.layers)
    assert size < daemon.upstream_bytes() < size + MIB


@pytest.mark.each_client
def test_after_a_kill_of_the_cache_in_mid_pull_a_pull_goes_on_where_it_was(
    kind: type[Client],
    large_upstream: Registry,
    directory: Path,
    large_image: BuiltImage,
    make_client: MakeClient,
):
    """Some clients retry the broken pull themselves; others need a second pull."""
    with Relay(large_upstream.address, 30 * MIB) as relay, ThreadPoolExecutor(1) as thread:
        daemon = Daemon(directory / "daemon", relay.url)
        daemon.start()
        client = make_client(kind, daemon.address)
        pull = thread.submit(client.pull, large_image)
        eventually(lambda: relay.received > 75 * MIB, "the middle of the image")
        daemon.kill()
        daemon.start()
        pull.exception(timeout=60)
        relay.rate = 0
        client.pull(large_image)
        received = relay.received
    assert client.run(large_image).strip() == large_image.prints
    size = sum(len(large_image.bytes_of(layer)) for layer in large_image.layers)
    # The kill costs each blob what was in memory and on the way; beginning anew would cost more
    # than 75 MiB.
    assert received < size + 60 * MIB
    daemon.finish()


# Not 429: podman, buildah and skopeo then repeat a request to the mirror for more than a minute.
@pytest.mark.parametrize("status", [404, 503])
@pytest.mark.parametrize(
    "kind", [Containerd, Podman, Buildah, Skopeo], ids=lambda kind: kind.__name__
)
def test_with_the_printed_files_a_client_pulls_from_the_registry_while_the_cache_fails(
    kind: type[Client],
    status: int,
    upstream: Registry,
    failing_server: Callable[[int], str],
    image: BuiltImage,
    make_client: MakeClient,
):
    client = make_client(kind, failing_server(status), fallback=upstream.url)
    image = replace(image, registry="private.test")
    client.pull(image)
    assert client.run(image).strip() == image.prints
