"""Lines of the log for people at a console: a request is one short line."""

import re
from collections.abc import Mapping
from typing import Any

from proxy.sizes import format_bytes

# The path of a request for an image, with or without the registry in it.
_IMAGE_PATH = re.compile(r"/v2/(?:library/)?(.+)/(manifests|blobs|referrers)/([^/?]+)(?:\?.*)?")
_DIGITS_SHOWN = 12


def format_request(fields: Mapping[str, Any]) -> str:
    """Return a request as verb, image, result, bytes and seconds: GET nginx:1.27 miss 5.3 MB 0.4 s.

    The result is how the cache has answered, or the status of an error with the reason.
    """
    status, cache = fields["status"], fields["cache"]
    result = str(status) if status >= 400 or cache == "none" else cache
    size, seconds = format_bytes(fields["bytes"]), fields["seconds"]
    line = f"{fields['method']} {describe_target(fields['path'])} {result} {size} {seconds:.3f} s"
    problem = fields.get("problem")
    return f"{line}: {problem}" if problem else line


def format_admin_request(fields: Mapping[str, Any]) -> str:
    """Return a request to the admin API as verb, path, status and actor."""
    path = fields["path"].partition("?")[0]
    return f"{fields['method']} {path} {fields['status']} by {fields.get('actor', '-')}"


def describe_target(path: str) -> str:
    """Return the image that a path of the registry API is about; any other path unchanged."""
    match = _IMAGE_PATH.fullmatch(path)
    if match is None:
        return path
    name, kind, reference = match.groups()
    algorithm, colon, encoded = reference.replace("%3A", ":").partition(":")
    shown = f"@{algorithm}:{encoded[:_DIGITS_SHOWN]}" if colon else f":{reference}"
    return f"{name}{shown}" + (" referrers" if kind == "referrers" else "")
