"""Which stored images have a package? Answered from what was read, without asking anybody."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import msgspec

from proxy.concurrency import SingleFlight, run_in_thread
from proxy.contents.reader import ContentsReader, ImageTarget
from proxy.contents.versions import PackageQuestion, matches, parse_question
from proxy.errors import ContentsError
from proxy.images.store import ImageStore
from proxy.images.table import QUICK_INDEX_SIZE
from proxy.names import display_name
from proxy.oci.digest import Digest
from proxy.storage.image_queries import ImageQueries
from proxy.storage.records import contents_rows
from proxy.storage.records.contents import ContentsRecords
from proxy.storage.records.contents_rows import FoundPackage, PackageRow, ReadImage

# Versions of packages of one name that are compared, and pairs of image and package that are looked at.
MAX_CANDIDATES = 20_000
MAX_PAIRS = 1_000_000
# How long the numbers of images are kept, if counting them took longer than `SLOW_COUNT`, in seconds.
COUNTS_TTL = 60.0
SLOW_COUNT = 0.5
# Seconds that an answer waits for them in an index of more than `QUICK_INDEX_SIZE` bytes.
COUNT_WAIT = 0.05
# Images that one answer names, and names of the same digest.
MAX_MATCHES = 10_000
MAX_NAMES_PER_IMAGE = 10
# Versions that cannot be compared, of which an answer names as many.
MAX_NOT_COMPARED = 100


class MatchingPackage(msgspec.Struct, frozen=True):
    """A package that a question is about; `source` is empty if it is named like the package."""

    name: str
    kind: str
    version: str
    source: str


class PackageMatch(msgspec.Struct, frozen=True):
    """A manifest of an image that has such packages; `images` are up to `MAX_NAMES_PER_IMAGE` names."""

    images: Sequence[str]
    digest: str
    platform: str
    packages: Sequence[MatchingPackage]


class PackageAnswer(msgspec.Struct, frozen=True):
    """The images that have a package: `more` manifests than `matches` names have it too.

    `read` and `not_read` count the stored images that the answer is about, and those that it is not; they
    are None while those of a large store are counted.
    `not_compared` are versions that cannot be compared.
    """

    question: str
    matches: Sequence[PackageMatch]
    more: int
    read: int | None
    not_read: int | None
    not_compared: Sequence[str]


class ReadEvent(msgspec.Struct, frozen=True):
    """An image that was read for a platform: `outcome` is `read`, `incomplete` or `failed`."""

    image: str
    platform: str
    outcome: str
    packages: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PackageQuestions:
    """Answers questions about the packages of stored images."""

    image_store: ImageStore
    records: ContentsRecords
    reader: ContentsReader
    counting: SingleFlight[str, tuple[int, int]]
    _counts: dict[str, tuple[float, tuple[int, int] | None]] = field(default_factory=dict)

    async def ask(self, text: str, limit: int = MAX_MATCHES) -> PackageAnswer:
        """Return the images that have a package. Raises `InvalidRequestError` and `StorageError`."""
        question = parse_question(text)
        candidates = await self.records.read(
            partial(contents_rows.find_packages, names=question.names, limit=MAX_CANDIDATES)
        )
        threads = self.image_store.index.list_threads
        found, not_compared = await run_in_thread(threads, _select, question, candidates)
        images = (
            await self.records.read(
                partial(contents_rows.images_with, packages=list(found), limit=MAX_PAIRS)
            )
            if found
            else []
        )
        read, not_read = await self._count_images()
        chosen = images[:limit]
        named = await self.image_store.query(lambda queries: _name_images(queries, chosen))
        return PackageAnswer(
            text.strip(),
            sorted(
                (
                    PackageMatch(
                        names,
                        one.digest,
                        one.platform,
                        sorted(
                            (_describe(found[number]) for number in one.packages),
                            key=lambda package: (package.name != question.name, package.name),
                        ),
                    )
                    for one, names in zip(chosen, named, strict=True)
                ),
                key=lambda match: (list(match.images), match.platform),
            ),
            len(images) - len(chosen),
            read,
            not_read,
            not_compared,
        )

    async def _count_images(self) -> tuple[int | None, int | None]:
        """Return how many images were read, and how many were not; None while they are counted.

        Counting 100,000 images takes 2 s and more: it is done in the background, and what took long is
        kept for `COUNTS_TTL` seconds.
        """
        kept_at, counts = self._counts.get("images", (0.0, None))
        if counts and monotonic() - kept_at < COUNTS_TTL:
            return counts
        index = self.image_store.index
        size = await run_in_thread(index.list_threads, lambda: index.path.stat().st_size)
        with suppress(TimeoutError):
            async with asyncio.timeout(COUNT_WAIT if size > QUICK_INDEX_SIZE else None):
                return await self.counting.run("images", self._count)
        return counts or (None, None)

    async def _count(self) -> tuple[int, int]:
        started = monotonic()
        counts = await self.records.read(contents_rows.count_images)
        if monotonic() - started > SLOW_COUNT:
            self._counts["images"] = monotonic(), counts
        return counts

    async def read_images(self, pattern: str = "") -> AsyncGenerator[ReadEvent, None]:
        """Read the stored images that match a part of a name or a glob and were not read.

        Yields an event for each platform whose layers are here. Raises `StorageError`.
        """
        async with aclosing(self.reader.all_targets(pattern)) as targets:
            async for target in targets:
                if await self.reader.known(target.digest) is None:
                    yield await self._read_one(target)

    async def _read_one(self, target: ImageTarget) -> ReadEvent:
        if target.incomplete:
            return ReadEvent(target.name, target.platform, "incomplete", reason=target.incomplete)
        try:
            contents = await self.reader.read(target, fetches=False)
        except ContentsError as error:
            return ReadEvent(target.name, target.platform, "failed", reason=str(error))
        reason = contents.problems[0] if contents.problems else ""
        return ReadEvent(target.name, target.platform, "read", len(contents.packages), reason[:200])


def _select(
    question: PackageQuestion, candidates: Sequence[FoundPackage]
) -> tuple[dict[int, PackageRow], list[str]]:
    """Return the packages that are asked for by id, and the versions that cannot be compared."""
    found: dict[int, PackageRow] = {}
    not_compared: dict[str, None] = {}
    for number, package in candidates:
        is_match = matches(question, package)
        if is_match:
            found[number] = package
        elif is_match is None:
            not_compared[f"{package.name} {package.version} ({package.kind})"] = None
    return found, sorted(not_compared)[:MAX_NOT_COMPARED]


def _describe(package: PackageRow) -> MatchingPackage:
    return MatchingPackage(package.name, package.kind, package.version, package.source)


def _name_images(queries: ImageQueries, images: Sequence[ReadImage]) -> list[list[str]]:
    return [
        [
            display_name(*one)
            for one in queries.images_containing(Digest.parse(image.digest), MAX_NAMES_PER_IMAGE)
        ]
        for image in images
    ]
