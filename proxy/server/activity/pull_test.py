"""A test pull: an image is pulled the way a client does it, and each step is timed.

It takes what clients get: from the store if it is there, else from upstream, and judged by the policies.
"""

import os
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import msgspec

from proxy.cache.blobs import BlobCache
from proxy.cache.manifests import ManifestCache
from proxy.concurrency import run_in_thread
from proxy.errors import (
    DeniedError,
    DigestMismatchError,
    InvalidReferenceError,
    NotFoundError,
    OfflineError,
    ProxyError,
    RateLimitedError,
    StorageError,
    UpstreamDownError,
    UpstreamError,
    UpstreamUnauthorizedError,
    error_code,
)
from proxy.metrics import CacheState
from proxy.names import NameParser, full_name
from proxy.oci.digest import Digest
from proxy.oci.manifest import Manifest, parse_manifest
from proxy.oci.platform import Platform, choose_platform, is_runnable, parse_platform
from proxy.oci.reference import Reference, Repository
from proxy.parsing import DocumentParser
from proxy.storage.blobs import OpenBlob
from proxy.traffic import fetching_for

# Bytes that are read at a time to verify a stored blob.
READ_SIZE = 1 << 20

StepKind = Literal["index", "manifest", "config", "layer"]

_ADVICE: Mapping[type[ProxyError], str] = {
    OfflineError: "go online, or test an image that is stored",
    DeniedError: "allow the image (allow, deny, [[policy]]), or test another one",
    RateLimitedError: "wait, or set a login for the upstream, which raises its limit",
    UpstreamUnauthorizedError: "give the upstream a login that may pull the image",
    NotFoundError: "test an image that exists, or give the upstream a login that may pull it",
    DigestMismatchError: "a proxy or mirror in between changes content: pull past it",
    UpstreamDownError: "the cache asks again by itself; the page Upstreams says when",
    UpstreamError: "look at the upstream on the page Upstreams",
    StorageError: "look at the store on the page Storage",
    InvalidReferenceError: "write the image as a client does, for instance nginx:1.27",
}


class PullTestStep(msgspec.Struct, frozen=True, tag_field="event", tag="step"):
    """A part of the image that was pulled; `state` says where it came from, `seconds` how long it took."""

    kind: StepKind
    digest: str
    state: CacheState
    bytes: int
    seconds: float


class PullTestResult(msgspec.Struct, frozen=True, tag_field="event", tag="result"):
    """The end of a test pull: `code` and `problem` are empty if it worked, else `advice` says what helps."""

    image: str
    digest: str
    platform: str
    bytes: int
    seconds: float
    code: str
    problem: str
    advice: str


PullTestEvent = PullTestStep | PullTestResult


@dataclass(slots=True)
class _Pulled:
    """What is known of the image at the end."""

    image: str
    digest: str = ""
    platform: str = ""
    bytes: int = 0


class PullTester:
    """Makes test pulls. `native_platform` is that of the machine."""

    def __init__(
        self,
        manifests: ManifestCache,
        blobs: BlobCache,
        names: NameParser,
        parser: DocumentParser,
        threads: Executor,
        native_platform: Platform,
    ) -> None:
        self._manifests = manifests
        self._blobs = blobs
        self._names = names
        self._parser = parser
        self._threads = threads
        self._native_platform = native_platform

    async def pull(
        self, image: str, platform: str = "", *, with_layers: bool = True
    ) -> AsyncGenerator[PullTestEvent, None]:
        """Pull an image for a platform, by default this machine's, and yield steps and the result.

        Its errors are in the result.
        """
        began = time.perf_counter()
        pulled = _Pulled(image[:300])
        code = problem = advice = ""
        try:
            steps = self._pull(pulled, platform, with_layers=with_layers)
            async with aclosing(steps):
                async for step in steps:
                    pulled.bytes += step.bytes
                    yield step
        except ProxyError as error:
            code, problem, advice = error_code(error), str(error), _advise(error)
        yield PullTestResult(
            pulled.image,
            pulled.digest,
            pulled.platform,
            pulled.bytes,
            round(time.perf_counter() - began, 3),
            code,
            problem,
            advice,
        )

    async def _pull(
        self, pulled: _Pulled, platform_text: str, *, with_layers: bool
    ) -> AsyncGenerator[PullTestStep, None]:
        repository, reference = self._names.parse_allowed(pulled.image)
        pulled.image = full_name(repository, reference)
        platform = parse_platform(platform_text) if platform_text else self._native_platform
        manifest, step = await self._pull_manifest(repository, reference)
        pulled.digest = step.digest
        yield step
        if manifest.is_index:
            offered = [
                (one.platform, one.digest)
                for one in manifest.manifests
                if is_runnable(one.platform)
            ]
            chosen = choose_platform(offered, platform)
            if chosen is None:
                names = ", ".join(dict.fromkeys(str(one) for one, _ in offered if one))
                raise InvalidReferenceError(f"the image is not for {platform}; it is for {names}")
            pulled.platform = str(platform)
            manifest, step = await self._pull_manifest(repository, chosen)
            yield step
        if not with_layers:
            return
        config = manifest.config.digest if manifest.config else None
        for child in manifest.blobs:
            if not child.is_foreign:
                kind: StepKind = "config" if child.digest == config else "layer"
                yield await self._pull_blob(repository, child.digest, kind)

    async def _pull_manifest(
        self, repository: Repository, reference: Reference
    ) -> tuple[Manifest, PullTestStep]:
        began = time.perf_counter()
        with fetching_for("preload"):
            result = await self._manifests.get_manifest(repository, reference, ())
        seconds = time.perf_counter() - began
        found, size = result.manifest, len(result.manifest.content)
        parsed = await self._parser.run_for_preload(
            size, parse_manifest, found.content, found.media_type
        )
        kind: StepKind = "index" if parsed.is_index else "manifest"
        step = PullTestStep(kind, str(found.digest), result.cache_state, size, round(seconds, 3))
        return parsed, step

    async def _pull_blob(
        self, repository: Repository, digest: Digest, kind: StepKind
    ) -> PullTestStep:
        began = time.perf_counter()
        with fetching_for("preload"):
            async with self._blobs.open_blob(repository, digest) as result:
                source, state = result.source, result.cache_state
                if isinstance(source, OpenBlob):
                    size = source.size
                    await run_in_thread(self._threads, _verify, source.fd, size, digest)
                else:
                    await source.wait_verified()
                    size = source.size or 0
        return PullTestStep(kind, str(digest), state, size, round(time.perf_counter() - began, 3))


def _verify(fd: int, size: int, digest: Digest) -> None:
    """Read a stored blob as a client would be sent it. Raises `DigestMismatchError`."""
    hasher = digest.new_hasher()
    offset = 0
    while offset < size and (part := os.pread(fd, READ_SIZE, offset)):
        hasher.update(part)
        offset += len(part)
    if not digest.matches(hasher):
        raise DigestMismatchError(f"the stored blob {digest} is damaged; the scrub fetches it anew")


def _advise(error: ProxyError) -> str:
    return next((text for kind, text in _ADVICE.items() if isinstance(error, kind)), "")
