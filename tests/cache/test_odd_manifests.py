"""Manifests that clients accept and specifications do not are served, stored, preloaded and bundled."""

import pytest

from tests.fakes.content import OCI_INDEX, digest_of
from tests.fakes.faults import Fault
from tests.fakes.odd_manifests import CHILD, ODD_INDEXES, ODD_MANIFESTS, OddManifest, image
from tests.support.admin_api import check_images, inspect_image
from tests.support.bundles import export_bundle, import_bundle
from tests.support.preload_api import run_preload
from tests.support.program import Program

APP = "library/app"


async def assert_served(program: Program, odd: OddManifest) -> None:
    """Check that all of it is served, by tag and by digest."""
    heads = []
    for reference in ("odd", odd.digest):
        answer = await program.manifest(APP, reference)
        assert (answer.status, answer.body) == (200, odd.content)
        head = await program.manifest(APP, reference, method="HEAD")
        for response in (answer, head):
            assert response.headers["Docker-Content-Digest"] == odd.digest
            heads.append(response.headers["Content-Type"])
    assert len(set(heads)) == 1
    for manifest in odd.manifests:
        assert (await program.manifest(APP, digest_of(manifest))).body == manifest
    for blob in odd.blobs:
        answer = await program.blob(digest_of(blob))
        assert (answer.status, answer.body) == (200, blob)
    await program.wait_for_downloads()


def digests(odd: OddManifest) -> set[str]:
    return {odd.digest, *map(digest_of, (*odd.manifests, *odd.blobs))}


@pytest.mark.parametrize("name", ODD_MANIFESTS)
async def test_an_odd_manifest_is_served_and_stored(registry, make_program, name):
    program = await make_program(fetch={"prefetch": "layers"})
    odd = ODD_MANIFESTS[name]
    odd.push(registry, APP, "odd")
    await assert_served(program, odd)
    assert program.stored() == digests(odd)
    await program.restart()
    async with registry.down():
        await assert_served(program, odd)


# Neither the document nor its clients say how many bytes these layers have, but the registry does.
@pytest.mark.parametrize("name", ODD_MANIFESTS)
async def test_an_odd_manifest_is_preloaded_and_bundled(registry, make_program, tmp_path, name):
    program = await make_program()
    odd = ODD_MANIFESTS[name]
    odd.push(registry, APP, "odd")
    selection = {"image": "app:odd", "platforms": ["all"]}
    run = await run_preload(program, selection)
    assert not run.events_of("failed")
    assert program.stored() == digests(odd)
    for check in await check_images(program, selection):
        assert check["state"] == "complete"
    assert (await inspect_image(program, "app:odd"))["digest"] == odd.digest
    if not (odd.blobs or odd.manifests):
        return  # there is nothing to export
    bundle = await export_bundle(program, "app:odd")
    other = await make_program(tmp_path / "other", offline=True)
    (imported,) = (await import_bundle(other, bundle))["images"]
    assert (imported["reason"], imported["missing"]) == ("", [])
    await assert_served(other, odd)


async def test_a_layer_without_a_size_is_counted_once_it_is_known(registry, program):
    odd = ODD_MANIFESTS["no size"]
    odd.push(registry, APP, "odd")
    for method in ("GET", "HEAD"):
        await program.manifest(APP, "odd", method=method)
    layer = digest_of(odd.blobs[1])
    head = await program.blob(layer, method="HEAD")
    assert head.headers["Content-Length"] == str(len(odd.blobs[1]))
    (check,) = await check_images(program, "app:odd")
    assert {"digest": layer, "size": 0} in check["missing"]
    for blob in odd.blobs[1:]:
        await program.blob(digest_of(blob))
    await program.wait_for_downloads()
    (platform,) = (await inspect_image(program, "app:odd"))["platforms"]
    assert [one["size"] for one in platform["layers"]] == [len(one) for one in odd.blobs[1:]]


UNREAD = {
    "layers": "text",
    "config": {},
    "config ": [1],
    "layers ": [{"digest": "sha256:" + "A" * 64}],
    "layers  ": [None],
    "layers   ": [{"digest": "blake3:" + "a" * 64}],
}


@pytest.mark.parametrize("field", UNREAD)
async def test_an_image_whose_children_cannot_be_read_is_served_but_never_called_complete(
    registry, program, field
):
    odd = image(**{field.strip(): UNREAD[field]})
    odd.push(registry, APP, "odd")
    for reference in ("odd", odd.digest):
        assert (await program.manifest(APP, reference)).body == odd.content
    assert program.stored() == {odd.digest}
    run = await run_preload(program, "app:odd")
    (failed,) = run.events_of("failed")
    assert "the manifest cannot be read" in failed["reason"]
    (check,) = await check_images(program, "app:odd")
    assert check["state"] == "partial"
    assert "the manifest cannot be read" in check["reason"]


async def test_a_child_is_what_its_bytes_say_whatever_the_index_says(registry, program):
    """The media types of children are only hints: an index may call an image an index."""
    document = ODD_INDEXES["null layers in an index"].content.replace(
        b"image.manifest.v1", b"image.index.v1"
    )
    odd = OddManifest(document, OCI_INDEX, manifests=(CHILD,))
    odd.push(registry, APP, "odd")
    await assert_served(program, odd)
    run = await run_preload(program, {"image": "app:odd", "platforms": ["all"]})
    assert not run.events_of("failed")


async def test_the_type_of_a_stored_manifest_is_not_changed_by_another_repository(
    registry, program
):
    """The header is not covered by the digest, so one upstream must not decide for another."""
    odd = image(mediaType=None)
    odd.push(registry, APP, "odd")
    odd.push(registry, "evil/app", "odd")
    liar = Fault(headers={"Content-Type": "application/vnd.evil"})
    registry.fail("/v2/evil/app/manifests/", liar, times=None)
    assert (await program.manifest("evil/app", odd.digest)).status == 200
    answer = await program.manifest(APP, odd.digest)
    assert answer.headers["Content-Type"] == odd.content_type
