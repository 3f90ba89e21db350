"""Behind nginx with `config/nginx/pullcache.conf`: nginx sends stored blobs, the daemon everything else."""

import http.client
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from proxy.cli.diagnosis.front import Worker, describe_access, find_workers
from proxy.config.schema import StoreSettings
from tests.support.certificates import Authority
from tests.system.blob_server import CHUNK_SIZE, BlobServer
from tests.system.http_client import DownloadThread, HttpResponse, send_request
from tests.system.images import BuiltImage
from tests.system.nginx import BEHIND_NGINX, LOCATION, nginx
from tests.system.processes import eventually, run
from tests.system.servers import Daemon, Registry

pytestmark = pytest.mark.system

DATA = bytes(range(256)) * 4096  # 1 MiB
SIZE = len(DATA)
ASKS = {"X-Sendfile-Type": "X-Accel-Redirect"}
MakeDaemon = Callable[..., Daemon]


def blob_path(digest: str) -> str:
    return f"/v2/library/app/blobs/{digest}"


@pytest.fixture
def daemon(blobs: BlobServer, make_daemon: MakeDaemon) -> Daemon:
    return make_daemon(blobs.url, env=BEHIND_NGINX)


@pytest.fixture
def url(directory: Path, daemon: Daemon) -> Iterator[str]:
    with nginx(directory, daemon) as (url, _):
        yield url


@pytest.fixture
def path(blobs: BlobServer, daemon: Daemon) -> str:
    """The path of a stored blob with `DATA`."""
    digest = blobs.add(DATA)
    assert send_request(daemon.url, blob_path(digest)).body == DATA
    wait_stored(daemon, blob_path(digest))
    return blob_path(digest)


def wait_stored(daemon: Daemon, path: str) -> None:
    def is_hit() -> bool:
        return "; hit" in get(daemon.url, path, "HEAD").headers["Cache-Status"]

    eventually(is_hit, "the blob is stored")


def lines_of(daemon: Daemon, path: str) -> list[dict[str, object]]:
    """Return the log lines of the requests for a path, after stopping the daemon."""
    assert daemon.stop() == 0
    lines = [json.loads(line) for line in daemon.log.splitlines() if line.startswith("{")]
    return [one for one in lines if one["event"] == "request" and one["path"] == path]


def promised(daemon: Daemon) -> float:
    return daemon.metric("pullcache_promised_bytes_total")


def get(url: str, path: str, method: str = "GET", **headers: str) -> HttpResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return send_request(url, path, method=method, headers=named)


def test_nginx_sends_a_stored_blob_with_the_headers_of_the_daemon(url, daemon, path):
    direct, response = get(daemon.url, path), get(url, path)
    assert (response.status, response.body) == (200, DATA)
    assert promised(daemon) == SIZE
    for name, value in direct.headers.items():
        if name not in ("Date", "Server"):
            assert response.headers.get_all(name) == [value], name
    assert {*response.headers} - {*direct.headers} == {"Connection"}
    assert response.headers["Server"].startswith("nginx")


@pytest.mark.parametrize("selection", ["bytes=5-99", "bytes=1000000-", "bytes=-7", "bytes=0-0"])
def test_ranges_are_those_of_the_daemon(url, daemon, path, selection):
    direct, response = get(daemon.url, path, Range=selection), get(url, path, Range=selection)
    assert response.status == direct.status == 206
    assert response.body == direct.body
    for name in ("Content-Range", "Content-Length", "ETag", "Docker-Content-Digest"):
        assert response.headers[name] == direct.headers[name]
    assert promised(daemon) == len(direct.body)


def test_several_ranges_are_one_multipart_body(url, daemon, path):
    response = get(url, path, Range="bytes=0-9,100-109,-5")
    assert response.status == 206
    boundary = re.fullmatch(
        r"multipart/byteranges; boundary=(\S+)", response.headers["Content-Type"]
    )
    assert boundary
    parts = response.body.split(f"--{boundary[1]}".encode())
    contents = [part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for part in parts[1:-1]]
    assert contents == [DATA[:10], DATA[100:110], DATA[-5:]]
    assert promised(daemon) == 25


def test_if_range_decides_about_the_range(url, path):
    etag = f'"{path.rpartition("/")[2]}"'
    assert get(url, path, Range="bytes=0-9", If_Range=etag).status == 206
    for other in ('"sha256:00"', "Thu, 01 Jan 1970 00:00:00 GMT"):
        response = get(url, path, Range="bytes=0-9", If_Range=other)
        assert (response.status, response.body) == (200, DATA)


def test_a_range_beyond_the_end_gets_416(url, daemon, path):
    response = get(url, path, Range=f"bytes={SIZE}-")
    assert response.status == 416
    assert response.headers["Content-Range"] == f"bytes */{SIZE}"
    assert promised(daemon) == 0


def test_head_and_conditions_are_answered_by_the_daemon(url, daemon, path):
    direct, response = get(daemon.url, path, "HEAD"), get(url, path, "HEAD")
    assert (response.status, response.body) == (200, b"")
    for name in ("Content-Length", "Content-Type", "ETag", "Docker-Content-Digest"):
        assert response.headers[name] == direct.headers[name]
    assert get(url, path, If_None_Match=direct.headers["ETag"]).status == 304
    assert get(url, path, If_None_Match='"other"').body == DATA
    assert get(url, path, If_Modified_Since="Thu, 01 Jan 2099 00:00:00 GMT").body == DATA


def test_a_growing_blob_is_passed_on_while_it_arrives(url, daemon, blobs):
    digest = blobs.add(DATA * 4, hold_at=2 * CHUNK_SIZE)
    clients = [DownloadThread(url, blob_path(digest)) for _ in range(8)]
    try:
        eventually(lambda: all(one.first_byte.is_set() for one in clients), "all have bytes")
        assert blobs.bytes_sent() == 2 * CHUNK_SIZE
    finally:
        blobs.release(digest)
    assert {client.finish().digest for client in clients} == {digest}
    assert sum(response.sent for response in blobs.responses_to_get(digest)) == 4 * SIZE
    assert promised(daemon) == 0
    wait_stored(daemon, blob_path(digest))
    assert get(url, blob_path(digest)).body == DATA * 4
    assert promised(daemon) == 4 * SIZE


def test_a_blob_that_is_evicted_before_nginx_opens_it_comes_from_the_daemon(
    blobs, make_daemon, directory
):
    daemon = make_daemon(blobs.url, env=BEHIND_NGINX)
    digest = blobs.add(DATA)
    assert get(daemon.url, blob_path(digest)).body == DATA
    wait_stored(daemon, blob_path(digest))
    # What nginx finds if the eviction comes after the daemon's answer.
    with nginx(directory, daemon, blobs=directory / "none") as (url, _):
        response = get(url, blob_path(digest))
        assert (response.status, response.body) == (200, DATA)
        assert response.headers.get_all("Docker-Content-Digest") == [digest]
        ranged = get(url, blob_path(digest), Range="bytes=3-5")
        assert (ranged.status, ranged.body) == (206, DATA[3:6])
    lines = [one for one in lines_of(daemon, blob_path(digest)) if one["cache"] == "hit"]
    answers = [(one.get("promised", False), one["bytes"]) for one in lines if one["bytes"]]
    assert answers == [(True, SIZE), (False, SIZE), (True, 3), (False, 3)]


def test_a_store_that_nginx_may_not_read_is_served_by_the_daemon(blobs, make_daemon, directory):
    env = {**BEHIND_NGINX, "PULLCACHE_STORE_GROUP_ACCESS": "false"}
    daemon = make_daemon(blobs.url, env=env)
    digest = blobs.add(DATA)
    assert get(daemon.url, blob_path(digest)).body == DATA
    wait_stored(daemon, blob_path(digest))
    with nginx(directory, daemon) as (url, _):
        assert get(url, blob_path(digest)).body == DATA


def test_a_client_without_nginx_gets_bytes_whatever_it_asks_for(daemon, path, make_daemon, blobs):
    stranger = make_daemon(
        blobs.url, env={**BEHIND_NGINX, "PULLCACHE_SERVER_TRUSTED_PROXIES": "192.0.2.1/32"}
    )
    for one in (daemon, stranger):
        response = get(one.url, path, **({} if one is daemon else ASKS))
        assert (response.status, response.body) == (200, DATA)
        assert "X-Accel-Redirect" not in response.headers
        assert promised(one) == 0


def test_the_internal_location_is_closed_to_clients(url, daemon, path):
    inside = f"{LOCATION}/sha256/{path.rpartition(':')[2]}"
    outside = f"{LOCATION}/../index.sqlite"
    for target in (inside, f"{inside}?x", f"/{inside}", f"/v2/..{inside}", outside):
        response = get(url, target, X_Accel_Redirect=inside, **ASKS)
        assert response.status in (400, 404)
        assert DATA not in response.body


def test_content_of_another_repository_is_refused_although_nginx_has_the_file(
    registry: Registry, image: BuiltImage, make_daemon, directory
):
    image.push(registry.address)
    daemon = make_daemon(registry.url, env=BEHIND_NGINX)
    layer = image.layers[-1]
    with nginx(directory, daemon) as (url, _):
        assert get(url, f"/v2/{image.repository}/blobs/{layer}").sha256 == layer
        wait_stored(daemon, f"/v2/{image.repository}/blobs/{layer}")
        assert get(url, f"/v2/{image.repository}/blobs/{layer}").sha256 == layer
        before = promised(daemon)
        assert before == len(image.bytes_of(layer))
        refused = get(url, f"/v2/other/private/blobs/{layer}", **ASKS)
        assert (refused.status, promised(daemon)) == (404, before)
        assert "X-Accel-Redirect" not in refused.headers


def test_skopeo_pulls_over_tls_of_nginx_with_a_login(
    upstream: Registry, image: BuiltImage, make_daemon, directory
):
    authority = Authority(directory / "certs.d")
    users = directory / "users"
    run("htpasswd", "-B", "-b", "-c", users, "amy", "secret")
    env = {**BEHIND_NGINX, "PULLCACHE_SERVER_HTPASSWD": str(users)}
    daemon = make_daemon(upstream.url, env=env)
    tls = authority.issue("local", "IP:127.0.0.1")
    with nginx(directory, daemon, tls=tls) as (url, _):
        address = url.partition("://")[2]
        source = f"docker://{address}/{image.repository}:{image.tag}"
        for number in range(2):
            options: list[str | Path] = [
                "--src-cert-dir",
                authority.certs,
                "--src-creds",
                "amy:secret",
            ]
            run("skopeo", "copy", *options, source, f"oci:{directory}/out{number}")
            eventually(lambda: not list((daemon.store / "ingest").iterdir()), "all is stored")
        refused = get(url, f"/v2/{image.repository}/blobs/{image.layers[-1]}", **ASKS)
        assert refused.status == 401
    lines = lines_of(daemon, f"/v2/{image.repository}/blobs/{image.layers[-1]}")
    assert [one.get("promised") for one in lines if one["status"] == 200] == [None, True]


def test_the_log_has_the_clients_and_not_nginx(url, daemon, path):
    address = url.partition("://")[2]
    connection = http.client.HTTPConnection(address, source_address=("127.0.0.2", 0))
    with closing(connection):
        # A client may say what it wants about itself.
        forged = {"X-Forwarded-For": "192.0.2.9", "Forwarded": "for=192.0.2.9"}
        connection.request("GET", path, headers=forged)
        assert connection.getresponse().read() == DATA
    promised_to = [one["client"] for one in lines_of(daemon, path) if "promised" in one]
    assert promised_to == ["127.0.0.2"]


def test_only_the_group_and_only_blobs_are_opened(daemon, path):
    modes = {
        str(one.relative_to(daemon.store)): one.stat().st_mode & 0o777
        for one in (daemon.store, *daemon.store.rglob("*"))
    }
    assert modes.pop(".") == modes.pop("blobs") == 0o710
    assert modes.pop("blobs/sha256") == modes.pop("blobs/sha512") == 0o750
    assert modes.pop(f"blobs/sha256/{path.rpartition(':')[2]}") == 0o640
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == {}


@pytest.mark.parametrize("has_group_access", [True, False])
def test_doctor_tells_whether_the_workers_may_read_the_store(
    blobs, make_daemon, directory, has_group_access
):
    env = {**BEHIND_NGINX, "PULLCACHE_STORE_GROUP_ACCESS": str(has_group_access).lower()}
    daemon = make_daemon(blobs.url, env=env)
    path = blob_path(blobs.add(DATA))
    assert get(daemon.url, path).body == DATA
    wait_stored(daemon, path)
    store = StoreSettings(path=daemon.store, group_access=has_group_access)
    with nginx(directory, daemon) as (url, process):
        assert get(url, path).body == DATA
        workers = [one for one in find_workers() if one.parent == process.pid]
        assert len(workers) == 2
        found = describe_access(store, workers)
        if has_group_access:
            assert (found.state, found.text) == ("ok", "nobody may read the stored blobs")
            strangers = [Worker(1, one.uid, frozenset((one.uid,))) for one in workers]
            assert describe_access(store, strangers).advice.startswith("adduser nobody root, ")
        else:
            assert (found.state, found.check) == ("warn", "nginx")
            assert found.text.startswith(f"nobody may not read {daemon.store} (mode 0700, ")
            assert found.advice.startswith("set store.group_access = true")
        assert describe_access(store, []).text.endswith("the daemon sends all blobs")
