"""Several caches behind HAProxy with `config/haproxy/haproxy.cfg`: what they share and what a dead one costs."""

import hashlib
import http.client
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from tests.system.blob_server import BlobServer
from tests.system.haproxy import BEHIND_HAPROXY, HAPROXY_EXAMPLE, haproxy_before
from tests.system.http_client import CHUNK_SIZE, connect, send_request
from tests.system.images import BuiltImage
from tests.system.processes import eventually, run
from tests.system.servers import Daemon, Registry

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

CLIENTS = 24
MIB = 1 << 20
MakeDaemon = Callable[..., Daemon]


def start_three(make_daemon: MakeDaemon, upstream: str) -> list[Daemon]:
    return [make_daemon(upstream, env=BEHIND_HAPROXY) for _ in range(3)]


def pull(url: str, image: BuiltImage) -> set[str]:
    """Request what a client does, and return the digests of what came."""
    base = f"/v2/{image.repository}"
    paths = [f"{base}/manifests/{one}" for one in (image.tag, image.manifest)]
    paths += [f"{base}/blobs/{one}" for one in (image.config, *image.layers)]
    return {send_request(url, path).sha256 for path in paths}


class ResumingClient(threading.Thread):
    """Downloads a blob, and resumes with a range when the connection breaks, as docker and containerd do."""

    def __init__(self, url: str, path: str, size: int) -> None:
        super().__init__(daemon=True)
        self._url, self._path, self._size = url, path, size
        self._hasher = hashlib.sha256()
        self.received = 0
        self.breaks = 0
        self.start()

    @property
    def digest(self) -> str:
        return f"sha256:{self._hasher.hexdigest()}"

    def run(self) -> None:
        while self.received < self._size and self.breaks < 20:
            with suppress(OSError, http.client.HTTPException):
                self._continue()
            self.breaks += self.received < self._size

    def _continue(self) -> None:
        connection = connect(self._url, 60)
        try:
            headers = {"Range": f"bytes={self.received}-"} if self.received else {}
            connection.request("GET", self._path, headers=headers)
            response = connection.getresponse()
            if response.status not in (200, 206):
                return
            while chunk := response.read1(CHUNK_SIZE):
                self._hasher.update(chunk)
                self.received += len(chunk)
        finally:
            connection.close()


def test_haproxy_accepts_the_file():
    run("haproxy", "-c", "-f", HAPROXY_EXAMPLE)


def test_many_clients_of_a_cold_image_cost_one_transfer_although_the_caches_share_nothing(
    upstream: Registry, image: BuiltImage, make_daemon: MakeDaemon, directory: Path
):
    daemons = start_three(make_daemon, upstream.url)
    wanted = {image.index, image.manifest, image.config, *image.layers}
    upstream_log = len(upstream.requests())
    with haproxy_before(directory, daemons) as url:
        with ThreadPoolExecutor(CLIENTS) as threads:
            pulls = [threads.submit(pull, url, image) for _ in range(CLIENTS)]
        assert [one.result() for one in pulls] == [wanted] * CLIENTS
    gets = [one for one in upstream.requests()[upstream_log:] if "GET" in one and "/blobs/" in one]
    # Each blob came once, to the node that owns it.
    assert len(gets) == len({*gets}) == len({image.config, *image.layers})
    sizes = sum(len(image.bytes_of(one)) for one in {image.config, *image.layers})
    fetched = [one.metric("pullcache_upstream_bytes_total", kind="blob") for one in daemons]
    assert sum(fetched) == sizes
    # The digests decide which node has what, so that one may have nothing; one does not have all.
    assert max(fetched) < sizes
    for daemon in daemons:
        assert daemon.metric("pullcache_requests_total", kind="blob") < CLIENTS * len(gets)


def test_clients_that_resume_notice_a_killed_cache_only_by_a_break(
    blobs: BlobServer, make_daemon: MakeDaemon, directory: Path
):
    data = random.Random(1).randbytes(16 * MIB)
    digest = blobs.add(data, hold_at=8 * MIB)
    daemons = start_three(make_daemon, blobs.url)
    with haproxy_before(directory, daemons) as url:
        path = f"/v2/library/app/blobs/{digest}"
        clients = [ResumingClient(url, path, len(data)) for _ in range(CLIENTS)]
        eventually(
            lambda: all(client.received > 4 * MIB for client in clients), "all have a quarter"
        )
        (owner,) = [one for one in daemons if one.metric("pullcache_downloads_in_progress")]
        owner.kill()
        blobs.release(digest)
        for client in clients:
            client.join(60)
        assert {client.digest for client in clients} == {digest}
        assert all(client.breaks for client in clients)
        # What the dead node had is fetched anew, once.
        assert blobs.bytes_sent() <= 2 * len(data)
        assert send_request(url, "/readyz").status == 200


def test_a_cache_that_stops_is_left_before_it_closes(
    upstream: Registry, image: BuiltImage, make_daemon: MakeDaemon, directory: Path
):
    daemons = start_three(make_daemon, upstream.url)
    wanted = {image.index, image.manifest, image.config, *image.layers}
    with haproxy_before(directory, daemons) as url:
        assert pull(url, image) == wanted
        for daemon in daemons:
            assert daemon.stop() == 0
            assert pull(url, image) == wanted
            daemon.start()


def test_nothing_of_a_client_reaches_the_daemon_that_only_nginx_may_say(
    blobs: BlobServer, make_daemon: MakeDaemon, directory: Path
):
    env = {**BEHIND_HAPROXY, "PULLCACHE_SERVER_ACCEL_REDIRECT": "/_blobs"}
    daemons = [make_daemon(blobs.url, env=env) for _ in range(3)]
    digest = blobs.add(b"content")
    path = f"/v2/library/app/blobs/{digest}"
    asks = {"X-Sendfile-Type": "X-Accel-Redirect"}
    with haproxy_before(directory, daemons) as url:

        def is_hit() -> bool:
            head = send_request(url, path, method="HEAD")
            return "; hit" in head.headers["Cache-Status"]

        assert send_request(url, path).body == b"content"
        eventually(is_hit, "the blob is stored")
        response = send_request(url, path, headers=asks)
        assert response.body == b"content"
        assert "X-Accel-Redirect" not in response.headers
