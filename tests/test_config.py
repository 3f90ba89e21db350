"""Loading the configuration: sources, errors that name their place, secrets, and its output."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from proxy.config import (
    Config,
    dump,
    find_config_file,
    iter_keys,
    json_schema,
    load,
    to_toml,
)
from proxy.config.schema import RENAMED_KEYS
from proxy.errors import ConfigError


def load_text(text: str, directory: Path, **sources: dict[str, Any]) -> Config:
    """Load a file with this text, and `environ` and `overrides`."""
    file = directory / "pullcache.toml"
    file.write_text(text, encoding="utf-8")
    return load(file, sources.get("environ", {}), sources.get("overrides", {}))


# Sources.


def test_the_default_caches_docker_hub_for_this_machine():
    config = load(None, {}, {}, is_root=True)
    assert config.server.listen == ("127.0.0.1:5000",)
    assert config.store.path == Path("/var/cache/pullcache")
    assert config.store.max_size.to_bytes(1) == 50 * 10**9
    assert config.store.min_free == 10**9
    assert config.manifests.ttl == 600.0
    assert config.manifests.tag_ttl == {"latest": 60.0}
    assert {name: one.url for name, one in config.upstreams.items()} == {
        "docker.io": "https://registry-1.docker.io"
    }


@pytest.mark.parametrize(
    ("environ", "store"),
    [
        ({"XDG_CACHE_HOME": "/fast", "HOME": "/home/me"}, "/fast/pullcache"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/pullcache"),
        ({"HOME": "/home/me"}, "/home/me/.cache/pullcache"),
        ({"HOME": "/home/me", "PULLCACHE_STORE_PATH": "/mine"}, "/mine"),
    ],
)
def test_without_a_file_a_user_other_than_root_gets_a_store_at_home(environ, store):
    assert load(None, environ, {}, is_root=False).store.path == Path(store)


def test_with_a_file_the_default_store_is_the_same_for_every_user(tmp_path):
    (tmp_path / "f").write_text("offline = true")
    assert load(tmp_path / "f", {}, {}, is_root=False).store.path == Path("/var/cache/pullcache")


def test_options_override_the_environment_and_it_overrides_the_file(tmp_path):
    text = 'fetch.attempts = 2\nfetch.max_downloads = 2\nlog.level = "debug"'
    environ = {"PULLCACHE_FETCH_ATTEMPTS": "3", "PULLCACHE_FETCH_MAX_DOWNLOADS": "3"}
    overrides = {"fetch": {"attempts": 4, "max_downloads": None}, "server": {"listen": None}}
    config = load_text(text, tmp_path, environ=environ, overrides=overrides)
    assert (config.fetch.attempts, config.fetch.max_downloads, config.log.level) == (4, 3, "debug")
    assert config.server.listen == ("127.0.0.1:5000",)


def test_the_environment_can_set_every_type_of_value():
    environ = {
        "PULLCACHE_OFFLINE": "true",
        "PULLCACHE_SERVER_LISTEN": "127.0.0.1:1, [::1]:2",
        "PULLCACHE_STORE_PATH": "/s",
        "PULLCACHE_STORE_MAX_SIZE": "80%",
        "PULLCACHE_MANIFESTS_TAG_TTL": "v*=1d, *=5s",
        "PULLCACHE_LOG_FORMAT": "json",
        "HOME": "/root",
    }
    config = load(None, environ, {})
    assert config.offline is True
    assert config.server.listen == ("127.0.0.1:1", "[::1]:2")
    assert config.store.path == Path("/s")
    assert config.store.max_size.to_bytes(1000) == 800
    assert list(config.manifests.tag_ttl.items()) == [("v*", 86400.0), ("*", 5.0)]
    assert config.log.format == "json"


def test_pullcache_config_names_the_file_and_an_option_overrides_it(tmp_path):
    (tmp_path / "one").write_text("fetch.attempts = 1")
    (tmp_path / "two").write_text("fetch.attempts = 2")
    environ = {"PULLCACHE_CONFIG": str(tmp_path / "one")}
    assert find_config_file(None, environ) == tmp_path / "one"
    assert find_config_file(tmp_path / "two", environ) == tmp_path / "two"


def test_the_file_of_the_system_is_read_unless_another_is_named(tmp_path, monkeypatch):
    system = tmp_path / "system.toml"
    monkeypatch.setattr(import_module("proxy.config.load"), "SYSTEM_FILE", system)
    for environ in ({}, {"PULLCACHE_CONFIG": ""}):
        assert find_config_file(None, environ) is None
    system.write_text("offline = true")
    for environ in ({}, {"PULLCACHE_CONFIG": ""}):
        assert find_config_file(None, environ) == system
    assert find_config_file(None, {"PULLCACHE_CONFIG": "/other"}) == Path("/other")
    assert find_config_file(tmp_path / "mine", {}) == tmp_path / "mine"


def test_an_empty_variable_counts_as_unset(tmp_path):
    (tmp_path / "password").write_text("secret")
    text = f"""
        [upstreams."docker.io"]
        username = "me"
        password_file = "{tmp_path}/password"
    """
    # What compose.yaml passes on if the variables of the host are not set.
    environ = {
        "PULLCACHE_UPSTREAMS_DOCKER_IO_USERNAME": "",
        "PULLCACHE_UPSTREAMS_DOCKER_IO_PASSWORD": "",
        "PULLCACHE_SERVER_LISTEN": "",
        "PULLCACHE_OFFLINE": "",
    }
    config = load_text(text, tmp_path, environ=environ)
    assert config == load_text(text, tmp_path)
    assert config.upstreams["docker.io"].username == "me"
    assert config.upstreams["docker.io"].read_password() == "secret"


@pytest.mark.parametrize("name", ["ghcr.io", "registry.k8s.io", "my.registry.example"])
def test_a_registry_s_name_without_quotes_gets_an_error_that_shows_them(name, tmp_path):
    with pytest.raises(ConfigError, match="quotes") as caught:
        load_text(f"[upstreams.{name}]\nurl = 'https://x'", tmp_path)
    assert f'[upstreams."{name}"]' in str(caught.value)
    with pytest.raises(ConfigError, match="quotes"):
        load_text(f"[upstreams.{name}]", tmp_path)


def test_the_variables_that_kubernetes_sets_for_a_service_are_ignored():
    environ = {
        "PULLCACHE_SERVICE_HOST": "10.0.0.1",
        "PULLCACHE_SERVICE_PORT_HTTP": "5000",
        "PULLCACHE_PORT": "tcp://10.0.0.1:5000",
        "PULLCACHE_PORT_5000_TCP_ADDR": "10.0.0.1",
    }
    assert load(None, environ, {}, is_root=True) == load(None, {}, {}, is_root=True)


def test_upstreams_of_all_sources_are_merged_key_by_key(tmp_path):
    text = """
        [upstreams."docker.io"]
        deny = ["*/private"]
        [upstreams."ghcr.io"]
        url = "https://ghcr.io"
    """
    overrides = {"upstreams": {"docker.io": {"url": "http://127.0.0.1:1"}}}
    config = load_text(text, tmp_path, overrides=overrides)
    assert config.upstreams["docker.io"].url == "http://127.0.0.1:1"
    assert config.upstreams["docker.io"].deny == ("*/private",)
    assert config.upstreams["ghcr.io"].allow == ("*",)


def test_tag_ttl_keeps_the_order_of_the_file_and_replaces_the_default(tmp_path):
    config = load_text('[manifests.tag_ttl]\n"v*" = "1d"\n"*" = "5s"', tmp_path)
    assert list(config.manifests.tag_ttl) == ["v*", "*"]


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("gcr.io", "https://gcr.io"),
        ("ghcr.io", "https://ghcr.io"),
        ("mcr.microsoft.com", "https://mcr.microsoft.com"),
        ("public.ecr.aws", "https://public.ecr.aws"),
        ("quay.io", "https://quay.io"),
        ("registry.k8s.io", "https://registry.k8s.io"),
    ],
)
def test_a_well_known_registry_needs_no_url(name, url, tmp_path):
    config = load_text(f'[upstreams."{name}"]', tmp_path)
    assert sorted(config.upstreams) == sorted(["docker.io", name])
    assert config.upstreams[name].url == url
    assert f'[upstreams."{name}"]\nurl = "{url}"\n' in to_toml(config)


def test_the_url_of_a_well_known_registry_can_be_changed(tmp_path):
    config = load_text('[upstreams."quay.io"]\nurl = "https://mirror.example"', tmp_path)
    assert config.upstreams["quay.io"].url == "https://mirror.example"


def test_a_well_known_registry_is_an_upstream_only_if_it_is_configured():
    assert list(load(None, {}, {}).upstreams) == ["docker.io"]


def test_the_environment_can_set_every_key_of_an_upstream(tmp_path):
    environ = {
        "PULLCACHE_UPSTREAMS_DOCKER_IO_USERNAME": "me",
        "PULLCACHE_UPSTREAMS_DOCKER_IO_PASSWORD": "hunter2",
        "PULLCACHE_UPSTREAMS_DOCKER_IO_DENY": "a/*, b/*",
        "PULLCACHE_UPSTREAMS_MY_REGISTRY_TEST_5000_PASSWORD_FILE": "/secret",
        "PULLCACHE_UPSTREAMS_GHCR_IO_CREDENTIAL_HELPER": "pass",
    }
    text = """
        [upstreams."my-registry.test:5000"]
        url = "https://my-registry.test:5000"
        username = "you"
    """
    config = load_text(text, tmp_path, environ=environ)
    hub = config.upstreams["docker.io"]
    assert (hub.username, hub.read_password(), hub.deny) == ("me", "hunter2", ("a/*", "b/*"))
    assert config.upstreams["my-registry.test:5000"].password_file == "/secret"
    assert config.upstreams["ghcr.io"].url == "https://ghcr.io"
    assert config.upstreams["ghcr.io"].credential_helper == "pass"
    assert "hunter2" not in to_toml(config)


def test_a_variable_that_matches_two_upstreams_is_an_error(tmp_path):
    text = """
        upstreams."a-b.test".url = "https://a-b.test"
        upstreams."a.b.test".url = "https://a.b.test"
    """
    load_text(text, tmp_path)
    with pytest.raises(ConfigError, match="PULLCACHE_UPSTREAMS_A_B_TEST_URL: matches more"):
        load_text(text, tmp_path, environ={"PULLCACHE_UPSTREAMS_A_B_TEST_URL": "https://x"})


# Errors.


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stor.path = '/x'", "stor: no such key (did you mean store?)"),
        ("fetch.parallel_below = '1MB'", "fetch.parallel_below: was renamed to fetch.parallel_max"),
        ("store.max_sze = '1GB'", "store.max_sze: no such key (did you mean max_size?)"),
        ("store = 3", "store: expected a table (write [store])"),
        ("store.max_size = '1XB'", "store.max_size: '1XB' is not a size (write"),
        ("store.max_size = '120%'", "store.max_size: '120%' is not a percentage (write"),
        ("store.path = ''", "store.path: expected a directory path"),
        ("server.listen = []", "server.listen: expected array of length >= 1 (for instance"),
        ("server.listen = ['a:1', 'b']", "server.listen[1]: 'b' is not host:port (write"),
        ("server.accel_redirect = 'x'", "'x' is not a path of nginx alone (write"),
        ("server.accel_redirect = '/v2/x'", "is not a path of nginx alone (write"),
        ("server.accel_redirect = '/a b'", "is not a path of nginx alone (write"),
        ("server.accel_redirect = '/x'", "accel_redirect needs trusted_proxies (name"),
        ("server.listen = ':1'", 'got str (for instance: listen = ["127.0.0.1:5000"])'),
        ("fetch.attempts = 0", "fetch.attempts: expected int >= 1 (for instance: attempts = 5)"),
        ("fetch.attempts = '5'", "fetch.attempts: expected int, got str (for instance"),
        ("fetch.stall_timeout = '0s'", "fetch.stall_timeout: '0s' must be longer than 0 (write"),
        ("log.level = 'loud'", "(write one of debug, info, warning, error)"),
        ("manifests.tag_ttl.'a*' = 'x'", "manifests.tag_ttl.\"a*\": 'x' is not a duration (write"),
        ("manifests.tag_ttl = 1", "manifests.tag_ttl: expected a table (write"),
        ("offline = 'no'", "offline: expected bool, got str (for instance: offline = false)"),
        ("upstreams.'my.io'.deny = []", 'upstreams."my.io".url: is missing (for instance'),
        ("upstreams.'docker.io'.url = 'x'", "upstreams.\"docker.io\".url: 'x' is not http(s)://"),
        ("upstreams.'docker.io'.user = 'x'", '"docker.io".user: no such key (did you mean user'),
        ("upstreams.'docker.io'.username = 'x'", "username and password must be set together"),
        ("upstreams.'A/B'.url = 'x'", 'upstreams."A/B": not a registry name (write'),
        ("upstreams.go = 1", 'upstreams."go": expected a table (write'),
        ("upstreams = 1", "upstreams: expected a table (write [upstreams])"),
        ("x = ", "is not TOML: Invalid value"),
    ],
)
def test_an_error_names_file_key_reason_and_remedy(text, reason, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_text(text, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/pullcache.toml: ")
    assert reason in message
    assert "\n" not in message


def test_a_variable_with_an_old_name_is_an_error_that_names_the_new_one():
    with pytest.raises(ConfigError) as caught:
        load(None, {"PULLCACHE_FETCH_PARALLEL_BELOW": "1MB"}, {})
    assert str(caught.value) == (
        "PULLCACHE_FETCH_PARALLEL_BELOW: was renamed to PULLCACHE_FETCH_PARALLEL_MAX_RATE"
    )


def test_every_renamed_key_has_a_new_name_that_exists():
    paths = {key.path for key in iter_keys()}
    assert set(RENAMED_KEYS.values()) <= paths
    assert not RENAMED_KEYS.keys() & paths


def test_an_error_in_the_environment_names_the_variable():
    with pytest.raises(
        ConfigError, match=r"^PULLCACHE_FETCH_ATTEMPTS: fetch\.attempts: expected int"
    ):
        load(None, {"PULLCACHE_FETCH_ATTEMPTS": "many"}, {})
    with pytest.raises(ConfigError, match=r"did you mean PULLCACHE_STORE_MAX_SIZE\?"):
        load(None, {"PULLCACHE_STORE_MAXSIZE": "1GB"}, {})


def test_an_error_in_an_option_names_the_command_line():
    with pytest.raises(ConfigError, match=r"^command line: store\.max_size: '1XB' is not a size"):
        load(None, {}, {"store": {"max_size": "1XB"}})


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load(tmp_path / "nowhere.toml", {}, {})
    (tmp_path / "latin").write_bytes(b'log.level = "\xe4"')
    with pytest.raises(ConfigError, match="latin: is not UTF-8 text"):
        load(tmp_path / "latin", {}, {})


# Secrets.


CREDENTIALS = "[upstreams.'docker.io']\nusername = 'me'\n"


def test_passwords_are_redacted_in_every_output(tmp_path):
    config = load_text(f"{CREDENTIALS}password = 'hunter2'", tmp_path)
    assert config.upstreams["docker.io"].read_password() == "hunter2"
    for shown in (repr(config), str(config), to_toml(config), json.dumps(dump(config))):
        assert "hunter2" not in shown
        assert "***" in shown


def test_the_credentials_of_a_proxy_are_redacted_in_every_output(tmp_path):
    text = "[upstreams.'docker.io']\nproxy = 'http://bob:hunter2@proxy.test:3128/'"
    config = load_text(text, tmp_path)
    assert config.upstreams["docker.io"].proxy == "http://bob:hunter2@proxy.test:3128"
    for shown in (repr(config), str(config), to_toml(config), json.dumps(dump(config))):
        assert "hunter2" not in shown
        assert "http://***@proxy.test:3128" in shown


@pytest.mark.parametrize("value", ["'socks5://hunter2'", "'http://a:hunter2@b@c'", "['hunter2']"])
def test_an_error_does_not_quote_the_credentials_of_a_proxy(tmp_path, value):
    with pytest.raises(ConfigError, match=r"docker\.io\"\.proxy: ") as caught:
        load_text(f"[upstreams.'docker.io']\nproxy = {value}", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_mirrors_are_urls_without_a_path(tmp_path):
    text = "[upstreams.'docker.io']\nmirrors = ['https://mirror.test/', '{}']"
    config = load_text(text.format("http://[::1]:5000"), tmp_path)
    assert config.upstreams["docker.io"].mirrors == ("https://mirror.test", "http://[::1]:5000")
    with pytest.raises(ConfigError, match=r"mirrors\[1\]: .* is not http"):
        load_text(text.format("https://mirror.test/v2"), tmp_path)


def test_an_error_does_not_quote_a_password(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_text(f"{CREDENTIALS}password = ['hunter2']", tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_password_file_is_read_at_each_use(tmp_path):
    secret = tmp_path / "secret"
    config = load_text(f"{CREDENTIALS}password_file = '{secret}'", tmp_path)
    upstream = config.upstreams["docker.io"]
    with pytest.raises(ConfigError, match="secret: password_file: No such file"):
        upstream.read_password()
    secret.write_text("one\n", encoding="utf-8")
    assert upstream.read_password() == "one"
    secret.write_text("two", encoding="utf-8")
    assert upstream.read_password() == "two"


def test_password_and_password_file_are_mutually_exclusive(tmp_path):
    with pytest.raises(ConfigError, match=r"both set \(keep one\)"):
        load_text(f"{CREDENTIALS}password = 'a'\npassword_file = 'b'", tmp_path)


def test_credentials_from_more_than_one_place_are_an_error(tmp_path):
    for pair in ("credential_helper = 'x'", "docker_config = 'x'"):
        with pytest.raises(ConfigError, match="credentials are set more than once"):
            load_text(f"{CREDENTIALS}password = 'a'\n{pair}", tmp_path)
    with pytest.raises(ConfigError, match="credentials are set more than once"):
        load_text("[upstreams.'docker.io']\ncredential_helper='x'\ndocker_config='y'", tmp_path)


def test_a_url_with_credentials_is_an_error_that_does_not_quote_it(tmp_path):
    with pytest.raises(ConfigError, match="must not contain credentials") as caught:
        load_text("[upstreams.'docker.io']\nurl = 'https://me:hunter2@x.test'", tmp_path)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load(None, {"PULLCACHE_UPSTREAMS_DOCKER_IO_URL": "http://me:hunter2@x"}, {})
    assert "hunter2" not in str(caught.value)


# Output.


def test_the_toml_output_has_the_same_meaning(tmp_path):
    text = """
        [manifests.tag_ttl]
        "v[0-9]*" = "1h30m"
        [upstreams."ghcr.io:443"]
        url = "https://ghcr.io"
        hosts = ["mirror.example"]
    """
    config = load_text(text, tmp_path)
    assert load_text(to_toml(config), tmp_path) == config


def test_the_json_schema_describes_every_key_and_allows_no_other():
    schema = json_schema()
    for key in iter_keys():
        assert key.description.endswith((".", ".)"))
        part = schema
        for name in key.path.split("."):
            part = part.get("items", part)
            assert part["additionalProperties"] is not True
            if name == "<name>":
                part = part["additionalProperties"]
                continue
            part = part["properties"][name]
        assert part["description"] == key.description
    assert schema["additionalProperties"] is False


def test_the_json_schema_contains_the_defaults():
    store = json_schema()["properties"]["store"]["properties"]
    assert {name: key["default"] for name, key in store.items()} == {
        "path": "/var/cache/pullcache",
        "max_size": "50GB",
        "min_free": "1GB",
        "max_idle": "0s",
        "scrub": "30d",
        "group_access": False,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "https://index.docker.io"),
        ("url = 'https://registry-1.docker.io/'", "https://index.docker.io"),
        ("url = 'http://mirror.test:5000'", "http://mirror.test:5000"),
        ("search_url = 'https://search.test/'", "https://search.test"),
        ("url = 'http://mirror.test'\nsearch_url = 'https://search.test'", "https://search.test"),
    ],
)
def test_docker_hub_is_searched_at_its_search_host_or_the_configured_url(text, expected, tmp_path):
    config = load_text(f"[upstreams.'docker.io']\n{text}", tmp_path)
    assert config.get_search_url("docker.io") == expected


def test_other_upstreams_have_a_search_only_if_it_is_configured(tmp_path):
    text = "[upstreams.'quay.io']\nsearch_url = 'https://quay.io'\n[upstreams.'ghcr.io']"
    config = load_text(text, tmp_path)
    assert config.get_search_url("quay.io") == "https://quay.io"
    assert config.get_search_url("ghcr.io") == ""
    with pytest.raises(ConfigError, match="search_url: 'x' is not http"):
        load_text("[upstreams.'ghcr.io']\nsearch_url = 'x'", tmp_path)


def test_a_clash_of_whole_sections_has_one_colon_after_the_file(tmp_path):
    text = '[[rules]]\nimages = ["library/*"]\nttl = "1h"\n'
    with pytest.raises(ConfigError) as caught:
        load_text(text, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'pullcache.toml'}: rules[1].images: ")
