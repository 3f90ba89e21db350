"""Stand-ins: what tags mean while their newest content is too young for a policy. They are not evicted.

Without them a tag would have no content that may be served, although it had some a moment before.
"""

from collections.abc import Callable
from functools import partial

from proxy.names import policy_name
from proxy.oci.digest import Digest
from proxy.policy.rules import RuleSet
from proxy.storage.index import Index
from proxy.storage.index_writes import MAX_CHILDREN, MAX_USED_BLOBS
from proxy.storage.records import tag_history
from proxy.storage.records.tag_history import StandIn
from proxy.storage.space import SpaceManager


class StandIns:
    """Tells the store which blobs to keep, as the rules and the index have it."""

    def __init__(
        self, rules: RuleSet, index: Index, space: SpaceManager, clock: Callable[[], float]
    ) -> None:
        self._rules = rules
        self._index = index
        self._space = space
        self._clock = clock
        # Those that were added since the last refresh: the index may not have them yet.
        self._added: set[Digest] = set()

    @property
    def kept_blobs(self) -> int:
        """The number of blobs that are kept."""
        return len(self._space.kept)

    async def refresh(self) -> None:
        """Keep the stand-ins of now, and no others any more. Raises `StorageError`."""
        longest = max((float(rule.settings.min_age) for rule in self._rules.rules), default=0.0)
        if not longest:
            self._space.kept = frozenset()
            return
        since, added = self._clock() - longest, self._added
        self._added = set()
        found = await self._index.read(partial(tag_history.find_stand_ins, since=since))
        digests = [one.digest for one in found if self._is_needed(one)]
        below = await self._index.read(partial(tag_history.find_below, digests=digests))
        self._space.kept = below | added | self._added

    def add(self, digest: Digest) -> None:
        """Keep an image that has just become a stand-in."""
        if digest in self._space.kept:
            return
        below, waiting = {digest}, [digest]
        while waiting and len(below) < MAX_USED_BLOBS:
            added = set(self._index.children(waiting.pop(), MAX_CHILDREN)) - below
            below |= added
            waiting += added
        self._added |= below
        self._space.kept |= below

    def _is_needed(self, stand_in: StandIn) -> bool:
        rule = self._rules.find(policy_name(stand_in.repository))
        return (
            rule is not None
            and rule.settings.mode == "enforce"
            and rule.settings.unripe == "previous"
            and stand_in.newest_since + rule.settings.min_age > self._clock()
        )
