"""The responses of a fake registry, its token check and its CDN, without sockets.

They are what Docker Hub and distribution were seen to send: 401 for a repository that does not
exist, 307 to signed URLs that allow GET only, and pull limits to which a HEAD does not count. The
Accept header is matched by exact media type.
"""

import json
import re
import secrets
from abc import ABC, abstractmethod

from aiohttp import web

from tests.fakes.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    FakeContent,
    FakeManifest,
    FakeRepository,
    digest_of,
)
from tests.fakes.faults import Reply
from tests.fakes.search import ListedRepository, search
from tests.fakes.tokens import SERVICE, TokenService, error

_RESOURCE = re.compile(r"/v2/(?P<name>.+)/(?P<kind>blobs|manifests|referrers)/(?P<ref>[^/]+)")
_TAGS = re.compile(r"/v2/(?P<name>.+)/tags/list")
_STORED_TYPES = ("application/vnd.oci.image.", "application/vnd.docker.distribution.")
_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"


class RegistryApi(FakeContent, ABC):
    """Responds as a registry with this content. Its attributes may be changed at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = True
        self.cdn = True
        self.redirect_heads = True
        self.referrers = True
        self.tags_page: int | None = None
        self.pull_limit: int | None = 100
        self.pulls = 0
        self.catalogue: list[ListedRepository] | None = None
        self.tokens = TokenService()
        self._signed: dict[str, bytes] = {}

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL of the registry and its token service."""

    @property
    @abstractmethod
    def cdn_url(self) -> str:
        """The URL of the CDN, from which blobs are served."""

    def expire_addresses(self) -> None:
        """Invalidate every signed URL handed out so far."""
        self._signed.clear()

    def answer(self, request: web.BaseRequest) -> Reply:
        """Respond as the registry or its token service."""
        path = request.raw_path.partition("?")[0]
        if path == "/token":
            return self.tokens.issue(request)
        if path == "/v1/search" and self.catalogue is not None:
            return search(self.catalogue, request)
        if path == "/v2/":
            return self._check_token(request, None) or self._json({})
        if path == "/v2/_catalog":
            return self._challenge("registry:catalog:*")
        route = _RESOURCE.fullmatch(path) or _TAGS.fullmatch(path)
        if route is None:
            return Reply(404, {"Content-Type": "text/plain"}, b"404 page not found\n")
        return self._check_token(request, route["name"]) or self._resource(
            request, **route.groupdict()
        )

    def _resource(
        self, request: web.BaseRequest, name: str, kind: str = "tags", ref: str = ""
    ) -> Reply:
        repository = self.repositories.get(name)
        if repository is None:
            return error(404, "NAME_UNKNOWN", "repository name not known to registry")
        if kind == "tags":
            return self._tags(request, name, repository)
        handlers = {
            "blobs": self._blob,
            "manifests": self._manifest,
            "referrers": self._referrers,
        }
        return handlers[kind](request, repository, ref)

    def _check_token(self, request: web.BaseRequest, name: str | None) -> Reply | None:
        if not self.auth:
            return None
        scope = f"repository:{name}:pull" if name else None
        header = request.headers.get("Authorization")
        if header is None:
            return self._challenge(scope)
        grant = self.tokens.grant(header)
        if grant is None:
            return self._challenge(scope, "invalid_token")
        if name is None:
            return None
        repository = self.repositories.get(name)
        is_hidden = repository is None or (repository.private and grant.user is None)
        if scope not in grant.scopes or is_hidden:
            return self._challenge(scope, "insufficient_scope")
        return None

    def _challenge(self, scope: str | None, reason: str | None = None) -> Reply:
        challenge = f'Bearer realm="{self.url}/token",service="{SERVICE}"'
        challenge += f',scope="{scope}"' if scope else ""
        challenge += f',error="{reason}"' if reason else ""
        return error(
            401,
            "UNAUTHORIZED",
            "authentication required",
            WWW_Authenticate=challenge,
            Docker_Distribution_Api_Version="registry/2.0",
        )

    def _manifest(
        self, request: web.BaseRequest, repository: FakeRepository, reference: str
    ) -> Reply:
        limit = self._limit_headers()
        if request.method == "GET" and self.pull_limit is not None:
            if self.pulls >= self.pull_limit:
                message = "You have reached your pull rate limit. https://www.docker.com/limit"
                return error(429, "TOOMANYREQUESTS", message, **limit)
            self.pulls += 1
            limit = self._limit_headers()
        digest = repository.tags.get(reference, reference)
        manifest = repository.manifests.get(digest)
        if manifest is None:
            return error(404, "MANIFEST_UNKNOWN", "manifest unknown", **limit)
        if ":" not in reference:
            converted = _convert(manifest, repository, accepted_types(request))
            if isinstance(converted, Reply):
                return converted
            manifest = converted
        digest = reference if ":" in reference else digest_of(manifest.content)
        headers = {
            "Content-Type": manifest.media_type,
            "Docker-Content-Digest": digest,
            "ETag": f'"{digest}"',
            "Docker-Distribution-Api-Version": "registry/2.0",
            **{name.replace("_", "-"): value for name, value in limit.items()},
        }
        if request.headers.get("If-None-Match") in (digest, f'"{digest}"'):
            return Reply(304, headers)
        return Reply(200, headers, manifest.content)

    def _limit_headers(self) -> dict[str, str]:
        if self.pull_limit is None:
            return {}
        return {
            "ratelimit_limit": f"{self.pull_limit};w=21600",
            "ratelimit_remaining": f"{self.pull_limit - self.pulls};w=21600",
            "docker_ratelimit_source": "192.0.2.1",
        }

    def _blob(self, request: web.BaseRequest, repository: FakeRepository, digest: str) -> Reply:
        content = repository.blobs.get(digest)
        if content is None:
            return error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if self.cdn and (request.method == "GET" or self.redirect_heads):
            return Reply(307, {"Location": self._sign(digest, content)})
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "ETag": f'"{digest}"',
            "Accept-Ranges": "bytes",
            "Cache-Control": "max-age=31536000",
        }
        return Reply(200, headers, content)

    def _referrers(
        self, request: web.BaseRequest, repository: FakeRepository, digest: str
    ) -> Reply:
        if not self.referrers:
            return Reply(404, {"Content-Type": "text/plain"}, b"404 page not found\n")
        wanted = request.query.get("artifactType")
        entries = []
        for own_digest, manifest in repository.manifests.items():
            if manifest.subject != digest:
                continue
            kind = manifest.document.get("artifactType")
            if wanted in (None, kind):
                entry = {
                    "mediaType": manifest.media_type,
                    "digest": own_digest,
                    "size": len(manifest.content),
                }
                entries.append({**entry, "artifactType": kind} if kind else entry)
        reply = self._json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
        applied = {"OCI-Filters-Applied": "artifactType"} if wanted else {}
        return Reply(200, {"Content-Type": OCI_INDEX, **applied}, reply.body)

    def _tags(self, request: web.BaseRequest, name: str, repository: FakeRepository) -> Reply:
        last = request.query.get("last", "")
        tags = sorted(tag for tag in repository.tags if tag > last)
        limits = [int(request.query["n"])] if "n" in request.query else []
        limits += [self.tags_page] if self.tags_page is not None else []
        page = tags[: min(limits)] if limits else tags
        reply = self._json({"name": name, "tags": page})
        if page and len(page) < len(tags):
            link = f'</v2/{name}/tags/list?last={page[-1]}&n={min(limits)}>; rel="next"'
            return Reply(200, {**reply.headers, "Link": link}, reply.body)
        return reply

    @staticmethod
    def _json(document: object) -> Reply:
        headers = {
            "Content-Type": "application/json",
            "Docker-Distribution-Api-Version": "registry/2.0",
        }
        return Reply(200, headers, json.dumps(document).encode())

    # The CDN.

    def _sign(self, digest: str, content: bytes) -> str:
        algorithm, _, hexdigits = digest.partition(":")
        target = (
            f"/registry-v2/docker/registry/v2/blobs/{algorithm}/{hexdigits[:2]}/{hexdigits}/data"
            f"?X-Amz-Credential=FAKE%2F20260101%2Fauto%2Fs3%2Faws4_request"
            f"&X-Amz-Signature={secrets.token_hex(16)}&verify=1%7E2%2B3%3D"
        )
        self._signed[target] = content
        return self.cdn_url + target

    def answer_cdn(self, request: web.BaseRequest) -> Reply:
        """Respond as the CDN."""
        content = self._signed.get(request.raw_path)
        if "Authorization" in request.headers:
            return _xml(400, "InvalidArgument", "Only one auth mechanism allowed")
        if content is None or request.method != "GET":
            return _xml(403, "SignatureDoesNotMatch", "Check your key and signing method")
        headers = {
            "Content-Type": "application/octet-stream",
            "ETag": f'"{digest_of(content, "md5")[4:]}"',
            "Accept-Ranges": "bytes",
        }
        return Reply(200, headers, content)


def accepted_types(request: web.BaseRequest) -> set[str]:
    """Return the media types of all Accept lines; parameters and wildcards are ignored."""
    lines = ",".join(request.headers.getall("Accept", []))
    return {part.partition(";")[0].strip() for part in lines.split(",")}


def _convert(
    manifest: FakeManifest, repository: FakeRepository, types: set[str]
) -> FakeManifest | Reply:
    """Return what a tag that names `manifest` serves to a client that accepts `types`."""
    media_type = manifest.media_type.partition(";")[0]
    if media_type in types or not media_type.startswith(_STORED_TYPES):
        return manifest
    if manifest.media_type in (OCI_INDEX, OCI_MANIFEST):
        kind = "index" if manifest.media_type == OCI_INDEX else "manifest"
        message = f"OCI {kind} found, but accept header does not support OCI {kind}s"
        return error(404, "MANIFEST_UNKNOWN", message)
    if manifest.media_type == DOCKER_LIST and DOCKER_MANIFEST in types:
        for entry in manifest.document["manifests"]:
            if entry["platform"] == {"os": "linux", "architecture": "amd64"}:
                return repository.manifests[entry["digest"]]
    return FakeManifest(b'{"schemaVersion":1,"name":"converted","fsLayers":[]}', _SCHEMA1)


def _xml(status: int, code: str, message: str) -> Reply:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Reply(status, {"Content-Type": "application/xml"}, body.encode())
