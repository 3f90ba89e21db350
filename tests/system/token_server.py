"""A token server for docker-registry, after distribution's "Token Authentication Specification".

The tokens are JWTs, signed by the `openssl` program; docker-registry trusts the certificate in
their `x5c` header. Its version 2.8 accepts a token for a minute after its `exp` (the leeway of
libtrust), so all times are set back by a minute.
"""

import base64
import json
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

SERVICE, ISSUER = "registry.test", "tokens.test"
USER, PASSWORD = "puller", "pull me"
LEEWAY = 60


@dataclass(frozen=True)
class TokenRequest:
    """A request: its scope and user ("" is anonymous, None a wrong password), and the issued token."""

    scope: str
    user: str | None
    token: str


class TokenServer(ThreadingHTTPServer):
    """Grants `USER`, and no other user, pulls from `repositories`. Tokens expire after `lifetime` seconds.

    Like Docker Hub's token server it also issues tokens to anonymous clients; they grant nothing.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.lifetime = 300
        self.repositories: set[str] = set()
        self.requests: list[TokenRequest] = []
        self._key, self._certificate = directory / "token.key", directory / "token.pem"
        request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens.test"]
        _openssl(*request, "-keyout", str(self._key), "-out", str(self._certificate))
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *arguments: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def auth(self) -> str:
        """Return the part of docker-registry's configuration that requires these tokens."""
        realm = f"http://127.0.0.1:{self.server_port}/token"
        return (
            f"auth: {{token: {{realm: {realm}, service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: {self._certificate}}}}}\n"
        )

    def issue(self, scope: str, user: str) -> str:
        """Return a token that grants the scope if the user has access to it, and otherwise nothing."""
        kind, _, rest = scope.partition(":")
        name, _, actions = rest.rpartition(":")
        is_granted = user == USER and kind == "repository" and name in self.repositories
        granted = [{"type": kind, "name": name, "actions": actions.split(",")}]
        now = int(time.time()) - LEEWAY
        header = {"typ": "JWT", "alg": "RS256", "x5c": [_der(self._certificate)]}
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "exp": now + self.lifetime,
            "nbf": now,
            "iat": now,
            "jti": uuid.uuid4().hex,
            "access": granted if is_granted else [],
        }
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in (header, claims))
        signature = _openssl("dgst", "-sha256", "-sign", str(self._key), data=signed.encode())
        return f"{signed}.{_base64url(signature)}"


class _TokenHandler(BaseHTTPRequestHandler):
    server: TokenServer

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        scope = query.get("scope", [""])[0]
        user = _user(self.headers.get("Authorization", ""))
        token = (
            ""
            if user is None or query.get("service") != [SERVICE]
            else self.server.issue(scope, user)
        )
        self.server.requests.append(TokenRequest(scope, user, token))
        error = {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect password"}]}
        document = {"token": token, "expires_in": self.server.lifetime} if token else error
        body = json.dumps(document).encode()
        self.send_response(200 if token else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def _user(authorization: str) -> str | None:
    """Return the user of an Authorization header: "" without one, None for a wrong password."""
    if not authorization:
        return ""
    credentials = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return USER if authorization == f"Basic {credentials}" else None


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _der(certificate: Path) -> str:
    return "".join(certificate.read_text().splitlines()[1:-1])


def _openssl(*arguments: str, data: bytes = b"") -> bytes:
    return subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, check=True
    ).stdout
