"""`pullcache client-config`: the files of each client, as the client's own parser would read them."""

import json
import re
import tomllib
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import yaml
from click.testing import CliRunner, Result

from proxy.cli import main
from proxy.cli.files.client_files import CLIENT_FILES
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


def run(*arguments: str | Path, config: str = UPSTREAMS) -> Result:
    with NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config)
        file.flush()
        return CliRunner().invoke(main, ["client-config", *map(str, arguments), "-c", file.name])


def files(client: str, address: str, tmp_path: Path) -> dict[str, str]:
    """Return what is written for a client, by its path."""
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
    found.pop("daemon.json", None)
    servers = ["https://hub.example", "https://ghcr.io", "http://registry.example:5000"]
    assert {name: tomllib.loads(text) for name, text in found.items()} == {
        f"{prefix}{name}/hosts.toml": {
            "server": server,
            "host": {address: {"capabilities": ["pull", "resolve"], "dial_timeout": "2s"}},
        }
        for name, server in zip(NAMES, servers, strict=True)
    }


def test_docker_gets_a_mirror_of_docker_hub_in_pure_json(tmp_path):
    assert json.loads(files("docker", PLAIN, tmp_path)["daemon.json"]) == {
        "registry-mirrors": [PLAIN]
    }


def test_docker_is_told_which_of_the_two_and_why():
    said = run("docker", "--address", PLAIN).stdout
    assert "# /etc/docker/daemon.json\n" in said
    assert "# /etc/docker/certs.d/docker.io/hosts.toml\n" in said
    assert "With the containerd image store" in said
    assert "stop verifying Docker Hub's own certificate" in said
    assert "systemctl reload docker" in said


@pytest.mark.parametrize("client", ["podman", "crio"])
def test_registries_conf_names_the_registry_in_the_mirror_s_path(tmp_path, client):
    found = files(client, PLAIN, tmp_path / "http")
    assert mirrors_of(found["pullcache.conf"]) == [
        ("docker.io", "hub.example", False, "mirror:5000", True),
        ("ghcr.io", "ghcr.io", False, "mirror:5000/ghcr.io", True),
    ]
    assert (
        "# Not for registry.example:5000: a path cannot hold a port.\n" in found["pullcache.conf"]
    )
    found = files(client, TLS, tmp_path / "https")
    assert {one[3:] for one in mirrors_of(found["pullcache.conf"])} == {
        ("mirror.example", False),
        ("mirror.example/ghcr.io", False),
    }


def test_docker_hub_keeps_its_name_where_it_is_docker_hub():
    said = run("podman", "--address", PLAIN, config="").stdout
    assert mirrors_of(said) == [("docker.io", "docker.io", False, "mirror:5000", True)]


def test_an_upstream_in_clear_is_asked_in_clear_when_the_cache_is_down():
    config = '[upstreams."private"]\nurl = "http://10.0.0.1:5000"\n'
    (_, mirror) = mirrors_of(run("podman", "--address", PLAIN, config=config).stdout)
    assert mirror == ("private", "10.0.0.1:5000", True, "mirror:5000/private", True)


@pytest.mark.parametrize(("address", "own"), [(PLAIN, {"http": True}), (TLS, {})])
def test_buildkit_is_told_of_the_mirror_in_its_own_table(tmp_path, address, own):
    found = tomllib.loads(files("buildkit", address, tmp_path)["buildkitd.toml"])
    host = address.partition("://")[2]
    mirrored = {name: {"mirrors": [host]} for name in NAMES}
    assert found == {"registry": {**mirrored, host: own}}


@pytest.mark.parametrize("address", [PLAIN, TLS])
def test_k3s_gets_an_endpoint_for_each_upstream(tmp_path, address):
    found = yaml.safe_load(files("k3s", address, tmp_path)["registries.yaml"])
    assert found == {"mirrors": {name: {"endpoint": [address]} for name in NAMES}}


@pytest.mark.parametrize("client", CLIENT_FILES)
@pytest.mark.parametrize("address", [PLAIN, TLS])
def test_each_file_is_headed_by_where_it_goes_and_what_is_to_be_restarted(client, address):
    done = run(client, "--address", address)
    assert (done.exit_code, done.stderr) == (0, "")
    assert re.match(r"# /etc/[a-z]+/\S+\n", done.stdout)
    assert re.search(r"^# .*(systemctl|restart)", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 120
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
def test_the_address_is_that_which_the_cache_listens_on(listen, address):
    done = run("k3s", config=f'[server]\nlisten = ["{listen}", "127.0.0.1:1"]\n')
    assert f'"{address}"' in done.stdout
    # Nobody else connects to loopback, and what serves every address has names that only people know.
    is_ours = "example" not in listen
    assert done.stderr == (
        f"{address} is for this machine; for others say --address URL\n" * is_ours
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
def test_with_a_certificate_clients_are_told_https_and_a_name_that_it_has(
    authority, listen, names, address
):
    certificate, key = authority.issue("client-config", *names)
    config = f'[server]\nlisten = ["{listen}"]\ntls_certificate = ["{certificate}"]\ntls_key = ["{key}"]\n'
    done = run("k3s", config=config)
    assert done.exit_code == 0, done.stderr
    assert yaml.safe_load(done.stdout)["mirrors"] == {"docker.io": {"endpoint": [address]}}
    assert ("--address URL" in done.stderr) == ("127.0.0.1" in address)
    # A mirror by https is not told to be insecure.
    assert mirrors_of(run("podman", config=config).stdout) == [
        ("docker.io", "docker.io", False, address.partition("://")[2], False)
    ]


def test_a_certificate_that_cannot_be_read_leaves_the_address_to_be_said(tmp_path):
    config = f'[server]\ntls_certificate = ["{tmp_path}/none.pem"]\n'
    done = run("docker", config=config)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "none.pem" in done.stderr
    assert "--address URL" in done.stderr
    assert run("docker", "--address", TLS, config=config).exit_code == 0


def test_an_address_that_only_a_start_decides_is_asked_for():
    done = run("k3s", config='[server]\nlisten = ["127.0.0.1:0"]\n')
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--address URL" in done.stderr


@pytest.mark.parametrize(
    "address", ["mirror:5000", "ftp://mirror", "http://mirror/path", 'http://a"b', "http://u:p@m"]
)
def test_an_address_that_is_none_is_a_usage_error(address):
    done = run("docker", "--address", address)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "u:p" not in done.stderr


def test_no_file_is_overwritten_and_then_none_is_written(tmp_path):
    daemon = tmp_path / "daemon.json"
    daemon.write_text("{}")
    done = run("docker", "--address", PLAIN, "-o", tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert (
        done.stderr == f"pullcache: {daemon} exists; it is left as it is, and nothing was written\n"
    )
    assert [*tmp_path.iterdir()] == [daemon]
    assert daemon.read_text() == "{}"


def test_the_examples_are_what_the_command_says_of_the_default_address(tmp_path):
    """To write them anew: for c in ...; pullcache client-config $c -o config/clients/$c."""
    for client in CLIENT_FILES:
        assert run(client, "-o", tmp_path / client, config="").exit_code == 0
    written, examples = (
        {
            str(path.relative_to(root)): path.read_text()
            for path in root.rglob("*")
            if path.is_file()
        }
        for root in (tmp_path, EXAMPLES)
    )
    assert written == examples
