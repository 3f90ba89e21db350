"""Docker's config.json and the output of credential helpers are parsed strictly."""

import json
from base64 import b64encode

import pytest
from hypothesis import given, strategies as st

from proxy.errors import ConfigError
from proxy.upstream.auth.credentials import (
    DOCKER_HUB_SERVER,
    Credentials,
    docker_server_name,
    helper_program,
    parse_helper_output,
    read_docker_config,
)

BOB = Credentials("bob", "pa:ss")
AUTH = {"auth": b64encode(b"bob:pa:ss").decode()}


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a config.json with this content for a server."""

    def read(content: object, server: str = "ghcr.io"):
        file = tmp_path / "config.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_docker_config(str(file), server)

    return read


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("https://registry-1.docker.io", DOCKER_HUB_SERVER),
        ("https://index.docker.io", DOCKER_HUB_SERVER),
        ("https://GHCR.io", "ghcr.io"),
        ("http://registry.test:5000", "registry.test:5000"),
        ("http://[::1]:5000", "[::1]:5000"),
    ],
)
def test_a_registry_has_the_name_that_docker_login_stores(url, server):
    assert docker_server_name(url) == server


@pytest.mark.parametrize(
    ("name", "server"),
    [
        ("ghcr.io", "ghcr.io"),
        ("https://ghcr.io", "ghcr.io"),
        ("https://ghcr.io/v2/", "ghcr.io"),
        ("http://GHCR.io/v1", "ghcr.io"),
        ("registry.test:5000", "registry.test:5000"),
        (DOCKER_HUB_SERVER, DOCKER_HUB_SERVER),
        ("docker.io", DOCKER_HUB_SERVER),
        ("https://registry-1.docker.io", DOCKER_HUB_SERVER),
    ],
)
def test_credentials_are_found_under_every_name_that_docker_uses(read, name, server):
    assert read({"auths": {"other.test": {}, name: AUTH}}, server) == BOB


@pytest.mark.parametrize(
    "name", ["ghcr.io.evil.test", "evil.test/ghcr.io", "ghcr.io:5000", "ghcr.io/me", "hcr.io", ""]
)
def test_credentials_for_another_server_are_not_found(read, name):
    with pytest.raises(ConfigError, match=r"no credentials for ghcr\.io"):
        read({"auths": {name: AUTH}})


@pytest.mark.parametrize(
    "entry",
    [
        {"username": "bob", "password": "pa:ss"},
        AUTH,
        {**AUTH, "email": "x", "identitytoken": ""},
        {"auth": b64encode(b"bob:pa:ss\0\0").decode()},
    ],
)
def test_username_and_password_may_be_plain_or_encoded(read, entry):
    assert read({"auths": {"ghcr.io": entry}}) == BOB


@pytest.mark.parametrize(
    ("config", "helper"),
    [
        ({"credsStore": "pass"}, "pass"),
        ({"credHelpers": {"ghcr.io": "gh"}, "credsStore": "pass"}, "gh"),
        ({"credHelpers": {"https://ghcr.io": "gh"}}, "gh"),
        ({"credHelpers": {"other.test": "gh"}, "credsStore": "pass"}, "pass"),
        ({"credHelpers": {"ghcr.io": "gh"}, "auths": {"ghcr.io": AUTH}}, "gh"),
    ],
)
def test_a_helper_named_in_the_file_takes_precedence(read, config, helper):
    assert read(config) == helper


def test_a_helper_for_another_registry_is_not_used(read):
    config = {"credHelpers": {"other.test": "gh"}, "auths": {"ghcr.io": AUTH}}
    assert read(config) == BOB


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a docker config.json"),
        (b"[]", "is not a docker config.json"),
        (b"[" * 100_000, "is not a docker config.json"),
        (b" " * 2_000_000 + b"{}", "is not a docker config.json"),
        (b'{"auths":{"ghcr.io":{"auth":"\xffCANARY"}}}', "is not a docker config.json"),
        ({"auths": {"ghcr.io": {"auth": ["CANARY"]}}}, "is not a docker config.json"),
        ({"auths": {"ghcr.io": {"auth": "CANARY!"}}}, "is not base64"),
        (
            {"auths": {"ghcr.io": {"auth": b64encode(b"CANARY").decode()}}},
            "no username or no password",
        ),
        ({"auths": {"ghcr.io": {}}}, "no username or no password"),
        ({"auths": {"ghcr.io": {**AUTH, "identitytoken": "CANARY"}}}, "is an identity token"),
        ({"auths": {"ghcr.io": {"registrytoken": "CANARY"}}}, "is an identity token"),
        ({}, "no credentials for ghcr.io"),
    ],
)
def test_a_file_without_usable_credentials_is_an_error_that_does_not_quote_it(
    read, content, reason
):
    with pytest.raises(ConfigError, match=reason) as caught:
        read(content)
    assert "CANARY" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="none: docker_config: No such file"):
        read_docker_config(str(tmp_path / "none"), "ghcr.io")


@pytest.mark.parametrize("name", ["", "../x", "/bin/sh", "a b", "-x", "x\n", "a;b", ".x"])
def test_a_helpers_name_cannot_leave_the_path(name):
    with pytest.raises(ConfigError, match="not a credential helper's name"):
        helper_program(name)
    assert helper_program("ecr-login") == "docker-credential-ecr-login"


@given(st.binary(max_size=200))
def test_invalid_output_of_a_helper_is_an_error_that_does_not_quote_it(content):
    with pytest.raises(ConfigError, match=r"^docker-credential-x did not print credentials$"):
        parse_helper_output(b"CANARY" + content, "docker-credential-x")


def test_an_identity_token_is_distinguished_from_a_password():
    output = b'{"ServerURL":"x","Username":"bob","Secret":"pa:ss"}'
    assert parse_helper_output(output, "x") == BOB
    with pytest.raises(ConfigError, match="identity token"):
        parse_helper_output(b'{"Username":"<token>","Secret":"CANARY"}', "x")
