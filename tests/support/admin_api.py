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
BASE, OWN, OTHER = b"base" * 1000, b"own" * 1000, b"other" * 1000


async def call(program, method: str, *arguments, **query) -> Any:
    return await asyncio.to_thread(getattr(AdminClient(program.root), method), *arguments, **query)


async def stream(program, *arguments, **query) -> list[Any]:
    client = AdminClient(program.root)
    return await asyncio.to_thread(lambda: list(client.stream(*arguments, **query)))


async def images(program, pattern: str = "") -> dict[str, Any]:
    found = await stream(program, "GET", "/api/v1/images", filter=pattern)
    for image in found:
        validate(image, "ImageSummary")
    assert len({image["name"] for image in found}) == len(found)
    return {image["name"]: image for image in found}


async def checks(program, *wanted: dict[str, Any] | str) -> list[dict[str, Any]]:
    documents = [{"image": one} if isinstance(one, str) else one for one in wanted]
    found = await stream(program, "POST", "/api/v1/images/check", {"images": documents})
    for one in found:
        validate(one, "ImageCheck")
    return found


async def inspect(program, image: str) -> Any:
    detail = await call(program, "get", "/api/v1/images/inspect", image=image)
    validate(detail, "ImageDetail")
    return detail


async def remove(program, *names: str, **kw: bool) -> Any:
    answer = await call(program, "post", "/api/v1/images/remove", {"images": names, **kw})
    validate(answer, "RemovedImages")
    return answer


async def pull(program, repository: str, reference: str, *digests: str) -> None:
    """Pull a manifest, then manifests and blobs below it by digest."""
    held = program.registry.repository(repository)
    for one in (reference, *digests):
        is_blob = one in held.blobs
        answer = await (
            program.blob(one, repository) if is_blob else program.manifest(repository, one)
        )
        assert (answer.status, answer.is_whole) == (200, True)
    await program.settled()
