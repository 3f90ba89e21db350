"""The I/O priority of a thread (ioprio_set(2)), which the C library has no function for."""

import ctypes
import platform

_SYSCALL_NUMBERS = {
    "x86_64": 251,
    "aarch64": 30,
    "riscv64": 30,
    "armv7l": 314,
    "ppc64le": 273,
    "s390x": 282,
}
_IOPRIO_WHO_PROCESS = 1  # with the number 0 it means the calling thread
_IOPRIO_CLASS_IDLE = 3
_IOPRIO_CLASS_SHIFT = 13


def set_idle_io_priority() -> bool:
    """Let the calling thread use the disk only while no other does; return whether that worked.

    A filter of system calls may refuse it, and not every I/O scheduler regards it.
    """
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        return False
    priority = _IOPRIO_CLASS_IDLE << _IOPRIO_CLASS_SHIFT
    try:
        failed = ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, 0, priority)
    except (OSError, AttributeError):
        return False
    return not failed
