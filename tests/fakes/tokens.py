"""The token service of a fake registry: it always issues a token, which the registry checks."""

import base64
import binascii
import json
import secrets
from dataclasses import dataclass

from aiohttp import web

from tests.fakes.faults import Reply

SERVICE = "registry.fake"


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows."""

    scopes: frozenset[str]
    user: str | None


class TokenService:
    """Issues tokens. A token allows only what its scope names."""

    def __init__(self) -> None:
        self.users: dict[str, str] = {}
        self.lifetime: float | str | None = 300
        self.suffix = ""
        self.fields: dict[str, object] = {}
        self._grants: dict[str, Grant] = {}

    def issue(self, request: web.BaseRequest) -> Reply:
        """Respond to GET /token: 200 for any scope, 401 only for wrong credentials."""
        user = None
        if "Authorization" in request.headers:
            user = self._login(request.headers["Authorization"])
            if user is None:
                return error(401, "UNAUTHORIZED", "incorrect username or password")
        token = secrets.token_urlsafe(24) + self.suffix
        scopes = frozenset(request.query.getall("scope", []))
        self._grants[token] = Grant(scopes, user)
        body: dict[str, object] = {"token": token, "access_token": token}
        if self.lifetime is not None:
            body["expires_in"] = self.lifetime
        body |= self.fields
        return Reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def grant(self, authorization: str) -> Grant | None:
        """Return the grant of the Bearer token in an Authorization header, if it is valid."""
        scheme, _, token = authorization.partition(" ")
        return self._grants.get(token) if scheme.lower() == "bearer" else None

    def revoke(self) -> None:
        """Invalidate all tokens, as if they had expired."""
        self._grants.clear()

    def _login(self, authorization: str) -> str | None:
        scheme, _, encoded = authorization.partition(" ")
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        is_known = scheme.lower() == "basic" and user in self.users
        return user if is_known and self.users[user] == password else None


def error(status: int, code: str, message: str, **headers: str) -> Reply:
    """Return an error response (distribution-spec, "Error Codes")."""
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    return Reply(
        status,
        {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        },
        body,
    )
