"""Requests to Docker Hub's own API: who publishes a repository, and when a tag was pushed."""

from collections.abc import Callable, Collection
from typing import TypeVar
from urllib.parse import quote, urlencode

from proxy.errors import NotFoundError, UpstreamUnauthorizedError
from proxy.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.manifest import ACCEPT
from proxy.oci.reference import Tag
from proxy.parsing import DocumentParser
from proxy.policy.facts import Badge
from proxy.upstream import responses
from proxy.upstream.hub import answers
from proxy.upstream.registry_client import ApiRequest, RegistryClient
from proxy.upstream.search import SearchHit, SearchPage

R = TypeVar("R")

# Attempts of one request: facts can be asked again later.
HUB_ATTEMPTS = 1


class HubClient:
    """Asks Docker Hub about public repositories, without credentials.

    `api` is a client of Docker Hub's API, with a breaker and a quota of its own; `registry` is an
    anonymous client of the registry.
    """

    def __init__(
        self,
        api: RegistryClient,
        registry: RegistryClient,
        metrics: Metrics,
        parser: DocumentParser,
    ) -> None:
        self._api = api
        self._parser = parser
        self._registry = registry
        self._metrics = metrics

    async def is_public(self, repository: str, digest: Digest) -> bool:
        """Tell whether anyone may pull the manifest from the repository, by an anonymous HEAD.

        Raises `UpstreamError` if that cannot be asked now.
        """
        headers = {"Accept": ACCEPT}
        request = ApiRequest("HEAD", repository, f"manifests/{digest}", "manifest", headers)
        try:
            await self._registry.request(request, responses.read_digest)
        except (NotFoundError, UpstreamUnauthorizedError):
            return False
        return True

    async def search(
        self, terms: str, *, limit: int, page: int, badges: Collection[Badge] = ()
    ) -> SearchPage:
        """Return one page of the images that match `terms`; the first page is 1.

        With `badges` only those that have one of them. Raises `NotFoundError` and
        `UpstreamError`.
        """
        query = {"query": terms, "from": (page - 1) * limit, "size": limit, "type": "image"}
        if badges:
            query["badges"] = ",".join(answers.BADGE_NAMES[badge] for badge in badges)
        return await self._get(f"api/search/v4?{urlencode(query)}", answers.parse_search)

    async def find_repository(self, repository: str) -> SearchHit | None:
        """Return what Docker Hub says of the repository; None if its search does not find it.

        That proves nothing: the search leaves out what it does not want to show. Raises
        `NotFoundError` and `UpstreamError`.
        """
        terms = repository.removeprefix("library/")
        return answers.find_repository(await self.search(terms, limit=25, page=1), repository)

    async def fetch_push_times(self, repository: str, tag: Tag) -> dict[Digest, float]:
        """Return when the content of a tag was pushed, by digest, in Unix seconds.

        Empty if Docker Hub knows no such tag, which proves nothing. Raises `UpstreamError`.
        """
        namespace, _, name = repository.partition("/")
        path = f"v2/namespaces/{quote(namespace)}/repositories/{quote(name)}/tags/{quote(tag)}"
        try:
            return await self._get(path, answers.parse_push_times)
        except (NotFoundError, UpstreamUnauthorizedError):
            return {}

    async def _get(self, path: str, parse: Callable[[bytes], R]) -> R:
        request = ApiRequest("GET", "", path, "facts", {"Accept": "application/json"})
        content = await self._api.request(request, responses.read_search_page)
        self._metrics.count_upstream_bytes(self._api.name, "facts", len(content))
        return await self._parser.run(self._api.name, len(content), parse, content)
