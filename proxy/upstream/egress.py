"""Where a connection may go: judged on the address, at the time of connecting.

An upstream chooses where its redirects, its token server and its names lead, so none of them may
lead to what only this machine can reach. A check of the URL alone sees no address behind a name,
and a check before connecting sees another one than the connection (DNS rebinding), so the guard is
the resolver: aiohttp connects to what comes out of it and to nothing else. What is an address
already does not pass through a resolver; the guard sees it as a middleware of the session.
"""

import socket
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from proxy.errors import UpstreamError
from proxy.upstream.proxies import ProxySelector


class AddressScope(IntEnum):
    """How near an address is. An upstream reaches no nearer than it is itself."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    RESERVED = 3
    """Where no registry is: link-local (clouds keep their metadata there), multicast, unspecified."""


# The registries of special addresses (RFC 6890), by how near they are. Written out, because
# what `is_global` says differs between the patch releases of Python.
_NETWORK_SCOPES = [
    (ip_network(text), zone)
    for zone, texts in {
        AddressScope.LOOPBACK: "127.0.0.0/8 ::1/128",
        AddressScope.RESERVED: (
            "0.0.0.0/8 169.254.0.0/16 192.0.0.0/24 224.0.0.0/4 240.0.0.0/4 ::/128 fe80::/10 ff00::/8 "
            # Metadata services outside link-local: Alibaba, Azure, AWS, Google.
            "100.100.100.200/32 168.63.129.16/32 fd00:ec2::/32 fd20:ce::254/128"
        ),
        AddressScope.PRIVATE: (
            "10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 198.18.0.0/15 "
            "192.0.2.0/24 198.51.100.0/24 203.0.113.0/24 fc00::/7 2001::/23 2001:db8::/32 3fff::/20"
        ),
        # What IANA has given out of IPv6. The rest is nowhere.
        AddressScope.PUBLIC: "0.0.0.0/0 2000::/3",
    }.items()
    for text in texts.split()
]

# IPv6 addresses that a gateway turns into the IPv4 address in them: where in their 128 bits it is.
_IPV4_IN_IPV6 = [
    (ip_network("::ffff:0:0/96"), 0),  # mapped
    (ip_network("64:ff9b::/96"), 0),  # NAT64, RFC 6052
    (ip_network("2002::/16"), 80),  # 6to4
]


def classify_address(address: IPv4Address | IPv6Address) -> AddressScope:
    """Return how near `address` is; of an IPv6 address that stands for an IPv4 one, that one's."""
    for network, shift in _IPV4_IN_IPV6:
        if address in network:
            return classify_address(IPv4Address((int(address) >> shift) & 0xFFFF_FFFF))
    return next(
        (zone for network, zone in _NETWORK_SCOPES if address in network), AddressScope.RESERVED
    )


_NO_PROXIES = ProxySelector({})


class EgressGuard(AbstractResolver):
    """Lets one upstream's connections go out, as far as the upstream itself is.

    `url` is what the operator configured: its host may be anywhere (but `Zone.NOWHERE`, unless
    it is spelled as an address). Any other host, be it named by a redirect or a challenge, may be
    as near as the upstream is, and no nearer: a registry on this site may store its blobs on
    this site, one on the internet may not send us here. A name that leads out and in at once, or by
    turns, counts as out for as long as the guard lives.

    A proxy may be anywhere. What goes through one is judged only if it is an address: names are
    for the proxy to resolve, and to allow.
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
        """Return the addresses of `host` that may be connected to.

        Raises `UpstreamError` if there is none, and what the resolver raises.
        """
        found = await self._resolver.resolve(host, port, family)
        zones = [classify_address(ip_address(one["host"])) for one in found]
        is_home = host.lower().rstrip(".") == self._upstream_host
        if is_home and zones:
            reach = _reachable_scope(min(zones))
            self._max_scope = reach if self._max_scope is None else min(reach, self._max_scope)
        is_ours = is_home or self._proxies.is_proxy(host, port)
        limit = AddressScope.LOOPBACK if is_ours else (self._max_scope or AddressScope.PUBLIC)
        allowed = [one for one, zone in zip(found, zones, strict=True) if zone <= limit]
        if found and not allowed:
            raise _egress_error(f"{host} ({found[0]['host']})", zones[0])
        return allowed

    async def close(self) -> None:
        """Release the resolver."""
        await self._resolver.close()

    async def middleware(
        self, request: ClientRequest, handler: ClientHandlerType
    ) -> ClientResponse:
        """Refuse a request to an address that it may not go to. Raises `UpstreamError`."""
        host = _normalize_host(request.url)
        address = _parse_ip_literal(host)
        if address is not None and host != self._upstream_host:
            zone = classify_address(address)
            if zone > (self._max_scope or AddressScope.PUBLIC):
                raise _egress_error(host, zone)
        is_direct = self._proxies.select(request.url) is None
        if (
            is_direct
            and host != self._upstream_host
            and self._proxies.is_proxy(host, request.url.port)
        ):
            raise UpstreamError(f"upstream leads to {host[:80]}, a proxy, where it may not send us")
        return await handler(request)


def _reachable_scope(scope: AddressScope) -> AddressScope:
    """Return how near an upstream may lead us that is in `zone` itself."""
    return AddressScope.PUBLIC if scope is AddressScope.RESERVED else scope


def _normalize_host(url: URL) -> str:
    return (url.raw_host or "").lower().rstrip(".")


def _parse_ip_literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that `host` is, None if it is a name, or raise `UpstreamError`.

    The C library takes 127.1 and 2130706433 for addresses. Nobody writes them in good faith.
    """
    if ":" not in host and not host.replace(".", "").isdigit():
        return None
    try:
        return ip_address(host)
    except ValueError as error:
        raise UpstreamError(f"{host[:80]} is not how an address is written") from error


def _egress_error(destination: str, scope: AddressScope) -> UpstreamError:
    where = {AddressScope.PRIVATE: "a private", AddressScope.LOOPBACK: "this machine's"}.get(
        scope, "a special"
    )
    return UpstreamError(
        f"upstream leads to {destination[:80]}, {where} address, where it may not send us"
    )
