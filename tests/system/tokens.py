"""A token server for docker-registry, as "Token Authentication Specification" of distribution has it.

The tokens are JWTs that the `openssl` program signs; docker-registry trusts the certificate in their `x5c` header. It
takes a token for another minute after its `exp` (libtrust's leeway in its version 2.8), so times are set that much back.
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
class Request:
    """What was asked for, by whom (None for a wrong password), and the token that was given."""

    scope: str
    user: str | None
    token: str


class TokenServer(ThreadingHTTPServer):
    """Lets `USER` pull from `repositories`, and nobody else anything; tokens are good for `lifetime` seconds.

    Like Docker Hub's, it has a token for everybody: one that opens nothing.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lifetime = 300
        self.repositories: set[str] = set()
        self.requests: list[Request] = []
        self._key, self._certificate = directory / "token.key", directory / "token.pem"
        new = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens.test"]
        _openssl(*new, "-keyout", str(self._key), "-out", str(self._certificate))
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
        """What docker-registry's configuration has to say."""
        realm = f"http://127.0.0.1:{self.server_port}/token"
        return (
            f"auth: {{token: {{realm: {realm}, service: {SERVICE}, issuer: {ISSUER}, "
            f"rootcertbundle: {self._certificate}}}}}\n"
        )

    def issue(self, scope: str, user: str) -> str:
        """Return a token for as much of the scope as the user may have."""
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
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
        signature = _openssl("dgst", "-sha256", "-sign", str(self._key), data=signed.encode())
        return f"{signed}.{_encoded(signature)}"


class _Handler(BaseHTTPRequestHandler):
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
        self.server.requests.append(Request(scope, user, token))
        refusal = {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect password"}]}
        answer = {"token": token, "expires_in": self.server.lifetime} if token else refusal
        body = json.dumps(answer).encode()
        self.send_response(200 if token else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


def _user(authorization: str) -> str | None:
    """Return who asks: "" is anybody, None who only says that he is somebody."""
    if not authorization:
        return ""
    login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    return USER if authorization == f"Basic {login}" else None


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _der(certificate: Path) -> str:
    return "".join(certificate.read_text().splitlines()[1:-1])


def _openssl(*arguments: str, data: bytes = b"") -> bytes:
    return subprocess.run(
        ["openssl", *arguments], input=data, capture_output=True, check=True
    ).stdout
