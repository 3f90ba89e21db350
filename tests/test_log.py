"""The log: one form for all lines, no raw control characters, and no blocking of callers."""

import asyncio
import io
import json
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from proxy.log import Format, LogWriter, configure_logging, get_logger, render_json, request_id

pytestmark = pytest.mark.usefixtures("restore_logging")

LINES = 50_000


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., list[str]]:
    """Return a function that runs some work with a log and returns the lines of the log."""
    file = tmp_path / "log"

    def run(
        work: Callable[[LogWriter], object], form: Format = "json", level: str = "info"
    ) -> list[str]:
        with file.open("w", encoding="utf-8") as stream:
            log = configure_logging(level, form, stream)
            work(log)
            log.close()
        return file.read_text(encoding="utf-8").splitlines()

    return run


def test_our_lines_access_lines_and_those_of_libraries_have_one_form(lines):
    def work(log: LogWriter) -> None:
        get_logger("proxy.cache").warning("disk is slow", seconds=1.5)
        log.log_request("request", status=200, path="/v2/")
        logging.getLogger("aiohttp.server").error("bad request: %s", "x")

    ours, access, library = map(json.loads, lines(work))
    assert [*ours] == ["time", "level", "event", "logger", "seconds"]
    assert [*access] == ["time", "level", "event", "status", "path"]
    assert [*library] == ["time", "level", "event", "logger"]
    assert (ours["level"], ours["event"], ours["seconds"]) == ("warning", "disk is slow", 1.5)
    assert (access["level"], access["status"]) == ("info", 200)
    assert (library["level"], library["event"]) == ("error", "bad request: x")
    assert library["logger"] == "aiohttp.server"
    assert all(line["time"][10] == "T" and line["time"][-1] == "Z" for line in (ours, access))


def test_every_line_of_a_request_carries_its_id(lines):
    def work(log: LogWriter) -> None:
        token = request_id.set("4bf92f")
        get_logger("a").info("one")
        log.log_request("two")
        logging.getLogger("b").warning("three")
        request_id.reset(token)
        get_logger("a").info("four")

    found = [json.loads(line) for line in lines(work)]
    assert [line.get("request") for line in found] == ["4bf92f", "4bf92f", "4bf92f", None]


@pytest.mark.parametrize("form", ["json", "console"])
def test_less_severe_lines_are_not_written(lines, form):
    def work(log: LogWriter) -> None:
        log.log_request("request")
        get_logger("a").info("quiet")
        logging.getLogger("b").info("quiet")
        get_logger("a").warning("loud")

    found = lines(work, form, "warning")
    assert len(found) == 1
    assert "loud" in found[0]


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.characters(), st.integers(), st.none())))
def test_c18_a_json_line_has_no_control_characters_and_decodes_to_the_fields(fields):
    line = render_json(fields)
    text = line.decode()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert json.loads(text) == fields


def test_a_header_that_is_not_utf_8_is_logged():
    header = b"curl\xff\x1b[2J".decode("utf-8", "surrogateescape")
    assert json.loads(render_json({"agent": header})) == {"agent": header}


def test_a_value_without_a_json_form_is_written_as_text():
    assert json.loads(render_json({"path": Path("/x"), "big": 2**70})) == {
        "path": "/x",
        "big": 2**70,
    }


@pytest.mark.parametrize("hostile", ["\x1b[31mred", "two\nlines\r", "\x9b2J", "\x7f", "\u202eabc"])
def test_c18_on_a_console_control_characters_are_escaped(lines, hostile):
    def work(log: LogWriter) -> None:
        get_logger("a").info(hostile, field=hostile)
        log.log_request(hostile, field=hostile)

    found = lines(work, "console")
    assert len(found) == 2
    assert all(line.isprintable() for line in found)


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_is_written_without_the_values_of_variables(lines, form):
    def work(log: LogWriter) -> None:
        password = "hunter2"
        try:
            [][len(password)]
        except IndexError:
            get_logger("a").exception("a bug")

    found = "\n".join(lines(work, form))
    assert "IndexError: list" in found
    assert "Traceback (most recent call last)" in found
    assert "hunter2" not in found.replace('password = "hunter2"', "")


def test_a_record_whose_arguments_do_not_match_is_logged(lines):
    record = logging.makeLogRecord({"msg": "%d and %d", "args": ("one",), "levelname": "INFO"})
    found = lines(lambda log: log._stdlib_handler.emit(record))  # pytest's own handler would raise
    assert json.loads(found[0])["event"] == "%d and %d"


def read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def test_p12_if_stderr_is_not_read_lines_are_dropped_and_counted():
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w", encoding="utf-8") as stream, ThreadPoolExecutor() as pool:
        log = configure_logging("info", "json", stream)
        for number in range(
            LINES
        ):  # far more than the pipe and the queue hold; the reader has not started
            log.log_request("request", number=number)
        received = pool.submit(read_all, read_end)
        log.close()
        stream.close()
        found = [json.loads(line) for line in received.result().splitlines()]
    written = [line["number"] for line in found if "number" in line]
    dropped = sum(line["lines"] for line in found if "lines" in line)
    assert dropped > 0
    assert len(written) + dropped == LINES
    assert written == sorted(written)


def test_a_non_blocking_stderr_loses_no_lines():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as another program on the same terminal may do
    with os.fdopen(write_end, "w", encoding="utf-8") as stream, ThreadPoolExecutor() as pool:
        log = configure_logging("info", "json", stream)
        for number in range(10_000):  # more than a pipe holds
            log.log_request("request", number=number)
        received = pool.submit(read_all, read_end)
        log.close()
        stream.close()
        found = received.result()
    assert [json.loads(line)["number"] for line in found.splitlines()] == [*range(10_000)]


def test_the_log_can_be_written_to_a_stream_without_a_descriptor():
    stream = io.StringIO()
    log = configure_logging("info", "auto", stream)
    log.log_request("request", status=200)
    log.close()
    assert json.loads(stream.getvalue())["status"] == 200


def test_close_writes_the_queue_and_later_lines_are_written_at_once(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        log = configure_logging("info", "json", stream)
        for number in range(1000):
            log.log_request("request", number=number)
        log.close()
        assert len((tmp_path / "log").read_text().splitlines()) == 1000
        get_logger("a").info("after close")
        assert "after close" in (tmp_path / "log").read_text()


def test_a_closed_stderr_is_ignored():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", encoding="utf-8") as stream:
        log = configure_logging("info", "json", stream)
        log.log_request("request")
        log.close()


async def test_logging_does_not_block_the_event_loop(tmp_path):
    file = tmp_path / "log"
    stream = await asyncio.to_thread(file.open, "w", encoding="utf-8")
    log = configure_logging("info", "json", stream)
    for number in range(100):
        log.log_request("request", number=number)
        get_logger("proxy").info("hello")
    await asyncio.to_thread(log.close)
    stream.close()
    assert len((await asyncio.to_thread(file.read_text)).splitlines()) == 200


def test_a_request_is_one_short_line_on_a_console(lines):
    def work(log: LogWriter) -> None:
        log.log_request(
            "request",
            client="127.0.0.1",
            method="GET",
            path="/v2/library/nginx/manifests/1.27",
            status=200,
            kind="manifest",
            cache="miss",
            upstream="docker.io",
            bytes=5_300_000,
            seconds=0.4,
        )
        get_logger("proxy.daemon").info("daemon_started", version="1.0", addresses=["a"])

    request, event = lines(work, "console")
    assert re.fullmatch(r"\d\d:\d\d:\d\d GET nginx:1.27 miss 5.3 MB 0.400 s", request)
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[info\] daemon_started version=1.0 .*", event)


def test_auto_is_json_in_a_file_and_console_on_a_terminal(lines):
    json.loads(lines(lambda log: log.log_request("request"), "auto")[0])
    controller, terminal_fd = os.openpty()
    with os.fdopen(terminal_fd, "w", encoding="utf-8") as terminal:
        log = configure_logging("info", "auto", terminal)
        log.log_request("request", status=200)
        log.close()
        shown = os.read(controller, 10_000).decode()
    os.close(controller)
    assert "request" in shown
    assert not shown.startswith("{")
