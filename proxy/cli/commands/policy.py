"""`pullcache policy`: check images, list rules and decisions, make exceptions."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from proxy.cli.display.text import Truncator, echo, escape_unprintable, print_table
from proxy.cli.exit_codes import FAILED
from proxy.cli.groups import SummaryGroup
from proxy.cli.options import (
    DurationParameter,
    config_options,
    json_option,
    no_trunc_option,
    open_client,
)
from proxy.config import Duration
from proxy.errors import ProxyError

_REASON_WIDTH = 70


@click.group(cls=SummaryGroup)
def policy() -> None:
    """Check images against the policies, and make exceptions.

    \b
    Examples:
      pullcache policy list
      pullcache policy why nginx:1.27
    """


@policy.command(context_settings={"ignore_unknown_options": True})
@config_options
@click.argument("images", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--containerd",
    is_flag=True,
    help="Act as an image verifier of containerd: takes its -name, -digest and "
    "-stdin-media-type, prints the reason, exits 0 or 1.",
)
@json_option
def check(
    *,
    path: Path | None,
    store: str | None,
    images: tuple[str, ...],
    containerd: bool,
    as_json: bool,
) -> None:
    """Check if the policies allow images.

    Asks upstream what the tags mean now, and serves nothing. Exits 1 if an image is refused or
    cannot be decided about, and 0 if its policy only audits.

    \b
    Examples:
      pullcache policy check nginx:1.27
    """
    if containerd:
        images = (_containerd_image(images),)
    try:
        with open_client(path, store) as api:
            checks = list(api.stream("POST", "/api/v1/policy/check", {"images": list(images)}))
    except ProxyError as error:
        if not containerd:
            raise
        # containerd shows what a verifier prints to stdout, and takes 0 and 1 only.
        click.echo(f"pullcache cannot check {images[0]}: {error}")
        raise click.exceptions.Exit(FAILED) from error
    if as_json:
        click.echo(json.dumps(checks, indent=2))
    elif containerd:
        click.echo(_describe_check(checks[0]))
    else:
        _print_checks(checks)
    if not all(one["is_allowed"] for one in checks):
        raise click.exceptions.Exit(FAILED)


@policy.command()
@config_options
@click.argument("image")
def why(*, path: Path | None, store: str | None, image: str) -> None:
    """Explain what the policies say about an image.

    \b
    Examples:
      pullcache policy why nginx:1.27
    """
    with open_client(path, store) as api:
        (found,) = api.stream("POST", "/api/v1/policy/check", {"images": [image]})
        rules = api.get("/api/v1/policy")["policies"]
    echo(escape_unprintable(_describe_check(found)))
    if found["digest"]:
        click.echo(f"digest: {found['digest']}")
    if found["earlier"]:
        click.echo(f"served meanwhile: {found['earlier']}")
    for rule in rules:
        if rule["policy"] == found["policy"]:
            echo(f"policy {rule['policy']}: {_describe_rule(rule)}")
    if found["decision"] in ("deny", "unripe", "previous") and found["digest"]:
        repository = found["image"].partition("@")[0].rpartition(":")[0] or found["image"]
        if "@" in found["image"]:
            repository = found["image"].partition("@")[0]
        click.echo(
            f"to allow it for a week: pullcache policy except {repository}@{found['digest']} "
            "--for 7d --reason TEXT"
        )
    if found["decision"] == "error":
        raise click.exceptions.Exit(FAILED)


@policy.command("list")
@config_options
@json_option
def list_policies(*, path: Path | None, store: str | None, as_json: bool) -> None:
    """List policies and exceptions.

    \b
    Examples:
      pullcache policy list
    """
    with open_client(path, store) as api:
        overview = api.get("/api/v1/policy")
    if as_json:
        click.echo(json.dumps(overview, indent=2))
        return
    if overview["policies"]:
        print_table(
            ("POLICY", "MODE", "IMAGES", "RULE"),
            [
                (str(rule["policy"]), rule["mode"], ", ".join(rule["images"]), _describe_rule(rule))
                for rule in overview["policies"]
            ],
            optional=("RULE",),
        )
    else:
        click.echo("no policies are configured", err=True)
    if overview["exceptions"]:
        click.echo()
        print_table(
            ("EXCEPTION", "UNTIL", "REASON"),
            [
                (one["image"], _format_time(one["until"]), escape_unprintable(one["reason"]))
                for one in overview["exceptions"]
            ],
        )


@policy.command("except")
@config_options
@click.argument("image", metavar="IMAGE@DIGEST")
@click.option(
    "--for",
    "duration",
    type=DurationParameter(),
    required=True,
    help="How long the image is allowed, for instance 7d; at most 366d.",
)
@click.option("--reason", required=True, help="Why; it is logged and listed.")
def add_exception(
    *, path: Path | None, store: str | None, image: str, duration: Duration, reason: str
) -> None:
    """Allow an image for a time, whatever the policies say.

    \b
    Examples:
      pullcache policy except IMAGE --for 7d --reason test
    """
    document = {"image": image, "seconds": float(duration), "reason": reason}
    with open_client(path, store) as api:
        made = api.post("/api/v1/policy/exceptions", document)
    click.echo(f"{made['image']} is allowed until {_format_time(made['until'])}")


@policy.command()
@config_options
@click.option(
    "--since",
    type=DurationParameter(),
    default="1d",
    show_default=True,
    help="How far to go back.",
)
@click.option(
    "--decision",
    metavar="NAME",
    default="",
    help="Only these: deny, unripe, unknown, previous, would_deny, would_unripe, would_unknown, "
    "allowed_unknown, exception.",
)
@no_trunc_option
@json_option
def decisions(
    *,
    path: Path | None,
    store: str | None,
    since: Duration,
    decision: str,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """List what the policies decided lately.

    \b
    Examples:
      pullcache policy decisions --since 7d
    """
    with open_client(path, store) as api:
        found = api.get("/api/v1/policy/decisions", since=time.time() - since, decision=decision)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"no decisions in the last {since}; plain hits are not listed", err=True)
        return
    truncator = Truncator(no_trunc=no_trunc)
    print_table(
        ("TIME", "DECISION", "POLICY", "IMAGE", "REASON"),
        [
            (
                _format_time(one["at"]),
                one["decision"],
                str(one["policy"]),
                one["image"],
                truncator.text(one["reason"], _REASON_WIDTH),
            )
            for one in found
        ],
        optional=("POLICY",),
        flexible="REASON",
        no_trunc=no_trunc,
    )


def _containerd_image(arguments: tuple[str, ...]) -> str:
    """Return the image that containerd asks about, by name and digest."""
    named = dict(zip(arguments[::2], arguments[1::2], strict=False))
    name, digest = named.get("-name"), named.get("-digest")
    if not (name and digest):
        raise click.UsageError("--containerd needs -name NAME and -digest DIGEST")
    return f"{name.partition('@')[0]}@{digest}"


def _print_checks(checks: list[dict[str, Any]]) -> None:
    print_table(
        ("IMAGE", "DECISION", "POLICY", "REASON"),
        [
            (
                one["image"],
                one["decision"]
                if one["is_allowed"] == (one["decision"] in ("allow", "previous"))
                else f"{one['decision']} (audit)",
                str(one["policy"] or "-"),
                escape_unprintable(_reason(one)),
            )
            for one in checks
        ],
    )


def _describe_check(found: dict[str, Any]) -> str:
    if found["decision"] == "error":
        return f"{found['image']} cannot be checked: {found['reason']}"
    if not found["policy"]:
        return f"{found['image']} is allowed: no policy is about it"
    said = {
        "allow": "allows",
        "unknown": "cannot decide about",
        "previous": "holds back new content of",
    }.get(found["decision"], "refuses")
    if found["mode"] == "audit" and said != "allows":
        said = f"audits only, and {said.replace('refuses', 'would refuse')}"
    reason = f": {_reason(found)}" if found["reason"] else ""
    return f"policy {found['policy']} {said} {found['image']}{reason}"


def _reason(found: dict[str, Any]) -> str:
    ends = " until" if found["decision"] == "allow" else "; from"
    until = f"{ends} {_format_time(found['until'])}" if found["until"] else ""
    return f"{found['reason']}{until}"


def _describe_rule(rule: dict[str, Any]) -> str:
    """Return the conditions of a rule in one line, as the configuration has them."""
    defaults = {"policy", "images", "mode"}
    parts = [
        f"{key} = {json.dumps(value)}"
        for key, value in rule.items()
        if key not in defaults
        and value not in ([], "0s")
        and not (key in ("unripe", "first_seen") and rule["min_age"] == "0s")
        and not (key == "unknown" and not rule["trusted"] and rule["min_age"] == "0s")
    ]
    return ", ".join(parts) or "allows all"


def _format_time(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%MZ}"
