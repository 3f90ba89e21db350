"""The process that reads what strangers made: `python -I -m proxy.contents.worker KIND`, with the file as its input.

It limits itself before it reads, opens nothing, and writes one JSON document of bounded size to its output:
a `WorkerAnswer`.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from typing import BinaryIO

import msgspec

from proxy.contents.answer import WorkerAnswer
from proxy.contents.findings import MAX_REPORT_SIZE, parse_report
from proxy.contents.layers.layer import read_layer
from proxy.contents.sboms.reader import MAX_SBOM_SIZE, parse_sbom
from proxy.errors import ContentsError
from proxy.storage.io_priority import set_idle_io_priority

# Bytes of address space, seconds of CPU time, and open files.
MAX_WORKER_MEMORY = 512 << 20
MAX_WORKER_SECONDS = 300
MAX_WORKER_FILES = 16
WORKER_NICENESS = 10

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL = 9


def limit_process() -> None:
    """Limit memory, CPU time and files of this process, its privileges and its priority, for good."""
    with suppress(PermissionError):
        os.nice(WORKER_NICENESS)
    set_idle_io_priority()
    for kind, wanted in (
        (resource.RLIMIT_AS, MAX_WORKER_MEMORY),
        (resource.RLIMIT_CPU, MAX_WORKER_SECONDS),
        (resource.RLIMIT_NOFILE, MAX_WORKER_FILES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (limit, limit))
    library = ctypes.CDLL(None)
    if library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError("new privileges cannot be forbidden")
    library.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)  # the daemon may be killed


def answer(kind: str, file: BinaryIO) -> WorkerAnswer:
    """Return what is in a file: a `layer`, an `sbom` or a `report` of a scanner."""
    try:
        if kind == "layer":
            return WorkerAnswer(layer=read_layer(file))
        if kind == "report":
            return WorkerAnswer(report=parse_report(file.read(MAX_REPORT_SIZE + 1)))
        return WorkerAnswer(sbom=parse_sbom(file.read(MAX_SBOM_SIZE + 1)))
    except ContentsError as error:
        return WorkerAnswer(problem=str(error))
    except MemoryError:
        return WorkerAnswer(
            problem=f"reading it takes more than {MAX_WORKER_MEMORY} bytes of memory"
        )


def main() -> None:
    """Read the file that is the standard input."""
    limit_process()
    document = msgspec.json.encode(answer(sys.argv[1], sys.stdin.buffer))
    sys.stdout.buffer.write(document)
    sys.stdout.buffer.flush()
    os._exit(0)  # nothing is left to clean up, and a large heap takes time


if __name__ == "__main__":
    main()
