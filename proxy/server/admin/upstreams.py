"""`/api/v1/upstreams/check`: whether each registry answers now and accepts the login."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from proxy.config import UpstreamSettings
from proxy.errors import ProxyError, UpstreamUnauthorizedError, error_code
from proxy.server.admin.api import AdminRequest, Route
from proxy.upstream.client import Upstream


class UpstreamCheck(msgspec.Struct, frozen=True):
    """The answer of a registry: `problem` is empty if there is none, `code` is that of the error."""

    name: str
    has_login: bool
    code: str
    problem: str


@dataclass(frozen=True, slots=True)
class UpstreamHandlers:
    """The handler of this route."""

    upstreams: Mapping[str, Upstream]
    settings: Mapping[str, UpstreamSettings]

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("POST", "/api/v1/upstreams/check", self.check, is_read=True)]

    async def check(self, _request: AdminRequest) -> list[UpstreamCheck]:
        """Ask each registry for the version of its API, with the configured login."""
        return await asyncio.gather(*(self._check(name) for name in self.upstreams))

    async def _check(self, name: str) -> UpstreamCheck:
        settings = self.settings[name]
        has_login = bool(settings.username or settings.credential_helper or settings.docker_config)
        try:
            await self.upstreams[name].check()
        except UpstreamUnauthorizedError as error:
            # Without a login, some registries refuse this request, and let public images be pulled.
            problem = str(error) if has_login else ""
            return UpstreamCheck(name, has_login, error_code(error) if problem else "", problem)
        except ProxyError as error:
            return UpstreamCheck(name, has_login, error_code(error), str(error))
        return UpstreamCheck(name, has_login, "", "")
