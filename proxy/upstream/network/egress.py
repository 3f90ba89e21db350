"""Guard against server-side request forgery: which addresses an upstream may make us connect to.

An upstream controls its redirects, its token server and its DNS names, so they must not lead to
addresses that only this machine can reach. A check of the URL misses the address behind a name, and
a check before connecting may see another address than the connection does (DNS rebinding).
Therefore the guard is the resolver: aiohttp connects to the addresses that it returns and to no
others. Hosts that are IP addresses bypass the resolver; for those the guard is also a middleware of
the session.
"""

import socket
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from proxy.errors import UpstreamError
from proxy.upstream.network.proxies import ProxySelector

_NO_PROXIES = ProxySelector({})


class AddressScope(IntEnum):
    """How close to this machine an address is, in increasing order.

    An upstream may lead to addresses as close as its own, but no closer.
    """

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    RESERVED = 3
    """Never a registry: link-local (cloud metadata services), multicast, unspecified."""


# IANA's registries of special-purpose addresses (RFC 6890), by scope. Listed here because the
# result of `is_global` differs between patch releases of Python.
_NETWORK_SCOPES = [
    (ip_network(text), scope)
    for scope, texts in {
        AddressScope.LOOPBACK: "127.0.0.0/8 ::1/128",
        AddressScope.RESERVED: (
            "0.0.0.0/8 169.254.0.0/16 192.0.0.0/24 224.0.0.0/4 240.0.0.0/4 "
            "::/128 fe80::/10 ff00::/8 "
            # Metadata services outside link-local: Alibaba, Azure, AWS, Google.
            "100.100.100.200/32 168.63.129.16/32 fd00:ec2::/32 fd20:ce::254/128"
        ),
        AddressScope.PRIVATE: (
            "10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 198.18.0.0/15 "
            "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 fc00::/7 2001::/23 2001:db8::/32 3fff::/20"
        ),
        # 2000::/3 is all of IPv6 that IANA has allocated; the rest counts as reserved.
        AddressScope.PUBLIC: "0.0.0.0/0 2000::/3",
    }.items()
    for text in texts.split()
]

# IPv6 networks whose addresses embed an IPv4 address, and by how many bits it is shifted.
_IPV4_IN_IPV6 = [
    (ip_network("::ffff:0:0/96"), 0),  # mapped
    (ip_network("64:ff9b::/96"), 0),  # NAT64, RFC 6052
    (ip_network("2002::/16"), 80),  # 6to4
]


def classify_address(address: IPv4Address | IPv6Address) -> AddressScope:
    """Return the scope of `address`; for an IPv6 address that embeds an IPv4 one, of the latter."""
    for network, shift in _IPV4_IN_IPV6:
        if address in network:
            return classify_address(IPv4Address((int(address) >> shift) & 0xFFFF_FFFF))
    return next(
        (scope for network, scope in _NETWORK_SCOPES if address in network), AddressScope.RESERVED
    )


class EgressGuard(AbstractResolver):
    """Allows the connections of one upstream to addresses no closer than its own.

    `url` is the configured one: its host may have any scope (`RESERVED` only if it is written as an
    address). Any other host, named by a redirect or a challenge, may be as close as the upstream
    but no closer: a registry on the local network may store its blobs there, one on the internet
    may not send us there. If the upstream's own name resolves to addresses of different scopes, at
    once or over time, the most public of them counts for the lifetime of the guard.

    A proxy may have any scope. Requests through a proxy are only checked if their host is an
    address: the proxy resolves names, and decides whether to allow them.
    """

    def __init__(
        self, url: URL, resolver: AbstractResolver, proxies: ProxySelector = _NO_PROXIES
    ) -> None:
        self._upstream_host = _normalize_host(url)
        self._resolver = resolver
        self._proxies = proxies
        literal = _parse_ip_literal(self._upstream_host)
        self._max_scope = None if literal is None else _reachable_scope(classify_address(literal))

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the allowed addresses of `host`.

        Raises `UpstreamError` if all its addresses are forbidden, and what the resolver raises.
        """
        results = await self._resolver.resolve(host, port, family)
        scopes = [classify_address(ip_address(result["host"])) for result in results]
        is_upstream = host.lower().rstrip(".") == self._upstream_host
        if is_upstream and scopes:
            reachable = _reachable_scope(min(scopes))
            self._max_scope = (
                reachable if self._max_scope is None else min(reachable, self._max_scope)
            )
        is_configured = is_upstream or self._proxies.is_proxy(host, port)
        limit = AddressScope.LOOPBACK if is_configured else self._limit
        allowed = [result for result, scope in zip(results, scopes, strict=True) if scope <= limit]
        if results and not allowed:
            raise _egress_error(f"{host} ({results[0]['host']})", scopes[0])
        return allowed

    async def close(self) -> None:
        """Release the resolver."""
        await self._resolver.close()

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        """Send a request unless its host is a forbidden address. Raises `UpstreamError`."""
        host = _normalize_host(request.url)
        address = _parse_ip_literal(host)
        if host != self._upstream_host:
            if address is not None and (scope := classify_address(address)) > self._limit:
                raise _egress_error(host, scope)
            is_direct = self._proxies.select(request.url) is None
            if is_direct and self._proxies.is_proxy(host, request.url.port):
                raise UpstreamError(
                    f"upstream points to {host[:80]}, a proxy, which is not allowed"
                )
        return await handler(request)

    @property
    def _limit(self) -> AddressScope:
        """The closest scope of hosts that upstream names; public until its own is known."""
        return AddressScope.PUBLIC if self._max_scope is None else self._max_scope


def _reachable_scope(scope: AddressScope) -> AddressScope:
    """Return the closest scope that an upstream of this scope may lead to."""
    return AddressScope.PUBLIC if scope is AddressScope.RESERVED else scope


def _normalize_host(url: URL) -> str:
    return (url.raw_host or "").lower().rstrip(".")


def _parse_ip_literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return `host` as an address, or None if it is a name.

    Raises `UpstreamError` for short and numeric forms such as 127.1 and 2130706433: the C library
    accepts them as addresses, but only attackers use them in URLs.
    """
    if ":" not in host and not host.replace(".", "").isdigit():
        return None
    try:
        return ip_address(host)
    except ValueError as error:
        raise UpstreamError(f"{host[:80]} is not a valid IP address") from error


def _egress_error(destination: str, scope: AddressScope) -> UpstreamError:
    where = {AddressScope.PRIVATE: "a private", AddressScope.LOOPBACK: "this machine's"}.get(
        scope, "a special"
    )
    return UpstreamError(
        f"upstream points to {destination[:80]}, {where} address, which is not allowed"
    )
