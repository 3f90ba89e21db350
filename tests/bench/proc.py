"""What a process has spent and holds, as /proc tells."""

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the seconds of all its threads, in user and kernel mode; none for no process (0)."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def await_idle(pids: Iterable[int], patience: float = 2.0) -> None:
    """Wait until these have nothing to do for a moment, or so many seconds."""
    pids = [*pids]
    end = time.monotonic() + patience
    spent, before = sum(map(cpu_seconds, pids)), -1.0
    while spent != before and time.monotonic() < end:
        time.sleep(5 / _TICK)
        spent, before = sum(map(cpu_seconds, pids)), spent


def memory(pid: int) -> int:
    """Return the bytes of memory it holds just now, shared libraries included."""
    return _status(pid, "VmRSS")


def peak(pid: int) -> int:
    """Return the most bytes it has held since `forget_peak`."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> None:
    """Let the peak begin anew from what is held now."""
    if pid:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, field: str) -> int:
    if not pid:
        return 0
    found = re.search(
        rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    assert found, f"{pid} has no {field}"
    return int(found[1]) << 10
