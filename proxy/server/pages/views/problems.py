"""What is wrong, in the order of its weight, with what helps. Pure."""

from collections.abc import Iterator, Sequence

import msgspec

from proxy.server.activity.recent_pulls import PullRecord
from proxy.server.admin.status import DaemonStatus, UpstreamStatus

# Share of the limit that pinned content may take before it is worth a word.
_PINNED_SHARE = 0.9
# Failed pulls that are older than this many seconds are history.
RECENT = 3600


class Problem(msgspec.Struct, frozen=True):
    """Something that is wrong: what it is, why, what helps, and the page that says more.

    `look` is `bad` if pulls fail by it, `warn` if they may, `info` if it only should be known. `at` is when
    it may be over, in Unix time.
    """

    look: str
    title: str
    reason: str
    advice: str
    page: str = ""
    at: int | None = None


def find_problems(status: DaemonStatus, failed: Sequence[PullRecord], now: float) -> list[Problem]:
    """Return the problems, the heaviest first; `failed` are the last failed pulls."""
    found = [
        *_store_problems(status),
        *(one for upstream in status.upstreams for one in _upstream_problems(status, upstream)),
        *_pull_problems([one for one in failed if now - one.at < RECENT]),
    ]
    return sorted(found, key=lambda one: ("bad", "warn", "info").index(one.look))


def _store_problems(status: DaemonStatus) -> Iterator[Problem]:
    store = status.store
    if store.problem:
        yield Problem(
            "bad",
            "The store cannot be used",
            store.problem,
            "Pulls go to the registries uncached, or fail. Check the disk and its permissions; "
            "pullcache fsck repairs the index.",
        )
    if status.scrub.damaged:
        yield Problem(
            "warn",
            f"{status.scrub.damaged} damaged blobs were found",
            "Their bytes on the disk no longer match their digests.",
            "They are fetched anew when their registry has them. Check the disk.",
        )
    if store.limit and store.pinned > store.limit * _PINNED_SHARE:
        yield Problem(
            "warn",
            "Pinned images fill the store",
            "Little space is left for others, which are evicted soon.",
            "Unpin images, or raise store.max_size.",
            "/images?pinned=yes&order=size",
        )
    if status.offline:
        yield Problem(
            "warn",
            "The cache is offline",
            "No registry is asked; only cached images can be pulled.",
            "Go online again when the network is back.",
        )


def _upstream_problems(status: DaemonStatus, upstream: UpstreamStatus) -> Iterator[Problem]:
    if not upstream.up and not status.offline:
        yield Problem(
            "bad",
            f"{upstream.name} is down",
            upstream.problem,
            "Pulls of what is not cached fail until it answers; cached images are served. Check the "
            "network and DNS of this machine: pullcache doctor.",
            at=upstream.retry_at,
        )
    elif upstream.problem and upstream.up:
        yield Problem(
            "bad",
            f"{upstream.name} rejects the credentials",
            upstream.problem,
            f'Correct the login in upstreams."{upstream.name}", and reload.',
            "/settings",
        )
    if upstream.ratelimit_limit and upstream.ratelimit_remaining == 0:
        yield Problem(
            "bad",
            f"No pulls are left at {upstream.name}",
            f"Its limit is {upstream.ratelimit_limit} pulls for each time window.",
            "Cached images are served. A login raises the limit.",
            at=upstream.ratelimit_renewed_at,
        )


def _pull_problems(failed: Sequence[PullRecord]) -> Iterator[Problem]:
    if not failed:
        return
    images = {one.image for one in failed}
    count = "One pull" if len(failed) == 1 else f"{len(failed)} pulls"
    yield Problem(
        "warn",
        f"{count} of {len(images)} image{'s' if len(images) > 1 else ''} failed in the last hour",
        f"{failed[0].image}: {failed[0].problem or 'no reason is known'}",
        "The activity shows each of them.",
        "/activity",
    )
