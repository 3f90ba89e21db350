"""Check of the fleet: whether this node can ask the directory, and whether the other nodes answer it."""

from collections.abc import Iterator
from typing import Any

from proxy.cli.api_client import AdminClient
from proxy.cli.diagnosis.finding import Finding
from proxy.config import Config
from proxy.errors import InvalidRequestError


def check_fleet(config: Config, api: AdminClient) -> Iterator[Finding]:
    """Check the directory and the other nodes, if the daemon is a node of a fleet."""
    try:
        fleet = api.get("/api/v1/fleet")
    except InvalidRequestError as error:
        if config.fleet.valkey:
            yield Finding("fleet", "fail", str(error), "restart the daemon with this configuration")
        return
    if fleet["problem"]:
        yield Finding(
            "fleet",
            "fail",
            f"this node works alone: {fleet['problem']}",
            "correct it; until then this node fetches from upstream what other nodes have",
        )
        return
    call: dict[str, Any] = {
        "method": "GET",
        "path": "/api/v1/status",
        "query": {},
        "document": None,
    }
    yield describe_answers([*api.stream("POST", "/api/v1/fleet/call", call)])


def describe_answers(answers: list[dict[str, Any]]) -> Finding:
    """Return the finding for what the nodes have answered to a call."""
    failed = [answer for answer in answers if answer["error"]]
    if not failed:
        return Finding("fleet", "ok", f"{len(answers)} nodes answer")
    text = f"{failed[0]['member']}: {failed[0]['error']['message']}"
    more = f" ({len(failed)} of {len(answers)} nodes)" if len(failed) > 1 else ""
    return Finding("fleet", "fail", text + more, "see: pullcache status --fleet")
