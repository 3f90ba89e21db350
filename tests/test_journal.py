"""Lines for the journal begin with a priority, for `journalctl -p`."""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from proxy.log import Format, LogWriter, configure_logging, get_logger

pytestmark = pytest.mark.usefixtures("restore_logging")

Journal = Callable[[Callable[[LogWriter], object], Format], list[tuple[int, str]]]


def stream_of(end: socket.socket) -> str:
    """Return the value of JOURNAL_STREAM for a socket."""
    status = os.fstat(end.fileno())
    return f"{status.st_dev}:{status.st_ino}"


def entries(text: str) -> list[tuple[int, str]]:
    """Parse lines as journald does: a priority in front, else 6 (SyslogLevel=info)."""
    matches = [re.fullmatch(r"(?:<([0-7])>)?(.*)", line) for line in text.splitlines()]
    return [(int(match[1] or 6), match[2]) for match in matches if match]


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """Run a function with a log that goes to the journal; return the entries."""
    reader, writer = socket.socketpair()

    def run(work: Callable[[LogWriter], object], form: Format) -> list[tuple[int, str]]:
        monkeypatch.setenv("JOURNAL_STREAM", stream_of(writer))
        with os.fdopen(os.dup(writer.fileno()), "w", encoding="utf-8") as stream:
            log = configure_logging("debug", form, stream)
            work(log)
            log.close()
        writer.close()
        with reader.makefile(encoding="utf-8") as received:
            return entries(received.read())

    yield run
    for end in (reader, writer):
        end.close()


def log_everything(log: LogWriter) -> None:
    for level in ("debug", "info", "warning", "error", "critical"):
        getattr(get_logger("proxy"), level)(f"our {level}")
    log.log_request("a response")
    logging.getLogger("aiohttp").warning("a library's")


@pytest.mark.parametrize("form", ["auto", "json", "console"])
def test_each_line_begins_with_the_priority_of_its_level(journal, form):
    found = journal(log_everything, form)
    assert [priority for priority, _ in found] == [7, 6, 4, 3, 2, 6, 4]
    assert [("{" in text[:1]) for _, text in found] == [form != "console"] * len(found)


@pytest.mark.parametrize("form", ["json", "console"])
def test_every_line_of_a_traceback_has_the_priority_of_its_entry(journal, form):
    def fail(log: LogWriter) -> None:
        get_logger("proxy").info("before")
        try:
            dict[str, int]()["wrong"]
        except KeyError:
            get_logger("proxy").exception("a bug")
        get_logger("proxy").info("after")

    (first, _), *failure, (last, _) = journal(fail, form)
    assert (first, last) == (6, 6)
    assert {priority for priority, _ in failure} == {3}
    assert "KeyError: 'wrong'" in failure[-1][1]
    assert (len(failure) > 3) == (form == "console")


@pytest.mark.parametrize("stream", ["", "1:1", "journal"])
def test_lines_to_anything_but_the_journal_have_no_priority(monkeypatch, tmp_path, stream):
    monkeypatch.setenv("JOURNAL_STREAM", stream)
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        log = configure_logging("info", "json", file)
        log_everything(log)
        log.close()
    assert all(line.startswith("{") for line in (tmp_path / "log").read_text().splitlines())


def test_a_failed_start_is_logged_as_an_error():
    reader, writer = socket.socketpair()
    with reader, writer:
        done = subprocess.run(
            [sys.executable, "-m", "proxy", "serve", "--listen", "nonsense"],
            stderr=writer.fileno(),
            env={**os.environ, "JOURNAL_STREAM": stream_of(writer)},
            timeout=30,
            check=False,
        )
        writer.close()
        with reader.makefile(encoding="utf-8") as received:
            ((priority, text),) = entries(received.read())
    assert done.returncode == 2
    assert priority == 3
    assert text.startswith("pullcache: ")
    assert "nonsense" in text
