"""The caches that a request has come through, in its `Via` header (RFC 9110 section 7.6.3). Pure.

Each daemon has an id that it adds to what it asks upstream. A request that comes back with the own id is
in a loop: caches name each other as upstream or mirror.
"""

import re
from contextvars import ContextVar

from proxy.errors import LoopDetectedError

# The ids that are passed on. A longer loop is not noticed, and ends at the time limit of a request.
MAX_HOPS = 16

_PSEUDONYM = re.compile(r"pullcache-[0-9a-f]{16}")

# The ids of the caches that the request being handled has come through, as `Via` has them. Tasks that a
# request starts inherit them.
_hops: ContextVar[tuple[str, ...]] = ContextVar("hops", default=())


def enter_hop(via: str | None, daemon_id: str) -> None:
    """Remember the caches that a request has come through.

    Raises `LoopDetectedError` if this daemon is one of them.
    """
    if via is None:
        # The context may be that of an earlier request of the same connection.
        if _hops.get():
            _hops.set(())
        return
    # Nothing else is passed on: a client could make upstream refuse what others wait for.
    hops = tuple(_PSEUDONYM.findall(via))
    if f"pullcache-{daemon_id}" in hops:
        raise LoopDetectedError(
            "this request has been here before: caches name each other as upstream or mirror; "
            "check url and mirrors"
        )
    _hops.set(hops[1 - MAX_HOPS :])


def via_header(daemon_id: str) -> str:
    """Return the `Via` header of a request that this daemon sends for the one being handled."""
    return ", ".join(f"1.1 {hop}" for hop in (*_hops.get(), f"pullcache-{daemon_id}"))
