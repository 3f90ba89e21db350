"""Referrers: whatever an upstream without the API answers, clients go on to the fallback tag."""

import json

import pytest

from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.faults import HTML, Fault
from tests.fakes.images import push_index

APP = "library/app"
UNKNOWN = (404, "MANIFEST_UNKNOWN")
INDEX = {"Content-Type": OCI_INDEX}
JSON = {"Content-Type": "application/json"}


def fallback_tag(digest: str) -> str:
    return digest.replace(":", "-")


def sign(registry, subject: str, kind: str) -> str:
    """Add an artifact that refers to `subject`."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": kind,
        "config": {
            "mediaType": "application/vnd.oci.empty.v1+json",
            "digest": digest_of(b"{}"),
            "size": 2,
        },
        "layers": [],
        "subject": {"mediaType": OCI_MANIFEST, "digest": subject, "size": 1},
    }
    digest: str = registry.add_manifest(APP, None, json.dumps(document).encode(), OCI_MANIFEST)
    return digest


async def test_referrers_are_listed_and_filtered_here(program, registry):
    image = registry.add_image()
    signature, sbom = (sign(registry, image.digest, kind) for kind in ("sig/x", "sbom/y"))
    target = f"/v2/{APP}/referrers/{image.digest}"
    answer = await program.ask(target)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == OCI_INDEX
    assert answer.json["mediaType"] == OCI_INDEX
    assert {one["digest"] for one in answer.json["manifests"]} == {signature, sbom}
    assert "OCI-Filters-Applied" not in answer.headers
    answer = await program.ask(target + "?artifactType=sbom/y")
    assert [one["digest"] for one in answer.json["manifests"]] == [sbom]
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"
    assert registry.count("/referrers/") == 2  # once without a token


async def test_what_nothing_refers_to_has_an_empty_index(program, registry):
    registry.add_image()
    answer = await program.ask(f"/v2/{APP}/referrers/{digest_of(b'nothing')}")
    assert (answer.status, answer.json["manifests"]) == (200, [])


async def test_an_upstream_without_the_referrers_api_is_404_so_that_clients_ask_by_tag(
    program, registry
):
    image = registry.add_image()
    registry.referrers = False
    assert (await program.ask(f"/v2/{APP}/referrers/{image.digest}")).status == 404
    fallback = image.digest.replace(":", "-")
    registry.move_tag(APP, fallback, image.digest)
    assert (await program.manifest(image, fallback)).status == 200


async def test_an_upstream_that_fails_is_not_taken_for_one_without_referrers(program, registry):
    image = registry.add_image()
    registry.fail("/referrers/", Fault(status=500), times=None)
    answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
    assert answer.status >= 500


async def test_without_upstream_the_referrers_that_are_cached_are_listed(program, registry):
    image = registry.add_image()
    target = f"/v2/{APP}/referrers/{image.digest}"
    signature = sign(registry, image.digest, "sig/x")
    await program.manifest(APP, signature)
    async with registry.down():
        answer = await program.ask(target)
        assert answer.status == 200
        (found,) = answer.json["manifests"]
        assert (found["digest"], found["artifactType"]) == (signature, "sig/x")
        assert found["mediaType"] == OCI_MANIFEST
        # Clients go on to the fallback tag, about which upstream cannot be asked either.
        target = f"/v2/{APP}/referrers/{signature}"
        assert ((await program.ask(target)).status, (await program.ask(target)).code) == UNKNOWN
        fallback = await program.manifest(APP, fallback_tag(signature))
        assert fallback.status == 503


async def test_a_list_of_referrers_is_asked_once_and_stays_when_upstream_is_gone(program, registry):
    image = registry.add_image()
    sbom = sign(registry, image.digest, "sbom/y")
    target = f"/v2/{APP}/referrers/{image.digest}"
    await program.ask(target)
    before = len(registry.requests)
    await program.ask(target)
    assert len(registry.requests) == before
    program.clock.advance(100_000)
    async with registry.down():
        answer = await program.ask(target)
    assert [one["digest"] for one in answer.json["manifests"]] == [sbom]
    assert "stale" in answer.headers["Cache-Status"]


def error_body(code: str) -> bytes:
    return json.dumps({"errors": [{"code": code, "message": "no"}]}).encode()


# What registries without the API send (Artifactory, Quay, GitLab, distribution, GitHub, Nexus), and whether the
# same is expected of all manifests of the repository.
REFUSALS = {
    "404 page": (Fault(status=404, body=b"404 page not found\n"), True),
    "404 json": (Fault(status=404, body=error_body("NOT_FOUND")), True),
    "404 unknown": (Fault(status=404, body=error_body("MANIFEST_UNKNOWN")), False),
    "404 name": (Fault(status=404, body=error_body("NAME_UNKNOWN")), False),
    "400": (Fault(status=400, body=error_body("UNSUPPORTED")), False),
    "403": (Fault(status=403, body=error_body("DENIED")), False),
    "405": (Fault(status=405, body=b""), True),
    "406": (Fault(status=406, body=b""), True),
    "410": (Fault(status=410, body=b""), False),
    "501": (Fault(status=501, body=b""), True),
    "html": (HTML, True),
    "html that claims to be an index": (Fault(status=200, body=b"<html>", headers=INDEX), True),
    "empty body": (Fault(status=200, body=b"", headers=JSON), True),
    "empty object": (Fault(status=200, body=b"{}", headers=JSON), True),
    "empty object, typed": (Fault(status=200, body=b"{}", headers=INDEX), True),
    "empty list, untyped": (Fault(status=200, body=b'{"manifests":[]}', headers=JSON), True),
    "list": (Fault(status=200, body=b"[]", headers=INDEX), True),
    "number": (Fault(status=200, body=b'{"manifests":5}', headers=INDEX), True),
    "deep": (Fault(status=200, body=b"[" * 100_000, headers=INDEX), True),
    "redirect to a page": (
        Fault(status=302, body=b"", headers={"Location": "/v2/library/app/login"}),
        True,
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_however_an_upstream_refuses_its_referrers_clients_go_on_to_the_fallback_tag(
    program, registry, refusal
):
    fault, is_about_the_repository = REFUSALS[refusal]
    images = [registry.add_image(tag=tag, layers=[tag.encode()]) for tag in ("a", "b")]
    signature = sign(registry, images[0].digest, "sig/x")
    push_index(registry, APP, fallback_tag(images[0].digest), {"unknown/unknown": signature})
    await program.manifest(APP, "a")  # gets a token
    registry.fail("/referrers/", fault, times=None)
    target = f"/v2/{APP}/referrers/{images[0].digest}"
    answer = await program.ask(target)
    assert (answer.status, answer.code) == UNKNOWN
    asked = registry.count("/referrers/")
    # Remembered: for this manifest, and for all of the repository if the API is missing.
    assert (await program.ask(target)).status == 404
    assert registry.count("/referrers/") == asked
    assert (await program.ask(f"/v2/{APP}/referrers/{images[1].digest}")).status == 404
    assert (registry.count("/referrers/") == asked) is is_about_the_repository
    fallback = await program.manifest(APP, fallback_tag(images[0].digest))
    assert [item["digest"] for item in fallback.json["manifests"]] == [signature]
    # Asked again later.
    registry.heal()
    program.clock.advance(601)
    answer = await program.ask(target)
    assert [item["digest"] for item in answer.json["manifests"]] == [signature]


async def test_null_is_an_empty_list(program, registry):
    image = registry.add_image()
    registry.fail("/referrers/", Fault(status=200, body=b'{"manifests":null}', headers=INDEX))
    registry.fail("/referrers/", Fault(status=200, body=b'{"manifests":null}', headers=INDEX))
    answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
    assert (answer.status, answer.json["manifests"]) == (200, [])


@pytest.mark.parametrize("content_type", [f"{OCI_INDEX}; charset=utf-8", "application/json"])
async def test_an_index_with_another_content_type_is_a_list_if_it_says_so_itself(
    program, registry, content_type
):
    image = registry.add_image()
    signature = sign(registry, image.digest, "sig/x")
    registry.fail("/referrers/", Fault(headers={"Content-Type": content_type}), times=None)
    # An empty list is one too: ORAS asks for what refers to the signature, and fails at a 404.
    for subject, expected in ((image.digest, [signature]), (signature, [])) * 2:
        answer = await program.ask(f"/v2/{APP}/referrers/{subject}")
        assert [item["digest"] for item in answer.json["manifests"]] == expected
        program.clock.advance(601)


async def test_what_one_repository_lacks_says_nothing_about_another(program, registry):
    image, other = registry.add_image(), registry.add_image("me/app")
    registry.fail("/v2/library/app/referrers/", Fault(status=404, body=b"no page"), times=None)
    assert (await program.ask(f"/v2/{APP}/referrers/{image.digest}")).status == 404
    assert (await program.ask(f"/v2/me/app/referrers/{other.digest}")).status == 200


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=429),
        Fault(status=520),
        Fault(hang_up=True),
    ],
)
async def test_a_failure_is_not_taken_for_a_missing_api(program, registry, fault):
    """A client that went on to the fallback tag would find no signature, though there may be one."""
    image = registry.add_image()
    registry.fail("/referrers/", fault, times=None)
    answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
    assert answer.status in (429, 502, 503)
    registry.heal()
    program.clock.advance(61)
    assert (await program.ask(f"/v2/{APP}/referrers/{image.digest}")).status == 200


async def test_failing_lists_do_not_open_the_breaker(program, registry):
    image = registry.add_image()
    registry.fail("/referrers/|/tags/", Fault(status=500), times=None)
    for _ in range(3):
        assert (await program.ask(f"/v2/{APP}/referrers/{image.digest}")).status == 503
        assert (await program.ask(f"/v2/{APP}/tags/list")).status == 503
    assert await program.metric("pullcache_upstream_up") == 1
    assert (await program.manifest(image)).status == 200


async def test_a_list_that_breaks_off_after_its_first_page_is_an_error(program, registry):
    image = registry.add_image()
    sign(registry, image.digest, "sig/x")
    link = {"Link": f'</v2/{APP}/referrers/{image.digest}?page=2>; rel="next"'}
    registry.fail("page=2", Fault(status=404), times=None)
    registry.fail("/referrers/", Fault(headers=link), times=None)
    answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
    assert (answer.status, answer.code) == (502, "UNKNOWN")


class TestWithoutUpstream:
    """What the index knows, else the children of the cached fallback tag, else 404."""

    async def test_the_children_of_the_cached_fallback_tag_are_listed(self, program, registry):
        registry.referrers = False
        image = registry.add_image()
        signature = sign(registry, image.digest, "sig/x")
        push_index(registry, APP, fallback_tag(image.digest), {"unknown/unknown": signature})
        target = f"/v2/{APP}/referrers/{image.digest}"
        assert (await program.ask(target)).status == 404
        await program.manifest(APP, fallback_tag(image.digest))
        await program.restart()
        async with registry.down():
            answer = await program.ask(target)
            assert [item["digest"] for item in answer.json["manifests"]] == [signature]
            await program.restart(offline=True)
            answer = await program.ask(target)
            assert [item["digest"] for item in answer.json["manifests"]] == [signature]

    async def test_the_index_and_the_fallback_tag_are_joined(self, program, registry):
        registry.referrers = False
        image = registry.add_image()
        signature, sbom = (sign(registry, image.digest, kind) for kind in ("sig/x", "sbom/y"))
        listed = {"unknown/unknown": signature, "unknown/other": sbom}
        push_index(registry, APP, fallback_tag(image.digest), listed)
        await program.manifest(APP, fallback_tag(image.digest))
        await program.manifest(APP, signature)
        await program.restart(offline=True)
        answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
        found = {item["digest"]: item for item in answer.json["manifests"]}
        assert found.keys() == {signature, sbom}
        assert found[signature]["artifactType"] == "sig/x"

    async def test_a_fallback_tag_that_is_the_subject_itself_lists_nothing(self, program, registry):
        registry.referrers = False
        image = registry.add_image(index=True)
        registry.move_tag(APP, fallback_tag(image.digest), image.digest)
        await program.manifest(APP, fallback_tag(image.digest))
        await program.restart(offline=True)
        answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
        assert (answer.status, answer.code) == UNKNOWN

    async def test_a_fallback_tag_whose_children_do_not_name_the_subject_lists_nothing(
        self, program, registry
    ):
        registry.referrers = False
        image = registry.add_image()
        other = registry.add_image(tag="other", layers=[b"other"], index=True)
        registry.move_tag(APP, fallback_tag(image.digest), other.digest)
        await program.manifest(APP, fallback_tag(image.digest))
        for digest in other.manifests.values():
            await program.manifest(APP, digest)
        await program.restart(offline=True)
        answer = await program.ask(f"/v2/{APP}/referrers/{image.digest}")
        assert (answer.status, answer.code) == UNKNOWN

    async def test_a_list_that_upstream_said_is_empty_stays_an_empty_list(self, program, registry):
        image = registry.add_image()
        target = f"/v2/{APP}/referrers/{image.digest}"
        assert (await program.ask(target)).json["manifests"] == []
        program.clock.advance(100_000)
        async with registry.down():
            answer = await program.ask(target)
            assert (answer.status, answer.json["manifests"]) == (200, [])
