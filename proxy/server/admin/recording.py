"""Recording acts of the admin API in the audit trail, under the full names of images."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from proxy.names import NameParser
from proxy.server.admin.actor import Actor
from proxy.storage.records.trail import Act, Action, AuditTrail


@dataclass(frozen=True, slots=True)
class ActRecorder:
    """Wraps what handlers do if it changes what is served or kept."""

    trail: AuditTrail
    names: NameParser

    @asynccontextmanager
    async def recording(
        self, action: Action, actor: Actor, images: Iterable[str] = ()
    ) -> AsyncIterator[Act]:
        """Record the act that the block does, with its outcome; `images` as the user wrote them."""
        async with self.trail.recording(action, actor, self.full_names(images)) as act:
            yield act

    def full_names(self, images: Iterable[str]) -> dict[str, int]:
        """Return full names as keys; text that is no name, such as a glob, stays as it is."""
        return {self.names.full_name(text): 0 for text in images}
