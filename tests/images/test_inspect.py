"""The details of one image."""

from typing import Any

import pytest

from proxy.errors import InvalidReferenceError, InvalidRequestError, NotFoundError
from tests.fakes.images import blobs_of, push_manifest
from tests.support.admin_api import (
    APP,
    BASE,
    NATIVE,
    OTHER,
    OWN,
    call,
    inspect_image,
    list_images,
    pull_parts,
)


async def test_layers_have_their_commands_and_the_images_that_share_them(registry, program):
    history: list[dict[str, Any]] = [
        {"created_by": "ADD rootfs / # buildkit"},
        {"created_by": "ENV A=1", "empty_layer": True},
        {"created_by": "RUN make # buildkit"},
    ]
    run = {
        "Env": ["A=1"],
        "Cmd": ["serve"],
        "Labels": {"x": "y"},
        "ExposedPorts": {"80/tcp": {}},
    }
    digest = push_manifest(registry, APP, [BASE, OWN], tag="v1", history=history, run=run)
    other = push_manifest(registry, "me/other", [BASE, OTHER], tag="v2")
    await pull_parts(program, APP, "v1", *blobs_of(registry, APP, digest)[:2])
    await pull_parts(program, "me/other", "v2", *blobs_of(registry, "me/other", other))
    detail = await inspect_image(program, "app:v1")
    (platform,) = detail["platforms"]
    assert platform["state"]["state"] == "partial"
    assert [(layer["command"], layer["cached"], layer["size"]) for layer in platform["layers"]] == [
        ("ADD rootfs /", True, len(BASE)),
        ("RUN make", False, len(OWN)),
    ]
    assert [layer["shared"] for layer in platform["layers"]] == [["me/other:v2"], []]
    assert platform["config"]["cmd"] == ["serve"]
    assert platform["config"]["ports"] == ["80/tcp"]
    assert detail["names"] == ["app:v1"]


async def test_referrers_of_a_platform_are_listed(registry, program, app):
    sbom = push_manifest(registry, APP, [b"sbom"], subject=app[NATIVE])
    await pull_parts(program, APP, "v1", app[NATIVE], sbom)
    (referrer,) = (await inspect_image(program, "app:v1"))["referrers"]
    assert (referrer["digest"], referrer["subject"]) == (sbom, app[NATIVE])


async def test_referrers_are_listed(registry, program):
    digest = push_manifest(registry, APP, [OWN], tag="v1")
    artifact_type = "application/spdx+json"
    sbom = push_manifest(registry, APP, [b"sbom"], subject=digest, artifact_type=artifact_type)
    await pull_parts(program, APP, "v1", sbom)
    (referrer,) = (await inspect_image(program, "app:v1"))["referrers"]
    assert (referrer["digest"], referrer["artifact_type"]) == (sbom, artifact_type)
    assert set(await list_images(program)) == {"app:v1"}


async def test_an_image_is_found_by_digest(registry, program, app):
    await pull_parts(program, APP, "v1", app[NATIVE], *blobs_of(registry, APP, app[NATIVE]))
    detail = await inspect_image(program, f"app@{app[NATIVE]}")
    assert detail["names"] == []
    assert detail["platforms"][0]["state"]["platform"] == NATIVE
    index = await inspect_image(program, f"app@{app['index']}")
    assert index["names"] == ["app:v1"]
    assert index["size"] >= detail["size"] > 0


async def test_an_unknown_or_invalid_image_is_an_error(program):
    with pytest.raises(NotFoundError, match="app:none is not in the store"):
        await inspect_image(program, "app:none")
    with pytest.raises(InvalidReferenceError):
        await inspect_image(program, "NOT AN IMAGE")
    with pytest.raises(InvalidRequestError):
        await call(program, "get", "/api/v1/images/inspect")
