"""Parsing of sizes, durations, limits, addresses and URLs."""

import pytest
from hypothesis import given, strategies as st

from proxy.config import (
    Address,
    Duration,
    ProxyUrl,
    RegistryUrl,
    Size,
    StoreLimit,
    WebhookUrl,
)

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
DURATIONS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


@given(st.integers(0, 10**6), st.sampled_from(sorted(SIZES)), st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit(number, unit, gap):
    assert Size.parse(f"{number}{gap}{unit}") == number * SIZES[unit]


@given(st.integers(0, 2**63 - 1))
def test_the_text_of_a_size_parses_to_the_same_size(number):
    assert Size.parse(str(Size(number))) == number == Size.parse(number)


def test_a_size_may_have_decimals_if_it_is_a_whole_number_of_bytes():
    assert Size.parse("1.5GB") == 1_500_000_000
    with pytest.raises(ValueError, match="whole number of bytes"):
        Size.parse("1.5B")


@given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from(sorted(DURATIONS))), min_size=1))
def test_a_duration_is_the_sum_of_its_parts(parts):
    text = "".join(f"{number}{unit}" for number, unit in parts)
    assert Duration.parse(text) == pytest.approx(sum(n * DURATIONS[unit] for n, unit in parts))


@given(st.integers(0, 10**12))
def test_the_text_of_a_duration_parses_to_the_same_duration(milliseconds):
    assert Duration.parse(str(Duration(milliseconds / 1000))) == milliseconds / 1000


def test_a_number_without_a_unit_is_bytes_or_seconds():
    assert (Size.parse(42), Size.parse("42")) == (42, 42)
    assert (Duration.parse(42), Duration.parse("42")) == (42.0, 42.0)


@given(st.one_of(st.text(), st.integers(), st.booleans(), st.floats(), st.none()))
def test_any_value_is_parsed_or_raises_value_error(value):
    for kind in (Size, Duration, StoreLimit, Address, RegistryUrl):
        try:
            parsed = kind.parse(value)
        except ValueError:
            continue
        assert kind.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1XB", "1GB2", "9999999TB", "\u0663GB", True, 1.5]
)
def test_an_invalid_size_is_rejected(text):
    with pytest.raises(ValueError, match=r"size|bytes|string"):
        Size.parse(text)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1y", "1.5h", "1h 5m", "40000d", True])
def test_an_invalid_duration_is_rejected(text):
    with pytest.raises(ValueError, match=r"duration|hundred|string"):
        Duration.parse(text)


@given(st.integers(1, 100), st.integers(0, 2**60))
def test_a_percentage_is_of_the_whole_file_system(percent, total):
    assert StoreLimit.parse(f"{percent}%").to_bytes(total) == total * percent // 100


def test_a_limit_in_bytes_does_not_depend_on_the_file_system():
    assert StoreLimit.parse("20MB").to_bytes(1) == 20_000_000


@pytest.mark.parametrize("text", ["0%", "101%", "0", 10, "50", "-5%", "1.5%"])
def test_a_limit_of_nothing_or_more_than_everything_is_rejected(text):
    with pytest.raises(ValueError, match=r"percentage|less than|size"):
        StoreLimit.parse(text)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5000", "127.0.0.1", 5000),
        ("[::]:0", "::", 0),
        (":80", "", 80),
        ("localhost:65535", "localhost", 65535),
    ],
)
def test_an_address_has_a_host_and_a_port(text, host, port):
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)


@pytest.mark.parametrize(
    "text", ["5000", "localhost", "::1:5000", "a:65536", "a b:1", "http://a:1"]
)
def test_an_invalid_address_is_rejected(text):
    with pytest.raises(ValueError, match="host:port"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("http://proxy.test", "http://proxy.test"),
        ("HTTP://10.0.0.1:3128/", "HTTP://10.0.0.1:3128"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("http://u:p%40@proxy.test:3128", "http://***@proxy.test:3128"),
        ("http://u@proxy.test", "http://***@proxy.test"),
    ],
)
def test_the_secret_of_a_proxy_url_is_its_credentials(text, shown):
    proxy = ProxyUrl.parse(text)
    assert proxy.redacted == shown
    assert repr(proxy) == repr(shown)


@pytest.mark.parametrize(
    "text",
    ["proxy.test:1", "https://p", "http://", "http://a/b", "http://a:65536", "http://127.1", "a b"],
)
def test_an_invalid_proxy_url_is_rejected(text):
    with pytest.raises(ValueError, match="not a proxy URL"):
        ProxyUrl.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "ghcr.io",
        "ftp://ghcr.io",
        "https://ghcr.io/v2",
        "https://u:p@ghcr.io",
        "https://a?b",
        "http://127.1:5000",
        "http://2130706433",
        "http://[::1::]",
    ],
)
def test_a_registry_url_consists_of_scheme_host_and_port_only(text):
    with pytest.raises(ValueError, match=r"http|credentials"):
        RegistryUrl.parse(text)
    assert RegistryUrl.parse("http://[::1]:5000/") == "http://[::1]:5000"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("https://hooks.example", "https://hooks.example"),
        ("https://hooks.example:8443/T0/secret?x=1", "https://hooks.example:8443/***"),
        ("http://[::1]:80?token=a", "http://[::1]:80/***"),
    ],
)
def test_the_path_of_a_webhook_is_not_shown(url, shown):
    assert WebhookUrl.parse(url).redacted == shown
    assert WebhookUrl.parse(url) == url


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "https://a:99999/", "https://u:CANARY@a/b", "a/CANARY", "http://127.1/"]
)
def test_a_wrong_webhook_is_not_quoted(url):
    with pytest.raises(ValueError, match="webhook") as raised:
        WebhookUrl.parse(url)
    assert "CANARY" not in str(raised.value)
