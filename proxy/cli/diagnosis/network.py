"""Checks of the way to each upstream: the clock, the name, the connection and its certificate."""

import http.client
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from proxy.cli.diagnosis.finding import Finding
from proxy.cli.display.text import format_duration
from proxy.config import UpstreamSettings
from proxy.config.values import expand_path

# Seconds for a connection, and for the answer.
TIMEOUT = 5.0
# Seconds that the clock may differ from that of a registry.
CLOCK_TOLERANCE = 60.0


@dataclass(frozen=True, slots=True)
class RegistryRoute:
    """The way to an upstream: directly to its host, or by a proxy, which has `proxy` as address."""

    name: str
    url: str
    ca_file: str
    proxy: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class _Probe:
    """What was found on the way; `server_time` is by the registry's clock, None if it said nothing."""

    dns: Finding
    connection: Finding
    server_time: float | None = None


def find_routes(upstreams: Mapping[str, UpstreamSettings]) -> Iterator[RegistryRoute]:
    """Yield the ways to the upstreams and their mirrors, as the configuration has them."""
    from yarl import URL  # noqa: PLC0415 - slow to import

    from proxy.upstream.network.proxies import ProxySelector  # noqa: PLC0415 - imports yarl

    for name, settings in upstreams.items():
        selector = ProxySelector(os.environ, settings.proxy)
        for url in (settings.url, *settings.mirrors):
            proxy = selector.select(URL(url))
            address = (proxy.url.host or "", proxy.url.port or 80) if proxy else None
            label = name if url == settings.url else f"{name} ({url.authority})"
            yield RegistryRoute(label, str(url), settings.ca_file, address)


def check_network(
    routes: Iterator[RegistryRoute], now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Check the clock, then names, then connections."""
    probes = [_probe(route) for route in routes]
    times = [probe.server_time for probe in probes if probe.server_time is not None]
    yield describe_clock(min((one - now() for one in times), key=abs) if times else None)
    yield from (probe.dns for probe in probes)
    yield from (probe.connection for probe in probes)


def describe_clock(difference: float | None) -> Finding:
    """Return the finding for what a registry's clock is ahead of this one, in seconds."""
    if difference is None:
        return Finding("clock", "skip", "no registry has told the time")
    if abs(difference) <= CLOCK_TOLERANCE:
        return Finding("clock", "ok", "agrees with the registries")
    direction = "behind" if difference > 0 else "ahead"
    return Finding(
        "clock",
        "fail",
        f"this clock is {format_duration(abs(difference))} {direction}: certificates and tokens fail",
        "set it: timedatectl set-ntp true",
    )


def _probe(route: RegistryRoute) -> _Probe:
    parts = urlsplit(route.url)
    is_tls = parts.scheme == "https"
    host, port = route.proxy or (parts.hostname or "", parts.port or (443 if is_tls else 80))
    via = f" (the proxy {host}:{port})" if route.proxy else ""
    skipped = Finding("connection", "skip", f"{route.name}: its name is not known")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = f"check the name in the configuration, and /etc/resolv.conf: getent hosts {host}"
        text = f"{route.name}: {host} is not known{via}: {error.strerror}"
        return _Probe(Finding("DNS", "fail", text, advice), skipped)
    dns = Finding("DNS", "ok", f"{route.name}: {host}{via}")
    if route.proxy:
        return _Probe(dns, _connect_to_proxy(route.name, host, port))
    return _connect(route, host, port, dns, is_tls=is_tls)


def _connect_to_proxy(name: str, host: str, port: int) -> Finding:
    try:
        socket.create_connection((host, port), TIMEOUT).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(
            "connection",
            "fail",
            f"{name}: the proxy {host}:{port} does not answer: {reason}",
            f'check upstreams."{name}".proxy, HTTPS_PROXY and the proxy itself',
        )
    return Finding("connection", "ok", f"{name}: by the proxy {host}:{port}")


def _connect(route: RegistryRoute, host: str, port: int, dns: Finding, *, is_tls: bool) -> _Probe:
    kind = "TLS" if is_tls else "connection"
    connection: http.client.HTTPConnection
    if is_tls:
        context = ssl.create_default_context()
        if route.ca_file:
            context.load_verify_locations(expand_path(route.ca_file))
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    with closing(connection):
        try:
            connection.request("GET", "/v2/")
            response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            text = f"{route.name}: the certificate of {host} is refused: {error.verify_message}"
            advice = (
                "check the clock; if a firewall opens TLS or the registry has a CA of its own, set "
                f'upstreams."{route.name}".ca_file to the PEM file of that CA'
            )
            return _Probe(dns, Finding(kind, "fail", text, advice))
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            text = f"{route.name}: {host}:{port} does not answer: {reason}"
            if isinstance(error, ConnectionRefusedError):
                advice = (
                    f"nothing listens on {host}:{port}: is the registry running, and is "
                    f'upstreams."{route.name}".url right?'
                )
            else:
                advice = (
                    f"allow this machine to reach {host}:{port} (firewall), or set "
                    f'upstreams."{route.name}".proxy'
                )
            return _Probe(dns, Finding(kind, "fail", text, advice))
        return _Probe(
            dns,
            Finding(kind, "ok", f"{route.name}: {host}:{port} answers"),
            _parse_date(response.headers.get("Date", "")),
        )


def _parse_date(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None
