"""Credential helpers are foreign programs: bounded, without a shell, rarely run (M18)."""

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
from proxy.upstream.auth.credentials import (
    HELPER_FAILURE_TTL,
    HELPER_TTL,
    Credentials,
    CredentialSource,
    run_credential_helper,
)
from tests.fakes.clock import Clock

BOB = Credentials("bob", "pa:ss")
PRINT_CREDENTIALS = """printf '{"ServerURL":"%s","Username":"bob","Secret":"pa:ss"}' "$server\""""

Helper = Callable[..., Path]


@pytest.fixture
def write_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Helper:
    """Return a function that writes docker-credential-NAME, which records its runs in a file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def write(script: str = PRINT_CREDENTIALS, name: str = "test") -> Path:
        runs = tmp_path / f"{name}.runs"
        runs.touch()
        program = programs / f"docker-credential-{name}"
        program.write_text(f'#!/bin/sh\nserver=$(cat)\necho "$1 $server" >>{runs}\n{script}\n')
        program.chmod(0o755)
        return runs

    return write


@pytest.fixture
async def make_source() -> AsyncIterator[Callable[..., CredentialSource]]:
    """Return a function that makes a source from the settings of an upstream."""
    async with asyncio.TaskGroup() as group:

        def make(clock: Clock | None = None, **settings: Any) -> CredentialSource:
            source = CredentialSource("ghcr.io", settings_of(**settings), group)
            source._now = clock or source._now
            return source

        yield make


def settings_of(**settings: Any) -> UpstreamSettings:
    table = {"url": "https://ghcr.io", **settings}
    return load(None, {}, {"upstreams": {"ghcr.io": table}}).upstreams["ghcr.io"]


def is_running(process: str) -> bool:
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_helper_is_asked_for_the_server_of_the_registry(write_helper):
    runs = write_helper()
    assert run_credential_helper("test", "ghcr.io") == BOB
    assert runs.read_text() == "get ghcr.io\n"


def test_a_helper_does_not_see_our_own_environment_variables(write_helper, monkeypatch):
    monkeypatch.setenv("PULLCACHE_UPSTREAMS_DOCKER_IO_PASSWORD", "CANARY")
    monkeypatch.setenv("OTHER", "kept")
    runs = write_helper(f"env >>$0.env\n{PRINT_CREDENTIALS}")
    assert run_credential_helper("test", "ghcr.io") == BOB
    seen = (runs.parent / "bin" / "docker-credential-test.env").read_text()
    assert "OTHER=kept" in seen
    assert "CANARY" not in seen


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo CANARY; exit 1", r"has no credentials for ghcr\.io \(exit code 1\)"),
        ("kill -9 $$", r"exit code -9"),
        ("echo CANARY", "did not print credentials"),
        ("exit 0", "did not print credentials"),
        ("yes CANARY", "printed more than 65536 bytes"),
        ("yes CANARY | head -c 65537", "printed more than 65536 bytes"),
        ('echo \'{"Username":"<token>","Secret":"CANARY"}\'', "identity token"),
    ],
)
def test_a_failing_helper_is_an_error_without_its_output(write_helper, script, reason):
    write_helper(script)
    with pytest.raises(ConfigError, match=reason) as caught:
        run_credential_helper("test", "ghcr.io")
    assert "CANARY" not in str(caught.value)


def test_a_helper_that_is_missing_or_cannot_run_is_named(write_helper):
    with pytest.raises(ConfigError, match="docker-credential-none cannot be run: No such file"):
        run_credential_helper("none", "ghcr.io")
    program = write_helper().parent / "bin" / "docker-credential-test"
    program.chmod(0o644)
    with pytest.raises(ConfigError, match="docker-credential-test cannot be run: Permission"):
        run_credential_helper("test", "ghcr.io")


@pytest.mark.parametrize("script", ["exec sleep 100", "sleep 100 & echo $! >$0.child; wait"])
def test_a_hanging_helper_is_killed_with_its_children(write_helper, script):
    runs = write_helper(script)
    with pytest.raises(ConfigError, match=r"did not respond within 0\.5 s"):
        run_credential_helper("test", "ghcr.io", timeout=0.5)
    child = runs.parent / "bin" / "docker-credential-test.child"
    wait_until(lambda: not child.exists() or not is_running(child.read_text().strip()))


async def test_a_helper_runs_once_for_concurrent_requests_and_for_minutes(
    write_helper, make_source
):
    runs = write_helper()
    clock = Clock()
    source = make_source(clock, credential_helper="test")
    assert await asyncio.gather(*(source.get() for _ in range(20))) == [BOB] * 20
    clock.advance(HELPER_TTL - 1)
    assert await source.get() == BOB
    assert runs.read_text() == "get ghcr.io\n"
    clock.advance(2)
    assert await source.get() == BOB
    assert runs.read_text() == "get ghcr.io\n" * 2


async def test_a_failed_helper_is_not_run_again_for_a_moment(write_helper, make_source):
    runs = write_helper("exit 1")
    clock = Clock()
    source = make_source(clock, credential_helper="test")
    for _ in range(3):
        with pytest.raises(
            UpstreamUnavailableError, match=r"no credentials for ghcr\.io: .*exit code"
        ):
            await source.get()
    assert len(runs.read_text().splitlines()) == 1
    write_helper()
    clock.advance(HELPER_FAILURE_TTL + 1)
    assert await source.get() == BOB


async def test_credentials_may_come_from_dockers_config_or_its_helper(
    write_helper, make_source, tmp_path
):
    file = tmp_path / "config.json"
    source = make_source(docker_config=str(file))
    with pytest.raises(UpstreamUnavailableError, match="docker_config: No such file"):
        await source.get()
    auths = {"ghcr.io": {"username": "amy", "password": "x"}}
    file.write_text(json.dumps({"auths": auths}))
    assert await source.get() == Credentials("amy", "x")
    runs = write_helper()
    file.write_text(json.dumps({"auths": auths, "credHelpers": {"ghcr.io": "test"}}))
    assert await source.get() == BOB
    assert runs.read_text() == "get ghcr.io\n"


async def test_credentials_may_be_configured_or_absent(make_source, tmp_path):
    (tmp_path / "secret").write_text("pa:ss\n")
    assert await make_source().get() is None
    assert await make_source(username="bob", password="pa:ss").get() == BOB
    assert await make_source(username="bob", password_file=str(tmp_path / "secret")).get() == BOB
    with pytest.raises(UpstreamUnavailableError, match="none: password_file: No such file"):
        await make_source(username="bob", password_file=str(tmp_path / "none")).get()
