"""Admin tokens, and the checks against web pages of other sites that send requests here."""

import hmac
import re
from collections.abc import Sequence

from aiohttp import hdrs
from aiohttp.web import BaseRequest

from proxy.config.schema import AdminToken
from proxy.config.values import is_ip_address, is_loopback
from proxy.errors import DeniedError, InvalidRequestError, UnauthorizedError
from proxy.server.admin.actor import Actor

# Content types that a page of another site may send without a preflight request (Fetch standard,
# "CORS-safelisted request-header"), including none at all.
_SAFELISTED_CONTENT_TYPES = (
    "",
    "text/plain",
    "multipart/form-data",
    "application/x-www-form-urlencoded",
)


class TokenAuth:
    """Checks requests over TCP. One of `tokens` is sufficient; without any, web pages are rejected.

    A site may point its own name at this address (DNS rebinding), so `Host` is checked; `hosts` are the
    names that lead here.
    """

    def __init__(self, tokens: Sequence[AdminToken], hosts: Sequence[str] = ()) -> None:
        self._tokens = tokens
        self._hosts = frozenset(host.lower() for host in hosts)

    @property
    def has_tokens(self) -> bool:
        """Whether a token is required."""
        return bool(self._tokens)

    def find_actor(self, secret: str) -> Actor | None:
        """Return the actor whose token has this text; None if there is none."""
        token = self._find_equal(secret)
        return Actor(token.role, token.name) if token else None

    def check(self, request: BaseRequest) -> Actor:
        """Return the actor of a request.

        Raises `UnauthorizedError`, `DeniedError` or `InvalidRequestError` to reject it.
        """
        if self._tokens:
            if token := self._find_token(request):
                return Actor(token.role, token.name)
            raise UnauthorizedError(
                "the admin API requires a token, of admin_token_file or admin_tokens: "
                "Authorization: Bearer TOKEN"
            )
        host = request.headers.get(hdrs.HOST, "")
        self._check_loopback_host(host)
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and origin != f"{request.scheme}://{host}":
            raise DeniedError("the admin API rejects cross-origin requests")
        media_type = request.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
        if request.method == "POST" and media_type in _SAFELISTED_CONTENT_TYPES:
            raise InvalidRequestError("POST requires a Content-Type (application/json)")
        return Actor()

    def check_page_host(self, request: BaseRequest) -> None:
        """Raise `DeniedError` if the request for a page has the name of another site."""
        host = request.headers.get(hdrs.HOST, "")
        name = _host_name(host)
        if not self._tokens:
            self._check_loopback_host(host)
        elif not (is_ip_address(name) or is_loopback(name) or name in self._hosts):
            raise DeniedError(
                f"the pages are not served under the name {name[:100]!r}; use an IP address, "
                "or add the name to server.admin_hosts"
            )

    @staticmethod
    def _check_loopback_host(host: str) -> None:
        if not is_loopback(_host_name(host)):
            raise DeniedError(
                "without a token, the Host header must be a loopback address or localhost"
            )

    def check_metrics(self, request: BaseRequest) -> None:
        """Raise `DeniedError` if the request for metrics may come from a web page."""
        host = request.headers.get(hdrs.HOST)
        if host is None:  # no browser leaves it out
            return
        name = _host_name(host)
        if not (is_ip_address(name) or is_loopback(name) or name in self._hosts):
            if self._find_token(request):
                return
            raise DeniedError(
                f"/metrics is not served under the name {name[:100]!r}; use an IP address, "
                "or add the name to server.admin_hosts"
            )

    def _find_token(self, request: BaseRequest) -> AdminToken | None:
        """Return the token of a request. How long it takes does not depend on which one it is."""
        scheme, _, text = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        equal = self._find_equal(text.strip())
        return equal if scheme.lower() == "bearer" else None

    def _find_equal(self, text: str) -> AdminToken | None:
        given = text.encode(errors="surrogateescape")
        equal = [
            token for token in self._tokens if hmac.compare_digest(given, token.secret.encode())
        ]
        return equal[0] if equal else None


def _host_name(host: str) -> str:
    """Return the name or address in a `Host` header, without port and brackets."""
    return re.sub(r":[0-9]*$", "", host).strip("[]").removesuffix(".").lower()
