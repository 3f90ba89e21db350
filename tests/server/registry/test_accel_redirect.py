"""`server.accel_redirect`: who gets the place of a stored blob instead of its bytes, and what is counted."""

import pytest

from tests.support.program import Answer, Program

LAYER = b"layer" * 1000
SETTINGS = {"trusted_proxies": ["127.0.0.0/8"], "accel_redirect": "/_blobs/"}
ASKS = {"X_Sendfile_Type": "X-Accel-Redirect"}


@pytest.fixture
async def cache(make_program, tmp_path, registry) -> Program:
    """A cache behind nginx that has an image with `LAYER`."""
    cache: Program = await make_program(tmp_path / "store", server=SETTINGS)
    await cache.pull(registry.add_image(layers=[LAYER]))
    await cache.wait_for_downloads()
    return cache


@pytest.fixture
def digest(registry, cache) -> str:
    return str(registry.add_image(layers=[LAYER]).blobs[-1])


def place(digest: str) -> str:
    return "/_blobs/" + digest.replace(":", "/")


async def promised(cache: Program) -> float:
    return await cache.metric("pullcache_promised_bytes_total", upstream="docker.io")


def check_redirect(answer: Answer, digest: str) -> None:
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["X-Accel-Redirect"] == place(digest)
    assert answer.headers["Docker-Content-Digest"] == digest
    assert answer.headers["ETag"] == f'"{digest}"'
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Length"] == "0"


async def test_nginx_is_told_where_a_stored_blob_is(cache, digest):
    for number in (1, 2):
        answer = await cache.blob(digest, **ASKS)
        check_redirect(answer, digest)
        assert answer.headers["Cache-Status"] == "pullcache; hit"
        assert await promised(cache) == number * len(LAYER)
    named = await cache.ask(f"/v2/library/app/blobs/{digest}?ns=docker.io", **ASKS)
    check_redirect(named, digest)
    assert named.headers["OCI-Namespace"] == "docker.io"


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("bytes=0-9", 10),
        ("bytes=-7", 7),
        ("bytes=0-0,10-19", 11),
        ("bytes=5000-", 0),
        ("bytes=x", len(LAYER)),
    ],
)
async def test_the_bytes_of_ranges_are_counted_as_promised(cache, digest, selection, expected):
    sent = await cache.metric("pullcache_response_bytes_total", kind="blob", cache="hit")
    check_redirect(await cache.blob(digest, Range=selection, **ASKS), digest)
    assert await promised(cache) == expected
    now = await cache.metric("pullcache_response_bytes_total", kind="blob", cache="hit")
    assert now - sent == expected


async def test_a_range_counts_as_the_whole_if_if_range_names_other_content(cache, digest):
    await cache.blob(digest, Range="bytes=0-9", If_Range='"other"', **ASKS)
    assert await promised(cache) == len(LAYER)


async def test_others_get_bytes(cache, digest):
    for headers in ({}, {"X_Sendfile_Type": "X-Sendfile"}, {"X_Sendfile_Type": ""}):
        assert (await cache.blob(digest, **headers)).body == LAYER
    head = await cache.blob(digest, method="HEAD", **ASKS)
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(LAYER)))
    assert (await cache.blob(digest, If_None_Match=f'"{digest}"', **ASKS)).status == 304
    assert (await cache.manifest("library/app", **ASKS)).body
    assert await promised(cache) == 0


@pytest.mark.parametrize(
    "server", [{"trusted_proxies": ["192.0.2.1"]}, {"accel_redirect": ""}], ids=str
)
async def test_a_stranger_gets_bytes_whatever_it_asks_for(cache, digest, server):
    await cache.restart(server={**SETTINGS, **server})
    answer = await cache.blob(digest, **ASKS)
    assert answer.body == LAYER
    assert "X-Accel-Redirect" not in answer.headers


async def test_a_client_that_the_proxy_speaks_for_gets_only_what_it_may_have(cache, digest):
    answer = await cache.blob(digest, "other/private", **ASKS)
    assert answer.status == 404
    assert "X-Accel-Redirect" not in answer.headers


async def test_content_that_first_needs_a_proof_is_sent_by_nginx_too(cache, registry, digest):
    other = registry.add_image(repository="library/other", layers=[LAYER])
    answer = await cache.blob(digest, other.repository, **ASKS)
    check_redirect(answer, digest)


@pytest.mark.parametrize("damage", ["removed", "truncated", "a link"])
async def test_a_blob_whose_file_is_damaged_is_fetched_again(cache, digest, damage):
    file = cache.root / "blobs" / "sha256" / digest.partition(":")[2]
    file.rename(cache.root / "elsewhere")
    if damage == "truncated":
        file.write_bytes(LAYER[:-1])
    elif damage == "a link":
        file.symlink_to(cache.root / "elsewhere")
    assert (await cache.blob(digest, **ASKS)).body == LAYER
