"""`/api/v1/images/contents`, `/packages` and `/sbom`: what is in the images of the store."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from proxy import __version__
from proxy.contents.findings import count_severities
from proxy.contents.image_contents import ImageContents
from proxy.contents.questions import MAX_MATCHES, PackageAnswer, PackageQuestions, ReadEvent
from proxy.contents.reader import ContentsReader, ImageTarget
from proxy.contents.sboms.writer import WRITERS, SbomFormat, SbomSubject
from proxy.contents.scanner import ImageScanner, ScanReport
from proxy.server.admin.api import AdminRequest, RequestModel, Route
from proxy.server.admin.recording import ActRecorder


class ContentsQuery(RequestModel, frozen=True):
    """An image, and the platform whose packages are wanted; by default the one of the daemon."""

    image: str
    platform: str = ""


class KnownQuery(ContentsQuery, frozen=True):
    """The image whose packages are wanted; without `read`, only what was read before is told."""

    read: bool = True


class SbomQuery(ContentsQuery, frozen=True):
    """The image whose SBOM is wanted."""

    format: SbomFormat = "cyclonedx"


class PackageQuery(RequestModel, frozen=True):
    """A question about packages, and how many manifests of images the answer names at most."""

    package: str
    limit: Annotated[int, Meta(ge=1, le=MAX_MATCHES)] = 1000


class ReadImagesRequest(RequestModel, frozen=True):
    """The images to read: all whose names have `filter` as a part, or match it as a glob."""

    filter: str = ""


class FindingsQuery(ContentsQuery, frozen=True):
    """The image whose findings are wanted."""


class ScanRequest(ContentsQuery, frozen=True):
    """The image to scan."""


class FindingsAnswer(msgspec.Struct, frozen=True):
    """What the scanner found in an image for one platform, None if it was not scanned.

    `counts` are the findings by severity, the worst first. `has_scanner` says that one is configured.
    """

    image: str
    platform: str
    digest: str
    report: ScanReport | None
    counts: dict[str, int]
    has_scanner: bool


class ContentsAnswer(msgspec.Struct, frozen=True):
    """What is in an image for one platform; None if it was not read and is not to be."""

    image: str
    platform: str
    digest: str
    contents: ImageContents | None


@dataclass(frozen=True, slots=True)
class ContentsHandlers:
    """The handlers of these routes."""

    reader: ContentsReader
    questions: PackageQuestions
    scanner: ImageScanner
    acts: ActRecorder

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("GET", "/api/v1/images/contents", self.show),
            Route("POST", "/api/v1/images/contents/read", self.read),
            Route("GET", "/api/v1/images/packages", self.ask),
            Route("GET", "/api/v1/images/sbom", self.write_sbom),
            Route("GET", "/api/v1/images/findings", self.show_findings),
            Route("POST", "/api/v1/images/scan", self.scan),
        ]

    async def show(self, request: AdminRequest) -> ContentsAnswer:
        """Return what is in an image; it is read if it was not."""
        query = request.parse_query(KnownQuery)
        target = await self.reader.find(query.image, query.platform)
        known = self.reader.read if query.read else self.reader.known_of
        contents = await known(target)
        return ContentsAnswer(target.name, target.platform, str(target.digest), contents)

    async def read(self, request: AdminRequest) -> AsyncGenerator[ReadEvent, None]:
        """Read the images that were not read, and yield each."""
        body = await request.read_json(ReadImagesRequest)
        async with aclosing(self.questions.read_images(body.filter)) as events:
            async for event in events:
                yield event

    async def ask(self, request: AdminRequest) -> PackageAnswer:
        """Return the images that have a package."""
        query = request.parse_query(PackageQuery)
        return await self.questions.ask(query.package, query.limit)

    async def write_sbom(self, request: AdminRequest) -> dict[str, Any]:
        """Return an SBOM of an image."""
        query = request.parse_query(SbomQuery)
        target, contents = await self.reader.contents(query.image, query.platform)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(contents.read))
        subject = SbomSubject(target.name, str(target.digest), target.platform, made, __version__)
        return WRITERS[query.format](subject, contents)

    async def show_findings(self, request: AdminRequest) -> FindingsAnswer:
        """Return what the scanner found in an image when it was scanned last."""
        query = request.parse_query(FindingsQuery)
        target = await self.reader.find(query.image, query.platform)
        return self._describe(target, await self.scanner.report(target))

    async def scan(self, request: AdminRequest) -> FindingsAnswer:
        """Scan an image now."""
        body = await request.read_json(ScanRequest)
        target = await self.reader.find(body.image, body.platform)
        async with self.acts.recording("scan", request.actor, [target.name]) as act:
            report = await self.scanner.scan(target)
            act.detail = f"{len(report.found.findings)} findings"
        return self._describe(target, report)

    def _describe(self, target: ImageTarget, report: ScanReport | None) -> FindingsAnswer:
        counts = count_severities(report.found.findings) if report else {}
        return FindingsAnswer(
            target.name,
            target.platform,
            str(target.digest),
            report,
            counts,
            bool(self.scanner.command),
        )
