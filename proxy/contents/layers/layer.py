"""Reads one layer: the files that name packages, and what the layer takes away from those below it.

Runs in the worker.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import BinaryIO

from proxy.contents.layers.archive import LayerEntry, LayerStream, iter_entries
from proxy.contents.layers.databases import (
    MAX_DATABASE_PACKAGES,
    parse_apk_installed,
    parse_dpkg_status,
    parse_node_package,
    parse_python_metadata,
)
from proxy.contents.layers.layer_contents import (
    FileKind,
    FoundFile,
    LayerContents,
    classify,
    read_whiteout,
)
from proxy.contents.layers.rpm import parse_rpm_header
from proxy.contents.packages import Package, parse_os_release
from proxy.errors import LayerError

# The largest file of each kind that is read, in bytes. Of the metadata of a Python package the head is read.
MAX_FILE_SIZES: dict[FileKind, int] = {
    "dpkg": 64 << 20,
    "apk": 64 << 20,
    "rpm": 128 << 20,
    "node": 1 << 20,
    "os-release": 64 << 10,
}
MAX_PYTHON_HEAD = 64 << 10
# Files that name packages, and packages, of one layer.
MAX_FOUND_FILES = 100_000
MAX_LAYER_PACKAGES = 100_000
# Paths that one layer removes.
MAX_WHITEOUTS = 100_000
# The largest row of rpm's database, and how long its queries may take, in steps of SQLite's machine.
MAX_RPM_ROW_SIZE = 16 << 20
MAX_SQLITE_STEPS = 20_000_000

_ARCHIVES = (".jar", ".war", ".ear")
_OLD_RPM = "an rpm database of an old kind (Berkeley DB or ndb) was not read"
_PROGRESS_STEPS = 100_000


def read_layer(file: BinaryIO) -> LayerContents:
    """Return what a layer has of packages. Damage ends the reading, and is told in `problem`."""
    reader = _LayerReader()
    problem = ""
    try:
        stream = LayerStream(file)
        for entry in iter_entries(stream):
            reader.add(entry, stream)
    except LayerError as error:
        problem = str(error)
    return reader.contents(problem)


class _LayerReader:
    def __init__(self) -> None:
        self._files: dict[str, FoundFile] = {}
        self._removed: dict[str, None] = {}
        self._opaque: dict[str, None] = {}
        self._entries = self._packages = self._archives = 0

    def contents(self, problem: str) -> LayerContents:
        """Return what was found."""
        return LayerContents(
            list(self._files.values()),
            list(self._removed),
            list(self._opaque),
            problem,
            self._entries,
            self._archives,
        )

    def add(self, entry: LayerEntry, stream: LayerStream) -> None:
        """Add an entry, whose content the stream has next. Raises `LayerError`."""
        self._entries += 1
        if ".wh." in entry.path and (whiteout := read_whiteout(entry.path)):
            path, is_opaque = whiteout
            (self._opaque if is_opaque else self._removed)[path] = None
            if len(self._removed) + len(self._opaque) > MAX_WHITEOUTS:
                raise LayerError(f"the layer removes more than {MAX_WHITEOUTS} files")
        elif kind := classify(entry.path):
            # A later entry of the same path replaces an earlier one.
            found = self._files.pop(entry.path, None)
            self._packages -= len(found.packages) if found else 0
            self._add_file(entry, kind, stream)
        elif entry.path.endswith(_ARCHIVES):
            self._archives += 1

    def _add_file(self, entry: LayerEntry, kind: FileKind, stream: LayerStream) -> None:
        if entry.kind == "file":
            found = _read_file(entry, kind, stream)
        elif entry.kind == "hard link" and (target := self._files.get(entry.link)):
            packages = [_at_path(one, entry.path) for one in target.packages]
            found = FoundFile(entry.path, packages, target.release, target.problem)
        elif entry.kind == "directory":
            return
        else:
            self._removed[entry.path] = None
            found = FoundFile(
                entry.path, problem="it is a link or a sparse file, which is not read"
            )
            if kind in ("python", "node", "os-release"):
                return  # mostly links into directories whose files are read
        self._packages += len(found.packages)
        if self._packages > MAX_LAYER_PACKAGES or len(self._files) >= MAX_FOUND_FILES:
            raise LayerError(f"the layer has more than {MAX_LAYER_PACKAGES} packages")
        self._files[entry.path] = found


def _at_path(package: Package, path: str) -> Package:
    return Package(
        package.kind,
        package.name,
        package.version,
        package.architecture,
        package.source,
        package.source_version,
        path,
    )


def _read_file(entry: LayerEntry, kind: FileKind, stream: LayerStream) -> FoundFile:
    path = entry.path
    if kind == "old rpm":
        return FoundFile(path, problem=_OLD_RPM if entry.size else "")
    if kind == "python":
        head = stream.read(min(entry.size, MAX_PYTHON_HEAD))
        return FoundFile(path, parse_python_metadata(head, path))
    limit = MAX_FILE_SIZES[kind]
    if entry.size > limit:
        return FoundFile(
            path, problem=f"it has {entry.size} bytes, more than {limit}, and was not read"
        )
    content = stream.read(entry.size)
    if kind == "os-release":
        return FoundFile(path, release=parse_os_release(content))
    if kind == "rpm":
        packages, problem = read_rpm_database(content, path)
        return FoundFile(path, packages, problem=problem)
    parse = {"dpkg": parse_dpkg_status, "apk": parse_apk_installed, "node": parse_node_package}[
        kind
    ]
    return FoundFile(path, parse(content, path))


def read_rpm_database(content: bytes, path: str) -> tuple[list[Package], str]:
    """Return the packages of an `rpmdb.sqlite`, and why some could not be read."""
    packages = []
    damaged = 0
    try:
        with _open_database(content) as rows:
            for (blob,) in islice(rows, MAX_DATABASE_PACKAGES):
                damaged += not isinstance(blob, bytes)
                package = parse_rpm_header(blob, path) if isinstance(blob, bytes) else None
                if package:
                    packages.append(package)
    except (sqlite3.Error, LayerError, ValueError, OverflowError) as error:
        return packages, f"the rpm database is damaged or not supported: {str(error)[:100]}"
    return packages, f"{damaged} rows of the rpm database are damaged" if damaged else ""


@contextmanager
def _open_database(content: bytes) -> Iterator[sqlite3.Cursor]:
    """Yield the rows of the table of packages."""
    if not content.startswith(b"SQLite format 3\0"):
        raise LayerError("it is no SQLite database")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        # Written with a write-ahead log, it could not be opened in memory (sqlite.org, "fileformat2", 1.3.3).
        connection.deserialize(content[:18] + b"\1\1" + content[20:])
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_RPM_ROW_SIZE)
        steps = iter(range(MAX_SQLITE_STEPS // _PROGRESS_STEPS))
        connection.set_progress_handler(lambda: next(steps, None) is None, _PROGRESS_STEPS)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        # A view or virtual table could compute anything.
        kinds = connection.execute(
            "SELECT type, sql FROM sqlite_schema WHERE lower(name) = 'packages'"
        ).fetchall()
        if [kind for kind, _ in kinds] != ["table"] or "virtual" in str(kinds[0][1]).lower():
            raise LayerError("it has no table of packages")
        if any(column[-1] for column in connection.execute("PRAGMA table_xinfo(Packages)")):
            raise LayerError("it has computed columns")  # so could one of them
        yield connection.execute("SELECT blob FROM Packages")
