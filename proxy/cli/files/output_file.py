"""Where an export is written: a file, parts of one, or standard output; compressed if the name says so."""

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from backports.zstd import CompressionParameter, ZstdCompressor

_PARTIAL = ".partial"
_LEVEL = 3


class Target:
    """A bundle's file `name`, or `name.000` and so on of at most `split` bytes each; "-" is stdout.

    A context: at a good end of it the files are durable and get their names, at a bad one they go. What is
    no regular file, a pipe or a device, is written to as it is.
    """

    def __init__(self, name: str, split: int | None = None) -> None:
        self.names: list[str] = []
        self.written = 0
        self._name = name
        self._split = split
        self._room: int | None = None
        self._file: BinaryIO = sys.stdout.buffer
        self._compressor = None
        if name.endswith(".zst"):
            options: dict[int, int] = {
                CompressionParameter.compression_level: _LEVEL,
                CompressionParameter.nb_workers: os.cpu_count() or 1,
            }
            self._compressor = ZstdCompressor(options=options)

    @property
    def plain(self) -> Path | None:
        """The one file that takes the bundle as it is, for whoever can open it too; or None."""
        if self._split or self._compressor or not self.names:
            return None
        return Path(self.names[0] + _PARTIAL)

    def write(self, data: bytes) -> int:
        """Write bytes of the bundle; return how many they were."""
        self._put(self._compressor.compress(data) if self._compressor else data)
        return len(data)

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._close()
            for name in self.names:
                # Those that are whole have their name by now.
                Path(name + _PARTIAL).unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._room == 0:
                self._sync()
                self._open()
            count = len(rest) if self._room is None else min(len(rest), self._room)
            self._file.write(rest[:count])
            self.written += count
            if self._room is not None:
                self._room -= count
            rest = rest[count:]

    def _open(self) -> None:
        """Open the file, or the next part."""
        if self._name == "-":
            return
        path = Path(self._name)
        if not path.exists() or path.is_file():
            self._room = self._split
            name = f"{self._name}.{len(self.names):03}" if self._split else self._name
            self.names.append(name)
            path = Path(name + _PARTIAL)
        self._file = path.open("wb")

    def _sync(self) -> None:
        """Have the file on the disk: it is to be carried away, and a stick is pulled out at once."""
        self._file.flush()
        if self.names:
            os.fsync(self._file.fileno())
        self._close()

    def _close(self) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()

    def _finish(self) -> None:
        if self._compressor:
            self._put(self._compressor.flush())
        self._sync()
        for name in self.names:
            Path(name + _PARTIAL).rename(name)
        # Parts of an earlier, larger bundle would be taken for parts of this one.
        number = len(self.names)
        while self._split and (stale := Path(f"{self._name}.{number:03}")).exists():
            stale.unlink()
            number += 1
