"""The same requests to docker-registry and to pullcache: their responses differ only where listed here."""

import json
import re
from dataclasses import dataclass, field

import pytest

from tests.system.http_client import HttpResponse, send_request
from tests.system.images import INDEX, MANIFEST, BuiltImage
from tests.system.servers import Daemon, Registry

DOCKER_TYPES = ", ".join(
    f"application/vnd.docker.distribution.manifest.{kind}+json" for kind in ("v2", "list.v2")
)
ACCEPT = {"Accept": f"{INDEX}, {MANIFEST}, {DOCKER_TYPES}"}
COMPARED_HEADERS = ("Content-Type", "Content-Length", "Docker-Content-Digest", "Content-Range")
MISSING = "sha256:" + "0" * 64


def insert_digests(text: str, image: BuiltImage) -> str:
    """Replace `{index}`, `{layer}` and so on by the image's digests."""
    return text.format(
        index=image.index,
        manifest=image.manifest,
        config=image.config,
        layer=image.layers[-1],
        missing=MISSING,
    )


@dataclass(frozen=True)
class ComparedRequest:
    """A request; its path and headers may contain names of digests, as in `{layer}`."""

    name: str
    path: str
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)

    def send(self, url: str, image: BuiltImage) -> HttpResponse:
        headers = {name: insert_digests(value, image) for name, value in self.headers.items()}
        path = insert_digests(self.path, image)
        return send_request(url, path, method=self.method, headers=headers)


HELLO = "/v2/library/hello"
LAYER = HELLO + "/blobs/{layer}"
EQUAL = [
    ComparedRequest("the base", "/v2/"),
    *(
        ComparedRequest(f"{method} {name}", HELLO + path, method, ACCEPT)
        for method in ("GET", "HEAD")
        for name, path in {
            "a tag": "/manifests/latest",
            "an index": "/manifests/{index}",
            "a manifest": "/manifests/{manifest}",
            "a config": "/blobs/{config}",
            "a layer": "/blobs/{layer}",
        }.items()
    ),
    *(
        ComparedRequest(f"range {value}", LAYER, headers={"Range": f"bytes={value}"})
        for value in ("0-", "0-0", "0-99", "100-199", "3000000-", "-1", "-500", "5-99999999")
    ),
]
EQUAL_ERRORS = [  # the same status and error code; messages and details differ
    ComparedRequest("an unknown tag", HELLO + "/manifests/none", headers=ACCEPT),
    ComparedRequest("an unknown digest", HELLO + "/manifests/{missing}", headers=ACCEPT),
    ComparedRequest("an unknown blob", HELLO + "/blobs/{missing}"),
    ComparedRequest("the tags of an unknown repository", "/v2/library/none/tags/list"),
]


@dataclass(frozen=True)
class Difference:
    """A request to which pullcache responds differently than docker-registry 2.8.2, and why.

    `theirs` and `ours` are statuses; our response must have `code` in its JSON body, if given, and
    `headers`.
    """

    request: ComparedRequest
    theirs: int
    ours: int
    why: str
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)


DIFFERENCES = [
    Difference(
        ComparedRequest("a manifest's digest and no Accept", HELLO + "/manifests/{manifest}"),
        *(404, 200, "a digest names exact bytes, so Accept does not matter"),
        headers={"Docker-Content-Digest": "{manifest}", "Content-Type": MANIFEST},
    ),
    Difference(
        ComparedRequest("a tag and no Accept", HELLO + "/manifests/latest"),
        *(404, 200, "without Accept, any type is acceptable"),
        headers={"Docker-Content-Digest": "{index}", "Content-Type": INDEX},
    ),
    Difference(
        ComparedRequest(
            "a tag with any type accepted", HELLO + "/manifests/latest", headers={"Accept": "*/*"}
        ),
        *(404, 200, "*/* is a wildcard"),
        headers={"Docker-Content-Digest": "{index}", "Content-Type": INDEX},
    ),
    Difference(
        ComparedRequest(
            "a manifest that the client has",
            HELLO + "/manifests/{manifest}",
            headers={**ACCEPT, "If-None-Match": '"{manifest}"'},
        ),
        *(304, 304, "our 304 has the headers that identify the manifest"),
        headers={"Docker-Content-Digest": "{manifest}", "ETag": '"{manifest}"'},
    ),
    Difference(
        ComparedRequest(
            "a blob that the client has", LAYER, headers={"If-None-Match": '"{layer}"'}
        ),
        *(304, 304, "our 304 also has a Content-Type"),
        headers={"Docker-Content-Digest": "{layer}", "ETag": '"{layer}"'},
    ),
    Difference(
        ComparedRequest("a range beyond the end", LAYER, headers={"Range": "bytes=99999999-"}),
        *(416, 416, "theirs has the blob's size as Content-Length and no body"),
    ),
    Difference(
        ComparedRequest("an empty suffix", LAYER, headers={"Range": "bytes=-0"}),
        *(206, 416, "an empty range cannot be satisfied"),
    ),
    Difference(
        ComparedRequest("a malformed range", LAYER, headers={"Range": "bytes=x"}),
        *(416, 200, "a malformed Range is ignored"),
    ),
    Difference(
        ComparedRequest(
            "a range that ends before it starts", LAYER, headers={"Range": "bytes=5-2"}
        ),
        *(416, 200, "a malformed Range is ignored"),
    ),
    Difference(
        ComparedRequest("a malformed digest", HELLO + "/manifests/sha256:bad", headers=ACCEPT),
        *(500, 400, "it is an error of the client"),
        code="DIGEST_INVALID",
    ),
    Difference(
        ComparedRequest("an invalid name", "/v2/Library/hello/tags/list"),
        *(404, 400, "no registry can have such a name"),
        code="NAME_INVALID",
    ),
    Difference(
        ComparedRequest("a page of tags", HELLO + "/tags/list?n=0"),
        *(200, 200, "theirs ignores n and last"),
    ),
    Difference(
        ComparedRequest("an unknown endpoint", HELLO + "/nothing"),
        *(404, 404, "every error has a JSON body"),
        headers={"Content-Type": "application/json"},
    ),
    Difference(
        ComparedRequest("referrers", HELLO + "/referrers/{manifest}"),
        *(404, 404, "every error has a JSON body"),
        headers={"Content-Type": "application/json"},
    ),
    Difference(
        ComparedRequest("an upload", HELLO + "/blobs/uploads/", "POST"),
        *(202, 405, "the cache is read-only"),
        code="UNSUPPORTED",
        headers={"Allow": "GET, HEAD"},
    ),
    Difference(
        ComparedRequest("a push of a manifest", HELLO + "/manifests/new", "PUT"),
        *(400, 405, "the cache is read-only"),
        code="UNSUPPORTED",
        headers={"Allow": "GET, HEAD"},
    ),
]


@pytest.mark.parametrize("case", EQUAL, ids=lambda case: case.name)
def test_responses_equal_those_of_the_registry(
    case: ComparedRequest, upstream: Registry, daemon: Daemon, image: BuiltImage
):
    expected = case.send(upstream.url, image)
    for state in ("not cached", "cached"):
        response = case.send(daemon.url, image)
        assert response.status == expected.status, state
        assert compared_headers(response) == compared_headers(expected), state
        assert response.body == expected.body, state


@pytest.mark.parametrize("case", EQUAL_ERRORS, ids=lambda case: case.name)
def test_errors_have_the_status_and_code_of_the_registry(
    case: ComparedRequest, upstream: Registry, daemon: Daemon, image: BuiltImage
):
    expected = case.send(upstream.url, image)
    for state in ("not cached", "cached"):
        response = case.send(daemon.url, image)
        assert response.status == expected.status, state
        assert error_codes(response) == error_codes(expected), state
        assert response.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda difference: difference.request.name)
def test_responses_differ_where_the_registry_is_wrong_or_accepts_pushes(
    difference: Difference, upstream: Registry, daemon: Daemon, image: BuiltImage
):
    theirs = difference.request.send(upstream.url, image)
    assert theirs.status == difference.theirs, "docker-registry has changed"
    for state in ("not cached", "cached"):
        response = difference.request.send(daemon.url, image)
        assert response.status == difference.ours, (state, difference.why)
        for name, value in difference.headers.items():
            assert response.headers[name].startswith(insert_digests(value, image)), (state, name)
        if difference.code:
            assert error_codes(response) == [difference.code], state


def test_the_response_to_a_range_beyond_the_end_has_the_size(daemon: Daemon, image: BuiltImage):
    size = len(image.bytes_of(image.layers[-1]))
    case = ComparedRequest("beyond the end", LAYER, headers={"Range": f"bytes={size}-"})
    for _ in ("not cached", "cached"):
        response = case.send(daemon.url, image)
        assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert int(response.headers["Content-Length"]) == len(response.body)


def test_the_tag_list_equals_that_of_the_registry(upstream: Registry, daemon: Daemon):
    expected = send_request(upstream.url, HELLO + "/tags/list")
    for _ in ("not cached", "cached"):
        response = send_request(daemon.url, HELLO + "/tags/list")
        assert response.status == expected.status
        assert json.loads(response.body) == json.loads(expected.body)


def test_tags_are_listed_in_pages(upstream: Registry, daemon: Daemon, image: BuiltImage):
    for tag in ("b", "a", "c"):
        image.push(upstream.address, tag)
    path, pages = HELLO + "/tags/list?n=3", []
    while path:
        page = send_request(daemon.url, path)
        pages.append(json.loads(page.body)["tags"])
        link = re.fullmatch(r'<([^>]+)>; *rel="next"', page.headers.get("Link", ""))
        path = link[1] if link else ""
    assert pages == [["a", "b", "c"], ["latest"]]


def compared_headers(response: HttpResponse) -> dict[str, str | None]:
    """Return the headers that clients use. The charset is ignored, because JSON is always UTF-8."""
    headers = {name: response.headers[name] for name in COMPARED_HEADERS}
    media_type = headers["Content-Type"]
    if media_type:
        headers["Content-Type"] = media_type.removesuffix("; charset=utf-8")
    return headers


def error_codes(response: HttpResponse) -> list[str]:
    return [error["code"] for error in json.loads(response.body)["errors"]]
