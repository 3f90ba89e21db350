"""The pages and their actions, in the order of the navigation."""

from collections.abc import Sequence

from proxy.server.pages.page import Action, Page
from proxy.server.pages.views import connect, image, images, overview, settings

PAGES: Sequence[Page] = (
    Page("/", overview.show, "overview.html", "Overview", nav="Overview", is_live=True),
    Page("/images", images.show, "images.html", "Images", nav="Images"),
    Page("/images/{name:path}", image.show, "image.html", "Image"),
    Page("/remove", images.confirm_removal, "remove.html", "Remove an image"),
    Page("/connect", connect.show, "connect.html", "Connect", nav="Connect"),
    Page("/settings", settings.show, "settings.html", "Settings", nav="Settings"),
)

ACTIONS: Sequence[Action] = (
    Action("/offline", overview.switch_offline),
    Action("/images/pin", images.pin),
    Action("/images/unpin", images.unpin),
    Action("/images/refresh", images.refresh),
    Action("/images/remove", images.remove),
)
