"""Who asks for a page, and whether the browser may have been sent by another site.

A change must come from a page of ours: `Sec-Fetch-Site` says so, or `Origin` in browsers and at addresses
that have it not, and the token of the page proves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import hdrs
from aiohttp.web import BaseRequest

from proxy.errors import DeniedError
from proxy.server.admin.actor import Actor
from proxy.server.clients.token_auth import TokenAuth
from proxy.server.pages.sessions import SessionStore, is_session_id, new_session_id


@dataclass(frozen=True, slots=True)
class Visitor:
    """A browser: its session and its actor, None before a login. `is_new` if it has no cookie yet."""

    session_id: str
    actor: Actor | None
    is_new: bool = False
    has_login: bool = False

    @property
    def can_change(self) -> bool:
        """Whether its role permits changes."""
        return self.actor is not None and self.actor.role == "operate"


def identify(
    request: BaseRequest, sessions: SessionStore, auth: TokenAuth, *, anonymous_read: bool
) -> Visitor:
    """Return the visitor that a request's cookie stands for. Raises `DeniedError`."""
    auth.check_page_host(request)
    check_fetch_metadata(request)
    session_id = request.cookies.get(cookie_name(request), "")
    if session := sessions.find(session_id):
        return Visitor(session.id, session.actor, has_login=True)
    is_new = not is_session_id(session_id)
    if is_new:
        session_id = new_session_id()
    if not auth.has_tokens:
        return Visitor(session_id, Actor(), is_new)
    if anonymous_read:
        return Visitor(session_id, Actor("read", origin="page without login"), is_new)
    return Visitor(session_id, None, is_new)


def check_fetch_metadata(request: BaseRequest) -> None:
    """Raise `DeniedError` if another site has sent the request, unless it only leads here."""
    site = request.headers.get("Sec-Fetch-Site")
    if request.method in ("GET", "HEAD"):
        is_link = request.headers.get("Sec-Fetch-Mode", "navigate") == "navigate"
        if site in (None, "same-origin", "none") or is_link:
            return
    elif site is not None:
        if site == "same-origin":
            return
    else:
        origin = request.headers.get(hdrs.ORIGIN, "")
        if origin and urlsplit(origin).netloc == request.headers.get(hdrs.HOST):
            return
    raise DeniedError("the request was sent by a page of another site; open the page itself")


def check_change_token(sessions: SessionStore, visitor: Visitor, fields: Mapping[str, str]) -> None:
    """Raise `DeniedError` unless a form has the token of the visitor's pages."""
    token = fields.get("token", "")
    if visitor.is_new or not sessions.is_change_token(visitor.session_id, token):
        raise DeniedError(
            "the form is not of your session, which may have ended: reload the page, and try again"
        )


def cookie_name(request: BaseRequest) -> str:
    """Return the name of the session's cookie: cookies are shared among the ports of a host."""
    if request.secure:
        return "__Host-pullcache"
    _, _, port = request.headers.get(hdrs.HOST, "").rpartition(":")
    return f"pullcache-{port}" if port.isdecimal() else "pullcache"


def session_cookie(request: BaseRequest, session_id: str, *, is_over: bool = False) -> str:
    """Return the `Set-Cookie` header of a session, which lasts until the browser is closed."""
    parts = [f"{cookie_name(request)}={session_id}", "Path=/", "HttpOnly", "SameSite=Strict"]
    if request.secure:
        parts.append("Secure")
    if is_over:
        parts.append("Max-Age=0")
    return "; ".join(parts)


def safe_path(text: str) -> str:
    """Return a path of ours to go to; `/` in place of anything that may lead elsewhere."""
    is_ours = text.startswith("/") and not text.startswith(("//", "/\\"))
    return text if is_ours and text.isprintable() else "/"
