"""The offline switch in a race that tests of the whole program cannot reproduce."""

import aiohttp
import pytest

from proxy.errors import OfflineError
from proxy.upstream.offline import OfflineSwitch


@pytest.mark.parametrize("goes_back_online", [False, True], ids=["stays offline", "online again"])
async def test_a_response_that_arrives_together_with_the_switch_is_aborted_too(
    registry, goes_back_online
):
    offline = OfflineSwitch()

    async def go_offline(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        offline.set_offline(is_offline=True)
        offline.set_offline(is_offline=not goes_back_online)
        return response

    middlewares = (offline.middleware, go_offline)
    async with aiohttp.ClientSession(middlewares=middlewares) as session:
        if goes_back_online:
            async with session.get(registry.url + "/v2/") as response:
                assert response.status == 401
        else:
            with pytest.raises(OfflineError):
                await session.get(registry.url + "/v2/")
