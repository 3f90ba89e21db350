"""Attacks on private content: a client, an upstream or a mirror tries to make the cache give it away.

In each, the image of `docker.io/me/secret` is cached. The attacker knows its digests and sizes.
"""

import asyncio
import json

import pytest

from tests.fakes.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    descriptor,
    digest_of,
)
from tests.fakes.faults import HTML, Fault
from tests.fakes.registry import FakeRegistry

SECRET = b"a secret layer " * 1000
THERE = "evil.test/any/thing"


@pytest.fixture
async def evil():
    """An upstream that is configured, and hostile."""
    async with FakeRegistry(auth=False, cdn=False) as evil:
        yield evil


@pytest.fixture
async def both(registry, evil, make_program):
    return await make_program(upstreams={"evil.test": {"url": evil.url}})


@pytest.fixture
async def secret(registry, both):
    image = registry.add_image("me/secret", layers=[SECRET], index=True)
    await both.pull(image)
    await both.wait_for_downloads()
    registry.requests.clear()
    return image


def document(**fields) -> bytes:
    return json.dumps({"schemaVersion": 2, **fields}).encode()


def digests(image) -> list[tuple[str, str]]:
    return [
        ("manifests", image.digest),
        ("manifests", image.manifest),
        *(("blobs", digest) for digest in (image.digest, image.manifest, *image.blobs)),
    ]


async def assert_served(program, image) -> None:
    for kind, digest in digests(image):
        answer = await program.ask(f"/v2/{image.repository}/{kind}/{digest}")
        assert (answer.status, answer.digest) == (200, digest)


# Proofs.


def echo(evil: FakeRegistry, image, registry: FakeRegistry) -> None:
    """Make the upstream claim to have each digest, with the right size, and send other bytes."""
    content = registry.repository("me/secret")
    known = {digest: len(one.content) for digest, one in content.manifests.items()}
    known |= {digest: len(one) for digest, one in content.blobs.items()}
    for kind, digest in digests(image):
        size = known[digest]
        headers = {"Docker-Content-Digest": digest, "Content-Range": f"bytes 0-0/{size}"}
        types = {"Content-Type": OCI_MANIFEST} if kind == "manifests" else {}
        whole = Fault(status=200, headers={**headers, **types}, body=bytes(size))
        evil.fail(f"/v2/any/thing/{kind}/{digest}", whole, times=None)


async def test_an_upstream_that_repeats_digest_and_size_is_not_given_what_another_sent(
    registry, evil, both, secret
):
    echo(evil, secret, registry)
    for kind, digest in digests(secret):
        for _ in range(2):
            answer = await both.ask(f"/v2/{THERE}/{kind}/{digest}")
            assert answer.digest != digest
            assert b"secret" not in answer.body
            await both.wait_for_downloads()
    await assert_served(both, secret)


@pytest.mark.parametrize("target", ["the portal", "nothing"])
async def test_a_redirect_proves_nothing(registry, evil, both, secret, target):
    """registry.k8s.io redirects every request for a blob, without looking whether it exists."""
    location = f"{evil.url}/{'portal' if target == 'the portal' else 'none'}"
    evil.fail("/portal", HTML, times=None)
    redirect = Fault(status=307, headers={"Location": location}, body=b"")
    evil.fail("/v2/any/thing/(blobs|manifests)", redirect, times=None)
    for kind, digest in digests(secret):
        for method in ("GET", "HEAD"):
            answer = await both.ask(f"/v2/{THERE}/{kind}/{digest}", method)
            assert b"secret" not in answer.body
            assert answer.digest != digest
            if kind == "manifests":
                assert answer.status >= 400
    await assert_served(both, secret)


@pytest.mark.parametrize(
    "portal",
    [
        HTML,
        Fault(status=200, body=b"{}", headers={"Docker-Content-Digest": None}),
        Fault(status=200, headers={"Docker-Content-Digest": digest_of(b"x")}, body=bytes(15000)),
        Fault(status=206, headers={"Content-Range": "bytes 0-0/7"}, body=b"x"),
        Fault(status=206, headers={"Content-Range": "bytes 0-0/*"}, body=b"x"),
        Fault(status=206, headers={"Content-Range": None}, body=b"x"),
        Fault(status=204, body=b""),
        Fault(status=500),
    ],
    ids=["page", "json", "another digest", "another size", "no size", "no range", "204", "500"],
)
async def test_an_answer_to_everything_proves_nothing(registry, both, secret, portal):
    """A hotel's portal, or a registry that is broken, stands before the upstream itself."""
    registry.repository("me/public")
    headers = {"Docker-Content-Digest": None, **portal.headers}
    fault = Fault(status=portal.status, body=portal.body, headers=headers)
    registry.fail("/v2/me/public/(blobs|manifests)", fault, times=None)
    for _ in range(2):
        for kind, digest in digests(secret):
            for method in ("GET", "HEAD"):
                answer = await both.ask(f"/v2/me/public/{kind}/{digest}", method)
                assert b"secret" not in answer.body
                assert answer.digest != digest
        await both.restart()
        registry.heal()
    await assert_served(both, secret)


async def test_a_proof_links_one_repository_and_lasts_until_eviction(registry, both, secret):
    layer = secret.layers[0]
    registry.add_blob(SECRET, "me/public")
    assert (await both.blob(layer, "me/public")).digest == layer
    async with registry.down():
        assert (await both.blob(layer, "me/public")).digest == layer
        assert (await both.blob(layer, "me/other")).status >= 400
        assert (await both.blob(layer, THERE)).status >= 400
    await both.restart()
    async with registry.down():
        assert (await both.blob(layer, "me/public")).digest == layer


async def test_an_upstream_that_has_sent_all_of_it_is_given_it_back(registry, evil, both, secret):
    evil.add_blob(SECRET, "any/thing")
    layer = secret.layers[0]
    assert (await both.blob(layer, THERE)).digest == layer
    assert evil.bytes_sent(layer) == len(SECRET)
    await both.wait_for_downloads()
    await both.restart()
    assert (await both.blob(layer, THERE)).digest == layer
    assert evil.bytes_sent(layer) == len(SECRET)
    # Its other repositories need a proof, as everywhere.
    assert (await both.blob(layer, "evil.test/other/thing")).status == 404
    evil.add_blob(SECRET, "other/thing")
    assert (await both.blob(layer, "evil.test/other/thing")).digest == layer
    assert evil.bytes_sent(layer) < 2 * len(SECRET)


async def test_a_registry_that_states_no_size_proves_by_its_digest_or_sends_all(registry, both):
    registry.cdn = False
    registry.front.send_length = registry.front.accept_ranges = False
    content = b"layer" * 1000
    layer = digest_of(content)
    for name in ("me/app", "me/copy", "me/third"):
        registry.add_blob(content, name)
    assert (await both.blob(layer, "me/app")).digest == layer
    await both.wait_for_downloads()
    assert (await both.blob(layer, "me/copy")).digest == layer
    assert registry.count(f"GET /v2/me/copy/blobs/{layer}") == 1
    registry.fail("/v2/me/third", Fault(headers={"Docker-Content-Digest": None}), times=None)
    assert (await both.blob(layer, "me/third")).digest == layer
    await both.wait_for_downloads()
    assert registry.count(f"GET /v2/me/third/blobs/{layer}") == 2
    assert (await both.blob(layer, "me/third")).digest == layer
    assert registry.count(f"GET /v2/me/third/blobs/{layer}") == 2


# Downloads that run, and what they leave.


async def test_a_private_download_is_not_joined_on_a_redirect(registry, both):
    blob = registry.add_blob(SECRET * 20, "me/secret")
    registry.repository("me/public")
    registry.fail(
        "/v2/me/public/blobs",
        Fault(status=307, headers={"Location": f"{registry.url}/none"}, body=b""),
        times=None,
    )
    hold = asyncio.Event()
    registry.fail(registry.body_of(blob), Fault(stall_at=100_000, until=hold))
    async with both.opened(f"/v2/me/secret/blobs/{blob}") as response:
        await response.content.readexactly(10_000)
        async with asyncio.TaskGroup() as group:
            asked = [
                group.create_task(both.ask(f"/v2/me/public/blobs/{blob}", method))
                for method in ("GET", "HEAD")
            ]
            await registry.until(lambda: registry.count("GET /none") > 0)
            hold.set()
        await response.read()
    for task in asked:
        assert b"secret" not in task.result().body
    assert (await both.blob(blob, "me/public")).status == 404


async def test_bytes_that_one_repository_has_left_are_not_shown_to_another(registry, both):
    """They would be sent before upstream has said anything."""
    blob = registry.add_blob(SECRET * 20, "me/secret")
    registry.repository("me/public")
    registry.fail(registry.body_of(blob), Fault(stall_at=200_000, until=asyncio.Event()))
    async with both.opened(f"/v2/me/secret/blobs/{blob}") as response:
        await response.content.readexactly(150_000)
        await both.stop()
    await both.start()
    hold = asyncio.Event()
    registry.fail("/v2/me/public/blobs", Fault(until_headers=hold), times=None)
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(both.blob(blob, "me/public"))
        await registry.until(lambda: registry.count("GET /v2/me/public/blobs") > 0)
        hold.set()
    assert asked.result().status == 404
    assert b"secret" not in asked.result().body


async def test_a_proof_given_while_it_arrives_lasts_after_the_commit(registry, both):
    blob = registry.add_blob(SECRET * 20, "me/secret")
    registry.add_blob(SECRET * 20, "me/public")
    hold = asyncio.Event()
    registry.fail(registry.body_of(blob), Fault(stall_at=100_000, until=hold))
    async with (
        both.opened(f"/v2/me/secret/blobs/{blob}") as response,
        both.opened(f"/v2/me/public/blobs/{blob}") as shared,
    ):
        await shared.content.readexactly(10_000)
        hold.set()
        await asyncio.gather(response.read(), shared.read())
    await both.wait_for_downloads()
    async with registry.down():
        assert (await both.blob(blob, "me/public")).digest == blob


# What a manifest names.


@pytest.fixture
def claims(registry, secret):
    """Manifests of a public repository that name all that is private."""
    content = registry.repository("me/secret")
    config, layer = (content.blobs[digest] for digest in secret.blobs)
    manifests = [content.manifests[digest] for digest in (secret.digest, secret.manifest)]
    image = document(
        mediaType=OCI_MANIFEST,
        config=descriptor(config, "application/vnd.oci.image.config.v1+json"),
        layers=[
            descriptor(one, "application/vnd.oci.image.layer.v1.tar")
            for one in (layer, manifests[0].content, manifests[1].content)
        ],
    )
    entries = [descriptor(one.content, one.media_type) for one in manifests]
    index = document(
        mediaType=OCI_INDEX,
        manifests=[{**e, "platform": {"os": "linux", "architecture": "amd64"}} for e in entries],
    )
    registry.add_manifest("me/public", "image", image, OCI_MANIFEST)
    registry.add_manifest("me/public", "index", index, OCI_INDEX)


async def test_a_manifest_opens_nothing_that_it_names(registry, both, secret, claims):
    for tag in ("image", "index"):
        assert (await both.manifest("me/public", tag)).status == 200
    for kind, digest in digests(secret):
        answer = await both.ask(f"/v2/me/public/{kind}/{digest}")
        assert answer.status >= 400
        await both.restart()
        answer = await both.ask(f"/v2/me/public/{kind}/{digest}")
        assert answer.status >= 400


async def test_a_manifest_of_another_upstream_opens_nothing_that_it_names(
    registry, evil, both, secret, claims
):
    for tag in ("image", "index"):
        content = registry.repository("me/public").manifests[
            registry.repository("me/public").tags[tag]
        ]
        evil.add_manifest("any/thing", tag, content.content, content.media_type)
        assert (await both.manifest(THERE, tag)).status == 200
    for kind, digest in digests(secret):
        assert (await both.ask(f"/v2/{THERE}/{kind}/{digest}")).status >= 400


async def test_an_index_opens_nothing_for_a_client_that_takes_none(registry, both, secret):
    manifest = registry.repository("me/secret").manifests[secret.manifest]
    entry = descriptor(manifest.content, manifest.media_type)
    index = document(
        mediaType=DOCKER_LIST,
        manifests=[{**entry, "platform": {"os": "linux", "architecture": "amd64"}}],
    )
    registry.add_manifest("me/public", "latest", index, DOCKER_LIST)
    registry.fail("HEAD /v2/me/public", Fault(headers={"Content-Type": DOCKER_LIST}))
    answer = await both.manifest("me/public", "latest", Accept=f"{OCI_MANIFEST}, {DOCKER_LIST}")
    assert answer.status == 200
    answer = await both.manifest("me/public", "latest", Accept=f"{OCI_MANIFEST}, {DOCKER_MANIFEST}")
    assert answer.status == 404
    assert b"layers" not in answer.body


async def test_a_referrer_of_another_repository_is_not_listed(registry, both):
    subject = registry.add_image("me/secret")
    fields = {
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"{}", "application/vnd.oci.empty.v1+json"),
        "layers": [],
        "subject": descriptor(b"x", OCI_MANIFEST) | {"digest": subject.digest},
    }
    signature = registry.add_manifest("me/secret", None, document(**fields), OCI_MANIFEST)
    assert (await both.manifest("me/secret", signature)).status == 200
    registry.add_manifest(
        "me/public",
        "latest",
        document(
            mediaType=OCI_INDEX,
            manifests=[
                descriptor(document(**fields), OCI_MANIFEST),
            ],
        ),
        OCI_INDEX,
    )
    assert (await both.manifest("me/public")).status == 200
    async with registry.down():
        own = await both.ask(f"/v2/me/secret/referrers/{subject.digest}")
        assert [one["digest"] for one in own.json["manifests"]] == [signature]
        answer = await both.ask(f"/v2/me/public/referrers/{subject.digest}")
        assert signature.encode() not in answer.body


# Mirrors.


@pytest.fixture
async def mirror():
    async with FakeRegistry(auth=False, cdn=False) as mirror:
        yield mirror


async def test_a_mirror_that_names_a_private_manifest_for_a_tag_links_nothing(
    registry, mirror, make_program
):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "mirrors": [mirror.url]}}
    )
    image = registry.add_image("me/secret", layers=[SECRET])
    await program.pull(image)
    public = registry.add_image("me/public", layers=[b"public"])
    assert (await program.manifest("me/public")).digest == public.digest
    await program.wait_for_downloads()
    program.clock.advance(3600)
    named = {"Docker-Content-Digest": image.digest, "Content-Type": OCI_MANIFEST}
    mirror.fail("HEAD /v2/me/public/", Fault(status=200, headers=named, body=b""), times=None)
    answer = await program.manifest("me/public")
    assert answer.digest != image.digest
    for kind, digest in (("manifests", image.digest), ("blobs", image.layers[0])):
        assert (await program.ask(f"/v2/me/public/{kind}/{digest}")).status >= 400
    mirror.heal()
    assert (await program.manifest("me/public")).digest == public.digest


async def test_a_mirror_that_sends_all_of_it_is_given_it_back(registry, mirror, make_program):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "mirrors": [mirror.url]}}
    )
    image = registry.add_image("me/secret", layers=[SECRET])
    await program.pull(image)
    await program.wait_for_downloads()
    copy = mirror.add_image("me/copy", layers=[SECRET])
    assert copy.digest == image.digest
    await program.pull(copy)
    await program.wait_for_downloads()
    await registry.stop()
    await mirror.stop()
    await program.restart()
    for kind, digest in digests(copy):
        assert (await program.ask(f"/v2/me/copy/{kind}/{digest}")).digest == digest


async def test_a_mirror_sends_a_manifest_that_the_registry_answers_with_something_else(
    registry, mirror, make_program
):
    program = await make_program(
        upstreams={"docker.io": {"url": registry.url, "mirrors": [mirror.url]}}
    )
    image = registry.add_image("me/app")
    await program.pull(image)
    mirror.add_image("me/copy")
    portal = Fault(status=200, body=b"{}", headers={"Docker-Content-Digest": None})
    registry.fail("/v2/me/copy", portal, times=None)
    assert (await program.manifest("me/copy", image.digest)).digest == image.digest


# Media types.


async def test_an_upstream_cannot_change_the_media_type_of_anothers_manifest(registry, evil, both):
    """Nothing in the content tells the type, so each upstream's header does."""
    content = b'{"schemaVersion": 2}'
    digest = registry.add_manifest("me/app", "latest", content, DOCKER_MANIFEST)
    evil.add_manifest("any/thing", "latest", content, OCI_MANIFEST)
    types = {"me/app": DOCKER_MANIFEST, THERE: OCI_MANIFEST}
    for _ in range(2):
        for name, media_type in types.items():
            for reference in ("latest", digest):
                for method in ("GET", "HEAD"):
                    answer = await both.manifest(name, reference, method=method)
                    assert (answer.status, answer.headers["Content-Type"]) == (200, media_type)
        await both.restart()
    # Another repository gets the type that its own upstream has stated.
    for upstream, name in ((registry, "me/copy"), (evil, "any/copy")):
        upstream.add_manifest(name, None, content, OCI_INDEX)
    assert (await both.manifest("me/copy", digest)).headers["Content-Type"] == DOCKER_MANIFEST
    answer = await both.manifest("evil.test/any/copy", digest)
    assert answer.headers["Content-Type"] == OCI_MANIFEST
