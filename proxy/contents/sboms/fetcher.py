"""Fetches the SBOMs that are attached to an image, when somebody asks what is in it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

from proxy.concurrency import run_in_thread
from proxy.contents.sboms.attached import (
    MAX_ATTACHED_SBOMS,
    AttachedDocument,
    list_blobs,
    list_documents,
    may_have_sbom,
)
from proxy.contents.sboms.reader import MAX_SBOM_SIZE
from proxy.errors import UNREACHABLE_ERRORS, NotFoundError, ProxyError, RateLimitedError
from proxy.log import get_logger
from proxy.oci.digest import Digest
from proxy.oci.reference import Reference, Repository, Tag
from proxy.oci.referrers import RawDescriptor, cosign_tags, parse_descriptor_digest

# Manifests of one image that are fetched to look for SBOMs, and seconds for all of an image.
MAX_FETCHED_ATTACHMENTS = 32
MAX_SBOM_FETCH_SECONDS = 60.0

T = TypeVar("T")

log = get_logger(__name__)


class ContentSource(Protocol):
    """Brings content of a repository into the store; `proxy.cache.content_fetcher` is one."""

    async def fetch_manifest(self, repository: Repository, reference: Reference) -> bytes:
        """Store a manifest and return its content. Raises `NotFoundError` and other `ProxyError`s."""

    async def fetch_blob(self, repository: Repository, digest: Digest, size: int) -> None:
        """Store a blob of this size. Raises `NotFoundError` and other `ProxyError`s."""

    async def list_referrers(self, repository: Repository, subject: Digest) -> list[RawDescriptor]:
        """Return the descriptors of what refers to a manifest. Raises `ProxyError`."""

    async def has_tag(self, repository: Repository, tag: Tag) -> bool:
        """Tell whether upstream has a tag. Raises `ProxyError`."""


class SbomSearch(NamedTuple):
    """Where to look: what refers to the `subjects`, and the manifests that attest the image."""

    repository: Repository
    subjects: tuple[Digest, ...]
    attestations: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class SbomFetcher:
    """Stores the SBOMs of images that upstream has."""

    source: ContentSource
    executor: Executor

    async def fetch(self, search: SbomSearch) -> str:
        """Store what upstream has of SBOMs; return why some of it was not fetched, "" if all was.

        What upstream says it does not have does not exist.
        """
        run = _SbomRun(self.source, self.executor, search.repository)
        try:
            async with asyncio.timeout(MAX_SBOM_FETCH_SECONDS):
                await run.fetch_all(search)
        except TimeoutError:
            return f"{search.repository.upstream} took more than {MAX_SBOM_FETCH_SECONDS:.0f} s"
        except ProxyError as error:
            return str(error)
        return run.problem


class _SbomRun:
    """The search for the SBOMs of one image; errors that make the rest pointless are raised."""

    def __init__(self, source: ContentSource, executor: Executor, repository: Repository) -> None:
        self.problem = ""
        self._source = source
        self._executor = executor
        self._repository = repository
        self._fetched: set[Reference] = set()
        self._documents: set[Digest] = set()

    async def fetch_all(self, search: SbomSearch) -> None:
        for attestation in search.attestations:
            await self._fetch_documents(attestation)
        if self._documents:
            return  # BuildKit's; what else refers to the image is not needed
        for subject in search.subjects:
            async for reference in self._find_referrers(subject):
                await self._fetch_documents(reference)

    async def _find_referrers(self, subject: Digest) -> AsyncIterator[Reference]:
        """Yield the manifests that may be or have SBOMs of a subject, also by cosign's tags."""
        descriptors = await self._try(self._source.list_referrers(self._repository, subject))
        for descriptor in filter(may_have_sbom, descriptors or ()):
            if digest := parse_descriptor_digest(descriptor):
                yield digest
        _, *tags = cosign_tags(subject)  # the first one is for signatures
        for tag in tags:
            if await self._try(self._source.has_tag(self._repository, tag)):
                yield tag

    async def _fetch_documents(self, reference: Reference) -> None:
        if reference in self._fetched:
            return
        if len(self._fetched) >= MAX_FETCHED_ATTACHMENTS:
            self._note(f"of what refers to the image only {MAX_FETCHED_ATTACHMENTS} are fetched")
            return
        self._fetched.add(reference)
        content = await self._try(self._source.fetch_manifest(self._repository, reference))
        if content is None:
            return
        manifest = reference if isinstance(reference, Digest) else Digest.from_content(content)
        found = await run_in_thread(self._executor, list_documents, manifest, content)
        chosen = self._choose(found)
        for document in chosen:
            await self._fetch_blob(document.digest, document.size)
        # An artifact is exported and kept with its image only if the store has all of it.
        rest = await run_in_thread(self._executor, list_blobs, content) if chosen else ()
        for digest, size in rest[:MAX_ATTACHED_SBOMS]:
            if size <= MAX_SBOM_SIZE and digest not in self._documents:
                await self._fetch_blob(digest, size)

    async def _fetch_blob(self, digest: Digest, size: int) -> None:
        await self._try(self._source.fetch_blob(self._repository, digest, size))

    def _choose(self, documents: Iterable[AttachedDocument]) -> list[AttachedDocument]:
        chosen = []
        for document in documents:
            if document.size > MAX_SBOM_SIZE:
                self._note(f"an SBOM has {document.size} bytes, more than {MAX_SBOM_SIZE}")
            elif len(self._documents) < MAX_ATTACHED_SBOMS:
                self._documents.add(document.digest)
                chosen.append(document)
        return chosen

    async def _try(self, work: Awaitable[T]) -> T | None:
        """Return the result of `work`; None if upstream does not have it, or if it fails, which is noted.

        Raises the errors that any other request would get as well.
        """
        try:
            return await work
        except NotFoundError:
            return None
        except (*UNREACHABLE_ERRORS, RateLimitedError):
            raise
        except ProxyError as error:
            self._note(str(error))
            return None

    def _note(self, problem: str) -> None:
        log.info("sbom_not_fetched", repository=self._repository.name, reason=problem)
        self.problem = self.problem or problem
