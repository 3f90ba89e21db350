"""Which proxy a request goes through, if any. PURE: the environment is an argument.

`HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` mean what they mean to docker and containerd (Go's
x/net/http/httpproxy), `ALL_PROXY` stands in for the first two, as in curl. Capitals go first.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from yarl import URL

from proxy.config import ProxyUrl
from proxy.errors import ConfigError
from proxy.upstream.credentials import Credentials

_IPAddress = IPv4Address | IPv6Address

_HOST_AND_PORT = re.compile(r"(\[.*\]|[^:]*):([0-9]+)")


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """An HTTP proxy. `authorization` is the value of `Proxy-Authorization`, empty for none."""

    url: URL
    authorization: str = field(repr=False)


class ProxySelector:
    """The proxies of one upstream: its own for everything, or those of the environment.

    Raises `ConfigError`, which names the variable and never its value.
    """

    def __init__(self, environ: Mapping[str, str], proxy_url: ProxyUrl = ProxyUrl("")) -> None:  # noqa: B008 (a text)
        self._proxies_by_scheme: dict[str, HttpProxy] = {}
        for scheme in ("http", "https"):
            found = _parse_proxy(proxy_url) if proxy_url else _from_environ(environ, scheme)
            if found:
                self._proxies_by_scheme[scheme] = found
        rules = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
        self._no_proxy_rules = [rule.strip().lower() for rule in rules.split(",") if rule.strip()]

    def select(self, url: URL) -> HttpProxy | None:
        """Return the proxy for `url`; None for what is asked directly, as this machine always is."""
        proxy = self._proxies_by_scheme.get(url.scheme)
        host = (url.raw_host or "").lower().rstrip(".")
        if proxy is None or f".{host}".endswith(".localhost"):
            return None
        address = _parse_ip_address(host)
        if address is not None and address.is_loopback:
            return None
        is_direct = any(
            _matches_no_proxy(rule, host, address, url.port or 0) for rule in self._no_proxy_rules
        )
        return None if is_direct else proxy

    def is_proxy(self, host: str, port: int | None) -> bool:
        """Tell whether a proxy is there."""
        return any(
            (host, port) == (one.url.raw_host, one.url.port)
            for one in self._proxies_by_scheme.values()
        )


def _from_environ(environ: Mapping[str, str], scheme: str) -> HttpProxy | None:
    for name in (f"{scheme}_PROXY".upper(), f"{scheme}_proxy", "ALL_PROXY", "all_proxy"):
        if value := environ.get(name):
            try:
                return _parse_proxy(ProxyUrl.parse(value if "://" in value else f"http://{value}"))
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    return None


def _parse_proxy(text: ProxyUrl) -> HttpProxy:
    url = URL(text)
    login = (
        "" if url.user is None else Credentials(url.user, url.password or "").basic_authorization()
    )
    return HttpProxy(url.origin(), login)


def _matches_no_proxy(rule: str, host: str, address: _IPAddress | None, port: int) -> bool:
    """Tell whether a part of NO_PROXY means this host. What cannot be read means none."""
    if match := _HOST_AND_PORT.fullmatch(rule):
        rule = match[1]
        if int(match[2]) != port:
            return False
    with suppress(ValueError):
        network = ip_network(rule.strip("[]"), strict=False)
        return address is not None and address in network
    if rule.startswith((".", "*.")):
        # Only what is below it; without the dot, the name itself too.
        return host.endswith(rule.removeprefix("*"))
    return rule == "*" or f".{host}".endswith(f".{rule}")


def _parse_ip_address(host: str) -> _IPAddress | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
