"""The switch at the one moment that the whole program cannot be made to meet."""

import aiohttp
import pytest

from proxy.errors import OfflineError
from proxy.upstream.offline import OfflineSwitch


@pytest.mark.parametrize("is_back", [False, True], ids=["stays offline", "online again"])
async def test_an_answer_that_comes_with_the_switch_is_cut_too(registry, is_back):
    offline = OfflineSwitch()

    async def throw(
        request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        response = await handler(request)
        offline.set_offline(is_offline=True)
        offline.set_offline(is_offline=not is_back)
        return response

    middlewares = (offline.middleware, throw)
    async with aiohttp.ClientSession(middlewares=middlewares) as session:
        if is_back:
            async with session.get(registry.url + "/v2/") as answer:
                assert answer.status == 401
        else:
            with pytest.raises(OfflineError):
                await session.get(registry.url + "/v2/")
