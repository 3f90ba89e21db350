"""A fake DNS, and an egress guard that leads every allowed connection to this machine."""

import socket
from collections.abc import Mapping

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from aiohttp.abc import AbstractResolver, ResolveResult

from proxy.upstream.network.egress import EgressGuard

PUBLIC = "93.184.215.14"
_LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1")


class FakeResolver(AbstractResolver):
    """Resolves each name to one list of addresses after another; the last one is repeated."""

    def __init__(self, names: Mapping[str, list[list[str]]]) -> None:
        self._names = {name: list(answers) for name, answers in names.items()}
        self.asked: list[str] = []
        """The names that were resolved."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self._names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answers = self._names[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [_result(host, address, port) for address in addresses]

    async def close(self) -> None:
        """Do nothing."""


class LoopbackGuard(EgressGuard):
    """The program's egress guard, with every name that it allows resolved to loopback.

    A connection that it should have refused therefore reaches a listener of the test, which counts
    it. Addresses of other machines are never connected to, even if the guard is broken.
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        allowed = await super().resolve(host, port, family)
        return [_result(host, "127.0.0.1", port) for _ in allowed[:1]]

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        async def on_this_machine(request: ClientRequest) -> ClientResponse:
            host = request.url.raw_host or ""
            is_name = ":" not in host and not host.replace(".", "").isdigit()
            assert is_name or host in _LOOPBACK, f"the test would connect to {host}"
            return await handler(request)

        return await super().middleware(request, on_this_machine)


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
    )
