"""What the files of a store take on the disk, measured while they come and go."""

import stat
from contextlib import suppress
from pathlib import Path

# A file: its inode, and the digest in its name. A manifest that is being committed has two names, and an
# evicted file's inode may be given to another blob at once.
_File = tuple[int, str]


def allocated(store: Path, *directories: str) -> dict[_File, int]:
    """Return the allocated bytes of the blobs and partial downloads in these directories of a store."""
    found = {}
    for directory in directories:
        for path in (store / directory).rglob("*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                if stat.S_ISREG(status.st_mode):
                    digest = path.name.removesuffix(".state")[-64:]
                    found[status.st_ino, digest] = status.st_blocks * 512
    return found


def allocated_at_once(store: Path, *directories: str) -> int:
    """Return a lower bound of the bytes that all files of these directories took at one moment.

    A file counts if it was there before that moment and after it. One walk does not suffice: an eviction
    during the walk makes room for bytes that the walk finds later.
    """
    before = allocated(store, *directories)
    after = allocated(store, *directories)
    return sum(min(before[file], after[file]) for file in before.keys() & after.keys())
