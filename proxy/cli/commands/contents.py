"""`pullcache sbom`, `inspect --packages` and `images --package`: what is in the stored images."""

import json
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
import msgspec

from proxy.cli.display.text import (
    Truncator,
    echo,
    escape_unprintable,
    format_count,
    print_fields,
    print_table,
)
from proxy.cli.exit_codes import PARTIAL_SUCCESS
from proxy.cli.options import complete_images, config_options, no_trunc_option, open_client
from proxy.contents.findings import ScanFindings, write_csv
from proxy.errors import ContentsError

platform_option = click.option(
    "--platform",
    metavar="OS/ARCH",
    default="",
    help="The platform. [default: the one of the daemon, or the only one that is stored]",
)

_PATH_WIDTH = 60


@click.command()
@config_options
@click.argument("image", shell_complete=complete_images)
@platform_option
@click.option(
    "--format",
    "form",
    type=click.Choice(("cyclonedx", "spdx")),
    default="cyclonedx",
    metavar="FORMAT",
    show_default=True,
    help="cyclonedx (CycloneDX 1.6) or spdx (SPDX 2.3).",
)
def sbom(*, path: Path | None, store: str | None, image: str, platform: str, form: str) -> None:
    """Print what is in a stored image as an SBOM.

    It lists what inspect --packages shows, as JSON.

    \b
    Examples:
      pullcache sbom nginx:1.27 > nginx.cdx.json
    """
    with open_client(path, store) as api:
        document = api.get("/api/v1/images/sbom", image=image, platform=platform, format=form)
    click.echo(json.dumps(document, indent=2))


@click.command()
@config_options
@click.argument("image", shell_complete=complete_images)
@platform_option
@click.option("--last", is_flag=True, help="Show what was found last; run nothing.")
@click.option(
    "--format",
    "form",
    type=click.Choice(("table", "json", "csv")),
    default="table",
    metavar="FORMAT",
    show_default=True,
    help="How the findings are printed: table, json or csv.",
)
@no_trunc_option
def scan(
    *,
    path: Path | None,
    store: str | None,
    image: str,
    platform: str,
    last: bool,
    form: str,
    no_trunc: bool,
) -> None:
    """Run your own scanner on a stored image.

    contents.scanner is its command. It finds the image in this cache, so the daemon must run. What it
    finds is kept until the next scan.

    \b
    Examples:
      pullcache scan nginx:1.27
      pullcache scan nginx:1.27 --last --format csv
    """
    query = {"image": image, "platform": platform}
    with open_client(path, store) as api:
        if last:
            document = api.get("/api/v1/images/findings", **query)
        else:
            document = api.post("/api/v1/images/scan", query)
    if form == "json":
        click.echo(json.dumps(document, indent=2))
    elif document["report"] is None:
        raise ContentsError(f"{document['image']} was not scanned yet; leave out --last")
    elif form == "csv":
        found = msgspec.convert(document["report"]["found"], ScanFindings)
        click.echo(write_csv(found.findings), nl=False)
    else:
        _print_findings(document, no_trunc=no_trunc)


def _print_findings(document: dict[str, Any], *, no_trunc: bool) -> None:
    report, truncator = document["report"], Truncator(no_trunc=no_trunc)
    found = report["found"]
    counts = ", ".join(f"{count} {name}" for name, count in document["counts"].items())
    print_fields(
        [
            ("image", document["image"]),
            ("platform", document["platform"] or "-"),
            ("scanner", escape_unprintable(found["scanner"])),
            ("scanned", time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(report["made"]))),
            (
                "data from",
                escape_unprintable(found.get("data_from", "")) or "the scanner does not say",
            ),
            ("findings", counts or "none"),
            ("problem", found.get("problem", "")),
        ]
    )
    if found["findings"]:
        click.echo()
        print_table(
            ("ID", "SEVERITY", "PACKAGE", "INSTALLED", "FIXED IN", "TITLE"),
            [
                (
                    one["id"],
                    one["severity"],
                    one["package"],
                    one["installed"],
                    one.get("fixed", "") or "-",
                    truncator.text(one.get("title", ""), _PATH_WIDTH) or "-",
                )
                for one in found["findings"]
            ],
            optional=("TITLE",),
            no_trunc=no_trunc,
        )


def print_contents(document: dict[str, Any], *, as_json: bool, no_trunc: bool) -> None:
    """Print the packages of an image."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    truncator, contents = Truncator(no_trunc=no_trunc), document["contents"]
    packages = contents["packages"]
    print_fields(
        [
            ("image", document["image"]),
            ("platform", document["platform"] or "-"),
            ("digest", truncator.digest(document["digest"])),
            ("system", contents["release"].get("name", "")),
            ("from", _describe_source(contents, truncator)),
            ("read", time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(contents["read"]))),
            ("SBOMs", _describe_unfetched(contents["not_fetched"])),
            ("packages", str(len(packages))),
            ("problems", "\n".join(contents["problems"])),
            ("not known", contents["unread"]),
        ]
    )
    if packages:
        click.echo()
        print_table(
            ("PACKAGE", "VERSION", "KIND", "SOURCE", "FILE"),
            [
                (
                    one["name"],
                    one["version"],
                    one["kind"],
                    one.get("source", "") or "-",
                    truncator.text(one.get("path", ""), _PATH_WIDTH) or "-",
                )
                for one in packages
            ],
            optional=("FILE", "SOURCE"),
            no_trunc=no_trunc,
        )


def _describe_source(contents: dict[str, Any], truncator: Truncator) -> str:
    if contents["source"] == "attached":
        sbom_ = contents["sbom"]
        return f"the attached SBOM {truncator.digest(sbom_['digest'])} ({sbom_['format']})"
    if contents["source"] == "layers":
        return "its layers"
    return "nothing: it has no file system"


def _describe_unfetched(reason: str) -> str:
    return f"not fetched: {escape_unprintable(reason)}" if reason else ""


def list_images_with(
    path: Path | None,
    store: str | None,
    question: str,
    pattern: str,
    *,
    reads: bool,
    no_trunc: bool,
    as_json: bool,
) -> None:
    """Print the images that have a package; read those first that were not, if `reads`."""
    unread = 0
    with open_client(path, store) as api:
        if reads:
            request = {"filter": pattern}
            for event in api.stream("POST", "/api/v1/images/contents/read", request):
                unread += event["outcome"] != "read"
                echo(_format_event(event), err=True)
        answer = api.get("/api/v1/images/packages", package=question, limit="10000")
    matches = answer["matches"]
    if pattern:
        matches = [one for one in matches if any(_matches(name, pattern) for name in one["images"])]
        answer = answer | {"matches": matches}
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _print_matches(matches, no_trunc=no_trunc)
    _print_reach(answer)
    if unread:
        raise SystemExit(PARTIAL_SUCCESS)


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a name has `pattern` as a part, or matches it as a glob."""
    return fnmatchcase(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")


def _format_event(event: dict[str, Any]) -> str:
    name = f"{escape_unprintable(event['image'])} ({event['platform'] or '-'})"
    if event["outcome"] == "read":
        problem = f"; {escape_unprintable(event['reason'])}" if event["reason"] else ""
        return f"read {name}: {format_count(event['packages'], 'package')}{problem}"
    return f"did not read {name}: {escape_unprintable(event['reason'])}"


def _print_matches(matches: list[dict[str, Any]], *, no_trunc: bool) -> None:
    truncator = Truncator(no_trunc=no_trunc)
    rows = [
        (
            _format_names(match, truncator),
            match["platform"] or "-",
            package["name"],
            package["version"],
            package["kind"],
            package["source"] or "-",
        )
        for match in matches
        for package in match["packages"]
    ]
    header = ("IMAGE", "PLATFORM", "PACKAGE", "VERSION", "KIND", "SOURCE")
    print_table(header, rows, optional=("SOURCE", "KIND", "PLATFORM"), no_trunc=no_trunc)


def _format_names(match: dict[str, Any], truncator: Truncator) -> str:
    names = match["images"] or [match["digest"]]
    name, at, digest = names[0].partition("@")
    shown = f"{name}{at}{truncator.digest(digest)}" if at else name
    return shown + (f" +{len(names) - 1}" if len(names) > 1 else "")


def _print_reach(answer: dict[str, Any]) -> None:
    """Say on stderr what the answer is about, and what it is not about."""
    lines = ["the images that were read are being counted: ask again for their number"]
    if answer["read"] is not None:
        lines = [f"{format_count(answer['read'], 'stored image')} read"]
    if answer["not_read"]:
        lines.append(f"{answer['not_read']} not read: --scan reads them first")
    if answer["more"]:
        lines.append(f"{answer['more']} more matches are not shown")
    if answer["not_compared"]:
        some = ", ".join(answer["not_compared"][:3])
        lines.append(f"versions that cannot be compared: {escape_unprintable(some)}")
    click.echo("; ".join(lines), err=True)
