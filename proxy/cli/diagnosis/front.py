"""Check of nginx in front of the daemon (`server.accel_redirect`): whether its workers may read the stored blobs."""

import grp
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from proxy.cli.diagnosis.finding import Finding
from proxy.config import Config
from proxy.config.schema import StoreSettings
from proxy.storage.permissions import user_name

_WORKER = b"nginx: worker process"


@dataclass(frozen=True, slots=True)
class Worker:
    """A running worker of nginx: the process that started it, and the user and groups that it has now."""

    parent: int
    uid: int
    groups: frozenset[int]


def check_front(config: Config) -> Iterator[Finding]:
    """Check the rights of nginx's workers, if the daemon is to let nginx send blobs."""
    if config.server.accel_redirect:
        yield describe_access(config.store, find_workers())


def find_workers() -> list[Worker]:
    """Return the workers of every nginx that this process can see."""
    workers = []
    for process in Path("/proc").iterdir():
        # It may have ended meanwhile.
        with suppress(OSError, KeyError, ValueError):
            if process.name.isdigit() and (process / "cmdline").read_bytes().startswith(_WORKER):
                workers.append(_read_worker((process / "status").read_text()))
    return workers


def _read_worker(status: str) -> Worker:
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    # Real, effective, saved, and for files.
    uid, gid = (int(fields[name].split()[3]) for name in ("Uid", "Gid"))
    groups = frozenset((gid, *map(int, fields["Groups"].split())))
    return Worker(int(fields["PPid"]), uid, groups)


def describe_access(store: StoreSettings, workers: Iterable[Worker]) -> Finding:
    """Return the finding for what these workers may read: ok if those of one nginx may read the blobs."""
    obstacles: list[tuple[Worker, Path]] = []
    for worker in workers:
        obstacle = _find_obstacle(store.path, worker)
        if obstacle is None:
            return Finding("nginx", "ok", f"{user_name(worker.uid)} may read the stored blobs")
        obstacles.append((worker, obstacle))
    if not obstacles:
        return Finding(
            "nginx",
            "warn",
            "server.accel_redirect is set, and no nginx runs here; the daemon sends all blobs",
            "start nginx with config/nginx/pullcache.conf, or remove server.accel_redirect",
        )
    worker, path = obstacles[0]
    status, user = path.stat(), user_name(worker.uid)
    mode, group = stat.S_IMODE(status.st_mode), _group_name(status.st_gid)
    text = (
        f"{user} may not read {path} (mode {mode:04o}, group {group}); the daemon sends all blobs"
    )
    if not path.is_relative_to(store.path):
        advice = f"let {user} pass this directory, or move the store: chmod o+x {path}"
    elif not store.group_access:
        advice = "set store.group_access = true, and restart the daemon"
    elif status.st_gid not in worker.groups:
        advice = f"adduser {user} {group}, then: systemctl restart nginx"
    else:
        advice = "restart the daemon, which then opens the store to its group"
    return Finding("nginx", "warn", text, advice)


def _find_obstacle(store: Path, worker: Worker) -> Path | None:
    """Return the first directory on the way to the blobs, or the first blob, that the worker may not read."""
    directory = store.resolve() / "blobs" / "sha256"
    for one in (*reversed(directory.parents), directory):
        if not _has_right(one, worker, stat.S_IXOTH):
            return one
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            return None if _has_right(Path(entry.path), worker, stat.S_IROTH) else Path(entry.path)
    return None


def _has_right(path: Path, worker: Worker, bit: int) -> bool:
    """Tell whether the mode of `path` gives the worker a right, named by its bit for others."""
    try:
        status = path.stat()
    except OSError:
        return True  # evicted meanwhile, or closed to this user, who cannot tell
    if worker.uid in (0, status.st_uid):
        return worker.uid == 0 or bool(status.st_mode & bit << 6)
    return bool(status.st_mode & (bit << 3 if status.st_gid in worker.groups else bit))


def _group_name(number: int) -> str:
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
