"""Real clients against odd registries: what they can pull directly, they can pull through the cache."""

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.content import digest_of
from tests.fakes.faults import Fault
from tests.fakes.odd_manifests import ODD_MANIFESTS, OddManifest, image
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program
from tests.system.clients import Containerd, Docker
from tests.system.processes import isolated_environment

APP = "library/app"
TAG = "odd"
PLAIN = image()


@pytest.fixture
async def odd_registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry(pull_limit=None) as registry:
        yield registry


@pytest.fixture
async def cache(odd_registry: FakeRegistry, tmp_path: Path) -> AsyncIterator[Program]:
    program = Program(tmp_path / "store", odd_registry)
    await program.start()
    yield program
    await program.stop()


@pytest.fixture
def root(pytestconfig: pytest.Config) -> Path | None:
    """The root that the clients run in, if it is not this one."""
    found: Path | None = pytestconfig.getoption("client_root", None)
    return found


# Clients.


@dataclass(frozen=True)
class ClientResult:
    """What a client has printed and written; nothing if it has failed."""

    has_succeeded: bool
    output: str = ""
    files: frozenset[str] = frozenset()


async def run_command(*argv: str | Path, root: Path | None = None) -> ClientResult:
    """Run a command, in a root of tests/newer-clients if given, while the event loop serves it."""
    process = await asyncio.create_subprocess_exec(
        *(("chroot", str(root)) if root else ()),
        *map(str, argv),
        env=isolated_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, _ = await process.communicate()
    if process.returncode:
        return ClientResult(False)
    return ClientResult(True, stdout.decode(errors="replace"))


def image_at(url: str) -> str:
    return f"docker://{url.removeprefix('http://')}/{APP}"


async def copy_image(url: str, directory: Path, root: Path | None) -> ClientResult:
    """Copy an image with all that it names, byte for byte."""
    options = ["--quiet", "--all", "--preserve-digests", "--src-tls-verify=false"]
    source, target = f"{image_at(url)}:{TAG}", f"dir:{directory}"
    skopeo = ("skopeo", "--insecure-policy", "copy", *options)
    outcome = await run_command(*skopeo, source, target, root=root)
    return ClientResult(outcome.has_succeeded, files=read_digests(directory))


def read_digests(directory: Path) -> frozenset[str]:
    return frozenset(digest_of(path.read_bytes()) for path in directory.glob("*"))


async def inspect_raw(url: str, root: Path | None) -> ClientResult:
    """Read the manifest of an image."""
    skopeo = ("skopeo", "inspect", "--raw", "--tls-verify=false")
    return await run_command(*skopeo, f"{image_at(url)}:{TAG}", root=root)


async def list_tags(url: str, _directory: Path, root: Path | None) -> ClientResult:
    """List the tags of a repository."""
    skopeo = ("skopeo", "list-tags", "--tls-verify=false")
    outcome = await run_command(*skopeo, image_at(url), root=root)
    tags = json.loads(outcome.output or "{}").get("Tags")
    return ClientResult(outcome.has_succeeded, str(sorted(tags or ())))


# Registries.

Quirk = Callable[[FakeRegistry], None]


def push(odd: OddManifest) -> Quirk:
    return lambda registry: odd.push(registry, APP, TAG)


def plain(change: Callable[[FakeRegistry], object]) -> Quirk:
    """Return a quirk of a registry that has an ordinary image."""

    def set_up(registry: FakeRegistry) -> None:
        PLAIN.push(registry, APP, TAG)
        change(registry)

    return set_up


def answer(match: str, fault: Fault) -> Quirk:
    """Change these responses."""
    return plain(lambda registry: registry.fail(match, fault, times=None))


def encode(match: str, content: bytes) -> Quirk:
    """Encode these responses with gzip, as nobody has requested."""
    body = gzip.compress(content)
    return answer(match, Fault(body=body, headers={"Content-Encoding": "gzip"}))


def set_tokens(suffix: str = "", **fields: object) -> Quirk:
    def change(registry: FakeRegistry) -> None:
        registry.tokens.suffix = suffix
        registry.tokens.fields = fields

    return plain(change)


def redirect_token_server(registry: FakeRegistry) -> None:
    query = f"service=registry.fake&scope=repository:{APP}:pull&hop=1"
    fault = Fault(status=307, body=b"", headers={"Location": f"{registry.url}/token?{query}"})
    registry.fail(r"/token(?!.*hop=1)", fault, times=None)


def add_tags(registry: FakeRegistry) -> None:
    registry.tags_page = 2
    for number in range(220):
        registry.move_tag(APP, f"v{number}", PLAIN.digest)


def link_tags(registry: FakeRegistry, link: str) -> None:
    """Let the list of tags have two pages."""
    last = Fault(status=200, body=b'{"tags":["b"]}', headers={"Link": None})
    registry.fail("tags/list.*page=2", last, times=None)
    first = Fault(status=200, body=b'{"tags":["a"]}', headers={"Link": link})
    registry.fail("tags/list", first, times=None)


def link_without_relation(registry: FakeRegistry) -> None:
    link_tags(registry, f"</v2/{APP}/tags/list?page=2>")


def link_without_brackets(registry: FakeRegistry) -> None:
    link_tags(registry, f'/v2/{APP}/tags/list?page=2; rel="next"')


BLOBS = [digest_of(blob)[7:] for blob in PLAIN.blobs]
QUIRKS: dict[str, Quirk] = {
    **{name: push(odd) for name, odd in ODD_MANIFESTS.items()},
    "token null": set_tokens(token=None),
    "access_token null": set_tokens(access_token=None),
    "other fields of a token null": set_tokens(expires_in=None, issued_at=None, scope=None),
    "a token with odd characters": set_tokens(":|{}!@$%^&*()',;"),
    "a token server that redirects": plain(redirect_token_server),
    "a manifest in gzip": encode(f"GET .*/manifests/({TAG}|{PLAIN.digest})", PLAIN.content),
    "a config in gzip": encode(BLOBS[0], PLAIN.blobs[0]),
    "a layer that is called gzip": answer(BLOBS[1], Fault(headers={"Content-Encoding": "gzip"})),
    "no digest in the header": answer(
        "/manifests/", Fault(headers={"Docker-Content-Digest": None})
    ),
    "no length": answer("", Fault(send_length=False)),
    "no type of a blob": answer("/registry-v2/", Fault(headers={"Content-Type": None})),
    "a tag that is redirected": answer(
        f"/manifests/{TAG}$",
        Fault(status=302, headers={"Location": f"/v2/{APP}/manifests/{PLAIN.digest}"}),
    ),
    "a CDN that refuses a URL once": plain(
        lambda registry: registry.fail(f"/registry-v2/.*{BLOBS[1]}", Fault(status=403, body=b""))
    ),
    "more than a hundred pages of tags": plain(add_tags),
    "no list of tags": answer("tags/list", Fault(status=200, body=b'{"name":"library/app"}')),
    "a null list of tags": answer("tags/list", Fault(status=200, body=b'{"tags":null}')),
    "a list of tags named in capitals": answer(
        "tags/list", Fault(status=200, body=b'{"Name":"library/app","Tags":["a","b"]}')
    ),
    "a list of tags with text after it": answer(
        "tags/list", Fault(status=200, body=b'{"tags":["a","b"]}\n<!-- cached -->')
    ),
    "a list of tags with a link without a relation": plain(link_without_relation),
    "a list of tags with a link without brackets": plain(link_without_brackets),
    "a list of tags in gzip": encode("tags/list", b'{"tags":["a","b"]}'),
}


@pytest.mark.parametrize("name", QUIRKS)
async def test_skopeo_gets_through_the_cache_what_it_gets_directly(
    odd_registry: FakeRegistry, cache: Program, tmp_path: Path, root: Path | None, name: str
):
    operation = list_tags if "tags" in name else copy_image
    QUIRKS[name](odd_registry)
    urls = {"cold": cache.url, "direct": odd_registry.url, "warm": cache.url}
    cold, direct, warm = [await operation(urls[visit], tmp_path / visit, root) for visit in urls]
    if not direct.has_succeeded:
        # skopeo does not copy all that other clients copy, but it shows any manifest.
        raw = [await inspect_raw(url, root) for url in (odd_registry.url, cache.url)]
        assert raw[0].has_succeeded
        assert raw[1] == raw[0]
    else:
        assert cold == direct
    assert warm == cold


# The daemons of clients take long to start, and a test may take 45 s.
@pytest.mark.parametrize("part", range(4))
async def test_containerd_fetches_through_the_cache_what_it_fetches_directly(
    odd_registry: FakeRegistry, cache: Program, directory: Path, root: Path | None, part: int
):
    """containerd checks sizes and types; `content fetch` takes all platforms and unpacks nothing."""
    client = Containerd(directory / "containerd", "127.0.0.1:1", root)
    await asyncio.to_thread(client.start)
    try:
        for number, name in enumerate([*ODD_MANIFESTS][part::4]):
            odd = ODD_MANIFESTS[name]
            odd.push(odd_registry, f"library/app{number}", TAG)
            direct, through = [
                await fetch_content(client, f"{kind}{number}", f"{url}/library/app{number}:{TAG}")
                for kind, url in {"direct": odd_registry.url, "cache": cache.url}.items()
            ]
            # More if the cache knows what it is, where the registry does not say it.
            assert through >= direct, name
    finally:
        await asyncio.to_thread(client.stop)


async def fetch_content(client: Containerd, namespace: str, url: str) -> set[str]:
    """Fetch an image into a namespace of its own; return its digests, none if it fails."""
    ctr = ("ctr", "--address", client.socket, "--namespace", namespace, "content")
    fetch = ("fetch", "--plain-http", "--all-platforms", url.removeprefix("http://"))
    if not (await run_command(*ctr, *fetch, root=client.root)).has_succeeded:
        return set()
    return set((await run_command(*ctr, "ls", "--quiet", root=client.root)).output.split())


@pytest.mark.parametrize("part", range(6))
async def test_docker_pulls_through_the_cache_what_it_pulls_directly(
    odd_registry: FakeRegistry, cache: Program, directory: Path, root: Path | None, part: int
):
    client = Docker(directory / "docker", "127.0.0.1:1", root)
    await asyncio.to_thread(client.start)
    pulled = []
    try:
        for number, name in enumerate([*ODD_MANIFESTS][part::6]):
            ODD_MANIFESTS[name].push(odd_registry, f"library/app{number}", TAG)
            direct, through = [
                await pull_image(client, f"{url}/library/app{number}:{TAG}")
                for url in (odd_registry.url, cache.url)
            ]
            assert through == direct or not direct, name
            pulled.append(direct)
    finally:
        await asyncio.to_thread(client.stop)
    assert any(pulled)


async def pull_image(client: Docker, url: str) -> set[str]:
    """Pull an image and remove it; return the digests of what it consisted of, none if it fails."""
    reference = url.removeprefix("http://")
    if not (await run_command(*client.command("pull", "--quiet", reference))).has_succeeded:
        return set()
    removed = await run_command(*client.command("rmi", reference))
    return set(re.findall(r"Deleted: (\S+)", removed.output))
