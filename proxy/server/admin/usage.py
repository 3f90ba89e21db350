"""`/api/v1/usage`: what takes the space of the store, and what is evicted next."""

from proxy.images.usage import StoreUsage, UsageReporter
from proxy.server.admin.api import AdminRequest, Route


def routes(reporter: UsageReporter) -> list[Route]:
    """Return the route."""

    async def report(_request: AdminRequest) -> StoreUsage:
        return await reporter.report()

    return [Route("GET", "/api/v1/usage", report)]
