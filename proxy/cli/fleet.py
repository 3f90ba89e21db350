"""`--fleet`: a command for all nodes of a fleet, by the one whose daemon runs here."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from proxy.cli.api_client import open_admin_client
from proxy.cli.display.text import echo, escape_unprintable, format_bytes, print_table
from proxy.cli.exit_codes import FAILED, PARTIAL_SUCCESS
from proxy.cli.options import load_config

fleet_option = click.option("--fleet", "is_fleet", is_flag=True, help="For all nodes of the fleet.")


def call_fleet(
    path: Path | None,
    store: str | None,
    method: str,
    target: str,
    document: Any = None,
    **query: Any,
) -> list[dict[str, Any]]:
    """Have all nodes do an operation; return their answers by address, with `document` or `error`.

    Raises `DaemonUnavailableError`: the daemon of this machine calls the others.
    """
    texts = {name: str(value) for name, value in query.items() if value not in (None, "")}
    call = {"method": method, "path": target, "query": texts, "document": document}
    with open_admin_client(load_config(path, store), allow_embedded=False) as api:
        answers = list(api.stream("POST", "/api/v1/fleet/call", call))
    return sorted(answers, key=lambda answer: str(answer["member"]))


def show_answers(
    answers: list[dict[str, Any]], describe: Callable[[Any], str], *, as_json: bool = False
) -> None:
    """Print a line for each node. Exits 4 if some nodes failed, 1 if all did."""
    if as_json:
        click.echo(json.dumps(answers, indent=2))
    else:
        for answer in answers:
            error = answer["error"]
            text = f"failed: {error['message']}" if error else describe(answer["document"])
            echo(f"{escape_unprintable(answer['member'])}: {escape_unprintable(text)}")
    check_answers(answers)


def check_answers(answers: list[dict[str, Any]]) -> None:
    """Exit 4 if some nodes failed, 1 if all did."""
    if failed := sum(bool(answer["error"]) for answer in answers):
        raise click.exceptions.Exit(PARTIAL_SUCCESS if failed < len(answers) else FAILED)


def check_membership(path: Path | None, store: str | None) -> None:
    """Exit 4 if the node of this machine works alone, with the reason on stderr."""
    with open_admin_client(load_config(path, store), allow_embedded=False) as api:
        problem = api.get("/api/v1/fleet")["problem"]
    if problem:
        echo(f"this node works alone: {escape_unprintable(problem)}", err=True)
        raise click.exceptions.Exit(PARTIAL_SUCCESS)


def warn_of_failures(answers: list[dict[str, Any]]) -> bool:
    """Say on stderr which nodes failed; return whether any did."""
    failed = [answer for answer in answers if answer["error"]]
    for answer in failed:
        message = escape_unprintable(answer["error"]["message"])
        echo(f"{escape_unprintable(answer['member'])}: failed: {message}", err=True)
    return bool(failed)


def skip_absent(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take it for a success that a node does not have an image, if another one has it."""
    if not any(answer["error"] is None for answer in answers):
        return answers
    return [
        answer | {"error": None}
        if answer["error"] and answer["error"]["code"] in ("not_found", "unknown_manifest")
        else answer
        for answer in answers
    ]


def print_status(answers: list[dict[str, Any]]) -> None:
    """Print the state of each node in a line."""
    rows = []
    for answer in answers:
        if answer["error"]:
            rows.append((answer["member"], "failed", "", "", "", "", answer["error"]["message"]))
            continue
        state = answer["document"]
        down = [one["name"] for one in state["upstreams"] if not one["up"]]
        problem = state["store"]["problem"] or (f"down: {', '.join(down)}" if down else "")
        ratio = "" if state["hit_ratio"] is None else f"{state['hit_ratio']:.0%}"
        used = f"{format_bytes(state['store']['used'])} of {format_bytes(state['store']['limit'])}"
        rows.append(
            (
                answer["member"],
                state["state"],
                state["version"],
                used,
                ratio,
                str(state["downloads"]),
                problem,
            )
        )
    columns = ("NODE", "STATE", "VERSION", "STORE", ">HIT RATIO", ">DOWNLOADS", "PROBLEM")
    print_table(columns, rows, optional=(">DOWNLOADS", "VERSION"))


def merge_images(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each image once, with the nodes that have it and the largest part of it on one node."""
    merged: dict[str, dict[str, Any]] = {}
    for answer in answers:
        for image in answer["document"] or ():
            one = merged.setdefault(
                image["name"], {"name": image["name"], "size": 0, "complete": [], "partial": []}
            )
            one["size"] = max(one["size"], image["size"])
            state = "complete" if image["state"] == "complete" else "partial"
            one[state].append(answer["member"])
    return sorted(merged.values(), key=lambda image: str(image["name"]))


def show_images(answers: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print on how many of the nodes each image is. Exits as `check_answers` does."""
    images, nodes = merge_images(answers), len(answers)
    if as_json:
        click.echo(json.dumps(images, indent=2))
    else:
        _print_images(images, nodes)
    warn_of_failures(answers)
    check_answers(answers)


def _print_images(images: list[dict[str, Any]], nodes: int) -> None:
    print_table(
        ("IMAGE", ">SIZE", ">COMPLETE", ">PARTIAL"),
        [
            (
                image["name"],
                format_bytes(image["size"]),
                f"{len(image['complete'])} of {nodes}",
                str(len(image["partial"]) or ""),
            )
            for image in images
        ],
    )


def merge_checks(answers: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the nodes have together of each image and platform.

    A node that misses a blob gets it from one that has it, so only what no node has is missing.
    """
    checks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for answer in answers:
        for check in answer["document"] or ():
            checks.setdefault((check["image"], check["platform"]), []).append(check)
    for found in checks.values():
        known = [check for check in found if check["state"] != "absent"]
        # Nodes may know different images under a tag.
        images = {check["digest"] for check in known}
        merged = [_merge([check for check in known if check["digest"] == one]) for one in images]
        yield min(merged, key=lambda check: len(check["missing"]), default=found[0])


def _merge(checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the nodes have together of one manifest, which all of them have."""
    counts = Counter(one["digest"] for check in checks for one in check["missing"])
    missing = [one for one in checks[0]["missing"] if counts[one["digest"]] == len(checks)]
    # Without missing blobs, a partial image has another fault.
    faults = [check for check in checks if check["state"] != "complete" and not check["missing"]]
    if missing or len(faults) == len(checks):
        return checks[0] | {"missing": missing}
    return checks[0] | {"state": "complete", "missing": [], "reason": ""}
