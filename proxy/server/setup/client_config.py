"""`/api/v1/client-config`: the files that make a client pull through this cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from proxy.config import UpstreamSettings
from proxy.config.client_files import CLIENT_FILES, docker_mirror_files
from proxy.config.values import RegistryUrl
from proxy.errors import InvalidRequestError
from proxy.server.admin.api import AdminRequest, RequestModel, Route

ClientKind = Literal["docker", "docker-mirror", "containerd", "podman", "buildkit", "k3s", "crio"]


class ClientConfigQuery(RequestModel, frozen=True):
    """The client, and the URL or `host:port` at which it reaches the cache.

    `docker-mirror` is a docker with the classic image store; `only` is as for `pullcache client-config`.
    """

    client: ClientKind
    address: str
    only: bool = False


class ClientConfigFile(msgspec.Struct, frozen=True):
    """A file at `path`; `note` says how to put it into use."""

    path: str
    note: str
    content: str


class ClientConfig(msgspec.Struct, frozen=True):
    """The files of a client for a cache at `address`."""

    client: str
    address: str
    files: list[ClientConfigFile]


@dataclass(frozen=True, slots=True)
class ClientConfigHandlers:
    """The handler of this route."""

    upstreams: Mapping[str, UpstreamSettings]

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("GET", "/api/v1/client-config", self.files)]

    async def files(self, request: AdminRequest) -> ClientConfig:
        """Return the files of a client."""
        query = request.parse_query(ClientConfigQuery)
        address = query.address if "://" in query.address else f"http://{query.address}"
        try:
            url = RegistryUrl.parse(address)
        except ValueError as error:
            raise InvalidRequestError(f"query: address: {error}") from error
        if query.client == "docker-mirror":
            if query.only:
                raise InvalidRequestError("such a docker asks Docker Hub too: it has no `only`")
            found = docker_mirror_files(url, self.upstreams)
        else:
            found = CLIENT_FILES[query.client](url, self.upstreams, only=query.only)
        files = [
            ClientConfigFile(f"{one.directory}/{one.path}", one.note, one.content) for one in found
        ]
        return ClientConfig(query.client, str(url), files)
