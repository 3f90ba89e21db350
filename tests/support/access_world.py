"""A world for random tests of access: the program, registries that may lie, a mirror, and an oracle.

The oracle knows what upstream would let a client have, and what the cache has seen of that. After each
request it checks both directions: nothing else is served, and all of that is.
"""

import asyncio
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aiohttp import ClientError, web

from tests.fakes.content import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    descriptor,
    digest_of,
)
from tests.fakes.faults import HTML, Fault, Reply
from tests.fakes.registry import FakeRegistry
from tests.support.program import Answer, Program

Mode = Literal["honest", "portal", "json", "redirect", "echo"]
HUB, OTHER = "docker.io", "other.test"
TAG = "latest"


@dataclass(frozen=True)
class Thing:
    """A blob or a manifest. `types` are the media types that upstreams state for a manifest."""

    content: bytes
    types: tuple[str, str] = ("", "")
    names: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """The digest of the content."""
        return digest_of(self.content)

    @property
    def kind(self) -> str:
        """The part of the path before the digest."""
        return "manifests" if self.types[0] else "blobs"


@dataclass(frozen=True)
class Place:
    """A repository at an upstream, and the name by which clients pull it."""

    upstream: str
    name: str

    @property
    def path(self) -> str:
        """The name by which clients pull from the repository."""
        return self.name if self.upstream == HUB else f"{self.upstream}/{self.name}"


def _blob(number: int) -> Thing:
    return Thing(b"".join(hashlib.sha256(b"%d %d" % (number, n)).digest() for n in range(128)))


def _manifest(*layers: Thing) -> Thing:
    config = CONFIG.content
    document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": descriptor(config, DOCKER_CONFIG),
        "layers": [descriptor(layer.content, DOCKER_LAYER) for layer in layers],
    }
    names = (digest_of(config), *(layer.digest for layer in layers))
    return Thing(json.dumps(document).encode(), (DOCKER_MANIFEST, DOCKER_MANIFEST), names)


def _index(*manifests: Thing) -> Thing:
    platform = {"os": "linux", "architecture": "amd64"}
    entries = [
        descriptor(one.content, DOCKER_MANIFEST) | {"platform": platform} for one in manifests
    ]
    document = {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": entries}
    names = tuple(one.digest for one in manifests)
    return Thing(json.dumps(document).encode(), (DOCKER_LIST, DOCKER_LIST), names)


CONFIG = Thing(b'{"os": "linux", "architecture": "amd64", "secret": "configuration"}')
LAYERS = [_blob(number) for number in range(2)]
# Nothing in it tells the media type, so the header does.
UNTYPED = Thing(b'{"schemaVersion": 2, "secret": "manifest"}', (DOCKER_MANIFEST, OCI_MANIFEST))
IMAGES = [_manifest(LAYERS[0]), _manifest(*LAYERS), UNTYPED]
INDEXES = [_index(IMAGES[0]), _index(IMAGES[1], IMAGES[0])]
MANIFESTS = [*IMAGES, *INDEXES]
THINGS = {thing.digest: thing for thing in (CONFIG, *LAYERS, *MANIFESTS)}
PLACES = [Place(HUB, "me/a"), Place(HUB, "me/b"), Place(OTHER, "me/a")]


@dataclass(frozen=True)
class _Expected:
    """The mode of the registry at the request, and whether the cache had to serve the content."""

    mode: Mode = "honest"
    must_serve: bool = False


class LyingRegistry(FakeRegistry):
    """A registry that has a mode in which it lies, and names digests for tags that it does not have."""

    def __init__(self, *, cdn: bool) -> None:
        self.mode: Mode = "honest"
        self.named: dict[str, str] = {}
        super().__init__(auth=False, cdn=cdn, pull_limit=None)

    def has(self, name: str, thing: Thing) -> bool:
        """Tell whether the repository has the content, whatever the registry says."""
        repository = self.repositories.get(name)
        if repository is None:
            return False
        return thing.digest in (repository.manifests if thing.types[0] else repository.blobs)

    def answer(self, request: web.BaseRequest) -> Reply:
        """Respond as the mode says."""
        path = request.raw_path.partition("?")[0]
        *_, name, kind, reference = ["", "", *path.removeprefix("/v2/").rsplit("/", 2)]
        is_tag_head = request.method == "HEAD" and kind == "manifests" and reference == TAG
        if is_tag_head and (digest := self.named.get(name)):
            headers = {"Docker-Content-Digest": digest, "Content-Type": DOCKER_MANIFEST}
            return Reply(200, headers, THINGS[digest].content)
        if self.mode == "portal":
            return Reply(200, {"Content-Type": "text/html"}, HTML.body or b"")
        if self.mode == "json":
            return Reply(200, {"Content-Type": "application/json"}, b'{"hello": "guest"}')
        if self.mode == "redirect" and kind in ("blobs", "manifests"):
            return Reply(307, {"Location": f"{self.url}/none"})
        if self.mode == "echo" and (thing := THINGS.get(reference)):
            headers = {"Docker-Content-Digest": reference}
            headers |= {"Content-Type": thing.types[1]} if thing.types[1] else {}
            return Reply(200, headers, bytes(len(thing.content)))
        return super().answer(request)


class World:
    """The program with its registries, and the oracle.

    `may` are the places that the cache may serve stored content under without asking, `must` those
    that it has to. Content that is evicted leaves both.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.registries = {HUB: LyingRegistry(cdn=True), OTHER: LyingRegistry(cdn=False)}
        self.mirror = LyingRegistry(cdn=False)
        self.may: set[tuple[Place, str]] = set()
        self.must: set[tuple[Place, str]] = set()
        self.stored: set[str] = set()
        # Interrupted downloads: their bytes are sent to those who ask at the same place.
        self.left: set[tuple[Place, str]] = set()
        # What was once in `may`. The sizes that such a manifest states are no secret.
        self.ever: set[tuple[Place, str]] = set()
        # The bytes that each upstream had sent of a blob when it was stored last.
        self.sent_before: dict[tuple[str, str], int] = {}

    async def start(self) -> None:
        """Start all servers."""
        for server in self._servers():
            await server.start()
        for place in PLACES:
            self.registries[place.upstream].repository(place.name)
        self.program = Program(
            self.root,
            self.registries[HUB],
            upstreams={
                HUB: {"url": self.registries[HUB].url, "mirrors": [self.mirror.url]},
                OTHER: {"url": self.registries[OTHER].url},
            },
            manifests={"ttl": "0s", "negative_ttl": "0s", "tag_ttl": {}},
            server={"shutdown_timeout": "0s"},
        )
        await self.program.start()

    async def stop(self) -> None:
        """Stop all servers."""
        if self.program.is_running:
            await self.program.stop()
        for server in self._servers():
            await server.stop()
        shutil.rmtree(self.root)

    def _servers(self) -> Iterator[LyingRegistry]:
        yield from self.registries.values()
        yield self.mirror

    # What happens outside the cache.

    def push(self, place: Place, thing: Thing, *, to_mirror: bool = False) -> None:
        """Push content, without a look at what it names."""
        self._push_to(self._target(place, to_mirror=to_mirror), place, thing)

    def _push_to(self, registry: LyingRegistry, place: Place, thing: Thing) -> None:
        if thing.types[0]:
            media_type = thing.types[0 if place.upstream == HUB else 1]
            registry.add_manifest(place.name, None, thing.content, media_type)
        else:
            registry.add_blob(thing.content, place.name)

    def push_tag(self, place: Place, thing: Thing, *, to_mirror: bool = False) -> None:
        """Push a manifest under the tag."""
        self.push(place, thing, to_mirror=to_mirror)
        self._target(place, to_mirror=to_mirror).move_tag(place.name, TAG, thing.digest)

    def withdraw(self, place: Place, thing: Thing) -> None:
        """Delete content upstream; tags that name it too."""
        for registry in self._upstream(place):
            repository = registry.repository(place.name)
            repository.blobs.pop(thing.digest, None)
            repository.manifests.pop(thing.digest, None)
            if repository.tags.get(TAG) == thing.digest:
                del repository.tags[TAG]

    def _target(self, place: Place, *, to_mirror: bool) -> LyingRegistry:
        is_mirrored = to_mirror and place.upstream == HUB
        return self.mirror if is_mirrored else self.registries[place.upstream]

    def _upstream(self, place: Place) -> list[LyingRegistry]:
        own = self.registries[place.upstream]
        return [self.mirror, own] if place.upstream == HUB else [own]

    # What the oracle knows.

    def is_available(self, place: Place, thing: Thing) -> bool:
        """Tell whether upstream would send the content to a client, by the registry or a mirror."""
        return any(
            one.mode == "honest" and one.has(place.name, thing) for one in self._upstream(place)
        )

    def _blob_bytes_sent(self, upstream: str, thing: Thing) -> int:
        servers = [self.registries[upstream], *([self.mirror] if upstream == HUB else [])]
        return sum(one.bytes_sent(f"GET .*{thing.digest[7:]}") for one in servers)

    async def _settle(self) -> None:
        """Wait for downloads, and forget what was evicted."""
        await self.program.wait_for_downloads()
        now = self.program.stored()
        gone = self.stored - now
        self.stored = now
        self.may = {pair for pair in self.may if pair[1] not in gone}
        self.must = {pair for pair in self.must if pair[1] not in gone}
        for upstream in self.registries:
            for digest in gone:
                sent = self._blob_bytes_sent(upstream, THINGS[digest])
                self.sent_before[upstream, digest] = sent

    # Requests, and their checks.

    async def pull(self, place: Place, thing: Thing, method: str, *, is_ranged: bool) -> None:
        """Request content by digest, and check the response."""
        expected = self._expect(place, thing)
        headers = {"Range": "bytes=5-60"} if is_ranged and thing.kind == "blobs" else {}
        answer = await self.program.ask(self._path(place, thing), method, **headers)
        await self._check(place, thing, answer, method, expected)

    def _path(self, place: Place, thing: Thing) -> str:
        return f"/v2/{place.path}/{thing.kind}/{thing.digest}"

    def _expect(self, place: Place, thing: Thing) -> _Expected:
        """Return what is known before a request."""
        if is_available := self.is_available(place, thing):
            self._permit(place, thing)
        mode = self.registries[place.upstream].mode
        return _Expected(mode, is_available or (place, thing.digest) in self.must)

    def _permit(self, place: Place, thing: Thing) -> None:
        self.may.add((place, thing.digest))
        self.ever.add((place, thing.digest))

    async def _check(
        self, place: Place, thing: Thing, answer: Answer, method: str, expected: _Expected
    ) -> None:
        is_success = answer.status in (200, 206)
        is_permitted = (place, thing.digest) in self.may | self.left
        if method == "HEAD":
            # A registry that says yes to everything says so of this, too.
            mode = expected.mode
            size = answer.headers.get("Content-Length")
            is_told_by_upstream = mode == "echo" or (
                mode in ("portal", "json") and size != str(len(thing.content))
            )
            is_claimed = any(
                thing.digest in THINGS[digest].names
                for there, digest in self.ever
                if there == place
            )
            is_permitted |= (is_claimed and thing.kind == "blobs") or is_told_by_upstream
            assert is_permitted or not is_success, "a HEAD tells that it is there"
        assert is_permitted or not reveals(answer.body, thing), (
            "content is served that is not theirs"
        )
        if expected.must_serve:
            assert is_success, f"content is not served: {answer.status} {answer.body[:200]!r}"
            assert method == "HEAD" or reveals(answer.body, thing), "wrong bytes"
        await self._settle()
        if answer.digest == thing.digest:
            self._learn(place, thing, answer)

    def _learn(self, place: Place, thing: Thing, answer: Answer) -> None:
        self.left.discard((place, thing.digest))
        if thing.digest in self.stored:
            self.must.add((place, thing.digest))
        if thing.types[0]:
            stated = thing.types[0 if place.upstream == HUB else 1]
            assert answer.headers["Content-Type"] == stated, "it is another upstream's media type"
        elif thing in LAYERS:
            sent = self._blob_bytes_sent(place.upstream, thing)
            sent -= self.sent_before.get((place.upstream, thing.digest), 0)
            assert sent >= len(thing.content), "it was not sent by this upstream"

    async def pull_tag(self, place: Place, method: str, *, takes_indexes: bool) -> None:
        """Request the tag, and check which manifest the response has."""
        types = [DOCKER_MANIFEST, OCI_MANIFEST]
        types += [DOCKER_LIST, OCI_INDEX] if takes_indexes else []
        for thing in THINGS.values():
            self._expect(place, thing)
        own = self.registries[place.upstream]
        if own.mode == "echo" and (named := own.repository(place.name).tags.get(TAG)):
            self._permit(place, THINGS[named])  # in this mode it is honest about tags
        answer = await self.program.manifest(
            place.path, TAG, method=method, Accept=", ".join(types)
        )
        digest = answer.headers.get("Docker-Content-Digest", "")
        if answer.status == 200:
            assert (place, digest) in self.may, "the tag has a manifest that is not theirs"
            await self._check(place, THINGS[digest], answer, method, _Expected(must_serve=True))
        for thing in THINGS.values():
            if (place, thing.digest) not in self.may:
                assert not reveals(answer.body, thing)
        if must := self._tag_digest(place):
            assert answer.status == 200, f"the tag is not served: {answer.body[:200]!r}"
            if takes_indexes or THINGS[must] in IMAGES:
                assert digest == must
        await self._settle()

    def _tag_digest(self, place: Place) -> str | None:
        """Return the digest of the tag, if the registry is honest and no mirror says otherwise."""
        own = self.registries[place.upstream]
        repository = own.repository(place.name)
        digest = repository.tags.get(TAG)
        if digest is None or own.mode != "honest":
            return None
        if place.upstream == HUB and (
            self.mirror.named or TAG in self.mirror.repository(place.name).tags
        ):
            return None
        names = THINGS[digest].names if THINGS[digest] in INDEXES else ()
        children = [THINGS[name] for name in names]
        is_whole = all(own.has(place.name, child) for child in children)
        return digest if own.has(place.name, THINGS[digest]) and is_whole else None

    async def pull_from_liar(self, place: Place, thing: Thing, method: str, mode: Mode) -> None:
        """Request content by digest while the registry lies."""
        with self.lying(place, mode):
            await self.pull(place, thing, method, is_ranged=False)

    @contextmanager
    def lying(self, place: Place, mode: Mode) -> Iterator[None]:
        """Let the registry of a place be in a mode during the block."""
        registry = self.registries[place.upstream]
        before, registry.mode = registry.mode, mode
        try:
            yield
        finally:
            registry.mode = before

    async def pull_tag_of_liar(self, place: Place, first: Thing, second: Thing) -> None:
        """Request a tag, and again when a mirror names another manifest for it."""
        self.push_tag(place, first)
        await self.pull_tag(place, "GET", takes_indexes=True)
        self.mirror.named[place.name] = second.digest
        await self.pull_tag(place, "GET", takes_indexes=True)
        self.mirror.named.clear()

    async def come_and_go(
        self, first: Place, second: Place, thing: Thing, method: str, mode: Mode
    ) -> None:
        """Let content be evicted and come back from elsewhere, and request it where it was."""
        for place, other in ((first, second), (second, first)):
            self.withdraw(other, thing)
            self.push(place, thing)
            await self.pull(place, thing, "GET", is_ranged=False)
            if place == first:
                await self.evict(0.5)
        if first != second:
            await self.pull_from_liar(first, thing, method, mode)

    async def overlap(
        self, first: Place, second: Place, layer: Thing, method: str, mode: Mode
    ) -> None:
        """Request a layer at one place while it arrives for another, and the registry lies."""
        hold = asyncio.Event()
        for registry in self._servers():
            registry.fail(registry.body_of(layer.digest), Fault(stall_at=1000, until=hold))
        self._expect(first, layer)
        async with asyncio.TaskGroup() as group:
            one = group.create_task(self.program.ask(self._path(first, layer)))
            await asyncio.wait((one,), timeout=0.03)
            with self.lying(second, mode):
                expected = self._expect(second, layer)
                other = group.create_task(self.program.ask(self._path(second, layer), method))
                await asyncio.wait((other,), timeout=0.03)
                hold.set()
                await asyncio.wait((one, other))
        for registry in self._servers():
            registry.heal()
        await self._check(second, layer, other.result(), method, expected)
        await self._check(first, layer, one.result(), "GET", _Expected())

    async def interrupt(self, place: Place, layer: Thing) -> None:
        """Stop the program while a layer arrives, and start it again."""
        hold = asyncio.Event()
        for registry in self._servers():
            registry.fail(registry.body_of(layer.digest), Fault(stall_at=3000, until=hold))
        self._expect(place, layer)
        self.left |= self.may & {(place, layer.digest)}
        with suppress(ClientError):
            async with self.program.opened(self._path(place, layer)) as response:
                with suppress(asyncio.IncompleteReadError, ClientError):
                    await response.content.readexactly(2000)
        await self.program.stop()
        hold.set()
        for registry in self._servers():
            registry.heal()
        await self.program.start()
        await self._settle()

    async def evict(self, idle: float) -> None:
        """Evict what was not used for so many seconds of the program's clock."""
        self.program.clock.advance(1)
        space = self.program.running._core.space
        await space.sweep(max_idle=idle, ingest_ttl=1e9)
        await self._settle()

    async def restart(self) -> None:
        """Stop the program and start it again."""
        await self.program.restart()
        await self._settle()


def reveals(body: bytes, thing: Thing) -> bool:
    """Tell whether a body has bytes of the content."""
    return len(body) >= 16 and body[:1000] in thing.content
