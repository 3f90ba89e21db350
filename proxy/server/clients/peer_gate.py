"""Recognises the requests of the other nodes of a fleet, by the token that they carry."""

from hmac import compare_digest

from proxy.config import Address
from proxy.server.request import Request
from proxy.upstream.peers import TOKEN_HEADER

_HEADER = TOKEN_HEADER.lower()


class PeerGate:
    """Admits requests with the token of the fleet. Any other is that of a client, whatever it says.

    With `is_local`, it also has to come from this machine: the fleet has no secret, and all nodes are here.
    """

    def __init__(self, token: str, *, is_local: bool) -> None:
        self._token = token.encode()
        self._is_local = is_local

    def admits(self, request: Request) -> bool:
        """Tell whether a node of the fleet has sent the request. Takes the same time for any wrong token."""
        sent = request.headers.get(_HEADER)
        if sent is None or (self._is_local and not _is_loopback(request.client)):
            return False
        return compare_digest(sent.encode("latin-1", "replace"), self._token)


def _is_loopback(client: str | None) -> bool:
    if client is None:
        return True
    return Address(f"[{client}]:0" if ":" in client else f"{client}:0").is_loopback
