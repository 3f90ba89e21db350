"""Random responses of an upstream: status, headers, JSON of odd shapes, bodies, and how they end."""

import gzip
import json
import random
from typing import Any

from tests.fakes.content import digest_of

STATUSES = [200] * 14 + [
    100, 103, 201, 204, 206, 206, 301, 302, 304, 307, 308, 400, 401, 401, 403, 404, 404, 405, 406, 410, 416,
    451, 500, 501, 502, 503, 504, 599, 999,
]  # fmt: skip
RATE_LIMITED_SHARE = 0.0005
TYPES = [
    "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json", "application/json", "text/html", "",
    "application/octet-stream", "application/vnd.docker.distribution.manifest.v1+prettyjws", "x" * 300,
]  # fmt: skip
ODD_HEADERS = [
    "Docker-Content-Digest: sha256:" + "0" * 64, "Docker-Content-Digest: x", "Content-Encoding: gzip",
    "Content-Encoding: br", "Retry-After: 1", "Retry-After: -1", "Retry-After: yesterday",
    "Retry-After: 1e9", "RateLimit-Limit: 100;w=21600", "RateLimit-Remaining: x", "Location: /v2/",
    "Location: http://127.0.0.1:1/", "Location: \xe4", "Location: //", "Location: file:///etc/passwd",
    "Content-Range: bytes 0-0/1", "Content-Range: bytes 9-3/x", "Content-Range: bytes */5",
    'WWW-Authenticate: Bearer realm="http://127.0.0.1:1/token"', "WWW-Authenticate: Basic",
    'WWW-Authenticate: Bearer realm="', "WWW-Authenticate: " + "a=b," * 500, "Connection: close",
    'Link: </v2/x?n=1>; rel="next"', "Link: <>; rel=next", "Link: " + "<" * 900, "X: \xff\xfe",
    "Docker-Distribution-Api-Version: registry/2.0", "Set-Cookie: a=b", "Transfer-Encoding: gzip, chunked",
]  # fmt: skip
MANY_TAGS = b'{"tags":[%s]}' % b",".join(b'"%x"' % (n * 7919 % 65_521) for n in range(40_000))
FIXED_BODIES = [
    *[b"<!DOCTYPE html><title>Just a moment...</title>"] * 5,
    *[b"[" * 5000] * 2,
    b'{"tags":[' + b'"a",' * 20_000 + b'"a"]}',
    MANY_TAGS,
    *(gzip.compress(b"") * 5000, gzip.compress(bytes(9 << 20)), gzip.compress(b'{"tags":["a"]}')),
]
KEYS = [
    "schemaVersion", "mediaType", "config", "layers", "manifests", "tags", "name", "digest", "size", "urls",
    "annotations", "subject", "platform", "artifactType", "token", "access_token", "errors", "results",
    "MediaType", "expires_in", "fsLayers", "history", "os", "architecture", "data",
]  # fmt: skip


class ResponseMaker:
    """Makes random responses; `digests` are of content that is asked for."""

    def __init__(self, rng: random.Random, digests: list[str]) -> None:
        self._rng = rng
        self._digests = digests

    def make(self, target: str, contents: dict[str, bytes]) -> bytes:
        """Return the bytes of a response; `contents` are the right bodies by digest."""
        rng = self._rng
        right = next((body for digest, body in contents.items() if digest in target), None)
        body = right if right is not None and rng.random() < 0.5 else self._body()
        # A 429 pauses requests of its kind for a while.
        status = 429 if rng.random() < RATE_LIMITED_SHARE else rng.choice(STATUSES)
        lines = [f"HTTP/1.1 {status} {rng.choice(['OK', '', 'x' * 200])}"]
        if (kind := rng.choice(TYPES)) or rng.random() < 0.5:
            lines.append(f"Content-Type: {kind}")
        lines += rng.sample(ODD_HEADERS, rng.choice([0, 0, 0, 1, 2, 3]))
        framing = rng.random()
        if framing < 0.75:
            size = len(body) + (rng.choice([-1, 1, 1000]) if rng.random() < 0.1 else 0)
            lines.append(f"Content-Length: {max(0, size)}")
        elif framing < 0.9:
            lines.append("Transfer-Encoding: chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        else:
            lines.append("Connection: close")
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body
        if rng.random() < 0.05:
            data = data[: rng.randrange(len(data) + 1)]
        return data

    def _body(self) -> bytes:
        rng = self._rng
        chance = rng.random()
        if chance < 0.7:
            text = json.dumps(self._json(4))
            return text.encode() if rng.random() < 0.95 else text[: len(text) // 2].encode()
        if chance < 0.94:
            return rng.choice(FIXED_BODIES)
        return rng.randbytes(rng.choice([0, 1, 10, 10_000]))

    def _json(self, depth: int) -> Any:
        rng = self._rng
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(
                [
                    *(None, True, 0, -1, 1 << 70, 1.5, "", "x", "\ud800", "a" * 300),
                    *(rng.choice(TYPES), rng.choice(self._digests), digest_of(b"absent"), [], {}),
                ]
            )
        if rng.random() < 0.3:
            return [self._json(depth - 1) for _ in range(rng.randint(0, 4))]
        return {key: self._json(depth - 1) for key in rng.sample(KEYS, rng.randint(1, 7))}
