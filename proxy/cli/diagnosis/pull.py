"""A pull of a small image from the daemon's own listener, as a client does it."""

import hashlib
import http.client
import json
import platform
import time
from contextlib import closing
from typing import Any

from proxy.cli.diagnosis.finding import Finding
from proxy.cli.diagnosis.machine import open_connection
from proxy.cli.display.text import format_bytes
from proxy.oci.manifest import DOCKER_MANIFEST, DOCKER_MANIFEST_LIST, OCI_INDEX, OCI_MANIFEST
from proxy.oci.platform import machine_platform
from proxy.traffic import TEST_PULL_AGENT

# Bytes of the image; it need only be small.
MAX_PULL_SIZE = 64 << 20
# Seconds for a response, of which the daemon itself takes 15 at most.
PULL_TIMEOUT = 20.0
_ACCEPT = f"{OCI_INDEX}, {DOCKER_MANIFEST_LIST}, {OCI_MANIFEST}, {DOCKER_MANIFEST}"


class PullFailedError(Exception):
    """The image could not be pulled."""


def check_pull(address: str, image: str, *, is_tls: bool, is_offline: bool = False) -> Finding:
    """Pull `image`, a path with a tag such as `library/hello-world:latest`, and check every digest.

    That an image cannot be fetched while the daemon `is_offline` is not a failure.
    """
    name, _, tag = image.rpartition(":")
    pull = _TestPull(address, name, is_tls=is_tls)
    began = time.monotonic()
    try:
        pull.run(tag)
    except PullFailedError as error:
        if is_offline and str(error).startswith("status 503"):
            advice = "test an image that is stored, with --image: pullcache images lists them"
            return Finding("pull", "warn", f"{image}: {error}", advice)
        return Finding("pull", "fail", f"{image}: {error}", _advise(str(error)))
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return Finding(
            "pull",
            "fail",
            f"{image}: {error}",
            "see the log of the daemon: journalctl -u pullcache -e",
        )
    seconds = time.monotonic() - began
    size = format_bytes(pull.size)
    return Finding("pull", "ok", f"{image}: {size} in {seconds:.1f} s ({', '.join(pull.states)})")


def _advise(problem: str) -> str:
    if problem.startswith("status 401"):
        return "the cache requires a login (server.htpasswd): give clients one; this pull has none"
    if problem.startswith("status 403"):
        return "allow the image (allow, deny, [[policy]]), or test another one with --image"
    if problem.startswith("status 429"):
        return "wait, or set a login for the upstream, which raises its limit"
    if problem.startswith("status 404"):
        return (
            "test an image that exists, with --image; or give the upstream a login that may pull it"
        )
    return "first do what is said above; then look up the message in Troubleshooting"


class _TestPull:
    def __init__(self, address: str, name: str, *, is_tls: bool) -> None:
        self._address = address
        self._name = name
        self._is_tls = is_tls
        self.size = 0
        self.states: dict[str, None] = {}

    def run(self, tag: str) -> None:
        """Pull manifest, configuration and layers. Raises `PullFailedError`, `OSError` and others."""
        document = self._get_manifest(tag)
        if children := document.get("manifests"):
            document = self._get_manifest(_choose(children))
        for descriptor in (document["config"], *document["layers"]):
            digest = str(descriptor["digest"])
            self._verify(self._get(f"blobs/{digest}"), digest)

    def _get_manifest(self, reference: str) -> dict[str, Any]:
        content = self._get(f"manifests/{reference}")
        if ":" in reference:
            self._verify(content, reference)
        return dict(json.loads(content))

    def _get(self, path: str) -> bytes:
        with closing(open_connection(self._address, is_tls=self._is_tls)) as connection:
            connection.timeout = PULL_TIMEOUT
            headers = {"Accept": _ACCEPT, "User-Agent": TEST_PULL_AGENT}
            connection.request("GET", f"/v2/{self._name}/{path}", headers=headers)
            response = connection.getresponse()
            content = response.read(MAX_PULL_SIZE + 1)
            if response.status != 200:
                raise PullFailedError(f"status {response.status}: {_read_message(content)}")
            self.size += len(content)
            if self.size > MAX_PULL_SIZE:
                raise PullFailedError("the image is too large for a test; choose another (--image)")
            state = response.headers.get("Cache-Status", "").partition("; ")[2].partition(";")[0]
            self.states[state.replace("fwd=miss", "miss").replace("fwd=stale", "checked")] = None
            return content

    def _verify(self, content: bytes, digest: str) -> None:
        algorithm, _, expected = digest.partition(":")
        if algorithm == "sha256" and hashlib.sha256(content).hexdigest() != expected:
            raise PullFailedError(f"what the cache sent is not {digest}")


def _choose(children: list[dict[str, Any]]) -> str:
    """Return the digest for this machine's platform, or the first one."""
    native = machine_platform(platform.machine())
    for child in children:
        wanted = child.get("platform") or {}
        if (wanted.get("os"), wanted.get("architecture")) == (native.os, native.architecture):
            return str(child["digest"])
    return str(children[0]["digest"])


def _read_message(content: bytes) -> str:
    try:
        return str(json.loads(content)["errors"][0]["message"])
    except (ValueError, LookupError, TypeError):
        return content[:100].decode(errors="replace")
