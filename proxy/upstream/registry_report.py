"""The state of a registry or mirror, as operators see it."""

from dataclasses import dataclass

from proxy.upstream.quota import ALL_REPOSITORIES
from proxy.upstream.registry_client import RegistryClient

# Pauses that are named, those that end last first.
MAX_NAMED_PAUSES = 10


@dataclass(frozen=True, slots=True)
class Pause:
    """Requests that are not sent until a Unix time, because the registry limits them.

    `repository` is empty for all.
    """

    repository: str
    requests: str
    until: float
    reason: str


@dataclass(frozen=True, slots=True)
class RegistryReport:
    """The state of a registry or mirror. Times are Unix time, None if there is none.

    `down_since` and `retry_at` are set while no requests are sent, `outage_reason` says why.
    """

    url: str
    is_up: bool
    outage_reason: str
    down_since: float | None
    retry_at: float | None
    last_success_at: float | None
    last_failure_at: float | None
    last_failure: str
    pull_limit: int | None
    pulls_left: int | None
    limit_renewed_at: float | None
    pauses: tuple[Pause, ...]


def describe_registry(client: RegistryClient) -> RegistryReport:
    """Return the state of a registry now."""
    health, quota = client.health, client.quota
    since, retry_at = health.outage_times or (None, None)
    return RegistryReport(
        url=client.url,
        is_up=health.is_up,
        outage_reason=health.reason,
        down_since=since,
        retry_at=retry_at,
        last_success_at=health.last_success_at,
        last_failure_at=health.last_failure_at,
        last_failure=health.last_failure,
        pull_limit=quota.limit,
        pulls_left=quota.remaining,
        limit_renewed_at=quota.renewed_at,
        pauses=tuple(
            Pause(
                "" if requests.repository == ALL_REPOSITORIES else requests.repository,
                f"{requests.method} {requests.kind}",
                pause.since + pause.seconds,
                pause.reason,
            )
            for requests, pause in client.active_pauses()[:MAX_NAMED_PAUSES]
        ),
    )
