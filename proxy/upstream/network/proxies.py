"""Which HTTP proxy a request goes through, if any. Pure: the environment is an argument.

`HTTP_PROXY`, `HTTPS_PROXY` and `NO_PROXY` work as in docker and containerd (Go's
x/net/http/httpproxy); `ALL_PROXY` is the default of the first two, as in curl. Upper-case names
take precedence.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from yarl import URL

from proxy.config import ProxyUrl
from proxy.errors import ConfigError
from proxy.upstream.auth.credentials import Credentials

_IPAddress = IPv4Address | IPv6Address

_HOST_AND_PORT = re.compile(r"(\[.*\]|[^:]*):([0-9]+)")


@dataclass(frozen=True, slots=True)
class HttpProxy:
    """An HTTP proxy. `authorization` is the value of `Proxy-Authorization`, empty for none."""

    url: URL
    authorization: str = field(repr=False)


class ProxySelector:
    """Selects the proxy for each URL: the configured one for all, or those of the environment.

    Raises `ConfigError`, which names the variable but never its value.
    """

    def __init__(self, environ: Mapping[str, str], proxy_url: ProxyUrl = ProxyUrl("")) -> None:  # noqa: B008 (a string)
        self._proxies_by_scheme: dict[str, HttpProxy] = {}
        for scheme in ("http", "https"):
            proxy = _parse_proxy(proxy_url) if proxy_url else _from_environ(environ, scheme)
            if proxy:
                self._proxies_by_scheme[scheme] = proxy
        rules = environ.get("NO_PROXY") or environ.get("no_proxy") or ""
        self._no_proxy_rules = [rule.strip().lower() for rule in rules.split(",") if rule.strip()]

    def select(self, url: URL) -> HttpProxy | None:
        """Return the proxy for `url`, None for a direct connection (always for loopback)."""
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
        """Tell whether one of the proxies has this address."""
        return any(
            (host, port) == (proxy.url.raw_host, proxy.url.port)
            for proxy in self._proxies_by_scheme.values()
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
    if url.user is None:
        return HttpProxy(url.origin(), "")
    credentials = Credentials(url.user, url.password or "")
    return HttpProxy(url.origin(), credentials.basic_authorization())


def _matches_no_proxy(rule: str, host: str, address: _IPAddress | None, port: int) -> bool:
    """Tell whether a rule of NO_PROXY matches this host. A malformed rule matches nothing."""
    if match := _HOST_AND_PORT.fullmatch(rule):
        rule = match[1]
        if int(match[2]) != port:
            return False
    with suppress(ValueError):
        network = ip_network(rule.strip("[]"), strict=False)
        return address is not None and address in network
    if rule.startswith((".", "*.")):
        # With the leading dot: subdomains only. Without it (below): the name itself too.
        return host.endswith(rule.removeprefix("*"))
    return rule == "*" or f".{host}".endswith(f".{rule}")


def _parse_ip_address(host: str) -> _IPAddress | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
