"""Credential helpers are programs of strangers: bounded, without a shell, seldom run (M18)."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.config import UpstreamSettings, load
from proxy.errors import ConfigError, UpstreamUnavailableError
from proxy.upstream.credentials import (
    HELPER_FAILURE_TTL,
    HELPER_TTL,
    Credentials,
    CredentialSource,
    run_credential_helper,
)
from tests.fakes.clock import Clock

BOB = Credentials("bob", "pa:ss")
ANSWER = """printf '{"ServerURL":"%s","Username":"bob","Secret":"pa:ss"}' "$server\""""

Helper = Callable[..., Path]


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    """Write docker-credential-NAME; it notes each run, with what it was asked."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def write(script: str = ANSWER, name: str = "test") -> Path:
        runs = tmp_path / f"{name}.runs"
        runs.touch()
        program = programs / f"docker-credential-{name}"
        program.write_text(f'#!/bin/sh\nserver=$(cat)\necho "$1 $server" >>{runs}\n{script}\n')
        program.chmod(0o755)
        return runs

    return write


@pytest.fixture
async def source() -> AsyncIterator[Callable[..., CredentialSource]]:
    """Make sources of an upstream's settings; `clock` turns the clock of all of them."""
    async with asyncio.TaskGroup() as group:

        def make(clock: Clock | None = None, **settings: Any) -> CredentialSource:
            made = CredentialSource("ghcr.io", upstream(**settings), group)
            made._now = clock or made._now
            return made

        yield make


def upstream(**settings: Any) -> UpstreamSettings:
    table = {"url": "https://ghcr.io", **settings}
    return load(None, {}, {"upstreams": {"ghcr.io": table}}).upstreams["ghcr.io"]


def is_running(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_helper_is_asked_for_the_registry_that_is_asked(helper):
    runs = helper()
    assert run_credential_helper("test", "ghcr.io") == BOB
    assert runs.read_text() == "get ghcr.io\n"


def test_a_helper_sees_none_of_our_own_variables(helper, monkeypatch):
    monkeypatch.setenv("PULLCACHE_UPSTREAMS_DOCKER_IO_PASSWORD", "CANARY")
    monkeypatch.setenv("OTHER", "kept")
    runs = helper(f"env >>$0.env\n{ANSWER}")
    assert run_credential_helper("test", "ghcr.io") == BOB
    seen = (runs.parent / "bin" / "docker-credential-test.env").read_text()
    assert "OTHER=kept" in seen
    assert "CANARY" not in seen


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo CANARY; exit 1", r"has no login for ghcr\.io \(exit code 1\)"),
        ("kill -9 $$", r"exit code -9"),
        ("echo CANARY", "did not print a login"),
        ("exit 0", "did not print a login"),
        ("yes CANARY", "printed more than 65536 bytes"),
        ("yes CANARY | head -c 65537", "printed more than 65536 bytes"),
        ('echo \'{"Username":"<token>","Secret":"CANARY"}\'', "identity token"),
    ],
)
def test_a_helper_that_gives_no_login_is_an_error_without_its_words(helper, script, reason):
    helper(script)
    with pytest.raises(ConfigError, match=reason) as caught:
        run_credential_helper("test", "ghcr.io")
    assert "CANARY" not in str(caught.value)


def test_a_helper_that_does_not_exist_or_cannot_run_is_named(helper):
    with pytest.raises(ConfigError, match="docker-credential-none cannot be run: No such file"):
        run_credential_helper("none", "ghcr.io")
    program = helper().parent / "bin" / "docker-credential-test"
    program.chmod(0o644)
    with pytest.raises(ConfigError, match="docker-credential-test cannot be run: Permission"):
        run_credential_helper("test", "ghcr.io")


@pytest.mark.parametrize("script", ["exec sleep 100", "sleep 100 & echo $! >$0.child; wait"])
def test_a_helper_that_hangs_is_ended_with_its_children(helper, script):
    runs = helper(script)
    with pytest.raises(ConfigError, match=r"did not answer in 0\.5 s"):
        run_credential_helper("test", "ghcr.io", timeout=0.5)
    child = runs.parent / "bin" / "docker-credential-test.child"
    until(lambda: not child.exists() or not is_running(child.read_text().strip()))


async def test_a_helper_is_run_once_for_many_and_for_minutes(helper, source):
    runs = helper()
    clock = Clock()
    login = source(clock, credential_helper="test")
    assert await asyncio.gather(*(login.get() for _ in range(20))) == [BOB] * 20
    clock.turn(HELPER_TTL - 1)
    assert await login.get() == BOB
    assert runs.read_text() == "get ghcr.io\n"
    clock.turn(2)
    assert await login.get() == BOB
    assert runs.read_text() == "get ghcr.io\n" * 2


async def test_a_helper_that_failed_is_left_alone_for_a_moment(helper, source):
    runs = helper("exit 1")
    clock = Clock()
    login = source(clock, credential_helper="test")
    for _ in range(3):
        with pytest.raises(UpstreamUnavailableError, match=r"no login for ghcr\.io: .*exit code"):
            await login.get()
    assert len(runs.read_text().splitlines()) == 1
    helper()
    clock.turn(HELPER_FAILURE_TTL + 1)
    assert await login.get() == BOB


async def test_a_login_may_come_from_dockers_file_or_the_helper_it_names(helper, source, tmp_path):
    file = tmp_path / "config.json"
    login = source(docker_config=str(file))
    with pytest.raises(UpstreamUnavailableError, match="docker_config: No such file"):
        await login.get()
    auths = {"ghcr.io": {"username": "amy", "password": "x"}}
    file.write_text(json.dumps({"auths": auths}))
    assert await login.get() == Credentials("amy", "x")
    runs = helper()
    file.write_text(json.dumps({"auths": auths, "credHelpers": {"ghcr.io": "test"}}))
    assert await login.get() == BOB
    assert runs.read_text() == "get ghcr.io\n"


async def test_a_login_may_be_written_down_or_not_exist(source, tmp_path):
    (tmp_path / "secret").write_text("pa:ss\n")
    assert await source().get() is None
    assert await source(username="bob", password="pa:ss").get() == BOB
    assert await source(username="bob", password_file=str(tmp_path / "secret")).get() == BOB
    with pytest.raises(UpstreamUnavailableError, match="none: password_file: No such file"):
        await source(username="bob", password_file=str(tmp_path / "none")).get()
