"""`pullcache status`: the state of the daemon, its store and its upstreams on one screen."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import (
    echo,
    format_bytes,
    format_count,
    format_duration,
    print_fields,
    print_table,
)
from proxy.cli.exit_codes import FAILED
from proxy.cli.options import config_options, json_option, load_config, open_client
from proxy.config import Config
from proxy.errors import DaemonUnavailableError, ProxyError, StoreNotFoundError

# Seconds after which a silent daemon counts as not ready.
PROBE_TIMEOUT = 5.0

FEATURE_LABELS = {
    "manifest_head": "HEAD of manifests",
    "blob_head": "HEAD of blobs",
    "ranges": "ranges of blobs",
    "referrers": "referrers API",
}

# Share of the store's limit above which pins leave too little space for other images.
PINNED_WARNING_RATIO = 0.9


@click.command()
@config_options
@json_option
@click.option("--probe", is_flag=True, help="Print nothing; exit 0 if the daemon is ready, else 1.")
def status(*, path: Path | None, store: str | None, as_json: bool, probe: bool) -> None:
    """Show the state of daemon and store.

    Counts what the daemon has served since it started. If no daemon is running, shows the store
    only, and exits 1.

    \b
    Examples:
      pullcache status
      pullcache status --probe && echo ready
    """
    if probe:
        raise click.exceptions.Exit(0 if _is_ready(load_config(path, store)) else FAILED)
    try:
        with open_client(path, store) as api:
            document = api.get("/api/v1/status")
    except StoreNotFoundError as error:
        raise DaemonUnavailableError(f"no daemon is running: {error}") from error
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _print_status(document)
    if not document["addresses"]:
        raise click.exceptions.Exit(FAILED)


def _print_status(document: dict[str, Any]) -> None:
    print_fields(_status_fields(document))
    click.echo()
    print_table(
        ("UPSTREAM", "STATE", ">PULLS LEFT", "URL"),
        [
            (one["name"], one["problem"] or "up", _format_pulls(one), one["url"])
            for one in document["upstreams"]
        ],
        optional=("URL",),
    )
    for line in _missing_feature_lines(document["upstreams"]):
        echo(line)


def _is_ready(config: Config) -> bool:
    try:
        with open_admin_client(config, allow_embedded=False, timeout=PROBE_TIMEOUT) as api:
            return api.is_ready()
    except (ProxyError, OSError):
        return False


def _status_fields(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    store, addresses = document["store"], document["addresses"]
    used, limit = format_bytes(store["used"]), format_bytes(store["limit"])
    yield "state", document["state"] if addresses else "no daemon is running"
    yield "version", document["version"]
    if addresses:
        yield "uptime", format_duration(document["uptime"])
        yield "listening", ", ".join(addresses)
    yield "admin", ", ".join(document["admin_addresses"])
    yield "store", store["path"]
    yield "used", f"{used} of {limit} in {format_count(store['blobs'], 'blob')}"
    if store["reserved"]:
        yield "reserved", f"{format_bytes(store['reserved'])} for downloads"
    if store["pinned"]:
        is_full = store["pinned"] > PINNED_WARNING_RATIO * store["limit"]
        warning = "; too little space left to store other images" if is_full else ""
        yield "pinned", f"{format_bytes(store['pinned'])}{warning}"
    yield "scrub", _format_scrub(document["scrub"])
    yield "problem", store["problem"]
    if addresses:
        yield "downloads", f"{document['downloads']} running"
        yield from _traffic_fields(document)


def _format_scrub(scrub: dict[str, Any]) -> str:
    if not scrub["period"]:
        return "off"
    text = f"{scrub['progress']:.0%} of the blobs read in this round"
    if scrub["damaged"]:
        text += f", {scrub['damaged']} damaged"
    if scrub["finished_at"]:
        age = max(0.0, time.time() - scrub["finished_at"])
        text += f"; the last one ended {format_duration(age)} ago"
    return text


def _traffic_fields(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for cache_state, served in document["served"].items():
        requests = format_count(served["requests"], "request")
        yield cache_state, f"{requests}, {format_bytes(served['bytes'])}"
    if document["hit_ratio"] is not None:
        saved = format_bytes(document["saved_bytes"])
        yield "hit ratio", f"{document['hit_ratio']:.1%}, {saved} saved"


def _missing_feature_lines(upstreams: list[dict[str, Any]]) -> Iterator[str]:
    for upstream in upstreams:
        for missing in upstream["missing_features"]:
            feature = FEATURE_LABELS[missing["feature"]]
            count = missing["repositories"]
            where = "1 repository" if count == 1 else f"{count} repositories"
            retry_at = time.strftime("%H:%M:%S", time.localtime(missing["retry_at"]))
            yield f"{upstream['name']}: no {feature} in {where}; tried again after {retry_at}"


def _format_pulls(upstream: dict[str, Any]) -> str:
    if upstream["ratelimit_limit"] is None:
        return "-"
    return f"{upstream['ratelimit_remaining']} of {upstream['ratelimit_limit']}"
