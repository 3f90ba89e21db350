"""CPU time and memory of a process, from /proc."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of all threads, in user and kernel mode. For `pid` 0, return 0."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def cpu_seconds_of_tree(pid: int) -> float:
    """Return the CPU seconds of a process and its children, such as nginx's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(cpu_seconds, [pid, *map(int, children)]))


def wait_until_idle(pids: Iterable[int], timeout: float = 2.0) -> None:
    """Wait until the processes use no CPU for five clock ticks, or until the timeout."""
    pids = [*pids]
    deadline = time.monotonic() + timeout
    spent, before = sum(map(cpu_seconds, pids)), -1.0
    while spent != before and time.monotonic() < deadline:
        time.sleep(5 / _TICK)
        spent, before = sum(map(cpu_seconds, pids)), spent


def resident_bytes(pid: int) -> int:
    """Return the resident memory, shared libraries included."""
    return _status(pid, "VmRSS")


def peak_bytes(pid: int) -> int:
    """Return the peak of the resident memory since `reset_peak`."""
    return _status(pid, "VmHWM")


def reset_peak(pid: int) -> None:
    """Set the peak to the present resident memory."""
    if pid:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, field: str) -> int:
    if not pid:
        return 0
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, f"{pid} has no {field}"
    return int(match[1]) << 10
