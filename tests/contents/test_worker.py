"""The process that reads layers."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from proxy.contents import process
from proxy.contents.process import ContentsWorker
from proxy.contents.worker import answer
from proxy.errors import ContentsError
from proxy.storage.blobs import OpenBlob
from tests.support.layers import DPKG_STATUS, make_layer


@pytest.fixture
def worker() -> Iterator[ContentsWorker]:
    """A worker that ends with the test."""
    worker = ContentsWorker()
    yield worker
    worker.close()


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens content as a blob."""
    blobs: list[OpenBlob] = []

    def open_content(content: bytes) -> OpenBlob:
        path = Path(tmp_path, str(len(blobs)))
        path.write_bytes(content)
        blobs.append(OpenBlob(os.open(path, os.O_RDONLY), len(content)))
        return blobs[-1]

    yield open_content
    for blob in blobs:
        blob.close()


async def test_a_layer_is_read_by_a_process_of_its_own(worker, opened):
    blob = opened(make_layer({"var/lib/dpkg/status": DPKG_STATUS}))
    for _ in range(2):  # from the front each time
        found = await worker.read("layer", blob)
        assert found.layer
        assert found.layer.files[0].packages[0].name == "openssl"


async def test_an_sbom_is_read_by_it_too(worker, opened):
    found = await worker.read("sbom", opened(b'{"spdxVersion": "SPDX-2.3", "packages": []}'))
    assert found.sbom
    assert found.sbom.format == "SPDX-2.3"
    found = await worker.read("sbom", opened(b"{}"))
    assert found.problem == "it is neither SPDX nor CycloneDX"


def test_what_it_answers_is_what_was_read():
    layer = make_layer({"var/lib/dpkg/status": DPKG_STATUS})
    assert answer("layer", BytesIO(layer)).layer
    assert answer("sbom", BytesIO(b'{"bomFormat": "CycloneDX"}')).sbom
    assert answer("sbom", BytesIO(b"[]")).problem == "the SBOM is no JSON object"


async def test_one_runs_at_a_time(worker, opened):
    blob = opened(make_layer({"var/lib/dpkg/status": DPKG_STATUS}))
    answers = await asyncio.gather(*(worker.read("layer", blob) for _ in range(3)))
    assert all(one.layer for one in answers)


async def test_it_limits_itself(worker, opened, monkeypatch):
    """What the worker may do, as it sees it itself."""
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from proxy.contents import worker as w\n"
        "w.limit_process()\n"
        "import json, os, resource as r\n"
        "no_new = [x for x in open('/proc/self/status') if x.startswith('NoNewPrivs')]\n"
        "names = ('AS', 'CPU', 'NOFILE', 'FSIZE', 'CORE')\n"
        "limits = [r.getrlimit(getattr(r, 'RLIMIT_' + x))[0] for x in names]\n"
        "print(json.dumps({'problem': repr((limits, no_new, os.nice(0), sorted(os.environ)))}))\n"
    )
    monkeypatch.setattr(process, "_START", code)
    monkeypatch.setenv("PULLCACHE_SECRET", "x")
    found = await worker.read("layer", opened(b""))
    limits, (no_new,), nice, names = eval(found.problem)  # our own list
    assert limits == [512 << 20, 300, 16, 0, 0]
    assert no_new.split() == ["NoNewPrivs:", "1"]
    assert nice == os.getpriority(os.PRIO_PROCESS, 0) + 10
    assert names == ["LC_ALL"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "status 3"),
        ("raise MemoryError", "it failed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "too much CPU time"),
        ("print('nonsense')", "invalid answer"),
        ("print('x' * 300_000)", "more than 100000 bytes"),
        ("import time; time.sleep(60)", "took too long"),
    ],
)
async def test_a_worker_that_fails_is_told(worker, opened, monkeypatch, code, reason):
    monkeypatch.setattr(process, "_START", code)
    monkeypatch.setattr(process, "MAX_WORKER_ANSWER_SIZE", 100_000)
    monkeypatch.setattr(process, "MAX_WORKER_WALL_SECONDS", 2.0)
    with pytest.raises(ContentsError, match=reason):
        await worker.read("layer", opened(b""))


async def test_more_memory_than_allowed_is_told(worker, opened, monkeypatch):
    code = (
        "import sys; sys.path.append(sys.argv.pop(1))\n"
        "from proxy.contents import worker as w\n"
        "w.read_layer = lambda file: bytearray(1 << 30)\n"
        "w.main()"
    )
    monkeypatch.setattr(process, "_START", code)
    found = await worker.read("layer", opened(b""))
    assert found.problem == "reading it takes more than 536870912 bytes of memory"


async def test_the_end_of_the_daemon_ends_it(opened, monkeypatch, tmp_path):
    started = tmp_path / "started"
    code = f"import time; open({str(started)!r}, 'w').close(); time.sleep(60)"
    monkeypatch.setattr(process, "_START", code)
    worker, blob = ContentsWorker(), opened(b"")
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(_ended(worker, blob))
        await asyncio.to_thread(_wait_for, started)
        await asyncio.to_thread(worker.close)
        assert "was stopped, because pullcache stops" in await reading
    assert "because pullcache stops" in await _ended(worker, blob)


def _wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


async def _ended(worker: ContentsWorker, blob: OpenBlob) -> str:
    with pytest.raises(ContentsError) as caught:
        await worker.read("layer", blob)
    return str(caught.value)


async def test_a_program_that_is_missing_is_told(worker, opened, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    with pytest.raises(ContentsError, match="cannot be run"):
        await worker.read("layer", opened(b""))
