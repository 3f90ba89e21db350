"""Images and registries as they are found: what is right here has to stay right."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from tests.fakes.content import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    descriptor,
    digest_of,
)
from tests.fakes.faults import Fault
from tests.fakes.images import push_index, push_manifest
from tests.fakes.raw_client import RawClient
from tests.fakes.raw_server import HEAD_END, RawUpstream, RecvUntil, Send, Step
from tests.support.admin_api import APP, BASE, FOREIGN, NATIVE, OTHER, check_images
from tests.support.bundles import export_bundle, import_bundle
from tests.support.preload_api import run_preload
from tests.support.program import Program

MakeProgram = Callable[..., Awaitable[Program]]

HELM_CONFIG = "application/vnd.cncf.helm.config.v1+json"
HELM_CHART = "application/vnd.cncf.helm.chart.content.v1.tar+gzip"


# Images.


async def assert_bundled(
    program: Program, make_program: MakeProgram, name: str, digest: str
) -> None:
    """Check that an image goes from one store to another that is offline."""
    bundle = await export_bundle(program, name)
    other = await make_program(program.root.with_name("other"), offline=True)
    (imported,) = (await import_bundle(other, bundle))["images"]
    assert (imported["reason"], imported["missing"]) == ("", [])
    assert (await other.manifest(APP, digest)).digest == digest


@pytest.mark.parametrize("count", [101, 130])
async def test_an_image_may_have_many_layers_and_some_of_them_twice(registry, make_program, count):
    registry.pull_limit = None
    program = await make_program(fetch={"prefetch": "layers"})
    layers = [b"layer %d" % (number % 97) for number in range(count)]
    image = registry.add_image(layers=layers)
    await program.pull(image)
    run = await run_preload(program, "app")
    assert not run.events_of("failed")
    assert program.stored() == {image.digest, *image.blobs}
    for blob in set(image.blobs):
        assert registry.count(registry.body_of(blob)) == 1
    await assert_bundled(program, make_program, "app", image.digest)


async def test_a_sparse_index_is_pulled_preloaded_and_exported(registry, make_program):
    program = await make_program()
    present = push_manifest(registry, APP, [BASE], platform=NATIVE)
    absent = push_manifest(registry, APP, [OTHER], platform=FOREIGN)
    index = push_index(registry, APP, "sparse", {NATIVE: present, FOREIGN: absent})
    del registry.repository(APP).manifests[absent]
    assert (await program.manifest(APP, "sparse")).digest == index
    assert (await program.manifest(APP, present)).digest == present
    assert (await program.manifest(APP, absent)).status == 404
    run = await run_preload(program, "app:sparse")
    assert not run.events_of("failed")
    (check,) = await check_images(program, "app:sparse")
    assert check["state"] == "complete"
    await assert_bundled(program, make_program, "app:sparse", index)
    run = await run_preload(program, {"image": "app:sparse", "platforms": [FOREIGN]})
    assert run.events_of("failed")


async def test_an_image_with_foreign_layers_is_preloaded_without_them(registry, make_program):
    program = await make_program()
    digest = push_manifest(registry, APP, [BASE], tag="windows", foreign=[OTHER])
    run = await run_preload(program, "app:windows")
    assert not run.events_of("failed")
    assert digest_of(OTHER) not in program.stored()
    await assert_bundled(program, make_program, "app:windows", digest)


async def test_a_helm_chart_is_an_image_like_any_other(registry, make_program):
    program = await make_program()
    config, chart = b'{"name":"app","version":"1.0.0"}', b"chart"
    document = {
        "schemaVersion": 2,
        "config": descriptor(config, HELM_CONFIG),
        "layers": [descriptor(chart, HELM_CHART)],
    }
    for blob in (config, chart):
        registry.add_blob(blob)
    digest = registry.add_manifest(APP, "1.0.0", json.dumps(document).encode(), OCI_MANIFEST)
    answer = await program.manifest(APP, "1.0.0", Accept=OCI_MANIFEST)
    assert (answer.digest, answer.headers["Content-Type"]) == (digest, OCI_MANIFEST)
    run = await run_preload(program, "app:1.0.0")
    assert not run.events_of("failed")
    await assert_bundled(program, make_program, "app:1.0.0", digest)


async def test_digests_of_another_algorithm_are_verified_and_served(registry, program):
    layer, config = b"sha512 layer", b"{}"
    digests = [registry.add_blob(blob, algorithm="sha512") for blob in (config, layer)]
    descriptors = [
        descriptor(blob, kind) | {"digest": digest}
        for blob, kind, digest in zip(
            (config, layer), (OCI_CONFIG, OCI_LAYER), digests, strict=True
        )
    ]
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptors[0],
        "layers": descriptors[1:],
    }
    content = json.dumps(document).encode()
    by_sha256 = registry.add_manifest(APP, "odd", content, OCI_MANIFEST)
    by_sha512 = digest_of(content, "sha512")
    manifests = registry.repository(APP).manifests
    manifests[by_sha512] = manifests[by_sha256]
    for _ in range(2):
        for digest in (by_sha256, by_sha512):
            answer = await program.manifest(APP, digest)
            assert answer.body == content
            assert answer.headers["Docker-Content-Digest"] == digest
        for digest, blob in zip(digests, (config, layer), strict=True):
            answer = await program.blob(digest)
            assert (answer.body, answer.headers["Docker-Content-Digest"]) == (blob, digest)
        await program.wait_for_downloads()
    registry.fail("/blobs/|/registry-v2/", Fault(status=200, body=b"other"), times=None)
    wrong = digest_of(b"absent", "sha512")
    answer = await program.blob(wrong)
    assert answer.status == 404 or not answer.is_whole


async def test_a_blob_is_no_manifest_even_if_upstream_serves_it_as_one(registry, program):
    image = registry.add_image()
    layer = image.layers[0]
    assert (await program.manifest(APP, layer)).status == 404
    served = Fault(status=200, body=b"layer", headers={"Content-Type": "text/plain"})
    registry.fail(f"/manifests/{layer}", served, times=None)
    answer = await program.manifest(APP, layer)
    assert (answer.status, answer.body) == (200, b"layer")
    # It stays a blob, and the image is what it was.
    await program.pull(image)
    await program.wait_for_downloads()
    assert (await program.blob(layer)).body == b"layer"
    assert (await check_images(program, "app"))[0]["state"] == "complete"


# Transport.

MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(b"{}", OCI_CONFIG),
        "layers": [],
    }
).encode()
TYPE = f"Content-Type: {OCI_MANIFEST}\r\n".encode()
LENGTH = b"Content-Length: %d\r\n" % len(MANIFEST)
CLOSE = b"Connection: close\r\n"

RESPONSES = {
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + TYPE + LENGTH + b"\r\n",
    "HTTP/1.0 without a length": b"HTTP/1.0 200 OK\r\n" + TYPE + b"\r\n",
    "HTTP/1.1 without a length": b"HTTP/1.1 200 OK\r\n" + TYPE + CLOSE + b"\r\n",
    "bare line feeds": (b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + CLOSE + b"\r\n").replace(
        b"\r\n", b"\n"
    ),
    "no reason": b"HTTP/1.1 200\r\n" + TYPE + LENGTH + CLOSE + b"\r\n",
    "lower case": (b"HTTP/1.1 200 OK\r\n" + (TYPE + LENGTH + CLOSE).lower() + b"\r\n"),
    "after 103": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
    + (b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + CLOSE + b"\r\n"),
    "no digest": b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + CLOSE + b"\r\n",
}


def respond(response: bytes) -> list[Step]:
    return [RecvUntil(HEAD_END), Send(response)]


@pytest.mark.parametrize("name", RESPONSES)
async def test_a_response_may_have_any_form_that_clients_read(make_program, name):
    async with RawUpstream(respond(RESPONSES[name] + MANIFEST)) as raw:
        program = await make_program(upstreams={"docker.io": {"url": raw.url}})
        for reference in ("latest", digest_of(MANIFEST)):
            answer = await program.manifest(APP, reference)
            assert (answer.status, answer.body) == (200, MANIFEST)
            assert answer.headers["Docker-Content-Digest"] == digest_of(MANIFEST)
        blob = await program.blob(digest_of(MANIFEST))
        assert (blob.status, blob.body) == (200, MANIFEST)


LOCATIONS = {
    "absolute": "http://127.0.0.1:{port}/target?a=b%2Fc",
    "scheme-relative": "//127.0.0.1:{port}/target?a=b%2Fc",
    "absolute path": "/target?a=b%2Fc",
    "relative path": "../../../../target?a=b%2Fc",
    "relative to here": "target?a=b%2Fc",
    "query only": "?a=b%2Fc",
    "with a fragment": "/target?a=b%2Fc#part",
    "10 kB": "/target?a=b%2Fc&x=" + "y" * 10_000,
    "20 kB": "/target?a=b%2Fc&x=" + "y" * 20_000,
    "UTF-8": "/target?a=b%2Fc&x=\u00e9",
    "encoded": "/target?a=b%2Fc&x=%C3%A9%20%2B+~%7E!$'()*,;",
}


@pytest.mark.parametrize("kind", ["manifest", "blob"])
@pytest.mark.parametrize("name", LOCATIONS)
async def test_a_location_may_be_of_any_form(make_program, name, kind):
    async with RawUpstream(respond(b""), respond(b"")) as raw:
        location = LOCATIONS[name].format(port=raw.port)
        redirect = f"HTTP/1.1 307 X\r\nLocation: {location}\r\nContent-Length: 0\r\n".encode()
        response = b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + CLOSE + b"\r\n" + MANIFEST
        raw._scripts = (respond(redirect + CLOSE + b"\r\n"), respond(response))
        program = await make_program(upstreams={"docker.io": {"url": raw.url}})
        digest = digest_of(MANIFEST)
        answer = await (
            program.manifest(APP, digest) if kind == "manifest" else program.blob(digest)
        )
        assert (answer.status, answer.body) == (200, MANIFEST)
        target = raw.received[1].split(b" ")[1]
        assert b"a=b%2Fc" in target
        assert b"#" not in target
        if name == "encoded":
            assert target == location.encode()


async def test_a_registry_and_a_client_may_use_ipv6(make_program):
    response = b"HTTP/1.1 200 OK\r\n" + TYPE + LENGTH + CLOSE + b"\r\n" + MANIFEST
    async with RawUpstream(respond(response), host="::1") as raw:
        program = await make_program(
            upstreams={"docker.io": {"url": raw.url}}, server={"listen": ["[::1]:0"]}
        )
        assert program.url.startswith("http://[::1]:")
        assert (await program.manifest(APP)).body == MANIFEST


# Lists.


async def test_a_list_of_twenty_thousand_tags_is_complete_and_paged(registry, program):
    digest = registry.add_image().digest
    tags = sorted(["latest", *(f"v{number}" for number in range(20_000))])
    registry.repository(APP).tags = dict.fromkeys(tags, digest)
    registry.tags_page = 1000
    assert (await program.ask(f"/v2/{APP}/tags/list")).json["tags"] == tags
    found: list[str] = []
    target: str | None = f"/v2/{APP}/tags/list?n=7000"
    while target:
        page = await program.ask(target)
        found += page.json["tags"]
        target = page.headers.get("Link", "").partition(">")[0].lstrip("<") or None
    assert found == tags
    assert registry.count("tags/list") == 22  # once without a token


async def test_referrers_come_from_all_pages_and_are_filtered(registry, program):
    subject = registry.add_image().digest
    path = f"/v2/{APP}/referrers/{subject}"
    pages = [
        [{**descriptor(b"%d" % number, OCI_MANIFEST), "artifactType": f"type/{number % 2}"}]
        for number in range(3)
    ]
    for number, page in enumerate(pages):
        body = json.dumps({"mediaType": OCI_INDEX, "manifests": page}).encode()
        link = {"Link": f'<{path}?page={number + 1}>; rel="next"'} if number < 2 else {}
        query = rf"\?page={number}$" if number else "$"
        fault = Fault(status=200, body=body, headers={"Content-Type": OCI_INDEX, **link})
        registry.fail(f"/referrers/{subject}{query}", fault, times=None)
    assert (await program.ask(path)).json["manifests"] == [one for page in pages for one in page]
    answer = await program.ask(f"{path}?artifactType=type/0")
    assert answer.json["manifests"] == [*pages[0], *pages[2]]
    assert answer.headers["OCI-Filters-Applied"] == "artifactType"


# Logins.

LOGINS = {
    "ECR": ("AWS", "x" * 2500 + "=="),
    "GCR": (
        "_json_key",
        json.dumps({"type": "service_account", "key": "-----\nMII/+=\n"}, indent=2),
    ),
    "ACR": ("00000000-0000-0000-0000-000000000000", "a~b.c_d-e:f"),
    "accents": ("b\u00f6b", "p\u00e4ss w\u00f6rd"),
}


@pytest.mark.parametrize("name", LOGINS)
@pytest.mark.parametrize("has_token_server", [True, False])
async def test_logins_have_any_characters(registry, make_program, name, has_token_server):
    user, password = LOGINS[name]
    image = registry.add_image()
    registry.repository(APP).private = True
    registry.tokens.users[user] = password
    if not has_token_server:
        registry.auth = False
        challenge = {"WWW-Authenticate": 'Basic realm="registry",service="ecr"'}
        refused = Fault(status=401, body=b"", headers=challenge)
        registry.fail("/v2/", refused)
    login = {"username": user, "password": password}
    program = await make_program(upstreams={"docker.io": {"url": registry.url, **login}})
    assert (await program.manifest(image)).digest == image.digest
    sent = [seen.headers.get("Authorization", "") for seen in registry.requests]
    assert any(value.startswith("Basic ") for value in sent)


EIGHT = ["Negotiate", "NTLM", 'Digest realm="x, y", nonce="z"', 'Basic realm="x"'] * 2


@pytest.mark.parametrize("is_one_header", [True, False])
async def test_eight_challenges_have_the_right_one_among_them(
    make_program, registry, is_one_header
):
    image = registry.add_image()
    bearer = f'bearer REALM="{registry.url}/token", Service = "registry.fake"'
    lines = [*EIGHT[:5], bearer, *EIGHT[5:]]
    head = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n"
    if is_one_header:
        head += f"WWW-Authenticate: {', '.join(lines)}\r\n".encode()
    else:
        head += "".join(f"WWW-Authenticate: {line}\r\n" for line in lines).encode()
    content = registry.repository(APP).manifests[image.digest].content
    found = b"HTTP/1.1 200 OK\r\n" + TYPE + b"Content-Length: %d\r\n" % len(content)
    async with RawUpstream(
        respond(head + CLOSE + b"\r\n"), respond(found + CLOSE + b"\r\n" + content)
    ) as raw:
        program = await make_program(upstreams={"docker.io": {"url": raw.url}})
        assert (await program.manifest(APP)).digest == image.digest
        assert b"Authorization: Bearer " in raw.received[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"expires_in": "300"},
        {"expires_in": 0},
        {"issued_at": "1970-01-01T00:00:00Z"},
        {"issued_at": "2099-01-01T00:00:00.123456789+14:00", "expires_in": 10**12},
        {"issued_at": 0, "refresh_token": "x", "scope": ["a"], "token_type": "bearer"},
    ],
)
async def test_a_token_may_have_odd_times(registry, program, fields):
    registry.tokens.fields = fields
    image = registry.add_image()
    await program.pull(image)
    assert registry.count("/token") == 1


async def test_a_token_may_have_nine_kilobytes(registry, program):
    registry.tokens.suffix = "x" * 9000
    image = registry.add_image()
    await program.pull(image)


# Clients.


async def test_a_tag_that_moves_again_and_again_is_never_mixed_up(registry, make_program):
    registry.pull_limit = None
    program = await make_program(manifests={"ttl": "0s", "tag_ttl": {}})
    images = [registry.add_image(layers=[b"%d" % number]) for number in range(20)]
    known = {image.digest for image in images}

    async def ask() -> None:
        answer = await program.manifest(APP)
        assert answer.digest == answer.headers["Docker-Content-Digest"]
        assert answer.digest in known

    for image in images:
        registry.move_tag(APP, "latest", image.digest)
        await asyncio.gather(*(ask() for _ in range(5)))
        assert (await program.manifest(APP)).digest == image.digest
    assert await program.metric("pullcache_internal_errors_total") == 0


async def test_three_hundred_clients_that_hang_up_leave_nothing(registry, make_program):
    program = await make_program(server={"max_connections_per_client": 1000})
    layer = registry.add_blob(b"x" * 3_000_000)
    target = f"GET /v2/{APP}/blobs/{layer} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    peers = [await RawClient.connect(program.url) for _ in range(300)]
    for peer in peers:
        peer.send(target)
    for peer in peers:
        peer.writer.transport.abort()
    answer = await program.blob(layer)
    assert (answer.status, answer.digest) == (200, layer)
    await program.wait_for_downloads()
    assert registry.count(registry.body_of(layer)) == 1
