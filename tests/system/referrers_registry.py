"""A small registry that clients push to, with the referrers API, which Debian's docker-registry lacks."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_UPLOADS = re.compile(r"/v2/(.+)/blobs/uploads/([0-9]*)")
_RESOURCE = re.compile(r"/v2/(.+)/(blobs|manifests|referrers)/([^/]+)")
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class ReferrersRegistry:
    """Listens on a free port of loopback, and keeps it over `stop` and `start`."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, tuple[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.uploads: list[bytes] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread = threading.Thread()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        registry = self

        class Handler(_Handler):
            content = registry

        self._server = server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = server.server_port
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        self._thread.start()

    def stop(self) -> None:
        if self._server:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def referrers(self, subject: str) -> list[dict[str, object]]:
        """Return the descriptors of what refers to a manifest, as the specification says."""
        found: list[dict[str, object]] = []
        for digest, (media_type, content) in self.manifests.items():
            document = json.loads(content)
            if document.get("subject", {}).get("digest") == subject:
                kind = document.get("artifactType") or document["config"]["mediaType"]
                entry = {"mediaType": media_type, "digest": digest, "size": len(content)}
                annotations = document.get("annotations")
                more = {"annotations": annotations} if annotations else {}
                found.append({**entry, "artifactType": kind, **more})
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content: ReferrersRegistry

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _unknown(self, code: str) -> None:
        body = json.dumps({"errors": [{"code": code, "message": "unknown"}]}).encode()
        self._answer(404, body, Content_Type="application/json")

    # Pulls.

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if path.path == "/v2/":
            self._answer(200, b"{}", Content_Type="application/json")
            return
        match = _RESOURCE.fullmatch(path.path)
        if match is None:
            self._unknown("UNSUPPORTED")
        elif match[2] == "referrers":
            manifests = self.content.referrers(match[3])
            document = {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": manifests}
            self._answer(200, json.dumps(document).encode(), Content_Type=_INDEX_TYPE)
        elif match[2] == "manifests":
            digest = self.content.tags.get(match[3], match[3])
            if digest not in self.content.manifests:
                self._unknown("MANIFEST_UNKNOWN")
                return
            media_type, body = self.content.manifests[digest]
            self._answer(200, body, Content_Type=media_type, Docker_Content_Digest=digest)
        elif match[3] not in self.content.blobs:
            self._unknown("BLOB_UNKNOWN")
        else:
            kind = "application/octet-stream"
            body = self.content.blobs[match[3]]
            self._answer(200, body, Content_Type=kind, Docker_Content_Digest=match[3])

    do_HEAD = do_GET  # noqa: N815

    # Pushes.

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        body, match = self._read_body(), _UPLOADS.fullmatch(urlsplit(self.path).path)
        assert match
        self.content.uploads.append(body)
        number = len(self.content.uploads) - 1
        self._accept_upload(match[1], number)

    def do_PATCH(self) -> None:
        body, match = self._read_body(), _UPLOADS.fullmatch(urlsplit(self.path).path)
        assert match
        self.content.uploads[int(match[2])] += body
        self._accept_upload(match[1], int(match[2]))

    def _accept_upload(self, name: str, number: int) -> None:
        end = max(0, len(self.content.uploads[number]) - 1)
        location = f"/v2/{name}/blobs/uploads/{number}"
        self._answer(202, Location=location, Range=f"0-{end}")

    def do_PUT(self) -> None:
        body, path = self._read_body(), urlsplit(self.path)
        if upload := _UPLOADS.fullmatch(path.path):
            content = self.content.uploads[int(upload[2])] + body
            (digest,) = parse_qs(path.query)["digest"]
            assert digest == _digest(content)
            self.content.blobs[digest] = content
            location = f"/v2/{upload[1]}/blobs/{digest}"
            self._answer(201, Location=location, Docker_Content_Digest=digest)
            return
        match = _RESOURCE.fullmatch(path.path)
        assert match
        digest, media_type = _digest(body), self.headers["Content-Type"]
        self.content.manifests[digest] = (media_type, body)
        if match[3] != digest:
            self.content.tags[match[3]] = digest
        subject = json.loads(body).get("subject", {}).get("digest")
        more = {"OCI_Subject": subject} if subject else {}
        location = f"/v2/{match[1]}/manifests/{digest}"
        self._answer(201, Location=location, Docker_Content_Digest=digest, **more)
