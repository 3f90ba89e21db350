"""The texts of pages that are asked for many times in a second, so that they cost the daemon two renderings."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

# Seconds for which a page is reused, by the third request of that time and later ones.
REUSE_TIME = 1.0
MAX_RECENT_PAGES = 32


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    started: float
    previous: float
    """When the rendering before this one was started."""


class RecentPages:
    """The last text of each page, by all that it depends on but the change token of its visitor.

    Texts are kept with `placeholder`, which no visitor is shown, in place of the token.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.placeholder = secrets.token_hex()
        self._clock = clock
        self._cleared = float("-inf")
        self._pages: OrderedDict[Hashable, _Rendered] = OrderedDict()

    def now(self) -> float:
        """Return the time to give to `add`."""
        return self._clock()

    def find(self, key: Hashable) -> str | None:
        """Return the text of a page that was rendered twice within `REUSE_TIME`, else None."""
        page = self._pages.get(key)
        if page is None or self._clock() - page.previous >= REUSE_TIME:
            return None
        return page.text

    def add(self, key: Hashable, text: str, started: float) -> None:
        """Record the text of a page; `started` is the time before its content was read."""
        last = self._pages.get(key)
        if started <= self._cleared or (last and started < last.started):
            return
        self._pages[key] = _Rendered(text, started, last.started if last else float("-inf"))
        self._pages.move_to_end(key)
        if len(self._pages) > MAX_RECENT_PAGES:
            self._pages.popitem(last=False)

    def clear(self) -> None:
        """Forget all texts, because a page has changed something."""
        self._cleared = self._clock()
        self._pages.clear()
