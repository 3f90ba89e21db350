"""`[fleet]`: where the server is, and what would not work."""

import pytest

from proxy.config.load import world_readable_files
from proxy.config.values import FleetName, ValkeyUrl
from proxy.errors import ConfigError
from tests.test_config import load_text

FLEET = '[fleet]\nvalkey = "valkey://10.0.0.1"\n'


@pytest.mark.parametrize(
    ("text", "hosts", "database"),
    [
        ("valkey://db", [("db", 6379)], 0),
        ("redis://10.0.0.1:7000/3", [("10.0.0.1", 7000)], 3),
        ("valkeys://cache@[fd00::1]:6380/", [("fd00::1", 6380)], 0),
        ("rediss://[fd00::1]", [("fd00::1", 6379)], 0),
        ("valkey://a,b:1,c/2?master=x", [("a", 26379), ("b", 1), ("c", 26379)], 2),
        ("unix:///run/valkey.sock", [], 0),
        ("", [], 0),
    ],
)
def test_the_url_of_a_server_has_hosts_and_a_database(text, hosts, database):
    url = ValkeyUrl.parse(text)
    assert (url.hosts, url.database) == (hosts, database)


def test_the_url_of_a_server_says_how_to_connect():
    assert ValkeyUrl.parse("valkeys://a").is_tls
    assert not ValkeyUrl.parse("valkey://a").is_tls
    assert ValkeyUrl.parse("valkey://cache@a").username == "cache"
    assert ValkeyUrl.parse("valkey://a").username == ""
    assert ValkeyUrl.parse("unix:///run/valkey.sock").unix_path == "/run/valkey.sock"
    assert ValkeyUrl.parse("valkey://a").unix_path == ""
    assert ValkeyUrl.parse("valkey://a,b?master=cache").master == "cache"
    assert ValkeyUrl.parse("valkey://a,b").master == "mymaster"


@pytest.mark.parametrize("text", ["db", "http://db", "valkey://", "valkey://a/b", "unix://x"])
def test_a_wrong_url_of_a_server_says_what_to_write(text):
    with pytest.raises(ValueError, match="valkey://host:6379/0"):
        ValkeyUrl.parse(text)


def test_a_port_that_does_not_exist_is_rejected():
    with pytest.raises(ValueError, match="65535"):
        ValkeyUrl.parse("valkey://a:1,b:70000")


def test_a_password_in_the_url_is_refused_and_not_quoted():
    with pytest.raises(ValueError, match="valkey_password_file") as caught:
        ValkeyUrl.parse("valkey://user:geheim@db")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "a b", "a{b}", "x" * 65])
def test_a_name_of_a_fleet_has_no_braces(text):
    with pytest.raises(ValueError, match="64 letters"):
        FleetName.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[fleet]\naddress = "http://10.0.0.7:5000"\n', "valkey is not set"),
        (FLEET, "address is not set"),
        (f'{FLEET}address = "http://0.0.0.0:5000"\n', "no other node can connect"),
        (f'{FLEET}address = "http://[::]:5000"\n', "no other node can connect"),
        (f'{FLEET}address = "http://localhost:5000"\n', "leads each node to itself"),
        (f'{FLEET}address = "http://10.0.0.7:5000"\n', "token_file is not set"),
        (f"{FLEET}children = 0\n", "children"),
    ],
)
def test_a_fleet_that_would_not_work_is_an_error(tmp_path, text, reason):
    with pytest.raises(ConfigError, match=reason):
        load_text(text, tmp_path)


def test_a_fleet_needs_a_server_an_address_and_a_token(tmp_path):
    secret = tmp_path / "token"
    secret.write_text("geheim\n")
    secret.chmod(0o644)
    fleet = load_text(
        f'{FLEET}address = "http://10.0.0.7:5000"\ntoken_file = "{secret}"\n', tmp_path
    )
    assert fleet.fleet.is_on
    assert fleet.fleet.address.host == "10.0.0.7"
    assert fleet.fleet.read_token() == "geheim"
    assert world_readable_files(fleet) == [str(secret)]


def test_nodes_of_one_machine_need_no_token(tmp_path):
    text = '[fleet]\nvalkey = "unix:///run/valkey.sock"\naddress = "http://127.0.0.1:5000"\n'
    settings = load_text(text, tmp_path).fleet
    assert settings.is_on
    assert settings.read_token() == ""


def test_no_fleet_is_the_default(tmp_path):
    assert not load_text("", tmp_path).fleet.is_on
