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
from proxy.cli.fleet import (
    call_fleet,
    check_answers,
    check_membership,
    fleet_option,
    print_status,
)
from proxy.cli.options import config_options, json_option, load_config, open_client
from proxy.config import Config
from proxy.errors import DaemonUnavailableError, ProxyError, StoreNotFoundError

# Seconds after which a silent daemon counts as not ready.
PROBE_TIMEOUT = 5.0
# Seconds between two states of `--watch`.
WATCH_INTERVAL = 2.0

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
@click.option("--watch", is_flag=True, help="Show the state every 2 seconds until Ctrl-C.")
@fleet_option
def status(
    *, path: Path | None, store: str | None, as_json: bool, probe: bool, watch: bool, is_fleet: bool
) -> None:
    """Show the state of daemon and store, and what the cache saved.

    Requests by cache status are counted since the daemon started; pulls and bytes by day. If no
    daemon is running, shows the store only, and exits 1. With --watch, --json prints a line each
    time.

    \b
    Examples:
      pullcache status
      pullcache status --watch
      pullcache status --fleet
      pullcache status --probe && echo ready
    """
    if probe:
        raise click.exceptions.Exit(0 if _is_ready(load_config(path, store)) else FAILED)
    if is_fleet:
        answers = call_fleet(path, store, "GET", "/api/v1/status")
        if as_json:
            click.echo(json.dumps(answers, indent=2))
        else:
            print_status(answers)
        check_answers(answers)
        check_membership(path, store)
        return
    if watch:
        config = load_config(path, store)
        while True:
            with open_admin_client(config, allow_embedded=False) as api:
                document = api.get("/api/v1/status")
            click.clear()
            _show(document, as_json=as_json, indent=None)
            time.sleep(WATCH_INTERVAL)
    try:
        with open_client(path, store) as api:
            document = api.get("/api/v1/status")
    except StoreNotFoundError as error:
        raise DaemonUnavailableError(f"no daemon is running: {error}") from error
    _show(document, as_json=as_json, indent=2)
    if not document["addresses"]:
        raise click.exceptions.Exit(FAILED)


def _show(document: dict[str, Any], *, as_json: bool, indent: int | None) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=indent))
    else:
        _print_status(document)


def _print_status(document: dict[str, Any]) -> None:
    print_fields(_status_fields(document))
    click.echo()
    if any(period["requests"] or period["preloaded_bytes"] for period in document["traffic"]):
        click.echo("\n".join(_traffic_lines(document["traffic"])) + "\n")
    print_table(
        ("UPSTREAM", "STATE", ">PULLS LEFT", "URL"),
        [
            (one["name"], _format_state(document, one), _format_pulls(one), one["url"])
            for one in document["upstreams"]
        ],
        optional=("URL",),
    )
    for line in _missing_feature_lines(document["upstreams"]):
        echo(line)


def _format_state(document: dict[str, Any], upstream: dict[str, Any]) -> str:
    # Without a daemon, the answer is from one of this command's own, which has asked no upstream.
    without_problem = "up" if document["addresses"] else "not asked"
    return upstream["problem"] or without_problem


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
        yield from _request_fields(document)


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


def _request_fields(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for cache_state, served in document["served"].items():
        requests = format_count(served["requests"], "request")
        # With a space, as "revalidated" takes the whole column.
        yield f"{cache_state} ", f"{requests}, {format_bytes(served['bytes'])}"


def _traffic_lines(periods: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a table of the traffic: a column for each period."""
    titles = ["today" if one["days"] == 1 else f"{one['days']} days" for one in periods]
    yield _columns("", titles)
    yield _columns("pulls", [str(one["pulls"]) for one in periods])
    yield _columns("served by cache", [_format_share(one["hits"], one["pulls"]) for one in periods])
    yield _columns("sent to clients", [format_bytes(one["sent_bytes"]) for one in periods])
    yield _columns("fetched for them", [format_bytes(one["received_bytes"]) for one in periods])
    if any(one["preloaded_bytes"] for one in periods):
        yield _columns("preloaded", [format_bytes(one["preloaded_bytes"]) for one in periods])
    yield _columns("saved", [_format_signed(one["saved_bytes"]) for one in periods])
    ratios = [one["hit_ratio"] for one in periods]
    yield _columns("byte hit ratio", ["-" if one is None else f"{one:.1%}" for one in ratios])
    if any(one["avoided"] for one in periods):
        yield _columns("429s avoided", [str(one["avoided"]) for one in periods])


def _columns(label: str, cells: list[str]) -> str:
    return f"{label:<17}" + "".join(f"{cell:>11}" for cell in cells)


def _format_share(count: int, total: int) -> str:
    return f"{count / total:.0%}" if total else "-"


def _format_signed(size: int) -> str:
    return f"-{format_bytes(-size)}" if size < 0 else format_bytes(size)


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
