"""Random requests, as clients, scanners and broken programs send them.

Most are nearly right, because a server refuses plain nonsense early.
"""

import random
from collections.abc import Callable, Sequence

METHODS = (
    ["GET"] * 12 + ["HEAD"] * 4 + ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"]
)
NAMES = [
    "library/app", "app", "docker.io/library/app", "docker.io/docker.io/app", "other.test/a/b", "a",
    "A/B", "a/../b", "a//b", "a" * 255, "a" * 256, "..", "a%2fb", "%61pp", "a\xe4", "library/app/",
    "_catalog", "a/blobs/uploads", "ghcr.io/x", "x:5000/y",
]  # fmt: skip
TAGS = ["latest", "v1", "1.0", "a" * 128, "a" * 129, ".x", "-x", "x y", "%6catest", "", "sha256:zz"]
HEX = ["0" * 64, "f" * 64, "F" * 64, "0" * 63, "g" * 64, "0" * 128]
QUERIES = [
    "", "", "", "?ns=docker.io", "?ns=other.test", "?ns=", "?ns=a&ns=b", "?n=1", "?n=-1", "?n=99999999999",
    "?n=x&last=%00", "?last=%ff", "?artifactType=x", "?q=app", "?q=%00", "?" + "a=b&" * 300, "?%", "?=",
]  # fmt: skip
RANGES = [
    "bytes=0-", "bytes=0-0", "bytes=-1", "bytes=5-3", "bytes=0-0,2-3", "bytes=" + "0-0," * 1100 + "1-1",
    "bytes=99999999999999999999-", "bytes=-0", "items=0-1", "bytes=", "bytes=a-b", "bytes=0-1\t,\t3-4",
]  # fmt: skip
ACCEPTS = [
    "*/*", "application/vnd.oci.image.index.v1+json", "application/vnd.oci.image.manifest.v1+json;q=0",
    "text/html", "application/json;q=x", "," * 500, "a/b, " * 500, "application/*", '"', "",
]  # fmt: skip
OTHER_HEADERS = [
    "If-None-Match: *", 'If-None-Match: "x"', "If-Range: x", "If-Modified-Since: yesterday",
    "Authorization: Basic Og==", "Authorization: Basic !!!", "Authorization: Bearer " + "x" * 900,
    "Expect: 100-continue", "Via: 1.1 x", "Connection: close", "Connection: keep-alive, x",
    "X-Forwarded-For: 1.2.3.4", "Upgrade: h2c", "Content-Length: 0", "Content-Length: 3\r\n\r\nabc",
    "Transfer-Encoding: chunked\r\n\r\n0", "Cookie: " + "c" * 7000, "TE: trailers", "A" * 300 + ": b",
]  # fmt: skip
HOSTS = ["127.0.0.1", "other.test", "docker.io", "[::1]:5000", "a b", "", "x" * 300, "mirror:99999"]


class RequestMaker:
    """Makes random requests; `digests` are of content that the upstream has."""

    def __init__(self, rng: random.Random, digests: Sequence[str]) -> None:
        self._rng = rng
        self._digests = [
            *digests,
            *(f"sha256:{one}" for one in HEX),
            "sha512:" + "0" * 128,
            "md5:0",
        ]
        self._targets: list[Callable[[], str]] = [
            lambda: f"/v2/{self._name()}/manifests/{rng.choice([*TAGS, self._digest()])}",
            lambda: f"/v2/{self._name()}/manifests/{self._digest()}",
            lambda: f"/v2/{self._name()}/blobs/{self._digest()}",
            lambda: f"/v2/{self._name()}/blobs/{self._digest()}",
            lambda: f"/v2/{self._name()}/referrers/{self._digest()}",
            lambda: f"/v2/{self._name()}/tags/list",
            lambda: rng.choice(["/v2/", "/v2", "/v2/_catalog", "/v1/search", "/v1/_ping", "/"]),
            lambda: rng.choice(["/healthz", "/readyz", "/metrics", "/api/v1/status", "/v3/x", "*"]),
            lambda: f"http://{rng.choice(HOSTS)}/v2/{self._name()}/tags/list",
        ]

    def make(self) -> bytes:
        """Return a request; one in ten is changed at random."""
        rng = self._rng
        lines = [
            f"{rng.choice(METHODS)} {rng.choice(self._targets)()}{rng.choice(QUERIES)} HTTP/1.1",
            f"Host: {rng.choice(HOSTS) if rng.random() < 0.05 else HOSTS[0]}",
        ]
        if rng.random() < 0.3:
            lines.append(f"Range: {rng.choice(RANGES)}")
        if rng.random() < 0.5:
            lines.append(f"Accept: {rng.choice(ACCEPTS)}")
        lines += rng.sample(OTHER_HEADERS, rng.choice([0, 0, 0, 1, 2]))
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        return self._change(data) if rng.random() < 0.1 else data

    def _name(self) -> str:
        # Most of the names exist, so that deeper code is reached.
        return self._rng.choice(NAMES) if self._rng.random() < 0.3 else NAMES[0]

    def _digest(self) -> str:
        return self._rng.choice(self._digests)

    def _change(self, data: bytes) -> bytes:
        at = self._rng.randrange(len(data))
        inserted = bytes(self._rng.choices(range(256), k=self._rng.randint(0, 3)))
        return data[:at] + inserted + data[at + self._rng.randint(0, 2) :]
