"""`pullcache config`: check, show and schema."""

import json
import re

import pytest
from click.testing import Result

from proxy.config import load
from tests.support.commands import read_terminal, run


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pullcache.toml"
    path.write_text(
        f"""
        [store]
        path = "{tmp_path}/store"
        max_size = "80%"
        [upstreams."docker.io"]
        username = "me"
        password_file = "{tmp_path}/password"
        """
    )
    (tmp_path / "password").write_text("hunter2\n")
    return path


def config(*arguments: object) -> Result:
    return run("config", *map(str, arguments))


def test_check_accepts_a_valid_configuration(file):
    done = config("check", "-c", file)
    assert (done.exit_code, done.stdout) == (0, "the configuration is valid\n")


def test_check_warns_of_a_secret_that_every_user_can_read(file, tmp_path):
    (tmp_path / "password").chmod(0o640)
    assert config("check", "-c", file).stderr == ""
    (tmp_path / "password").chmod(0o644)
    done = config("check", "-c", file)
    secret = tmp_path / "password"
    assert done.exit_code == 0
    assert done.stderr == (
        f"{secret}: contains a secret and is world-readable (chmod o-r {secret})\n"
    )


def test_check_reads_the_password_file(file, tmp_path):
    (tmp_path / "password").unlink()
    done = config("check", "-c", file)
    assert done.exit_code == 2
    assert "password: password_file: No such file" in done.stderr


def test_check_reads_docker_config_and_looks_for_the_helper_it_names(tmp_path):
    file, docker = tmp_path / "pullcache.toml", tmp_path / "config.json"
    file.write_text(f'[upstreams."ghcr.io"]\ndocker_config = "{docker}"')
    docker.write_text('{"auths": {"ghcr.io": {"username": "me", "password": "hunter2"}}}')
    assert config("check", "-c", file).exit_code == 0
    for content, reason in (
        ("{}", "config.json: docker_config: no credentials for ghcr.io (run docker login)"),
        ('{"credsStore": "none"}', "docker-credential-none: not found in PATH"),
        ("hunter2", "is not a docker config.json"),
    ):
        docker.write_text(content)
        done = config("check", "-c", file)
        assert done.exit_code == 2
        assert reason in done.stderr
        assert "hunter2" not in done.output


def test_check_looks_for_the_credential_helper_without_running_it(tmp_path, monkeypatch):
    file, helper = tmp_path / "pullcache.toml", tmp_path / "docker-credential-test"
    file.write_text('[upstreams."ghcr.io"]\ncredential_helper = "test"')
    assert "docker-credential-test: not found in PATH" in config("check", "-c", file).stderr
    helper.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert config("check", "-c", file).exit_code == 0
    assert not (tmp_path / "ran").exists()


def test_check_validates_the_proxies_in_the_environment(file, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://bob:hunter2@proxy.test")
    done = config("check", "-c", file)
    assert done.exit_code == 2
    assert "HTTPS_PROXY: not a proxy URL (write http://" in done.stderr
    assert "hunter2" not in done.output


def test_check_reads_the_certificates(file, tmp_path):
    with file.open("a") as stream:
        stream.write(f'ca_file = "{tmp_path}/ca.pem"')
    done = config("check", "-c", file)
    assert done.exit_code == 2
    assert 'ca.pem: cannot be read: No such file or directory (see upstreams."docker.io".ca' in (
        done.stderr
    )
    (tmp_path / "ca.pem").write_text("")
    assert config("check", "-c", file).exit_code == 0


def test_show_prints_the_url_of_a_well_known_registry(tmp_path):
    (tmp_path / "pullcache.toml").write_text('[upstreams."quay.io"]')
    done = config("show", "-c", tmp_path / "pullcache.toml")
    assert '[upstreams."quay.io"]\nurl = "https://quay.io"\n' in done.stdout


def test_show_prints_a_file_with_the_same_meaning(file, tmp_path):
    done = config("show", "-c", file)
    (tmp_path / "shown.toml").write_text(done.stdout)
    assert load(tmp_path / "shown.toml", {}, {}) == load(file, {}, {})


def test_show_applies_the_store_option(file):
    shown = json.loads(config("show", "-c", file, "--store", "/elsewhere", "--json").stdout)
    assert shown["store"] == {
        "path": "/elsewhere",
        "max_size": "80%",
        "min_free": "1GB",
        "max_idle": "0s",
        "scrub": "30d",
        "group_access": False,
    }


def test_show_redacts_passwords(file, tmp_path):
    text = file.read_text().replace(f'_file = "{tmp_path}/password"', ' = "hunter2"')
    file.write_text(text)
    for form in ([], ["--json"]):
        done = config("show", "-c", file, *form)
        assert "hunter2" not in done.output
        assert "***" in done.stdout


def test_schema_is_json_schema():
    schema = json.loads(config("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]["server"]["properties"]) == {
        "listen",
        "admin_listen",
        "admin_token_file",
        "admin_tokens",
        "allow_clients",
        "trusted_proxies",
        "admin_hosts",
        "pages",
        "pages_anonymous_read",
        "tls_certificate",
        "tls_key",
        "htpasswd",
        "max_connections",
        "max_connections_per_client",
        "registry_proxy_metrics",
        "tracing",
        "shutdown_timeout",
        "accel_redirect",
    }


def test_explain_shows_which_rule_decides_about_each_key(tmp_path):
    file = tmp_path / "pullcache.toml"
    file.write_text(
        '[[rules]]\nimages = ["docker.io/library/*"]\nimmutable = ["v*"]\nmax_share = "30%"\n'
        '[[policy]]\nimages = ["docker.io/*"]\n'
        '[upstreams."docker.io"]\ndeny = ["evil/*"]\n'
    )
    done = run("config", "explain", "-c", file, "nginx:v1")
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line]
    rows = {key: " ".join(values) for key, *values in lines}
    assert rows["repository"] == "docker.io/library/nginx"
    assert rows["pulled"] == 'yes (upstreams."docker.io")'
    assert 'ttl of v1 never asked again rules[1].immutable "v*"' in " ".join(done.stdout.split())
    assert rows["max_share"] == "30% rules[1].max_share"
    assert rows["max_idle"] == "never evicted store.max_idle"
    assert rows["tag_ttl"] == "latest: 1m manifests.tag_ttl"
    assert rows["policy"] == "audit policy[1]"
    done = run("config", "explain", "-c", file, "--json", "evil/app")
    values = {row["key"]: row["value"] for row in json.loads(done.stdout)}
    assert values["pulled"].startswith("no: the configuration of this cache does not allow")
    assert run("config", "explain", "-c", file, "ghcr.io/a/b@sha256:" + "0" * 64).exit_code == 0
    assert run("config", "explain", "-c", file, "NOT A NAME").exit_code == 2


def test_explain_shows_the_whole_reason_on_a_narrow_terminal():
    shown = read_terminal("config", "explain", "quay.io/x/y:1", columns=60)
    assert 'upstreams."quay.io"' in shown
    assert "…" not in shown.partition("KEY")[0]
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines())) <= 60
