"""`pullcache doctor`: find out in order what is wrong, and say what to do."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import AdminClient, open_admin_client
from proxy.cli.commands.config import check_referenced_files
from proxy.cli.diagnosis import fleet, front, machine, network, pull
from proxy.cli.diagnosis.finding import Finding
from proxy.cli.display.text import escape_unprintable, format_count, terminal_width, wrap
from proxy.cli.exit_codes import FAILED
from proxy.cli.options import config_options, json_option, load_config
from proxy.config import Config, find_config_file
from proxy.errors import ConfigError, DaemonUnavailableError, ProxyError

# Seconds that the daemon may be silent while it asks the registries.
DAEMON_TIMEOUT = 30.0
DEFAULT_IMAGE = "library/hello-world:latest"

_WIDTH = 6


@click.command()
@config_options
@click.option(
    "--image",
    metavar="PATH",
    default=DEFAULT_IMAGE,
    show_default=True,
    help="Image that is pulled, as a path of the cache with a tag.",
)
@click.option("--no-pull", is_flag=True, help="Pull nothing.")
@json_option
def doctor(
    *, path: Path | None, store: str | None, image: str, no_pull: bool, as_json: bool
) -> None:
    """Find out what is wrong, and what to do first.

    Looks in order at the configuration, the units, the ports, the disk, nginx if it sends blobs, the
    clock, the name, the certificate and the login of each upstream, pulls a small image from the cache, and tells
    whether clients have. Exits 1 if something fails.

    \b
    Examples:
      pullcache doctor
      pullcache doctor --image ghcr.io/owner/app:latest
    """
    findings = []
    for finding in _diagnose(path, store, image if not no_pull else ""):
        findings.append(finding)
        if not as_json:
            _print_finding(finding)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print_advice(findings)
    if any(finding.state == "fail" for finding in findings):
        raise click.exceptions.Exit(FAILED)


def _diagnose(path: Path | None, store: str | None, image: str) -> Iterator[Finding]:
    """Yield the findings in the order in which problems should be solved."""
    file = find_config_file(path, os.environ)
    try:
        config = load_config(path, store)
        check_referenced_files(config)
    except ConfigError as error:
        advice = "correct it, then: pullcache config check, and run pullcache doctor again"
        yield Finding("configuration", "fail", str(error), advice)
        return
    yield Finding("configuration", "ok", str(file or "no file: all defaults"))
    yield from machine.check_units()
    try:
        with open_admin_client(config, allow_embedded=False, timeout=DAEMON_TIMEOUT) as api:
            yield from _diagnose_daemon(config, api, image)
    except (DaemonUnavailableError, OSError) as error:
        yield from _diagnose_without_daemon(config, str(error))


def _diagnose_without_daemon(config: Config, reason: str) -> Iterator[Finding]:
    taken = [*machine.check_free_ports(config.server.listen)]
    yield from taken
    yield from machine.check_disk(config, None)
    yield Finding(
        "daemon",
        "fail",
        reason,
        "run this as root or the daemon's user, with its -c or --store"
        if "permission denied" in reason
        else "start it: systemctl start pullcache, or pullcache serve; if it runs, with its -c or "
        "--store",
    )
    if not config.offline:
        yield from network.check_network(network.find_routes(config.upstreams))


def _diagnose_daemon(config: Config, api: AdminClient, image: str) -> Iterator[Finding]:
    status = api.get("/api/v1/status")
    is_tls = bool(config.server.tls_certificate)
    yield from machine.check_listeners(status["addresses"], is_tls=is_tls)
    yield from machine.check_disk(config, status)
    yield from front.check_front(config)
    yield from fleet.check_fleet(config, api)
    if status["offline"]:
        yield Finding(
            "upstreams",
            "warn",
            "the daemon is offline",
            "if it should not be: pullcache offline off",
        )
    else:
        failed = []
        for finding in network.check_network(network.find_routes(config.upstreams)):
            failed += [finding.text.partition(":")[0]] if finding.state == "fail" else []
            yield finding
        yield from _check_logins(api, failed)
    tcp = [address for address in status["addresses"] if not address.startswith("unix:")]
    if image and tcp:
        yield pull.check_pull(
            machine.local_address(tcp[0]), image, is_tls=is_tls, is_offline=status["offline"]
        )
    yield _check_clients(api, status)


def _check_logins(api: AdminClient, unreachable: Sequence[str]) -> Iterator[Finding]:
    """Check the logins of the upstreams, except those that were found `unreachable`."""
    try:
        checks = api.post("/api/v1/upstreams/check")
    except ProxyError as error:
        yield Finding("login", "warn", str(error))
        return
    for one in checks:
        name = one["name"]
        if name in unreachable:
            yield Finding("login", "skip", f"{name}: it cannot be reached")
        elif not one["problem"]:
            login = "its login is accepted" if one["has_login"] else "anonymous"
            yield Finding("login", "ok", f"{name}: {login}")
        elif one["code"].startswith("upstream_unauthorized") or "credentials" in one["problem"]:
            advice = f'set the right username and password_file in [upstreams."{name}"], or none'
            yield Finding("login", "fail", f"{name}: {one['problem']}", advice)
        else:
            advice = "if the line of its connection is ok, look up the message in Troubleshooting"
            yield Finding("login", "fail", f"{name}: {one['problem']}", advice)


def _check_clients(api: AdminClient, status: dict[str, Any]) -> Finding:
    """Say how many addresses have pulled, other than those of this machine."""
    found = api.get("/api/v1/traffic/top", of="client", by="pulls", days=2, limit=1000)
    names = [one["name"] for one in found if one["requests"]]
    others = [name for name in names if not (name and machine.is_own_address(name))]
    if names:
        text = f"{format_count(len(names), 'client')} since yesterday"
        return Finding("clients", "ok", f"{text}, {len(others)} of them on other machines")
    listens_here = all(
        machine.is_local(address) for address in status["addresses"] if "unix:" not in address
    )
    advice = "configure them: pullcache client-config docker" + (
        "; for other machines set server.listen, which is on loopback" if listens_here else ""
    )
    return Finding("clients", "warn", "no client has pulled since yesterday", advice)


def _print_finding(finding: Finding) -> None:
    text = f"{finding.state:<{_WIDTH}}{finding.check}: {escape_unprintable(finding.text)}"
    click.echo(wrap(text, terminal_width(), indent=" " * _WIDTH))


def _print_advice(findings: list[Finding]) -> None:
    order = {"fail": 0, "warn": 1}
    todo = [one for one in findings if one.advice and one.state in order]
    todo.sort(key=lambda one: order[one.state])
    click.echo()
    if not todo:
        click.echo("nothing to do")
        return
    click.echo("what to do, in this order:")
    for number, finding in enumerate(todo, 1):
        head = f"{number}. {finding.check}: "
        text = f"{head}{escape_unprintable(finding.advice)}"
        click.echo(wrap(text, terminal_width(), indent="   "))
