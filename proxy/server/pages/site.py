"""The pages' server: finds the page or action of a request, and makes the response or the error page.

A change needs the token of its page (`visitors.py`). Every response has the same headers: scripts and styles
are ours alone, and no other site may show, read or keep a page.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import msgspec
from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response, StreamResponse

from proxy.errors import (
    DeniedError,
    NotFoundError,
    ProxyError,
    TooManyRequestsError,
    UnauthorizedError,
    error_code,
    error_outcome,
)
from proxy.log import LogWriter, get_logger, request_id
from proxy.server.admin.actor import Actor
from proxy.server.admin.api import ByteStream
from proxy.server.admin.handler import AdminApiHandler, api_error_response
from proxy.server.clients.token_auth import TokenAuth
from proxy.server.pages import live
from proxy.server.pages.calls import ApiCaller
from proxy.server.pages.forms import Form, read_form
from proxy.server.pages.jobs import JobRunner
from proxy.server.pages.page import Action, Done, Model, NewJob, Page, PageRequest, View
from proxy.server.pages.recent_pages import RecentPages
from proxy.server.pages.sessions import Notice, SessionStore
from proxy.server.pages.static import STATIC_PREFIX, StaticFiles
from proxy.server.pages.templating import PageRenderer, create_environment
from proxy.server.pages.views import ACTIONS, PAGES
from proxy.server.pages.visitors import (
    Visitor,
    check_change_token,
    identify,
    safe_path,
    session_cookie,
)

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
    # With `no-referrer`, browsers would send the Origin `null` with forms, where they send no
    # Sec-Fetch-Site: at addresses without TLS that are not loopback.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

R = TypeVar("R", bound=StreamResponse)

log = get_logger(__name__)


class PageSite:
    """Answers requests for pages. Construction reads the templates' folder and the static files."""

    def __init__(
        self,
        api: AdminApiHandler,
        sessions: SessionStore,
        group: asyncio.TaskGroup,
        access_log: LogWriter | None,
        *,
        anonymous_read: bool = False,
        clock: Callable[[], float] = time.time,
        pages: Sequence[Page] = PAGES,
        actions: Sequence[Action] = ACTIONS,
    ) -> None:
        self._api = api
        self._sessions = sessions
        self._access_log = access_log
        self._anonymous_read = anonymous_read
        self._clock = clock
        self._static = StaticFiles()
        self._renderer = PageRenderer(create_environment(self._static.path, clock))
        self._recent = RecentPages()
        self._jobs = JobRunner(group, api.to_proxy_error)
        self._pages = [*pages, Page("/jobs/{id}", self._show_job, "job.html", "Job", is_live=True)]
        self._actions = {action.path: action for action in actions}
        self._actions["/jobs/cancel"] = Action("/jobs/cancel", self._cancel_job)
        self._live = live.LiveStreams()

    async def handle(self, request: BaseRequest, auth: TokenAuth) -> StreamResponse:
        """Respond to a request. Raises only `ConnectionError`, if the client disconnects."""
        request_id.set(f"page-{id(request):x}")
        visitor: Visitor | None = None
        try:
            if static := self._static_response(request):
                return static
            visitor = identify(request, self._sessions, auth, anonymous_read=self._anonymous_read)
            response = await self._respond(request, auth, visitor)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 (unexpected errors are logged and counted)
            reason = self._api.to_proxy_error(error)
            response = await self._error_response(request, visitor, reason)
        if visitor and visitor.is_new and not response.prepared:
            cookie = session_cookie(request, visitor.session_id)
            response.headers.setdefault(hdrs.SET_COOKIE, cookie)
        self._log_request(request, visitor, response.status)
        return response

    def close(self) -> None:
        """End the streams of live figures."""
        self._live.close()

    # Requests.

    async def _respond(
        self, request: BaseRequest, auth: TokenAuth, visitor: Visitor
    ) -> StreamResponse:
        path = _raw_path(request)
        if path == "/login":
            return await self._handle_login(request, auth, visitor)
        if path == "/logout" and request.method == "POST":
            check_change_token(
                self._sessions, visitor, (await read_form(request, takes_upload=False)).last_values
            )
            self._sessions.close(visitor.session_id)
            return _redirect("/login", session_cookie(request, visitor.session_id, is_over=True))
        if visitor.actor is None:
            if _wants_json(request) or path == "/live":
                raise UnauthorizedError("log in to see this page")
            return _redirect(f"/login?to={quote(_page_of(request), safe='')}")
        if path == "/live":
            return await self._send_live(request, visitor)
        if request.method == "POST":
            return await self._handle_action(request, visitor)
        if request.method not in ("GET", "HEAD"):
            raise DeniedError("pages have the methods GET and POST")
        return await self._show_page(request, visitor)

    async def _show_page(self, request: BaseRequest, visitor: Visitor) -> Response:
        page, page_request = self._find_page(request, visitor, _raw_path(request), request.query)
        if _wants_json(request):
            model = await page.handler(page_request)
            return _secured(
                Response(body=msgspec.json.encode(model), content_type="application/json")
            )
        if "notice" in request.query:
            model = await page.handler(page_request)
            return await self._render(request, visitor, page.template, page.title, model, page)
        context = self._context(request, visitor, page.title, page, _raw_path(request))
        key = (context["here"], context["origin"], visitor.actor, visitor.has_login)
        text = self._recent.find(key)
        if text is None:
            started = self._recent.now()
            model = await page.handler(page_request)
            shown = {**context, "notice": None, "token": self._recent.placeholder, **model}
            text = await self._renderer.render(page.template, shown)
            self._recent.add(key, text, started)
        return _html(text.replace(self._recent.placeholder, str(context["token"])))

    def _find_page(
        self, request: BaseRequest, visitor: Visitor, path: str, query: Mapping[str, str]
    ) -> tuple[Page, PageRequest]:
        for page in self._pages:
            if (path_params := page.match(path)) is not None:
                return page, PageRequest(
                    self._caller(visitor),
                    visitor.actor or Actor("read"),
                    _origin(request),
                    self._clock(),
                    path_params,
                    dict(query),
                )
        raise NotFoundError("there is no page at this address")

    async def _handle_action(self, request: BaseRequest, visitor: Visitor) -> StreamResponse:
        action = self._actions.get(_raw_path(request))
        if action is None:
            raise NotFoundError(
                "no form is sent to this address; open the page, and use its buttons"
            )
        form = await read_form(request, takes_upload=action.takes_upload)
        fields = form.last_values
        check_change_token(self._sessions, visitor, fields)
        try:
            return await self._run_action(request, visitor, action, form)
        except ConnectionError:
            raise
        except Exception as error:
            reason = self._api.to_proxy_error(error)
            if _wants_json(request) or not fields.get("back"):
                raise reason from error
            return self._go(visitor, fields["back"], Notice(str(reason), is_error=True))
        finally:
            self._recent.clear()

    async def _run_action(
        self, request: BaseRequest, visitor: Visitor, action: Action, form: Form
    ) -> StreamResponse:
        assert visitor.actor is not None
        if not (visitor.can_change or action.is_read):
            raise DeniedError("your login may read only; changes need the role operate")
        fields = form.last_values
        result = await action.handler(
            PageRequest(
                self._caller(visitor),
                visitor.actor,
                _origin(request),
                self._clock(),
                form=fields,
                form_values=form.values,
                upload=form.upload,
            )
        )
        match result:
            case Done():
                path = result.path or fields.get("back", "/")
                return self._go(visitor, path, Notice(result.message) if result.message else None)
            case View():
                return await self._render(
                    request, visitor, result.template, result.title, result.model
                )
            case NewJob():
                new = replace(result, back=safe_path(result.back))
                return self._go(visitor, f"/jobs/{self._jobs.start(new)}")
            case ByteStream():
                return await self._send_stream(request, result)

    def _go(self, visitor: Visitor, path: str, notice: Notice | None = None) -> Response:
        path = safe_path(path)
        if notice:
            base, _, fragment = path.partition("#")
            mark = "&" if "?" in base else "?"
            notice_id = self._sessions.add_notice(visitor.session_id, notice)
            path = f"{base}{mark}notice={notice_id}" + (f"#{fragment}" if fragment else "")
        return _redirect(path)

    async def _send_stream(self, request: BaseRequest, stream: ByteStream) -> StreamResponse:
        response = _secured(StreamResponse())
        response.headers[hdrs.CONTENT_TYPE] = stream.content_type
        if stream.filename:
            response.headers[hdrs.CONTENT_DISPOSITION] = f'attachment; filename="{stream.filename}"'
        async with aclosing(stream.chunks) as chunks:
            chunk = await anext(
                chunks, None
            )  # an error before the first chunk is shown on the page
            await response.prepare(request)
            try:
                while chunk is not None:
                    await response.write(chunk)
                    chunk = await anext(chunks, None)
            except ConnectionError:
                raise
            except Exception as error:
                reason = str(self._api.to_proxy_error(error))
                log.warning(
                    "admin_response_truncated", path=_raw_path(request)[:200], reason=reason
                )
                raise ConnectionError(reason) from error  # the body is then incomplete
        await response.write_eof()
        return response

    async def _send_live(self, request: BaseRequest, visitor: Visitor) -> StreamResponse:
        target = urlsplit(safe_path(request.query.get("page", "/")))
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        page, page_request = self._find_page(request, visitor, target.path, query)
        if not page.is_live:
            raise NotFoundError("the page has no live figures")

        def is_still_valid() -> bool:
            return not visitor.has_login or self._sessions.is_open(visitor.session_id)

        here = f"{target.path}?{target.query}" if target.query else target.path
        context = self._context(request, visitor, page.title, page, target.path)
        context["here"] = here  # its forms lead back to the page
        key = ("live", here, context["origin"], visitor.actor, visitor.has_login)

        async def render() -> str:
            text = self._recent.find(key)
            if text is None:
                started = self._recent.now()
                shown = {**context, "token": self._recent.placeholder}
                text = await live.render(self._renderer, page, page_request, shown)
                self._recent.add(key, text, started)
            return text.replace(self._recent.placeholder, str(context["token"]))

        client = visitor.session_id if visitor.has_login else request.remote or ""
        headers = {**SECURITY_HEADERS, hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8"}
        return await self._live.send(request, client, headers, render, is_still_valid)

    # Logins.

    async def _handle_login(
        self, request: BaseRequest, auth: TokenAuth, visitor: Visitor
    ) -> StreamResponse:
        target = safe_path(request.query.get("to", "/"))
        if request.method in ("GET", "HEAD"):
            if code := request.query.get("code", ""):
                return self._login(request, self._sessions.take_code(code), target)
            if visitor.has_login or not auth.has_tokens:
                return _redirect(target)
            return await self._render(
                request, visitor, "login.html", "Log in", {"to": target, "error": ""}
            )
        fields = (await read_form(request, takes_upload=False)).last_values
        address = request.remote or ""
        self._sessions.check_login_rate(address)
        actor = auth.find_actor(fields.get("secret", "").strip())
        if actor is None:
            self._sessions.count_wrong_login(address)
            log.warning("page_login_failed", client=address)
            model = {"to": target, "error": "This is no admin token of this cache."}
            return await self._render(request, visitor, "login.html", "Log in", model, status=401)
        return self._login(request, actor, safe_path(fields.get("to", "/")))

    def _login(self, request: BaseRequest, actor: Actor | None, target: str) -> Response:
        if actor is None:
            raise UnauthorizedError("the link was used already, or is older than a minute")
        log.info("page_login", client=request.remote or "", actor=str(actor))
        session = self._sessions.open(actor)
        return _redirect(target, session_cookie(request, session.id))

    # Jobs.

    async def _show_job(self, request: PageRequest) -> Model:
        return {"job": self._jobs.view(request.path_params["id"])}

    async def _cancel_job(self, request: PageRequest) -> Done:
        self._jobs.cancel(request.form.get("id", ""))
        return Done("The job was cancelled.")

    # Responses.

    def _caller(self, visitor: Visitor) -> ApiCaller:
        return ApiCaller(self._api, visitor.actor or Actor("read"))

    def _context(
        self, request: BaseRequest, visitor: Visitor, title: str, page: Page | None, path: str
    ) -> dict[str, object]:
        return {
            "title": title,
            "page": page,
            "nav": [one for one in self._pages if one.nav],
            "here": _path_with_query(request),
            "path": path,
            "origin": _origin(request),
            "token": self._sessions.change_token(visitor.session_id),
            "actor": visitor.actor,
            "can_change": visitor.can_change,
            "has_login": visitor.has_login,
            "can_log_in": not visitor.has_login
            and visitor.actor is not None
            and bool(visitor.actor.origin),
            "running_jobs": self._jobs.running(),
        }

    async def _render(
        self,
        request: BaseRequest,
        visitor: Visitor | None,
        template: str,
        title: str,
        model: Model,
        page: Page | None = None,
        status: int = 200,
    ) -> Response:
        visitor = visitor or Visitor("", None)
        context = self._context(request, visitor, title, page, _raw_path(request))
        notice_id = request.query.get("notice", "")
        context["notice"] = self._sessions.take_notice(visitor.session_id, notice_id)
        text = await self._renderer.render(template, {**context, **model})
        return _html(text, status)

    async def _error_response(
        self, request: BaseRequest, visitor: Visitor | None, error: ProxyError
    ) -> Response:
        if _wants_json(request):
            return _secured(api_error_response(error))
        status = error_outcome(error).admin_status
        model = {"status": status, "code": error_code(error), "message": str(error)}
        response = await self._render(request, visitor, "error.html", "Error", model, status=status)
        if isinstance(error, TooManyRequestsError):
            response.headers[hdrs.RETRY_AFTER] = "60"
        response.force_close()  # the body of a rejected request is not read
        return response

    def _static_response(self, request: BaseRequest) -> Response | None:
        path = _raw_path(request)
        if not path.startswith(STATIC_PREFIX) or request.method not in ("GET", "HEAD"):
            return None
        file = self._static.find(path)
        if file is None:
            return None
        response = _secured(Response(body=file.content))
        response.headers[hdrs.CONTENT_TYPE] = file.content_type
        response.headers[hdrs.CACHE_CONTROL] = "public, max-age=31536000, immutable"
        return response

    def _log_request(self, request: BaseRequest, visitor: Visitor | None, status: int) -> None:
        if self._access_log:
            self._access_log.log_request(
                "page_request",
                client=request.remote or "",
                actor=str(visitor.actor) if visitor and visitor.actor else "",
                method=request.method,
                path=_raw_path(request)[:300],  # the query may have a code
                status=status,
            )


def _html(text: str, status: int = 200) -> Response:
    return _secured(Response(text=text, status=status, content_type="text/html", charset="utf-8"))


def _secured(response: R) -> R:
    response.headers.update(SECURITY_HEADERS)
    return response


def _redirect(path: str, cookie: str = "") -> Response:
    response = _secured(Response(status=303))
    response.headers[hdrs.LOCATION] = path
    if cookie:
        response.headers[hdrs.SET_COOKIE] = cookie
    return response


def _raw_path(request: BaseRequest) -> str:
    return request.raw_path.partition("?")[0]


def _path_with_query(request: BaseRequest) -> str:
    """Return where the browser is, without the message that was shown."""
    kept = [(name, text) for name, text in request.query.items() if name != "notice"]
    return f"{_raw_path(request)}?{urlencode(kept)}" if kept else _raw_path(request)


def _page_of(request: BaseRequest) -> str:
    """Return the page that a login leads back to: of a form, the page that it is on."""
    if request.method != "POST":
        return _path_with_query(request)
    return safe_path(request.headers.get(hdrs.REFERER, "").removeprefix(_origin(request)))


def _origin(request: BaseRequest) -> str:
    return f"{request.scheme}://{request.headers.get(hdrs.HOST, '')}"


def _wants_json(request: BaseRequest) -> bool:
    accepted = request.headers.get(hdrs.ACCEPT, "")
    return request.query.get("format") == "json" or (
        "application/json" in accepted and "text/html" not in accepted
    )
