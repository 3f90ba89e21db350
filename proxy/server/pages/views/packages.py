"""The packages in an image, what a scanner found, and the images that have a package."""

from collections.abc import AsyncGenerator, Sequence

from proxy.contents.findings import Vulnerability, write_csv
from proxy.contents.image_contents import ImageContents
from proxy.contents.packages import Package
from proxy.contents.questions import PackageAnswer, ReadEvent
from proxy.errors import InvalidRequestError, UnknownManifestError
from proxy.server.admin.api import ByteStream
from proxy.server.admin.contents import ContentsAnswer, FindingsAnswer
from proxy.server.pages.page import JobLine, Model, NewJob, PageRequest

# Packages, and findings, that a page shows.
MAX_SHOWN_PACKAGES = 100
MAX_SHOWN_FINDINGS = 100


async def show(request: PageRequest) -> Model:
    """Return the packages of an image that contain a text."""
    query = request.query
    return await describe(
        request,
        query.get("image", ""),
        query.get("platform", ""),
        query.get("q", "").strip(),
    )


async def describe(request: PageRequest, image: str, platform: str, text: str = "") -> Model:
    """Return what is known of the packages of an image, without reading it.

    Packages and findings are those whose name contains `text`.
    """
    try:
        known = await request.api.get(
            "/api/v1/images/contents", ContentsAnswer, image=image, platform=platform, read=False
        )
        findings = await request.api.get(
            "/api/v1/images/findings", FindingsAnswer, image=image, platform=platform
        )
    except UnknownManifestError as error:
        return {"packages": {"image": image, "platform": platform, "problem": str(error)}}
    contents = known.contents
    found = _select(contents, text)
    reported = findings.report.found.findings if findings.report else ()
    listed = [one for one in reported if text.lower() in one.package.lower()]
    return {
        "packages": {
            "image": image,
            "platform": known.platform,
            "problem": "",
            "text": text,
            "contents": contents,
            "count": len(contents.packages) if contents else 0,
            "fitting": len(found),
            "shown": found[:MAX_SHOWN_PACKAGES],
            "report": findings.report,
            "has_scanner": findings.has_scanner,
            "counts": findings.counts,
            "findings": listed[:MAX_SHOWN_FINDINGS],
            "fitting_findings": len(listed),
            "fixes": _find_fixes(reported),
        }
    }


def _select(contents: ImageContents | None, text: str) -> list[Package]:
    if contents is None:
        return []
    part = text.lower()
    return [one for one in contents.packages if part in one.name.lower() or part in one.source]


def _find_fixes(findings: Sequence[Vulnerability]) -> dict[str, str]:
    """Return a version that repairs something, by `name version` of the package."""
    return {f"{one.package} {one.installed}": one.fixed for one in findings if one.fixed}


async def read(request: PageRequest) -> NewJob:
    """Read the packages of an image."""
    image, platform = request.form.get("image", ""), request.form.get("platform", "")

    async def events() -> AsyncGenerator[object, None]:
        yield await request.api.get(
            "/api/v1/images/contents", ContentsAnswer, image=image, platform=platform
        )

    back = request.form.get("back", "/images")
    return NewJob(f"Read the packages of {image}", events(), _describe_contents, back)


async def read_all(request: PageRequest) -> NewJob:
    """Read the packages of all images that were not read."""
    events = request.api.stream("POST", "/api/v1/images/contents/read", {})
    back = request.form.get("back", "/images")
    return NewJob("Read the packages of the stored images", events, _describe_read, back)


async def scan(request: PageRequest) -> NewJob:
    """Run the scanner on an image."""
    body = {name: request.form.get(name, "") for name in ("image", "platform")}

    async def events() -> AsyncGenerator[object, None]:
        yield await request.api.post("/api/v1/images/scan", FindingsAnswer, body)

    back = request.form.get("back", "/images")
    return NewJob(f"Scan {body['image']}", events(), _describe_findings, back)


async def download_csv(request: PageRequest) -> ByteStream:
    """Return the findings of an image as CSV."""
    answer = await request.api.get(
        "/api/v1/images/findings",
        FindingsAnswer,
        image=request.form.get("image", ""),
        platform=request.form.get("platform", ""),
    )
    if answer.report is None:
        raise InvalidRequestError("this image was not scanned")
    text = write_csv(answer.report.found.findings)

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield text.encode()

    return ByteStream(chunks(), "text/csv; charset=utf-8")


async def ask(request: PageRequest, question: str) -> Model:
    """Return the images that have a package, or why the question cannot be answered."""
    try:
        answer = await request.api.get(
            "/api/v1/images/packages", PackageAnswer, package=question, limit=MAX_SHOWN_PACKAGES
        )
    except InvalidRequestError as error:
        return {"answer": None, "answer_problem": str(error)}
    return {"answer": answer, "answer_problem": ""}


def _describe_contents(event: object) -> JobLine | None:
    if not isinstance(event, ContentsAnswer) or event.contents is None:
        return None
    return JobLine(f"{event.image}: {len(event.contents.packages)} packages")


def _describe_read(event: object) -> JobLine | None:
    if not isinstance(event, ReadEvent):
        return None
    text = f"{event.image} ({event.platform or 'any platform'}): "
    if event.outcome == "read":
        return JobLine(f"{text}{event.packages} packages")
    return JobLine(f"{text}{event.outcome}: {event.reason}", is_problem=True)


def _describe_findings(event: object) -> JobLine | None:
    if not isinstance(event, FindingsAnswer):
        return None
    counts = ", ".join(f"{count} {name}" for name, count in event.counts.items())
    return JobLine(f"{event.image}: {counts or 'no findings'}")
