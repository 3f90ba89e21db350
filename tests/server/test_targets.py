"""Targets that are equal by RFC 3986 and RFC 9112 are the same resource, and no others are."""

import json
import ssl

import bcrypt
import pytest
from structlog.testing import capture_logs

from tests.fakes.content import FakeImage, digest_of
from tests.fakes.raw_client import RawClient, exchange
from tests.fakes.registry import FakeRegistry
from tests.support.program import Program

APP = "/v2/library/app"


@pytest.fixture
async def image(registry: FakeRegistry, program: Program) -> FakeImage:
    """An image that is cached."""
    image = registry.add_image()
    await program.pull(image)
    await program.wait_for_downloads()
    return image


def get(target: str, host: str = "127.0.0.1") -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def encode_all(path: str) -> str:
    """Return a path with each character but slashes percent-encoded."""
    return "".join(one if one == "/" else f"%{ord(one):02X}" for one in path)


async def test_characters_that_may_stand_as_they_are_may_be_encoded(program, image):
    paths = {
        f"{APP}/manifests/latest": image.digest,
        f"{APP}/manifests/{image.digest}": image.digest,
        f"{APP}/blobs/{image.config}": image.config,
    }
    for path, digest in paths.items():
        for target in (
            path,
            encode_all(path),
            encode_all(path).lower(),
            path.replace(":", "%3A"),
            path.replace(":", "%3a"),
            path.replace("a", "%61"),
            path.replace("/v2/", "/%762/"),
        ):
            answer = await exchange(program.url, get(target))
            assert (answer.status, digest_of(answer.body)) == (200, digest), target


async def test_encoded_lists_and_pages_name_the_repository_as_it_is(program, image):
    answer = await exchange(program.url, get(f"{encode_all(APP)}/tags/list?n=0"))
    assert json.loads(answer.body) == {"name": "library/app", "tags": []}
    image_paths = [encode_all("/v2/"), encode_all("/healthz"), encode_all("/v2/_catalog")]
    for target in image_paths:
        assert (await exchange(program.url, get(target))).status == 200


@pytest.mark.parametrize(
    "target",
    [
        "/v2/library%2Fapp/manifests/latest",
        "/v2%2Flibrary/app/manifests/latest",
        "/v2/library/app/manifests/%2561",
        "/v2/library/app/manifests/latest%3Fns=docker.io",
        "/v2/library/app/manifests/%2e%2e",
        "/v2/library/%2e%2e/app/manifests/latest",
        "/v2/library/app/manifests/latest%",
        "/v2/library/app/manifests/latest%6",
        "/v2/library/app/manifests/latest%zz",
        "/v2/library/app/manifests/latest%00",
        "/v2/library/app/manifests/latest%20",
        "/v2/library/app/manifests/latest%E2%80%A5",
        "/v2/library/app/manifests/sha256%3a..%2f..%2fx",
    ],
)
async def test_other_encoded_characters_are_no_part_of_a_name(program, registry, image, target):
    before = len(registry.requests)
    answer = await exchange(program.url, get(target))
    assert answer.status in (400, 404)
    assert json.loads(answer.body)["errors"]
    assert len(registry.requests) == before


@pytest.mark.parametrize(
    "prefix",
    [
        "http://127.0.0.1",
        "HTTP://127.0.0.1:5000",
        "http://u:p@cache",
        "https://cache",
        "http://[::1]:1",
    ],
)
async def test_a_target_may_be_an_absolute_url(program, image, prefix):
    for path in (f"{APP}/manifests/latest", f"{APP}/manifests/latest?ns=docker.io"):
        answer = await exchange(program.url, get(prefix + path))
        assert (answer.status, digest_of(answer.body)) == (200, image.digest)
    assert (await exchange(program.url, get(f"{prefix}/v2/"))).status == 200
    assert (await exchange(program.url, get(f"{prefix}/healthz"))).status == 200


@pytest.mark.parametrize(
    "target", ["http://cache", "http://cache?x", "http://", "http:///v2/", "x:/v2/"]
)
async def test_an_absolute_url_without_a_path_is_no_resource(program, target):
    assert (await exchange(program.url, get(target))).status in (400, 404)


async def test_the_host_of_an_absolute_url_replaces_the_header(registry, make_program):
    async with FakeRegistry() as other:
        program = await make_program(
            upstreams={
                "docker.io": {"url": registry.url},
                "ghcr.io": {"url": other.url, "hosts": ["ghcr.cache"]},
            }
        )
        image = other.add_image("owner/app")
        for host in ("docker.cache", "ghcr.cache"):
            target = "http://ghcr.cache:5000/v2/owner/app/manifests/latest"
            answer = await exchange(program.url, get(target, host))
            assert (answer.status, digest_of(answer.body)) == (200, image.digest)
        target = "http://docker.cache/v2/owner/app/manifests/latest"
        assert (await exchange(program.url, get(target, "ghcr.cache"))).status == 404


async def test_only_get_and_head_have_absolute_targets(program):
    for method, status in (("POST", 405), ("OPTIONS", 405)):
        data = get("http://cache/v2/library/app/manifests/x").replace(b"GET", method.encode())
        assert (await exchange(program.url, data)).status == status


async def test_the_login_is_required_whatever_the_form_of_the_target(
    registry, make_program, tmp_path
):
    file = tmp_path / "htpasswd"
    file.write_text(f"bob:{bcrypt.hashpw(b'secret', bcrypt.gensalt(4)).decode()}\n")
    program = await make_program(server={"htpasswd": str(file)})
    for target in (
        f"{APP}/manifests/latest",
        f"http://cache{APP}/manifests/latest",
        encode_all(APP),
    ):
        assert (await exchange(program.url, get(target))).status == 401
    for target in ("/healthz", "/%68ealthz", "http://cache/healthz"):
        assert (await exchange(program.url, get(target))).status == 200


async def test_a_tls_handshake_on_a_plain_port_is_answered_and_not_reported(program):
    context = ssl.create_default_context()
    hello = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="cache")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    data = hello.read()
    for pieces in ([data], [data[:1], data[1:]], [data[:3], data[3:]]):
        with capture_logs() as logged:
            peer = await RawClient.connect(program.url)
            for piece in pieces:
                peer.send(piece)
            answer = await peer.read_to_end()
            await peer.close()
        # Go's clients recognise plain HTTP by the first bytes of the response.
        assert answer.data.startswith(b"HTTP/1.1 400")
        assert "speaks plain HTTP" in json.loads(answer.body)["errors"][0]["message"]
        events = {entry["event"]: entry["log_level"] for entry in logged}
        assert events == {"tls_on_plain_port": "debug"}


async def test_other_bytes_that_are_no_http_are_still_reported(program):
    with capture_logs() as logged:
        await exchange(program.url, b"\x17\x03\x01 junk\r\n\r\n")
    assert [entry["event"] for entry in logged] == ["malformed_request_rejected"]
