"""The log: one shape for all lines, no raw control character, and never a wait."""

import asyncio
import io
import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from proxy.log import Format, LogWriter, configure_logging, get_logger, render_json, request_id

pytestmark = pytest.mark.usefixtures("log_as_it_was")

LINES = 50_000


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., list[str]]:
    """Run something with a log and return the lines that came out."""
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


def test_our_lines_access_lines_and_those_of_libraries_have_one_shape(lines):
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


def test_every_line_of_a_request_says_its_id(lines):
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
def test_below_the_level_nothing_comes_out(lines, form):
    def work(log: LogWriter) -> None:
        log.log_request("request")
        get_logger("a").info("quiet")
        logging.getLogger("b").info("quiet")
        get_logger("a").warning("loud")

    found = lines(work, form, "warning")
    assert len(found) == 1
    assert "loud" in found[0]


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.characters(), st.integers(), st.none())))
def test_c18_a_json_line_holds_no_control_character_and_means_what_was_said(fields):
    line = render_json(fields)
    text = line.decode()
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert json.loads(text) == fields


def test_bytes_of_a_header_that_are_no_text_do_not_stop_the_line():
    header = b"curl\xff\x1b[2J".decode("utf-8", "surrogateescape")
    assert json.loads(render_json({"agent": header})) == {"agent": header}


def test_a_value_that_json_does_not_know_is_written_as_text():
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
def test_a_traceback_comes_out_without_the_values_of_variables(lines, form):
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


def test_a_call_with_the_wrong_arguments_is_logged_and_does_not_raise(lines):
    record = logging.makeLogRecord({"msg": "%d and %d", "args": ("one",), "levelname": "INFO"})
    found = lines(lambda log: log._stdlib_handler.emit(record))  # pytest's own handler would raise
    assert json.loads(found[0])["event"] == "%d and %d"


def read_all(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb") as stream:
        return stream.read()


def test_p12_a_reader_that_stops_reading_costs_lines_and_nothing_else():
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w", encoding="utf-8") as stream, ThreadPoolExecutor() as pool:
        log = configure_logging("info", "json", stream)
        for number in range(LINES):  # far more than pipe and queue hold: nobody reads yet
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


def test_a_stderr_that_does_not_block_loses_nothing():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # as a program that shares our terminal may make it
    with os.fdopen(write_end, "w", encoding="utf-8") as stream, ThreadPoolExecutor() as pool:
        log = configure_logging("info", "json", stream)
        for number in range(10_000):  # more than a pipe holds
            log.log_request("request", number=number)
        received = pool.submit(read_all, read_end)
        log.close()
        stream.close()
        found = received.result()
    assert [json.loads(line)["number"] for line in found.splitlines()] == [*range(10_000)]


def test_a_stream_without_a_descriptor_will_do():
    stream = io.StringIO()
    log = configure_logging("info", "auto", stream)
    log.log_request("request", status=200)
    log.close()
    assert json.loads(stream.getvalue())["status"] == 200


def test_close_writes_what_waits_and_later_lines_come_out_at_once(tmp_path):
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        log = configure_logging("info", "json", stream)
        for number in range(1000):
            log.log_request("request", number=number)
        log.close()
        assert len((tmp_path / "log").read_text().splitlines()) == 1000
        get_logger("a").info("the last words")
        assert "the last words" in (tmp_path / "log").read_text()


def test_a_stderr_that_is_gone_hurts_nobody():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w", encoding="utf-8") as stream:
        log = configure_logging("info", "json", stream)
        log.log_request("request")
        log.close()


async def test_logging_in_the_event_loop_blocks_nothing(tmp_path):
    file = tmp_path / "log"
    stream = await asyncio.to_thread(file.open, "w", encoding="utf-8")
    log = configure_logging("info", "json", stream)
    for number in range(100):
        log.log_request("request", number=number)
        get_logger("proxy").info("hello")
    await asyncio.to_thread(log.close)
    stream.close()
    assert len((await asyncio.to_thread(file.read_text)).splitlines()) == 200


def test_auto_is_json_in_a_file_and_for_people_on_a_terminal(lines):
    json.loads(lines(lambda log: log.log_request("request"), "auto")[0])
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        log = configure_logging("info", "auto", terminal)
        log.log_request("request", status=200)
        log.close()
        shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "request" in shown
    assert not shown.startswith("{")
