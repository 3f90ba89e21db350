"""A name service that tests write, and a network in which public addresses are on this machine."""

import socket
from collections.abc import Mapping

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from aiohttp.abc import AbstractResolver, ResolveResult

from proxy.upstream.egress import EgressGuard

PUBLIC = "93.184.215.14"
_LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "::ffff:7f00:1")


class Names(AbstractResolver):
    """Answers with the addresses of each name, a list an answer; the last is given again."""

    def __init__(self, names: Mapping[str, list[list[str]]]) -> None:
        self._names = {name: list(answers) for name, answers in names.items()}
        self.asked: list[str] = []

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


class RoutedGuard(EgressGuard):
    """A guard behind which every name that it lets through leads to loopback.

    So what it should have refused arrives at a listener, which can count it. An address elsewhere
    that it lets through is not connected to: whatever breaks, tests send nothing out.
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
            assert is_name or host in _LOOPBACK, f"{host} would be connected to"
            return await handler(request)

        return await super().middleware(request, on_this_machine)


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return ResolveResult(
        hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST
    )
