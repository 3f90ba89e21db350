"""Opens the directory that the configuration names; imports redis only if it names one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from proxy.config import FleetSettings
from proxy.errors import ConfigError
from proxy.fleet.alone import Alone
from proxy.fleet.directory import Directory
from proxy.metrics import Metrics

if TYPE_CHECKING:
    from proxy.fleet.holdings import ListHoldings
    from proxy.fleet.valkey import ValkeyDirectory


def check_fleet(settings: FleetSettings) -> None:
    """Raise `ConfigError` if the node could not belong to its fleet. Blocks; asks no server."""
    if settings.is_on:
        _prepare(settings)


@asynccontextmanager
async def open_directory(
    settings: FleetSettings,
    metrics: Metrics,
    *,
    instance: str,
    version: str,
    list_holdings: "ListHoldings",
) -> AsyncIterator[Directory]:
    """Yield the directory; its `run` joins the fleet. Raises `ConfigError`."""
    if not settings.is_on:
        yield Alone()
        return
    directory_class, ca = await asyncio.to_thread(_prepare, settings)
    directory = directory_class(
        settings, metrics, instance=instance, version=version, list_holdings=list_holdings, ca=ca
    )
    try:
        yield directory
    finally:
        await directory.close()


def _prepare(settings: FleetSettings) -> "tuple[type[ValkeyDirectory], str]":
    """Return the class of the directory, and the CA certificates of its server."""
    try:
        from proxy.fleet.server import read_ca, read_password  # noqa: PLC0415 (an optional dependency)
        from proxy.fleet.valkey import ValkeyDirectory  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "fleet.valkey: redis-py is not installed (pip install 'pullcache[fleet]')"
        ) from error
    settings.read_token()
    if settings.valkey_password_file:
        read_password(settings)
    return ValkeyDirectory, read_ca(settings)
