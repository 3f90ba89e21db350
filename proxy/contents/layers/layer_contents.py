"""What one layer has of packages, and what layers on top of each other leave of it. Pure."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from proxy.contents.packages import OsRelease, Package, sort_packages
from proxy.contents.purls import with_purl

# Raised when layers are read in another way than before: what was kept of them is then read again.
READER_VERSION = 1
# Packages of an image. The rest is left out, and said.
MAX_IMAGE_PACKAGES = 100_000

FileKind = Literal["dpkg", "apk", "rpm", "old rpm", "python", "node", "os-release"]

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"

_RPM_FILES: tuple[tuple[str, FileKind], ...] = (
    ("rpmdb.sqlite", "rpm"),
    ("Packages", "old rpm"),
    ("Packages.db", "old rpm"),
)
_EXACT_PATHS: dict[str, FileKind] = {
    "var/lib/dpkg/status": "dpkg",
    "lib/apk/db/installed": "apk",
    "usr/lib/apk/db/installed": "apk",
    "etc/os-release": "os-release",
    "usr/lib/os-release": "os-release",
    **{
        f"{directory}/{name}": kind
        for directory in ("var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm")
        for name, kind in _RPM_FILES
    },
}
_DISTROLESS = "var/lib/dpkg/status.d/"
_PYTHON = re.compile(
    r"(?:^|/)[^/]+\.(?:dist-info/METADATA|egg-info/PKG-INFO|egg-info)$|(?:^|/)EGG-INFO/PKG-INFO$"
)
_NODE = re.compile(r"(?:^|/)node_modules/(?:@[^/]+/)?[^/@.][^/]*/package\.json$")
_LAST_PARTS = ("METADATA", "PKG-INFO", ".egg-info")


class FoundFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file that names packages, or the distribution; `problem` says why some of it was not read."""

    path: str
    packages: Sequence[Package] = ()
    release: OsRelease | None = None
    problem: str = ""


class LayerContents(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one layer has, and takes away from those below it.

    `removed` are paths that exist no more, with all below them; `opaque` are directories whose earlier
    content is hidden. `problem` says why the layer was not read to its end. `archives` counts files of
    Java, whose packages are not read.
    """

    files: Sequence[FoundFile] = ()
    removed: Sequence[str] = ()
    opaque: Sequence[str] = ()
    problem: str = ""
    entries: int = 0
    archives: int = 0


@dataclass(frozen=True, slots=True)
class MergedContents:
    """The packages of an image, and what of it was not read."""

    packages: list[Package]
    release: OsRelease
    problems: list[str]


def classify(path: str) -> FileKind | None:
    """Return what the file at a path names packages for; None for other files."""
    kind = _EXACT_PATHS.get(path)
    if kind is not None:
        return kind
    if path.endswith("package.json"):
        return "node" if _NODE.search(path) else None
    if path.endswith(_LAST_PARTS):
        return "python" if _PYTHON.search(path) else None
    if path.startswith(_DISTROLESS):
        return "dpkg" if not path.endswith((".md5sums", "/")) else None
    return None


def read_whiteout(path: str) -> tuple[str, bool] | None:
    """Return what an entry hides, and whether it is an opaque directory; None if it is no whiteout.

    image-spec, layer.md, "Whiteouts".
    """
    directory, _, name = path.rpartition("/")
    if not name.startswith(_WHITEOUT):
        return None
    if name == _OPAQUE:
        return directory, True
    hidden = name.removeprefix(_WHITEOUT)
    if not hidden or hidden.startswith(_WHITEOUT):
        return None  # metadata of AUFS
    return f"{directory}/{hidden}" if directory else hidden, False


def merge_layers(layers: Iterable[LayerContents]) -> MergedContents:
    """Return what is left of layers, the lowest first, and the distribution by which purls are made."""
    files: dict[str, FoundFile] = {}
    problems: list[str] = []
    for number, layer in enumerate(layers, start=1):
        for path in _hidden(files, layer):
            del files[path]
        files |= {one.path: one for one in layer.files}
        if layer.problem:
            problems.append(f"layer {number}: {layer.problem}")
    problems += [f"{one.path}: {one.problem}" for one in files.values() if one.problem]
    release = next(
        (
            found.release
            for path in ("etc/os-release", "usr/lib/os-release")
            if (found := files.get(path)) and found.release
        ),
        OsRelease(),
    )
    packages = sort_packages(one for found in files.values() for one in found.packages)
    if len(packages) > MAX_IMAGE_PACKAGES:
        problems.append(f"of {len(packages)} packages only {MAX_IMAGE_PACKAGES} are listed")
    kept = [with_purl(one, release) for one in packages[:MAX_IMAGE_PACKAGES]]
    return MergedContents(kept, release, list(dict.fromkeys(problems)))


def _hidden(files: Iterable[str], layer: LayerContents) -> Iterator[str]:
    removed, opaque = frozenset(layer.removed), frozenset(layer.opaque)
    if not removed and not opaque:
        return
    for path in list(files):
        parents = [path[:end] for end, letter in enumerate(path) if letter == "/"]
        is_removed = path in removed or not removed.isdisjoint(parents)
        if is_removed or "" in opaque or not opaque.isdisjoint(parents):
            yield path
