"""`/api/v1/config`: the configuration that applies, and where each value comes from."""

import os
from dataclasses import dataclass

from proxy.config import Config
from proxy.config.origins import KeyOrigin, describe_origins
from proxy.server.admin.api import AdminRequest, Route


@dataclass(frozen=True, slots=True)
class SettingsHandlers:
    """The handler of this route."""

    config: Config

    def routes(self) -> list[Route]:
        """Return the route."""
        return [Route("GET", "/api/v1/config", self.keys)]

    async def keys(self, _request: AdminRequest) -> list[KeyOrigin]:
        """Return every key, with its value, its default and its source; secrets are `***`."""
        return describe_origins(self.config, os.environ)
