"""Runs the operator's own scanner on stored images, one at a time, and keeps what it found."""

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

import msgspec

from proxy.contents.findings import MAX_REPORT_SIZE, ScanFindings
from proxy.contents.process import ContentsWorker
from proxy.contents.program import run_program
from proxy.contents.reader import ContentsReader, ImageTarget
from proxy.errors import ContentsError, InvalidRequestError, ProxyError, StorageError
from proxy.log import get_logger
from proxy.names import full_name
from proxy.storage.blobs import OpenBlob
from proxy.storage.records.contents import ContentsRecords

# Bytes of a scanner's last words that an error shows.
MAX_SCANNER_MESSAGE = 120

# How often the schedule is looked at, in seconds.
SCHEDULE_INTERVAL = 30.0

log = get_logger(__name__)


class ScanReport(msgspec.Struct, frozen=True):
    """What the scanner found in an image at the Unix time `made`."""

    made: int
    found: ScanFindings


@dataclass(frozen=True, slots=True)
class ImageScanner:
    """Runs one configured command; all images every `every` seconds, unless that is 0.

    `addresses` are those that the daemon listens on.
    """

    command: Sequence[str]
    timeout: float
    every: float
    addresses: Sequence[str]
    reader: ContentsReader
    records: ContentsRecords
    worker: ContentsWorker
    clock: Callable[[], float]

    async def report(self, target: ImageTarget) -> ScanReport | None:
        """Return what was found in an image when it was scanned last. Raises `StorageError`."""
        document = await self.records.report(target.digest)
        with suppress(msgspec.MsgspecError):
            return msgspec.json.decode(document, type=ScanReport) if document else None
        return None

    async def scan(self, target: ImageTarget) -> ScanReport:
        """Run the scanner on an image. Raises `InvalidRequestError` and `ContentsError`."""
        if not self.command:
            raise InvalidRequestError(
                "no scanner is configured: set contents.scanner to the command of yours"
            )
        if target.incomplete:
            raise ContentsError(f"{target.name[:80]} cannot be scanned: {target.incomplete}")
        output = await self.worker.run_scanner(self._run, self._arguments(target))
        try:
            answer = await self.worker.read("report", output)
        finally:
            output.close()
        if answer.report is None:
            raise ContentsError(f"{self.command[0][:60]}: {answer.problem}")
        report = ScanReport(int(self.clock()), answer.report)
        with suppress(StorageError):
            await self.records.put_report(target.digest, msgspec.json.encode(report))
        return report

    async def scan_all(self) -> AsyncGenerator[tuple[ImageTarget, ScanReport | None], None]:
        """Scan all stored images whose layers are here; yield None for those that failed."""
        async for target in self.reader.all_targets():
            if target.incomplete:
                continue
            try:
                yield target, await self.scan(target)
            except ContentsError as error:
                log.warning("scan_failed", image=target.name, reason=str(error))
                yield target, None

    def _arguments(self, target: ImageTarget) -> list[str]:
        """Return the command with the address of this cache, and the image there, in its place."""
        address = loopback_address(self.addresses)
        repository = full_name(target.repository, target.digest)
        values = {"{cache}": address, "{image}": f"{address}/{repository}"}
        arguments = list(self.command)
        for name, value in values.items():
            arguments = [one.replace(name, value) for one in arguments]
        return arguments

    def _run(self, stopping: threading.Event, arguments: Sequence[str]) -> OpenBlob:
        with _memory_file("messages") as messages:
            done = run_program(
                arguments,
                timeout=self.timeout,
                max_output=MAX_REPORT_SIZE,
                stopping=stopping,
                environment=_environment(os.environ),
                stderr=messages,
            )
            last = _last_line(messages)
        # A scanner may exit with another status because of what it found.
        if not done.output.lstrip().startswith(b"{"):
            raise ContentsError(
                f"{arguments[0][:60]} ended with status {done.status} and no report: {last}"
            )
        output = os.memfd_create("report")
        with open(output, "wb", closefd=False) as file:
            file.write(done.output)
        return OpenBlob(output, len(done.output))


@contextmanager
def _memory_file(name: str) -> Iterator[int]:
    descriptor = os.memfd_create(name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the settings of pullcache, some of which are secrets."""
    return {name: value for name, value in environment.items() if not name.startswith("PULLCACHE_")}


def _last_line(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    content = os.pread(descriptor, 4096, max(0, size - 4096))
    lines = content.decode(errors="replace").split("\n")
    text = next((line for line in reversed(lines) if line.strip()), "")
    return "".join(one if one.isprintable() else "\ufffd" for one in text)[-MAX_SCANNER_MESSAGE:]


def loopback_address(addresses: Sequence[str]) -> str:
    """Return the address by which this machine reaches a daemon that listens on `addresses`.

    Raises `ContentsError` if it listens on none.
    """
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            parsed = ip_address(host.strip("[]"))
        except ValueError:
            continue
        if parsed.is_unspecified:
            return f"127.0.0.1:{port}" if parsed.version == 4 else f"[::1]:{port}"
        return address
    raise ContentsError("a scanner needs a daemon that listens: start pullcache serve")


async def run_scan_schedule(
    get_scanner: Callable[[], ImageScanner], clock: Callable[[], float]
) -> None:
    """Scan all stored images whenever the interval of the configuration that applies has passed."""
    last = clock()
    while True:
        await asyncio.sleep(SCHEDULE_INTERVAL)
        scanner = get_scanner()
        if not scanner.every or clock() - last < scanner.every:
            continue
        scanned = failed = 0
        try:
            async with aclosing(scanner.scan_all()) as reports:
                async for _, report in reports:
                    scanned += report is not None
                    failed += report is None
        except ProxyError as error:
            log.warning("scan_failed", image="", reason=str(error))
        log.info("images_scanned", images=scanned, failed=failed)
        last = clock()
