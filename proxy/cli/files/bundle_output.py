"""The target of an export: a file, numbered parts or stdout; compressed if it ends in .zst."""

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from backports.zstd import CompressionParameter, ZstdCompressor

_PARTIAL_SUFFIX = ".partial"
_COMPRESSION_LEVEL = 3


class BundleOutput:
    """The file `name`, or parts `name.000`, `name.001` … of `part_size` bytes; "-" is stdout.

    A context manager: on success the files are synced and renamed to their final names, on failure
    they are deleted. A pipe or a device is written to directly.
    """

    def __init__(self, name: str, part_size: int | None = None) -> None:
        self.file_names: list[str] = []
        self.bytes_written = 0
        self._name = name
        self._part_size = part_size
        self._part_remaining: int | None = None
        self._file: BinaryIO = sys.stdout.buffer
        self._compressor = None
        if name.endswith(".zst"):
            options: dict[int, int] = {
                CompressionParameter.compression_level: _COMPRESSION_LEVEL,
                CompressionParameter.nb_workers: os.cpu_count() or 1,
            }
            self._compressor = ZstdCompressor(options=options)

    @property
    def plain_path(self) -> Path | None:
        """The file that the daemon can write itself; None if it is split, compressed or a pipe."""
        if self._part_size or self._compressor or not self.file_names:
            return None
        return Path(self.file_names[0] + _PARTIAL_SUFFIX)

    def write(self, data: bytes) -> int:
        """Write bytes of the bundle; return their number."""
        self._write_raw(self._compressor.compress(data) if self._compressor else data)
        return len(data)

    def __enter__(self) -> Self:
        self._open_part()
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
            self._close_part()
            for name in self.file_names:
                # Complete files have been renamed.
                Path(name + _PARTIAL_SUFFIX).unlink(missing_ok=True)

    def _write_raw(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._part_remaining == 0:
                self._sync_part()
                self._open_part()
            count = (
                len(rest) if self._part_remaining is None else min(len(rest), self._part_remaining)
            )
            self._file.write(rest[:count])
            self.bytes_written += count
            if self._part_remaining is not None:
                self._part_remaining -= count
            rest = rest[count:]

    def _open_part(self) -> None:
        """Open the file, or the next part."""
        if self._name == "-":
            return
        path = Path(self._name)
        if not path.exists() or path.is_file():
            self._part_remaining = self._part_size
            name = f"{self._name}.{len(self.file_names):03}" if self._part_size else self._name
            self.file_names.append(name)
            path = Path(name + _PARTIAL_SUFFIX)
        self._file = path.open("wb")

    def _sync_part(self) -> None:
        """Sync and close the file: a USB stick may be unplugged as soon as the command is done."""
        self._file.flush()
        if self.file_names:
            os.fsync(self._file.fileno())
        self._close_part()

    def _close_part(self) -> None:
        if self._file is not sys.stdout.buffer:
            self._file.close()

    def _finish(self) -> None:
        if self._compressor:
            self._write_raw(self._compressor.flush())
        self._sync_part()
        for name in self.file_names:
            Path(name + _PARTIAL_SUFFIX).rename(name)
        # An earlier, larger bundle of this name may have left parts that would be read as ours.
        number = len(self.file_names)
        while self._part_size and (stale := Path(f"{self._name}.{number:03}")).exists():
            stale.unlink()
            number += 1
