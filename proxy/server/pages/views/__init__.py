"""The pages and their actions, in the order of the navigation."""

from collections.abc import Sequence

from proxy.server.pages.page import Action, Page
from proxy.server.pages.views import (
    activity,
    connect,
    image,
    images,
    overview,
    packages,
    policy,
    schedules,
    search,
    settings,
    storage,
    unplug,
    upstreams,
)

PAGES: Sequence[Page] = (
    Page("/", overview.show, "overview.html", "Overview", nav="Overview", is_live=True),
    Page("/images", images.show, "images.html", "Images", nav="Images"),
    Page("/images/{name:path}", image.show, "image.html", "Image"),
    Page("/packages", packages.show, "packages.html", "Packages"),
    Page("/remove", images.confirm_removal, "remove.html", "Remove an image"),
    Page("/search", search.show, "search.html", "Search", nav="Search"),
    Page("/unplug", unplug.show, "unplug.html", "Unplug", nav="Unplug"),
    Page("/activity", activity.show, "activity.html", "Activity", nav="Activity", is_live=True),
    Page("/upstreams", upstreams.show, "upstreams.html", "Upstreams", "Upstreams", is_live=True),
    Page("/storage", storage.show, "storage.html", "Storage", nav="Storage", is_live=True),
    Page("/policy", policy.show, "policy.html", "Policy", nav="Policy"),
    Page("/schedules", schedules.show, "schedules.html", "Schedules", "Schedules", is_live=True),
    Page("/connect", connect.show, "connect.html", "Connect", nav="Connect"),
    Page("/settings", settings.show, "settings.html", "Settings", nav="Settings"),
)

ACTIONS: Sequence[Action] = (
    Action("/offline", overview.switch_offline),
    Action("/images/pin", images.pin),
    Action("/images/unpin", images.unpin),
    Action("/images/refresh", images.refresh),
    Action("/images/remove", images.remove),
    Action("/search/pull", search.pull),
    Action("/unplug", unplug.check, is_read=True),
    Action("/unplug/preload", unplug.preload),
    Action("/unplug/bundle", unplug.export),
    Action("/unplug/import", unplug.import_bundle, takes_upload=True),
    Action("/activity/test-pull", activity.test_pull),
    Action("/upstreams/check", upstreams.check, is_read=True),
    Action("/storage/remove", storage.remove),
    Action("/policy/exceptions/add", policy.add_exception),
    Action("/policy/exceptions/remove", policy.remove_exception),
    Action("/schedules/run", schedules.run),
    Action("/packages/read", packages.read),
    Action("/packages/read-all", packages.read_all),
    Action("/packages/scan", packages.scan),
    Action("/packages/findings.csv", packages.download_csv, is_read=True),
)
