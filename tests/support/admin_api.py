"""Requests to the admin API about images; each response is validated against its schema."""

import asyncio
import platform
from typing import Any

from proxy.cli.api_client import AdminClient
from proxy.oci.platform import machine_platform
from tests.support.openapi import validate

APP = "library/app"
NATIVE = str(machine_platform(platform.machine()))
FOREIGN = "linux/s390x"
# Layers: one that images share, and one for each of two images.
BASE, OWN, OTHER = b"base" * 1000, b"own" * 1000, b"other" * 1000


async def call(program, method: str, *arguments, **query) -> Any:
    """Return what a method of `AdminClient` returns."""
    return await asyncio.to_thread(getattr(AdminClient(program.root), method), *arguments, **query)


async def stream(program, *arguments, **query) -> list[Any]:
    """Return all events of a streamed response."""
    client = AdminClient(program.root)
    return await asyncio.to_thread(lambda: list(client.stream(*arguments, **query)))


async def list_images(
    program, pattern: str = "", *, after: str = "", limit: int = 0
) -> dict[str, Any]:
    """Return the stored images by name."""
    images = await stream(
        program, "GET", "/api/v1/images", filter=pattern, after=after, limit=str(limit)
    )
    for image in images:
        validate(image, "ImageSummary")
    assert len({image["name"] for image in images}) == len(images)
    return {image["name"]: image for image in images}


async def check_images(program, *images: dict[str, Any] | str) -> list[dict[str, Any]]:
    """Return the offline checks of images, which are names or selections."""
    selections = [{"image": image} if isinstance(image, str) else image for image in images]
    checks = await stream(program, "POST", "/api/v1/images/check", {"images": selections})
    for check in checks:
        validate(check, "ImageCheck")
    return checks


async def inspect_image(program, image: str) -> Any:
    """Return the details of an image."""
    detail = await call(program, "get", "/api/v1/images/inspect", image=image)
    validate(detail, "ImageDetail")
    return detail


async def remove_images(program, *names: str, **options: bool) -> Any:
    """Remove images and return what was removed."""
    removed = await call(program, "post", "/api/v1/images/remove", {"images": names, **options})
    validate(removed, "RemovedImages")
    return removed


async def pull_parts(program, repository: str, reference: str, *digests: str) -> None:
    """Pull a manifest, then manifests and blobs by digest."""
    blobs = program.registry.repository(repository).blobs
    for part in (reference, *digests):
        if part in blobs:
            answer = await program.blob(part, repository)
        else:
            answer = await program.manifest(repository, part)
        assert (answer.status, answer.is_whole) == (200, True)
    await program.wait_for_downloads()
