"""The same requests to docker-registry itself and through pullcache: what differs is named here."""

import json
import re
from dataclasses import dataclass, field

import pytest

from tests.system.images import INDEX, MANIFEST, Image
from tests.system.servers import Daemon, Registry
from tests.system.wire import Answer, ask

DOCKER_TYPES = ", ".join(
    f"application/vnd.docker.distribution.manifest.{kind}+json" for kind in ("v2", "list.v2")
)
ACCEPT = {"Accept": f"{INDEX}, {MANIFEST}, {DOCKER_TYPES}"}
COMPARED = ("Content-Type", "Content-Length", "Docker-Content-Digest", "Content-Range")
MISSING = "sha256:" + "0" * 64


def filled(text: str, image: Image) -> str:
    return text.format(
        index=image.index,
        manifest=image.manifest,
        config=image.config,
        layer=image.layers[-1],
        missing=MISSING,
    )


@dataclass(frozen=True)
class Question:
    """A request; `{…}` in its path is filled with the image's digests."""

    name: str
    path: str
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)

    def put(self, url: str, image: Image) -> Answer:
        headers = {name: filled(value, image) for name, value in self.headers.items()}
        return ask(url, filled(self.path, image), method=self.method, headers=headers)


HELLO = "/v2/library/hello"
LAYER = HELLO + "/blobs/{layer}"
SAME = [
    Question("the base", "/v2/"),
    *(
        Question(f"{method} {name}", HELLO + path, method, ACCEPT)
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
        Question(f"range {value}", LAYER, headers={"Range": f"bytes={value}"})
        for value in ("0-", "0-0", "0-99", "100-199", "3000000-", "-1", "-500", "5-99999999")
    ),
]
ALIKE = [  # the same status and error code; messages and details are each program's own
    Question("an unknown tag", HELLO + "/manifests/none", headers=ACCEPT),
    Question("an unknown digest", HELLO + "/manifests/{missing}", headers=ACCEPT),
    Question("an unknown blob", HELLO + "/blobs/{missing}"),
    Question("the tags of an unknown repository", "/v2/library/none/tags/list"),
]


@dataclass(frozen=True)
class Difference:
    """A request that we answer otherwise than docker-registry 2.8.2 does, and why."""

    question: Question
    theirs: int
    ours: int
    why: str
    code: str = ""  # the error code of our JSON body
    headers: dict[str, str] = field(default_factory=dict)  # that our answer must carry


DIFFERENT = [
    Difference(
        Question("a manifest's digest and no Accept", HELLO + "/manifests/{manifest}"),
        *(404, 200, "by digest the bytes are served whatever Accept says"),
        headers={"Docker-Content-Digest": "{manifest}", "Content-Type": MANIFEST},
    ),
    Difference(
        Question("a tag and no Accept", HELLO + "/manifests/latest"),
        *(404, 200, "who names no type takes any"),
        headers={"Docker-Content-Digest": "{index}", "Content-Type": INDEX},
    ),
    Difference(
        Question("a tag for anything", HELLO + "/manifests/latest", headers={"Accept": "*/*"}),
        *(404, 200, "*/* is a wildcard"),
        headers={"Docker-Content-Digest": "{index}", "Content-Type": INDEX},
    ),
    Difference(
        Question(
            "a manifest that is known",
            HELLO + "/manifests/{manifest}",
            headers={**ACCEPT, "If-None-Match": '"{manifest}"'},
        ),
        *(304, 304, "a 304 repeats what identifies the manifest"),
        headers={"Docker-Content-Digest": "{manifest}", "ETag": '"{manifest}"'},
    ),
    Difference(
        Question("a blob that is known", LAYER, headers={"If-None-Match": '"{layer}"'}),
        *(304, 304, "ours has a Content-Type, which a 304 does not need"),
        headers={"Docker-Content-Digest": "{layer}", "ETag": '"{layer}"'},
    ),
    Difference(
        Question("a range behind the end", LAYER, headers={"Range": "bytes=99999999-"}),
        *(416, 416, "theirs announces a body of the blob's size and sends none"),
    ),
    Difference(
        Question("a suffix of nothing", LAYER, headers={"Range": "bytes=-0"}),
        *(206, 416, "no byte can satisfy it"),
    ),
    Difference(
        Question("a range that is none", LAYER, headers={"Range": "bytes=x"}),
        *(416, 200, "a malformed Range is ignored"),
    ),
    Difference(
        Question("a range that ends before it starts", LAYER, headers={"Range": "bytes=5-2"}),
        *(416, 200, "a malformed Range is ignored"),
    ),
    Difference(
        Question("a manifest's bad digest", HELLO + "/manifests/sha256:bad", headers=ACCEPT),
        *(500, 400, "the client's mistake is not the server's"),
        code="DIGEST_INVALID",
    ),
    Difference(
        Question("a bad name", "/v2/Library/hello/tags/list"),
        *(404, 400, "no registry can hold such a name"),
        code="NAME_INVALID",
    ),
    Difference(
        Question("the tags page by page", HELLO + "/tags/list?n=0"),
        *(200, 200, "theirs ignores n and last"),
    ),
    Difference(
        Question("no endpoint", HELLO + "/nothing"),
        *(404, 404, "every error has a JSON body"),
        headers={"Content-Type": "application/json"},
    ),
    Difference(
        Question("referrers", HELLO + "/referrers/{manifest}"),
        *(404, 404, "every error has a JSON body"),
        headers={"Content-Type": "application/json"},
    ),
    Difference(
        Question("an upload", HELLO + "/blobs/uploads/", "POST"),
        *(202, 405, "the cache is read-only"),
        code="UNSUPPORTED",
        headers={"Allow": "GET, HEAD"},
    ),
    Difference(
        Question("a push of a manifest", HELLO + "/manifests/new", "PUT"),
        *(400, 405, "the cache is read-only"),
        code="UNSUPPORTED",
        headers={"Allow": "GET, HEAD"},
    ),
]


def by_name(question: Question) -> str:
    return question.name


@pytest.mark.parametrize("question", SAME, ids=by_name)
def test_answers_are_the_registrys_own(
    question: Question, upstream: Registry, daemon: Daemon, image: Image
):
    expected = question.put(upstream.url, image)
    for temperature in ("cold", "warm"):
        got = question.put(daemon.url, image)
        assert got.status == expected.status, temperature
        assert described(got) == described(expected), temperature
        assert got.body == expected.body, temperature


@pytest.mark.parametrize("question", ALIKE, ids=by_name)
def test_errors_are_the_registrys_own(
    question: Question, upstream: Registry, daemon: Daemon, image: Image
):
    expected = question.put(upstream.url, image)
    for temperature in ("cold", "warm"):
        got = question.put(daemon.url, image)
        assert (got.status, codes(got)) == (expected.status, codes(expected)), temperature
        assert got.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize("difference", DIFFERENT, ids=lambda difference: difference.question.name)
def test_we_differ_from_the_registry_where_it_is_wrong_or_writes(
    difference: Difference, upstream: Registry, daemon: Daemon, image: Image
):
    theirs = difference.question.put(upstream.url, image)
    assert theirs.status == difference.theirs, "docker-registry has changed its mind"
    for temperature in ("cold", "warm"):
        got = difference.question.put(daemon.url, image)
        assert got.status == difference.ours, (temperature, difference.why)
        for name, value in difference.headers.items():
            assert got.headers[name].startswith(filled(value, image)), (temperature, name)
        if difference.code:
            assert codes(got) == [difference.code], temperature


def test_a_range_behind_the_end_is_answered_with_the_size(daemon: Daemon, image: Image):
    size = len(image.bytes_of(image.layers[-1]))
    question = Question("behind the end", LAYER, headers={"Range": f"bytes={size}-"})
    for _ in ("cold", "warm"):
        got = question.put(daemon.url, image)
        assert (got.status, got.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert int(got.headers["Content-Length"]) == len(got.body)


def test_the_tags_are_the_registrys_own(upstream: Registry, daemon: Daemon):
    expected = ask(upstream.url, HELLO + "/tags/list")
    for _ in ("cold", "warm"):
        got = ask(daemon.url, HELLO + "/tags/list")
        assert (got.status, json.loads(got.body)) == (expected.status, json.loads(expected.body))


def test_tags_come_page_by_page(upstream: Registry, daemon: Daemon, image: Image):
    for tag in ("b", "a", "c"):
        image.push(upstream.address, tag)
    path, seen = HELLO + "/tags/list?n=3", []
    while path:
        page = ask(daemon.url, path)
        seen.append(json.loads(page.body)["tags"])
        link = re.fullmatch(r'<([^>]+)>; *rel="next"', page.headers.get("Link", ""))
        path = link[1] if link else ""
    assert seen == [["a", "b", "c"], ["latest"]]


def described(answer: Answer) -> dict[str, str | None]:
    """Return the headers that clients act on; a charset says nothing about JSON."""
    headers = {name: answer.headers[name] for name in COMPARED}
    kind = headers["Content-Type"]
    return {**headers, "Content-Type": kind.removesuffix("; charset=utf-8") if kind else kind}


def codes(answer: Answer) -> list[str]:
    return [error["code"] for error in json.loads(answer.body)["errors"]]
