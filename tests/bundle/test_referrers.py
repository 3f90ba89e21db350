"""A bundle holds all that refers to its images, and another cache then answers as the first one."""

import json
import tarfile

import pytest

from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, descriptor, digest_of
from tests.fakes.images import push_manifest
from tests.preload.images import push_app
from tests.support.admin_api import APP, NATIVE, list_images
from tests.support.commands import run_on
from tests.support.preload_api import run_preload

SUFFIXES = ("", ".sig", ".att", ".sbom")


def fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def sign(registry, subject: str, content: bytes, kind: str = "sig/x") -> str:
    return push_manifest(registry, APP, [content], subject=subject, artifact_type=kind)


def push_all(registry) -> dict[str, str]:
    """Push `app:v1` with all kinds of referrers; return digests by name."""
    digests = push_app(registry)
    subject = digests["index"]
    sbom = sign(registry, subject, b"sbom", "sbom/y")
    found = digests | {
        "signature": sign(registry, subject, b"signature"),
        "sbom": sbom,
        "of sbom": sign(registry, sbom, b"of sbom"),
        "native": sign(registry, digests[NATIVE], b"native"),
    }
    pushed = registry.repository(APP).manifests
    entries = [
        descriptor(pushed[found[name]].content, OCI_MANIFEST) for name in ("signature", "sbom")
    ]
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    content = json.dumps(document).encode()
    registry.add_manifest(APP, fallback_tag(subject), content, OCI_INDEX)
    for suffix in SUFFIXES[1:]:
        push_manifest(registry, APP, [suffix.encode()], tag=f"{fallback_tag(subject)}{suffix}")
    return found


async def answers(program, found: dict[str, str]) -> list[object]:
    """Return all that a client can learn of what refers to the image."""
    seen: list[object] = []
    for digest in found.values():
        answer = await program.ask(f"/v2/{APP}/referrers/{digest}")
        seen.append((answer.status, answer.body))
        for suffix in SUFFIXES:
            tagged = await program.manifest(APP, f"{fallback_tag(digest)}{suffix}")
            seen.append((tagged.status, tagged.digest if tagged.status == 200 else ""))
    for name in ("signature", "sbom", "of sbom", "native"):
        seen.append((await program.manifest(APP, found[name])).digest)
        seen.append((await program.blob(digest_of(name.encode()))).body)
    seen += [(await program.blob(digest_of(one.encode()))).body for one in SUFFIXES[1:]]
    return seen


@pytest.mark.parametrize("has_api", [True, False])
async def test_the_importing_cache_answers_as_the_exporting_one_did(
    registry, make_program, tmp_path, has_api
):
    registry.referrers = has_api
    found = push_all(registry)
    first = await make_program(tmp_path / "one")
    await run_preload(first, "app:v1")
    await first.restart(offline=True)
    before = await answers_of(first, found, has_api)
    bundle = tmp_path / "bundle.tar"
    assert (await run_on(first, "export", "app:v1", "-o", str(bundle))).exit_code == 0
    second = await make_program(tmp_path / "two", offline=True)
    assert (await run_on(second, "import", str(bundle))).exit_code == 0
    assert await answers_of(second, found, has_api) == before
    assert set(await list_images(second)) == {"app:v1"}
    # The same again from the other cache, byte for byte.
    again = tmp_path / "again.tar"
    assert (await run_on(second, "export", "app:v1", "-o", str(again))).exit_code == 0
    assert again.read_bytes() == bundle.read_bytes()


async def answers_of(program, found: dict[str, str], has_api: bool) -> list[object]:
    if has_api:
        return await answers(program, found)
    seen: list[object] = []
    for digest in (found["index"], found["signature"]):
        answer = await program.ask(f"/v2/{APP}/referrers/{digest}")
        seen.append((answer.status, answer.body))
        seen += [
            (await program.manifest(APP, f"{fallback_tag(digest)}{suffix}")).digest
            for suffix in SUFFIXES
        ]
    return seen


async def ask_for_none(program, digests: dict[str, str]) -> list[object]:
    """Ask for referrers of the manifests that a preload brings, by the API and by tags."""
    seen: list[object] = []
    for subject in (digests["index"], digests[NATIVE]):
        answer = await program.ask(f"/v2/{APP}/referrers/{subject}")
        seen.append((answer.status, answer.json.get("manifests")))
        tags = [fallback_tag(subject) + suffix for suffix in SUFFIXES]
        seen += [(await program.manifest(APP, tag)).status for tag in tags]
    return seen


@pytest.mark.parametrize("has_api", [True, False])
async def test_an_image_without_referrers_has_none_in_the_importing_cache_either(
    registry, make_program, tmp_path, has_api
):
    registry.referrers = has_api
    digests = push_app(registry)
    first = await make_program(tmp_path / "one")
    await run_preload(first, "app:v1")
    await first.restart(offline=True)
    bundle = tmp_path / "bundle.tar"
    assert (await run_on(first, "export", "app:v1", "-o", str(bundle))).exit_code == 0
    second = await make_program(tmp_path / "two", offline=True)
    assert (await run_on(second, "import", str(bundle))).exit_code == 0
    assert await ask_for_none(second, digests) == await ask_for_none(first, digests)
    assert await ask_for_none(second, digests) == [(200, []), 404, 404, 404, 404] * 2


async def test_of_an_image_that_was_only_pulled_nothing_is_known_in_the_importing_cache(
    registry, make_program, tmp_path
):
    """A client that asked for no signatures does not know whether there are any."""
    digests = push_app(registry)
    first = await make_program(tmp_path / "one")
    for digest in ((await first.manifest(APP, "v1")).digest, digests[NATIVE]):
        await first.manifest(APP, digest)
    for blob in registry.repository(APP).blobs:
        await first.blob(blob)
    await first.wait_for_downloads()
    bundle = tmp_path / "bundle.tar"
    assert (await run_on(first, "export", "app:v1", "-o", str(bundle))).exit_code == 0
    assert b"records" not in bundle.read_bytes()
    second = await make_program(tmp_path / "two", offline=True)
    assert (await run_on(second, "import", str(bundle))).exit_code == 0
    assert (await ask_for_none(second, digests))[1:5] == [503, 503, 503, 503]


async def test_referrers_are_not_images_for_the_tools_that_load_bundles(
    registry, program, tmp_path
):
    push_all(registry)
    await run_preload(program, "app:v1")
    bundle = tmp_path / "bundle.tar"
    assert (await run_on(program, "export", "app:v1", "-o", str(bundle))).exit_code == 0
    with tarfile.open(bundle) as archive:
        file = archive.extractfile("index.json")
        assert file
        (listed,) = json.load(file)["manifests"]
    assert listed["annotations"]["io.containerd.image.name"] == "docker.io/library/app:v1"
