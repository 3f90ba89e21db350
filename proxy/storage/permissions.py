"""Who may change a store: the index and the files of a store are believed, so only its owner may write to it.

What other users could have written is refused; what users outside its group could read is closed to
them. On request the group of the store may read the blobs: it passes the directories above them, and reads
nothing else.
"""

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from proxy.errors import StorageError

_DIRECTORIES = ("blobs", "blobs/sha256", "blobs/sha512", "ingest")
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_BLOB_DIRECTORIES = ("blobs/sha256", "blobs/sha512")
# The mode of a blob, without and with access of the group.
PRIVATE_MODE, GROUP_MODE = 0o600, 0o640
_FILES = ("lock", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "scrub.json")


def secure_store(root: Path) -> None:
    """Check a store that exists, and remove the permissions of users outside its group.

    Its group may read it. Raises `StorageError`, with the command that helps, if the store belongs to
    another user, others or the group may write to it, or a symbolic link stands in a place of it.
    """
    if root.is_symlink():
        # A link of the administrator or of this user, as systemd makes for DynamicUser=.
        _check_owner(root, root.lstat(), (0, os.geteuid()))
    root = root.resolve()
    status = root.stat()
    _secure(root, is_directory=True)
    # 0.1.0 left the mode of `blobs` to the umask. Nobody gets there if the store itself is private.
    is_private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    for name in _DIRECTORIES:
        _secure(root / name, is_directory=True, is_private=is_private)
    for name in _FILES:
        _secure(root / name, is_directory=False)


def open_to_group(root: Path) -> None:
    """Let the group of the store read its blobs. Raises `OSError`.

    The directory of the blobs is opened last: while it is closed, its files were not all opened.
    """
    for name in _BLOB_DIRECTORIES:
        directory = root / name
        mode = stat.S_IMODE(directory.stat().st_mode)
        if mode & 0o050 != 0o050:
            with os.scandir(directory) as entries:
                for entry in entries:
                    open_blob_to_group(entry.path)
            directory.chmod(mode | 0o050)
    for directory in (root / "blobs", root):
        directory.chmod(stat.S_IMODE(directory.stat().st_mode) | 0o010)


def open_blob_to_group(path: str) -> None:
    """Let the group read a blob, if the file exists and may be changed."""
    with suppress(OSError):  # the daemon sends what nginx cannot read
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_mode & 0o777 == PRIVATE_MODE:
                os.fchmod(fd, GROUP_MODE)
        finally:
            os.close(fd)


def create_private_file(path: Path) -> None:
    """Create an empty file for this user alone, unless it exists. Raises `OSError` for a link."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    os.close(os.open(path, flags, 0o600))


def _secure(path: Path, *, is_directory: bool, is_private: bool = False) -> None:
    """Check a file or directory if it exists; `is_private`: only its owner gets there anyway."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    is_right = stat.S_ISDIR(status.st_mode) if is_directory else stat.S_ISREG(status.st_mode)
    if not is_right:
        kind = "directory" if is_directory else "file"
        raise StorageError(f"{path} must be a regular {kind}, and no link: move it away")
    _check_owner(path, status, (os.geteuid(),))
    mode = stat.S_IMODE(status.st_mode)
    if mode & _WRITABLE and not is_private:
        raise StorageError(
            f"other users may write to {path} (mode {mode:04o}); if you trust its content: "
            f"chmod go-w {path}"
        )
    if mode & (_WRITABLE | stat.S_IRWXO):
        path.chmod(mode & ~(_WRITABLE | stat.S_IRWXO))


def _check_owner(path: Path, status: os.stat_result, allowed: tuple[int, ...]) -> None:
    if status.st_uid not in allowed:
        owner, user = user_name(status.st_uid), user_name(os.geteuid())
        if not status.st_uid:
            # As the mount point of a volume does.
            raise StorageError(
                f"{path} belongs to root, and this is {user}: run it as root, or use another "
                f"directory, such as {path}/store"
            )
        account = owner if " " not in owner else f"'#{status.st_uid}'"
        raise StorageError(
            f"{path} belongs to {owner}, and this is {user}: run it as its owner: "
            f"sudo -u {account} pullcache …"
        )


def user_name(number: int) -> str:
    """Return the name of a user, or `user` and the number if it has none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"
