"""`docker search`, `podman search` and `pullcache search`, with and without Docker Hub's search."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.system.clients import Client, Docker, Podman
from tests.system.images import BuiltImage
from tests.system.servers import Daemon, Registry

MakeClient = Callable[[type[Client], str], Client]
RESULTS = [
    {
        "name": "hello",
        "description": "An official one.",
        "star_count": 21000,
        "is_official": True,
        "is_automated": False,
        "is_trusted": False,
    },
    {"name": "me/hello", "description": "\x1b[31mMine", "star_count": 3, "is_official": False},
]


class Hub(ThreadingHTTPServer):
    """Docker Hub's search: it always returns `RESULTS`, and records the paths of its requests."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _SearchHandler)
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _SearchHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        body = json.dumps({"num_results": len(RESULTS), "results": RESULTS}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def search(client: Client, words: str, *options: str) -> list[list[str]]:
    """Return the client's row for each repository, without the registry that podman puts before the name."""
    assert isinstance(client, Docker | Podman)
    return [
        [
            row["Name"].removeprefix(f"{client.mirror}/"),
            row["Description"],
            row["StarCount"],
            {"true": "[OK]", "false": ""}.get(row["IsOfficial"], row["IsOfficial"]),
        ]
        for row in client.search(words, *options)
    ]


@pytest.mark.each_client(Docker, Podman)
def test_clients_get_docker_hub_s_results_with_one_request_to_it(
    kind: type[Client],
    registry: Registry,
    hub: Hub,
    make_daemon: Callable[..., Daemon],
    make_client: MakeClient,
):
    daemon = make_daemon(registry.url, env={"PULLCACHE_UPSTREAMS_DOCKER_IO_SEARCH_URL": hub.url})
    client = make_client(kind, daemon.address)
    expected = [["hello", "An official one.", "21000", "[OK]"], ["me/hello", "[31mMine", "3", ""]]
    assert search(client, "hello") == expected
    assert search(client, "hello") == expected
    assert hub.paths == ["/v1/search?q=hello&n=25&page=1"]
    assert search(client, "hello", "--filter", "is-official=true") == expected[:1]
    assert search(client, "hello", "--limit", "1") == expected[:1]


@pytest.mark.each_client(Docker, Podman)
def test_without_the_upstream_clients_find_cached_images(
    kind: type[Client],
    upstream: Registry,
    daemon: Daemon,
    image: BuiltImage,
    make_client: MakeClient,
):
    client = make_client(kind, daemon.address)
    name = image.repository.removeprefix("library/")
    assert search(client, name[1:]) == []  # the upstream has no search, and the store is empty
    client.pull(image)
    cached = [[name, "in this cache", "0", "[OK]"]]
    assert search(client, name[1:]) == cached
    upstream.stop()
    assert search(client, name[1:]) == cached
    # For an empty search, docker lists the cached images, podman the catalog.
    assert search(client, "") == (
        cached if issubclass(kind, Docker) else [[image.repository, "", "0", ""]]
    )
    assert daemon.metric("pullcache_requests_total", kind="search", cache="stale") >= 3


def test_the_command_finds_the_same_as_clients(
    registry: Registry, hub: Hub, make_daemon: Callable[..., Daemon]
):
    daemon = make_daemon(registry.url, env={"PULLCACHE_UPSTREAMS_DOCKER_IO_SEARCH_URL": hub.url})
    _, *rows = [line.split() for line in daemon.run("search", "hello").splitlines()]
    assert rows == [
        ["hello", "An", "official", "one.", "21000", "official"],
        ["me/hello", "[31mMine", "3", "-"],
    ]
    daemon.run("offline", "on")
    assert [line.split() for line in daemon.run("search", "hello").splitlines()][1:] == rows
    assert json.loads(daemon.run("search", "other", "--json"))["source"] == "store"
    assert hub.paths == ["/v1/search?q=hello&n=25&page=1"]
