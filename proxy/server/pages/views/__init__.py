"""The pages and their actions, in the order of the navigation."""

from collections.abc import Sequence

from proxy.server.pages.page import Action, Page
from proxy.server.pages.views import overview

PAGES: Sequence[Page] = (
    Page("/", overview.show, "overview.html", "Overview", nav="Overview", is_live=True),
)

ACTIONS: Sequence[Action] = (Action("/offline", overview.switch_offline),)
