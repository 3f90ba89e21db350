"""`pullcache client-config`: the files of each client, parsed as the client parses them."""

import json
import os
import re
import tomllib
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import yaml
from click.testing import Result

from proxy.config.client_files import CLIENT_FILES
from tests.support import commands
from tests.support.certificates import Authority

EXAMPLES = Path(__file__).parents[2] / "config" / "clients"
UPSTREAMS = """\
[upstreams."ghcr.io"]
[upstreams."docker.io"]
url = "https://hub.example"
[upstreams."registry.example:5000"]
url = "http://registry.example:5000"
"""
NAMES = ["docker.io", "ghcr.io", "registry.example:5000"]
PLAIN, TLS = "http://mirror:5000", "https://mirror.example"


@pytest.fixture(autouse=True)
def _docker_with_the_containerd_store(tmp_path_factory, monkeypatch):
    docker = tmp_path_factory.mktemp("bin") / "docker"
    docker.write_text(f"#!/bin/sh\necho '\"29.0\" {CONTAINERD_STORE}'\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}:{os.environ['PATH']}")


def run(*arguments: str | Path, config: str = UPSTREAMS) -> Result:
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config)
        file.flush()
        return commands.run("client-config", *arguments, "-c", file.name)


def files(client: str, address: str, tmp_path: Path) -> dict[str, str]:
    """Return the content of the files for a client, by path."""
    done = run(client, "--address", address, "-o", tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    found = {
        str(path.relative_to(tmp_path)): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    assert {str(tmp_path / name) for name in found} == {*done.stdout.splitlines()}
    return found


def mirrors_of(registries_conf: str) -> list[tuple[str, str, bool, str, bool]]:
    return [
        (
            one["prefix"],
            one["location"],
            one.get("insecure", False),
            one["mirror"][0]["location"],
            one["mirror"][0].get("insecure", False),
        )
        for one in tomllib.loads(registries_conf)["registry"]
    ]


@pytest.mark.parametrize(("client", "prefix"), [("containerd", ""), ("docker", "certs.d/")])
@pytest.mark.parametrize("address", [PLAIN, TLS])
def test_a_hosts_toml_for_each_upstream_falls_back_to_it(tmp_path, client, prefix, address):
    found = files(client, address, tmp_path)
    servers = ["https://hub.example", "https://ghcr.io", "http://registry.example:5000"]
    assert {name: tomllib.loads(text) for name, text in found.items()} == {
        f"{prefix}{name}/hosts.toml": {
            "server": server,
            "host": {address: {"capabilities": ["pull", "resolve"], "dial_timeout": "2s"}},
        }
        for name, server in zip(NAMES, servers, strict=True)
    }


DAEMON_JSON = ("--docker-file", "daemon.json")


def test_docker_s_daemon_json_has_a_mirror_and_no_comments(tmp_path):
    done = run("docker", *DAEMON_JSON, "--address", PLAIN, "-o", tmp_path)
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/daemon.json\n")
    assert json.loads((tmp_path / "daemon.json").read_text()) == {"registry-mirrors": [PLAIN]}


def test_docker_s_comments_say_for_which_docker_the_file_is():
    text = run("docker", *DAEMON_JSON, "--address", PLAIN).stdout
    assert "# /etc/docker/daemon.json\n" in text
    assert "systemctl reload docker" in text
    assert "--docker-file hosts.toml" in text
    assert "private CA" not in text
    text = run("docker", *DAEMON_JSON, "--address", TLS).stdout
    assert "private CA: /etc/docker/certs.d/mirror.example/ca.crt" in text
    text = run("docker", "--address", PLAIN).stdout
    assert "# /etc/docker/certs.d/docker.io/hosts.toml\n" in text
    assert "stops verifying Docker Hub's own certificate" in text
    assert "--docker-file daemon.json" in text


CONTAINERD_STORE = '[["driver-type","io.containerd.snapshotter.v1"]]'
CLASSIC_STORE = '[["Backing Filesystem","extfs"],["Supports d_type","true"]]'


@pytest.mark.parametrize(
    ("answer", "file"),
    [
        (f'"29.0.1" {CONTAINERD_STORE}', "hosts.toml"),
        (f'"28.5.2" {CONTAINERD_STORE}', "hosts.toml"),
        (f'"26.1.4" {CONTAINERD_STORE}', "daemon.json"),
        (f'"29.0.1" {CLASSIC_STORE}', "daemon.json"),
        (f'"20.10.24+dfsg1" {CLASSIC_STORE}', "daemon.json"),
    ],
)
def test_docker_is_asked_which_file_it_needs(answer, file, tmp_path, monkeypatch):
    docker = tmp_path / "docker"
    docker.write_text(f"#!/bin/sh\n[ \"$1\" = info ] && echo '{answer}'\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = run("docker", "--address", PLAIN, "-o", tmp_path / "made")
    assert (done.exit_code, done.stderr) == (0, "")
    assert [path.rpartition("/")[2] for path in {*done.stdout.splitlines()}] == [file] * len(
        done.stdout.splitlines()
    )


def test_without_a_docker_that_answers_it_says_what_was_assumed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run("docker", "--address", PLAIN)
    assert (done.exit_code, "hosts.toml" in done.stdout) == (0, True)
    assert "docker info does not answer; this is for Docker 28 and later" in done.stderr


def test_the_option_for_docker_s_file_is_for_docker_only():
    assert run("k3s", *DAEMON_JSON, "--address", PLAIN).exit_code == 2


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_registries_conf_has_the_registry_in_the_path_of_the_mirror(tmp_path, client):
    found = files(client, PLAIN, tmp_path / "http")
    assert mirrors_of(found["pullcache.conf"]) == [
        ("docker.io", "hub.example", False, "mirror:5000", True),
        ("ghcr.io", "ghcr.io", False, "mirror:5000/ghcr.io", True),
    ]
    assert (
        "# Not for registry.example:5000: a path cannot contain a port.\n"
        in found["pullcache.conf"]
    )
    found = files(client, TLS, tmp_path / "https")
    assert {one[3:] for one in mirrors_of(found["pullcache.conf"])} == {
        ("mirror.example", False),
        ("mirror.example/ghcr.io", False),
    }


def test_docker_hub_keeps_its_name_unless_its_url_is_changed():
    text = run("podman", "--address", PLAIN, config="").stdout
    assert mirrors_of(text) == [("docker.io", "docker.io", False, "mirror:5000", True)]


def test_an_upstream_with_an_http_url_is_insecure():
    config = '[upstreams."private"]\nurl = "http://10.0.0.1:5000"\n'
    (_, mirror) = mirrors_of(run("podman", "--address", PLAIN, config=config).stdout)
    assert mirror == ("private", "10.0.0.1:5000", True, "mirror:5000/private", True)


@pytest.mark.parametrize(("address", "own"), [(PLAIN, {"http": True}), (TLS, {})])
def test_buildkit_has_a_table_for_the_mirror_itself(tmp_path, address, own):
    found = tomllib.loads(files("buildkit", address, tmp_path)["buildkitd.toml"])
    host = address.partition("://")[2]
    mirrored = {name: {"mirrors": [host]} for name in NAMES}
    assert found == {"registry": {**mirrored, host: own}}


@pytest.mark.parametrize("address", [PLAIN, TLS])
def test_k3s_has_an_endpoint_for_each_upstream(tmp_path, address):
    found = yaml.safe_load(files("k3s", address, tmp_path)["registries.yaml"])
    assert found == {"mirrors": {name: {"endpoint": [address]} for name in NAMES}}


@pytest.mark.parametrize("client", CLIENT_FILES)
@pytest.mark.parametrize("address", [PLAIN, TLS])
def test_the_header_of_a_file_says_where_it_belongs_and_what_to_restart(client, address):
    done = run(client, "--address", address)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.match(r"# /etc/[a-z]+/\S+\n", done.stdout)
    assert re.search(r"^# .*(systemctl|restart)", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout.endswith("\n")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        (":5001", "http://127.0.0.1:5001"),
        ("[::]:5001", "http://127.0.0.1:5001"),
        ("0.0.0.0:5001", "http://127.0.0.1:5001"),
        ("[::1]:5001", "http://[::1]:5001"),
        ("cache.example:5001", "http://cache.example:5001"),
    ],
)
def test_the_default_address_is_the_first_of_server_listen(listen, address):
    done = run("k3s", config=f'[server]\nlisten = ["{listen}", "127.0.0.1:1"]\n')
    assert f'"{address}"' in done.stdout
    is_loopback = "example" not in listen
    assert done.stderr == (
        f"{address} works on this machine only; pass --address URL for others\n" * is_loopback
    )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize(
    ("listen", "names", "address"),
    [
        ("[::]:5000", ["DNS:cache.example", "DNS:other.example"], "https://cache.example:5000"),
        ("[::]:5000", ["DNS:*.example", "IP:192.0.2.7"], "https://192.0.2.7:5000"),
        ("127.0.0.1:5000", ["DNS:cache.example", "IP:127.0.0.1"], "https://127.0.0.1:5000"),
        ("127.0.0.1:5000", ["DNS:cache.example"], "https://cache.example:5000"),
        (
            "mirror.example:443",
            ["DNS:a.example", "DNS:mirror.example"],
            "https://mirror.example:443",
        ),
    ],
)
def test_with_a_certificate_the_address_is_https_with_a_name_it_is_valid_for(
    authority, listen, names, address
):
    certificate, key = authority.issue("client-config", *names)
    config = f'''
        [server]
        listen = ["{listen}"]
        tls_certificate = ["{certificate}"]
        tls_key = ["{key}"]
    '''
    done = run("k3s", config=config)
    assert done.exit_code == 0, done.stderr
    assert yaml.safe_load(done.stdout)["mirrors"] == {"docker.io": {"endpoint": [address]}}
    assert ("--address URL" in done.stderr) == ("127.0.0.1" in address)
    assert mirrors_of(run("podman", config=config).stdout) == [
        ("docker.io", "docker.io", False, address.partition("://")[2], False)
    ]


def test_with_an_unreadable_certificate_the_address_must_be_given(tmp_path):
    config = f'[server]\ntls_certificate = ["{tmp_path}/none.pem"]\n'
    done = run("docker", config=config)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "none.pem" in done.stderr
    assert "--address URL" in done.stderr
    assert run("docker", "--address", TLS, config=config).exit_code == 0


def test_an_address_needs_no_scheme():
    assert run("k3s", "--address", "mirror:5000").stdout == run("k3s", "--address", PLAIN).stdout


async def test_the_default_address_is_where_the_daemon_listens(program):
    done = await commands.run_on(program, "client-config", "k3s")
    assert done.exit_code == 0, done.stderr
    assert f'"{program.url}"' in done.stdout


def test_with_port_0_the_address_must_be_given():
    done = run("k3s", config='[server]\nlisten = ["127.0.0.1:0"]\n')
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--address URL" in done.stderr


@pytest.mark.parametrize(
    "address", ["mirror:port", "ftp://mirror", "http://mirror/path", 'http://a"b', "http://u:p@m"]
)
def test_an_invalid_address_is_a_usage_error(address):
    done = run("docker", "--address", address)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "u:p" not in done.stderr


def test_if_a_file_exists_nothing_is_written(tmp_path):
    daemon = tmp_path / "daemon.json"
    daemon.write_text("{}")
    done = run("docker", *DAEMON_JSON, "--address", PLAIN, "-o", tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"pullcache: {daemon} exists; nothing was written\n"
    assert [*tmp_path.iterdir()] == [daemon]
    assert daemon.read_text() == "{}"


def test_the_examples_in_config_clients_are_the_command_s_output(tmp_path):
    """To regenerate: rm -r config/clients/$c; pullcache client-config $c -o config/clients/$c."""
    for client in CLIENT_FILES:
        assert run(client, "-o", tmp_path / client, config="").exit_code == 0
    older = run("docker", *DAEMON_JSON, "-o", tmp_path / "docker-daemon-json", config="")
    assert older.exit_code == 0
    written, examples = (
        {
            str(path.relative_to(root)): path.read_text()
            for path in root.rglob("*")
            if path.is_file()
        }
        for root in (tmp_path, EXAMPLES)
    )
    assert written == examples


def only(client: str, tmp_path: Path) -> dict[str, str]:
    """Return the files with which a client asks only the cache, by path."""
    done = run(client, "--only", "--address", PLAIN, "-o", tmp_path)
    assert done.exit_code == 0
    return {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*.*ml")}


@pytest.mark.parametrize(("client", "prefix"), [("docker", "certs.d/"), ("containerd", "")])
def test_only_makes_the_cache_the_server_of_every_registry(client, prefix, tmp_path):
    found = only(client, tmp_path)
    assert found.keys() == {f"{prefix}{name}/hosts.toml" for name in [*NAMES, "_default"]}
    for text in found.values():
        assert tomllib.loads(text)["server"] == PLAIN
        assert [*tomllib.loads(text)["host"]] == [PLAIN]


def test_only_has_no_registry_mirrors_for_docker_and_says_why(tmp_path):
    done = run("docker", "--only", "--address", PLAIN, "-o", tmp_path)
    assert not (tmp_path / "daemon.json").exists()
    assert "cannot be restricted to the cache by registry-mirrors" in done.stderr


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_only_puts_the_cache_in_the_place_of_the_registry_for_podman_and_crio(client, tmp_path):
    run(client, "--only", "--address", PLAIN, "-o", tmp_path)
    found = tomllib.loads((tmp_path / "pullcache.conf").read_text())["registry"]
    assert [(one["prefix"], one["location"], "mirror" in one) for one in found] == [
        ("docker.io", "mirror:5000", False),
        ("ghcr.io", "mirror:5000/ghcr.io", False),
    ]


def test_only_sends_k3s_to_the_cache_for_all_registries(tmp_path):
    found = only("k3s", tmp_path)
    mirrors = yaml.safe_load(found["registries.yaml"])["mirrors"]
    assert mirrors == {name: {"endpoint": [PLAIN]} for name in [*NAMES, "*"]}
    assert "--disable-default-registry-endpoint" in found["registries.yaml"]


def test_only_says_that_buildkit_cannot_be_restricted(tmp_path):
    done = run("buildkit", "--only", "--address", PLAIN, "-o", tmp_path)
    assert "BuildKit cannot be restricted" in done.stderr


def test_comments_on_a_narrow_terminal_are_broken_once(tmp_path):
    shown = commands.read_terminal(
        *("client-config", "docker", "--docker-file", "hosts.toml", "--store", tmp_path), columns=60
    )
    comments = [line for line in shown.splitlines() if line.startswith("# ")]
    assert max(map(len, comments)) <= 60
    assert "# Read at every pull, no restart needed." in " ".join(comments)
