"""Manifests on `/v2/`."""

from aiohttp import hdrs
from aiohttp.web import BaseRequest, Response
from multidict import CIMultiDictProxy

from proxy.cache.prefetch import Prefetch
from proxy.cache.pull_through import ManifestAnswer, PullThrough
from proxy.oci.reference import Reference, Repository
from proxy.server import ranges
from proxy.server.request_context import IMMUTABLE, Exchange, digest_headers
from proxy.server.responses import Answer

Headers = CIMultiDictProxy[str]


class Manifests:
    """Answers requests for manifests."""

    def __init__(self, cache: PullThrough, prefetch: Prefetch | None) -> None:
        self._cache = cache
        self._prefetch = prefetch

    async def answer(
        self, request: BaseRequest, exchange: Exchange, repository: Repository, reference: Reference
    ) -> Response:
        """Answer a GET or HEAD. Raises `ProxyError`."""
        accept = accept_of(request.headers)
        answer = await self._cache.manifest(repository, reference, accept)
        exchange.cache = answer.state
        self._announce(repository, answer, request.method)
        return response_to(request.headers, exchange, answer)

    def at_hand(
        self, repository: Repository, reference: Reference, accept: tuple[str, ...], method: str
    ) -> ManifestAnswer | None:
        """Return the answer to a GET or HEAD, if that takes no waiting, and nobody has to be asked."""
        answer = self._cache.at_hand(repository, reference, accept)
        if answer:
            self._announce(repository, answer, method)
        return answer

    def _announce(self, repository: Repository, answer: ManifestAnswer, method: str) -> None:
        if self._prefetch and method == hdrs.METH_GET:
            self._prefetch.announce(repository, answer.held)


def accept_of(headers: Headers) -> tuple[str, ...]:
    """Return the lines of the header Accept."""
    return tuple(headers.getall(hdrs.ACCEPT, ()))


def response_to(asked: Headers, exchange: Exchange, answer: ManifestAnswer) -> Response:
    """Return the answer to a request that had the headers `asked`."""
    held = answer.held
    headers = digest_headers(exchange, held.digest)
    if answer.ttl is None:
        headers["Cache-Control"] = IMMUTABLE
    else:
        headers["Cache-Control"] = f"public, max-age={answer.ttl:.0f}"
        headers["Age"] = f"{answer.age:.0f}"
    if answer.warning:
        # distribution-spec, "Warnings": this form exactly, and clients print it.
        text = answer.warning.replace("\\", "").replace('"', "'")
        headers["Warning"] = f'299 - "{_printable(text)}"'
    if ranges.is_match(asked.get(hdrs.IF_NONE_MATCH), headers["ETag"]):
        return Response(status=304, headers=headers)
    headers["Content-Type"] = held.media_type
    return Answer(body=held.content, headers=headers)


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text)[:400]
