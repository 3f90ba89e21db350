"""`pullcache search`: what it prints of upstream's answer, an older one, and of what is cached."""

import asyncio
import json
import os
import pty
import re
import subprocess
import sys

import pytest
import structlog
from click.testing import CliRunner, Result
from structlog.testing import capture_logs

from proxy.cache.search import SEARCH_TTL
from proxy.cli import main
from proxy.errors import InvalidRequestError
from tests.fakes.faults import HTML
from tests.fakes.search import Listed
from tests.support.admin_api import call
from tests.support.openapi import validate

OFFLINE = "this cache is offline"
LONG = "A web server, a reverse proxy, \x1b[31ma mail proxy\x07\r\n and much more besides"
CLEAN = "A web server, a reverse proxy, [31ma mail proxy and much more besides"


@pytest.fixture
def hub(registry):
    """A registry that is searched by itself, as a mirror of Docker Hub under another address is."""
    registry.catalogue = [
        Listed("me/nginx", LONG, 20),
        Listed("nginx", "Official build of Nginx.", 21000, official=True),
    ]
    return registry


async def search(program, *arguments: str) -> Result:
    command = ["search", *arguments, "--store", str(program.root)]
    with capture_logs():  # the daemon's in this process would be taken for the command's output
        result = await asyncio.to_thread(CliRunner().invoke, main, command)
    structlog.reset_defaults()  # a command that is the daemon itself has configured what was captured
    return result


async def found(program, *arguments: str) -> list[str]:
    document = json.loads((await search(program, *arguments, "--json")).stdout)
    validate(document, "SearchResponse")
    return [one["name"] for one in document["results"]]


async def test_results_are_a_table_as_docker_s_and_whole_where_no_terminal_is(program, hub):
    done = await search(program, "nginx")
    assert (done.exit_code, done.stderr) == (0, "")
    header, first, second = done.stdout.splitlines()
    assert header.split() == ["NAME", "DESCRIPTION", "STARS", "OFFICIAL"]
    assert re.fullmatch(r"nginx +Official build of Nginx\. +21000 +\[OK\] *", first)
    assert second.split() == ["me/nginx", *CLEAN.split(), "20"]


@pytest.mark.parametrize("option", [(), ("--no-trunc",)], ids=["cut", "whole"])
async def test_a_terminal_gets_a_description_s_beginning_and_none_of_its_commands(
    program, hub, option
):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "proxy", "search", "nginx", "--store", str(program.root)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    await asyncio.to_thread(
        subprocess.run, [*command, *option], stdout=theirs, check=True, env=environment
    )
    shown = os.read(ours, 1 << 16).decode()
    os.close(theirs)
    os.close(ours)
    assert (CLEAN in shown) is bool(option)
    assert (f" {CLEAN[:44]}… " in shown) is not bool(option)
    assert "\x1b[31m" not in shown
    assert "\x07" not in shown


async def test_no_more_results_than_are_wanted(program, hub):
    assert await found(program, "nginx", "--limit", "1") == ["nginx"]
    assert [one.target for one in hub.seen("search")] == ["/v1/search?q=nginx&n=1&page=1"]
    assert (await search(program, "nginx", "--limit", "0")).exit_code == 2
    assert (await search(program, "nginx", "--limit", "101")).exit_code == 2
    assert hub.count("search") == 1


async def test_offline_what_is_cached_is_found_and_stderr_says_so(program, hub):
    hub.add_image("library/nginx")
    await program.manifest("library/nginx")
    await program.restart(offline=True)
    done = await search(program, "nginx")
    assert done.exit_code == 0
    assert done.stderr == f"docker.io was not searched, this is what is cached here: {OFFLINE}\n"
    (row,) = done.stdout.splitlines()[1:]
    assert row.split() == ["nginx", "in", "this", "cache", "0", "[OK]"]
    assert await found(program, "httpd") == []


async def test_an_older_answer_is_called_one(program, hub):
    await search(program, "nginx")
    program.clock.turn(SEARCH_TTL)
    hub.fail("/v1/search", HTML, times=None)
    done = await search(program, "nginx")
    assert done.exit_code == 0
    assert done.stderr.startswith("docker.io was not searched, this is what it found before: ")
    assert len(done.stdout.splitlines()) == 3


async def test_a_registry_without_a_search_is_named(make_program, hub):
    program = await make_program(upstreams={"ghcr.io": {"url": hub.url}})
    hub.add_image("me/app")
    await program.manifest("ghcr.io/me/app")
    done = await search(program, "ghcr.io/app")
    assert "ghcr.io/me/app" in done.stdout
    assert done.stderr == (
        "ghcr.io was not searched, this is what is cached here: no search_url is set for it\n"
    )


async def test_an_empty_text_lists_what_is_cached_and_that_is_no_failure(program, hub):
    hub.add_image("me/app")
    await program.manifest("me/app")
    done = await search(program, "")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "me/app" in done.stdout


async def test_a_search_that_fails_is_exit_code_1_if_nothing_fits(program, hub):
    async with hub.down():
        done = await search(program, "nginx")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("pullcache: ")


async def test_words_that_nobody_types_are_exit_code_2(program, hub):
    done = await search(program, "a\x1b[31m")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "\x1b" not in done.stderr
    assert hub.requests == []


async def test_it_works_without_a_daemon(program, hub):
    await program.stop()
    config = program.root.parent / "search.toml"
    config.write_text(f'[upstreams."docker.io"]\nurl = "{hub.url}"\n')
    assert await found(program, "nginx", "-c", str(config)) == ["nginx", "me/nginx"]
    await program.start()


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 101}, {"page": 0}, {"upstream": "x"}])
async def test_the_route_names_what_is_wrong(program, hub, wrong):
    with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
        await call(program, "get", "/api/v1/search", text="nginx", **wrong)


async def test_the_route_turns_pages(program, hub):
    pages = [
        await call(program, "get", "/api/v1/search", text="nginx", limit=1, page=page)
        for page in (1, 2)
    ]
    assert [page["results"][0]["name"] for page in pages] == ["nginx", "me/nginx"]
    assert {page["total"] for page in pages} == {2}
