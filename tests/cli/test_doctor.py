"""`pullcache doctor`: what it finds in set-ups that work and in ones that do not."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.cli.diagnosis.machine import describe_unit, is_own_address
from proxy.cli.diagnosis.network import describe_clock
from tests.fakes.faults import Fault
from tests.fakes.registry import FakeRegistry
from tests.support.certificates import Authority
from tests.support.commands import run, run_on, run_on_terminal
from tests.support.program import Program

IMAGE = ("--image", "me/app:latest")


@dataclass
class TlsServer:
    """A registry whose certificate only `ca_file` vouches for."""

    address: str
    ca_file: str


@pytest.fixture
async def tls_server(tmp_path) -> AsyncIterator[TlsServer]:
    authority = Authority(tmp_path / "authority")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("registry", "IP:127.0.0.1"))
    async with FakeRegistry(tls=context) as server:
        yield TlsServer(server.url.removeprefix("https://"), str(authority.ca))


async def diagnose(program: Program, *arguments: str, file: Any = None) -> list[dict[str, Any]]:
    """Return the findings of the command with the configuration of `program`."""
    settings = file or program.root.parent / "doctor.toml"
    if not file:
        upstream = program.upstreams["docker.io"]
        lines = [f"{key} = {json.dumps(value)}" for key, value in upstream.items()]
        text = "store.min_free = '0B'\n[upstreams.'docker.io']\n" + "\n".join(lines)
        settings.write_text(text)
    done = await run_on(program, "doctor", "-c", settings, "--json", *arguments)
    findings = json.loads(done.stdout)
    assert done.exit_code == any(one["state"] == "fail" for one in findings)
    return list(findings)


def problems(findings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one["check"], one["text"]) for one in findings if one["state"] == "fail"]


async def test_a_set_up_that_works_has_nothing_to_do(registry, program):
    await program.pull(registry.add_image("me/app"))
    await program.wait_for_downloads()
    findings = await diagnose(program, *IMAGE)
    assert problems(findings) == []
    states = {one["check"]: one["state"] for one in findings if one["check"] != "units"}
    assert states == dict.fromkeys(
        ("configuration", "port", "disk", "clock", "DNS", "connection", "login", "pull", "clients"),
        "ok",
    )
    (pull,) = [one for one in findings if one["check"] == "pull"]
    assert re.fullmatch(r"me/app:latest: [\d.]+ k?B in \d+\.\d s \(hit\)", pull["text"])


async def test_the_rights_of_nginx_are_checked_where_it_sends_the_blobs(program, tmp_path):
    (tmp_path / "f.toml").write_text(
        "store.min_free = '0B'\nupstreams = {}\n[server]\n"
        "accel_redirect = '/_blobs'\ntrusted_proxies = ['127.0.0.1']"
    )
    findings = await diagnose(program, "--no-pull", file=tmp_path / "f.toml")
    checks = [one["check"] for one in findings]
    assert checks.index("disk") < checks.index("nginx") < checks.index("clock")


def test_an_error_in_the_configuration_comes_first_and_alone(tmp_path):
    (tmp_path / "f.toml").write_text("[stor]\npath = '/x'")
    done = run("doctor", "-c", tmp_path / "f.toml")
    assert done.exit_code == 1
    assert "stor: no such key (did you mean store?)" in done.stdout
    assert "\n1. configuration: correct it, then: pullcache config check" in done.stdout
    assert "\n2. " not in done.stdout


def test_without_a_daemon_it_names_the_program_on_its_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "f.toml").write_text(f"offline = true\nserver.listen = ['127.0.0.1:{port}']")
        done = run("doctor", "-c", tmp_path / "f.toml", "--store", tmp_path / "store")
    assert done.exit_code == 1
    assert f"fail  port: another program listens on 127.0.0.1:{port}\n" in done.stdout
    assert f"\n1. port: find it (ss -ltnp | grep :{port}) and stop it" in done.stdout
    assert "\n2. daemon: start it: systemctl start pullcache" in done.stdout
    assert not (tmp_path / "store").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="chown needs root: tests/run has it")
@pytest.mark.parametrize(
    ("owner", "mode", "text", "advice"),
    [
        (0, 0o755, "{} belongs to root, and this is daemon", "chown -R daemon: {}"),
        (0, 0o700, "{} belongs to root, and this is daemon", "chown -R daemon: {}"),
        (1, 0o500, "daemon may not write to {} (mode 0500)", "chmod u+rwx {}"),
    ],
)
def test_a_store_that_the_user_may_not_write_is_found_first(owner, mode, text, advice):
    # A user other than root reaches no directory of `tmp_path`.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "store").mkdir()
        os.chown(folder / "store", owner, -1)
        (folder / "store").chmod(mode)
        (folder / "f.toml").write_text("offline = true\nserver.listen = ['127.0.0.1:0']")
        # The first run imports what the other user may not be allowed to read.
        code = (
            "import io, os, sys\nfrom contextlib import redirect_stdout, suppress\n"
            "from proxy.cli import main\n"
            "with suppress(SystemExit), redirect_stdout(io.StringIO()): main(sys.argv[1:])\n"
            "os.setgroups([]); os.setgid(1); os.setuid(1); main(sys.argv[1:])"
        )
        command = [sys.executable, "-c", code, "doctor", "-c", str(folder / "f.toml")]
        done = subprocess.run(
            [*command, "--store", str(folder / "store"), "--json"],
            # The coverage of the other user could not be written.
            env={name: value for name, value in os.environ.items() if "COVERAGE" not in name},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, "")
        found = [one for one in json.loads(done.stdout) if one["state"] == "fail"]
        assert [one["check"] for one in found] == ["disk", "daemon"]
        assert found[0]["text"] == text.format(folder / "store")
        assert advice.format(folder / "store") in found[0]["advice"]


async def test_a_wrong_password_is_found_at_the_registry(registry, make_program):
    registry.tokens.users["me"] = "right"
    upstream = {"url": registry.url, "username": "me", "password": "s3cret-typo"}
    program = await make_program(upstreams={"docker.io": upstream})
    registry.add_image("me/app")
    findings = await diagnose(program, *IMAGE)
    (login, *_) = problems(findings)
    assert login[0] == "login"
    (advice,) = [one["advice"] for one in findings if one["check"] == "login"]
    assert advice == 'set the right username and password_file in [upstreams."docker.io"], or none'
    assert "s3cret-typo" not in json.dumps(findings)


async def test_a_registry_that_cannot_be_reached_is_found_before_its_consequences(
    registry, program
):
    await registry.stop()
    findings = await diagnose(program, *IMAGE)
    checks = [name for name, _ in problems(findings)]
    assert checks == ["connection", "pull"]
    assert (
        f"docker.io: {registry.url.removeprefix('http://')} does not answer"
        in (problems(findings)[0][1])
    )
    await registry.start()


async def test_a_registry_that_refuses_connections_is_not_a_reason_to_cut_off_the_others(
    registry, program, tmp_path
):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    (tmp_path / "f.toml").write_text(
        f'store.min_free = "0B"\n[upstreams."docker.io"]\nurl = "{registry.url}"\n'
        f'[upstreams."ghcr.io"]\nurl = "http://{host}"'
    )
    findings = await diagnose(program, "--no-pull", file=tmp_path / "f.toml")
    assert [check for check, _ in problems(findings)] == ["connection"]
    (advice,) = [one["advice"] for one in findings if one["state"] == "fail"]
    assert advice == (
        f'nothing listens on {host}: is the registry running, and is upstreams."ghcr.io".url right?'
    )
    assert "offline on" not in json.dumps(findings)


async def test_a_name_that_is_not_known_is_found(program, tmp_path):
    (tmp_path / "f.toml").write_text(
        'store.min_free = "0B"\n[upstreams."docker.io"]\nurl = "https://registry.invalid"'
    )
    findings = await diagnose(program, "--no-pull", file=tmp_path / "f.toml")
    ((check, text),) = problems(findings)
    assert check == "DNS"
    assert text.startswith("docker.io: registry.invalid is not known: ")


async def test_a_certificate_that_is_not_trusted_is_found(program, tmp_path, tls_server):
    (tmp_path / "f.toml").write_text(
        f'store.min_free = "0B"\n[upstreams."docker.io"]\nurl = "https://{tls_server.address}"'
    )
    findings = await diagnose(program, "--no-pull", file=tmp_path / "f.toml")
    ((check, text),) = problems(findings)
    assert check == "TLS"
    assert "the certificate of 127.0.0.1 is refused" in text
    (tmp_path / "f.toml").write_text(
        f'store.min_free = "0B"\n[upstreams."docker.io"]\nurl = "https://{tls_server.address}"\n'
        f'ca_file = "{tls_server.ca_file}"'
    )
    assert problems(await diagnose(program, "--no-pull", file=tmp_path / "f.toml")) == []


async def test_an_image_that_does_not_exist_is_no_fault_of_the_cache(registry, program):
    findings = await diagnose(program, "--image", "me/none:latest")
    (pull,) = [one for one in findings if one["check"] == "pull"]
    assert (pull["state"], "status 404" in pull["text"]) == ("fail", True)
    assert "test an image that exists, with --image" in pull["advice"]


async def test_an_image_that_arrives_damaged_is_a_failure(registry, program):
    image = registry.add_image("me/app")
    registry.fail(f"/blobs/.*{image.layers[0][7:]}", Fault(status=500), times=None)
    registry.fail(registry.body_of(image.layers[0]), Fault(status=500), times=None)
    (pull,) = [one for one in await diagnose(program, *IMAGE) if one["check"] == "pull"]
    assert pull["state"] == "fail"


async def test_a_store_full_of_pins_is_found(registry, make_program):
    program = await make_program(store={"max_size": "10MB"})
    await program.pull(registry.add_image("me/app", layers=[bytes(9_150_000)]))
    await program.wait_for_downloads()
    await run_on(program, "pin", "me/app")
    findings = await diagnose(program, "--no-pull")
    ((check, text),) = problems(findings)
    assert check == "disk"
    assert "pinned images take" in text


async def test_an_offline_daemon_asks_no_registry(registry, program):
    await run_on(program, "offline", "on")
    findings = await diagnose(program, "--no-pull")
    assert "pullcache offline off" in json.dumps(findings)
    assert registry.count() == 0


async def test_the_first_advice_to_an_offline_daemon_is_to_end_that(registry, program):
    registry.add_image("me/app")
    await run_on(program, "offline", "on")
    findings = await diagnose(program, *IMAGE)
    assert problems(findings) == []
    advised = [one["check"] for one in findings if one["advice"] and one["check"] != "units"]
    assert advised[0] == "upstreams"
    (pull,) = [one for one in findings if one["check"] == "pull"]
    assert (pull["state"], "pullcache images" in pull["advice"]) == ("warn", True)


async def test_without_clients_it_says_how_to_configure_them(program):
    findings = await diagnose(program, "--no-pull")
    (clients,) = [one for one in findings if one["check"] == "clients"]
    assert clients["state"] == "warn"
    assert clients["advice"].startswith("configure them: pullcache client-config docker; for other")


async def test_its_own_pull_is_not_that_of_a_client(registry, program):
    registry.add_image("me/app")
    for _ in range(2):
        findings = await diagnose(program, *IMAGE)
        (pull,) = [one for one in findings if one["check"] == "pull"]
        (clients,) = [one for one in findings if one["check"] == "clients"]
        assert (pull["state"], clients["state"]) == ("ok", "warn")
        assert clients["text"] == "no client has pulled since yesterday"
    for of in ("images", "clients"):
        assert json.loads((await run_on(program, "top", of, "--json")).stdout) == []


@pytest.mark.parametrize(
    ("address", "is_own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("192.0.2.7", False), ("2001:db8::7", False)],
)
def test_the_addresses_of_this_machine_are_those_that_a_socket_can_have(address, is_own):
    assert is_own_address(address) is is_own


async def test_it_fits_into_60_columns(program, tmp_path):
    (tmp_path / "f.toml").write_text(
        'store.min_free = "0B"\n[upstreams."docker.io"]\nurl = "https://registry.invalid"'
    )
    shown = await run_on_terminal(
        program, "doctor", "-c", tmp_path / "f.toml", "--no-pull", columns=60, exit_code=1
    )
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 60


@pytest.mark.parametrize(
    ("difference", "state"), [(None, "skip"), (0.0, "ok"), (-59.0, "ok"), (61.0, "fail")]
)
def test_the_clock_may_differ_by_a_minute(difference, state):
    assert describe_clock(difference).state == state


@pytest.mark.parametrize(
    ("shown", "state", "advice"),
    [
        ({"LoadState": "loaded", "ActiveState": "active"}, "ok", ""),
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "skip", ""),
        ({"LoadState": "loaded", "ActiveState": "inactive"}, "warn", "enable --now"),
        (
            {"LoadState": "loaded", "ActiveState": "failed", "Result": "exit-code"},
            "fail",
            "journalctl -u pullcache.service",
        ),
    ],
)
def test_the_state_of_the_service_says_what_to_do(shown, state, advice):
    finding = describe_unit(shown)
    assert (finding.state, advice in finding.advice) == (state, True)
