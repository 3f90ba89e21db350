"""The style sheet and the script, under names with a hash of their content, kept by browsers for long."""

import hashlib
from importlib.resources import files
from pathlib import PurePath
from typing import NamedTuple

STATIC_PREFIX = "/static/"

_CONTENT_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class StaticFile(NamedTuple):
    """A file and its media type."""

    content: bytes
    content_type: str


class StaticFiles:
    """The files of `static`, by the paths at which browsers get them. Reads them all: blocking."""

    def __init__(self) -> None:
        self._paths: dict[str, str] = {}
        self._files: dict[str, StaticFile] = {}
        for entry in files("proxy.server.pages").joinpath("static").iterdir():
            suffix = PurePath(entry.name).suffix
            if suffix not in _CONTENT_TYPES:
                continue
            content = entry.read_bytes()
            stem, digest = PurePath(entry.name).stem, hashlib.sha256(content).hexdigest()[:16]
            path = f"{STATIC_PREFIX}{stem}.{digest}{suffix}"
            self._paths[entry.name] = path
            self._files[path] = StaticFile(content, _CONTENT_TYPES[suffix])

    def path(self, name: str) -> str:
        """Return the path of a file. Raises `KeyError`."""
        return self._paths[name]

    def find(self, path: str) -> StaticFile | None:
        """Return the file at a path; None if there is none."""
        return self._files.get(path)
